"""Training mode: dropout, layers without a gradient, gradient checkpointing and frozen weights.

In training mode, dropout changes the output from call to call, and checkpointed blocks run a second
time in the backward pass.
"""

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
    """Warns `DroppedOut` at the user's line if the model is in training mode and has dropout."""
    if not lm.root.training:
        return
    for path, module in lm.root.named_modules():
        dropout = _describe_dropout(module)
        if dropout is not None:
            warnings.warn(
                f"the model is in training mode and drops numbers out at random ({path}: "
                f"{dropout}), so that what comes out differs from call to call: call model.eval() "
                "first",
                DroppedOut,
                stacklevel=user_stacklevel(),
            )
            return


def _describe_dropout(module: nn.Module) -> str | None:
    """Returns a module's own dropout as text, or None. Attention has no dropout module."""
    if not module.training:
        return None
    if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
        return f"p = {module.p:g}"
    for name, value in vars(module).items():
        if isinstance(value, float) and value > 0 and "drop" in name:
            return f"{name} = {value:g}"
    return None


def refuse_no_gradient(lm: LM) -> None:
    """Raises `Unsupported` for layers without a gradient, such as dynamically quantised ones."""
    if "without gradient" not in lm.trial_results:
        lm.trial_results["without gradient"] = _without_gradient(lm.root)
    paths = lm.trial_results["without gradient"]
    if paths:
        kind = type(lm.root.get_submodule(paths[0])).__name__
        raise Unsupported(
            f"{paths[0]} ({kind}) and {len(paths) - 1} other layers give no gradient, as quantised "
            "layers do, so that what is asked for cannot be computed through them: load the model "
            "in float32 or bfloat16"
        )


def _without_gradient(root: nn.Module) -> list[str]:
    """Returns the paths of the layers through which autograd finds no gradient."""
    gives_gradient: dict[type, bool] = {}
    paths = []
    for path, module in root.named_modules():
        layer_class, width = type(module), getattr(module, "in_features", None)
        if layer_class is nn.Linear or not isinstance(width, int):
            continue
        if layer_class not in gives_gradient:
            gives_gradient[layer_class] = _gives_gradient(module, width)
        if not gives_gradient[layer_class]:
            paths.append(path)
    return paths


def _gives_gradient(layer: nn.Module, width: int) -> bool:
    """True if a layer gives a gradient, or if this cannot be tried (for offloaded weights)."""
    first = next(layer.parameters(), None)
    dtype = first.dtype if first is not None and first.is_floating_point() else torch.float32
    with torch.inference_mode(False), torch.enable_grad():
        probe = torch.zeros(1, width, dtype=dtype, device=device_of(layer), requires_grad=True)
        try:
            output = layer.forward(probe)
        # a layer of another library cannot be called so, or its weights are offloaded
        except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError):
            return True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of a missing gradient
            try:
                return torch.autograd.grad(output.sum(), probe, allow_unused=True)[0] is not None
            except RuntimeError:
                return False


def user_stacklevel() -> int:
    """Returns the `stacklevel` with which the caller's warning names the user's line."""
    level, frame = 0, sys._getframe(1)
    while frame.f_back is not None:
        package = frame.f_globals.get("__name__", "").split(".")[0]
        if package != "hookkit":
            break
        level, frame = level + 1, frame.f_back
    return level + 1


def checkpointing_parents(root: nn.Module, paths: Iterable[str]) -> list[Any]:
    """Returns the modules around these paths that run their forward again in the backward pass."""
    modules: dict[Any, None] = {}
    for path in filter(None, paths):
        module: Any = root
        modules[module] = None
        for name in path.split(".")[:-1]:
            module = module._modules[name]
            modules[module] = None
    parents: list[Any] = []
    for module in modules:
        attributes = vars(module)
        is_enabled = attributes.get("gradient_checkpointing")
        if is_enabled and "_gradient_checkpointing_func" in attributes:
            parents.append(module)
    return parents


def is_in_checkpointed_block(root: nn.Module, path: str) -> bool:
    """True for a module inside a block that runs again in the backward pass; not for the block."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    parents = checkpointing_parents(root, [path])
    return any(isinstance(module, GradientCheckpointingLayer) for module in parents)


@contextmanager
def freeze_weights(model: nn.Module) -> Iterator[None]:
    """Sets `requires_grad` of all weights to False inside a `with` block.

    Afterwards each weight has its previous setting again. Weights are identified by name, because
    offloaded weights are new objects after every forward.
    """
    trainable = {name for name, weight in _weights(model) if weight.requires_grad}
    try:
        for _, weight in _weights(model):
            weight.requires_grad_(False)
        yield
    finally:
        for name, weight in _weights(model):
            if name in trainable:
                weight.requires_grad_(True)


def _weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return model.named_parameters(remove_duplicate=False)
