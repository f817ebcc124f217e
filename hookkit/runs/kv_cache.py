"""Caches of keys and values, or of states, that one forward passes to the next.

`Caches` knows of each cache which text it belongs to and how many columns of it it has. A cache is
recognised by the object itself, or by the tensors in a tuple; a copy of a cache by its values.
"""

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import Unsupported
from ..models.batch_positions import SequenceBatch

ARGUMENT_NAMES = (
    "past_key_values",
    "cache_params",
    "past_key_value",
    "layer_past",
    "past_buckets_states",
    "mems",
    "state",
)
LAYER_TENSORS = ("keys", "recurrent_states", "ssm_states", "conv_states")  # of a cache's layer


@dataclass(eq=False)
class Caches:
    """The caches that the forwards of a block were called with, or returned.

    Owned by the block's `PositionTracker`.
    """

    # by id: the cache, its text, and the columns that it had
    _entries: dict[int, tuple[weakref.ref[Any], SequenceBatch, int]] = field(default_factory=dict)
    _fingerprints: dict[tuple[SequenceBatch, int], Tensor] = field(default_factory=dict)

    def note(self, cache: Any, text: SequenceBatch, columns: int) -> None:
        """Notes that a cache has this many columns of a text."""
        identity = _identity(cache)
        if identity is None:
            return
        self._entries = {
            key: entry for key, entry in self._entries.items() if entry[0]() is not None
        }
        self._entries[id(identity)] = weakref.ref(identity), text, columns
        fingerprint = _fingerprint(cache, columns)
        if fingerprint is not None:
            self._fingerprints[text, columns] = fingerprint

    def text_of(self, cache: Any) -> tuple[SequenceBatch, int] | None:
        """Returns the text of a cache that the block knows, and the columns that it had."""
        identity = _identity(cache)
        entry = self._entries.get(id(identity))
        if identity is None or entry is None:
            return None
        reference, text, columns = entry
        return (text, columns) if reference() is identity else None

    def copied_from(self, cache: Any, columns: int) -> SequenceBatch | None:
        """Returns the text of which a cache holds a copy."""
        fingerprint = _fingerprint(cache, columns)
        if fingerprint is None:
            return None
        for (text, text_columns), other in reversed(self._fingerprints.items()):
            if text_columns == columns and _equal(fingerprint, other):
                return text
        return None

    def could_be_copy(self, cache: Any, columns: int) -> bool:
        """True if a cache may be a copy, and has no values by which that can be decided."""
        if _fingerprint(cache, columns) is not None:
            return False
        return any(text.seen >= columns for _, text, _ in self._entries.values())

    def unchanged(self, cache: Any, text: SequenceBatch, columns: int) -> bool:
        """False if the rows of a cache are not those that the last forward left in it."""
        fingerprint, other = _fingerprint(cache, columns), self._fingerprints.get((text, columns))
        return fingerprint is None or other is None or _equal(fingerprint, other)


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """Returns the cache among the arguments of a forward; None if there is none."""
    for name in ARGUMENT_NAMES:
        cache = arguments.get(name)
        if cache is not None:
            return cache
    return None


def cache_of(output: Any) -> Any:
    """Returns the cache in the output of a forward; None if there is none."""
    for name in ARGUMENT_NAMES:
        cache = getattr(output, name, None)
        if cache is not None:
            return cache
    if isinstance(output, tuple):
        for item in output:
            if _is_cache(item):
                return item
    return None


def columns_in(cache: Any, entry: tuple[SequenceBatch, int] | None) -> int:
    """Returns how many columns of a text a cache has, or raises `Unsupported`.

    `entry` is what `Caches.text_of` returns for it.
    """
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        try:
            return int(cache.get_seq_length())
        except ValueError:  # a state-space model's cache does not count
            if not cache.has_previous_state():
                return 0
    elif entry is None:
        tensors = list(_tensors(cache))
        if not tensors:
            return 0
        lengths = {tensor.shape[-2] for tensor in tensors if tensor.ndim == 4}
        if len(lengths) == 1 and all(tensor.ndim == 4 for tensor in tensors):
            return lengths.pop()
    if entry is None:
        raise Unsupported(
            f"this forward goes on from a {type(cache).__name__} that no forward of the block has "
            "filled, and it does not say how many tokens it has read: fill it in the block, or run "
            "the whole text"
        )
    return entry[1]


def _is_cache(item: Any) -> bool:
    if hasattr(item, "get_seq_length"):
        return True
    if not isinstance(item, tuple | list) or not item:
        return False
    return all(isinstance(layer, tuple | list) and _has_tensor(layer) for layer in item)


def _has_tensor(layer: Any) -> bool:
    return next(_tensors(layer), None) is not None


def _tensors(cache: Any) -> Iterator[Tensor]:
    """The tensors in a cache that is made of tuples."""
    if isinstance(cache, Tensor):
        yield cache
    elif isinstance(cache, tuple | list):
        for item in cache:
            yield from _tensors(item)


def _identity(cache: Any) -> Any:
    """The object by which a cache is recognised."""
    if cache is None or isinstance(cache, tuple | list):
        return next(_tensors(cache), None)
    try:
        weakref.ref(cache)
    except TypeError:
        return None
    return cache


def _fingerprint(cache: Any, columns: int) -> Tensor | None:
    """The last layer's values at the last column: equal in a copy, different for another text."""
    layers = getattr(cache, "layers", None)
    if layers is None:
        tensors = [tensor for tensor in _tensors(cache) if tensor.ndim == 4]
        if not tensors:
            return None
        return tensors[-1][..., -1, :].detach().clone()
    for layer in reversed(layers):
        for name in LAYER_TENSORS:
            values = getattr(layer, name, None)
            if not isinstance(values, Tensor) or values.ndim < 3 or not values.numel():
                continue
            if name != "keys":
                return values.detach().clone()
            last = columns - 1 if columns <= values.shape[-2] else -1
            return values[..., last, :].detach().clone()
    return None


def _equal(fingerprint: Tensor, other: Tensor) -> bool:
    if fingerprint.shape != other.shape:
        return False
    return torch.equal(fingerprint, other.to(fingerprint.device))
