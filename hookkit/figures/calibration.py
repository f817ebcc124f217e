"""Figures of a confidence: whether it is a probability, and whether it tells right answers from wrong ones.

hk.reliability_diagram(hk.calibration(confidence, right)).savefig("reliability.png")
hk.roc_curves({"router": hk.roc(probability, right), "baseline": hk.roc(top1, right)}).savefig("roc.png")
"""

from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure

from ..arguments import checks_arguments
from ..errors import BadHook, EmptySelection
from .ranks import DASHES, DOWN, GRID, INK, MUTED, POINT, UP, finished, plain

LINES = (UP, POINT, "#b07a1e", "#a565c4", DOWN)  # seen on either paper


@checks_arguments
def reliability_diagram(table: pd.DataFrame, *, title: str = "") -> Figure:
    """How often answers of each confidence were right, beside how often they should have been, and how many there were.

    `table` is `calibration(confidence, right)`. A bar under the diagonal was too sure, one above it not sure enough.
    """
    _check(
        table,
        ("low", "high", "count", "confidence", "accuracy", "gap", "error"),
        "calibration(confidence, right)",
    )
    figure = Figure(figsize=(5.4, 5.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3.2, 1))
    width = table["high"] - table["low"]
    some = pd.DataFrame(table[table["count"] > 0])
    bars = {"width": width[some.index] * 0.92, "align": "edge"}
    left = some["low"] + width[some.index] * 0.04
    above.bar(left, some["accuracy"], color=POINT, label="were right", **bars)
    lower, gap = some[["accuracy", "confidence"]].min(axis=1), some["gap"].abs()
    above.bar(
        left,
        gap,
        bottom=lower,
        color=(0, 0, 0, 0),
        edgecolor=DOWN,
        hatch="////",
        lw=0.8,
        label="gap",
        **bars,
    )
    above.plot([0, 1], [0, 1], color=MUTED, lw=1, ls="--", label="as sure as right")
    above.set_ylim(0, 1.02)
    above.set_ylabel("accuracy (part that was right)")
    above.legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper left")
    below.bar(
        table["low"] + width * 0.04, table["count"], color=MUTED, width=width * 0.92, align="edge"
    )
    below.set_ylabel("answers")
    below.set_xlabel("confidence (probability given to the answer)")
    below.set_xlim(0, 1)
    error = f"expected calibration error {table['error'].sum():.3f} ({len(table)} bins, {table['count'].sum():,} answers)"
    return finished(figure, f"{title}\n{error}" if title else error.capitalize())


@checks_arguments
def roc_curves(curves: Mapping[str, pd.DataFrame], *, title: str = "") -> Figure:
    """Of the right answers, how many are trusted, against how many of the wrong ones: one line for each score.

    `curves` are tables of `roc(score, right)` by name. The diagonal is what chance would do.
    """
    if not curves:
        raise EmptySelection("there is no curve to draw: give {'name': roc(score, right)}")
    figure = Figure(figsize=(5.6, 5.2), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=GRID, lw=1.2, label="chance  0.500")
    for number, (name, table) in enumerate(curves.items()):
        _check(table, ("false_positive_rate", "true_positive_rate"), "roc(score, right)")
        false, true = (
            table["false_positive_rate"].to_numpy(float),
            table["true_positive_rate"].to_numpy(float),
        )
        area = float(((true[1:] + true[:-1]) / 2 * (false[1:] - false[:-1])).sum())
        style = {"color": LINES[number % len(LINES)], "ls": DASHES[number % len(DASHES)]}
        axes.plot(false, true, lw=1.8, label=plain(f"{name}  {area:.3f}"), **style)
    axes.set_xlabel("false positive rate (wrong answers that are trusted)")
    axes.set_ylabel("true positive rate (right answers that are trusted)")
    axes.set_xlim(-0.01, 1.01)
    axes.set_ylim(-0.01, 1.01)
    axes.set_aspect("equal")
    axes.legend(
        frameon=False, fontsize=8.5, labelcolor=INK, loc="lower right", title="area under the curve"
    )
    axes.get_legend().get_title().set(color=MUTED, fontsize=8)  # pyright: ignore[reportOptionalMemberAccess]
    return finished(figure, title or "Which answers to trust")


def _check(table: pd.DataFrame, columns: tuple[str, ...], made_by: str) -> None:
    missing = [column for column in columns if column not in table]
    if missing:
        raise BadHook(
            f"this figure is drawn from {made_by}, and this table has no column {', '.join(map(repr, missing))}: "
            f"it has {', '.join(map(str, table.columns))}"
        )
