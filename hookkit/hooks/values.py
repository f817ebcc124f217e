"""The numbers that go into a site: constants that fit its values, and what its dtype can hold."""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import BadEdit, BadHook
from .base import Binding, Constant, EditContext


def convert_once(tensor: Tensor, name: str) -> Callable[[Tensor], Tensor]:
    """Returns a function that gives the tensor in the dtype and on the device of some values.

    The function owns the converted tensor and keeps it for the next forward. It raises `BadEdit` if
    the dtype cannot hold the numbers.
    """
    cached = tensor

    def convert(values: Tensor) -> Tensor:
        nonlocal cached
        if cached.device != values.device or cached.dtype != values.dtype:
            with torch.inference_mode(False):  # a later forward may need gradients
                cached = convert_like(tensor, values, name)
        return cached

    return convert


def fit_to_values(value: Constant, name: str) -> Callable[[Tensor, EditContext], Tensor]:
    """Returns a function that gives a constant in a shape that broadcasts over some values.

    The constant may have the axes of the site, or [pos, ...] for the hook's positions, or
    [row, pos, ...]. The result has the dtype and the device of the values.
    """
    convert = convert_once(value.tensor, name)

    def fit(values: Float[Tensor, "row pos ..."], here: EditContext) -> Tensor:
        tensor, shape = convert(values), values.shape[2:]
        if tensor.shape == shape:
            return tensor
        n_leading = tensor.ndim - len(shape)
        leading = tensor.shape[:n_leading]
        if tensor.shape[n_leading:] == shape and len(leading) in (1, 2):
            order = here.order().to(values.device)
            has_all_positions = int(order.max()) < leading[-1]
            if has_all_positions and len(leading) == 1:
                return tensor[order]
            if has_all_positions and max(here.rows) < leading[0]:
                return tensor[torch.tensor(here.rows, device=values.device)[:, None], order]
        raise BadEdit(
            f"{name} has shape {list(tensor.shape)}, and the values at {here.site} have "
            f"{list(values.shape)} [row, pos, ...]: give {list(shape)}, or one for each position, "
            "or one for each row and position"
        )

    return fit


def check_shape(value: Constant, binding: Binding, name: str) -> None:
    """Raises `BadHook` if a tensor can never fit its site, before anything runs."""
    shape = binding.shape
    if shape is None:
        return
    tensor = value.tensor
    n_leading = tensor.ndim - len(shape)
    if n_leading not in (0, 1, 2) or tensor.shape[n_leading:] != shape:
        axes = ", ".join(map(str, shape))
        raise BadHook(
            f"{name} has shape {list(tensor.shape)}, and {binding.site} is [batch, pos, {axes}]: "
            f"give {list(shape)}, or [pos, …] or [batch, pos, …] with it"
        )


def check_result(new: Any, old: Tensor, name: str) -> Tensor:
    """Returns the result of a user's function. Raises `BadEdit` if it cannot replace `old`."""
    shape = list(old.shape)
    if new is None:
        raise BadEdit(f"{name} returned None: end it with `return`, with a tensor of shape {shape}")
    if not isinstance(new, Tensor):
        raise BadEdit(f"{name} returned a {type(new).__name__}: return a tensor of shape {shape}")
    if new.shape != old.shape:
        raise BadEdit(
            f"{name} was given shape {shape} and returned {list(new.shape)}: return the same shape"
        )
    if new.dtype != old.dtype:
        raise BadEdit(
            f"{name} was given {old.dtype} and returned {new.dtype}: return .to({old.dtype})"
        )
    if new.device != old.device:
        raise BadEdit(
            f"{name} was given a tensor on {old.device} and returned one on {new.device}: move it "
            "back"
        )
    return new


def convert_like(tensor: Tensor, like: Tensor, name: str) -> Tensor:
    """Returns the tensor in the dtype and on the device of `like`, as `convert_dtype` does."""
    return convert_dtype(tensor, like.dtype, name).to(like.device)


def convert_dtype(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Returns the tensor in another dtype. Raises `BadEdit` for numbers that it cannot hold."""
    new = tensor.to(dtype=dtype)
    largest = torch.finfo(tensor.dtype).max if tensor.is_floating_point() else math.inf
    if dtype.is_floating_point and torch.finfo(dtype).max < largest:
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
    if count := int((~torch.isfinite(product)).sum()):
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


def _overflow_message(count: int, name: str, dtype: torch.dtype) -> str:
    numbers = "a number" if count == 1 else f"{count} numbers"
    return (
        f"{name} has {numbers} that {str(dtype).removeprefix('torch.')} cannot hold: its largest "
        f"is {torch.finfo(dtype).max:g}; give smaller ones"
    )
