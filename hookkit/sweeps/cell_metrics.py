"""From what a model says to the metrics of cells.

What the metrics are at a sweep's target, from which the effect is counted.

Cells of a sweep, drawn by chance and run once more by themselves.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import BadHook, Unsupported
from ..models.prompts import Prompts, as_batch
from ..runs.run import Run
from ..tables.metrics import Loss, Measure, Metric, Said, last_logits
from .cells import check_reached
from .forwards import BaseForward, run_trunk
from .inputs import SweepInputs, read
from .plan import Plan
from .shortcuts import LIMITS

Values: TypeAlias = dict[tuple[int, int], list[float]]
"""What the metrics gave, by the cell's number and the prompt's."""

UNEDITED = -1  # stands for a cell: the prompt without any cell's edits

Before: TypeAlias = Mapping[int, Float[Tensor, " vocab"]]
"""What the model says of each prompt without a cell's edits, where the metric looks."""


@dataclass(frozen=True, eq=False)
class CellMetrics:
    """The metrics of a reading. `before` is there where one of them compares."""

    reading: SweepInputs
    measures: Sequence[Measure]
    before: Before | None = None

    def values(
        self, keys: Sequence[tuple[int, int]], logits: Float[Tensor, "row look vocab"]
    ) -> Values:
        """The metrics of these cells and prompts."""
        found: Values = {}
        part = max(
            1, 2**26 // max(1, logits[0].numel())
        )  # rows at a time, since a metric makes copies
        for start in range(0, len(keys), part):
            some = keys[start : start + part]
            found |= self.measured(
                some, self.said([row for _, row in some], logits[start : start + part])
            )
        return found

    def measured(self, keys: Sequence[tuple[int, int]], said: Said) -> Values:
        """The metrics of what was said."""
        columns = [measure(said).double().tolist() for measure in self.measures]
        return {key: list(values) for key, *values in zip(keys, *columns, strict=True)}

    def earlier(self, rows: Sequence[int]) -> Float[Tensor, "row vocab"] | None:
        """What the model says of these prompts without an edit, where a metric compares with it."""
        return (
            None if self.before is None else torch.stack([self.before[row] for row in rows]).float()
        )

    def said(self, rows: Sequence[int], logits: Float[Tensor, "row look vocab"]) -> Said:
        """What the model says of these prompts, where the metrics look."""
        looks = self.reading.looks
        if max(looks) == 1 and not self.reading.continues:
            return Said(logits[:, -1].float(), rows, self.earlier(rows))
        first = torch.stack([each[-looks[row]] for each, row in zip(logits, rows, strict=True)])
        after = [each[-looks[row] :].float() for each, row in zip(logits, rows, strict=True)]
        return Said(first.float(), rows, self.earlier(rows), after)


def unedited(reading: SweepInputs, trunk: BaseForward, metrics: Sequence[Metric]) -> Before | None:
    """What the unedited rows say; None where no metric compares with it."""
    if not any(metric.compares for metric in metrics):
        return None
    each = zip(trunk.rows, trunk.logits, strict=True)
    return {row: logits[-reading.looks[row]] for row, logits in each}


Part = tuple[int, ...]


def aims(made: Plan, target: Run | Prompts, pos: int) -> list[list[float]]:
    """The metrics of each prompt's target: a run, or prompts, which are run under the hooks of every cell."""
    measured = (
        _of_run(made, target, pos) if isinstance(target, Run) else _of_prompts(made, target, pos)
    )
    found: Values = {}
    for rows in made.chunks():
        before = None
        if any(metric.compares for metric in made.metrics):
            before = unedited(made.reading, _trunk(made, made.reading, rows), made.metrics)
        found |= measured(rows, CellMetrics(made.reading, made.measures, before))
    return [found[UNEDITED, row] for row in range(len(made.reading))]


def _of_run(made: Plan, run: Run, pos: int) -> Callable[[Part, CellMetrics], Values]:
    if any(isinstance(metric, Loss) for metric in made.metrics):
        raise Unsupported(
            "a run has not read the continuation whose loss is meant: give prompts as the target"
        )
    logits, count = last_logits(run, pos), len(made.reading)
    _check(len(logits), count)
    logits = logits.expand(count, -1)

    def measured(rows: Part, saying: CellMetrics) -> Values:
        earlier = saying.earlier(rows)
        said = Said(logits[list(rows)], rows, None if earlier is None else earlier.cpu())
        return saying.measured([(UNEDITED, row) for row in rows], said)

    return measured


def _of_prompts(made: Plan, prompts: Prompts, pos: int) -> Callable[[Part, CellMetrics], Values]:
    rows, count = as_batch(made.lm, prompts).rows, len(made.reading)
    _check(len(rows), count)
    theirs = read(
        made.lm,
        [list(row) for row in (rows if len(rows) == count else rows * count)],
        made.metrics,
        pos,
    )
    check_reached(made.under, theirs)

    def measured(rows: Part, saying: CellMetrics) -> Values:
        logits = _trunk(made, theirs, rows).logits
        return CellMetrics(theirs, made.measures, saying.before).values(
            [(UNEDITED, row) for row in rows], logits
        )

    return measured


def _check(found: int, count: int) -> None:
    if found not in (1, count):
        raise BadHook(
            f"the target has {found} rows, and there are {count} prompts: give as many, or one"
        )


def _trunk(made: Plan, reading: SweepInputs, rows: Part) -> BaseForward:
    return run_trunk(reading, rows, made.under, (), 1, cache=False)


def verify(made: Plan, values: Values, count: int) -> None:
    """Run some cells by themselves, from beginning to end, and raise `Unsupported` if one has other values."""
    done = sorted({cell for cell, _ in values} - {UNEDITED})
    for number in random.Random(0).sample(done, min(count, len(done))):
        for rows in made.chunks():
            alone = run_trunk(made.reading, rows, made.taps[number], (), 1, cache=False)
            before = None
            if any(metric.compares for metric in made.metrics):
                trunk = run_trunk(made.reading, rows, made.under, (), 1, cache=False)
                before = unedited(made.reading, trunk, made.metrics)
            said = CellMetrics(made.reading, made.measures, before)
            _compare(made, values, said.values([(number, row) for row in rows], alone.logits))


def _compare(made: Plan, values: Values, wanted: Values) -> None:
    for (number, row), expected in wanted.items():
        for metric, now, was in zip(
            made.metrics, values.get((number, row), expected), expected, strict=True
        ):
            if abs(now - was) > _allowed(made, was):
                raise Unsupported(
                    f"the cell {made.cells[number]} of prompt {row} has {metric.name} {now:.6g}, and {was:.6g} "
                    "when it is run by itself: a shortcut does not hold for this model. Please report it; until "
                    "then run the cells with hk.forward"
                )


def _allowed(made: Plan, value: float) -> float:
    limit = LIMITS.get(getattr(made.lm.root, "dtype", None), LIMITS[next(iter(LIMITS))])  # pyright: ignore
    return 5 * limit * max(1.0, abs(value))
