"""Queries and keys through their own softmax: the QK fix of AtP* (Kramár et al. 2024, section
3.1.1).

A query acts on the metric through its pattern alone. The gradient at the query treats the softmax
as linear, which is wrong where one key has all of the attention. Here the pattern that the other
prompt's query (or key) would give is computed from the site `scores`, and the change of the pattern
is multiplied by the gradient there. It still takes one forward and one backward. The factor of the
products of queries and keys is computed from the scores of the two runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..errors import Unsupported
from ..hooks.capture import Captured, capture
from ..models.lm import LM
from ..models.sites import SITES_WITH_KEY_HEADS, AnySite, Site
from ..models.views import is_hidden
from ..runs.run import Run
from .backward import CAPTURE_NAME, PromptMetric, SiteGradients, as_float, compute_gradients

QK_CAPTURES = f"{CAPTURE_NAME}.qk"
QK_SITES = ("q", "k", "q_rot", "k_rot")

# By how much scores computed from queries and keys may differ, relative to the largest.
LIMITS = {torch.float64: 1e-6, torch.float32: 1e-3}

# The share of a query's attention above which the score of a sink can be computed from it.
MIN_SINK_SHARE = 0.05


@dataclass(frozen=True, eq=False)
class AttentionRun:
    """One block's attention in one of the two runs, with a key for each query head: the heads of a
    group share one.

    `visible` is True where a query sees a key.
    """

    query: Float[Tensor, "row head pos d_qk"]
    key: Float[Tensor, "row head pos d_qk"]
    scores: Float[Tensor, "row head query key"]
    visible: Bool[Tensor, "row head query key"]

    @cached_property
    def products(self) -> Float[Tensor, "row head query key"]:
        """The products of queries and keys."""
        return self.query @ self.key.mT


@dataclass(frozen=True, eq=False)
class Attention:
    """One block's attention in both runs.

    target    the run of the prompts that are patched
    source    the run of the prompts that they are patched from
    gradient  the metric's gradient at the target's pattern
    missing   [row, head, query]: 1 minus the sum of the pattern, which a sink takes
    cap       for scores with a soft-cap, largest * tanh(scaling * query · key / largest): the
              largest and the scaling; else None
    """

    target: AttentionRun
    source: AttentionRun
    gradient: Float[Tensor, "row head query key"]
    missing: Float[Tensor, "row head query"]
    cap: tuple[float, float] | None

    @cached_property
    def scale(self) -> float:
        """The factor of products of queries and keys in the scores.

        Without a soft-cap it is the slope of the change of the scores between the two runs. Masks
        and position biases, which are the same in both, cancel out, and so does what all keys of a
        query share.
        """
        if self.cap is not None:
            return self.cap[1]
        visible = self.target.visible & self.source.visible
        changes = center(self.source.scores - self.target.scores, visible)
        products = center(self.source.products - self.target.products, visible)
        square = float((products * products).sum())
        if not square:
            return self.target.query.shape[-1] ** -0.5
        return float((products * changes).sum()) / square

    def query_effects(self, masks: Float[Tensor, "mask row pos"]) -> Float[Tensor, "mask row head"]:
        """Returns the effect of the source's queries: each changes its own row of the pattern."""
        products = (self.source.query - self.target.query) @ self.target.key.mT
        return torch.einsum("nrq,rhq->nrh", masks, self._effect(products).sum(-1))

    def key_effects(self, masks: Float[Tensor, "mask row pos"]) -> Float[Tensor, "mask row head"]:
        """Returns the effect of the source's keys: for each mask, that of all its keys together.

        A key changes the rows of all later queries.
        """
        products = self.target.query @ (self.source.key - self.target.key).mT
        effects = []
        for mask in masks:
            effects.append(self._effect(products * mask[:, None, None, :]).sum((-2, -1)))
        return torch.stack(effects)

    def _effect(self, products: Tensor) -> Float[Tensor, "row head query key"]:
        """Returns the effect of a change of the products on the metric, through the pattern."""
        scores, visible = self.target.scores, self.target.visible
        before = softmax(scores, visible, self._sink_scores)
        after = softmax(scores + self._score_changes(products), visible, self._sink_scores)
        return self.gradient * (after - before)

    def _score_changes(self, products: Tensor) -> Float[Tensor, "row head query key"]:
        """Returns the change of the scores for a change of the products of queries and keys."""
        change = self.scale * products
        if self.cap is None:
            return change
        raw, largest = self.scale * self.target.products, self.cap[0]
        return largest * (((raw + change) / largest).tanh() - (raw / largest).tanh())

    @cached_property
    def _sink_scores(self) -> Float[Tensor, "row head query"]:
        """The score of each head's sink, relative to each query's scores; minus infinity for a head
        without a sink.

        A sink's score is one number for a head. It is computed from the queries whose attention it
        takes a good part of, and used for all queries.
        """
        run = self.target
        totals = run.scores.masked_fill(~run.visible, -torch.inf).logsumexp(-1)
        # What the model adds to all scores of a query.
        offsets = torch.where(run.visible, run.scores - self.scale * run.products, 0.0).sum(-1)
        offsets = offsets / run.visible.sum(-1).clamp(min=1)
        readable = (self.missing > MIN_SINK_SHARE) & (self.missing < 1 - MIN_SINK_SHARE)
        readable = readable & run.visible.any(-1)
        scores = totals + self.missing.logit() - offsets
        scores = torch.where(readable, scores, torch.nan)
        heads = scores.transpose(0, 1).flatten(1).nanmedian(-1).values
        return torch.where(heads.isnan(), -torch.inf, heads)[None, :, None] + offsets

    def check(self, site: AnySite, limit: float) -> None:
        """Raises `Unsupported` if queries and keys do not explain the scores of the model."""
        visible = self.target.visible & self.source.visible
        changes = self._score_changes(self.source.products - self.target.products)
        computed = self.target.scores + changes
        difference = float(center(computed - self.source.scores, visible).abs().max())
        scores = torch.stack([self.target.scores, self.source.scores])
        largest = float(torch.where(visible, scores, 0.0).abs().max())
        if not difference <= limit * max(1.0, largest):
            raise Unsupported(
                f"{site} are not scaled products of queries and keys with a bias that is the same "
                f"for both prompts (off by {difference:.2g}, where the largest is {largest:.2g}: a "
                "hook on the way, a rotation inside the attention, or a bias made of the tokens), "
                "so that method='qk_fix' does not hold: take method='gradient' or 'integrated'"
            )


def center(
    values: Float[Tensor, "row head query key"], visible: Bool[Tensor, "row head query key"]
) -> Float[Tensor, "row head query key"]:
    """Returns each query's values minus their mean over the keys that it sees, which a softmax
    ignores; 0 at the other keys."""
    masked = torch.where(visible, values, 0.0)
    mean = masked.sum(-1, keepdim=True) / visible.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(visible, masked - mean, 0.0)


def softmax(
    scores: Float[Tensor, "row head query key"],
    visible: Bool[Tensor, "row head query key"],
    sink: Float[Tensor, "row head query"],
) -> Float[Tensor, "row head query key"]:
    """Returns the pattern of these scores; zero for a query that sees no key."""
    masked = scores.masked_fill(~visible, -torch.inf)
    pattern = torch.cat([masked, sink[..., None]], dim=-1).softmax(-1)[..., :-1]
    return pattern.masked_fill(~visible, 0)


def qk_effects(
    target: PromptMetric,
    source: PromptMetric,
    sites: Sequence[Site],
    masks: Float[Tensor, "mask row pos"],
) -> tuple[Tensor, Tensor, dict[AnySite, Float[Tensor, "mask row head"]]]:
    """Returns the metric of the target's and of the source's prompts, and the effect of each site
    at the positions of each mask."""
    lm, rows = target.lm, target.rows
    layers = sorted({site.layer for site in sites if site.layer is not None})
    captured_sites: list[Site] = []
    for layer in layers:
        captured_sites += _attention_sites(lm, layer)
    captures = capture(captured_sites, name=QK_CAPTURES)
    source_run = source.run(captures)
    patterns = [Site("pattern", layer) for layer in layers]
    result = compute_gradients(target, patterns, captures)
    limit = LIMITS.get(getattr(lm.root, "dtype", torch.float32), 0.03)
    effects: dict[AnySite, Tensor] = {}
    for layer in layers:
        attention = _read_attention(result, source_run, layer)
        attention.check(Site("scores", layer), limit)
        row_masks = masks[:, list(rows), : attention.gradient.shape[-1]]
        row_masks = row_masks.to(attention.gradient)
        for site in sites:
            if site.layer == layer:
                effects[site] = _site_effect(lm, attention, site, row_masks)
    return result.metric, source.of_run(source_run), effects


def _read_attention(result: SiteGradients, source_run: Run, layer: int) -> Attention:
    """Returns a block's attention in the run with gradients and in that of the source's prompts."""
    lm, pattern = source_run.lm, Site("pattern", layer)
    sites = _attention_sites(lm, layer)
    target = _attention_run(*[result.run.captured(site, QK_CAPTURES) for site in sites])
    source = _attention_run(*[source_run.captured(site, QK_CAPTURES) for site in sites])
    gradient = as_float(result.gradient[pattern]).to(target.scores)
    captured_pattern = as_float(result.values[pattern].values.detach())
    missing = (1 - captured_pattern.sum(-1)).to(gradient)
    module: Any = lm.root.get_submodule(lm.location(pattern).path)
    largest = getattr(module, "attn_logit_softcapping", None)  # transformers' name
    cap = None
    if largest is not None:
        cap = (float(largest), float(module.scaling))
    return Attention(target, source, gradient, missing, cap)


def _site_effect(
    lm: LM, attention: Attention, site: Site, masks: Float[Tensor, "mask row pos"]
) -> Float[Tensor, "mask row head"]:
    """Returns the effect of a site, summed over the query heads that share a key head."""
    if site.name in SITES_WITH_KEY_HEADS:
        effect, axis = attention.key_effects(masks), "kv_head"
    else:
        effect, axis = attention.query_effects(masks), "head"
    count = lm.layout.sizes_of(site.layer)[axis] or effect.shape[-1]
    return effect.unflatten(-1, (count, -1)).sum(-1).to(device="cpu", dtype=torch.float64)


def _attention_run(query: Captured, key: Captured, scores: Captured) -> AttentionRun:
    """Returns queries, keys and scores of one run in one dtype, the widest of them."""
    score_values = as_float(scores.values.detach())
    queries = as_float(query.by_position.detach()).transpose(1, 2)
    keys = as_float(key.by_position.detach()).transpose(1, 2)
    dtype = torch.promote_types(queries.dtype, keys.dtype)
    dtype = torch.promote_types(score_values.dtype, dtype)
    keys = keys.repeat_interleave(score_values.shape[1] // keys.shape[1], dim=1)
    visible = ~is_hidden(scores.values.detach())
    return AttentionRun(queries.to(dtype), keys.to(dtype), score_values.to(dtype), visible)


def _attention_sites(lm: LM, layer: int) -> list[Site]:
    """Returns the sites of queries, keys and scores: after the rotation, if there is one."""
    sites = []
    for name in ("q", "k"):
        rotated = f"{name}_rot"
        sites.append(Site(rotated if lm.layout.find(rotated, layer) else name, layer))
    return [*sites, Site("scores", layer)]
