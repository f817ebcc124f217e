"""Words: a word in all its spellings, and the tokens that would complete it in a text.

    hk.ban(hk.word("coffee"))                  # in no spelling, and with no other tokens
    hk.force(hk.word(" a cup of tea", exact=True))
    hk.ranks(run, watch=hk.word("coffee"))     # a row for each spelling of one token

A model writes a word in many ways: after a space or not, in capitals, and each time as one token or
as several. `Word` knows the spellings, and `WordEnds` finds the tokens that complete one of them.
It works on the bytes of the text, since a token may hold a part of a character.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from ..arguments import as_bool, check_bool, check_keywords, describe
from ..errors import BadHook, EmptySelection, NotOneToken
from .tokens import Token, check_tokens

if TYPE_CHECKING:
    from .lm import LM

# Scripts without spaces between words, by the start of their characters' names in Unicode.
UNSPACED_SCRIPTS = (
    "CJK", "HIRAGANA", "KATAKANA", "BOPOMOFO", "IDEOGRAPHIC", "THAI", "LAO", "KHMER", "MYANMAR",
    "TIBETAN",
)  # fmt: skip
HISSING = ("s", "x", "z", "ch", "sh")  # the ends of words with the plural "es"
SPARE_TOKENS = 8  # read before a word, for the character before it and tokens without text


@dataclass(frozen=True)
class Word:
    """A word in all its spellings, an exact text, or tokens in a row. `word` returns it."""

    text: str | tuple[Token, ...]
    exact: bool = False
    plural: bool | str = False
    may_continue: bool = False

    def __post_init__(self) -> None:
        is_text = isinstance(self.text, str)
        text = str(self.text) if is_text else check_tokens(self.text, "word")
        if not text or (is_text and not self.exact and not str(text).strip()):
            raise BadHook("word() has no token: give a text, or tokens")
        object.__setattr__(self, "text", text)
        self._check_switch("exact")
        self._check_switch("may_continue")
        self._check_plural()
        self._check_spellings()

    def _check_switch(self, name: str) -> None:
        object.__setattr__(self, name, check_bool(getattr(self, name), name))

    def _check_plural(self) -> None:
        plural = as_bool(self.plural)
        if plural is None and not (isinstance(self.plural, str) and self.plural.strip()):
            raise BadHook(
                f"plural={describe(self.plural)}: give True for the regular English plural, or "
                "the plural itself, such as 'mice'"
            )
        object.__setattr__(self, "plural", str(self.plural) if plural is None else plural)

    def _check_spellings(self) -> None:
        """Raises `BadHook` for settings that an exact text does not have, and for spaces."""
        fixed = self.exact or not isinstance(self.text, str)
        if fixed and (self.plural or self.may_continue):
            raise BadHook(
                f"{self!r} is one exact text, inside longer words too: leave plural and "
                "may_continue out"
            )
        if self.exact and not isinstance(self.text, str):
            raise BadHook(f"{self!r}: tokens are exact already: leave exact out")
        bare = str(self.text).strip()
        if not fixed and self.text != bare:
            raise BadHook(
                f"{self!r} begins or ends with a space: give {bare!r} for all spellings, with a "
                "space and without, or exact=True for this text as it is"
            )

    def __repr__(self) -> str:
        text = self.text if isinstance(self.text, str) else list(self.text)
        settings = ""
        for name in ("exact", "plural", "may_continue"):
            if value := getattr(self, name):
                settings += f", {name}={value!r}"
        return f"word({text!r}{settings})"

    @property
    def texts(self) -> tuple[str, ...]:
        """The text in each case, and its plural, without a space before it."""
        if not isinstance(self.text, str):
            return ()
        if self.exact:
            return (self.text,)
        forms = [self.text]
        if self.plural:
            forms.append(_plural(self.text) if self.plural is True else str(self.plural))
        texts: list[str] = []
        for form in forms:
            texts += [form, form.lower(), _capitalised(form), form.upper()]
        return tuple(dict.fromkeys(texts))

    def spellings(self, lm: LM) -> dict[str, list[str]]:
        """Returns the tokens of each spelling in this model, with and without a leading space.

        >>> word("coffee").spellings(lm)["coffee"]
        ['co', 'ff', 'ee']
        """
        pieces: dict[str, list[str]] = {}
        for text in self.spaced_texts():
            pieces[text] = list(map(lm.string, _ids_of_text(lm, text, self)))
        return pieces

    def spaced_texts(self) -> list[str]:
        """Returns the texts with a space before them and without; an exact text as it is."""
        if self.exact:
            return list(self.texts)
        texts: list[str] = []
        for text in self.texts:
            texts += [f" {text}", text]
        return texts

    def ids(self, lm: LM) -> list[int]:
        """Returns the tokens that `force` writes: the text as it was given, after a space."""
        if not isinstance(self.text, str):
            return list(map(lm.token, self.text))
        has_space = not self.exact and _continues_word(self.text[0])
        return _ids_of_text(lm, f" {self.text}" if has_space else self.text, self)

    def token_ids(self, lm: LM) -> list[int]:
        """Returns the spellings that are one token. Raises `NotOneToken` if there is none."""
        ids = self._one_token_ids(lm)
        if not ids:
            pieces = " + ".join(map(repr, map(lm.string, self.ids(lm))))
            raise NotOneToken(
                f"{self!r} has no spelling of one token here ({pieces}), and single tokens are "
                "meant: only force and ban take several tokens in a row, so name one of these "
                "tokens"
            )
        return ids

    def edited_ids(self, lm: LM) -> list[int]:
        """Returns the tokens by which tables show an edit of the word."""
        return self._one_token_ids(lm) or self.ids(lm)

    def _one_token_ids(self, lm: LM) -> list[int]:
        if not isinstance(self.text, str):
            ids = self.ids(lm)
            return ids if len(ids) == 1 else []
        _require_tokenizer(lm, self)
        token_ids: list[int] = []
        for text in self.spaced_texts():
            try:
                token_ids.append(lm.token(text))
            except NotOneToken:
                continue
        return list(dict.fromkeys(token_ids))


WordLike: TypeAlias = Token | Word


@check_keywords
def word(
    text: str | Sequence[Token],
    *,
    exact: bool = False,
    plural: bool | str = False,
    may_continue: bool = False,
) -> Word:
    """Returns a word in all its spellings: as given, in lower case, Capitalised and in CAPITALS,
    each with and without a space before it.

    `plural=True` adds the regular English plural; `plural="mice"` names another one.

    `ban` makes the text never have the word as a whole word, whatever tokens it is made of: it bans
    each token that would complete a spelling, after the prompt's text too. A single token of a
    longer word, such as " teacher" for "tea", stays possible. Longer words that the tokenizer
    spells with the word's own tokens (" coffee" + "house") are no longer written in this way. With
    `may_continue=True` they are: " coffee" may be written, and what is banned after it is every
    token with which the word would end there (a space, a punctuation mark, the end of the text).
    The probability of " coffee" then goes to longer words, and a text that ends at
    `max_new_tokens` may end with the word.

    `force` writes the word as it was given, with a space before it. `boost`, `cap`, `restrict`,
    `watch=` and the metrics `prob`, `logprob` and `rank` mean the spellings that are one token, and
    raise `NotOneToken` if there is none. `swap`, `set_rank`, `logit` and `logit_diff` mean one
    token, and take no word.

    `exact=True` means this text only, as it stands, inside longer words too, for `force` and `ban`;
    a text in the middle of a line usually begins with a space. Tokens in a list, as texts or ids,
    are meant as they are: `ban` bans the last one after the others.

    In Thai, Chinese, Japanese and other scripts without spaces a word may begin and end anywhere.

    >>> word("coffee").spellings(lm)[" coffee"]
    [' coffee']
    >>> print(ban(word("coffee", plural=True)), force(word(" a cup of tea", exact=True)))
    ban(word('coffee', plural=True)) force(word(' a cup of tea', exact=True))
    """
    return Word(text, exact, plural, may_continue)  # pyright: ignore[reportArgumentType]


def token_ids(lm: LM, tokens: Iterable[WordLike]) -> list[int]:
    """Returns the ids of tokens and of words' spellings of one token, each once."""
    ids: list[int] = []
    for token in tokens:
        ids += token.token_ids(lm) if isinstance(token, Word) else [lm.token(token)]
    return list(dict.fromkeys(ids))


def check_words(values: object, name: str) -> tuple[WordLike, ...]:
    """Returns one token or word, or several, in order."""
    return check_tokens(values, name, also=(Word,))


def tokens_in_table(values: object, name: str, texts: Iterable[str]) -> list[Token]:
    """Returns the tokens, with a word as those of its spellings that are among a table's texts."""
    known_texts = set(texts)
    tokens: list[Token] = []
    for token in check_words(values, name):
        if not isinstance(token, Word):
            tokens.append(token)
            continue
        spellings = [text for text in token.spaced_texts() if text in known_texts]
        if not spellings:
            raise EmptySelection(
                f"no spelling of {token!r} is in the table: watch it in the call that made the "
                "table too, or give top=None"
            )
        tokens += spellings
    return tokens


def _plural(text: str) -> str:
    """Returns the regular English plural."""
    lower = text.lower()
    if lower.endswith("y") and lower[-2:-1] not in "aeiou":
        return f"{text[:-1]}ies"
    return f"{text}es" if lower.endswith(HISSING) else f"{text}s"


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:].lower()


def _require_tokenizer(lm: LM, text: Word) -> None:
    if lm.tokenizer is None:
        raise NotOneToken(
            f"{text!r} is text, and this model came without a tokenizer: give token ids"
        )


def _ids_of_text(lm: LM, text: str, source: Word) -> list[int]:
    _require_tokenizer(lm, source)
    return lm.continuation(text)


# ---- the tokens that complete a word


class WordEnds:
    """Finds the tokens that would complete a word after some text.

    It owns lists of tokens, which it collects from the vocabulary when they are first needed.
    """

    def __init__(self, lm: LM, target: Word) -> None:
        _require_tokenizer(lm, target)
        self._bytes = lm.token_bytes
        self._exact, self._may_continue = target.exact, target.may_continue
        self._spellings = _encoded_spellings(target)
        self.n_read = max(map(len, self._spellings)) + SPARE_TOKENS  # tokens that `after` needs
        self._inside: list[int] = []  # tokens with the whole word and its start
        self._at_start: list[tuple[bytes, int]] = []  # spellings, and tokens that begin with one
        self._collect()
        self.completing = functools.cache(self._completing)
        self.ending = functools.cache(self._ending)

    def _collect(self) -> None:
        for token_id, data in enumerate(self._bytes):
            for spelling in self._spellings:
                for start in _places_of(spelling, data):
                    self._add(token_id, spelling, start)

    def _add(self, token_id: int, spelling: bytes, start: int) -> None:
        """Adds a token to the lists if the word ends in it."""
        data = self._bytes[token_id]
        if not self._ends_here(spelling, data[start + len(spelling) :]):
            return
        if start == 0 and not self._exact:
            self._at_start.append((spelling, token_id))
        elif self._begins_here(data[:start], spelling):
            self._inside.append(token_id)

    def after(self, ids: Sequence[int]) -> list[int]:
        """Returns the tokens that complete the word after these, the last ones of the text."""
        text = b"".join(self._bytes[token_id] for token_id in ids if token_id < len(self._bytes))
        tokens = list(self._inside)
        for spelling, token_id in self._at_start:
            if self._begins_here(text, spelling):
                tokens.append(token_id)
        for spelling in self._spellings:
            tokens += self._completing_after(text, spelling)
            if self._may_continue:
                tokens += self._ending_after(text, spelling)
        return tokens

    def _completing_after(self, text: bytes, spelling: bytes) -> list[int]:
        """Returns the tokens that complete a spelling that has begun at the end of the text."""
        tokens: list[int] = []
        for length in range(1, len(spelling)):
            has_begun = text.endswith(spelling[:length])
            if has_begun and self._begins_here(text[:-length], spelling):
                tokens += self.completing(spelling, length)
        return tokens

    def _completing(self, spelling: bytes, length: int) -> list[int]:
        """Returns the tokens that complete a spelling after its first `length` bytes."""
        ending = spelling[length:]
        tokens = []
        for token_id, data in enumerate(self._bytes):
            if data.startswith(ending) and self._ends_here(spelling, data[len(ending) :]):
                tokens.append(token_id)
        return tokens

    def _ending_after(self, text: bytes, spelling: bytes) -> list[int]:
        """Returns the tokens that end a word which is complete, and which might have gone on."""
        for size in range(4):  # bytes of a character that is not complete
            before, part = text[: len(text) - size], text[len(text) - size :]
            if part and part[0] < 0xC0:
                continue
            start = before.removesuffix(spelling)
            if start != before and self._begins_here(start, spelling):
                return self.ending(part)
        return []

    def _ending(self, part: bytes) -> list[int]:
        """Returns the tokens with which the character after `part` is no part of a word."""
        tokens = []
        for token_id, data in enumerate(self._bytes):
            character = _first_character(part + data)
            if character and not _continues_word(character):
                tokens.append(token_id)
        return tokens

    def _begins_here(self, before: bytes, spelling: bytes) -> bool:
        """True if a word can begin after these bytes."""
        last = before[-4:].decode("utf-8", "ignore")[-1:]
        first = _first_character(spelling)
        return self._exact or not _continues_word(last) or not _continues_word(first)

    def _ends_here(self, spelling: bytes, after: bytes) -> bool:
        """True if the word is over before these bytes of the same token."""
        if self._exact or not _continues_word(spelling.decode()[-1]):
            return True
        character = _first_character(after)
        if not character:
            return not self._may_continue
        return not _continues_word(character)


def _places_of(spelling: bytes, data: bytes) -> Iterator[int]:
    """Yields where a spelling begins in the bytes of a token."""
    start = data.find(spelling)
    while start >= 0:
        yield start
        start = data.find(spelling, start + 1)


def _encoded_spellings(target: Word) -> tuple[bytes, ...]:
    """Returns the texts as bytes, with accents in one character and as characters of their own."""
    spellings: list[bytes] = []
    for text in target.texts:
        for form in ("NFC", "NFD"):
            spellings.append(unicodedata.normalize(form, text).encode())
    return tuple(dict.fromkeys(spellings))


def _first_character(data: bytes) -> str:
    """Returns the first character of UTF-8, or "" if it is not complete."""
    if not data:
        return ""
    lead, size = data[0], 1
    for size_of_character, smallest in ((2, 0xC0), (3, 0xE0), (4, 0xF0)):
        if lead >= smallest:
            size = size_of_character
    return data[:size].decode("utf-8", "replace")[0] if len(data) >= size else ""


@functools.lru_cache(maxsize=4096)
def _continues_word(character: str) -> bool:
    """True for a letter, a digit, an accent or _, unless its script has no spaces."""
    if not character:
        return False
    is_part = character.isalnum() or character == "_" or unicodedata.category(character)[0] == "M"
    return is_part and not unicodedata.name(character, "").startswith(UNSPACED_SCRIPTS)
