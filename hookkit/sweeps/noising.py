"""Causal tracing: the subject is blurred by noise, and one clean state at a time is put back (Meng et al. 2022)."""

from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd
import torch

from ..errors import BadHook, BadPrompt, checks_keywords
from ..hooks.base import Hook
from ..hooks.edits import steer
from ..hooks.looking import capture
from ..hooks.replacing import patch
from ..model import LM
from ..positions import At, at
from ..prompts import Prompts, as_batch, cover
from ..runs import forward
from ..sites import Site
from .grids import Metrics, Positions, positions_of
from .sweep import sweep


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
    **settings: Any,
) -> pd.DataFrame:
    """How much of what noise on the subject destroys comes back when one clean state is restored (Meng et al. 2022).

    Normal noise of `noise` times the standard deviation of the embeddings is added to the embeddings of the subject's
    tokens, drawn `samples` times for each prompt; then the clean value of `site` is put back at each layer and
    position, in `window` layers around it (the paper takes 1 for the stream and 10 for attn_out and mlp_out). The
    effect is 0 where the noise stands and 1 where the clean value came back.

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
    rows = [list(row) for row in batch.rows for _ in range(samples)]
    spans = [
        cover(lm, row, at(name) if isinstance(name, str) else name) for row, name in zip(batch.rows, names, strict=True)
    ]
    under = _noise(lm, rows, [span for span in spans for _ in range(samples)], noise, seed)
    chosen = list(lm.layout.layers(site) or []) if layers is None else list(layers)
    clean = forward(lm, rows, capture(lm.sites(site)))
    places = positions_of(clean, [site], pos)
    assert places is not None

    def hooks(layer: int, pos: Any) -> list[Hook]:
        first = max(0, layer - window // 2)
        around = [Site(site, each) for each in range(first, min(lm.n_layers, first + window))]
        return [patch(around, clean, pos=where, rows=some) for where, some in places[pos]]

    table = sweep(
        lm, rows, {"layer": chosen, "pos": list(places)}, hooks, metrics, under=under, target=clean, **settings
    )
    table["prompt"], table["sample"] = table["row"] // samples, table["row"] % samples
    return table


def _noise(lm: LM, rows: list[list[int]], spans: list[tuple[int, ...]], noise: float, seed: int) -> list[Hook]:
    """The hooks that add noise to the subject's embeddings, one for the rows whose subject stands at one place."""
    embeddings = forward(lm, rows, capture("embed"), logits=False).captured("embed")
    assert embeddings.positions is not None
    size = noise * embeddings.values[embeddings.positions >= 0].float().std()
    draws = torch.Generator().manual_seed(seed)
    width = embeddings.values.shape[-1]
    by_place: dict[tuple[int, ...], list[int]] = {}
    for row, span in enumerate(spans):
        by_place.setdefault(span, []).append(row)
    hooks: list[Hook] = []
    for span, some in by_place.items():
        vectors = torch.zeros(len(rows), len(span), width)
        vectors[some] = size.cpu() * torch.randn(len(some), len(span), width, generator=draws)
        hooks.append(steer("embed", vectors, pos=list(span), rows=some))
    return hooks
