"""Metrics of tokens: their logits, probabilities and ranks."""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..arguments import checks_keywords
from ..model import LM
from ..ranking import rank_among, shown_ranks
from .answers import Answers, ids_of, read_answers
from .metric import Measure, Metric, Said


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
