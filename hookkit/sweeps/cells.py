"""The cells of a sweep: each point of the grid with the hooks that act there."""

import inspect
import itertools
from collections.abc import Callable, Hashable, Iterable, KeysView, Mapping, Sequence, Set, ValuesView
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from torch import Tensor

from ..arguments import described, items_of
from ..calls import Call
from ..captured import Captured
from ..errors import BadHook, EmptySelection
from ..firing import check_possible
from ..hooks.base import Hook
from ..hooks.looking import Capture
from ..manager import HookManager
from ..model import LM
from ..sites import AnySite, Site
from ..taps import Action, Tap, planned
from .reading import Reading

Grid: TypeAlias = Mapping[str, Iterable[Any]]
HooksAt: TypeAlias = Callable[..., Hook | Sequence[Hook] | None]
"""From a value of each dimension, by name, to the hooks of the cell; None where the grid has no such cell."""

TAKEN = ("row", "control")  # columns that the table has of its own


@dataclass(eq=False)
class Cell:
    """One point of the grid: its coordinates, its hooks, and what they do where."""

    number: int
    at: dict[str, Any]
    hooks: tuple[Hook, ...]
    taps: list[Tap]
    control: bool = False
    draw: int = 0  # which draw of a control
    alone: str = ""  # why it has to be run by itself

    @property
    def actions(self) -> list[Action]:
        """All that is done."""
        return [action for tap in self.taps for action in tap.actions]

    def __str__(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.at.items())


@dataclass(eq=False)
class References:
    """Values of other prompts, for hooks that put in means or draws: each layer of a site is captured once."""

    lm: LM
    known: dict[tuple[Any, str], dict[AnySite, Captured]] = field(default_factory=dict)

    def __call__(self, sites: Sequence[AnySite], prompts: tuple[Any, ...]) -> dict[AnySite, Captured]:
        return {site: self._at(site, prompts) for site in sites}

    def _at(self, site: AnySite, prompts: tuple[Any, ...]) -> Captured:
        name = site.name if isinstance(site, Site) else str(site)
        whole: AnySite = Site(site.name, site.layer) if isinstance(site, Site) else site
        if (prompts, name) not in self.known:
            asked = self.lm.expand(name if isinstance(site, Site) else [site])
            self.known[prompts, name] = HookManager(self.lm, ()).reference(asked, prompts)
        found = self.known[prompts, name][whole]
        return found.head(site.head) if isinstance(site, Site) and site.head is not None else found


def cells_of(lm: LM, grid: Grid, hooks: HooksAt, reading: Reading) -> list[Cell]:
    """Every cell of the grid, the last dimension fastest, its hooks checked against the model and the prompts."""
    axes = _axes(grid)
    references = References(lm)
    cells: list[Cell] = []
    for values in itertools.product(*axes.values()):
        at = dict(zip(axes, values, strict=True))
        made = hooks_at(hooks, at)
        if made is not None:
            cells.append(_cell(lm, len(cells), at, made, reading, references))
    if not cells:
        raise EmptySelection("the function gave None for every point of the grid: give hooks for at least one")
    return cells


def _axes(grid: Grid) -> dict[str, list[Any]]:
    """The values of each dimension of a grid, checked."""
    if not isinstance(grid, Mapping):
        raise BadHook(
            f"the grid is a {type(grid).__name__}: give a dictionary from the name of each dimension to its values, "
            "such as {'layer': range(lm.n_layers)}"
        )
    for name in grid:
        if not isinstance(name, str):
            raise BadHook(f"the grid has a dimension {name!r}: name it with a text, as the function's parameter")
        if name in TAKEN:
            raise BadHook(f"the grid has a dimension {name!r}, which is a column of the table: give it another name")
    axes = {name: listed(values, f"the grid's dimension {name!r}") for name, values in grid.items()}
    for name, values in axes.items():
        if not values:
            raise EmptySelection(f"the grid's dimension {name!r} is empty: give at least one value")
    if not axes:
        raise EmptySelection("the grid has no dimension: give one, such as {'layer': range(lm.n_layers)}")
    return axes


def listed(given: Any, word: str) -> list[Any]:
    """The values of a dimension, numbers of numpy, pandas and torch as Python's own.

    `BadHook` for one value where several are meant, for what has no order and for a value that is there twice.
    """
    scalar = getattr(given, "ndim", None) == 0
    if isinstance(given, str | bytes) or scalar or not isinstance(given, Iterable):
        raise BadHook(f"{word} is {described(given)}, one value, and a grid has a list of them: [{described(given)}]")
    if isinstance(given, Mapping | Set | pd.DataFrame) and not isinstance(given, KeysView | ValuesView):
        raise BadHook(f"{word} is a {type(given).__name__}: give its values as a list, in the order that is meant")
    values = [_plain(value) for value in given]
    known = set()
    for value in values:
        if not isinstance(value, Hashable) or isinstance(value, Tensor):
            continue
        if value in known:
            raise BadHook(f"{word} has {value!r} twice: name each value once")
        known.add(value)
    return values


def _plain(value: Any) -> Any:
    """A number, truth value or text of numpy or torch as Python's own; anything else as it is."""
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray | Tensor) and value.ndim == 0):
        return value.item()
    return value


def hooks_at(hooks: HooksAt, at: Mapping[str, Any]) -> tuple[Hook, ...] | None:
    """What a function of the grid's values gives at a point, as hooks."""
    check_takes(hooks, at)
    try:
        given = hooks(**at)
    except Exception as error:
        error.add_note(f"in the sweep's cell {', '.join(f'{name}={value!r}' for name, value in at.items())}")
        raise
    return None if given is None else as_hooks(given)


def check_takes(hooks: HooksAt, at: Mapping[str, Any]) -> None:
    """Raises `BadHook` where a function cannot be called with the grid's dimensions by name."""
    if not callable(hooks):
        raise BadHook(f"hooks={described(hooks)}: give a function of the grid's values, lambda {', '.join(at)}: …")
    try:
        inspect.signature(hooks).bind(**at)
    except ValueError:  # a function written in C does not say what it takes
        return
    except TypeError as mistake:
        raise BadHook(
            f"the function that gives the hooks cannot be called with the grid's dimensions {', '.join(at)}: {mistake}"
        ) from None


def as_hooks(given: Hook | Sequence[Hook]) -> tuple[Hook, ...]:
    """One hook or several, as several."""
    if isinstance(given, Hook):
        return (given,)
    items = items_of(given)
    for item in (given,) if items is None else items:
        if not isinstance(item, Hook):
            raise BadHook(f"{described(item)} is no hook: make one with hk.steer, hk.ablate, hk.force …")
    return tuple(items or ())


def _cell(
    lm: LM, number: int, at: dict[str, Any], hooks: tuple[Hook, ...], reading: Reading, references: References
) -> Cell:
    try:
        return Cell(number, at, hooks, checked(lm, hooks, reading, references))
    except Exception as error:
        error.add_note(f"in the sweep's cell {', '.join(f'{name}={value!r}' for name, value in at.items())}")
        raise


def checked(lm: LM, hooks: Sequence[Hook], reading: Reading, references: References) -> list[Tap]:
    """The taps of hooks that can act on these prompts."""
    for hook in hooks:
        if isinstance(hook, Capture):
            raise BadHook(f"{hook} in a sweep: a sweep keeps metrics only; capture with hk.forward")
    taps = planned(lm, hooks, references)
    check_reached(taps, reading)
    return taps


def check_reached(taps: Sequence[Tap], reading: Reading) -> None:
    """Raise where something is to be done at a place that these prompts do not have."""
    text = reading.full
    width = max(text.lengths)
    whole = Call(text, 0, 0, len(reading), width, range(width), 0)
    check_possible([action for tap in taps for action in tap.actions], text, whole, None)
