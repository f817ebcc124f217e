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
from ..tables.metrics.metric import Measure, Metric
from .cells import Cell
from .forwards import CellPrompt, Shortcuts
from .inputs import SweepInputs
from .reach import INPUT, FirstEffect, bound_hooks_of

# The fixed cost of running a block (reading its weights, calling it), in tokens.
BLOCK_COST = {"cpu": 40, "cuda": 256}

# Bytes, where the free memory is unknown. Larger tensors would be mapped anew each time.
DEFAULT_BUDGET = 128 * 2**20


@dataclass(frozen=True)
class Job:
    """Cell prompts that run in one forward, over the last `width` positions.

    All of them join at blocks, or all of them run from the input on.
    """

    width: int
    cell_prompts: tuple[CellPrompt, ...]

    @property
    def keys(self) -> list[tuple[int, int]]:
        """The cell number and the row of each cell prompt."""
        return [cell_prompt.key for cell_prompt in self.cell_prompts]

    def split(self, size: int) -> list["Job"]:
        """Returns jobs of at most `size` of the cell prompts each."""
        starts = range(0, len(self.cell_prompts), size)
        return [Job(self.width, self.cell_prompts[start : start + size]) for start in starts]


def _block_counts(cell_prompts: Sequence[CellPrompt], n_layers: int) -> list[int]:
    """Returns how many blocks each cell prompt runs through."""
    return [n_layers - max(0, cell_prompt.block) for cell_prompt in cell_prompts]


def _cheapest_jobs(by_width: dict[int, list[CellPrompt]], lm: LM) -> list[Job]:
    """Returns the cheapest jobs for cell prompts, by how many of the last positions they need.

    A job costs its tokens, at its largest width, and the fixed cost of each block that it runs.
    More widths mean fewer tokens and more forwards.
    """
    fixed = BLOCK_COST.get(lm.device.type, BLOCK_COST["cuda"])
    widths = sorted(by_width)
    best: list[tuple[int, list[Job]]] = [(0, [])]  # for the first widths: none, one, two ...
    counts = [_block_counts(by_width[width], lm.n_layers) for width in widths]
    blocks, deepest = [sum(group) for group in counts], [max(group) for group in counts]
    for last, width in enumerate(widths):
        costs = []
        for first in range(last + 1):
            tokens = sum(blocks[first : last + 1]) * width
            costs.append(best[first][0] + tokens + fixed * max(deepest[first : last + 1]))
        first = costs.index(min(costs))
        group: list[CellPrompt] = []
        for narrower in widths[first : last + 1]:
            group += by_width[narrower]
        best.append((costs[first], [*best[first][1], Job(width, tuple(sorted(group)))]))
    return best[-1][1]


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

    @property
    def compares(self) -> bool:
        """True if a metric compares a cell with the unedited prompts."""
        return any(metric.compares for metric in self.metrics)

    def chunks(self) -> Iterator[tuple[int, ...]]:
        """Yields groups of prompts whose results, and whose forward, fit half the budget."""
        columns = max(self.inputs.lengths)
        row = max(self._base_row_bytes, self._row_bytes(columns, columns))
        size = max(1, self.budget // 2 // max(1, row))
        for start in range(0, len(self.inputs), size):
            yield tuple(range(start, min(start + size, len(self.inputs))))

    @cached_property
    def first_effect(self) -> FirstEffect:
        """What decides which cells can matter."""
        return FirstEffect(self.inputs, bound_hooks_of(self.base_hook_points))

    def cell_prompts(self, rows: Sequence[int], *, sources_match: bool = True) -> list[CellPrompt]:
        """Returns the cell prompts of some prompts that have to run.

        `sources_match` is True if patches have the model's own values (see `FirstEffect`).
        """
        key = tuple(rows), sources_match
        if key in self._cell_prompts:
            return self._cell_prompts[key]
        cell_prompts: list[CellPrompt] = []
        for cell in self.cells:
            bound_hooks = cell.bound_hooks
            for row in rows:
                start = INPUT, 0
                if not cell.alone:
                    start = self.first_effect.first_start(
                        bound_hooks, row, sources_match=sources_match
                    )
                if start is not None:
                    block = start[0] if self.shortcuts.grow else INPUT
                    cell_prompts.append(CellPrompt(block, cell.number, row, start[1]))
        self._cell_prompts[key] = cell_prompts
        return cell_prompts

    @cached_property
    def _cell_prompts(self) -> dict[tuple[tuple[int, ...], bool], list[CellPrompt]]:
        """Cache of `cell_prompts`, owned by this plan."""
        return {}

    def jobs(
        self, rows: Sequence[int], cell_prompts: Sequence[CellPrompt], budget: int
    ) -> list[Job]:
        """Returns the forwards that run these cell prompts."""
        columns = self.inputs.count_columns(rows)
        alone: dict[int, list[CellPrompt]] = {}
        from_input: dict[int, list[CellPrompt]] = {}  # these cannot be in a batch that grows
        joining: dict[int, list[CellPrompt]] = {}
        for cell_prompt in cell_prompts:
            if self.cells[cell_prompt.cell].alone:
                alone.setdefault(cell_prompt.cell, []).append(cell_prompt)
                continue
            by_width = joining if cell_prompt.block > INPUT else from_input
            width = columns
            if self.shortcuts.prefix:
                row = cell_prompt.row
                width = self.inputs.lengths[row] - cell_prompt.pos
                width = max(self.inputs.read_counts[row], width)
            by_width.setdefault(width, []).append(cell_prompt)
        jobs = [Job(columns, tuple(group)) for group in alone.values()]
        for by_width in (from_input, joining):
            jobs += _cheapest_jobs(by_width, self.lm)
        parts: list[Job] = []
        for job in jobs:
            parts += job.split(max(1, budget // 2 // self._row_bytes(job.width, columns)))
        return parts

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
        return len(list(self.chunks())) + len(self.all_jobs)

    @cached_property
    def layer_tokens(self) -> int:
        """How many tokens will pass through a block, summed over the blocks. The unedited prompts
        and padding are included."""
        n_layers = self.lm.n_layers
        total = 0
        for rows in self.chunks():
            total += len(rows) * self.inputs.count_columns(rows) * n_layers
        for job in self.all_jobs:
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
        return sum(len(job.cell_prompts) for job in self.all_jobs)

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
        n_logits = self.inputs.count_logits(range(len(self.inputs)), width)
        return self._number_bytes * (activations + attention) + 12 * n_logits * sizes["vocab"]

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
        to_run = f"{self.running:,} in {_count(self.forwards, 'forward')}"
        shared = [job for job in self.all_jobs if not self.cells[job.cell_prompts[0].cell].alone]
        if shared:
            widths = sorted({job.width for job in shared})
            span = f"{widths[0]}" if len(widths) == 1 else f"{widths[0]} to {widths[-1]}"
            to_run += f", over {span} of {max(self.inputs.lengths)} positions"
        yield "to run", to_run
        tokens, naive = self.layer_tokens, self.naive_layer_tokens
        yield "layer-tokens", f"{tokens:,} instead of {naive:,} ({tokens / max(1, naive):.1%})"
        yield "memory", f"about {self.memory / 2**20:,.0f} MB beside the model"

    def _reductions(self) -> Iterator[tuple[str, str]]:
        stop = "at the last position, where the metric looks"
        if self.inputs.has_continuation:
            stop = "at the end of the continuation"
        elif self.inputs.cropped:
            stop = "at the position where the metric looks"
        elif max(self.inputs.read_counts) > 1:
            stop = "no: a function receives positions after the one where the metric looks"
        yield "stop", stop
        for name, shortcut, description in (
            ("share", "batch", "cells share forwards"),
            ("start", "grow", "at the block where a cell first differs"),
            ("prefix", "prefix", "positions before the edit come from a cache"),
            ("last block", "last", "after its attention at the metric's position only"),
        ):
            is_used = getattr(self.shortcuts, shortcut)
            yield name, description if is_used else f"no: {self.shortcuts.why[shortcut]}"
        takes_count = "logits_to_keep" in self.lm.takes
        no_count = "no: the model takes no logits_to_keep"
        yield "head", "at the metric's position only" if takes_count else no_count
        for reason, count in Counter(cell.alone for cell in self.alone).items():
            yield "alone", f"{_count(count, 'cell')}: {reason}"


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"
