"""What a dtype can hold: whether numbers fit into it, and the numbers next to each other in it."""

import math

import torch
from torch import Tensor

from ..errors import BadEdit, BadHook


def converted(tensor: Tensor, like: Tensor, words: str) -> Tensor:
    """The tensor in the dtype and on the device of `like`; `BadEdit` for numbers that this dtype
    cannot hold.
    """
    return narrowed(tensor, like.dtype, words).to(like.device)


def narrowed(tensor: Tensor, dtype: torch.dtype, words: str) -> Tensor:
    """The tensor in another dtype; `BadEdit` for numbers that it cannot hold."""
    new = tensor.to(dtype=dtype)
    if dtype.is_floating_point and torch.finfo(dtype).max < _largest(tensor.dtype):
        lost = int((torch.isfinite(tensor) & ~torch.isfinite(new)).sum())
        if lost:
            raise BadEdit(_does_not_fit(lost, words, dtype))
    return new


def fitted_number(value: float, dtype: torch.dtype, words: str) -> float:
    """The number, or `BadEdit` where the dtype cannot hold it. An infinite number stands for
    itself.
    """
    if math.isfinite(value) and abs(value) > torch.finfo(dtype).max:
        raise BadEdit(_does_not_fit(1, f"{words}={value:g}", dtype))
    return value


def scaled(tensor: Tensor, scale: float, words: str) -> Tensor:
    """`scale` times the tensor, or `BadHook` where a product is too large for the tensor's own
    dtype.
    """
    product = scale * tensor
    if not bool(torch.isfinite(product).all()):
        raise BadHook(
            _does_not_fit(
                int((~torch.isfinite(product)).sum()), f"{scale:g} times {words}", tensor.dtype
            )
        )
    return product


def next_above(values: Tensor) -> Tensor:
    """The next larger number of the same dtype; of numbers about 0, the smallest that is not
    subnormal.
    """
    info = torch.finfo(values.dtype)
    if values.dtype in (torch.float32, torch.float64):
        above = torch.nextafter(values, torch.full_like(values, math.inf))
    else:
        # torch.nextafter has no float16 on every device; the numbers of one sign follow each other as their bits do
        bits = values.contiguous().view(torch.int16)
        above = torch.where(values > 0, bits + 1, bits - 1).view(values.dtype)
    return torch.where(values.abs() < info.tiny, info.tiny, above)


def next_below(values: Tensor) -> Tensor:
    """The next smaller number of the same dtype."""
    return -next_above(-values)


def rounded_down(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers in a dtype, none of them above what it was."""
    new = exact.to(dtype)
    return torch.where(new.to(exact.dtype) > exact, next_below(new), new)


def _largest(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).max if dtype.is_floating_point else math.inf


def _does_not_fit(count: int, words: str, dtype: torch.dtype) -> str:
    name, most = str(dtype).removeprefix("torch."), torch.finfo(dtype).max
    numbers = "a number" if count == 1 else f"{count} numbers"
    return (
        f"{words} has {numbers} that {name} cannot hold: its largest is {most:g}; give smaller ones"
    )
