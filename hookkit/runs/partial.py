"""One forward for many cells: a batch that grows as it passes the blocks, each cell's hooks on its own rows.

A row joins at the first block where its cell differs from the unedited row, with what the unedited row has there. Each
cell's hooks see its rows alone, as they would in a forward of their own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import Unsupported
from ..models.batch_positions import ForwardPass, SequenceBatch
from ..models.families.schema import ModuleLocation
from ..models.lm import LM
from ..models.overrides import Lent, Work
from ..models.sites import AnySite
from .acting import act
from .manager import Border, HookManager
from .taps import BoundHook, HookPoint, input_of

Path: TypeAlias = tuple[Any, ...]
Factors: TypeAlias = Mapping[tuple[int, Path], int]
"""Of what each block is given, by path: how many entries of axis 0 there are for each row; 0 where it has no rows."""


class NotByRow(Unsupported):
    """A tensor that cannot be told apart by rows, so that cells cannot share a forward. `sites` has its places."""

    def __init__(self, message: str, tap: HookPoint | None = None) -> None:
        super().__init__(message)
        self.tap = tap


@dataclass(eq=False)
class CellRows:
    """The rows of one cell in a batch: from `start` to before `stop`, of the prompts `rows`."""

    rows: tuple[int, ...]
    start: int
    stop: int
    call: ForwardPass


@dataclass(frozen=True, eq=False)
class JoinSchedule:
    """How the batch grows.

    first   the first block that runs; those before it are passed by
    counts  how many rows there are in each block
    states  what the unedited rows that join at a block have there: block -> [row, pos, d_model]
    skipped what the blocks that are passed by give out: "tensor", or how many values
    factors which of the things that a block is given have rows
    """

    first: int
    counts: Sequence[int]
    states: Callable[[int], Tensor]
    prompts: Sequence[int]  # of each row, the number of the row that the model itself was given
    base: int  # rows that the model itself was given
    kinds: Sequence[int]
    factors: Factors


@dataclass(eq=False)
class Recorder:
    """Keeps what enters some blocks, the last `width` positions of it."""

    blocks: Sequence[int]
    width: int
    states: dict[int, Tensor] = field(default_factory=dict)

    def note(self, block: int, hidden: Tensor) -> None:
        self.states[block] = hidden[:, -self.width :].detach().clone()


class SharedForward(HookManager):
    """A forward in which each lane has hooks of its own. Used once."""

    def __init__(
        self,
        lm: LM,
        lanes: Sequence[tuple[CellRows, Sequence[HookPoint]]],
        growth: JoinSchedule | None = None,
        recorder: Recorder | None = None,
        *,
        rows: int,
        width: int,
    ) -> None:
        super().__init__(lm, ())
        self.growth, self.recorder = growth, recorder
        self.count = rows  # the rows that are there by now
        self.width = width
        self.taps: list[HookPoint] = []
        self.work: dict[HookPoint, list[tuple[CellRows, list[BoundHook]]]] = {}
        self.work_before: dict[
            HookPoint, list[tuple[CellRows, list[BoundHook]]]
        ] = {}  # what acts before a batch begins to grow
        self._grows = growth is not None  # and has not begun to
        self._merge(lanes, self.work)
        self._shown = ForwardPass(
            SequenceBatch([], [], lambda row: (), lambda ids, at: ()),
            0,
            0,
            rows,
            width,
            range(width),
            0,
        )
        self._spreads: dict[int, tuple[Tensor, Tensor]] = {}

    def act_before_the_blocks(self, lane: CellRows, taps: Sequence[HookPoint]) -> None:
        """Let these act on the rows that the model is given, until the first block that runs; none of them joins."""
        self._merge([(lane, taps)], self.work_before)

    def _merge(
        self,
        lanes: Sequence[tuple[CellRows, Sequence[HookPoint]]],
        into: dict[HookPoint, list[tuple[CellRows, list[BoundHook]]]],
    ) -> None:
        """One tap for each place, with the work of every lane there."""
        taps: dict[ModuleLocation, HookPoint] = {tap.place: tap for tap in self.taps}
        for lane, own in lanes:
            for each in own:
                tap = taps.get(each.place)
                if tap is None:
                    tap = taps[each.place] = HookPoint(
                        each.module, each.place, [], only_looks=False
                    )
                tap.reads_input |= each.reads_input
                work = into.setdefault(tap, [])
                if work and work[-1][0] is lane:
                    work[-1][1].extend(each.actions)
                else:
                    work.append((lane, list(each.actions)))
        self.taps = sorted(taps.values(), key=lambda tap: not tap.place.shared)

    # ---- around the blocks

    def _register(self, lent: Lent) -> None:
        super()._register(lent)
        growth = self.growth
        for number in (
            range(self.lm.n_layers) if growth is not None or self.recorder is not None else ()
        ):
            block = self.lm.submodule(self.lm.family.block.format(layer=number))
            if growth is not None and number < growth.first:
                lent.around(block, "forward", passed_by(growth.kinds[number]))
            elif growth is not None or (
                self.recorder is not None and number in self.recorder.blocks
            ):
                self._put_first(lent, block, Border(self._entering, number))

    def _entering(
        self,
        number: int,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if self._thread != get_ident():
            return None
        assert kwargs is not None
        hidden, key = input_of(args, kwargs, 0, f"block {number}")
        if self.recorder is not None and number in self.recorder.blocks:
            self.recorder.note(number, hidden)
        if self.growth is None:
            return None
        hidden = self._grown(self.growth, number, hidden)
        spread_args, spread_kwargs = self._spread(number, args, kwargs)
        if isinstance(key, str):
            return spread_args, spread_kwargs | {key: hidden}
        return (*spread_args[:key], hidden, *spread_args[key + 1 :]), spread_kwargs

    def _grown(self, growth: JoinSchedule, number: int, hidden: Tensor) -> Tensor:
        """The rows in a block: those that were there before it, and those that join at it."""
        before, now = (
            (0 if number == growth.first else growth.counts[number - 1]),
            growth.counts[number],
        )
        self.count, self._grows = now, False
        if now == before:
            return hidden
        joining = growth.states(number).to(hidden.device)
        return torch.cat([hidden, joining]) if before else joining

    def _spread(self, number: int, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """What a block is given, with a row of it for each row that is there."""
        assert self.growth is not None
        growth = self.growth

        def spread(value: Any, path: Path) -> Any:
            if isinstance(value, Tensor):
                return self._rows_of(growth, number, path, value)
            if isinstance(value, tuple | list) and not hasattr(value, "_fields"):
                return type(value)(spread(each, (*path, place)) for place, each in enumerate(value))
            if type(value) is dict:
                return {name: spread(each, (*path, name)) for name, each in value.items()}
            return value

        return tuple(spread(each, (place,)) for place, each in enumerate(args)), spread(kwargs, ())

    def _rows_of(self, growth: JoinSchedule, number: int, path: Path, value: Tensor) -> Tensor:
        factor = growth.factors.get((number, path))
        if factor is None:
            raise NotByRow(
                f"block {number} is given a tensor {list(value.shape)} at {path}, which no trial showed"
            )
        if factor == 0 or value.shape[0] != factor * growth.base:
            return value
        if (
            id(value) not in self._spreads
        ):  # what all blocks share is spread once, over all the rows that there will be
            rows = torch.tensor(growth.prompts, device=value.device)
            wide = value.unflatten(0, (growth.base, factor)).index_select(0, rows).flatten(0, 1)
            self._spreads[id(value)] = (
                value,
                wide,
            )  # the tensor is kept alive, and its number with it
        return self._spreads[id(value)][1][: self.count * factor]

    # ---- what the hooks do

    def _begun(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> ForwardPass:
        return self._shown

    def _site(self, tap: HookPoint) -> AnySite:
        return (self.work.get(tap) or self.work_before[tap])[0][1][0].site

    def _whole(
        self, tap: HookPoint, call: ForwardPass, found: Tensor, before: Tensor | None
    ) -> Tensor:
        out = found
        self._busy = self._thread
        try:
            for lane, actions in (self.work_before if self._grows else self.work).get(tap, ()):
                if lane.stop > self.count:
                    continue  # it joins later, with all of this in what it joins with
                part = new = self._part(tap, out, lane)
                own = None if before is None else self._part(tap, before, lane)
                for action in actions:
                    new = self._done_by(action, tap, lane, new, own)
                if new is not part:
                    out = self._put(tap, out, found, lane, new)
        finally:
            self._busy = 0
        return out

    def _done_by(
        self,
        action: BoundHook,
        tap: HookPoint,
        lane: CellRows,
        given: Tensor,
        before: Tensor | None,
    ) -> Tensor:
        try:
            return act(action, tap, lane.call, given, before)[1]
        except Exception as error:
            error.add_note(f"in {action.hook} at {action.site}, in a sweep")
            raise

    def _part(self, tap: HookPoint, full: Tensor, lane: CellRows) -> Tensor:
        """A lane's rows of a tensor."""
        if lane.stop - lane.start == self.count:
            return full  # it has the forward to itself
        if full.ndim and full.shape[0] == self.count:
            return full[lane.start : lane.stop]
        if (
            full.ndim
            and full.shape[0] == self.count * self.width
            and (tap.place.flat or full.ndim == 2)
        ):
            return full[lane.start * self.width : lane.stop * self.width]
        if full.ndim > 1 and full.shape[0] == 1:
            return full
        raise NotByRow(
            f"{tap.place.path} has a tensor {list(full.shape)}, and {self.count} rows ran", tap
        )

    def _put(
        self, tap: HookPoint, out: Tensor, found: Tensor, lane: CellRows, new: Tensor
    ) -> Tensor:
        """The tensor with a lane's rows replaced; a copy, the first time."""
        if lane.stop - lane.start == self.count:
            return new
        if out is found:
            one_for_all = found.shape[0] == 1 and self.count > 1
            out = (
                found.expand(self.count, *found.shape[1:]).clone() if one_for_all else found.clone()
            )
        self._part(tap, out, lane).copy_(new)
        return out


def passed_by(kind: int) -> Work:
    """In place of a block's forward, one that gives out what it was given: a tensor, or so many values of which it is
    the first."""

    def forward(inner: Any, /, *args: Any, **kwargs: Any) -> Any:
        hidden = input_of(args, kwargs, 0, "a block")[0]
        return hidden if not kind else (hidden, *[None] * (kind - 1))

    return forward
