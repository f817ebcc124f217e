"""Controls: the same cell with an edit that says nothing of the hypothesis."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from ..arguments import described, seed_of
from ..captured import Captured
from ..errors import BadEdit, BadHook
from ..hooks.base import Binding, Change, EditHook, Here, Hook, not_square, put
from ..hooks.replacing import Ablate, FromRun
from ..model import LM
from ..positions import Where
from .cells import Cell, HooksAt, References, checked, hooks_at
from .reading import Reading

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
            raise BadHook(f"a random control changes as much as an edit, and {described(self.of)} is none")
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
                raise BadEdit(f"{self.of} changes numbers without end, which no random change is as large as")
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
    reading: Reading,
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
        raise BadHook(f"draws={draws!r} goes with control='random' or 'resample': a function gives one control")
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
        raise BadHook(f"control='resample' patches from another prompt, and {hook} is no patch: say control='random'")
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
