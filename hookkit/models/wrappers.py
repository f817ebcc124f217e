"""What other libraries put around a model: torch.compile, the adapters of PEFT.

None of them is imported here: a model that they wrapped has imported them.
"""

import sys
from typing import Any

from torch import nn

from ..errors import Unsupported

DISTRIBUTING = ("torch.nn.parallel", "torch.distributed", "deepspeed")  # packages of such wrappers


def unwrapped(model: nn.Module) -> tuple[nn.Module, ...]:
    """The model, what it wraps, what that wraps …, the last being transformers' own: a PeftModelForCausalLM, its
    LoraModel, its LlamaForCausalLM. `Unsupported` for one that copies or cuts the model up."""
    package = type(model).__module__
    if isinstance(getattr(model, "module", None), nn.Module) and package.startswith(DISTRIBUTING):
        raise Unsupported(
            f"the model is inside {type(model).__name__}, which wraps it for several devices: give hookkit the model "
            "itself, model.module. Hooks on it act in the wrapper's forwards too where those run it in this process"
        )
    inner = model._modules.get("_orig_mod") or _adapted(model)
    return (model,) if inner is None else (model, *unwrapped(inner))


def called(wrapping: tuple[nn.Module, ...]) -> tuple[nn.Module, ...]:
    """Those of them whose forward may call the next one's without its hooks, so that hooks have to go on them too."""
    return tuple(module for module in wrapping[:-1] if "_orig_mod" not in module._modules)


def _adapted(model: Any) -> nn.Module | None:
    """The model in one of PEFT's."""
    if "peft" not in sys.modules:
        return None
    from peft import PeftMixedModel, PeftModel
    from peft.tuners.tuners_utils import BaseTuner

    if isinstance(model, PeftModel | PeftMixedModel):
        return model.base_model
    return model.model if isinstance(model, BaseTuner) else None


def adapters(wrapping: tuple[nn.Module, ...]) -> list[str]:
    """The names of a model's adapters. PEFT wraps a model in them; transformers puts them into it."""
    return list(dict.fromkeys(name for module in wrapping for name in _configs(module)))


def adapters_of(module: nn.Module) -> list[str]:
    """The names of the adapters of one layer."""
    if "peft" not in sys.modules:
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not isinstance(module, BaseTunerLayer):
        return []
    parts: Any = [getattr(module, name, None) for name in module.adapter_layer_names]
    return list(
        dict.fromkeys(name for part in parts if hasattr(part, "keys") for name in part.keys())
    )  # noqa: SIM118  no mapping


def adapters_in_use(model: nn.Module) -> list[str]:
    """The names of the adapters that act in some layer; none where they are disabled."""
    if "peft" not in sys.modules:
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return sorted(
        {name for layer in layers if not layer.disable_adapters for name in layer.active_adapters}
    )


def _configs(module: Any) -> dict[str, Any]:
    found = getattr(module, "peft_config", None)
    return found if isinstance(found, dict) else {}


def refuse_virtual_tokens(wrapping: tuple[nn.Module, ...]) -> None:
    """Raise `Unsupported` where the active adapter puts tokens of its own in front of the text."""
    for module in wrapping:
        active: Any = getattr(module, "active_adapter", None) if _configs(module) else None
        config = _configs(module).get(active) if isinstance(active, str) else None
        if (
            config is None
            or not config.is_prompt_learning
            or getattr(module, "_adapters_disabled", False)
        ):
            continue
        raise Unsupported(
            f"the adapter {active!r} ({config.peft_type.value}) puts {config.num_virtual_tokens} tokens of its own in "
            "front of every text, so positions would mean others than the text's: use an adapter in the layers such as "
            "LoRA, or run inside `with model.disable_adapter():`"
        )
