"""Whether a tensor fits: a constant among the values of a site, and what a user's function gave
back.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import BadEdit, BadHook
from .base import Binding, Constant, Here
from .rounding import converted


def moved(tensor: Tensor, word: str) -> Callable[[Tensor], Tensor]:
    """What gives the tensor on the device and in the dtype of some values: moved there once, not in
    every forward.

    Raises `BadEdit` where the dtype of the values cannot hold its numbers.
    """
    there = tensor

    def like(values: Tensor) -> Tensor:
        nonlocal there
        if there.device != values.device or there.dtype != values.dtype:
            with torch.inference_mode(False):  # a later forward may need gradients
                there = converted(tensor, values, word)
        return there

    return like


def fitting(value: Constant, word: str) -> Callable[[Tensor, Here], Tensor]:
    """What gives a constant in the dtype and on the device of some values, in a shape that spreads
    over them.

    It may have the axes of the site, or [pos, ...] for the positions wanted, or [row, pos, ...].
    """
    like = moved(value.tensor, word)
    return lambda values, here: _fitted(like(values), values, here, word)


def _fitted(tensor: Tensor, values: Float[Tensor, "row pos ..."], here: Here, word: str) -> Tensor:
    axes = values.ndim - 2
    if tensor.shape == values.shape[2:]:
        return tensor
    leading = tensor.shape[: tensor.ndim - axes]
    if tensor.shape[tensor.ndim - axes :] == values.shape[2:] and len(leading) in (1, 2):
        order = here.order().to(values.device)
        if int(order.max()) < leading[-1]:
            if len(leading) == 1:
                return tensor[order]
            if max(here.rows) < leading[0]:
                return tensor[torch.tensor(here.rows, device=values.device)[:, None], order]
    raise BadEdit(
        f"{word} has shape {list(tensor.shape)}, and the values at {here.site} have {list(values.shape)} "
        f"[row, pos, ...]: give {list(values.shape[2:])}, or one for each position, or one for each row and position"
    )


def check_shape(value: Constant, binding: Binding, word: str) -> None:
    """Raise `BadHook` before anything runs if a tensor can never fit its site."""
    shape = binding.shape
    if shape is None:
        return
    tensor = value.tensor
    if (
        tensor.ndim < len(shape)
        or tensor.shape[tensor.ndim - len(shape) :] != shape
        or tensor.ndim > len(shape) + 2
    ):
        raise BadHook(
            f"{word} has shape {list(tensor.shape)}, and {binding.site} is [batch, pos, "
            f"{', '.join(map(str, shape))}]: give {list(shape)}, or [pos, …] or [batch, pos, …] with it"
        )


def checked_result(new: Any, old: Tensor, words: str) -> Tensor:
    """What a user's function returned, if it can take the place of what it was given; else
    `BadEdit`.
    """
    if new is None:
        raise BadEdit(
            f"{words} returned None: end it with `return`, with a tensor of shape {list(old.shape)}"
        )
    if not isinstance(new, Tensor):
        raise BadEdit(
            f"{words} returned a {type(new).__name__}: return a tensor of shape {list(old.shape)}"
        )
    if new.shape != old.shape:
        raise BadEdit(
            f"{words} was given shape {list(old.shape)} and returned {list(new.shape)}: return the same shape"
        )
    if new.dtype != old.dtype:
        raise BadEdit(
            f"{words} was given {old.dtype} and returned {new.dtype}: return .to({old.dtype})"
        )
    if new.device != old.device:
        raise BadEdit(
            f"{words} was given a tensor on {old.device} and returned one on {new.device}: move it back"
        )
    return new
