"""The plan of a sweep: which cells can matter, which forwards run, and the cost.

Where the rows of a cell begin to differ from the unedited rows is a block and a position. Four
arguments decide it; nothing is measured.

causal           A position depends on no later position, so an edit changes nothing before its own
                 position. Where an edit of scores or a pattern may break this, whole prompts run.
last block       After the attention of the last block no position reads another. An edit there
                 matters only at the positions that the metric reads.
all positions    A user's function receives all of its positions together, so what it does at one
                 may depend on the other ones.
shared prefix    A patch changes nothing up to the first token in which the source's prompt
                 differs. The sweep compares the source with the model's own values before it
                 relies on this.

Which cell prompts share a forward depends on how many of the last positions they need, and on how
much memory there is.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain, takewhile
from operator import attrgetter, eq, itemgetter
from typing import TypeAlias

import torch

from ..arguments import check_integer
from ..display import render_html
from ..hooks.ablation import Patch
from ..hooks.capture import Captured
from ..models.lm import LM
from ..models.named_positions import find_positions
from ..models.positions import Where, is_named, resolve_positions
from ..models.sites import AnySite, ModuleSite, Site
from ..runs.hook_points import BoundHook, HookPoint
from ..tables.metrics.metric import Measure, Metric
from .cell_batches import BaseForward, CellPrompt, Job, Shortcuts, token_widths
from .cells import Cell
from .hook_needs import (
    AFTER_ATTENTION,
    INPUT,
    block_of_module,
    bound_hooks_of,
    can_compute_tokens,
    needs_all_positions,
)
from .inputs import CellMetrics, SweepInputs
from .jobs import JobChooser, patch_source

Start: TypeAlias = tuple[int, int]
"""The block and the position at which a row of a cell begins to differ."""


@dataclass(frozen=True, eq=False)
class FirstEffect:
    """Finds where edits begin to change a row of the inputs.

    `base` are the hooks that act in every row, edited or not. `sources_match` in its methods is
    True if the sources of patches were compared with the model's own values.
    """

    inputs: SweepInputs
    base: list[BoundHook]

    @cached_property
    def _mixing(self) -> list[BoundHook]:
        """Base hooks that may carry a change from a position to an earlier one."""
        return list(filter(needs_all_positions, self.base))

    def first_start(
        self, bound_hooks: Iterable[BoundHook], row: int, *, sources_match: bool
    ) -> Start | None:
        """Returns where a row begins to differ under these hooks; None if it cannot matter."""
        starts: list[Start] = []
        for bound in bound_hooks:
            start = self.start_of(bound, row, sources_match=sources_match)
            if start is not None:
                starts.append(start)
        if not starts:
            return None
        blocks, positions = zip(*starts, strict=True)
        return min(blocks), min(*positions, self._first_position(self._mixing, row))

    def start_of(self, bound: BoundHook, row: int, *, sources_match: bool) -> Start | None:
        """Returns where an edit begins to change a row, as far as the metric can see; None for a
        capture."""
        positions = self._positions(bound.where, row)
        if bound.change is None or not positions:
            return None
        first = self._first_that_matters(bound, row)
        if sources_match:
            first = max(first, self._unchanged_prefix(bound, row))
        position = first_position(positions, first, self.inputs.lengths[row])
        return None if position is None else (self.block_of(bound.site), position)

    def _first_that_matters(self, bound: BoundHook, row: int) -> int:
        """Returns the first position whose change at the hook's site can reach the metric."""
        is_last = self.is_after_last_attention(bound.site)
        if not is_last or needs_all_positions(bound) or self._is_mixed_later(bound):
            return 0
        return self.inputs.lengths[row] - self.inputs.read_counts[row]

    def _unchanged_prefix(self, bound: BoundHook, row: int) -> int:
        """Returns the first position at which a patch may change a row; 0 for any other edit."""
        source = patch_source(bound)
        has_other_positions = isinstance(bound.hook, Patch) and bound.hook.source_pos is not None
        if source is None or has_other_positions:
            return 0
        if not self._has_same_positions(bound.where, source, row):
            return 0
        return self.common_prefix(source, row)

    def _is_mixed_later(self, bound: BoundHook) -> bool:
        """True if a base hook after a hook of the last block may carry its change elsewhere."""
        if not bound.head:
            return bool(self._mixing)
        return any(mixing.head or isinstance(mixing.site, ModuleSite) for mixing in self._mixing)

    def block_of(self, site: AnySite) -> int:
        """Returns the block of a site: the last one for sites after all blocks, `INPUT` for the
        embedding and for modules outside the blocks."""
        lm = self.inputs.lm
        if isinstance(site, ModuleSite):
            return block_of_module(lm, site.path)
        if site.stack or site.name in ("embed", "pos_embed"):
            return INPUT
        return lm.n_layers - 1 if site.layer is None else site.layer

    def is_after_last_attention(self, site: AnySite) -> bool:
        """True if no later attention reads a site."""
        if not isinstance(site, Site) or site.base_name not in AFTER_ATTENTION:
            return False
        return site.layer is None or site.layer == self.inputs.lm.n_layers - 1

    def common_prefix(self, source: Captured, row: int) -> int:
        """Returns the first position at which a source's prompt differs from a prompt of the
        sweep, or at which a base hook acts."""
        if source.positions is None:
            return 0
        source_ids = source.prompts[source.row(row)]
        key = id(source_ids), row
        if key not in self._common_prefixes:
            is_same = map(eq, self.inputs.rows[row], source_ids)
            n_same = len(list(takewhile(bool, is_same)))
            if self.inputs.has_more_than_tokens:
                n_same = 0  # the same tokens may stand for different images
            end = min(n_same, self._first_position(self.base, row))
            self._common_prefixes[key] = source_ids, end
        return self._common_prefixes[key][1]

    @cached_property
    def _common_prefixes(self) -> dict[tuple[int, int], tuple[tuple[int, ...], int]]:
        """Cache of `common_prefix`, owned by this object. It keeps the source's tokens alive,
        because their id is part of the key."""
        return {}

    def _has_same_positions(self, where: Where, source: Captured, row: int) -> bool:
        """True if a hook's positions are the same in the source's prompt and in a row."""
        source_ids = source.prompts[source.row(row)]
        if len(source_ids) == len(self.inputs.rows[row]) and not is_named(where.pos):
            return True
        positions = resolve_positions(
            where, len(source_ids), partial(find_positions, self.inputs.lm, source_ids)
        )
        return positions == self._positions(where, row)

    def _positions(self, where: Where, row: int) -> Sequence[int] | None:
        """Returns the positions of a hook in a row; None if it does not act there."""
        return self.inputs.full.selected_positions(where)[row]

    def _first_position(self, bound_hooks: Iterable[BoundHook], row: int) -> int:
        """Returns the first position of a row at which one of the hooks acts; its length if none
        does."""
        selected = [self._positions(bound.where, row) for bound in bound_hooks]
        end = len(self.inputs.rows[row])
        return min(map(itemgetter(0), filter(None, selected)), default=end)


def first_position(positions: Sequence[int] | None, start: int, stop: int) -> int | None:
    """Returns the first of these positions, in order, that is from `start` to before `stop`."""
    positions = positions or ()
    index = bisect_left(positions, start)
    if index == len(positions) or positions[index] >= stop:
        return None
    return positions[index]


# What the printed plan says of each shortcut: its name there, the field of `Shortcuts`, the words.
SHORTCUT_DESCRIPTIONS = (
    ("share", "batch", "cells share forwards"),
    ("start", "grow", "at the block where a cell first differs"),
    ("prefix", "prefix", "positions before the edit come from a cache"),
    ("pack", "pack", "positions of several cells in one row, where that is less work"),
    ("last block", "last", "after its attention at the metric's position only"),
)

# Bytes, where the free memory is unknown. Larger tensors would be mapped anew each time.
DEFAULT_BUDGET = 128 * 2**20


def memory_budget(lm: LM, memory: int | None) -> int:
    """Returns the bytes that a sweep may use beside the model: `memory`, or a quarter of what a
    GPU has free."""
    if memory is not None:
        return check_integer(
            memory, "memory", least=1, meaning="the bytes that it may use beside the model,"
        )
    if lm.device.type == "cuda":
        free = torch.cuda.mem_get_info(lm.device)[0] // 4
        return free if lm.ranks is None else min(lm.ranks.gather_values(free))
    return DEFAULT_BUDGET


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """What a sweep will do; print it. `hk.sweep_plan` returns one, `hk.sweep` runs one."""

    lm: LM
    cells: tuple[Cell, ...]
    inputs: SweepInputs
    metrics: tuple[Metric, ...]
    base_hook_points: tuple[HookPoint, ...]
    shortcuts: Shortcuts
    budget: int

    @cached_property
    def hook_points(self) -> list[list[HookPoint]]:
        """All hook points of each cell, those of the base hooks first."""
        return [[*self.base_hook_points, *cell.hook_points] for cell in self.cells]

    @cached_property
    def measures(self) -> list[Measure]:
        """The metrics, bound to this model and these prompts."""
        return [metric.bind(self.lm, len(self.inputs)) for metric in self.metrics]

    @cached_property
    def tokens(self) -> list[int] | None:
        """The sorted ids of the only tokens whose logits the metrics read; None for all."""
        tokens: set[int] = set()
        for metric in self.metrics:
            of_metric = metric.tokens_read(metric.prepare(self.lm, len(self.inputs)))
            if of_metric is None:
                return None
            tokens.update(of_metric)
        return sorted(tokens)

    @property
    def compares(self) -> bool:
        """True if a metric compares a cell with the unedited prompts."""
        return any(map(attrgetter("compares"), self.metrics))

    def chunks(self) -> Iterator[tuple[int, ...]]:
        """Yields groups of prompts whose results, and whose forward, fit half the budget."""
        columns = max(self.inputs.lengths)
        row = max(self._base_row_bytes, self.chooser.row_bytes(columns, columns))
        size = max(1, self.budget // 2 // max(1, row))
        rows = range(len(self.inputs))
        for start in rows[::size]:
            yield tuple(rows[start : start + size])

    @cached_property
    def first_effect(self) -> FirstEffect:
        """What decides which cells can matter."""
        return FirstEffect(self.inputs, bound_hooks_of(self.base_hook_points))

    def cell_metrics(self, base: BaseForward | None) -> CellMetrics:
        """Returns the metrics of the prompts of an unedited forward, which may be None if no metric
        compares with it."""
        before = None
        if self.compares:
            assert base is not None
            before = {}
            for row, logits in zip(base.rows, base.logits, strict=True):
                before[row] = logits[-self.inputs.read_counts[row]]
        return CellMetrics(self.inputs, self.measures, before, self.tokens)

    def cell_prompts(self, rows: Sequence[int], *, sources_match: bool = True) -> list[CellPrompt]:
        """Returns the cell prompts of some prompts that have to run.

        `sources_match` is True if patches have the model's own values (see `FirstEffect`).
        """
        key = tuple(rows), sources_match
        if key not in self._cell_prompts:
            cell_prompts: list[CellPrompt] = []
            for cell in self.cells:
                cell_prompts += self._prompts_of_cell(cell, rows, sources_match=sources_match)
            self._cell_prompts[key] = cell_prompts
        return self._cell_prompts[key]

    def _prompts_of_cell(
        self, cell: Cell, rows: Sequence[int], *, sources_match: bool
    ) -> Iterator[CellPrompt]:
        if cell.alone:
            yield from (CellPrompt(INPUT, cell.number, row, 0) for row in rows)
            return
        bound_hooks = cell.bound_hooks
        for row in rows:
            start = self.first_effect.first_start(bound_hooks, row, sources_match=sources_match)
            if start is not None:
                block = start[0] if self.shortcuts.grow else INPUT
                yield CellPrompt(block, cell.number, row, start[1])

    @cached_property
    def _cell_prompts(self) -> dict[tuple[tuple[int, ...], bool], list[CellPrompt]]:
        """Cache of `cell_prompts`, owned by this plan."""
        return {}

    @cached_property
    def chooser(self) -> JobChooser:
        """What decides which cell prompts run in one forward."""
        return JobChooser(
            self.lm,
            self.inputs,
            self.cells,
            self.base_hook_points,
            self.shortcuts,
            self._tokens_computed,
        )

    @property
    def alone(self) -> list[Cell]:
        """The cells that cannot share a forward."""
        return [cell for cell in self.cells if cell.alone]

    @cached_property
    def all_jobs(self) -> list[Job]:
        """The forwards of all prompts."""
        jobs: list[Job] = []
        for rows in self.chunks():
            jobs += self.chooser.jobs(rows, self.cell_prompts(rows), self.budget)
        return jobs

    @property
    def forwards(self) -> int:
        """How many forwards will run."""
        n_together = sum(job.n_unedited > 0 for job in self.all_jobs)
        return len(list(self.chunks())) + len(self.all_jobs) - n_together

    @cached_property
    def layer_tokens(self) -> int:
        """How many tokens will pass through a block, summed over the blocks. The unedited prompts
        and padding are included."""
        n_layers = self.lm.n_layers
        total = 0
        for rows in self.chunks():
            total += len(rows) * self.inputs.count_columns(rows) * n_layers
        for job in self.all_jobs:
            total += sum(job.counts_by_block(token_widths(self.inputs, job), n_layers))
            total -= job.n_unedited * job.width * n_layers  # counted above with their padding
        return total

    @property
    def naive_layer_tokens(self) -> int:
        """The same for one whole forward of each prompt in each cell."""
        tokens = sum(map(len, self.inputs.rows))
        return tokens * self.lm.n_layers * len(self.cells)

    @property
    def running(self) -> int:
        """How many cells have to run, counted once for each prompt."""
        return sum(len(job.keys) for job in self.all_jobs)

    @property
    def filled(self) -> int:
        """How many cells need not run, because their edit cannot change what the metric reads."""
        return len(self.cells) * len(self.inputs) - self.running

    @property
    def memory(self) -> int:
        """About how many bytes the sweep takes at its peak, beside the model."""
        columns = max(self.inputs.lengths)
        rows = max(map(len, self.chunks()))
        peaks = [rows * self.chooser.row_bytes(columns, columns)]
        peaks += map(partial(self.chooser.bytes_of, columns), self.all_jobs)
        return rows * self._base_row_bytes + max(peaks)

    @property
    def _base_row_bytes(self) -> int:
        """About how much memory the results of an unedited row take: keys and values, and the
        inputs of each block."""
        columns, d_model = max(self.inputs.lengths), self.lm.sizes["d_model"] or 0
        return self.chooser.number_bytes * columns * self.lm.n_layers * 3 * d_model

    @cached_property
    def _tokens_computed(self) -> int:
        """Of how many tokens the forwards of the cells compute logits, at most."""
        hook_points = chain.from_iterable(self.hook_points)
        computes_some = self.tokens is not None and self.shortcuts.tokens
        if computes_some and can_compute_tokens(self.lm, hook_points):
            return len(self.tokens or ())
        return self.lm.sizes["vocab"] or 0

    def _repr_html_(self) -> str:
        return render_html("Plan of a sweep", text=repr(self))

    def __repr__(self) -> str:
        lines = [f"{len(self.cells):,} cells x {_count(len(self.inputs), 'prompt')}"]
        lines += [f"  {name:<15} {words}" for name, words in (*self._costs(), *self._reductions())]
        return "\n".join(lines)

    def _costs(self) -> Iterator[tuple[str, str]]:
        yield "cannot matter", f"{self.filled:,}: filled with the unedited value"
        yield "to run", f"{self.running:,} in {_count(self.forwards, 'forward')}{self._widths()}"
        tokens, naive = self.layer_tokens, self.naive_layer_tokens
        yield "layer-tokens", f"{tokens:,} instead of {naive:,} ({tokens / max(1, naive):.1%})"
        yield "memory", f"about {self.memory / 2**20:,.0f} MB beside the model"

    def _widths(self) -> str:
        """Returns over how many positions the cells run in shared forwards, in words."""
        shared: set[int] = set()
        for job in self.all_jobs:
            if not self._is_alone(job):
                shared.update(token_widths(self.inputs, job)[job.n_unedited :])
        if not shared:
            return ""
        span = " to ".join(map(str, sorted({min(shared), max(shared)})))
        return f", over {span} of {max(self.inputs.lengths)} positions"

    def _is_alone(self, job: Job) -> bool:
        return bool(self.cells[job.keys[0][0]].alone)

    def _reductions(self) -> Iterator[tuple[str, str]]:
        yield "stop", self._last_position()
        for name, shortcut, description in SHORTCUT_DESCRIPTIONS:
            is_used = getattr(self.shortcuts, shortcut)
            yield name, _use(is_used, description, self.shortcuts.why.get(shortcut, ""))
        takes_count = "logits_to_keep" in self.lm.takes
        no_count = "the model takes no logits_to_keep"
        yield "head", _use(takes_count, "at the metric's position only", no_count)
        if self.tokens is not None:
            reason = self.shortcuts.why.get("tokens", "")
            words = "only the logits of the metric's tokens"
            yield "tokens", _use(self.shortcuts.tokens, words, reason)
        for reason, count in Counter(cell.alone for cell in self.alone).items():
            yield "alone", f"{_count(count, 'cell')}: {reason}"

    def _last_position(self) -> str:
        """Returns at which position the forwards end, in words."""
        if self.inputs.has_continuation:
            return "at the end of the continuation"
        if self.inputs.cropped:
            return "at the position where the metric looks"
        if max(self.inputs.read_counts) > 1:
            return "no: a function receives positions after the one where the metric looks"
        return "at the last position, where the metric looks"


def _use(is_used: bool, description: str, reason: str) -> str:
    return description if is_used else f"no: {reason}"


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"
