"""How alike two models are: linear CKA of a site, and the distances of each token's vectors.

    CKA(X, Y) = |YᵀX|² / (|XᵀX| |YᵀY|)

with X [token, d] and Y [token, e] minus their means over the tokens, and Frobenius norms. It is 1
if one is the other rotated, scaled by one number and shifted, and 0 if no direction of one
correlates with any of the other (Kornblith, Norouzi, Lee and Hinton, 2019, Similarity of Neural
Network Representations Revisited, https://arxiv.org/abs/1905.00414). With K = XXᵀ and L = YYᵀ it
equals <K, L> / (|K| |L|), which needs less computation for few tokens.
"""

import operator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...data.harvest.statistics import Moments, compute_moments, merge_moments, to_float64
from ...models import next_token
from ...models.lm import LM
from ...models.sites import AnySite, Site
from ...tables.rank_tables import add_deltas

Vectors = Float[Tensor, "token d"]
Logits = Float[Tensor, "token vocab"]
LOGITS_AT_ONCE = 2**22  # logits in one piece of work: 32 MiB of float64
COLUMNS = ("site", "name", "layer", "tokens", "cosine", "cosine_min", "difference",
           "difference_max", "norm_before", "norm_after", "cka", "parts")  # fmt: skip


def linear_cka(before: Vectors, after: Float[Tensor, "token e"]) -> float:
    """The linear CKA of two sets of vectors, one row for each token.

    Returns a number from 0 to 1, NaN if all rows of one set are equal. Rotating, scaling and
    shifting the vectors does not change it:

    >>> x = torch.randn(20, 4)
    >>> rotation = torch.linalg.qr(torch.randn(4, 4)).Q
    >>> round(linear_cka(x, 3 * x @ rotation + 1), 6), linear_cka(x, torch.ones(20, 7))
    (1.0, nan)
    """
    x, y = to_float64(before), to_float64(after)
    x, y = x - x.mean(0), y - y.mean(0)
    if len(x) >= x.shape[1] + y.shape[1]:
        return _ratio((x.T @ y).square(), (x.T @ x).square(), (y.T @ y).square())
    k, m = x @ x.T, y @ y.T
    return _ratio(k * m, k * k, m * m)


def _ratio(cross: Tensor, before: Tensor, after: Tensor) -> float:
    """The sum of the first over the root of the product of the other two sums."""
    cross_sum, before_sum, after_sum = cross.sum(), before.sum(), after.sum()
    if bool(before_sum > 0) and bool(after_sum > 0):
        return float(cross_sum / (before_sum * after_sum).sqrt())
    return float("nan")


class RunningCKA:
    """The linear CKA of rows that are added batch by batch. Owns the rows, or their moments.

    Rows are kept as they are while they need less memory than their moments: the moments of both
    sets side by side, [d + e, d + e], in float64, by the formulas of `data.harvest.statistics`, so
    that a large mean costs no precision.
    """

    def __init__(self, tokens: int, widths: tuple[int, int]) -> None:
        self._keeps_rows = keeps_rows(tokens, widths)
        self._width = widths[0]
        self._rows: list[tuple[Tensor, Tensor]] = []
        self._moments: Moments | None = None

    def add(self, before: Vectors, after: Float[Tensor, "token e"]) -> None:
        """Add more rows."""
        if self._keeps_rows:
            self._rows.append((before.cpu(), after.cpu()))
        else:
            x = to_float64(before)
            rows = torch.cat([x, to_float64(after).to(x.device)], dim=-1)
            self._moments = merge_moments(self._moments, compute_moments(rows, covariance=True))

    def value(self) -> float:
        """The CKA of all rows so far."""
        if self._keeps_rows:
            before, after = zip(*self._rows, strict=True)
            return linear_cka(torch.cat(before), torch.cat(after))
        assert self._moments is not None and self._moments.products is not None
        products, d = self._moments.products, self._width
        return _ratio(
            products[:d, d:].square(), products[:d, :d].square(), products[d:, d:].square()
        )


def keeps_rows(tokens: int, widths: tuple[int, int]) -> bool:
    """True if the rows (float32) need less memory than the sums of their products (float64)."""
    return tokens <= 2 * sum(widths)


def cka_bytes(tokens: int, widths: tuple[int, int]) -> int:
    """The bytes that a `RunningCKA` needs at its end."""
    width = sum(widths)
    return 4 * tokens * width if keeps_rows(tokens, widths) else 8 * width**2


@dataclass(frozen=True, eq=False)
class TokenDistances:
    """The cosine of two vectors of each token, |after - before| / |before|, and their norms."""

    cosine: Float[Tensor, " token"]
    difference: Float[Tensor, " token"]
    norms: tuple[Float[Tensor, " token"], Float[Tensor, " token"]]


def token_distances(
    before: Float[Tensor, "token d"], after: Float[Tensor, "token d"]
) -> TokenDistances:
    """How far apart two models' vectors of the same tokens are, one number for each token.

    Two equal vectors have the difference 0, also if they are zero or infinite in the same elements.
    From a vector of zeros any other vector has an infinite difference. The cosine with a vector of
    zeros is NaN.
    """
    x = before if before.dtype == torch.float64 else before.float()
    y = after.to(x.device, x.dtype)
    change = torch.where(x == y, 0.0, y - x).norm(dim=-1)
    finite_x = torch.where(torch.isinf(x), 0.0, x)
    finite_y = torch.where(torch.isinf(y), 0.0, y)
    norms = finite_x.norm(dim=-1), finite_y.norm(dim=-1)
    cosine = ((finite_x * finite_y).sum(-1) / (norms[0] * norms[1])).clamp(-1.0, 1.0)
    return TokenDistances(cosine, torch.where(change == 0, 0.0, change / norms[0]), norms)


def prediction_distances(
    lm: LM, before: Logits, after: Logits, tokens: pd.DataFrame
) -> pd.DataFrame:
    """How far apart two models' distributions are after each token.

    Columns: row, pos, read (the token at pos, the last one read); kl (KL(before‖after), nats),
    kl_reverse, js (nats, at most ln 2); entropy_before, _after, _delta (nats); top1_before,
    top1_after, top1_changed; loss_before, _after, _delta (nats, of the token that follows in the
    prompt; empty after its last).
    """
    step = max(1, LOGITS_AT_ONCE // before.shape[-1])
    following = torch.tensor(tokens["following"].tolist())
    parts = []
    for start in range(0, len(tokens), step):
        piece = slice(start, start + step)
        parts.append(_compare_logits(lm, before[piece], after[piece], following[piece]))
    numbers = pd.concat(parts, ignore_index=True)
    return pd.concat([tokens[["row", "pos", "read"]], numbers], axis="columns")


def _compare_logits(
    lm: LM, before: Logits, after: Logits, following: Int[Tensor, " token"]
) -> pd.DataFrame:
    columns: dict[str, Any] = {}
    logprobs, top1 = {}, {}
    for when, logits in (("before", before), ("after", after)):
        logprobs[when] = next_token.exact_logprobs(logits.detach().cpu())
        top1[when] = _top_tokens(next_token.token_logits(logits, lm.n_tokens))
        columns[f"entropy_{when}"] = next_token.entropy_of(logprobs[when]).tolist()
        losses = 0.0 - next_token.values_at(logprobs[when], following.clamp(min=0))
        columns[f"loss_{when}"] = losses.masked_fill(following < 0, float("nan")).tolist()
    apart = next_token.divergences(logprobs["before"], logprobs["after"])
    columns |= {name: apart[name].tolist() for name in ("kl", "kl_reverse", "js")}
    text = partial(_text_or_none, lm)
    table = add_deltas(pd.DataFrame(columns), ["entropy"]).assign(
        top1_before=list(map(text, top1["before"])),
        top1_after=list(map(text, top1["after"])),
        top1_changed=list(map(operator.ne, top1["before"], top1["after"])),
    )
    return add_deltas(table, ["loss"])


def _top_tokens(logits: Logits) -> list[int]:
    """The most likely tokens; -1 where logits are NaN, so that no token is the first."""
    return logits.argmax(-1).masked_fill(logits.isnan().any(-1), -1).tolist()


def _text_or_none(lm: LM, token_id: int) -> str | None:
    return None if token_id < 0 else lm.string(token_id)


@dataclass(eq=False)
class SiteSimilarity:
    """The running sums of one site. Owned by `PairedRuns`. `cka` is None if no CKA is computed."""

    site: AnySite
    cka: RunningCKA | None
    tokens: int = 0
    compared: int = 0  # tokens with a cosine
    cosine: float = 0.0
    cosine_min: float = float("inf")
    difference: float = 0.0
    difference_max: float = 0.0
    norms: tuple[float, float] = (0.0, 0.0)
    comparable: bool = True  # whether the vectors have the same shape

    def add(
        self, before: Float[Tensor, "token ..."], after: Float[Tensor, "token ..."]
    ) -> TokenDistances | None:
        """Add more tokens. Returns their distances, None if the shapes differ."""
        self.comparable = before.shape == after.shape
        x, y = before.flatten(1), after.flatten(1)
        if self.cka is not None:
            self.cka.add(x, y)
        if not self.comparable:
            self._add_norms(x.float().norm(dim=-1), y.float().norm(dim=-1))
            return None
        distances = token_distances(x, y)
        self.add_distances(distances)
        return distances

    def add_distances(self, distances: TokenDistances) -> None:
        """Add more tokens whose distances are known."""
        cosines = distances.cosine[~distances.cosine.isnan()].double()
        self.compared += len(cosines)
        self.cosine += float(cosines.sum())
        self.cosine_min = min([self.cosine_min, *cosines.tolist()])
        self.difference += float(distances.difference.double().sum())
        largest = float(distances.difference.max())  # NaN if any is NaN
        if not largest <= self.difference_max:
            self.difference_max = largest
        self._add_norms(*distances.norms)

    def _add_norms(self, before: Float[Tensor, " token"], after: Float[Tensor, " token"]) -> None:
        self.tokens += len(before)
        norm_before, norm_after = self.norms
        self.norms = (
            norm_before + float(before.double().sum()),
            norm_after + float(after.double().sum()),
        )

    def row(self, tolerance: float) -> dict[str, Any]:
        """The site's row of the table."""
        row: dict[str, Any] = dict.fromkeys(COLUMNS, float("nan"))
        name = self.site.name if isinstance(self.site, Site) else str(self.site)
        row |= {"site": str(self.site), "name": name, "layer": layer_of(self.site), "parts": None}
        row |= {"tokens": self.tokens, "norm_before": self.norms[0] / self.tokens}
        row["norm_after"] = self.norms[1] / self.tokens
        if self.cka is not None:
            row["cka"] = self.cka.value()
        if self.comparable:
            row["difference"] = self.difference / self.tokens
            row["difference_max"] = self.difference_max
            row["parts"] = not self.difference_max <= tolerance
        if self.comparable and self.compared:
            row["cosine"] = self.cosine / self.compared
            row["cosine_min"] = self.cosine_min
        return row


def layer_of(site: AnySite) -> int | None:
    """The site's block; None for a site outside the blocks."""
    return site.layer if isinstance(site, Site) else None
