"""What hooks wished for, held against what a text can give and what happened.

What the hooks of a block have done: the captures of the text that runs and of those that ended, and what fired.
"""

import functools
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

import pandas as pd
import torch
from torch import Tensor

from ..errors import EmptySelection, NeverFired, OutOfRange, Unsupported
from ..hooks.capture import Capture
from ..hooks.captured_values import (
    Captured,
    CapturedChunk,
    Captures,
    LazyCapture,
    SequenceEnd,
    in_order,
    joined,
)
from ..models.batch_positions import ForwardPass, Selection, SequenceBatch
from ..models.positions import PositionRange
from ..models.sites import AnySite, Site
from ..models.views import unseen_value
from .generation import Generation
from .taps import BoundHook

Firing: TypeAlias = tuple[BoundHook, int, Selection | None, torch.Size, Tensor | None]
"""One hook at one site in one forward: the action, the forward's number, the cells, the shape of one cell (of the whole
tensor where it has no cells), and for an edit how many numbers it changed in each cell."""


def check_possible(
    actions: Iterable[BoundHook],
    text: SequenceBatch,
    call: ForwardPass,
    generation: Generation | None,
) -> None:
    """Raise before the forward if a wish names a place that this text cannot have, or selects nothing in a row.

    Only for a text whose length is known: one forward of prompts, or a `generate`.
    """
    end = (
        call.past + call.width if generation is None else generation.max_width - 1
    )  # the last token is never read
    for action in _one_of_each(actions):
        first = (
            0
            if not action.head
            else call.past + call.head.start
            if generation is None
            else text.head or 0
        )
        for row, wanted in enumerate(text.wishes(action.where)):
            if wanted is None:
                continue
            there = _positions(text, row, first, end)
            if isinstance(wanted, tuple) and not (wanted[0] in there and wanted[-1] in there):
                missing = next(place for place in wanted if place not in there)
                raise OutOfRange(_no_such_place(action, text, row, missing, there, generation))
            if isinstance(wanted, range) and not _meets(wanted, there):
                raise EmptySelection(
                    f"{action.hook} selects nothing in row {row}, which has positions {_range(there)}"
                    f"{' at the logits' if action.head else ''}: choose others, or leave the row out with rows="
                )


def check_cached(actions: Iterable[BoundHook], text: SequenceBatch) -> None:
    """Raise for a hook that means positions which are in a cache already, and at which it did not act.

    A capture of all positions is let be: it says which ones it has.
    """
    if not text.start:
        return
    for action in actions:
        everywhere = action.where.pos is None and action.where.step is None
        if action.head or (everywhere and action.change is None):
            continue
        for row in range(len(text.lengths)):
            place = text.missed(action.where, row)
            if place is not None:
                raise (Unsupported if everywhere else OutOfRange)(
                    f"{action.hook} at {action.site} means position {place} of row {row}, and the forward goes on from "
                    f"a cache that has columns 0 to {text.start - 1}: they are not read again, and the hook did not "
                    f"act there when the cache was filled. Run the whole text, say pos=slice({text.start}, None), or "
                    "fill the cache inside the same block"
                )


def _one_of_each(actions: Iterable[BoundHook]) -> Iterable[BoundHook]:
    """One action for every different wish: a hook at thirty sites wishes for the same positions at each."""
    return {(id(action.where), action.head): action for action in actions}.values()


def _positions(text: SequenceBatch, row: int, first: int, end: int) -> range:
    length = text.lengths[row]
    last = bisect_left(text.columns[row], end)
    return range(
        bisect_left(text.columns[row], first), last if text.generating else min(last, length)
    )


def _meets(wanted: range, there: range) -> bool:
    first = (
        wanted.start
        if wanted.start >= there.start
        else wanted.start + -(-(there.start - wanted.start) // wanted.step) * wanted.step
    )
    return first < min(wanted.stop, there.stop)


def _no_such_place(
    action: BoundHook,
    text: SequenceBatch,
    row: int,
    place: int,
    there: range,
    generation: Generation | None,
) -> str:
    length, step = text.lengths[row], action.where.step
    asked = f"{action.hook} means position {place} of row {row}"
    if step is not None:
        asked = f"{action.hook} means step {place - length + 1} of row {row}"
        if generation is None:
            return f"{asked}, and a forward of the prompt has step 0 only: use generate for later steps"
        return f"{asked}, and at most {generation.max_width - generation.width} tokens are generated: steps count from 0"
    if action.head and place < there.start:
        return f"{asked}, where no logits are computed; they are at positions {_range(there)} (forward with logits='all')"
    if generation is None:
        return f"{asked}, which has {length} tokens: positions 0 to {length - 1}"
    new = generation.max_width - generation.width
    return f"{asked}, and with {new} new tokens the model reads positions {_range(there)}"


def unreached(actions: Iterable[BoundHook], text: SequenceBatch, ending: SequenceEnd) -> str | None:
    """The first place that a hook named and the text did not come to, in words; None if all were reached."""
    for action in _one_of_each(actions):
        wishes = text.wishes(action.where)
        for number, prompt in enumerate(ending.prompts):
            wanted = wishes[prompt // text.expand if ending.limits is None else prompt]
            there = (
                text.reached(prompt, head=action.head)
                if ending.limits is None
                else range(ending.limits[number])
            )
            if isinstance(wanted, tuple) and wanted[-1] not in there:
                return (
                    f"{action.hook} at {action.site} means position {wanted[-1]} of row {prompt}, and the text ended "
                    f"before it came there (positions {_range(there)})"
                )
    return None


def never_fired(action: BoundHook, forwards: int) -> str:
    """Why nothing came of a hook, in words."""
    asked = f"{action.hook} never fired at {action.site}"
    if not forwards:
        return f"{asked}: no forward of the model ran inside the block"
    ran = f"{forwards} forward{'s' if forwards > 1 else ''} ran"
    if action.fired:
        return (
            f"{asked} before a row's end, though {ran}: the rows that it means had ended before they came to its "
            "positions or steps. Look at run.log, and at the lengths of the rows; leave those rows out with rows="
        )
    return (
        f"{asked}, though {ran}: either its positions, rows or steps did not come, or the model never calls this "
        "module (some are bypassed by fused code). Look at run.log, and at lm.describe() for the sites"
    )


def firing_log(firings: Sequence[Firing], limits: dict[SequenceBatch, SequenceEnd]) -> pd.DataFrame:
    """One row for each hook, site, forward and row of the batch in which it fired.

    Columns: hook (its number, in the order given), do, site, forward, row, positions ("0-14"), numbers (how many it
    read or wrote) and changed (how many of those an edit changed; 0 for a capture).
    """
    rows = []
    for action, call, cells, cell, changed in firings:
        common = {
            "hook": action.number,
            "do": str(action.hook),
            "site": str(action.site),
            "forward": call,
        }
        if cells is None:
            total = 0 if changed is None else int(changed)
            rows.append(
                common | {"row": -1, "positions": "", "numbers": cell.numel(), "changed": total}
            )
            continue
        counts = [[0]] * len(cells.rows) if changed is None else changed.tolist()
        for row, prompt, places, count in zip(
            cells.rows, cells.prompts, cells.places, counts, strict=True
        ):
            places = _before_end(places, row, limits.get(cells.text))
            if places:
                seen = {
                    "row": prompt,
                    "positions": _compact(places),
                    "numbers": len(places) * cell.numel(),
                }
                rows.append(common | seen | {"changed": sum(count[: len(places)])})
    columns = ["hook", "do", "site", "forward", "row", "positions", "numbers", "changed"]
    return pd.DataFrame(rows, columns=columns)


def _before_end(places: PositionRange, row: int, ending: SequenceEnd | None) -> PositionRange:
    """The places that count: a row that has ended is fed padding while the others go on."""
    limit = None if ending is None else ending.limit(row)
    return places if limit is None else places[: bisect_left(places, limit)]


def counted(
    firings: Iterable[Firing], limits: Mapping[SequenceBatch, SequenceEnd]
) -> set[BoundHook]:
    """The actions that did something before the end of some row."""
    acted: set[BoundHook] = set()
    for action, _, cells, _, _ in firings:
        if action not in acted and (cells is None or counts(cells, limits.get(cells.text))):
            acted.add(action)
    return acted


def counts(cells: Selection, ending: SequenceEnd | None) -> bool:
    """True if one of the cells stands before the end of its row."""
    if ending is None or ending.limits is None:
        return True
    pairs = zip(cells.rows, cells.places, strict=True)
    return any(_before_end(places, row, ending) for row, places in pairs)


def _compact(places: PositionRange) -> str:
    """Positions as words: "3", "0-14", "2,5,7"."""
    if len(places) > 1 and places[-1] - places[0] == len(places) - 1:
        return f"{places[0]}-{places[-1]}"
    return ",".join(map(str, places))


def _range(there: range) -> str:
    return f"{there[0]} to {there[-1]}" if there else "none"


class CaptureStore:
    """What came of these actions since the block was entered."""

    def __init__(self, actions: Sequence[BoundHook]) -> None:
        self.actions = actions
        self.running: SequenceBatch | None = (
            None  # the text of the last forward, which its captures belong to
        )
        self.firings: list[Firing] = []
        self._pieces: dict[
            SequenceBatch, list[list[CapturedChunk]]
        ] = {}  # of every text, in the order in which they began, by action
        self._finished: dict[SequenceBatch, Captures] = {}
        self._endings: dict[SequenceBatch, SequenceEnd] = {}
        self._problem: str | None = None
        for action in actions:
            action.pieces, action.fired, action.last = [], 0, None

    def turn_to(self, text: SequenceBatch) -> None:
        """What the captures keep from now on is of this text."""
        if text is self.running:
            return
        self.running = text
        pieces = self._pieces.setdefault(text, [[] for _ in self.actions])
        for action, mine in zip(self.actions, pieces, strict=True):
            action.pieces = mine

    def finish(self, text: SequenceBatch, ending: SequenceEnd) -> None:
        """Hold what the captures of a text kept, to be joined when it is asked for."""
        if text not in self._pieces or text in self._finished:
            return
        self._endings[text] = ending
        self._finished[text] = self._kept(text, ending)
        self._problem = self._problem or unreached(self.actions, text, ending)
        if text is self.running:
            self._leave()

    def forget(self, text: SequenceBatch) -> None:
        """A text was broken off: nothing of it counts."""
        self._pieces.pop(text, None)
        self._leave()

    def _leave(self) -> None:
        self.running = None
        for action in self.actions:
            action.pieces = []

    def finish_all(self, ending: Callable[[SequenceBatch], SequenceEnd]) -> None:
        """The same for every text that has no end yet."""
        for text in list(self._pieces):
            if text not in self._finished:
                self.finish(text, ending(text))

    def texts(self, ending: Callable[[SequenceBatch], SequenceEnd]) -> list[Captures]:
        """What was kept, a text each; of those that may go on, what `ending` says if they ended now."""
        return [
            self._finished[text] if text in self._finished else self._kept(text, ending(text))
            for text in self._pieces
            if text in self._finished or not text.generating
        ]

    def _kept(self, text: SequenceBatch, ending: SequenceEnd) -> Captures:
        slots, ended = [], []
        for action, pieces in zip(self.actions, self._pieces[text], strict=True):
            if not isinstance(action.hook, Capture) or not pieces:
                continue
            if not any(piece.cells is None or counts(piece.cells, ending) for piece in pieces):
                ended.append(action.site)  # all that it read is the padding of rows that had ended
                continue
            make = functools.partial(
                _captured, action.hook, action.site, list(pieces), text, ending
            )
            slots.append(LazyCapture(action.site, action.hook.name, make))
        return Captures(tuple(slots), tuple(dict.fromkeys(ended)))

    def check_fired(self, forwards: int) -> None:
        """Raise `NeverFired` for the first hook that did nothing, or not all that it was to do."""
        acted = counted(self.firings, self._endings)
        for action in self.actions:
            if not action.fired or action not in acted:
                raise NeverFired(never_fired(action, forwards))
        if self._problem is not None:
            raise NeverFired(self._problem)

    def log(self) -> pd.DataFrame:
        """Where each hook fired: one row for each hook, site, forward and row of the batch."""
        return firing_log(self.firings, self._endings)


def _captured(
    hook: Capture,
    site: AnySite,
    pieces: list[CapturedChunk],
    text: SequenceBatch,
    ending: SequenceEnd,
) -> Captured:
    """What one capture kept of a text, in one piece."""
    if pieces[0].cells is None:
        return Captured(site, hook.where, pieces[0].values, None, (), (), hook.name)
    scores = isinstance(site, Site) and site.name == "scores"
    values, positions, rows = joined(pieces, ending, unseen_value(pieces[0].values.dtype, scores))
    values = in_order(site, values) if pieces[0].leaf is None else pieces[0].leaf
    return Captured(site, hook.where, values, positions, *_origins(rows, text, ending), hook.name)


def _origins(
    rows: list[int], text: SequenceBatch, ending: SequenceEnd
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """The prompt that each final row is of, and its tokens."""
    prompts = tuple(
        ending.prompts[row] // (text.expand if ending.limits is None else 1) for row in rows
    )
    return prompts, tuple(map(text.prompt, prompts))
