"""Metrics of tokens: their logits, log-probabilities, probabilities and ranks.

A metric names one token, several tokens that all count (a tuple), or an entry for each prompt (a
list). A word (`hk.word`) is its spellings of one token, which all count. `read_answers` reads
what the user passes, and `ids_of` looks the tokens up in a model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ...arguments import as_items, check_keywords, describe
from ...errors import BadHook, BadPrompt, EmptySelection
from ...hooks.base import as_tuple, set_field
from ...models.batch_positions import pad_rows
from ...models.lm import LM, Token
from ...models.next_token import rank_among, ranks_for_table, token_logits
from ...models.tokens import check_token, check_tokens
from ...models.words import Word, WordLike
from .metric import Metric, MetricInput

Entry: TypeAlias = WordLike | tuple[Token, ...]
Answers: TypeAlias = Entry | list[Token] | list[tuple[Token, ...]] | list[Entry]


@dataclass(frozen=True, eq=False)
class Ids:
    """The tokens that count in each prompt: `ids` [row, n], valid where `mask` is True."""

    ids: Int[Tensor, "row n"]
    mask: Bool[Tensor, "row n"]

    def of(self, values: Tensor, rows: Sequence[int], fill: float) -> Tensor:
        """Returns the values [row, n] of these tokens, `fill` where a row has fewer."""
        index = torch.as_tensor(rows)
        ids, mask = self.ids[index].to(values.device), self.mask[index].to(values.device)
        return values.gather(1, ids).masked_fill(~mask, fill)

    def mean(self, inputs: MetricInput) -> Tensor:
        """Returns the mean logit of these tokens in each row."""
        columns = self
        if inputs.tokens is not None:
            columns = Ids(torch.searchsorted(inputs.tokens, self.ids), self.mask)
        counts = self.mask[torch.as_tensor(inputs.rows)].sum(-1).to(inputs.logits.device)
        return columns.of(inputs.logits, inputs.rows, 0.0).sum(-1) / counts


def read_answers(answers: object, name: str) -> Answers:
    """Returns answers as a metric stores them: a token, a tuple of tokens that all count, or a list
    with an entry for each prompt."""
    if isinstance(answers, Set):
        raise BadHook(
            f"{name}={describe(answers)} has no order: give a tuple of tokens that count, or a "
            "list of them"
        )
    items = None if isinstance(answers, tuple) else as_items(answers)
    if items is None:
        return _read_entry(answers, name)
    if not items:
        raise EmptySelection(f"{name}=[] has no token: a list has an entry for each prompt")
    for number, item in enumerate(items):
        _refuse_list(item, number, name)
    return [_read_entry(item, name) for item in items]


def _refuse_list(item: object, number: int, name: str) -> None:
    if not isinstance(item, str | tuple) and as_items(item) is not None:
        raise BadHook(
            f"{name} has {describe(item)} for prompt {number}, which is no token: write "
            "several that count as a tuple"
        )


def _read_entry(answers: object, name: str) -> Entry:
    """Returns a token, a word, or a tuple of tokens that all count."""
    if isinstance(answers, Word):
        return answers
    if not isinstance(answers, tuple):
        return check_token(answers, name)
    if not answers:
        raise BadHook("a metric was given an empty tuple of tokens: name at least one")
    return check_tokens(answers, name)


def ids_of(lm: LM, answers: Answers, count: int) -> Ids:
    """Returns the ids of these answers for `count` prompts.

    Raises if an answer is not one token, or if a prompt has none.
    """
    if isinstance(answers, tuple) and len(answers) == count > 1:
        raise BadHook(
            f"a metric has a tuple of {count} tokens for {count} prompts, which could mean one "
            "token for each prompt, or that each of them counts in every prompt: write a list for "
            "one token each, list(answers), or [answers] * "
            f"{count} for all of them in every prompt"
        )
    entries = answers if isinstance(answers, list) else [answers] * count
    if len(entries) != count:
        raise BadPrompt(
            f"a metric has tokens for {len(entries)} prompts, and there are {count}: a list has "
            "one entry for each prompt, and a tuple holds several tokens of one"
        )
    rows = [_ids_of_entry(lm, entry) for entry in entries]
    return Ids(pad_rows(rows, 0), pad_rows(rows, -1) >= 0)


def _ids_of_entry(lm: LM, entry: Entry) -> list[int]:
    """Returns the ids of all tokens that count for one prompt."""
    if isinstance(entry, Word):
        return entry.token_ids(lm)
    ids = list(map(lm.token, as_tuple(entry)))
    if len(set(ids)) < len(ids):
        raise BadHook(
            f"a metric names token {max(ids, key=ids.count)} twice for one prompt: name each once"
        )
    return ids


def _refuse_words(answers: Answers, name: str) -> None:
    """Raises `BadHook` for a word in a metric that takes the mean of logits."""
    for entry in answers if isinstance(answers, list) else [answers]:
        if isinstance(entry, Word):
            raise BadHook(
                f"{name}={entry!r} has several spellings, and the mean of their logits has no "
                "meaning: give the token that is meant, such as ' coffee', or measure "
                "hk.metrics.logprob, which adds the probabilities of the spellings"
            )


@dataclass(frozen=True)
class LogitDiff(Metric):
    """The right logit minus the wrong one. Made by `logit_diff`."""

    right: Answers
    wrong: Answers

    name: ClassVar[str] = "logit_diff"

    def __post_init__(self) -> None:
        set_field(self, "right", read_answers(self.right, "right"))
        set_field(self, "wrong", read_answers(self.wrong, "wrong"))
        _refuse_words(self.right, "right")
        _refuse_words(self.wrong, "wrong")

    def prepare(self, lm: LM, count: int) -> tuple[Ids, Ids]:
        return ids_of(lm, self.right, count), ids_of(lm, self.wrong, count)

    def tokens_read(self, prepared: tuple[Ids, Ids]) -> list[int]:
        right, wrong = prepared
        return [*right.ids.flatten().tolist(), *wrong.ids.flatten().tolist()]

    def measure(self, lm: LM, prepared: tuple[Ids, Ids], inputs: MetricInput) -> Tensor:
        right, wrong = prepared
        return right.mean(inputs) - wrong.mean(inputs)


@check_keywords
def logit_diff(right: Answers, wrong: Answers) -> LogitDiff:
    """The logit of the right token minus that of the wrong one (the mean of tokens in a tuple).

    A constant that is added to all logits does not change it. Most work on circuits measures it
    (Wang et al. 2022).

    >>> logit_diff(" Mary", " John")
    LogitDiff(right=' Mary', wrong=' John')
    """
    return LogitDiff(right, wrong)


@dataclass(frozen=True)
class TokenMetric(Metric):
    """A metric of one token, or of several."""

    token: Answers

    def __post_init__(self) -> None:
        set_field(self, "token", read_answers(self.token, "token"))

    def prepare(self, lm: LM, count: int) -> Ids:
        return ids_of(lm, self.token, count)


class Logit(TokenMetric):
    """The logit of a token. Made by `logit`."""

    name: ClassVar[str] = "logit"

    def __post_init__(self) -> None:
        super().__post_init__()
        _refuse_words(self.token, "token")

    def tokens_read(self, prepared: Ids) -> list[int]:
        return prepared.ids.flatten().tolist()

    def measure(self, lm: LM, prepared: Ids, inputs: MetricInput) -> Tensor:
        return prepared.mean(inputs)


@check_keywords
def logit(token: Answers) -> Logit:
    """The logit of a token; of several tokens in a tuple, their mean."""
    return Logit(token)


class Logprob(TokenMetric):
    """The log-probability of a token. Made by `logprob`."""

    name: ClassVar[str] = "logprob"

    def measure(self, lm: LM, prepared: Ids, inputs: MetricInput) -> Tensor:
        return prepared.of(inputs.logits.log_softmax(-1), inputs.rows, -math.inf).logsumexp(-1)


@check_keywords
def logprob(token: Answers) -> Logprob:
    """The log-probability of a token, in nats; of tokens in a tuple or the spellings of a word,
    that of any of them."""
    return Logprob(token)


class Prob(TokenMetric):
    """The probability of a token. Made by `prob`."""

    name: ClassVar[str] = "prob"

    def measure(self, lm: LM, prepared: Ids, inputs: MetricInput) -> Tensor:
        return prepared.of(inputs.logits.softmax(-1), inputs.rows, 0.0).sum(-1)


@check_keywords
def prob(token: Answers) -> Prob:
    """The probability of a token, 0 to 1; of several tokens in a tuple, their sum.

    Of a word, `prob(word("coffee"))`, it is the sum over its spellings that are one token: the
    probability that the next token is the word.
    """
    return Prob(token)


class Rank(TokenMetric):
    """The rank of a token. Made by `rank`."""

    name: ClassVar[str] = "rank"

    def measure(self, lm: LM, prepared: Ids, inputs: MetricInput) -> Tensor:
        largest = prepared.of(inputs.logits, inputs.rows, -math.inf).amax(-1)
        ranks = rank_among(token_logits(inputs.logits, lm.n_tokens), largest)
        return ranks_for_table(ranks).float()


@check_keywords
def rank(token: Answers) -> Rank:
    """The rank of a token, 1 for the most likely; of a tuple or a word, the best one's."""
    return Rank(token)
