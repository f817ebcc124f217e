"""Rows of features, as a shard stores them: only the few that are active.

A shard has three tensors for such a site: the values of all active features, row by row, their
numbers ("SITE/features"), and where each row begins in these two ("SITE/starts").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

FEATURES, STARTS = "/features", "/starts"  # after the site's name


@dataclass(frozen=True, eq=False)
class SparseRows:
    """The active features of some rows: how many each row has, their numbers and values, by row."""

    counts: Int[Tensor, " row"]
    features: Int[Tensor, " entry"]
    values: Float[Tensor, " entry"]

    @property
    def rows(self) -> Int[Tensor, " entry"]:
        """The number of each entry's row."""
        return torch.arange(len(self.counts)).repeat_interleave(self.counts)

    def stored(self, site: str) -> dict[str, Tensor]:
        """Returns the tensors of a shard."""
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), self.counts.cumsum(0)])
        return {site: self.values, site + FEATURES: self.features, site + STARTS: starts}

    def select(self, rows: Int[Tensor, " selected"]) -> SparseRows:
        """Returns these rows, in their order."""
        counts = self.counts[rows]
        first = self.counts.cumsum(0) - self.counts  # the first entry of each row
        first_selected = counts.cumsum(0) - counts
        offsets = (first[rows] - first_selected).repeat_interleave(counts)
        entries = torch.arange(len(offsets)) + offsets
        return SparseRows(counts, self.features[entries], self.values[entries])

    def as_tensor(self, size: int) -> Float[Tensor, "row feature"]:
        """Returns a sparse COO tensor of this many features."""
        indices = torch.stack([self.rows, self.features.long()])
        shape = (len(self.counts), size)
        return torch.sparse_coo_tensor(
            indices, self.values, shape, is_coalesced=True, check_invariants=False
        )

    def of_feature(self, feature: int) -> Float[Tensor, " row"]:
        """Returns one feature of every row."""
        values = torch.zeros(len(self.counts), dtype=self.values.dtype)
        is_feature = self.features == feature
        values[self.rows[is_feature]] = self.values[is_feature]
        return values


def join_sparse(parts: Sequence[SparseRows]) -> SparseRows:
    """Returns the rows of several parts, one part after another."""
    return SparseRows(
        torch.cat([part.counts for part in parts]),
        torch.cat([part.features for part in parts]),
        torch.cat([part.values for part in parts]),
    )


def sparse_rows(values: Float[Tensor, "row pos feature"], is_kept: Tensor) -> SparseRows:
    """Returns the kept positions of a sparse COO tensor as rows, in order."""
    row, position, feature = values.indices()
    number = is_kept.flatten().cumsum(0) - 1  # of each position among the kept ones
    cell = row * values.shape[1] + position
    is_entry = is_kept.flatten()[cell]
    counts = torch.bincount(number[cell[is_entry]], minlength=int(is_kept.sum()))
    features = feature[is_entry].to(torch.int32)
    return SparseRows(counts.cpu(), features.cpu(), values.values()[is_entry].cpu())


@dataclass(eq=False)
class SparseWindow:
    """The sparse rows of a window of texts, whose batches come in any order.

    `window[numbers] = rows` sets rows by their numbers. A shard's writer owns it.
    """

    n_rows: int
    numbers: list[Tensor] = field(default_factory=list)
    parts: list[SparseRows] = field(default_factory=list)

    def __setitem__(self, numbers: Tensor, rows: SparseRows) -> None:
        self.numbers.append(numbers)
        self.parts.append(rows)

    def join(self) -> SparseRows:
        """Returns all rows in order."""
        order = torch.cat(self.numbers).argsort()
        assert len(order) == self.n_rows, "a row was not computed"
        return join_sparse(self.parts).select(order)
