"""Figures of a sweep: where an edit matters, and how certain that is. No torch, no display.

    table = hk.patching(lm, clean, corrupted, "resid_pre", hk.metrics.logit_diff(" Mary", " John"))
    hk.figures.heat_map(table)                          # layer x position, the mean over prompts
    hk.figures.interval_lines(table, x="layer")         # means with intervals, or each prompt
    doses = hk.dose_response(lm, prompts, vectors, metric, neutral=texts)
    hk.figures.dose(doses)                              # the metric against the dose
    hk.figures.damage_curves(doses)                     # the metric against the damage

Cells are green where the value is positive and orange where it is negative, the stronger the
larger. Where no value is negative, the scale of colours begins at 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..arguments import check_arguments
from ..errors import BadHook, EmptySelection, did_you_mean
from ..steering.controls import DAMAGE, mean_over_doses
from ..tables.intervals import MIN_FOR_INTERVAL
from . import style
from .style import INK, MUTED, apply_style, describe_column, short_label

GRID_COLUMNS = ("pos", "head", "unit", "scale")  # for x, the first that a table has
SERIES = ("site", "control", "pos", "head")  # for lines, the first that has several values
UNITS = {
    "damage_kl": "damage: KL on neutral text (nats per token)",
    "damage_loss": "damage: rise of the loss of neutral text (nats per token)",
    "perplexity": "perplexity of neutral text",
}
DOSE_COLUMNS = ("vector", "site", "dose", "control")
CELL_WIDTH, CELL_HEIGHT = 0.4, 0.17  # inches of a cell, where the figure does not become too large
LEAST_SIDE, MAX_WIDTH, MAX_HEIGHT = 2.8, 12.0, 16.0  # inches of a panel, and of all panels
LEAST_FRAMED = 0.12  # inches of a cell that has a frame
NAMED_SHARE = 0.1  # of the largest value: smaller ones are not written in their cells
NAME_SIZE = 6.5  # points of a number in a cell
ROTATED: dict[str, Any] = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"}
SAY_AXES = "Say x= and y=."


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
    are the columns of the axes. `labels` are texts for x, by default the tokens of the prompt where
    x is the position and the table is about one prompt. Colours reach from -`limit` to `limit` (by
    default the largest value), or from 0 where no value is negative. The `named` largest values of
    each panel are written in their cells where there is room. Cells without a value are hatched.
    """
    value = _value_column(table, value)
    x = _check_column(table, x or style.first_column(GRID_COLUMNS, table.columns), SAY_AXES)
    y = _check_column(table, y, SAY_AXES)
    if labels is None and x == "pos":
        labels = style.tokens_of(table) or None
    parts = _split_by(table, style.first_column(["site"], table.columns))
    grids = [_build_grid(part, value, x, y).sort_index() for part in parts.values()]
    numbers = np.concatenate([grid.to_numpy(float).ravel() for grid in grids])
    shades, limits = style.choose_colours(numbers, limit)
    sizes = _panel_sizes(grids)
    widths, heights = zip(*sizes, strict=True)
    ratios: dict[str, Any] = {"gridspec_kw": {"width_ratios": list(widths)}}
    figure, panels = style.new_panels(sum(widths) + 1.6, max(heights) + 1.3, len(grids), **ratios)
    for axes, grid, site, size in zip(panels, grids, parts, sizes, strict=True):
        cell_width = size[0] / grid.shape[1]
        frame = 0.25 if cell_width > LEAST_FRAMED else 0.0
        style.draw_cells(axes, grid.to_numpy(float), shades, limits[0], high=limits[1], lw=frame)
        _name_cells(axes, grid, limits[1], named, cell_width)
        _label_grid(axes, grid, (x, y), labels, size)
        axes.set_title(short_label(str(site or ""), size[0], 10), fontsize=10, color=INK)
    label = f"{describe_column(value)}{_describe_mean(table, parts)}"
    default = f"{style.column_title(value)} by {describe_column(y)} and {describe_column(x)}"
    apply_style(figure, title or default, style.describe_prompt(table))
    if limits[0] < 0:
        label = f"{label}; 0 is the centre"
    style.add_colour_bar(figure, shades, limits, label, fraction=0.05, pad=0.02)
    return figure


def _panel_sizes(grids: Sequence[pd.DataFrame]) -> list[tuple[float, float]]:
    """The width and height of each panel, in inches."""
    sizes = []
    for grid in grids:
        n_rows, n_columns = grid.shape
        width = min(MAX_WIDTH / len(grids), max(LEAST_SIDE, CELL_WIDTH * n_columns))
        sizes.append((width, min(MAX_HEIGHT, max(2.0, CELL_HEIGHT * n_rows))))
    return sizes


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
        return table.pivot_table(values=value, dropna=False, **pivot)
    sides = table.astype({delta: float, before: float, target: float})
    sides["_full_change"] = sides[target] - sides[before]
    sides = sides.dropna(subset=[delta, "_full_change"])
    numerator = sides.pivot_table(values=delta, **pivot)
    denominator = sides.pivot_table(values="_full_change", **pivot)
    return numerator / denominator.where(denominator != 0)


def _describe_mean(table: pd.DataFrame, parts: Mapping[Any, pd.DataFrame]) -> str:
    """What the table's values are averaged over, in words; "" for one prompt."""
    table = next(iter(parts.values()), table)
    counts = {"prompts": 1}
    if "n" in table.columns:
        counts["prompts"] = int(table["n"].to_numpy().max())
    elif "sample" in table.columns:  # a table of causal tracing
        counts = {"prompts": len(set(table["prompt"])), "draws of noise": len(set(table["sample"]))}
    elif "row" in table.columns:
        counts["prompts"] = len(set(table["row"]))
    words = [f"{count} {name}" for name, count in counts.items() if count > 1]
    return f", mean of {' x '.join(words)}" if words else ""


def _name_cells(
    axes: Axes, grid: pd.DataFrame, largest: float, named: int, cell_width: float
) -> None:
    """Write the largest values in their cells, and the infinite ones, where there is room."""
    numbers = grid.to_numpy(float)
    sizes = np.abs(np.nan_to_num(numbers, posinf=np.inf, neginf=-np.inf)).ravel()
    infinite = np.flatnonzero(np.isinf(sizes)).tolist()
    finite = np.where(np.isinf(sizes), 0.0, sizes)
    for index in dict.fromkeys([*infinite, *np.argsort(-finite, kind="stable")[:named].tolist()]):
        row, column = divmod(index, numbers.shape[1])
        text = style.format_number(float(numbers[row, column]), ".2g")
        has_room = style.text_width(text, NAME_SIZE) <= 0.9 * cell_width
        if has_room and sizes[index] > NAMED_SHARE * largest:
            style.write_centred(axes, (column + 0.5, row + 0.5), text, NAME_SIZE)


def _label_grid(
    axes: Axes,
    grid: pd.DataFrame,
    names: tuple[str, str],
    labels: Any,
    size: tuple[float, float],
) -> None:
    """Label rows and columns, all of them where there is room. `names` are those of x and y."""
    columns = list(grid.columns)
    axes.set_xlabel(describe_column(names[0]))
    texts, rotation = list(map(str, columns)), {}
    room = max(style.text_width(text, 8.5) for text in texts) + 0.08
    if labels is not None:
        texts = _column_labels(columns, labels)
        axes.set_xlabel(f"token and {describe_column(names[0])}" if names[0] == "pos" else "")
    is_wide = room > size[0] / len(columns) and not _are_numbers(columns)
    if labels is not None or is_wide:
        rotation = ROTATED
        room = 0.17
    texts = [short_label(text, 1.5) for text in texts]
    stride = style.label_stride(len(columns), size[0], room)
    axes.set_xticks(np.arange(0, len(columns), stride) + 0.5, texts[::stride], **rotation)
    _label_rows(axes, list(grid.index), size[1])
    axes.set_ylabel(describe_column(names[1]))


def _label_rows(axes: Axes, rows: Sequence[Any], height: float) -> None:
    stride = style.label_stride(len(rows), height, 0.15)
    names = [short_label(str(row), 1.5, 7.5) for row in rows[::stride]]
    axes.set_yticks(np.arange(0, len(rows), stride) + 0.5, names)


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float | np.number) for value in values)


def _column_labels(columns: Sequence[Any], labels: Any) -> list[str]:
    """The texts of the x axis. A sequence is indexed by position where the columns are numbers."""
    if isinstance(labels, Mapping):
        return [style.shorten(str(labels.get(column, column)), 1.2) for column in columns]
    if len(labels) < len(columns):
        raise BadHook(
            f"{len(labels)} labels were given, and the grid has {len(columns)} columns: "
            "give one for each"
        )
    indices: Sequence[Any] = range(len(columns))
    if all(isinstance(column, int | np.integer) for column in columns):
        indices = columns
    texts = []
    for index, column in zip(indices, columns, strict=True):
        texts.append(f"{style.shorten(str(labels[index]), 1.2)}  {column}")
    return texts


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
    is drawn as a point, and from `mean_over_prompts` the means stand alone. Of more than 25 lines
    those that reach farthest from 0 have colours and names.
    """
    value = _value_column(summary, value)
    _check_column(summary, x)
    series = series or _default_series(summary, x)
    prompt = style.describe_prompt(summary)
    means = summary
    points_of: dict[Any, pd.DataFrame] = {}
    if "row" in summary.columns and "n" not in summary.columns:
        means = _mean_over_prompts(summary, x, series, value)
        points_of = _split_by(summary, series)
    lines, tokens = _split_by(means, series), style.tokens_of(summary)
    coloured = _reach_farthest(lines, value)
    figure, axes = style.new_figure(8.6, _height_for(len(coloured) + 3))
    for name, line in lines.items():
        line = line.sort_values(x)
        look: dict[str, Any] = {"color": MUTED, "lw": 0.6, "alpha": 0.5}
        if name in coloured:
            look = {"lw": 1.8, "ms": 4, **style.line_style(coloured.index(name))}
            look["label"] = _series_label(series, name, tokens)
        axes.plot(line[x], line[value].replace([np.inf, -np.inf], np.nan), **look)
        if name in coloured:
            _draw_spread(axes, line, points_of.get(name), x, value, look["color"])
        _mark_infinite(axes, line[x], line[value], look["color"])
    if len(coloured) < len(lines):
        axes.plot([], [], color=MUTED, lw=0.6, label=f"the other {len(lines) - len(coloured)}")
    axes.axhline(0, color=MUTED, lw=0.8)
    _label_x(axes, means[x], tokens)
    axes.set_ylabel(describe_column(value))
    _add_series_legend(axes, series)
    words = f"{style.column_title(value)} by {describe_column(x)}{_describe_mean(means, {})}"
    return apply_style(figure, title or words, prompt)


def _height_for(entries: int) -> float:
    """The height in inches of a figure whose legend has so many entries."""
    return max(3.8, 0.18 * entries + 1.2)


def _reach_farthest(lines: Mapping[Any, pd.DataFrame], value: str) -> list[Any]:
    """The names of the lines that have colours: all, or those that reach farthest from 0."""
    if len(lines) <= style.MAX_LINES:
        return list(lines)
    reaches = {}
    for name, line in lines.items():
        reaches[name] = style.largest_finite(np.abs(line[value].to_numpy(float)))
    return sorted(reaches, key=lambda name: -reaches[name])[: style.MAX_LINES]


def _mark_infinite(axes: Axes, places: Any, values: Any, colour: str) -> None:
    """Draw an arrow at the edge of the axes for each infinite value, and explain it."""
    numbers = values.to_numpy(float)
    for sign, height, marker, text in ((-1, 0.02, "v", "−∞"), (1, 0.98, "^", "+∞")):
        is_infinite = numbers == sign * np.inf
        if is_infinite.any():
            look: dict[str, Any] = {"color": colour, "marker": marker, "ls": "", "ms": 8}
            transform = axes.get_xaxis_transform()
            xs = places[is_infinite]
            axes.plot(xs, np.full(len(xs), height), transform=transform, label=text, **look)


def _label_x(axes: Axes, values: Any, tokens: list[str]) -> None:
    """Label the x axis: whole numbers where all values are whole; positions by their tokens."""
    axes.set_xlabel(describe_column(str(values.name)))
    if values.name == "pos" and tokens and pd.api.types.is_integer_dtype(values):
        positions = sorted(set(values))
        positions = positions[:: style.label_stride(len(positions), 5.0, 0.17)]
        texts = []
        for pos in positions:
            texts.append(f"{short_label(tokens[pos], 1.2)}  {pos}")
        axes.set_xticks(positions, texts, **ROTATED)
    elif not pd.api.types.is_numeric_dtype(values):
        names = list(dict.fromkeys(values))
        stride = style.label_stride(len(names), 5.0, 0.17)
        texts = [short_label(str(name), 1.2) for name in names[::stride]]
        axes.set_xticks(range(0, len(names), stride), texts, **ROTATED)
    else:
        style.integer_axis(axes, values)


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
            finite = prompts[np.isfinite(prompts[value].to_numpy(float))]
            axes.plot(finite[x], finite[value], color=colour, **points_style)
    elif f"{value}_low" in line.columns:
        low, high = line[f"{value}_low"], line[f"{value}_high"]
        axes.fill_between(line[x], low, high, color=colour, alpha=0.2, lw=0)


def _add_series_legend(axes: Axes, series: str | None) -> None:
    """Add the legend, with the name of the column that has a line for each value."""
    legend = style.add_legend(axes)
    if legend is not None and series not in (None, "control"):
        legend.set_title(short_label(describe_column(str(series)), 2.0))
        legend.get_title().set(fontsize=8.5, color=INK)
        legend.set_alignment("left")


def _series_label(series: str | None, name: Any, tokens: Sequence[str]) -> str:
    if series is None:
        return ""
    if series == "control":
        return ("edit", "control")[bool(name)]
    if isinstance(name, float) and name.is_integer():
        name = int(name)
    if series == "pos" and isinstance(name, int | np.integer) and name < len(tokens):
        return f"{style.shorten(tokens[int(name)], 1.8)}  {name}"
    return str(name)


@check_arguments
def dose(
    table: pd.DataFrame,
    *,
    value: str | None = None,
    labels: dict[str, str] | None = None,
    title: str = "",
) -> Figure:
    """A metric against the dose of each vector, with the random vectors of equal length in grey.

    `table` is the table of `dose_response`, or its `mean_over_doses`. `value` is the column to draw
    (by default the first delta), `labels` are texts for the vectors. Lines are means over the
    prompts, bands their intervals; below 10 prompts each prompt is a point instead, if the table
    has them. The grey band is the control: the interval over prompts and random vectors. Each site
    has a panel.

    >>> table = hk.dose_response(lm, prompts, vector, metric, doses=[0.1, 0.3])  # doctest: +SKIP
    >>> dose(table).savefig("dose.png")  # doctest: +SKIP
    """
    style.check_columns(table, DOSE_COLUMNS, "dose_response(lm, prompts, vectors, metrics)")
    value = _value_column(table, value)
    prompt = style.describe_prompt(table)
    table = table.reset_index(drop=True)  # the index of concatenated tables may have duplicates
    figure, panels, parts = _site_panels(table)
    means_of_panels = []
    for axes, part in zip(panels, parts.values(), strict=True):
        means: Any = part
        prompts_of: dict[Any, Any] = {}
        if "row" in part.columns:
            means = mean_over_doses(part)
            prompts_of = dict(iter(part.groupby(["vector", "control"])))
        _draw_control_band(axes, means[means["control"]], prompts_of, value)
        vectors: Any = means[~means["control"]].groupby("vector", sort=False)
        for number, (name, line) in enumerate(vectors):
            line = line.sort_values("dose")
            look = style.line_style(number)
            _draw_spread(axes, line, prompts_of.get((name, False)), "dose", value, look["color"])
            label = (labels or {}).get(str(name), str(name))
            heights = line[value].replace([np.inf, -np.inf], np.nan)
            axes.plot(line["dose"], heights, lw=1.8, ms=4, label=label, **look)
            _mark_infinite(axes, line["dose"], line[value], look["color"])
        axes.axhline(0, color=MUTED, lw=0.8)
        axes.axvline(0, color=MUTED, lw=0.8)
        axes.set_xlabel(describe_column("dose"))
        means_of_panels.append(means)
    _limit_control(panels[0], pd.concat(means_of_panels), value)
    _label_sites(panels, parts, value, table)
    default = f"{style.column_title(value)} against the dose"
    return apply_style(figure, title or default, prompt)


def _draw_control_band(axes: Axes, means: Any, prompts_of: Mapping[Any, Any], value: str) -> None:
    """Draw the mean and the interval of the random vectors of each vector, in grey."""
    label: str | None = "random vectors of equal length"
    for name, line in means.groupby("vector", sort=False):
        line = line.sort_values("dose")
        _draw_spread(axes, line, prompts_of.get((name, True)), "dose", value, MUTED)
        axes.plot(line["dose"], line[value], color=MUTED, lw=1.2, ls="--", label=label)
        label = None


def _limit_control(axes: Axes, means: Any, value: str) -> None:
    """Let a control's wide interval, which is that of a few random vectors, leave the axes."""
    if "n" not in means.columns or (means["n"] < MIN_FOR_INTERVAL).any():
        return
    vectors = means[~means["control"].astype(bool)]
    numbers = [means[value].to_numpy(float)]
    for name in (f"{value}_low", f"{value}_high"):
        if name in vectors.columns:
            numbers.append(vectors[name].to_numpy(float))
    reach = np.concatenate([*numbers, [0.0]])
    reach = reach[np.isfinite(reach)]
    room = 0.5 * (reach.max() - reach.min())
    low, high = axes.get_ylim()
    if room > 0:
        axes.set_ylim(max(low, reach.min() - room), min(high, reach.max() + room))


def _site_panels(table: pd.DataFrame) -> tuple[Figure, list[Axes], dict[Any, pd.DataFrame]]:
    """A figure with a panel for each site of a `dose_response`, and the part of each."""
    parts = _split_by(table, "site")
    width = min(16.0, 4.0 + 4.6 * len(parts))
    height = _height_for(len(set(table["vector"])) + 3)
    figure, panels = style.new_panels(width, height, len(parts), sharey=True)
    return figure, panels, parts


def _label_sites(
    panels: Sequence[Axes], parts: Mapping[Any, pd.DataFrame], value: str, table: pd.DataFrame
) -> None:
    """Name the panels by their sites, and label the first y axis; add a legend."""
    for axes, site in zip(panels, parts, strict=True):
        if len(parts) > 1:
            axes.set_title(short_label(str(site), 3, 10), fontsize=10, color=INK)
    counts: Any = table["n"].max() if "n" in table.columns else table["row"].nunique()
    panels[0].set_ylabel(f"{describe_column(value)}, mean of {counts} prompts")
    style.add_legend(panels[-1])


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
    prompts; below 10 prompts each prompt is a point instead. `log` draws the damage on a log axis,
    with a linear part around 0 if there is damage of 0 or less. Each site has a panel.
    """
    if by not in DAMAGE or by not in table.columns:
        raise BadHook(
            f"the table has no damage {by!r}{did_you_mean(by, DAMAGE)} Give dose_response neutral=."
        )
    value = _value_column(table, value)
    prompt = style.describe_prompt(table)
    table = table.reset_index(drop=True)  # the index of concatenated tables may have duplicates
    figure, panels, parts = _site_panels(table)
    for axes, part in zip(panels, parts.values(), strict=True):
        _draw_random(axes, part, value, by)
        _draw_vectors(axes, part, value, by, labels or {})
        axes.axhline(0, color=MUTED, lw=0.8)
        if log:
            _log_damage_axis(axes, part[by].to_numpy(float))
        axes.set_xlabel(UNITS[by])
    _label_sites(panels, parts, value, table)
    default = f"{style.column_title(value)} against the damage that it costs"
    return apply_style(figure, title or default, prompt)


def _log_damage_axis(axes: Axes, damages: np.ndarray) -> None:
    if (damages > 0).all():
        axes.set_xscale("log")
    else:
        positive = damages[damages > 0]
        axes.set_xscale("symlog", linthresh=float(positive.min(initial=1.0)))


def _draw_random(axes: Axes, table: pd.DataFrame, value: str, by: str) -> None:
    """Draw each random vector once, even where it is the control of several vectors."""
    controls = table[table["control"]]
    controls = controls.assign(sign=controls["dose"] > 0)
    label: str | None = "random vectors of equal length"
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
        look = style.line_style(number)
        label: dict[str, Any] = {"label": labels.get(str(name), str(name))}
        for is_positive in (True, False):
            line = doses[(doses["dose"] > 0) == is_positive].sort_values("dose", key=abs)
            if line.empty:
                continue
            axes.plot(line[by], line[value], lw=1.8, ms=4, **look, **label)
            label = {}
            is_line = (prompts["vector"] == name) & ((prompts["dose"] > 0) == is_positive)
            _draw_spread(axes, line, prompts[is_line], by, value, look["color"])
