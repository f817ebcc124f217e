"""Figures of a confidence: whether it is a probability, and whether it separates right from wrong.

hk.figures.reliability_diagram(hk.stats.calibration(confidence, right)).savefig("reliability.png")
hk.figures.roc_curves({"router": hk.stats.roc(probability, right)}).savefig("roc.png")
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..arguments import check_arguments
from ..errors import BadHook, EmptySelection
from ..tables.intervals import shares
from . import style

CALIBRATION_COLUMNS = ("low", "high", "count", "confidence", "accuracy", "gap", "error")
ROC_COLUMNS = ("false_positive_rate", "true_positive_rate")


@check_arguments
def reliability_diagram(table: pd.DataFrame, *, title: str = "") -> Figure:
    """The accuracy of the answers of each confidence against that confidence, and their counts.

    `table` is `calibration(confidence, right)`. A bar below the diagonal shows answers that were
    too confident, a bar above it answers that were not confident enough. Each accuracy has its
    95 % interval (Wilson's).
    """
    style.check_columns(table, CALIBRATION_COLUMNS, "calibration(confidence, right)")
    figure, panels = style.new_panels(6.6, 5.6, 2, rows=2, sharex=True, height_ratios=(3.2, 1))
    accuracy_axes, count_axes = panels
    width = table["high"] - table["low"]
    filled = pd.DataFrame(table[table["count"] > 0])
    bars: dict[str, Any] = {"width": width[filled.index] * 0.92, "align": "edge"}
    left = filled["low"] + width[filled.index] * 0.04
    accuracy_axes.bar(left, filled["accuracy"], color=style.POINT, label="were right", **bars)
    bottom = filled[["accuracy", "confidence"]].min(axis=1)
    hatching = {"color": (0, 0, 0, 0), "edgecolor": style.DOWN, "hatch": "////", "lw": 0.8}
    accuracy_axes.bar(left, filled["gap"].abs(), bottom=bottom, label="gap", **hatching, **bars)
    _draw_accuracy_intervals(accuracy_axes, filled)
    diagonal = {"color": style.MUTED, "lw": 1, "ls": "--", "label": "as sure as right"}
    accuracy_axes.plot([0, 1], [0, 1], **diagonal)
    accuracy_axes.set_ylim(0, 1.02)
    accuracy_axes.set_ylabel("accuracy (share that was right)")
    style.add_legend(accuracy_axes)
    left = table["low"] + width * 0.04
    count_axes.bar(left, table["count"], color=style.MUTED, width=width * 0.92, align="edge")
    count_axes.set_ylabel("answers")
    count_axes.set_xlabel("confidence (probability of the answer)")
    count_axes.set_xlim(0, 1)
    error = (
        f"Expected calibration error {table['error'].sum():.3f} "
        f"({len(table)} bins, {table['count'].sum():,} answers)"
    )
    return style.apply_style(figure, title or "Confidence against accuracy", error)


def _draw_accuracy_intervals(axes: Axes, bins: pd.DataFrame) -> None:
    """Draw the 95 % interval of the accuracy of each bin."""
    counts = bins["count"].to_numpy(int)
    accuracies = bins["accuracy"].to_numpy(float)
    centres = (bins["low"] + bins["high"]).to_numpy(float) / 2
    label: str | None = "95 % interval"
    for centre, accuracy, count in zip(centres, accuracies, counts.tolist(), strict=True):
        interval = shares(np.array([round(accuracy * count)]), count, 0.95)
        line: dict[str, Any] = {"color": style.INK, "lw": 1.2, "label": label}
        axes.plot([centre, centre], [interval.low[0], interval.high[0]], **line)
        label = None


@check_arguments
def roc_curves(curves: Mapping[str, pd.DataFrame], *, title: str = "") -> Figure:
    """ROC curves: the share of right answers that are trusted, against that of wrong ones.

    `curves` are tables of `roc(score, right)` by name, one for each line. The dashed diagonal is
    chance. The area under each curve has its 95 % interval (Hanley & McNeil 1982).
    """
    if not curves:
        raise EmptySelection("there is no curve to draw: give {'name': roc(score, right)}")
    if len(curves) > style.MAX_LINES:
        raise BadHook(
            f"{len(curves)} curves are more than can be told apart: draw up to {style.MAX_LINES}"
        )
    figure, axes = style.new_figure(8.4, 4.9)
    axes.plot([0, 1], [0, 1], color=style.MUTED, lw=1.2, ls="--", label="chance: 0.500")
    for number, (name, table) in enumerate(curves.items()):
        style.check_columns(table, ROC_COLUMNS, "roc(score, right)")
        false_rates = table["false_positive_rate"].to_numpy(float)
        true_rates = table["true_positive_rate"].to_numpy(float)
        area = float(np.trapezoid(true_rates, false_rates))
        look: dict[str, Any] = style.line_style(number) | {"marker": ""}
        label = f"{style.shorten(name, 1.6)}: {area:.3f}{_area_interval(area, table)}"
        axes.plot(false_rates, true_rates, lw=1.8, label=label, **look)
    axes.set_xlabel("false positive rate (share of the wrong answers that are trusted)")
    axes.set_ylabel("true positive rate (share of the right answers that are trusted)")
    axes.set_aspect("equal")
    legend = style.add_legend(axes, title="area under the curve", title_fontsize=8.5)
    if legend is not None:
        legend.get_title().set_color(style.INK)
        legend.set_alignment("left")
    return style.apply_style(figure, title or "Right answers trusted against wrong ones trusted")


def _area_interval(area: float, table: pd.DataFrame) -> str:
    """The 95 % interval of an area, in words; "" where the table lacks the numbers of answers."""
    n_right, n_wrong = table.attrs.get("right"), table.attrs.get("wrong")
    if not n_right or not n_wrong:
        return ""
    # Hanley & McNeil 1982, equation 2.
    two_right, two_wrong = area / (2 - area), 2 * area**2 / (1 + area)
    variance = area * (1 - area) + (n_right - 1) * (two_right - area**2)
    variance = (variance + (n_wrong - 1) * (two_wrong - area**2)) / (n_right * n_wrong)
    half = 1.96 * max(variance, 0.0) ** 0.5
    return f" ({max(0.0, area - half):.2f} to {min(1.0, area + half):.2f})"
