"""Which units run together: by how many of the last positions they need, and by how much memory there is."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..arguments import whole_number
from ..model import LM
from .passes import Unit

FORWARD = {"cpu": 40, "cuda": 256}  # what a block costs beside its tokens, in tokens: reading its weights, calling it
BUDGET = 128 * 2**20  # bytes, where the memory cannot be asked for: larger tensors are mapped anew each time


@dataclass(frozen=True)
class Job:
    """Units that run in one forward, over the last `width` positions."""

    width: int
    units: tuple[Unit, ...]

    def layer_tokens(self, n_layers: int, *, grow: bool) -> int:
        """How many tokens pass through a block, counted for each block."""
        if not grow:
            return len(self.units) * self.width * n_layers
        return sum(n_layers - max(0, unit.start.block) for unit in self.units) * self.width


def grouped(lm: LM, units: Sequence[Unit], needs: Sequence[int], columns: int, *, prefix: bool) -> list[Job]:
    """Jobs for units of which each needs so many of the last positions; the cheapest way to cut them into widths.

    More widths mean fewer tokens and more forwards, and a forward costs something beside its tokens.
    """
    if not units:
        return []
    if not prefix:
        return [Job(columns, tuple(sorted(units, key=lambda unit: unit.order)))]
    by_need: dict[int, list[Unit]] = {}
    for unit, need in zip(units, needs, strict=True):
        by_need.setdefault(need, []).append(unit)
    widths = sorted(by_need)
    layers = [sum(lm.n_layers - max(0, unit.start.block) for unit in by_need[width]) for width in widths]
    deepest = [lm.n_layers - max(0, min(unit.start.block for unit in by_need[width])) for width in widths]
    jobs = []
    for first, last in _cheapest(widths, layers, deepest, FORWARD.get(lm.device.type, FORWARD["cuda"])):
        together = [unit for width in widths[first : last + 1] for unit in by_need[width]]
        jobs.append(Job(widths[last], tuple(sorted(together, key=lambda unit: unit.order))))
    return jobs


def _cheapest(widths: list[int], layers: list[int], deepest: list[int], fixed: int) -> list[tuple[int, int]]:
    """The cut of ascending widths into runs with the least cost: a run costs its tokens at its largest width, and a
    forward through its blocks."""
    best: list[tuple[int, list[tuple[int, int]]]] = [(0, [])]
    for last in range(len(widths)):
        options = []
        for first in range(last + 1):
            cost = sum(layers[first : last + 1]) * widths[last] + fixed * max(deepest[first : last + 1])
            options.append((best[first][0] + cost, [*best[first][1], (first, last)]))
        best.append(min(options, key=lambda option: option[0]))
    return best[-1][1]


def cut(job: Job, row: int, budget: int) -> list[Job]:
    """A job in parts that fit the budget, where a row takes so many bytes."""
    rows = max(1, budget // row)
    return [Job(job.width, job.units[start : start + rows]) for start in range(0, len(job.units), rows)]


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
        return whole_number(asked, "memory", least=1, meaning="the bytes that it may use beside the model,")
    if lm.device.type == "cuda":
        free = torch.cuda.mem_get_info(lm.device)[0] // 4
        return free if lm.ranks is None else lm.ranks.least(free)
    return BUDGET
