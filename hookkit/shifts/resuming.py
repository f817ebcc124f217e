"""Forwards that begin where an edit does: what is below the edited block is what it was without the edit."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from ..captured import Kept, Slot
from ..errors import HookkitError
from ..hooks.base import Hook
from ..lenses.tail import ending
from ..lent import Lent
from ..manager import HookManager
from ..model import LM
from ..prompts import Row
from ..sites import Site
from ..sweeps.trial import shortcuts
from ..sweeps.wave import passed_by
from ..taps import Tap, planned

WORTH = 512  # tokens that edits would pass through the model, below which a trial of the shortcut costs more


@dataclass(frozen=True, eq=False)
class Resuming:
    """What the blocks before edited ones gave in the unedited forward, by their numbers."""

    lm: LM
    starts: dict[int, int]  # of each edit, by its place, the first block that it touches
    given: dict[int, Any] = field(default_factory=dict)

    @contextmanager
    def noting(self) -> Iterator[None]:
        """A block in which what is needed of a forward is kept."""
        with Lent() as lent:
            for number in {start - 1 for start in self.starts.values()}:
                lent.around(self._block(number), "forward", partial(self._noted, number))
            yield

    def _noted(self, number: int, inner: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.given[number] = inner(*args, **kwargs)
        return self.given[number]

    @contextmanager
    def resumed(self, start: int) -> Iterator[None]:
        """A block in which forwards of the same prompts begin with this block; with 0 they are whole."""
        with Lent() as lent:
            for number in range(start - 1):
                kind = ending(self.lm).kinds[number]
                lent.around(self._block(number), "forward", passed_by(kind))
            if start:
                given = self.given[start - 1]
                lent.around(self._block(start - 1), "forward", lambda *_, **__: _copy(given))
            yield

    def _block(self, number: int) -> Any:
        return self.lm.submodule(self.lm.family.block.format(layer=number))


def _copy(given: Any) -> Any:
    return given.clone() if isinstance(given, Tensor) else (given[0].clone(), *given[1:])


def resuming(lm: LM, rows: Sequence[Row], edits: Sequence[tuple[Hook, ...]]) -> Resuming:
    """Which edits' forwards can begin at the block that they touch first. The model is seen to allow it in a trial; one
    that does not, or that carries hooks already, which would see blocks passed by, runs whole forwards."""
    none = Resuming(lm, {})
    if sum(map(len, rows)) * len(edits) < WORTH or lm.root.training or _carries_hooks(lm):
        return none
    try:
        starts = {place: _first_block(lm, hooks) for place, hooks in enumerate(edits)}
    except HookkitError:
        return none
    starts = {place: start for place, start in starts.items() if start > 0}
    return Resuming(lm, starts) if starts and shortcuts(lm).grow else none


def _carries_hooks(lm: LM) -> bool:
    """True where a forward is seen by others: hooks of the user's, or those of an outer block of hookkit's."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in (*lm.wrapping, *lm.root.modules()))


def _first_block(lm: LM, hooks: tuple[Hook, ...]) -> int:
    """The first block that hooks touch: the number of blocks for those that act behind them, 0 for others."""
    known = ending(lm)
    blocks = {lm.family.block.format(layer=number): number for number in range(lm.n_layers)}

    def first(tap: Tap) -> int:
        parts = tap.place.path.split(".")
        inside = (blocks.get(".".join(parts[:count])) for count in range(len(parts), 0, -1))
        return next((number for number in inside if number is not None), lm.n_layers if known.has(tap) else 0)

    return min((first(tap) for tap in planned(lm, list(hooks), HookManager(lm, ()).reference)), default=0)


def seen_from(sites: Sequence[Site], start: int) -> list[Site]:
    """The sites that a forward from this block on passes."""
    return [site for site in sites if site.layer is None or site.layer >= start]


def with_those_below(kept: Kept, unedited: Kept) -> Kept:
    """What a resumed forward kept, and below it what the unedited one did, in its order."""
    mine = {slot.site: slot for slot in kept.slots}
    slots: list[Slot] = [mine.pop(slot.site, slot) for slot in unedited.slots]
    return Kept((*slots, *mine.values()))
