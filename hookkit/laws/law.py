"""What a law is: a way to try it on a model, the sites of which it says something, and what it finds at each."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from .study import Study


@dataclass(frozen=True)
class Finding:
    """How one law stands at one site: the difference, as a part of the largest value, and what it may be at most."""

    site: str
    difference: float
    limit: float
    note: str = ""
    at_least: bool = False  # the difference has to be larger than the limit

    @property
    def holds(self) -> bool:
        """True where the law holds; never for a difference that is not a number."""
        return self.difference > self.limit if self.at_least else self.difference <= self.limit


Check: TypeAlias = Callable[[Study], Iterator[Finding]]


@dataclass(frozen=True)
class Law:
    """A law: its name, how it is tried, and every site of which it may find something."""

    name: str
    check: Check
    sites: tuple[str, ...]


def law(name: str, *sites: str) -> Callable[[Check], Law]:
    """Make a law of the function that tries it."""
    return lambda check: Law(name, check, sites)
