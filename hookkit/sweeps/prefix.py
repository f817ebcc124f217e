"""The positions before the first that an edit reaches: their keys and values, computed once, shared by all rows."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, cat

KeysAndValues = Sequence[tuple[Tensor, Tensor] | None]
"""For each layer of a cache its keys and values [row, head, pos, d_head]; None where a layer keeps nothing."""


def kept(cache: Any) -> KeysAndValues:
    """What transformers' cache holds after a forward."""
    return [(layer.keys, layer.values) if layer.is_initialized else None for layer in cache.layers]


def prefix(known: KeysAndValues, columns: int, rows: Callable[[], Tensor]) -> Any:
    """A cache of transformers that has the first `columns` columns of what is known.

    It keeps nothing: each layer's update gives the prefix of the rows that are there at that moment, `rows()`, with
    the new keys and values behind it. So the batch may grow from layer to layer, and a prefix is never stored twice.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    class Prefix(DynamicLayer):
        """One layer of it."""

        def __init__(self, keys: Tensor, values: Tensor) -> None:
            super().__init__()
            self.keys, self.values = keys[..., :columns, :], values[..., :columns, :]
            self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            assert self.keys is not None and self.values is not None
            return _behind(self.keys, rows(), key_states), _behind(self.values, rows(), value_states)

    cache: Any = DynamicCache()
    cache.layers = [DynamicLayer() if each is None else Prefix(*each) for each in known]
    return cache


def _behind(known: Tensor, rows: Tensor, new: Tensor) -> Tensor:
    """New keys or values behind those that are known, of which some rows are meant."""
    alone = len(known) == 1  # and need not be copied twice
    first = known.expand(len(rows), *known.shape[1:]) if alone else known.index_select(0, rows.to(known.device))
    return cat([first, new], dim=-2)
