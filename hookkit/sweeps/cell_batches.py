"""The batches of a sweep: which rows of cells run in one forward, and how they stand in it.

The positions before the first edit have the keys and values of the unedited prompts, which are
computed once and shared by all rows. A row joins the batch at the block at which it begins to
differ. Each row has the last positions of its prompt; or the rows of cells are packed, so that none
is padded.
"""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, filterfalse, groupby
from operator import itemgetter
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, cat

from ..models.batch_positions import ForwardPass, SequenceBatch
from ..models.lm import LM
from ..runs.growing_batch import (
    Factors,
    GrowingBatch,
    GrowingRows,
    PackedTokens,
    TokenAxes,
    TokenPlaces,
)
from ..runs.hook_points import HookPoint
from ..runs.partial import CellRows, SharedForward
from .hook_needs import INPUT, is_after_blocks
from .inputs import UNEDITED, SweepInputs


class CellPrompt(NamedTuple):
    """One prompt of one cell, and the block and position at which it begins to differ from the
    unedited prompt. The cell prompts of a forward are sorted."""

    block: int
    cell: int
    row: int
    pos: int

    @property
    def key(self) -> tuple[int, int]:
        """The cell number and the row."""
        return self.cell, self.row


@dataclass(frozen=True)
class Job:
    """Cell prompts that run in one forward, over the last `width` positions.

    All of them join at blocks, or all of them run from the input on. Those that join may be packed
    into one row. Then the first ones may be the unedited prompts, which otherwise ran before.
    """

    width: int
    cell_prompts: tuple[CellPrompt, ...]
    packed: bool = False

    @property
    def n_unedited(self) -> int:
        """How many unedited prompts run in the forward."""
        return sum(cell_prompt.cell == UNEDITED for cell_prompt in self.cell_prompts)

    @property
    def keys(self) -> list[tuple[int, int]]:
        """The cell number and the row of each cell prompt, without unedited ones."""
        return [cell_prompt.key for cell_prompt in self.cell_prompts[self.n_unedited :]]

    def with_unedited(self, rows: Sequence[int], columns: int) -> "Job":
        """Returns the same job with these unedited prompts."""
        unedited = [CellPrompt(0, UNEDITED, row, 0) for row in rows]
        return Job(columns, (*unedited, *self.cell_prompts), packed=True)

    @property
    def rows(self) -> list[int]:
        """The row of each cell prompt."""
        return [cell_prompt.row for cell_prompt in self.cell_prompts]

    @property
    def joins(self) -> bool:
        """True if the cell prompts join at blocks."""
        return self.cell_prompts[0].block > INPUT

    def counts_by_block(self, sizes: Sequence[int], n_layers: int) -> list[int]:
        """Returns the sum of the sizes of the cell prompts that are in each block."""
        blocks = [cell_prompt.block for cell_prompt in self.cell_prompts]
        sums = [0, *accumulate(sizes)]
        return [sums[bisect_right(blocks, block)] for block in range(n_layers)]

    def split(self, size: int) -> list["Job"]:
        """Returns jobs of at most `size` of the cell prompts each."""
        starts = range(0, len(self.cell_prompts), size)
        return [
            replace(self, cell_prompts=self.cell_prompts[start : start + size]) for start in starts
        ]


@dataclass(frozen=True, eq=False)
class BaseForward:
    """The results of the unedited prompts, from which later forwards start.

    cache   transformers' cache of every position; None if it was not stored
    states  the inputs of the blocks at which a row may join: the last `width` positions
    logits  the logits that the metrics read
    """

    rows: tuple[int, ...]
    columns: int
    cache: Any
    states: Mapping[int, Tensor]
    logits: Float[Tensor, "row pos vocab"]

    def indices_of(self, rows: Sequence[int]) -> list[int]:
        """Returns the index of each of these rows among those that were run."""
        indices = {row: index for index, row in enumerate(self.rows)}
        return list(map(indices.__getitem__, rows))


@dataclass(frozen=True, eq=False)
class Shortcuts:
    """The shortcuts that a model allows, and the facts that they need.

    batch    cells can share a forward, each with its own rows
    grow     rows can join at the block at which they begin to differ
    prefix   positions before the first that differs can come from a cache
    pack     cells that differ from different positions on can share a row of the batch
    last     after the last attention only the metric's positions have to be computed
    tokens   of the logits only those of the tokens that the metrics read have to be computed
    why      for each shortcut that is not allowed, the reason
    factors  which inputs of the blocks have rows (see `GrowingRows`)
    kinds    what each block returns: 0 for a tensor, or the length of a tuple
    token_axes   which inputs of the blocks have positions (see `PackedTokens`)
    reads_ahead  True if the logits at a position depend on a later token
    """

    batch: bool
    grow: bool
    prefix: bool
    last: bool
    tokens: bool
    why: Mapping[str, str]
    factors: Factors
    kinds: Sequence[int]
    pack: bool = False
    token_axes: TokenAxes = field(default_factory=dict)
    reads_ahead: bool = False


Lanes: TypeAlias = list[tuple[CellRows, Sequence[HookPoint]]]
"""The rows of each cell in a forward, with its hook points."""

HookPointsOfCells: TypeAlias = Sequence[Sequence[HookPoint]] | Mapping[int, Sequence[HookPoint]]
"""All hook points of each cell, by its number."""


def prefix_cache(whole: Any, columns: int, append: Callable[[Tensor, Tensor], Tensor]) -> Any:
    """Returns a cache of transformers that holds the first `columns` columns of another one.

    The cache stores nothing new. Each update of a layer returns what `append` makes of all that the
    other cache holds there and the new keys, or values. So the batch can grow from layer to layer,
    and no prefix is stored twice.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    class PrefixLayer(DynamicLayer):
        """The prefix in one layer."""

        def __init__(self, keys: Tensor, values: Tensor) -> None:
            super().__init__()
            self.whole = keys, values
            self.keys, self.values = keys[..., :columns, :], values[..., :columns, :]
            self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

        def update(
            self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
        ) -> tuple[Tensor, Tensor]:
            keys, values = self.whole
            return append(keys, key_states), append(values, value_states)

    cache: Any = DynamicCache()
    cache.layers = []
    for layer in whole.layers:
        if layer.is_initialized:
            cache.layers.append(PrefixLayer(layer.keys, layer.values))
        else:
            cache.layers.append(DynamicLayer())  # of a layer without keys and values
    return cache


def cache_of_rows(whole: Any, columns: int, rows: Callable[[], Tensor]) -> Any:
    """Returns a cache with the prefix of the rows that are in the batch at that moment, `rows()`,
    before the new keys and values."""

    def append(stored: Tensor, new: Tensor) -> Tensor:
        return _append(stored[..., :columns, :], rows(), new)

    return prefix_cache(whole, columns, append)


def _append(prefix: Tensor, rows: Tensor, new: Tensor) -> Tensor:
    """Returns the new keys or values after the prefix of these rows."""
    if len(prefix) == 1:  # one row needs no second copy
        selected = prefix.expand(len(rows), *prefix.shape[1:])
    else:
        selected = prefix.index_select(0, rows.to(prefix.device))
    return cat([selected, new], dim=-2)


class CellBatch(NamedTuple):
    """How the rows of a job stand in a batch.

    lanes   the rows of each cell, with its hook points
    growth  how the batch grows; None if all rows run from the input on
    cache   returns the cache for a forward
    read    the positions that the head reads, in the last block
    """

    lanes: Lanes
    growth: GrowingBatch | None
    cache: Callable[[SharedForward], Any]
    read: slice | Tensor


def arrange_rows(
    base: BaseForward,
    inputs: SweepInputs,
    job: Job,
    hook_points: HookPointsOfCells,
    n_logits: int,
    shortcuts: Shortcuts,
) -> CellBatch:
    """Returns a batch in which each cell prompt has a row with the last columns."""
    lm, past = inputs.lm, base.columns - job.width
    prompts = base.indices_of(job.rows)
    text = inputs.padded_batch(base.columns)  # one for all cells: it caches the hooks' positions
    cell_rows = partial(cell_rows_of, text, past, job.width, n_logits)
    growth = None
    if job.joins:
        counts = job.counts_by_block([1] * len(prompts), lm.n_layers)

        def joining_states(block: int, hidden: Tensor) -> Tensor:
            states = base.states[block]
            joining = prompts[len(hidden) : counts[block]]
            return states[torch.tensor(joining, device=states.device), -job.width :]

        growth = GrowingRows(
            job.cell_prompts[0].block,
            counts,
            joining_states,
            shortcuts.kinds,
            prompts,
            len(base.rows),
            shortcuts.factors,
        )
    indices = torch.tensor(prompts)

    def cache(forward: SharedForward) -> Any:
        return cache_of_rows(base.cache, past, lambda: indices[: forward.count])

    lanes = _lanes_of_cells(job.cell_prompts, hook_points, cell_rows)
    return CellBatch(lanes, growth, cache, slice(-n_logits, None))


def arrange_tokens(
    base: BaseForward,
    inputs: SweepInputs,
    job: Job,
    hook_points: HookPointsOfCells,
    n_logits: int,
    shortcuts: Shortcuts,
) -> CellBatch:
    """Returns a batch with one row, in which the tokens of each cell prompt from its position on
    follow those of the one before."""
    lm, past = inputs.lm, base.columns - job.width
    widths = token_widths(inputs, job)
    prompts = base.indices_of(job.rows)
    places = TokenPlaces.of_rows(prompts, widths, base.columns, job.n_unedited)
    counts = job.counts_by_block(widths, lm.n_layers)
    last = torch.tensor(widths).cumsum(0) - 1

    def joining_states(block: int, hidden: Tensor) -> Tensor:
        joining = slice(hidden.shape[1], counts[block])
        joining_prompts, columns = places.prompts[joining], places.columns[joining]
        if job.n_unedited:
            return hidden[:, last[joining_prompts] - (base.columns - 1 - columns)]
        states = base.states[block]
        return states[joining_prompts, columns - (base.columns - states.shape[1])][None]

    growth = PackedTokens(
        job.cell_prompts[0].block,
        counts,
        joining_states,
        shortcuts.kinds,
        places,
        past,
        job.width,
        shortcuts.token_axes,
        last,
    )
    text = inputs.padded_batch(base.columns)
    lanes = _lanes_of_tokens(lm, job.cell_prompts, widths, hook_points, text, n_logits)
    after_blocks: dict[int, Sequence[HookPoint]] = {}
    for cell in {cell_prompt.cell for cell_prompt in job.cell_prompts}:
        after_blocks[cell] = list(filter(partial(is_after_blocks, lm), hook_points[cell]))
    of_rows = partial(cell_rows_of, text, past, job.width, n_logits)
    lanes += _lanes_of_cells(job.cell_prompts, after_blocks, of_rows)
    read = last[:, None] - torch.arange(n_logits - 1, -1, -1)
    return CellBatch(
        lanes,
        growth,
        lambda forward: prefix_cache(base.cache, past, places.after_prefix),
        read.flatten(),
    )


def token_widths(inputs: SweepInputs, job: Job) -> list[int]:
    """Returns over how many of the last positions each cell prompt of a job runs."""
    if not job.packed:
        return [job.width] * len(job.cell_prompts)
    least = inputs.count_read(job.rows)
    widths: list[int] = []
    for cell_prompt in job.cell_prompts:
        widths.append(max(least, inputs.width_of(cell_prompt.row, cell_prompt.pos)))
    return widths


def _lanes_of_tokens(
    lm: LM,
    cell_prompts: Sequence[CellPrompt],
    widths: Sequence[int],
    hook_points: HookPointsOfCells,
    text: SequenceBatch,
    n_logits: int,
) -> Lanes:
    """Returns the tokens of each cell and its hook points in the blocks; rows of one width that
    join together are together."""
    lanes: Lanes = []
    start, columns = 0, max(map(max, filter(None, text.columns))) + 1
    numbered = zip(cell_prompts, widths, strict=True)
    for (_, cell, width), group in groupby(numbered, key=lambda pair: (*pair[0][:2], pair[1])):
        rows = tuple(cell_prompt.row for cell_prompt, _ in group)
        lane = cell_rows_of(text, columns - width, width, n_logits, rows, start)
        lane.stop = start + len(rows) * width
        in_blocks = filterfalse(partial(is_after_blocks, lm), hook_points[cell])
        lanes.append((lane, list(in_blocks)))
        start = lane.stop
    return lanes


def _lanes_of_cells(
    cell_prompts: Sequence[CellPrompt],
    hook_points: HookPointsOfCells,
    cell_rows: Callable[[Sequence[int], int], CellRows],
) -> Lanes:
    """Returns the rows of each cell and its hook points; rows that join together are together."""
    lanes: Lanes = []
    start = 0
    for (_, cell), group in groupby(cell_prompts, key=itemgetter(0, 1)):
        rows = [cell_prompt.row for cell_prompt in group]
        lanes.append((cell_rows(rows, start), hook_points[cell]))
        start += len(rows)
    return lanes


def cell_rows_of(
    batch: SequenceBatch, past: int, width: int, n_logits: int, rows: Sequence[int], start: int = 0
) -> CellRows:
    """Returns some rows of a forward that computes the logits of the last `n_logits` positions."""
    numbers = tuple(rows)
    head = range(width - n_logits, width)
    row_batch = replace(batch, numbers=numbers)
    forward_pass = ForwardPass(row_batch, 0, past, len(rows), width, head, past)
    return CellRows(numbers, start, start + len(rows), forward_pass)
