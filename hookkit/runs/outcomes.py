"""What the hooks of a block were to do, and what they did.

Before a forward, `check_positions` and `check_cached` compare the positions of hooks with those
that a text can have. During forwards, a `CaptureStore` holds the captures and the firings of each
text. Afterwards it raises for a hook that never fired, and gives the log.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from functools import partial
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
    join_chunks,
    swap_head_and_query,
)
from ..models.batch_positions import ForwardPass, Selection, SequenceBatch
from ..models.positions import PositionRange
from ..models.sites import AnySite, Site
from ..models.views import unseen_value
from .generation import Generation
from .taps import BoundHook

Firing: TypeAlias = tuple[BoundHook, int, Selection | None, torch.Size, Tensor | None]
"""One hook at one site in one forward.

The bound hook, the forward's number, the selection, the shape of one cell (of the whole tensor if
there is no selection), and for an edit how many numbers it changed in each cell.
"""

LOG_COLUMNS = ["hook", "do", "site", "forward", "row", "positions", "numbers", "changed"]


# ---- checks before a forward


def check_positions(
    bound_hooks: Iterable[BoundHook],
    text: SequenceBatch,
    forward_pass: ForwardPass,
    generation: Generation | None,
) -> None:
    """Raises if a hook names a position that the text cannot have, or selects nothing in a row.

    Only for a text whose length is known: one forward of prompts, or a `generate`.
    """
    for bound_hook in _one_per_selection(bound_hooks):
        first, end = _columns_read(bound_hook, text, forward_pass, generation)
        for row, positions in enumerate(text.selected_positions(bound_hook.where)):
            if positions is None:
                continue
            possible = _positions_in(text, row, first, end)
            if isinstance(positions, tuple):
                if positions[0] in possible and positions[-1] in possible:
                    continue
                missing = [position for position in positions if position not in possible]
                raise OutOfRange(
                    _out_of_range_message(bound_hook, text, row, missing[0], possible, generation)
                )
            if not _overlaps(positions, possible):
                at_logits = " at the logits" if bound_hook.head else ""
                raise EmptySelection(
                    f"{bound_hook.hook} selects nothing in row {row}, which has positions "
                    f"{_first_to_last(possible)}{at_logits}: choose others, or leave the row out "
                    "with rows="
                )


def check_cached(bound_hooks: Iterable[BoundHook], text: SequenceBatch) -> None:
    """Raises for a hook at positions that are in a cache already, at which it did not act.

    A capture of all positions is allowed: it holds the positions that it has.
    """
    if not text.start:
        return
    for bound_hook in bound_hooks:
        everywhere = bound_hook.where.pos is None and bound_hook.where.step is None
        if bound_hook.head or (everywhere and bound_hook.change is None):
            continue
        for row in range(len(text.lengths)):
            position = text.first_missed_position(bound_hook.where, row)
            if position is None:
                continue
            error = Unsupported if everywhere else OutOfRange
            raise error(
                f"{bound_hook.hook} at {bound_hook.site} means position {position} of row {row}, "
                f"and the forward goes on from a cache that has columns 0 to {text.start - 1}: "
                "they are not read again, and the hook did not act there when the cache was "
                f"filled. Run the whole text, say pos=slice({text.start}, None), or fill the cache "
                "inside the same block"
            )


def _one_per_selection(bound_hooks: Iterable[BoundHook]) -> Iterable[BoundHook]:
    """One bound hook for each different selection: a hook selects the same at all its sites."""
    by_selection = {
        (id(bound_hook.where), bound_hook.head): bound_hook for bound_hook in bound_hooks
    }
    return by_selection.values()


def _columns_read(
    bound_hook: BoundHook,
    text: SequenceBatch,
    forward_pass: ForwardPass,
    generation: Generation | None,
) -> tuple[int, int]:
    """The first column at which a hook can act, and the end of the columns that are read."""
    first = 0
    if generation is None:
        end = forward_pass.past + forward_pass.width
        if bound_hook.head:
            first = forward_pass.past + forward_pass.head.start
        return first, end
    if bound_hook.head:
        first = text.head or 0
    return first, generation.max_width - 1  # the last token is never read


def _positions_in(text: SequenceBatch, row: int, first: int, end: int) -> range:
    """The positions of a row in the columns from `first` to before `end`."""
    columns = text.columns[row]
    last = bisect_left(columns, end)
    if not text.generating:
        last = min(last, text.lengths[row])
    return range(bisect_left(columns, first), last)


def _overlaps(positions: range, possible: range) -> bool:
    first = positions.start
    if first < possible.start:
        steps = -(-(possible.start - first) // positions.step)  # rounded up
        first += steps * positions.step
    return first < min(positions.stop, possible.stop)


def _out_of_range_message(
    bound_hook: BoundHook,
    text: SequenceBatch,
    row: int,
    position: int,
    possible: range,
    generation: Generation | None,
) -> str:
    """The message for a position that a row does not have."""
    length = text.lengths[row]
    if bound_hook.where.step is not None:
        meaning = f"{bound_hook.hook} means step {position - length + 1} of row {row}"
        if generation is None:
            return (
                f"{meaning}, and a forward of the prompt has step 0 only: use generate for later "
                "steps"
            )
        new_tokens = generation.max_width - generation.width
        return f"{meaning}, and at most {new_tokens} tokens are generated: steps count from 0"
    meaning = f"{bound_hook.hook} means position {position} of row {row}"
    if bound_hook.head and position < possible.start:
        return (
            f"{meaning}, where no logits are computed; they are at positions "
            f"{_first_to_last(possible)} (forward with logits='all')"
        )
    if generation is None:
        return f"{meaning}, which has {length} tokens: positions 0 to {length - 1}"
    new_tokens = generation.max_width - generation.width
    return (
        f"{meaning}, and with {new_tokens} new tokens the model reads positions "
        f"{_first_to_last(possible)}"
    )


# ---- hooks that did not fire


def _unreached_message(
    bound_hooks: Iterable[BoundHook], text: SequenceBatch, ending: SequenceEnd
) -> str | None:
    """The message for the first position of a hook that the text did not reach; None if none."""
    for bound_hook in _one_per_selection(bound_hooks):
        positions_by_prompt = text.selected_positions(bound_hook.where)
        for number, row in enumerate(ending.prompts):
            if ending.limits is None:
                positions = positions_by_prompt[row // text.expand]
                reached = text.reached(row, head=bound_hook.head)
            else:
                positions = positions_by_prompt[row]
                reached = range(ending.limits[number])
            if isinstance(positions, tuple) and positions[-1] not in reached:
                return (
                    f"{bound_hook.hook} at {bound_hook.site} means position {positions[-1]} of row "
                    f"{row}, and the text ended before it came there (positions "
                    f"{_first_to_last(reached)})"
                )
    return None


def _never_fired_message(bound_hook: BoundHook, forwards: int) -> str:
    """The message for a hook that did nothing in this number of forwards."""
    subject = f"{bound_hook.hook} never fired at {bound_hook.site}"
    if not forwards:
        return f"{subject}: no forward of the model ran inside the block"
    ran = "1 forward ran" if forwards == 1 else f"{forwards} forwards ran"
    if bound_hook.fired:
        return (
            f"{subject} before a row's end, though {ran}: the rows that it means had ended before "
            "they came to its positions or steps. Look at run.log, and at the lengths of the rows; "
            "leave those rows out with rows="
        )
    return (
        f"{subject}, though {ran}: either its positions, rows or steps did not come, or the model "
        "never calls this module (some are bypassed by fused code). Look at run.log, and at "
        "lm.describe() for the sites"
    )


# ---- firings


def _selection_rows(
    selection: Selection, ending: SequenceEnd | None, cell_size: int, changed: Tensor | None
) -> list[dict[str, object]]:
    """The log's last four columns, for each row of a selection that has positions that count."""
    counts = [[0]] * len(selection.rows)
    if changed is not None:
        counts = changed.tolist()
    rows: list[dict[str, object]] = []
    cells = zip(selection.rows, selection.prompts, selection.places, counts, strict=True)
    for row, prompt, all_positions, changed_counts in cells:
        positions = _before_end(all_positions, row, ending)
        if positions:
            rows.append(
                {
                    "row": prompt,
                    "positions": _positions_text(positions),
                    "numbers": len(positions) * cell_size,
                    "changed": sum(changed_counts[: len(positions)]),
                }
            )
    return rows


def _before_end(positions: PositionRange, row: int, ending: SequenceEnd | None) -> PositionRange:
    """The positions before the end of a model row.

    A row that has ended is fed padding while the other rows go on.
    """
    limit = None if ending is None else ending.limit(row)
    if limit is None:
        return positions
    return positions[: bisect_left(positions, limit)]


def _has_cell_before_end(selection: Selection, ending: SequenceEnd | None) -> bool:
    """True if a cell of the selection is before the end of its row."""
    if ending is None or ending.limits is None:
        return True
    for row, positions in zip(selection.rows, selection.places, strict=True):
        if _before_end(positions, row, ending):
            return True
    return False


def _positions_text(positions: PositionRange) -> str:
    """Positions as text: "3", "0-14", "2,5,7"."""
    if len(positions) > 1 and positions[-1] - positions[0] == len(positions) - 1:
        return f"{positions[0]}-{positions[-1]}"
    return ",".join(map(str, positions))


def _first_to_last(positions: range) -> str:
    return f"{positions[0]} to {positions[-1]}" if positions else "none"


# ---- captures


class CaptureStore:
    """The captures and firings of the bound hooks of one block, by text.

    Owned by the manager of the block. It also owns the state in the bound hooks: their `pieces`
    are those of the current text.
    """

    def __init__(self, bound_hooks: Sequence[BoundHook]) -> None:
        self.bound_hooks = bound_hooks
        self.current_text: SequenceBatch | None = None  # the text of the last forward
        self.firings: list[Firing] = []
        # of each text in the order in which the texts began: a list for each bound hook
        self._chunks: dict[SequenceBatch, list[list[CapturedChunk]]] = {}
        self._endings: dict[SequenceBatch, SequenceEnd] = {}  # of the texts that have ended
        self._finished: dict[SequenceBatch, Captures] = {}
        self._problem: str | None = None
        for bound_hook in bound_hooks:
            bound_hook.pieces, bound_hook.fired, bound_hook.last_pass = [], 0, None

    def turn_to(self, text: SequenceBatch) -> None:
        """Makes this text the one to which captures are added."""
        if text is self.current_text:
            return
        self.current_text = text
        if text not in self._chunks:
            self._chunks[text] = [[] for _ in self.bound_hooks]
        for bound_hook, chunks in zip(self.bound_hooks, self._chunks[text], strict=True):
            bound_hook.pieces = chunks

    def finish(self, text: SequenceBatch, ending: SequenceEnd) -> None:
        """Ends a text. Its captures are joined when they are first asked for."""
        if text not in self._chunks or text in self._finished:
            return
        self._endings[text] = ending
        self._finished[text] = self._captures(text, ending)
        if self._problem is None:
            self._problem = _unreached_message(self.bound_hooks, text, ending)
        if text is self.current_text:
            self._leave_text()

    def finish_all(self) -> None:
        """Ends each text that no `generate` has ended."""
        for text in list(self._chunks):
            self.finish(text, _plain_ending(text))

    def forget(self, text: SequenceBatch) -> None:
        """Drops a text that was interrupted."""
        self._chunks.pop(text, None)
        self._leave_text()

    def _leave_text(self) -> None:
        self.current_text = None
        for bound_hook in self.bound_hooks:
            bound_hook.pieces = []

    def texts(self) -> list[Captures]:
        """Returns the captures of the user's hooks by text; open texts as if they ended now."""
        texts = []
        for text in self._chunks:
            if text in self._finished:
                texts.append(self._finished[text])
            elif not text.generating:
                texts.append(self._captures(text, _plain_ending(text)))
        return texts

    def observed(self) -> Captures:
        """Returns the captures of the observers in the first text, after its end."""
        text = next(iter(self._chunks))
        return self._captures(text, self._endings[text], observers=True)

    def _captures(
        self, text: SequenceBatch, ending: SequenceEnd, *, observers: bool = False
    ) -> Captures:
        slots, ended = [], []
        for bound_hook, chunks in zip(self.bound_hooks, self._chunks[text], strict=True):
            hook, site = bound_hook.hook, bound_hook.site
            if bound_hook.observer is not observers or not isinstance(hook, Capture) or not chunks:
                continue
            if not _any_before_end(chunks, ending):
                ended.append(site)  # all that was captured is the padding of rows that had ended
                continue
            join = partial(_join_chunks, hook, site, list(chunks), text, ending)
            slots.append(LazyCapture(site, hook.name, join))
        return Captures(tuple(slots), tuple(dict.fromkeys(ended)))

    def check_fired(self, forwards: int) -> None:
        """Raises `NeverFired` for the first hook that did nothing, or not all that it was to do."""
        fired: set[BoundHook] = set()  # before the end of some row
        for bound_hook, _, selection, _, _ in self.firings:
            if bound_hook not in fired and self._acts_before_end(selection):
                fired.add(bound_hook)
        for bound_hook in self.bound_hooks:
            if not bound_hook.fired or bound_hook not in fired:
                raise NeverFired(_never_fired_message(bound_hook, forwards))
        if self._problem is not None:
            raise NeverFired(self._problem)

    def _acts_before_end(self, selection: Selection | None) -> bool:
        if selection is None:
            return True
        return _has_cell_before_end(selection, self._endings.get(selection.text))

    def log(self) -> pd.DataFrame:
        """Returns one row for each hook, site, forward and row of the batch where a hook fired.

        Columns: hook (its number, in the order in which the hooks were passed), do, site, forward,
        row, positions ("0-14"), numbers (how many the hook read or wrote) and changed (how many of
        those an edit changed; 0 for a capture). Observers are left out.
        """
        rows: list[dict[str, object]] = []
        for bound_hook, forward, selection, shape, changed in self.firings:
            if bound_hook.observer:
                continue
            common = {
                "hook": bound_hook.number,
                "do": str(bound_hook.hook),
                "site": str(bound_hook.site),
                "forward": forward,
            }
            if selection is None:
                total = 0 if changed is None else int(changed)
                numbers = {"row": -1, "positions": "", "numbers": shape.numel(), "changed": total}
                rows.append(common | numbers)
                continue
            ending = self._endings.get(selection.text)
            for numbers in _selection_rows(selection, ending, shape.numel(), changed):
                rows.append(common | numbers)
        return pd.DataFrame(rows, columns=LOG_COLUMNS)


def _plain_ending(text: SequenceBatch) -> SequenceEnd:
    """The ending of a text that no `generate` has made."""
    return SequenceEnd(range(len(text.lengths) * text.expand))


def _any_before_end(chunks: list[CapturedChunk], ending: SequenceEnd) -> bool:
    return any(chunk.cells is None or _has_cell_before_end(chunk.cells, ending) for chunk in chunks)


def _join_chunks(
    hook: Capture,
    site: AnySite,
    chunks: list[CapturedChunk],
    text: SequenceBatch,
    ending: SequenceEnd,
) -> Captured:
    """Joins the chunks that one capture has of a text."""
    first = chunks[0]
    if first.cells is None:
        return Captured(site, hook.where, first.values, None, (), (), hook.name)
    is_scores = isinstance(site, Site) and site.name == "scores"
    fill = unseen_value(first.values.dtype, is_scores)
    values, positions, final_rows = join_chunks(chunks, ending, fill)
    values = swap_head_and_query(site, values) if first.leaf is None else first.leaf
    rows_per_prompt = text.expand if ending.limits is None else 1
    rows = tuple(ending.prompts[row] // rows_per_prompt for row in final_rows)
    prompts = tuple(map(text.prompt, rows))
    return Captured(site, hook.where, values, positions, rows, prompts, hook.name)
