"""Figures of a sweep: where an edit matters, and how sure that is. No torch, no display.

    table = hk.patching(lm, clean, corrupted, "resid_pre", hk.logit_diff(" Mary", " John"))
    hk.heat_map(table, labels=tokens)                       # layer x position, the mean over prompts
    hk.interval_lines(table, x="layer")                     # means with their intervals, or each prompt

Cells are green where the value is positive and red where it is negative, the stronger the larger; zero is the paper.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize, to_rgb
from matplotlib.figure import Figure

from ..arguments import checks_arguments
from ..errors import BadHook, EmptySelection, did_you_mean
from ..tables.intervals import DRAWN
from .ranks import DOWN, GRID, INK, MARK, MUTED, POINT, UP, drawable, finished

LINES = (
    UP,
    MARK,
    POINT,
    "#b8862b",
    "#8a5bb5",
    MUTED,
)  # one after the other, for the lines of a figure
SHADES = 256
WORDS = {"layer": "layer", "pos": "position", "head": "head", "unit": "neuron", "scale": "scale"}


@checks_arguments
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
    """A number for every point of a grid, as colour: layer by position, or layer by head; a panel for each site.

    `table` is what `sweep`, `patching` … or `over_prompts` gave; several prompts are averaged, an effect as in
    `over_prompts`: the ratio of the means. `value` is the column that is shown (the first effect, else the first
    delta), `x` and `y` those of the axes. `labels` are texts for x,
    such as the prompt's tokens. Colours reach from -`limit` to `limit` (left out, the largest value); the `named`
    largest values of each panel are written in their cells.
    """
    value = _value(table, value)
    x = x or next(
        (name for name in ("pos", "head", "unit", "scale") if name in table.columns), None
    )
    for name in (x, y):
        if name not in table.columns:
            raise BadHook(
                f"the table has no column {name!r}{did_you_mean(str(name), table.columns)} Say x= and y=."
            )
    assert x is not None
    sites = list(dict.fromkeys(table["site"])) if "site" in table.columns else [None]
    found: list[Any] = [table if site is None else table[table["site"] == site] for site in sites]
    grids = [_grid(each, value, x, y).sort_index() for each in found]
    most = (
        limit
        if limit is not None
        else max(float(np.nanmax(np.abs(grid.to_numpy()))) for grid in grids) or 1.0
    )
    width = min(14.0, 1.6 + sum(max(2.4, 0.34 * grid.shape[1]) for grid in grids))
    figure = Figure(figsize=(width, max(3.0, 0.17 * len(grids[0]) + 1.6)), layout="constrained")
    panels = list(figure.subplots(1, len(grids), squeeze=False)[0])
    for axes, grid, site in zip(panels, grids, sites, strict=True):
        _cells(axes, grid, most, named)
        _ticks(axes, grid, x, y, labels)
        if site is not None:
            axes.set_title(str(site), fontsize=10, color=INK)
    finished(figure, title)
    for axes in panels:
        axes.grid(visible=False)
    _scale(figure, panels, most, f"{value.replace('_', ' ')}{_prompts(found[0])}")
    return figure


def _value(table: pd.DataFrame, value: str | None) -> str:
    if value is None:
        value = next(
            (name for end in ("_effect", "_delta") for name in table.columns if name.endswith(end)),
            None,
        )
    if table.empty:
        raise EmptySelection("the table has no row to draw")
    if value is None or value not in table.columns:
        raise BadHook(
            f"the table has no column {value!r}; it has {', '.join(table.columns)}: say value="
        )
    return value


def _grid(table: Any, value: str, x: str, y: str) -> pd.DataFrame:
    """The mean of a column in each cell; of an effect of several prompts the ratio of the means."""
    axes: dict[str, Any] = {"index": y, "columns": x, "aggfunc": "mean", "sort": False}
    metric = value.removesuffix("_effect")
    parts = [f"{metric}_{end}" for end in ("delta", "before", "target")]
    pairs = (
        "row" in table.columns and value.endswith("_effect") and set(parts) <= set(table.columns)
    )
    if not pairs:
        return table.pivot_table(values=value, **axes)
    moved, before, target = (table[part].astype(float) for part in parts)
    way = target - before
    counts = moved.notna() & way.notna()
    sides = table[counts].assign(_moved=moved[counts], _way=way[counts])
    over, under = (sides.pivot_table(values=name, **axes) for name in ("_moved", "_way"))
    return over / under.where(under != 0)


def _prompts(table: pd.DataFrame) -> str:
    """Over what a table's values are averaged, in words."""
    if "n" in table.columns:
        counts = {"prompts": int(table["n"].to_numpy().max())}
    elif "sample" in table.columns:  # of causal tracing
        counts = {"prompts": len(set(table["prompt"])), "draws of noise": len(set(table["sample"]))}
    else:
        counts = {"prompts": len(set(table["row"])) if "row" in table.columns else 1}
    words = [f"{count} {name}" for name, count in counts.items() if count > 1]
    return f", mean of {' x '.join(words)}" if words else ""


def _colours() -> ListedColormap:
    """From red over nothing to green: a colour with more or less of it, so that it stands on any paper."""
    shades = np.linspace(-1, 1, SHADES)
    return ListedColormap(
        [(*to_rgb(UP if shade > 0 else DOWN), abs(shade) ** 0.8) for shade in shades]
    )


def _cells(axes: Axes, grid: pd.DataFrame, most: float, named: int) -> None:
    numbers = grid.to_numpy(float)
    axes.pcolormesh(
        np.ma.masked_invalid(numbers),
        cmap=_colours(),
        vmin=-most,
        vmax=most,
        edgecolors=GRID,
        linewidth=0.25,
    )
    flat = np.abs(np.nan_to_num(numbers)).ravel()
    for place in np.argsort(-flat, kind="stable")[:named]:
        row, column = divmod(int(place), numbers.shape[1])
        if flat[place] > 0:
            written = f"{numbers[row, column]:.2g}"
            axes.text(
                column + 0.5, row + 0.5, written, ha="center", va="center", fontsize=6.5, color=INK
            )


def _ticks(axes: Axes, grid: pd.DataFrame, x: str, y: str, labels: Any) -> None:
    columns, rows = list(grid.columns), list(grid.index)
    names = _names(columns, labels)
    turned: dict[str, Any] = (
        {} if labels is None else {"rotation": 60, "ha": "right", "rotation_mode": "anchor"}
    )
    axes.set_xticks(np.arange(len(columns)) + 0.5, names, **turned)
    every = max(1, len(rows) // 10)
    axes.set_yticks(np.arange(0, len(rows), every) + 0.5, [str(row) for row in rows[::every]])
    axes.set_xlabel("" if labels is not None and x == "pos" else WORDS.get(x, x))
    axes.set_ylabel(WORDS.get(y, y))


def _names(columns: Sequence[Any], labels: Any) -> list[str]:
    if labels is None:
        return [drawable(str(column)) for column in columns]
    if isinstance(labels, Mapping):
        return [drawable(str(labels.get(column, column))) for column in columns]
    if len(labels) < len(columns):
        raise BadHook(
            f"{len(labels)} labels were given, and the grid has {len(columns)} columns: give one for each"
        )
    return [
        f"{drawable(labels[place])}  {column}"
        for place, column in zip(_places(columns), columns, strict=True)
    ]


def _places(columns: Sequence[Any]) -> list[int]:
    """The label of each column: by its number where columns are positions, else in order."""
    whole = all(isinstance(column, int | np.integer) for column in columns)
    return [int(column) for column in columns] if whole else list(range(len(columns)))


def _scale(figure: Figure, panels: list[Axes], most: float, words: str) -> None:
    bar = figure.colorbar(
        ScalarMappable(Normalize(-most, most), _colours()), ax=panels, fraction=0.05, pad=0.02
    )
    bar.set_label(words, fontsize=9, color=INK)
    bar.ax.tick_params(colors=MUTED, labelcolor=INK, labelsize=8)
    bar.outline.set_edgecolor(GRID)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]


@checks_arguments
def interval_lines(
    summary: pd.DataFrame,
    *,
    x: str = "layer",
    value: str | None = None,
    series: str | None = None,
    title: str = "",
) -> Figure:
    """Means as lines with the band of their intervals, along one dimension of a grid.

    `summary` is `over_prompts(table)`, or the table of a sweep itself. `series` is the column that has a line for each
    of its values (left out: site, control, pos or head, where there is one with several). An interval of fewer than 10
    prompts is not drawn: given the sweep's table, each prompt is a point there, and else the means stand alone.
    """
    value = _value(summary, value)
    if x not in summary.columns:
        raise BadHook(f"the table has no column {x!r}{did_you_mean(x, summary.columns)}")
    others = [
        name for name in ("site", "control", "pos", "head") if name in summary.columns and name != x
    ]
    series = series or next((name for name in others if len(set(summary[name])) > 1), None)
    prompts = None
    if "row" in summary.columns and "n" not in summary.columns:
        from ..sweeps.summary import over_prompts

        prompts = summary
        summary = over_prompts(summary, by=[x] if series is None else [x, series])
        if value not in summary.columns:
            raise BadHook(
                f"{value!r} is no column of a metric: give over_prompts(table, by=…, values=[{value!r}])"
            )
    figure = Figure(figsize=(8, 4.0), layout="constrained")
    axes = figure.subplots()
    groups = [(None, summary)] if series is None else list(summary.groupby(series, sort=False))
    for number, (name, found) in enumerate(groups):
        found = found.sort_values(x)
        colour = LINES[number % len(LINES)]
        axes.plot(
            found[x],
            found[value],
            color=colour,
            lw=1.8,
            marker="o",
            ms=3.5,
            label=_series(series, name),
        )
        band(axes, found, x, value, colour)
        if prompts is not None and few(found, value):
            own = prompts if series is None else prompts[prompts[series] == name]
            axes.plot(own[x], own[value], ls="", marker=".", ms=4, alpha=0.5, color=colour)
    axes.axhline(0, color=MUTED, lw=0.8)
    axes.set_xlabel(WORDS.get(x, x))
    axes.set_ylabel(f"{value.replace('_', ' ')}{_prompts(summary)}")
    if series is not None:
        axes.legend(frameon=False, fontsize=8.5, labelcolor=INK)
    return finished(figure, title)


def few(summary: pd.DataFrame, value: str) -> bool:
    """True where means are over too few prompts for an interval to be drawn."""
    count = f"{value}_n" if f"{value}_n" in summary.columns else "n"
    return count in summary.columns and bool((summary[count] < DRAWN).all())


def band(axes: Axes, summary: pd.DataFrame, x: str, value: str, colour: str) -> None:
    """Draw the band of the intervals of a line, unless they are over too few prompts."""
    if f"{value}_low" in summary.columns and not few(summary, value):
        low, high = summary[f"{value}_low"], summary[f"{value}_high"]
        axes.fill_between(summary[x], low, high, color=colour, alpha=0.2, lw=0)


def _series(series: str | None, name: Any) -> str:
    if series == "control":
        return "control" if name else "edit"
    return drawable(str(name)) if series is not None else ""
