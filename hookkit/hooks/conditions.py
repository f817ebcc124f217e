"""When a logit edit acts: conditions on the logits that it finds.

    hk.force(" coffee", when=hk.entropy_above(2.0))
    hk.ban(" tea", when=hk.rank_of(" tea", at_most=3))

A user's own function does as well: it is given the logits [row, pos, vocab] and where they are, and
says True or False, or for each row and position.

Phrases: several tokens in a row, where one token is not enough.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from ..arguments import checks_keywords, choice, read_tokens, whole_number
from ..arguments import read_token as as_token
from ..errors import BadEdit, BadHook, NotOneToken, Unsupported
from ..models.batch_positions import SequenceBatch
from ..models.lm import LM
from ..models.tokens import Token, rank_among, shown_ranks
from .base import Here, number, put

Logits: TypeAlias = Float[Tensor, "row pos vocab"]
Holds: TypeAlias = Callable[[Logits, Here], Bool[Tensor, "row pos"]]

COMPARE: dict[str, Callable[[Tensor, float], Tensor]] = {
    "above": torch.gt,
    "below": torch.lt,
    "at_least": torch.ge,
    "at_most": torch.le,
}


LIMITS = {
    "entropy": (0.0, math.inf),
    "margin": (0.0, math.inf),
    "prob": (0.0, 1.0),
    "rank": (1, math.inf),
}
UNITS = {"entropy": "nats", "margin": "logits"}  # the name of the argument that is the limit


@dataclass(frozen=True)
class Condition:
    """A quantity of the logits held against a limit. Made by `entropy_above`, `rank_of` …"""

    quantity: str
    token: Token | None
    compare: str
    limit: float

    def __post_init__(self) -> None:
        choice(self.quantity, "a condition's quantity", LIMITS)
        choice(self.compare, f"a condition of {self.quantity}", COMPARE)
        of_token = self.quantity in ("rank", "prob")
        if of_token:
            put(self, "token", as_token(self.token))
        elif self.token is not None:
            raise BadHook(
                f"a condition of {self.quantity} is of no token, and names {self.token!r}"
            )
        limit = number(self.limit, self.compare if of_token else UNITS[self.quantity])
        if self.quantity == "rank":
            limit = whole_number(self.limit, self.compare, meaning="a rank", error=BadHook)
        self._check_possible(limit)
        put(self, "limit", limit)

    def _check_possible(self, limit: float) -> None:
        """Raises `BadHook` where the condition can never hold, whatever the logits are."""
        least, most = LIMITS[self.quantity]
        never = {
            "above": limit >= most,
            "below": limit <= least,
            "at_least": limit > most,
            "at_most": limit < least,
        }
        if never[self.compare]:
            raise BadHook(
                f"{self!r} never holds: {self.quantity} is from {least:g} to {most:g}, so give a limit between them"
            )

    def __repr__(self) -> str:
        if self.token is None:
            return f"{self.quantity}_{self.compare}({self.limit!r})"
        return f"{self.quantity}_of({self.token!r}, {self.compare}={self.limit!r})"

    def bound(self, lm: LM) -> Holds:
        """The condition for this model's tokens."""
        token = None if self.token is None else lm.token(self.token)
        real = lm.n_tokens or None

        def measured(logits: Logits, here: Here) -> Bool[Tensor, "row pos"]:
            values = _measured(self.quantity, logits, token, real)
            unknown = here.real_cells(values.isnan())
            if bool(unknown.any()):
                row = here.rows[int(unknown.nonzero()[0][0])]
                raise BadEdit(
                    f"when={self} has no answer at {here.site}: the logits of row {row} are NaN there"
                )
            return COMPARE[self.compare](values, self.limit)

        return measured


When: TypeAlias = Condition | Callable[[Any, Any], Any]


def _measured(
    quantity: str, logits: Logits, token: int | None, real: int | None
) -> Shaped[Tensor, "row pos"]:
    logprobs = logits.float().log_softmax(dim=-1)
    if quantity == "entropy":
        return torch.special.entr(logprobs.exp()).sum(dim=-1)
    if quantity == "margin":
        first, second = logits[..., :real].float().topk(2, dim=-1).values.unbind(dim=-1)
        return first - second
    if quantity == "prob":
        return logprobs[..., token].exp()
    assert quantity == "rank" and token is not None
    return shown_ranks(rank_among(logits[..., :real], logits[..., token]))


def holds(when: When, lm: LM) -> Holds:
    """What says for each cell whether an edit acts there. A function's answer is checked."""
    if isinstance(when, Condition):
        return when.bound(lm)

    def asked(logits: Logits, here: Here) -> Bool[Tensor, "row pos"]:
        answer = when(logits.clone(), here)
        answer = (
            torch.as_tensor(answer, device=logits.device) if isinstance(answer, bool) else answer
        )
        if (
            not isinstance(answer, Tensor)
            or answer.dtype != torch.bool
            or answer.shape not in ((), logits.shape[:2])
        ):
            said = (
                f"{answer.dtype} {list(answer.shape)}"
                if isinstance(answer, Tensor)
                else type(answer).__name__
            )
            raise BadEdit(
                f"when= gave {said}: return True or False, or a bool tensor {list(logits.shape[:2])} [row, pos]"
            )
        return answer.to(logits.device).expand(logits.shape[:2])

    return asked


def checked_when(when: When | None) -> When | None:
    """`when` as it was given, or `BadHook` if it is no condition."""
    if when is not None and not isinstance(when, Condition) and not callable(when):
        raise BadHook(
            f"when={when!r} is no condition: give hk.entropy_above(2.0), hk.rank_of(token, at_most=10) … or a function"
        )
    return when


@checks_keywords
def entropy_above(nats: float) -> Condition:
    """True where the model is less sure than this: the entropy of its next-token distribution is
    above `nats`.

    >>> entropy_above(2.0)
    entropy_above(2.0)
    """
    return Condition("entropy", None, "above", number(nats, "nats"))


@checks_keywords
def entropy_below(nats: float) -> Condition:
    """True where the model is surer than this: the entropy of its next-token distribution is below
    `nats`.
    """
    return Condition("entropy", None, "below", number(nats, "nats"))


@checks_keywords
def margin_above(logits: float) -> Condition:
    """True where the largest logit is more than this above the second largest."""
    return Condition("margin", None, "above", number(logits, "logits"))


@checks_keywords
def margin_below(logits: float) -> Condition:
    """True where the largest logit is less than this above the second largest."""
    return Condition("margin", None, "below", number(logits, "logits"))


@checks_keywords
def rank_of(token: Token, *, at_most: int | None = None, at_least: int | None = None) -> Condition:
    """True where a token's rank is at most, or at least, so much; 1 is the most likely token.

    >>> rank_of(" coffee", at_most=10)
    rank_of(' coffee', at_most=10)
    """
    return _of("rank", token, at_most, at_least)


@checks_keywords
def prob_of(
    token: Token, *, at_most: float | None = None, at_least: float | None = None
) -> Condition:
    """True where a token's probability (0 to 1) is at most, or at least, so much.

    >>> prob_of(" coffee", at_least=0.05)
    prob_of(' coffee', at_least=0.05)
    """
    return _of("prob", token, at_most, at_least)


def _of(quantity: str, token: Token, at_most: float | None, at_least: float | None) -> Condition:
    if (at_most is None) == (at_least is None):
        raise BadHook(f"{quantity}_of({token!r}) needs one limit: at_most= or at_least=")
    if at_most is not None:
        return Condition(quantity, token, "at_most", at_most)
    assert at_least is not None
    return Condition(quantity, token, "at_least", at_least)


@dataclass(frozen=True)
class Phrase:
    """Tokens in a row, as a text or as ids. Made by `phrase`."""

    words: str | tuple[Token, ...]

    def __post_init__(self) -> None:
        words = (
            str(self.words) if isinstance(self.words, str) else read_tokens(self.words, "phrase")
        )
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
            raise NotOneToken(
                f"{self!r} is text, and this model came without a tokenizer: give token ids"
            )
        return lm.continuation(self.words)


@checks_keywords
def phrase(words: str | Sequence[Token]) -> Phrase:
    """Several tokens in a row, for `force` and `ban`: a text, tokenized as it stands, or tokens one
    by one.

    A text in the middle of a line mostly begins with a space.

    >>> phrase(" a cup of tea")
    phrase(' a cup of tea')
    """
    return Phrase(words)  # pyright: ignore[reportArgumentType]


class Begun:
    """Where phrases that wait for a condition have begun, by text, model row and step: at any, or
    one of `starts`.

    The steps of a row are asked for in order; one that is asked for again (a cache is not used) has
    the same answer.
    """

    def __init__(self, length: int, holds: Holds, starts: Sequence[int] | None) -> None:
        self.length, self.holds, self.starts = length, holds, starts
        self._offsets: WeakKeyDictionary[SequenceBatch, dict[tuple[int, int], int]] = (
            WeakKeyDictionary()
        )

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
