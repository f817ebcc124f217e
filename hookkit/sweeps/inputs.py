"""What a sweep reads: its prompts, as far as the metric looks, and with the continuation that it looks at."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from ..arguments import as_whole
from ..errors import BadHook, OutOfRange, Unsupported
from ..models.batch_positions import SequenceBatch
from ..models.lm import LM
from ..models.padding import padded_inputs
from ..models.prompts import Prompts, Row, as_batch, cover, pad_id, padded
from ..tables.metrics import Loss, Metric


@dataclass(frozen=True, eq=False)
class SweepInputs:
    """The rows of a sweep.

    rows    the tokens of each prompt
    fed     what is run of each: up to where the metric looks, and a continuation
    looks   how many of the last positions of each count; the metric looks at the first of them, a loss at all
    every   whether the logits of every position are computed, for a user's function that is given them
    """

    lm: LM
    rows: tuple[Row, ...]
    fed: tuple[Row, ...]
    looks: tuple[int, ...]
    continues: bool = False  # a continuation is read, be it of one token, whose prompt alone is run
    every: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def cropped(self) -> bool:
        """True where prompts go on behind the position at which the metric looks, and are not run there."""
        return any(len(fed) < len(row) for fed, row in zip(self.fed, self.rows, strict=True))

    def whole(self) -> "SweepInputs":
        """The same with all of each prompt run."""
        ends = zip(self.rows, self.fed, strict=True)
        return replace(
            self, fed=self.rows, looks=tuple(len(row) - len(fed) + 1 for row, fed in ends)
        )

    def logits_of(self, rows: Iterable[int], width: int) -> int:
        """How many of the last positions have their logits computed, where the last `width` of these rows run."""
        return width if self.every else max(self.looks[row] for row in rows)

    @cached_property
    def lengths(self) -> list[int]:
        """How many tokens are run of each row."""
        return [len(row) for row in self.fed]

    @cached_property
    def full(self) -> SequenceBatch:
        """The prompts by themselves, without padding, for what hooks wish of them."""
        return self._text([range(len(row)) for row in self.rows])

    def text(self, columns: int) -> SequenceBatch:
        """The rows that are run, padded on the left to so many columns."""
        return self._text([range(columns - length, columns) for length in self.lengths])

    def _text(self, columns: Sequence[range]) -> SequenceBatch:
        lengths = [len(row) for row in self.rows]
        return SequenceBatch(
            list(columns), lengths, self.rows.__getitem__, partial(cover, self.lm), final=True
        )

    def inputs(self, rows: Sequence[int], columns: int, width: int) -> dict[str, Tensor]:
        """The arguments of a forward over the last `width` of so many columns of these rows."""
        lm, lengths = self.lm, [self.lengths[row] for row in rows]
        ids = padded([self.fed[row] for row in rows], pad_id(lm), "left")
        ids = torch.nn.functional.pad(ids, (columns - ids.shape[1], 0), value=pad_id(lm))
        ids = ids.to(lm.device)
        if set(lengths) == {columns}:
            return {"input_ids": ids[:, -width:]}
        positions = torch.stack([torch.arange(columns) - (columns - length) for length in lengths])
        return padded_inputs(lm, ids, positions.clamp(min=-1), "left", width)


def read(lm: LM, prompts: Prompts, metrics: Sequence[Metric], pos: int) -> SweepInputs:
    """The prompts of a sweep whose metrics look at position `pos`."""
    if as_whole(pos) is None:
        raise BadHook(
            f"the metric looks at one position of each prompt, and pos={pos!r}: give a whole number"
        )
    rows = as_batch(lm, prompts).rows
    ends = [_end(number, len(row), pos) for number, row in enumerate(rows)]
    continued: list[Loss] = []
    for metric in metrics:
        if isinstance(metric, Loss) and metric not in continued:
            continued.append(metric)
    if not continued:
        fed = tuple(row[: end + 1] for row, end in zip(rows, ends, strict=True))
        return SweepInputs(lm, rows, fed, (1,) * len(rows))
    if len(continued) > 1 or pos != -1:
        raise Unsupported(
            f"loss reads a continuation behind the prompt, and {len(continued)} were asked for with pos={pos}: "
            "ask for one, at pos=-1"
        )
    behind = continued.pop().tokens(lm, len(rows))
    fed = tuple((*row, *more[:-1]) for row, more in zip(rows, behind, strict=True))
    fed = as_batch(lm, [list(row) for row in fed]).rows
    return SweepInputs(lm, rows, fed, tuple(map(len, behind)), continues=True)


def _end(number: int, length: int, pos: Any) -> int:
    place = pos if pos >= 0 else length + pos
    if not 0 <= place < length:
        raise OutOfRange(
            f"the metric looks at position {pos}, and prompt {number} has {length} tokens: -{length} to {length - 1}"
        )
    return place
