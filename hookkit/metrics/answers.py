"""The tokens that a metric is of: one or several for each prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ..errors import BadHook, BadPrompt
from ..model import LM, Token
from .metric import Said

Answers: TypeAlias = Token | tuple[Token, ...] | list[Token | tuple[Token, ...]]


@dataclass(frozen=True, eq=False)
class Ids:
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


def ids_of(lm: LM, answers: Answers, count: int) -> Ids:
    """The ids of these answers for so many prompts; raises where one is no token, or one prompt has none."""
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
    return Ids(ids, torch.tensor([[n < len(row) for n in range(width)] for row in rows]))
