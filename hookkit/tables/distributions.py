"""What a model says at one position: a distribution over the vocabulary, and the numbers that follow from it.

Log-probabilities are a float32 log-softmax over every row of the vocabulary that the model has, as in decoding. Rows of
the vocabulary that are no token are never ranked and never shown. Sums over the vocabulary are taken in float64.

Scenarios: four names for how a choice between next tokens can look, with the thresholds that decide between them.

very confident     the first token has at least 0.9 of the probability
two good options   the second has at least half of what the first has, and the two together at least 0.6
one clear winner   the first has at least 0.5
uncertain          all the rest: no token, and no pair of equals, has most of it

They are asked in this order, and the first that fits is the name. The thresholds are round numbers that sort positions
for a reader, no more: a study should use the columns `top1_prob`, `entropy` and `perplexity` themselves.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import EmptySelection, OutOfRange
from ..models.lm import LM
from ..models.positions import CountLike, PosLike, Where, as_count, as_pos, chosen, wish
from ..models.prompts import cover
from ..models.tokens import NO_RANK
from ..runs.run import Run

LogitVector: TypeAlias = Float[Tensor, " vocab"]


@dataclass(frozen=True, eq=False)
class Distribution:
    """What the model says at one position: logits and all that follows from them."""

    lm: LM
    place: dict[str, int]  # row and pos, and step where steps were asked for
    logits: LogitVector  # float32, on the CPU

    @cached_property
    def logprobs(self) -> LogitVector:
        return self.logits.log_softmax(dim=-1)

    @cached_property
    def probs(self) -> LogitVector:
        return self.logprobs.exp()

    @property
    def real(self) -> LogitVector:
        """The logits of the rows of the vocabulary that are tokens."""
        return self.logits[: self.lm.n_tokens or None]

    @cached_property
    def _ascending(self) -> LogitVector:
        return self.real[~self.real.isnan()].sort().values

    def ranks(self, ids: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """1 + the number of tokens with a strictly larger logit; `NO_RANK` for a logit that is NaN."""
        wanted = self.logits[ids].contiguous()
        larger = len(self.real) - torch.searchsorted(
            self._ascending, wanted, right=True
        )  # NaN counts as larger
        return (larger + 1).masked_fill(wanted.isnan(), NO_RANK)

    @property
    def unknown(self) -> bool:
        """True where logits are NaN, so that no token is the most likely one."""
        return bool(self.logits.isnan().any())

    def top(self, count: int | None) -> list[int]:
        """The most likely tokens; the lower id first among equals, as in greedy decoding."""
        order = torch.sort(self.real, descending=True, stable=True).indices
        return order[:count].tolist()

    @cached_property
    def exact(self) -> Float[Tensor, " vocab"]:
        """The log-probabilities in float64, for sums over the vocabulary."""
        return self.logits.double().log_softmax(dim=-1)

    @cached_property
    def entropy(self) -> float:
        """-Σ p log p, in nats."""
        return 0.0 - float(expected(self.exact, self.exact))  # 0.0 where it is certain, not -0.0

    @cached_property
    def varentropy(self) -> float:
        """The variance of -log p under p, in nats²: 0 where all candidates are equally likely, or there is only one."""
        return float(expected(self.exact, (self.exact + self.entropy) ** 2))

    @cached_property
    def margin(self) -> float:
        """The largest logit minus the second largest; infinite where every other token is banned, NaN where it is
        not known which they are."""
        first, second = self.real.topk(2).values.tolist()
        return first - second if second != -math.inf else math.inf


def expected(
    logprobs: Float[Tensor, "*place vocab"], values: Float[Tensor, "*place vocab"]
) -> Float[Tensor, "*place"]:
    """The mean of values under each distribution; a probability of 0 takes its value out, be it infinite.

    A probability that is NaN makes the mean NaN.
    """
    probs = logprobs.exp()
    found = (probs * values).sum(-1)
    return found if found.isfinite().all() else torch.where(probs == 0, 0.0, probs * values).sum(-1)


def distributions(
    run: Run, *, pos: PosLike = None, step: CountLike = None, rows: CountLike = None
) -> Iterator[Distribution]:
    """What the model says at each chosen position of each row, in order.

    Without `pos` and `step` these are all the positions at which the run has logits. Raises `OutOfRange` where a chosen
    position has none.
    """
    kept = run.captured_logits()
    assert kept.positions is not None
    where = Where(
        as_pos(pos), as_count(rows, "row", negative=False), as_count(step, "step", negative=False)
    )
    if where.pos is not None and where.step is not None:
        raise EmptySelection(f"pos={pos!r} and step={step!r} were both given: say one of them")
    for row in chosen(where.rows, len(kept.rows)):
        prompt = kept.prompts[row]
        wanted = wish(where, len(prompt), lambda at, prompt=prompt: cover(run.lm, prompt, at))
        there = [place for place in kept.positions[row].tolist() if place >= 0]
        missing = (
            [] if isinstance(wanted, range) else [place for place in wanted if place not in there]
        )
        places = [place for place in there if place in wanted]
        if missing or not places:
            asked = f"step={step!r}" if step is not None else f"pos={pos!r}"
            raise OutOfRange(
                f"{asked} was asked for in row {row}, where this run has logits at positions {there[0]} to {there[-1]} "
                f"(its prompt has {len(prompt)} tokens)"
            )
        for place in places:
            asked_step = {} if where.step is None else {"step": place - len(prompt) + 1}
            logits = kept.values[row, there.index(place)].detach().float().cpu()
            yield Distribution(run.lm, {"row": row, "pos": place, **asked_step}, logits)


def divergences(was: Distribution, now: Distribution) -> dict[str, float]:
    """kl, kl_reverse, js and tv of two distributions."""
    p, q = was.exact, now.exact
    middle = torch.logaddexp(p, q) - math.log(2)
    found = {
        "kl": float(expected(p, p - q)),
        "kl_reverse": float(expected(q, q - p)),
        "js": float(expected(p, p - middle) + expected(q, q - middle)) / 2,
        "tv": float((p.exp() - q.exp()).abs().sum() / 2),
    }
    # rounding can leave -1e-17; max(0.0, NaN) would be 0.0
    return {name: value if math.isnan(value) else max(0.0, value) for name, value in found.items()}


VERY_CONFIDENT = 0.9  # the first token's probability
HALF_AS_GOOD = 0.5  # the second's probability as a part of the first's
TOGETHER = 0.6  # the two tokens' probability
CLEAR = 0.5  # the first token's probability

UNKNOWN = "unknown"  # where the model's logits are NaN

SCENARIOS = ("very confident", "two good options", "one clear winner", "uncertain")


def scenario(first: float, second: float) -> str:
    """The name for a distribution whose two largest probabilities are these.

    >>> scenario(0.45, 0.4)
    'two good options'
    """
    confident, options, winner, uncertain = SCENARIOS
    if math.isnan(first) or math.isnan(second):
        return UNKNOWN
    if first >= VERY_CONFIDENT:
        return confident
    if second >= HALF_AS_GOOD * first and first + second >= TOGETHER:
        return options
    return winner if first >= CLEAR else uncertain
