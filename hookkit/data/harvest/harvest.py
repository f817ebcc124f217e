"""Columns: the rows of all shards one behind the other, read from the disk as far as they are looked at.

Reading a harvest: rows by number, in slices, in batches, shuffled; without loading what is not asked for.

harvest = hk.open_harvest("folder")
harvest["resid_post.6"][17], harvest["pos"][17], harvest.tokens(17)
for batch in harvest.batches(4096, seed=0):
    batch["resid_post.6"], batch["token"]
"""

import itertools
import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd
import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from ...arguments import checks_arguments, folder_of
from ...display import shown
from ...errors import BadHook, DamagedHarvest, EmptySelection, NotCaptured, OutOfRange
from ...files.atomic import sha256
from ...files.untrusted import tensors_in
from ...models.positions import At, PosLike, Where, as_pos
from ...models.sites import AnySite, Site, Sites, SitesLike, as_sites, parse
from .folder import COLUMNS, End, Shard, read_index, read_settings
from .statistics import Statistics, summing
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
                found[order[first:last]] = self._of(shard)[
                    ordered[first:last] - self.shards.starts[shard]
                ]
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
        if (
            values is None
            or values.dtype != self.dtype
            or (sizes is not None and tuple(values.shape[1:]) != sizes)
        ):
            raise DamagedHarvest(
                f"shard {shard} of {len(self.shards)} has not the {self.name} that harvest.json says: call verify(), "
                "which says what to do"
            )
        if self.head is None:
            return values
        if values.ndim < 2 or self.head >= values.shape[1] or tuple(values.shape[2:]) != self.sizes:
            raise DamagedHarvest(
                f"shard {shard} has other heads at {self.name} than harvest.json says"
            )
        return values[:, self.head]


def _check_columns(tensors: Mapping[str, Tensor], shard: Shard) -> None:
    """Raise `DamagedHarvest` where a shard's columns are not those of so many rows of tokens."""
    lacking = [name for name in (*COLUMNS, "ids", "starts") if name not in tensors]
    short = [
        name
        for name, tensor in tensors.items()
        if name not in ("ids", "starts") and not _rows(tensor, shard)
    ]
    if lacking or short:
        words = (
            f"has no {', '.join(lacking)}"
            if lacking
            else f"has not {shard.rows} rows of {', '.join(short)}"
        )
        raise DamagedHarvest(
            f"{shard.file} {words}: it was changed; call verify(), which says what to do"
        )
    starts, read = tensors["starts"], tensors["read"]
    ends = (
        starts.ndim == 1
        and len(starts) > 1
        and int(starts[0]) == 0
        and int(starts[-1]) == len(tensors["ids"])
    )
    inside = (
        ends
        and bool((starts.diff() >= 0).all())
        and bool(((read >= 0) & (read < len(starts) - 1)).all())
    )
    if not inside:
        raise DamagedHarvest(
            f"{shard.file} has rows of tokens that are not there: it was changed; call verify()"
        )


def _rows(tensor: Tensor, shard: Shard) -> bool:
    return tensor.ndim > 0 and len(tensor) == shard.rows


def rows_at(shard: Mapping[str, Tensor], where: Where) -> Int[Tensor, " row"]:
    """The rows of a shard that stand at some positions of their texts. `NotCaptured` where one was not harvested."""
    if where == Where():
        return torch.arange(len(shard["pos"]))

    def find(at: At) -> tuple[int, ...]:
        raise BadHook(
            f"pos={at!r}: a harvest has no tokenizer to find a text with; harvest at these positions"
        )

    found: list[int] = []
    counts = torch.bincount(shard["read"], minlength=len(shard["starts"]) - 1).tolist()
    ids = shard["ids"].split(shard["starts"].diff().tolist())
    first = 0
    for count, row in zip(counts, ids, strict=True):
        there = {
            place: first + n for n, place in enumerate(shard["pos"][first : first + count].tolist())
        }
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
        raise BadHook(
            f"rows={rows!r} were asked for: give a number, a slice or a list of whole numbers"
        )
    numbers = numbers.long()
    low, high = int(numbers.min()), int(numbers.max())
    if not -count <= low <= high < count:
        wrong = low if low < -count else high
        raise OutOfRange(
            f"row {wrong} was asked for, and there are {count}: 0 to {count - 1}, or counted from the end"
        )
    return torch.where(numbers < 0, numbers + count, numbers)


WORDS = COLUMNS[:4]  # text, piece, pos, token
CHUNK = 4096  # rows that statistics take in at once


@checks_arguments
def open_harvest(folder: str | os.PathLike[str]) -> "Harvest":
    """The harvest in a folder, as far as it is: while it is being made, the shards that are done.

    `DamagedHarvest` where the folder has none.

    >>> made = hk.harvest(lm, ["Tea with milk", "Coffee"], "resid_post.6", "folder", progress=False)
    >>> open_harvest("folder")
    Harvest(6 rows of 2 texts; 1 site: resid_post.6)
    """
    path = folder_of(folder)
    about = read_settings(path)
    shards, end = read_index(path)
    return Harvest(about, Shards(path, tuple(shards)), end)


@dataclass(frozen=True, eq=False, repr=False)
class Harvest:
    """Values at sites, a row for each position of each text, in shards on the disk. Made by `harvest`.

    `harvest["resid_post.6"]` are the values at a site. `harvest["text"]`, "piece", "pos" and "token" say which token
    each row is of: the number of its text, of the piece of it (0 unless it was split), its position and its id. `about`
    is what harvest.json says, and `end` how it ended.
    """

    about: Mapping[str, Any]
    shards: Shards
    end: End | None

    @property
    def finished(self) -> bool:
        """False while texts are missing: `hk.harvest` with the same settings and texts goes on."""
        return self.end is not None

    @cached_property
    def sites(self) -> Sites:
        """The sites that have values."""
        return Sites(tuple(map(parse, self.about["sites"])))

    @property
    def texts(self) -> int:
        """How many texts were read, the ones that were left out counted too."""
        return (
            self.end.texts if self.end else self.shards.all[-1].text + 1 if self.shards.all else 0
        )

    @property
    def left_out(self) -> int:
        """How many of them gave no row."""
        return sum(shard.left_out for shard in self.shards.all) + (
            self.end.left_out if self.end else 0
        )

    def __len__(self) -> int:
        return self.shards.starts[-1]

    def _ipython_key_completions_(self) -> list[str]:
        return [str(site) for site in self.sites]

    def _repr_html_(self) -> str:
        return shown(
            "Harvest",
            {
                "rows": len(self),
                "texts": self.texts,
                "finished": self.finished,
                "sites": self.sites,
            },
        )

    def __repr__(self) -> str:
        texts = f"{self.texts} text{'' if self.texts == 1 else 's'}{'' if self.finished else ', unfinished'}"
        return f"Harvest({len(self)} rows of {texts}; {self.sites})"

    def __getitem__(self, name: str | AnySite) -> Column:
        """The values at a site, or which token each row is of, all rows one behind the other."""
        if name in WORDS:
            return Column(
                self.shards, str(name), (), torch.int64 if name == "text" else torch.int32
            )
        site = parse(name) if isinstance(name, str) else name
        whole = Site(site.name, site.layer) if isinstance(site, Site) else site
        if site not in self.sites and whole not in self.sites:
            raise NotCaptured(
                f"{site} was not harvested. There are {self.sites}; and the columns {', '.join(WORDS)}"
            )
        head = None if site in self.sites else site.head  # pyright: ignore[reportAttributeAccessIssue]
        source = self.about["sites"][str(site if head is None else whole)]
        sizes, dtype = tuple(source["shape"]), getattr(torch, source["dtype"])
        if head is None:
            return Column(self.shards, str(site), sizes, dtype)
        if head >= sizes[0]:
            raise OutOfRange(
                f"{site} was asked for, and {whole} has {sizes[0]} heads: 0 to {sizes[0] - 1}"
            )
        return Column(self.shards, str(whole), sizes[1:], dtype, head)

    def tokens(self, row: int) -> tuple[int, ...]:
        """The ids of all tokens that the model read together with the token of a row: its text, or piece of one."""
        shard, inside = self.shards.place(int(numbered(row, len(self))))
        found = self.shards.tensors(shard)
        read = int(found["read"][inside])
        return tuple(
            found["ids"][int(found["starts"][read]) : int(found["starts"][read + 1])].tolist()
        )

    @checks_arguments
    def table(
        self, rows: RowsLike = slice(None), *, sites: Sequence[str | AnySite] | str = ()
    ) -> pd.DataFrame:
        """Which token each row is of: columns row, text, piece, pos, token_id. Only these rows are read.

        With `sites`, what is there stands behind them, a column for each number: "z.9[3, 17]" is number 17 of head 3.
        The numbers are copies; for more than a part, go through `batches`.

        >>> made = hk.harvest(lm, ["Tea with milk", "Coffee"], "z.9", "folder", progress=False)
        >>> made.table(slice(4, 6), sites=["z.9.3"]).iloc[:, :6].columns.tolist()
        ['row', 'text', 'piece', 'pos', 'token_id', 'z.9.3[0]']
        """
        numbers = torch.atleast_1d(numbered(rows, len(self)))
        found = {name: self[name][numbers].tolist() for name in WORDS}
        table = pd.DataFrame({"row": numbers.tolist(), **found}).rename(
            columns={"token": "token_id"}
        )
        names = [str(site) for site in ([sites] if isinstance(sites, str) else sites)]
        return pd.concat([table, *(_numbers(name, self[name], numbers) for name in names)], axis=1)

    @checks_arguments
    def batches(
        self,
        size: int,
        *,
        sites: Sequence[str | AnySite] | None = None,
        seed: int | None = None,
        whole: bool = False,
    ) -> Iterator[dict[str, Tensor]]:
        """All rows once, `size` at a time: a tensor for each site (all, where left out), and text, piece, pos, token.

        With a `seed` they come shuffled over the whole harvest, the same for the same seed. `whole` leaves out a last
        batch of fewer rows.
        """
        if size < 1:
            raise BadHook(f"a batch of {size} rows was asked for: give 1 or more")
        names = [
            str(site)
            for site in (
                self.sites if sites is None else [sites] if isinstance(sites, str) else sites
            )
        ]
        columns = {name: self[name] for name in dict.fromkeys([*names, *WORDS])}
        order = (
            None
            if seed is None
            else torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        )
        return _batches(
            self.shards, columns, size, order, len(self) // size * size if whole else len(self)
        )

    @checks_arguments
    def statistics(
        self,
        sites: SitesLike | None = None,
        *,
        pos: PosLike = None,
        covariance: bool = False,
        top: int = 0,
    ) -> Statistics:
        """The statistics of these sites (all, where left out) over the rows, as `hk.statistics` gives them.

        `pos` takes the rows at some positions only. The numbers are those on the disk, as they were rounded there.
        """
        where, total = Where(as_pos(pos)), summing(covariance, top)
        chosen = self.sites if sites is None else as_sites(sites)
        columns = {site: self[site] for site in chosen}
        for shard, start in enumerate(self.shards.starts[:-1]):
            rows = start + rows_at(self.shards.tensors(shard), where)
            for some in rows.split(CHUNK) if len(rows) else ():
                places = torch.stack([self[name][some].long() for name in WORDS], dim=1)
                total.add({site: column[some] for site, column in columns.items()}, some, places)
            self.shards.close_before(self.shards.starts[shard + 1])
        if not total.of_site:
            raise EmptySelection(f"none of the {len(self)} rows is at pos={pos!r}: give others")
        about = {name: self.about[name] for name in ("model", "context", "long")}
        stream = self.end.stream if self.end else self.shards.all[-1].stream
        about |= {"pos": repr(where.pos) if pos is not None else self.about["pos"]}
        return total.statistics(
            {**about, "texts": self.texts, "left_out": self.left_out, "stream": stream}
        )

    def verify(self) -> None:
        """Read all, and raise `DamagedHarvest` with every shard that is not as it was written."""
        wrong = []
        for shard in self.shards.all:
            path = shard.path(self.shards.folder)
            if not path.is_file():
                wrong.append(f"{shard.file} is missing")
            elif sha256(path) != shard.sha256:
                wrong.append(f"{shard.file} was changed")
        if wrong:
            raise DamagedHarvest(
                f"{'; '.join(wrong)}; the other {len(self.shards) - len(wrong)} shards are as they were written: "
                "delete what was changed and call hk.harvest with the same settings and texts, which makes it again"
            )


def _numbers(name: str, column: Column, rows: Tensor) -> pd.DataFrame:
    """The numbers of a site at some rows, a column each, named by their places along the site's axes."""
    values = column[rows]
    values = (values.float() if values.dtype == torch.bfloat16 else values).flatten(1)
    places = itertools.product(*map(range, column.sizes))
    return pd.DataFrame(
        values.numpy(), columns=[f"{name}[{', '.join(map(str, place))}]" for place in places]
    )


def _batches(
    shards: Shards, columns: Mapping[str, Column], size: int, order: Tensor | None, end: int
) -> Iterator[dict[str, Tensor]]:
    for start in range(0, end, size):
        rows = slice(start, min(start + size, end))
        if order is None:
            shards.close_before(start)
        yield {
            name: column[rows if order is None else order[rows]] for name, column in columns.items()
        }
