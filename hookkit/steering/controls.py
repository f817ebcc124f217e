"""Dose responses over the prompts, and vectors compared where they damage equally much.

    table = hk.dose_response(lm, prompts, vectors, metric, samples=8, neutral=texts)
    hk.stats.mean_over_doses(table)          # means with intervals, and the damage
    hk.stats.effect_at_damage(table, 0.1)    # every vector at the dose that costs 0.1 nats a token

No torch is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from ..arguments import check_arguments
from ..errors import BadHook, EmptySelection, OutOfRange, did_you_mean
from ..sweeps.summary import mean_over_prompts
from ..tables import intervals

LINE = ("vector", "site", "layer")  # the columns that name a vector
SIGNS = {1: "positive", -1: "negative"}
DAMAGE = ("damage_kl", "damage_loss", "perplexity")


@check_arguments
def mean_over_doses(
    table: pd.DataFrame, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """The means of a `dose_response` over its prompts: one row for each vector, dose and control.

    Columns: vector, site, layer, dose, control, n (prompts), the means of the metrics with `_se`,
    `_low` and `_high` as in `mean_over_prompts` (of a control, over prompts and random vectors:
    both are samples), samples (random vectors), and the mean damage. The damage is that of all
    neutral texts together and has no interval.
    """
    cells = [*_line_columns(table), "dose", "control"]
    means = mean_over_prompts(
        table, by=cells, confidence=confidence, resamples=resamples, seed=seed
    )
    aggregations: dict[str, tuple[str, str]] = {"samples": ("sample", "nunique")}
    for name in _damage_columns(table):
        aggregations[name] = (name, "mean")
    groups: Any = table.groupby(cells, sort=False)
    return means.merge(groups.agg(**aggregations).reset_index(), on=cells)


@check_arguments
def effect_at_damage(
    table: pd.DataFrame, damage: float, *, by: str = "damage_kl", toward: int = 1
) -> pd.DataFrame:
    """Every vector of a `dose_response` at the dose that costs this much damage.

    This is a fair comparison, since a random vector of equal length often damages less. Along the
    positive doses (`toward=-1`: the negative ones), from no dose at all, the first dose that costs
    `damage` in the column `by` is interpolated between the doses that were run, and so are each
    prompt's metrics there. Raises `OutOfRange` if a vector's doses do not cost as much: nothing is
    extrapolated.

    Columns: vector, site, layer, control, sample, row, prompt, dose_there, random_vectors (how many
    the site has), and each metric's value, `_before`, `_delta`, and `_gain`: its delta minus the
    mean delta of all random vectors at the same site, for the same prompt (NaN without any).
    `_random_sd` is the standard deviation of the random vectors' mean deltas over the prompts, and
    `_random_rest` that of the residuals for a vector and a prompt, after both means.

    `over_prompts(result, by=["vector", "site", "control"])` gives the means and intervals. The
    random vectors are a sample: a gain's interval is over prompts and vectors, and is above 0 if
    the vector does more than one more random vector would in 97.5 of 100 experiments. It needs two
    random vectors, and 8 or more to be informative.
    """
    if by not in _damage_columns(table):
        raise BadHook(
            f"the table has no damage {by!r}{did_you_mean(by, DAMAGE)} Give dose_response "
            "neutral=, texts on which damage is measured"
        )
    if toward not in SIGNS or not damage > 0:
        raise BadHook(
            f"damage={damage} and toward={toward}: give a damage above 0, and 1 or -1 for the "
            "doses' sign"
        )
    table = table.reset_index(drop=True)  # tables put together may repeat their index
    metrics = [name.removesuffix("_before") for name in table.filter(regex="_before$")]
    names = [*_line_columns(table), "control", "sample"]
    groups: Any = table.groupby(names, sort=False, dropna=False)
    parts = []
    for values, line in groups:
        key = dict(zip(names, values, strict=True))
        side = line[np.sign(line["dose"]) == toward]
        if side.empty:
            raise EmptySelection(f"the table has no {SIGNS[toward]} dose of {_words(key)}")
        parts.append(_interpolate(side, key, metrics, damage, by))
    return _compare_with_random(pd.concat(parts, ignore_index=True), metrics)


def _compare_with_random(result: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    """Returns the table with each metric beside that of the random vectors at the same site."""
    random: Any = result[result["control"]]
    # sample n is one direction for all vectors of a site
    counts = random.groupby("site")["sample"].nunique().to_dict()
    result["random_vectors"] = result["site"].map(counts).fillna(0).astype(int)
    prompts_of_sites: Any = pd.MultiIndex.from_arrays([result["site"], result["row"]])
    for metric in metrics:
        delta = f"{metric}_delta"
        random_means = random.groupby(["site", "row"])[delta].mean().reindex(prompts_of_sites)
        result[f"{metric}_gain"] = result[delta] - random_means.to_numpy()
        companions = [f"{metric}_random_sd", f"{metric}_random_rest"]
        result[companions] = np.nan
        for site, rows in random.groupby("site"):
            result.loc[result["site"] == site, companions] = _random_spread(rows, delta)
    return result


def _random_spread(rows: Any, name: str) -> tuple[float, float]:
    """Returns the standard deviations of one site's random vectors: of their means over the
    prompts, and of the residuals."""
    columns = ["vector", "sample"]
    pivot = rows.pivot_table(index="row", columns=columns, values=name, sort=False)
    values = pivot.to_numpy(float)
    count = int(rows["sample"].nunique())
    if count < 2 or np.isnan(values).any():
        return np.nan, np.nan
    # lines of several vectors may be of the same random ones, which count once
    lines = values.shape[1]
    factor = (1 - 1 / lines) / (1 - 1 / count)
    variance = float(values.mean(axis=0).var(ddof=1)) * factor
    residual = intervals.variation(values).residual * factor
    return float(np.sqrt(variance)), float(np.sqrt(residual))


def _interpolate(
    side: pd.DataFrame, key: dict[str, Any], metrics: Sequence[str], damage: float, by: str
) -> pd.DataFrame:
    """Returns the prompts of one vector at the first dose that costs the damage.

    It lies between two doses that were run, or between none and the first.
    """
    groups: Any = side.groupby("dose")
    rows_at: dict[float, Any] = {dose: rows.set_index("row") for dose, rows in groups}
    by_dose = side.drop_duplicates("dose").sort_values("dose", key=abs)
    doses, costs = [0.0, *by_dose["dose"]], [0.0, *by_dose[by]]
    first = rows_at[doses[1]]
    rows_at[0.0] = first.assign(**{metric: first[f"{metric}_before"] for metric in metrics})
    reached = [low < damage <= high for low, high in pairwise(costs)]
    if True not in reached:
        raise OutOfRange(
            f"{by} {damage} was asked for, and {_words(key)} reaches {max(costs):.3g}: "
            "dose further, or ask for less"
        )
    step = reached.index(True)
    start, dose = doses[step : step + 2]
    part = (damage - costs[step]) / (costs[step + 1] - costs[step])
    after = rows_at[dose]
    previous = rows_at[start].loc[after.index]
    rows = pd.DataFrame({**key, "row": after.index, "prompt": after.index}, index=after.index)
    rows["dose_there"] = start + part * (dose - start)
    for metric in metrics:
        rows[metric] = previous[metric] + part * (after[metric] - previous[metric])
        rows[f"{metric}_before"] = after[f"{metric}_before"]
        rows[f"{metric}_delta"] = rows[metric] - rows[f"{metric}_before"]
    return rows


def _line_columns(table: pd.DataFrame) -> list[str]:
    if not {"vector", "site", "control", "sample"} <= set(table.columns):
        columns = ", ".join(map(str, table.columns))
        raise BadHook(f"this table has columns {columns}: give what dose_response gave")
    return list(filter(table.columns.__contains__, LINE))


def _damage_columns(table: pd.DataFrame) -> list[str]:
    return list(filter(table.columns.__contains__, DAMAGE))


def _words(key: dict[str, Any]) -> str:
    vector = f"{key['vector']!r} at {key['site']}"
    if key["control"]:
        return f"random vector {key['sample']} beside {vector}"
    return vector
