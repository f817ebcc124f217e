"""Texts of a corpus as token sequences for the model, read once, in order and in constant memory.

A `TextReader` turns the texts of a list, an iterable or a file into `TokenSequence`s: a text or a
piece of one, with the positions that are kept. It reads windows of them, and `Window.batches`
groups a window by length, so that there is little padding. Which sequences share a batch decides
the last digits of the values: it follows from the texts and the settings alone.
"""

import hashlib
import json
import math
import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

from ...arguments import check_integer, describe
from ...errors import BadFile, BadHook, BadPrompt, HarvestChanged, OutOfRange
from ...files.untrusted import parse_json
from ...models.chat import KEYS, Chat
from ...models.lm import LM
from ...models.named_positions import find_positions
from ...models.positions import (
    GENERATED,
    Named,
    PositionRange,
    PosLike,
    Where,
    read_position,
    resolve_positions,
)
from ...models.prompt_row import crop_row, piece_of_row, row_as_json
from ...models.prompts import (
    Row,
    batches_by_length,
    check_prompt,
    check_prompts,
    is_token_row,
    refuse_non_prompts,
    shorten,
    tokenize,
)

TextsLike: TypeAlias = str | os.PathLike[str] | Iterable[Any]
Long: TypeAlias = Literal["error", "truncate", "split"]
OnError: TypeAlias = Literal["error", "skip"]

COLUMNS = ("text", "piece", "pos", "token", "read")  # of each row
TOKENS = ("ids", "starts")  # of each sequence
COLUMN_DTYPES: Mapping[str, torch.dtype] = {
    **dict.fromkeys((*COLUMNS, *TOKENS), torch.int32),
    "text": torch.int64,
    "starts": torch.int64,
}
LOOK_AHEAD = 16  # batches in a window
MAX_NAMED = 8  # texts that an error names
NO_TEXT = object()  # marks the end of the texts


@dataclass(frozen=True)
class Rules:
    """Which positions are kept, what happens to texts that are too long or cannot be read, and
    batches.

    `one_length` is for models that take no mask: all sequences of a batch are then equally long.
    """

    where: Where
    context: int | None
    long: Long
    on_error: OnError
    batch_tokens: int
    one_length: bool


def read_rules(
    lm: LM, pos: PosLike, context: int | None, long: Long, on_error: OnError, batch_tokens: int
) -> Rules:
    """Returns the rules of these arguments. The context is the model's own limit by default."""
    if context is not None:
        meaning = "how many tokens a row may have within the model's context,"
        most = lm.context or math.inf
        check_integer(context, "context", least=2, most=most, meaning=meaning, error=BadHook)
    where = Where(read_position(pos))
    if where.pos is GENERATED:
        raise BadHook(
            "pos=hk.GENERATED: a harvest reads texts and generates none; "
            "give their tokens as the texts"
        )
    meaning = "how many tokens run together,"
    check_integer(batch_tokens, "batch_tokens", least=1, meaning=meaning, error=BadHook)
    context = context or lm.context
    return Rules(where, context, long, on_error, batch_tokens, one_length=lm.config is None)


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """The tokens of a text, or of a piece of one, that the model reads together.

    positions  the positions that are kept
    left_out   the number of texts without a kept position between the sequence before and this one
    stream     the sha256 of all texts up to this one
    """

    text: int
    piece: int
    ids: Row
    positions: PositionRange
    left_out: int
    stream: str

    def __len__(self) -> int:
        """The number of tokens."""
        return len(self.ids)

    @property
    def rows(self) -> int:
        """The number of rows of values: one for each kept position."""
        return len(self.positions)


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences of one forward. A batch is never cut: it decides the last digits of values.

    `starts` has the number of each sequence's first row in its window.
    """

    sequences: tuple[TokenSequence, ...]
    starts: tuple[int, ...]

    @property
    def rows(self) -> Int[Tensor, " row"]:
        """The numbers of the rows in their window, a row for each kept position."""
        numbers: list[Tensor] = []
        for sequence, start in zip(self.sequences, self.starts, strict=True):
            numbers.append(torch.arange(start, start + sequence.rows))
        return torch.cat(numbers)

    def __str__(self) -> str:
        texts = sorted({sequence.text for sequence in self.sequences})
        names = ", ".join(map(str, texts[:MAX_NAMED]))
        if len(texts) == 1:
            return f"the batch of text {names}"
        if len(texts) > MAX_NAMED:
            names += f" and {len(texts) - MAX_NAMED} more"
        return f"the batch of texts {names}"


@dataclass(frozen=True, eq=False)
class Window:
    """Successive sequences, whose values are stored together in the order of the texts."""

    sequences: tuple[TokenSequence, ...]

    @property
    def rows(self) -> int:
        """The number of rows of values: one for each kept position."""
        return sum(sequence.rows for sequence in self.sequences)

    @property
    def left_out(self) -> int:
        return sum(sequence.left_out for sequence in self.sequences)

    def batches(self, rules: Rules) -> list[Batch]:
        """Returns the sequences in batches, the longest first.

        A batch has at most `batch_tokens` tokens with padding; a longer sequence has a batch of its
        own.
        """
        lengths = list(map(len, self.sequences))
        starts = [0, *accumulate(sequence.rows for sequence in self.sequences)]
        batches: list[Batch] = []
        for indices in batches_by_length(lengths, rules.batch_tokens, one_length=rules.one_length):
            sequences = tuple(self.sequences[index] for index in indices)
            batches.append(Batch(sequences, tuple(starts[index] for index in indices)))
        return batches

    def batches_in_order(self, rules: Rules) -> list[Batch]:
        """Returns the sequences in batches, in the order of the texts."""
        batches: list[Batch] = []
        group: list[TokenSequence] = []
        width = start = 0
        for sequence in self.sequences:
            new_width = max(width, len(sequence))
            is_full = new_width * (len(group) + 1) > rules.batch_tokens
            if group and (is_full or (rules.one_length and len(sequence) != width)):
                batches.append(_batch_in_order(group, start))
                start += sum(other.rows for other in group)
                group, new_width = [], len(sequence)
            group.append(sequence)
            width = new_width
        if group:
            batches.append(_batch_in_order(group, start))
        return batches


def _batch_in_order(sequences: Sequence[TokenSequence], start: int) -> Batch:
    """Returns a batch of successive sequences, the first of which has row `start` of its window."""
    starts = accumulate((sequence.rows for sequence in sequences[:-1]), initial=start)
    return Batch(tuple(sequences), tuple(starts))


class TextReader:
    """Reads texts once, from the first to the last, and keeps count of them.

    `text` is the number of the last text that was read, `digest` the sha256 of all texts up to it,
    and `left_out` the number of texts since the last sequence that had no position to keep. One
    harvest owns the reader.
    """

    def __init__(self, lm: LM, texts: TextsLike, rules: Rules) -> None:
        self.lm, self.rules = lm, rules
        self.text, self.left_out = -1, 0
        self._source = open_texts(texts)
        self._texts = iter(self._source)
        self._hash = hashlib.sha256()
        self._pending: deque[TokenSequence] = deque()

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    @property
    def count(self) -> int | None:
        """The number of all texts, or None if it is unknown before they are read."""
        return len(self._source) if isinstance(self._source, Sized) else None

    def read_window(self, max_rows: float = math.inf) -> Window | None:
        """Reads sequences for a few batches, up to `max_rows`. Returns None after the last text."""
        sequences: list[TokenSequence] = []
        tokens = rows = 0
        while tokens < LOOK_AHEAD * self.rules.batch_tokens and rows < max_rows:
            sequence = self.read()
            if sequence is None:
                break
            sequences.append(sequence)
            tokens += len(sequence)
            rows += sequence.rows
        return Window(tuple(sequences)) if sequences else None

    def read(self) -> TokenSequence | None:
        """Returns the next sequence, or None after the last text."""
        while not self._pending:
            content = self._next_content()
            if content is None:
                return None
            self._pending.extend(self._sequences(content))
            if not self._pending:
                self.left_out += 1
        self.left_out = 0
        return self._pending.popleft()

    def skip(self, text: int, piece: int, digest: str) -> None:
        """Skips texts up to this piece of a text.

        Raises `HarvestChanged` if `digest` is not that of the texts.
        """
        first = self.text + 1
        content: str | Chat | Row | None = None
        while self.text < text:
            self._pending.clear()
            content = self._next_content()
            if content is None:
                raise self.too_few_texts(text + 1)
        if self.digest != digest:
            raise HarvestChanged(
                f"texts {min(first, text)} to {text} are not those that the folder was made from: "
                "give the same texts in the same order to go on, or another folder"
            )
        if content is not None and self.rules.long == "split":
            self._pending.extend(self._sequences(content))
        while self._pending and self._pending[0].piece <= piece:
            self._pending.popleft()
        self.left_out = 0

    def too_few_texts(self, harvested: int) -> HarvestChanged:
        """Returns the error for a harvest in the folder that has more texts than were read."""
        return HarvestChanged(
            f"the folder was made from {harvested} texts or more, and only {self.text + 1} were "
            "given: give the same texts in the same order to go on, or another folder"
        )

    def _next_content(self) -> str | Chat | Row | None:
        """Returns the next text, chat or row of ids, and adds it to the hash."""
        item = next(self._texts, NO_TEXT)
        if item is NO_TEXT:
            return None
        self.text += 1
        content = text_or_ids(item, self.text)
        if isinstance(content, str):
            kind, data = "text", content.encode("utf-8", "surrogatepass")
        elif isinstance(content, Chat):
            kind, data = "chat", content.to_json().encode()
        else:
            kind, data = "ids", json.dumps(row_as_json(content)).encode()
        self._hash.update(f"{kind} {len(data)} ".encode() + data)
        return content

    def _sequences(self, content: str | Chat | Row) -> list[TokenSequence]:
        """Returns the sequences of a text that have positions to keep. A text left out has none."""
        try:
            ids = tokenize(self.lm, content)
        except BadPrompt as error:
            if isinstance(content, Chat) and self.rules.on_error == "skip":
                return []
            raise BadPrompt(f"text {self.text}: {error}") from error
        _check_ids(self.lm, ids, self.text)
        sequences: list[TokenSequence] = []
        left_out = self.left_out
        try:
            for piece, row in enumerate(_fit_to_context(self.lm, ids, self.rules, self.text)):
                find = partial(find_positions, self.lm, row)
                positions = positions_of_row(row, self.rules.where, find)
                if positions:
                    sequences.append(
                        TokenSequence(self.text, piece, row, positions, left_out, self.digest)
                    )
                    left_out = 0
        except (BadPrompt, BadHook, OutOfRange) as error:
            if self.rules.on_error == "skip":
                return []
            message = str(error)
            if not isinstance(error, BadPrompt):
                message = f"text {self.text}: {error}"
            raise type(error)(
                f"{message}. on_error='skip' leaves out every text that cannot be harvested"
            ) from None
        return sequences


# ---- sources of texts


@dataclass(frozen=True)
class TextFile:
    """The texts of a file: its lines, or in a .jsonl file the JSON of each."""

    path: Path

    def __len__(self) -> int:
        with self.path.open("rb") as file:
            return sum(1 for _ in file)

    def __iter__(self) -> Iterator[Any]:
        kind: str = "text in UTF-8"
        parse: Callable[[bytes], Any] = bytes.decode
        if self.path.suffix == ".jsonl":
            kind, parse = "JSON", partial(parse_json, name="it", finite=False)
        with self.path.open("rb") as file:
            for number, line in enumerate(file):
                try:
                    text = parse(line.removesuffix(b"\n").removesuffix(b"\r"))
                except (ValueError, BadFile) as error:
                    raise BadPrompt(
                        f"text {number}: line {number + 1} of {self.path.name} is no {kind}: "
                        f"{error}"
                    ) from error
                yield text


def open_texts(texts: TextsLike) -> Iterable[Any]:
    """Returns the texts of a file or the items of an iterable."""
    if isinstance(texts, str | os.PathLike):
        try:
            is_file = Path(texts).is_file()
        except (OSError, ValueError):  # the text is far too long for a name
            is_file = False
        if not is_file:
            raise BadPrompt(
                f"{shorten(str(texts))!r} is no file of texts: give the path of one with a text a "
                "line (.txt, .jsonl), or for one text the list [text]"
            )
        return TextFile(Path(texts))
    if isinstance(texts, Mapping) and "input_ids" in texts:
        return check_prompts(texts)
    if isinstance(texts, Mapping) or not isinstance(texts, Iterable):
        raise BadPrompt(
            f"texts={describe(texts)}: give a list or another iterable of texts or of "
            "rows of token ids, or the path of a file with a text a line (.txt, .jsonl)"
        )
    refuse_non_prompts(texts, rows=True)
    return check_prompts(texts) if is_token_row(texts) else texts


def text_or_ids(item: Any, number: int) -> str | Chat | Row:
    """Returns the text, chat or token ids of an item of the texts, which may be a mapping."""
    if isinstance(item, Mapping):
        if "text" in item:
            item = item["text"]
        elif "messages" in item:
            item = {name: item[name] for name in KEYS if name in item}
        elif "input_ids" not in item:
            names = ", ".join(map(repr, item)) or "nothing"
            raise BadPrompt(
                f"text {number} has {names}, and none of 'text', 'messages' and 'input_ids': "
                "give the column that is meant, as (row['content'] for row in texts)"
            )
    try:
        return check_prompt(item, number)
    except BadPrompt as error:
        raise BadPrompt(
            f"text {number}, {shorten(repr(item))}, is no text: "
            f"give texts, chats, or rows of token ids ({error})"
        ) from error


# ---- tokens and positions of a text


def _check_ids(lm: LM, ids: Row, number: int) -> None:
    vocab = lm.sizes["vocab"]
    for token_id in (min(ids, default=0), max(ids, default=0)):
        if vocab is not None and not 0 <= token_id < vocab:
            raise BadPrompt(
                f"text {number} has token id {token_id}, and the vocabulary has ids 0 to "
                f"{vocab - 1}: give the model the tokenizer that the texts were read with, or the "
                "texts its own tokens"
            )


def _fit_to_context(lm: LM, ids: Row, rules: Rules, number: int) -> list[Row]:
    """Returns the tokens of a text as rows that fit into the context.

    Every piece of a text begins with the bos token if the text does.
    """
    if not ids:
        raise BadPrompt(f"text {number} is empty: the model needs at least one token to read")
    context = rules.context
    if context is None or len(ids) <= context:
        return [ids]
    if rules.long == "error":
        raise BadPrompt(
            f"text {number} has {len(ids)} tokens, and {context} is the most that is read: say "
            "long='truncate' for their first ones, or long='split' for pieces"
        )
    if rules.long == "truncate":
        return [crop_row(ids, context)]
    bos = ids[:1] if ids[0] == getattr(lm.tokenizer, "bos_token_id", None) else ()
    step = context - len(bos)
    starts = range(len(bos), len(ids), step)
    return [piece_of_row(ids, len(bos), start, start + step) for start in starts]


def positions_of_row(
    ids: Sequence[int], where: Where, find: Callable[[Named], Row]
) -> PositionRange:
    """Returns the positions of a row that `where` selects.

    Raises `OutOfRange` for a position that the row does not have; a slice selects those that exist.
    """
    positions = resolve_positions(where, len(ids), find)
    if isinstance(positions, range):
        stop = max(positions.start, min(positions.stop, len(ids)))
        return range(positions.start, stop, positions.step)
    if positions[-1] >= len(ids):
        raise OutOfRange(
            f"position {positions[-1]} was asked for, and it has {len(ids)} tokens: "
            f"0 to {len(ids) - 1}"
        )
    return positions


def token_columns(sequences: Iterable[TokenSequence]) -> dict[str, Tensor]:
    """Returns the columns of the sequences' rows, and all their tokens: `COLUMNS` and `TOKENS`."""
    columns: defaultdict[str, list[int]] = defaultdict(list, starts=[0])
    for number, sequence in enumerate(sequences):
        count = len(sequence.positions)
        columns["text"] += [sequence.text] * count
        columns["piece"] += [sequence.piece] * count
        columns["pos"] += sequence.positions
        columns["token"] += [sequence.ids[position] for position in sequence.positions]
        columns["read"] += [number] * count
        columns["ids"] += sequence.ids
        columns["starts"].append(len(columns["ids"]))
    tensors: dict[str, Tensor] = {}
    for name, dtype in COLUMN_DTYPES.items():
        tensors[name] = torch.tensor(columns[name], dtype=dtype)
    return tensors
