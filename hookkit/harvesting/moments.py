"""Moments: count, mean, variance and covariance of a stream of values, in float64 and in memory that does not grow.

Each batch is summed up by itself and merged into what came before, by the formulas of Chan, Golub and LeVeque (1979),
which lose no digits where a mean is large and a variance small.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Moments:
    """Of `count` rows: their mean, the sum of squared deviations from it, and on request that of products [n, n]."""

    count: int
    mean: Float[Tensor, "..."]
    spread: Float[Tensor, "..."]
    products: Float[Tensor, "... n n"] | None = None

    @property
    def variance(self) -> Float[Tensor, "..."]:
        """The mean of squared deviations (divided by the count)."""
        return self.spread / self.count

    def head(self, head: int) -> "Moments":
        """Those of one head, where the first axis is heads."""
        products = None if self.products is None else self.products[head]
        return Moments(self.count, self.mean[head], self.spread[head], products)


def exact(values: Tensor) -> Float[Tensor, "..."]:
    """The same numbers in float64, on the CPU where the device has no such numbers."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def moments(values: Float[Tensor, "row ..."], *, covariance: bool = False) -> Moments:
    """The moments of some rows in float64; covariances are of the last axis."""
    mean = values.mean(0)
    away = values - mean
    products = torch.einsum("r...i,r...j->...ij", away, away) if covariance else None
    return Moments(len(values), mean, (away * away).sum(0), products)


def merged(first: Moments | None, second: Moments) -> Moments:
    """The moments of two sets of rows together."""
    if first is None:
        return second
    count = first.count + second.count
    shift = second.mean - first.mean
    weight = first.count * second.count / count
    products = None
    if first.products is not None and second.products is not None:
        products = first.products + second.products + weight * shift[..., :, None] * shift[..., None, :]
    return Moments(
        count,
        first.mean + shift * (second.count / count),
        first.spread + second.spread + weight * shift * shift,
        products,
    )


@dataclass(frozen=True, eq=False)
class Norms:
    """How long the vectors of a site are, along its last axis: one number, or one a head."""

    moments: Moments
    min: Float[Tensor, "..."]
    max: Float[Tensor, "..."]

    @property
    def mean(self) -> Float[Tensor, "..."]:
        """The mean of the lengths."""
        return self.moments.mean

    @property
    def std(self) -> Float[Tensor, "..."]:
        """Their standard deviation."""
        return self.moments.variance.sqrt()

    def head(self, head: int) -> "Norms":
        """Those of one head."""
        return Norms(self.moments.head(head), self.min[head], self.max[head])


def norms(values: Float[Tensor, "row ..."]) -> Norms:
    """The norms of some rows in float64."""
    lengths = values.norm(dim=-1)
    return Norms(moments(lengths), lengths.amin(0), lengths.amax(0))


def merged_norms(first: Norms | None, second: Norms) -> Norms:
    """The norms of two sets of rows together."""
    if first is None:
        return second
    low, high = torch.minimum(first.min, second.min), torch.maximum(first.max, second.max)
    return Norms(merged(first.moments, second.moments), low, high)
