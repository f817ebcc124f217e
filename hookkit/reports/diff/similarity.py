"""Linear CKA: how alike two sets of vectors of the same tokens are, whatever axes and sizes each is written in.

    CKA(X, Y) = |YᵀX|² / (|XᵀX| |YᵀY|)

with X [token, d] and Y [token, e] less their means over the tokens, and Frobenius norms: 1 where one is the other
turned, scaled by one number and moved, 0 where no direction of the one goes with any of the other (Kornblith, Norouzi,
Lee and Hinton, 2019, Similarity of Neural Network Representations Revisited, https://arxiv.org/abs/1905.00414). With
K = XXᵀ and L = YYᵀ it is the same as <K, L> / (|K| |L|), which is less to compute where tokens are few.

How alike two models are at one site, over tokens that come a batch at a time.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...data.harvest.statistics import Moments, exact, merged, moments
from ...models.sites import AnySite, Site

Vectors = Float[Tensor, "token d"]


def linear_cka(before: Vectors, after: Float[Tensor, "token e"]) -> float:
    """The linear CKA of two sets of vectors, a row for each token: 0 to 1, NaN where all rows of one are the same.

    A vector turned, made longer and moved stays what it was:

    >>> x = torch.randn(20, 4)
    >>> turned = torch.linalg.qr(torch.randn(4, 4)).Q
    >>> round(linear_cka(x, 3 * x @ turned + 1), 6), linear_cka(x, torch.ones(20, 7))
    (1.0, nan)
    """
    x, y = (centred(exact(rows)) for rows in (before, after))
    return (
        _ratio(*_products(x @ x.T, y @ y.T)) if len(x) < x.shape[1] + y.shape[1] else _of_sums(x, y)
    )


def centred(rows: Vectors) -> Vectors:
    """The rows less their mean."""
    return rows - rows.mean(0)


def _products(k: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (k * m).sum(), (k * k).sum(), (m * m).sum()


def _of_sums(x: Tensor, y: Tensor) -> float:
    return _ratio((x.T @ y).square().sum(), (x.T @ x).square().sum(), (y.T @ y).square().sum())


def _ratio(both: Tensor, one: Tensor, other: Tensor) -> float:
    return float(both / (one * other).sqrt()) if bool(one > 0) and bool(other > 0) else float("nan")


class RunningCKA:
    """The linear CKA of rows that come a batch at a time.

    Rows are kept as they are while that takes less room than what is summed up of them: the moments of both sets side
    by side, [d + e, d + e], in float64 and by the formulas of `harvesting.moments`, so that a large mean costs no
    digits.
    """

    def __init__(self, tokens: int, widths: tuple[int, int]) -> None:
        self._keeps = keeps_rows(tokens, widths)
        self._width = widths[0]
        self._rows: list[tuple[Tensor, Tensor]] = []
        self._moments: Moments | None = None

    def add(self, before: Vectors, after: Float[Tensor, "token e"]) -> None:
        """Some more rows."""
        if self._keeps:
            self._rows.append((before.cpu(), after.cpu()))
        else:
            both = torch.cat([exact(before), exact(after).to(exact(before).device)], dim=-1)
            self._moments = merged(self._moments, moments(both, covariance=True))

    def value(self) -> float:
        """The CKA of all rows so far."""
        if self._keeps:
            before, after = (torch.cat(rows) for rows in zip(*self._rows, strict=True))
            return linear_cka(before, after)
        assert self._moments is not None and self._moments.products is not None
        products, d = self._moments.products, self._width
        parts = (products[:d, d:], products[:d, :d], products[d:, d:])
        return _ratio(*(part.square().sum() for part in parts))


def keeps_rows(tokens: int, widths: tuple[int, int]) -> bool:
    """Whether the rows of so many tokens take less room (in float32) than the sums of their products (in float64)."""
    return tokens <= 2 * sum(widths)


def room(tokens: int, widths: tuple[int, int]) -> int:
    """The bytes that a running CKA takes in the end."""
    return 4 * tokens * sum(widths) if keeps_rows(tokens, widths) else 8 * sum(widths) ** 2


COLUMNS = ("site", "name", "layer", "tokens", "cosine", "cosine_min", "difference", "difference_max",
           "norm_before", "norm_after", "cka", "parts")  # fmt: skip


@dataclass(frozen=True, eq=False)
class Apart:
    """Of each token: the cosine of what two models have there, and the length of the difference as a part of the
    first one's length. NaN and infinite numbers of an activation are not passed over: they are a difference."""

    cosine: Float[Tensor, " token"]
    difference: Float[Tensor, " token"]
    norms: tuple[Float[Tensor, " token"], Float[Tensor, " token"]]


def apart(before: Float[Tensor, "token d"], after: Float[Tensor, "token d"]) -> Apart:
    """How far two models' vectors of the same tokens are apart, one number a token.

    Two vectors that are equal differ by 0, be they zero or infinite at the same places; from a vector of zeros any
    other differs by infinitely much. The cosine with a vector of zeros is NaN.
    """
    x = before if before.dtype == torch.float64 else before.float()
    y = after.to(x.device, x.dtype)
    change = torch.where(x == y, 0.0, y - x).norm(dim=-1)
    real = [torch.where(torch.isinf(values), 0.0, values) for values in (x, y)]
    norms = real[0].norm(dim=-1), real[1].norm(dim=-1)
    cosine = ((real[0] * real[1]).sum(-1) / (norms[0] * norms[1])).clamp(-1.0, 1.0)
    return Apart(cosine, torch.where(change == 0, 0.0, change / norms[0]), norms)


@dataclass(eq=False)
class Alike:
    """One site, summed up as tokens come. `cka` is None where none is taken."""

    site: AnySite
    cka: RunningCKA | None
    tokens: int = 0
    compared: int = 0  # tokens with a cosine
    cosine: float = 0.0
    cosine_min: float = float("inf")
    difference: float = 0.0
    difference_max: float = 0.0
    norms: tuple[float, float] = (0.0, 0.0)
    comparable: bool = True  # of one shape

    def add(
        self, before: Float[Tensor, "token ..."], after: Float[Tensor, "token ..."]
    ) -> Apart | None:
        """Some more tokens; how far each is apart, where that has a meaning."""
        self.comparable = before.shape == after.shape
        x, y = before.flatten(1), after.flatten(1)
        if self.cka is not None:
            self.cka.add(x, y)
        if self.comparable:
            return self.told(apart(x, y))
        self._measured(x.float().norm(dim=-1), y.float().norm(dim=-1))
        return None

    def told(self, found: Apart) -> Apart:
        """The same from how far each token is apart."""
        known = found.cosine[~found.cosine.isnan()].double()
        self.compared += len(known)
        self.cosine += float(known.sum())
        self.cosine_min = min([self.cosine_min, *known.tolist()])
        self.difference += float(found.difference.double().sum())
        largest = float(found.difference.max())  # NaN where any is
        self.difference_max = largest if not largest <= self.difference_max else self.difference_max
        self._measured(*found.norms)
        return found

    def _measured(self, before: Float[Tensor, " token"], after: Float[Tensor, " token"]) -> None:
        self.tokens += len(before)
        self.norms = (
            self.norms[0] + float(before.double().sum()),
            self.norms[1] + float(after.double().sum()),
        )

    def row(self, tolerance: float) -> dict[str, Any]:
        """The site's row of the table."""
        nan = float("nan")
        found: dict[str, Any] = {
            "site": str(self.site),
            "name": name_of(self.site),
            "layer": layer_of(self.site),
        }
        found |= {
            "tokens": self.tokens,
            "cosine": nan,
            "cosine_min": nan,
            "difference": nan,
            "difference_max": nan,
        }
        found |= {
            f"norm_{when}": norm / self.tokens
            for when, norm in zip(("before", "after"), self.norms, strict=True)
        }
        found["cka"] = nan if self.cka is None else self.cka.value()
        if not self.comparable:
            return found | {"parts": None}
        if self.compared:
            found |= {"cosine": self.cosine / self.compared, "cosine_min": self.cosine_min}
        found |= {
            "difference": self.difference / self.tokens,
            "difference_max": self.difference_max,
        }
        return found | {"parts": not self.difference_max <= tolerance}


def name_of(site: AnySite) -> str:
    """The site's name without its layer; a module's path."""
    return site.name if isinstance(site, Site) else str(site)


def layer_of(site: AnySite) -> int | None:
    """The site's block, where it is in one."""
    return site.layer if isinstance(site, Site) else None
