"""Conditions on logits, which say when a logit edit acts.

    hk.force(" coffee", when=hk.when.entropy_above(2.0))
    hk.ban(" tea", when=hk.when.rank_of(" tea", at_most=3))

A user's function is a condition too: it receives the logits [row, pos, vocab] and their
`hk.types.EditContext`, and returns True or False, for all or for each row and position.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from ..arguments import check_choice, check_integer, check_keywords, check_number
from ..errors import BadEdit, BadHook, Unsupported
from ..models.batch_positions import SequenceBatch
from ..models.lm import LM
from ..models.next_token import entropy_of, margin_of, rank_among, ranks_for_table, token_logits
from ..models.tokens import Token, check_token
from .base import EditContext, set_field

__all__ = [
    "Condition",
    "entropy_above",
    "entropy_below",
    "margin_above",
    "margin_below",
    "prob_of",
    "rank_of",
]

Logits: TypeAlias = Float[Tensor, "row pos vocab"]
BoundCondition: TypeAlias = Callable[[Logits, EditContext], Bool[Tensor, "row pos"]]

COMPARE: dict[str, Callable[[Tensor, float], Tensor]] = {
    "above": torch.gt,
    "below": torch.lt,
    "at_least": torch.ge,
    "at_most": torch.le,
}
LIMITS = {
    "entropy": (0.0, math.inf),
    "margin": (0.0, math.inf),
    "prob": (0.0, 1.0),
    "rank": (1, math.inf),
}
UNITS = {"entropy": "nats", "margin": "logits"}  # the names of the limit's argument


def __dir__() -> list[str]:
    return __all__


@dataclass(frozen=True)
class Condition:
    """A quantity of the logits and its limit. `entropy_above`, `rank_of` … return it."""

    quantity: str
    token: Token | None
    compare: str
    limit: float

    def __post_init__(self) -> None:
        check_choice(self.quantity, "a condition's quantity", LIMITS)
        check_choice(self.compare, f"a condition of {self.quantity}", COMPARE)
        if self.quantity in ("rank", "prob"):
            set_field(self, "token", check_token(self.token))
        elif self.token is not None:
            raise BadHook(
                f"a condition of {self.quantity} is of no token, and names {self.token!r}"
            )
        limit_name = UNITS.get(self.quantity, self.compare)
        limit = check_number(self.limit, limit_name)
        if self.quantity == "rank":
            limit = check_integer(self.limit, limit_name, meaning="a rank", error=BadHook)
        set_field(self, "limit", limit)
        least, most = LIMITS[self.quantity]
        never_holds = {
            "above": limit >= most,
            "below": limit <= least,
            "at_least": limit > most,
            "at_most": limit < least,
        }
        if never_holds[self.compare]:
            raise BadHook(
                f"{self!r} never holds: {self.quantity} is from {least:g} to {most:g}, so give a "
                "limit between them"
            )

    def __repr__(self) -> str:
        if self.token is None:
            return f"{self.quantity}_{self.compare}({self.limit!r})"
        return f"{self.quantity}_of({self.token!r}, {self.compare}={self.limit!r})"


When: TypeAlias = Condition | Callable[[Any, Any], Any]


def _bind(condition: Condition, lm: LM) -> BoundCondition:
    token = None if condition.token is None else lm.token(condition.token)

    def holds(logits: Logits, here: EditContext) -> Bool[Tensor, "row pos"]:
        values = _measure(condition.quantity, logits, token, lm.n_tokens)
        is_nan = here.real_cells(values.isnan())
        if bool(is_nan.any()):
            row = here.rows[int(is_nan.nonzero()[0][0])]
            raise BadEdit(
                f"when={condition} has no answer at {here.site}: the logits of row {row} are NaN "
                "there"
            )
        return COMPARE[condition.compare](values, condition.limit)

    return holds


def _measure(
    quantity: str, logits: Logits, token: int | None, n_tokens: int
) -> Shaped[Tensor, "row pos"]:
    if quantity == "margin":
        return margin_of(logits.float(), n_tokens)
    if quantity == "rank":
        return ranks_for_table(rank_among(token_logits(logits, n_tokens), logits[..., token]))
    logprobs = logits.float().log_softmax(dim=-1)
    if quantity == "entropy":
        return entropy_of(logprobs)
    assert quantity == "prob"
    return logprobs[..., token].exp()


def bind_condition(when: When, lm: LM) -> BoundCondition:
    """Returns the function that says for each cell whether an edit acts there.

    The results of a user's function are checked.
    """
    if isinstance(when, Condition):
        return _bind(when, lm)

    def holds(logits: Logits, here: EditContext) -> Bool[Tensor, "row pos"]:
        result, shape = when(logits.clone(), here), logits.shape[:2]
        if isinstance(result, bool):
            result = torch.as_tensor(result)
        is_tensor = isinstance(result, Tensor)
        if is_tensor and result.dtype == torch.bool and result.shape in ((), shape):
            return result.to(logits.device).expand(shape)
        kind = f"{result.dtype} {list(result.shape)}" if is_tensor else type(result).__name__
        raise BadEdit(
            f"when= gave {kind}: return True or False, or a bool tensor {list(shape)} [row, pos]"
        )

    return holds


@check_keywords
def entropy_above(nats: float) -> Condition:
    """True where the entropy of the next-token distribution is above `nats`.

    >>> entropy_above(2.0)
    entropy_above(2.0)
    """
    return Condition("entropy", None, "above", nats)


@check_keywords
def entropy_below(nats: float) -> Condition:
    """True where the entropy of the next-token distribution is below `nats`."""
    return Condition("entropy", None, "below", nats)


@check_keywords
def margin_above(logits: float) -> Condition:
    """True where the largest logit is more than `logits` above the second largest."""
    return Condition("margin", None, "above", logits)


@check_keywords
def margin_below(logits: float) -> Condition:
    """True where the largest logit is less than `logits` above the second largest."""
    return Condition("margin", None, "below", logits)


@check_keywords
def rank_of(token: Token, *, at_most: int | None = None, at_least: int | None = None) -> Condition:
    """True where a token's rank is within the limit; 1 is the most likely token.

    >>> rank_of(" coffee", at_most=10)
    rank_of(' coffee', at_most=10)
    """
    return _of("rank", token, at_most, at_least)


@check_keywords
def prob_of(
    token: Token, *, at_most: float | None = None, at_least: float | None = None
) -> Condition:
    """True where a token's probability (0 to 1) is within the limit.

    >>> prob_of(" coffee", at_least=0.05)
    prob_of(' coffee', at_least=0.05)
    """
    return _of("prob", token, at_most, at_least)


def _of(quantity: str, token: Token, at_most: float | None, at_least: float | None) -> Condition:
    if at_most is None and at_least is not None:
        return Condition(quantity, token, "at_least", at_least)
    if at_least is None and at_most is not None:
        return Condition(quantity, token, "at_most", at_most)
    raise BadHook(f"{quantity}_of({token!r}) needs one limit: at_most= or at_least=")


def offsets_of_tokens(
    length: int, condition: BoundCondition, steps: Sequence[int] | None
) -> Callable[[Logits, EditContext], Int[Tensor, "row pos"]]:
    """Returns the function that says which of several tokens is due at each cell; -1 for none.

    They begin where the condition holds, at any step or at one of `steps`. The function owns
    the offsets for each text, by model row and step. The steps of a row are requested in order; a
    repeated request (without a cache) has the same answer.
    """
    offsets_of_text: WeakKeyDictionary[SequenceBatch, dict[tuple[int, int], int]]
    offsets_of_text = WeakKeyDictionary()

    def next_offset(previous: int, step: int, holds: bool) -> int:
        if 0 <= previous < length - 1:
            return previous + 1
        begins = holds and (steps is None or step in steps)
        return 0 if begins else -1

    def offsets(logits: Logits, here: EditContext) -> Int[Tensor, "row pos"]:
        if here.cells.text.beams > 1:
            raise Unsupported(
                "a word that begins when a condition holds has no place in beam search, which "
                "goes back on itself"
            )
        known_offsets = offsets_of_text.setdefault(here.cells.text, {})
        condition_holds = condition(logits, here).tolist()
        offsets = torch.full_like(here.steps, -1)
        for index, row in enumerate(here.cells.rows):
            steps_of_row = here.steps[index, : len(here.cells.row_positions[index])].tolist()
            for column, step in enumerate(steps_of_row):
                previous = known_offsets.get((row, step - 1), -1)
                offset = next_offset(previous, step, condition_holds[index][column])
                offsets[index, column] = known_offsets.setdefault((row, step), offset)
        return offsets

    return offsets
