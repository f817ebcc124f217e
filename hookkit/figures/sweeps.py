"""Figures of a sweep: where an edit matters, and how certain that is. No torch, no display.

    table = hk.patching(lm, clean, corrupted, "resid_pre", hk.metrics.logit_diff(" Mary", " John"))
    hk.figures.heat_map(table, labels=tokens)           # layer x position, the mean over prompts
    hk.figures.interval_lines(table, x="layer")         # means with intervals, or each prompt
    hk.figures.damage_curves(hk.dose_response(lm, prompts, vectors, metric, neutral=texts))

Cells are green where the value is positive and red where it is negative, the stronger the larger.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, to_rgb
from matplotlib.figure import Figure

from ..arguments import check_arguments
from ..errors import BadHook, EmptySelection, did_you_mean
from ..steering.controls import DAMAGE, mean_over_doses
from ..tables.intervals import MIN_FOR_INTERVAL
from . import style
from .style import INK, LINES, MUTED, apply_style, drawable

WORDS = {"pos": "position", "unit": "neuron"}  # of columns whose names are no words
LABELLED_WORDS = {**WORDS, "pos": ""}  # where each position has a label of its own
GRID_COLUMNS = ("pos", "head", "unit", "scale")  # for x, the first that a table has
SERIES = ("site", "control", "pos", "head")  # for lines, the first that has several values
UNITS = {
    "damage_kl": "damage: KL on neutral text (nats per token)",
    "damage_loss": "damage: rise of the loss of neutral text (nats per token)",
    "perplexity": "perplexity of neutral text",
}
VECTOR_COLOURS = LINES[:-1]  # the last colour is that of the random vectors


@check_arguments
def heat_map(
    table: pd.DataFrame,
    *,
    value: str | None = None,
    x: str | None = None,
    y: str = "layer",
    labels: Sequence[str] | Mapping[Any, str] | None = None,
    limit: float | None = None,
    named: int = 3,
    title: str = "",
) -> Figure:
    """A number for every point of a grid, as colour: layer by position, or layer by head.

    `table` is the result of `sweep`, `patching` … or `mean_over_prompts`. Several prompts are
    averaged, an effect as in `mean_over_prompts`: the ratio of the means. Each site has a panel.
    `value` is the column to draw (by default the first effect, else the first delta); `x` and `y`
    are the columns of the axes. `labels` are texts for x, such as the prompt's tokens. Colours
    reach from -`limit` to `limit` (by default the largest value). The `named` largest values of
    each panel are written in their cells.
    """
    value = _value_column(table, value)
    x = x or style.first_column(GRID_COLUMNS, table.columns)
    x = _check_column(table, x, "Say x= and y=.")
    y = _check_column(table, y, "Say x= and y=.")
    parts = _split_by(table, style.first_column(["site"], table.columns))
    grids = [_build_grid(part, value, x, y).sort_index() for part in parts.values()]
    if limit is None:
        limit = max(float(np.nanmax(np.abs(grid.to_numpy()))) for grid in grids) or 1.0
    width = min(14.0, 1.6 + sum(max(2.4, 0.34 * grid.shape[1]) for grid in grids))
    figure, panels = style.new_panels(width, max(3.0, 0.17 * len(grids[0]) + 1.6), len(grids))
    for axes, grid, site in zip(panels, grids, parts, strict=True):
        _draw_cells(axes, grid, limit, named)
        _label_grid(axes, grid, x, y, labels)
        axes.set_title(str(site or ""), fontsize=10, color=INK)
    apply_style(figure, title)
    label = f"{value.replace('_', ' ')}{_describe_mean(next(iter(parts.values())))}"
    style.add_colour_bar(figure, _colour_map(), (-limit, limit), label, fraction=0.05, pad=0.02)
    return figure


def _check_column(table: pd.DataFrame, name: str | None, advice: str = "") -> str:
    if name is None or name not in table.columns:
        hint = did_you_mean(str(name), map(str, table.columns))
        raise BadHook(f"the table has no column {name!r}{hint} {advice}".rstrip())
    return name


def _value_column(table: pd.DataFrame, value: str | None) -> str:
    """The column to draw: `value`, else the first effect, else the first delta."""
    if table.empty:
        raise EmptySelection("the table has no row to draw")
    candidates = [*table.filter(regex="_effect$"), *table.filter(regex="_delta$")]
    value = value or next(iter(candidates), None)
    if value is None or value not in table.columns:
        raise BadHook(
            f"the table has no column {value!r}; it has {', '.join(table.columns)}: say value="
        )
    return value


def _split_by(table: pd.DataFrame, column: str | None) -> dict[Any, pd.DataFrame]:
    """The part of the table for each value of a column. Without a column it is the whole table."""
    if column is None:
        return {None: table}
    return dict(iter(table.groupby(column, sort=False)))


def _build_grid(table: Any, value: str, x: str, y: str) -> pd.DataFrame:
    """The mean of a column in each cell; of an effect of several prompts the ratio of the means."""
    pivot: dict[str, Any] = {"index": y, "columns": x, "aggfunc": "mean", "sort": False}
    metric = value.removesuffix("_effect")
    delta, before, target = f"{metric}_delta", f"{metric}_before", f"{metric}_target"
    has_sides = {"row", delta, before, target} <= set(table.columns)
    if not has_sides or not value.endswith("_effect"):
        return table.pivot_table(values=value, **pivot)
    sides = table.astype({delta: float, before: float, target: float})
    sides["_full_change"] = sides[target] - sides[before]
    sides = sides.dropna(subset=[delta, "_full_change"])
    numerator = sides.pivot_table(values=delta, **pivot)
    denominator = sides.pivot_table(values="_full_change", **pivot)
    return numerator / denominator.where(denominator != 0)


def _describe_mean(table: pd.DataFrame) -> str:
    """What the table's values are averaged over, in words; "" for one prompt."""
    counts = {"prompts": 1}
    if "n" in table.columns:
        counts["prompts"] = int(table["n"].to_numpy().max())
    elif "sample" in table.columns:  # a table of causal tracing
        counts = {"prompts": len(set(table["prompt"])), "draws of noise": len(set(table["sample"]))}
    elif "row" in table.columns:
        counts["prompts"] = len(set(table["row"]))
    words = [f"{count} {name}" for name, count in counts.items() if count > 1]
    return f", mean of {' x '.join(words)}" if words else ""


def _colour_map() -> ListedColormap:
    """From red over nothing to green, by opacity, so that it can stand on paper of any colour."""
    colours = []
    for share in np.linspace(-1, 1, style.SHADES):
        colours.append((*to_rgb(style.sign_colour(share)), abs(share) ** 0.8))
    return ListedColormap(colours)


def _draw_cells(axes: Axes, grid: pd.DataFrame, limit: float, named: int) -> None:
    numbers = grid.to_numpy(float)
    cells = np.ma.masked_invalid(numbers)
    style.draw_cells(axes, cells, _colour_map(), -limit, high=limit, lw=0.25)
    sizes = np.abs(np.nan_to_num(numbers)).ravel()
    for index in np.argsort(-sizes, kind="stable")[:named]:
        if sizes[index] > 0:
            row, column = divmod(int(index), numbers.shape[1])
            text = f"{numbers[row, column]:.2g}"
            style.write_centred(axes, (column + 0.5, row + 0.5), text, 6.5)


def _label_grid(axes: Axes, grid: pd.DataFrame, x: str, y: str, labels: Any) -> None:
    columns, rows = list(grid.columns), list(grid.index)
    rotation: dict[str, Any] = {}
    axes.set_xlabel(WORDS.get(x, x))
    if labels is not None:
        rotation = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"}
        axes.set_xlabel(LABELLED_WORDS.get(x, x))
    axes.set_xticks(np.arange(len(columns)) + 0.5, _column_labels(columns, labels), **rotation)
    stride = max(1, len(rows) // 10)
    axes.set_yticks(np.arange(0, len(rows), stride) + 0.5, list(map(str, rows[::stride])))
    axes.set_ylabel(WORDS.get(y, y))


def _column_labels(columns: Sequence[Any], labels: Any) -> list[str]:
    """The texts of the x axis. A sequence is indexed by position where the columns are numbers."""
    if labels is None or isinstance(labels, Mapping):
        texts = labels or {}
        return [drawable(str(texts.get(column, column))) for column in columns]
    if len(labels) < len(columns):
        raise BadHook(
            f"{len(labels)} labels were given, and the grid has {len(columns)} columns: "
            "give one for each"
        )
    indices: Sequence[Any] = range(len(columns))
    if all(isinstance(column, int | np.integer) for column in columns):
        indices = columns
    names = map(drawable, map(labels.__getitem__, indices))
    return list(map("{}  {}".format, names, columns))


@check_arguments
def interval_lines(
    summary: pd.DataFrame,
    *,
    x: str = "layer",
    value: str | None = None,
    series: str | None = None,
    title: str = "",
) -> Figure:
    """Means as lines with the band of their intervals, along one dimension of a grid.

    `summary` is `over_prompts(table)`, or the table of a sweep itself. `series` is the column that
    has a line for each of its values (by default site, control, pos or head, the first that has
    several). An interval of fewer than 10 prompts is not drawn: from the sweep's table each prompt
    is drawn as a point, and from `mean_over_prompts` the means stand alone.
    """
    value = _value_column(summary, value)
    _check_column(summary, x)
    series = series or _default_series(summary, x)
    means = summary
    points_of: dict[Any, pd.DataFrame] = {}
    if "row" in summary.columns and "n" not in summary.columns:
        means = _mean_over_prompts(summary, x, series, value)
        points_of = _split_by(summary, series)
    figure, axes = style.new_figure(8, 4.0)
    for number, (name, line) in enumerate(_split_by(means, series).items()):
        line = line.sort_values(x)
        colour = LINES[number % len(LINES)]
        line_style = {"lw": 1.8, "marker": "o", "ms": 3.5, "label": _series_label(series, name)}
        axes.plot(line[x], line[value], color=colour, **line_style)
        _draw_spread(axes, line, points_of.get(name), x, value, colour)
    axes.axhline(0, color=MUTED, lw=0.8)
    axes.set_xlabel(WORDS.get(x, x))
    axes.set_ylabel(f"{value.replace('_', ' ')}{_describe_mean(means)}")
    if series is not None:
        style.add_legend(axes)
    return apply_style(figure, title)


def _mean_over_prompts(table: pd.DataFrame, x: str, series: str | None, value: str) -> pd.DataFrame:
    """The means of a sweep's table along `x`, for each value of `series`."""
    from ..sweeps.summary import mean_over_prompts

    means = mean_over_prompts(table, by=list(filter(None, [x, series])))
    if value not in means.columns:
        raise BadHook(
            f"{value!r} is no column of a metric: give over_prompts(table, by=…, "
            f"values=[{value!r}])"
        )
    return means


def _default_series(summary: pd.DataFrame, x: str) -> str | None:
    columns = summary.columns.intersection(SERIES).difference([x])
    counts: Any = summary[columns].nunique(dropna=False)
    return style.first_column(SERIES, counts.index[counts > 1])


def _draw_spread(
    axes: Axes, line: pd.DataFrame, prompts: Any, x: str, value: str, colour: str
) -> None:
    """Draw the intervals of a line as a band; of too few prompts, draw each prompt as a point."""
    count = style.first_column([f"{value}_n", "n"], line.columns)
    if count is not None and bool((line[count] < MIN_FOR_INTERVAL).all()):
        if prompts is not None:
            points_style = {"ls": "", "marker": ".", "ms": 4, "alpha": 0.5}
            axes.plot(prompts[x], prompts[value], color=colour, **points_style)
    elif f"{value}_low" in line.columns:
        low, high = line[f"{value}_low"], line[f"{value}_high"]
        axes.fill_between(line[x], low, high, color=colour, alpha=0.2, lw=0)


def _series_label(series: str | None, name: Any) -> str:
    if series is None:
        return ""
    if series == "control":
        return ("edit", "control")[bool(name)]
    return drawable(str(name))


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
    value = _value_column(table, value)
    table = table.reset_index(drop=True)  # the index of concatenated tables may have duplicates
    parts = _split_by(table, "site")
    width = min(14.0, 3.0 + 5.0 * len(parts))
    figure, panels = style.new_panels(width, 4.4, len(parts), sharey=True)
    for axes, (site, part) in zip(panels, parts.items(), strict=True):
        _draw_random(axes, part, value, by)
        _draw_vectors(axes, part, value, by, labels or {})
        axes.axhline(0, color=MUTED, lw=0.8)
        if log:
            axes.set_xscale("log")
        axes.set_xlabel(UNITS[by])
        if len(parts) > 1:
            axes.set_title(str(site), fontsize=10, color=INK)
    panels[0].set_ylabel(f"{value.replace('_', ' ')}, mean of {table['row'].nunique()} prompts")
    style.add_legend(panels[0])
    return apply_style(figure, title)


def _draw_random(axes: Axes, table: pd.DataFrame, value: str, by: str) -> None:
    """Draw each random vector once, even where it is the control of several vectors."""
    controls = table[table["control"]]
    controls = controls.assign(sign=controls["dose"] > 0)
    label: str | None = "random, of equal length"
    line_style: dict[str, Any] = {"color": MUTED, "lw": 0.8, "alpha": 0.6, "marker": ".", "ms": 3}
    for _, line in controls.groupby(["vector", "sample", "sign"], sort=False):
        means: Any = line.groupby("dose")[[value, by]].mean()
        means = means.loc[sorted(means.index, key=abs)]
        axes.plot(means[by], means[value], label=label, **line_style)
        label = None


def _draw_vectors(
    axes: Axes, table: pd.DataFrame, value: str, by: str, labels: dict[str, str]
) -> None:
    prompts: Any = table[~table["control"]]
    means: Any = mean_over_doses(table)
    vectors: Any = means[~means["control"]].groupby("vector", sort=False)
    for number, (name, doses) in enumerate(vectors):
        colour = VECTOR_COLOURS[number % len(VECTOR_COLOURS)]
        dashes = style.DASHES[number % len(style.DASHES)]
        label = {"label": drawable(labels.get(str(name), str(name)))}
        for is_positive in (True, False):
            line = doses[(doses["dose"] > 0) == is_positive].sort_values("dose", key=abs)
            if line.empty:
                continue
            line_style: dict[str, Any] = {"color": colour, "ls": dashes, **label}
            axes.plot(line[by], line[value], lw=1.8, marker="o", ms=4, **line_style)
            label = {}
            is_line = (prompts["vector"] == name) & ((prompts["dose"] > 0) == is_positive)
            _draw_spread(axes, line, prompts[is_line], by, value, colour)
