"""The style that all figures share: colours, fonts, headings, and text that fits into its room.

The colours of ink and paper are constants, so that a report can replace them by those of the
reader's light or dark theme. No torch, no display, no global state of pyplot.
"""

import io
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from math import ceil
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from matplotlib.legend import Legend
from matplotlib.text import Text
from matplotlib.textpath import text_to_path
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from ..display import quote_token
from ..errors import BadHook, EmptySelection, OutOfRange

INK, MUTED, GRID, PAPER = "#1f2430", "#6b7283", "#dcdfe6", "#ffffff"
# The palette. Its colours differ for readers with any of the three kinds of colour blindness, and
# have a contrast of 3 or more with light and with dark paper.
BLUE, VERMILLION, GREEN, VIOLET, BROWN = "#0a78bf", "#d55e00", "#159a80", "#8a4fe0", "#995533"
POINT, MARK, UP, DOWN = BLUE, VERMILLION, GREEN, VERMILLION
LINES = (BLUE, VERMILLION, GREEN, VIOLET, BROWN)  # colours of lines, in turn
MARKERS = ("o", "s", "^", "D", "v")  # of the points of lines, in turn
# Dash patterns tell lines apart without colour, and where one line hides another.
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
MAX_LINES = len(LINES) * len(DASHES)  # that can be told apart
MAX_BARS = 60  # bars or lines of tokens that one figure shows
DPI = 150
LABEL_HEIGHT = 0.175  # inches from label to label in a column
SHADES = 256  # colours of a colour map
MAX_DRAWN_CELLS = 5000  # more are one picture in an SVG
# Fonts with characters that matplotlib's own font lacks. Those that are installed are used.
FALLBACK_FONTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Noto Sans JP", "Noto Sans KR",
    "Source Han Sans SC", "WenQuanYi Zen Hei", "PingFang SC", "Hiragino Sans", "Microsoft YaHei",
    "Yu Gothic", "Malgun Gothic", "Arial Unicode MS", "Noto Sans Devanagari", "Noto Sans Thai",
    "Noto Sans Bengali", "Noto Sans Tamil", "Nirmala UI", "Noto Emoji", "Segoe UI Symbol",
)  # fmt: skip
# What columns hold, with units.
WORDS = {
    "pos": "position",
    "unit": "neuron",
    "dose": "dose (length of the vector / length of the stream)",
    "logit": "logit",
    "logit_diff": "logit difference",
    "prob": "probability",
    "prob_diff": "difference of probabilities",
    "logprob": "log-probability (nats)",
    "kl": "KL divergence (nats)",
    "js": "JS divergence (nats)",
    "entropy": "entropy (nats)",
    "loss": "loss (nats per token)",
    "rank": "rank (1 is the most likely)",
    "log10_rank": "log10 of the rank (0 is the most likely)",
    "difference": "‖after − before‖ / ‖before‖",
}
SUFFIXES = {
    "_effect": "{} effect (0: no change, 1: as in the target)",
    "_delta": "Δ {}, after minus before",
    "_before": "{} before",
    "_after": "{} after",
}


class NotebookFigure(Figure):
    """A matplotlib Figure that a notebook shows where it is the value of a cell.

    It needs no `%matplotlib inline`, and is not among pyplot's figures, so that it is shown once
    and its memory is freed with it.
    """

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        picture = io.BytesIO()
        self.savefig(picture, format="png")
        width, height = (96 * self.get_size_inches()).round().astype(int).tolist()
        return picture.getvalue(), {"width": width, "height": height}


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of one plot. Its size is in inches."""
    figure = NotebookFigure(figsize=(width, height), dpi=DPI, layout="constrained")
    return figure, figure.subplots()


def new_panels(
    width: float, height: float, count: int, *, rows: int = 1, **layout: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of plots side by side, in this many rows. Its size is in inches."""
    figure = NotebookFigure(figsize=(width, height), dpi=DPI, layout="constrained")
    panels = list(figure.subplots(rows, ceil(count / rows), squeeze=False, **layout).flat)
    for axes in panels[count:]:
        axes.set_axis_off()
    return figure, panels[:count]


def new_sheet(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure whose axes are inches from its top left corner, without a frame."""
    figure = NotebookFigure(figsize=(width, height), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_axis_off()
    return figure, axes


def apply_style(figure: Figure, title: str, prompt: str = "") -> Figure:
    """Returns the figure with hookkit's colours and font sizes, a title, and the prompt below it.

    The figure grows by the height of its title.
    """
    figure.set_facecolor(PAPER)
    for axes in figure.axes:
        axes.set_facecolor(PAPER)
        axes.grid(color=GRID, lw=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(colors=MUTED, labelcolor=INK, labelsize=8.5)
        for side, spine in axes.spines.items():
            spine.set_color(GRID)
            spine.set_visible(side in ("left", "bottom"))
        _fit_axis_labels(figure, axes)
    _write_heading(figure, title, prompt)
    _use_fallback_fonts(figure)
    return figure


def _fit_axis_labels(figure: Figure, axes: Axes) -> None:
    """Set the look of the labels of both axes, and wrap those that are longer than the axes."""
    width, height = figure.get_size_inches()
    spec = axes.get_subplotspec()
    n_rows, n_columns = (1, 1) if spec is None else spec.get_gridspec().get_geometry()
    rooms = (max(1.8, width / n_columns - 2.4), max(1.2, height / n_rows - 1.4))
    for label, room in zip((axes.xaxis.label, axes.yaxis.label), rooms, strict=True):
        lines = wrap_text(label.get_text(), room, 9)
        label.set(text=escape_dollars("\n".join(lines)), color=INK, fontsize=9)


def _write_heading(figure: Figure, title: str, prompt: str) -> None:
    """Write the title, and the prompt below it, above what the figure has."""
    width, height = figure.get_size_inches()
    lines = wrap_text(title, width - 0.2, 11) if title else []
    title_height = 0.2 * len(lines)
    full_height = height + title_height + 0.12 + (0.2 if prompt else 0.0)
    figure.set_size_inches(width, full_height)
    _move_down(figure, height / full_height)
    location: dict[str, Any] = {"x": 0.1 / width, "ha": "left", "va": "top"}
    if lines:
        text = escape_dollars("\n".join(lines))
        heading = figure.suptitle(
            text, y=1 - 0.08 / full_height, fontsize=11, color=INK, **location
        )
        heading.set_in_layout(False)
    if prompt:
        text = short_label(prompt, width - 0.2, 8.5)
        y = 1 - (0.1 + title_height) / full_height
        figure.text(y=y, s=text, fontsize=8.5, color=MUTED, in_layout=False, **location)


def _move_down(figure: Figure, share: float) -> None:
    """Put all axes into the lower part of the figure, this share of its height."""
    if figure.get_layout_engine() is None:
        for axes in figure.axes:
            left, bottom, axes_width, axes_height = axes.get_position().bounds
            axes.set_position((left, bottom * share, axes_width, axes_height * share))
    else:
        figure.get_layout_engine().set(rect=(0, 0, 1, share))  # pyright: ignore


def describe_prompt(table: pd.DataFrame) -> str:
    """The prompt that a table is about, in quotes; "" if the table does not have it.

    Of several prompts it is their number and the first.
    """
    prompts = list(dict.fromkeys(map(str, _texts_of_rows(table, "prompts"))))
    if not prompts:
        return ""
    first = " ".join(prompts[0].split())
    if len(prompts) == 1:
        return f"“{first}”"
    return f"{len(prompts)} prompts, the first: “{first}”"


def tokens_of(table: pd.DataFrame) -> list[str]:
    """The tokens of the prompt that a table is about, [] if the table lacks them.

    Of several prompts of one length it is the tokens that all have at a position, and "…" where
    they differ.
    """
    texts = _texts_of_rows(table, "tokens")
    if len(set(map(len, texts))) != 1:
        return []
    tokens = []
    for tokens_of_prompts in zip(*texts, strict=True):
        is_common = len(set(tokens_of_prompts)) == 1
        tokens.append(token_label(tokens_of_prompts[0]) if is_common else "…")
    return tokens


def _texts_of_rows(table: pd.DataFrame, name: str) -> list[Any]:
    """What the table keeps in its `attrs` about its rows of the batch; [] if it lacks one."""
    texts, rows = table.attrs.get(name, []), []
    if "row" in table.columns:
        rows = sorted(set(table["row"].dropna().tolist()))
    if not set(rows) <= set(range(len(texts))):
        return []
    return [texts[int(row)] for row in rows]


def describe_column(name: str) -> str:
    """What a column holds, with its unit, in words."""
    for suffix, words in SUFFIXES.items():
        if name.endswith(suffix):
            return words.format(describe_column(name.removesuffix(suffix)))
    return WORDS.get(name, name.replace("_", " "))


def column_title(name: str) -> str:
    """What a column holds as the beginning of a title, without its unit."""
    words = describe_column(name).split(" (")[0].split(", ")[0]
    return f"{words[0].upper()}{words[1:]}"


def check_columns(table: pd.DataFrame, columns: Sequence[str], source: str) -> None:
    """Raises `BadHook` if the table has not all columns of the table that `source` returns.

    Raises `EmptySelection` if it has no rows.
    """
    missing = [repr(column) for column in columns if column not in table]
    if missing:
        raise BadHook(
            f"this figure is drawn from {source}, and this table has no column "
            f"{', '.join(missing)}: it has {', '.join(map(str, table.columns))}"
        )
    if table.empty:
        raise EmptySelection(f"the table has no row to draw: this figure is drawn from {source}")


def first_column(names: Iterable[str], columns: pd.Index) -> str | None:
    """The first of these names that is among the columns of a table."""
    return next(filter(columns.__contains__, names), None)


def largest_finite(values: np.ndarray, least: float = 0.0) -> float:
    """The largest of the finite numbers, at least `least`."""
    return float(values[np.isfinite(values)].max(initial=least))


def format_number(value: float, form: str) -> str:
    """A number in this format; −∞, +∞ and NaN have names of their own."""
    if np.isnan(value):
        return "NaN"
    if np.isinf(value):
        return "+∞" if value > 0 else "−∞"
    return format(value, form)


def select_row(table: pd.DataFrame, row: int) -> Any:
    """The part of a table that is about one row of the batch."""
    rows = sorted(set(table["row"].tolist()))
    if row not in rows:
        numbers = ", ".join(map(str, rows)) or "none"
        raise OutOfRange(f"row {row} is not in the table, which has rows {numbers}")
    return table[table["row"] == row]


def line_style(number: int) -> dict[str, Any]:
    """The colour, dashes and marker of a line, by its number. Those of 25 lines differ.

    Neighbours differ in their dashes too, so that both are seen where one hides the other.
    """
    index = number % len(LINES)
    dashes = DASHES[(number + number // len(LINES)) % len(DASHES)]
    return {"color": LINES[index], "marker": MARKERS[index], "ls": dashes, "mew": 0}


def rank_axis(axes: Axes, lowest: float) -> None:
    """Make the y axis a log axis of ranks, from 1 at the top to `lowest` at the bottom."""
    axes.set_yscale("log")
    axes.set_ylim(lowest, 0.85)
    ticks = [1, 2, 5, *(10**power for power in range(1, int(np.log10(lowest)) + 1))]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda rank, _: f"{rank:,.0f}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("rank (log axis; 1 is the most likely)")


def integer_axis(axes: Axes, values: Any) -> None:
    """Put the ticks of the x axis at whole numbers where all values are whole, such as layers."""
    if pd.api.types.is_integer_dtype(values) or "layer" in str(getattr(values, "name", "")):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))


def add_legend(axes: Axes, **settings: Any) -> Legend | None:
    """Add the legend of the lines that have labels, at the right of the axes."""
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return None
    names = [short_label(label, 2.4) for label in labels]
    location: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0)}
    look: dict[str, Any] = {"frameon": False, "fontsize": 8.5, "labelcolor": INK}
    return axes.legend(handles, names, **location, **look, borderaxespad=0, **settings)


def one_colour_map(colour: str) -> ListedColormap:
    """From nothing to a colour, by opacity, so that it can stand on paper of any colour."""
    opacities = np.linspace(0, 1, SHADES) ** 0.8
    return ListedColormap([(*to_rgb(colour), opacity) for opacity in opacities.tolist()])


def two_colour_map() -> ListedColormap:
    """From the colour of falls over nothing to the colour of rises, by opacity."""
    colours = []
    for share in np.linspace(-1, 1, SHADES):
        colours.append((*to_rgb(sign_colour(share)), abs(share) ** 0.8))
    return ListedColormap(colours)


def choose_colours(
    numbers: np.ndarray, limit: float | None = None
) -> tuple[ListedColormap, tuple[float, float]]:
    """The colour map for these numbers, with the numbers at its ends.

    Numbers of which none is negative have one colour, from 0 on; others two colours around 0.
    Negative numbers below a thousandth of the largest count as rounding.
    """
    if limit is None:
        limit = largest_finite(np.abs(numbers)) or 1.0
    lowest = -largest_finite(-numbers)
    if np.isneginf(numbers).any() or lowest < -limit / 1000:
        return two_colour_map(), (-limit, limit)
    return one_colour_map(UP), (0.0, limit)


def draw_cells(
    axes: Axes, numbers: np.ndarray, shades: ListedColormap, low: float, *, high: float, lw: float
) -> None:
    """Draw a grid of numbers as coloured cells with frames; cells without a number are hatched."""
    cells = np.ma.masked_invalid(np.clip(numbers, low, high))
    colours: dict[str, Any] = {"cmap": shades, "vmin": low, "vmax": high, "edgecolors": GRID}
    is_large = cells.size > MAX_DRAWN_CELLS
    axes.pcolormesh(cells, linewidth=lw, rasterized=is_large, **colours)
    missing = np.ma.masked_where(~np.isnan(numbers), np.zeros_like(numbers))
    if missing.count():
        no_fill = ListedColormap([(0, 0, 0, 0)])
        axes.pcolor(missing, cmap=no_fill, edgecolors=MUTED, linewidth=0, hatch="//////")


def add_colour_bar(
    figure: Figure, shades: ListedColormap, limits: tuple[float, float], label: str, **size: Any
) -> None:
    """Add the scale of the colours of cells at the right of a styled figure, without grid lines."""
    panels = list(figure.axes)
    for axes in panels:
        axes.grid(visible=False)
    bar = figure.colorbar(ScalarMappable(Normalize(*limits), shades), ax=panels, **size)
    lines = wrap_text(label, max(1.4, 0.7 * figure.get_figheight() - 0.7), 9, most=6)
    bar.set_label(escape_dollars("\n".join(lines)), fontsize=9, color=INK)
    bar.ax.tick_params(colors=MUTED, labelcolor=INK, labelsize=8)
    bar.outline.set_edgecolor(GRID)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    _use_fallback_fonts(figure)


def change_colour(change: float) -> str:
    """The colour of a rise, of a fall, or of no change. NaN is no change."""
    if change > 0:
        return UP
    return DOWN if change < 0 else MUTED


def sign_colour(value: float) -> str:
    """The colour of a bar or cell by its sign. 0 and NaN have the colour of negative numbers."""
    return UP if value > 0 else DOWN


# ---- labels


@dataclass(frozen=True)
class PointLabel:
    """A text about a point of a plot."""

    text: str
    x: float
    y: float
    colour: str = INK
    bold: bool = False


def label_column(
    axes: Axes,
    labels: Sequence[PointLabel],
    height: float,
    *,
    x: float = 1.04,
    coords: Any = "axes fraction",
    align: Literal["left", "right"] = "left",
) -> None:
    """Write labels in a column, by default at the right of the axes, with lines to their points.

    `height` is the least height of the axes, in inches; the labels are moved apart for it. The
    axes need their limits before. The column is at `x`, in the coordinates `coords`, in which y is
    a share of the axes' height.
    """
    axes.get_ylim()  # which brings the limits up to date
    pixels = axes.transData.transform([(label.x, label.y) for label in labels])
    shares = axes.transAxes.inverted().transform(pixels)[:, 1]
    heights = spread_apart(shares, LABEL_HEIGHT / height)
    line: dict[str, Any] = {"arrowstyle": "-", "color": MUTED, "lw": 0.6, "alpha": 0.75}
    line |= {"shrinkA": 1, "shrinkB": 3, "relpos": (float(align == "right"), 0.5)}
    look: dict[str, Any] = {"fontsize": 8.5, "va": "center", "ha": align, "arrowprops": line}
    for label, y in zip(labels, heights.tolist(), strict=True):
        look |= {"color": label.colour, "fontweight": ("normal", "bold")[label.bold]}
        point = (label.x, label.y)
        axes.annotate(label.text, point, (x, y), textcoords=coords, annotation_clip=False, **look)


def spread_apart(heights: np.ndarray, gap: float) -> np.ndarray:
    """The heights of labels in the same order, moved as little as possible to be `gap` apart.

    They stay between 0 and 1 if there is room for all.
    """
    from scipy.optimize import isotonic_regression

    order = np.argsort(heights, kind="stable")
    offsets = gap * np.arange(len(heights))
    # Labels are `gap` apart where what remains without the offsets does not fall.
    shifted = isotonic_regression(heights[order] - offsets).x
    highest = max(gap / 2, 1 - gap / 2 - offsets[-1])
    spread_heights = np.empty(len(heights))
    spread_heights[order] = np.clip(shifted, gap / 2, highest) + offsets
    return spread_heights


def write_centred(axes: Axes, point: tuple[float, float], text: str, size: float) -> None:
    """Write a text whose centre is at this point."""
    axes.text(*point, text, fontsize=size, color=INK, ha="center", va="center")


def label_stride(count: int, room: float, width: float) -> int:
    """Every how many ticks there is room for a label, of `width` inches, on an axis of `room`."""
    return max(1, ceil(count * width / max(room, width)))


# ---- bars


def draw_bars(
    axes: Axes,
    names: Sequence[str],
    lengths: Sequence[float] | np.ndarray,
    colours: Sequence[str],
    form: str,
    *,
    width: float,
) -> None:
    """Draw horizontal bars from the top down, each with its name and with its number at its end.

    `width` is that of the figure in inches. An infinite bar is hatched, reaches beyond all others
    and ends in an arrow. NaN has no bar.
    """
    values = np.asarray(lengths, dtype=float)
    limit = 1.25 * (largest_finite(np.abs(values)) or 1.0)
    drawn = np.nan_to_num(np.clip(values, -limit, limit))
    positions = np.arange(len(values))
    bars = axes.barh(positions, drawn, color=colours, height=0.7)
    texts = [format_number(value, form) for value in values.tolist()]
    for position, bar in enumerate(bars):
        if np.isinf(values[position]):
            _draw_arrow(axes, bar, drawn[position], position, colours[position])
        _write_end(axes, texts[position], drawn[position], position)
    labels = [shorten(name, 2.4) for name in names]
    axes.set_yticks(positions, list(map(escape_dollars, labels)), fontsize=8.5)
    axes.set_ylim(len(values) - 0.4, -0.6)
    axes.axvline(0, color=MUTED, lw=0.8)
    name_room, text_room = _widest(labels, 8.5), _widest(texts, 8) + 0.15
    _make_room(axes, drawn, text_room / max(1.0, width - name_room - 0.5))


def _draw_arrow(axes: Axes, bar: Any, end: float, position: int, colour: str) -> None:
    """Draw an infinite bar hatched, with an arrow at its end."""
    bar.set(facecolor="none", edgecolor=colour, hatch="////")
    axes.plot(end, position, ">" if end > 0 else "<", color=colour, ms=7)


def _widest(texts: Iterable[str], size: float) -> float:
    """The width of the widest text, in inches."""
    return max(text_width(text, size) for text in texts)


def _make_room(axes: Axes, lengths: np.ndarray, share: float) -> None:
    """Set the limits of the x axis so that each end has this share of the width for its texts."""
    low, high = min(0.0, float(lengths.min())), max(0.0, float(lengths.max()))
    ends = (low < 0) + (high > 0) or 1
    room = (high - low or 1.0) * share / max(0.2, 1 - share * ends)
    axes.set_xlim(low - room * (low < 0), high + room * (high > 0 or low == 0))


def _write_end(axes: Axes, text: str, value: float, position: float) -> None:
    """Write a text beyond the end of a horizontal bar."""
    side, shift = ("left", 5) if value >= 0 else ("right", -5)
    location: dict[str, Any] = {"xytext": (shift, 0), "textcoords": "offset points", "va": "center"}
    axes.annotate(text, (value, position), ha=side, fontsize=8, color=INK, **location)


def draw_signed_bars(
    axes: Axes, names: Sequence[str], values: Sequence[float], *, width: float
) -> None:
    """Draw horizontal bars with their values, from the top down. The last, hollow, is the sum."""
    draw_bars(axes, names, values, [*map(sign_colour, values[:-1]), INK], "+.2f", width=width)
    total = axes.patches[len(values) - 1]
    total.set(facecolor="none", edgecolor=INK, linestyle="--", linewidth=1.2)


# ---- text


def token_label(token: str) -> str:
    """A token in quotes, so that its leading space is seen."""
    return quote_token(str(token))


def drawable(token: str) -> str:
    """A text as matplotlib can draw it."""
    return escape_dollars(escape_missing_glyphs(token))


def short_label(text: str, room: float, size: float = 8.5) -> str:
    """A text as matplotlib can draw it, without its middle if it needs more than `room` inches."""
    return escape_dollars(shorten(text, room, size))


def shorten(text: str, room: float, size: float = 8.5) -> str:
    """A text without its middle if it needs more than `room` inches."""
    word = short = escape_missing_glyphs(text)
    length = len(word) - 1
    if len(word) > 40:  # so that a long text is not measured once for each of its letters
        length = min(length, ceil(1.5 * len(word) * room / text_width(word, size)))
    while text_width(short, size) > room * 1.001 and length > 3:
        short = f"{word[: ceil(length / 2)]}…{word[-(length // 2) :]}"
        length -= 1
    return short


def wrap_text(text: str, room: float, size: float, most: int = 3) -> list[str]:
    """The lines of a text that may be `room` inches wide: at most three, the last one shortened."""
    lines = []
    for paragraph in text.split("\n"):
        words = escape_missing_glyphs(paragraph).split(" ")
        line = words[0]
        for word in words[1:]:
            if text_width(f"{line} {word}", size) > room:
                lines.append(line)
                line = word
            else:
                line = f"{line} {word}"
        lines.append(line)
    if len(lines) > most:
        lines = [*lines[: most - 1], " ".join(lines[most - 1 :])]
    return [shorten(line, room, size) for line in lines]


def fit_text(token: str, room: float, size: float) -> tuple[str, float]:
    """A token and its font size, at most a fifth smaller, for `room` inches; see `short_label`."""
    word = escape_missing_glyphs(token)
    size *= float(np.clip(room / text_width(word, size), 0.8, 1.0))
    return short_label(token, room, size), size


def escape_missing_glyphs(token: str) -> str:
    """A token in which the characters that no font here has are written as their codes."""
    characters = _font_characters()
    letters = []
    for letter in token:
        if ord(letter) not in characters:
            letter = letter.encode("unicode_escape").decode()
        letters.append(letter)
    return "".join(letters)


def _has_font_weight(record: logging.LogRecord) -> bool:
    """False for matplotlib's message that a fallback font lacks a weight, which changes nothing."""
    is_of_weight = str(record.msg).startswith("findfont: Failed to find font weight")
    return not (is_of_weight and any(name in record.getMessage() for name in FALLBACK_FONTS))


logging.getLogger("matplotlib.font_manager").addFilter(_has_font_weight)


@cache
def fallback_fonts() -> tuple[str, ...]:
    """The fonts for characters that matplotlib's own font lacks, as far as they are installed."""
    installed = set(fontManager.get_font_names())
    return tuple(filter(installed.__contains__, FALLBACK_FONTS))


@cache
def _font_characters() -> frozenset[int]:
    characters = set(get_font(findfont(FontProperties())).get_charmap())
    for name in fallback_fonts():
        characters |= set(get_font(findfont(FontProperties(family=name))).get_charmap())
    return frozenset(characters)


def _font_families() -> list[str]:
    return [*rcParams["font.family"], *fallback_fonts()]


def _use_fallback_fonts(figure: Figure) -> None:
    """Let every text take the characters that its font lacks from the other installed fonts."""
    if not fallback_fonts():
        return
    families = _font_families()
    for axes in figure.axes:
        axes.tick_params(labelfontfamily=families)  # pyright: ignore[reportArgumentType]
    for text in figure.findobj(Text):
        text.set_fontfamily(families)  # pyright: ignore[reportAttributeAccessIssue]


def escape_dollars(text: str) -> str:
    """A text that matplotlib draws unchanged: it would read text between dollars as mathematics."""
    return text.replace("$", r"\$")


def text_width(text: str, size: float) -> float:
    """The width of a text in inches, at a font size in points."""
    font = FontProperties(family=_font_families(), size=size)
    width, _, _ = text_to_path.get_text_width_height_descent(escape_dollars(text), font, False)
    return width * 1.04 / 72
