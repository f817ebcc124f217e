"""Weights that are in the process of an engine: here they have a shape and a dtype, and no values.

Many functions of hookkit compute with the weights of a model. With these weights, such a
computation raises `Unsupported` with the reason, instead of an error of torch's meta tensors.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .engine import not_in_engine


class AbsentWeight(Tensor):
    """A weight of a model in an engine. Every operation of torch on it raises `Unsupported`."""

    @classmethod
    def __torch_dispatch__(cls, *_: Any, **__: Any) -> Any:
        raise not_in_engine("weights of the model were to be read")

    def tolist(self) -> Any:  # which torch refuses with a reason of its own
        raise not_in_engine("weights of the model were to be read")


def mark_absent(model: nn.Module) -> None:
    """Replaces the weights of a model on the meta device. Weights that are tied remain so."""
    marked: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for weights in (module._parameters, module._buffers):
            for name, weight in weights.items():
                if weight is None:
                    continue
                if weight not in marked:
                    marked[weight] = _absent(weight)
                weights[name] = marked[weight]  # pyright: ignore[reportArgumentType]


def _absent(weight: Tensor) -> Tensor:
    is_parameter = isinstance(weight, nn.Parameter)
    absent: Any = Tensor._make_subclass(AbsentWeight, weight.detach(), False)
    absent._is_param = is_parameter  # by which torch recognises an nn.Parameter
    return absent
