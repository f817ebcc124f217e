"""The cells of a sweep: the points of the grid with their hooks, and the controls of the cells.

A control is the same cell with an edit that says nothing about the hypothesis: a change of the same
size in a random direction, or a patch from an unrelated prompt.
"""

import hashlib
import inspect
import sys
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, KeysView, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, product
from typing import Any, ClassVar, Literal, TypeAlias

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from ..arguments import as_items, check_choice, check_integer, check_seed, describe
from ..errors import BadEdit, BadHook, EmptySelection, Unsupported
from ..hooks.ablation import Ablate
from ..hooks.base import Binding, Change, EditContext, EditHook, Hook, require_vectors, set_field
from ..hooks.capture import Capture, Captured
from ..hooks.values import FromRun
from ..models.lm import LM
from ..models.positions import Where
from ..models.sites import AnySite, Site
from ..runs.hook_points import BoundHook, HookPoint, Reference, build_hook_points
from ..runs.manager import capture_reference
from ..runs.text_hooks import check_positions
from .hook_needs import bound_hooks_of
from .inputs import SweepInputs

Grid: TypeAlias = Mapping[str, Iterable[Any]]
HooksAt: TypeAlias = Callable[..., Hook | Sequence[Hook] | None]
"""Takes a value of each dimension, by name. Returns the hooks of the cell, or None for no cell."""

RESERVED = ("row", "control")  # columns that every table may have


@dataclass(eq=False)
class Cell:
    """One point of the grid with its hooks. `alone` is set by the plan.

    point        the value of each dimension
    hook_points  where the hooks act
    draw         the number of the draw, in a control
    alone        why the cell cannot share a forward; empty if it can
    """

    number: int
    point: dict[str, Any]
    hooks: tuple[Hook, ...]
    hook_points: list[HookPoint]
    control: bool = False
    draw: int = 0
    alone: str = ""

    @property
    def bound_hooks(self) -> list[BoundHook]:
        """The hooks at each of their sites."""
        return bound_hooks_of(self.hook_points)

    def __str__(self) -> str:
        return point_name(self.point)


def point_name(point: Mapping[str, Any]) -> str:
    """Returns the name of a point of the grid in messages."""
    return ", ".join(f"{name}={value!r}" for name, value in point.items())


@dataclass(eq=False)
class References:
    """Captures values of other prompts, for hooks that insert means or draws of them.

    It owns `captures`: all layers of a site are captured at once, and only once.
    """

    lm: LM
    captures: dict[Any, dict[AnySite, Captured]] = field(default_factory=dict)

    def __call__(
        self, sites: Sequence[AnySite], prompts: tuple[Any, ...]
    ) -> dict[AnySite, Captured]:
        return {site: self._capture_site(site, prompts) for site in sites}

    def _capture_site(self, site: AnySite, prompts: tuple[Any, ...]) -> Captured:
        if not isinstance(site, Site):
            return self._capture_layers(site, prompts)[site]
        values = self._capture_layers(site.name, prompts)[Site(site.name, site.layer)]
        return values if site.head is None else values.head(site.head)

    def _capture_layers(
        self, site: str | AnySite, prompts: tuple[Any, ...]
    ) -> dict[AnySite, Captured]:
        key = site, prompts
        if key not in self.captures:
            self.captures[key] = capture_reference(self.lm, self.lm.expand(site), prompts)
        return self.captures[key]


def create_cells(lm: LM, grid: Grid, hooks: HooksAt, inputs: SweepInputs) -> list[Cell]:
    """Returns every cell of the grid, the last dimension fastest. Checks the hooks against the
    model and the prompts."""
    axes = _check_axes(grid)
    _check_takes(hooks, axes)
    reference = References(lm)
    cells: list[Cell] = []
    for values in product(*axes.values()):
        point = dict(zip(axes, values, strict=True))
        cell_hooks = hooks_at(hooks, point)
        if cell_hooks is None:
            continue
        try:
            hook_points = bind_hooks(lm, cell_hooks, inputs, reference)
        except Exception as error:
            error.add_note(_in_cell(point))
            raise
        cells.append(Cell(len(cells), point, cell_hooks, hook_points))
    if not cells:
        raise EmptySelection(
            "the function gave None for every point of the grid: give hooks for at least one"
        )
    return cells


def _check_axes(grid: Grid) -> dict[str, list[Any]]:
    if not grid:
        raise EmptySelection(
            "the grid has no dimension: give one, such as {'layer': range(lm.n_layers)}"
        )
    axes: dict[str, list[Any]] = {}
    for name, values in grid.items():
        if not isinstance(name, str):
            raise BadHook(
                f"the grid has a dimension {name!r}: name it with a text, as the function's "
                "parameter"
            )
        if name in RESERVED:
            raise BadHook(
                f"the grid has a dimension {name!r}, which is a column of the table: give it "
                "another name"
            )
        axes[name] = list_values(values, f"the grid's dimension {name!r}")
        if not axes[name]:
            raise EmptySelection(f"the grid's dimension {name!r} is empty: give at least one value")
    return axes


def list_values(values: Any, name: str) -> list[Any]:
    """Returns the values of a dimension as a list; numbers of numpy, pandas and torch as Python's.

    Raises `BadHook` for a single value, for a collection without an order, and for a value that
    occurs twice. `name` names the dimension in messages.
    """
    if isinstance(values, str | bytes) or _is_scalar(values) or not isinstance(values, Iterable):
        raise BadHook(
            f"{name} is {describe(values)}, one value, and a grid has a list of them: "
            f"[{describe(values)}]"
        )
    is_ordered = isinstance(values, KeysView)
    if isinstance(values, Mapping | Set | pd.DataFrame) and not is_ordered:
        raise BadHook(
            f"{name} is a {type(values).__name__}: give its values as a list, in the order that "
            "is meant"
        )
    items = [value.item() if _is_scalar(value) else value for value in values]
    unique = set()
    for item in filter(_can_be_compared, items):
        if item in unique:
            raise BadHook(f"{name} has {item!r} twice: name each value once")
        unique.add(item)
    return items


def _is_scalar(value: Any) -> bool:
    """True for a number of numpy, and an array or a tensor without axes."""
    return getattr(value, "ndim", None) == 0


def _can_be_compared(value: Any) -> bool:
    return isinstance(value, Hashable) and not isinstance(value, Tensor)


def _check_takes(hooks: HooksAt, dimensions: Mapping[str, Any]) -> None:
    """Raises `BadHook` if a function cannot be called with the grid's dimensions by name."""
    try:
        inspect.signature(hooks).bind(**dimensions)
    except ValueError:  # a function written in C has no signature
        pass
    except TypeError as error:
        raise BadHook(
            "the function that gives the hooks cannot be called with the grid's dimensions "
            f"{', '.join(dimensions)}: {error}"
        ) from None


def hooks_at(hooks: HooksAt, point: Mapping[str, Any]) -> tuple[Hook, ...] | None:
    """Calls a function of the grid's values at a point. Returns the hooks; None for no cell."""
    try:
        result = hooks(**point)
    except Exception as error:
        error.add_note(_in_cell(point))
        raise
    return None if result is None else as_hooks(result)


def _in_cell(point: Mapping[str, Any]) -> str:
    """Returns the note of an error at a point of the grid."""
    return f"in the sweep's cell {point_name(point)}"


def as_hooks(hooks: Hook | Sequence[Hook]) -> tuple[Hook, ...]:
    """Returns one hook or several as a tuple."""
    items: Any = None if isinstance(hooks, Hook) else as_items(hooks)
    if items is None:
        items = [hooks]
    for item in items:
        if not isinstance(item, Hook):
            raise BadHook(
                f"{describe(item)} is no hook: make one with hk.steer, hk.ablate, hk.force …"
            )
    return tuple(items)


def bind_hooks(
    lm: LM, hooks: Sequence[Hook], inputs: SweepInputs, reference: Reference
) -> list[HookPoint]:
    """Returns where hooks act. Raises if one cannot act on these prompts."""
    for hook in hooks:
        if isinstance(hook, Capture):
            raise BadHook(f"{hook} in a sweep: a sweep keeps metrics only; capture with hk.forward")
    hook_points = build_hook_points(lm, hooks, reference)
    check_reached(hook_points, inputs)
    return hook_points


def check_reached(hook_points: Sequence[HookPoint], inputs: SweepInputs) -> None:
    """Raises if a hook names positions that these prompts do not have."""
    check_positions(bound_hooks_of(hook_points), inputs.full_pass, None)


DRAWS = 10  # of a control, by default
SEED_STRIDE = 1_000_003  # more than the draws of any control, so that two seeds share none

Control: TypeAlias = Literal["random", "resample"] | HooksAt


@dataclass(frozen=True)
class Randomised(EditHook):
    """Changes the values by as much as another hook would, in a random direction.

    With per="position" each position of each prompt has a direction of its own. With per="all" one
    random rotation turns all changes, so that they keep their angles to each other: what is one
    vector in the other hook is one random vector here.
    """

    of: EditHook
    seed: int = 0
    per: Literal["position", "all"] = "position"

    verb: ClassVar[str] = "randomised"
    bare: ClassVar[tuple[str, ...]] = ("of",)
    takes_step: ClassVar[bool] = True  # where the other hook does

    def check(self) -> None:
        if not isinstance(self.of, EditHook):
            raise BadHook(
                f"a random control changes as much as an edit, and {describe(self.of)} is none"
            )
        if self.sites != self.of.sites or self.where != self.of.where:
            raise BadHook(f"{self} acts at other places than the edit that it is the control of")
        require_vectors(self.sites, "control='random' needs vectors, and changes")
        for site in self.sites:
            if isinstance(site, Site) and site.of_features and site.head is not None:
                raise Unsupported(
                    f"{site} is one number at a token, which has no random direction: compare "
                    "with the same edit of other features"
                )
        set_field(self, "when", self.of.when)
        set_field(self, "seed", check_seed(self.seed))
        check_choice(self.per, "per", ("position", "all"))

    @property
    def mixes_positions(self) -> bool:
        return self.of.mixes_positions

    @property
    def reads_input(self) -> bool:
        return self.of.reads_input

    def __str__(self) -> str:
        return f"{self.verb}({self.of})"

    def placed(self, lm: LM) -> Where:
        return self.of.placed(lm)

    def change(self, binding: Binding) -> Change:
        change = self.of.change(binding)

        def apply(values: Tensor, here: EditContext) -> Tensor:
            difference = (change(values, here) - values).float()
            if bool(here.real_cells(~difference.isfinite()).any()):
                raise BadEdit(
                    f"{self.of} changes numbers without end, which no random change is as large as"
                )
            if self.per == "all":
                turned = turn(difference.flatten(2), self.seed).reshape(values.shape)
                return values + turned.to(values.dtype)
            axes = tuple(range(2, values.ndim))
            noise = self._noise(values, here)
            size = difference.norm(dim=axes, keepdim=True) / noise.norm(dim=axes, keepdim=True)
            return values + (noise * size).to(values.dtype)

        return apply

    def _noise(self, values: Tensor, here: EditContext) -> Tensor:
        """Returns normal draws that depend only on the seed, the site, the prompt's tokens and the
        position."""
        noise = torch.ones(values.shape)
        site = str(here.site)
        for index, row in enumerate(here.rows):
            tokens = here.cells.text.prompt(row)
            for column, position in enumerate(here.cells.row_positions[index]):
                generator = noise_generator(self.seed, site, tokens, position)
                noise[index, column] = torch.randn(values.shape[2:], generator=generator)
        return noise.to(values.device)


def turn(vectors: Float[Tensor, "... d"], seed: int) -> Float[Tensor, "... d"]:
    """Returns the vectors turned by one random rotation, which depends on the seed and on d.

    Three rounds of random signs and the discrete Hartley transform are an orthogonal map, after
    which a direction is close to uniform (orthogonal random features: Yu et al. 2016).
    """
    width = vectors.shape[-1]
    generator = noise_generator(seed, width)
    signs = 2 * torch.randint(0, 2, (3, width), generator=generator) - 1
    for round_signs in signs.to(vectors):
        spectrum = torch.fft.fft(vectors * round_signs)
        vectors = (spectrum.real - spectrum.imag) / width**0.5
    return vectors


def noise_generator(*key: Any) -> torch.Generator:
    """Returns a generator that depends only on the key: a seed, the prompt's tokens …"""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def create_controls(
    lm: LM,
    cells: Sequence[Cell],
    control: Control | None,
    inputs: SweepInputs,
    *,
    draws: int | None = None,
    seed: int | None = None,
) -> list[Cell]:
    """Returns the controls of the cells: one if a function gives the hooks, else one per draw."""
    _check_control_settings(control, draws, seed)
    if control is None:
        return []
    if callable(control):
        _check_takes(control, cells[0].point)
    reference = References(lm)
    controls: list[Cell] = []
    for draw, cell in product(range(_count_draws(cells, control, draws)), cells):
        hooks = _control_hooks(cell, control, draw, seed or 0)
        if hooks is not None:
            hook_points = bind_hooks(lm, hooks, inputs, reference)
            number = len(cells) + len(controls)
            controls.append(Cell(number, cell.point, hooks, hook_points, True, draw))
    return controls


def _check_control_settings(control: Control | None, draws: int | None, seed: int | None) -> None:
    if control is None and (draws, seed) != (None, None):
        raise BadHook(
            f"draws={draws!r} and control_seed={seed!r} are of a control: say control='random'"
        )
    if callable(control) and draws is not None:
        raise BadHook(
            f"draws={draws!r} goes with control='random' or 'resample': a function gives one "
            "control"
        )
    if control != "random" and seed is not None:
        raise BadHook(f"control_seed={seed!r} goes with control='random': nothing else is drawn")


def _control_hooks(cell: Cell, control: Control, draw: int, seed: int) -> tuple[Hook, ...] | None:
    """Returns the hooks of one draw of a control; None if a function leaves the cell out."""
    if callable(control):
        return hooks_at(control, cell.point)
    control_of = partial(_resample, draw=draw)
    if control == "random":
        control_of = partial(_randomise, seed=seed * SEED_STRIDE + draw)
    return tuple(map(control_of, cell.hooks))


def _randomise(hook: Hook, seed: int) -> Randomised:
    assert isinstance(hook, EditHook)
    return Randomised(hook.sites, hook.where, hook, seed)


def _count_draws(cells: Sequence[Cell], control: Control, draws: int | None) -> int:
    if callable(control):
        return 1
    if draws is not None:
        meaning = "how many times a control is drawn,"
        check_integer(draws, "draws", least=1, meaning=meaning, error=BadHook)
    if control == "random":
        return draws or DRAWS
    most = _count_other_prompts(cells)
    if draws is not None and draws > most:
        raise BadHook(
            f"draws={draws}, and a prompt has {most} other{'s' if most > 1 else ''} of its length "
            "to patch from: ask for no more, or give more prompts"
        )
    return draws or min(DRAWS, most)


def _count_other_prompts(cells: Sequence[Cell]) -> int:
    """Returns how many other prompts of its length every source has for each of its prompts; 1 if
    there are none, since a prompt of another length is then patched from."""
    fewest = sys.maxsize
    hooks = chain.from_iterable(cell.hooks for cell in cells)
    for source in chain.from_iterable(map(_sources, hooks)):
        counts = Counter(map(len, source.prompts))
        fewest = min(fewest, *counts.values())
    return max(1, fewest - 1)


def _sources(hook: Hook) -> tuple[Captured, ...]:
    """Returns what a patch inserts. Raises for another hook, and if there is no other prompt."""
    if not isinstance(hook, Ablate) or not isinstance(hook.to, FromRun):
        raise BadHook(
            f"control='resample' patches from another prompt, and {hook} is no patch: say "
            "control='random'"
        )
    for source in hook.to.sources:
        if len(source.rows) < 2 or source.positions is None:
            raise BadHook(
                "control='resample' patches from an unrelated prompt, and the source of "
                f"{source.site} has one prompt only: give several prompts, or say "
                "control='random'"
            )
    return tuple(hook.to.sources)


def _resample(hook: Hook, draw: int) -> Hook:
    """Returns the same patch with each prompt's values from a later prompt of its source."""
    sources = _sources(hook)
    assert isinstance(hook, Ablate)
    return replace(hook, to=FromRun(tuple(_shift_prompts(source, draw) for source in sources)))


def _shift_prompts(source: Captured, draw: int) -> Captured:
    """Returns a source with each prompt's values from a later one of the same length, cyclically;
    the draw says which. If no other prompt has this length, all other prompts count."""
    assert source.positions is not None
    lengths = list(map(len, source.prompts))
    indices: list[int] = []
    for row, length in enumerate(lengths):
        other_rows = [*range(row + 1, len(lengths)), *range(row)]
        candidates = [index for index in other_rows if lengths[index] == length] or other_rows
        indices.append(candidates[draw % len(candidates)])
    prompts = tuple(source.prompts[index] for index in indices)
    values, positions = source.values[indices], source.positions[indices]
    return replace(source, values=values, positions=positions, prompts=prompts)
