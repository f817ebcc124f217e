"""Queries and keys through their own softmax: the QK fix of AtP* (Kramár et al. 2024, section 3.1.1).

A query acts on the metric through its pattern alone. The gradient at the query takes the softmax for a straight line,
which it is not where one key has all of the attention. Here the pattern that the other prompt's query (or key) would
give is computed from the site `scores`, and what that moves is multiplied by the gradient at the pattern: one forward
and one backward still. What products of queries and keys are multiplied by is read off the scores of the two runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..errors import BadHook, Unsupported
from ..hooks.base import Hook
from ..hooks.capture import capture
from ..hooks.captured_values import Captured
from ..models.lm import LM
from ..models.sites import KEY_HEADED, AnySite, Site
from ..models.views import hidden
from .backward import OWN, Question, derived, wide

FIXED = ("q", "k", "q_rot", "k_rot")
LIMITS = {
    torch.float64: 1e-6,
    torch.float32: 1e-3,
}  # of scores computed from queries and keys, beside the largest
READABLE = 0.05  # of a query's attention, from which the score of a sink is read


def check_fixed(names: Sequence[str]) -> None:
    """Raise `BadHook` for a site that has no softmax of its own behind it."""
    if others := [name for name in names if name not in FIXED]:
        raise BadHook(
            f"method='qk_fix' is of queries and keys ({', '.join(FIXED)}), and {others[0]!r} is neither"
        )


@dataclass(frozen=True, eq=False)
class Side:
    """One block's attention in one of the two runs, with a key for each query head: those of a group share theirs.

    `seen` is true where a query sees a key.
    """

    query: Float[Tensor, "row head pos d_qk"]
    key: Float[Tensor, "row head pos d_qk"]
    scores: Float[Tensor, "row head query key"]
    seen: Bool[Tensor, "row head query key"]

    @cached_property
    def products(self) -> Float[Tensor, "row head query key"]:
        return self.query @ self.key.mT


@dataclass(frozen=True)
class SoftCap:
    """Scores that stay below `largest`: largest * tanh(scaling * query · key / largest)."""

    largest: float
    scaling: float


@dataclass(frozen=True, eq=False)
class Attention:
    """One block's attention in both runs.

    `gradient` is the metric's at the pattern of the run that is patched into, `lacking` [row, head, query] what that
    pattern lacks of 1, which a sink takes.
    """

    here: Side
    other: Side
    gradient: Float[Tensor, "row head query key"]
    lacking: Float[Tensor, "row head query"]
    cap: SoftCap | None

    @cached_property
    def scale(self) -> float:
        """What products of queries and keys are multiplied by.

        Where there is no soft-cap it is the slope of the change of the scores between the two runs: masks and position
        biases, which are the same in both, cancel out, and so does what all keys of a query share.
        """
        if self.cap is not None:
            return self.cap.scaling
        seen = self.here.seen & self.other.seen
        changes = centred(self.other.scores - self.here.scores, seen)
        products = centred(self.other.products - self.here.products, seen)
        square = float((products * products).sum())
        return (
            float((products * changes).sum()) / square
            if square
            else self.here.query.shape[-1] ** -0.5
        )

    def of_queries(self, masks: Float[Tensor, "place row pos"]) -> Float[Tensor, "place row head"]:
        """What the other prompt's queries would do: each moves its own row of the pattern."""
        products = (self.other.query - self.here.query) @ self.here.key.mT
        return torch.einsum("nrq,rhq->nrh", masks, self._effect(products).sum(-1))

    def of_keys(self, masks: Float[Tensor, "place row pos"]) -> Float[Tensor, "place row head"]:
        """What the other prompt's keys would do, those of a place together: each moves every later query's row."""
        products = self.here.query @ (self.other.key - self.here.key).mT
        return torch.stack(
            [self._effect(products * mask[:, None, None, :]).sum((-2, -1)) for mask in masks]
        )

    def _effect(self, products: Tensor) -> Float[Tensor, "row head query key"]:
        """What a change of the products of queries and keys does to the metric, by way of the pattern alone."""
        before = softmax(self.here.scores, self.here.seen, self._sink_score)
        after = softmax(self.here.scores + self._moved(products), self.here.seen, self._sink_score)
        return self.gradient * (after - before)

    def _moved(self, products: Tensor) -> Float[Tensor, "row head query key"]:
        """The change of the scores when the products of queries and keys change by so much."""
        by = self.scale * products
        if self.cap is None:
            return by
        raw, largest = self.scale * self.here.products, self.cap.largest
        return largest * (((raw + by) / largest).tanh() - (raw / largest).tanh())

    @cached_property
    def _sink_score(self) -> Float[Tensor, "row head query"]:
        """The score of a head's sink, beside each query's scores; minus infinity where it has none.

        A sink's score is one number for a head. It is read where the sink takes a good part of the attention, and holds
        for the queries of which it takes too little to be read.
        """
        totals = self.here.scores.masked_fill(~self.here.seen, -torch.inf).logsumexp(-1)
        offsets = torch.where(
            self.here.seen, self.here.scores - self.scale * self.here.products, 0.0
        ).sum(-1)
        offsets = offsets / self.here.seen.sum(-1).clamp(
            min=1
        )  # what the model adds to all scores of a query
        readable = (
            (self.lacking > READABLE) & (self.lacking < 1 - READABLE) & self.here.seen.any(-1)
        )
        scores = totals + self.lacking.logit() - offsets
        heads = (
            torch.where(readable, scores, torch.nan).transpose(0, 1).flatten(1).nanmedian(-1).values
        )
        return torch.where(heads.isnan(), -torch.inf, heads)[None, :, None] + offsets

    def check(self, site: AnySite, limit: float) -> None:
        """Raise `Unsupported` where queries and keys do not make the scores that the model has."""
        seen = self.here.seen & self.other.seen
        made = self.here.scores + self._moved(self.other.products - self.here.products)
        apart = float(centred(made - self.other.scores, seen).abs().max())
        largest = max(
            float(torch.where(seen, side.scores, 0.0).abs().max())
            for side in (self.here, self.other)
        )
        if not apart <= limit * max(1.0, largest):
            raise Unsupported(
                f"{site} are not scaled products of queries and keys with a bias that is the same for both prompts "
                f"(off by {apart:.2g}, where the largest is {largest:.2g}: a hook on the way, a rotation inside the "
                "attention, or a bias made of the tokens), so that method='qk_fix' does not hold: take "
                "method='gradient' or 'integrated'"
            )


def centred(
    values: Float[Tensor, "row head query key"], seen: Bool[Tensor, "row head query key"]
) -> Float[Tensor, "row head query key"]:
    """Each query's values less their mean over the keys that it sees, which a softmax ignores; 0 at the others."""
    shown = torch.where(seen, values, 0.0)
    mean = shown.sum(-1, keepdim=True) / seen.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(seen, shown - mean, 0.0)


def softmax(
    scores: Float[Tensor, "row head query key"],
    seen: Bool[Tensor, "row head query key"],
    sink: Float[Tensor, "row head query"],
) -> Float[Tensor, "row head query key"]:
    """The pattern of these scores; zero for a query that sees no key."""
    shown = scores.masked_fill(~seen, -torch.inf)
    pattern = torch.cat([shown, sink[..., None]], dim=-1).softmax(-1)[..., :-1]
    return pattern.masked_fill(~seen, 0)


def softmaxed(
    to: Question,
    of: Question,
    rows: range,
    sites: Sequence[Site],
    under: Sequence[Hook],
    masks: Tensor,
) -> tuple[Tensor, Tensor, dict[AnySite, Float[Tensor, "place row head"]]]:
    """For each of these prompts the metric without and with all of the other one, and the estimate at each site."""
    lm = to.lm
    layers = sorted({site.layer for site in sites if site.layer is not None})
    patterns = {layer: Site("pattern", layer) for layer in layers}
    scores = {layer: Site("scores", layer) for layer in layers}
    made_of = {
        layer: (_turned(lm, "q", layer), _turned(lm, "k", layer), scores[layer]) for layer in layers
    }
    looks = capture([site for group in made_of.values() for site in group], name=f"{OWN}.made_of")
    other = of.run(rows, *under, looks)
    here = derived(to, rows, list(patterns.values()), (*under, looks))
    effects: dict[AnySite, Tensor] = {}
    for layer, pattern in patterns.items():
        sides = []
        for run in (here.run, other):
            query, key, score = (run.captured(site, looks.name) for site in made_of[layer])
            sides.append(_side(query, key, score))
        dtype = getattr(lm.root, "dtype", torch.float32)
        lacking = 1 - wide(here.run.captured(pattern, OWN).values.detach()).sum(-1)
        gradient = wide(here.gradient[pattern]).to(sides[0].scores)
        attention = Attention(sides[0], sides[1], gradient, lacking.to(gradient), _cap(lm, pattern))
        attention.check(scores[layer], LIMITS.get(dtype, 0.03))
        shown = masks[:, rows.start : rows.stop, : attention.gradient.shape[-1]].to(
            attention.gradient
        )
        for site in (site for site in sites if site.layer == layer):
            headed = "kv_head" if site.name in KEY_HEADED else "head"
            effect = (
                attention.of_keys(shown) if headed == "kv_head" else attention.of_queries(shown)
            )
            count = lm.layout.sizes_of(layer)[headed] or effect.shape[-1]
            effects[site] = (
                effect.unflatten(-1, (count, -1)).sum(-1).to(device="cpu", dtype=torch.float64)
            )
    return here.metric, of.asked_of(other, rows), effects


def _side(query: Captured, key: Captured, scores: Captured) -> Side:
    """Queries, keys and scores of one run in one dtype, the widest of them."""
    square = wide(scores.values.detach())
    heads = [wide(captured.by_place.detach()).transpose(1, 2) for captured in (query, key)]
    dtype = torch.promote_types(square.dtype, torch.promote_types(heads[0].dtype, heads[1].dtype))
    group = square.shape[1] // heads[1].shape[1]
    keys = heads[1].repeat_interleave(group, dim=1)
    seen = ~hidden(scores.values.detach())
    return Side(heads[0].to(dtype), keys.to(dtype), square.to(dtype), seen)


def _cap(lm: LM, pattern: Site) -> SoftCap | None:
    """The soft-cap of a block's scores, under the names that transformers gives it and their multiplier."""
    module: Any = lm.root.get_submodule(lm.place(pattern).path)
    largest = getattr(module, "attn_logit_softcapping", None)
    return None if largest is None else SoftCap(float(largest), float(module.scaling))


def _turned(lm: LM, name: str, layer: int) -> Site:
    """The queries or keys that the products are of: behind the rotation, where there is one."""
    return Site(f"{name}_rot" if lm.layout.find(f"{name}_rot", layer) else name, layer)
