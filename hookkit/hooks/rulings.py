"""What grammars rule in the current step of a `generate`, and the hook that disagrees with one.

A grammar notes in the text which tokens it allows in each row (`Ruling`). What acts after it, a
hook or a decoding rule of `generate`, must leave one of these possible, and no other.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..errors import BadEdit
from ..models.batch_positions import Ruling, SequenceBatch

if TYPE_CHECKING:
    from .base import EditContext

NAMED = 5  # tokens in a message
ADVICE = "change one of the two"


class LogitJournal:
    """The edits of the logits in one forward of a `generate`, each with the logits after it.

    The `TextHooks` of a run with a grammar own it.
    """

    def __init__(self) -> None:
        self._edits: list[tuple[str, Float[Tensor, "row vocab"]]] = []

    def begin(self) -> None:
        """Called before each forward."""
        self._edits.clear()

    def note(
        self, hook: object, sequences: SequenceBatch, logits: Float[Tensor, "row pos vocab"]
    ) -> None:
        """Called with the logits after an edit. Raises `BadEdit` if it disagrees with a grammar."""
        name = str(hook)
        last_logits = logits[:, -1]
        self._edits.append((name, last_logits))
        for ruling in sequences.rulings:
            check_ruling(ruling, last_logits, name, self._edits)


def check_ruling(
    ruling: Ruling,
    logits: Float[Tensor, "row vocab"],
    name: str,
    edits: Sequence[tuple[str, Tensor]] = (),
    excused: Collection[int] = (),
) -> None:
    """Raises `BadEdit` if what acted last, `name`, disagrees with a ruling.

    If that is the grammar itself, the edit before it that disagrees is among `edits`. Rows that are
    `excused` are not checked.
    """
    possible = _possible(logits[ruling.rows])
    undone = (possible & ~ruling.allowed).any(dim=-1)
    empty = ~(possible & ruling.allowed).any(dim=-1)
    if not bool((undone | empty).any()):
        return
    for index in (undone | empty).nonzero()[:, 0].tolist():
        if ruling.rows[index] in excused:
            continue
        if bool(empty[index]):
            name = _first_that_empties(ruling, index, edits) or name
            raise BadEdit(_nothing_left(ruling, index, name))
        token = int((possible & ~ruling.allowed)[index].nonzero()[0])
        raise BadEdit(
            f"{name} makes {ruling.name_token(token)} possible in row {ruling.prompts[index]} at "
            f"step {ruling.steps[index]}, where {ruling.hook} forbids it: {ADVICE}"
        )


def _possible(logits: Float[Tensor, "row vocab"]) -> Bool[Tensor, "row vocab"]:
    """True for tokens that can be chosen: generate's remove_invalid_values writes no -inf."""
    return ~(logits <= torch.finfo(logits.dtype).min)


def _first_that_empties(
    ruling: Ruling, index: int, edits: Iterable[tuple[str, Tensor]]
) -> str | None:
    """Returns the first edit that leaves a row nothing that the grammar allows."""
    row, allowed = ruling.rows[index], ruling.allowed[index]
    for name, logits in edits:
        if not bool((_possible(logits[row]) & allowed).any()):
            return name
    return None


def _nothing_left(ruling: Ruling, index: int, name: str) -> str:
    where = f"in row {ruling.prompts[index]} at step {ruling.steps[index]}"
    if not bool(ruling.allowed[index].any()):
        return f"{ruling.hook} allows no token {where}: its text can neither go on nor end there"
    if name == ruling.hook:
        name = "the model, whose logits are -inf,"
    return f"{name} leaves none of the tokens that {_allowed_tokens(ruling, index)}: {ADVICE}"


def _allowed_tokens(ruling: Ruling, index: int) -> str:
    """Returns the grammar and the tokens that it allows in a row, in words."""
    ids = ruling.allowed[index].nonzero()[:, 0].tolist()
    names = ", ".join(map(ruling.name_token, ids[:NAMED]))
    ending = f" and {len(ids) - NAMED} more" if len(ids) > NAMED else ""
    where = f"in row {ruling.prompts[index]} at step {ruling.steps[index]}"
    return f"{ruling.hook} allows {where} ({names}{ending})"


def besides_ruling(here: EditContext, row: int) -> str:
    """Returns what a grammar allows in a row, for the message of an edit; "" if none has acted."""
    model_row = here.cells.rows[row]
    for ruling in here.cells.text.rulings:
        if model_row in ruling.rows:
            allowed = _allowed_tokens(ruling, ruling.rows.index(model_row))
            return f", none of those that {allowed}: {ADVICE}"
    return ""
