"""Figures of a confidence: whether it is a probability, and whether it separates right from wrong.

hk.figures.reliability_diagram(hk.stats.calibration(confidence, right)).savefig("reliability.png")
hk.figures.roc_curves({"router": hk.stats.roc(probability, right)}).savefig("roc.png")
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ..arguments import check_arguments
from ..errors import EmptySelection
from . import style

# colours that are visible on light and on dark paper
LINES = (style.UP, style.POINT, "#b07a1e", "#a565c4", style.DOWN)
CALIBRATION_COLUMNS = ("low", "high", "count", "confidence", "accuracy", "gap", "error")
ROC_COLUMNS = ("false_positive_rate", "true_positive_rate")


@check_arguments
def reliability_diagram(table: pd.DataFrame, *, title: str = "") -> Figure:
    """The accuracy of the answers of each confidence against that confidence, and their counts.

    `table` is `calibration(confidence, right)`. A bar below the diagonal shows answers that were
    too confident, a bar above it answers that were not confident enough.
    """
    style.check_columns(table, CALIBRATION_COLUMNS, "calibration(confidence, right)")
    figure = Figure(figsize=(5.4, 5.6), layout="constrained")
    accuracy_axes, count_axes = figure.subplots(2, 1, sharex=True, height_ratios=(3.2, 1))
    width = table["high"] - table["low"]
    filled = pd.DataFrame(table[table["count"] > 0])
    bars: dict[str, Any] = {"width": width[filled.index] * 0.92, "align": "edge"}
    left = filled["low"] + width[filled.index] * 0.04
    accuracy_axes.bar(left, filled["accuracy"], color=style.POINT, label="were right", **bars)
    bottom = filled[["accuracy", "confidence"]].min(axis=1)
    hatching = {"color": (0, 0, 0, 0), "edgecolor": style.DOWN, "hatch": "////", "lw": 0.8}
    accuracy_axes.bar(left, filled["gap"].abs(), bottom=bottom, label="gap", **hatching, **bars)
    accuracy_axes.plot([0, 1], [0, 1], color=style.MUTED, lw=1, ls="--", label="as sure as right")
    accuracy_axes.set_ylim(0, 1.02)
    accuracy_axes.set_ylabel("accuracy (part that was right)")
    style.add_legend(accuracy_axes, fontsize=8, loc="upper left")
    left = table["low"] + width * 0.04
    count_axes.bar(left, table["count"], color=style.MUTED, width=width * 0.92, align="edge")
    count_axes.set_ylabel("answers")
    count_axes.set_xlabel("confidence (probability given to the answer)")
    count_axes.set_xlim(0, 1)
    error = (
        f"expected calibration error {table['error'].sum():.3f} "
        f"({len(table)} bins, {table['count'].sum():,} answers)"
    )
    return style.apply_style(figure, f"{title}\n{error}" if title else error.capitalize())


@check_arguments
def roc_curves(curves: Mapping[str, pd.DataFrame], *, title: str = "") -> Figure:
    """ROC curves: the share of right answers that are trusted, against that of wrong ones.

    `curves` are tables of `roc(score, right)` by name, one for each line. The diagonal is chance.
    """
    if not curves:
        raise EmptySelection("there is no curve to draw: give {'name': roc(score, right)}")
    figure, axes = style.new_figure(5.6, 5.2)
    axes.plot([0, 1], [0, 1], color=style.GRID, lw=1.2, label="chance  0.500")
    for number, (name, table) in enumerate(curves.items()):
        style.check_columns(table, ROC_COLUMNS, "roc(score, right)")
        false_rates = table["false_positive_rate"].to_numpy(float)
        true_rates = table["true_positive_rate"].to_numpy(float)
        label = style.escape_dollars(f"{name}  {np.trapezoid(true_rates, false_rates):.3f}")
        colour, dashes = LINES[number % len(LINES)], style.DASHES[number % len(style.DASHES)]
        axes.plot(false_rates, true_rates, lw=1.8, label=label, color=colour, ls=dashes)
    axes.set_xlabel("false positive rate (wrong answers that are trusted)")
    axes.set_ylabel("true positive rate (right answers that are trusted)")
    axes.set_xlim(-0.01, 1.01)
    axes.set_ylim(-0.01, 1.01)
    axes.set_aspect("equal")
    legend = style.add_legend(axes, loc="lower right", title="area under the curve")
    legend.get_title().set(color=style.MUTED, fontsize=8)
    return style.apply_style(figure, title or "Which answers to trust")
