"""The tokens of a model: from text to ids and back, with or without a tokenizer.

What a rank is, everywhere in hookkit: 1 + the number of tokens whose logit is strictly larger.

A logit that is NaN has no rank, and stands above all others, so that nothing is first beside it. In tensors of ranks
no rank is 0; in tables it is NaN, and the column then has floating-point numbers.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from ..arguments import read_token as as_token
from ..errors import NotOneToken

Token: TypeAlias = str | int
SPACE = "▁"  # sentencepiece's own way to write a space
ANCHORS = (
    "\n",
    ":",
    "|",
    "=",
    "1",
    "é",
    "a",
)  # texts to read another one behind: one that does not join with it


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
                raise NotOneToken(
                    f"token {token} was asked for, and the vocabulary has ids 0 to {self.size - 1}"
                )
            return token
        if self.tokenizer is None:
            raise NotOneToken(
                f"{token!r} is text, and this model came without a tokenizer: give token ids"
            )
        ids = self._ids(token)
        if self.size is not None and max(ids, default=0) >= self.size:
            raise NotOneToken(
                f"{token!r} is token {max(ids)} of the tokenizer, and the model has ids 0 to {self.size - 1}: give the "
                "LM the model's own tokenizer"
            )
        one = self._one(token, ids)
        if one is not None:
            return one
        pieces = " + ".join(repr(self.string(i)) for i in ids) or "nothing"
        offered = (
            ", ".join(map(repr, self._one_token_spellings(token, ids)))
            or "no near spelling, so give an id"
        )
        raise NotOneToken(
            f"{token!r} is {len(ids)} tokens here ({pieces}), and one is meant. One token each: {offered}."
        )

    def encode(self, text: str) -> list[int]:
        """The ids of a text's tokens, without the special tokens that begin a prompt."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def continuation(self, text: str) -> list[int]:
        """The ids of a text that goes on from another, the space that it begins with being its own.

        Sentencepiece tokenizers put a space before every text that they are given. Here the text is read behind another
        one, whose tokens are taken off again.
        """
        if not text or not self._adds_space:
            return self.encode(text)
        for anchor in ANCHORS:
            before, both = self.encode(anchor), self.encode(anchor + text)
            if (
                before
                and both[: len(before)] == before
                and self.added(before, both[len(before) :]) == text
            ):
                return both[len(before) :]
        raise NotOneToken(
            f"{text!r} is read by this tokenizer with a space before it or joined to what stands before, so that its "
            "own tokens cannot be told: give token ids"
        )

    @cached_property
    def _adds_space(self) -> bool:
        """True where the tokenizer puts a space before a text, as sentencepiece's do."""
        first = self.tokenizer.convert_ids_to_tokens(self.encode("a")[:1])
        return bool(first) and str(first[0]).startswith(SPACE)

    def _one_token_spellings(self, text: str, ids: list[int]) -> list[str]:
        bare = text.strip()
        cases = dict.fromkeys([bare, bare.lower(), bare.capitalize(), bare.upper(), *bare.split()])
        tried = [space + case for case in cases if case for space in (" ", "")]
        tried += map(self.string, ids)
        return [spelling for spelling in dict.fromkeys(tried) if self._is_offered(spelling)]

    def _is_offered(self, spelling: str) -> bool:
        """True where `token` accepts this spelling."""
        token_id = self._one(spelling, self._ids(spelling)) if spelling else None
        return token_id is not None and (self.size is None or token_id < self.size)

    def _ids(self, text: str) -> list[int]:
        """The ids of a text's tokens, as it goes on from another where that can be told."""
        try:
            return self.continuation(text)
        except NotOneToken:
            return self.encode(text)

    def _one(self, text: str, ids: Sequence[int]) -> int | None:
        """The token that a text is, by itself or in the vocabulary; None where it is none, or several."""
        if len(ids) == 1 and self.string(ids[0]) == text:
            return ids[0]
        marked = self.tokenizer.convert_tokens_to_ids(text.replace(" ", SPACE))
        return marked if isinstance(marked, int) and self.string(marked) == text else None

    def string(self, token_id: int) -> str:
        """The text of one token, its leading space kept. Without a tokenizer, the id in angle brackets."""
        if self.tokenizer is None:
            return f"<{token_id}>"
        if token_id >= self.n_tokens:
            return f"<unused {token_id}>"
        text = self.text([token_id])
        piece = self.tokenizer.convert_ids_to_tokens(token_id)
        # sentencepiece tokenizers drop a leading space when they decode
        return (
            " " + text
            if isinstance(piece, str) and piece.startswith(SPACE) and not text.startswith(" ")
            else text
        )

    def added(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """The text that tokens add behind others: its leading space kept, a character that they complete in it."""
        if not before or not ids:
            return self.text(ids) if ids else ""
        start, whole = self.text(before), self.text([*before, *ids])
        start = (
            start if whole.startswith(start) else start.rstrip("�")
        )  # half a character decodes to "�"
        return whole[len(start) :] if whole.startswith(start) else self.text(ids)

    def text(self, ids: Sequence[int]) -> str:
        """The text of a row of tokens, special tokens included."""
        if self.tokenizer is None:
            return " ".join(f"<{token_id}>" for token_id in ids)
        return self.tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )


NO_RANK = 0


def rank_among(
    logits: Float[Tensor, "*place token"], value: Float[Tensor, "*place"]
) -> Int[Tensor, "*place"]:
    """The rank that a value has among the logits along the last axis; `NO_RANK` for NaN."""
    not_larger = logits <= value[..., None]
    # counted in int64 it takes five times as long on a CPU
    ranks = logits.shape[-1] + 1 - not_larger.sum(-1, dtype=torch.int32).long()
    return ranks.masked_fill(value.isnan(), NO_RANK)


def shown_ranks(ranks: Int[Tensor, "*place"]) -> Shaped[Tensor, "*place"]:
    """Ranks as a table has them: whole numbers, or floating-point ones where some are NaN."""
    missing = ranks == NO_RANK
    return ranks.double().masked_fill(missing, math.nan) if bool(missing.any()) else ranks
