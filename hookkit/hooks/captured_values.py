"""What a capture kept: values with the row and the position of each, joined over the forwards of a
text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor, nn

from ..arguments import described
from ..display import shown
from ..errors import NotCaptured
from ..models.batch_positions import Selection
from ..models.positions import Where
from ..models.sites import SQUARE, AnySite, ModuleSite, Site, Sites, parse


@dataclass(frozen=True, eq=False, repr=False)
class Captured:
    """A copy of the values at a site, which nothing changes later.

    `values` [row, pos, ...] (at scores and pattern [row, head, query, key], positions being those
    of queries) holds the chosen rows and positions in the order of the text, zero where a shorter
    row was filled up; `positions` [row, pos] says which position each is, -1 where filled. `rows`
    are the prompts' numbers, `prompts` the prompts' tokens. For a tensor without rows and positions
    of its own, `positions` is None.
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
            and (self.site, self.where, self.rows, self.prompts)
            == (other.site, other.where, other.rows, other.prompts)
            and torch.equal(self.values, other.values)
        )

    def __hash__(self) -> int:
        return hash((self.site, self.where, self.rows, self.prompts))

    def _repr_html_(self) -> str:
        facts = {
            "shape": list(self.values.shape),
            "dtype": self.values.dtype,
            "rows": list(self.rows),
        }
        return shown(f"captured {self.site}", facts)

    def __repr__(self) -> str:
        return f"Captured({self.site}, {list(self.values.shape)}, rows {list(self.rows)})"

    @property
    def by_place(self) -> Shaped[Tensor, "row pos ..."]:
        """The values with rows and positions as the first two axes, for scores and patterns too."""
        return in_order(self.site, self.values)

    def head(self, head: int) -> "Captured":
        """The values of one head of a site that was captured with all of them."""
        if (
            not isinstance(self.site, Site)
            or self.site.head is not None
            or head >= self.by_place.shape[2]
        ):
            raise NotCaptured(f"{self.site} was captured, which has no head {head} to take")
        site = Site(self.site.name, self.site.layer, head)
        return replace(self, site=site, values=self.by_place[:, :, head])

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
        return [
            {place: column for column, place in enumerate(row) if place >= 0}
            for row in self.positions.tolist()
        ]

    def column(self, row: int, position: int) -> int:
        """The index of a position's value in a row of `values`."""
        columns = self._columns[row]
        if position not in columns:
            raise NotCaptured(
                f"position {position} of {self.site} was asked for, and the source has positions "
                f"{min(columns)} to {max(columns)} of its row {self.rows[row]}: capture it there"
            )
        return columns[position]


def in_order(site: AnySite, values: Tensor) -> Tensor:
    """Values [row, query, head, key] of scores or a pattern as [row, head, query, key], or back;
    others as they are.
    """
    whole_square = isinstance(site, Site) and site.name in SQUARE and site.head is None
    return values.transpose(1, 2) if whole_square else values


@dataclass(eq=False, slots=True)
class LazyCapture:
    """The place of one capture at one site, whose pieces are joined when it is first asked for."""

    site: AnySite
    name: str | None
    make: Callable[[], Captured] | None
    made: Captured | None = None

    def __getstate__(self) -> tuple[None, dict[str, Any]]:
        """What a copy has: the values, joined."""
        return None, {"site": self.site, "name": self.name, "make": None, "made": self.captured()}

    def captured(self) -> Captured:
        """What was captured."""
        if self.made is None:
            assert self.make is not None
            self.made, self.make = self.make(), None  # the pieces are let go
        return self.made


@dataclass(frozen=True, eq=False, repr=False)
class Captures:
    """All that the captures of one text kept, by site: `kept["resid_post.6"]`, or
    `kept["resid_post.6", "before"]`.
    """

    slots: tuple[LazyCapture, ...] = ()
    ended: tuple[AnySite, ...] = ()  # asked for in rows alone that had ended before they came there

    @property
    def all(self) -> list[Captured]:
        """Every capture, in the order of the hooks."""
        return [slot.captured() for slot in self.slots]

    @property
    def sites(self) -> Sites:
        """The sites that have values, in the order of the hooks."""
        return Sites(tuple(dict.fromkeys(slot.site for slot in self.slots)))

    def captured(self, site: str | AnySite, name: str | None = None) -> Captured:
        """The values at a site with their rows and positions; `name` where several captures kept
        it.
        """
        wanted = parse(site) if isinstance(site, str) else site
        if not isinstance(wanted, Site | ModuleSite):
            raise NotCaptured(
                f"{described(site)} is no site: ask for [site] or [site, name], such as ['resid_post.6']. "
                f"It has {self.sites}."
            )
        found = self._at(wanted, name)
        if found:
            return self._only(wanted, found).captured()
        if isinstance(wanted, Site) and wanted.head is not None:
            whole = self._at(Site(wanted.name, wanted.layer), name)
            if whole:
                return self._only(wanted, whole).captured().head(wanted.head)
        what = str(wanted) if name is None else f"{wanted} named {name!r}"
        if wanted in self.ended:
            raise NotCaptured(
                f"{what} was to be captured in rows that had ended before they came to the capture's positions: there "
                "is nothing of it. Let the rows generate more tokens, or capture it elsewhere"
            )
        raise NotCaptured(f"{what} was not captured. {self._there(wanted)}")

    def _at(self, site: AnySite, name: str | None) -> list[LazyCapture]:
        return [
            slot for slot in self.slots if slot.site == site and (name is None or slot.name == name)
        ]

    def _only(self, wanted: AnySite, found: list[LazyCapture]) -> LazyCapture:
        if len(found) > 1:
            raise NotCaptured(
                f"{wanted} was captured {len(found)} times, with the names {', '.join(repr(s.name) for s in found)}: "
                f"give each capture a name of its own and ask for [{str(wanted)!r}, name]"
            )
        return found[0]

    def _there(self, wanted: AnySite) -> str:
        if not self.slots:
            return "Nothing was: give hk.capture(site) to the run."
        if wanted.every_layer:
            one, all_of_them = f"{wanted}.0", f".stack({str(wanted)!r})"
            return f"Name one layer, such as {one!r}, or stack them with {all_of_them}. It has {self.sites}."
        return f"It has {self.sites}."

    def __getitem__(self, key: "str | AnySite | tuple[str | AnySite, str]") -> Tensor:
        if isinstance(key, tuple) and len(key) != 2:
            raise NotCaptured(
                f"{described(key)} is no key: ask for [site] or [site, name], such as ['resid_post.6']"
            )
        site, name = key if isinstance(key, tuple) else (key, None)
        return self.captured(site, name).values

    def stack(self, name: str) -> Shaped[Tensor, "layer ..."]:
        """The values of every captured layer of a site, such as "resid_post", in the order of the
        layers, where the first of them is.
        """
        found = sorted(site for site in self.sites if isinstance(site, Site) and site.name == name)
        if not found:
            raise NotCaptured(f"no layer of {name!r} was captured. {self._there(Site(name))}")
        first, *others = (self[site] for site in found)
        return torch.stack(
            [first, *(values.to(first.device) for values in others)]
        )  # layers may be on several

    def _ipython_key_completions_(self) -> list[str]:
        return [str(site) for site in self.sites]


@dataclass(eq=False, slots=True)
class CapturedChunk:
    """What one forward gave to a capture. `cells` is None where the tensor has no rows and
    positions of its own.

    `leaf` is what a capture with gradients gives out, where that is not `values` itself but in
    another order.
    """

    call: int
    cells: Selection | None
    values: Tensor
    leaf: Tensor | None = None

    def of_rows(self, rows: Sequence[int]) -> list["CapturedChunk"]:
        """The same of some model rows alone, as one piece; none where it has none of them."""
        cells = _cells(self)
        chosen = [number for number, row in enumerate(cells.rows) if row in rows]
        if not chosen:
            return []
        mine = [cells.rows[number] for number in chosen]
        places = [cells.places[number] for number in chosen]
        values = self.values[torch.tensor(chosen, device=self.values.device)]
        return [
            CapturedChunk(
                self.call, replace(cells, rows=mine, places=places, valid=None, whole=False), values
            )
        ]


@dataclass(frozen=True)
class SequenceEnd:
    """How a text ended: each final row's prompt, how many positions count, and the model row it was
    in each call.
    """

    prompts: Sequence[int]
    limits: Sequence[int] | None = None
    lineage: dict[int, list[int]] | None = None
    expand: int = 1  # model rows of each prompt

    def limit(self, row: int) -> int | None:
        """How many positions of a model row count; None where no end is known.

        Where beams go from row to row, that of the longest text that came of the row's prompt: what
        ran after it led to none.
        """
        if self.limits is None:
            return None
        return self.limits[row] if self.lineage is None else self._longest.get(row // self.expand)

    @cached_property
    def _longest(self) -> dict[int, int]:
        longest: dict[int, int] = {}
        for prompt, limit in zip(self.prompts, self.limits or (), strict=False):
            longest[prompt] = max(limit, longest.get(prompt, 0))
        return longest

    def sources(self, call: int) -> Sequence[int]:
        """The model row that each final row was in a call, -1 for none."""
        return range(len(self.prompts)) if self.lineage is None else self.lineage[call]


def joined(
    pieces: list[CapturedChunk], ending: SequenceEnd, unseen: float
) -> tuple[Tensor, Tensor, list[int]]:
    """The values [row, pos, ...] of all pieces, their positions [row, pos], and the final rows that
    have any.

    `unseen` fills the last axis where later pieces have more in it, as scores and patterns have
    keys.
    """
    if len(pieces) == 1 and ending.limits is None:
        cells = _cells(pieces[0])
        return pieces[0].values, cells.positions, cells.rows
    blocks = [_arranged(piece, ending.sources(piece.call)) for piece in pieces]
    widest = max(values.shape[-1] for values, _ in blocks)
    wide = [
        v
        if v.shape[-1] == widest
        else nn.functional.pad(v, (0, widest - v.shape[-1]), value=unseen)
        for v, _ in blocks
    ]
    values = torch.cat(wide, dim=1)
    positions = torch.cat([positions for _, positions in blocks], dim=1)
    if ending.limits is not None:
        positions = positions.masked_fill(positions >= torch.tensor(ending.limits)[:, None], -1)
    return _compacted(values, positions)


def _arranged(piece: CapturedChunk, sources: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The values and positions of one piece, with a row for every final row."""
    cells = _cells(piece)
    if list(sources) == cells.rows:
        return piece.values, cells.positions
    index = {row: number for number, row in enumerate(cells.rows)}
    taken = torch.tensor([index.get(source, -1) for source in sources])
    positions = cells.positions[taken].masked_fill((taken < 0)[:, None], -1)
    return piece.values[taken.to(piece.values.device)], positions


def _cells(piece: CapturedChunk) -> Selection:
    assert piece.cells is not None, "a tensor without rows and positions has one piece"
    return piece.cells


def _compacted(values: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """The same with the gaps taken out: rows without positions dropped, positions moved to the
    front, the rest zero.
    """
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
    positions = torch.cat(
        [_widened(part.positions, width, -1) for part in parts if part.positions is not None]
    )
    prompts = tuple(prompt for part in parts for prompt in part.prompts)
    return replace(
        first, values=values, positions=positions, rows=tuple(range(len(prompts))), prompts=prompts
    )


def _widened(values: Tensor, width: int, fill: int) -> Tensor:
    return nn.functional.pad(
        values, [0, 0] * (values.ndim - 2) + [0, width - values.shape[1]], value=fill
    )
