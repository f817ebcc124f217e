"""Caches of keys and values, or of states, that are handed from one forward to the next: how much of a text each has,
and which text it is of.

A cache is known by the object itself, or by the tensors in a tuple of them. A copy is known by what it holds.
"""

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import Unsupported
from ..models.batch_positions import SequenceBatch

NAMES = (
    "past_key_values",
    "cache_params",
    "past_key_value",
    "layer_past",
    "past_buckets_states",
    "mems",
    "state",
)
HOLDS = (
    "keys",
    "recurrent_states",
    "ssm_states",
    "conv_states",
)  # what a layer of a cache may have


@dataclass(eq=False)
class Caches:
    """The caches that the forwards of a block were given or gave, each with its text and the columns that it had."""

    _known: dict[int, tuple[weakref.ref[Any], SequenceBatch, int]] = field(default_factory=dict)
    _marks: dict[tuple[SequenceBatch, int], Tensor] = field(default_factory=dict)

    def note(self, cache: Any, text: SequenceBatch, columns: int) -> None:
        """A forward of this text has left the cache with so many columns."""
        keeper = _keeper(cache)
        if keeper is None:
            return
        self._known = {key: entry for key, entry in self._known.items() if entry[0]() is not None}
        self._known[id(keeper)] = weakref.ref(keeper), text, columns
        mark = _mark(cache, columns)
        if mark is not None:
            self._marks[text, columns] = mark

    def text_of(self, cache: Any) -> tuple[SequenceBatch, int] | None:
        """The text of a cache that a forward of the block has left, and the columns that it had then."""
        keeper = _keeper(cache)
        entry = self._known.get(id(keeper))
        if keeper is None or entry is None or entry[0]() is not keeper:
            return None
        return entry[1], entry[2]

    def copied_from(self, cache: Any, columns: int) -> SequenceBatch | None:
        """The text of which a cache holds a copy."""
        mark = _mark(cache, columns)
        for (text, length), other in reversed(self._marks.items()):
            if length == columns and mark is not None and _equal(mark, other):
                return text
        return None

    def could_be_copy(self, cache: Any, columns: int) -> bool:
        """True where that cannot be told."""
        return _mark(cache, columns) is None and any(
            text.seen >= columns for _, text, _ in self._known.values()
        )

    def unchanged(self, cache: Any, text: SequenceBatch, columns: int) -> bool:
        """False if the rows of a cache are others than those that the last forward left."""
        mark, other = _mark(cache, columns), self._marks.get((text, columns))
        return mark is None or other is None or _equal(mark, other)


def cache_in(given: Mapping[str, Any]) -> Any:
    """The cache that a forward is given, None where it has none."""
    return next((given[name] for name in NAMES if given.get(name) is not None), None)


def cache_of(output: Any) -> Any:
    """The cache that a forward gives, None where it gives none."""
    for name in NAMES:
        found = getattr(output, name, None)
        if found is not None:
            return found
    if isinstance(output, tuple):
        return next((item for item in output if _is_cache(item)), None)
    return None


def columns_in(cache: Any, known: tuple[SequenceBatch, int] | None) -> int:
    """How many columns of a text a cache has, or `Unsupported`. `known` is what `Caches` knows of it."""
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        try:
            return int(cache.get_seq_length())
        except ValueError:  # a state-space model's cache does not count
            if not cache.has_previous_state():
                return 0
    elif known is None:
        tensors = list(_tensors(cache))
        if not tensors:
            return 0
        lengths = {tensor.shape[-2] for tensor in tensors if tensor.ndim == 4}
        if len(lengths) == 1 and all(tensor.ndim == 4 for tensor in tensors):
            return lengths.pop()
    if known is None:
        raise Unsupported(
            f"this forward goes on from a {type(cache).__name__} that no forward of the block has filled, and it does "
            "not say how many tokens it has read: fill it in the block, or run the whole text"
        )
    return known[1]


def _is_cache(item: Any) -> bool:
    if hasattr(item, "get_seq_length"):
        return True
    layers = isinstance(item, tuple | list) and len(item) > 0
    return layers and all(
        isinstance(layer, tuple | list) and any(_tensors(layer)) for layer in item
    )


def _tensors(cache: Any) -> Iterator[Tensor]:
    if isinstance(cache, Tensor):
        yield cache
    elif isinstance(cache, tuple | list):
        for item in cache:
            yield from _tensors(item)


def _keeper(cache: Any) -> Any:
    """The object by which a cache is known."""
    if cache is None or isinstance(cache, tuple | list):
        return next(_tensors(cache), None)
    try:
        weakref.ref(cache)
    except TypeError:
        return None
    return cache


def _mark(cache: Any, columns: int) -> Tensor | None:
    """What the last layer holds of the last column: the same in a copy, and in no other text's cache."""
    layers = getattr(cache, "layers", None)
    if layers is None:
        tensors = [tensor for tensor in _tensors(cache) if tensor.ndim == 4]
        return tensors[-1][..., -1, :].detach().clone() if tensors else None
    for layer in reversed(layers):
        for name in HOLDS:
            held = getattr(layer, name, None)
            if not isinstance(held, Tensor) or held.ndim < 3 or not held.numel():
                continue
            if name != "keys":
                return held.detach().clone()
            last = columns - 1 if columns <= held.shape[-2] else -1
            return held[..., last, :].detach().clone()
    return None


def _equal(mark: Tensor, other: Tensor) -> bool:
    return mark.shape == other.shape and torch.equal(mark, other.to(mark.device))
