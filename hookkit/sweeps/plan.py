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
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain, takewhile
from operator import attrgetter, eq, itemgetter
from typing import TypeAlias

import torch

from ..arguments import check_integer
from ..display import render_html
from ..hooks.ablation import Ablate, Patch
from ..hooks.capture import Captured
from ..hooks.values import FromRun
from ..models.lm import LM
from ..models.named_positions import find_positions
from ..models.positions import Where, is_named, resolve_positions
from ..models.sites import AnySite, ModuleSite, Site
from ..runs.hook_points import BoundHook, HookPoint
from ..tables.metrics.metric import Measure, Metric
from .cells import Cell
from .forwards import (
    AFTER_ATTENTION,
    INPUT,
    BaseForward,
    CellPrompt,
    Job,
    Shortcuts,
    block_of_module,
    bound_hooks_of,
    can_compute_tokens,
    can_pack,
    needs_all_positions,
    token_widths,
)
from .inputs import CellMetrics, SweepInputs

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


def patch_source(bound: BoundHook) -> Captured | None:
    """Returns the values that a patch inserts at its site; None for any other hook."""
    hook = bound.hook
    if not isinstance(hook, Ablate) or not isinstance(hook.to, FromRun):
        return None
    return next(source for source in hook.to.sources if source.site == bound.site)


# The fixed cost of running a block (reading its weights, calling it), in tokens.
BLOCK_COST = {"cpu": 40, "cuda": 256}

# How many tokens a packed forward may have: the sizes that are compared.
PACKED_TOKENS = (256, 512, 1024, 2048)

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


def _block_counts(cell_prompts: Sequence[CellPrompt], n_layers: int) -> list[int]:
    """Returns how many blocks each cell prompt runs through."""
    return [n_layers - max(0, cell_prompt.block) for cell_prompt in cell_prompts]


def _cheapest_jobs(by_width: Mapping[int, Sequence[CellPrompt]], lm: LM) -> tuple[float, list[Job]]:
    """Returns the cheapest jobs for cell prompts, by how many of the last positions they need, and
    their cost.

    A job costs its tokens, at its largest width, and the fixed cost of each block that it runs.
    More widths mean fewer tokens and more forwards.
    """
    fixed = _fixed_cost(lm)
    widths = sorted(by_width)
    counts = [_block_counts(by_width[width], lm.n_layers) for width in widths]
    blocks, deepest = list(map(sum, counts)), list(map(max, counts))
    best: list[tuple[float, list[Job]]] = [(0, [])]  # for the first widths: none, one, two ...
    for last, width in enumerate(widths):
        costs: list[float] = []
        for first in range(last + 1):
            group = slice(first, last + 1)
            costs.append(best[first][0] + sum(blocks[group]) * width + fixed * max(deepest[group]))
        first = costs.index(min(costs))
        cell_prompts = chain.from_iterable(map(by_width.__getitem__, widths[first : last + 1]))
        job = Job(width, tuple(sorted(cell_prompts)))
        best.append((costs[first], [*best[first][1], job]))
    return best[-1]


def _fixed_cost(lm: LM) -> int:
    return BLOCK_COST.get(lm.device.type, BLOCK_COST["cuda"])


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
        row = max(self._base_row_bytes, self._row_bytes(columns, columns))
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

    def jobs(
        self, rows: Sequence[int], cell_prompts: Sequence[CellPrompt], budget: int
    ) -> list[Job]:
        """Returns the forwards that run these cell prompts.

        If a single packed one suffices, and has room for them, the unedited prompts are in it.
        """
        columns = self.inputs.count_columns(rows)
        alone: dict[int, list[CellPrompt]] = defaultdict(list)  # by cell
        from_input: dict[int, list[CellPrompt]] = defaultdict(list)  # by width; their batch is full
        joining: dict[int, list[CellPrompt]] = defaultdict(list)  # by width; their batch grows
        for cell_prompt in cell_prompts:
            if self.cells[cell_prompt.cell].alone:
                alone[cell_prompt.cell].append(cell_prompt)
            else:
                by_width = joining if cell_prompt.block > INPUT else from_input
                by_width[self._width_of(cell_prompt, columns)].append(cell_prompt)
        jobs = [Job(columns, tuple(group)) for group in alone.values()]
        jobs += _cheapest_jobs(from_input, self.lm)[1] + self._joining_jobs(joining, budget)
        parts: list[Job] = []
        for job in jobs:
            n_rows = max(1, budget // 2 // self._row_bytes(job.width, columns))
            parts += [job] if job.packed else job.split(n_rows)
        if len(parts) == 1 and parts[0].packed and self._can_join_unedited(rows):
            whole = parts[0].with_unedited(rows, columns)
            is_cheap = self._packed_cost(whole) < self._packed_cost(parts[0]) + self._base_cost(
                rows
            )
            if is_cheap and self._packed_bytes(whole) <= budget // 2:
                return [whole]
        return parts

    def _can_join_unedited(self, rows: Sequence[int]) -> bool:
        """True if unedited prompts may be packed. The values with which the sources of patches are
        compared come in one tensor only from prompts of one length."""
        return not self._has_patches or len({self.inputs.lengths[row] for row in rows}) == 1

    @cached_property
    def _has_patches(self) -> bool:
        """True if a cell has a patch. Owned by this plan."""
        bound_hooks = chain.from_iterable(cell.bound_hooks for cell in self.cells)
        return any(patch_source(bound) is not None for bound in bound_hooks)

    def _base_cost(self, rows: Sequence[int]) -> int:
        """Returns the cost of the unedited prompts in a forward of their own."""
        n_tokens = len(rows) * self.inputs.count_columns(rows)
        return (n_tokens + _fixed_cost(self.lm)) * self.lm.n_layers

    def _joining_jobs(
        self, by_width: Mapping[int, Sequence[CellPrompt]], budget: int
    ) -> Sequence[Job]:
        """Returns the cheapest forwards for cell prompts that join at blocks, packed or not."""
        cost, jobs = _cheapest_jobs(by_width, self.lm)
        others: dict[int, list[CellPrompt]] = defaultdict(list)  # those that cannot be packed
        packable: list[CellPrompt] = []
        least = self.inputs.count_read(range(len(self.inputs)))
        for width, cell_prompts in by_width.items():
            for cell_prompt in cell_prompts:
                is_long = self.inputs.lengths[cell_prompt.row] >= least
                can_be_packed = is_long and cell_prompt.cell in self._packable_cells
                (packable if can_be_packed else others[width]).append(cell_prompt)
        if not packable:
            return jobs
        rest = {width: others[width] for width in others if others[width]}
        cost_of_rest, jobs_of_rest = _cheapest_jobs(rest, self.lm)
        for size in PACKED_TOKENS:
            packed = self._packed_jobs(packable, size)
            if max(map(self._packed_bytes, packed)) > budget // 2:
                continue
            cost_with = cost_of_rest + sum(map(self._packed_cost, packed))
            if cost_with < cost:
                cost, jobs = cost_with, [*jobs_of_rest, *packed]
        return jobs

    @cached_property
    def _packable_cells(self) -> frozenset[int]:
        """The cells that may be packed. Owned by this plan."""
        lm, is_allowed = self.lm, self.shortcuts.pack and not self.inputs.all_logits
        if not is_allowed or not can_pack(lm, self.base_hook_points):
            return frozenset()
        return frozenset(cell.number for cell in self.cells if can_pack(lm, cell.hook_points))

    def _packed_jobs(self, cell_prompts: Iterable[CellPrompt], size: int) -> list[Job]:
        """Returns jobs of at most so many tokens, if each cell prompt has fewer."""
        jobs: list[Job] = []
        group: list[CellPrompt] = []
        n_tokens = longest = 0
        least = self.inputs.count_read(range(len(self.inputs)))
        for cell_prompt in sorted(cell_prompts):
            width = max(least, self.inputs.width_of(cell_prompt.row, cell_prompt.pos))
            if group and n_tokens + width > size:
                jobs.append(Job(longest, tuple(group), packed=True))
                group, n_tokens, longest = [], 0, 0
            group.append(cell_prompt)
            n_tokens, longest = n_tokens + width, max(longest, width)
        jobs.append(Job(longest, tuple(group), packed=True))
        return jobs

    def _packed_cost(self, job: Job) -> float:
        """Returns the cost of a packed job, as that of `_cheapest_jobs`. Each token is compared
        with all keys, for which it costs a part of what it costs in a block's matrices."""
        counts, n_prefix = self._packed_counts(job)
        per_key = 1 / (4 * max(1, self.lm.sizes["d_model"] or 0))
        cost = sum(count * (1 + (n_prefix + count) * per_key) for count in counts)
        return cost + _fixed_cost(self.lm) * max(_block_counts(job.cell_prompts, self.lm.n_layers))

    def _packed_counts(self, job: Job) -> tuple[list[int], int]:
        """Returns how many tokens of a packed job are in each block, and of how many positions of
        the unedited prompts there are keys, at most."""
        widths = token_widths(self.inputs, job)
        columns = self.inputs.count_columns(range(len(self.inputs)))
        n_prefix = 0 if job.n_unedited else len(set(job.rows)) * (columns - min(widths))
        return job.counts_by_block(widths, self.lm.n_layers), n_prefix

    def _packed_bytes(self, job: Job) -> int:
        """Returns about how much memory a packed job takes at its peak."""
        counts, n_prefix = self._packed_counts(job)
        n_tokens, n_keys = counts[-1], counts[-1] + n_prefix
        sizes = {name: size or 0 for name, size in self.lm.sizes.items()}
        mlp = sizes.get("d_mlp") or 4 * sizes["d_model"]
        activations = n_tokens * (8 * sizes["d_model"] + 3 * mlp) + n_keys * 4 * sizes["d_model"]
        attention = (sizes.get("head") or 1) * n_tokens * n_keys
        n_logits = self.inputs.count_read(job.rows) * self._tokens_computed
        return self._number_bytes * (activations + attention) + 12 * n_logits * len(job.rows)

    def _width_of(self, cell_prompt: CellPrompt, columns: int) -> int:
        """Returns how many of the last positions a cell prompt has to run."""
        if not self.shortcuts.prefix:
            return columns
        return self.inputs.width_of(cell_prompt.row, cell_prompt.pos)

    @property
    def alone(self) -> list[Cell]:
        """The cells that cannot share a forward."""
        return [cell for cell in self.cells if cell.alone]

    @cached_property
    def all_jobs(self) -> list[Job]:
        """The forwards of all prompts."""
        jobs: list[Job] = []
        for rows in self.chunks():
            jobs += self.jobs(rows, self.cell_prompts(rows), self.budget)
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
            jobs = self.jobs(rows, self.cell_prompts(rows), self.budget)
            if not any(job.n_unedited for job in jobs):
                total += len(rows) * self.inputs.count_columns(rows) * n_layers
        for job in self.all_jobs:
            if job.packed:
                total += sum(self._packed_counts(job)[0])
            else:
                total += job.width * sum(_block_counts(job.cell_prompts, n_layers))
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
        peaks = [rows * self._row_bytes(columns, columns)]
        for job in self.all_jobs:
            if job.packed:
                peaks.append(self._packed_bytes(job))
            else:
                peaks.append(len(job.cell_prompts) * self._row_bytes(job.width, columns))
        return rows * self._base_row_bytes + max(peaks)

    @property
    def _base_row_bytes(self) -> int:
        """About how much memory the results of an unedited row take: keys and values, and the
        inputs of each block."""
        columns, d_model = max(self.inputs.lengths), self.lm.sizes["d_model"] or 0
        return self._number_bytes * columns * self.lm.n_layers * 3 * d_model

    def _row_bytes(self, width: int, columns: int) -> int:
        """Returns about how much memory a row of a forward takes at its peak: its activations in a
        block, the keys and values that it reads, the mask, and its logits three times."""
        sizes = {name: size or 0 for name, size in self.lm.sizes.items()}
        mlp = sizes.get("d_mlp") or 4 * sizes["d_model"]
        activations = width * (8 * sizes["d_model"] + 3 * mlp)
        heads = sizes.get("head") or 1
        attention = columns * 4 * sizes["d_model"] + heads * width * columns
        n_logits = self.inputs.count_logits(range(len(self.inputs)), width) * self._tokens_computed
        return self._number_bytes * (activations + attention) + 12 * n_logits

    @cached_property
    def _tokens_computed(self) -> int:
        """Of how many tokens the forwards of the cells compute logits, at most."""
        hook_points = chain.from_iterable(self.hook_points)
        computes_some = self.tokens is not None and self.shortcuts.tokens
        if computes_some and can_compute_tokens(self.lm, hook_points):
            return len(self.tokens or ())
        return self.lm.sizes["vocab"] or 0

    @property
    def _number_bytes(self) -> int:
        return torch.finfo(getattr(self.lm.root, "dtype", torch.float32)).bits // 8

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
        """Returns over how many positions the shared forwards run, in words."""
        shared = [job.width for job in self.all_jobs if not self._is_alone(job)]
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
            yield "tokens", _use(self.shortcuts.tokens, "logits of the metric's only", reason)
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
