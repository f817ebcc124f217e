"""Causal tracing: noise blurs the subject, and one clean state at a time is restored (Meng et al.
2022)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import chain, repeat
from typing import Any, Unpack

import pandas as pd
import torch
from torch import Tensor

from ..arguments import as_items, check_arguments, check_number, describe
from ..errors import BadHook, BadPrompt
from ..hooks.ablation import patch
from ..hooks.base import Hook
from ..hooks.capture import capture
from ..hooks.edits import steer
from ..models.lm import LM
from ..models.positions import At, at
from ..models.prompts import Prompts, Row, as_batch, as_rows, positions_of_text
from ..models.sites import SITES_WITHOUT_LAYER, Site
from ..runs.forward import forward
from .cells import as_hooks, list_values, noise_generator
from .grids import AT_ONCE, GridPositions, Metrics, Positions, RowPositions, grid_positions
from .sweep import Settings, sweep

# Rows of one forward and tokens of a row, while embeddings are read.
BATCH, WIDTH = 64, 64


@check_arguments
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
    noise_over: Prompts | None = None,
    samples: int = 10,
    seed: int = 0,
    **settings: Unpack[Settings],
) -> pd.DataFrame:
    """Returns how much of the metric comes back when one clean state is restored under noise on the
    subject (Meng et al. 2022).

    Normal noise is added to the embeddings of the subject's tokens, drawn `samples` times for each
    prompt. Its standard deviation is `noise` times that of embeddings, which is one number for a
    model: over the embeddings of the whole vocabulary, or of the tokens of `noise_over` (texts or
    ids; the paper uses the subjects of a thousand facts). Then the clean value of `site` is
    restored at each layer and position, in `window` layers around it (the paper uses 1 for the
    residual stream and 10 for attn_out and mlp_out; near the ends there are fewer). The effect is 0
    if the noise has its full effect and 1 if the clean value came back. A prompt has the same noise
    alone and in a batch.

    `subject` is the text of the subject, or one for each prompt. Columns: layer, pos, row, those of
    `sweep`, prompt and sample: `row` counts prompts times samples, and `prompt` and `sample` say
    which one it is. `attrs["noise_std"]` is the standard deviation of the noise.
    """
    batch = as_batch(lm, prompts)
    subjects = _check_subjects(subject, len(batch.rows))
    if samples < 1 or window < 1:
        raise BadHook(f"samples={samples} and window={window}: both count from 1")
    check_number(noise, "noise", above=0.0, meaning="how many standard deviations are added,")
    if site in SITES_WITHOUT_LAYER:
        raise BadHook(f"{site!r} is there once, and causal tracing restores a site layer by layer")
    sites = _sites_by_layer(lm, site, None)
    restored_layers = list(_sites_by_layer(lm, site, layers))
    spans = [
        positions_of_text(lm, row, item) for row, item in zip(batch.rows, subjects, strict=True)
    ]
    positions = grid_positions(batch.lengths, [site], pos)
    if positions is AT_ONCE:
        raise BadHook(
            f"{site!r} has heads, all of which are restored together: say at which positions, "
            "with pos="
        )
    positions = _positions_of_samples(positions, samples)
    repeated = chain.from_iterable(repeat(row, samples) for row in batch.rows)
    rows = [list(row) for row in repeated]
    base_hooks = as_hooks(settings.get("base_hooks", ()))
    clean = forward(lm, rows, *base_hooks, capture(lm.sites(site)))

    def hooks(layer: int, pos: object) -> list[Hook]:
        first = layer - window // 2
        around = [sites[near] for near in range(first, first + window) if near in sites]
        return [
            patch(around, clean, pos=position, rows=sample_rows)
            for position, sample_rows in positions[pos]
        ]

    noise_std = noise * embedding_std(lm, noise_over)
    noise_hooks = _noise_hooks(lm, batch.rows, spans, samples, noise_std, seed)
    settings["base_hooks"] = [*base_hooks, *noise_hooks]
    axes = {"layer": restored_layers, "pos": list(positions)}
    table = sweep(lm, rows, axes, hooks, metrics, target=clean, **settings)
    table["prompt"], table["sample"] = table["row"] // samples, table["row"] % samples
    table.attrs["noise_std"] = noise_std
    return table


def _sites_by_layer(lm: LM, name: str, layers: Iterable[int] | None) -> dict[int | None, Site]:
    values = None if layers is None else list_values(layers, "layers")
    sites = lm.sites(name, layers=values)
    return {site.layer: site for site in sites if isinstance(site, Site)}


def _check_subjects(subject: str | At | Sequence[str | At], count: int) -> list[At]:
    items = as_items(subject)
    subjects: list[Any] = [subject] * count if items is None else items
    for item in subjects:
        if not isinstance(item, str | At):
            raise BadPrompt(
                f"subject={describe(item)}: give its text, hk.at(text), or a list with one for "
                "each prompt"
            )
    if len(subjects) != count:
        raise BadPrompt(
            f"{len(subjects)} subjects were given, and there are {count} prompts: give as many, "
            "or one"
        )
    return [at(item) if isinstance(item, str) else item for item in subjects]


def _positions_of_samples(positions: GridPositions, samples: int) -> GridPositions:
    """Returns the positions with a row for each sample of a prompt."""
    expanded: dict[Any, RowPositions] = {}
    for name, row_positions in positions.items():
        expanded[name] = []
        for position, prompts in row_positions:
            rows = prompts
            if isinstance(prompts, list):
                spans = [range(prompt * samples, (prompt + 1) * samples) for prompt in prompts]
                rows = list(chain.from_iterable(spans))
            expanded[name].append((position, rows))
    return expanded


def embedding_std(lm: LM, over: Prompts | None = None) -> float:
    """Returns the standard deviation of all numbers of the embeddings, of the whole vocabulary or
    of the tokens of `over`."""
    rows = _vocabulary_rows(lm) if over is None else as_rows(lm, over)
    count, total, squares = 0, 0.0, 0.0
    for start in range(0, len(rows), BATCH):
        batch = [list(row) for row in rows[start : start + BATCH]]
        run = forward(lm, batch, capture("embed"), logits=False)
        for row, values in zip(batch, run["embed"], strict=True):
            numbers = values[: len(row)].double()
            count += numbers.numel()
            total += float(numbers.sum())
            squares += float((numbers * numbers).sum())
    return math.sqrt(max(0.0, squares - total * total / count) / (count - 1))


def _vocabulary_rows(lm: LM) -> list[Row]:
    """Returns every token of the vocabulary once, in rows of which the last may be shorter."""
    if not lm.n_tokens:
        raise BadHook(
            "the size of this model's vocabulary is not known: give texts or ids, over whose "
            "embeddings the standard deviation is taken, as noise_over="
        )
    width = min(WIDTH, lm.context or WIDTH)
    starts = range(0, lm.n_tokens, width)
    return [tuple(range(start, min(start + width, lm.n_tokens))) for start in starts]


def _noise_hooks(
    lm: LM, prompts: Sequence[Row], spans: Sequence[Row], samples: int, std: float, seed: int
) -> list[Hook]:
    """Returns the hooks that add noise to the subject's embeddings, one for the rows whose subject
    is at the same positions."""
    width = lm.shape(Site("embed"))[-1]
    noise_by_span: dict[Row, dict[int, Tensor]] = {}
    for index, (prompt, span) in enumerate(zip(prompts, spans, strict=True)):
        for sample in range(samples):
            generator = noise_generator(seed, prompt, sample)
            noise = std * torch.randn(len(span), width, generator=generator)
            noise_by_span.setdefault(span, {})[index * samples + sample] = noise
    hooks: list[Hook] = []
    for span, noise_by_row in noise_by_span.items():
        rows = list(noise_by_row)
        vectors = torch.zeros(len(prompts) * samples, len(span), width)
        vectors[rows] = torch.stack(list(noise_by_row.values()))
        hooks.append(steer("embed", vectors, pos=list(span), rows=rows))
    return hooks
