"""Dose responses over the prompts, and vectors compared where they damage equally much.

table = hk.dose_response(lm, prompts, vectors, metric, samples=8, neutral=texts)
hk.over_doses(table)                        # means with intervals, and the damage
hk.at_damage(table, 0.1)                    # every vector at the dose that costs 0.1 nats a token

No torch is needed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from ..arguments import check_arguments
from ..errors import BadHook, EmptySelection, OutOfRange, did_you_mean
from ..sweeps.summary import over_prompts
from ..tables import intervals

LINE = ("vector", "site", "layer")  # the columns that name a vector
DAMAGE = ("damage_kl", "damage_loss", "perplexity")


@check_arguments
def over_doses(
    table: pd.DataFrame, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """The means of a `dose_response` over its prompts: one row for each vector, dose and control.

    Columns: vector, site, layer, dose, control, n (prompts), the means of the metrics with `_se`,
    `_low` and `_high` as in `over_prompts` (of a control, over prompts and random vectors: both are
    samples), samples (random vectors), and the mean damage. The damage is that of all neutral texts
    together and has no interval.
    """
    cells = [*_line_columns(table), "dose", "control"]
    means = over_prompts(table, by=cells, confidence=confidence, resamples=resamples, seed=seed)
    aggregations: dict[str, tuple[str, str]] = {"samples": ("sample", "nunique")}
    for name in _damage_columns(table):
        aggregations[name] = (name, "mean")
    groups: Any = table.groupby(cells, sort=False)
    return means.merge(groups.agg(**aggregations).reset_index(), on=cells)


@check_arguments
def at_damage(
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
    if toward not in (1, -1) or not damage > 0:
        raise BadHook(
            f"damage={damage} and toward={toward}: give a damage above 0, and 1 or -1 for the "
            "doses' sign"
        )
    table = table.reset_index(drop=True)  # tables put together may repeat their index
    metrics = [name.removesuffix("_before") for name in table.columns if name.endswith("_before")]
    request = _Request(damage, by, toward, metrics)
    names = [*_line_columns(table), "control", "sample"]
    groups: Any = table.groupby(names, sort=False, dropna=False)
    parts = []
    for key, line in groups:
        parts.append(_at_damage(line, dict(zip(names, key, strict=True)), request))
    result = pd.concat(parts, ignore_index=True)
    random: Any = result[result["control"]]
    # sample n is one direction for all vectors of a site
    counts = random.groupby("site")["sample"].nunique().to_dict()
    result["random_vectors"] = result["site"].map(counts).fillna(0).astype(int)
    for metric in metrics:
        result[f"{metric}_gain"] = _gains(result, f"{metric}_delta")
        spreads: dict[str, tuple[float, float]] = {}
        for site, rows in random.groupby("site"):
            spreads[site] = _random_spread(rows, f"{metric}_delta")
        pairs = [spreads.get(site, (np.nan, np.nan)) for site in result["site"]]
        result[f"{metric}_random_sd"], result[f"{metric}_random_rest"] = zip(*pairs, strict=True)
    return result


@dataclass(frozen=True)
class _Request:
    """The damage at which vectors are compared, its column, the doses' sign, and the metrics."""

    damage: float
    by: str
    toward: int
    metrics: Sequence[str]


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


def _at_damage(line: pd.DataFrame, key: dict[str, Any], request: _Request) -> pd.DataFrame:
    """Returns the prompts of one vector at the dose that costs the damage."""
    side = pd.DataFrame(line[np.sign(line["dose"]) == request.toward])
    if side.empty:
        sign = "positive" if request.toward > 0 else "negative"
        raise EmptySelection(f"the table has no {sign} dose of {_words(key)}")
    doses = sorted(set(side["dose"]), key=abs)
    rows_at = {dose: side[side["dose"] == dose].set_index("row") for dose in doses}
    costs = [0.0, *[float(rows_at[dose][request.by].iloc[0]) for dose in doses]]
    step, part = _crossing(costs, request, _words(key))
    after = rows_at[doses[step]]
    previous_dose = doses[step - 1] if step else 0.0
    rows = pd.DataFrame({**key, "row": after.index, "prompt": after.index})
    rows["dose_there"] = previous_dose + part * (doses[step] - previous_dose)
    for metric in request.metrics:
        before = after[f"{metric}_before"].to_numpy(float)
        previous = before
        if step:
            previous = rows_at[previous_dose].loc[after.index, metric].to_numpy(float)
        rows[metric] = previous + part * (after[metric].to_numpy(float) - previous)
        rows[f"{metric}_before"] = before
        rows[f"{metric}_delta"] = rows[metric] - before
    return rows


def _crossing(costs: Sequence[float], request: _Request, words: str) -> tuple[int, float]:
    """Returns the step between two doses in which the damage is first reached, and how far into it
    the damage is."""
    for step, (low, high) in enumerate(pairwise(costs)):
        if low < request.damage <= high:
            return step, (request.damage - low) / (high - low)
    raise OutOfRange(
        f"{request.by} {request.damage} was asked for, and {words} reaches {max(costs):.3g}: "
        "dose further, or ask for less"
    )


def _gains(table: pd.DataFrame, delta: str) -> list[float]:
    """Returns each prompt's delta minus the mean of the random vectors' at the same site."""
    random: Any = table[table["control"]].groupby(["site", "row"])[delta].mean()
    means = random.to_dict()
    gains = []
    for site, row, value in table[["site", "row", delta]].itertuples(index=False):
        gains.append(value - means.get((site, row), np.nan))
    return gains


def _line_columns(table: pd.DataFrame) -> list[str]:
    if not {"vector", "site", "control", "sample"} <= set(table.columns):
        columns = ", ".join(map(str, table.columns))
        raise BadHook(f"this table has columns {columns}: give what dose_response gave")
    return [name for name in LINE if name in table.columns]


def _damage_columns(table: pd.DataFrame) -> list[str]:
    return [name for name in DAMAGE if name in table.columns]


def _words(key: dict[str, Any]) -> str:
    vector = f"{key['vector']!r} at {key['site']}"
    return f"random vector {key['sample']} beside {vector}" if key["control"] else vector
