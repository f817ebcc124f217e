"""Cells of a sweep, drawn by chance and run once more by themselves."""

import random

from ..errors import Unsupported
from .passes import run_trunk
from .planning import Plan
from .saying import UNEDITED, Saying, Values, unedited
from .trial import LIMITS


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
            said = Saying(made.reading, made.measures, before)
            _compare(made, values, said.values([(number, row) for row in rows], alone.logits))


def _compare(made: Plan, values: Values, wanted: Values) -> None:
    for (number, row), expected in wanted.items():
        for metric, now, was in zip(made.metrics, values.get((number, row), expected), expected, strict=True):
            if abs(now - was) > _allowed(made, was):
                raise Unsupported(
                    f"the cell {made.cells[number]} of prompt {row} has {metric.name} {now:.6g}, and {was:.6g} "
                    "when it is run by itself: a shortcut does not hold for this model. Please report it; until "
                    "then run the cells with hk.forward"
                )


def _allowed(made: Plan, value: float) -> float:
    limit = LIMITS.get(getattr(made.lm.root, "dtype", None), LIMITS[next(iter(LIMITS))])  # pyright: ignore
    return 5 * limit * max(1.0, abs(value))
