"""The prompts of a sweep: as inputs of the model, and the metrics of their logits.

A prompt is run up to the position that the metric reads, or with the continuation whose loss is
measured.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import OutOfRange, Unsupported
from ..models.batch_positions import ForwardPass, SequenceBatch
from ..models.lm import LM
from ..models.named_positions import find_positions
from ..models.padding import forward_inputs, padding_scheme
from ..models.prompt_row import crop_row, has_inputs, input_names
from ..models.prompts import Prompts, Row, as_batch, continue_row, pad_id, pad_rows
from ..tables.metrics.metric import Loss, Measure, Metric, MetricInput

Values: TypeAlias = dict[tuple[int, int], list[float]]
"""The values of the metrics, by cell number and row."""

UNEDITED = -1  # the cell number of the prompts without any cell's edits


def count_cells(values: Values) -> int:
    """Returns of how many cells these are the values, counted for each prompt."""
    return sum(cell != UNEDITED for cell, _ in values)


LOGITS_AT_ONCE = 2**26  # numbers, in the logits that the metrics receive


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
    def has_more_than_tokens(self) -> bool:
        """True if a prompt has more than token ids, such as an image or a source."""
        return any(map(has_inputs, self.rows))

    @property
    def cropped(self) -> bool:
        """True if a prompt has tokens after the metric's position, which are not run."""
        return sum(self.lengths) < sum(map(len, self.rows))

    def uncropped(self) -> "SweepInputs":
        """Returns the same inputs with all tokens of each prompt run."""
        pairs = zip(self.rows, self.lengths, strict=True)
        read_counts = tuple(len(row) - length + 1 for row, length in pairs)
        return replace(self, run_rows=self.rows, read_counts=read_counts)

    def count_logits(self, rows: Iterable[int], width: int) -> int:
        """Returns for how many of the last `width` positions logits are computed."""
        return width if self.all_logits else self.count_read(rows)

    def count_read(self, rows: Iterable[int]) -> int:
        """Returns how many of the last positions of these rows the metrics read."""
        return max(map(self.read_counts.__getitem__, rows))

    def width_of(self, row: int, pos: int) -> int:
        """Returns how many of the last positions of a row have to run if it differs from `pos`
        on."""
        return max(self.read_counts[row], self.lengths[row] - pos)

    def count_columns(self, rows: Iterable[int]) -> int:
        """Returns how many tokens the longest of these rows has."""
        return max(map(self.lengths.__getitem__, rows))

    @cached_property
    def lengths(self) -> list[int]:
        """How many tokens of each prompt are run."""
        return list(map(len, self.run_rows))

    @cached_property
    def full(self) -> SequenceBatch:
        """The whole prompts without padding, in which hooks look up their positions."""
        return self._sequence_batch([range(len(row)) for row in self.rows])

    @cached_property
    def full_pass(self) -> ForwardPass:
        """A forward of the whole prompts, by which positions are checked."""
        width = max(self.full.lengths)
        return ForwardPass(self.full, 0, 0, len(self), width, range(width), 0)

    def padded_batch(self, columns: int) -> SequenceBatch:
        """Returns the rows that are run, padded on the left to this number of columns."""
        return self._sequence_batch([range(columns - length, columns) for length in self.lengths])

    def _sequence_batch(self, columns: Sequence[range]) -> SequenceBatch:
        lengths = list(map(len, self.rows))
        find = partial(find_positions, self.lm)
        return SequenceBatch(list(columns), lengths, self.rows.__getitem__, find, final=True)

    def model_inputs(self, rows: Sequence[int], columns: int, width: int) -> dict[str, Tensor]:
        """Returns the arguments of a forward over the last `width` of `columns` columns."""
        lm = self.lm
        run_rows = [self.run_rows[row] for row in rows]
        ids = pad_rows(run_rows, pad_id(lm), "left")
        ids = torch.nn.functional.pad(ids, (columns - ids.shape[1], 0), value=pad_id(lm))
        ids = ids.to(lm.device)
        lengths = torch.tensor(list(map(len, run_rows)))
        if width < columns and input_names(run_rows):
            raise Unsupported(
                "a prompt with more than token ids is read at once, and not after a cache"
            )
        own = {"input_ids": ids[:, -width:]}
        if not bool((lengths == columns).all()):
            positions = torch.arange(columns) - (columns - lengths[:, None])
            scheme = padding_scheme(lm, "left", run_rows)
            own = scheme.inputs(ids, positions.clamp(min=-1), width)
        return forward_inputs(lm, run_rows, own, columns, "left")


def read_inputs(lm: LM, prompts: Prompts, metrics: Sequence[Metric], pos: int) -> SweepInputs:
    """Returns the inputs of a sweep whose metrics read position `pos` of each prompt."""
    rows = as_batch(lm, prompts).rows
    loss = _find_loss(metrics, pos)
    if loss is None:
        run_rows = tuple(_crop(number, row, pos) for number, row in enumerate(rows))
        return SweepInputs(lm, rows, run_rows, (1,) * len(rows))
    continuations = loss.prepare(lm, len(rows))
    pairs = zip(rows, continuations, strict=True)
    joined = [continue_row(lm, row, tokens[:-1]) for row, tokens in pairs]
    run_rows = as_batch(lm, joined).rows
    read_counts = tuple(map(len, continuations))
    return SweepInputs(lm, rows, run_rows, read_counts, has_continuation=True)


def _find_loss(metrics: Sequence[Metric], pos: int) -> Loss | None:
    """Returns the loss among the metrics, if there is one. Raises if its position is not -1, or
    if there are several different ones."""
    losses: list[Loss] = []
    for metric in metrics:
        if isinstance(metric, Loss) and metric not in losses:
            losses.append(metric)
    if len(losses) > 1 or (losses and pos != -1):
        raise Unsupported(
            f"loss reads a continuation after the prompt, and {len(losses)} were asked for with "
            f"pos={pos}: ask for one, at pos=-1"
        )
    return next(iter(losses), None)


def _crop(number: int, row: Row, pos: int) -> Row:
    """Returns the tokens of a prompt up to the metric's position."""
    length = len(row)
    if not -length <= pos < length:
        raise OutOfRange(
            f"the metric looks at position {pos}, and prompt {number} has {length} tokens: "
            f"-{length} to {length - 1}"
        )
    return crop_row(row, pos % length + 1)


@dataclass(frozen=True, eq=False)
class CellMetrics:
    """The metrics of the prompts of a sweep.

    `before` are the logits of each row without a cell's edits, at the metric's position; None if no
    metric compares with them. `tokens` are the sorted ids of the only tokens whose logits the
    metrics read; None for all.
    """

    inputs: SweepInputs
    measures: Sequence[Measure]
    before: Mapping[int, Float[Tensor, " vocab"]] | None = None
    tokens: Sequence[int] | None = None

    def values(
        self, keys: Sequence[tuple[int, int]], logits: Float[Tensor, "row pos vocab"]
    ) -> Values:
        """Returns the metrics of these cells and rows, in parts because metrics make copies.

        `logits` are those of all tokens of the model, or of `tokens`.
        """
        values: Values = {}
        size = max(1, LOGITS_AT_ONCE // max(1, logits[0].numel()))
        for start in range(0, len(keys), size):
            part = keys[start : start + size]
            _, rows = zip(*part, strict=True)
            inputs = self.metric_input(rows, logits[start : start + size])
            columns = [measure(inputs).double().tolist() for measure in self.measures]
            values |= zip(part, map(list, zip(*columns, strict=True)), strict=True)
        return values

    def metric_input(
        self, rows: Sequence[int], logits: Float[Tensor, "row pos vocab"]
    ) -> MetricInput:
        """Returns the logits of these rows that the metrics read."""
        before = after = tokens = None
        if self.before is not None:
            before = torch.stack([self.before[row] for row in rows]).float().to(logits.device)
        counts = [self.inputs.read_counts[row] for row in rows]
        if self.inputs.has_continuation:
            pairs = zip(logits, counts, strict=True)
            after = [row_logits[-count:].float() for row_logits, count in pairs]
        if self.tokens is not None and len(self.tokens) == logits.shape[-1]:
            tokens = torch.tensor(self.tokens)
        at_position = logits[:, -counts[0]]
        if len(set(counts)) > 1:
            at_position = logits[torch.arange(len(rows)), -torch.tensor(counts)]
        return MetricInput(at_position.float(), rows, before, after, tokens)
