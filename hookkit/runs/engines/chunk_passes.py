"""The forwards in a step of an engine: chunks of rows, on the one axis of all tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...models.batch_positions import Columns, ForwardPass, Selection, positions_between
from ...models.positions import NO_END, PositionRange, Where

EVERY_COLUMN = range(NO_END)  # a row of an engine has no padding


@dataclass(frozen=True)
class Chunk:
    """The tokens of one request in a step of the engine.

    row      the row of the run
    start    the index of the first token on the flat axis
    past     how many tokens of the row were read before
    count    how many are read now
    samples  True if the logits at the last of them choose the next token
    """

    row: int
    start: int
    past: int
    count: int
    samples: bool


@dataclass(eq=False)
class ChunkPass(ForwardPass):
    """A forward of some chunks that have equally many tokens, each from its own position on.

    `new_from` is the first position of each chunk that no earlier step has read: a request that the
    engine preempts is read again.
    """

    chunks: Sequence[Chunk] = ()
    firsts: Sequence[int] = ()  # the position of each chunk's first token in the tensor
    new_from: Sequence[int] = ()

    def _select(self, where: Where, head: bool, new: bool) -> Selection | None:
        selected = self.text.selected_positions(where)
        rows: list[int] = []
        indices: list[int] = []
        positions: list[PositionRange] = []
        columns: list[Columns] = []
        for index, chunk in enumerate(self.chunks):
            first = self.firsts[index]
            lowest = max(first, self.new_from[index]) if new else first
            row_positions = positions_between(
                selected[self.text.of(chunk.row)], EVERY_COLUMN, lowest, first + self.width
            )
            if not row_positions:
                continue
            rows.append(chunk.row)
            indices.append(index)
            positions.append(row_positions)
            if isinstance(row_positions, range):
                step = row_positions.step
                columns.append(range(row_positions[0] - first, row_positions[-1] - first + 1, step))
            else:
                columns.append(tuple(position - first for position in row_positions))
        if not rows:
            return None
        return self._build_selection(rows, positions, columns, self.width, indices)


def index_of(chunks: Sequence[Chunk]) -> slice | Tensor:
    """Returns where the tokens of these chunks are on the flat axis: a slice where possible."""
    first, last = chunks[0], chunks[-1]
    length = sum(chunk.count for chunk in chunks)
    if last.start + last.count - first.start == length:
        return slice(first.start, first.start + length)
    return torch.tensor([chunk.start for chunk in chunks])
