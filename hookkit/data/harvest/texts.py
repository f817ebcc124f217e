"""Texts: from whatever holds them to numbered rows of tokens, read once and in order, however many there are.

Windows: the next rows of a stream, and the batches that they are computed in.

Rows of like length go together, so that little is padded, and no further ahead is looked than a window. Which rows
share a batch decides the last digits of what comes out: it follows from the texts and the settings alone.
"""

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, TypeAlias

from ...arguments import is_one_row, one_prompt, prompt_rows, refuse_container
from ...errors import BadFile, BadHook, BadPrompt, HarvestChanged, OutOfRange
from ...files.untrusted import json_of
from ...models.lm import LM
from ...models.positions import GENERATED, At, PositionRange, Where, wish
from ...models.prompts import Row, cover, shortened

TextsLike: TypeAlias = str | os.PathLike[str] | Iterable[Any]
Long: TypeAlias = Literal["error", "truncate", "split"]
Unfit: TypeAlias = Literal["error", "skip"]

END = object()  # behind the last text


@dataclass(frozen=True)
class Rules:
    """Which positions are wanted, and what becomes of a text that is too long, or that cannot be harvested."""

    where: Where
    context: int | None
    long: Long
    unfit: Unfit

    def __post_init__(self) -> None:
        if self.where.pos is GENERATED:
            raise BadHook(
                "pos=hk.GENERATED: a harvest reads texts and generates none; give their tokens as the texts"
            )
        if self.context is not None and self.context < 2:
            raise BadHook(
                f"context={self.context!r}: give how many tokens a row may have, at least 2"
            )
        for word, value, known in (
            ("long", self.long, ("error", "truncate", "split")),
            ("unfit", self.unfit, ("error", "skip")),
        ):
            if value not in known:
                raise BadHook(f"{word}={value!r} is unknown: say {' or '.join(map(repr, known))}")


@dataclass(frozen=True, slots=True)
class Read:
    """A row of tokens that the model reads: a text, or a piece of one; and the positions that are wanted of it."""

    text: int
    piece: int
    ids: Row
    places: PositionRange
    left_out: int  # texts before it, behind the last read, that gave no row
    stream: str  # the sha256 of all texts up to this one


class Cursor:
    """Goes through texts once, from the first to the last, and knows which it has seen.

    `text` is the number of the last text taken, `digest` the sha256 of all texts up to it, `left_out` the number of
    texts since the last read that gave no row.
    """

    def __init__(self, lm: LM, texts: TextsLike, rules: Rules) -> None:
        self.lm, self.rules = lm, rules
        self.text, self.left_out = -1, 0
        self._items = items(texts)
        self._hash = hashlib.sha256()
        self._pending: deque[Read] = deque()

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def read(self) -> Read | None:
        """The next row for the model; None behind the last text."""
        while not self._pending:
            content = self._take()
            if content is None:
                return None
            self._pending.extend(self._reads(content))
            if not self._pending:
                self.left_out += 1
        self.left_out = 0
        return self._pending.popleft()

    def skip(self, text: int, piece: int, digest: str) -> None:
        """Go behind a piece of a text, or raise `HarvestChanged` if the texts up to it are not those of the digest."""
        first = self.text + 1
        content: str | Row | None = None
        while self.text < text:
            self._pending.clear()
            content = self._take()
            if content is None:
                raise HarvestChanged(
                    f"the folder has a harvest of {text + 1} texts or more, and only {self.text + 1} were given: give "
                    "the same texts in the same order to go on, or another folder"
                )
        if self.digest != digest:
            raise HarvestChanged(
                f"texts {min(first, text)} to {text} are not those that the folder's harvest has: give the same texts "
                "in the same order to go on, or another folder"
            )
        if content is not None and self.rules.long == "split":
            self._pending.extend(self._reads(content))
        while self._pending and self._pending[0].piece <= piece:
            self._pending.popleft()
        self.left_out = 0

    def at_end(self) -> bool:
        """True if no text is left. One is taken if there is."""
        return not self._pending and self._take() is None

    def _take(self) -> str | Row | None:
        """The next text as it was given, told to the hash."""
        item = next(self._items, END)
        if item is END:
            return None
        self.text += 1
        found = content(item, self.text)
        is_text = isinstance(found, str)
        data = found.encode("utf-8", "surrogatepass") if is_text else json.dumps(found).encode()
        self._hash.update(f"{'text' if is_text else 'ids'} {len(data)} ".encode() + data)
        return found

    def _reads(self, content: str | Row) -> list[Read]:
        """The rows of a text that have positions wanted; none for a text that is left out."""
        ids = _tokens(self.lm, content, self.text)
        try:
            rows = _cut(self.lm, ids, self.rules, self.text)
            wanted = [self._places(row) for row in rows]
        except (BadPrompt, BadHook, OutOfRange) as error:
            if self.rules.unfit == "skip":
                return []
            said = str(error) if isinstance(error, BadPrompt) else f"text {self.text}: {error}"
            raise type(error)(
                f"{said}. unfit='skip' leaves out every text that cannot be harvested"
            ) from None
        pieces = [piece for piece, some in enumerate(wanted) if some]
        return [
            Read(
                self.text,
                piece,
                rows[piece],
                wanted[piece],
                0 if number else self.left_out,
                self.digest,
            )
            for number, piece in enumerate(pieces)
        ]

    def _places(self, row: Row) -> PositionRange:
        return places(row, self.rules.where, lambda at: cover(self.lm, row, at))


def items(texts: TextsLike) -> Iterator[Any]:
    """The texts one after the other: the lines of a file, or what an iterable gives."""
    if isinstance(texts, str | os.PathLike):
        return _lines(as_path(texts))
    if isinstance(texts, Mapping) and "input_ids" in texts:
        return iter(prompt_rows(texts))
    if isinstance(texts, Iterable) and not isinstance(texts, Mapping):
        refuse_container(texts, rows=True)
        if is_one_row(texts):
            return iter(prompt_rows(texts))
    else:
        raise BadPrompt(
            f"texts is a {type(texts).__name__}: give a list or another iterable of texts or of rows of token ids, or "
            "the path of a file with a text a line (.txt, .jsonl)"
        )
    return iter(texts)


def as_path(texts: str | os.PathLike[str]) -> Path:
    """The path of a file of texts, or `BadPrompt` where there is none."""
    try:
        there = Path(texts).is_file()
    except (OSError, ValueError):  # a text far too long for a name
        there = False
    if not there:
        raise BadPrompt(
            f"{shortened(str(texts))!r} is no file of texts: give the path of one with a text a line (.txt, .jsonl), "
            "or for one text the list [text]"
        )
    return Path(texts)


def how_many(texts: TextsLike) -> int | None:
    """How many texts there are, where that can be told without reading them as texts."""
    if isinstance(texts, str | os.PathLike):
        with as_path(texts).open("rb") as file:
            return sum(1 for _ in file)
    if is_one_row(texts) or (isinstance(texts, Mapping) and "input_ids" in texts):
        return len(prompt_rows(texts))
    return len(texts) if hasattr(texts, "__len__") else None  # pyright: ignore[reportArgumentType]


def _lines(path: Path) -> Iterator[Any]:
    with path.open("rb") as file:
        for number, line in enumerate(file):
            try:
                words = line.removesuffix(b"\n").removesuffix(b"\r")
                yield (
                    json_of(words, "it", finite=False)
                    if path.suffix == ".jsonl"
                    else words.decode("utf-8")
                )
            except (ValueError, BadFile) as error:  # no UTF-8, or no JSON
                kind = "JSON" if path.suffix == ".jsonl" else "text in UTF-8"
                raise BadPrompt(
                    f"text {number}: line {number + 1} of {path.name} is no {kind}: {error}"
                ) from error


def content(item: Any, number: int) -> str | Row:
    """What was given as one text: the text itself, or its token ids."""
    if isinstance(item, Mapping) and "text" not in item and "input_ids" not in item:
        raise BadPrompt(
            f"text {number} has {', '.join(map(repr, item)) or 'nothing'}, and neither 'text' nor 'input_ids': "
            "give the column that is meant, as (row['content'] for row in texts)"
        )
    if isinstance(item, Mapping) and "text" in item:
        item = item["text"]
    try:
        return one_prompt(item, number)
    except BadPrompt as error:
        raise BadPrompt(
            f"text {number}, {shortened(repr(item))}, is no text: give texts, or rows of token ids ({error})"
        ) from error


def _tokens(lm: LM, content: str | Row, number: int) -> Row:
    if isinstance(content, str):
        if lm.tokenizer is None:
            raise BadPrompt(
                f"text {number} is text, and this model came without a tokenizer: give rows of token ids"
            )
        ids = (
            tuple(lm.tokenizer.encode(content, verbose=False)) if content else ()
        )  # verbose: of long texts
    else:
        ids = content
    vocab = lm.sizes["vocab"]
    if vocab is not None and ids and not 0 <= min(ids) <= max(ids) < vocab:
        wrong = next(i for i in ids if not 0 <= i < vocab)
        raise BadPrompt(
            f"text {number} has token id {wrong}, and the vocabulary has ids 0 to {vocab - 1}: give the model the "
            "tokenizer that the texts were read with, or the texts its own tokens"
        )
    return ids


def _cut(lm: LM, ids: Row, rules: Rules, number: int) -> list[Row]:
    """A text's tokens as rows that fit the context. Every piece begins with the token that begins texts, if it did."""
    if not ids:
        raise BadPrompt(f"text {number} is empty: the model needs at least one token to read")
    most = rules.context
    if most is None or len(ids) <= most:
        return [ids]
    if rules.long == "error":
        raise BadPrompt(
            f"text {number} has {len(ids)} tokens, and {most} is the most that is read: say long='truncate' for their "
            "first ones, or long='split' for pieces"
        )
    if rules.long == "truncate":
        return [ids[:most]]
    begin = ids[:1] if ids[0] == getattr(lm.tokenizer, "bos_token_id", None) else ()
    step = most - len(begin)
    return [(*begin, *ids[start : start + step]) for start in range(len(begin), len(ids), step)]


def places(ids: Sequence[int], where: Where, find: Callable[[At], Row]) -> PositionRange:
    """The positions of a row that are wanted. One that it does not have raises; a slice takes those that there are."""
    wanted = wish(where, len(ids), find)
    if isinstance(wanted, range):
        return range(wanted.start, max(wanted.start, min(wanted.stop, len(ids))), wanted.step)
    if wanted[-1] >= len(ids):
        raise OutOfRange(
            f"position {wanted[-1]} was asked for, and it has {len(ids)} tokens: 0 to {len(ids) - 1}"
        )
    return wanted


def context_of(lm: LM, asked: int | None) -> int | None:
    """How many tokens of a text are read at most: what was asked for, or the model's own limit."""
    if lm.context is not None and asked is not None and asked > lm.context:
        raise BadHook(
            f"context={asked} was asked for, and the model's is {lm.context}: give that or less"
        )
    return lm.context if asked is None else asked


LOOK_AHEAD = 16  # batches in a window


@dataclass(frozen=True)
class Window:
    """Rows in the order of the texts. `starts[i]` is the number of positions wanted before row i."""

    reads: tuple[Read, ...]

    @property
    def starts(self) -> list[int]:
        return [0, *accumulate(len(read.places) for read in self.reads)][:-1]

    @property
    def rows(self) -> int:
        """How many positions are wanted, which is how many rows of values come of it."""
        return sum(len(read.places) for read in self.reads)

    @property
    def tokens(self) -> int:
        return sum(len(read.ids) for read in self.reads)

    @property
    def left_out(self) -> int:
        return sum(read.left_out for read in self.reads)


def next_window(cursor: Cursor, *, room: float, tokens: int) -> Window | None:
    """The next rows: until they have this many tokens, or fill the room for values. None behind the last text."""
    reads: list[Read] = []
    read_tokens = rows = 0
    while read_tokens < tokens and rows < room:
        read = cursor.read()
        if read is None:
            break
        reads.append(read)
        read_tokens, rows = read_tokens + len(read.ids), rows + len(read.places)
    return Window(tuple(reads)) if reads else None


def batches(window: Window, tokens: int, *, one_length: bool = False) -> list[list[int]]:
    """The numbers of the window's rows in batches of at most so many tokens, padding included, the longest rows first.

    A row that is longer than that has a batch of its own. `one_length` is for models that take no mask.
    """
    lengths = [len(read.ids) for read in window.reads]
    found: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        width = lengths[found[-1][0]] if found else 0
        fits = (
            bool(found)
            and width * (len(found[-1]) + 1) <= tokens
            and (not one_length or width == lengths[number])
        )
        if fits:
            found[-1].append(number)
        else:
            found.append([number])
    return found
