"""The numbers of a lens, computed from the logits of many states in few passes and little memory.

They are those of `tables/distributions.py` in float32, without a log-softmax of the whole chunk.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..models.next_token import NO_RANK, ranks_among

CHUNK = {"cpu": 96 * 2**20, "cuda": 1024 * 2**20}  # bytes of logits that are computed at a time
CACHED = {"cpu": 6 * 2**20, "cuda": 1024 * 2**20}  # bytes of logits that stay in a cache
BLOCK = 256  # tokens whose largest logit is computed first


def states_per_chunk(device: torch.device, vocab: int) -> int:
    """Returns how many states' logits are computed at a time."""
    return max(1, CHUNK.get(device.type, CHUNK["cuda"]) // (4 * vocab))


def split_for_cache(
    logits: Float[Tensor, "cell state vocab"],
) -> Sequence[Float[Tensor, "some state vocab"]]:
    """Returns the logits in pieces of some cells each that fit into a cache."""
    bytes_of_cell = 4 * logits[0].numel()
    return logits.split(max(1, CACHED.get(logits.device.type, CACHED["cuda"]) // bytes_of_cell))


@dataclass(frozen=True, eq=False)
class Readout:
    """The numbers of some cells, each with its states in order; the last state is the end.

    ids       [cell, state, token]  the tokens that are shown; their logits, logprobs and ranks
    entropy   [cell, state]         nats
    kl        [cell, state]         KL(end ‖ state), nats
    """

    ids: Int[Tensor, "cell state token"]
    logits: Float[Tensor, "cell state token"]
    logprobs: Float[Tensor, "cell state token"]
    ranks: Int[Tensor, "cell state token"]
    entropy: Float[Tensor, "cell state"]
    kl: Float[Tensor, "cell state"]

    def cpu(self) -> "Readout":
        return Readout(*[tensor.cpu() for tensor in vars(self).values()])

    @staticmethod
    def join(parts: Sequence["Readout"]) -> "Readout":
        """Returns the readout of the cells of all parts."""
        columns = zip(*[vars(part).values() for part in parts], strict=True)
        return Readout(*map(torch.cat, columns))


def numbers(
    logits: Float[Tensor, "cell state vocab"],
    n_tokens: int,
    top: int,
    watched: Sequence[int],
    buffer: Float[Tensor, "2 most_cells state vocab"],
    *,
    anywhere: bool,
) -> Readout:
    """Returns the numbers of a piece of logits.

    Shown are the first `top` tokens of each state or, with `anywhere`, the same tokens at every
    state of a cell: those that rank best at any of them; and the watched ones. `buffer` is
    overwritten: to allocate memory for each piece is slow.
    """
    real = logits[..., :n_tokens]
    values, ids = largest(real, max(top, 1))
    most = values[..., :1]
    if n_tokens != logits.shape[-1]:
        most = logits.amax(-1, keepdim=True)
    values, ids = values[..., :top], ids[..., :top]
    ranks = 1 + (values[..., None, :] > values[..., None]).sum(-1)
    ranks = ranks.masked_fill(values.isnan(), NO_RANK)
    if anywhere and top:
        ids = _best_anywhere(ids, ranks)
        values, ranks = _logits_and_ranks(real, ids)
    if watched:
        watched_ids = torch.tensor(list(watched), device=logits.device)
        watched_ids = watched_ids.expand(*logits.shape[:2], -1)
        watched_values, watched_ranks = _logits_and_ranks(real, watched_ids)
        ids = torch.cat((ids, watched_ids), -1)
        values = torch.cat((values, watched_values), -1)
        ranks = torch.cat((ranks, watched_ranks), -1)
    log_total, entropy, kl = _sums(logits, most, buffer[:, : len(logits)])
    return Readout(ids, values, values - log_total[..., None], ranks, entropy, kl)


def _logits_and_ranks(real: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    values = real.gather(-1, ids)
    return values, ranks_among(real, values)


def _best_anywhere(ids: Tensor, ranks: Tensor) -> Tensor:
    """Returns for each cell the `top` tokens that rank best at any state. `ids` are the leading
    tokens [cell, state, top]; among equal ranks, those at later states come first."""
    selected = []
    for ids_of_cell, ranks_of_cell in zip(ids.tolist(), ranks.tolist(), strict=True):
        best: dict[int, tuple[int, int]] = {}
        for state, tokens in enumerate(ids_of_cell):
            for token, rank in zip(tokens, ranks_of_cell[state], strict=True):
                best[token] = min(best.get(token, (rank, -state)), (rank, -state))
        selected.append(sorted(best, key=best.__getitem__)[: ids.shape[-1]])
    return torch.tensor(selected, device=ids.device)[:, None].expand(-1, ids.shape[1], -1)


def largest(values: Float[Tensor, "cell state token"], top: int) -> tuple[Tensor, Tensor]:
    """Returns the `top` largest values along the last axis, in order, and their indices.

    It returns what `topk` returns, in a fifth of its time: the values are in the blocks that have
    the `top` largest maxima, or after the last whole block.
    """
    blocks = values.shape[-1] // BLOCK
    if blocks <= top:
        return values.topk(top, dim=-1)
    whole, end = blocks * BLOCK, values.shape[-1]
    by_block = values[..., :whole].unflatten(-1, (blocks, BLOCK))
    leading = by_block.amax(-1).topk(top, dim=-1).indices[..., None]
    inside = by_block.gather(-2, leading.expand(*leading.shape[:-1], BLOCK)).flatten(-2)
    ids = (leading * BLOCK + torch.arange(BLOCK, device=values.device)).flatten(-2)
    ids_after = torch.arange(whole, end, device=values.device).expand(*ids.shape[:-1], -1)
    candidates = torch.cat([inside, values[..., whole:]], -1)
    best, index = candidates.topk(top, dim=-1)
    return best, torch.cat([ids, ids_after], -1).gather(-1, index)


def _sums(
    logits: Float[Tensor, "cell state vocab"],
    most: Float[Tensor, "cell state 1"],
    buffer: Float[Tensor, "2 cell state vocab"],
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns log Z, the entropy, and the KL from the last state of each cell.

    Σ p log p is computed as Σ p x - log Z, so that no log-softmax of the whole is in memory. The
    sums are torch's pairwise ones: matrix products add term by term, which over a vocabulary costs
    three digits.
    """
    below, weights = torch.sub(logits, most, out=buffer[0]), buffer[1]
    total = torch.exp(below, out=weights).sum(-1)
    end = weights[:, -1:].clone()
    if not below.amin().isfinite():  # the weight of a banned token is 0, and 0 times -inf is NaN
        below.nan_to_num_(nan=math.nan, neginf=0.0)
    mean = weights.mul_(below).sum(-1) / total
    crossed = below.mul_(end).sum(-1) / total[:, -1:]
    log_total = total.log()
    entropy = (log_total - mean).clamp(min=0)
    kl = (log_total - crossed - entropy[:, -1:]).clamp(min=0)
    kl[:, -1] = kl[:, -1].mul(0.0)  # 0, or NaN if the end has NaN
    return log_total + most[..., 0], entropy, kl
