"""Where the weights of a model are: on one device, on several, or kept by accelerate in memory or on the disk.

accelerate brings what is kept elsewhere to a module's device for the module's own forward, and takes it away behind it:
between forwards such weights are on torch's "meta" device, without numbers. What is run through a module's `forward`
has them; what reads them itself asks here.

Which device_map, max_memory, offload_folder and tp_plan can be: checked before a large model is read, not after.
"""

import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadHook, Unsupported, did_you_mean

Kept = tuple[Mapping[str, Tensor], str]
"""A mapping in which accelerate finds weights, and the name that a weight has in it."""


def execution_device(module: nn.Module) -> torch.device | None:
    """Where accelerate brings an offloaded module's weights, and what it is given, for its forward."""
    for hook in _aligning(module):
        device = getattr(hook, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return None


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes."""
    found = execution_device(module)
    if found is None:
        found = next((weight.device for weight in module.parameters()), torch.device("cpu"))
    inside = map(execution_device, module.modules()) if found.type == "meta" else ()
    return next(
        (device for device in inside if device is not None), found
    )  # adapters keep a module in their own


def _aligning(module: nn.Module) -> Iterator[Any]:
    hook: Any = getattr(module, "_hf_hook", None)
    yield from getattr(hook, "hooks", (hook,))


def _kept(root: nn.Module) -> dict[str, Kept]:
    """Where accelerate keeps each weight that is on "meta", by the weight's name."""
    found: dict[str, Kept] = {}
    for path, module in root.named_modules():
        for hook in _aligning(module):
            weights = (
                getattr(hook, "weights_map", None) if getattr(hook, "offload", False) else None
            )
            if weights is None:
                continue
            whole = bool(getattr(hook, "place_submodules", False))
            parameters = module.named_parameters(recurse=whole, remove_duplicate=False)
            for name, weight in (
                *parameters,
                *module.named_buffers(recurse=whole, remove_duplicate=False),
            ):
                if weight.is_meta:
                    found[f"{path}.{name}" if path else name] = (weights, name)
    return found


def weights_of(root: nn.Module) -> Iterator[tuple[str, Callable[[], Any], bool]]:
    """All that a model has learnt, by name: what gives each, and whether it is there already.

    Those that are kept elsewhere are read when asked for, so that no more than one has to be in memory.
    """
    kept = _kept(root)
    for name, value in root.state_dict().items():
        if isinstance(value, Tensor) and value.is_meta and name in kept:
            yield name, _reading(kept[name], value.dtype), False
        else:
            yield name, lambda value=value: value, True


def _reading(kept: Kept, dtype: torch.dtype) -> Callable[[], Tensor]:
    def read() -> Tensor:
        weights, name = kept
        found = weights[name]
        return found.to(dtype) if found.dtype != dtype and dtype.is_floating_point else found

    return read


def places_of(root: nn.Module) -> dict[str, str]:
    """Where each weight is kept between forwards: "cpu", "cuda:0" …, "disk", or "meta" for one that is nowhere."""
    kept = _kept(root)
    return {
        name: _where(*kept[name]) if weight.is_meta and name in kept else str(weight.device)
        for name, weight in root.named_parameters(remove_duplicate=False)
    }


def _where(weights: Any, name: str) -> str:
    while hasattr(weights, "prefix") and hasattr(
        weights, "dataset"
    ):  # accelerate's view of the names of one module
        weights, name = weights.dataset, f"{weights.prefix}{name}"
    if not hasattr(weights, "index"):
        return str(weights[name].device)
    return str(weights.state_dict[name].device) if name in weights.state_dict else "disk"


def place_at(places: Mapping[str, str], path: str) -> str:
    """Where the weights under a path are; of the nearest module around it that has any."""
    while True:
        inside = f"{path}." if path else ""
        found = dict.fromkeys(place for name, place in places.items() if name.startswith(inside))
        if found or not path:
            return " and ".join(found)
        path = path.rpartition(".")[0]


def told(each: Iterable[tuple[int, str]]) -> str:
    """The places of blocks in words: "cuda:0 in 0-3, disk in 4-7"; one alone where all are in the same."""
    pairs = list(each)
    if len({place for _, place in pairs}) == 1:
        return pairs[0][1]
    runs = [[number for number, _ in run] for _, run in groupby(pairs, key=lambda pair: pair[1])]
    at = dict(pairs)
    return ", ".join(
        f"{at[run[0]]} in {run[0]}{f'-{run[-1]}' if len(run) > 1 else ''}" for run in runs
    )


def count(root: nn.Module) -> int:
    """How many numbers a model has learnt. Weights that are shared count once: accelerate parts them in a forward."""
    shared = getattr(root, "all_tied_weights_keys", None) or {}
    named = root.named_parameters()
    return sum(weight.numel() for name, weight in named if not (weight.is_meta and name in shared))


PLANS = ("auto", "balanced", "balanced_low_0", "sequential")


def check_placement(device: Any, device_map: Any, max_memory: Any, offload_folder: Any) -> None:
    """Raise `BadHook` for a placement that cannot be, and `Unsupported` where accelerate is missing."""
    if device_map is None:
        _check_device(device)
        for word, value in (("max_memory", max_memory), ("offload_folder", offload_folder)):
            if value is not None:
                raise BadHook(
                    f"{word}={value!r} goes with a device_map: say device_map='auto', or what goes where"
                )
        return
    if device is not None:
        raise BadHook(
            f"device={device!r} and device_map={device_map!r} were both given: say one of them"
        )
    if importlib.util.find_spec("accelerate") is None:
        raise Unsupported(
            "a device_map needs the package accelerate, one of hookkit's own dependencies, and this Python lacks it: "
            "pip install accelerate"
        )
    _check_map(device_map)
    if max_memory is not None:
        if isinstance(device_map, Mapping) or device_map not in PLANS:
            raise BadHook(
                f"max_memory goes with device_map='auto', and {device_map!r} already says where all is"
            )
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
        raise BadHook(
            f"device={str(device)!r} is none of this machine, which has {_there().removesuffix(', disk')}"
        )


def check_dtype(dtype: Any) -> None:
    """Raise `BadHook` for a dtype in which no model computes."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    named = (
        dtype is None or dtype == "auto" or isinstance(dtype, Mapping)
    )  # a mapping has one for each part
    known = named or (isinstance(found, torch.dtype) and found.is_floating_point)
    if not known:
        raise BadHook(
            f"dtype={str(dtype)!r} is none in which a model computes: say float32, bfloat16, float16 or auto"
        )


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
        raise BadHook(
            f"{words} is no device: say 'auto', or a device of this machine, which has {_there()}"
        ) from None
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
        raise BadHook(
            f"max_memory={max_memory!r}: give a mapping such as {{0: '20GB', 'cpu': '60GB'}}"
        )
    from accelerate.utils import convert_file_size_to_int

    for place, size in max_memory.items():
        words = f"max_memory[{place!r}]={size!r}"
        if place not in ("cpu", "disk", "mps") and (
            isinstance(place, bool) or not isinstance(place, int)
        ):
            raise BadHook(
                f"{words}: devices are the numbers of accelerators, 'cpu' and 'disk' here"
            )
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
    there = {name for name, _ in model.named_modules()} | {
        name for name, _ in model.named_parameters()
    }
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
    return DistributedConfig(tp_plan=plan if isinstance(plan, str) else dict(plan))  # pyright: ignore
