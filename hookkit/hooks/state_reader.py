"""StateReader: reads the state for a condition, and remembers what it read.

A reader is registered at its site like a capture. It is the one owner of what was read: by text,
and in it by model row and position, or by prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Shaped
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..errors import EmptySelection, OutOfRange, Unsupported
from ..models.batch_positions import ForwardPass, Selection, SequenceBatch, pad_rows
from ..models.positions import PositionRange, Where
from ..models.sites import AnySite
from .base import EVERY_STEP, EditContext
from .when import LogitCondition, StateCondition

Numbers: TypeAlias = Shaped[Tensor, "row pos"]
Measure: TypeAlias = Callable[[Tensor, EditContext], Numbers]
"""Maps the values [row, pos, ...] of cells to the number that a condition compares."""


@dataclass(eq=False)
class _TextReadings:
    """What a `StateReader`, its owner, has read of one text.

    An engine reads the rows of one step in several parts, which have the same number.
    """

    forward: int = -1  # the number of the last forward that it read
    # of that forward, without the selection itself, which would keep the text alive
    rows: Sequence[int] = ()
    row_positions: Sequence[PositionRange] = ()
    numbers: Numbers | None = None
    # the sites of edits that the model computes before the reader's site
    late_sites: set[AnySite] = field(default_factory=set)
    earlier: dict[tuple[int, int], float] = field(default_factory=dict)  # by model row, position
    by_position: dict[int, dict[int, float]] = field(default_factory=dict)  # by prompt
    decisions: dict[int, float] = field(default_factory=dict)  # by prompt, the number to compare

    def keep(self, numbers: Numbers, cells: Selection, *, same_forward: bool) -> None:
        """Keeps the numbers of a forward, beside those of its other rows."""
        if self.numbers is None or not same_forward or set(self.rows) & set(cells.rows):
            self.numbers, self.rows, self.row_positions = numbers, cells.rows, cells.row_positions
            return
        rows = [*self.numbers, *numbers]
        self.numbers = pad_sequence(rows, batch_first=True, padding_value=math.nan)
        self.rows = [*self.rows, *cells.rows]
        self.row_positions = [*self.row_positions, *cells.row_positions]


class StateReader:
    """Reads the values at a site for one condition of one hook, and owns what it has read.

    Whether the site is computed before an edit's own is seen in the forward itself: by whether it
    was read when the edit acts.
    """

    def __init__(
        self, condition: LogitCondition | StateCondition, site: AnySite, rows: Any, measure: Measure
    ) -> None:
        self.condition, self.site, self._measure = condition, site, measure
        self.pos = condition.pos if isinstance(condition, StateCondition) else None
        step = EVERY_STEP if isinstance(condition, LogitCondition) else None
        self.where = Where(None, rows, step)
        self._texts: WeakKeyDictionary[SequenceBatch, _TextReadings] = WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        """The state of a copy, which has read nothing."""
        return {**self.__dict__, "_texts": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _texts=WeakKeyDictionary())

    def receive(self, forward_pass: ForwardPass, cells: Selection, values: Tensor) -> None:
        """Called with the values at the reader's site in each forward."""
        context = EditContext(self.site, self.where, cells)
        readings = self._texts.setdefault(cells.text, _TextReadings())
        same_forward = readings.forward == forward_pass.number
        readings.forward = forward_pass.number
        if self.pos is None:
            numbers = self._measure(values, context)
            readings.keep(numbers, cells, same_forward=same_forward)
            self._note_earlier(readings, numbers.tolist(), cells)
        elif not readings.decisions.keys() >= set(context.rows):
            self._read_prompts(readings, values, context)

    def _note_earlier(
        self, readings: _TextReadings, numbers: list[list[float]], cells: Selection
    ) -> None:
        """Keeps what edits of the next token ask for, at sites that are computed before."""
        if not readings.late_sites:
            return
        for index, row in enumerate(cells.rows):
            first = cells.text.lengths[cells.text.of(row)] - 1
            for column, position in enumerate(cells.row_positions[index]):
                if position >= first:
                    readings.earlier.setdefault((row, position), numbers[index][column])

    def _read_prompts(self, readings: _TextReadings, values: Tensor, here: EditContext) -> None:
        text, numbers = here.cells.text, self._measure(values, here).tolist()
        for index, prompt in enumerate(here.rows):
            prompt_positions = self._prompt_positions(text, prompt)
            row_readings = readings.by_position.setdefault(prompt, {})
            for column, position in enumerate(here.cells.row_positions[index]):
                if position in prompt_positions:
                    row_readings.setdefault(position, numbers[index][column])
            if len(row_readings) == len(prompt_positions):
                readings.decisions[prompt] = self._combine(
                    [row_readings[key] for key in sorted(row_readings)]
                )

    def _prompt_positions(self, text: SequenceBatch, prompt: int) -> PositionRange:
        """Returns the positions of a prompt that decide."""
        selected, length = text.selected_positions(Where(self.pos))[prompt], text.lengths[prompt]
        assert selected is not None
        if isinstance(selected, range):
            selected = range(selected.start, min(selected.stop, length), selected.step)
        elif selected and selected[-1] >= length:
            raise OutOfRange(
                f"when={self.condition} means position {selected[-1]} of row {prompt}, whose "
                f"prompt has {length} tokens"
            )
        if not selected:
            raise EmptySelection(
                f"when={self.condition} reads no position of row {prompt}, whose prompt has "
                f"{length} tokens: choose others, or leave the row out with rows="
            )
        return selected

    def _combine(self, numbers: list[float]) -> float:
        condition = self.condition
        assert isinstance(condition, StateCondition)
        if condition.over == "last":
            return numbers[-1]
        if condition.over == "mean":
            return math.fsum(numbers) / len(numbers)
        return max(numbers) if condition.compare == "above" else min(numbers)

    def numbers_at(self, here: EditContext, forward: int) -> Numbers:
        """Returns the numbers that decide on the cells of an edit; NaN where none does."""
        readings = self._texts.setdefault(here.cells.text, _TextReadings())
        was_read = readings.forward == forward and here.site not in readings.late_sites
        if self.pos is not None:
            return self._decided_numbers(readings, here, was_read=was_read)
        if not was_read:
            self._note_late(readings, here)
            return self._earlier_numbers(readings, here)
        assert readings.numbers is not None
        if readings.rows == here.cells.rows and _is_same(readings.row_positions, here):
            return readings.numbers
        return _select(readings, here)

    def _note_late(self, readings: _TextReadings, here: EditContext) -> None:
        """Notes that the reader's site is computed after that of an edit."""
        text = here.cells.text
        if here.site in readings.late_sites:
            return
        what = f"when={self.condition} reads {self.site}, which is computed after {here.site}"
        if text.final:
            raise Unsupported(
                f"{what}: such an edit acts from the next token on, and a forward of prompts has "
                "none. Use hk.generate, or a condition at an earlier site"
            )
        if text.beams > 1 and self.pos is None:
            raise Unsupported(
                f"{what}, so that what was read at a token decides on the next one, and beam "
                "search goes back on itself: use a condition at an earlier site, or decide once, "
                "pos=hk.PROMPT"
            )
        readings.late_sites.add(here.site)

    def _earlier_numbers(self, readings: _TextReadings, here: EditContext) -> Numbers:
        """Returns for each generated token what was read at the token before it."""
        text = here.cells.text

        def number(row: int, position: int) -> float:
            if position < text.lengths[text.of(row)]:
                return math.nan
            if (row, position - 1) not in readings.earlier:
                raise self._missing(here, row, position)
            return readings.earlier[row, position - 1]

        return _table(here, number)

    def _decided_numbers(
        self, readings: _TextReadings, here: EditContext, *, was_read: bool
    ) -> Numbers:
        """Returns for each cell the number that its row's prompt decided."""
        text = here.cells.text
        if not readings.decisions.keys() >= set(here.rows) and not was_read:
            self._note_late(readings, here)
        is_late = here.site in readings.late_sites

        def number(row: int, position: int) -> float:
            prompt = text.of(row)
            if is_late and position < text.lengths[prompt]:
                return math.nan
            if prompt not in readings.decisions:
                raise self._missing(here, row, position)
            return readings.decisions[prompt]

        return _table(here, number)

    def _missing(self, here: EditContext, row: int, position: int) -> Unsupported:
        return Unsupported(
            f"when={self.condition} is not decided yet at position {position} of row "
            f"{here.cells.text.of(row)} at {here.site}, because {self.site} was not read at all of "
            "its positions before: the prompt is read in chunks or comes from a cache, or the "
            "logits of its positions are not computed. Let the edit act from the prompt's last "
            "position on, pos=slice(-1, None), or read the whole prompt in one forward of the block"
        )


def _table(here: EditContext, number: Callable[[int, int], float]) -> Numbers:
    """Returns a number for each cell of an edit."""
    rows: list[list[float]] = []
    for row, positions in zip(here.cells.rows, here.cells.row_positions, strict=True):
        rows.append([number(row, position) for position in positions])
    width = max(map(len, rows))
    for numbers in rows:
        numbers += [math.nan] * (width - len(numbers))
    return torch.tensor(rows)


def _is_same(row_positions: Sequence[PositionRange], here: EditContext) -> bool:
    return list(row_positions) == here.cells.row_positions


def _select(readings: _TextReadings, here: EditContext) -> Numbers:
    """Returns the numbers of the cells of an edit, among more that were read."""
    assert readings.numbers is not None
    index_of_row = {row: index for index, row in enumerate(readings.rows)}
    indices, columns = [], []
    for row, positions in zip(here.cells.rows, here.cells.row_positions, strict=True):
        index = index_of_row[row]
        indices.append([index])
        columns.append(list(map(readings.row_positions[index].index, positions)))
    device = readings.numbers.device
    return readings.numbers[torch.tensor(indices).to(device), pad_rows(columns, 0).to(device)]
