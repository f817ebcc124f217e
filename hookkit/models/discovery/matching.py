"""Comparisons by value: equal tensors, sums in the residual stream, heads in projections."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..families.schema import ModuleLocation, split_axis
from ..layout import FusedView

RELATIVE_TOLERANCE = 1e-5


def tolerance(tensor: Tensor) -> float:
    """Returns how far two computations of the same tensor may differ, relative to their terms."""
    if not tensor.is_floating_point():
        return 0.0
    return max(RELATIVE_TOLERANCE, 2 * torch.finfo(tensor.dtype).eps)


def equal_values(first: Tensor | None, second: Tensor | None) -> bool:
    """True if both have the same numbers in the same order. Their axes may differ."""
    if first is None or second is None:
        return False
    if first.numel() != second.numel() or first.dtype != second.dtype:
        return False
    return torch.equal(first.reshape(-1), second.reshape(-1))


def sum_error(terms: list[Tensor], total: Tensor) -> float:
    """Returns how far the sum is from the total at most, relative to the size of its terms."""
    added, size = terms[0], terms[0].abs()
    for term in terms[1:]:
        added, size = added + term, size + term.abs()
    relative = (added - total).abs() / (size + total.abs()).clamp(min=1e-20)
    return float(relative.max().nan_to_num(nan=1e9))


def is_sum(terms: list[Tensor], total: Tensor) -> bool:
    """True if the terms add up to the total."""
    same_shape = all(term.shape == total.shape for term in terms)
    return same_shape and sum_error(terms, total) <= tolerance(total)


def scale_factor(tensor: Tensor, expected: Tensor) -> float | None:
    """Returns the number by which `tensor` must be multiplied to give `expected`, or None."""
    tensor, expected = tensor.double(), expected.double()
    square = float((tensor * tensor).sum())
    if square == 0:
        return None
    factor = float((tensor * expected).sum()) / square
    limit = max(RELATIVE_TOLERANCE, float(expected.abs().max()) * RELATIVE_TOLERANCE)
    if factor == 0 or not float((tensor * factor - expected).abs().max()) <= limit:
        return None
    return factor


@dataclass(frozen=True)
class Match:
    """Where heads are in a projection's output.

    `transformed` is True if attention receives them after a norm or a rotation.
    """

    cut: str
    part: int
    transformed: bool


def find_heads(
    output: Tensor | None, target: Tensor, sizes: dict[str, int | None], rotates: bool
) -> Match | None:
    """Returns where in an output [batch, pos, …] the heads [batch, pos, head, d_head] are.

    With `rotates` only the first position is compared, where a rotation is the identity (but may
    reorder the numbers of a head).
    """
    if output is None:
        return None
    for layout in _possible_layouts(output.shape[-1], target.shape[2], target.shape[3], sizes):
        for part in range(layout.count("|") + 1):
            heads = _read_part(output, layout, part, sizes)
            if heads is None or heads.shape != target.shape:
                continue
            if scale_factor(heads, target) is not None:
                return Match(layout, part, transformed=False)
            if rotates and _equal_up_to_order(heads[:, 0], target[:, 0]):
                return Match(layout, part, transformed=True)
    return None


def _equal_up_to_order(heads: Tensor, target: Tensor) -> bool:
    if scale_factor(heads, target) is not None:
        return True
    factor = scale_factor(heads.sort(dim=-1).values, target.sort(dim=-1).values)
    return factor is not None and abs(factor - 1) < RELATIVE_TOLERANCE


def _read_part(
    output: Tensor, layout: str, part: int, sizes: dict[str, int | None]
) -> Tensor | None:
    split = split_axis(ModuleLocation("", cut=layout, part=part), sizes)
    if not split.total or split.outer * split.total != output.shape[-1] or split.inner is None:
        return None
    heads = FusedView(cut=split).view(output)
    if heads.ndim == 5:
        heads = heads.flatten(2, 3)
    return heads if heads.ndim == 4 else None


def _possible_layouts(
    width: int, heads: int, d_head: int, sizes: dict[str, int | None]
) -> list[str]:
    """Returns the layouts that a projection with these heads may have, the likeliest first."""
    q = "d_head" if sizes["d_qk"] == sizes["d_head"] else "d_qk"
    v = "d_head"
    head_width = q if d_head == sizes["d_qk"] else v
    head_count = "head" if heads == sizes["head"] else "kv_head"
    layouts = [
        f"{head_count} {head_width}",
        f"head {q} | kv_head {q} | kv_head {v}",
        f"head: {q} | {q} | {v}",
        f"kv_head: share {q} | {q} | {v}",
        f"4: quarter {q} | quarter {v} | quarter {q}",
        f"head: {q} | {q}",
        f"kv_head {q} | kv_head {v}",
        f"kv_head: {q} | {v}",
    ]
    extra, extra_of_head = width - heads * d_head, width // heads - d_head
    if extra > 0:
        layouts += [
            f"{head_count}: {head_width} | {extra_of_head}",
            f"{head_count}: {extra_of_head} | {head_width}",
            f"{head_count} {head_width} | {extra}",
            f"{extra} | {head_count} {head_width}",
        ]
    return layouts
