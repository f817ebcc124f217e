"""The metrics of cells: from logits to numbers.

Also the metrics of a sweep's target, to which effects are relative, and the check that runs some
cells again by themselves.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import BadHook, Unsupported
from ..models.prompts import Prompts, as_batch
from ..runs.run import Run
from ..tables.metrics.metric import Measure, MetricInput, logits_at
from .cells import check_reached
from .forwards import BaseForward, run_base
from .inputs import SweepInputs, read_inputs
from .plan import Plan
from .shortcuts import LIMITS

Values: TypeAlias = dict[tuple[int, int], list[float]]
"""The values of the metrics, by cell number and row."""

UNEDITED = -1  # the cell number of the prompts without any cell's edits


def cell_keys(cell: int, rows: Sequence[int]) -> list[tuple[int, int]]:
    """Returns the keys of a cell's values."""
    return [(cell, row) for row in rows]


@dataclass(frozen=True, eq=False)
class CellMetrics:
    """The metrics of the prompts of a sweep.

    `before` are the logits of each row without a cell's edits, at the metric's position; None if no
    metric compares with them.
    """

    inputs: SweepInputs
    measures: Sequence[Measure]
    before: Mapping[int, Float[Tensor, " vocab"]] | None = None

    @classmethod
    def after_base(cls, plan: Plan, base: BaseForward | None) -> "CellMetrics":
        """Returns the metrics of the prompts of an unedited forward, which may be None if no metric
        compares with it."""
        before = None
        if plan.compares:
            assert base is not None
            before = {}
            for row, logits in zip(base.rows, base.logits, strict=True):
                before[row] = logits[-plan.inputs.read_counts[row]]
        return cls(plan.inputs, plan.measures, before)

    def values(
        self, keys: Sequence[tuple[int, int]], logits: Float[Tensor, "row pos vocab"]
    ) -> Values:
        """Returns the metrics of these cells and rows, in parts because metrics make copies."""
        values: Values = {}
        size = max(1, 2**26 // max(1, logits[0].numel()))
        for start in range(0, len(keys), size):
            part = keys[start : start + size]
            inputs = self.said([row for _, row in part], logits[start : start + size])
            columns = [measure(inputs).double().tolist() for measure in self.measures]
            for key, *numbers in zip(part, *columns, strict=True):
                values[key] = numbers
        return values

    def said(self, rows: Sequence[int], logits: Float[Tensor, "row pos vocab"]) -> MetricInput:
        """Returns what the metrics read of these rows."""
        before = None
        if self.before is not None:
            before = torch.stack([self.before[row] for row in rows]).float().to(logits.device)
        read_counts = self.inputs.read_counts
        if max(read_counts) == 1 and not self.inputs.has_continuation:
            return MetricInput(logits[:, -1].float(), rows, before)
        after = []
        for row, row_logits in zip(rows, logits, strict=True):
            after.append(row_logits[-read_counts[row] :].float())
        return MetricInput(
            torch.stack([row_logits[0] for row_logits in after]), rows, before, after
        )


def metric_columns(
    name: str,
    values: Float[np.ndarray, " cell"],
    before: Float[np.ndarray, " cell"],
    delta: Float[np.ndarray, " cell"],
    target: Float[np.ndarray, " cell"] | None,
) -> dict[str, Float[np.ndarray, " cell"]]:
    """Returns the columns of a metric: its values, `_before` and `_delta`, with a target also
    `_target` and `_effect` (NaN where the target is the unedited value)."""
    columns = {name: values, f"{name}_before": before, f"{name}_delta": delta}
    if target is not None:
        with np.errstate(invalid="ignore"):  # infinity minus infinity
            distance = target - before
            effect = np.divide(delta, distance, out=distance * np.nan, where=distance != 0)
        columns |= {f"{name}_target": target, f"{name}_effect": effect}
    return columns


def _unedited_metrics(plan: Plan, rows: tuple[int, ...]) -> CellMetrics:
    """Returns the metrics of some prompts, which are run if a metric compares with them."""
    base = run_base(plan.inputs, rows, plan.base_hook_points) if plan.compares else None
    return CellMetrics.after_base(plan, base)


def target_values(plan: Plan, target: Run | Prompts, pos: int) -> list[list[float]]:
    """Returns the metrics of each prompt's target: of a run, or of prompts, which are run with the
    base hooks."""
    run_logits = None
    if isinstance(target, Run):
        if plan.inputs.has_continuation:
            raise Unsupported(
                "a run has not read the continuation whose loss is meant: give prompts as the "
                "target"
            )
        run_logits = _for_all_prompts([*logits_at(target, pos)], plan)
        inputs = replace(plan.inputs, read_counts=(1,) * len(plan.inputs))
    else:
        target_rows = _for_all_prompts(as_batch(plan.lm, target).rows, plan)
        inputs = read_inputs(plan.lm, [list(row) for row in target_rows], plan.metrics, pos)
        check_reached(plan.base_hook_points, inputs)
    values: Values = {}
    for rows in plan.chunks():
        cell_metrics = replace(_unedited_metrics(plan, rows), inputs=inputs)
        if run_logits is None:
            logits = run_base(inputs, rows, plan.base_hook_points).logits
        else:
            logits = torch.stack([run_logits[row] for row in rows])[:, None]
        values |= cell_metrics.values(cell_keys(UNEDITED, rows), logits)
    return [values[UNEDITED, row] for row in range(len(plan.inputs))]


def _for_all_prompts(targets: Sequence[Any], plan: Plan) -> Sequence[Any]:
    """Returns a target for each prompt. Raises unless there are as many, or one."""
    count = len(plan.inputs)
    if len(targets) not in (1, count):
        raise BadHook(
            f"the target has {len(targets)} rows, and there are {count} prompts: give as many, "
            "or one"
        )
    return targets if len(targets) == count else [*targets] * count


def verify_cells(plan: Plan, values: Values, count: int) -> None:
    """Runs some random cells by themselves. Raises `Unsupported` if one has other values."""
    dtype = getattr(plan.lm.root, "dtype", torch.float64)
    limit = 5 * LIMITS.get(dtype, LIMITS[torch.float64])
    cells = sorted({cell for cell, _ in values} - {UNEDITED})
    for cell in random.Random(0).sample(cells, min(count, len(cells))):
        alone: Values = {}
        for rows in plan.chunks():
            logits = run_base(plan.inputs, rows, plan.hook_points[cell]).logits
            alone |= _unedited_metrics(plan, rows).values(cell_keys(cell, rows), logits)
        for key, expected in alone.items():
            actual = values.get(key, expected)
            for metric, value, number in zip(plan.metrics, actual, expected, strict=True):
                if abs(value - number) > limit * max(1.0, abs(number)):
                    raise Unsupported(
                        f"the cell {plan.cells[cell]} of prompt {key[1]} has {metric.name} "
                        f"{value:.6g}, and {number:.6g} when it is run by itself: a shortcut does "
                        "not hold for this model. Please report it; until then run the cells with "
                        "hk.forward"
                    )
