"""What forward and generate are asked alike: which logits to keep, of a model that they can run."""

import functools
from collections.abc import Callable
from typing import Literal, ParamSpec, TypeAlias, TypeVar

import torch

from ..errors import EmptySelection, Unsupported
from ..model import LM

Logits: TypeAlias = Literal["all", "last", "none"] | bool | None

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def outside_inference_mode(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The same function, whose tensors autograd can use later, also where it is called in torch.inference_mode.

    Whether gradients are on is afterwards as it was, also where Ctrl-C came while torch.no_grad was left.
    """

    @functools.wraps(function)
    def outside(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        gradients = torch.is_grad_enabled()
        if not torch.is_inference_mode_enabled():
            try:
                return function(*args, **kwargs)
            except BaseException:
                torch.set_grad_enabled(gradients)
                raise
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return outside


def refuse_two_texts(lm: LM) -> None:
    """Raise `Unsupported` for a model that reads one text and writes another."""
    if lm.two_texts:
        raise Unsupported(
            f"{type(lm.root).__name__} is an encoder-decoder, which reads one text and writes another: run it yourself "
            "in a block of hk.attach, with hooks at hk.module(path)"
        )


def wanted_logits(logits: Logits) -> Literal["all", "last", "none"]:
    """Which logits a run is to keep."""
    if logits in ("all", True):
        return "all"
    if logits in ("none", False, None):
        return "none"
    if logits == "last":
        return "last"
    raise EmptySelection(f"logits={logits!r} is unknown: say 'all', 'last' or False")
