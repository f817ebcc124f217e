"""Steps: what has to be computed, and what is done here with what came of it, one after the other."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias


@dataclass(frozen=True, eq=False)
class Step:
    """A unit that is computed somewhere, which may be nothing, and `then`, which is given what came of it, here.

    A unit prints as what a user knows it by: the texts, or the cells, that are in it.
    """

    unit: Any
    then: Callable[[Any], object]


Steps: TypeAlias = Iterator[Step]


class Work(Protocol):
    """What computes units. It gives the same for a unit whenever and wherever it is asked."""

    def compute(self, unit: Any, /) -> Any: ...


def computed_here(work: Work, steps: Steps) -> None:
    """Take steps one after the other, each to its end before the next is asked for."""
    for step in steps:
        step.then(None if step.unit is None else work.compute(step.unit))
