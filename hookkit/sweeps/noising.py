"""Causal tracing: the subject is blurred by noise, and one clean state at a time is put back (Meng et al. 2022)."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Unpack

import pandas as pd
import torch
from torch import Tensor

from ..errors import BadHook, BadPrompt, checks_keywords
from ..hooks.base import Hook
from ..hooks.edits import steer
from ..hooks.looking import capture
from ..hooks.replacing import patch
from ..model import LM
from ..positions import At, CountLike, at
from ..prompts import Prompts, Row, as_batch, cover
from ..runs import forward
from ..sites import WHOLE_MODEL, Site
from .cells import as_hooks, listed
from .grids import Metrics, Positions, positions_of
from .sweep import Settings, sweep


@checks_keywords
def causal_tracing(
    lm: LM,
    prompts: Prompts,
    subject: str | At | Sequence[str | At],
    metrics: Metrics,
    *,
    site: str = "resid_post",
    layers: Iterable[int] | None = None,
    pos: Positions = None,
    window: int = 1,
    noise: float = 3.0,
    samples: int = 10,
    seed: int = 0,
    **settings: Unpack[Settings],
) -> pd.DataFrame:
    """How much of what noise on the subject destroys comes back when one clean state is restored (Meng et al. 2022).

    Normal noise is added to the embeddings of the subject's tokens, `noise` times as large as the standard deviation of
    all the embeddings of its prompt, drawn `samples` times for each prompt; then the clean value of `site` is put back
    at each layer and position, in `window` layers around it (the paper takes 1 for the stream and 10 for attn_out and
    mlp_out; at the ends there are fewer). The effect is 0 where the noise stands and 1 where the clean value came back.
    A prompt has the same noise alone and among others.

    `subject` is the text of the subject, or one for each prompt. Columns: layer, pos, row, those of `sweep`, prompt and
    sample: `row` counts prompts times samples, and `prompt` and `sample` say which it is.
    """
    batch = as_batch(lm, prompts)
    names = [subject] * len(batch.rows) if isinstance(subject, str | At) else list(subject)
    if len(names) != len(batch.rows):
        raise BadPrompt(
            f"{len(names)} subjects were given, and there are {len(batch.rows)} prompts: give as many, or one"
        )
    if samples < 1 or window < 1:
        raise BadHook(f"samples={samples} and window={window}: both count from 1")
    if site in WHOLE_MODEL:
        raise BadHook(f"{site!r} is there once, and causal tracing restores a site layer by layer")
    chosen = list(lm.sites(site) if layers is None else lm.sites(site, layers=listed(layers, "layers")))
    there = {each.layer: each for each in lm.sites(site) if isinstance(each, Site)}
    rows = [list(row) for row in batch.rows for _ in range(samples)]
    spans = [
        cover(lm, row, at(name) if isinstance(name, str) else name) for row, name in zip(batch.rows, names, strict=True)
    ]
    found = positions_of(batch.lengths, [site], pos)
    if found is None:
        raise BadHook(f"{site!r} has heads, all of which are restored together: say at which positions, with pos=")
    places = {name: [(where, _each(some, samples)) for where, some in given] for name, given in found.items()}
    under = as_hooks(settings.get("under", ()))
    clean = forward(lm, rows, *under, capture(lm.sites(site)))

    def hooks(layer: int, pos: object) -> list[Hook]:
        first = layer - window // 2
        around = [there[each] for each in range(first, first + window) if each in there]
        return [patch(around, clean, pos=where, rows=some) for where, some in places[pos]]

    settings["under"] = [*under, *_noise(lm, batch.rows, spans, samples, noise, seed)]
    table = sweep(
        lm,
        rows,
        {"layer": [each.layer for each in chosen if isinstance(each, Site)], "pos": list(places)},
        hooks,
        metrics,
        target=clean,
        **settings,
    )
    table["prompt"], table["sample"] = table["row"] // samples, table["row"] % samples
    return table


def _each(prompts: CountLike, samples: int) -> CountLike:
    """The rows of some prompts, of which there is one for each sample."""
    if not isinstance(prompts, list):
        return prompts
    return [prompt * samples + sample for prompt in prompts for sample in range(samples)]


def _noise(lm: LM, prompts: Sequence[Row], spans: Sequence[Row], samples: int, noise: float, seed: int) -> list[Hook]:
    """The hooks that add noise to the subject's embeddings, one for the rows whose subject stands at one place."""
    embeddings = forward(lm, [list(prompt) for prompt in prompts], capture("embed"), logits=False)["embed"]
    by_place: dict[Row, dict[int, Tensor]] = {}
    for number, (prompt, span) in enumerate(zip(prompts, spans, strict=True)):
        size = noise * embeddings[number, : len(prompt)].float().std().cpu()
        for sample in range(samples):
            drawn = torch.randn(len(span), embeddings.shape[-1], generator=_draws(seed, prompt, sample))
            by_place.setdefault(span, {})[number * samples + sample] = size * drawn
    hooks: list[Hook] = []
    for span, drawn in by_place.items():
        vectors = torch.zeros(len(prompts) * samples, len(span), embeddings.shape[-1])
        vectors[list(drawn)] = torch.stack(list(drawn.values()))
        hooks.append(steer("embed", vectors, pos=list(span), rows=list(drawn)))
    return hooks


def _draws(seed: int, prompt: Row, sample: int) -> torch.Generator:
    """A generator that depends on the seed, the prompt's tokens and the sample's number alone."""
    words = hashlib.sha256(repr((seed, prompt, sample)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(words[:8], "big") >> 1)
