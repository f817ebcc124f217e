"""What a rank is, everywhere in hookkit: 1 + the number of tokens whose logit is strictly larger.

A logit that is NaN has no rank, and stands above all others, so that nothing is first beside it. In tensors of ranks
no rank is 0; in tables it is NaN, and the column then has floating-point numbers.
"""

import math

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

NO_RANK = 0


def rank_among(logits: Float[Tensor, "*place token"], value: Float[Tensor, "*place"]) -> Int[Tensor, "*place"]:
    """The rank that a value has among the logits along the last axis; `NO_RANK` for NaN."""
    not_larger = logits <= value[..., None]
    # counted in int64 it takes five times as long on a CPU
    ranks = logits.shape[-1] + 1 - not_larger.sum(-1, dtype=torch.int32).long()
    return ranks.masked_fill(value.isnan(), NO_RANK)


def shown_ranks(ranks: Int[Tensor, "*place"]) -> Shaped[Tensor, "*place"]:
    """Ranks as a table has them: whole numbers, or floating-point ones where some are NaN."""
    missing = ranks == NO_RANK
    return ranks.double().masked_fill(missing, math.nan) if bool(missing.any()) else ranks
