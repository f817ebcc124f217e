"""Where the weights of a model are: on one device, on several, or kept by accelerate in memory or on the disk.

accelerate brings what is kept elsewhere to a module's device for the module's own forward, and takes it away behind it:
between forwards such weights are on torch's "meta" device, without numbers. What is run through a module's `forward`
has them; what reads them itself asks here.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

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
    return next((device for device in inside if device is not None), found)  # adapters keep a module in their own


def _aligning(module: nn.Module) -> Iterator[Any]:
    hook: Any = getattr(module, "_hf_hook", None)
    yield from getattr(hook, "hooks", (hook,))


def _kept(root: nn.Module) -> dict[str, Kept]:
    """Where accelerate keeps each weight that is on "meta", by the weight's name."""
    found: dict[str, Kept] = {}
    for path, module in root.named_modules():
        for hook in _aligning(module):
            weights = getattr(hook, "weights_map", None) if getattr(hook, "offload", False) else None
            if weights is None:
                continue
            whole = bool(getattr(hook, "place_submodules", False))
            parameters = module.named_parameters(recurse=whole, remove_duplicate=False)
            for name, weight in (*parameters, *module.named_buffers(recurse=whole, remove_duplicate=False)):
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
    while hasattr(weights, "prefix") and hasattr(weights, "dataset"):  # accelerate's view of the names of one module
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
    return ", ".join(f"{at[run[0]]} in {run[0]}{f'-{run[-1]}' if len(run) > 1 else ''}" for run in runs)


def count(root: nn.Module) -> int:
    """How many numbers a model has learnt. Weights that are shared count once: accelerate parts them in a forward."""
    shared = getattr(root, "all_tied_weights_keys", None) or {}
    named = root.named_parameters()
    return sum(weight.numel() for name, weight in named if not (weight.is_meta and name in shared))
