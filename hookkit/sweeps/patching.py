"""Activation patching, path patching and causal tracing: which component carries a difference.

Each is a grid of patches, and its effect is 0 if nothing changed and 1 if the metric became that of
the target.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, repeat
from operator import itemgetter
from typing import Any, Literal, Unpack

import pandas as pd
import torch
from torch import Tensor

from ..arguments import as_items, check_arguments, check_number, describe
from ..errors import BadHook, BadPrompt
from ..hooks.ablation import patch
from ..hooks.base import Hook
from ..hooks.capture import Captured, CapturedChunk, Captures, LazyCapture, capture
from ..hooks.edits import steer
from ..models.batch_positions import Selection
from ..models.lm import LM
from ..models.named_positions import positions_of_text
from ..models.positions import At, IndicesLike, at
from ..models.prompts import Prompts, Row, as_batch, as_rows
from ..models.sites import SITES_WITHOUT_LAYER, AnySite, Site, Sites, SitesLike
from ..runs.forward import forward
from ..runs.hook_points import build_hook_points
from ..runs.run import Run
from ..tables.metrics.token_metrics import logit
from .cells import Cell, HooksAt, as_hooks, list_values, noise_generator
from .execute import PlanRun
from .grids import (
    AT_ONCE,
    GridPositions,
    GridSettings,
    Metrics,
    Positions,
    RowPositions,
    check_pairs,
    create_site_grid,
    grid_positions,
    site_names,
    split_settings,
)
from .journal import Journal
from .plan import Plan
from .shortcuts import no_reference
from .sweep import Settings, sweep, sweep_plan

SHARED = "sweeps share forwards, and run parts of them"


@check_arguments
def patching(
    lm: LM,
    clean: Prompts,
    corrupted: Prompts,
    sites: str | Sequence[str],
    metrics: Metrics,
    *,
    direction: Literal["denoise", "noise"] = "denoise",
    pos: Positions = None,
    **settings: Unpack[GridSettings],
) -> pd.DataFrame:
    """Returns the effect of activation patching at every layer and position, or layer and head, of
    a site (Vig et al. 2020; Meng et al. 2022; Heimersheim and Nanda 2024).

    "denoise" runs the corrupted prompts with the clean value at one site and position: it finds
    what is sufficient. "noise" runs the clean prompts with the corrupted value: it finds what is
    necessary. The effect is 0 if nothing changed and 1 if the metric became that of the prompts
    patched from.

    A site without heads is patched at each layer and position. A site with heads is patched at each
    layer and head, at all positions at once, or with `pos` at each of those. There are as many
    clean as corrupted prompts, of the same lengths. `layers` and `heads` select some of them; by
    default all are patched. Other settings are those of `sweep`. Columns: site if there are
    several, layer, head, pos, and those of `sweep`.

    >>> metric = logit_diff(" Mary", " John")
    >>> table = patching(lm, clean, corrupted, "attn_out", metric, layers=[9], pos=[-1])
    >>> list(table.columns)[:4]
    ['layer', 'pos', 'row', 'logit_diff']
    """
    layers, heads, sweep_settings = split_settings(settings)
    names = site_names(sites)
    target, source = (corrupted, clean) if direction == "denoise" else (clean, corrupted)
    lm.refuse_engine(SHARED)
    lengths = check_pairs(lm, source, target)
    grid = create_site_grid(lm, names, layers, heads, grid_positions(lengths, names, pos))
    base_hooks = as_hooks(settings.get("base_hooks", ()))
    run = forward(lm, source, *base_hooks, capture(grid.sites()), logits=False)
    hooks = grid.hooks(lambda site, pos, rows: patch(site, run, pos=pos, rows=rows))
    return sweep(lm, target, grid.axes, hooks, metrics, target=source, **sweep_settings)


# ---- path patching


# The components that write into the residual stream, and their order within a block: `z` and
# `attn_out` are one addition.
COMPONENTS = {"z": 0, "attn_out": 0, "mlp_out": 1}


@check_arguments
def path_patching(
    lm: LM,
    clean: Prompts,
    corrupted: Prompts,
    metrics: Metrics,
    *,
    senders: str = "z",
    receivers: SitesLike | None = None,
    freeze: Sequence[str] = ("z",),
    pos: Positions = None,
    **settings: Unpack[GridSettings],
) -> pd.DataFrame:
    """Returns the direct effect of each sender on the receivers: the metric when only that path
    carries corrupted values (Wang et al. 2022; Goldowsky-Dill et al. 2023).

    On the clean prompts, a sender has its value on the corrupted prompts, and every later component
    that writes into the residual stream is frozen at its clean value. So the receivers read the
    sender's change, and nothing that other components made of it. Then the values that the
    receivers read are patched into a second run, in which nothing is frozen. Without receivers, the
    logits receive.

    senders     a site: each of its heads ("z"), or each layer of it ("mlp_out")
    receivers   what blocks read, such as lm.sites("q", layers=[9], heads=[3]); by default the
                logits
    freeze      what is frozen at its clean value: with ("z",) the MLPs pass the change on, as in
                the paper on indirect objects; with ("z", "mlp_out") only the residual stream does
    layers      the senders' layers; by default all
    heads       the senders' heads; by default all
    pos         positions at which the sender is patched; by default all at once

    The clean prompts run. The effect is 0 if nothing changed and 1 if the metric became that of the
    corrupted prompts. Columns: layer, head, pos, and those of `sweep`.
    """
    layers, heads, sweep_settings = split_settings(settings)
    _check_components(senders, *freeze)
    receiver_sites = Sites(()) if receivers is None else lm.expand(receivers)
    if not freeze and not receiver_sites:
        raise BadHook(
            "freeze=() holds nothing, so that every path carries the change: that is hk.patching"
        )
    read_sites = list(dict.fromkeys(map(_check_receiver, receiver_sites)))
    frozen = _all_layers(lm, freeze)
    lm.refuse_engine(SHARED)
    lengths = check_pairs(lm, corrupted, clean)
    base_hooks = as_hooks(settings.get("base_hooks", ()))
    captured_sites = list(dict.fromkeys([*frozen, *read_sites]))
    clean_run = forward(lm, clean, *base_hooks, capture(captured_sites), logits=False)
    corrupted_run = forward(lm, corrupted, *base_hooks, capture(lm.sites(senders)), logits=False)
    positions = AT_ONCE if pos is None else grid_positions(lengths, [senders], pos)
    grid = create_site_grid(lm, [senders], layers, heads, positions)
    corrupt = grid.hooks(lambda site, pos, rows: patch(site, corrupted_run, pos=pos, rows=rows))

    def sender_hooks(layer: int, **point: Any) -> list[Hook] | None:
        sender = corrupt(layer=layer, **point)
        later = [site for site in frozen if _is_later(site, senders, layer)]
        if sender is None or not later:
            return sender
        return [patch(later, clean_run), *sender]

    hooks: HooksAt = sender_hooks
    if receiver_sites:
        memory = settings.get("memory")
        first_plan = sweep_plan(
            lm, clean, grid.axes, hooks, logit(0), base_hooks=base_hooks, memory=memory
        )
        received = _read_receivers(first_plan, clean_run, read_sites)
        hooks = partial(_patch_receivers, receiver_sites, received, lengths)
    return sweep(lm, clean, grid.axes, hooks, metrics, target=corrupted, **sweep_settings)


def _patch_receivers(
    receivers: Sites,
    received: Mapping[tuple[Any, ...], tuple[Captures, int]],
    lengths: Sequence[int],
    /,
    **point: Any,
) -> list[Hook] | None:
    """Returns the patches of what the receivers read in a cell, from the first position at which
    it may differ, for the rows of each length; None if there is no such cell."""
    key = tuple(point.values())
    if key not in received:
        return None
    source, first = received[key]
    rows_by_length: dict[int, list[int]] = defaultdict(list)
    for row, length in enumerate(lengths):
        rows_by_length[length].append(row)
    hooks: list[Hook] = []
    for length, rows in sorted(rows_by_length.items()):
        if length > first:
            hooks.append(patch(receivers, source, pos=slice(first, length), rows=rows))
    return hooks


def _all_layers(lm: LM, names: Sequence[str]) -> list[Site]:
    sites: list[Site] = []
    for name in names:
        sites += [Site(name, layer) for layer in lm.layout.layers(name) or []]
    return sites


def _check_components(*names: str) -> None:
    for name in names:
        if name not in COMPONENTS:
            raise BadHook(
                f"{name!r} adds nothing to the residual stream by itself: name some of "
                f"{', '.join(COMPONENTS)}"
            )


def _check_receiver(site: AnySite) -> Site:
    """Returns the site of a receiver, with all of its heads."""
    if not isinstance(site, Site) or site.layer is None or site.name in COMPONENTS:
        raise BadHook(
            f"{site} is no receiver: name what a block reads, such as 'q.9.3' or 'mlp_in.12'"
        )
    return Site(site.name, site.layer)


def _is_later(site: Site, sender: str, layer: int) -> bool:
    """True if a site adds to the residual stream after the sender in this layer."""
    assert site.layer is not None
    return (site.layer, COMPONENTS[site.name]) > (layer, COMPONENTS[sender])


def _read_receivers(
    first_plan: Plan, clean_run: Run, read_sites: Sequence[Site]
) -> dict[tuple[Any, ...], tuple[Captures, int]]:
    """Runs the first plan. Returns what the receivers read in each cell, and the first position at
    which it may differ from the clean run: the end of the prompts if no receiver reads a change."""
    for cell in first_plan.cells:
        captures = build_hook_points(first_plan.lm, [capture(read_sites)], no_reference)
        cell.hook_points = [*cell.hook_points, *captures]
    PlanRun(first_plan, Journal()).run()
    end = max(map(len, first_plan.inputs.rows))
    received: dict[tuple[Any, ...], tuple[Captures, int]] = {}
    for cell in first_plan.cells:
        received[tuple(cell.point.values())] = _captures_of_cell(cell, clean_run, end)
    return received


def _captures_of_cell(cell: Cell, clean_run: Run, end: int) -> tuple[Captures, int]:
    slots: list[LazyCapture] = []
    first = end
    for bound in cell.bound_hooks:
        if bound.change is None:
            values = _replace_values(clean_run.captured(bound.site), bound.pieces)
            slots.append(LazyCapture(bound.site, None, None, values))
            row_positions = chain.from_iterable(_cells_of(c).row_positions for c in bound.pieces)
            first = min(first, *map(itemgetter(0), row_positions), end)
    return Captures(tuple(slots)), first


def _cells_of(chunk: CapturedChunk) -> Selection:
    assert chunk.cells is not None
    return chunk.cells


def _replace_values(clean: Captured, chunks: Sequence[CapturedChunk]) -> Captured:
    """Returns a capture of the clean prompts with the values of some rows and positions replaced.

    Its prompts are unknown (token -1), because the values are not those of the tokens.
    """
    values = clean.values.clone()
    for chunk in chunks:
        cells = _cells_of(chunk)
        for prompt, positions, new in zip(
            cells.prompts, cells.row_positions, chunk.values, strict=True
        ):
            values[clean.row(prompt), list(positions)] = new[: len(positions)]
    unknown = tuple((-1,) * len(prompt) for prompt in clean.prompts)
    return replace(clean, values=values, prompts=unknown)


# ---- causal tracing


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
    spans = list(map(partial(positions_of_text, lm), batch.rows, subjects))
    positions = grid_positions(batch.lengths, [site], pos)
    if positions is AT_ONCE:
        raise BadHook(
            f"{site!r} has heads, all of which are restored together: say at which positions, "
            "with pos="
        )
    positions = _positions_of_samples(positions, samples)
    rows = list(chain.from_iterable(repeat(row, samples) for row in batch.rows))
    base_hooks = as_hooks(settings.get("base_hooks", ()))
    lm.refuse_engine(SHARED)
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
    subjects = list(map(_check_subject, [subject] * count if items is None else items))
    if len(subjects) != count:
        raise BadPrompt(
            f"{len(subjects)} subjects were given, and there are {count} prompts: give as many, "
            "or one"
        )
    return subjects


def _check_subject(item: Any) -> At:
    if not isinstance(item, str | At):
        raise BadPrompt(
            f"subject={describe(item)}: give its text, hk.at(text), or a list with one for each "
            "prompt"
        )
    return at(item) if isinstance(item, str) else item


def _positions_of_samples(positions: GridPositions, samples: int) -> GridPositions:
    """Returns the positions with a row for each sample of a prompt."""
    expanded: dict[Any, RowPositions] = {}
    for name, row_positions in positions.items():
        expanded[name] = [(pos, _rows_of_samples(rows, samples)) for pos, rows in row_positions]
    return expanded


def _rows_of_samples(prompts: IndicesLike, samples: int) -> IndicesLike:
    if not isinstance(prompts, list):
        return prompts
    spans = [range(prompt * samples, (prompt + 1) * samples) for prompt in prompts]
    return list(chain.from_iterable(spans))


def embedding_std(lm: LM, over: Prompts | None = None) -> float:
    """Returns the standard deviation of all numbers of the embeddings, of the whole vocabulary or
    of the tokens of `over`."""
    rows = _vocabulary_rows(lm) if over is None else as_rows(lm, over)
    count, total, squares = 0, 0.0, 0.0
    for start in range(0, len(rows), BATCH):
        batch = list(rows[start : start + BATCH])
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
