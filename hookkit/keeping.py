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
        self.running: Text | None = None  # a text whose captures are not joined yet
        self.firings: list[Firing] = []
        self._finished: list[Kept] = []
        self._endings: dict[Text, Ending] = {}
        self._problem: str | None = None
        for action in actions:
            action.pieces, action.fired, action.last = [], 0, None

    def finish(self, ending: Callable[[], Ending]) -> None:
        """Hold what the captures of the running text kept, to be joined when it is asked for."""
        if self.running is None:
            return
        text, self.running = self.running, None
        self._endings[text] = ending()
        self._finished.append(self._kept(text, self._endings[text]))
        for action in self.actions:
            action.pieces = []
        self._problem = self._problem or unreached(self.actions, text, self._endings[text])

    def texts(self, ending: Callable[[], Ending] | None) -> list[Kept]:
        """What was kept, a text each; the running one too, if `ending` says how it would end now."""
        if self.running is None or ending is None:
            return list(self._finished)
        return [*self._finished, self._kept(self.running, ending())]

    def _kept(self, text: Text, ending: Ending) -> Kept:
        slots, ended = [], []
        for action in self.actions:
            if not isinstance(action.hook, Capture) or not action.pieces:
                continue
            if not any(piece.cells is None or counts(piece.cells, ending) for piece in action.pieces):
                ended.append(action.site)  # all that it read is the padding of rows that had ended
                continue
            make = functools.partial(_captured, action.hook, action.site, list(action.pieces), text, ending)
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
