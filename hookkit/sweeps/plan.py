"""The plan of a sweep: what has to run, what need not, and what it will cost.

Which units run together: by how many of the last positions they need, and by how much memory there is.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from ..arguments import whole_number
from ..display import shown
from ..models.lm import LM
from ..runs.taps import HookPoint
from ..tables.metrics import Loss, Measure, Metric
from .cells import Cell
from .forwards import CellPrompt, Shortcuts
from .inputs import SweepInputs
from .reach import INPUT, FirstEffect, Start

FORWARD = {
    "cpu": 40,
    "cuda": 256,
}  # what a block costs beside its tokens, in tokens: reading its weights, calling it
BUDGET = (
    128 * 2**20
)  # bytes, where the memory cannot be asked for: larger tensors are mapped anew each time


@dataclass(frozen=True)
class Job:
    """Units that run in one forward, over the last `width` positions."""

    width: int
    units: tuple[CellPrompt, ...]

    def layer_tokens(self, n_layers: int, *, grow: bool) -> int:
        """How many tokens pass through a block, counted for each block."""
        if not grow:
            return len(self.units) * self.width * n_layers
        return sum(n_layers - max(0, unit.start.block) for unit in self.units) * self.width


def grouped(
    lm: LM, units: Sequence[CellPrompt], needs: Sequence[int], columns: int, *, prefix: bool
) -> list[Job]:
    """Jobs for units of which each needs so many of the last positions; the cheapest way to cut them into widths.

    More widths mean fewer tokens and more forwards, and a forward costs something beside its tokens.
    """
    if not units:
        return []
    if not prefix:
        return [Job(columns, tuple(sorted(units, key=lambda unit: unit.order)))]
    by_need: dict[int, list[CellPrompt]] = {}
    for unit, need in zip(units, needs, strict=True):
        by_need.setdefault(need, []).append(unit)
    widths = sorted(by_need)
    layers = [
        sum(lm.n_layers - max(0, unit.start.block) for unit in by_need[width]) for width in widths
    ]
    deepest = [
        lm.n_layers - max(0, min(unit.start.block for unit in by_need[width])) for width in widths
    ]
    jobs = []
    for first, last in _cheapest(
        widths, layers, deepest, FORWARD.get(lm.device.type, FORWARD["cuda"])
    ):
        together = [unit for width in widths[first : last + 1] for unit in by_need[width]]
        jobs.append(Job(widths[last], tuple(sorted(together, key=lambda unit: unit.order))))
    return jobs


def _cheapest(
    widths: list[int], layers: list[int], deepest: list[int], fixed: int
) -> list[tuple[int, int]]:
    """The cut of ascending widths into runs with the least cost: a run costs its tokens at its largest width, and a
    forward through its blocks."""
    best: list[tuple[int, list[tuple[int, int]]]] = [(0, [])]
    for last in range(len(widths)):
        options = []
        for first in range(last + 1):
            cost = sum(layers[first : last + 1]) * widths[last] + fixed * max(
                deepest[first : last + 1]
            )
            options.append((best[first][0] + cost, [*best[first][1], (first, last)]))
        best.append(min(options, key=lambda option: option[0]))
    return best[-1][1]


def cut(job: Job, row: int, budget: int) -> list[Job]:
    """A job in parts that fit the budget, where a row takes so many bytes."""
    rows = max(1, budget // row)
    return [
        Job(job.width, job.units[start : start + rows]) for start in range(0, len(job.units), rows)
    ]


def row_bytes(lm: LM, width: int, columns: int, looks: int) -> int:
    """About how much memory a row of a forward takes at its peak: its activations in a block, the keys and values that
    it reads, the mask, and its logits three times."""
    sizes = {name: size or 0 for name, size in lm.sizes.items()}
    number = torch.finfo(getattr(lm.root, "dtype", torch.float32)).bits // 8
    mlp = sizes.get("d_mlp") or 4 * sizes["d_model"]
    inside = width * (8 * sizes["d_model"] + 3 * mlp)
    heads = sizes.get("head") or 1
    attention = columns * 4 * sizes["d_model"] + heads * width * columns
    return number * (inside + attention) + 12 * looks * (sizes["vocab"] or 0)


def trunk_bytes(lm: LM, columns: int) -> int:
    """About how much memory is kept of an unedited row: keys and values, and what enters each block."""
    number = torch.finfo(getattr(lm.root, "dtype", torch.float32)).bits // 8
    return number * columns * lm.n_layers * 3 * (lm.sizes["d_model"] or 0)


def memory_budget(lm: LM, asked: int | None) -> int:
    """The bytes that a sweep may use beside the model: what was asked for, or a quarter of what a GPU has free."""
    if asked is not None:
        return whole_number(
            asked, "memory", least=1, meaning="the bytes that it may use beside the model,"
        )
    if lm.device.type == "cuda":
        free = torch.cuda.mem_get_info(lm.device)[0] // 4
        return free if lm.ranks is None else lm.ranks.least(free)
    return BUDGET


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """What a sweep is going to do; print it. `hk.plan` makes one, `hk.sweep` runs one."""

    lm: LM
    cells: tuple[Cell, ...]
    reading: SweepInputs
    metrics: tuple[Metric, ...]
    under: tuple[HookPoint, ...]
    may: Shortcuts
    budget: int

    @cached_property
    def taps(self) -> list[list[HookPoint]]:
        """All that is done in each cell, what acts in every cell first."""
        return [[*self.under, *cell.taps] for cell in self.cells]

    @cached_property
    def measures(self) -> list[Measure]:
        """The metrics for this model's tokens."""
        return [metric.bound(self.lm, len(self.reading)) for metric in self.metrics]

    def chunks(self) -> Iterator[tuple[int, ...]]:
        """The prompts, a part at a time, so that what is kept of them fits half the budget, and their forward too."""
        columns = max(self.reading.lengths)
        row = max(trunk_bytes(self.lm, columns), self._row_bytes(columns, columns))
        room = max(1, self.budget // 2 // max(1, row))
        for start in range(0, len(self.reading), room):
            yield tuple(range(start, min(start + room, len(self.reading))))

    def reach(self, *, trusted: bool = True) -> FirstEffect:
        """The argument about what can change; `trusted` where sources were seen to be this model's own."""
        actions = tuple(action for tap in self.under for action in tap.actions)
        return FirstEffect(self.lm, self.reading, trusted, actions)

    def units(self, rows: Sequence[int], reach: FirstEffect) -> list[CellPrompt]:
        """The units of some prompts that have to run with others; the rest cannot matter, or runs alone."""
        key = tuple(rows), reach.trusted
        if key not in self._units:
            found = self._units[key] = []
            for cell in self.cells:
                actions = [] if cell.alone else cell.actions
                starts = ((row, reach.start(actions, row)) for row in rows)
                found += [
                    CellPrompt(cell.number, row, start)
                    for row, start in starts
                    if start is not None
                ]
        return self._units[key]

    @cached_property
    def _units(self) -> dict[tuple[tuple[int, ...], bool], list[CellPrompt]]:
        return {}

    def jobs(self, rows: Sequence[int], units: Sequence[CellPrompt], budget: int) -> list[Job]:
        """The forwards that run these units."""
        reading, columns = self.reading, max(self.reading.lengths[row] for row in rows)
        needs = [
            max(reading.looks[unit.row], reading.lengths[unit.row] - unit.start.pos)
            for unit in units
        ]
        jobs = []
        for joining in (
            False,
            True,
        ):  # rows that begin with the input are no part of a batch that grows
            chosen = [
                n
                for n, unit in enumerate(units)
                if (self.may.grow and unit.start.block > INPUT) is joining
            ]
            some = _from_input([units[n] for n in chosen], keep=joining)
            jobs += grouped(
                self.lm, some, [needs[n] for n in chosen], columns, prefix=self.may.prefix
            )
        return [
            part
            for job in jobs
            for part in cut(job, self._row_bytes(job.width, columns), budget // 2)
        ]

    @property
    def alone(self) -> list[Cell]:
        """The cells that run by themselves."""
        return [cell for cell in self.cells if cell.alone]

    @cached_property
    def all_jobs(self) -> list[Job]:
        """The forwards of all prompts."""
        reach = self.reach()
        return [
            job
            for rows in self.chunks()
            for job in self.jobs(rows, self.units(rows, reach), self.budget)
        ]

    @property
    def forwards(self) -> int:
        """How many forwards will run."""
        chunks = len(list(self.chunks()))
        return chunks * (1 + len(self.alone)) + len(self.all_jobs)

    @cached_property
    def layer_tokens(self) -> int:
        """How many tokens will pass through a block, counted for each block: those of the unedited rows and what fills
        up shorter rows are included."""
        lengths = self.reading.lengths
        whole = (
            sum(len(rows) * max(lengths[row] for row in rows) for rows in self.chunks())
            * self.lm.n_layers
        )
        run = sum(job.layer_tokens(self.lm.n_layers, grow=self.may.grow) for job in self.all_jobs)
        return whole * (1 + len(self.alone)) + run

    @property
    def naive_layer_tokens(self) -> int:
        """The same for one whole forward of each prompt in each cell."""
        return sum(map(len, self.reading.rows)) * self.lm.n_layers * len(self.cells)

    @property
    def running(self) -> int:
        """How many cells, counted for each prompt, have to run."""
        return sum(len(job.units) for job in self.all_jobs) + len(self.alone) * len(self.reading)

    @property
    def filled(self) -> int:
        """How many need not run, since their edit cannot change what the metric sees."""
        return len(self.cells) * len(self.reading) - self.running

    @property
    def memory(self) -> int:
        """About how many bytes it will take at its peak, beside the model."""
        reading = self.reading
        columns = max(reading.lengths)
        rows = max(map(len, self.chunks()))
        waves = [len(job.units) * self._row_bytes(job.width, columns) for job in self.all_jobs]
        return rows * trunk_bytes(self.lm, columns) + max(
            [*waves, rows * self._row_bytes(columns, columns)]
        )

    def _row_bytes(self, width: int, columns: int) -> int:
        """About how much memory a row takes in a forward over the last `width` of so many columns."""
        computed = self.reading.logits_of(range(len(self.reading)), width)
        return row_bytes(self.lm, width, columns, computed)

    def _repr_html_(self) -> str:
        return shown("Plan of a sweep", text=repr(self))

    def __repr__(self) -> str:
        prompts = len(self.reading)
        share = self.layer_tokens / max(1, self.naive_layer_tokens)
        widths = [job.width for job in self.all_jobs]
        over = f", over {_range(widths)} of {max(self.reading.lengths)} positions" if widths else ""
        lines = [
            f"{len(self.cells):,} cells x {_count(prompts, 'prompt')}",
            f"  cannot matter   {self.filled:,}: filled with the unedited value",
            f"  to run          {self.running:,} in {_count(self.forwards, 'forward')}{over}",
            f"  layer-tokens    {self.layer_tokens:,} instead of {self.naive_layer_tokens:,} ({share:.1%})",
            f"  memory          about {self.memory / 2**20:,.0f} MB beside the model",
            *(f"  {name:<15} {words}" for name, words in self._reductions()),
        ]
        return "\n".join(lines)

    def _reductions(self) -> Iterator[tuple[str, str]]:
        why = self.may.why
        yield "stop", self._stop()
        yield "share", "cells share forwards" if self.may.batch else f"no: {why['batch']}"
        yield (
            "start",
            "at the block where a cell first differs" if self.may.grow else f"no: {why['grow']}",
        )
        yield (
            "prefix",
            "positions before the edit come from a cache"
            if self.may.prefix
            else f"no: {why['prefix']}",
        )
        yield (
            "last block",
            "behind its attention at the metric's position only"
            if self.may.last
            else f"no: {why['last']}",
        )
        yield (
            "head",
            "at the metric's position only"
            if "logits_to_keep" in self.lm.takes
            else "no: the model takes no logits_to_keep",
        )
        for reason, count in Counter(cell.alone for cell in self.alone).items():
            yield "alone", f"{_count(count, 'cell')}: {reason}"

    def _stop(self) -> str:
        if any(isinstance(metric, Loss) for metric in self.metrics):
            return "at the end of the continuation"
        if self.reading.cropped:
            return "at the position where the metric looks"
        if max(self.reading.looks) > 1:
            return "no: a function is given positions behind the one where the metric looks"
        return "at the last position, where the metric looks"


def _from_input(units: Sequence[CellPrompt], *, keep: bool) -> Sequence[CellPrompt]:
    """The same units, to be run from the input on unless their own start is to be kept."""
    return (
        units
        if keep
        else [CellPrompt(unit.cell, unit.row, Start(INPUT, unit.start.pos)) for unit in units]
    )


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"
