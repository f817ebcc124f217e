"""A harvest on disk: rows by number, in slices, in batches or shuffled; only what is asked for is
read.

harvest = hk.open_harvest("folder")
harvest["resid_post.6"][17], harvest["pos"][17], harvest.tokens(17)
for batch in harvest.batches(4096, seed=0):
    batch["resid_post.6"], batch["token"]

Features of a dictionary are read as sparse tensors: see `SparseColumn`.
"""

from __future__ import annotations

import itertools
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from ...arguments import check_arguments
from ...display import count_of, describe_outcome, render_html
from ...errors import BadHook, DamagedHarvest, EmptySelection, NotCaptured, OutOfRange
from ...files.address import Address, read_folder
from ...files.atomic import sha256
from ...models.positions import Named, PosLike, Where, read_position
from ...models.sites import AnySite, Site, Sites, SitesLike, as_sites, parse_site
from .columns import Column, RowsLike, Shards, SparseColumn, resolve_rows
from .folder import End, download_index, local_file, read_index, read_settings
from .statistics import Statistics, StatisticsSum
from .texts import COLUMN_DTYPES, COLUMNS, positions_of_row

Name = TypeVar("Name", bound=str | AnySite)

TOKEN_COLUMNS: tuple[str, ...] = COLUMNS[:4]  # text, piece, pos, token
CHUNK = 4096  # rows that statistics add at once
CHUNK_NUMBERS = 2**24  # of features, with their zeros, that statistics add at once


@check_arguments
def open_harvest(folder: str | os.PathLike[str]) -> Harvest:
    """Returns the harvest in a folder. An unfinished harvest has the rows of its complete shards.

    The folder can be an address such as s3://bucket/name. A shard is then downloaded when its first
    row is read, and compared with its sha256. The copy is removed with `harvest.shards`, or when
    `batches` and `statistics` have passed it.

    Raises `DamagedHarvest` if the folder has no harvest.

    >>> made = hk.harvest(lm, ["Tea with milk", "Coffee"], "resid_post.6", "folder", progress=False)
    >>> open_harvest("folder")
    Harvest(6 rows of 2 texts; 1 site: resid_post.6)
      next: harvest['resid_post.6'], harvest.batches(...), harvest.table(...)
    """
    place = read_folder(folder)
    if isinstance(place, Path):
        return _open(place, place)
    with place.temporary_folder() as copies:
        download_index(place, copies)
        return _open(copies, place)


def _open(folder: Path, place: Path | Address) -> Harvest:
    about = read_settings(folder)
    shards, end = read_index(folder)
    return Harvest(about, Shards(place, tuple(shards)), end)


# ---- selections of rows


def rows_at_positions(shard: Mapping[str, Tensor], where: Where) -> Int[Tensor, " row"]:
    """Returns the numbers of a shard's rows at some positions of their texts.

    Raises `NotCaptured` for a position that was not harvested.
    """
    if where == Where():
        return torch.arange(len(shard["pos"]))
    result: list[int] = []
    sequences = shard["ids"].split(shard["starts"].diff().tolist())
    counts = torch.bincount(shard["read"], minlength=len(sequences)).tolist()
    all_rows = torch.arange(len(shard["pos"])).split(counts)
    for sequence, rows in zip(sequences, all_rows, strict=True):
        row_of_position = dict(zip(shard["pos"][rows].tolist(), rows.tolist(), strict=True))
        for position in positions_of_row(sequence.tolist(), where, _refuse_text):
            if position not in row_of_position:
                raise NotCaptured(
                    f"position {position} of text {int(shard['text'][rows[0]])} was asked for, and "
                    f"was not harvested: {len(row_of_position)} of its positions were, "
                    f"{min(row_of_position)} to {max(row_of_position)}"
                )
            result.append(row_of_position[position])
    return torch.tensor(result, dtype=torch.int64)


def _refuse_text(at: Named) -> tuple[int, ...]:
    raise BadHook(
        f"pos={at!r}: a harvest has token ids only, and finds no text or role in them; harvest at "
        "these positions"
    )


# ---- the harvest


@dataclass(frozen=True, eq=False, repr=False)
class Harvest:
    """Values at sites on disk, a row for each position of each text. Made by `harvest`.

    `harvest["resid_post.6"]` are the values at a site. `harvest["text"]`, "piece", "pos" and
    "token" say which token each row has: the number of its text, of the piece of it (0 unless it
    was split), its position and its id. `about` has the settings in harvest.json. `end` is None
    while the harvest is unfinished.
    """

    about: Mapping[str, Any]
    shards: Shards
    end: End | None

    @property
    def finished(self) -> bool:
        """False while texts are missing: `hk.harvest` with the same arguments continues."""
        return self.end is not None

    @cached_property
    def sites(self) -> Sites:
        """The sites that have values."""
        return Sites(tuple(map(parse_site, self.about["sites"])))

    @property
    def texts(self) -> int:
        """The number of texts that were read, including those that were left out."""
        if self.end is not None:
            return self.end.texts
        return self.shards.all[-1].text + 1 if self.shards.all else 0

    @property
    def left_out(self) -> int:
        """The number of texts without a row."""
        after_last_shard = 0 if self.end is None else self.end.left_out
        return sum(shard.left_out for shard in self.shards.all) + after_last_shard

    def __len__(self) -> int:
        return self.shards.starts[-1]

    def _ipython_key_completions_(self) -> list[str]:
        return list(map(str, self.sites))

    def _repr_html_(self) -> str:
        facts = {"rows": len(self), "texts": self.texts, "finished": self.finished}
        return render_html("Harvest", {**facts, "sites": self.sites})

    def __repr__(self) -> str:
        texts = count_of(self.texts, "text")
        if not self.finished:
            texts += ", unfinished"
        text = f"Harvest({len(self)} rows of {texts}; {self.sites})"
        column = f"harvest[{str(self.sites[0])!r}]"
        return describe_outcome(text, column, "harvest.batches(...)", "harvest.table(...)")

    def __getitem__(self, name: str | AnySite) -> Column | SparseColumn:
        """Returns all rows of a site, of one head or feature of it, or of a token column."""
        if name in TOKEN_COLUMNS:
            return Column(self.shards, str(name), (), COLUMN_DTYPES[str(name)])
        site = parse_site(name) if isinstance(name, str) else name
        if site in self.sites:
            return self._column(site)
        match site:
            case Site(site_name, layer, int(head)) if Site(site_name, layer) in self.sites:
                return self._column(Site(site_name, layer), head)
        raise NotCaptured(
            f"{site} was not harvested. There are {self.sites}; "
            f"and the columns {', '.join(TOKEN_COLUMNS)}"
        )

    def _columns(self, names: Iterable[Name]) -> dict[Name, Column | SparseColumn]:
        return {name: self[name] for name in names}

    def _column(self, site: AnySite, head: int | None = None) -> Column | SparseColumn:
        kind = self.about["sites"][str(site)]
        sizes, dtype = tuple(kind["shape"]), getattr(torch, kind["dtype"])
        is_sparse = kind.get("sparse", False)
        if head is not None and head >= sizes[0]:
            part = "features" if is_sparse else "heads"
            raise OutOfRange(
                f"{site}.{head} was asked for, and {site} has {sizes[0]} {part}: "
                f"0 to {sizes[0] - 1}"
            )
        if is_sparse:
            return SparseColumn(self.shards, str(site), sizes[0], dtype, head)
        return Column(self.shards, str(site), sizes, dtype, head)

    def tokens(self, row: int) -> tuple[int, ...]:
        """Returns all token ids that the model read with the token of a row: its text or piece."""
        number = int(resolve_rows(row, len(self)))
        shard = bisect_right(self.shards.starts, number) - 1
        tensors = self.shards.tensors(shard)
        sequence = int(tensors["read"][number - self.shards.starts[shard]])
        start, stop = tensors["starts"][sequence : sequence + 2].tolist()
        return tuple(tensors["ids"][start:stop].tolist())

    @check_arguments
    def table(
        self, rows: RowsLike = slice(None), *, sites: Sequence[str | AnySite] | str = ()
    ) -> pd.DataFrame:
        """Returns which token each row has: columns row, text, piece, pos, token_id.

        With `sites`, a column for each number of these sites follows: "z.9[3, 17]" is number 17 of
        head 3. Only these rows are read. The numbers are copies; use `batches` for many rows.

        >>> made = hk.harvest(lm, ["Tea with milk", "Coffee"], "z.9", "folder", progress=False)
        >>> made.table(slice(4, 6), sites=["z.9.3"]).iloc[:, :6].columns.tolist()
        ['row', 'text', 'piece', 'pos', 'token_id', 'z.9.3[0]']
        """
        numbers = torch.atleast_1d(resolve_rows(rows, len(self)))
        columns = {"row": numbers.tolist()}
        for name in TOKEN_COLUMNS:
            columns[name] = self[name][numbers].tolist()
        tables = [pd.DataFrame(columns).rename(columns={"token": "token_id"})]
        for name in _site_names(sites):
            tables.append(_table_of_numbers(name, self[name], numbers))
        return pd.concat(tables, axis=1)

    @check_arguments
    def batches(
        self,
        size: int,
        *,
        sites: Sequence[str | AnySite] | None = None,
        seed: int | None = None,
        drop_last: bool = False,
    ) -> Iterator[dict[str, Tensor]]:
        """Returns an iterator over all rows, `size` at a time.

        A batch has a tensor for each site (all sites by default), and text, piece, pos and token.
        With a `seed` the rows are shuffled over the whole harvest, in the same way for the same
        seed. `drop_last` leaves out a last batch of fewer rows.
        """
        if size < 1:
            raise BadHook(f"a batch of {size} rows was asked for: give 1 or more")
        names = _site_names(list(self.sites) if sites is None else sites)
        columns = self._columns(dict.fromkeys([*names, *TOKEN_COLUMNS]))
        end = len(self) // size * size if drop_last else len(self)
        if seed is None:
            return _successive_batches(self.shards, columns, size, end)
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return (_rows_of(columns, rows) for rows in order[:end].split(size) if len(rows))

    @check_arguments
    def statistics(
        self,
        sites: SitesLike | None = None,
        *,
        pos: PosLike = None,
        covariance: bool = False,
        top: int = 0,
    ) -> Statistics:
        """Returns the statistics of these sites (all by default) over the rows, as
        `hk.stats.activation_statistics`.

        `pos` selects the rows at some positions. The values are those on the disk, rounded to their
        dtype.
        """
        where, total = Where(read_position(pos)), StatisticsSum(covariance, top)
        selected = self.sites if sites is None else as_sites(sites)
        columns, token_columns = self._columns(selected), self._columns(TOKEN_COLUMNS)
        sizes = [CHUNK]
        for column in columns.values():
            if isinstance(column, SparseColumn):
                sizes.append(max(1, CHUNK_NUMBERS // column.n_features))
        for rows in self._chunks_at(where, min(sizes)):
            values = {site: column[rows].to_dense() for site, column in columns.items()}
            total.add(values, rows, _rows_of(token_columns, rows))
        if not total.of_site:
            raise EmptySelection(f"none of the {len(self)} rows is at pos={pos!r}: give others")
        about = {name: self.about[name] for name in ("model", "context", "long", "pos")}
        if pos is not None:
            about["pos"] = repr(where.pos)
        about |= {"texts": self.texts, "left_out": self.left_out}
        about["stream"] = (self.end or self.shards.all[-1]).stream
        return total.statistics(about)

    def _chunks_at(self, where: Where, size: int) -> Iterator[Int[Tensor, " row"]]:
        """Yields the numbers of the rows at some positions, of one shard after another."""
        for shard, (start, end) in enumerate(pairwise(self.shards.starts)):
            rows = start + rows_at_positions(self.shards.tensors(shard), where)
            if len(rows):
                yield from rows.split(size)
            self.shards.close_before(end)

    def verify(self) -> None:
        """Reads all shards, and raises `DamagedHarvest` with those that have changed."""
        wrong: list[str] = []
        for shard in self.shards.all:
            with local_file(self.shards.folder, shard.file) as path:
                if not path.is_file():
                    wrong.append(f"{shard.file} is missing")
                elif sha256(path) != shard.sha256:
                    wrong.append(f"{shard.file} was changed")
        if wrong:
            raise DamagedHarvest(
                f"{'; '.join(wrong)}; the other {len(self.shards) - len(wrong)} shards are as they "
                "were written: delete what was changed and call hk.harvest with the same settings "
                "and texts, which makes it again"
            )


def _site_names(sites: Sequence[str | AnySite] | str) -> list[str]:
    return [sites] if isinstance(sites, str) else list(map(str, sites))


def _table_of_numbers(name: str, column: Column | SparseColumn, rows: Tensor) -> pd.DataFrame:
    """Returns a column for each number of a site, named by its index along the site's axes."""
    if isinstance(column, SparseColumn) and column.feature is None:
        raise BadHook(
            f"a table has a column for each number, and {name} has {column.n_features} features, "
            f"most of them zero: name features, {name}.7, or read harvest[{name!r}][rows]"
        )
    values = column[rows]
    if values.dtype == torch.bfloat16:
        values = values.float()
    if not column.sizes:
        return pd.DataFrame({name: values.numpy()})
    indices = itertools.product(*map(range, column.sizes))
    names = [f"{name}[{', '.join(map(str, index))}]" for index in indices]
    return pd.DataFrame(values.flatten(1).numpy(), columns=names)


def _rows_of(columns: Mapping[Name, Column | SparseColumn], rows: RowsLike) -> dict[Name, Tensor]:
    return {name: column[rows] for name, column in columns.items()}


def _successive_batches(
    shards: Shards, columns: Mapping[str, Column | SparseColumn], size: int, end: int
) -> Iterator[dict[str, Tensor]]:
    for start in range(0, end, size):
        shards.close_before(start)
        yield _rows_of(columns, slice(start, min(start + size, end)))
