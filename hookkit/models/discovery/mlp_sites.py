"""Where the sites of the MLP are in a block, by value: its last projection, its activation, its router."""

from torch import Tensor

from ..families.schema import ModuleLocation
from ..families.shared import DENSE, NEURONS
from .attention_sites import UNPROVED
from .dry_run import Visit
from .matching import same
from .residual_sites import Block


def read_mlp(block: Block) -> None:
    """Find mlp_in, mlp_pre, mlp_post, and what a router says."""
    mlp = _mlp(block)
    inside = _inside(block, mlp)
    last = next((visit for visit in inside[::-1] if visit.linear), None)
    _router(block, inside)
    if not inside or (mlp is None and (block.mlp_term is None or last is None)):
        for name in ("mlp_in", "mlp_pre", "mlp_post"):
            block.missing[name] = UNPROVED + "no MLP was seen in this block"
        return
    _reads(block, mlp, inside)
    ends = last is not None and _ends(block, mlp, last)
    if last is None or not ends:
        mixed = any("expert" in name for name, _ in (mlp or block.visit).module.named_modules())
        why = UNPROVED + "the MLP's last matrix, if it has one, does not give what the MLP gives"
        block.missing |= NEURONS if mixed else dict.fromkeys(NEURONS, why)
        return
    block.places["mlp_post"] = ModuleLocation(last.path, "input", flat=_flat(last.read))
    _before(block, inside, last)


def _mlp(block: Block) -> Visit | None:
    """The outermost module that holds the MLP's matrices; None where they stand in the block themselves."""
    watched, attends = block.watched, block.attends
    holds = []
    for visit in watched.inside(block.visit):
        outermost = visit.above[-1] is block.visit
        if (
            not outermost
            or visit.linear
            or visit is attends
            or (attends and visit in attends.above)
        ):
            continue
        if _wide(visit) and watched.once(visit):
            holds.append(visit)
    term = block.mlp_term
    if term is not None:
        given = [visit for visit in holds if visit in term.given.visits or term.given.under(visit)]
        before = [visit for visit in holds if visit.end <= term.given.visits[-1].end]
        after_attention = [
            visit for visit in before if attends is None or visit.start > attends.end or given
        ]
        linears = [v for v in term.given.visits if v.linear and v.above[-1] is block.visit]
        return None if linears else (given or after_attention or [None])[-1]
    after = [visit for visit in holds if attends is not None and visit.start > attends.end]
    return after[0] if len(after) == 1 else None


def _wide(visit: Visit) -> bool:
    """True where a module or one in it has a matrix."""
    return any(weight.ndim > 1 for weight in visit.module.parameters())


def _inside(block: Block, mlp: Visit | None) -> list[Visit]:
    """The calls in the MLP; without a module of its own, those of the block outside attention."""
    watched, attends = block.watched, block.attends
    if mlp is not None:
        return watched.inside(mlp)
    if block.mlp_term is None:
        return []
    end = block.mlp_term.given.visits[-1].end
    return [
        visit
        for visit in watched.inside(block.visit)
        if attends is not None
        and visit.start > attends.end
        and visit.end <= end
        and watched.once(visit)
    ]


def _reads(block: Block, mlp: Visit | None, inside: list[Visit]) -> None:
    """mlp_in: what the MLP's module is given, if a matrix in it reads that; else what the first matrix reads."""
    first = next((visit for visit in inside if visit.linear), None)
    into = mlp or first
    value = block.watched.laid(into.read) if into else None
    known = mlp is None or any(
        same(visit.read, value) for visit in inside if visit.linear or _wide(visit)
    )
    if into is None or value is None or value.shape[-1] != block.pre.shape[-1] or not known:
        block.missing["mlp_in"] = UNPROVED + "no matrix of the MLP reads what its module is given"
        return
    block.places["mlp_in"] = ModuleLocation(into.path, "input", flat=_flat(into.read))


def _ends(block: Block, mlp: Visit | None, last: Visit) -> bool:
    """True where the last matrix gives what the MLP gives, so that it reads all neurons of each token."""
    if not block.watched.once(last) or block.watched.laid(last.read) is None:
        return False
    given = block.mlp_term.given.value if block.mlp_term else None
    return same(last.result, given) or (mlp is not None and same(last.result, mlp.result))


def _before(block: Block, inside: list[Visit], last: Visit) -> None:
    """mlp_pre: the matrix whose output, or a half of it, goes into an activation."""
    bent = _bent(block, inside)
    width = (last.read.shape[-1] if last.read is not None else 0) or 0
    for visit in inside:
        output = block.watched.laid(visit.result) if visit.linear and visit is not last else None
        if output is None or not block.watched.once(visit):
            continue
        halves = output.split(width, dim=-1) if output.shape[-1] == 2 * width else (output,)
        for part, half in enumerate(halves):
            if half.shape[-1] == width and any(same(half, each) for each in bent):
                cut = "d_mlp | d_mlp" if len(halves) == 2 else ""
                block.places["mlp_pre"] = ModuleLocation(
                    visit.path, cut=cut, part=part, flat=_flat(visit.result)
                )
                return
    block.missing["mlp_pre"] = UNPROVED + "no matrix's output is what the MLP's activation reads"


def _bent(block: Block, inside: list[Visit]) -> list[Tensor]:
    """What the activations of the MLP read."""
    found = []
    for visit in inside:
        leaf = not visit.linear and not any(True for _ in visit.module.children())
        normed = "norm" in type(visit.module).__name__.lower()
        if leaf and not normed and visit.read is not None and not same(visit.read, visit.result):
            found.append(visit.read)
    owners = {id(visit): visit for each in inside for visit in (each, each.above[-1])}
    steps = [step for visit in owners.values() for step in visit.steps if step.kind == "activation"]
    return found + [step.given[0] for step in steps if step.given]


def _router(block: Block, inside: list[Visit]) -> None:
    """A module that says of each token how much each expert is worth, and which are chosen."""
    block.missing |= dict.fromkeys(DENSE, "no router was seen in this block's MLP")
    for visit in inside:
        logits = _logits(block, visit)
        if logits is None:
            continue
        block.places["router_logits"] = ModuleLocation(visit.path, "inside", "router", flat=True)
        if len(visit.gave) == 3 and _choice(visit.gave[1], visit.gave[2], logits):
            block.places["expert_weights"] = ModuleLocation(visit.path, item=1, flat=True)
            block.places["experts"] = ModuleLocation(visit.path, item=2, flat=True)
        else:
            why = UNPROVED + f"the router {visit.name!r} does not give logits, weights and indices"
            block.missing |= dict.fromkeys(("expert_weights", "experts"), why)
        return


def _logits(block: Block, visit: Visit) -> Tensor | None:
    """A router's logits, [tokens, expert]: what the first linear map in it gives."""
    tensors = [each for each in visit.gave if each is not None]
    if len(tensors) < 2 or not block.watched.once(visit) or len(tensors) != len(visit.gave):
        return None
    logits = next((step.gave for step in block.watched.steps(visit) if step.kind == "linear"), None)
    tokens = block.watched.rows * block.watched.width
    if logits is None or logits.ndim != 2 or len(logits) != tokens:
        return None
    return logits if any(each.shape == logits.shape for each in tensors) else None


def _choice(weights: Tensor, chosen: Tensor, logits: Tensor) -> bool:
    """True for a weight and a number of an expert for each token and choice."""
    whole = (
        not chosen.is_floating_point()
        and weights.is_floating_point()
        and weights.shape == chosen.shape
    )
    return (
        whole
        and len(chosen) == len(logits)
        and chosen.ndim == 2
        and chosen.shape[-1] <= logits.shape[-1]
    )


def _flat(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.ndim == 2
