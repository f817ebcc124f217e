"""A figure of doses: what a vector does against what it damages, beside random vectors. No torch, no display."""

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..arguments import checks_arguments
from ..errors import BadHook, did_you_mean
from ..steering.controls import DAMAGE, over_doses
from .ranks import DASHES, INK, MUTED, drawable, finished
from .sweeps import LINES, band, few

UNITS = {
    "damage_kl": "damage: KL on neutral text (nats per token)",
    "damage_loss": "damage: rise of the loss of neutral text (nats per token)",
    "perplexity": "perplexity of neutral text",
}


@checks_arguments
def damage_curves(
    table: pd.DataFrame,
    *,
    value: str | None = None,
    by: str = "damage_kl",
    log: bool = True,
    labels: dict[str, str] | None = None,
    title: str = "",
) -> Figure:
    """What each dose does against what it damages: a line with its interval for each vector, grey ones for the random.

    `table` is what `dose_response` gave with neutral texts. `value` is the column that is shown (the first delta), `by`
    the damage. Points are doses; those of one sign are joined. Each random vector is a thin line, the mean over the
    prompts; bands are intervals over the prompts, and below 10 of them each prompt is a point instead. `log` draws
    the damage on a log axis. A panel for each site.
    """
    if by not in DAMAGE or by not in table.columns:
        raise BadHook(
            f"the table has no damage {by!r}{did_you_mean(by, DAMAGE)} Give dose_response neutral=."
        )
    shown = value or next(str(name) for name in table.columns if str(name).endswith("_delta"))
    if shown not in table.columns:
        raise BadHook(
            f"the table has no column {shown!r}{did_you_mean(shown, map(str, table.columns))} Say value=."
        )
    table = table.reset_index(drop=True)  # several put together may count their rows alike
    sites = list(dict.fromkeys(table["site"]))
    figure = Figure(figsize=(min(14.0, 3.0 + 5.0 * len(sites)), 4.4), layout="constrained")
    panels = list(figure.subplots(1, len(sites), squeeze=False, sharey=True)[0])
    for axes, site in zip(panels, sites, strict=True):
        own: Any = table[table["site"] == site]
        _random(axes, own, shown, by)
        _vectors(axes, own, shown, by, labels or {})
        axes.axhline(0, color=MUTED, lw=0.8)
        if log:
            axes.set_xscale("log")
        axes.set_xlabel(UNITS[by])
        axes.set_title(str(site) if len(sites) > 1 else "", fontsize=10, color=INK)
    panels[0].set_ylabel(f"{shown.replace('_', ' ')}, mean of {table['row'].nunique()} prompts")
    panels[0].legend(frameon=False, fontsize=8.5, labelcolor=INK)
    return finished(figure, title)


def _random(axes: Axes, table: pd.DataFrame, value: str, by: str) -> None:
    """Each random vector once, though several vectors may have it as their control."""
    label: str | None = "random, of equal length"
    for _, line in (
        table[table["control"]]
        .assign(sign=table["dose"] > 0)
        .groupby(["vector", "sample", "sign"], sort=False)
    ):
        means: Any = line.groupby("dose")[[value, by]].mean()
        means = means.loc[sorted(means.index, key=abs)]
        axes.plot(
            means[by], means[value], color=MUTED, lw=0.8, alpha=0.6, marker=".", ms=3, label=label
        )
        label = None


def _vectors(axes: Axes, table: pd.DataFrame, value: str, by: str, labels: dict[str, str]) -> None:
    means: Any = over_doses(table)
    means = means[~means["control"]]
    names: list[str] = list(dict.fromkeys(means["vector"]))
    for number, name in enumerate(names):
        colour = LINES[number % (len(LINES) - 1)]  # the last one is that of the random vectors
        label: str | None = drawable(labels.get(name, name))
        for up in (True, False):
            line = means[(means["vector"] == name) & ((means["dose"] > 0) == up)].sort_values(
                "dose", key=abs
            )
            if line.empty:
                continue
            style = {"color": colour, "ls": DASHES[number % len(DASHES)]}
            axes.plot(line[by], line[value], lw=1.8, marker="o", ms=4, label=label, **style)
            label = None
            if not few(line, value):
                band(axes, line, by, value, colour)
                continue
            own = table[(table["vector"] == name) & ~table["control"] & ((table["dose"] > 0) == up)]
            axes.plot(own[by], own[value], ls="", marker=".", ms=4, alpha=0.5, color=colour)
