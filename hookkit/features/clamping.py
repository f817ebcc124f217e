"""What clamping a feature does to the next token, beside random features that add as much."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..hooks.ablation import ablate
from ..hooks.base import Hook
from ..hooks.capture import capture
from ..hooks.edits import edit
from ..models.lm import LM
from ..models.next_token import exact_logprobs, kl_divergence, rank_among, token_logits, values_at
from ..models.sites import Site
from ..runs.forward import forward
from ..runs.run import Run
from ..tables.distributions import token_texts
from .dictionary import Dictionary

DRAWS = 8  # random features


@dataclass(frozen=True)
class Context:
    """The tokens of a text up to the one at which a feature is clamped, and the token after it."""

    ids: tuple[int, ...]
    came: int
    text: int


def clamp_effects(
    lm: LM,
    dictionary: Dictionary,
    feature: Site,
    contexts: Sequence[Context],
    peak: float,
    *,
    watch: int | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Returns what clamping a feature at one token of each context does to the next token.

    The feature is set to 0, and to twice its largest activation `peak`. Columns: feature, edit,
    text, pos, read (the token there), came (the text's next token), activation (before); loss of
    the next token, and rank of the watched `token` (the next token by default), each with _before,
    _after and _delta; kl (nats, of the distribution after from that before). control_loss_delta,
    control_kl and control_rank_delta are the means over 8 other features, drawn at random, that add
    a vector of the same length instead; control_kl_max is the largest.
    """
    assert feature.head is not None
    base_site = dictionary.site
    came = torch.tensor([context.came for context in contexts])
    watched = came if watch is None else torch.full_like(came, watch)
    prompts = [context.ids for context in contexts]
    look = capture([feature, base_site], pos=-1)
    before_run = forward(lm, prompts, look, logits="last")
    before = _Outcome.of(before_run, came, watched)
    activations = before_run[feature][:, 0].float().cpu()
    directions = _draw_others(dictionary, feature.head, seed)
    parts: list[pd.DataFrame] = []
    for name, value in (("to 0", 0.0), ("to 2 x max", 2 * peak)):
        clamp = ablate(feature, to=torch.tensor(value), pos=-1)
        after_run = forward(lm, prompts, clamp, look, logits="last")
        after = _Outcome.of(after_run, came, watched)
        added = after_run[base_site] - before_run[base_site]
        lengths = added.flatten(1).float().norm(dim=-1).cpu()
        sign = torch.where(value > activations, 1.0, -1.0)
        control_hook = _add_others(base_site, directions, lengths * sign)
        control_run = forward(lm, prompts * len(directions), control_hook, logits="last")
        control = _Outcome.of(
            control_run, came.repeat(len(directions)), watched.repeat(len(directions))
        )
        columns = {
            "feature": feature.head,
            "edit": name,
            **_describe_contexts(lm, contexts),
            "activation": activations.tolist(),
            "token": token_texts(lm, watched.tolist()),
            "token_id": watched.tolist(),
        }
        columns |= _compare(before, after, control, len(directions))
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


def _describe_contexts(lm: LM, contexts: Sequence[Context]) -> dict[str, list[Any]]:
    """Returns the columns of the contexts: the last token that was read, and the one that came."""
    return {
        "text": [context.text for context in contexts],
        "pos": [len(context.ids) - 1 for context in contexts],
        "read": token_texts(lm, [context.ids[-1] for context in contexts]),
        "came": token_texts(lm, [context.came for context in contexts]),
    }


@dataclass(frozen=True, eq=False)
class _Outcome:
    """The distributions after the clamped position: the loss of a token and the rank of another."""

    logprobs: Float[Tensor, "row vocab"]
    losses: Float[Tensor, " row"]
    ranks: Int[Tensor, " row"]

    @classmethod
    def of(cls, run: Run, came: Tensor, watched: Tensor) -> _Outcome:
        logits = token_logits(run.logits[:, -1].float().cpu(), run.lm.n_tokens)
        logprobs = exact_logprobs(logits)
        ranks = rank_among(logits, values_at(logits, watched))
        return cls(logprobs, -values_at(logprobs, came), ranks)


def _draw_others(dictionary: Dictionary, feature: int, seed: int) -> Float[Tensor, "draw d"]:
    """Returns the directions of other features, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(dictionary.n_features, generator=generator)
    norms = dictionary.weights["W_dec"].norm(dim=-1)
    is_other = (order != feature) & (norms[order] > 0)
    numbers = order[is_other][:DRAWS]
    return nn.functional.normalize(dictionary.weights["W_dec"][numbers].float(), dim=-1)


def _add_others(
    site: Site, directions: Float[Tensor, "draw d"], lengths: Float[Tensor, " row"]
) -> Hook:
    """Returns an edit of all rows for each draw: it adds the draw's direction, of these lengths."""
    added = torch.einsum("nd,r->nrd", directions, lengths).flatten(0, 1)

    def add(values: Tensor) -> Tensor:
        return values + added.to(values).reshape(values.shape)

    return edit(site, add, pos=-1)


def _compare(before: _Outcome, after: _Outcome, control: _Outcome, draws: int) -> dict[str, Any]:
    """Returns the columns of numbers before and after, and those of the control."""
    many = _Outcome(
        before.logprobs.repeat(draws, 1), before.losses.repeat(draws), before.ranks.repeat(draws)
    )
    control_kl = kl_divergence(many.logprobs, control.logprobs).reshape(draws, -1)
    control_losses = (control.losses - many.losses).reshape(draws, -1)
    control_ranks = (control.ranks - many.ranks).double().reshape(draws, -1)
    return {
        "loss_before": before.losses.tolist(),
        "loss_after": after.losses.tolist(),
        "loss_delta": (after.losses - before.losses).tolist(),
        "rank_before": before.ranks.tolist(),
        "rank_after": after.ranks.tolist(),
        "rank_delta": (after.ranks - before.ranks).tolist(),
        "kl": kl_divergence(before.logprobs, after.logprobs).clamp(min=0).tolist(),
        "control_loss_delta": control_losses.mean(0).tolist(),
        "control_rank_delta": control_ranks.mean(0).tolist(),
        "control_kl": control_kl.mean(0).clamp(min=0).tolist(),
        "control_kl_max": control_kl.amax(0).clamp(min=0).tolist(),
    }
