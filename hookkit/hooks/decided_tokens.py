"""How a token that a hook has decided on is the one that `generate` takes, whatever its decoding
rules.

Rules of transformers (temperature, top_p, suppress_tokens …) are overruled. A constraint of the
caller's own (`prefix_allowed_tokens_fn`, `logits_processor`) that rules the token out is a
contradiction, and raises `BadEdit`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import BadEdit
from ..models.batch_positions import Decided, SequenceBatch

Scores = Float[Tensor, "row vocab"]


class Decisions:
    """The decisions of one call of `generate`. `offset` columns stand before the tokens that
    generate itself counts.
    """

    def __init__(self, text: SequenceBatch, offset: int) -> None:
        self.text, self.offset = text, offset

    def apply(
        self,
        rules: Any,
        constraints: Sequence[Any],
        input_ids: Int[Tensor, "row column"],
        scores: Scores,
        settings: Mapping[str, Any],
    ) -> Scores:
        """What the rules make of the scores, with the decided token alone left in the rows that
        have one.
        """
        decided = self._standing(input_ids, scores)
        if not decided:
            return rules(input_ids, scores, **settings)
        if any(rule is constraint for rule in rules for constraint in constraints):
            scores = self._one_by_one(rules, constraints, input_ids, scores, settings, decided)
        else:
            scores = rules(input_ids, scores, **settings)
        return _alone(scores, decided)

    def _standing(self, input_ids: Int[Tensor, "row column"], scores: Scores) -> dict[int, Decided]:
        """The decision for each row of the scores, where no later hook has put another token first."""
        column = self.offset + input_ids.shape[1] - 1
        found = {
            row: decision for (row, place), decision in self.text.decided.items() if place == column
        }
        self.text.decided.clear()
        if not found:
            return {}
        rows = torch.tensor(list(found), device=scores.device)
        tokens = torch.tensor([decision.token for decision in found.values()], device=scores.device)
        first = (scores[rows, tokens] >= scores[rows].amax(dim=-1)).tolist()
        return {row: found[row] for row, is_first in zip(found, first, strict=True) if is_first}

    def _one_by_one(
        self,
        rules: Any,
        constraints: Sequence[Any],
        input_ids: Tensor,
        scores: Scores,
        settings: Mapping[str, Any],
        decided: Mapping[int, Decided],
    ) -> Scores:
        """The rules in their order, each of the caller's own asked whether it leaves the decided
        tokens.
        """
        if (
            type(rules).__name__ != "LogitsProcessorList"
        ):  # of a block around this one, which acts as a whole
            new = rules(input_ids, scores, **settings)
            self._check_left(new, decided, "prefix_allowed_tokens_fn or logits_processor")
            return new
        for rule in rules:
            before, scores = scores, type(rules)([rule])(input_ids, scores, **settings)
            if any(rule is constraint for constraint in constraints):
                left = {
                    row: each
                    for row, each in decided.items()
                    if before[row, each.token] > -math.inf
                }
                self._check_left(scores, left, _name(rule))
        return scores

    def _check_left(self, scores: Scores, decided: Mapping[int, Decided], who: str) -> None:
        for row, decision in decided.items():
            if not scores[row, decision.token] > -math.inf:
                raise BadEdit(
                    f"{decision.hook} decides on token {decision.token} in row {self.text.of(row)}, and {who} leaves "
                    "it out: change one of the two, or give force a margin=, which decoding may overrule"
                )


def heeding(
    rules: Any, given: Mapping[str, Any], decisions: Decisions | None, listener: Any
) -> Any:
    """The rules of a call of `generate`, which heed decisions and tell a listener what they made of
    the logits.

    `given` are the keywords with which transformers asked the model for the rules.
    """
    from transformers import LogitsProcessorList

    class Rules(LogitsProcessorList):
        constraints: Sequence[Any] = ()

        def __call__(self, input_ids: Any, scores: Any, **settings: Any) -> Any:
            if decisions is None:
                new = rules(input_ids, scores, **settings)
            else:
                new = decisions.apply(rules, self.constraints, input_ids, scores, settings)
            return new if listener is None else listener.processed(new)

    made = Rules(rules)
    own = [*(given.get("logits_processor") or ()), *getattr(rules, "constraints", ())]
    made.constraints = [
        rule for rule in rules if _constrains(rule) or any(rule is each for each in own)
    ]
    return made


def _constrains(rule: Any) -> bool:
    from transformers import PrefixConstrainedLogitsProcessor

    return isinstance(rule, PrefixConstrainedLogitsProcessor)


def _name(rule: Any) -> str:
    return (
        "prefix_allowed_tokens_fn"
        if _constrains(rule)
        else f"the logits_processor {type(rule).__name__}"
    )


def _alone(scores: Scores, decided: Mapping[int, Decided]) -> Scores:
    """The scores with one token left in the decided rows: its own score, or 0 where a rule had
    taken it out.
    """
    rows = torch.tensor(list(decided), device=scores.device)
    tokens = torch.tensor([decision.token for decision in decided.values()], device=scores.device)
    kept = scores[rows, tokens]
    kept = torch.where(torch.isfinite(kept), kept, torch.zeros_like(kept))
    new = scores.clone()
    new[rows] = -math.inf
    new[rows, tokens] = kept
    return new
