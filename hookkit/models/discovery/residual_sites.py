"""What a block adds to the residual stream, by value: the outputs A and M of which resid_pre + A + M is resid_post."""

import itertools
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..families.schema import ModuleLocation
from ..families.shared import PARALLEL
from .attention_sites import UNPROVED, Attention
from .dry_run import Visit, Watched
from .matching import apart, same, sums, tolerance

SUM = "the block adds more to the stream than what attention and the MLP give, or multiplies it"


@dataclass(eq=False)
class Given:
    """One tensor [batch, pos, d_model] that modules of a block gave, and the calls that gave it."""

    value: Tensor
    visits: list[Visit]

    def under(self, owner: Visit | None) -> bool:
        """True where it was given by this call, or inside it."""
        return owner is not None and any(
            visit is owner or owner in visit.above for visit in self.visits
        )


@dataclass(eq=False)
class Term:
    """What is added: a tensor, multiplied by a number that the block has under a name."""

    given: Given
    times: str
    value: Tensor


@dataclass(eq=False)
class Block:
    """One block: its call, its stream, and what was found of it."""

    watched: Watched
    visit: Visit
    attention: Attention | None
    pre: Tensor
    post: Tensor
    places: dict[str, ModuleLocation] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    exceptions: dict[str, str] = field(default_factory=dict)
    mlp_term: Term | None = None

    @property
    def attends(self) -> Visit | None:
        return self.attention.visit if self.attention else None


def follow(block: Block) -> None:
    """Find attn_out, mlp_out and resid_mid."""
    terms = _terms(block)
    first, second = _pair(block, terms)
    if first is None and second is None:
        first, mid = _read_first(block, terms)
        second, base = _read_second(block, terms, mid)
        mid = mid if mid is not None else base
        if first is not None and second is not None:
            block.exceptions["sum"] = SUM
    else:
        mid = None if first is None or second is None else block.pre + first.value
    _place(block, "attn_out", first)
    _place(block, "mlp_out", second)
    block.mlp_term = second
    _between(block, first, second, mid)


def _terms(block: Block) -> list[Term]:
    """All that may be added: each tensor that a module gave, times 1 or a number that the block has."""
    kept: list[Given] = []
    for visit in block.watched.inside(block.visit):
        value = block.watched.laid(visit.result)
        if value is None or value.shape != block.pre.shape or not block.watched.once(visit):
            continue
        known = next((given for given in kept if same(given.value, value)), None)
        if known is None:
            kept.append(Given(value, [visit]))
        else:
            known.visits.append(visit)
    return [
        Term(given, name, given.value * factor)
        for given in kept
        for name, factor in _factors(block).items()
    ]


def _factors(block: Block) -> dict[str, float]:
    numbers: dict[str, Any] = {"": 1.0}
    for name, value in vars(block.visit.module).items():
        if isinstance(value, float) and value not in (0.0, 1.0):
            numbers[name] = value
    return numbers


def _order(term: Term) -> int:
    return term.given.visits[-1].start


def _attentive(block: Block, term: Term) -> bool:
    """True for what attention gave, or what came after it."""
    attends = block.attends
    return attends is None or term.given.under(attends) or _order(term) > attends.end


def _pair(block: Block, terms: list[Term]) -> tuple[Term | None, Term | None]:
    """The A and M of which pre + A + M is post, or A alone where the block adds one thing."""
    found = [
        (apart([block.pre, first.value, second.value], block.post), number, first, second)
        for number, (first, second) in enumerate(itertools.product(terms, terms))
        if _may_be(block, first, second)
    ]
    if found:
        far, _, first, second = min(found, key=lambda each: each[:2])
        if far <= tolerance(block.post):
            return first, second
    return _alone(block, terms), None


def _may_be(block: Block, first: Term, second: Term) -> bool:
    """True where the first may be attention's part and the second the MLP's."""
    from_attention = first.given.under(block.attends)
    if (
        second.given is first.given
        or second.given.under(block.attends)
        or not _attentive(block, first)
    ):
        return False
    if _order(second) < _order(first) and not from_attention:
        return False
    return not _nested(first, second) and (
        block.attends is not None or not _together(block, first, second)
    )


def _alone(block: Block, terms: list[Term]) -> Term | None:
    """A where pre + A is post and A is attention's; else None, and the reason is written down."""
    alone = next((term for term in terms if sums([block.pre, term.value], block.post)), None)
    if alone is None:
        return None
    if alone.given.under(block.attends):
        why = "the block has no MLP: it adds what attention gives, and nothing more"
        block.missing |= dict.fromkeys(("mlp_out", "resid_mid"), why)
        return alone
    adds = _chosen(block, alone.given).name
    why = f"the block adds one thing, what its module {adds!r} gives: reach it with hk.module"
    block.missing |= dict.fromkeys(("attn_out", "mlp_out", "resid_mid"), why)
    return None


def _nested(first: Term, second: Term) -> bool:
    """True where one is computed inside the other."""
    return any(
        all(any(v in w.above for w in outer.given.visits) for v in inner.given.visits)
        for outer, inner in ((first, second), (second, first))
    )


def _together(block: Block, first: Term, second: Term) -> bool:
    """True where both come from one module of the block, as those of a mixture of experts with a shared one do."""
    depth = len(block.visit.above) + 1
    tops = [
        {(*visit.above, visit)[depth] for visit in term.given.visits} for term in (first, second)
    ]
    return bool(tops[0] & tops[1])


def _reads(block: Block) -> list[tuple[Visit, Tensor]]:
    """What the modules of the block outside attention read of the stream."""
    found = []
    for visit in block.watched.inside(block.visit):
        value = block.watched.laid(visit.read)
        attends = block.attends
        outside = attends is None or (visit is not attends and attends not in visit.above)
        if value is not None and value.shape == block.pre.shape and outside:
            found.append((visit, value))
    return found


def _read_first(block: Block, terms: list[Term]) -> tuple[Term | None, Tensor | None]:
    """A where a later module reads pre + A."""
    for term in terms:
        if not _attentive(block, term):
            continue
        total = block.pre + term.value
        after = max(_order(term), block.attends.end if block.attends else 0)
        for visit, value in _reads(block):
            if visit.start > after and sums([block.pre, term.value], value):
                return term, total
    return None, None


def _read_second(
    block: Block, terms: list[Term], mid: Tensor | None
) -> tuple[Term | None, Tensor | None]:
    """M where mid + M is post or read by a later module; mid may be what any module after attention reads."""
    ended = block.attends.end if block.attends else 0
    reads = _reads(block)
    bases = [mid] if mid is not None else [v for visit, v in reads if ended and visit.start > ended]
    for base in bases:
        if same(base, block.pre):
            continue
        for term in terms:
            if term.given.under(block.attends) or _order(term) < ended:
                continue
            if sums([base, term.value], block.post):
                return term, base
            later = (
                [value for visit, value in reads if visit.start > _order(term)]
                if mid is not None
                else []
            )
            if any(sums([base, term.value], value) for value in later):
                return term, base
    return None, None


def _chosen(block: Block, given: Given) -> Visit:
    """Of several modules that give the same: attention, the MLP (the one that holds others), or else the last."""
    attends = next((visit for visit in given.visits if visit is block.attends), None)
    holds = [
        visit
        for visit in given.visits
        if block.watched.inside(visit) and not _in_attention(block, visit)
    ]
    return attends or (holds[0] if holds else given.visits[-1])


def _in_attention(block: Block, visit: Visit) -> bool:
    return block.attends is not None and block.attends in visit.above


def _place(block: Block, name: str, term: Term | None) -> None:
    if term is None:
        what = "attention" if name == "attn_out" else "the MLP"
        why = f"{UNPROVED}no module's output, as {what}'s part of what the block adds, gives resid_post"
        block.missing.setdefault(name, why)
        return
    visit = _chosen(block, term.given)
    flat = visit.result is not None and visit.result.ndim == 2
    block.places[name] = ModuleLocation(visit.path, flat=flat, times=term.times)
    if name == "attn_out" and block.attention is None:
        _place_read(block, visit)


def _place_read(block: Block, visit: Visit) -> None:
    """attn_in of what stands in attention's place: a convolution, or linear attention."""
    inside = block.watched.inside(visit)
    if visit.read is not None and any(
        same(each.read, visit.read) for each in inside if each.linear
    ):
        block.places["attn_in"] = ModuleLocation(visit.path, "input", flat=visit.read.ndim == 2)


def _between(block: Block, first: Term | None, second: Term | None, mid: Tensor | None) -> None:
    """resid_mid: what a module reads between attention and the MLP."""
    if mid is None:
        why = "it is the sum of resid_pre and attn_out, and not both of attn_out and mlp_out were found"
        block.missing.setdefault("resid_mid", UNPROVED + why)
        return
    after = max(_order(first) if first else 0, block.attends.end if block.attends else 0)
    scale = [block.pre, first.value] if first else [mid]
    for visit, value in _reads(block):
        if visit.start > after and block.watched.once(visit) and sums(scale, value):
            flat = visit.read is not None and visit.read.ndim == 2
            block.places["resid_mid"] = ModuleLocation(visit.path, "input", shared=True, flat=flat)
            return
    block.missing |= PARALLEL
