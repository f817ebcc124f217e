"""The tokens of a model: from text to ids and back, with or without a tokenizer."""

import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache, cached_property
from typing import Any, TypeAlias

from ..arguments import as_integer, as_items, as_number, describe
from ..errors import NotOneToken

Token: TypeAlias = str | int
HALF_CHARACTER = "�"  # how a part of a character is decoded
SPACE = "▁"  # sentencepiece writes a space as this character
MAX_PROMPTS, MAX_TOKENS = 200, 1000  # that a table keeps as texts
BYTE_PIECE = re.compile("<0x[0-9A-Fa-f]{2}>")  # sentencepiece's name of a single byte
# Texts that are put before another one, to tokenize it as a continuation.
ANCHORS = ("\n", ":", "|", "=", "1", "é", "a")


class Vocabulary(ABC):
    """The tokens of a model as methods of its `LM`, with or without a tokenizer."""

    tokenizer: Any

    @property
    @abstractmethod
    def sizes(self) -> dict[str, int | None]:
        """The length of each axis that the model fixes; None where the family has no such axis."""

    @cached_property
    def n_tokens(self) -> int:
        """The number of real tokens. Rows of the vocabulary after them are never ranked."""
        rows = self.sizes["vocab"] or 0
        if self.tokenizer is None:
            return rows
        return min(rows, max(self.tokenizer.get_vocab().values()) + 1)

    def token(self, token: Token) -> int:
        """Returns the id of one token, from its text or from the id itself.

        Text that is not exactly one token raises `NotOneToken`, which shows the pieces and the
        nearest spellings that are one.
        """
        token = check_token(token)
        if isinstance(token, str):
            return self._token_of_text(token)
        if token >= self._n_rows:
            raise NotOneToken(
                f"token {token} was asked for, and the vocabulary has ids 0 to {self._n_rows - 1}"
            )
        return token

    @property
    def _n_rows(self) -> int:
        """The number of rows of the vocabulary, or a huge number where it is not known."""
        return self.sizes["vocab"] or sys.maxsize

    def _token_of_text(self, text: str) -> int:
        if self.tokenizer is None:
            raise NotOneToken(
                f"{text!r} is text, and this model came without a tokenizer: give token ids"
            )
        token_id, ids = self._token_and_pieces(text)
        if max(ids, default=0) >= self._n_rows:
            raise NotOneToken(
                f"{text!r} is token {max(ids)} of the tokenizer, and the model has ids 0 to "
                f"{self._n_rows - 1}: give the LM the model's own tokenizer"
            )
        if token_id is None:
            pieces = " + ".join(map(repr, map(self.string, ids)))
            spellings = ", ".join(map(repr, self._one_token_spellings(text, ids)))
            raise NotOneToken(
                f"{text!r} is {len(ids)} tokens here ({pieces or 'nothing'}), and one is meant. "
                f"One token each: {spellings or 'no near spelling, so give an id'}."
            )
        return token_id

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a text, without the special tokens that begin a prompt."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def continuation(self, text: str) -> list[int]:
        """Returns the token ids of a text that continues another one.

        Its leading space, or none, is kept as it is, also where the tokenizer puts a space before
        every text.
        """
        if not text or not self._adds_space:
            return self.encode(text)
        # The text is tokenized after an anchor text, whose tokens are removed.
        for anchor in ANCHORS:
            anchor_ids, all_ids = self.encode(anchor), self.encode(anchor + text)
            ids = all_ids[len(anchor_ids) :]
            is_prefix = bool(anchor_ids) and all_ids[: len(anchor_ids)] == anchor_ids
            if is_prefix and self.added(anchor_ids, ids) == text:
                return ids
        raise NotOneToken(
            f"this tokenizer puts a space before {text!r} or joins it to the text before it, so "
            "its own tokens are not known: give token ids"
        )

    @cached_property
    def _adds_space(self) -> bool:
        """True if the tokenizer puts a space before a text, as sentencepiece does."""
        first = self.tokenizer.convert_ids_to_tokens(self.encode("a")[:1])
        return bool(first) and str(first[0]).startswith(SPACE)

    def _one_token_spellings(self, text: str, ids: list[int]) -> list[str]:
        bare = text.strip()
        candidates: list[str] = []
        cases = (bare, bare.lower(), bare.capitalize(), bare.upper(), *bare.split())
        for case in filter(None, cases):
            candidates += [f" {case}", case]
        candidates += map(self.string, ids)
        spellings: list[str] = []
        for spelling in dict.fromkeys(filter(None, candidates)):
            token_id, _ = self._token_and_pieces(spelling)
            if token_id is not None and token_id < self._n_rows:
                spellings.append(spelling)
        return spellings

    def _token_and_pieces(self, text: str) -> tuple[int | None, list[int]]:
        """Returns the token that a text is, or None, and the tokens of the text."""
        try:
            ids = self.continuation(text)
        except NotOneToken:
            ids = self.encode(text)
        if len(ids) == 1 and self.string(ids[0]) == text:
            return ids[0], ids
        token_id = self.tokenizer.convert_tokens_to_ids(text.replace(" ", SPACE))
        if isinstance(token_id, int) and self.string(token_id) == text:
            return token_id, ids
        return None, ids

    def string(self, token_id: int) -> str:
        """Returns the text of one token, its leading space included.

        The bytes of a token that is a part of a character are written as in sentencepiece:
        `<0xE2><0x80>`. Without a tokenizer, this is the id in angle brackets.
        """
        if self.tokenizer is None:
            return f"<{token_id}>"
        if token_id >= self.n_tokens:
            return f"<unused {token_id}>"
        text = self.text([token_id])
        piece = str(self.tokenizer.convert_ids_to_tokens(token_id))
        # Sentencepiece tokenizers drop a leading space when they decode.
        if piece.startswith(SPACE):
            return f" {text.removeprefix(' ')}"
        data = _bytes_of(piece) if HALF_CHARACTER in text else None
        return _text_of_bytes(data) if data else text or f"<empty {token_id}>"

    @cached_property
    def strings(self) -> list[str]:
        """The text of every token, as `string` returns it."""
        return list(map(self.string, range(self.n_tokens)))

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The UTF-8 bytes that each token adds to a text, its leading space included.

        A special token, which is no part of the text, is one zero byte.
        """
        anchor = self.encode("a")[-1:]
        pairs = [[*anchor, token_id] for token_id in range(self.n_tokens)]
        texts = self.tokenizer.batch_decode(
            pairs, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        start, special_ids = self.text(anchor), self._special_ids
        pieces = self.tokenizer.convert_ids_to_tokens(list(range(self.n_tokens)))
        result: list[bytes] = []
        for token_id, (text, piece) in enumerate(zip(texts, pieces, strict=True)):
            is_special = token_id in special_ids
            result.append(_added_bytes(text.removeprefix(start), str(piece), is_special=is_special))
        return result

    @property
    def _special_ids(self) -> set[int]:
        special_ids = set(self.tokenizer.all_special_ids)
        for token_id, token in self.tokenizer.added_tokens_decoder.items():
            if token.special:
                special_ids.add(token_id)
        return special_ids

    def added(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """Returns the text that tokens add after others.

        The two texts together are the text of all tokens.
        """
        if not ids:
            return ""
        if not before:
            return self.text(ids)
        start, whole = self.text(before), self.text([*before, *ids])
        if not whole.startswith(start):
            start = start.rstrip(HALF_CHARACTER)
        return whole[len(start) :] if whole.startswith(start) else self.text(ids)

    def text(self, ids: Sequence[int]) -> str:
        """Returns the text of a row of tokens, special tokens included."""
        if self.tokenizer is None:
            return " ".join(map(self.string, ids))
        return self.tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )


def _bytes_of(piece: str) -> bytes | None:
    """Returns the bytes of a piece of a byte-level vocabulary, or of sentencepiece's <0xF0>."""
    if BYTE_PIECE.fullmatch(piece):
        return bytes([int(piece[3:5], 16)])
    try:
        return bytes(map(_byte_letters().__getitem__, piece))
    except KeyError:
        return None


@cache
def _byte_letters() -> dict[str, int]:
    """Returns the byte of each letter of GPT-2's vocabulary.

    A printable byte is its own letter. The other bytes are the letters from 256 on.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    unprintable = sorted(set(range(256)) - printable)
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + number): byte for number, byte in enumerate(unprintable)}


def _text_of_bytes(data: bytes) -> str:
    """Returns the characters of the bytes, with the bytes that are no character as <0xF0>."""
    text = ""
    while data:
        try:
            return text + data.decode()
        except UnicodeDecodeError as error:
            wrong_bytes = map("<0x{:02X}>".format, data[error.start : error.end])
            text += data[: error.start].decode() + "".join(wrong_bytes)
            data = data[error.end :]
    return text


def check_token(value: object, name: str = "token") -> str | int:
    """Returns one token: its text, or its id as an int."""
    if isinstance(value, str):
        if not value:
            raise NotOneToken(f"{name}='' is no token: give its text, such as ' coffee', or its id")
        return str(value)
    number = as_integer(value)
    if number is None:
        raise NotOneToken(
            f"{name}={describe(value)} is no token: give its text, such as ' coffee', "
            f"or its id{_token_hint(value)}"
        )
    if number < 0:
        raise NotOneToken(f"{name}={number} is no token: ids count from 0 upwards")
    return number


def _token_hint(value: object) -> str:
    """Returns the end of the message about a value that is no token."""
    if isinstance(value, bytes):
        return "; bytes are no text: decode them first, value.decode()"
    if as_number(value) is not None:
        return "; an id is a whole number, int(value)"
    if hasattr(value, "spellings"):
        return "; a word has several spellings, and one token is meant here"
    if as_items(value) is not None:
        return (
            "; several are given where one token is meant: for a token of each prompt, give a "
            "hook for each, with rows=0, rows=1 …"
        )
    return ""


def check_tokens(
    values: object, name: str = "tokens", *, also: tuple[type, ...] = ()
) -> tuple[Any, ...]:
    """Returns one token or several, in order. Values of the types `also`, such as words, pass."""
    items = as_items(values)
    if items is None:
        items = [values]
    tokens: list[Any] = []
    for item in items:
        tokens.append(item if isinstance(item, also) else check_token(item, name))
    return tuple(tokens)


def _added_bytes(text: str, piece: str, *, is_special: bool) -> bytes:
    """Returns the bytes of a token from its text and its piece; one zero byte if it is special."""
    is_byte = BYTE_PIECE.fullmatch(piece) is not None
    if is_special and not is_byte:
        return b"\0"
    if is_byte or HALF_CHARACTER in text:
        return _bytes_of(piece) or text.encode()
    return text.encode()


def different_tokens(first: Vocabulary, second: Vocabulary) -> dict[int, tuple[str, str]]:
    """Returns the ids that name another token in each of two tokenizers, with both names.

    Empty if one of the two has no tokenizer.
    """
    if first.tokenizer is None or second.tokenizer is None or first.tokenizer is second.tokenizer:
        return {}
    tables: list[dict[int, str]] = []
    for vocabulary in (first, second):
        ids = vocabulary.tokenizer.get_vocab()
        tables.append({number: word for word, number in ids.items()})
    one, other = tables
    missing = "not there"
    different = sorted(dict(one.items() ^ other.items()))
    return {number: (one.get(number, missing), other.get(number, missing)) for number in different}


def turn_texts(lm: Vocabulary, row: Sequence[int]) -> list[tuple[str, str]]:
    """Returns the role and the text of each message of a chat; nothing for other prompts."""
    turns = getattr(row, "turns", ())
    texts: list[tuple[str, str]] = []
    for number, role in enumerate(getattr(row, "speakers", ())):
        ids = [token_id for token_id, turn in zip(row, turns, strict=False) if turn == number]
        texts.append((role, lm.text(ids)))
    return texts if turns else []


def prompt_text(lm: Vocabulary, row: Sequence[int]) -> str:
    """Returns a prompt as titles show it: of a chat its messages, without the template."""
    texts = [f"{role}: {text}" for role, text in turn_texts(lm, row)]
    return " ".join(texts) or lm.text(row)


def describe_prompts(
    lm: Vocabulary, rows: Sequence[Sequence[int]], *, tokens: bool = False
) -> dict[str, list[Any]]:
    """Returns the prompts of a table for its `attrs`, which figures and pages show.

    `prompts` are their texts, and with `tokens`, `tokens` the texts of their tokens. Of many
    prompts, or of long ones, nothing is kept.
    """
    if len(rows) > MAX_PROMPTS:
        return {}
    attrs: dict[str, list[Any]] = {"prompts": [prompt_text(lm, row) for row in rows]}
    if tokens and sum(map(len, rows)) <= MAX_TOKENS:
        attrs["tokens"] = [list(map(lm.string, row)) for row in rows]
    return attrs
