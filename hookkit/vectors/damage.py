"""What steering damages: how much worse the model predicts neutral text, and how far its predictions moved."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import BadPrompt
from ..hooks.base import Hook
from ..model import LM
from ..prompts import Prompts, Row, as_batch
from ..runs import forward


@dataclass(frozen=True)
class Damage:
    """What hooks do to neutral text: the mean loss of its tokens, that without the hooks, and the KL; nats a token."""

    loss: float
    before: float
    kl: float


def neutral_rows(lm: LM, texts: Prompts) -> tuple[Row, ...]:
    """The tokens of neutral texts, each of two or more, so that one of them can be predicted."""
    rows = as_batch(lm, texts).rows
    short = [number for number, row in enumerate(rows) if len(row) < 2]
    if short:
        raise BadPrompt(f"neutral text {short[0]} has one token, and nothing in it is predicted: give longer texts")
    return rows


def damages(
    lm: LM,
    rows: Sequence[Row],
    hooks: Sequence[Sequence[Hook]],
    *,
    under: Sequence[Hook] = (),
    batch: int,
    progress: bool | None = None,
) -> list[Damage]:
    """The damage of each list of hooks; `under` act with and without them. Only `batch` texts' predictions are held."""
    totals = torch.zeros(len(hooks), 3, dtype=torch.float64)  # loss, loss before, kl
    shown = None if progress is None else not progress
    with tqdm(total=len(hooks) * len(rows), unit="text", desc="neutral text", disable=shown) as bar:
        for start in range(0, len(rows), batch):
            some = rows[start : start + batch]
            was = _predictions(lm, some, under)
            for number, each in enumerate(hooks):
                now = _predictions(lm, some, [*under, *each])
                totals[number] += sum(_apart(*three) for three in zip(some, was, now, strict=True))
                bar.update(len(some))
    tokens = sum(len(row) - 1 for row in rows)
    return [Damage(*values) for values in (totals / tokens).tolist()]


def _predictions(lm: LM, rows: Sequence[Row], hooks: Sequence[Hook]) -> list[Float[Tensor, "pos vocab"]]:
    """The log-probabilities at each token of each row but its last."""
    logits = forward(lm, [list(row) for row in rows], *hooks).logits
    return [found[: len(row) - 1].float().log_softmax(-1) for found, row in zip(logits, rows, strict=True)]


def _apart(row: Row, was: Float[Tensor, "pos vocab"], now: Float[Tensor, "pos vocab"]) -> Float[Tensor, " 3"]:
    """The sums over a row's tokens of the loss, the loss before, and KL(before ‖ now)."""
    tokens = torch.tensor(row[1:], device=now.device)[:, None]
    prob = was.exp()
    kl = torch.where(prob > 0, prob * (was - now), 0.0).sum(dim=-1, dtype=torch.float64).clamp(min=0)
    losses = [-each.gather(1, tokens).sum(dtype=torch.float64) for each in (now, was)]
    return torch.stack([*losses, kl.sum()]).cpu()
