"""How a model is set up: compiled, with adapters, in training mode, with checkpointing.

torch.compile and PEFT wrap a model. PEFT is not imported here, because a model that it wraps has
imported it. In training mode, dropout changes the output from call to call, and checkpointed blocks
run a second time in the backward pass. Under sdpa, some attention modules leave out a part of what
their configuration says.
"""

import inspect
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import nn

from ..errors import DroppedOut, IncompleteAttention, Unsupported
from .devices import device_of

DISTRIBUTING = ("torch.nn.parallel", "torch.distributed", "deepspeed")  # packages of such wrappers
# Arguments of transformers' attention functions that sdpa ignores: the attribute with the value of
# each, and what it is.
IGNORED_BY_SDPA: Mapping[str, tuple[str, str]] = {
    "softcap": ("attn_logit_softcapping", "the soft-cap of the attention scores"),
    "s_aux": ("sinks", "the attention sinks"),
}


def wrapper_chain(model: nn.Module) -> tuple[nn.Module, ...]:
    """Returns the model and the models inside it, from the outermost to transformers' own.

    For example a PeftModelForCausalLM, its LoraModel and its LlamaForCausalLM. Raises `Unsupported`
    for a wrapper that copies or splits the model.
    """
    package = type(model).__module__
    if isinstance(getattr(model, "module", None), nn.Module) and package.startswith(DISTRIBUTING):
        raise Unsupported(
            f"the model is inside {type(model).__name__}, which wraps it for several devices: give "
            "hookkit the model itself, model.module. Hooks on it act in the wrapper's forwards too "
            "where those run it in this process"
        )
    inner = model._modules.get("_orig_mod") or _inside_peft(model)
    return (model,) if inner is None else (model, *wrapper_chain(inner))


def wrappers_to_hook(wrapping: tuple[nn.Module, ...]) -> tuple[nn.Module, ...]:
    """Returns the wrappers whose forward may call the next one's without its hooks.

    Hooks must be registered on these too.
    """
    return tuple(module for module in wrapping[:-1] if "_orig_mod" not in module._modules)


def _inside_peft(model: Any) -> nn.Module | None:
    """Returns the model inside a model of PEFT, or None."""
    if "peft" not in sys.modules:
        return None
    from peft import PeftMixedModel, PeftModel
    from peft.tuners.tuners_utils import BaseTuner

    if isinstance(model, PeftModel | PeftMixedModel):
        return model.base_model
    return model.model if isinstance(model, BaseTuner) else None


def _adapter_layers(modules: Iterable[nn.Module]) -> list[Any]:
    if "peft" not in sys.modules:
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in modules if isinstance(module, BaseTunerLayer)]


def adapter_names(wrapping: tuple[nn.Module, ...]) -> list[str]:
    """Returns the names of a model's adapters.

    PEFT wraps them around it; transformers adds them inside.
    """
    return list(dict.fromkeys(chain.from_iterable(map(_adapter_configs, wrapping))))


def layer_adapter_names(module: nn.Module) -> list[str]:
    """Returns the names of the adapters of one layer."""
    names: list[str] = []
    for layer in _adapter_layers([module]):
        for attribute in layer.adapter_layer_names:
            part: Any = getattr(layer, attribute, None)
            if hasattr(part, "keys"):
                names += part.keys()
    return list(dict.fromkeys(names))


def active_adapter_names(model: nn.Module) -> list[str]:
    """Returns the names of the adapters that are active in some layer and not disabled there."""
    names: set[str] = set()
    for layer in _adapter_layers(model.modules()):
        if not layer.disable_adapters:
            names.update(layer.active_adapters)
    return sorted(names)


def _adapter_configs(module: Any) -> dict[str, Any]:
    configs = getattr(module, "peft_config", None)
    if isinstance(configs, dict):
        return configs
    return {}


def refuse_virtual_tokens(wrapping: tuple[nn.Module, ...]) -> None:
    """Raises `Unsupported` if the active adapter puts virtual tokens before the text."""
    for module in wrapping:
        config = _active_config(module)
        if config is None or not config.is_prompt_learning:
            continue
        if not getattr(module, "_adapters_disabled", False):
            raise Unsupported(
                f"the adapter {module.active_adapter!r} ({config.peft_type.value}) puts "
                f"{config.num_virtual_tokens} tokens of its own in front of every text, so "
                "positions would mean others than the text's: use an adapter in the layers such "
                "as LoRA, or run inside `with model.disable_adapter():`"
            )


def _active_config(module: Any) -> Any:
    """Returns the configuration of the one active adapter of a PEFT model, or None."""
    configs = _adapter_configs(module)
    name = configs and getattr(module, "active_adapter", None)
    if isinstance(name, str):
        return configs.get(name)
    return None


# ---- attention


def warn_of_incomplete_attention(model: nn.Module) -> None:
    """Warns `IncompleteAttention` at the user's line if sdpa leaves out a soft-cap or sinks."""
    left_out = left_out_by_sdpa(model)
    if left_out is not None:
        warnings.warn(
            f"the attention implementation in use, 'sdpa', leaves out {left_out}, so that the "
            "model computes other values than it was trained to: load it with "
            "attn_implementation='eager'",
            IncompleteAttention,
            stacklevel=user_stacklevel(),
        )


def left_out_by_sdpa(model: nn.Module) -> str | None:
    """Returns what the sdpa attention that a model uses leaves out, in words, or None."""
    for path, module in model.named_modules():
        config = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) != "sdpa":
            continue
        for keyword, (attribute, meaning) in IGNORED_BY_SDPA.items():
            value = getattr(module, attribute, None)
            if value is None or not _passes_keyword(module, keyword):
                continue
            text = f" = {value:g}" if isinstance(value, int | float) else ""
            return f"{meaning} ({path}: {attribute}{text})"
    return None


def _passes_keyword(module: nn.Module, keyword: str) -> bool:
    """True if a module's forward calls a function with this keyword argument."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    constants = () if code is None else code.co_consts  # the keywords of a call are a tuple
    return any(isinstance(names, tuple) and keyword in names for names in constants)


# ---- training mode


def warn_of_dropout(model: nn.Module) -> None:
    """Warns `DroppedOut` at the user's line if the model is in training mode and has dropout."""
    if not model.training:
        return
    for path, module in model.named_modules():
        for name, probability in _dropout_probabilities(module).items():
            warnings.warn(
                f"the model is in training mode and drops numbers out at random ({path}: "
                f"{name} = {probability:g}), so that what comes out differs from call to call: "
                "call model.eval() first",
                DroppedOut,
                stacklevel=user_stacklevel(),
            )
            return


def _dropout_probabilities(module: nn.Module) -> dict[str, float]:
    """Returns a module's own probabilities of dropout. Attention has no dropout module."""
    if not module.training:
        return {}
    if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
        return {"p": module.p}
    numbers = {name: value for name, value in vars(module).items() if isinstance(value, float)}
    return {name: number for name, number in numbers.items() if "drop" in name and number > 0}


def layers_without_gradient(root: nn.Module) -> list[str]:
    """Returns the paths of the layers through which autograd finds no gradient."""
    gives_gradient: dict[type, bool] = {nn.Linear: True}
    paths = []
    for path, module in root.named_modules():
        layer_class, width = type(module), getattr(module, "in_features", None)
        if not isinstance(width, int):
            continue
        if layer_class not in gives_gradient:
            gives_gradient[layer_class] = _gives_gradient(module, width)
        if not gives_gradient[layer_class]:
            paths.append(path)
    return paths


def _gives_gradient(layer: nn.Module, width: int) -> bool:
    """True if a layer gives a gradient, or if this cannot be tried (for offloaded weights)."""
    first = next(layer.parameters(), torch.zeros(0))
    dtype = first.dtype if first.is_floating_point() else torch.float32
    with torch.inference_mode(False), torch.enable_grad():
        probe = torch.zeros(1, width, dtype=dtype, device=device_of(layer), requires_grad=True)
        try:
            output = layer.forward(probe)
            output = output[0] if isinstance(output, tuple) else output  # of a router
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
    parents: dict[Any, None] = {}
    for path in filter(None, paths):
        parents[root] = None
        module: Any = root
        for name in path.split(".")[:-1]:
            module = module._modules[name]
            parents[module] = None
    return list(filter(_is_checkpointing, parents))


def _is_checkpointing(module: nn.Module) -> bool:
    attributes = vars(module)
    has_function = "_gradient_checkpointing_func" in attributes
    return has_function and bool(attributes.get("gradient_checkpointing"))


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
    named_weights = partial(model.named_parameters, remove_duplicate=False)
    trainable = {name for name, weight in named_weights() if weight.requires_grad}
    try:
        for _, weight in named_weights():
            weight.requires_grad_(False)
        yield
    finally:
        for name, weight in named_weights():
            if name in trainable:
                weight.requires_grad_(True)
