"""The numbers that a dtype can hold: checked conversions, and the neighbours of a number."""

import math

import torch
from torch import Tensor

from ..errors import BadEdit, BadHook


def convert_like(tensor: Tensor, like: Tensor, name: str) -> Tensor:
    """Returns the tensor in the dtype and on the device of `like`, as `convert_dtype` does."""
    return convert_dtype(tensor, like.dtype, name).to(like.device)


def convert_dtype(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Returns the tensor in another dtype. Raises `BadEdit` for numbers that it cannot hold."""
    new = tensor.to(dtype=dtype)
    if dtype.is_floating_point and torch.finfo(dtype).max < _largest(tensor.dtype):
        lost = int((torch.isfinite(tensor) & ~torch.isfinite(new)).sum())
        if lost:
            raise BadEdit(_overflow_message(lost, name, dtype))
    return new


def fitted_number(value: float, dtype: torch.dtype, name: str) -> float:
    """Returns the number. Raises `BadEdit` if it is finite and the dtype cannot hold it."""
    if math.isfinite(value) and abs(value) > torch.finfo(dtype).max:
        raise BadEdit(_overflow_message(1, f"{name}={value:g}", dtype))
    return value


def scale_tensor(tensor: Tensor, scale: float, name: str) -> Tensor:
    """Returns `scale` times the tensor. Raises `BadHook` if its dtype cannot hold a product."""
    product = scale * tensor
    is_finite = torch.isfinite(product)
    if not bool(is_finite.all()):
        count = int((~is_finite).sum())
        raise BadHook(_overflow_message(count, f"{scale:g} times {name}", tensor.dtype))
    return product


def next_above(values: Tensor) -> Tensor:
    """Returns the next larger numbers of the dtype; around 0, the smallest normal number."""
    info = torch.finfo(values.dtype)
    if values.dtype in (torch.float32, torch.float64):
        above = torch.nextafter(values, torch.full_like(values, math.inf))
    else:
        # torch.nextafter lacks 16-bit dtypes on some devices. Numbers of one sign have the order of
        # their bits
        bits = values.contiguous().view(torch.int16)
        above = torch.where(values > 0, bits + 1, bits - 1).view(values.dtype)
    return torch.where(values.abs() < info.tiny, info.tiny, above)


def next_below(values: Tensor) -> Tensor:
    """Returns the next smaller numbers of the dtype."""
    return -next_above(-values)


def round_down(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the numbers in another dtype, each at most the exact one."""
    new = exact.to(dtype)
    return torch.where(new.to(exact.dtype) > exact, next_below(new), new)


def _largest(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).max if dtype.is_floating_point else math.inf


def _overflow_message(count: int, name: str, dtype: torch.dtype) -> str:
    numbers = "a number" if count == 1 else f"{count} numbers"
    return (
        f"{name} has {numbers} that {str(dtype).removeprefix('torch.')} cannot hold: its largest "
        f"is {torch.finfo(dtype).max:g}; give smaller ones"
    )
