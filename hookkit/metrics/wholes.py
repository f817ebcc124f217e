"""Metrics of the whole distribution: how unsure it is, and how far from another."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..arguments import checks_arguments
from ..errors import BadHook, BadPrompt, Unsupported
from ..model import LM
from ..runs import Run
from .metric import Measure, Metric, Said, last_logits


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
                was = given[[row if len(given) > 1 else 0 for row in said.rows]].to(said.logits.device)
            if was is None:
                raise Unsupported(
                    "kl() without a reference compares a sweep's cells with no edit: give kl(reference_run)"
                )
            was, now = was.double().log_softmax(-1), said.logits.double().log_softmax(-1)
            return torch.where(was.exp() == 0, 0.0, was.exp() * (was - now)).sum(-1).clamp(min=0).float()

        return measure


@checks_arguments
def kl(reference: Run | None = None, *, pos: int = -1) -> KL:
    """How far the model's next-token distribution is from a reference run's: KL(reference ‖ now), in nats.

    Without a reference, a sweep takes what the model says of the same prompt without the edit. `pos` is the position of
    the reference's prompts.
    """
    if reference is None and pos != -1:
        raise BadHook(f"pos={pos} is a position of the reference's prompts, and kl() has no reference: leave pos out")
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
