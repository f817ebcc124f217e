"""hk.attribution: estimates of activation patching at all sites and positions at once.

    estimate = hk.attribution(lm, clean, corrupted, "z", metric)
    truth = hk.patching(lm, clean, corrupted, "z", metric)
    hk.agreement(estimate, truth)

Patching inserts another prompt's value at a site and runs the model once for each site and
position. To first order the metric changes by (that value - the value there) · (the metric's
gradient there), and one backward computes the gradient everywhere.

hk.agreement measures how well such an estimate agrees with patching.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from ..arguments import check_arguments
from ..errors import BadHook, EmptySelection, OutOfRange, Unsupported, did_you_mean
from ..hooks.base import Hook
from ..hooks.capture import capture
from ..hooks.captured_values import Captured, swap_head_and_query
from ..models.lm import LM
from ..models.positions import PositionRange, Where, read_indices
from ..models.prompts import Prompts
from ..models.sites import SITES_WITH_HEADS, AnySite, Site
from ..sweeps.cells import as_hooks
from ..sweeps.grids import (
    ALL_POSITIONS,
    GridPositions,
    Positions,
    SiteGrid,
    check_pairs,
    create_site_grid,
    grid_positions,
)
from ..tables.metrics import MetricLike
from .backward import CAPTURE_NAME, PromptMetric, bind_metric, check_choice, compute_gradients
from .interpolation import EMBED, EmbeddingPath, Points, check_path_end, mean_gradient, path_points
from .qk import check_qk_sites, qk_effects

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
    method: Literal["gradient", "integrated", "qk_fix"] = "gradient",
    steps: int | None = None,
    points: Points | None = None,
    under: Hook | Sequence[Hook] = (),
) -> pd.DataFrame:
    """Returns an estimate of `patching` with the same arguments: (the other prompt's value - the
    value there) times the metric's gradient there, summed over the cell (attribution patching:
    Nanda 2023; Kramár et al. 2024).

    method   "gradient": the gradient on the prompts patched into, two forwards and a backward in
             all. "integrated": its mean over runs with embeddings between the two prompts' (Hanna
             et al. 2024), which is closer where the metric is not linear. "qk_fix": for queries and
             keys, the gradient at the pattern times the change of the pattern with the other
             prompt's queries or keys (AtP*: Kramár et al. 2024, 3.1.1), which is right where a
             softmax is saturated; the keys of a cell are inserted together
    steps    for "integrated": how many runs, 5 by default
    points   for "integrated": where on the path. "start" (the default), the paper's own points:
             `steps` equal parts, each at its start, the first of which is the prompt patched into.
             "middle": their middles, which are closer to the integral
    by       "neuron": each value of a site without heads by itself (column unit), at all positions
             at once or at each of `pos`; by default the cells of `patching`
    under    hooks that act in every run

    Columns are those of `patching`: the cells', row, and the metric's own with `_before`, `_delta`
    (the estimate), `_target`, `_effect`; the value is `_before` plus `_delta`. The estimate is
    wrong where the gradient vanishes and the effect does not (a saturated pattern), or where the
    inserted value is far away (early in the stream); `agreement` measures by how much. "qk_fix" is
    the first of AtP*'s two corrections. The other, GradDrop (effects that cancel between a direct
    and an indirect path), is not available: it takes a backward for each layer.

    >>> metric = logit_diff(" Mary", " John")
    >>> table = attribution(lm, clean, corrupted, "attn_out", metric, layers=[9], pos=[-1])
    >>> list(table.columns)[3:5]
    ['logit_diff', 'logit_diff_before']
    """
    check_choice("direction", direction, "denoise", "noise")
    check_choice("method", method, "gradient", "integrated", "qk_fix")
    if method != "integrated" and (steps is not None or points is not None):
        raise BadHook(
            "steps and points are of method='integrated', and have no effect with "
            f"{method!r}: leave them out"
        )
    steps = 5 if steps is None else steps
    points = points or "start"
    path_points(steps, points)  # raises
    names = [sites] if isinstance(sites, str) else list(sites)
    pair = PromptPair.create(lm, clean, corrupted, metric, direction, under)
    if by is not None:
        _check_neurons(by, names)
    if method == "qk_fix":
        check_qk_sites(names)
    positions = None
    if by is None or pos is not None:
        positions = grid_positions(list(map(len, pair.target.inputs.rows)), names, pos)
    grid = create_site_grid(lm, names, layers, heads, positions)
    masks = position_masks(pair.target, positions)
    if method == "qk_fix":
        scores = pair.qk_scores(grid.sites(), masks)
    else:
        n_steps = steps if method == "integrated" else 0
        scores = pair.scores(grid.sites(), n_steps, points).summed(masks, by is not None)
    table = _table(pair.target.metric.name, grid, scores, by is not None)
    table.attrs["method"] = method
    table.attrs["direction"] = direction
    if method == "integrated":
        table.attrs["steps"] = steps
        table.attrs["points"] = points
    return table


def _check_neurons(by: str, names: Sequence[str]) -> None:
    check_choice("by", by, "neuron")
    for name in names:
        if name in SITES_WITH_HEADS:
            raise BadHook(
                f"by='neuron' takes sites without heads, and {name} has them: leave by= out"
            )


@dataclass(frozen=True, eq=False)
class SiteScores:
    """For each prompt the metric, the metric of the other prompt, and the estimates at each site.

    The estimates are those of every value [row, pos, ...], or with masks of positions summed to
    [mask, row, ...].
    """

    before: Float[Tensor, " row"]
    target: Float[Tensor, " row"]
    estimates: Mapping[AnySite, Tensor]

    def summed(self, masks: Float[Tensor, "mask row pos"], by_neuron: bool) -> "SiteScores":
        """Returns the estimates summed over the positions of each mask, and without `by_neuron`
        over the last axis."""
        sums: dict[AnySite, Tensor] = {}
        for site, estimate in self.estimates.items():
            if not by_neuron and estimate.ndim >= 3:
                estimate = estimate.sum(-1)
            sums[site] = torch.einsum("nrp,rp...->nr...", masks, estimate)
        return SiteScores(self.before, self.target, sums)


@dataclass(frozen=True, eq=False)
class PromptPair:
    """The metric of the prompts that are patched (target) and of those patched from (source), with
    hooks that act in both."""

    target: PromptMetric
    source: PromptMetric
    base_hooks: tuple[Hook, ...]

    @classmethod
    def create(
        cls,
        lm: LM,
        clean: Prompts,
        corrupted: Prompts,
        metric: MetricLike,
        direction: str,
        base_hooks: Hook | Sequence[Hook],
    ) -> "PromptPair":
        """Returns the pair for a direction: "denoise" runs the corrupted prompts, "noise" the clean
        ones."""
        target, source = clean, corrupted
        if direction == "denoise":
            target, source = corrupted, clean
        check_pairs(lm, source, target)
        target_metric = bind_metric(lm, target, metric)
        if target_metric.reads_continuation:
            raise Unsupported(
                "loss reads a continuation, and attribution is of prompts in pairs: take "
                "hk.logprob of its first token"
            )
        return cls(target_metric, bind_metric(lm, source, metric), as_hooks(base_hooks))

    def batches(self, size: int) -> list[range]:
        """Returns the prompts that run together: all of them if hooks may name rows."""
        count = len(self.target)
        if self.base_hooks:
            size = count
        return [range(start, min(start + size, count)) for start in range(0, count, size)]

    def scores(self, sites: Sequence[Site], steps: int, points: Points) -> SiteScores:
        """Returns the estimates at these sites; with `steps`, integrated over as many points."""
        parts = [self._score_rows(rows, sites, steps, points) for rows in self.batches(BATCH)]
        estimates: dict[AnySite, Tensor] = {}
        for site in sites:
            estimates[site] = _concatenate([part.estimates[site] for part in parts])
        before = torch.cat([part.before for part in parts])
        return SiteScores(before, torch.cat([part.target for part in parts]), estimates)

    def qk_scores(self, sites: Sequence[Site], masks: Tensor) -> SiteScores:
        """Returns the estimates of the QK fix for queries and keys, at each mask of positions."""
        before, target, effects = [], [], []
        for rows in self.batches(BATCH):
            part = qk_effects(self.target, self.source, rows, sites, self.base_hooks, masks)
            before.append(part[0])
            target.append(part[1])
            effects.append(part[2])
        estimates: dict[AnySite, Tensor] = {}
        for site in sites:
            estimates[site] = torch.cat([part[site] for part in effects], 1)
        return SiteScores(torch.cat(before), torch.cat(target), estimates)

    def _score_rows(
        self, rows: range, sites: Sequence[Site], steps: int, points: Points
    ) -> SiteScores:
        captured_sites = [*sites, EMBED] if steps and EMBED not in sites else sites
        captures = capture(captured_sites, name=CAPTURE_NAME)
        source_run = self.source.run(rows, *self.base_hooks, captures)
        source_metric = self.source.of_run(source_run, rows)
        source = {site: source_run.captured(site, CAPTURE_NAME) for site in captured_sites}
        if not steps:
            result = compute_gradients(self.target, rows, sites, self.base_hooks)
            before, values, gradient = result.metric, result.values, result.gradient
        else:
            run = self.target.run(rows, *self.base_hooks, captures)
            before = self.target.of_run(run, rows)
            values = {site: run.captured(site, CAPTURE_NAME) for site in captured_sites}
            end = source[EMBED].values
            check_path_end(self.target, rows, self.base_hooks, end, source_metric)
            path = EmbeddingPath(values[EMBED].values, end, steps, points)
            gradient = mean_gradient(path.gradients(self.target, rows, sites, self.base_hooks))
        estimates: dict[AnySite, Tensor] = {}
        for site in sites:
            estimates[site] = _first_order_change(source[site], values[site], gradient[site])
        return SiteScores(before, source_metric, estimates)


def _first_order_change(source: Captured, target: Captured, gradient: Tensor) -> Tensor:
    """Returns the change of the metric [row, pos, ...] for each value, on the CPU. For scores and
    pattern it is [row, query, head, key]."""
    difference = source.by_place - target.by_place.detach()
    product = difference * swap_head_and_query(target.site, gradient)
    return product.to(device="cpu", dtype=torch.float64)


def _concatenate(parts: Sequence[Tensor]) -> Tensor:
    """Returns batches of different widths as one, padded with zeros at the end of each row."""
    shapes = torch.tensor([part.shape for part in parts])
    widest = shapes[:, 1:].amax(0).tolist()
    joined = parts[0].new_zeros(sum(map(len, parts)), *widest)
    start = 0
    for part in parts:
        sizes = [slice(size) for size in part.shape[1:]]
        joined[(slice(start, start + len(part)), *sizes)] = part
        start += len(part)
    return joined


def position_masks(
    prompt_metric: PromptMetric, positions: GridPositions | None
) -> Float[Tensor, "mask row pos"]:
    """Returns for each value of the dimension `pos` its positions in each prompt, as 1 and 0."""
    lengths = list(map(len, prompt_metric.inputs.rows))
    named = positions or {None: ALL_POSITIONS}
    masks = torch.zeros(len(named), len(lengths), max(lengths), dtype=torch.float64)
    for number, (name, row_positions) in enumerate(named.items()):
        for pos, rows in row_positions:
            where = Where(pos, read_indices(rows, "row"))
            for row, selected in enumerate(prompt_metric.inputs.full.selected_positions(where)):
                if selected is not None:
                    masks[number, row, _clip(selected, lengths[row], row, name)] = 1
    return masks


def _clip(positions: PositionRange, length: int, row: int, name: Any) -> list[int]:
    """Returns positions as a list; those of an open slice end with the prompt."""
    if isinstance(positions, range):
        return list(range(positions.start, min(positions.stop, length), positions.step))
    if positions[-1] >= length:
        raise OutOfRange(
            f"position {positions[-1]} of row {row} was asked for (pos={name!r}), and it has "
            f"{length} tokens, 0 to {length - 1}"
        )
    return list(positions)


def _table(metric: str, grid: SiteGrid, scores: SiteScores, by_neuron: bool) -> pd.DataFrame:
    """Returns the table of `patching`: the cells in its order, a row for each prompt."""
    before = scores.before.double().numpy(force=True)
    distance = (scores.target - scores.before).double().numpy(force=True)
    count = len(before)
    estimates = {}  # [position, head or neuron, row]
    for site, estimate in scores.estimates.items():
        estimates[site] = estimate.movedim(1, -1).numpy()
    indices = {position: index for index, position in enumerate(grid.axes.get("pos", [None]))}
    columns: dict[str, list[Any]] = {name: [] for name in grid.axes}
    units, deltas = [], []
    for values in itertools.product(*grid.axes.values()):
        point = dict(zip(grid.axes, values, strict=True))
        selection = grid.at(point)
        if selection is None:
            continue
        site = selection[0]
        delta = estimates[Site(site.name, site.layer)][indices[point.get("pos")]]
        if site.head is not None:
            delta = delta[site.head]
        for name, value in point.items():
            columns[name] += [value] * delta.size
        units.append(np.repeat(np.arange(delta.size // count), count))
        deltas.append(delta.ravel())
    delta = np.concatenate(deltas)
    rows = np.tile(np.arange(count), len(delta) // count)
    table = pd.DataFrame(columns, index=range(len(delta)))
    if by_neuron:
        table["unit"] = np.concatenate(units)
    table["row"] = rows
    table[metric] = before[rows] + delta
    table[f"{metric}_before"] = before[rows]
    table[f"{metric}_delta"] = delta
    table[f"{metric}_target"] = (before + distance)[rows]
    effect = np.full(len(delta), np.nan)
    np.divide(delta, distance[rows], out=effect, where=distance[rows] != 0)
    table[f"{metric}_effect"] = effect
    return table


# Columns that do not identify a cell.
COUNTS = ("row", "prompt", "sample", "n", "control", "interval")


@check_arguments
def agreement(
    estimate: pd.DataFrame,
    truth: pd.DataFrame,
    *,
    value: str | None = None,
    by: str | None = None,
    top: int = 10,
) -> pd.DataFrame:
    """Returns how well two tables of the same cells agree: those of `attribution` and `patching`,
    for example, or `over_prompts` of each.

    Cells are matched by all columns that both tables have beside the metric's. `value` is the
    column that is compared (by default the first `_delta` that both have). `by` is a column for
    each of whose values the result has a row, such as "site".

    Columns: `by`, value, n (cells in both), pearson, spearman (-1 to 1), same_sign (share of the
    cells that are zero in neither), top (how many of the largest by absolute value were compared)
    and overlap (the share of them that both have). Cells that are zero in both, such as those
    before the first different token, count in all but same_sign and overlap.

    >>> agreement(table, table)["pearson"].round(3).tolist()
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
    shared = [name for name in estimate.columns if name in truth.columns]
    if value is None:
        deltas = [name for name in shared if name.endswith("_delta")]
        value = deltas[0] if deltas else None
    if value is None or value not in shared:
        raise BadHook(
            f"the tables share {', '.join(shared) or 'no column'}, and not "
            f"{value or 'a _delta'}: say value="
        )
    return value


def _cell_columns(estimate: pd.DataFrame, truth: pd.DataFrame) -> list[str]:
    """Returns the columns that both tables have and that are not a metric's."""
    metrics = set()
    for name in (*estimate.columns, *truth.columns):
        for suffix in ("_before", "_delta"):
            if name.endswith(suffix):
                metrics.add(name.removesuffix(suffix))
    cells = []
    for name in estimate.columns:
        is_value = any(name == metric or name.startswith(f"{metric}_") for metric in metrics)
        if name in truth.columns and not is_value and name not in ("n", "interval"):
            cells.append(name)
    if all(name in COUNTS for name in cells):
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
    overlap = float("nan")
    if count:
        overlap = len(largest & largest_true) / count
    return {
        "n": len(pair),
        "pearson": estimate.corr(truth),
        "spearman": estimate.rank().corr(truth.rank()),
        "same_sign": float(((estimate > 0) == (truth > 0))[nonzero].mean()),
        "top": count,
        "overlap": overlap,
    }
