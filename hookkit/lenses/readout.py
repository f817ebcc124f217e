"""What is read off the logits of many states: in few passes, and never more than a chunk of them in memory."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..models.tokens import NO_RANK, rank_among

CHUNK = {"cpu": 96 * 2**20, "cuda": 1024 * 2**20}  # bytes of logits that are computed at a time
BLOCK = 256  # tokens of which the largest is found first
CACHED = {
    "cpu": 6 * 2**20,
    "cuda": 1024 * 2**20,
}  # and that are read at a time: what stays in a cache between passes


def chunk_of(device: torch.device, vocab: int) -> int:
    """How many states' logits are computed at a time."""
    return max(1, CHUNK.get(device.type, CHUNK["cuda"]) // (4 * vocab))


def in_cache(
    logits: Float[Tensor, "cell state vocab"],
) -> Sequence[Float[Tensor, "some state vocab"]]:
    """The same logits, of some cells at a time."""
    bytes_of_cell = 4 * logits[0].numel()
    return logits.split(max(1, CACHED.get(logits.device.type, CACHED["cuda"]) // bytes_of_cell))


@dataclass(frozen=True, eq=False)
class Readout:
    """The numbers of some cells, each with its states in order: the last one is the end that `kl` is measured to.

    ids       [cell, state, token]  the tokens that are shown; their logits, logprobs and ranks likewise
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
        return Readout(*(getattr(self, name).cpu() for name in self.__dataclass_fields__))


def numbers(
    logits: Float[Tensor, "cell state vocab"],
    real: int,
    top: int,
    watched: Sequence[int],
    room: Float[Tensor, "2 most_cells state vocab"],
    *,
    anywhere: bool,
) -> Readout:
    """The numbers of a chunk of logits. `room` is written over: memory that is fetched anew each time is slow.

    Shown are the first `top` tokens of each state or, with `anywhere`, the same tokens at every state of a cell: those
    that rank best at any of them; and the watched ones.
    """
    shown = logits[..., :real]
    leading, ids = largest(shown, max(top, 1))
    most = leading[..., :1] if real == logits.shape[-1] else logits.amax(-1, keepdim=True)
    leading, ids = leading[..., :top], ids[..., :top]
    ranks = 1 + (leading[..., None, :] > leading[..., None]).sum(-1)
    ranks = ranks.masked_fill(leading.isnan(), NO_RANK)
    if anywhere and top:
        ids = _best_anywhere(ids, ranks)
        leading, ranks = _of(shown, ids)
    if watched:
        others = torch.tensor(list(watched), device=logits.device).expand(*logits.shape[:2], -1)
        values, places = _of(shown, others)
        ids, leading, ranks = (
            torch.cat(pair, -1) for pair in ((ids, others), (leading, values), (ranks, places))
        )
    log_total, entropy, kl = _sums(logits, most, room[:, : len(logits)])
    return Readout(ids, leading, leading - log_total[..., None], ranks, entropy, kl)


def _of(shown: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The logits of tokens, and their ranks."""
    values = shown.gather(-1, ids)
    return values, torch.stack([rank_among(shown, each) for each in values.unbind(-1)], -1)


def _best_anywhere(ids: Tensor, ranks: Tensor) -> Tensor:
    """Of each cell's leading tokens [cell, state, top], those `top` that rank best at any state; the later state first
    among equals."""
    chosen = []
    for tokens, places in zip(ids.tolist(), ranks.tolist(), strict=True):
        best: dict[int, tuple[int, int]] = {}
        for number, (row, found) in enumerate(zip(tokens, places, strict=True)):
            for token, rank in zip(row, found, strict=True):
                best[token] = min(best.get(token, (rank, -number)), (rank, -number))
        chosen.append(sorted(best, key=lambda token: best[token])[: ids.shape[-1]])
    return torch.tensor(chosen, device=ids.device)[:, None].expand(-1, ids.shape[1], -1)


def largest(values: Float[Tensor, "cell state token"], top: int) -> tuple[Tensor, Tensor]:
    """The `top` largest along the last axis, in order, and where they are: what `topk` gives, in a fifth of its time.

    They lie in those blocks that have the `top` largest maxima, or in what is left behind the last whole block.
    """
    blocks = values.shape[-1] // BLOCK
    if blocks <= top:
        return values.topk(top, dim=-1)
    cut = values[..., : blocks * BLOCK].unflatten(-1, (blocks, BLOCK))
    chosen = cut.amax(-1).topk(top, dim=-1).indices
    inside = cut.gather(-2, chosen[..., None].expand(*chosen.shape, BLOCK)).flatten(-2)
    ids = (chosen[..., None] * BLOCK + torch.arange(BLOCK, device=values.device)).flatten(-2)
    rest = torch.arange(blocks * BLOCK, values.shape[-1], device=values.device).expand(
        *ids.shape[:-1], -1
    )
    found, places = torch.cat([inside, values[..., blocks * BLOCK :]], -1).topk(top, dim=-1)
    return found, torch.cat([ids, rest], -1).gather(-1, places)


def _sums(
    logits: Float[Tensor, "cell state vocab"],
    most: Float[Tensor, "cell state 1"],
    room: Float[Tensor, "2 cell state vocab"],
) -> tuple[Tensor, Tensor, Tensor]:
    """The logarithm of the sum of exponentials, the entropy, and the divergence from the last state of each cell.

    Σ p log p is written as Σ p x - log Z, so that no log-softmax of the whole is ever there. The sums are torch's
    pairwise ones: products of matrices add term by term, which over a vocabulary costs three digits.
    """
    below, weights = torch.sub(logits, most, out=room[0]), room[1]
    total = torch.exp(below, out=weights).sum(-1)
    end = weights[:, -1:].clone()
    if (
        not below.amin().isfinite()
    ):  # banned tokens: their weight is 0, and 0 times -inf is no number
        below.nan_to_num_(nan=math.nan, neginf=0.0)
    mean = weights.mul_(below).sum(-1) / total
    crossed = below.mul_(end).sum(-1) / total[:, -1:]
    log_total = total.log()
    entropy = (log_total - mean).clamp(min=0)
    kl = (log_total - crossed - entropy[:, -1:]).clamp(min=0)
    kl[:, -1] = kl[:, -1].mul(0.0)  # 0, or NaN where the end is not known
    return log_total + most[..., 0], entropy, kl
