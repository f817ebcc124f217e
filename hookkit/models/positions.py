"""When: positions, rows and steps, as values. Nothing here knows torch.

A position is counted in the row's own text, without padding, from 0. A negative one counts back from the end of the
prompt, while generating too. A slice without an end goes on into the generated text.
"""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from ..arguments import as_whole, checks_keywords, described, whole_number
from ..errors import BadHook, EmptySelection, OutOfRange

OPEN = sys.maxsize  # the end of a slice that has none


class Part(Enum):
    """A part of the text: what was given, or what the model wrote."""

    PROMPT = "prompt"
    GENERATED = "generated"

    def __repr__(self) -> str:
        return self.name


PROMPT = Part.PROMPT
GENERATED = Part.GENERATED


@dataclass(frozen=True)
class Span:
    """A slice as a value (Python's own cannot be hashed before 3.12)."""

    start: int | None
    stop: int | None
    step: int | None = None

    def __repr__(self) -> str:
        ends = ["" if end is None else str(end) for end in (self.start, self.stop, self.step)]
        return ":".join(ends if self.step is not None else ends[:2])


@dataclass(frozen=True)
class At:
    """The tokens of the prompt that cover a text; `which` occurrence, where there are several."""

    text: str
    which: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not self.text:
            raise EmptySelection(
                f"at({described(self.text)}) covers no token: give the text that the tokens cover"
            )
        if self.which is not None:
            object.__setattr__(
                self,
                "which",
                whole_number(self.which, "which", meaning="which occurrence is meant"),
            )

    def __repr__(self) -> str:
        return (
            f"at({self.text!r})" if self.which is None else f"at({self.text!r}, which={self.which})"
        )


@checks_keywords
def at(text: str, *, which: int | None = None) -> At:
    """The positions of the tokens of each prompt that cover `text`.

    Where the text occurs several times, `which` says which one: 0 is the first, -1 the last. Without it, a text that
    does not occur exactly once raises `OutOfRange` before the forward.

    >>> at("store")
    at('store')
    """
    return At(text, which)


Pos: TypeAlias = int | tuple[int, ...] | Span | At | Part | None
PosLike: TypeAlias = int | slice | Sequence[int] | Pos | None
CountLike: TypeAlias = int | slice | Sequence[int] | tuple[int, ...] | Span | None
Count: TypeAlias = int | tuple[int, ...] | Span | None

PositionRange: TypeAlias = range | tuple[int, ...]
"""The positions of one row that a hook wants, in ascending order; a range without end has `OPEN` as its stop."""


@dataclass(frozen=True)
class Where:
    """The part of a site that a hook wants: which positions or steps, of which rows."""

    pos: Pos = None
    rows: Count = None
    step: Count = None


def as_pos(pos: PosLike) -> Pos:
    """`pos` as a value, or `BadHook` if it is none of the ways to say where."""
    if isinstance(pos, At | Part):
        return pos
    return as_count(pos, "pos")


def as_count(count: CountLike, word: str, *, negative: bool = True) -> Count:
    """Whole numbers as a value: one, several, or a slice of them."""
    if count is None:
        return None
    if isinstance(count, slice):
        count = Span(count.start, count.stop, count.step)
    if isinstance(count, Span):
        read: Count = _span(count, word)
        numbers = [end for end in (read.start, read.stop) if end is not None]
    elif (
        as_whole(count) is not None
        or not isinstance(count, Iterable)
        or isinstance(count, NO_NUMBERS)
    ):
        read = _whole(count, word)
        numbers = [read]
    else:
        read = _several(count, word)
        numbers = list(read)
    if not negative and any(number < 0 for number in numbers):
        raise OutOfRange(f"{word}={read!r}: {word}s count from 0 upwards")
    return read


NO_NUMBERS = (str, bytes, bytearray, Mapping)  # what can be iterated over, and holds no positions


def _span(span: Span, word: str) -> Span:
    """A slice with its ends as whole numbers; `EmptySelection` where it can never hold anything."""
    ends = [
        None if end is None else _whole(end, word) for end in (span.start, span.stop, span.step)
    ]
    start, stop, step = ends
    if step is not None and step < 1:
        raise BadHook(
            f"{word}={span!r} steps backwards: positions are taken in the order of the text"
        )
    first = 0 if start is None else start
    if stop is not None and (first < 0) == (stop < 0) and stop <= first:
        raise EmptySelection(f"{word}={span!r} selects nothing: its end is not after its start")
    return Span(start, stop, step)


def _several(count: Iterable[object], word: str) -> tuple[int, ...]:
    try:
        items = list(count)
    except TypeError:
        return (_whole(count, word),)
    numbers = tuple(_whole(number, word) for number in items)
    if not numbers:
        raise EmptySelection(
            f"{word}=[] selects nothing: leave {word} out for all, or name at least one"
        )
    if len(set(numbers)) < len(numbers):
        raise BadHook(f"{word}={list(numbers)} names one of them twice")
    return numbers


def _whole(number: object, word: str) -> int:
    whole = as_whole(number)
    if isinstance(number, bool):
        raise BadHook(f"{word}={number!r} is not a whole number")
    if whole is None:
        also = ", hk.PROMPT, hk.GENERATED or hk.at('text')" if word == "pos" else ""
        raise BadHook(
            f"{word}={described(number)} says no place: give a whole number, a list of them or a slice{also}"
        )
    return whole


def wish(where: Where, length: int, cover: Callable[[At], tuple[int, ...]]) -> PositionRange:
    """The positions that `where` means in a row whose prompt has `length` tokens. `cover` finds a text's tokens."""
    if where.step is not None:
        steps = _resolve(where.step, 0)
        return _shifted(
            steps, length - 1
        )  # the logits that choose step 0 stand at the prompt's last token
    pos = where.pos
    if isinstance(pos, At):
        return cover(pos)
    if isinstance(pos, Part):
        return range(length) if pos is PROMPT else range(length, OPEN)
    return range(OPEN) if pos is None else _resolve(pos, length)


def chosen(rows: Count, count: int) -> list[int]:
    """The rows of a batch of `count` that are meant, in order."""
    if rows is None:
        return list(range(count))
    wanted = _resolve(rows, count)
    if isinstance(wanted, range):
        wanted = range(wanted.start, min(wanted.stop, count), wanted.step)
    for row in wanted:
        if row >= count:
            raise OutOfRange(f"row {row} was asked for, and the batch has {_rows(count)}")
    if not wanted:
        raise EmptySelection(f"rows={rows!r} selects none of the batch's {_rows(count)}")
    return list(wanted)


def _rows(count: int) -> str:
    return "1 row, row 0" if count == 1 else f"{count} rows, 0 to {count - 1}"


def _resolve(count: int | tuple[int, ...] | Span, length: int) -> PositionRange:
    if isinstance(count, Span):
        start = (
            0
            if count.start is None
            else count.start
            if count.start >= 0
            else max(0, length + count.start)
        )
        stop = (
            OPEN
            if count.stop is None
            else count.stop
            if count.stop >= 0
            else max(0, length + count.stop)
        )
        return range(start, stop, count.step or 1)
    numbers = (count,) if isinstance(count, int) else count
    places = sorted(number if number >= 0 else length + number for number in numbers)
    if places[0] < 0:
        raise OutOfRange(
            f"position {min(numbers)} was asked for, and the prompt has {length} tokens: "
            f"positions go from -{length} to {length - 1}"
        )
    if len(set(places)) < len(places):
        raise BadHook(
            f"the positions {list(numbers)} name one token twice in a prompt of {length} tokens"
        )
    return tuple(places)


def _shifted(wanted: PositionRange, by: int) -> PositionRange:
    if isinstance(wanted, range):
        return range(
            wanted.start + by, wanted.stop if wanted.stop == OPEN else wanted.stop + by, wanted.step
        )
    return tuple(place + by for place in wanted)
