"""Where the weights of a model are: on devices, or offloaded by accelerate to memory or the disk.

accelerate moves offloaded weights to a module's device for the module's own forward and removes
them after it: between forwards such weights are on torch's "meta" device, without numbers. Code
that runs through a module's `forward` has them; code that reads the weights themselves must use the
functions of this file.

This file also checks device_map, max_memory, offload_folder and tp_plan before a large model is
read.
"""

import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadHook, Unsupported, did_you_mean

OffloadedWeight = tuple[Mapping[str, Tensor], str]
"""A mapping in which accelerate stores weights, and the key of one weight in it."""


def _execution_device(module: nn.Module) -> torch.device | None:
    """Returns the device to which accelerate moves a module's weights for its forward, or None."""
    for hook in _accelerate_hooks(module):
        device = getattr(hook, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return None


def device_of(module: nn.Module) -> torch.device:
    """Returns the device on which a module computes."""
    device = _execution_device(module)
    if device is None:
        device = next((weight.device for weight in module.parameters()), torch.device("cpu"))
    if device.type == "meta":  # adapters contain the module that has the hook
        inner_devices = filter(None, map(_execution_device, module.modules()))
        device = next(inner_devices, device)
    return device


def _accelerate_hooks(module: nn.Module) -> Iterable[Any]:
    hook: Any = getattr(module, "_hf_hook", None)
    return getattr(hook, "hooks", (hook,))


def _offloaded_weights(root: nn.Module) -> dict[str, OffloadedWeight]:
    """Returns where accelerate stores each weight that is on "meta", by the weight's name."""
    offloaded: dict[str, OffloadedWeight] = {}
    for path, module in root.named_modules():
        prefix = f"{path}." if path else ""
        for hook in _accelerate_hooks(module):
            weights_map = getattr(hook, "weights_map", None)
            if weights_map is None or not getattr(hook, "offload", False):
                continue
            recurse = bool(getattr(hook, "place_submodules", False))
            parameters = module.named_parameters(recurse=recurse, remove_duplicate=False)
            buffers = module.named_buffers(recurse=recurse, remove_duplicate=False)
            for name, weight in (*parameters, *buffers):
                if weight.is_meta:
                    offloaded[prefix + name] = (weights_map, name)
    return offloaded


def weights_of(root: nn.Module) -> Iterator[tuple[str, Callable[[], Any], bool]]:
    """Yields the names of the state dict, functions that read the values, and if each is loaded."""
    offloaded = _offloaded_weights(root)
    for name, value in root.state_dict().items():
        if isinstance(value, Tensor) and value.is_meta and name in offloaded:
            yield name, partial(_read_offloaded, *offloaded[name], value.dtype), False
        else:
            yield name, lambda value=value: value, True


def _read_offloaded(weights: Mapping[str, Tensor], name: str, dtype: torch.dtype) -> Tensor:
    return weights[name].to(dtype) if dtype.is_floating_point else weights[name]


def weight_storages(root: nn.Module) -> dict[str, str]:
    """Returns where each weight is between forwards: a device, "disk", or "meta" for nowhere."""
    offloaded = _offloaded_weights(root)
    storages: dict[str, str] = {}
    for name, weight in root.named_parameters(remove_duplicate=False):
        storages[name] = str(weight.device)
        if weight.is_meta and name in offloaded:
            storages[name] = _offload_storage(*offloaded[name])
    return storages


def _offload_storage(weights: Any, name: str) -> str:
    # accelerate gives each module a view of the mapping, in which names have no prefix
    while hasattr(weights, "prefix") and hasattr(weights, "dataset"):
        weights, name = weights.dataset, f"{weights.prefix}{name}"
    if not hasattr(weights, "index"):
        return str(weights[name].device)
    return str(weights.state_dict[name].device) if name in weights.state_dict else "disk"


def storage_under_path(storages: Mapping[str, str], path: str) -> str:
    """Returns where the weights under a path are, or those of the nearest module around it."""
    prefix = f"{path}." if path else ""
    under_path = [storage for name, storage in storages.items() if name.startswith(prefix)]
    if not under_path and path:
        return storage_under_path(storages, path.rpartition(".")[0])
    return " and ".join(dict.fromkeys(under_path))


def describe_storages(block_storages: Iterable[tuple[int | None, str]]) -> str:
    """Returns where blocks are as text: "cuda:0 in 0-3, disk in 4-7", or "cpu" if all are there."""
    storages = dict(block_storages)
    if len(set(storages.values())) == 1:
        return next(iter(storages.values()))
    texts = []
    for storage, blocks in groupby(storages, key=storages.__getitem__):
        numbers = list(blocks)
        last = f"-{numbers[-1]}" if len(numbers) > 1 else ""
        texts.append(f"{storage} in {numbers[0]}{last}")
    return ", ".join(texts)


def count_parameters(root: nn.Module) -> int:
    """Returns the number of parameters. Tied weights count once, also if accelerate unties them."""
    tied = getattr(root, "all_tied_weights_keys", None) or {}
    total = 0
    for name, weight in root.named_parameters():
        if not (weight.is_meta and name in tied):
            total += weight.numel()
    return total


# ---- checks of the arguments of hk.load

PLANS = ("auto", "balanced", "balanced_low_0", "sequential")


def check_placement(device: Any, device_map: Any, max_memory: Any, offload_folder: Any) -> None:
    """Raises `BadHook` for an impossible placement, and `Unsupported` if accelerate is missing."""
    if device_map is None:
        _check_device(device)
        for word, value in (("max_memory", max_memory), ("offload_folder", offload_folder)):
            if value is not None:
                raise BadHook(
                    f"{word}={value!r} goes with a device_map: say device_map='auto', or what goes "
                    "where"
                )
        return
    if device is not None:
        raise BadHook(
            f"device={device!r} and device_map={device_map!r} were both given: say one of them"
        )
    if importlib.util.find_spec("accelerate") is None:
        raise Unsupported(
            "a device_map needs the package accelerate, one of hookkit's own dependencies, and "
            "this Python lacks it: pip install accelerate"
        )
    _check_map(device_map)
    if max_memory is not None:
        if isinstance(device_map, Mapping) or device_map not in PLANS:
            raise BadHook(
                f"max_memory goes with device_map='auto', and {device_map!r} already says where "
                "all is"
            )
        _check_memory(max_memory)
    if offload_folder is not None and Path(os.fspath(offload_folder)).is_file():
        raise BadHook(f"offload_folder={str(offload_folder)!r} is a file: give a folder")


def _check_device(device: Any) -> None:
    if device is None:
        return
    try:
        exists = _exists(torch.device(device))
    except (RuntimeError, TypeError):
        exists = False
    if not exists:
        devices = _list_devices().removesuffix(", disk")
        raise BadHook(f"device={str(device)!r} is none of this machine, which has {devices}")


def check_dtype(dtype: Any) -> None:
    """Raises `BadHook` for a dtype in which no model computes."""
    if dtype is None or dtype == "auto" or isinstance(dtype, Mapping):  # a mapping names submodules
        return
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise BadHook(
            f"dtype={str(dtype)!r} is none in which a model computes: say float32, bfloat16, "
            "float16 or auto"
        )


def _check_map(device_map: Any) -> None:
    if device_map == "disk":
        raise BadHook("device_map='disk': say device_map={'': 'disk'} for all of the model")
    if isinstance(device_map, Mapping):
        if not device_map:
            raise BadHook("device_map={} places nothing: name modules, or say 'auto'")
        for module, storage in device_map.items():
            _check_storage(storage, f"device_map[{module!r}]={storage!r}")
    elif device_map not in PLANS:
        _check_storage(device_map, f"device_map={device_map!r}")


def _check_storage(storage: Any, argument: str) -> None:
    """Raises `BadHook` for what is neither a device of this machine nor "disk"."""
    if isinstance(storage, bool) or not isinstance(storage, str | int | torch.device):
        raise BadHook(f"{argument}: give a device ('cpu', 0, 'cuda:1'), or 'disk'")
    if storage == "disk":
        return
    try:
        device = torch.device(f"cuda:{storage}" if isinstance(storage, int) else storage)
    except RuntimeError:
        raise BadHook(
            f"{argument} is no device: say 'auto', or a device of this machine, which has "
            f"{_list_devices()}"
        ) from None
    if isinstance(storage, int) and torch.accelerator.is_available():
        accelerator: Any = torch.accelerator.current_accelerator()
        device = torch.device(accelerator.type, storage)
    if device.type == "meta" or not _exists(device):
        raise BadHook(f"{argument} is not on this machine, which has {_list_devices()}")


def _exists(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
    return device.type != "mps" or torch.backends.mps.is_available()


def _list_devices() -> str:
    devices = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append("mps")
    return ", ".join([*devices, "cpu", "disk"])


def _check_memory(max_memory: Mapping[Any, Any]) -> None:
    if not max_memory:
        raise BadHook(
            f"max_memory={max_memory!r}: give a mapping such as {{0: '20GB', 'cpu': '60GB'}}"
        )
    from accelerate.utils import convert_file_size_to_int

    for storage, size in max_memory.items():
        argument = f"max_memory[{storage!r}]={size!r}"
        is_number = isinstance(storage, int) and not isinstance(storage, bool)
        if not is_number and storage not in ("cpu", "disk", "mps"):
            raise BadHook(
                f"{argument}: devices are the numbers of accelerators, 'cpu' and 'disk' here"
            )
        _check_storage(storage, argument)
        try:
            byte_count = convert_file_size_to_int(size)
        except (TypeError, ValueError):
            byte_count = -1
        if isinstance(size, bool) or byte_count < 0:
            raise BadHook(f"{argument}: give bytes, or a text such as '20GB' or '512MiB'")


def check_named(model: nn.Module, device_map: Any) -> None:
    """Raises `BadHook` if a device_map names a module that the model does not have."""
    if not isinstance(device_map, Mapping):
        return
    names = {*dict(model.named_modules()), *dict(model.named_parameters())}
    for name in device_map:
        if name not in names:
            suggestion = did_you_mean(str(name), sorted(names))
            children = ", ".join(dict(model.named_children()))
            raise BadHook(
                f"device_map names {name!r}, and the model has no such module{suggestion} "
                f"Its first modules are: {children}."
            )


def make_distributed_config(plan: str | Mapping[str, str], device: Any, device_map: Any) -> Any:
    """Returns transformers' configuration of a model that is split among processes."""
    if device is not None or device_map is not None:
        raise BadHook(
            "tp_plan= says where each part of the model goes: leave device= and device_map= out"
        )
    if "WORLD_SIZE" not in os.environ:
        raise Unsupported(
            "tp_plan= splits a model among processes, and there is one: start the script with "
            "`torchrun --nproc-per-node N script.py`"
        )
    try:
        from transformers.distributed.configuration_utils import DistributedConfig
    except ImportError as error:
        raise Unsupported(
            f"this version of transformers splits no models by a plan: {error}"
        ) from error
    rules: Any = plan if isinstance(plan, str) else dict(plan)
    return DistributedConfig(tp_plan=rules)
