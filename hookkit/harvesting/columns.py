"""Columns: the rows of all shards one behind the other, read from the disk as far as they are looked at."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, TypeAlias

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from ..checked_files import tensors_in
from ..errors import BadHook, DamagedHarvest, NotCaptured, OutOfRange
from ..positions import At, Where
from .folder import COLUMNS, Shard
from .texts import places

RowsLike: TypeAlias = int | slice | Sequence[int] | Tensor


@dataclass(frozen=True, eq=False)
class Shards:
    """The shards of a folder that are done, and those of them that are open."""

    folder: Path
    all: tuple[Shard, ...]
    _open: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    @cached_property
    def starts(self) -> list[int]:
        """The number of each shard's first row, and of the row behind the last."""
        return [0, *accumulate(shard.rows for shard in self.all)]

    def __len__(self) -> int:
        return len(self.all)

    def place(self, row: int) -> tuple[int, int]:
        """The number of a row's shard, and of the row in it."""
        shard = bisect_right(self.starts, row) - 1
        return shard, row - self.starts[shard]

    def tensors(self, shard: int) -> dict[str, Tensor]:
        """The tensors of a shard, mapped into memory: what is changed in them never reaches the disk."""
        if shard not in self._open:
            entry = self.all[shard]
            try:
                tensors = tensors_in(entry.path(self.folder), error=DamagedHarvest)[0]
            except DamagedHarvest as error:
                raise DamagedHarvest(
                    f"{entry.file}, shard {shard} of {len(self.all)}, cannot be read ({error}): call verify(), which "
                    "says what to do"
                ) from error
            _check_columns(tensors, entry)
            self._open[shard] = tensors
        return self._open[shard]

    def close_before(self, row: int) -> None:
        """Let go of the shards that end before a row: the pages of open ones count as this process's memory."""
        for shard in [shard for shard in self._open if self.starts[shard + 1] <= row]:
            del self._open[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # another process opens them for itself


@dataclass(frozen=True, eq=False, repr=False)
class Column:
    """The rows of one site of a harvest, or of one head of it: a number, a slice or a list of numbers gives a copy.

    It has a length and rows by number, which is all that torch's DataLoader wants of a dataset.
    """

    shards: Shards
    name: str
    sizes: tuple[int, ...]  # of the site's axes
    dtype: torch.dtype
    head: int | None = None

    def __len__(self) -> int:
        return self.shards.starts[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """The number of rows, and the sizes of the site's axes."""
        return (len(self), *self.sizes)

    def __repr__(self) -> str:
        head = "" if self.head is None else f".{self.head}"
        return f"Column({self.name}{head}, {list(self.shape)}, {str(self.dtype).removeprefix('torch.')})"

    def __getitem__(self, rows: RowsLike) -> Shaped[Tensor, "..."]:
        if isinstance(rows, slice) and rows.step in (None, 1):
            return self._slice(*rows.indices(len(self))[:2])
        numbers = numbered(rows, len(self))
        if numbers.ndim == 0:
            shard, inside = self.shards.place(int(numbers))
            return self._of(shard)[inside].clone()
        found = torch.empty((len(numbers), *self.sizes), dtype=self.dtype)
        ordered, order = numbers.sort()  # the disk is read from front to back
        bounds = torch.searchsorted(ordered, torch.tensor(self.shards.starts)).tolist()
        for shard, (first, last) in enumerate(pairwise(bounds)):
            if first < last:
                found[order[first:last]] = self._of(shard)[ordered[first:last] - self.shards.starts[shard]]
        return found

    def _slice(self, start: int, stop: int) -> Tensor:
        parts = [
            self._of(shard)[max(0, start - first) : stop - first]
            for shard, (first, last) in enumerate(pairwise(self.shards.starts))
            if first < stop and start < last and start < stop
        ]
        if not parts:
            return torch.empty((0, *self.sizes), dtype=self.dtype)
        return parts[0].clone() if len(parts) == 1 else torch.cat(parts)

    def _of(self, shard: int) -> Tensor:
        values = self.shards.tensors(shard).get(self.name)
        sizes = self.sizes if self.head is None else None  # those of a head lack an axis
        if values is None or values.dtype != self.dtype or (sizes is not None and tuple(values.shape[1:]) != sizes):
            raise DamagedHarvest(
                f"shard {shard} of {len(self.shards)} has not the {self.name} that harvest.json says: call verify(), "
                "which says what to do"
            )
        if self.head is None:
            return values
        if values.ndim < 2 or self.head >= values.shape[1] or tuple(values.shape[2:]) != self.sizes:
            raise DamagedHarvest(f"shard {shard} has other heads at {self.name} than harvest.json says")
        return values[:, self.head]


def _check_columns(tensors: Mapping[str, Tensor], shard: Shard) -> None:
    """Raise `DamagedHarvest` where a shard's columns are not those of so many rows of tokens."""
    lacking = [name for name in (*COLUMNS, "ids", "starts") if name not in tensors]
    short = [name for name, tensor in tensors.items() if name not in ("ids", "starts") and not _rows(tensor, shard)]
    if lacking or short:
        words = f"has no {', '.join(lacking)}" if lacking else f"has not {shard.rows} rows of {', '.join(short)}"
        raise DamagedHarvest(f"{shard.file} {words}: it was changed; call verify(), which says what to do")
    starts, read = tensors["starts"], tensors["read"]
    ends = starts.ndim == 1 and len(starts) > 1 and int(starts[0]) == 0 and int(starts[-1]) == len(tensors["ids"])
    inside = ends and bool((starts.diff() >= 0).all()) and bool(((read >= 0) & (read < len(starts) - 1)).all())
    if not inside:
        raise DamagedHarvest(f"{shard.file} has rows of tokens that are not there: it was changed; call verify()")


def _rows(tensor: Tensor, shard: Shard) -> bool:
    return tensor.ndim > 0 and len(tensor) == shard.rows


def rows_at(shard: Mapping[str, Tensor], where: Where) -> Int[Tensor, " row"]:
    """The rows of a shard that stand at some positions of their texts. `NotCaptured` where one was not harvested."""
    if where == Where():
        return torch.arange(len(shard["pos"]))

    def find(at: At) -> tuple[int, ...]:
        raise BadHook(f"pos={at!r}: a harvest has no tokenizer to find a text with; harvest at these positions")

    found: list[int] = []
    counts = torch.bincount(shard["read"], minlength=len(shard["starts"]) - 1).tolist()
    ids = shard["ids"].split(shard["starts"].diff().tolist())
    first = 0
    for count, row in zip(counts, ids, strict=True):
        there = {place: first + n for n, place in enumerate(shard["pos"][first : first + count].tolist())}
        for place in places(row.tolist(), where, find):
            if place not in there:
                raise NotCaptured(
                    f"position {place} of text {int(shard['text'][first])} was asked for, and was not harvested: "
                    f"{len(there)} of its positions were, {min(there)} to {max(there)}"
                )
            found.append(there[place])
        first += count
    return torch.tensor(found, dtype=torch.int64)


def numbered(rows: RowsLike, count: int) -> Int[Tensor, "..."]:
    """Row numbers from 0, of all the ways to say which; `OutOfRange` for a row that is not there."""
    if isinstance(rows, slice):
        return torch.arange(*rows.indices(count))
    numbers = torch.as_tensor(rows)
    if not numbers.numel():
        return numbers.long()
    if numbers.dtype == torch.bool or numbers.is_floating_point() or numbers.ndim > 1:
        raise BadHook(f"rows={rows!r} were asked for: give a number, a slice or a list of whole numbers")
    numbers = numbers.long()
    low, high = int(numbers.min()), int(numbers.max())
    if not -count <= low <= high < count:
        wrong = low if low < -count else high
        raise OutOfRange(f"row {wrong} was asked for, and there are {count}: 0 to {count - 1}, or counted from the end")
    return torch.where(numbers < 0, numbers + count, numbers)
