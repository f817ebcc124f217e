"""Linear CKA: how alike two sets of vectors of the same tokens are, whatever axes and sizes each is written in.

    CKA(X, Y) = |YᵀX|² / (|XᵀX| |YᵀY|)

with X [token, d] and Y [token, e] less their means over the tokens, and Frobenius norms: 1 where one is the other
turned, scaled by one number and moved, 0 where no direction of the one goes with any of the other (Kornblith, Norouzi,
Lee and Hinton, 2019, Similarity of Neural Network Representations Revisited, https://arxiv.org/abs/1905.00414). With
K = XXᵀ and L = YYᵀ it is the same as <K, L> / (|K| |L|), which is less to compute where tokens are few.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from ..harvesting.moments import Moments, exact, merged, moments

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
    return _ratio(*_products(x @ x.T, y @ y.T)) if len(x) < x.shape[1] + y.shape[1] else _of_sums(x, y)


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
