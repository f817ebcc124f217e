"""Where the sites of attention are in a block, by value: what attention multiplied is looked for in what its
projections gave."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..attention import squares
from ..families.schema import ModuleLocation
from ..families.shared import OWN, UNTURNED
from .dry_run import Step, Visit, Watched
from .matching import Match, heads_in, ratio, same

HEADED = ("q", "k", "v", "q_rot", "k_rot", "scores", "pattern", "z")
UNPROVED = "hookkit could not prove where it is: "


@dataclass
class Attention:
    """The attention of one block: its call, what it multiplied [batch, head, pos, d_head], and its places."""

    visit: Visit
    style: str
    query: Tensor
    key: Tensor
    value: Tensor
    scores: Tensor | None
    pattern: Tensor | None
    sizes: dict[str, int | None] = field(default_factory=dict)
    places: dict[str, ModuleLocation] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    out: Visit | None = None  # the output projection
    by_head: bool = True  # scores and pattern stand as [batch, head, query, key]
    repeated: bool = False  # keys and values are given to attention once for each query's head
    turned: bool = True  # q_rot and k_rot are other than q and k


def attention_of(watched: Watched, block: Visit) -> Attention | str:
    """The attention of a block with its places, or the reason why there is none."""
    found = [visit for visit in watched.inside(block) if "query" in visit.heads]
    made = [_through_interface(visit) for visit in found] or _own(watched, block)
    if not made:
        return "no attention (a softmax of queries by keys) was seen in this block"
    if len(made) > 1:
        return f"this block has {len(made)} attentions, and one is meant"
    (attention,) = made
    if not watched.once(attention.visit):
        return "the module of this block's attention runs in several blocks, so that its calls cannot be told apart"
    _measure(attention)
    _projections(watched, attention)
    _output(watched, attention)
    _squares(watched, attention)
    return attention


def _through_interface(visit: Visit) -> Attention:
    heads = visit.heads
    return Attention(
        visit,
        "interface",
        heads["query"],
        heads["key"],
        heads["value"],
        heads.get("scores"),
        heads.get("pattern"),
    )


def _own(watched: Watched, block: Visit) -> list[Attention]:
    """The attention that a family computes in its own code."""
    found = []
    for visit in (block, *watched.inside(block)):
        for step in visit.steps:
            if not _square(step, watched):
                continue
            owner = next(
                (
                    v
                    for v in (visit, *visit.above[::-1])
                    if any(w.linear for w in watched.inside(v))
                ),
                None,
            )
            if owner is None or owner is block or block not in owner.above:
                continue
            made = (
                _of_fused(owner, step)
                if step.kind == "fused"
                else _of_softmax(watched, owner, step)
            )
            if made is not None:
                found.append(made)
    return found


def _square(step: Step, watched: Watched) -> bool:
    """True for a softmax over keys, or torch's fused attention."""
    shape = step.gave.shape
    if step.kind == "fused":
        return len(step.given) >= 3
    return (
        step.kind == "softmax"
        and len(shape) in (3, 4)
        and shape[-2:] == (watched.width, watched.width)
        and (shape[0] == watched.rows if len(shape) == 4 else shape[0] > watched.rows)
    )


def _of_fused(owner: Visit, step: Step) -> Attention | None:
    query, key, value = step.given[:3]
    if query.ndim != 4:
        return None
    keys = key.shape[1]
    shared = query.shape[1] // keys
    wide = (
        [each.repeat_interleave(shared, dim=1) for each in (key, value)]
        if shared > 1
        else [key, value]
    )
    settings = {name: value for name, value in step.keywords.items() if name != "enable_gqa"}
    made = squares(query, *wide, *step.given[3:], **settings)
    return Attention(owner, "own", query, key, value, made["scores"], made["pattern"])


def _of_softmax(watched: Watched, owner: Visit, softmax: Step) -> Attention | None:
    """The operands of the two products around a softmax."""
    rows, width = watched.rows, watched.width
    products = [
        step for step in watched.steps(owner) if step.kind == "product" and len(step.given) > 1
    ]
    before = [
        s for s in products if s.start < softmax.start and s.gave.shape[-2:] == (width, width)
    ]
    after = [
        s
        for s in products
        if s.start > softmax.start and same(s.given[-2], softmax.gave.to(s.given[-2].dtype))
    ]
    if not before or not after:
        return None
    by_head = [
        tensor.reshape(rows, -1, *tensor.shape[-2:])
        for tensor in (
            before[-1].given[-2],
            before[-1].given[-1].transpose(-1, -2),
            after[0].given[-1],
        )
    ]
    squares = [each.reshape(rows, -1, width, width) for each in (softmax.given[0], softmax.gave)]
    query, key, value = by_head
    scores, pattern = squares
    return Attention(
        owner, "own", query, key, value, scores, pattern, by_head=softmax.gave.ndim == 4
    )


def _unique(tensor: Tensor, *with_it: Tensor) -> int:
    """How many heads [batch, head, …] there are that differ: some families repeat one for the queries that share it."""
    heads = tensor.shape[1]
    for kept in range(1, heads):
        if heads % kept:
            continue
        both = [each.unflatten(1, (kept, heads // kept)) for each in (tensor, *with_it)]
        if all(torch.equal(each, each[:, :, :1].expand_as(each)) for each in both):
            return kept
    return heads


def _measure(found: Attention) -> None:
    heads, kept = found.query.shape[1], _unique(found.key, found.value)
    if found.key.shape[1] != kept:
        found.repeated = True
        found.key = found.key[:, :: found.key.shape[1] // kept]
        found.value = found.value[:, :: found.value.shape[1] // kept]
    d_qk, d_v = found.query.shape[-1], found.value.shape[-1]
    found.sizes = {
        "head": heads,
        "kv_head": kept,
        "d_head": d_v,
        "d_qk": d_qk,
        "d_v": d_v,
        "share": heads // kept,
        "quarter": heads // 4,
    }


def _projections(watched: Watched, found: Attention) -> None:
    """q, k, v, and whether they are turned before they are multiplied."""
    targets = {"q": found.query, "k": found.key, "v": found.value}
    turned = {}
    for name, tensor in targets.items():
        where = _projection(watched, found, tensor.transpose(1, 2), rotates=name != "v")
        if where is None:
            found.missing[name] = (
                f"{UNPROVED}no projection in {type(found.visit.module).__name__} gives what attention multiplies"
            )
            continue
        visit, heads = where
        turned[name] = heads.turned
        if watched.laid(visit.result) is not None:
            found.places[name] = ModuleLocation(
                visit.path, cut=heads.cut, part=heads.part, flat=_flat(visit.result)
            )
        elif name == "v" and found.style == "interface" and not heads.turned:
            found.places[name] = ModuleLocation(found.visit.path, "inside", "value")
        else:
            found.missing[name] = (
                f"the output of its projection {visit.name!r}, where it stands, is not [batch, pos, …]"
            )
    found.turned = turned.get("q", True) or turned.get("k", True)
    path = found.visit.path
    names: tuple[tuple[Literal["q_rot", "k_rot"], str], ...] = (
        ("q_rot", "query"),
        ("k_rot", "key"),
    )
    for name, item in names:
        if not found.turned:
            found.missing[name] = UNTURNED[name]
        elif found.style == "own":
            found.missing[name] = OWN[name]
        else:
            found.places[name] = ModuleLocation(path, "inside", item)
    if found.repeated and "k_rot" in found.places:
        found.places.pop("k_rot")
        found.missing["k_rot"] = (
            UNPROVED + "keys are repeated for each query's head before attention is given them"
        )


def _projection(
    watched: Watched, found: Attention, target: Tensor, *, rotates: bool
) -> tuple[Visit, Match] | None:
    """The projection that some heads [batch, pos, head, d_head] come from, directly or through a norm."""
    inside = watched.inside(found.visit)
    for visit in inside:
        output = _spread(watched, visit.result) if visit.linear and watched.once(visit) else None
        heads = None if output is None else heads_in(output, target, found.sizes, rotates)
        if heads is not None:
            return visit, Match(
                heads.cut, heads.part, heads.turned or not _everywhere(output, heads, target, found)
            )
    for visit in inside:
        if visit.linear or watched.inside(visit):
            continue
        for before, after in zip(
            _by_head(visit.read, target), _by_head(visit.result, target), strict=False
        ):
            gave = after[:, :1] if rotates else after
            if ratio(gave, target[:, :1] if rotates else target) is None or same(before, target):
                continue
            where = _projection(watched, found, before, rotates=rotates)
            if where is not None:
                return where[0], Match(where[1].cut, where[1].part, turned=True)
    return None


def _spread(watched: Watched, tensor: Tensor | None) -> Tensor | None:
    """A projection's output as [batch, pos, …], also where it stands as one head [batch, 1, pos, …]."""
    if tensor is not None and tensor.ndim == 4 and tensor.shape[1] == 1:
        tensor = tensor[:, 0]
    return watched.laid(tensor)


def _everywhere(output: Tensor | None, heads: Match, target: Tensor, found: Attention) -> bool:
    return output is not None and heads_in(output, target, found.sizes, rotates=False) is not None


def _by_head(tensor: Tensor | None, target: Tensor) -> list[Tensor]:
    """What a norm reads or gives, as [batch, pos, head, d_head], in each way that it may be meant."""
    if tensor is None or tensor.numel() != target.numel():
        return []
    batch, pos, heads, d = target.shape
    if tensor.ndim == 4 and tensor.shape == (batch, heads, pos, d):
        return [tensor.transpose(1, 2)]
    return [tensor.reshape(target.shape)]


def _output(watched: Watched, found: Attention) -> None:
    """attn_in, and z: what the last projection reads, if it is the heads' values, weighted."""
    inside = [
        visit for visit in watched.inside(found.visit) if visit.linear and watched.once(visit)
    ]
    given = watched.laid(found.visit.read)
    if given is not None and any(same(visit.read, given) for visit in inside):
        found.places["attn_in"] = ModuleLocation(
            found.visit.path, "input", flat=_flat(found.visit.read)
        )
    else:
        found.missing["attn_in"] = (
            UNPROVED + "no projection of attention reads what the module is given first"
        )
    out = found.out = inside[-1] if inside else None
    reads = None if out is None else watched.laid(out.read)
    if out is None or reads is None or not _weighted(found, reads):
        found.missing["z"] = (
            UNPROVED + "the last projection of attention does not read the heads' outputs in order"
        )
        return
    name = "d_head" if found.sizes["d_qk"] == found.sizes["d_v"] else "d_v"
    found.places["z"] = ModuleLocation(out.path, "input", cut=f"head {name}", flat=_flat(out.read))


def _weighted(found: Attention, reads: Tensor) -> bool:
    """True where numbers [batch, pos, …] are each head's weighted values, perhaps gated or normed: signs then stay."""
    heads, d = found.query.shape[1], found.value.shape[-1]
    if reads.shape[-1] != heads * d:
        return False
    pattern = found.pattern
    if pattern is None:
        return False
    value = found.value.repeat_interleave(heads // found.value.shape[1], dim=1).double()
    expected = (pattern.double() @ value).transpose(1, 2).flatten(2)
    signs = expected.sign() == reads.double().sign()
    return ratio(reads, expected) is not None or float(signs.double().mean()) > 0.98


def _squares(watched: Watched, found: Attention) -> None:
    """Scores and pattern, where hookkit's own way to them ends at the attention's softmax."""
    path = found.visit.path
    for name in ("scores", "pattern"):
        if getattr(found, name) is not None and found.by_head and _first(watched, found):
            found.places[name] = ModuleLocation(path, "inside", name)
        else:
            why = watched.unopened or "the softmax of this attention was not seen, or not by head"
            found.missing[name] = UNPROVED + why


def _first(watched: Watched, found: Attention) -> bool:
    """True where the attention's softmax is the first in its module."""
    if found.style == "interface":
        return True
    first = next(step for step in watched.steps(found.visit) if step.kind in ("softmax", "fused"))
    if first.kind == "fused":
        return first.given[1].shape[1] in (
            1,
            first.given[0].shape[1],
        )  # heads in groups are not written out
    return same(first.gave, found.pattern)


def _flat(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.ndim == 2
