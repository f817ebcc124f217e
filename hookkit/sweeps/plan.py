"""The plan of a sweep: which forwards run, which cells need none, and the cost.

Which cell prompts share a forward depends on how many of the last positions they need, and on how
much memory there is.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from ..arguments import check_integer
from ..display import render_html
from ..models.lm import LM
from ..runs.taps import HookPoint
from ..tables.metrics import Measure, Metric
from .cells import Cell
from .forwards import CellPrompt, Shortcuts
from .inputs import SweepInputs
from .reach import INPUT, FirstEffect, Start, bound_hooks_of

# The fixed cost of running a block (reading its weights, calling it), in tokens.
BLOCK_COST = {"cpu": 40, "cuda": 256}

# Bytes, where the free memory is unknown. Larger tensors would be mapped anew each time.
DEFAULT_BUDGET = 128 * 2**20


@dataclass(frozen=True)
class Job:
    """Cell prompts that run in one forward, over the last `width` positions."""

    width: int
    cell_prompts: tuple[CellPrompt, ...]

    @property
    def keys(self) -> list[tuple[int, int]]:
        """The cell number and the row of each cell prompt."""
        return [cell_prompt.key for cell_prompt in self.cell_prompts]

    def layer_tokens(self, n_layers: int, *, grow: bool) -> int:
        """Returns how many tokens pass through a block, summed over the blocks."""
        if not grow:
            return len(self.cell_prompts) * self.width * n_layers
        blocks = sum(_count_blocks(n_layers, prompt) for prompt in self.cell_prompts)
        return blocks * self.width

    def split(self, row_bytes: int, budget: int) -> list["Job"]:
        """Returns jobs of the same cell prompts that fit the budget."""
        rows = max(1, budget // row_bytes)
        starts = range(0, len(self.cell_prompts), rows)
        return [Job(self.width, self.cell_prompts[start : start + rows]) for start in starts]


def _count_blocks(n_layers: int, cell_prompt: CellPrompt) -> int:
    return n_layers - max(0, cell_prompt.start.block)


def group_into_jobs(
    lm: LM,
    cell_prompts: Sequence[CellPrompt],
    needs: Sequence[int],
    columns: int,
    *,
    prefix: bool,
) -> list[Job]:
    """Returns the cheapest jobs for cell prompts that each need so many of the last positions.

    More widths mean fewer tokens but more forwards, and a forward has a fixed cost.
    """
    if not cell_prompts:
        return []
    if not prefix:
        return [_sorted_job(columns, cell_prompts)]
    by_need: dict[int, list[CellPrompt]] = {}
    for cell_prompt, need in zip(cell_prompts, needs, strict=True):
        by_need.setdefault(need, []).append(cell_prompt)
    widths = sorted(by_need)
    blocks, deepest = [], []
    for width in widths:
        counts = [_count_blocks(lm.n_layers, prompt) for prompt in by_need[width]]
        blocks.append(sum(counts))
        deepest.append(max(counts))
    fixed = BLOCK_COST.get(lm.device.type, BLOCK_COST["cuda"])
    jobs = []
    for first, last in _cheapest_split(widths, blocks, deepest, fixed):
        group: list[CellPrompt] = []
        for width in widths[first : last + 1]:
            group += by_need[width]
        jobs.append(_sorted_job(widths[last], group))
    return jobs


def _sorted_job(width: int, cell_prompts: Sequence[CellPrompt]) -> Job:
    return Job(width, tuple(sorted(cell_prompts, key=lambda prompt: prompt.order)))


def _cheapest_split(
    widths: list[int], blocks: list[int], deepest: list[int], fixed: int
) -> list[tuple[int, int]]:
    """Returns the cheapest split of ascending widths into ranges, as first and last index.

    A range costs its tokens at its largest width, and the fixed cost of each block that it runs.
    """
    best: list[tuple[int, list[tuple[int, int]]]] = [(0, [])]
    for last in range(len(widths)):
        options = []
        for first in range(last + 1):
            tokens = sum(blocks[first : last + 1]) * widths[last]
            cost = tokens + fixed * max(deepest[first : last + 1])
            options.append((best[first][0] + cost, [*best[first][1], (first, last)]))
        best.append(min(options, key=lambda option: option[0]))
    return best[-1][1]


def row_bytes(lm: LM, width: int, columns: int, n_logits: int) -> int:
    """Returns about how much memory a row of a forward takes at its peak: its activations in a
    block, the keys and values that it reads, the mask, and its logits three times."""
    sizes = {name: size or 0 for name, size in lm.sizes.items()}
    mlp = sizes.get("d_mlp") or 4 * sizes["d_model"]
    activations = width * (8 * sizes["d_model"] + 3 * mlp)
    heads = sizes.get("head") or 1
    attention = columns * 4 * sizes["d_model"] + heads * width * columns
    return _number_bytes(lm) * (activations + attention) + 12 * n_logits * (sizes["vocab"] or 0)


def base_row_bytes(lm: LM, columns: int) -> int:
    """Returns about how much memory the results of an unedited row take: keys and values, and the
    inputs of each block."""
    return _number_bytes(lm) * columns * lm.n_layers * 3 * (lm.sizes["d_model"] or 0)


def _number_bytes(lm: LM) -> int:
    return torch.finfo(getattr(lm.root, "dtype", torch.float32)).bits // 8


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
    """What a sweep will do; print it. `hk.plan` returns one, `hk.sweep` runs one."""

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
        return [metric.bound(self.lm, len(self.inputs)) for metric in self.metrics]

    @property
    def compares(self) -> bool:
        """True if a metric compares a cell with the unedited prompts."""
        return any(metric.compares for metric in self.metrics)

    def chunks(self) -> Iterator[tuple[int, ...]]:
        """Yields groups of prompts whose results, and whose forward, fit half the budget."""
        columns = max(self.inputs.lengths)
        row = max(base_row_bytes(self.lm, columns), self._row_bytes(columns, columns))
        size = max(1, self.budget // 2 // max(1, row))
        for start in range(0, len(self.inputs), size):
            yield tuple(range(start, min(start + size, len(self.inputs))))

    def first_effect(self, *, sources_match: bool = True) -> FirstEffect:
        """Returns what decides which cells can matter; see `FirstEffect` for `sources_match`."""
        base = tuple(bound_hooks_of(self.base_hook_points))
        return FirstEffect(self.lm, self.inputs, sources_match, base)

    def cell_prompts(self, rows: Sequence[int], first_effect: FirstEffect) -> list[CellPrompt]:
        """Returns the cell prompts of some prompts that have to run and can share a forward."""
        key = tuple(rows), first_effect.sources_match
        if key not in self._cell_prompts:
            self._cell_prompts[key] = list(self._find_cell_prompts(rows, first_effect))
        return self._cell_prompts[key]

    @cached_property
    def _cell_prompts(self) -> dict[tuple[tuple[int, ...], bool], list[CellPrompt]]:
        """Cache of `cell_prompts`, owned by this plan."""
        return {}

    def _find_cell_prompts(
        self, rows: Sequence[int], first_effect: FirstEffect
    ) -> Iterator[CellPrompt]:
        for cell in self.cells:
            if cell.alone:
                continue
            bound_hooks = cell.bound_hooks
            for row in rows:
                start = first_effect.first_start(bound_hooks, row)
                if start is not None:
                    yield CellPrompt(cell.number, row, start)

    def jobs(
        self, rows: Sequence[int], cell_prompts: Sequence[CellPrompt], budget: int
    ) -> list[Job]:
        """Returns the forwards that run these cell prompts."""
        columns = self.inputs.count_columns(rows)
        from_input: list[CellPrompt] = []  # these cannot be in a batch that grows
        joining: list[CellPrompt] = []
        for cell_prompt in cell_prompts:
            start = cell_prompt.start
            if self.shortcuts.grow and start.block > INPUT:
                joining.append(cell_prompt)
            else:
                start = Start(INPUT, start.pos)
                from_input.append(CellPrompt(cell_prompt.cell, cell_prompt.row, start))
        jobs = []
        for group in (from_input, joining):
            needs = [self._needed_width(cell_prompt) for cell_prompt in group]
            jobs += group_into_jobs(self.lm, group, needs, columns, prefix=self.shortcuts.prefix)
        parts = []
        for job in jobs:
            parts += job.split(self._row_bytes(job.width, columns), budget // 2)
        return parts

    def _needed_width(self, cell_prompt: CellPrompt) -> int:
        row = cell_prompt.row
        return max(self.inputs.read_counts[row], self.inputs.lengths[row] - cell_prompt.start.pos)

    @property
    def alone(self) -> list[Cell]:
        """The cells that cannot share a forward."""
        return [cell for cell in self.cells if cell.alone]

    @cached_property
    def all_jobs(self) -> list[Job]:
        """The forwards of all prompts."""
        first_effect = self.first_effect()
        jobs = []
        for rows in self.chunks():
            jobs += self.jobs(rows, self.cell_prompts(rows, first_effect), self.budget)
        return jobs

    @property
    def forwards(self) -> int:
        """How many forwards will run."""
        chunks = len(list(self.chunks()))
        return chunks * (1 + len(self.alone)) + len(self.all_jobs)

    @cached_property
    def layer_tokens(self) -> int:
        """How many tokens will pass through a block, summed over the blocks. The unedited prompts
        and padding are included."""
        n_layers = self.lm.n_layers
        columns = 0
        for rows in self.chunks():
            columns += len(rows) * self.inputs.count_columns(rows)
        grow = self.shortcuts.grow
        shared = sum(job.layer_tokens(n_layers, grow=grow) for job in self.all_jobs)
        return columns * n_layers * (1 + len(self.alone)) + shared

    @property
    def naive_layer_tokens(self) -> int:
        """The same for one whole forward of each prompt in each cell."""
        tokens = sum(map(len, self.inputs.rows))
        return tokens * self.lm.n_layers * len(self.cells)

    @property
    def running(self) -> int:
        """How many cells have to run, counted once for each prompt."""
        shared = sum(len(job.cell_prompts) for job in self.all_jobs)
        return shared + len(self.alone) * len(self.inputs)

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
            peaks.append(len(job.cell_prompts) * self._row_bytes(job.width, columns))
        return rows * base_row_bytes(self.lm, columns) + max(peaks)

    def _row_bytes(self, width: int, columns: int) -> int:
        n_logits = self.inputs.count_logits(range(len(self.inputs)), width)
        return row_bytes(self.lm, width, columns, n_logits)

    def _repr_html_(self) -> str:
        return render_html("Plan of a sweep", text=repr(self))

    def __repr__(self) -> str:
        share = self.layer_tokens / max(1, self.naive_layer_tokens)
        widths = [job.width for job in self.all_jobs]
        positions = ""
        if widths:
            positions = f", over {_range(widths)} of {max(self.inputs.lengths)} positions"
        tokens = f"{self.layer_tokens:,} instead of {self.naive_layer_tokens:,} ({share:.1%})"
        lines = [
            f"{len(self.cells):,} cells x {_count(len(self.inputs), 'prompt')}",
            f"  cannot matter   {self.filled:,}: filled with the unedited value",
            f"  to run          {self.running:,} in {_count(self.forwards, 'forward')}{positions}",
            f"  layer-tokens    {tokens}",
            f"  memory          about {self.memory / 2**20:,.0f} MB beside the model",
        ]
        lines += [f"  {name:<15} {words}" for name, words in self._reductions()]
        return "\n".join(lines)

    def _reductions(self) -> Iterator[tuple[str, str]]:
        """Yields the name and the description of each reduction of the work."""
        yield "stop", self._stop()
        yield "share", self._shortcut("batch", "cells share forwards")
        yield "start", self._shortcut("grow", "at the block where a cell first differs")
        yield "prefix", self._shortcut("prefix", "positions before the edit come from a cache")
        after_attention = "after its attention at the metric's position only"
        yield "last block", self._shortcut("last", after_attention)
        if "logits_to_keep" in self.lm.takes:
            yield "head", "at the metric's position only"
        else:
            yield "head", "no: the model takes no logits_to_keep"
        for reason, count in Counter(cell.alone for cell in self.alone).items():
            yield "alone", f"{_count(count, 'cell')}: {reason}"

    def _shortcut(self, name: str, description: str) -> str:
        if getattr(self.shortcuts, name):
            return description
        return f"no: {self.shortcuts.why[name]}"

    def _stop(self) -> str:
        if self.inputs.has_continuation:
            return "at the end of the continuation"
        if self.inputs.cropped:
            return "at the position where the metric looks"
        if max(self.inputs.read_counts) > 1:
            return "no: a function receives positions after the one where the metric looks"
        return "at the last position, where the metric looks"


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"
