"""The hook `capture`, the values that it keeps, and how those of several forwards are joined.

A forward gives a `CapturedChunk` to each capture. `join_chunks` joins the chunks of one text into
the tensors of a `Captured`. `Captures` holds all of them by site; each is joined when it is first
read.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..arguments import check_bool, check_keywords, check_text, describe, shorten
from ..display import render_html
from ..errors import BadHook, NotCaptured
from ..models.batch_positions import Selection, expand_mask
from ..models.positions import IndicesLike, PosLike, Where
from ..models.sites import (
    QUERY_KEY_SITES,
    AnySite,
    ModuleSite,
    Site,
    Sites,
    SitesLike,
    as_sites,
    has_name,
    parse_site,
)
from .base import Hook, as_where, set_field

INTEGER_SITES = frozenset({"experts"})  # the sites whose values are integers


@dataclass(frozen=True)
class Capture(Hook, verb="capture", takes_step=True):
    """Keeps a copy of the values at the sites. `capture` returns it."""

    name: str | None = None
    grad: bool = False
    dtype: str | None = None
    device: str | None = None
    sparse: bool = False

    def check(self) -> None:
        set_field(self, "sparse", _check_sparse(self.sparse, self.grad, self.sites))
        if self.name is not None:
            check_text(self.name, "name", "a name that tells two captures of one site apart")
        grad = check_bool(self.grad, "grad")
        set_field(self, "grad", grad)
        if grad and (self.dtype is not None or self.device is not None):
            raise BadHook(
                "capture(grad=True) keeps the very tensor of the computation: leave dtype and "
                "device out"
            )
        if self.dtype is not None:
            set_field(self, "dtype", _dtype_name(self.dtype, self.sites))
        if self.device is not None:
            set_field(self, "device", _device_name(self.device))


def _dtype_name(dtype: object, sites: Sites) -> str:
    """Returns the name of a dtype. Raises `BadHook` if it cannot hold the values of the sites."""
    name = str(dtype).removeprefix("torch.")
    torch_dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype | str) or not isinstance(torch_dtype, torch.dtype):
        raise BadHook(
            f"dtype={describe(dtype)} is no dtype of torch: say torch.float16, or 'float16'"
        )
    may_be_integers = any(
        isinstance(site, ModuleSite) or site.name in INTEGER_SITES for site in sites
    )
    if torch_dtype.is_complex or not (may_be_integers or torch_dtype.is_floating_point):
        raise BadHook(
            f"dtype={name!r} cannot hold the real numbers at {sites[0]}: say a floating dtype, "
            "such as 'float16'"
        )
    return name


def _check_sparse(sparse: object, grad: object, sites: Sites) -> bool:
    """Returns whether values are kept sparse. Raises `BadHook` where they are not mostly zero."""
    value = check_bool(sparse, "sparse")
    for site in sites if value else ():
        if not isinstance(site, Site) or not site.of_features or site.head is not None:
            raise BadHook(
                f"sparse=True keeps the values that are not zero, for all features of a dictionary "
                f"such as 'feat.resid_post.12', and {site} has few zeros: leave sparse out"
            )
    if value and grad:
        raise BadHook("a gradient is of every feature: leave sparse=True or grad=True out")
    return value


def _device_name(device: object) -> str:
    try:
        torch_device = torch.device(str(device))
    except RuntimeError as error:
        raise BadHook(
            f"device={describe(device)} is no device of torch: say 'cpu' or 'cuda:0'"
        ) from error
    if torch_device.type == "meta":
        raise BadHook(
            "device='meta' holds no numbers, so nothing would be kept: say 'cpu' or 'cuda:0'"
        )
    return str(torch_device)


@dataclass(frozen=True)
class CaptureLast(Capture):
    """A capture of each row's last position, which frees earlier positions during generation.

    `generate` uses it for logits="last".
    """


@check_keywords
def capture(
    sites: SitesLike,
    *,
    pos: PosLike = None,
    rows: IndicesLike = None,
    step: IndicesLike = None,
    name: str | None = None,
    grad: bool = False,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    sparse: bool = False,
) -> Capture:
    """Keeps a copy of the values at these sites: `run["resid_post.6"]`, of shape [row, pos, ...].

    A capture before an edit of the same site keeps the original values, one after it the changed
    values; `name` tells two captures of one site apart: `run["resid_post.6", "before"]`. Only the
    selected positions and rows are kept, in the order of the text. `dtype` and `device` are those
    of the copy. With `grad=True` the copy takes part in the computation, so that
    `torch.autograd.grad(f(run.logits), run["resid_post.6"])` works; a forward then runs with
    gradients.

    With `sparse=True`, for the features of a dictionary, the values are a sparse COO tensor
    [row, pos, feature] that holds those which are not zero. Each forward computes all features, and
    keeps no more of them.

    >>> print(capture("resid_post.6", pos=-1))
    capture(resid_post.6, pos=-1)
    """
    dtype_text = None if dtype is None else str(dtype)
    device_text = None if device is None else str(device)
    where = as_where(pos, rows, step)
    return Capture(as_sites(sites), where, name, grad, dtype_text, device_text, sparse)


@dataclass(frozen=True, eq=False, repr=False)
class Captured:
    """A copy of the values at a site, which nothing changes later.

    `values` [row, pos, ...] (at scores and pattern [row, head, query, key], where positions are
    those of queries) holds the selected rows and positions in the order of the text, padded with
    zeros; `positions` [row, pos] holds the position of each, -1 in padding. `rows` are the indices
    of the prompts in the batch, `prompts` the prompts' tokens. `positions` is None for a tensor
    without the axes batch and pos.
    """

    site: AnySite
    where: Where
    values: Shaped[Tensor, ...]
    positions: Int[Tensor, "row pos"] | None
    rows: tuple[int, ...]
    prompts: tuple[tuple[int, ...], ...]
    name: str | None = None

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Captured)
            and self._key == other._key
            and torch.equal(self.values, other.values)
        )

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[Any, ...]:
        return self.site, self.where, self.rows, self.prompts

    def _repr_html_(self) -> str:
        shape, dtype, rows = list(self.values.shape), self.values.dtype, list(self.rows)
        return render_html(f"captured {self.site}", {"shape": shape, "dtype": dtype, "rows": rows})

    def __repr__(self) -> str:
        rows = shorten(str(list(self.rows)))
        return f"Captured({self.site}, {list(self.values.shape)}, rows {rows})"

    @property
    def by_position(self) -> Shaped[Tensor, "row pos ..."]:
        """The values with row and position as the first two axes, for scores and patterns too."""
        return swap_head_and_query(self.site, self.values)

    def head(self, head: int) -> Captured:
        """Returns the values of one head of a site that was captured with all of its heads."""
        values, site = self.by_position, self.site
        if not isinstance(site, Site) or site.head is not None or head >= values.shape[2]:
            raise NotCaptured(f"{site} was captured, which has no head {head} to take")
        part = values.select(2, head)
        if part.is_sparse:
            part = part.to_dense()
        return replace(self, site=replace(site, head=head), values=part)

    def row(self, prompt: int) -> int:
        """Returns the index of a prompt's values. A capture of one row serves every prompt."""
        if prompt in self.rows:
            return self.rows.index(prompt)
        if len(self.rows) == 1:
            return 0
        raise NotCaptured(
            f"the source of {self.site} has rows {list(self.rows)}, and row {prompt} is to be "
            "replaced: give a source of one row, or with the same rows"
        )

    @cached_property
    def columns(self) -> list[dict[int, int]]:
        """The index of each position in a row of `values`, for every row."""
        assert self.positions is not None
        columns: list[dict[int, int]] = []
        for row in self.positions.tolist():
            columns.append(dict(zip(row, itertools.count())))
            columns[-1].pop(-1, None)  # padding
        return columns

    def column(self, row: int, position: int) -> int:
        """Returns the index of a position's value in a row of `values`."""
        columns = self.columns[row]
        if position not in columns:
            raise NotCaptured(
                f"position {position} of {self.site} was asked for, and the source has positions "
                f"{min(columns)} to {max(columns)} of its row {self.rows[row]}: capture it there"
            )
        return columns[position]


def swap_head_and_query(site: AnySite, values: Tensor) -> Tensor:
    """Swaps the axes head and query of the values of scores or a pattern; returns others as they
    are.

    The model's view is [row, query, head, key], the user's [row, head, query, key].
    """
    if has_name(site, *QUERY_KEY_SITES) and site.head is None:
        return values.transpose(1, 2)
    return values


@dataclass(eq=False, slots=True)
class LazyCapture:
    """The values of one capture at one site, computed when they are first read.

    The run that holds it in its `Captures` owns it.
    """

    site: AnySite
    name: str | None
    compute: Callable[[], Captured] | None
    value: Captured | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles hold the computed values."""
        return LazyCapture, (self.site, self.name, None, self.captured())

    def captured(self) -> Captured:
        """Returns the captured values."""
        if self.value is None:
            assert self.compute is not None
            self.value = self.compute()
            self.compute = None  # frees the chunks
        return self.value


@dataclass(frozen=True, eq=False, repr=False)
class Captures:
    """All captured values of one text: `captures["resid_post.6"]`, `captures["resid_post.6",
    name]`.
    """

    slots: tuple[LazyCapture, ...] = ()
    ended: tuple[AnySite, ...] = ()  # sites whose rows all ended before the capture's positions

    @property
    def all(self) -> list[Captured]:
        """Every capture, in the order of the hooks."""
        return [slot.captured() for slot in self.slots]

    @property
    def sites(self) -> Sites:
        """The sites that have values, in the order of the hooks."""
        return self._sites

    @cached_property
    def _sites(self) -> Sites:
        return Sites(tuple(dict.fromkeys(slot.site for slot in self.slots)))

    @cached_property
    def _slots_by_site(self) -> dict[AnySite, list[LazyCapture]]:
        by_site: dict[AnySite, list[LazyCapture]] = {}
        for slot in self.slots:
            by_site.setdefault(slot.site, []).append(slot)
        return by_site

    def captured(self, site: str | AnySite, name: str | None = None) -> Captured:
        """Returns the values at a site with their rows and positions.

        `name` is the capture's name, which is needed if several captures kept the site.
        """
        key = parse_site(site) if isinstance(site, str) else site
        if not isinstance(key, Site | ModuleSite):
            raise NotCaptured(
                f"{describe(site)} is no site: ask for [site] or [site, name], such as "
                f"['resid_post.6']. It has {self.sites}."
            )
        if slot := self._slot(key, name, key):
            return slot.captured()
        if isinstance(key, Site) and key.head is not None:
            all_heads = self._slot(replace(key, head=None), name, key)
            if all_heads is not None:
                return all_heads.captured().head(key.head)
        raise NotCaptured(self._why_not_captured(key, name))

    def _why_not_captured(self, site: AnySite, name: str | None) -> str:
        label = str(site) if name is None else f"{site} named {name!r}"
        if site in self.ended:
            return (
                f"{label} was to be captured in rows that had ended before they came to the "
                "capture's positions: there is nothing of it. Let the rows generate more tokens, "
                "or capture it elsewhere"
            )
        return f"{label} was not captured. {self._available(site)}"

    def _slot(self, site: AnySite, name: str | None, requested: AnySite) -> LazyCapture | None:
        """Returns the one capture of a site, or None. Raises `NotCaptured` if there are several."""
        slots = [s for s in self._slots_by_site.get(site, ()) if name in (None, s.name)]
        if len(slots) <= 1:
            return next(iter(slots), None)
        names = ", ".join(repr(slot.name) for slot in slots)
        raise NotCaptured(
            f"{requested} was captured {len(slots)} times, with the names {names}: give each "
            f"capture a name of its own and ask for [{str(requested)!r}, name]"
        )

    def _available(self, site: AnySite) -> str:
        if not self.slots:
            return "Nothing was: give hk.capture(site) to the run."
        advice = ""
        if site.every_layer:
            advice = f"Name one layer, such as '{site}.0', or stack them with .stack('{site}'). "
        return f"{advice}It has {self.sites}."

    def __getitem__(self, key: str | AnySite | tuple[str | AnySite, str]) -> Tensor:
        if not isinstance(key, tuple):
            return self.captured(key).values
        if len(key) != 2:
            raise NotCaptured(
                f"{describe(key)} is no key: ask for [site] or [site, name], such as "
                "['resid_post.6']"
            )
        return self.captured(*key).values

    def stack(self, name: str) -> Shaped[Tensor, "layer ..."]:
        """Returns the values of all captured layers of a site such as "resid_post", by layer.

        The result is on the device of the first layer.
        """
        site_of_all_layers = parse_site(name)
        sites = sorted(
            site
            for site in self.sites
            if isinstance(site, Site) and replace(site, layer=None, head=None) == site_of_all_layers
        )
        if not sites:
            raise NotCaptured(
                f"no layer of {name!r} was captured. {self._available(site_of_all_layers)}"
            )
        device = self[sites[0]].device  # layers may be on several devices
        return torch.stack([self[site].to(device) for site in sites])

    def _ipython_key_completions_(self) -> list[str]:
        return list(map(str, self.sites))


@dataclass(eq=False, slots=True)
class CapturedChunk:
    """The values that one forward gave to a capture.

    `cells` is None if the tensor has no axes batch and pos. `leaf` is the tensor that a capture
    with gradients returns, in the user's order of axes. The capture's bound hook owns the chunk.
    """

    call: int
    cells: Selection | None
    values: Tensor
    leaf: Tensor | None = None

    def of_rows(self, rows: Sequence[int]) -> list[CapturedChunk]:
        """Returns a list with the chunk of these model rows alone, or an empty list."""
        cells = _cells(self)
        kept_indices = [index for index, row in enumerate(cells.rows) if row in rows]
        if not kept_indices:
            return []
        rows = [cells.rows[index] for index in kept_indices]
        positions = [cells.row_positions[index] for index in kept_indices]
        kept_cells = replace(cells, rows=rows, row_positions=positions, valid=None, whole=False)
        return [CapturedChunk(self.call, kept_cells, self.values[kept_indices])]


@dataclass(frozen=True)
class SequenceEnd:
    """How a text ended.

    For each final row: its prompt, the number of positions that count (`limits`), and by the number
    of a forward the model row that became this row (`lineage`; None without beams, where rows never
    change).
    """

    prompts: Sequence[int]
    limits: Sequence[int] | None = None
    lineage: dict[int, list[int]] | None = None
    expand: int = 1  # model rows of each prompt

    def limit(self, row: int) -> int | None:
        """Returns how many positions of a model row count; None if no end is known.

        With beams it is the length of the longest final text of the row's prompt.
        """
        if self.limits is None:
            return None
        if self.lineage is None:
            return self.limits[row]
        return self._longest_of_prompt.get(row // self.expand)

    @cached_property
    def _longest_of_prompt(self) -> dict[int, int]:
        longest: dict[int, int] = {}
        for prompt, limit in zip(self.prompts, self.limits or (), strict=False):
            longest[prompt] = max(limit, longest.get(prompt, 0))
        return longest

    def sources(self, call: int) -> Sequence[int]:
        """Returns the model row of a forward that became each final row, -1 for none."""
        return range(len(self.prompts)) if self.lineage is None else self.lineage[call]


def join_chunks(
    chunks: list[CapturedChunk], ending: SequenceEnd, unseen: float
) -> tuple[Tensor, Tensor, list[int]]:
    """Joins the chunks of a text: values [row, pos, ...], positions [row, pos], and the final rows.

    Rows without values are left out. `unseen` pads the last axis where later chunks are wider, as
    scores and patterns have more keys.
    """
    if len(chunks) == 1 and ending.limits is None:
        cells = _cells(chunks[0])
        return chunks[0].values, cells.positions, cells.rows
    if chunks[0].values.is_sparse:
        return _join_sparse_chunks(chunks, ending)
    width = max(chunk.values.shape[-1] for chunk in chunks)
    all_values, all_positions = [], []
    for chunk in chunks:
        values, chunk_positions = _for_final_rows(chunk, ending.sources(chunk.call))
        missing = width - values.shape[-1]
        if missing and values.ndim > 2:  # one feature has the axes row and pos alone
            values = nn.functional.pad(values, (0, missing), value=unseen)
        all_values.append(values)
        all_positions.append(chunk_positions)
    positions = torch.cat(all_positions, dim=1)
    if ending.limits is not None:
        positions = positions.masked_fill(positions >= torch.tensor(ending.limits)[:, None], -1)
    return _without_gaps(torch.cat(all_values, dim=1), positions)


def _join_sparse_chunks(
    chunks: list[CapturedChunk], ending: SequenceEnd
) -> tuple[Tensor, Tensor, list[int]]:
    """`join_chunks` for sparse values [row, pos, feature].

    The cells of all chunks are numbered from 1, and the numbers are joined; 0 is an empty cell.
    """
    numbered, count = [], 1
    for chunk in chunks:
        shape = chunk.values.shape[:2]
        numbers = torch.arange(count, count + shape.numel()).reshape(shape)
        numbered.append(replace(chunk, values=numbers))
        count += shape.numel()
    numbers, positions, rows = join_chunks(numbered, ending, 0)
    flat = [_cells_of_sparse(chunk.values) for chunk in chunks]
    nothing = flat[0].values()[:0]
    empty = _sparse(nothing.new_zeros(2, 0, dtype=torch.long), nothing, (1, flat[0].shape[1]))
    cells = torch.cat([empty, *flat])
    joined = cells.index_select(0, numbers.flatten().to(cells.device)).coalesce()
    cell, feature = joined.indices()
    row_and_pos = torch.stack([cell // numbers.shape[1], cell % numbers.shape[1], feature])
    size = (*numbers.shape, joined.shape[1])
    return _sparse(row_and_pos, joined.values(), size), positions, rows


def _cells_of_sparse(values: Tensor) -> Tensor:
    """Returns sparse values [row, pos, feature] as [cell, feature]."""
    row, pos, feature = values.indices()
    width = values.shape[1]
    indices = torch.stack([row * width + pos, feature])
    return _sparse(indices, values.values(), (values.shape[0] * width, values.shape[2]))


def _sparse(indices: Tensor, values: Tensor, size: tuple[int, ...]) -> Tensor:
    """Returns a sparse tensor whose indices are in order: torch need not sort or check them."""
    return torch.sparse_coo_tensor(indices, values, size, is_coalesced=True, check_invariants=False)


def _for_final_rows(chunk: CapturedChunk, sources: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Returns the values and positions of a chunk with one row for every final row."""
    cells = _cells(chunk)
    if list(sources) == cells.rows:
        return chunk.values, cells.positions
    index_of_row = {row: index for index, row in enumerate(cells.rows)}
    indices = torch.tensor([index_of_row.get(source, -1) for source in sources])
    positions = cells.positions[indices].masked_fill((indices < 0)[:, None], -1)
    return chunk.values[indices.to(chunk.values.device)], positions


def _cells(chunk: CapturedChunk) -> Selection:
    assert chunk.cells is not None, "a tensor without rows and positions has one chunk"
    return chunk.cells


def _without_gaps(values: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """Drops rows without positions, and moves padding to the end of each row, where it is zero."""
    is_real = positions >= 0
    rows = is_real.any(dim=1).nonzero().flatten().tolist()
    width = int(is_real.sum(dim=1).max()) if rows else 0
    if len(rows) == len(is_real) and bool(is_real[:, :width].all()):
        return values[:, :width], positions[:, :width], rows
    order = torch.argsort(is_real.long(), dim=1, descending=True, stable=True)[rows, :width]
    row_index = torch.tensor(rows)[:, None]
    positions = positions[row_index, order]
    device = values.device
    values = values[row_index.to(device), order.to(device)]
    return values.masked_fill(expand_mask(positions < 0, values), 0), positions, rows


def positions_of(captured: Captured) -> Tensor:
    """Returns the positions. Raises `BadHook` for values that have no rows and positions."""
    if captured.positions is None:
        raise BadHook(
            f"the tensor at {captured.site} has no rows and positions of its own: it cannot be "
            "patched by position, and prompts cannot be a reference for it"
        )
    return captured.positions


def merge_captures(parts: Sequence[Captured]) -> Captured:
    """Joins captures of one site from several batches. The rows count through all batches."""
    values, positions, prompts = [], [], []
    for part in parts:
        values += part.values
        positions += positions_of(part)
        prompts += part.prompts
    return replace(
        parts[0],
        values=pad_sequence(values, batch_first=True),
        positions=pad_sequence(positions, batch_first=True, padding_value=-1),
        rows=tuple(range(len(prompts))),
        prompts=tuple(prompts),
    )
