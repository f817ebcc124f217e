"""The tokens that a metric is of: one or several for each prompt."""

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ..arguments import as_whole, described, items_of, read_token, read_tokens
from ..errors import BadHook, BadPrompt, EmptySelection
from ..model import LM, Token
from .metric import Said

Answers: TypeAlias = Token | tuple[Token, ...] | list[Token] | list[Token | tuple[Token, ...]]


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


def read_answers(answers: object, name: str) -> Answers:
    """Answers as a metric keeps them: a token, a tuple of tokens that all count, or a list with an entry per prompt."""
    if isinstance(answers, str) or as_whole(answers) is not None:
        return read_token(answers, name)
    if isinstance(answers, tuple):
        return _several(answers, name)
    if isinstance(answers, Set):
        raise BadHook(f"{name}={described(answers)} has no order: give a tuple of tokens that count, or a list of them")
    items = items_of(answers)
    if items is None:
        return read_token(answers, name)  # raises
    if not items:
        raise EmptySelection(f"{name}=[] has no token: a list has an entry for each prompt")
    return [_entry(item, name, number) for number, item in enumerate(items)]


def _entry(item: object, name: str, number: int) -> Token | tuple[Token, ...]:
    """The token, or the tuple of tokens, of one prompt."""
    if isinstance(item, tuple):
        return _several(item, name)
    if not isinstance(item, str) and items_of(item) is not None:
        raise BadHook(
            f"{name} has {described(item)} for prompt {number}, which is no token: write several that count as a tuple"
        )
    return read_token(item, name)


def _several(answers: tuple[object, ...], name: str) -> tuple[Token, ...]:
    if not answers:
        raise BadHook("a metric was given an empty tuple of tokens: name at least one")
    return read_tokens(answers, name)


def ids_of(lm: LM, answers: Answers, count: int) -> Ids:
    """The ids of these answers for so many prompts; raises where one is no token, or one prompt has none."""
    if isinstance(answers, tuple) and len(answers) == count > 1:
        raise BadHook(
            f"a metric has a tuple of {count} tokens for {count} prompts, which could mean one token for each prompt, "
            "or that each of them counts in every prompt: write a list for one token each, list(answers), or "
            f"[answers] * {count} for all of them in every prompt"
        )
    entries: Sequence[Token | tuple[Token, ...]] = answers if isinstance(answers, list) else [answers] * count
    if len(entries) != count:
        raise BadPrompt(
            f"a metric has tokens for {len(entries)} prompts, and there are {count}: a list has one entry for each "
            "prompt, and a tuple holds several tokens of one"
        )
    rows: list[list[int]] = []
    for entry in entries:
        several = entry if isinstance(entry, tuple) else (entry,)
        rows.append([lm.token(one) for one in several])
    for row in rows:
        if len(set(row)) < len(row):
            raise BadHook(f"a metric names token {max(row, key=row.count)} twice for one prompt: name each once")
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return Ids(ids, torch.tensor([[n < len(row) for n in range(width)] for row in rows]))
