"""The metrics of cells: from logits to numbers.

Also the metrics of a sweep's target, to which effects are relative, and the check that runs some
cells again by themselves.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import BadHook, Unsupported
from ..models.prompts import Prompts, as_batch
from ..runs.run import Run
from ..tables.metrics import Measure, Said, logits_at
from .cells import check_reached
from .forwards import BaseForward, run_base
from .inputs import SweepInputs, read_inputs
from .plan import Plan
from .shortcuts import LIMITS

Values: TypeAlias = dict[tuple[int, int], list[float]]
"""The values of the metrics, by cell number and row."""

UNEDITED = -1  # the cell number of the prompts without any cell's edits

UneditedLogits: TypeAlias = Mapping[int, Float[Tensor, " vocab"]]
"""For each row the logits without a cell's edits, at the metric's position."""


def cell_keys(cell: int, rows: Sequence[int]) -> list[tuple[int, int]]:
    """Returns the keys of a cell's values."""
    return [(cell, row) for row in rows]


@dataclass(frozen=True, eq=False)
class CellMetrics:
    """The metrics of the prompts of a sweep. `before` is there if a metric compares with it."""

    inputs: SweepInputs
    measures: Sequence[Measure]
    before: UneditedLogits | None = None

    def values(
        self, keys: Sequence[tuple[int, int]], logits: Float[Tensor, "row pos vocab"]
    ) -> Values:
        """Returns the metrics of these cells and rows, in parts because metrics make copies."""
        values: Values = {}
        size = max(1, 2**26 // max(1, logits[0].numel()))
        for start in range(0, len(keys), size):
            part = keys[start : start + size]
            said = self.said([row for _, row in part], logits[start : start + size])
            values |= self.measure(part, said)
        return values

    def measure(self, keys: Sequence[tuple[int, int]], said: Said) -> Values:
        """Returns the metrics of these logits."""
        columns = [measure(said).double().tolist() for measure in self.measures]
        return {key: list(values) for key, *values in zip(keys, *columns, strict=True)}

    def before_logits(self, rows: Sequence[int]) -> Float[Tensor, "row vocab"] | None:
        """Returns the unedited logits of these rows; None if no metric compares with them."""
        if self.before is None:
            return None
        return torch.stack([self.before[row] for row in rows]).float()

    def said(self, rows: Sequence[int], logits: Float[Tensor, "row pos vocab"]) -> Said:
        """Returns what the metrics read of these rows."""
        read_counts = self.inputs.read_counts
        if max(read_counts) == 1 and not self.inputs.has_continuation:
            return Said(logits[:, -1].float(), rows, self.before_logits(rows))
        first, after = [], []
        for row, row_logits in zip(rows, logits, strict=True):
            first.append(row_logits[-read_counts[row]])
            after.append(row_logits[-read_counts[row] :].float())
        return Said(torch.stack(first).float(), rows, self.before_logits(rows), after)


def unedited_logits(plan: Plan, forward: BaseForward) -> UneditedLogits | None:
    """Returns the logits of unedited rows; None if no metric compares with them."""
    if not plan.compares:
        return None
    read_counts = plan.inputs.read_counts
    pairs = zip(forward.rows, forward.logits, strict=True)
    return {row: logits[-read_counts[row]] for row, logits in pairs}


def _cell_metrics(plan: Plan, rows: tuple[int, ...]) -> CellMetrics:
    """Returns the metrics of some prompts, which are run if a metric compares with them."""
    before = None
    if plan.compares:
        before = unedited_logits(plan, _run_unedited(plan, plan.inputs, rows))
    return CellMetrics(plan.inputs, plan.measures, before)


def _run_unedited(plan: Plan, inputs: SweepInputs, rows: tuple[int, ...]) -> BaseForward:
    return run_base(inputs, rows, plan.base_hook_points, (), 1, cache=False)


def target_values(plan: Plan, target: Run | Prompts, pos: int) -> list[list[float]]:
    """Returns the metrics of each prompt's target: of a run, or of prompts, which are run with the
    base hooks."""
    if isinstance(target, Run):
        values = _values_of_run(plan, target, pos)
    else:
        values = _values_of_prompts(plan, target, pos)
    return [values[UNEDITED, row] for row in range(len(plan.inputs))]


def _values_of_run(plan: Plan, run: Run, pos: int) -> Values:
    if plan.inputs.has_continuation:
        raise Unsupported(
            "a run has not read the continuation whose loss is meant: give prompts as the target"
        )
    count = len(plan.inputs)
    logits = logits_at(run, pos)
    _check_count(len(logits), count)
    logits = logits.expand(count, -1)
    values: Values = {}
    for rows in plan.chunks():
        cell_metrics = _cell_metrics(plan, rows)
        before = cell_metrics.before_logits(rows)
        if before is not None:
            before = before.cpu()
        said = Said(logits[list(rows)], rows, before)
        values |= cell_metrics.measure(cell_keys(UNEDITED, rows), said)
    return values


def _values_of_prompts(plan: Plan, prompts: Prompts, pos: int) -> Values:
    count = len(plan.inputs)
    target_rows = as_batch(plan.lm, prompts).rows
    _check_count(len(target_rows), count)
    if len(target_rows) != count:
        target_rows = target_rows * count
    inputs = read_inputs(plan.lm, [list(row) for row in target_rows], plan.metrics, pos)
    check_reached(plan.base_hook_points, inputs)
    values: Values = {}
    for rows in plan.chunks():
        before = _cell_metrics(plan, rows).before
        logits = _run_unedited(plan, inputs, rows).logits
        cell_metrics = CellMetrics(inputs, plan.measures, before)
        values |= cell_metrics.values(cell_keys(UNEDITED, rows), logits)
    return values


def _check_count(target_count: int, count: int) -> None:
    if target_count not in (1, count):
        raise BadHook(
            f"the target has {target_count} rows, and there are {count} prompts: give as many, "
            "or one"
        )


def verify_cells(plan: Plan, values: Values, count: int) -> None:
    """Runs some random cells by themselves. Raises `Unsupported` if one has other values."""
    cells = sorted({cell for cell, _ in values} - {UNEDITED})
    for cell in random.Random(0).sample(cells, min(count, len(cells))):
        for rows in plan.chunks():
            forward = run_base(plan.inputs, rows, plan.hook_points[cell], (), 1, cache=False)
            cell_metrics = _cell_metrics(plan, rows)
            alone = cell_metrics.values(cell_keys(cell, rows), forward.logits)
            _compare(plan, values, alone)


def _compare(plan: Plan, values: Values, expected_values: Values) -> None:
    dtype = getattr(plan.lm.root, "dtype", torch.float64)
    limit = 5 * LIMITS.get(dtype, LIMITS[torch.float64])
    for (cell, row), expected in expected_values.items():
        actual = values.get((cell, row), expected)
        for metric, value, alone in zip(plan.metrics, actual, expected, strict=True):
            if abs(value - alone) > limit * max(1.0, abs(alone)):
                raise Unsupported(
                    f"the cell {plan.cells[cell]} of prompt {row} has {metric.name} {value:.6g}, "
                    f"and {alone:.6g} when it is run by itself: a shortcut does not hold for this "
                    "model. Please report it; until then run the cells with hk.forward"
                )
