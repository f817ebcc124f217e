"""Where the weights of a model are: on devices, offloaded, or split among processes.

accelerate moves offloaded weights to a module's device for the module's own forward and removes
them after it: between forwards such weights are on torch's "meta" device, without numbers. Code
that runs through a module's `forward` has them; code that reads the weights themselves must use the
functions of this file.

Tensor parallelism is one model split among several processes (ranks):

    torchrun --nproc-per-node 2 script.py    # the script calls hk.load(name, tp_plan="auto")

transformers splits the matrices: in each rank `q_proj` returns some of the heads, and `down_proj`
reads some of the neurons, as plain tensors that are not marked as parts. hookkit gathers the parts
of all ranks before a hook runs, and splits the result of the hooks again. So each rank does the
same work on the same whole tensors and gets the same run, and only rank 0 writes files.

A tensor is known to be split by its size, because the model's configuration determines the full
size. A tensor of full size must be equal on all ranks, which is checked once for each module
location. Any other tensor raises.

This file also checks device_map, max_memory, offload_folder and tp_plan before a large model is
read.
"""

import importlib.util
import os
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, TypeAlias

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
        for hook in _accelerate_hooks(module):
            weights_map = getattr(hook, "weights_map", None)
            if weights_map is None or not getattr(hook, "offload", False):
                continue
            recurse = bool(getattr(hook, "place_submodules", False))
            parameters = module.named_parameters(recurse=recurse, remove_duplicate=False)
            buffers = module.named_buffers(recurse=recurse, remove_duplicate=False)
            for name, weight in (*parameters, *buffers):
                if weight.is_meta:
                    offloaded[f"{path}.{name}".lstrip(".")] = (weights_map, name)
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
    weight = weights[name]
    return weight.to(dtype) if dtype.is_floating_point else weight


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
    if name in weights.state_dict:
        return str(weights.state_dict[name].device)
    return "disk"


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
        ends = dict.fromkeys([numbers[0], numbers[-1]])  # one end if it is one block
        texts.append(f"{storage} in {'-'.join(map(str, ends))}")
    return ", ".join(texts)


def count_parameters(root: nn.Module) -> int:
    """Returns the number of parameters. Tied weights count once, also if accelerate unties them."""
    tied = getattr(root, "all_tied_weights_keys", None) or {}
    weights = root.named_parameters()
    return sum(weight.numel() for name, weight in weights if not (weight.is_meta and name in tied))


# ---- tensor parallelism

Key = tuple[str, str, int | str]
"""A module location: path, side and item."""
Transform: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Split:
    """How a tensor is split: along which axis, and the size of each rank's part."""

    axis: int
    sizes: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Ranks:
    """The processes that share one model, seen from one of them. The model's LM owns it."""

    group: Any
    rank: int
    count: int
    # None: whole, and the same on every rank
    splits: dict[Key, Split | None] = field(default_factory=dict)

    def split(self, key: Key, tensor: Tensor, expected: Mapping[int, int] | None) -> Split | None:
        """Returns how the tensor at a module location is split. All ranks must call this together.

        `expected` has the full sizes of the axes that may be split; it is None if they are unknown.
        """
        if key not in self.splits:
            self.splits[key] = self._find_split(key, tensor, expected)
        return self.splits[key]

    def _find_split(
        self, key: Key, tensor: Tensor, expected: Mapping[int, int] | None
    ) -> Split | None:
        subject = f"what is at the {key[1]} of {key[0] or 'the model'}"
        shapes: list[list[int]] = self.gather_values(list(tensor.shape))
        for axis, full in (expected or {}).items():
            sizes = tuple(shape[axis] for shape in shapes)
            if sum(sizes) == full and tensor.shape[axis] != full:
                return Split(axis % tensor.ndim, sizes)
            if set(sizes) != {full}:
                raise Unsupported(
                    f"{subject} has {list(sizes)} numbers on the ranks along axis "
                    f"{axis % tensor.ndim}, which do not make up {full}: it cannot be put together"
                )
        if not self._is_same_on_all(tensor) or shapes.count(shapes[0]) != len(shapes):
            raise Unsupported(
                f"{subject} differs from rank to rank ({list(map(tuple, shapes))}), and "
                "how its parts make up the whole is not known: it cannot be put together. The "
                "sites of lm.describe() can"
            )
        return None

    def _is_same_on_all(self, tensor: Tensor) -> bool:
        """True if the sums of the numbers and of their sizes are close on all ranks."""
        numbers = tensor.detach().double()
        checksums = [float(numbers.sum()), float(numbers.abs().sum())]
        sums = torch.tensor(self.gather_values(checksums))
        return torch.allclose(sums, sums[:1].expand_as(sums), rtol=1e-4, equal_nan=True)

    def gather_values(self, value: Any) -> list[Any]:
        """Returns the value of each rank, in their order."""
        values: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(values, value, group=self.group)
        return values

    # ---- parts and wholes; every rank has the gradient of a whole, and of its own part

    def whole(self, part: Tensor, split: Split) -> Tensor:
        """Returns the whole tensor from the part that each rank has."""
        return _apply(partial(self.gather, split=split), partial(self.slice, split=split), part)

    def part(self, whole: Tensor, split: Split) -> Tensor:
        """Returns this rank's part of a whole tensor."""
        return _apply(partial(self.slice, split=split), partial(self.gather, split=split), whole)

    def gather(self, part: Tensor, split: Split) -> Tensor:
        """Returns the whole tensor, without a gradient."""
        largest = max(split.sizes)
        sent = part.detach().movedim(split.axis, 0).contiguous()
        if len(sent) < largest:
            sent = torch.cat([sent, sent.new_zeros(largest - len(sent), *sent.shape[1:])])
        received = [torch.empty_like(sent) for _ in split.sizes]
        torch.distributed.all_gather(received, sent, group=self.group)
        parts = [padded[:size] for padded, size in zip(received, split.sizes, strict=True)]
        return torch.cat(parts).movedim(0, split.axis).contiguous()

    def slice(self, whole: Tensor, split: Split) -> Tensor:
        """Returns this rank's part, without a gradient."""
        start = sum(split.sizes[: self.rank])
        return whole.narrow(split.axis, start, split.sizes[self.rank]).contiguous()

    def around(
        self, key: Key, tensor: Tensor, expected: Mapping[int, int] | None, work: Transform
    ) -> Tensor:
        """Applies `work` to the whole of a tensor, and returns this rank's part of the result."""
        split = self.split(key, tensor, expected)
        if split is None:
            return work(tensor)
        whole = self.whole(tensor, split)
        new = work(whole)
        return tensor if new is whole else self.part(new, split)


def _apply(function: Transform, gradient_function: Transform, tensor: Tensor) -> Tensor:
    """Returns `function(tensor)`, whose gradient goes through `gradient_function`."""
    if not tensor.requires_grad:
        return function(tensor)
    return _WithGradient.apply(tensor, function, gradient_function)  # pyright: ignore


class _WithGradient(torch.autograd.Function):
    """A function without a gradient of its own, and the function for the gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, function: Transform, gradient_function: Transform) -> Any:
        ctx.gradient_function = gradient_function
        return function(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return ctx.gradient_function(gradients[0]), None, None


# ---- the model


def find_ranks(model: nn.Module) -> Ranks | None:
    """Returns the ranks that share a model, or None if this process has the whole model.

    Raises `Unsupported` for a model that is distributed in another way than by tensor parallelism.
    """
    if "torch.distributed.tensor" not in sys.modules:
        return None
    from torch.distributed.tensor import DTensor

    meshes = [weight.device_mesh for weight in model.parameters() if isinstance(weight, DTensor)]
    if meshes:
        return _ranks_of_mesh(meshes[0])
    if (getattr(model, "_tp_size", None) or 1) > 1:
        raise Unsupported(
            "this version of transformers does not mark what it splits among processes: use 5.20 on"
        )
    return None


def _ranks_of_mesh(mesh: Any) -> Ranks:
    names = tuple(mesh.mesh_dim_names or ())
    if mesh.ndim != 1 or names not in ((), ("tp",)):
        raise Unsupported(
            f"the model is spread over {mesh.size()} processes by "
            f"{' and '.join(names) or 'a mesh of several axes'}, and hooks reach models spread by "
            "tensor parallelism only: hk.load(name, tp_plan='auto')"
        )
    group = mesh.get_group()
    ranks = Ranks(group, torch.distributed.get_rank(group), mesh.size())
    _LIVE_RANKS.add(ranks)
    return ranks


_LIVE_RANKS: weakref.WeakSet[Ranks] = weakref.WeakSet()
"""This process's part in each split model that it has. The models own the entries."""


def is_writing_process() -> bool:
    """True if this process has rank 0 in every model: it writes files of no single model."""
    return all(ranks.rank == 0 for ranks in _LIVE_RANKS)


# ---- checks of the arguments of hk.load

PLANS = ("auto", "balanced", "balanced_low_0", "sequential")


def check_placement(device: Any, device_map: Any, max_memory: Any, offload_folder: Any) -> None:
    """Raises `BadHook` for an impossible placement, and `Unsupported` if accelerate is missing."""
    if device_map is None:
        _check_device(device)
        _refuse_without_map("max_memory", max_memory)
        _refuse_without_map("offload_folder", offload_folder)
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
        _check_memory(max_memory, device_map)
    if offload_folder is not None and Path(offload_folder).is_file():
        raise BadHook(f"offload_folder={str(offload_folder)!r} is a file: give a folder")


def _refuse_without_map(word: str, value: Any) -> None:
    if value is not None:
        raise BadHook(
            f"{word}={value!r} goes with a device_map: say device_map='auto', or what goes where"
        )


def _check_device(device: Any) -> None:
    try:
        exists = device is None or _exists(torch.device(device))
    except (RuntimeError, TypeError):
        exists = False
    if not exists:
        devices = _list_devices().removesuffix(", disk")
        raise BadHook(f"device={str(device)!r} is none of this machine, which has {devices}")


def check_dtype(dtype: Any) -> None:
    """Raises `BadHook` for a dtype in which no model computes."""
    if dtype in (None, "auto"):
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
        device = _read_device(storage)
    except RuntimeError:
        raise BadHook(
            f"{argument} is no device: say 'auto', or a device of this machine, which has "
            f"{_list_devices()}"
        ) from None
    if device.type == "meta" or not _exists(device):
        raise BadHook(f"{argument} is not on this machine, which has {_list_devices()}")


def _read_device(storage: str | int | torch.device) -> torch.device:
    """Returns the device that is meant; a number is the number of an accelerator."""
    if not isinstance(storage, int):
        return torch.device(storage)
    accelerator = torch.accelerator.current_accelerator() or torch.device("cuda")
    return torch.device(f"{accelerator.type}:{storage}")


def _exists(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
    return device.type != "mps" or torch.backends.mps.is_available()


def _list_devices() -> str:
    devices = list(map("cuda:{}".format, range(torch.cuda.device_count())))
    if torch.backends.mps.is_available():
        devices.append("mps")
    return ", ".join([*devices, "cpu", "disk"])


def _check_memory(max_memory: Mapping[Any, Any], device_map: Any) -> None:
    if device_map not in PLANS:
        raise BadHook(
            f"max_memory goes with device_map='auto', and {device_map!r} already says where all is"
        )
    if not max_memory:
        raise BadHook(
            f"max_memory={max_memory!r}: give a mapping such as {{0: '20GB', 'cpu': '60GB'}}"
        )
    for storage, size in max_memory.items():
        _check_limit(storage, size)


def _check_limit(storage: Any, size: Any) -> None:
    argument = f"max_memory[{storage!r}]={size!r}"
    if type(storage) is not int and storage not in ("cpu", "disk", "mps"):
        raise BadHook(f"{argument}: devices are the numbers of accelerators, 'cpu' and 'disk' here")
    _check_storage(storage, argument)
    if not _is_size(size):
        raise BadHook(f"{argument}: give bytes, or a text such as '20GB' or '512MiB'")


def _is_size(size: Any) -> bool:
    """True for a number of bytes, and for a text such as "20GB"."""
    from accelerate.utils import convert_file_size_to_int

    try:
        return not isinstance(size, bool) and convert_file_size_to_int(size) >= 0
    except (TypeError, ValueError):
        return False


def check_named(model: nn.Module, device_map: Any) -> None:
    """Raises `BadHook` if a device_map names a module that the model does not have."""
    if not isinstance(device_map, Mapping):
        return
    names = {*dict(model.named_modules()), *dict(model.named_parameters())}
    unknown = [name for name in device_map if name not in names]
    if unknown:
        suggestion = did_you_mean(str(unknown[0]), sorted(names))
        raise BadHook(
            f"device_map names {unknown[0]!r}, and the model has no such module{suggestion} "
            f"Its first modules are: {', '.join(dict(model.named_children()))}."
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
