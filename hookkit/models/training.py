"""What training mode does to numbers: dropout changes them from call to call, and checkpointed blocks run twice; and
weights that learn, held still for a while."""

import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import DroppedOut, Unsupported
from .devices import device_of
from .lm import LM


def warn_of_dropout(lm: LM) -> None:
    """Give a `DroppedOut` warning at the user's own line, if the model is in training mode and drops numbers out."""
    if not lm.root.training:
        return
    found = next(
        (words for path, module in lm.root.named_modules() for words in _dropping(path, module)),
        None,
    )
    if found is not None:
        warnings.warn(
            f"the model is in training mode and drops numbers out at random ({found}), so that what comes out differs "
            "from call to call: call model.eval() first",
            DroppedOut,
            stacklevel=levels_to_the_user(),
        )


def _dropping(path: str, module: nn.Module) -> Iterable[str]:
    """What a module itself drops out, in words. Attention has the probability as a number, without a module for it."""
    if not module.training:
        return
    if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
        yield f"{path}: p = {module.p:g}"
    for name, value in vars(module).items():
        if isinstance(value, float) and value > 0 and "drop" in name:
            yield f"{path}: {name} = {value:g}"


def refuse_no_gradient(lm: LM) -> None:
    """Raise `Unsupported` for a model with layers that give no gradient: one through it would silently miss them.

    torch's dynamically quantised layers are of this kind. Each kind of layer is tried once.
    """
    if "without gradient" not in lm.learnt:
        lm.learnt["without gradient"] = _without_gradient(lm.root)
    paths = lm.learnt["without gradient"]
    if paths:
        kind = type(lm.root.get_submodule(paths[0])).__name__
        raise Unsupported(
            f"{paths[0]} ({kind}) and {len(paths) - 1} other layers give no gradient, as quantised layers do, so that "
            "what is asked for cannot be computed through them: load the model in float32 or bfloat16"
        )


def _without_gradient(root: nn.Module) -> list[str]:
    """The paths of the layers whose output does not depend on their input as far as autograd can tell."""
    answers: dict[type, bool] = {}
    paths = []
    for path, module in root.named_modules():
        kind, width = type(module), getattr(module, "in_features", None)
        if kind is nn.Linear or not isinstance(width, int):
            continue
        if kind not in answers:
            answers[kind] = _gives_gradient(module, width)
        if not answers[kind]:
            paths.append(path)
    return paths


def _gives_gradient(layer: nn.Module, width: int) -> bool:
    """Whether a layer gives a gradient; True where that cannot be tried, such as for weights that are elsewhere."""
    first = next(layer.parameters(), None)
    dtype = first.dtype if first is not None and first.is_floating_point() else torch.float32
    with torch.inference_mode(False), torch.enable_grad():
        given = torch.zeros(1, width, dtype=dtype, device=device_of(layer), requires_grad=True)
        try:
            output = layer.forward(given)
        except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError):
            return True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns here of what is to be found out
            try:
                return torch.autograd.grad(output.sum(), given, allow_unused=True)[0] is not None
            except RuntimeError:
                return False


def levels_to_the_user() -> int:
    """How many frames above the caller of this the first one stands that is not hookkit's."""
    level, frame = 0, sys._getframe(1)
    while (
        frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] == "hookkit"
    ):
        level, frame = level + 1, frame.f_back
    return level + 1


def checkpointing(root: nn.Module, paths: Iterable[str]) -> list[Any]:
    """The modules around these that may run something in them again in the backward pass, the outer ones first."""
    around: dict[str, Any] = {}  # each is looked at once, however many are in it

    def at(path: str) -> Any:
        if path not in around:
            above, _, name = path.rpartition(".")
            around[path] = at(above)._modules[name] if path else root
        return around[path]

    for path in paths:
        if path:
            at(path.rpartition(".")[0])
    return [module for module in around.values() if _checkpoints(vars(module))]


def _checkpoints(attributes: dict[str, Any]) -> bool:
    return (
        bool(attributes.get("gradient_checkpointing"))
        and "_gradient_checkpointing_func" in attributes
    )


def in_checkpointed_block(root: nn.Module, path: str) -> bool:
    """True for a module in a block whose forward runs again in the backward pass. Hooks on the block itself do not."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return any(
        isinstance(module, GradientCheckpointingLayer) for module in checkpointing(root, [path])
    )


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """A block in which no weight asks for a gradient, so that none is computed; then each asks as it did before.

    Weights are known by their names: those that accelerate keeps elsewhere are other objects after every forward.
    """
    asking = {name for name, weight in _weights(model) if weight.requires_grad}
    try:
        for _, weight in _weights(model):
            weight.requires_grad_(False)
        yield
    finally:
        for name, weight in _weights(model):
            if name in asking:
                weight.requires_grad_(True)


def _weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return model.named_parameters(remove_duplicate=False)
