"""The style that all figures share: colours, fonts, labels, and text that fits into a given width.

The colours of ink and paper are constants, so that a report can replace them by those of the
reader's light or dark theme. No torch, no display, no global state of pyplot.
"""

import textwrap
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import pairwise
from math import ceil
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.legend import Legend
from matplotlib.textpath import text_to_path
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from ..display import quote_token
from ..errors import BadHook, OutOfRange

INK, MUTED, GRID, PAPER = "#1f2430", "#6b7283", "#dcdfe6", "#ffffff"
POINT, MARK, UP, DOWN = "#7d93c9", "#e0522d", "#1f9e89", "#e0522d"
LINES = (UP, MARK, POINT, "#b8862b", "#8a5bb5", MUTED)  # colours of lines, in turn
# Dash patterns tell lines apart without colour, and where one line hides another.
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
TITLE_LETTERS = 12.5  # letters of a title in one inch
SHADES = 256  # colours of a colour map


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of one plot. Its size is in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def new_panels(width: float, height: float, count: int, **layout: Any) -> tuple[Figure, list[Axes]]:
    """A figure of plots side by side. Its size is in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False, **layout)[0])


def apply_style(figure: Figure, title: str) -> Figure:
    """Returns the figure with hookkit's colours and font sizes, and with its title."""
    figure.set_facecolor(PAPER)
    for axes in figure.axes:
        axes.set_facecolor(PAPER)
        axes.grid(color=GRID, lw=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(colors=MUTED, labelcolor=INK, labelsize=8.5)
        for side, spine in axes.spines.items():
            spine.set_color(GRID)
            spine.set_visible(side in ("left", "bottom"))
        for label in (axes.xaxis.label, axes.yaxis.label):
            label.set_color(INK)
            label.set_fontsize(9)
    if title:
        lines = textwrap.fill(escape_dollars(title), int(TITLE_LETTERS * figure.get_figwidth()))
        figure.suptitle(lines, fontsize=11, color=INK, x=0.01, ha="left")
    return figure


def check_columns(table: pd.DataFrame, columns: Sequence[str], source: str) -> None:
    """Raises `BadHook` if the table has not all columns of the table that `source` returns."""
    missing = [repr(column) for column in columns if column not in table]
    if missing:
        raise BadHook(
            f"this figure is drawn from {source}, and this table has no column "
            f"{', '.join(missing)}: it has {', '.join(map(str, table.columns))}"
        )


def first_column(names: Iterable[str], columns: pd.Index) -> str | None:
    """The first of these names that is among the columns of a table."""
    return next(filter(columns.__contains__, names), None)


def largest_finite(values: np.ndarray, least: float = 0.0) -> float:
    """The largest of the finite numbers, at least `least`."""
    return float(values[np.isfinite(values)].max(initial=least))


def format_finite(value: float, form: str, otherwise: str) -> str:
    """A number in this format, or another text if it is infinite or NaN."""
    return format(value, form) if np.isfinite(value) else otherwise


def select_row(table: pd.DataFrame, row: int) -> Any:
    """The part of a table that is about one row of the batch."""
    rows = sorted(set(table["row"].tolist()))
    if row not in rows:
        numbers = ", ".join(map(str, rows)) or "none"
        raise OutOfRange(f"row {row} is not in the table, which has rows {numbers}")
    return table[table["row"] == row]


def rank_axis(axes: Axes, lowest: float) -> None:
    """Make the y axis a log axis of ranks, from 1 at the top to `lowest` at the bottom."""
    axes.set_yscale("log")
    axes.set_ylim(lowest, 0.85)
    ticks = [1, 2, 5, *(10**power for power in range(1, int(np.log10(lowest)) + 1))]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda rank, _: f"{rank:,.0f}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("rank (log axis; 1 is the most likely)")


def add_legend(axes: Axes, **settings: Any) -> Legend:
    """Add the legend of the lines that have labels."""
    return axes.legend(**{"frameon": False, "fontsize": 8.5, "labelcolor": INK, **settings})


def draw_cells(
    axes: Axes, numbers: np.ndarray, shades: ListedColormap, low: float, *, high: float, lw: float
) -> None:
    """Draw a grid of numbers as coloured cells with frames of this width."""
    axes.pcolormesh(numbers, cmap=shades, vmin=low, vmax=high, edgecolors=GRID, linewidth=lw)


def add_colour_bar(
    figure: Figure, shades: ListedColormap, limits: tuple[float, float], label: str, **size: Any
) -> None:
    """Add the scale of the colours of cells at the right of a styled figure, without grid lines."""
    panels = list(figure.axes)
    for axes in panels:
        axes.grid(visible=False)
    bar = figure.colorbar(ScalarMappable(Normalize(*limits), shades), ax=panels, **size)
    bar.set_label(label, fontsize=9, color=INK)
    bar.ax.tick_params(colors=MUTED, labelcolor=INK, labelsize=8)
    bar.outline.set_edgecolor(GRID)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]


def change_colour(change: float) -> str:
    """The colour of a rise, of a fall, or of no change. NaN is no change."""
    if change > 0:
        return UP
    return DOWN if change < 0 else MUTED


def sign_colour(value: float) -> str:
    """The colour of a bar or cell by its sign. 0 and NaN have the colour of negative numbers."""
    return UP if value > 0 else DOWN


def label_point(
    axes: Axes,
    text: str,
    point: tuple[float, float],
    label_position: tuple[float, float],
    *,
    shrink: tuple[float, float],
    align: Literal["left", "right"] = "left",
    bold: bool = False,
    **style: Any,
) -> None:
    """Write a label beside a point, with a thin line from one to the other.

    `shrink` is the gap between the line and the label, and between the line and the point, in
    points. `style` is passed to `Axes.annotate`.
    """
    line: dict[str, Any] = {"arrowstyle": "-", "color": GRID, "lw": 0.9}
    line |= {"shrinkA": shrink[0], "shrinkB": shrink[1]}
    line["relpos"] = (0 if align == "left" else 1, 0.5)
    style = {"fontsize": 8.5, "fontweight": "bold" if bold else "normal", **style}
    axes.annotate(
        text, point, xytext=label_position, ha=align, va="center", arrowprops=line, **style
    )


def write_centred(axes: Axes, point: tuple[float, float], text: str, size: float) -> None:
    """Write a text whose centre is at this point."""
    axes.text(*point, text, fontsize=size, color=INK, ha="center", va="center")


def draw_bars(
    axes: Axes,
    names: Sequence[str],
    lengths: Sequence[float] | np.ndarray,
    colours: Sequence[str],
    texts: Sequence[str],
    *,
    height: float = 0.7,
) -> None:
    """Draw horizontal bars from the top down, each with its name and with a text beyond its end."""
    positions = np.arange(len(lengths))
    axes.barh(positions, lengths, color=colours, height=height)
    for position, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        if text:
            annotate_bar(axes, text, length, position)
    axes.set_yticks(positions, names, fontsize=8.5)
    axes.invert_yaxis()


def draw_signed_bars(axes: Axes, names: Sequence[str], values: Sequence[float]) -> None:
    """Draw horizontal bars with their values, from the top down. The last bar is the sum."""
    texts = [f"{value:+.2f}" for value in values]
    draw_bars(axes, names, values, [*map(sign_colour, values[:-1]), INK], texts)
    axes.axvline(0, color=MUTED, lw=0.8)


def annotate_bar(
    axes: Axes, text: str, value: float, position: float, *, inside: bool = False
) -> None:
    """Write a text beyond the end of a horizontal bar, or `inside` it."""
    side, shift = "right", -4
    if (value >= 0) != inside:
        side, shift = "left", 4
    axes.annotate(
        text,
        (value, position),
        xytext=(shift, 0),
        textcoords="offset points",
        ha=side,
        va="center",
        fontsize=8,
        color=PAPER if inside else INK,
    )


def spread_apart(heights: np.ndarray, gap: float) -> np.ndarray:
    """The heights of labels in the same order, moved up until neighbours are `gap` apart."""
    spread_heights = heights.astype(float)
    for lower, upper in pairwise(np.argsort(heights, kind="stable")):
        spread_heights[upper] = max(spread_heights[upper], spread_heights[lower] + gap)
    return spread_heights


def drawable(token: str) -> str:
    """A token as matplotlib can draw it."""
    return escape_dollars(escape_missing_glyphs(token))


def token_label(token: str) -> str:
    """A token in quotes, so that its leading space is seen, as matplotlib can draw it."""
    return drawable(quote_token(token))


def short_label(text: str, room: float, size: float = 8.5) -> str:
    """A text as matplotlib can draw it, without its middle if it needs more than `room` inches."""
    word = short = escape_missing_glyphs(text)
    length = len(word) - 1
    while text_width(short, size) > room * 1.001 and length > 3:
        short = f"{word[: ceil(length / 2)]}…{word[-(length // 2) :]}"
        length -= 1
    return escape_dollars(short)


def fit_text(token: str, room: float, size: float) -> tuple[str, float]:
    """A token and its font size, at most a fifth smaller, for `room` inches; see `short_label`."""
    word = escape_missing_glyphs(token)
    size *= float(np.clip(room / text_width(word, size), 0.8, 1.0))
    return short_label(token, room, size), size


def escape_missing_glyphs(token: str) -> str:
    """A token in which the characters that the font lacks are written as their codes."""
    characters = _font_characters()
    letters = []
    for letter in token:
        if ord(letter) not in characters:
            letter = letter.encode("unicode_escape").decode()
        letters.append(letter)
    return "".join(letters)


@cache
def _font_characters() -> frozenset[int]:
    return frozenset(get_font(findfont(FontProperties())).get_charmap())


def escape_dollars(text: str) -> str:
    """A text that matplotlib draws unchanged: it would read text between dollars as mathematics."""
    return text.replace("$", r"\$")


def text_width(text: str, size: float) -> float:
    """The width of a text in inches, at a font size in points."""
    width, _, _ = text_to_path.get_text_width_height_descent(
        escape_dollars(text), FontProperties(size=size), False
    )
    return width * 1.04 / 72
