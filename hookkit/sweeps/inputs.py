"""The prompts of a sweep as model inputs.

A prompt is run up to the position that the metric reads, or with the continuation whose loss is
measured.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from ..errors import OutOfRange, Unsupported
from ..models.batch_positions import SequenceBatch
from ..models.lm import LM
from ..models.padding import padding_scheme
from ..models.prompts import Prompts, Row, as_batch, pad_id, pad_rows, positions_of_text
from ..tables.metrics.metric import Loss, Metric


@dataclass(frozen=True, eq=False)
class SweepInputs:
    """The prompts of a sweep.

    rows              the tokens of each prompt
    run_rows          the tokens that are run: up to the metric's position, or with a continuation
    read_counts       for each prompt, how many of its last run positions a metric reads: the
                      metric's position first; a loss reads all of them
    has_continuation  True if a loss reads a continuation; if that has one token, only the prompt
                      is run
    all_logits        True if a user's function receives the logits of all positions
    """

    lm: LM
    rows: tuple[Row, ...]
    run_rows: tuple[Row, ...]
    read_counts: tuple[int, ...]
    has_continuation: bool = False
    all_logits: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def cropped(self) -> bool:
        """True if a prompt has tokens after the metric's position, which are not run."""
        return any(
            len(run_row) < len(row) for run_row, row in zip(self.run_rows, self.rows, strict=True)
        )

    def uncropped(self) -> "SweepInputs":
        """Returns the same inputs with all tokens of each prompt run."""
        pairs = zip(self.rows, self.run_rows, strict=True)
        read_counts = tuple(len(row) - len(run_row) + 1 for row, run_row in pairs)
        return replace(self, run_rows=self.rows, read_counts=read_counts)

    def count_logits(self, rows: Iterable[int], width: int) -> int:
        """Returns for how many of the last `width` positions logits are computed."""
        if self.all_logits:
            return width
        return max(self.read_counts[row] for row in rows)

    @cached_property
    def lengths(self) -> list[int]:
        """How many tokens of each prompt are run."""
        return list(map(len, self.run_rows))

    def count_columns(self, rows: Iterable[int]) -> int:
        """Returns how many tokens the longest of these rows has."""
        return max(self.lengths[row] for row in rows)

    @cached_property
    def full(self) -> SequenceBatch:
        """The whole prompts without padding, in which hooks look up their positions."""
        return self._sequence_batch([range(len(row)) for row in self.rows])

    def padded_batch(self, columns: int) -> SequenceBatch:
        """Returns the rows that are run, padded on the left to this number of columns."""
        return self._sequence_batch([range(columns - length, columns) for length in self.lengths])

    def _sequence_batch(self, columns: Sequence[range]) -> SequenceBatch:
        lengths = list(map(len, self.rows))
        find = partial(positions_of_text, self.lm)
        return SequenceBatch(list(columns), lengths, self.rows.__getitem__, find, final=True)

    def model_inputs(self, rows: Sequence[int], columns: int, width: int) -> dict[str, Tensor]:
        """Returns the arguments of a forward over the last `width` of `columns` columns."""
        lm = self.lm
        lengths = [self.lengths[row] for row in rows]
        ids = pad_rows([self.run_rows[row] for row in rows], pad_id(lm), "left")
        ids = torch.nn.functional.pad(ids, (columns - ids.shape[1], 0), value=pad_id(lm))
        ids = ids.to(lm.device)
        if set(lengths) == {columns}:
            return {"input_ids": ids[:, -width:]}
        positions = torch.stack([torch.arange(columns) - (columns - length) for length in lengths])
        return padding_scheme(lm, "left").inputs(ids, positions.clamp(min=-1), width)


def read_inputs(lm: LM, prompts: Prompts, metrics: Sequence[Metric], pos: int) -> SweepInputs:
    """Returns the inputs of a sweep whose metrics read position `pos` of each prompt."""
    rows = as_batch(lm, prompts).rows
    ends = [_metric_position(number, len(row), pos) for number, row in enumerate(rows)]
    losses: list[Loss] = []
    for metric in metrics:
        if isinstance(metric, Loss) and metric not in losses:
            losses.append(metric)
    if not losses:
        run_rows = tuple(row[: end + 1] for row, end in zip(rows, ends, strict=True))
        return SweepInputs(lm, rows, run_rows, (1,) * len(rows))
    if len(losses) > 1 or pos != -1:
        raise Unsupported(
            f"loss reads a continuation after the prompt, and {len(losses)} were asked for with "
            f"pos={pos}: ask for one, at pos=-1"
        )
    continuations = losses[0].prepare(lm, len(rows))
    joined = [[*row, *tokens[:-1]] for row, tokens in zip(rows, continuations, strict=True)]
    run_rows = as_batch(lm, joined).rows
    read_counts = tuple(map(len, continuations))
    return SweepInputs(lm, rows, run_rows, read_counts, has_continuation=True)


def _metric_position(row: int, length: int, pos: int) -> int:
    position = length + pos if pos < 0 else pos
    if not 0 <= position < length:
        raise OutOfRange(
            f"the metric looks at position {pos}, and prompt {row} has {length} tokens: "
            f"-{length} to {length - 1}"
        )
    return position
