"""Reading a harvest: rows by number, in slices, in batches, shuffled; without loading what is not asked for.

harvest = hk.open_harvest("folder")
harvest["resid_post.6"][17], harvest["pos"][17], harvest.tokens(17)
for batch in harvest.batches(4096, seed=0):
    batch["resid_post.6"], batch["token"]
"""

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from ..arguments import checks_arguments, folder_of
from ..displaying import shown
from ..errors import BadHook, DamagedHarvest, EmptySelection, NotCaptured, OutOfRange
from ..positions import PosLike, Where, as_pos
from ..sites import AnySite, Site, Sites, SitesLike, as_sites, parse
from ..whole_files import sha256
from .columns import Column, RowsLike, Shards, numbered, rows_at
from .folder import COLUMNS, End, read_index, read_settings
from .summary import Statistics, summing

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
        return self.end.texts if self.end else self.shards.all[-1].text + 1 if self.shards.all else 0

    @property
    def left_out(self) -> int:
        """How many of them gave no row."""
        return sum(shard.left_out for shard in self.shards.all) + (self.end.left_out if self.end else 0)

    def __len__(self) -> int:
        return self.shards.starts[-1]

    def _ipython_key_completions_(self) -> list[str]:
        return [str(site) for site in self.sites]

    def _repr_html_(self) -> str:
        return shown(
            "Harvest", {"rows": len(self), "texts": self.texts, "finished": self.finished, "sites": self.sites}
        )

    def __repr__(self) -> str:
        texts = f"{self.texts} text{'' if self.texts == 1 else 's'}{'' if self.finished else ', unfinished'}"
        return f"Harvest({len(self)} rows of {texts}; {self.sites})"

    def __getitem__(self, name: str | AnySite) -> Column:
        """The values at a site, or which token each row is of, all rows one behind the other."""
        if name in WORDS:
            return Column(self.shards, str(name), (), torch.int64 if name == "text" else torch.int32)
        site = parse(name) if isinstance(name, str) else name
        whole = Site(site.name, site.layer) if isinstance(site, Site) else site
        if site not in self.sites and whole not in self.sites:
            raise NotCaptured(f"{site} was not harvested. There are {self.sites}; and the columns {', '.join(WORDS)}")
        head = None if site in self.sites else site.head  # pyright: ignore[reportAttributeAccessIssue]
        source = self.about["sites"][str(site if head is None else whole)]
        sizes, dtype = tuple(source["shape"]), getattr(torch, source["dtype"])
        if head is None:
            return Column(self.shards, str(site), sizes, dtype)
        if head >= sizes[0]:
            raise OutOfRange(f"{site} was asked for, and {whole} has {sizes[0]} heads: 0 to {sizes[0] - 1}")
        return Column(self.shards, str(whole), sizes[1:], dtype, head)

    def tokens(self, row: int) -> tuple[int, ...]:
        """The ids of all tokens that the model read together with the token of a row: its text, or piece of one."""
        shard, inside = self.shards.place(int(numbered(row, len(self))))
        found = self.shards.tensors(shard)
        read = int(found["read"][inside])
        return tuple(found["ids"][int(found["starts"][read]) : int(found["starts"][read + 1])].tolist())

    @checks_arguments
    def table(self, rows: RowsLike = slice(None), *, sites: Sequence[str | AnySite] | str = ()) -> pd.DataFrame:
        """Which token each row is of: columns row, text, piece, pos, token_id. Only these rows are read.

        With `sites`, what is there stands behind them, a column for each number: "z.9[3, 17]" is number 17 of head 3.
        The numbers are copies; for more than a part, go through `batches`.

        >>> made = hk.harvest(lm, ["Tea with milk", "Coffee"], "z.9", "folder", progress=False)
        >>> made.table(slice(4, 6), sites=["z.9.3"]).iloc[:, :6].columns.tolist()
        ['row', 'text', 'piece', 'pos', 'token_id', 'z.9.3[0]']
        """
        numbers = torch.atleast_1d(numbered(rows, len(self)))
        found = {name: self[name][numbers].tolist() for name in WORDS}
        table = pd.DataFrame({"row": numbers.tolist(), **found}).rename(columns={"token": "token_id"})
        names = [str(site) for site in ([sites] if isinstance(sites, str) else sites)]
        return pd.concat([table, *(_numbers(name, self[name], numbers) for name in names)], axis=1)

    @checks_arguments
    def batches(
        self, size: int, *, sites: Sequence[str | AnySite] | None = None, seed: int | None = None, whole: bool = False
    ) -> Iterator[dict[str, Tensor]]:
        """All rows once, `size` at a time: a tensor for each site (all, where left out), and text, piece, pos, token.

        With a `seed` they come shuffled over the whole harvest, the same for the same seed. `whole` leaves out a last
        batch of fewer rows.
        """
        if size < 1:
            raise BadHook(f"a batch of {size} rows was asked for: give 1 or more")
        names = [str(site) for site in (self.sites if sites is None else [sites] if isinstance(sites, str) else sites)]
        columns = {name: self[name] for name in dict.fromkeys([*names, *WORDS])}
        order = None if seed is None else torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return _batches(self.shards, columns, size, order, len(self) // size * size if whole else len(self))

    @checks_arguments
    def statistics(
        self, sites: SitesLike | None = None, *, pos: PosLike = None, covariance: bool = False, top: int = 0
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
        return total.statistics({**about, "texts": self.texts, "left_out": self.left_out, "stream": stream})

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
    return pd.DataFrame(values.numpy(), columns=[f"{name}[{', '.join(map(str, place))}]" for place in places])


def _batches(
    shards: Shards, columns: Mapping[str, Column], size: int, order: Tensor | None, end: int
) -> Iterator[dict[str, Tensor]]:
    for start in range(0, end, size):
        rows = slice(start, min(start + size, end))
        if order is None:
            shards.close_before(start)
        yield {name: column[rows if order is None else order[rows]] for name, column in columns.items()}
