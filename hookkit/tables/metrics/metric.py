"""Metrics: one number for each prompt, computed from the logits at one position.

`Metric` is the base of all metrics, and `as_metrics` reads what a user passes: one metric, several,
or functions of the logits. The metrics of whole distributions (`entropy`, `kl`, `top1_changed`) and
the loss of a continuation (`loss`) are in this file. The metrics of tokens are in
`token_metrics.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...arguments import (
    as_integer,
    as_items,
    check_arguments,
    check_integer,
    check_keywords,
    describe,
)
from ...display import count_of
from ...errors import BadArgument, BadEdit, BadHook, BadPrompt, EmptySelection, Unsupported
from ...hooks.base import set_field
from ...models.chat import Chat
from ...models.lm import LM
from ...models.next_token import entropy_of, exact_logprobs, kl_divergence, token_logits, values_at
from ...models.prompts import check_prompts, shorten
from ...runs.run import Run
from ..distributions import distributions


@dataclass(frozen=True, eq=False)
class MetricInput:
    """The logits of some prompts, which a metric measures.

    logits  [row, vocab]        float32, at the position that is measured
    rows                        the prompt of each row
    before  [row, vocab]        the same rows without the edit; None if no metric of a sweep
                                compares with them
    after   row of [pos, vocab] the logits at the prompt's last position and at each token of the
                                continuation but the last; None if there is no continuation
    tokens  [vocab]             the sorted ids of the tokens whose logits these are; None for all
                                tokens of the model
    """

    logits: Float[Tensor, "row vocab"]
    rows: Sequence[int]
    before: Float[Tensor, "row vocab"] | None = None
    after: Sequence[Float[Tensor, "pos vocab"]] | None = None
    tokens: Int[Tensor, " vocab"] | None = None

    def __repr__(self) -> str:
        n_rows, n_tokens = self.logits.shape
        return f"MetricInput(logits of {count_of(n_rows, 'row')}, {n_tokens} tokens)"


Measure: TypeAlias = Callable[[MetricInput], Float[Tensor, " row"]]


@dataclass(frozen=True)
class Metric:
    """One number for each prompt. Made by `logit_diff`, `prob`, `kl` …"""

    name: ClassVar[str]  # of its column
    compares: ClassVar[bool] = False  # with the same prompt without the edit

    def bind(self, lm: LM, count: int) -> Measure:
        """Returns the function that measures `count` prompts of this model.

        Raises if a token is not in the vocabulary, or if a prompt has no token.
        """
        return partial(self.measure, lm, self.prepare(lm, count))

    def prepare(self, lm: LM, count: int) -> Any:
        """Returns what `measure` needs beside the logits of these prompts, such as token ids."""

    def tokens_read(self, prepared: Any) -> list[int] | None:
        """Returns the only tokens whose logits are measured; None if all logits are."""

    def measure(self, lm: LM, prepared: Any, inputs: MetricInput) -> Float[Tensor, " row"]:
        """Returns the metric of each row."""
        raise AssertionError(f"{type(self).__name__} measures nothing")

    def __call__(self, run: Run, *, pos: int = -1) -> Float[Tensor, " row"]:
        """Returns the metric of a run at one position of each prompt: [row], on the CPU."""
        if not isinstance(run, Run):
            raise BadArgument(
                f"a metric measures a run, and was given {describe(run)}: "
                "metric(hk.forward(lm, prompts))"
            )
        meaning = "the one position of each prompt at which a metric looks,"
        pos = check_integer(pos, "pos", meaning=meaning, error=BadHook)
        measure = self.bind(run.lm, len(run.lengths))
        logits = logits_at(run, pos)
        return measure(MetricInput(logits, range(len(logits)))).cpu()


def logits_at(run: Run, pos: int = -1) -> Float[Tensor, "row vocab"]:
    """Returns the logits of a run at one position of each row, float32 on the CPU."""
    return torch.stack([distribution.logits for distribution in distributions(run, pos=pos)])


@dataclass(frozen=True)
class FunctionMetric(Metric):
    """A user's function of the logits [row, vocab]."""

    fn: Callable[[Tensor], Tensor]

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return getattr(self.fn, "__name__", "metric").replace("<lambda>", "metric")

    def measure(self, lm: LM, prepared: None, inputs: MetricInput) -> Tensor:
        numbers = self.fn(inputs.logits.clone())  # the function may write into its argument
        if isinstance(numbers, Tensor) and numbers.shape == (len(inputs.rows),):
            return numbers.float()
        result = list(numbers.shape) if isinstance(numbers, Tensor) else type(numbers).__name__
        raise BadEdit(
            f"the metric {self.name} was given logits {list(inputs.logits.shape)} [row, vocab] and "
            f"returned {result}: return one number for each row, a tensor [{len(inputs.rows)}]"
        )


MetricLike: TypeAlias = Metric | Callable[[Tensor], Tensor]


def as_metrics(metrics: MetricLike | Sequence[MetricLike]) -> tuple[Metric, ...]:
    """Returns one or several metrics or functions of logits as metrics."""
    is_one = isinstance(metrics, Metric) or callable(metrics)
    items = None if is_one else as_items(metrics)
    if items is None:
        return (_as_metric(metrics),)
    if not items:
        raise BadHook(
            "no metric was given: give one, such as hk.metrics.logit_diff(' Mary', ' John')"
        )
    return tuple(map(_as_metric, items))


def _as_metric(item: Any) -> Metric:
    if isinstance(item, Metric):
        return item
    if getattr(item, "__module__", "").startswith("hookkit.tables."):
        name = getattr(item, "__name__", "entropy")
        raise BadHook(f"hk.metrics.{name} makes a metric: call it, hk.metrics.{name}(…)")
    if not callable(item):
        raise BadHook(
            f"{describe(item)} is no metric: give hk.metrics.logit_diff(…), hk.metrics.prob(…) …, "
            "or a function of logits [row, vocab]"
        )
    return FunctionMetric(item)  # pyright: ignore[reportArgumentType]


def column_names(metrics: Sequence[Metric]) -> list[str]:
    """Returns the name of each metric's column: prob, prob_2 … if a name occurs several times."""
    counts: dict[str, int] = {}
    names = []
    for metric in metrics:
        count = counts[metric.name] = counts.get(metric.name, 0) + 1
        names.append(metric.name if count == 1 else f"{metric.name}_{count}")
    return names


@dataclass(frozen=True)
class Entropy(Metric):
    """The entropy of the next token. Made by `entropy`."""

    name: ClassVar[str] = "entropy"

    def measure(self, lm: LM, prepared: None, inputs: MetricInput) -> Tensor:
        return entropy_of(inputs.logits.log_softmax(-1))


@check_arguments
def entropy() -> Entropy:
    """The entropy of the next token, in nats: how unsure the model is."""
    return Entropy()


@dataclass(frozen=True, eq=False)
class KL(Metric):
    """The divergence from a reference. Made by `kl`."""

    reference: Run | None
    pos: int = -1

    name: ClassVar[str] = "kl"
    compares: ClassVar[bool] = True

    def __repr__(self) -> str:
        return "KL()" if self.reference is None else f"KL({repr(self.reference).splitlines()[0]})"

    def prepare(self, lm: LM, count: int) -> Float[Tensor, "row vocab"] | None:
        if self.reference is None:
            return None
        reference = logits_at(self.reference, self.pos)
        if len(reference) not in (1, count):
            raise BadPrompt(
                f"kl has a reference of {len(reference)} rows, and there are {count} prompts: "
                "give as many, or one"
            )
        return reference.expand(count, -1)

    def measure(self, lm: LM, prepared: Tensor | None, inputs: MetricInput) -> Tensor:
        before = inputs.before
        if prepared is not None:
            before = prepared[list(inputs.rows)].to(inputs.logits.device)
        if before is None:
            raise Unsupported(
                "kl() without a reference compares a sweep's cells with no edit: "
                "give kl(reference_run)"
            )
        divergence = kl_divergence(exact_logprobs(before), exact_logprobs(inputs.logits))
        return divergence.clamp(min=0).float()


@check_arguments
def kl(reference: Run | None = None, *, pos: int = -1) -> KL:
    """KL(reference ‖ run), in nats: how far the next-token distribution is from a reference run's.

    Without a reference, a sweep compares with the logits of the same prompt without the edit. `pos`
    is the position of the reference's prompts.
    """
    if reference is None and pos != -1:
        raise BadHook(
            f"pos={pos} is a position of the reference's prompts, and kl() has no reference: "
            "leave pos out"
        )
    return KL(reference, pos)


@dataclass(frozen=True)
class Top1Changed(Metric):
    """Whether the most likely token is another. Made by `top1_changed`."""

    name: ClassVar[str] = "top1_changed"
    compares: ClassVar[bool] = True

    def measure(self, lm: LM, prepared: None, inputs: MetricInput) -> Tensor:
        if inputs.before is None:
            raise Unsupported(
                "top1_changed compares a sweep's cells with no edit, and a run has none to "
                "compare with"
            )
        before = token_logits(inputs.before, lm.n_tokens).argmax(-1)
        after = token_logits(inputs.logits, lm.n_tokens).argmax(-1)
        unknown = inputs.logits.isnan().any(-1) | inputs.before.isnan().any(-1)
        return (after != before).float().masked_fill(unknown, torch.nan)


@check_arguments
def top1_changed() -> Top1Changed:
    """1 if the most likely token is another than without the edit, else 0.

    The mean over prompts is the share of prompts whose most likely token changed.
    """
    return Top1Changed()


@dataclass(frozen=True)
class Loss(Metric):
    """The loss of a continuation. Made by `loss`."""

    continuation: (
        str | tuple[int, ...] | list[str] | list[tuple[int, ...]] | list[str | tuple[int, ...]]
    )

    name: ClassVar[str] = "loss"

    def __post_init__(self) -> None:
        continuation: Any = self.continuation
        if not isinstance(continuation, list):
            continuation = _read_continuation(continuation)
        elif continuation:
            continuation = list(map(_read_continuation, continuation))
        else:
            raise EmptySelection(
                "loss was given an empty list of continuations: a list has one for each prompt"
            )
        set_field(self, "continuation", continuation)

    def prepare(self, lm: LM, count: int) -> list[tuple[int, ...]]:
        """Returns the tokens of each prompt's continuation."""
        continuation = self.continuation
        if isinstance(continuation, tuple) and len(continuation) == count > 1:
            raise BadHook(
                f"loss has a tuple of {count} token ids for {count} prompts, which could mean one "
                "token after each prompt, or all of them after every prompt: write a list of "
                f"tuples, [(token,), …], for one after each, or [ids] * {count} for all of them"
            )
        entries = continuation if isinstance(continuation, list) else [continuation] * count
        if len(entries) != count:
            raise BadPrompt(
                f"loss has {len(entries)} continuations, and there are {count} prompts: "
                "give one for each, or one"
            )
        return [_tokens_of(lm, entry) for entry in entries]

    def measure(self, lm: LM, prepared: list[tuple[int, ...]], inputs: MetricInput) -> Tensor:
        if inputs.after is None:
            raise Unsupported(
                "loss reads a continuation, which a sweep feeds to the model; a run has none: "
                "see surprisal"
            )
        losses = []
        for row, logits in zip(inputs.rows, inputs.after, strict=True):
            ids = torch.tensor(prepared[row])
            losses.append(-values_at(logits.log_softmax(-1), ids).mean())
        return torch.stack(losses)


def _read_continuation(continuation: object) -> str | tuple[int, ...]:
    """Returns one continuation as a text, or as a tuple of token ids."""
    if isinstance(continuation, str):
        if not continuation:
            raise BadPrompt("loss was given an empty continuation: give a text")
        return str(continuation)
    if as_integer(continuation) is not None:
        raise BadPrompt(
            f"loss was given {continuation}, one token: a continuation is a text, or ids in a tuple"
        )
    rows: list[Any] = check_prompts(continuation)
    if len(rows) != 1 or isinstance(rows[0], str | Chat):
        raise BadPrompt(
            f"loss was given {describe(continuation)} as one continuation: give a text, ids in a "
            "tuple, or a list with one for each prompt"
        )
    return rows[0]


def _tokens_of(lm: LM, continuation: str | tuple[int, ...]) -> tuple[int, ...]:
    ids: Sequence[int] | str = continuation
    if isinstance(ids, str):
        if lm.tokenizer is None:
            raise BadPrompt(
                f"{shorten(ids)!r} is text, and this model came without a tokenizer: give token ids"
            )
        ids = lm.continuation(ids)
    return tuple(map(lm.token, ids))


@check_keywords
def loss(
    continuation: str | list[str] | tuple[int, ...] | list[tuple[int, ...]],
) -> Loss:
    """The mean loss of a text that follows the prompt, in nats per token.

    A list has one text for each prompt. The continuation follows the prompt, and edits act at the
    positions that they name: pos=-1 is still the prompt's last token, and an edit without positions
    acts on the continuation too.
    """
    return Loss(continuation)
