"""The columns of a harvest: the rows of all shards at one site, one shard after another.

Shards are mapped into memory, and only the rows that are asked for are read. A `Column` has as many
numbers for every row. A `SparseColumn` has the features that are active at each token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, TypeAlias

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from ...errors import BadHook, DamagedHarvest, OutOfRange
from ...files.address import Address
from ...files.atomic import sha256
from ...files.untrusted import read_tensors
from .folder import Shard, local_file
from .sparse_rows import FEATURES, STARTS, SparseRows, join_sparse
from .texts import COLUMNS, TOKENS

RowsLike: TypeAlias = int | slice | Sequence[int] | Tensor


# ---- shards and columns


@dataclass(frozen=True, eq=False)
class Shards:
    """The complete shards of a folder. It owns the tensors of the open ones, mapped into memory.

    Those of an address are mapped from copies without a name, which go with the tensors.
    """

    folder: Path | Address
    all: tuple[Shard, ...]
    _open: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    @cached_property
    def starts(self) -> list[int]:
        """The number of each shard's first row, and the number of all rows."""
        return [0, *accumulate(shard.rows for shard in self.all)]

    def __len__(self) -> int:
        return len(self.all)

    def tensors(self, shard: int) -> dict[str, Tensor]:
        """Returns the tensors of a shard. Changes to them are never written to the disk."""
        if shard not in self._open:
            entry = self.all[shard]
            try:
                with local_file(self.folder, entry.file) as path:
                    if isinstance(self.folder, Address):
                        _check_copy(path, entry)
                    tensors, _ = read_tensors(path, error=DamagedHarvest)
            except DamagedHarvest as error:
                raise DamagedHarvest(
                    f"{entry.file}, shard {shard} of {len(self.all)}, cannot be read ({error}): "
                    "call verify(), which says what to do"
                ) from error
            problem = _find_problem(tensors, entry.rows)
            if problem:
                raise DamagedHarvest(
                    f"{entry.file} {problem}: it was changed; call verify(), which says what to do"
                )
            self._open[shard] = tensors
        return self._open[shard]

    def sparse_rows(self, shard: int, site: str) -> SparseRows:
        """Returns the rows of a sparse site in a shard. Raises `DamagedHarvest` without it."""
        tensors = self.tensors(shard)
        names = (site, site + FEATURES, site + STARTS)
        if not tensors.keys() >= {*names}:
            raise self.damaged(shard, site)
        values, features, starts = map(tensors.__getitem__, names)
        return SparseRows(starts.diff(), features, values)

    def damaged(self, shard: int, site: str) -> DamagedHarvest:
        """Returns the error for a shard that lacks a site, or has it with another dtype or size."""
        return DamagedHarvest(
            f"shard {shard} of {len(self)} does not have the {site} of harvest.json: call "
            "verify(), which says what to do"
        )

    def close_before(self, row: int) -> None:
        """Closes the shards that end before a row, so that they no longer take memory."""
        for shard in list(self._open):
            if self.starts[shard + 1] <= row:
                del self._open[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # another process opens the shards itself


def _check_copy(path: Path, shard: Shard) -> None:
    if not path.is_file() or sha256(path) != shard.sha256:
        raise DamagedHarvest(f"it is missing, or does not have the sha256 {shard.sha256[:8]}…")


def _find_problem(tensors: Mapping[str, Tensor], rows: int) -> str:
    """Returns what is wrong with the tensors of a shard of so many rows; "" if nothing is."""
    missing = sorted({*COLUMNS, *TOKENS} - tensors.keys())
    if missing:
        return f"has no {', '.join(missing)}"
    sparse_sites = [name.removesuffix(STARTS) for name in tensors if name.endswith(STARTS)]
    for site in sparse_sites:
        if not _is_sparse_site(tensors, site, rows):
            return f"does not have {rows} rows of {site}"
    sparse: set[str] = set()
    for site in sparse_sites:
        sparse |= {site, site + FEATURES, site + STARTS}
    for name, tensor in tensors.items():
        if name not in {*TOKENS, *sparse} and tensor.shape[:1] != (rows,):
            return f"does not have {rows} rows of {name}"
    if not _has_valid_sequences(tensors):
        return "refers to tokens that do not exist"
    return ""


def _is_sparse_site(tensors: Mapping[str, Tensor], site: str, rows: int) -> bool:
    """True if the three tensors of a sparse site belong together."""
    values, features = tensors.get(site), tensors.get(site + FEATURES)
    starts = tensors[site + STARTS]
    if values is None or features is None or starts.shape != (rows + 1,):
        return False
    shape = (int(starts[-1]),)
    is_ordered = int(starts[0]) == 0 and bool((starts.diff() >= 0).all())
    return is_ordered and values.shape == shape and features.shape == shape


def _has_valid_sequences(tensors: Mapping[str, Tensor]) -> bool:
    starts, read = tensors["starts"], tensors["read"]
    if starts.ndim != 1 or len(starts) < 2:
        return False
    if int(starts[0]) != 0 or int(starts[-1]) != len(tensors["ids"]):
        return False
    is_sequence = (read >= 0) & (read < len(starts) - 1)
    return bool((starts.diff() >= 0).all() & is_sequence.all())


@dataclass(frozen=True, eq=False, repr=False)
class Column:
    """The rows of a site, of one of its heads, or of a token column. Indexing returns a copy.

    The index is a number, a slice or a list of numbers. A column can be the data set of torch's
    DataLoader.
    """

    shards: Shards
    name: str
    stored_sizes: tuple[int, ...]  # of the site's axes, of all heads
    dtype: torch.dtype
    head: int | None = None

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes of the axes of a row."""
        return self.stored_sizes if self.head is None else self.stored_sizes[1:]

    def __len__(self) -> int:
        return self.shards.starts[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """The number of rows, and the sizes of the site's axes."""
        return (len(self), *self.sizes)

    def __repr__(self) -> str:
        name, dtype = self.name, str(self.dtype).removeprefix("torch.")
        if self.head is not None:
            name += f".{self.head}"
        return f"Column({name}, {list(self.shape)}, {dtype})"

    def __getitem__(self, rows: RowsLike) -> Shaped[Tensor, ...]:
        if isinstance(rows, slice) and rows.step in (None, 1):
            start, stop, _ = rows.indices(len(self))
            return self._slice(start, stop)
        numbers = resolve_rows(rows, len(self))
        result = torch.empty((numbers.numel(), *self.sizes), dtype=self.dtype)
        ordered, order = numbers.flatten().sort()  # the disk is read from front to back
        bounds = torch.searchsorted(ordered, torch.tensor(self.shards.starts)).tolist()
        for shard, (first, last) in enumerate(pairwise(bounds)):
            if first < last:
                rows_in_shard = ordered[first:last] - self.shards.starts[shard]
                result[order[first:last]] = self._values(shard)[rows_in_shard]
        return result.reshape(*numbers.shape, *self.sizes)

    def _slice(self, start: int, stop: int) -> Tensor:
        parts = [torch.empty((0, *self.sizes), dtype=self.dtype)]
        for shard, (first, last) in enumerate(pairwise(self.shards.starts)):
            if max(first, start) < min(last, stop):
                parts.append(self._values(shard)[max(0, start - first) : stop - first])
        return torch.cat(parts)

    def _values(self, shard: int) -> Tensor:
        """Returns this column's values in a shard. Raises `DamagedHarvest` for a wrong shape."""
        values = self.shards.tensors(shard).get(self.name)
        sizes = self.stored_sizes
        if values is None or values.dtype != self.dtype or values.shape[1:] != sizes:
            raise self.shards.damaged(shard, self.name)
        return values if self.head is None else values[:, self.head]


@dataclass(frozen=True, eq=False, repr=False)
class SparseColumn:
    """The rows of all features of a dictionary, or of one feature. Indexing returns a copy.

    All features of some rows are a sparse COO tensor [row, feature]; `tensor.indices()` has the row
    and the feature of each active one, and `tensor.values()` its activation. One feature of some
    rows is a dense tensor [row].
    """

    shards: Shards
    name: str
    n_features: int
    dtype: torch.dtype
    feature: int | None = None

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes of the axes of a row."""
        return (self.n_features,) if self.feature is None else ()

    def __len__(self) -> int:
        return self.shards.starts[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """The number of rows, and of features."""
        return (len(self), *self.sizes)

    def __repr__(self) -> str:
        name = self.name if self.feature is None else f"{self.name}.{self.feature}"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"SparseColumn({name}, {list(self.shape)}, {dtype})"

    def __getitem__(self, rows: RowsLike) -> Shaped[Tensor, ...]:
        numbers = resolve_rows(rows, len(self))
        selected = self._select(numbers.flatten())
        if self.feature is not None:
            return selected.of_feature(self.feature).reshape(numbers.shape)
        tensor = selected.as_tensor(self.n_features)
        return tensor if numbers.ndim else tensor[0]

    def _select(self, numbers: Int[Tensor, " row"]) -> SparseRows:
        """Returns rows by their numbers; the disk is read from front to back."""
        ordered, order = numbers.sort()
        nothing = torch.empty(0, dtype=torch.int32)
        parts = [SparseRows(nothing.long(), nothing, nothing.to(self.dtype))]
        bounds = torch.searchsorted(ordered, torch.tensor(self.shards.starts)).tolist()
        for shard, (first, last) in enumerate(pairwise(bounds)):
            if first < last:
                rows = ordered[first:last] - self.shards.starts[shard]
                parts.append(self.in_shard(shard).select(rows))
        return join_sparse(parts).select(order.argsort())

    def in_shard(self, shard: int) -> SparseRows:
        """Returns the rows of a shard. Raises `DamagedHarvest` for features that do not exist."""
        rows = self.shards.sparse_rows(shard, self.name)
        is_feature = (rows.features >= 0) & (rows.features < self.n_features)
        if rows.values.dtype != self.dtype or not bool(is_feature.all()):
            raise self.shards.damaged(shard, self.name)
        return rows


# ---- selections of rows


def resolve_rows(rows: RowsLike, count: int) -> Int[Tensor, ...]:
    """Returns row numbers from 0. Raises `OutOfRange` for a row that does not exist."""
    if isinstance(rows, slice):
        return torch.arange(*rows.indices(count))
    numbers = torch.as_tensor(rows)
    if not numbers.numel():
        return numbers.long()
    if numbers.dtype == torch.bool or numbers.is_floating_point() or numbers.ndim > 1:
        raise BadHook(
            f"rows={rows!r} were asked for: give a number, a slice or a list of whole numbers"
        )
    numbers = numbers.long()
    for number in (int(numbers.min()), int(numbers.max())):
        if not -count <= number < count:
            raise OutOfRange(
                f"row {number} was asked for, and there are {count}: 0 to {count - 1}, "
                "or counted from the end"
            )
    return torch.where(numbers < 0, numbers + count, numbers)
