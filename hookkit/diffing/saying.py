"""What two models say after each token of the same texts: distances of the distributions, and shifts of the ranks."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..distributions import Distribution, expected
from ..model import LM
from ..shifts.naming import literal
from ..tables import shift_of

NUMBERS_AT_ONCE = 2**22  # logits in one piece of work: 32 MiB of float64
MOVERS = 3
Logits = Float[Tensor, "token vocab"]


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokens of some prompts, one a row: the prompt's number, the position, its id, and the id that follows or -1."""

    row: list[int]
    pos: list[int]
    ids: list[int]
    following: list[int]

    def __len__(self) -> int:
        return len(self.row)


def distances(lm: LM, before: Logits, after: Logits, tokens: Tokens) -> pd.DataFrame:
    """How far apart two models' distributions are after each token.

    Columns: row, pos, read (the token there, the last one read); kl (KL(before‖after), nats), kl_reverse, js (nats, at
    most ln 2); entropy_before, _after, _delta (nats); top1_before, top1_after, top1_changed; loss_before, _after,
    _delta (nats, of the token that follows in the prompt; empty after its last).
    """
    step = max(1, NUMBERS_AT_ONCE // before.shape[-1])
    following = torch.tensor(tokens.following)
    parts = [
        _numbers(lm, before[start : start + step], after[start : start + step], following[start : start + step])
        for start in range(0, len(tokens), step)
    ]
    table = pd.concat(parts, ignore_index=True)
    for place, name in enumerate(("row", "pos")):
        table.insert(place, name, getattr(tokens, name))
    table.insert(2, "read", [literal(lm, token) for token in tokens.ids])
    return table


def _numbers(lm: LM, before: Logits, after: Logits, following: Int[Tensor, " token"]) -> pd.DataFrame:
    p, q = (logits.detach().cpu().double().log_softmax(-1) for logits in (before, after))
    middle = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0))
    found = {"kl": expected(p, p - q), "kl_reverse": expected(q, q - p)}
    found["js"] = (expected(p, p - middle) + expected(q, q - middle)) / 2
    found = {name: values.clamp(min=0.0) for name, values in found.items()}  # rounding can leave -1e-17
    entropies = 0.0 - expected(p, p), 0.0 - expected(q, q)
    found |= {
        "entropy_before": entropies[0],
        "entropy_after": entropies[1],
        "entropy_delta": entropies[1] - entropies[0],
    }
    table = pd.DataFrame({name: values.tolist() for name, values in found.items()})
    firsts = [said[:, : lm.n_tokens or None].argmax(-1).tolist() for said in (before, after)]
    table["top1_before"], table["top1_after"] = ([literal(lm, token) for token in tokens] for tokens in firsts)
    table["top1_changed"] = [one != other for one, other in zip(*firsts, strict=True)]
    losses = [0.0 - said.gather(1, following.clamp(min=0)[:, None])[:, 0] for said in (p, q)]
    known = (following >= 0).tolist()
    for when, loss in zip(("before", "after"), losses, strict=True):
        table[f"loss_{when}"] = [
            value if there else float("nan") for value, there in zip(loss.tolist(), known, strict=True)
        ]
    was, now = table["loss_before"], table["loss_after"]
    table["loss_delta"] = (now - was).where((now != was) | now.isna(), 0.0)
    return table


def rank_shifts(
    lm: LM, before: Logits, after: Logits, tokens: Tokens, top: int, watched: Sequence[int], named: Sequence[int]
) -> pd.DataFrame:
    """`rank_shift` of what two models say after these tokens, with parts of characters as bytes."""
    places = [{"row": row, "pos": pos} for row, pos in zip(tokens.row, tokens.pos, strict=True)]
    pairs = [
        tuple(Distribution(lm, place, logits[number].detach().float().cpu()) for logits in (before, after))
        for number, place in enumerate(places)
    ]
    table = shift_of(pairs, top, MOVERS, list(watched), list(named))  # pyright: ignore[reportArgumentType]
    return table.assign(token=[literal(lm, token) for token in table["token_id"]])
