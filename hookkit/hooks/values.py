"""Fits a constant to the values at a site, and checks the results of a user's function."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import BadEdit, BadHook
from .base import Binding, Constant, Here
from .rounding import convert_like


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


def fit_to_values(value: Constant, name: str) -> Callable[[Tensor, Here], Tensor]:
    """Returns a function that gives a constant in a shape that broadcasts over some values.

    The constant may have the axes of the site, or [pos, ...] for the hook's positions, or
    [row, pos, ...]. The result has the dtype and the device of the values.
    """
    convert = convert_once(value.tensor, name)
    return lambda values, here: _fit(convert(values), values, here, name)


def _fit(tensor: Tensor, values: Float[Tensor, "row pos ..."], here: Here, name: str) -> Tensor:
    shape = values.shape[2:]
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
        f"{list(values.shape)} [row, pos, ...]: give {list(shape)}, or one for each position, or "
        "one for each row and position"
    )


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
