"""The tokens of a model: from text to ids and back, with or without a tokenizer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

from .arguments import token as as_token
from .errors import NotOneToken

Token: TypeAlias = str | int


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """A tokenizer, if there is one, and how to find out how many rows the model's vocabulary has, where that is known.

    The rows are counted when they matter first, since a model's family may have to be found out for that.
    """

    tokenizer: Any
    count: Callable[[], int | None]

    @cached_property
    def size(self) -> int | None:
        """How many rows the vocabulary has; None where that is not known."""
        return self.count()

    @cached_property
    def n_tokens(self) -> int:
        """How many rows of the vocabulary are real tokens."""
        if self.tokenizer is None:
            return self.size or 0
        return min(self.size or 0, max(self.tokenizer.get_vocab().values()) + 1)

    def token(self, token: Token) -> int:
        """The id of one token, given as text or as the id itself.

        Text that is not exactly one token raises `NotOneToken`, which shows the pieces and the nearest spellings that
        are one.
        """
        token = as_token(token)
        if not isinstance(token, str):
            if self.size is not None and token >= self.size:
                raise NotOneToken(f"token {token} was asked for, and the vocabulary has ids 0 to {self.size - 1}")
            return token
        if self.tokenizer is None:
            raise NotOneToken(f"{token!r} is text, and this model came without a tokenizer: give token ids")
        ids = self.encode(token)
        if self.size is not None and max(ids, default=0) >= self.size:
            raise NotOneToken(
                f"{token!r} is token {max(ids)} of the tokenizer, and the model has ids 0 to {self.size - 1}: give the "
                "LM the model's own tokenizer"
            )
        if len(ids) == 1 and self.string(ids[0]) == token:
            return ids[0]
        # sentencepiece's own way to write a space
        marked = self.tokenizer.convert_tokens_to_ids(token.replace(" ", "▁"))
        if isinstance(marked, int) and self.string(marked) == token:
            return marked
        pieces = " + ".join(repr(self.string(i)) for i in ids) or "nothing"
        raise NotOneToken(
            f"{token!r} is {len(ids)} tokens here ({pieces}), and one is meant. "
            f"One token each: {', '.join(map(repr, self._one_token_spellings(token, ids))) or 'no near spelling'}."
        )

    def encode(self, text: str) -> list[int]:
        """The ids of a text's tokens, without the special tokens that begin a prompt."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _one_token_spellings(self, text: str, ids: list[int]) -> list[str]:
        bare = text.strip()
        cases = dict.fromkeys([bare, bare.lower(), bare.capitalize(), bare.upper(), *bare.split()])
        tried = [space + case for case in cases if case for space in (" ", "")]
        single = [spelling for spelling in tried if len(self.encode(spelling)) == 1]
        return single or [self.string(i) for i in ids]

    def string(self, token_id: int) -> str:
        """The text of one token, its leading space kept. Without a tokenizer, the id in angle brackets."""
        if self.tokenizer is None:
            return f"<{token_id}>"
        if token_id >= self.n_tokens:
            return f"<unused {token_id}>"
        text = self.text([token_id])
        piece = self.tokenizer.convert_ids_to_tokens(token_id)
        # sentencepiece tokenizers drop a leading space when they decode
        return " " + text if isinstance(piece, str) and piece.startswith("▁") and not text.startswith(" ") else text

    def text(self, ids: Sequence[int]) -> str:
        """The text of a row of tokens, special tokens included."""
        if self.tokenizer is None:
            return " ".join(f"<{token_id}>" for token_id in ids)
        return self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
