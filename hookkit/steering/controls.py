"""What doses did, over the prompts; and vectors beside one another where they damage equally much. No torch.

table = hk.dose_response(lm, prompts, vectors, metric, samples=8, neutral=texts)
hk.over_doses(table)                        # means with intervals, and the damage
hk.at_damage(table, 0.1)                    # every vector at the dose that costs 0.1 nats a token
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from ..arguments import checks_arguments
from ..errors import BadHook, EmptySelection, OutOfRange, did_you_mean
from ..sweeps.summary import over_prompts
from ..tables import intervals

PLACES = ("vector", "site", "layer")
DAMAGE = ("damage_kl", "damage_loss", "perplexity")


@checks_arguments
def over_doses(
    table: pd.DataFrame, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """What `dose_response` gave, over its prompts: one row for each vector, dose and control.

    Columns: vector, site, layer, dose, control, n (prompts), the means of the metrics with `_se`, `_low` and `_high` as
    in `over_prompts` (of a control, over prompts and random vectors: both are samples), samples (random vectors), and
    the mean damage. Damage is that of all neutral texts together and has no interval.
    """
    cells = [*_places(table), "dose", "control"]
    means = over_prompts(table, by=cells, confidence=confidence, resamples=resamples, seed=seed)
    groups: Any = table.groupby(cells, sort=False)
    others = {"samples": ("sample", "nunique")} | {name: (name, "mean") for name in _damage(table)}
    return means.merge(groups.agg(**others).reset_index(), on=cells)


@checks_arguments
def at_damage(
    table: pd.DataFrame, damage: float, *, by: str = "damage_kl", toward: int = 1
) -> pd.DataFrame:
    """Every vector of a `dose_response` at the dose at which it damages so much: a fair comparison, since a random
    vector of equal length often damages less.

    Along the positive doses (`toward=-1`: the negative ones), from no dose at all, the first one that costs `damage` in
    the column `by` is found by straight lines between the doses that were run, and so are each prompt's metrics there.
    `OutOfRange` where a vector's doses do not cost so much: none is extrapolated.

    Columns: vector, site, layer, control, sample, row, prompt, dose_there, random_vectors (how many the site has), and
    each metric's value, `_before`, `_delta`, and `_gain`: how far its delta is above the mean of that of all random
    vectors at the same site, for the same prompt (NaN without any). How the random vectors' deltas vary is in
    `_random_sd` (standard deviation of their means over the prompts) and `_random_rest` (of what is left for a vector
    and a prompt beside both means).

    `over_prompts(found, by=["vector", "site", "control"])` gives the means and intervals. The random vectors are a
    sample: a gain's interval is over prompts and vectors, and lies above 0 where the vector goes further than one more
    random vector would in 97.5 of 100 experiments. It needs two random vectors, and 8 or more to say much.
    """
    if by not in _damage(table):
        raise BadHook(
            f"the table has no damage {by!r}{did_you_mean(by, DAMAGE)} Give dose_response neutral=, texts on which "
            "damage is measured"
        )
    if toward not in (1, -1) or not damage > 0:
        raise BadHook(
            f"damage={damage} and toward={toward}: give a damage above 0, and 1 or -1 for the doses' sign"
        )
    table = table.reset_index(drop=True)  # several put together may count their rows alike
    metrics = [name.removesuffix("_before") for name in table.columns if name.endswith("_before")]
    lines = [*_places(table), "control", "sample"]
    groups: Any = table.groupby(lines, sort=False, dropna=False)
    found = [
        _there(line, dict(zip(lines, key, strict=True)), damage, by, toward, metrics)
        for key, line in groups
    ]
    made = pd.concat(found, ignore_index=True)
    random: Any = made[made["control"]]
    vectors: Any = random.groupby("site")[
        "sample"
    ].nunique()  # sample n is one direction beside every vector
    made["random_vectors"] = [int(vectors.get(site, 0)) for site in made["site"]]
    for metric in metrics:
        made[f"{metric}_gain"] = _gain(made, metric)
        spreads = {site: _spread(rows, f"{metric}_delta") for site, rows in random.groupby("site")}
        for end, place in (("sd", 0), ("rest", 1)):
            made[f"{metric}_random_{end}"] = [
                spreads.get(site, (np.nan, np.nan))[place] for site in made["site"]
            ]
    return made


def _spread(rows: Any, name: str) -> tuple[float, float]:
    """How the random vectors of one site vary: in their means over the prompts, and besides."""
    values = rows.pivot_table(
        index="row", columns=["vector", "sample"], values=name, sort=False
    ).to_numpy(float)
    count = int(rows["sample"].nunique())
    if count < 2 or np.isnan(values).any():
        return np.nan, np.nan
    lines = values.shape[
        1
    ]  # those of several vectors may be of the same random ones, which count once
    part = (1 - 1 / lines) / (1 - 1 / count)
    variance = float(values.mean(axis=0).var(ddof=1)) * part
    return float(np.sqrt(variance)), float(np.sqrt(intervals.variation(values).rest * part))


def _there(
    line: pd.DataFrame,
    at: dict[str, Any],
    damage: float,
    by: str,
    toward: int,
    metrics: Sequence[str],
) -> pd.DataFrame:
    """The prompts of one vector at the dose that damages so much."""
    side = pd.DataFrame(line[np.sign(line["dose"]) == toward])
    if side.empty:
        raise EmptySelection(
            f"the table has no {'positive' if toward > 0 else 'negative'} dose of {_said(at)}"
        )
    doses = sorted(set(side["dose"]), key=abs)
    costs = [0.0, *(float(side.loc[side["dose"] == dose, by].iloc[0]) for dose in doses)]
    step, part = _crossing(costs, damage, _said(at), by)
    after = side[side["dose"] == doses[step]].set_index("row")
    last = side[side["dose"] == doses[step - 1]].set_index("row") if step else None
    start = doses[step - 1] if step else 0.0
    rows = pd.DataFrame({**at, "row": after.index, "prompt": after.index})
    rows["dose_there"] = start + part * (doses[step] - start)
    for metric in metrics:
        was = after[f"{metric}_before"].to_numpy(float)
        first = was if last is None else last.loc[after.index, metric].to_numpy(float)
        rows[metric] = first + part * (after[metric].to_numpy(float) - first)
        rows[f"{metric}_before"] = was
        rows[f"{metric}_delta"] = rows[metric] - was
    return rows


def _crossing(costs: Sequence[float], damage: float, words: str, by: str) -> tuple[int, float]:
    """The step between two doses within which the damage is first reached, and how far into it."""
    for step, (low, high) in enumerate(pairwise(costs)):
        if low < damage <= high:
            return step, (damage - low) / (high - low)
    raise OutOfRange(
        f"{by} {damage} was asked for, and {words} reaches {max(costs):.3g}: dose further, or ask for less"
    )


def _gain(made: pd.DataFrame, metric: str) -> list[float]:
    """How far each prompt's delta is above the mean of the random vectors' at the same site."""
    random: Any = made[made["control"]].groupby(["site", "row"])[f"{metric}_delta"].mean()
    means = random.to_dict()
    rows = made[["site", "row", f"{metric}_delta"]].itertuples(index=False)
    return [delta - means.get((site, row), np.nan) for site, row, delta in rows]


def _places(table: pd.DataFrame) -> list[str]:
    if not {"vector", "site", "control", "sample"} <= set(table.columns):
        raise BadHook(
            f"this table has columns {', '.join(map(str, table.columns))}: give what dose_response gave"
        )
    return [name for name in PLACES if name in table.columns]


def _damage(table: pd.DataFrame) -> list[str]:
    return [name for name in DAMAGE if name in table.columns]


def _said(at: dict[str, Any]) -> str:
    return f"{'random vector ' + str(at['sample']) + ' beside ' if at['control'] else ''}{at['vector']!r} at {at['site']}"
