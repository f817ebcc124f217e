"""Strongest: for each unit of a site the tokens at which it is largest, found in one pass.

Of equal values the earlier token comes first, so that what comes out depends on the texts and not on the batches.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

PLACE = ("text", "piece", "pos", "token_id")  # what is known of each token
LAST = torch.iinfo(torch.int64).max


@dataclass(frozen=True, eq=False)
class Strongest:
    """The largest values of each unit, the largest first, the numbers of their rows, and which token each is at."""

    values: Float[Tensor, "top ..."]
    rows: Int[Tensor, "top ..."]
    places: Int[Tensor, "top ... 4"]

    def head(self, head: int) -> "Strongest":
        """Those of one head, where the first axis behind `top` is heads."""
        return Strongest(self.values[:, head], self.rows[:, head], self.places[:, head])


def strongest(
    values: Float[Tensor, "row ..."], rows: Int[Tensor, " row"], places: Int[Tensor, "row 4"], top: int
) -> Strongest:
    """The largest values of some rows, `top` of them or as many as there are rows."""
    flat = values.flatten(1)
    numbers = rows.to(flat.device)[:, None].expand_as(flat)
    index = _largest(flat, numbers, min(top, len(flat)))
    shape = (len(index), *values.shape[1:])
    return Strongest(
        flat.gather(0, index).reshape(shape),
        numbers.gather(0, index).reshape(shape),
        places.to(flat.device)[index].reshape(*shape, len(PLACE)),
    )


def merged_strongest(first: Strongest | None, second: Strongest, top: int) -> Strongest:
    """The largest values of two sets of rows together."""
    if first is None:
        return second
    values = torch.cat([first.values, second.values])
    rows = torch.cat([first.rows, second.rows])
    places = torch.cat([first.places, second.places]).flatten(1, -2)
    index = _largest(values.flatten(1), rows.flatten(1), min(top, len(values)))
    shape = (len(index), *values.shape[1:])
    return Strongest(
        values.flatten(1).gather(0, index).reshape(shape),
        rows.flatten(1).gather(0, index).reshape(shape),
        places.gather(0, index[..., None].expand(-1, -1, len(PLACE))).reshape(*shape, len(PLACE)),
    )


def _largest(values: Float[Tensor, "row unit"], numbers: Int[Tensor, "row unit"], top: int) -> Int[Tensor, "top unit"]:
    """Where the largest values of each column are, in order; of equal ones those of the smallest numbers, in order."""
    least = values.topk(top, dim=0).values[-1]
    tied = values == least
    needed = top - (values > least).sum(0)
    earliest = numbers.masked_fill(~tied, LAST)
    cutoff = earliest.topk(top, dim=0, largest=False).values.gather(0, needed[None] - 1)
    chosen = (values > least) | (earliest <= cutoff) & tied
    index = chosen.T.nonzero()[:, 1].reshape(values.shape[1], top).T
    by_number = numbers.gather(0, index).argsort(dim=0)
    index = index.gather(0, by_number)
    by_value = values.gather(0, index).argsort(dim=0, descending=True, stable=True)
    return index.gather(0, by_value)
