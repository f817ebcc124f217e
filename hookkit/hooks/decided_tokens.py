"""Makes `generate` take the tokens that hooks have decided on, in every decoding mode.

Rules of transformers (temperature, top_p, suppress_tokens …) are overruled. A constraint of the
caller (`prefix_allowed_tokens_fn`, `logits_processor`) that rules the token out contradicts the
hook, and raises `BadEdit`.
"""

import math
from collections.abc import Mapping, Set
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import BadEdit
from ..models.batch_positions import DecidedToken, SequenceBatch

Scores = Float[Tensor, "row vocab"]


class Decisions:
    """Applies the decisions of one call of `generate`.

    `text` owns the decisions; each is removed when it is read. `offset` is the number of columns
    before the tokens that `generate` itself counts.
    """

    def __init__(self, text: SequenceBatch, offset: int) -> None:
        self.text, self.offset = text, offset

    def apply(
        self,
        rules: Any,
        constraints: Set[int],
        input_ids: Int[Tensor, "row column"],
        scores: Scores,
        settings: Mapping[str, Any],
    ) -> Scores:
        """Applies the rules to the scores, then leaves only the decided token in rows with one.

        `constraints` are the ids of the rules that are the caller's.
        """
        decided = self._current(input_ids, scores)
        if not decided or not any(id(rule) in constraints for rule in rules):
            scores = rules(input_ids, scores, **settings)
        elif type(rules).__name__ == "LogitsProcessorList":
            for rule in rules:
                before = scores
                scores = type(rules)([rule])(input_ids, scores, **settings)
                if id(rule) in constraints:
                    self._check_possible(before, scores, decided, _name(rule))
        else:  # the rules of an enclosing `attach`, which act as a whole
            scores = rules(input_ids, scores, **settings)
            name = "prefix_allowed_tokens_fn or logits_processor"
            self._check_possible(None, scores, decided, name)
        return _keep_only_decided(scores, decided) if decided else scores

    def _current(
        self, input_ids: Int[Tensor, "row column"], scores: Scores
    ) -> dict[int, DecidedToken]:
        """Returns the decision for each row, unless a later hook has put another token first."""
        current_column = self.offset + input_ids.shape[1] - 1
        decided = {}
        for (row, column), decision in self.text.decided.items():
            if column == current_column:
                decided[row] = decision
        self.text.decided.clear()
        if not decided:
            return {}
        rows, tokens = _rows_and_tokens(decided, scores.device)
        is_first = (scores[rows, tokens] >= scores[rows].amax(dim=-1)).tolist()
        for row, first in zip(list(decided), is_first, strict=True):
            if not first:
                del decided[row]
        return decided

    def _check_possible(
        self, before: Scores | None, after: Scores, decided: Mapping[int, DecidedToken], name: str
    ) -> None:
        """Raises `BadEdit` for a decided token that the caller's rule makes impossible.

        A token that was impossible before the rule is not the rule's fault.
        """
        for row, decision in decided.items():
            token = decision.token
            was_possible = before is None or before[row, token] > -math.inf
            if was_possible and not after[row, token] > -math.inf:
                raise BadEdit(
                    f"{decision.hook} decides on token {token} in row {self.text.of(row)}, and "
                    f"{name} leaves it out: change one of the two, or give force a margin=, which "
                    "decoding may overrule"
                )


def follow_decisions(
    rules: Any, keywords: Mapping[str, Any], decisions: Decisions | None, listener: Any
) -> Any:
    """Returns the rules of a call of `generate`, changed so that they follow decisions.

    They also report the resulting scores to a listener. `keywords` are those with which
    transformers asked the model for the rules.
    """
    from transformers import LogitsProcessorList

    class Rules(LogitsProcessorList):
        constraints: set[int]

        def __call__(self, input_ids: Any, scores: Any, **settings: Any) -> Any:
            if decisions is None:
                new = rules(input_ids, scores, **settings)
            else:
                new = decisions.apply(rules, self.constraints, input_ids, scores, settings)
            return new if listener is None else listener.processed(new)

    following = Rules(rules)
    processors = keywords.get("logits_processor") or ()
    following.constraints = {*map(id, processors), *getattr(rules, "constraints", ())}
    following.constraints.update(id(rule) for rule in rules if _has_allowed_tokens(rule))
    return following


def _has_allowed_tokens(rule: Any) -> bool:
    from transformers import PrefixConstrainedLogitsProcessor

    return isinstance(rule, PrefixConstrainedLogitsProcessor)


def _name(rule: Any) -> str:
    if _has_allowed_tokens(rule):
        return "prefix_allowed_tokens_fn"
    return f"the logits_processor {type(rule).__name__}"


def _rows_and_tokens(
    decided: Mapping[int, DecidedToken], device: torch.device
) -> tuple[Int[Tensor, " row"], Int[Tensor, " row"]]:
    tokens = [decision.token for decision in decided.values()]
    return torch.tensor(list(decided), device=device), torch.tensor(tokens, device=device)


def _keep_only_decided(scores: Scores, decided: Mapping[int, DecidedToken]) -> Scores:
    """Sets all other scores of the decided rows to -inf, and an impossible decided token's to 0."""
    rows, tokens = _rows_and_tokens(decided, scores.device)
    new = scores.clone()
    new[rows] = -math.inf
    new[rows, tokens] = scores[rows, tokens].nan_to_num(0, 0, 0)
    return new
