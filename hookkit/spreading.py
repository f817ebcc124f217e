"""Which device_map, max_memory, offload_folder and tp_plan can be: checked before a large model is read, not after."""

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import BadHook, Unsupported, did_you_mean

PLANS = ("auto", "balanced", "balanced_low_0", "sequential")


def check_placement(device: Any, device_map: Any, max_memory: Any, offload_folder: Any) -> None:
    """Raise `BadHook` for a placement that cannot be, and `Unsupported` where accelerate is missing."""
    if device_map is None:
        _check_device(device)
        for word, value in (("max_memory", max_memory), ("offload_folder", offload_folder)):
            if value is not None:
                raise BadHook(f"{word}={value!r} goes with a device_map: say device_map='auto', or what goes where")
        return
    if device is not None:
        raise BadHook(f"device={device!r} and device_map={device_map!r} were both given: say one of them")
    if importlib.util.find_spec("accelerate") is None:
        raise Unsupported(
            "a device_map needs the package accelerate, one of hookkit's own dependencies, and this Python lacks it: "
            "pip install accelerate"
        )
    _check_map(device_map)
    if max_memory is not None:
        if isinstance(device_map, Mapping) or device_map not in PLANS:
            raise BadHook(f"max_memory goes with device_map='auto', and {device_map!r} already says where all is")
        _check_memory(max_memory)
    if offload_folder is not None and Path(os.fspath(offload_folder)).is_file():
        raise BadHook(f"offload_folder={str(offload_folder)!r} is a file: give a folder")


def _check_device(device: Any) -> None:
    if device is None:
        return
    try:
        there = _is_there(torch.device(device))
    except (RuntimeError, TypeError):
        there = False
    if not there:
        raise BadHook(f"device={str(device)!r} is none of this machine, which has {_there().removesuffix(', disk')}")


def check_dtype(dtype: Any) -> None:
    """Raise `BadHook` for a dtype in which no model computes."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    named = dtype is None or dtype == "auto" or isinstance(dtype, Mapping)  # a mapping has one for each part
    known = named or (isinstance(found, torch.dtype) and found.is_floating_point)
    if not known:
        raise BadHook(f"dtype={str(dtype)!r} is none in which a model computes: say float32, bfloat16, float16 or auto")


def _check_map(device_map: Any) -> None:
    if device_map == "disk":
        raise BadHook("device_map='disk': say device_map={'': 'disk'} for all of the model")
    if isinstance(device_map, Mapping):
        if not device_map:
            raise BadHook("device_map={} places nothing: name modules, or say 'auto'")
        for module, place in device_map.items():
            _check_place(place, f"device_map[{module!r}]={place!r}")
    elif device_map not in PLANS:
        _check_place(device_map, f"device_map={device_map!r}")


def _check_place(place: Any, words: str) -> None:
    if isinstance(place, bool) or not isinstance(place, str | int | torch.device):
        raise BadHook(f"{words}: give a device ('cpu', 0, 'cuda:1'), or 'disk'")
    if place == "disk":
        return
    try:
        device = torch.device(f"cuda:{place}") if isinstance(place, int) else torch.device(place)
    except RuntimeError:
        raise BadHook(f"{words} is no device: say 'auto', or a device of this machine, which has {_there()}") from None
    if isinstance(place, int) and torch.accelerator.is_available():
        device = torch.device(torch.accelerator.current_accelerator().type, place)  # pyright: ignore
    if device.type == "meta" or not _is_there(device):
        raise BadHook(f"{words} is not on this machine, which has {_there()}")


def _is_there(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
    return device.type != "mps" or torch.backends.mps.is_available()


def _there() -> str:
    found = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    found += ["mps"] if torch.backends.mps.is_available() else []
    return ", ".join([*found, "cpu", "disk"])


def _check_memory(max_memory: Any) -> None:
    if not isinstance(max_memory, Mapping) or not max_memory:
        raise BadHook(f"max_memory={max_memory!r}: give a mapping such as {{0: '20GB', 'cpu': '60GB'}}")
    from accelerate.utils import convert_file_size_to_int

    for place, size in max_memory.items():
        words = f"max_memory[{place!r}]={size!r}"
        if place not in ("cpu", "disk", "mps") and (isinstance(place, bool) or not isinstance(place, int)):
            raise BadHook(f"{words}: devices are the numbers of accelerators, 'cpu' and 'disk' here")
        if place != "disk":
            _check_place(place, words)
        try:
            count = convert_file_size_to_int(size)
        except (TypeError, ValueError):
            count = -1
        if isinstance(size, bool) or count < 0:
            raise BadHook(f"{words}: give bytes, or a text such as '20GB' or '512MiB'")


def check_named(model: nn.Module, device_map: Any) -> None:
    """Raise `BadHook` where a device_map names a module that the model does not have: it would have no effect."""
    if not isinstance(device_map, Mapping):
        return
    there = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
    for name in device_map:
        if name not in there:
            first = ", ".join(child for child, _ in model.named_children())
            raise BadHook(
                f"device_map names {name!r}, and the model has no such module{did_you_mean(str(name), sorted(there))} "
                f"Its first modules are: {first}."
            )


def distributed(plan: str | Mapping[str, str], device: Any, device_map: Any) -> Any:
    """transformers' word for a model that is split among processes."""
    if device is not None or device_map is not None:
        raise BadHook("tp_plan= says where each part of the model goes: leave device= and device_map= out")
    if "WORLD_SIZE" not in os.environ:
        raise Unsupported(
            "tp_plan= splits a model among processes, and there is one: start the script with "
            "`torchrun --nproc-per-node N script.py`"
        )
    try:
        from transformers.distributed.configuration_utils import DistributedConfig
    except ImportError as error:
        raise Unsupported(f"this version of transformers splits no models by a plan: {error}") from error
    return DistributedConfig(tp_plan=plan if isinstance(plan, str) else dict(plan))  # pyright: ignore
