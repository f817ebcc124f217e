"""What a metric is, and what it is given.

Metrics as they are given: one or several, or a user's function of the logits.

Metrics of the whole distribution: how unsure it is, and how far from another.

The loss of a text that follows the prompt.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ..arguments import (
    as_whole,
    checks_arguments,
    checks_keywords,
    described,
    items_of,
    prompt_rows,
    whole_number,
)
from ..errors import BadArgument, BadEdit, BadHook, BadPrompt, EmptySelection, Unsupported
from ..models.lm import LM
from ..models.prompts import shortened
from ..runs.run import Run
from .distributions import distributions


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
        if not isinstance(run, Run):
            raise BadArgument(
                f"a metric measures a run, and was given {described(run)}: metric(hk.forward(lm, prompts))"
            )
        pos = whole_number(
            pos,
            "pos",
            meaning="the one position of each prompt at which a metric looks,",
            error=BadHook,
        )
        measure = self.bound(run.lm, len(run.lengths))
        logits = last_logits(run, pos)
        return measure(Said(logits, range(len(logits)))).cpu()


def last_logits(run: Run, pos: int = -1) -> Float[Tensor, "row vocab"]:
    """The logits of a run at one position of each row, float32 on the CPU."""
    return torch.stack([found.logits for found in distributions(run, pos=pos)])


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
    items = None if isinstance(metrics, Metric) or callable(metrics) else items_of(metrics)
    given: list[Any] = [metrics] if items is None else items
    if not given:
        raise BadHook(
            "no metric was given: give at least one, such as hk.logit_diff(' Mary', ' John')"
        )
    for each in given:
        if getattr(each, "__module__", "").startswith("hookkit.tables.") and not isinstance(
            each, Metric
        ):
            name = getattr(each, "__name__", "entropy")
            raise BadHook(f"hk.{name} makes a metric and is none: call it, hk.{name}(…)")
        if not isinstance(each, Metric) and not callable(each):
            raise BadHook(
                f"{described(each)} is no metric: give hk.logit_diff(…), hk.prob(…) …, or a function of logits "
                "[row, vocab]"
            )
    return tuple(each if isinstance(each, Metric) else OfLogits(each) for each in given)


def columns(metrics: Sequence[Metric]) -> list[str]:
    """The name of each metric's column: prob, prob_2 … where one is there several times."""
    names = [metric.name for metric in metrics]
    before = [names[:place].count(name) for place, name in enumerate(names)]
    return [
        f"{name}_{count + 1}" if count else name for name, count in zip(names, before, strict=True)
    ]


@dataclass(frozen=True)
class Entropy(Metric):
    """The entropy of the next token. Made by `entropy`."""

    name: ClassVar[str] = "entropy"

    def bound(self, lm: LM, count: int) -> Measure:
        return lambda said: torch.special.entr(said.logits.softmax(-1)).sum(-1)


@checks_arguments
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
                was = given[[row if len(given) > 1 else 0 for row in said.rows]].to(
                    said.logits.device
                )
            if was is None:
                raise Unsupported(
                    "kl() without a reference compares a sweep's cells with no edit: give kl(reference_run)"
                )
            was, now = was.double().log_softmax(-1), said.logits.double().log_softmax(-1)
            return (
                torch.where(was.exp() == 0, 0.0, was.exp() * (was - now))
                .sum(-1)
                .clamp(min=0)
                .float()
            )

        return measure


@checks_arguments
def kl(reference: Run | None = None, *, pos: int = -1) -> KL:
    """How far the model's next-token distribution is from a reference run's: KL(reference ‖ now), in nats.

    Without a reference, a sweep takes what the model says of the same prompt without the edit. `pos` is the position of
    the reference's prompts.
    """
    if reference is None and pos != -1:
        raise BadHook(
            f"pos={pos} is a position of the reference's prompts, and kl() has no reference: leave pos out"
        )
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
            changed = said.logits[:, :real].argmax(-1) != said.before[:, :real].argmax(-1)
            unknown = said.logits.isnan().any(-1) | said.before.isnan().any(-1)
            return changed.float().masked_fill(unknown, torch.nan)

        return measure


@checks_arguments
def top1_changed() -> Top1Changed:
    """1 where the most likely token is another than without the edit, else 0; the mean is the share of prompts."""
    return Top1Changed()


@dataclass(frozen=True)
class Loss(Metric):
    """The loss of a continuation. Made by `loss`."""

    continuation: str | tuple[int, ...] | list[str] | list[str | tuple[int, ...]]

    name: ClassVar[str] = "loss"

    def __post_init__(self) -> None:
        given = self.continuation
        is_list = isinstance(given, list)
        entries = given if is_list else [given]
        if not entries:
            raise EmptySelection(
                "loss was given an empty list of continuations: a list has one for each prompt"
            )
        kept = [_read(entry) for entry in entries]
        object.__setattr__(self, "continuation", kept if is_list else kept[0])

    def tokens(self, lm: LM, count: int) -> list[tuple[int, ...]]:
        """The tokens of each prompt's continuation."""
        given = self.continuation
        entries = given if isinstance(given, list) else [given] * count
        if len(entries) != count:
            raise BadPrompt(
                f"loss has {len(entries)} continuations, and there are {count} prompts: give one for each, or one"
            )
        return [_tokens_of(lm, entry) for entry in entries]

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


def _read(continuation: object) -> str | tuple[int, ...]:
    """One continuation: a text, or token ids as a tuple."""
    if isinstance(continuation, str):
        if not continuation:
            raise BadPrompt(
                "loss was given an empty continuation: give the text whose loss is meant"
            )
        return str(continuation)
    if as_whole(continuation) is not None:
        raise BadPrompt(
            f"loss was given {continuation}, one token: a continuation is a text, or ids in a tuple"
        )
    rows = prompt_rows(continuation)
    if len(rows) != 1 or isinstance(rows[0], str):
        raise BadPrompt(
            f"loss was given {described(continuation)} as one continuation: give a text, ids in a tuple, or a list "
            "with one for each prompt"
        )
    return rows[0]


def _tokens_of(lm: LM, continuation: str | tuple[int, ...]) -> tuple[int, ...]:
    if isinstance(continuation, str) and lm.tokenizer is None:
        raise BadPrompt(
            f"{shortened(continuation)!r} is text, and this model came without a tokenizer: give token ids"
        )
    ids = lm.continuation(continuation) if isinstance(continuation, str) else continuation
    return tuple(lm.token(token_id) for token_id in ids)


@checks_keywords
def loss(continuation: str | list[str] | tuple[int, ...]) -> Loss:
    """The mean loss of a text that follows the prompt, in nats per token; a list has one text for each prompt.

    Edits act at the positions that they name. The continuation comes behind the prompt, so that pos=-1 is still the
    prompt's last token, and an edit without positions acts on the continuation too.
    """
    return Loss(continuation)
