"""Path patching: the effect of one component on another along the direct path alone.

(Wang et al. 2022; Goldowsky-Dill et al. 2023.) On the clean prompts,

1. a sender has its value on the corrupted prompts, and every later component that writes into the
   residual stream is frozen at its clean value. So the receivers read the sender's change, and
   nothing that other components made of it;
2. the values that the receivers then read are patched into a second run, in which nothing is
   frozen.

Without receivers, the logits receive.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Unpack

import pandas as pd

from ..arguments import check_arguments
from ..errors import BadHook
from ..hooks.ablation import patch
from ..hooks.base import Hook
from ..hooks.capture import Captured, CapturedChunk, Captures, LazyCapture, capture
from ..models.lm import LM
from ..models.prompts import Prompts
from ..models.sites import AnySite, Site, Sites, SitesLike
from ..runs.forward import forward
from ..runs.run import Run
from ..runs.taps import build_hook_points
from ..tables.metrics.token_metrics import logit
from .cells import as_hooks
from .execute import PlanRun
from .grids import (
    AT_ONCE,
    Metrics,
    Positions,
    check_pairs,
    create_site_grid,
    grid_positions,
)
from .journal import Journal
from .plan import Plan
from .shortcuts import no_reference
from .sweep import Settings, sweep, sweep_plan

# The components that write into the residual stream, in the order within a block.
COMPONENTS = ("z", "attn_out", "mlp_out")


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
    layers: Iterable[int] | None = None,
    heads: Iterable[int] | None = None,
    pos: Positions = None,
    **settings: Unpack[Settings],
) -> pd.DataFrame:
    """Returns the direct effect of each sender on the receivers: the metric when only that path
    carries corrupted values.

    senders     a site: each of its heads ("z"), or each layer of it ("mlp_out")
    receivers   what blocks read, such as lm.sites("q", layers=[9], heads=[3]); by default the
                logits
    freeze      what is frozen at its clean value: with ("z",) the MLPs pass the change on, as in
                the paper on indirect objects; with ("z", "mlp_out") only the residual stream does
    pos         positions at which the sender is patched; by default all at once

    The clean prompts run. The effect is 0 if nothing changed and 1 if the metric became that of the
    corrupted prompts. Columns: layer, head, pos, and those of `sweep`.
    """
    _check_components(senders, *freeze)
    receiver_sites = Sites(()) if receivers is None else lm.expand(receivers)
    if not freeze and not receiver_sites:
        raise BadHook(
            "freeze=() holds nothing, so that every path carries the change: that is hk.patching"
        )
    read_sites = list(dict.fromkeys(_check_receiver(site) for site in receiver_sites))
    frozen = _all_layers(lm, freeze)
    lengths = check_pairs(lm, corrupted, clean)
    base_hooks = as_hooks(settings.get("base_hooks", ()))
    captured_sites = list(dict.fromkeys([*frozen, *read_sites]))
    clean_run = forward(lm, clean, *base_hooks, capture(captured_sites), logits=False)
    corrupted_run = forward(lm, corrupted, *base_hooks, capture(lm.sites(senders)), logits=False)
    positions = AT_ONCE if pos is None else grid_positions(lengths, [senders], pos)
    grid = create_site_grid(lm, [senders], layers, heads, positions)
    corrupt = grid.hooks(lambda site, pos, rows: patch(site, corrupted_run, pos=pos, rows=rows))

    def sender_hooks(layer: int, **point: Any) -> list[Hook] | None:
        sender = as_hooks(corrupt(layer=layer, **point) or ())
        later = [site for site in frozen if _is_later(site, senders, layer)]
        frozen_hooks = [patch(later, clean_run)] if later else []
        return [*frozen_hooks, *sender] if sender else None

    if not receiver_sites:
        return sweep(lm, clean, grid.axes, sender_hooks, metrics, target=corrupted, **settings)
    memory = settings.get("memory")
    first_plan = sweep_plan(
        lm, clean, grid.axes, sender_hooks, logit(0), base_hooks=base_hooks, memory=memory
    )
    received = _read_receivers(first_plan, clean_run, read_sites)

    def receiver_hooks(**point: Any) -> list[Hook] | None:
        key = tuple(point.values())
        if key not in received:
            return None
        return _receiver_patches(receiver_sites, *received[key], lengths)

    return sweep(lm, clean, grid.axes, receiver_hooks, metrics, target=corrupted, **settings)


def _receiver_patches(
    receivers: Sites, source: Captures, first: int, lengths: Sequence[int]
) -> list[Hook]:
    """Returns the patches of what the receivers read, from the first position on, for the rows of
    each length."""
    rows_by_length: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        if length > first:
            rows_by_length.setdefault(length, []).append(row)
    hooks: list[Hook] = []
    for length, rows in sorted(rows_by_length.items()):
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
    attention = ("z", "attn_out")  # one addition
    if site.layer == layer and site.name in attention and sender in attention:
        return False
    order = COMPONENTS.index(site.name), COMPONENTS.index(sender)
    return (site.layer, order[0]) > (layer, order[1])


def _read_receivers(
    first_plan: Plan, clean_run: Run, read_sites: Sequence[Site]
) -> dict[tuple[Any, ...], tuple[Captures, int]]:
    """Runs the first plan. Returns what the receivers read in each cell, and the first position at
    which it may differ from the clean run: the end of the prompts if no receiver reads a change."""
    for cell in first_plan.cells:
        captures = build_hook_points(first_plan.lm, [capture(read_sites)], no_reference)
        cell.hook_points = [*cell.hook_points, *captures]
    PlanRun(first_plan, Journal()).run()
    received: dict[tuple[Any, ...], tuple[Captures, int]] = {}
    for cell in first_plan.cells:
        slots: list[LazyCapture] = []
        first_positions: list[int] = []
        for bound in cell.bound_hooks:
            if bound.change is not None:
                continue
            values = _replace_values(clean_run.captured(bound.site), bound.pieces)
            slots.append(LazyCapture(bound.site, None, None, values))
            for chunk in bound.pieces:
                assert chunk.cells is not None
                first_positions += [positions[0] for positions in chunk.cells.row_positions]
        end = max(map(len, first_plan.inputs.rows))
        first = min(first_positions, default=end)
        received[tuple(cell.point.values())] = Captures(tuple(slots)), first
    return received


def _replace_values(clean: Captured, chunks: Sequence[CapturedChunk]) -> Captured:
    """Returns a capture of the clean prompts with the values of some rows and positions replaced.

    Its prompts are unknown (token -1), because the values are not those of the tokens.
    """
    values = clean.values.clone()
    for chunk in chunks:
        assert chunk.cells is not None
        pairs = zip(chunk.cells.prompts, chunk.cells.row_positions, strict=True)
        for index, (prompt, positions) in enumerate(pairs):
            values[clean.row(prompt), list(positions)] = chunk.values[index, : len(positions)]
    unknown = tuple((-1,) * len(prompt) for prompt in clean.prompts)
    return replace(clean, values=values, prompts=unknown)
