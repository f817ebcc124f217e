"""Controls: the same cell with an edit that says nothing of the hypothesis."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, TypeAlias

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


def controlled(lm: LM, cells: Sequence[Cell], control: Control, reading: Reading) -> list[Cell]:
    """The control of each cell."""
    made: dict[Any, Callable[[Sequence[Hook], dict[str, Any]], Sequence[Hook]]] = {
        "random": lambda hooks, at: [_random(hook) for hook in hooks],
        "resample": lambda hooks, at: [_resampled(hook) for hook in hooks],
    }
    if not callable(control) and control not in made:
        raise BadHook(
            f"control={control!r} is unknown: say 'random', 'resample', or give a function of the grid's values"
        )
    references, found = References(lm), []
    for cell in cells:
        if callable(control):
            hooks = hooks_at(control, cell.at)
            if hooks is None:
                continue
        else:
            hooks = tuple(made[control](cell.hooks, cell.at))
        number = len(cells) + len(found)
        found.append(Cell(number, cell.at, hooks, checked(lm, hooks, reading, references), control=True))
    return found


def _random(hook: Hook) -> Hook:
    assert isinstance(hook, EditHook)
    not_square(hook.sites, "control='random' needs vectors, and changes")
    return Randomised(hook.sites, hook.where, hook)


def _resampled(hook: Hook) -> Hook:
    """The same patch with the values of the next prompt of its source, of the same length where there is one."""
    if not isinstance(hook, Ablate) or not isinstance(hook.to, FromRun):
        raise BadHook(f"control='resample' patches from another prompt, and {hook} is no patch: say control='random'")
    return replace(hook, to=FromRun(tuple(map(_rolled, hook.to.sources))))


def _rolled(source: Captured) -> Captured:
    if len(source.rows) < 2 or source.positions is None:
        raise BadHook(
            f"control='resample' patches from an unrelated prompt, and the source of {source.site} has one prompt "
            "only: give several prompts, or say control='random'"
        )
    others = _next_of_length([len(prompt) for prompt in source.prompts])
    return replace(
        source,
        values=source.values[others],
        positions=source.positions[others],
        prompts=tuple(source.prompts[other] for other in others),
    )


def _next_of_length(lengths: Sequence[int]) -> list[int]:
    """For each prompt the next one around that has as many tokens, or the very next where none has."""
    count, found = len(lengths), []
    for row in range(count):
        around = [(row + step) % count for step in range(1, count)]
        found.append(next((other for other in around if lengths[other] == lengths[row]), around[0]))
    return found
