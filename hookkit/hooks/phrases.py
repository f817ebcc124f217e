"""Phrases: several tokens in a row, where one token is not enough."""

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..arguments import checks_keywords, read_tokens
from ..calls import Text
from ..errors import BadHook, NotOneToken, Unsupported
from ..model import LM
from ..vocabulary import Token
from .base import Here
from .conditions import Holds


@dataclass(frozen=True)
class Phrase:
    """Tokens in a row, as a text or as ids. Made by `phrase`."""

    words: str | tuple[Token, ...]

    def __post_init__(self) -> None:
        words = str(self.words) if isinstance(self.words, str) else read_tokens(self.words, "phrase")
        if not words:
            raise BadHook("phrase() has no token: give a text, or tokens")
        object.__setattr__(self, "words", words)

    def __repr__(self) -> str:
        return f"phrase({(self.words if isinstance(self.words, str) else list(self.words))!r})"

    def ids(self, lm: LM) -> list[int]:
        """The ids of its tokens in this model's vocabulary."""
        if not isinstance(self.words, str):
            return [lm.token(token) for token in self.words]
        if lm.tokenizer is None:
            raise NotOneToken(f"{self!r} is text, and this model came without a tokenizer: give token ids")
        return lm.continuation(self.words)


@checks_keywords
def phrase(words: str | Sequence[Token]) -> Phrase:
    """Several tokens in a row, for `force` and `ban`: a text, tokenized as it stands, or tokens one by one.

    A text in the middle of a line mostly begins with a space.

    >>> phrase(" a cup of tea")
    phrase(' a cup of tea')
    """
    return Phrase(words)  # pyright: ignore[reportArgumentType]


class Begun:
    """Where phrases that wait for a condition have begun, by text, model row and step: at any, or one of `starts`.

    The steps of a row are asked for in order; one that is asked for again (a cache is not used) has the same answer.
    """

    def __init__(self, length: int, holds: Holds, starts: Sequence[int] | None) -> None:
        self.length, self.holds, self.starts = length, holds, starts
        self._offsets: WeakKeyDictionary[Text, dict[tuple[int, int], int]] = WeakKeyDictionary()

    def offsets(self, logits: Float[Tensor, "row pos vocab"], here: Here) -> Int[Tensor, "row pos"]:
        """Which of the phrase's tokens is due at each cell; -1 for none."""
        if here.cells.text.beams > 1:
            raise Unsupported(
                "a phrase that begins when a condition holds has no place in beam search, which goes back on itself"
            )
        known = self._offsets.setdefault(here.cells.text, {})
        asked = self.holds(logits, here).tolist()
        offsets = torch.full_like(here.steps, -1)
        for index, row in enumerate(here.cells.rows):
            for column in range(len(here.cells.places[index])):
                step = int(here.steps[index, column])
                if (row, step) not in known:
                    before = known.get((row, step - 1), -1)
                    going_on = 0 <= before < self.length - 1
                    begins = asked[index][column] and (self.starts is None or step in self.starts)
                    known[row, step] = before + 1 if going_on else 0 if begins else -1
                offsets[index, column] = known[row, step]
        return offsets
