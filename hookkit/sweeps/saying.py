"""From what a model says to the metrics of cells."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ..metrics import Measure, Metric, Said
from .passes import Trunk
from .reading import Reading

Values: TypeAlias = dict[tuple[int, int], list[float]]
"""What the metrics gave, by the cell's number and the prompt's."""

UNEDITED = -1  # stands for a cell: the prompt without any cell's edits

Before: TypeAlias = Mapping[int, Float[Tensor, " vocab"]]
"""What the model says of each prompt without a cell's edits, where the metric looks."""


@dataclass(frozen=True, eq=False)
class Saying:
    """The metrics of a reading. `before` is there where one of them compares."""

    reading: Reading
    measures: Sequence[Measure]
    before: Before | None = None

    def values(self, keys: Sequence[tuple[int, int]], logits: Float[Tensor, "row look vocab"]) -> Values:
        """The metrics of these cells and prompts."""
        found: Values = {}
        part = max(1, 2**26 // max(1, logits[0].numel()))  # rows at a time, since a metric makes copies
        for start in range(0, len(keys), part):
            some = keys[start : start + part]
            found |= self.measured(some, self.said([row for _, row in some], logits[start : start + part]))
        return found

    def measured(self, keys: Sequence[tuple[int, int]], said: Said) -> Values:
        """The metrics of what was said."""
        columns = [measure(said).double().tolist() for measure in self.measures]
        return {key: list(values) for key, *values in zip(keys, *columns, strict=True)}

    def earlier(self, rows: Sequence[int]) -> Float[Tensor, "row vocab"] | None:
        """What the model says of these prompts without an edit, where a metric compares with it."""
        return None if self.before is None else torch.stack([self.before[row] for row in rows]).float()

    def said(self, rows: Sequence[int], logits: Float[Tensor, "row look vocab"]) -> Said:
        """What the model says of these prompts, where the metrics look."""
        looks = self.reading.looks
        if max(looks) == 1 and not self.reading.continues:
            return Said(logits[:, -1].float(), rows, self.earlier(rows))
        first = torch.stack([each[-looks[row]] for each, row in zip(logits, rows, strict=True)])
        after = [each[-looks[row] :].float() for each, row in zip(logits, rows, strict=True)]
        return Said(first.float(), rows, self.earlier(rows), after)


def unedited(reading: Reading, trunk: Trunk, metrics: Sequence[Metric]) -> Before | None:
    """What the unedited rows say; None where no metric compares with it."""
    if not any(metric.compares for metric in metrics):
        return None
    each = zip(trunk.rows, trunk.logits, strict=True)
    return {row: logits[-reading.looks[row]] for row, logits in each}
