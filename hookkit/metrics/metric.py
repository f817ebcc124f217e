"""What a metric is, and what it is given."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ..arguments import described, whole_number
from ..distributions import distributions
from ..errors import BadArgument, BadHook
from ..model import LM
from ..runs import Run


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
            pos, "pos", meaning="the one position of each prompt at which a metric looks,", error=BadHook
        )
        measure = self.bound(run.lm, len(run.lengths))
        logits = last_logits(run, pos)
        return measure(Said(logits, range(len(logits)))).cpu()


def last_logits(run: Run, pos: int = -1) -> Float[Tensor, "row vocab"]:
    """The logits of a run at one position of each row, float32 on the CPU."""
    return torch.stack([found.logits for found in distributions(run, pos=pos)])
