"""hk.attribution: estimates of activation patching at all sites and positions at once.

    estimate = hk.attribution(lm, clean, corrupted, "z", metric)
    truth = hk.patching(lm, clean, corrupted, "z", metric)
    hk.stats.compare_attributions(estimate, truth)

Patching inserts another prompt's value at a site and runs the model once for each site and
position. To first order the metric changes by (that value - the value there) · (the metric's
gradient there), and one backward computes the gradient everywhere.

hk.stats.compare_attributions measures how well such an estimate agrees with patching.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..arguments import check_arguments
from ..errors import BadHook, EmptySelection, OutOfRange, Unsupported, did_you_mean
from ..hooks.base import Hook
from ..hooks.capture import Capture, Captured, capture, swap_head_and_query
from ..hooks.edits import edit
from ..models.dictionaries import find_dictionary
from ..models.experts import NEURONS
from ..models.lm import LM
from ..models.positions import Where, read_indices
from ..models.prompts import Prompts
from ..models.sites import FEATURE_AXES, SITES_WITH_HEADS, AnySite, Site
from ..models.tokens import describe_prompts
from ..sweeps.grids import (
    AT_ONCE,
    GridPositions,
    Positions,
    SiteGrid,
    create_site_grid,
    grid_positions,
    site_names,
)
from ..sweeps.sweep import metric_columns
from ..tables.metrics.metric import MetricLike
from .backward import (
    CAPTURE_NAME,
    EMBED,
    Points,
    PromptMetric,
    SiteGradients,
    bind_pair,
    check_path_end,
    compute_gradients,
    mean_gradient,
    path_gradients,
    points_of_method,
    read_captures,
)
from .qk import QK_SITES, qk_effects

NO_UNIT = -1  # what a dictionary does not explain; the column has no number there
ADDED = ("attn_out", "mlp_out")  # what a block adds to the stream
OUTSIDE_BLOCKS = ("resid", "embed", "pos_embed", "final_norm", "logits", "lm_head", "feat.")
BATCH = 16  # prompts of one backward: the graph of each is in memory until then


@check_arguments
def attribution(
    lm: LM,
    clean: Prompts,
    corrupted: Prompts,
    sites: str | Sequence[str],
    metric: MetricLike,
    *,
    direction: Literal["denoise", "noise"] = "denoise",
    layers: Iterable[int] | None = None,
    heads: Iterable[int] | None = None,
    pos: Positions = None,
    by: Literal["neuron"] | None = None,
    method: Literal["gradient", "integrated", "qk_fix", "grad_drop"] = "gradient",
    steps: int | None = None,
    points: Points | None = None,
    base_hooks: Hook | Sequence[Hook] = (),
) -> pd.DataFrame:
    """Returns an estimate of `patching` with the same arguments: (the other prompt's value - the
    value there) times the metric's gradient there, summed over the cell (attribution patching:
    Nanda 2023; Kramár et al. 2024).

    method   "gradient": the gradient on the prompts patched into, two forwards and a backward in
             all. "integrated": its mean over runs with embeddings between the two prompts' (Hanna
             et al. 2024), which is closer where the metric is not linear. "qk_fix": for queries and
             keys, the gradient at the pattern times the change of the pattern with the other
             prompt's queries or keys (AtP*: Kramár et al. 2024, 3.1.1), which is right where a
             softmax is saturated; the keys of a cell are inserted together. "grad_drop": the mean
             size of the estimates with the gradient through one block left out, a backward for each
             block, which does not miss effects that cancel between two paths (AtP*, 3.1.2); its
             sign is that of "gradient"
    steps    for "integrated": how many runs, 5 by default
    points   for "integrated": where on the path. "start" (the default), the paper's own points:
             `steps` equal parts, each at its start, the first of which is the prompt patched into.
             "middle": their middles, which are closer to the integral
    by       "neuron": each value of a site without heads by itself (column unit), at all positions
             at once or at each of `pos`; by default the cells of `patching`. Of features of a
             dictionary ("feat.resid_post") the row without a unit is what they do not explain
    base_hooks    hooks that act in every run

    Columns are those of `patching`: the cells', row, and the metric's own with `_before`, `_delta`
    (the estimate), `_target`, `_effect`; the value is `_before` plus `_delta`. The estimate is
    wrong where the gradient vanishes and the effect does not (a saturated pattern), or where the
    inserted value is far away (early in the stream); `compare_attributions` measures by how much.
    "qk_fix" and "grad_drop" are the two corrections of AtP*.

    >>> metric = logit_diff(" Mary", " John")
    >>> table = attribution(lm, clean, corrupted, "attn_out", metric, layers=[9], pos=[-1])
    >>> list(table.columns)[3:5]
    ['logit_diff', 'logit_diff_before']
    """
    path = points_of_method(method, steps, points)
    names = site_names(sites)
    target, source = bind_pair(lm, clean, corrupted, metric, direction, base_hooks)
    _check_names(names, by, method)
    positions = AT_ONCE
    if by is None or pos is not None:
        positions = grid_positions(list(map(len, target.inputs.rows)), names, pos)
    grid = create_site_grid(lm, names, layers, heads, positions)
    grid_sites, masks = grid.sites(), position_masks(target, positions)
    by_neuron = by is not None
    if by_neuron:
        _refuse_experts(lm, grid_sites)
    first_order = partial(
        _first_order_effects, sites=grid_sites, masks=masks, path=path, by_neuron=by_neuron
    )
    qk_fix = partial(qk_effects, sites=grid_sites, masks=masks)
    grad_drop = partial(_grad_drop_effects, sites=grid_sites, masks=masks, by_neuron=by_neuron)
    effects = {
        "gradient": first_order,
        "integrated": first_order,
        "qk_fix": qk_fix,
        "grad_drop": grad_drop,
    }[method]
    parts = list(map(effects, target.batches(BATCH), source.batches(BATCH)))
    table = _table(target.metric.name, grid, parts, by_neuron)
    table.attrs |= describe_prompts(lm, target.inputs.rows, tokens=True)
    table.attrs["method"] = method
    table.attrs["direction"] = direction
    if path:
        table.attrs["steps"] = len(path)
        table.attrs["points"] = points or "start"
    return table


SiteEffects: TypeAlias = tuple[
    Float[Tensor, " row"], Float[Tensor, " row"], dict[AnySite, Float[Tensor, "mask row ..."]]
]
"""For each prompt the metric, the metric of the other prompt, and the effects of each site."""


def _check_names(names: Sequence[str], by: str | None, method: str) -> None:
    with_heads = list(filter(SITES_WITH_HEADS.__contains__, names))
    if by is not None and with_heads:
        raise BadHook(
            f"by='neuron' takes sites without heads, and {with_heads[0]} has them: leave by= out"
        )
    unfit = set(names).difference(QK_SITES)
    if method == "qk_fix" and unfit:
        raise BadHook(
            f"method='qk_fix' is of queries and keys ({', '.join(QK_SITES)}), and {min(unfit)!r} "
            "is neither"
        )
    outside = [name for name in names if name.startswith(OUTSIDE_BLOCKS)]
    if method == "grad_drop" and outside:
        raise BadHook(
            "method='grad_drop' leaves out the gradient through what a block adds to the stream, "
            f"and {outside[0]!r} is not inside a block: name z, attn_out, mlp_out or another site "
            "of attention or an MLP"
        )


def _refuse_experts(lm: LM, sites: Iterable[Site]) -> None:
    """Raises `BadHook` for the neurons of experts, which are others at each token."""
    for site in sites:
        if lm.location(site).side == "inside" and site.name in NEURONS:
            raise BadHook(
                f"by='neuron' adds up a neuron's estimates over tokens, and {site} has the neurons "
                "of the experts that each token chose: leave by= out, or use hk.gradients"
            )


def _first_order_effects(
    target: PromptMetric,
    source: PromptMetric,
    sites: Sequence[Site],
    masks: Float[Tensor, "mask row pos"],
    path: Sequence[float],
    by_neuron: bool,
) -> SiteEffects:
    """Returns the effects to first order; with a path, with the mean gradient on it."""
    bases = _sites_of_dictionaries(target.lm, sites) if by_neuron else {}
    sites = list(dict.fromkeys([*sites, *bases.values()]))
    captured_sites = [*sites, EMBED] if path and EMBED not in sites else sites
    captures = capture(captured_sites, name=CAPTURE_NAME)
    source_run = source.run(captures)
    source_metric = source.of_run(source_run)
    source_values = read_captures(source_run, captured_sites)
    if path:
        end = source_values[EMBED].values
        result = _mean_over_path(target, sites, captures, end, source_metric, path)
    else:
        result = compute_gradients(target, sites)
    row_masks = masks[:, list(target.rows)]
    effects = _effects_of(result, source_values, sites, row_masks, by_neuron=by_neuron)
    for site, base in bases.items():
        error = effects[base].flatten(2).sum(-1) - effects[site].sum(-1)
        effects[site] = torch.cat([effects[site], error[..., None]], dim=-1)
    return result.metric, source_metric, effects


def _effects_of(
    result: SiteGradients,
    source_values: Mapping[AnySite, Captured],
    sites: Sequence[Site],
    masks: Float[Tensor, "mask row pos"],
    *,
    by_neuron: bool,
) -> dict[AnySite, Float[Tensor, "mask row ..."]]:
    """Returns (the source's value - the value) times the gradient, summed over positions."""
    effects: dict[AnySite, Tensor] = {}
    for site in sites:
        difference = source_values[site].by_position - result.values[site].by_position.detach()
        # [row, pos, ...]
        change = difference * swap_head_and_query(site, result.gradient[site])
        change = change.to(device="cpu", dtype=torch.float64)
        if not by_neuron and change.ndim >= 3:
            change = change.sum(-1)
            if site.name in NEURONS and change.ndim == 3:  # the choices of experts
                change = change.sum(-1)
        effects[site] = torch.einsum("nrp,rp...->nr...", masks[..., : change.shape[1]], change)
    return effects


def _grad_drop_effects(
    target: PromptMetric,
    source: PromptMetric,
    sites: Sequence[Site],
    masks: Float[Tensor, "mask row pos"],
    by_neuron: bool,
) -> SiteEffects:
    """Returns the mean size of the effects with the gradient through one block left out, over all
    blocks but the site's own, with the sign of the effect to first order."""
    lm = target.lm
    if lm.n_layers < 2:
        raise Unsupported("method='grad_drop' leaves out one block, and this model has no other")
    source_run = source.run(capture(sites, name=CAPTURE_NAME))
    values = read_captures(source_run, sites)
    row_masks = masks[:, list(target.rows)]
    result = compute_gradients(target, sites)
    whole = _effects_of(result, values, sites, row_masks, by_neuron=by_neuron)
    sizes = {site: torch.zeros_like(effect) for site, effect in whole.items()}
    for layer in range(lm.n_layers):
        cuts = [edit(site, _detached) for site in _added_sites(lm, layer)]
        without = compute_gradients(target, sites, *cuts)
        effects = _effects_of(without, values, sites, row_masks, by_neuron=by_neuron)
        for site in sites:
            if site.layer != layer:
                sizes[site] += effects[site].abs() / (lm.n_layers - 1)
    signed = {site: size.copysign(whole[site]) for site, size in sizes.items()}
    return result.metric, source.of_run(source_run), signed


def _added_sites(lm: LM, layer: int) -> list[Site]:
    """Returns the sites of what a block adds to the stream."""
    sites = [Site(name, layer) for name in ADDED if lm.layout.find(name, layer)]
    if not sites:
        raise Unsupported(
            f"block {layer} of this {lm.family.name} model has neither {' nor '.join(ADDED)}, so "
            "that method='grad_drop' cannot leave out the gradient through it"
        )
    return sites


def _detached(values: Tensor) -> Tensor:
    return values.detach()


def _sites_of_dictionaries(lm: LM, sites: Sequence[Site]) -> dict[Site, Site]:
    """Returns for each site of features the one that they are added to."""
    dictionaries = lm.layout.dictionaries
    bases: dict[Site, Site] = {}
    for site in sites:
        if site.of_features:
            bases[site] = find_dictionary(dictionaries, site).site
    return bases


def _mean_over_path(
    target: PromptMetric,
    sites: Sequence[Site],
    captures: Capture,
    end: Tensor,
    source_metric: Tensor,
    path: Sequence[float],
) -> SiteGradients:
    """Returns the target's metric and values, with the mean gradient on the path to the source."""
    run = target.run(captures)
    values = read_captures(run, captures.sites)
    check_path_end(target, end, source_metric)
    results = path_gradients(target, sites, values[EMBED].values, end, path)
    return SiteGradients(target.of_run(run), run, values, mean_gradient(results))


def position_masks(
    prompt_metric: PromptMetric, positions: GridPositions
) -> Float[Tensor, "mask row pos"]:
    """Returns for each value of the dimension `pos` its positions in each prompt, as 1 and 0."""
    lengths = list(map(len, prompt_metric.inputs.rows))
    masks = torch.zeros(len(positions), len(lengths), max(lengths), dtype=torch.float64)
    for mask, (name, row_positions) in zip(masks, positions.items(), strict=True):
        for pos, rows in row_positions:
            where = Where(pos, read_indices(rows, "row"))
            for row, selected in enumerate(prompt_metric.inputs.full.selected_positions(where)):
                mask[row, _positions_of_row(selected, row, lengths[row], name)] = 1
    return masks


def _positions_of_row(
    selected: Sequence[int] | None, row: int, length: int, name: Any
) -> Int[Tensor, " pos"]:
    """Returns the selected positions of a prompt. Raises `OutOfRange` beyond its last token."""
    if selected is None:
        selected = ()
    if isinstance(selected, range):  # an open slice ends with the prompt
        selected = range(selected.start, min(selected.stop, length), selected.step)
    if selected and selected[-1] >= length:
        raise OutOfRange(
            f"position {selected[-1]} of row {row} was asked for (pos={name!r}), and it has "
            f"{length} tokens, 0 to {length - 1}"
        )
    return torch.tensor(selected, dtype=torch.int64)


def _table(
    metric: str, grid: SiteGrid, parts: Sequence[SiteEffects], by_neuron: bool
) -> pd.DataFrame:
    befores, targets, effects = zip(*parts, strict=True)
    before = torch.cat(befores).double().numpy(force=True)
    target = torch.cat(targets).double().numpy(force=True)
    count = len(before)
    estimates = {}  # [position, head or neuron, row]
    for site in effects[0]:
        estimate = torch.cat([effect[site] for effect in effects], dim=1)
        estimates[site] = estimate.movedim(1, -1).numpy()
    points, deltas = _estimates_of_points(grid, estimates)
    n_units = list(map(len, deltas))  # neurons, or 1
    repeats = np.repeat(np.arange(len(points)), np.multiply(n_units, count))
    table = pd.DataFrame(points).iloc[repeats].reset_index(drop=True)
    if by_neuron:
        table["unit"] = _unit_column(grid, points, n_units, count)
    delta = np.concatenate(deltas).ravel()
    rows = np.tile(np.arange(count), len(delta) // count)
    table["row"] = rows
    unedited = before[rows]
    numbers = metric_columns(metric, unedited + delta, unedited, delta, target[rows])
    return table.assign(**numbers)


def _unit_column(
    grid: SiteGrid, points: Sequence[Mapping[str, Any]], n_units: Sequence[int], count: int
) -> pd.Series:
    """Returns the neuron or the feature of each row; NA for the error of a dictionary."""
    units = list(map(np.arange, n_units))
    for point, numbers in zip(points, units, strict=True):
        if point.get("site", next(iter(grid.layers))) in FEATURE_AXES:
            numbers[-1] = NO_UNIT
    column = pd.Series(np.repeat(np.concatenate(units), count))
    if (column == NO_UNIT).any():
        return column.astype("Int64").mask(column == NO_UNIT)
    return column


def _estimates_of_points(
    grid: SiteGrid, estimates: Mapping[AnySite, np.ndarray]
) -> tuple[list[dict[str, Any]], list[Float[np.ndarray, "unit row"]]]:
    """Returns the points of the grid at which the model has a site, and the estimates there."""
    indices = {position: index for index, position in enumerate(grid.axes.get("pos", [None]))}
    points, deltas = [], []
    for values in itertools.product(*grid.axes.values()):
        point = dict(zip(grid.axes, values, strict=True))
        selection = grid.at(point)
        if selection is None:
            continue
        site = selection[0]
        delta = estimates[Site(site.name, site.layer)][indices[point.get("pos")]]
        if site.head is not None:
            delta = delta[site.head]
        points.append(point)
        deltas.append(delta.reshape(-1, delta.shape[-1]))
    return points, deltas


METRIC_COLUMN = re.compile(r"(.*)_(?:before|delta)")
# Columns that do not identify a cell.
COUNTS = ("row", "prompt", "sample", "n", "control", "interval")


@check_arguments
def compare_attributions(
    estimate: pd.DataFrame,
    truth: pd.DataFrame,
    *,
    value: str | None = None,
    by: str | None = None,
    top: int = 10,
) -> pd.DataFrame:
    """Returns how well two tables of the same cells agree: those of `attribution` and `patching`,
    for example, or `mean_over_prompts` of each.

    Cells are matched by all columns that both tables have beside the metric's. `value` is the
    column that is compared (by default the first `_delta` that both have). `by` is a column for
    each of whose values the result has a row, such as "site".

    Columns: `by`, value, n (cells in both), pearson, spearman (-1 to 1), same_sign (share of the
    cells that are zero in neither), top (how many of the largest by absolute value were compared)
    and overlap (the share of them that both have). Cells that are zero in both, such as those
    before the first different token, count in all but same_sign and overlap.

    >>> compare_attributions(table, table)["pearson"].round(3).tolist()
    [1.0]
    """
    value = _value_column(estimate, truth, value)
    cells = _cell_columns(estimate, truth)
    pair = estimate[[*cells, value]].merge(truth[[*cells, value]], on=cells, suffixes=("", "_true"))
    if pair.empty:
        raise EmptySelection(
            f"the tables have no cell in common by {', '.join(cells)}: make them of one grid"
        )
    if any(table.duplicated(cells).any() for table in (estimate, truth)):
        raise BadHook(
            f"a cell of {', '.join(cells)} stands several times in a table: leave one of each, or "
            "average"
        )
    if by is None:
        return pd.DataFrame([{"value": value, **_compare(pair, value, top)}])
    if by not in cells:
        raise BadHook(
            f"by={by!r} is no column of both tables{did_you_mean(by, cells)} They share "
            f"{', '.join(cells)}."
        )
    records = []
    for name, group in pair.groupby(by, sort=False):
        records.append({by: name, "value": value, **_compare(group, value, top)})
    return pd.DataFrame(records)


def _value_column(estimate: pd.DataFrame, truth: pd.DataFrame, value: str | None) -> str:
    shared = list(filter(truth.columns.__contains__, estimate.columns))
    deltas = [name for name in shared if name.endswith("_delta")]
    column = value or next(iter(deltas), "a _delta")
    if column not in shared:
        raise BadHook(
            f"the tables share {', '.join(shared) or 'no column'}, and not {column}: say value="
        )
    return column


def _cell_columns(estimate: pd.DataFrame, truth: pd.DataFrame) -> list[str]:
    """Returns the columns that both tables have and that are not a metric's."""
    matches = map(METRIC_COLUMN.fullmatch, [*estimate.columns, *truth.columns])
    metrics = {match[1] for match in filter(None, matches)}
    prefixes = tuple(f"{metric}_" for metric in metrics)
    cells = []
    for name in filter(truth.columns.__contains__, estimate.columns):
        if name not in {*metrics, "n", "interval"} and not name.startswith(prefixes):
            cells.append(name)
    if set(cells) <= set(COUNTS):
        raise BadHook(
            "the tables share no column that says which cell a row is of: "
            f"{', '.join(estimate.columns)}"
        )
    return cells


def _compare(pair: pd.DataFrame, value: str, top: int) -> dict[str, Any]:
    estimate: Any = pair[value]
    truth: Any = pair[f"{value}_true"]
    nonzero = (estimate != 0) & (truth != 0)
    count = min(top, int(nonzero.sum()))
    largest = set(estimate[nonzero].abs().nlargest(count).index)
    largest_true = set(truth[nonzero].abs().nlargest(count).index)
    return {
        "n": len(pair),
        "pearson": estimate.corr(truth),
        "spearman": estimate.rank().corr(truth.rank()),
        "same_sign": float(((estimate > 0) == (truth > 0))[nonzero].mean()),
        "top": count,
        "overlap": len(largest & largest_true) / count if count else float("nan"),
    }
