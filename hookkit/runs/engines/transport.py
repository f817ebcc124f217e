"""The model and its work as bytes, which are sent to actors.

The model itself is sent, not its name. An actor then has the weights, the configuration and the
adapters of this process, with all changes after loading, and needs neither a Hub nor the folders of
this machine. The numbers of the weights are beside the bytes, each storage once. Ray keeps them in
shared memory, and the actors of a node compute with that memory, without a copy.

Work is pickled without the model. It names the model's modules by their paths, and so finds them in
the actor's model.
"""

import io
import pickle
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from ...errors import OtherModel, Unsupported
from ...models.lm import LM
from ...models.provenance import weights_hash
from ..manager import find_user_hooks

THE_LM = "lm:"  # the name of the LM, among names that are paths of modules


@dataclass(frozen=True, eq=False)
class Packed:
    """A value as bytes, with the storages of its tensors beside them.

    A storage that is `shared` is only read, never written to.
    """

    data: bytes
    storages: Sequence[np.ndarray]
    devices: Sequence[str]
    shared: Sequence[bool]


def check_can_be_sent(lm: LM, gpus: float) -> None:
    """Raises `Unsupported` for a model that cannot be sent to an actor with so many GPUs."""
    root, kind = lm.root, type(lm.root).__name__
    _check_whole_model(lm)
    devices = {weight.device for weight in root.parameters()}
    if len(devices) > 1:
        raise Unsupported(
            f"this {kind} is on several devices, and an actor's model is on one: leave engine= out"
        )
    if any("_orig_mod" in module._modules for module in lm.wrapping):
        raise Unsupported(
            "a compiled model does not travel: give the one that was compiled, or leave engine= out"
        )
    if any(type(weight) is not nn.Parameter for weight in root.parameters()):
        raise Unsupported(
            f"this {kind} has quantised weights, which do not travel: leave engine= out"
        )
    device_type = next(iter(devices)).type if devices else "cpu"
    if (device_type == "cuda") != (gpus > 0):
        device_name = "a GPU" if device_type == "cuda" else f"the {device_type}"
        raise Unsupported(
            f"the model is on {device_name}, and its actors have gpus={gpus:g}: an actor computes "
            "where this process does, so load the model there, or change gpus="
        )


def _check_whole_model(lm: LM) -> None:
    """Raises `Unsupported` for a model with hooks of the user's, or which is not all here."""
    root, kind = lm.root, type(lm.root).__name__
    hooked_paths = find_user_hooks(lm.model)
    if hooked_paths:
        raise Unsupported(
            "the model carries hooks that are not hookkit's (on "
            f"{hooked_paths[0] or 'the model'}), which cannot go with it to an actor: remove them, "
            "or leave engine= out"
        )
    if lm.ranks is not None:
        raise Unsupported(
            f"this {kind} is held by {lm.ranks.count} processes together, and every actor holds a "
            "whole model: load it without tp_plan, or leave engine= out"
        )
    is_offloaded = any(weight.device.type == "meta" for weight in root.parameters())
    if is_offloaded or any(hasattr(module, "_hf_hook") for module in root.modules()):
        raise Unsupported(
            f"this {kind} is offloaded or spread by accelerate, and every actor holds a whole "
            "model: load it without device_map, or leave engine= out"
        )


# ---- models, work and results


def pack_model(lm: LM) -> Packed:
    """Returns the model with its tokenizer, its name and its row of the families' table."""
    weights = frozenset(weight.untyped_storage().data_ptr() for weight in lm.model.parameters())
    return _pack([lm.model, lm.tokenizer, lm.name, lm.row, weights_hash(lm)], {}, weights)


def unpack_model(packed: Packed) -> LM:
    """Returns the model in an actor; `OtherModel` if its weights are not those that were sent."""
    model, tokenizer, name, row, sent_hash = unpack(packed)
    lm = LM(model, tokenizer, name, row)
    own_hash = weights_hash(lm)
    if own_hash != sent_hash:
        raise OtherModel(
            f"the weights in the actor have the sha256 {own_hash}, and {sent_hash} was sent: "
            "report this"
        )
    return lm


def pack_work(work: Any, lm: LM) -> Packed:
    """Returns work for a model, without the model."""
    references = {id(module): path for path, module in lm.model.named_modules()}
    references[id(lm)] = THE_LM
    return _pack(work, references, frozenset())


def pack_result(value: Any) -> Packed:
    """Returns the result of a unit; its tensors will be in Ray's shared memory."""
    return _pack(value, {}, None)


# ---- pickling


def _pack(value: Any, references: Mapping[int, str], read_only: frozenset[int] | None) -> Packed:
    """Pickles a value.

    `references` has, by id, the paths of modules that are not sent; `read_only` the addresses of
    storages that nothing writes to, None for all.
    """
    # cloudpickle sends the user's functions by their code
    from ray.cloudpickle import CloudPickler  # pyright: ignore[reportAttributeAccessIssue]

    storages = _Storages(read_only)

    class Pickler(CloudPickler):
        def persistent_id(self, obj: Any) -> Any:
            if id(obj) in references:
                return references[id(obj)]
            return storages.add(obj) if isinstance(obj, torch.TypedStorage) else None

    file = io.BytesIO()
    try:
        Pickler(file, protocol=5).dump(value)
    # what the pickle methods of torch, of Python and of the user's objects raise
    except (pickle.PicklingError, TypeError, AttributeError, NotImplementedError) as error:
        raise Unsupported(
            f"something in the model, a hook or a metric cannot go to an actor ({error}): a "
            "function may use values and modules, and no open file, lock or connection"
        ) from error
    return Packed(file.getvalue(), storages.arrays, storages.devices, storages.shared)


def unpack(packed: Packed, lm: LM | None = None) -> Any:
    """Returns work, with the modules of this copy of the model, or the result of a unit.

    The tensors of a result must not be written to.
    """
    storages: dict[int, torch.UntypedStorage] = {}

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, pid: Any) -> Any:
            if isinstance(pid, str):
                assert lm is not None
                return lm if pid == THE_LM else lm.model.get_submodule(pid)
            number, dtype = pid
            if number not in storages:
                storages[number] = _storage(packed, number)
            return torch.TypedStorage(wrap_storage=storages[number], dtype=dtype, _internal=True)

    return Unpickler(io.BytesIO(packed.data)).load()


def _storage(packed: Packed, number: int) -> torch.UntypedStorage:
    array = packed.storages[number]
    if len(array):
        with warnings.catch_warnings():
            # torch warns that the memory is read-only, which shared memory has to be
            warnings.simplefilter("ignore", UserWarning)
            tensor = torch.from_numpy(array)
    else:
        tensor = torch.empty(0, dtype=torch.uint8)
    device = packed.devices[number]
    if device != "cpu":
        return tensor.to(device).untyped_storage()
    if not packed.shared[number]:
        tensor = tensor.clone()
    return tensor.untyped_storage()


@dataclass(eq=False)
class _Storages:
    """The storages of the tensors in a value, each once. Owned by one call of `_pack`."""

    read_only: frozenset[int] | None
    arrays: list[np.ndarray] = field(default_factory=list)
    devices: list[str] = field(default_factory=list)
    shared: list[bool] = field(default_factory=list)
    _numbers: dict[tuple[int, int], int] = field(default_factory=dict)
    # the storages are kept alive, so that no address is used twice
    _added: list[torch.TypedStorage] = field(default_factory=list)

    def add(self, storage: torch.TypedStorage) -> tuple[int, torch.dtype]:
        """Adds a storage and returns its persistent id."""
        untyped = storage._untyped_storage
        key = untyped.data_ptr(), untyped.nbytes()
        if key not in self._numbers or not untyped.nbytes():
            self._numbers[key] = len(self.arrays)
            numbers = torch.empty(0, dtype=torch.uint8, device=untyped.device)
            numbers.set_(untyped)  # pyright: ignore[reportCallIssue, reportArgumentType]
            self.arrays.append(numbers.cpu().numpy())
            self.devices.append(untyped.device.type)
            is_shared = self.read_only is None or untyped.data_ptr() in self.read_only
            self.shared.append(is_shared)
            self._added.append(storage)
        return self._numbers[key], storage.dtype
