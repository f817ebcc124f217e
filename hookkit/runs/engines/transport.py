"""A model as bytes, and work that speaks of it: what an actor is sent.

The model itself travels, not its name: an actor then has the weights, the configuration and the adapters that this
process has, also those that were changed after loading, and needs neither a Hub nor this machine's folders. The numbers
of its weights stand beside the bytes, each storage once. Ray keeps them in shared memory, and the actors of a node
compute with that memory, without a copy.

Work is pickled for itself, with the model's modules by their paths, so that it finds them again in the actor's model.
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
from ..manager import hooks_of_others


@dataclass(frozen=True, eq=False)
class Packed:
    """Something as bytes, with the numbers of its tensors beside them. `shared` ones are read and never written."""

    data: bytes
    storages: Sequence[np.ndarray]
    devices: Sequence[str]
    shared: Sequence[bool]


def check_travels(lm: LM, gpus: float) -> None:
    """Raise `Unsupported` for a model that cannot be had twice."""
    root, kind = lm.root, type(lm.root).__name__
    devices = {weight.device.type for weight in root.parameters()}
    users = hooks_of_others(lm.model)
    if users:
        raise Unsupported(
            f"the model carries hooks that are not hookkit's (on {users[0] or 'the model'}), which cannot go with it "
            "to an actor: remove them, or leave engine= out"
        )
    if lm.ranks is not None:
        raise Unsupported(
            f"this {kind} is held by {lm.ranks.count} processes together, and every actor holds a whole model: load it "
            "without tp_plan, or leave engine= out"
        )
    if "meta" in devices or any(hasattr(module, "_hf_hook") for module in root.modules()):
        raise Unsupported(
            f"this {kind} is offloaded or spread by accelerate, and every actor holds a whole model: load it without "
            "device_map, or leave engine= out"
        )
    if len({weight.device for weight in root.parameters()}) > 1:
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
    if ("cuda" in devices) != (gpus > 0):
        has = "a GPU" if "cuda" in devices else f"the {''.join(sorted(devices)) or 'cpu'}"
        raise Unsupported(
            f"the model is on {has}, and its actors have gpus={gpus:g}: an actor computes where this process does, so "
            "load the model there, or change gpus="
        )


def packed_model(lm: LM) -> Packed:
    """The model with its tokenizer, name and row of the families' table."""
    weights = frozenset(weight.untyped_storage().data_ptr() for weight in lm.model.parameters())
    return _packed([lm.model, lm.tokenizer, lm.name, lm.row, weights_hash(lm)], {}, weights)


def unpacked_model(packed: Packed) -> LM:
    """The model in an actor. `OtherModel` where its weights are not those that were sent."""
    model, tokenizer, name, row, digest = _unpacked(packed, {})
    lm = LM(model, tokenizer, name, row)
    found = weights_hash(lm)
    if found != digest:
        raise OtherModel(
            f"the weights in the actor have the sha256 {found}, and {digest} was sent: report this"
        )
    return lm


def packed_work(work: Any, lm: LM) -> Packed:
    """Work for a model, without the model."""
    known = {id(module): ("module", path) for path, module in lm.model.named_modules()}
    return _packed(work, known | {id(lm): ("lm", "")}, frozenset())


def unpacked_work(packed: Packed, lm: LM) -> Any:
    """Work for a model, on this copy of it."""
    known: dict[tuple[str, str], Any] = {
        ("module", path): module for path, module in lm.model.named_modules()
    }
    return _unpacked(packed, known | {("lm", ""): lm})


def packed_result(value: Any) -> Packed:
    """What came of a unit, with its tensors where Ray shares them."""
    packed = _packed(value, {}, frozenset())
    return Packed(packed.data, packed.storages, packed.devices, [True] * len(packed.storages))


def unpacked_result(packed: Packed) -> Any:
    """What came of a unit. Its tensors are for reading."""
    return _unpacked(packed, {})


def _packed(value: Any, known: Mapping[int, tuple[str, str]], shared: frozenset[int]) -> Packed:
    # functions of the user's go by their code
    from ray.cloudpickle import CloudPickler  # pyright: ignore[reportAttributeAccessIssue]

    numbers = _Storages(shared)

    class Pickler(CloudPickler):
        def persistent_id(self, obj: Any) -> Any:
            if id(obj) in known:
                return known[id(obj)]
            return numbers.told(obj) if isinstance(obj, torch.TypedStorage) else None

    file = io.BytesIO()
    try:
        Pickler(file, protocol=5).dump(value)
    except (pickle.PicklingError, TypeError, AttributeError, NotImplementedError) as error:
        raise Unsupported(
            f"something in the model, a hook or a metric cannot go to an actor ({error}): a function may use values "
            "and modules, and no open file, lock or connection"
        ) from error
    return Packed(file.getvalue(), numbers.arrays, numbers.devices, numbers.shared)


def _unpacked(packed: Packed, known: Mapping[tuple[str, str], Any]) -> Any:
    storages: dict[int, torch.UntypedStorage] = {}

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, pid: Any) -> Any:
            if pid in known:
                return known[pid]
            _, number, dtype = pid
            if number not in storages:
                storages[number] = _storage(packed, number)
            return torch.TypedStorage(wrap_storage=storages[number], dtype=dtype, _internal=True)

    return Unpickler(io.BytesIO(packed.data)).load()


def _storage(packed: Packed, number: int) -> torch.UntypedStorage:
    array = packed.storages[number]
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # that the memory is read-only, which a shared one has to be
        found = torch.from_numpy(array) if len(array) else torch.empty(0, dtype=torch.uint8)
    device = packed.devices[number]
    if device != "cpu":
        return found.to(device).untyped_storage()
    return (found if packed.shared[number] else found.clone()).untyped_storage()


@dataclass(eq=False)
class _Storages:
    """The numbers of tensors, each storage once. `own` are the addresses of those that nothing writes into."""

    own: frozenset[int]
    arrays: list[np.ndarray] = field(default_factory=list)
    devices: list[str] = field(default_factory=list)
    shared: list[bool] = field(default_factory=list)
    _known: dict[tuple[int, int], int] = field(default_factory=dict)
    _held: list[Any] = field(
        default_factory=list
    )  # so that no address is given out twice meanwhile

    def told(self, storage: torch.TypedStorage) -> tuple[str, int, torch.dtype]:
        plain = storage._untyped_storage
        key = plain.data_ptr(), plain.nbytes()
        if key not in self._known or not plain.nbytes():
            self._known[key] = len(self.arrays)
            whole = torch.empty(0, dtype=torch.uint8, device=plain.device).set_(plain)  # pyright: ignore
            self.arrays.append(whole.cpu().numpy())
            self.devices.append(plain.device.type)
            self.shared.append(plain.data_ptr() in self.own)
            self._held.append(storage)
        return "storage", self._known[key], storage.dtype
