"""Next-token distributions of a run: the logits of one position, and the numbers that tables show.

Log-probabilities are a float32 log-softmax over every row of the model's vocabulary, as in
decoding. Sums over the vocabulary are taken in float64.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeAlias

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import EmptySelection, OutOfRange
from ..hooks.capture import Captured
from ..models import next_token
from ..models.lm import LM
from ..models.named_positions import find_positions
from ..models.positions import (
    IndicesLike,
    PosLike,
    Where,
    read_indices,
    read_position,
    resolve_positions,
    resolve_rows,
)
from ..models.tokens import describe_prompts
from ..runs.run import Run

LogitVector: TypeAlias = Float[Tensor, " vocab"]


def token_texts(lm: LM, ids: Iterable[int]) -> list[str]:
    """Returns the texts of tokens, as tables have them."""
    return list(map(lm.string, ids))


@dataclass(frozen=True, eq=False)
class Distribution:
    """The next-token distribution at one position.

    location  `row` and `pos`, and `step` if steps were selected
    logits    float32, on the CPU
    """

    lm: LM
    location: dict[str, int]
    logits: LogitVector

    @cached_property
    def logprobs(self) -> LogitVector:
        return self.logits.log_softmax(dim=-1)

    @cached_property
    def probs(self) -> LogitVector:
        return self.logprobs.exp()

    @cached_property
    def exact(self) -> LogitVector:
        """The log-probabilities in float64."""
        return next_token.exact_logprobs(self.logits)

    @property
    def real(self) -> LogitVector:
        """The logits of the rows of the vocabulary that are tokens."""
        return next_token.token_logits(self.logits, self.lm.n_tokens)

    @cached_property
    def _ascending(self) -> LogitVector:
        return self.real[~self.real.isnan()].sort().values

    def ranks(self, ids: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """Returns 1 + the number of tokens with a strictly larger logit; `NO_RANK` for NaN."""
        logits = self.logits[ids].contiguous()
        not_larger = torch.searchsorted(self._ascending, logits, right=True)
        larger = len(self.real) - not_larger  # NaN counts as larger
        return (larger + 1).masked_fill(logits.isnan(), next_token.NO_RANK)

    @property
    def unknown(self) -> bool:
        """True if logits are NaN, so that no token is the most likely one."""
        return bool(self.logits.isnan().any())

    def top(self, count: int | None) -> list[int]:
        """Returns the most likely tokens. See `top_tokens`."""
        return self._by_rank[:count].tolist()

    @cached_property
    def _by_rank(self) -> Int[Tensor, " token"]:
        return next_token.top_tokens(self.logits, self.lm.n_tokens, None)

    def top_names(self, count: int) -> list[str | None]:
        """Returns the most likely tokens; None if logits are NaN, so that no token is the first."""
        return [None] * count if self.unknown else [*token_texts(self.lm, self.top(count))]

    def names(self, ids: Int[Tensor, " n"]) -> dict[str, object]:
        """Returns the columns of a table that say where the distribution is, and name tokens."""
        tokens = ids.tolist()
        return {**self.location, "token": token_texts(self.lm, tokens), "token_id": tokens}

    def numbers(self, ids: Int[Tensor, " n"], suffix: str = "") -> dict[str, object]:
        """Returns the columns logit, logprob, prob and rank of these tokens."""
        return {
            f"logit{suffix}": self.logits[ids].double().tolist(),
            f"logprob{suffix}": self.logprobs[ids].double().tolist(),
            f"prob{suffix}": self.probs[ids].double().tolist(),
            f"rank{suffix}": next_token.ranks_for_table(self.ranks(ids)).tolist(),
        }

    @cached_property
    def entropy(self) -> float:
        """-Σ p log p, in nats."""
        return float(next_token.entropy_of(self.exact))

    @cached_property
    def varentropy(self) -> float:
        """The variance of -log p under p, in nats²."""
        return float(next_token.varentropy_of(self.exact))

    @cached_property
    def margin(self) -> float:
        """The largest logit minus the second; NaN if logits are NaN."""
        return float(next_token.margin_of(self.logits.double(), self.lm.n_tokens))


def distributions(
    run: Run, *, pos: PosLike = None, step: IndicesLike = None, rows: IndicesLike = None
) -> Iterator[Distribution]:
    """Returns the distribution at each selected position of each row, in order.

    Without `pos` and `step`, these are all positions at which the run has logits. Raises
    `OutOfRange` if a selected position has none.
    """
    captured = run.captured_logits()
    where = Where(
        read_position(pos),
        read_indices(rows, "row", negative=False),
        read_indices(step, "step", negative=False),
    )
    if where.pos is not None and where.step is not None:
        raise EmptySelection(f"pos={pos!r} and step={step!r} were both given: give one of them")
    for row in resolve_rows(where.rows, len(captured.rows)):
        for position in _positions_with_logits(run.lm, captured, row, where):
            location = {"row": row, "pos": position}
            if where.step is not None:
                location["step"] = position - len(captured.prompts[row]) + 1
            logits = captured.values[row, captured.column(row, position)]
            yield Distribution(run.lm, location, logits.detach().float().cpu())


def _positions_with_logits(lm: LM, captured: Captured, row: int, where: Where) -> list[int]:
    """Returns the selected positions of a row. Raises `OutOfRange` if one of them has no logits."""
    assert captured.positions is not None
    prompt = captured.prompts[row]
    selected = resolve_positions(where, len(prompt), partial(find_positions, lm, prompt))
    available = [position for position in captured.positions[row].tolist() if position >= 0]
    positions = [position for position in available if position in selected]
    is_range = isinstance(selected, range)  # a range may reach beyond the text
    if not positions or not (is_range or set(selected) <= set(available)):
        request = f"pos={where.pos!r}"
        if where.step is not None:
            request = f"step={where.step!r}"
        raise OutOfRange(
            f"{request} was asked for in row {row}, where this run has logits at positions "
            f"{available[0]} to {available[-1]} (its prompt has {len(prompt)} tokens)"
        )
    return positions


def selected_rows(rows: IndicesLike, count: int) -> list[int]:
    """Returns the rows that `rows=` of a table selects among so many."""
    return resolve_rows(read_indices(rows, "row", negative=False), count)


def scenario(first: float, second: float) -> str:
    """Returns the name for a distribution whose two largest probabilities are these.

    The thresholds are round numbers that sort positions for a reader. A study should use the
    columns `top1_prob`, `entropy` and `perplexity`.

    >>> scenario(0.45, 0.4)
    'two good options'
    """
    if math.isnan(first) or math.isnan(second):
        return "unknown"
    if first >= 0.9:
        return "very confident"
    if second >= first / 2 and first + second >= 0.6:
        return "two good options"
    if first >= 0.5:
        return "one clear winner"
    return "uncertain"


def add_roles(table: pd.DataFrame, roles: Sequence[Sequence[str]]) -> pd.DataFrame:
    """Returns a table with a column `role`, after `pos`, if a prompt is a chat.

    It says who said the token at each position: a role, "template", or "" in other prompts.
    """
    if not any(roles):
        return table
    values: list[Any] = []
    for row, pos in zip(table["row"], table["pos"], strict=True):
        row_roles = roles[row]
        values.append(row_roles[pos] if row_roles else "")
    table = table.copy()
    table.insert(list(table.columns).index("pos") + 1, "role", values)
    return table


def prompts_of_run(run: Run) -> dict[str, list[Any]]:
    """Returns the texts of a run's prompts, for the `attrs` of its tables."""
    return describe_prompts(run.lm, [run.prompts[number] for number in run.prompt_rows])
