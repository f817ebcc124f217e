"""The cells of a sweep: each point of the grid with the hooks that act there.

Controls: the same cell with an edit that says nothing of the hypothesis.
"""

import hashlib
import inspect
import itertools
from collections.abc import (
    Callable,
    Hashable,
    Iterable,
    KeysView,
    Mapping,
    Sequence,
    Set,
    ValuesView,
)
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..arguments import described, items_of, seed_of
from ..errors import BadEdit, BadHook, EmptySelection
from ..hooks.ablation import Ablate, FromRun
from ..hooks.base import Binding, Change, EditHook, Here, Hook, not_square, put
from ..hooks.capture import Capture
from ..hooks.captured_values import Captured
from ..models.batch_positions import ForwardPass
from ..models.lm import LM
from ..models.positions import Where
from ..models.sites import AnySite, Site
from ..runs.manager import HookManager
from ..runs.outcomes import check_possible
from ..runs.taps import BoundHook, HookPoint, planned
from .inputs import SweepInputs

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
    taps: list[HookPoint]
    control: bool = False
    draw: int = 0  # which draw of a control
    alone: str = ""  # why it has to be run by itself

    @property
    def actions(self) -> list[BoundHook]:
        """All that is done."""
        return [action for tap in self.taps for action in tap.actions]

    def __str__(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.at.items())


@dataclass(eq=False)
class References:
    """Values of other prompts, for hooks that put in means or draws: each layer of a site is captured once."""

    lm: LM
    known: dict[tuple[Any, str], dict[AnySite, Captured]] = field(default_factory=dict)

    def __call__(
        self, sites: Sequence[AnySite], prompts: tuple[Any, ...]
    ) -> dict[AnySite, Captured]:
        return {site: self._at(site, prompts) for site in sites}

    def _at(self, site: AnySite, prompts: tuple[Any, ...]) -> Captured:
        name = site.name if isinstance(site, Site) else str(site)
        whole: AnySite = Site(site.name, site.layer) if isinstance(site, Site) else site
        if (prompts, name) not in self.known:
            asked = self.lm.expand(name if isinstance(site, Site) else [site])
            self.known[prompts, name] = HookManager(self.lm, ()).reference(asked, prompts)
        found = self.known[prompts, name][whole]
        return found.head(site.head) if isinstance(site, Site) and site.head is not None else found


def cells_of(lm: LM, grid: Grid, hooks: HooksAt, reading: SweepInputs) -> list[Cell]:
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
        raise EmptySelection(
            "the function gave None for every point of the grid: give hooks for at least one"
        )
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
            raise BadHook(
                f"the grid has a dimension {name!r}: name it with a text, as the function's parameter"
            )
        if name in TAKEN:
            raise BadHook(
                f"the grid has a dimension {name!r}, which is a column of the table: give it another name"
            )
    axes = {name: listed(values, f"the grid's dimension {name!r}") for name, values in grid.items()}
    for name, values in axes.items():
        if not values:
            raise EmptySelection(f"the grid's dimension {name!r} is empty: give at least one value")
    if not axes:
        raise EmptySelection(
            "the grid has no dimension: give one, such as {'layer': range(lm.n_layers)}"
        )
    return axes


def listed(given: Any, word: str) -> list[Any]:
    """The values of a dimension, numbers of numpy, pandas and torch as Python's own.

    `BadHook` for one value where several are meant, for what has no order and for a value that is there twice.
    """
    scalar = getattr(given, "ndim", None) == 0
    if isinstance(given, str | bytes) or scalar or not isinstance(given, Iterable):
        raise BadHook(
            f"{word} is {described(given)}, one value, and a grid has a list of them: [{described(given)}]"
        )
    if isinstance(given, Mapping | Set | pd.DataFrame) and not isinstance(
        given, KeysView | ValuesView
    ):
        raise BadHook(
            f"{word} is a {type(given).__name__}: give its values as a list, in the order that is meant"
        )
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
    if isinstance(value, np.generic) or (
        isinstance(value, np.ndarray | Tensor) and value.ndim == 0
    ):
        return value.item()
    return value


def hooks_at(hooks: HooksAt, at: Mapping[str, Any]) -> tuple[Hook, ...] | None:
    """What a function of the grid's values gives at a point, as hooks."""
    check_takes(hooks, at)
    try:
        given = hooks(**at)
    except Exception as error:
        error.add_note(
            f"in the sweep's cell {', '.join(f'{name}={value!r}' for name, value in at.items())}"
        )
        raise
    return None if given is None else as_hooks(given)


def check_takes(hooks: HooksAt, at: Mapping[str, Any]) -> None:
    """Raises `BadHook` where a function cannot be called with the grid's dimensions by name."""
    if not callable(hooks):
        raise BadHook(
            f"hooks={described(hooks)}: give a function of the grid's values, lambda {', '.join(at)}: …"
        )
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
            raise BadHook(
                f"{described(item)} is no hook: make one with hk.steer, hk.ablate, hk.force …"
            )
    return tuple(items or ())


def _cell(
    lm: LM,
    number: int,
    at: dict[str, Any],
    hooks: tuple[Hook, ...],
    reading: SweepInputs,
    references: References,
) -> Cell:
    try:
        return Cell(number, at, hooks, checked(lm, hooks, reading, references))
    except Exception as error:
        error.add_note(
            f"in the sweep's cell {', '.join(f'{name}={value!r}' for name, value in at.items())}"
        )
        raise


def checked(
    lm: LM, hooks: Sequence[Hook], reading: SweepInputs, references: References
) -> list[HookPoint]:
    """The taps of hooks that can act on these prompts."""
    for hook in hooks:
        if isinstance(hook, Capture):
            raise BadHook(f"{hook} in a sweep: a sweep keeps metrics only; capture with hk.forward")
    taps = planned(lm, hooks, references)
    check_reached(taps, reading)
    return taps


def check_reached(taps: Sequence[HookPoint], reading: SweepInputs) -> None:
    """Raise where something is to be done at a place that these prompts do not have."""
    text = reading.full
    width = max(text.lengths)
    whole = ForwardPass(text, 0, 0, len(reading), width, range(width), 0)
    check_possible([action for tap in taps for action in tap.actions], text, whole, None)


DRAWS = 10  # of a control, unless the user says how many
SEEDS = 1_000_003  # more than the draws of any control, so that two seeds share none

Control: TypeAlias = Literal["random", "resample"] | HooksAt


@dataclass(frozen=True)
class Randomised(EditHook):
    """Change what it finds by as much as another hook would, in a random direction."""

    of: EditHook
    seed: int = 0

    verb: ClassVar[str] = "randomised"
    bare: ClassVar[tuple[str, ...]] = ("of",)
    takes_step: ClassVar[bool] = True  # where the other hook does

    def check(self) -> None:
        if not isinstance(self.of, EditHook):
            raise BadHook(
                f"a random control changes as much as an edit, and {described(self.of)} is none"
            )
        if self.sites != self.of.sites or self.where != self.of.where:
            raise BadHook(f"{self} acts at other places than the edit that it is the control of")
        not_square(self.sites, "control='random' needs vectors, and changes")
        put(self, "seed", seed_of(self.seed))

    @property
    def together(self) -> bool:
        return self.of.together

    @property
    def reads_input(self) -> bool:
        return self.of.reads_input

    def __str__(self) -> str:
        return f"{self.verb}({self.of})"

    def placed(self, lm: LM) -> Where:
        return self.of.placed(lm)

    def change(self, binding: Binding) -> Change:
        inner = self.of.change(binding)

        def apply(values: Tensor, here: Here) -> Tensor:
            by = (inner(values, here) - values).float()
            if bool(here.real_cells(~by.isfinite()).any()):
                raise BadEdit(
                    f"{self.of} changes numbers without end, which no random change is as large as"
                )
            axes = tuple(range(2, values.ndim))
            noise = self._noise(values, here)
            size = by.norm(dim=axes, keepdim=True) / noise.norm(dim=axes, keepdim=True)
            return values + (noise * size).to(values.dtype)

        return apply

    def _noise(self, values: Tensor, here: Here) -> Tensor:
        """Normal draws that depend on the seed, the site, the prompt's tokens and the position alone."""
        noise = torch.ones(values.shape)
        for number, (row, places) in enumerate(zip(here.rows, here.cells.places, strict=True)):
            for column, place in enumerate(places):
                words = repr((self.seed, str(here.site), here.cells.text.prompt(row), place))
                seed = int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "big") >> 1
                drawn = torch.randn(values.shape[2:], generator=torch.Generator().manual_seed(seed))
                noise[number, column] = drawn
        return noise.to(values.device)


def controlled(
    lm: LM,
    cells: Sequence[Cell],
    control: Control,
    reading: SweepInputs,
    *,
    draws: int | None = None,
    seed: int | None = None,
) -> list[Cell]:
    """The control of each cell: once with the hooks of a function, else once for each draw."""
    if not callable(control) and control not in ("random", "resample"):
        raise BadHook(
            f"control={control!r} is unknown: say 'random', 'resample', or give a function of the grid's values"
        )
    if callable(control) and draws is not None:
        raise BadHook(
            f"draws={draws!r} goes with control='random' or 'resample': a function gives one control"
        )
    if control != "random" and seed is not None:
        raise BadHook(f"control_seed={seed!r} goes with control='random': nothing else is drawn")
    references, made = References(lm), []
    for draw in range(_count(cells, control, draws)):
        for cell in cells:
            hooks = _hooks(cell, control, draw, seed or 0)
            if hooks is None:
                continue
            taps = checked(lm, hooks, reading, references)
            made.append(Cell(len(cells) + len(made), cell.at, hooks, taps, control=True, draw=draw))
    return made


def _hooks(cell: Cell, control: Control, draw: int, seed: int) -> tuple[Hook, ...] | None:
    """The hooks of one draw of a cell's control; None where a function leaves the cell out."""
    if callable(control):
        return hooks_at(control, cell.at)
    if control == "random":
        return tuple(_random(hook, seed * SEEDS + draw) for hook in cell.hooks)
    return tuple(_resampled(hook, draw) for hook in cell.hooks)


def _count(cells: Sequence[Cell], control: Control, draws: int | None) -> int:
    """How many draws a control has."""
    if callable(control):
        return 1
    if draws is not None and (isinstance(draws, bool) or not isinstance(draws, int) or draws < 1):
        raise BadHook(f"draws={draws!r}: give how many times a control is drawn, at least 1")
    if control == "random":
        return draws or DRAWS
    most = min(_others(hook) for cell in cells for hook in cell.hooks)
    if draws is not None and draws > most:
        raise BadHook(
            f"draws={draws}, and a prompt has {most} other{'s' if most > 1 else ''} of its length to patch from: "
            "ask for no more, or give more prompts"
        )
    return draws or min(DRAWS, most)


def _random(hook: Hook, seed: int) -> Hook:
    assert isinstance(hook, EditHook)
    not_square(hook.sites, "control='random' needs vectors, and changes")
    return Randomised(hook.sites, hook.where, hook, seed)


def _sources(hook: Hook) -> tuple[Captured, ...]:
    """What a patch puts in; raises for another hook, and where there is no other prompt."""
    if not isinstance(hook, Ablate) or not isinstance(hook.to, FromRun):
        raise BadHook(
            f"control='resample' patches from another prompt, and {hook} is no patch: say control='random'"
        )
    for source in hook.to.sources:
        if len(source.rows) < 2 or source.positions is None:
            raise BadHook(
                f"control='resample' patches from an unrelated prompt, and the source of {source.site} has one prompt "
                "only: give several prompts, or say control='random'"
            )
    return tuple(hook.to.sources)


def _others(hook: Hook) -> int:
    """How many draws of other prompts a patch allows: the fewest that a prompt has of its length, or 1."""
    counts = []
    for source in _sources(hook):
        lengths = [len(prompt) for prompt in source.prompts]
        counts += [lengths.count(length) - 1 for length in lengths]
    return max(1, min(counts))


def _resampled(hook: Hook, draw: int) -> Hook:
    """The same patch with the values of a later prompt of its source, of the same length where there is one."""
    sources = _sources(hook)
    assert isinstance(hook, Ablate)
    return replace(hook, to=FromRun(tuple(_rolled(source, draw) for source in sources)))


def _rolled(source: Captured, draw: int) -> Captured:
    others = _next_of_length([len(prompt) for prompt in source.prompts], draw)
    return replace(
        source,
        values=source.values[others],
        positions=source.positions[others],  # pyright: ignore[reportOptionalSubscript]
        prompts=tuple(source.prompts[other] for other in others),
    )


def _next_of_length(lengths: Sequence[int], draw: int) -> list[int]:
    """For each prompt the next one around that has as many tokens (the draw says which), or any where none has."""
    count, chosen = len(lengths), []
    for row in range(count):
        around = [(row + step) % count for step in range(1, count)]
        alike = [other for other in around if lengths[other] == lengths[row]] or around
        chosen.append(alike[draw % len(alike)])
    return chosen
