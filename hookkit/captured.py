"""What a capture kept: values with the row and the position of each, joined over the forwards of a text."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from .calls import Cells
from .errors import NotCaptured
from .positions import Where
from .sites import AnySite, Site, Sites, parse


@dataclass(frozen=True, eq=False, repr=False)
class Captured:
    """A copy of the values at a site, which nothing changes later.

    `values` [row, pos, ...] holds the chosen rows and positions in the order of the text, zero where a shorter row was
    filled up; `positions` [row, pos] says which position each is, -1 where filled. `rows` are the prompts' numbers,
    `prompts` the prompts' tokens. For a tensor without rows and positions of its own, `positions` is None.
    """

    site: AnySite
    where: Where
    values: Shaped[Tensor, "..."]
    positions: Int[Tensor, "row pos"] | None
    rows: tuple[int, ...]
    prompts: tuple[tuple[int, ...], ...]
    name: str | None = None

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Captured)
            and (self.site, self.where, self.rows, self.prompts) == (other.site, other.where, other.rows, other.prompts)
            and torch.equal(self.values, other.values)
        )

    def __hash__(self) -> int:
        return hash((self.site, self.where, self.rows, self.prompts))

    def __repr__(self) -> str:
        return f"Captured({self.site}, {list(self.values.shape)}, rows {list(self.rows)})"

    def head(self, head: int) -> "Captured":
        """The values of one head of a site that was captured with all of them."""
        if not isinstance(self.site, Site) or self.site.head is not None:
            raise NotCaptured(f"{self.site} was captured, which has no head {head} to take")
        site = Site(self.site.name, self.site.layer, head)
        return replace(self, site=site, values=self.values[:, :, head])

    def row(self, prompt: int) -> int:
        """The index of a prompt's values: its own row, or the only one there is."""
        if prompt in self.rows:
            return self.rows.index(prompt)
        if len(self.rows) == 1:
            return 0
        raise NotCaptured(
            f"the source of {self.site} has rows {list(self.rows)}, and row {prompt} is to be replaced: "
            "give a source of one row, or with the same rows"
        )

    @cached_property
    def _columns(self) -> list[dict[int, int]]:
        assert self.positions is not None
        return [{place: column for column, place in enumerate(row) if place >= 0} for row in self.positions.tolist()]

    def column(self, row: int, position: int) -> int:
        """The index of a position's value in a row of `values`."""
        columns = self._columns[row]
        if position not in columns:
            raise NotCaptured(
                f"position {position} of {self.site} was asked for, and the source has positions "
                f"{min(columns)} to {max(columns)} of its row {self.rows[row]}: capture it there"
            )
        return columns[position]


@dataclass(frozen=True, eq=False, repr=False)
class Kept:
    """All that the captures of one text kept, by site: `kept["resid_post.6"]`, or `kept["resid_post.6", "before"]`."""

    all: tuple[Captured, ...] = ()

    @property
    def sites(self) -> Sites:
        """The sites that have values, in the order of the hooks."""
        return Sites(tuple(dict.fromkeys(each.site for each in self.all)))

    def captured(self, site: str | AnySite, name: str | None = None) -> Captured:
        """The values at a site with their rows and positions; `name` where several captures kept it."""
        wanted = parse(site) if isinstance(site, str) else site
        found = self._at(wanted, name)
        if not found and isinstance(wanted, Site) and wanted.head is not None:
            whole = self._at(Site(wanted.name, wanted.layer), name)
            found = [each.head(wanted.head) for each in whole if wanted.head < each.values.shape[2]]
        if not found:
            what = str(wanted) if name is None else f"{wanted} named {name!r}"
            raise NotCaptured(f"{what} was not captured. {self._there(wanted)}")
        if len(found) > 1:
            names = ", ".join(repr(each.name) for each in found)
            raise NotCaptured(
                f"{wanted} was captured {len(found)} times, with the names {names}: give each capture a name of its own "
                f"and ask for [{str(wanted)!r}, name]"
            )
        return found[0]

    def _at(self, site: AnySite, name: str | None) -> list[Captured]:
        return [each for each in self.all if each.site == site and (name is None or each.name == name)]

    def _there(self, wanted: AnySite) -> str:
        if not self.all:
            return "Nothing was: give hk.capture(site) to the run."
        if wanted.every_layer:
            return f"Name one layer, such as '{wanted}.0', or stack them with .stack({str(wanted)!r}). It has {self.sites}."
        return f"It has {self.sites}."

    def __getitem__(self, key: "str | AnySite | tuple[str | AnySite, str]") -> Tensor:
        site, name = key if isinstance(key, tuple) else (key, None)
        return self.captured(site, name).values

    def stack(self, name: str) -> Shaped[Tensor, "layer ..."]:
        """The values of every captured layer of a site, such as "resid_post", in the order of the layers."""
        found = sorted(each.site for each in self.all if isinstance(each.site, Site) and each.site.name == name)
        if not found:
            raise NotCaptured(f"no layer of {name!r} was captured. {self._there(Site(name))}")
        return torch.stack([self.captured(site).values for site in found])


@dataclass(eq=False)
class Piece:
    """What one forward gave to a capture. `cells` is None where the tensor has no rows and positions of its own."""

    call: int
    cells: Cells | None
    values: Tensor


@dataclass(frozen=True)
class Ending:
    """How a text ended: for each final row, its prompt, how many positions count, and the model row it had in each call."""

    prompts: Sequence[int]
    limits: Sequence[int] | None = None
    lineage: dict[int, list[int]] | None = None

    def sources(self, call: int) -> Sequence[int]:
        """The model row that each final row was in a call, -1 for none."""
        return range(len(self.prompts)) if self.lineage is None else self.lineage[call]


def joined(pieces: list[Piece], ending: Ending) -> tuple[Tensor, Tensor, list[int]]:
    """The values [row, pos, ...] of all pieces, their positions [row, pos], and the final rows that have any."""
    if len(pieces) == 1 and ending.limits is None:
        cells = _cells(pieces[0])
        return pieces[0].values, cells.positions, cells.rows
    blocks = [_arranged(piece, ending.sources(piece.call)) for piece in pieces]
    values = torch.cat([values for values, _ in blocks], dim=1)
    positions = torch.cat([positions for _, positions in blocks], dim=1)
    if ending.limits is not None:
        positions = positions.masked_fill(positions >= torch.tensor(ending.limits)[:, None], -1)
    return _compacted(values, positions)


def _arranged(piece: Piece, sources: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The values and positions of one piece, with a row for every final row."""
    cells = _cells(piece)
    if list(sources) == cells.rows:
        return piece.values, cells.positions
    index = {row: number for number, row in enumerate(cells.rows)}
    taken = torch.tensor([index.get(source, -1) for source in sources])
    positions = cells.positions[taken].masked_fill((taken < 0)[:, None], -1)
    return piece.values[taken.to(piece.values.device)], positions


def _cells(piece: Piece) -> Cells:
    assert piece.cells is not None, "a tensor without rows and positions has one piece"
    return piece.cells


def _compacted(values: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """The same with the gaps taken out: rows without positions dropped, positions moved to the front, the rest zero."""
    there = positions >= 0
    rows = [row for row, some in enumerate(there.any(dim=1).tolist()) if some]
    width = int(there.sum(dim=1).max()) if rows else 0
    if len(rows) == len(there) and bool(there[:, :width].all()):
        return values[:, :width] if width < values.shape[1] else values, positions[:, :width], rows
    order = torch.argsort(there.long(), dim=1, descending=True, stable=True)[rows, :width]
    positions = positions[torch.tensor(rows)[:, None], order]
    picked: Any = (torch.tensor(rows)[:, None].to(values.device), order.to(values.device))
    fill = (positions < 0).to(values.device)
    kept = values[picked]
    return kept.masked_fill(fill.reshape(*fill.shape, *[1] * (kept.ndim - 2)), 0), positions, rows


def merged(parts: Sequence[Captured]) -> Captured:
    """Captures of one site from several batches, as one, their rows numbered on."""
    first = parts[0]
    width = max(part.values.shape[1] for part in parts)
    values = torch.cat([_widened(part.values, width, 0) for part in parts])
    positions = torch.cat([_widened(part.positions, width, -1) for part in parts if part.positions is not None])
    prompts = tuple(prompt for part in parts for prompt in part.prompts)
    return replace(first, values=values, positions=positions, rows=tuple(range(len(prompts))), prompts=prompts)


def _widened(values: Tensor, width: int, fill: int) -> Tensor:
    return torch.nn.functional.pad(values, [0, 0] * (values.ndim - 2) + [0, width - values.shape[1]], value=fill)
