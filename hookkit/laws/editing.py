"""Laws of a model that is edited."""

from collections.abc import Iterator

import torch

from .. import hooks as hk
from ..sites import AXES, SQUARE, Site
from .law import Finding, law
from .study import Study, apart

REACHES = 1e-6  # of the largest logit: what an edit has to change at least
STEERED = tuple(name for name in AXES if name not in SQUARE and name != "experts")


@law("identity", *AXES)
def _identity(study: Study) -> Iterator[Finding]:
    """A run patched with its own values is the same run, to the bit."""
    study = study.few
    for site in study.sites:
        found = study.logits(hk.patch(site, study.run))
        same = torch.equal(found, study.plain.logits)
        yield Finding(site.name, 0.0 if same else apart(found, study.plain.logits), 0.0)


@law("reaches", *AXES)
def _reaches(study: Study) -> Iterator[Finding]:
    """Zeroing a site changes the output (halving scores; for chosen experts, the next ones)."""
    study = study.few
    for site in study.sites:
        edit: hk.Hook = hk.ablate(site)
        if site.name == "scores":
            edit = hk.scale(site, 0.5)
        elif site.name == "experts":
            experts = study.lm.sizes["expert"] or 2
            edit = hk.edit(site, lambda chosen, experts=experts: (chosen + 1) % experts)
        yield Finding(site.name, apart(study.logits(edit), study.plain.logits), REACHES, at_least=True)


@law("there and back", *STEERED)
def _back(study: Study) -> Iterator[Finding]:
    """Steered by a vector and by its opposite, a model says what it said."""
    study = study.few
    for site in study.sites:
        if site.name in STEERED:
            vector = study.vector(site)
            found = study.logits(hk.steer(site, vector), hk.steer(site, -vector))
            yield Finding(site.name, apart(found, study.plain.logits), 5 * study.limit)


@law("one stream", "attn_out", "mlp_out", "resid_post")
def _one_stream(study: Study) -> Iterator[Finding]:
    """A vector added to what attention or the MLP gives is a vector added to the stream behind it."""
    study = study.few

    def same(first: Site, second: Site) -> Finding:
        vector = study.vector(Site("resid_post", first.layer))
        found, expected = study.logits(hk.steer(first, vector)), study.logits(hk.steer(second, vector))
        return Finding(first.name, apart(found, expected), 5 * study.limit)

    for layer in study.having("attn_out", "resid_mid"):
        yield same(Site("attn_out", layer), Site("resid_mid", layer))
    for layer in study.having("mlp_out"):
        yield same(Site("mlp_out", layer), Site("resid_post", layer))
        if "resid_mid" not in study.lm.layout.names and study.having("attn_out"):
            yield same(Site("attn_out", layer), Site("resid_post", layer))
    for layer in range(study.lm.n_layers - 1):
        if layer in study.layers:
            yield same(Site("resid_post", layer), Site("resid_pre", layer + 1))


@law("all heads", "z", "mlp_post")
def _all_heads(study: Study) -> Iterator[Finding]:
    """Zeroing every head, or every neuron, leaves of what is added to the stream what a projection makes of zero."""
    study = study.few
    for name, added in (("z", "attn_out"), ("mlp_post", "mlp_out")):
        for layer in study.having(name, added):
            source, target = Site(name, layer), Site(added, layer)
            values = study.run[source]
            nothing = torch.zeros_like(values.flatten(2) if name == "z" else values)[:1, :1]
            rest = study.written(nothing, source, target)[0, 0]
            heads = values.shape[2] if name == "z" else 0
            off = [hk.ablate([Site(name, layer, head) for head in range(heads)])] if heads else [hk.ablate(source)]
            expected = study.logits(hk.ablate(target, to=rest))
            yield Finding(name, apart(study.logits(*off), expected), 5 * study.limit)


@law("one head", "pattern")
def _one_head(study: Study) -> Iterator[Finding]:
    """Zeroing one head's pattern is zeroing its z."""
    study = study.few
    for layer in study.having("pattern", "z"):
        found = study.logits(hk.ablate(Site("pattern", layer, 1)))
        expected = study.logits(hk.ablate(Site("z", layer, 1)))
        yield Finding("pattern", apart(found, expected), 5 * study.limit)
