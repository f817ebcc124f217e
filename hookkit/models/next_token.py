"""The numbers of next-token distributions: probabilities, entropies, divergences, margins, ranks.

All functions are batched: they take logits or log-probabilities with the vocabulary on the last
axis. Rows of the vocabulary that are no token are never ranked and never shown.

The rank of a token, everywhere in hookkit, is 1 + the number of tokens whose logit is strictly
larger. A NaN logit has no rank and counts as larger than all others, so no token beside it has rank
1. In tensors of ranks, no rank is 0; in tables it is NaN, and the column is floating-point then.
"""

import math
from typing import TypeAlias

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

Batch: TypeAlias = Float[Tensor, "*batch vocab"]
Numbers: TypeAlias = Float[Tensor, "*batch"]

NO_RANK = 0


def token_logits(logits: Batch, n_tokens: int) -> Float[Tensor, "*batch token"]:
    """Returns the logits of the vocabulary's rows that are tokens; all if `n_tokens` is 0."""
    return logits[..., : n_tokens or None]


def exact_logprobs(logits: Batch) -> Batch:
    """Returns the log-probabilities in float64, for sums over the vocabulary."""
    return logits.double().log_softmax(dim=-1)


def values_at(values: Batch, ids: Int[Tensor, "*batch"]) -> Numbers:
    """Returns the value of one token of each distribution."""
    return values.gather(-1, ids.to(values.device)[..., None])[..., 0]


def top_tokens(logits: Batch, n_tokens: int, count: int | None) -> Int[Tensor, "*batch count"]:
    """Returns the `count` most likely tokens, most likely first; all tokens for None.

    Of tokens with equal logits the lower id comes first, as in greedy decoding.
    """
    order = torch.sort(token_logits(logits, n_tokens), dim=-1, descending=True, stable=True)
    return order.indices[..., :count]


def margin_of(logits: Batch, n_tokens: int) -> Numbers:
    """Returns the largest logit minus the second; infinite if every other token is banned."""
    top = token_logits(logits, n_tokens).topk(2, dim=-1).values
    return top[..., 0] - top[..., 1]


def rank_among(logits: Float[Tensor, "*batch token"], value: Numbers) -> Int[Tensor, "*batch"]:
    """Returns the rank of a value among the logits along the last axis; `NO_RANK` for NaN."""
    not_larger = logits <= value[..., None]
    # Counting in int64 takes five times as long on a CPU.
    ranks = logits.shape[-1] + 1 - not_larger.sum(-1, dtype=torch.int32).long()
    return ranks.masked_fill(value.isnan(), NO_RANK)


def ranks_among(
    logits: Float[Tensor, "*batch token"], values: Float[Tensor, "*batch n"]
) -> Int[Tensor, "*batch n"]:
    """Returns the ranks of several values among the logits along the last axis."""
    return torch.stack([rank_among(logits, value) for value in values.unbind(-1)], dim=-1)


def ranks_for_table(ranks: Int[Tensor, "*batch"]) -> Shaped[Tensor, "*batch"]:
    """Returns ranks for a table: whole numbers, or floating-point ones if some are NaN."""
    missing = ranks == NO_RANK
    return ranks.double().masked_fill(missing, math.nan) if bool(missing.any()) else ranks


def expectation(logprobs: Batch, values: Batch, *, dtype: torch.dtype | None = None) -> Numbers:
    """Returns the mean of values under each distribution, summed in `dtype`.

    A value whose probability is 0 does not count, even if it is infinite. A probability that is
    NaN makes the mean NaN.
    """
    probs = logprobs.exp()
    products = probs * values
    mean = products.sum(-1, dtype=dtype)
    if mean.isfinite().all():
        return mean
    return torch.where(probs == 0, 0.0, products).sum(-1, dtype=dtype)


def entropy_of(logprobs: Batch) -> Numbers:
    """Returns -Σ p log p, in nats."""
    return 0.0 - expectation(logprobs, logprobs)  # 0.0 for a certain token, not -0.0


def varentropy_of(logprobs: Batch) -> Numbers:
    """Returns the variance of -log p under p, in nats²; 0 if all candidates are equally likely."""
    return expectation(logprobs, (logprobs + entropy_of(logprobs)[..., None]) ** 2)


def kl_divergence(p: Batch, q: Batch, *, dtype: torch.dtype | None = None) -> Numbers:
    """Returns KL(p ‖ q) in nats, from log-probabilities; rounding may leave it below 0."""
    return expectation(p, p - q, dtype=dtype)


def divergences(before: Batch, after: Batch) -> dict[str, Numbers]:
    """Returns kl, kl_reverse, js and tv of the distributions with these log-probabilities."""
    middle = torch.logaddexp(before, after) - math.log(2)
    values = {
        "kl": kl_divergence(before, after),
        "kl_reverse": kl_divergence(after, before),
        "js": (kl_divergence(before, middle) + kl_divergence(after, middle)) / 2,
        "tv": (before.exp() - after.exp()).abs().sum(-1) / 2,
    }
    # rounding can leave -1e-17; clamp keeps NaN
    return {name: value.clamp(min=0.0) for name, value in values.items()}
