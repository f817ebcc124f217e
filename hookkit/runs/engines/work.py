"""Steps: units that are computed in some process, and what is done here with each result."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias


@dataclass(frozen=True, eq=False)
class Step:
    """A unit, or None if nothing is to be computed, and `then`, which is called with its result.

    A unit prints as the user knows it: the texts, or the cells, that are in it.
    """

    unit: Any
    then: Callable[[Any], object]


Steps: TypeAlias = Iterator[Step]


class Work(Protocol):
    """Computes units. The result of a unit is the same whenever and wherever it is computed."""

    def compute(self, unit: Any, /) -> Any: ...


def run_steps_here(work: Work, steps: Steps) -> None:
    """Runs steps in this process, each to its end before the next is requested."""
    for step in steps:
        step.then(None if step.unit is None else work.compute(step.unit))
