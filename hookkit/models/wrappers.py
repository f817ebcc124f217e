"""What other libraries wrap around a model: torch.compile and the adapters of PEFT.

Neither library is imported here, because a model that one of them wraps has imported it.
"""

import sys
from collections.abc import Iterable
from typing import Any

from torch import nn

from ..errors import Unsupported

DISTRIBUTING = ("torch.nn.parallel", "torch.distributed", "deepspeed")  # packages of such wrappers


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
    names: list[str] = []
    for module in wrapping:
        names += _adapter_configs(module)
    return list(dict.fromkeys(names))


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
    return configs if isinstance(configs, dict) else {}


def refuse_virtual_tokens(wrapping: tuple[nn.Module, ...]) -> None:
    """Raises `Unsupported` if the active adapter puts virtual tokens before the text."""
    for module in wrapping:
        configs = _adapter_configs(module)
        name: Any = getattr(module, "active_adapter", None) if configs else None
        if not isinstance(name, str) or name not in configs:
            continue
        config = configs[name]
        if not config.is_prompt_learning or getattr(module, "_adapters_disabled", False):
            continue
        raise Unsupported(
            f"the adapter {name!r} ({config.peft_type.value}) puts {config.num_virtual_tokens} "
            "tokens of its own in front of every text, so positions would mean others than the "
            "text's: use an adapter in the layers such as LoRA, or run inside `with "
            "model.disable_adapter():`"
        )
