"""Metrics as they are given: one or several, or a user's function of the logits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from ..arguments import described, items_of
from ..errors import BadEdit, BadHook
from ..model import LM
from .metric import Measure, Metric, Said


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
        raise BadHook("no metric was given: give at least one, such as hk.logit_diff(' Mary', ' John')")
    for each in given:
        if getattr(each, "__module__", "").startswith(f"{__package__}.") and not isinstance(each, Metric):
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
    return [f"{name}_{count + 1}" if count else name for name, count in zip(names, before, strict=True)]
