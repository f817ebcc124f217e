"""Metrics: from what the model says to one number for each prompt.

    diff = hk.logit_diff(" Mary", " John")
    diff(run)                                   # [row], of a run
    hk.sweep(lm, prompts, grid, hooks, diff)    # of every cell of a sweep

A token is text or an id. A tuple of tokens means several answers that all count; a list has an entry for each prompt.
Any function of the logits [row, vocab] that gives a number for each row is a metric as well.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .distributions import distributions
from .errors import BadEdit, BadHook, BadPrompt, Unsupported
from .model import LM, Token
from .prompts import shortened
from .runs import Run

Answers: TypeAlias = Token | tuple[Token, ...] | list[Token | tuple[Token, ...]]


@dataclass(frozen=True, eq=False)
class Said:
    """What a model said where a metric looks: the logits of some of the prompts.

    logits  [row, vocab]        float32, at the position that the metric is of
    rows                        the prompt that each row is of
    before  [row, vocab]        the same rows without the edit; None where no metric of a sweep compares with it
    after   row of [pos, vocab] where a continuation was read: the logits at the prompt's last position and at each
                                token of the continuation but the last
    """

    logits: Float[Tensor, "row vocab"]
    rows: Sequence[int]
    before: Float[Tensor, "row vocab"] | None = None
    after: Sequence[Float[Tensor, "pos vocab"]] | None = None


Measure: TypeAlias = Callable[[Said], Float[Tensor, " row"]]


@dataclass(frozen=True)
class Metric:
    """One number for each prompt. Made by `logit_diff`, `prob`, `kl` …"""

    name: ClassVar[str]  # of its column
    compares: ClassVar[bool] = False  # with the same prompt without the edit

    def bound(self, lm: LM, count: int) -> Measure:
        """The metric for this model's tokens and so many prompts; raises where a token is none, or one is missing."""
        raise AssertionError(f"{type(self).__name__} measures nothing")

    def __call__(self, run: Run, *, pos: int = -1) -> Float[Tensor, " row"]:
        """The metric of a run at a position of each prompt: [row], on the CPU."""
        if isinstance(pos, bool) or not isinstance(pos, int):
            raise BadHook(f"a metric looks at one position of each prompt, and pos={pos!r}: give a whole number")
        measure = self.bound(run.lm, len(run.lengths))
        logits = last_logits(run, pos)
        return measure(Said(logits, range(len(logits)))).cpu()


def last_logits(run: Run, pos: int = -1) -> Float[Tensor, "row vocab"]:
    """The logits of a run at one position of each row, float32 on the CPU."""
    return torch.stack([found.logits for found in distributions(run, pos=pos)])


@dataclass(frozen=True)
class LogitDiff(Metric):
    """The right logit minus the wrong one. Made by `logit_diff`."""

    right: Answers
    wrong: Answers

    name: ClassVar[str] = "logit_diff"

    def bound(self, lm: LM, count: int) -> Measure:
        right, wrong = _ids(lm, self.right, count), _ids(lm, self.wrong, count)
        return lambda said: right.mean(said) - wrong.mean(said)


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

    def bound(self, lm: LM, count: int) -> Measure:
        return _ids(lm, self.token, count).mean


def logit(token: Answers) -> Logit:
    """The logit of a token; of several tokens in a tuple, their mean."""
    return Logit(token)


@dataclass(frozen=True)
class Logprob(Metric):
    """The log-probability of a token. Made by `logprob`."""

    token: Answers

    name: ClassVar[str] = "logprob"

    def bound(self, lm: LM, count: int) -> Measure:
        ids = _ids(lm, self.token, count)
        return lambda said: ids.of(said.logits.log_softmax(-1), said.rows, -math.inf).logsumexp(-1)


def logprob(token: Answers) -> Logprob:
    """The log-probability of a token, in nats; of several tokens in a tuple, that of any of them."""
    return Logprob(token)


@dataclass(frozen=True)
class Prob(Metric):
    """The probability of a token. Made by `prob`."""

    token: Answers

    name: ClassVar[str] = "prob"

    def bound(self, lm: LM, count: int) -> Measure:
        ids = _ids(lm, self.token, count)
        return lambda said: ids.of(said.logits.softmax(-1), said.rows, 0.0).sum(-1)


def prob(token: Answers) -> Prob:
    """The probability of a token, 0 to 1; of several tokens in a tuple, their sum."""
    return Prob(token)


@dataclass(frozen=True)
class Rank(Metric):
    """The rank of a token. Made by `rank`."""

    token: Answers

    name: ClassVar[str] = "rank"

    def bound(self, lm: LM, count: int) -> Measure:
        ids, real = _ids(lm, self.token, count), lm.n_tokens or None

        def measure(said: Said) -> Tensor:
            best = ids.of(said.logits, said.rows, -math.inf).amax(-1, keepdim=True)
            return 1.0 + (said.logits[:, :real] > best).sum(-1)

        return measure


def rank(token: Answers) -> Rank:
    """The rank of a token, 1 for the most likely; of several tokens in a tuple, the best one's."""
    return Rank(token)


@dataclass(frozen=True)
class Entropy(Metric):
    """The entropy of the next token. Made by `entropy`."""

    name: ClassVar[str] = "entropy"

    def bound(self, lm: LM, count: int) -> Measure:
        return lambda said: torch.special.entr(said.logits.softmax(-1)).sum(-1)


def entropy() -> Entropy:
    """How unsure the model is: the entropy of the next token, in nats."""
    return Entropy()


@dataclass(frozen=True, eq=False)
class KL(Metric):
    """The divergence from a reference. Made by `kl`."""

    reference: Run | None
    pos: int = -1

    name: ClassVar[str] = "kl"
    compares: ClassVar[bool] = True

    def __repr__(self) -> str:
        return "KL()" if self.reference is None else f"KL({self.reference})"

    def bound(self, lm: LM, count: int) -> Measure:
        given = None if self.reference is None else last_logits(self.reference, self.pos)
        if given is not None and len(given) not in (1, count):
            raise BadPrompt(
                f"kl has a reference of {len(given)} rows, and there are {count} prompts: give as many, or one"
            )

        def measure(said: Said) -> Tensor:
            was = said.before
            if given is not None:
                was = given[[row if len(given) > 1 else 0 for row in said.rows]].to(said.logits.device)
            if was is None:
                raise Unsupported(
                    "kl() without a reference compares a sweep's cells with no edit: give kl(reference_run)"
                )
            was, now = was.double().log_softmax(-1), said.logits.double().log_softmax(-1)
            return torch.where(was.exp() > 0, was.exp() * (was - now), 0.0).sum(-1).clamp(min=0).float()

        return measure


def kl(reference: Run | None = None, *, pos: int = -1) -> KL:
    """How far the model's next-token distribution is from a reference run's: KL(reference ‖ now), in nats.

    Without a reference, a sweep takes what the model says of the same prompt without the edit. `pos` is the position of
    the reference's prompts.
    """
    if reference is not None and not isinstance(reference, Run):
        raise BadHook(f"kl needs a run as its reference, and was given a {type(reference).__name__}")
    return KL(reference, pos)


@dataclass(frozen=True)
class Top1Changed(Metric):
    """Whether the most likely token is another. Made by `top1_changed`."""

    name: ClassVar[str] = "top1_changed"
    compares: ClassVar[bool] = True

    def bound(self, lm: LM, count: int) -> Measure:
        real = lm.n_tokens or None

        def measure(said: Said) -> Tensor:
            if said.before is None:
                raise Unsupported(
                    "top1_changed compares a sweep's cells with no edit, and a run has none to compare with"
                )
            return (said.logits[:, :real].argmax(-1) != said.before[:, :real].argmax(-1)).float()

        return measure


def top1_changed() -> Top1Changed:
    """1 where the most likely token is another than without the edit, else 0; the mean is the share of prompts."""
    return Top1Changed()


@dataclass(frozen=True)
class Loss(Metric):
    """The loss of a continuation. Made by `loss`."""

    continuation: str | list[str] | tuple[int, ...]

    name: ClassVar[str] = "loss"

    def tokens(self, lm: LM, count: int) -> list[tuple[int, ...]]:
        """The tokens of each prompt's continuation."""
        given = self.continuation
        each = list(given) if isinstance(given, list) else [given] * count
        if len(each) != count:
            raise BadPrompt(
                f"loss has {len(each)} continuations, and there are {count} prompts: give one for each, or one"
            )
        rows = [_continuation(lm, text) for text in each]
        if not all(rows):
            raise BadPrompt("loss was given an empty continuation: give the text whose loss is meant")
        return rows

    def bound(self, lm: LM, count: int) -> Measure:
        wanted = self.tokens(lm, count)

        def measure(said: Said) -> Tensor:
            if said.after is None:
                raise Unsupported(
                    "loss reads a continuation, which a sweep feeds to the model; a run has none: see surprisal"
                )
            found = []
            for row, logits in zip(said.rows, said.after, strict=True):
                ids = torch.tensor(wanted[row], device=logits.device)
                found.append(-logits.log_softmax(-1).gather(1, ids[:, None]).mean())
            return torch.stack(found)

        return measure


def _continuation(lm: LM, given: str | Sequence[int]) -> tuple[int, ...]:
    if isinstance(given, int):
        raise BadPrompt(f"loss was given {given}, one token: a continuation is a text, or ids in a tuple")
    if isinstance(given, str) and given and lm.tokenizer is None:
        raise BadPrompt(f"{shortened(given)!r} is text, and this model came without a tokenizer: give token ids")
    return tuple(lm.token(token) for token in (lm.encode(given) if isinstance(given, str) and given else given))


def loss(continuation: str | list[str] | tuple[int, ...]) -> Loss:
    """The mean loss of a text that follows the prompt, in nats per token; a list has one text for each prompt.

    Edits act at the positions that they name. The continuation comes behind the prompt, so that pos=-1 is still the
    prompt's last token, and an edit without positions acts on the continuation too.
    """
    return Loss(continuation)


@dataclass(frozen=True)
class OfLogits(Metric):
    """A user's function of the logits [row, vocab]."""

    fn: Callable[[Tensor], Tensor]

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return getattr(self.fn, "__name__", "metric").replace("<lambda>", "metric")

    def bound(self, lm: LM, count: int) -> Measure:
        def measure(said: Said) -> Tensor:
            found = self.fn(said.logits.clone())  # the function may write into what it is given
            if not isinstance(found, Tensor) or found.shape != (len(said.rows),):
                shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise BadEdit(
                    f"the metric {self.name} was given logits {list(said.logits.shape)} [row, vocab] and returned "
                    f"{shape}: return one number for each row, a tensor [{len(said.rows)}]"
                )
            return found.float()

        return measure


MetricLike: TypeAlias = Metric | Callable[[Tensor], Tensor]


def as_metrics(metrics: MetricLike | Sequence[MetricLike]) -> tuple[Metric, ...]:
    """Metrics as values, each with a column of its own."""
    given = list(metrics) if isinstance(metrics, Sequence) else [metrics]
    if not given:
        raise BadHook("no metric was given: give at least one, such as hk.logit_diff(' Mary', ' John')")
    for each in given:
        if not isinstance(each, Metric) and not callable(each):
            raise BadHook(
                f"{each!r} is no metric: give hk.logit_diff(…), hk.prob(…) …, or a function of logits [row, vocab]"
            )
    return tuple(each if isinstance(each, Metric) else OfLogits(each) for each in given)


def columns(metrics: Sequence[Metric]) -> list[str]:
    """The name of each metric's column: prob, prob_2 … where one is there several times."""
    names = [metric.name for metric in metrics]
    before = [names[:place].count(name) for place, name in enumerate(names)]
    return [f"{name}_{count + 1}" if count else name for name, count in zip(names, before, strict=True)]


@dataclass(frozen=True, eq=False)
class _Ids:
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


def _ids(lm: LM, answers: Answers, count: int) -> _Ids:
    each = answers if isinstance(answers, list) else [answers] * count
    if len(each) != count:
        raise BadPrompt(
            f"a metric has tokens for {len(each)} prompts, and there are {count}: a list has one entry for each "
            "prompt, and a tuple holds several tokens of one"
        )
    for one in each:
        if not isinstance(one, str | int | tuple):
            raise BadHook(
                f"{one!r} is no token: give its text or id, a tuple of several that count, or a list with an entry for "
                "each prompt"
            )
    rows = [[lm.token(token) for token in (one if isinstance(one, tuple) else (one,))] for one in each]
    if not all(rows):
        raise BadHook("a metric was given an empty tuple of tokens: name at least one")
    for row in rows:
        if len(set(row)) < len(row):
            raise BadHook(f"a metric names token {max(row, key=row.count)} twice for one prompt: name each once")
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return _Ids(ids, torch.tensor([[n < len(row) for n in range(width)] for row in rows]))
