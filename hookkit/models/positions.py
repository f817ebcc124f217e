"""Positions, rows and steps as values. Nothing here imports torch.

A position is counted in the row's own text, without padding, from 0. A negative position counts
back from the end of the prompt, also while generating. A slice without an end continues into the
generated text. `resolve_positions` resolves these values into the positions of one row, and
`resolve_rows` into rows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeAlias

from ..arguments import as_integer, as_items, check_integer, check_keywords, describe
from ..errors import BadHook, EmptySelection, OutOfRange

NO_END = sys.maxsize  # the end of a slice that has none


class TextPart(Enum):
    """A part of the text: the prompt, what the model generated, what a chat template added, or
    the tokens that stand for images and videos or for sound."""

    PROMPT = "prompt"
    GENERATED = "generated"
    TEMPLATE = "template"
    IMAGE = "image"
    AUDIO = "audio"

    def __repr__(self) -> str:
        return self.name

    __str__ = __repr__


PROMPT = TextPart.PROMPT
GENERATED = TextPart.GENERATED
TEMPLATE = TextPart.TEMPLATE
IMAGE = TextPart.IMAGE
AUDIO = TextPart.AUDIO


@dataclass(frozen=True)
class Span:
    """A slice as a value (Python's own cannot be hashed before 3.12)."""

    start: int | None
    stop: int | None
    step: int | None = None

    def __repr__(self) -> str:
        parts = [self.start, self.stop]
        if self.step is not None:
            parts.append(self.step)
        return ":".join(map(str, parts)).replace("None", "")


@dataclass(frozen=True)
class At:
    """The tokens of the prompt that cover a text; `which` is the index of the occurrence."""

    text: str
    which: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not self.text:
            raise EmptySelection(
                f"at({describe(self.text)}) covers no token: give the text that the tokens cover"
            )
        if self.which is not None:
            which = check_integer(self.which, "which", meaning="which occurrence is meant")
            object.__setattr__(self, "which", which)

    def __repr__(self) -> str:
        if self.which is None:
            return f"at({self.text!r})"
        return f"at({self.text!r}, which={self.which})"


@check_keywords
def at(text: str, *, which: int | None = None) -> At:
    """Returns the positions of the tokens of each prompt that cover `text`, as a value for `pos=`.

    `which` is the index of the occurrence where the text occurs several times: 0 is the first, -1
    the last. Without it, a text that does not occur exactly once raises `OutOfRange` before the
    forward.

    >>> at("store")
    at('store')
    """
    return At(text, which)


@dataclass(frozen=True)
class Role:
    """The tokens of a chat that a role says; `which` is the index among the role's messages."""

    name: str
    which: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise EmptySelection(
                f"role({describe(self.name)}) is no role: say role('user'), for example"
            )
        if self.which is not None:
            which = check_integer(self.which, "which", meaning="which message is meant")
            object.__setattr__(self, "which", which)

    def __repr__(self) -> str:
        which = "" if self.which is None else f", which={self.which}"
        return f"role({self.name!r}{which})"


@dataclass(frozen=True)
class Turn:
    """The tokens of what one message of a chat says."""

    number: int

    def __post_init__(self) -> None:
        number = check_integer(self.number, "turn", meaning="which message is meant")
        object.__setattr__(self, "number", number)

    def __repr__(self) -> str:
        return f"turn({self.number})"


@check_keywords
def role(name: str, *, which: int | None = None) -> Role:
    """Returns the positions of what a role says in each chat, as a value for `pos=`.

    These are the tokens of the contents of all its messages, without those of the template.
    `which` is the index of one message among them: 0 is the role's first, -1 its last. A prompt
    that is no chat, or has no such message, raises `OutOfRange` before the forward.

    >>> role("user", which=-1)
    role('user', which=-1)
    """
    return Role(name, which)


@check_keywords
def turn(number: int) -> Turn:
    """Returns the positions of what one message of each chat says, as a value for `pos=`.

    `number` counts all messages of the chat from 0; -1 is the last. The tokens of the template are
    left out.

    >>> turn(-1)
    turn(-1)
    """
    return Turn(number)


Named: TypeAlias = At | Role | Turn | TextPart  # found in the text, or in the chat
Pos: TypeAlias = int | tuple[int, ...] | Span | Named | None
PosLike: TypeAlias = int | slice | Sequence[int] | Pos | None
IndicesLike: TypeAlias = int | slice | Sequence[int] | tuple[int, ...] | Span | None
Indices: TypeAlias = int | tuple[int, ...] | Span | None

PositionRange: TypeAlias = range | tuple[int, ...]
"""The selected positions of one row, ascending. A range without an end stops at `NO_END`."""


@dataclass(frozen=True)
class Where:
    """The part of a site that a hook selects: which positions or steps, of which rows."""

    pos: Pos = None
    rows: Indices = None
    step: Indices = None


def read_position(pos: PosLike) -> Pos:
    """Returns `pos` as a value. Raises `BadHook` if it does not say a position."""
    if pos is None or type(pos) is int:
        return pos
    if isinstance(pos, At | Role | Turn | TextPart):
        return pos
    return read_indices(pos, "pos")


def read_indices(count: IndicesLike, word: str, *, negative: bool = True) -> Indices:
    """Returns one whole number, several, or a slice of them as a value.

    `word` is the name of the argument in messages. With `negative=False`, negative numbers raise
    `OutOfRange`.
    """
    if count is None:
        return None
    value = _read_value(count, word)
    if not negative and min(_numbers_in(value)) < 0:
        raise OutOfRange(f"{word}={value!r}: {word}s count from 0 upwards")
    return value


def _numbers_in(value: int | tuple[int, ...] | Span) -> tuple[int, ...]:
    if isinstance(value, Span):
        return value.start or 0, value.stop or 0
    if isinstance(value, int):
        return (value,)
    return value


def _read_value(count: object, word: str) -> int | tuple[int, ...] | Span:
    if type(count) is int:
        return count
    if isinstance(count, slice):
        return _read_span(Span(count.start, count.stop, count.step), word)
    if isinstance(count, Span):
        return _read_span(count, word)
    items = as_items(count)
    if items is None:
        return _read_whole(count, word)
    return tuple(_read_several(items, word))


def _read_span(span: Span, word: str) -> Span:
    """Returns a slice with whole numbers. Raises `EmptySelection` if it is always empty."""
    start, stop = _read_end(span.start, word), _read_end(span.stop, word)
    step = _read_end(span.step, word)
    if step is not None and step < 1:
        raise BadHook(
            f"{word}={span!r} steps backwards: positions are taken in the order of the text"
        )
    first = start or 0
    if stop is not None and (first < 0) == (stop < 0) and stop <= first:
        raise EmptySelection(f"{word}={span!r} selects nothing: its end is not after its start")
    return Span(start, stop, step)


def _read_end(end: object, word: str) -> int | None:
    return None if end is None else _read_whole(end, word)


def _read_several(items: list[Any], word: str) -> list[int]:
    numbers = [_read_whole(item, word) for item in items]
    if not numbers:
        raise EmptySelection(
            f"{word}=[] selects nothing: leave {word} out for all, or name at least one"
        )
    if len(set(numbers)) < len(numbers):
        raise BadHook(f"{word}={numbers} names one of them twice")
    return numbers


def _read_whole(number: object, word: str) -> int:
    if isinstance(number, bool):
        raise BadHook(f"{word}={number!r} is not a whole number")
    whole = as_integer(number)
    if whole is None:
        forms = "a whole number, a list of them or a slice"
        if word == "pos":
            forms += ", hk.PROMPT, hk.GENERATED, hk.at('text') or hk.role('user')"
        raise BadHook(f"{word}={describe(number)} is not valid: give {forms}")
    return whole


def is_named(pos: object) -> bool:
    """True for positions that depend on what a row says, such as a text, a role or an image."""
    return isinstance(pos, At | Role | Turn) or pos in (TEMPLATE, IMAGE, AUDIO)


def resolve_positions(
    where: Where, length: int, cover: Callable[[Named], tuple[int, ...]]
) -> PositionRange:
    """Returns the positions that `where` selects in a row. `cover` returns those of a text, a
    role, a turn, the template, images or sound."""
    if where.step is not None:
        # The logits that choose step 0 are at the prompt's last token.
        return _shift(_resolve(where.step, 0), length - 1)
    pos = where.pos
    if pos is None:
        return range(NO_END)
    if pos is TextPart.PROMPT:
        return range(length)
    if pos is TextPart.GENERATED:
        return range(length, NO_END)
    if isinstance(pos, At | Role | Turn | TextPart):
        return cover(pos)
    return _resolve(pos, length)


def resolve_rows(rows: Indices, count: int) -> list[int]:
    """Returns the selected rows of a batch of `count` rows, in order."""
    if rows is None:
        return list(range(count))
    numbers = _resolve(rows, count)
    if isinstance(numbers, range):
        numbers = range(numbers.start, min(numbers.stop, count), numbers.step)
    batch = "1 row, row 0" if count == 1 else f"{count} rows, 0 to {count - 1}"
    beyond = [row for row in numbers if row >= count]
    if beyond:
        raise OutOfRange(f"row {beyond[0]} was asked for, and the batch has {batch}")
    if not numbers:
        raise EmptySelection(f"rows={rows!r} selects none of the batch's {batch}")
    return list(numbers)


def _resolve(count: int | tuple[int, ...] | Span, length: int) -> PositionRange:
    """Returns the numbers of a value, counted from the start of a row of `length` tokens."""
    if isinstance(count, Span):
        start = _resolve_end(count.start, length, default=0)
        stop = _resolve_end(count.stop, length, default=NO_END)
        return range(start, stop, count.step or 1)
    numbers = _numbers_in(count)
    positions = sorted(_from_start(number, length) for number in numbers)
    if positions[0] < 0:
        raise OutOfRange(
            f"position {min(numbers)} was asked for, and the prompt has {length} tokens: "
            f"positions go from -{length} to {length - 1}"
        )
    if len(set(positions)) < len(positions):
        raise BadHook(
            f"the positions {list(numbers)} name one token twice in a prompt of {length} tokens"
        )
    return tuple(positions)


def _resolve_end(end: int | None, length: int, default: int) -> int:
    return default if end is None else max(0, _from_start(end, length))


def _from_start(number: int, length: int) -> int:
    """Returns a number where negative numbers count back from `length`."""
    return number if number >= 0 else length + number


def _shift(positions: PositionRange, offset: int) -> PositionRange:
    if isinstance(positions, range):
        stop = positions.stop if positions.stop == NO_END else positions.stop + offset
        return range(positions.start + offset, stop, positions.step)
    return tuple(position + offset for position in positions)
