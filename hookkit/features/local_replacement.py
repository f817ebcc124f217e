"""The local replacement model: a model on one prompt, with everything nonlinear held fixed.

Attention patterns and the scales of norms keep their values on this prompt, and what each MLP adds
is an input. So what the transcoders read, and the raw logits, are affine functions of what enters
the first block and of what each MLP adds (Ameisen et al. 2025, "Circuit Tracing").
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..hooks.capture import capture
from ..hooks.edits import edit
from ..lenses.components import FrozenNorm
from ..models.lm import LM
from ..models.model_setup import freeze_weights
from ..models.overrides import Overrides
from ..models.sites import Site
from ..runs.forward import forward
from ..runs.run import Run
from .dictionary import Dictionary

ENTERING = Site("resid_pre", 0)
HEAD = Site("lm_head")


def pattern_sites(lm: LM) -> list[Site]:
    """Returns the attention patterns of a model. Raises if it has none."""
    lm.expand("pattern")  # raises, with the reason
    sites: list[Site] = []
    for name in ("pattern", "cross_pattern"):
        if name in lm.layout.names:
            sites += [Site(name, layer) for layer in lm.layout.layers(name) or ()]
    return sites


class LocalReplacement:
    """The local replacement model of the prompt of a run.

    `plain` is the run, with its patterns and the sources' values: the site that enters the first
    block and the site that each transcoder writes. The object owns the graph of the computation
    from `sources` [1, pos, d_model], in this order, to the values [1, pos, d] in `read`: the sites
    that the transcoders read, and the head's raw output at the last position.
    """

    def __init__(self, plain: Run, transcoders: Sequence[Dictionary]) -> None:
        self.lm, self.plain, self.transcoders = plain.lm, plain, transcoders
        sites = [ENTERING, *[transcoder.site for transcoder in transcoders]]
        self._norms: list[FrozenNorm] = []  # in the order of their calls
        with torch.inference_mode(False), torch.enable_grad(), freeze_weights(self.lm.model):
            leaves = {site: plain[site].detach().clone().requires_grad_() for site in sites}
            self.sources = list(leaves.values())
            self.read = self._run(leaves, None)

    def pull_back(
        self, output: Float[Tensor, "1 pos d"], directions: Float[Tensor, "target 1 pos d"]
    ) -> tuple[Tensor | None, ...]:
        """Returns the gradients [target, 1, pos, d_model] at each source along directions of an
        output, None for a source on which it does not depend."""
        return torch.autograd.grad(
            output,
            self.sources,
            directions.to(output),
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=True,
        )

    def without_sources(self) -> dict[Site, Tensor]:
        """Returns the values of `read` if no feature, error or token adds anything."""
        sources = {ENTERING: torch.zeros_like(self.plain[ENTERING])}
        for transcoder in self.transcoders:
            sources[transcoder.site] = bias_of(transcoder, self.plain[transcoder.reads])
        with torch.inference_mode(False):
            return self._run(sources, iter(self._norms))

    def _run(
        self, sources: Mapping[Site, Tensor], norms: Iterator[FrozenNorm] | None
    ) -> dict[Site, Tensor]:
        """Runs the model with these sources and norms. Without norms it has the values of the plain
        run, with gradients, and keeps its norms."""
        read: dict[Site, Tensor] = {}

        def keep(site: Site, values: Tensor) -> Tensor:
            read[site] = values
            return values.clone()  # which the block may write into

        def add(transcoder: Dictionary, _: Tensor) -> Tensor:
            if "W_skip" not in transcoder.weights:
                return sources[transcoder.site].clone()
            bias = bias_of(transcoder, read[transcoder.reads])
            if norms is not None:
                return bias
            return sources[transcoder.site] + (bias - bias.detach())

        def attend(site: Site, pattern: Tensor) -> Tensor:
            if norms is not None:
                return self.plain[site]
            return pattern.detach().requires_grad_()  # a leaf: queries and keys get no gradient

        hooks = [edit(ENTERING, lambda _: sources[ENTERING].clone())]
        hooks += [edit(site, partial(attend, site)) for site in pattern_sites(self.lm)]
        for transcoder in self.transcoders:
            hooks.append(edit(transcoder.reads, partial(keep, transcoder.reads)))
            hooks.append(edit(transcoder.site, partial(add, transcoder)))
        hooks.append(edit(HEAD, partial(keep, HEAD), pos=-1))
        # a capture with a gradient, after the head, turns gradients on
        after = capture("logits", pos=-1, grad=norms is None)
        with Overrides() as overrides:
            for path, module in self.lm.root.named_modules():
                if _is_norm(module):
                    run_norm = partial(self._run_norm, norms, path)
                    overrides.wrap_method(module, "forward", run_norm)
            forward(self.lm, list(self.plain.prompts), *hooks, after, logits="last")
        return read

    def _run_norm(
        self,
        norms: Iterator[FrozenNorm] | None,
        path: str,
        inner: Any,
        /,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Runs a norm with the next of these fixed scales, or keeps the one that it has now."""
        if len(args) != 1 or kwargs:  # a norm with a gate, or the like
            return inner(*args, **kwargs)
        states: Tensor = args[0]
        flat = states.flatten(0, -2)
        if norms is not None:
            norm = next(norms)
            return (norm.offset + norm.forward(flat)).view_as(states)
        norm = FrozenNorm(inner, flat.detach(), f"the norm {path!r}")
        self._norms.append(norm)
        change = flat - flat.detach()  # zero, with a gradient
        growth = (norm.scale_gradient.to(flat) * change).sum(-1, keepdim=True)
        return inner(states) + ((norm.outputs - norm.offset) * growth).view_as(states)


def bias_of(
    transcoder: Dictionary, inputs: Float[Tensor, "1 pos d_in"]
) -> Float[Tensor, "1 pos d_model"]:
    """Returns what a transcoder writes without any feature: its bias and its skip connection."""
    weights = transcoder.weights
    bias = weights["b_dec"].to(inputs).expand(*inputs.shape[:2], -1)
    if "W_skip" not in weights:
        return bias
    return bias + inputs @ weights["W_skip"].to(inputs).T


def _is_norm(module: torch.nn.Module) -> bool:
    """True for a norm of the last axis alone."""
    weight: Any = getattr(module, "weight", None)
    is_norm = "norm" in type(module).__name__.lower() and not list(module.children())
    return is_norm and (weight is None or weight.ndim == 1)
