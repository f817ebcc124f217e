"""Same values or not: sums in the stream, and heads in a projection's output."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..families.schema import ModuleLocation, cut
from ..views import FusedView

ROUGH = 1e-5


def tolerance(tensor: Tensor) -> float:
    """How far two computations of the same number may be apart, relative to what they are made of."""
    return max(ROUGH, 2 * torch.finfo(tensor.dtype).eps) if tensor.is_floating_point() else 0.0


def same(found: Tensor | None, expected: Tensor | None) -> bool:
    """True for the same numbers in the same order, whatever the axes are."""
    if (
        found is None
        or expected is None
        or found.numel() != expected.numel()
        or found.dtype != expected.dtype
    ):
        return False
    return torch.equal(found.reshape(-1), expected.reshape(-1))


def apart(parts: list[Tensor], total: Tensor) -> float:
    """How far the sum of the parts is from the total, relative to the size of what is added, at the worst number."""
    added, size = parts[0], parts[0].abs()
    for part in parts[1:]:
        added, size = added + part, size + part.abs()
    return float(
        ((added - total).abs() / (size + total.abs()).clamp(min=1e-20)).max().nan_to_num(nan=1e9)
    )


def sums(parts: list[Tensor], total: Tensor) -> bool:
    """True where the parts add up to the total."""
    return all(part.shape == total.shape for part in parts) and apart(parts, total) <= tolerance(
        total
    )


def ratio(found: Tensor, expected: Tensor) -> float | None:
    """The one number by which `found` has to be multiplied to give `expected`, or None."""
    found, expected = found.double(), expected.double()
    square = float((found * found).sum())
    factor = float((found * expected).sum()) / square if square else 0.0
    rough = max(ROUGH, float(expected.abs().max()) * ROUGH)
    near = factor != 0 and float((found * factor - expected).abs().max()) <= rough
    return factor if near else None


@dataclass(frozen=True)
class Match:
    """Where in a projection's output some heads are. `turned` is true where what attention was given is not that
    output itself, but normed or rotated."""

    cut: str
    part: int
    turned: bool


def heads_in(
    output: Tensor, target: Tensor, sizes: dict[str, int | None], rotates: bool
) -> Match | None:
    """Where in an output [batch, pos, …] the heads [batch, pos, head, d_head] are.

    With `rotates` the first position decides, where a rotation is the identity (but may reorder a head's numbers).
    """
    for layout in _layouts(output.shape[-1], target.shape[2], target.shape[3], sizes):
        for part in range(layout.count("|") + 1):
            found = _part(output, layout, part, sizes)
            if found is None or found.shape != target.shape:
                continue
            if ratio(found, target) is not None:
                return Match(layout, part, turned=False)
            if rotates and _alike(found[:, 0], target[:, 0]):
                return Match(layout, part, turned=True)
    return None


def _alike(found: Tensor, target: Tensor) -> bool:
    if ratio(found, target) is not None:
        return True
    return ratio(found.sort(dim=-1).values, target.sort(dim=-1).values) == 1.0 or _same_numbers(
        found, target
    )


def _same_numbers(found: Tensor, target: Tensor) -> bool:
    factor = ratio(found.sort(dim=-1).values, target.sort(dim=-1).values)
    return factor is not None and abs(factor - 1) < ROUGH


def _part(output: Tensor, layout: str, part: int, sizes: dict[str, int | None]) -> Tensor | None:
    numbers = cut(ModuleLocation("", cut=layout, part=part), sizes)
    if (
        not numbers.total
        or numbers.outer * numbers.total != output.shape[-1]
        or numbers.inner is None
    ):
        return None
    form = FusedView(cut=numbers)
    found = form.view(output)
    found = found.flatten(2, 3) if found.ndim == 5 else found
    return found if found.ndim == 4 else None


def _layouts(width: int, heads: int, d: int, sizes: dict[str, int | None]) -> Iterator[str]:
    """The ways in which families lay out their projections, then any place for these heads in a row of that width."""
    q, v = ("d_head", "d_head") if sizes["d_qk"] == sizes["d_v"] else ("d_qk", "d_v")
    one = q if d == sizes["d_qk"] else v
    word = "head" if heads == sizes["head"] else "kv_head"
    yield f"{word} {one}"
    yield f"head {q} | kv_head {q} | kv_head {v}"
    yield f"head: {q} | {q} | {v}"
    yield f"kv_head: share {q} | {q} | {v}"
    yield f"4: quarter {q} | quarter {v} | quarter {q}"
    yield f"head: {q} | {q}"
    yield f"kv_head {q} | kv_head {v}"
    yield f"kv_head: {q} | {v}"
    rest, each = width - heads * d, width // heads - d
    if each > 0 and not width % heads:
        yield from (f"{word}: {one} | {each}", f"{word}: {each} | {one}")
    if rest > 0:
        yield from (f"{word} {one} | {rest}", f"{rest} | {word} {one}")
