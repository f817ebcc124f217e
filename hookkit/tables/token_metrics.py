"""The tokens that a metric is of: one or several for each prompt.

Metrics of tokens: their logits, probabilities and ranks.
"""

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ..arguments import as_whole, checks_keywords, described, items_of, read_token, read_tokens
from ..errors import BadHook, BadPrompt, EmptySelection
from ..models.lm import LM, Token
from ..models.tokens import rank_among, shown_ranks
from .metrics import Measure, Metric, Said

Answers: TypeAlias = Token | tuple[Token, ...] | list[Token] | list[Token | tuple[Token, ...]]


@dataclass(frozen=True, eq=False)
class Ids:
    """The tokens that count in each prompt: `ids` [row, n], of which `there` are meant."""

    ids: Int[Tensor, "row n"]
    there: Bool[Tensor, "row n"]

    def of(self, values: Tensor, rows: Sequence[int], fill: float) -> Tensor:
        """The values [row, n] of these tokens, `fill` where a row has fewer."""
        chosen = torch.as_tensor(rows)
        ids, there = self.ids[chosen].to(values.device), self.there[chosen].to(values.device)
        return values.gather(1, ids).masked_fill(~there, fill)

    def mean(self, said: Said) -> Tensor:
        """The mean logit of these tokens in each row."""
        counts = self.there[torch.as_tensor(said.rows)].sum(-1).to(said.logits.device)
        return self.of(said.logits, said.rows, 0.0).sum(-1) / counts


def read_answers(answers: object, name: str) -> Answers:
    """Answers as a metric keeps them: a token, a tuple of tokens that all count, or a list with an entry per prompt."""
    if isinstance(answers, str) or as_whole(answers) is not None:
        return read_token(answers, name)
    if isinstance(answers, tuple):
        return _several(answers, name)
    if isinstance(answers, Set):
        raise BadHook(
            f"{name}={described(answers)} has no order: give a tuple of tokens that count, or a list of them"
        )
    items = items_of(answers)
    if items is None:
        return read_token(answers, name)  # raises
    if not items:
        raise EmptySelection(f"{name}=[] has no token: a list has an entry for each prompt")
    return [_entry(item, name, number) for number, item in enumerate(items)]


def _entry(item: object, name: str, number: int) -> Token | tuple[Token, ...]:
    """The token, or the tuple of tokens, of one prompt."""
    if isinstance(item, tuple):
        return _several(item, name)
    if not isinstance(item, str) and items_of(item) is not None:
        raise BadHook(
            f"{name} has {described(item)} for prompt {number}, which is no token: write several that count as a tuple"
        )
    return read_token(item, name)


def _several(answers: tuple[object, ...], name: str) -> tuple[Token, ...]:
    if not answers:
        raise BadHook("a metric was given an empty tuple of tokens: name at least one")
    return read_tokens(answers, name)


def ids_of(lm: LM, answers: Answers, count: int) -> Ids:
    """The ids of these answers for so many prompts; raises where one is no token, or one prompt has none."""
    if isinstance(answers, tuple) and len(answers) == count > 1:
        raise BadHook(
            f"a metric has a tuple of {count} tokens for {count} prompts, which could mean one token for each prompt, "
            "or that each of them counts in every prompt: write a list for one token each, list(answers), or "
            f"[answers] * {count} for all of them in every prompt"
        )
    entries: Sequence[Token | tuple[Token, ...]] = (
        answers if isinstance(answers, list) else [answers] * count
    )
    if len(entries) != count:
        raise BadPrompt(
            f"a metric has tokens for {len(entries)} prompts, and there are {count}: a list has one entry for each "
            "prompt, and a tuple holds several tokens of one"
        )
    rows: list[list[int]] = []
    for entry in entries:
        several = entry if isinstance(entry, tuple) else (entry,)
        rows.append([lm.token(one) for one in several])
    for row in rows:
        if len(set(row)) < len(row):
            raise BadHook(
                f"a metric names token {max(row, key=row.count)} twice for one prompt: name each once"
            )
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return Ids(ids, torch.tensor([[n < len(row) for n in range(width)] for row in rows]))


@dataclass(frozen=True)
class LogitDiff(Metric):
    """The right logit minus the wrong one. Made by `logit_diff`."""

    right: Answers
    wrong: Answers

    name: ClassVar[str] = "logit_diff"

    def __post_init__(self) -> None:
        object.__setattr__(self, "right", read_answers(self.right, "right"))
        object.__setattr__(self, "wrong", read_answers(self.wrong, "wrong"))

    def bound(self, lm: LM, count: int) -> Measure:
        right, wrong = ids_of(lm, self.right, count), ids_of(lm, self.wrong, count)
        return lambda said: right.mean(said) - wrong.mean(said)


@checks_keywords
def logit_diff(right: Answers, wrong: Answers) -> LogitDiff:
    """The logit of the right token minus that of the wrong one (of several tokens in a tuple: their mean).

    A constant that is added to all logits does not change it, which makes it the measure of most circuit work (Wang et
    al. 2022).

    >>> logit_diff(" Mary", " John")
    LogitDiff(right=' Mary', wrong=' John')
    """
    return LogitDiff(right, wrong)


@dataclass(frozen=True)
class Logit(Metric):
    """The logit of a token. Made by `logit`."""

    token: Answers

    name: ClassVar[str] = "logit"

    def __post_init__(self) -> None:
        object.__setattr__(self, "token", read_answers(self.token, "token"))

    def bound(self, lm: LM, count: int) -> Measure:
        return ids_of(lm, self.token, count).mean


@checks_keywords
def logit(token: Answers) -> Logit:
    """The logit of a token; of several tokens in a tuple, their mean."""
    return Logit(token)


@dataclass(frozen=True)
class Logprob(Metric):
    """The log-probability of a token. Made by `logprob`."""

    token: Answers

    name: ClassVar[str] = "logprob"

    def __post_init__(self) -> None:
        object.__setattr__(self, "token", read_answers(self.token, "token"))

    def bound(self, lm: LM, count: int) -> Measure:
        ids = ids_of(lm, self.token, count)
        return lambda said: ids.of(said.logits.log_softmax(-1), said.rows, -math.inf).logsumexp(-1)


@checks_keywords
def logprob(token: Answers) -> Logprob:
    """The log-probability of a token, in nats; of several tokens in a tuple, that of any of them."""
    return Logprob(token)


@dataclass(frozen=True)
class Prob(Metric):
    """The probability of a token. Made by `prob`."""

    token: Answers

    name: ClassVar[str] = "prob"

    def __post_init__(self) -> None:
        object.__setattr__(self, "token", read_answers(self.token, "token"))

    def bound(self, lm: LM, count: int) -> Measure:
        ids = ids_of(lm, self.token, count)
        return lambda said: ids.of(said.logits.softmax(-1), said.rows, 0.0).sum(-1)


@checks_keywords
def prob(token: Answers) -> Prob:
    """The probability of a token, 0 to 1; of several tokens in a tuple, their sum."""
    return Prob(token)


@dataclass(frozen=True)
class Rank(Metric):
    """The rank of a token. Made by `rank`."""

    token: Answers

    name: ClassVar[str] = "rank"

    def __post_init__(self) -> None:
        object.__setattr__(self, "token", read_answers(self.token, "token"))

    def bound(self, lm: LM, count: int) -> Measure:
        ids, real = ids_of(lm, self.token, count), lm.n_tokens or None

        def measure(said: Said) -> Tensor:
            best = ids.of(said.logits, said.rows, -math.inf).amax(-1)
            return shown_ranks(rank_among(said.logits[:, :real], best)).float()

        return measure


@checks_keywords
def rank(token: Answers) -> Rank:
    """The rank of a token, 1 for the most likely; of several tokens in a tuple, the best one's."""
    return Rank(token)
