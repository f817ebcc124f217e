"""A figure of doses: what a steering vector does against the damage it causes. No torch."""

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..arguments import check_arguments
from ..errors import BadHook, did_you_mean
from ..steering.controls import DAMAGE, over_doses
from .style import DASHES, INK, LINES, MUTED, add_legend, apply_style, drawable
from .sweeps import draw_spread

UNITS = {
    "damage_kl": "damage: KL on neutral text (nats per token)",
    "damage_loss": "damage: rise of the loss of neutral text (nats per token)",
    "perplexity": "perplexity of neutral text",
}
COLOURS = LINES[:-1]  # the last colour is that of the random vectors


@check_arguments
def damage_curves(
    table: pd.DataFrame,
    *,
    value: str | None = None,
    by: str = "damage_kl",
    log: bool = True,
    labels: dict[str, str] | None = None,
    title: str = "",
) -> Figure:
    """What each dose does against the damage it causes, as a line for each vector.

    `table` is the table of `dose_response` with neutral texts. `value` is the column to draw (by
    default the first delta), `by` the damage. Points are doses; doses of the same sign are joined.
    Each random vector is a thin grey line, the mean over the prompts. Bands are intervals over the
    prompts; below 10 prompts each prompt is a point instead. `log` draws the damage on a log axis.
    Each site has a panel.
    """
    if by not in DAMAGE or by not in table.columns:
        raise BadHook(
            f"the table has no damage {by!r}{did_you_mean(by, DAMAGE)} Give dose_response neutral=."
        )
    if not value:
        deltas = [str(name) for name in table.columns if str(name).endswith("_delta")]
        if not deltas:
            raise BadHook("the table has no column that ends in '_delta': say value=")
        value = deltas[0]
    if value not in table.columns:
        raise BadHook(
            f"the table has no column {value!r}{did_you_mean(value, map(str, table.columns))} "
            "Say value=."
        )
    table = table.reset_index(drop=True)  # the index of concatenated tables may have duplicates
    sites = list(dict.fromkeys(table["site"]))
    figure = Figure(figsize=(min(14.0, 3.0 + 5.0 * len(sites)), 4.4), layout="constrained")
    panels = list(figure.subplots(1, len(sites), squeeze=False, sharey=True)[0])
    for axes, site in zip(panels, sites, strict=True):
        part = pd.DataFrame(table[table["site"] == site])
        _draw_random(axes, part, value, by)
        _draw_vectors(axes, part, value, by, labels or {})
        axes.axhline(0, color=MUTED, lw=0.8)
        if log:
            axes.set_xscale("log")
        axes.set_xlabel(UNITS[by])
        axes.set_title(str(site) if len(sites) > 1 else "", fontsize=10, color=INK)
    panels[0].set_ylabel(f"{value.replace('_', ' ')}, mean of {table['row'].nunique()} prompts")
    add_legend(panels[0])
    return apply_style(figure, title)


def _draw_random(axes: Axes, table: pd.DataFrame, value: str, by: str) -> None:
    """Draw each random vector once, even where it is the control of several vectors."""
    controls = table[table["control"]]
    controls = controls.assign(sign=controls["dose"] > 0)
    label: str | None = "random, of equal length"
    style: dict[str, Any] = {"color": MUTED, "lw": 0.8, "alpha": 0.6, "marker": ".", "ms": 3}
    for _, line in controls.groupby(["vector", "sample", "sign"], sort=False):
        means: Any = line.groupby("dose")[[value, by]].mean()
        means = means.loc[sorted(means.index, key=abs)]
        axes.plot(means[by], means[value], label=label, **style)
        label = None


def _draw_vectors(
    axes: Axes, table: pd.DataFrame, value: str, by: str, labels: dict[str, str]
) -> None:
    prompts: Any = table[~table["control"]]
    means: Any = over_doses(table)
    vectors: Any = means[~means["control"]].groupby("vector", sort=False)
    for number, (name, doses) in enumerate(vectors):
        colour, dashes = COLOURS[number % len(COLOURS)], DASHES[number % len(DASHES)]
        label = {"label": drawable(labels.get(str(name), str(name)))}
        for is_positive in (True, False):
            line = doses[(doses["dose"] > 0) == is_positive].sort_values("dose", key=abs)
            if line.empty:
                continue
            style: dict[str, Any] = {"color": colour, "ls": dashes, **label}
            axes.plot(line[by], line[value], lw=1.8, marker="o", ms=4, **style)
            label = {}
            is_line = (prompts["vector"] == name) & ((prompts["dose"] > 0) == is_positive)
            draw_spread(axes, line, prompts[is_line], by, value, colour)
