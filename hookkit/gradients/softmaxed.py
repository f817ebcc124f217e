"""Queries and keys through their own softmax: the QK fix of AtP* (Kramár et al. 2024, section 3.1.1).

A query acts on the metric through its pattern alone. The gradient at the query takes the softmax for a straight line,
which it is not where one key has all of the attention. Here the pattern that the other prompt's query (or key) would
give is computed, and what that moves is multiplied by the gradient at the pattern: one forward and one backward still.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from ..captured import Captured
from ..errors import BadHook, Unsupported
from ..hooks.base import Hook
from ..hooks.looking import capture
from ..model import LM
from ..sites import KEY_HEADED, AnySite, Site
from .backward import OWN, Question, derived, wide

SEEN = 1e-4  # of a pattern, from which its logarithm is read
FIXED = ("q", "k", "q_rot", "k_rot")
LIMITS = {torch.float64: 1e-6, torch.float32: 1e-3}  # of a pattern that is computed from queries and keys


def check_fixed(names: Sequence[str]) -> None:
    """Raise `BadHook` for a site that has no softmax of its own behind it."""
    if others := [name for name in names if name not in FIXED]:
        raise BadHook(f"method='qk_fix' is of queries and keys ({', '.join(FIXED)}), and {others[0]!r} is neither")


@dataclass(frozen=True, eq=False)
class Side:
    """One block's attention in one of the two runs, with a key for each query head: those of a group share theirs."""

    query: Float[Tensor, "row head pos d_qk"]
    key: Float[Tensor, "row head pos d_qk"]
    pattern: Float[Tensor, "row head query key"]


@dataclass(frozen=True, eq=False)
class Attention:
    """One block's attention in both runs. `gradient` is the metric's at the pattern of the run that is patched into."""

    here: Side
    other: Side
    gradient: Float[Tensor, "row head query key"]

    @cached_property
    def scale(self) -> float:
        """What products of queries and keys are multiplied by, as both patterns say: a softmax's logarithms differ as
        its scores do."""
        seen = (self.here.pattern > SEEN) & (self.other.pattern > SEEN)
        products = _centred(self._products, seen)
        logs = _centred((self.other.pattern.clamp(min=SEEN) / self.here.pattern.clamp(min=SEEN)).log(), seen)
        square = float((products * products).sum())
        return float((products * logs).sum()) / square if square else self.here.query.shape[-1] ** -0.5

    @cached_property
    def _products(self) -> Float[Tensor, "row head query key"]:
        return self.other.query @ self.other.key.mT - self.here.query @ self.here.key.mT

    def of_queries(self, masks: Float[Tensor, "place row pos"]) -> Float[Tensor, "place row head"]:
        """What the other prompt's queries would do: each moves its own row of the pattern."""
        by = self.scale * (self.other.query - self.here.query) @ self.here.key.mT
        return torch.einsum("nrq,rhq->nrh", masks, self._effect(by).sum(-1))

    def of_keys(self, masks: Float[Tensor, "place row pos"]) -> Float[Tensor, "place row head"]:
        """What the other prompt's keys would do, those of a place together: each moves every later query's row."""
        by = self.scale * self.here.query @ (self.other.key - self.here.key).mT
        return torch.stack([self._effect(by * mask[:, None, None, :]).sum((-2, -1)) for mask in masks])

    def _effect(self, by: Tensor) -> Float[Tensor, "row head query key"]:
        return self.gradient * (moved(self.here.pattern, by) - self.here.pattern)

    def check(self, site: AnySite, limit: float) -> None:
        """Raise `Unsupported` where queries and keys do not make the pattern that the model has."""
        apart = float((moved(self.here.pattern, self.scale * self._products) - self.other.pattern).abs().max())
        if not apart <= limit:
            raise Unsupported(
                f"{site} is not the softmax of scaled products of queries and keys (off by {apart:.2g}: a soft-cap, a "
                "hook on the way, or scores too far apart), so that method='qk_fix' does not hold: take "
                "method='gradient' or 'integrated'"
            )


def moved(pattern: Float[Tensor, "... key"], by: Float[Tensor, "... key"]) -> Float[Tensor, "... key"]:
    """A softmax whose scores are changed by so much. What the pattern lacks of 1 (a sink) has a score that stays."""
    most = by.masked_fill(pattern == 0, 0).amax(-1, keepdim=True).clamp(min=0)
    weights = torch.where(pattern == 0, 0.0, pattern * (by - most).exp())
    rest = (1 - pattern.sum(-1, keepdim=True)).clamp(min=0) * (-most).exp()
    return weights / (weights.sum(-1, keepdim=True) + rest).clamp(min=torch.finfo(weights.dtype).tiny)


def softmaxed(
    to: Question, of: Question, rows: range, sites: Sequence[Site], under: Sequence[Hook], masks: Tensor
) -> tuple[Tensor, Tensor, dict[AnySite, Float[Tensor, "place row head"]]]:
    """For each of these prompts the metric without and with all of the other one, and the estimate at each site."""
    lm = to.lm
    layers = sorted({site.layer for site in sites if site.layer is not None})
    patterns = {layer: Site("pattern", layer) for layer in layers}
    made_of = {layer: (_turned(lm, "q", layer), _turned(lm, "k", layer)) for layer in layers}
    looks = capture([site for pair in made_of.values() for site in pair], name=f"{OWN}.made_of")
    other = of.run(rows, *under, looks, capture(list(patterns.values()), name=OWN))
    here = derived(to, rows, list(patterns.values()), (*under, looks))
    found: dict[AnySite, Tensor] = {}
    for layer, pattern in patterns.items():
        sides = [
            _side(run.captured(pattern, OWN), *(run.captured(site, looks.name) for site in made_of[layer]))
            for run in (here.run, other)
        ]
        attention = Attention(sides[0], sides[1], wide(here.gradient[pattern]))
        attention.check(pattern, LIMITS.get(getattr(lm.root, "dtype", torch.float32), 0.03))
        shown = masks[:, rows.start : rows.stop, : attention.gradient.shape[-1]].to(attention.gradient)
        for site in (site for site in sites if site.layer == layer):
            headed = "kv_head" if site.name in KEY_HEADED else "head"
            effect = attention.of_keys(shown) if headed == "kv_head" else attention.of_queries(shown)
            count = lm.layout.sizes_of(layer)[headed] or effect.shape[-1]
            found[site] = effect.unflatten(-1, (count, -1)).sum(-1).to(device="cpu", dtype=torch.float64)
    return here.metric, of.asked_of(other, rows), found


def _side(pattern: Captured, query: Captured, key: Captured) -> Side:
    square = wide(pattern.values.detach())
    heads = [wide(each.by_place.detach()).transpose(1, 2) for each in (query, key)]
    queries, keys = (each.repeat_interleave(square.shape[1] // each.shape[1], dim=1) for each in heads)
    return Side(queries, keys, square)


def _turned(lm: LM, name: str, layer: int) -> Site:
    """The queries or keys that the products are of: behind the rotation, where there is one."""
    return Site(f"{name}_rot" if lm.layout.find(f"{name}_rot", layer) else name, layer)


def _centred(values: Tensor, seen: Tensor) -> Float[Tensor, "row head query key"]:
    """Less the mean of what is seen of each query's keys, and 0 elsewhere."""
    mean = (values * seen).sum(-1, keepdim=True) / seen.sum(-1, keepdim=True).clamp(min=1)
    return (values - mean) * seen
