"""What the hooks of a block have done: the captures of the text that runs and of those that ended, and what fired."""

import functools
from collections.abc import Callable, Sequence

import pandas as pd

from .calls import Text
from .captured import Captured, Ending, Kept, Piece, Slot, in_order, joined
from .errors import NeverFired
from .firing import Firing, counted, counts, firing_log, never_fired, unreached
from .forms import unseen_value
from .hooks.looking import Capture
from .sites import AnySite, Site
from .taps import Action


class Keeping:
    """What came of these actions since the block was entered."""

    def __init__(self, actions: Sequence[Action]) -> None:
        self.actions = actions
        self.running: Text | None = None  # the text of the last forward, which its captures belong to
        self.firings: list[Firing] = []
        self._pieces: dict[Text, list[list[Piece]]] = {}  # of every text, in the order in which they began, by action
        self._finished: dict[Text, Kept] = {}
        self._endings: dict[Text, Ending] = {}
        self._problem: str | None = None
        for action in actions:
            action.pieces, action.fired, action.last = [], 0, None

    def turn_to(self, text: Text) -> None:
        """What the captures keep from now on is of this text."""
        if text is self.running:
            return
        self.running = text
        pieces = self._pieces.setdefault(text, [[] for _ in self.actions])
        for action, mine in zip(self.actions, pieces, strict=True):
            action.pieces = mine

    def finish(self, text: Text, ending: Ending) -> None:
        """Hold what the captures of a text kept, to be joined when it is asked for."""
        if text not in self._pieces or text in self._finished:
            return
        self._endings[text] = ending
        self._finished[text] = self._kept(text, ending)
        self._problem = self._problem or unreached(self.actions, text, ending)
        if text is self.running:
            self._leave()

    def forget(self, text: Text) -> None:
        """A text was broken off: nothing of it counts."""
        self._pieces.pop(text, None)
        self._leave()

    def _leave(self) -> None:
        self.running = None
        for action in self.actions:
            action.pieces = []

    def finish_all(self, ending: Callable[[Text], Ending]) -> None:
        """The same for every text that has no end yet."""
        for text in list(self._pieces):
            if text not in self._finished:
                self.finish(text, ending(text))

    def texts(self, ending: Callable[[Text], Ending]) -> list[Kept]:
        """What was kept, a text each; of those that may go on, what `ending` says if they ended now."""
        return [
            self._finished[text] if text in self._finished else self._kept(text, ending(text))
            for text in self._pieces
            if text in self._finished or not text.generating
        ]

    def _kept(self, text: Text, ending: Ending) -> Kept:
        slots, ended = [], []
        for action, pieces in zip(self.actions, self._pieces[text], strict=True):
            if not isinstance(action.hook, Capture) or not pieces:
                continue
            if not any(piece.cells is None or counts(piece.cells, ending) for piece in pieces):
                ended.append(action.site)  # all that it read is the padding of rows that had ended
                continue
            make = functools.partial(_captured, action.hook, action.site, list(pieces), text, ending)
            slots.append(Slot(action.site, action.hook.name, make))
        return Kept(tuple(slots), tuple(dict.fromkeys(ended)))

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


def _captured(hook: Capture, site: AnySite, pieces: list[Piece], text: Text, ending: Ending) -> Captured:
    """What one capture kept of a text, in one piece."""
    if pieces[0].cells is None:
        return Captured(site, hook.where, pieces[0].values, None, (), (), hook.name)
    scores = isinstance(site, Site) and site.name == "scores"
    values, positions, rows = joined(pieces, ending, unseen_value(pieces[0].values.dtype, scores))
    values = in_order(site, values) if pieces[0].leaf is None else pieces[0].leaf
    return Captured(site, hook.where, values, positions, *_origins(rows, text, ending), hook.name)


def _origins(rows: list[int], text: Text, ending: Ending) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """The prompt that each final row is of, and its tokens."""
    prompts = tuple(ending.prompts[row] // (text.expand if ending.limits is None else 1) for row in rows)
    return prompts, tuple(map(text.prompt, prompts))
