"""Figures: from a table to a matplotlib Figure. No torch, no display, no global state of pyplot.

    table = hk.ranks(run, top=None)              # the whole vocabulary
    hk.logit_panels(table, watch=" coffee").savefig("panels.png")

Every figure is about one position of one row. Tokens are in quotes, so that a leading space is seen; a character that
the font lacks is written as its code. The colours of ink and paper are the constants below, so that a report can follow
the reader's light or dark theme.
"""

import textwrap
from collections.abc import Hashable, Iterable
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from ..arguments import checks_arguments
from ..errors import BadHook, EmptySelection

INK, MUTED, GRID, PAPER = "#1f2430", "#6b7283", "#dcdfe6", "#ffffff"
POINT, MARK, UP, DOWN = "#7d93c9", "#e0522d", "#1f9e89", "#e0522d"
DASHES = (
    "-",
    "--",
    "-.",
    ":",
    (0, (5, 1, 1, 1, 1, 1)),
)  # tell lines apart without colour, and where one hides another
LETTERS = 12.5  # of a title, to an inch
LABELLED = 6  # the most likely tokens that get their names


@checks_arguments
def logit_scatter(
    table: pd.DataFrame, *, watch: "Iterable[str | int] | str | int" = (), title: str = ""
) -> Figure:
    """Every token's logit at one position, by token id, with the watched tokens marked and the top ones named.

    `table` is `ranks(run, top=None)`. Raises `EmptySelection` for a table of several positions, or for a watched token
    that is not in it.
    """
    _one_position(table, "logit")
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    _scatter(axes, table, "logit", _watched(table, watch), names=LABELLED)
    axes.set_ylabel("logit (raw)")
    return finished(figure, title or "Every token's logit")


@checks_arguments
def logit_panels(
    table: pd.DataFrame, *, watch: "Iterable[str | int] | str | int" = (), title: str = ""
) -> Figure:
    """The same tokens three times: raw logits, after softmax, after log-softmax.

    `table` is `ranks(run, top=None)`.
    """
    _one_position(table, "logit")
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    words = (
        ("logit", "logit (raw)", "Raw logits"),
        ("prob", "probability", "Softmax: they sum to 1"),
        ("logprob", "log-probability (nats)", "Log-softmax: logits, shifted by one number"),
    )
    watched = _watched(table, watch)
    for axes, (column, unit, name) in zip(figure.subplots(1, 3), words, strict=True):
        _scatter(axes, table, column, watched, names=LABELLED if column == "prob" else 0)
        axes.set_ylabel(unit)
        axes.set_title(name, fontsize=10, color=INK)
    return finished(figure, title)


@checks_arguments
def rank_bump(
    shift: pd.DataFrame, *, title: str = "", names: tuple[str, str] = ("before", "after")
) -> Figure:
    """Each token's rank before and after as a line, on a log axis with rank 1 at the top.

    `shift` is `rank_shift(before, after)`. Lines that rise are green, lines that fall red, edited tokens bold. Tokens
    without a rank, whose logits are NaN, are left out.
    """
    _one_position(shift, "rank_after")
    columns = ("rank_before", "rank_after")
    shift = shift.dropna(subset=list(columns))
    if shift.empty:
        raise EmptySelection(
            "no token of this table has a rank before and after: the model's logits are NaN there"
        )
    height = max(4.2, 0.26 * len(shift) + 1.2)  # inches
    figure = Figure(figsize=(7, height), layout="constrained")
    axes = figure.subplots()
    tokens = shift.to_dict("records")
    low = max(float(shift[list(columns)].to_numpy().max()), 10.0) * 1.25
    gap = (
        np.log(low / 0.85) * 0.2 / (height - 0.9)
    )  # a label needs 0.2 inches of what the frame leaves
    heights = [np.exp(spread(np.log(shift[column].to_numpy(float)), gap)) for column in columns]
    low = max(low, float(np.max(heights)) * 1.1)
    rank_axis(axes, low)
    for side, column in enumerate(columns):
        for token, height in zip(tokens, heights[side], strict=True):
            _rank_label(axes, token, side, token[column], height)
    for token in tokens:
        colour = UP if token["shift"] > 0 else DOWN if token["shift"] < 0 else MUTED
        width = 2.4 if "edited" in token["why"] else 1.3
        axes.plot(
            [0, 1],
            [token["rank_before"], token["rank_after"]],
            color=colour,
            lw=width,
            marker="o",
            ms=4,
        )
    axes.set_xlim(-0.75, 1.75)
    axes.set_xticks([0, 1], names)
    return finished(figure, title or "How the ranking moved")


def rank_axis(axes: Axes, low: float) -> None:
    """Make the y axis one of ranks: logarithmic, from `low` at the bottom to 1 at the top."""
    axes.set_yscale("log")
    axes.set_ylim(low, 0.85)
    ticks = [1, 2, 5, *(10**power for power in range(1, int(np.log10(low)) + 1))]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda rank, _: f"{rank:,.0f}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("rank (log axis; 1 is the most likely)")


def _rank_label(
    axes: Axes, token: dict[Hashable, Any], side: int, rank: int, height: float
) -> None:
    """A token's name and rank beside its point, moved to where there is room, with a thin line to the point."""
    name = drawable(token["token"])
    axes.annotate(
        f"{name}  {rank:,}" if side else f"{rank:,}  {name}",
        (side, rank),
        xytext=(1.12 if side else -0.12, height),
        ha="left" if side else "right",
        va="center",
        fontsize=8.5,
        color=INK,
        fontweight="bold" if "edited" in token["why"] else "normal",
        arrowprops={
            "arrowstyle": "-",
            "color": GRID,
            "lw": 0.9,
            "shrinkA": 2,
            "shrinkB": 3,
            "relpos": (1 - side, 0.5),
        },
    )


@checks_arguments
def delta_bars(shift: pd.DataFrame, *, title: str = "") -> Figure:
    """The change of each token's log-probability as bars, risen tokens first; a banned token's bar runs off the axis.

    `shift` is `rank_shift(before, after)`; the delta is after minus before.
    """
    _one_position(shift, "logprob_delta")
    ordered = shift.sort_values("logprob_delta", ascending=False)
    deltas = ordered["logprob_delta"].to_numpy(float)
    finite = np.abs(deltas[np.isfinite(deltas)])
    reach = 1.15 * max(1e-3, float(finite.max()) if len(finite) else 1.0)
    drawn = np.clip(deltas, -reach, reach)
    figure = Figure(figsize=(7, max(2.4, 0.27 * len(ordered) + 1)), layout="constrained")
    axes = figure.subplots()
    axes.barh(
        np.arange(len(drawn)),
        drawn,
        color=[UP if delta > 0 else DOWN for delta in deltas],
        height=0.7,
    )
    for place, (delta, length) in enumerate(zip(deltas, drawn, strict=True)):
        endless = not np.isfinite(delta)
        outwards = 1 if length >= 0 else -1
        axes.annotate(
            ("+∞" if delta > 0 else "−∞") if endless else f"{delta:+.2f}",
            (length, place),
            xytext=((-4 if endless else 4) * outwards, 0),
            textcoords="offset points",
            ha="right" if (outwards > 0) == endless else "left",
            va="center",
            fontsize=8,
            color=PAPER if endless else INK,
        )
    axes.set_yticks(
        np.arange(len(drawn)), [drawable(str(token)) for token in ordered["token"]], fontsize=8.5
    )
    axes.invert_yaxis()
    axes.axvline(0, color=MUTED, lw=0.8)
    left, right = (deltas < 0).any(), (deltas > 0).any()
    axes.set_xlim(-reach * (1.12 if left else 0.05), reach * (1.12 if right else 0.05))
    axes.set_xlabel("Δ log-probability (nats, after minus before)")
    return finished(figure, title or "What became more and less likely")


def _scatter(
    axes: Axes, table: pd.DataFrame, column: str, watched: pd.DataFrame, *, names: int
) -> None:
    """Points by token id, the watched ones marked, and the names of them and of the top `names` in the right margin."""
    shown = _finite(table, column)
    axes.scatter(
        shown["token_id"],
        shown[column],
        s=3,
        color=POINT,
        alpha=0.35,
        linewidths=0,
        rasterized=True,
    )
    chosen = pd.concat([table.sort_values("rank").head(names), watched]).drop_duplicates("token_id")
    named = _finite(chosen, column).sort_values(column, ascending=False)
    marked = set(watched["token_id"])
    top, bottom = shown[column].to_numpy(float).max(), shown[column].to_numpy(float).min()
    reach = (top - bottom) or 1.0
    axes.set_ylim(bottom - 0.06 * reach, top + 0.08 * reach)
    heights = -spread(-named[column].to_numpy(float), 0.062 * reach)
    width = table["token_id"].to_numpy(float).max() or 1.0
    for token, height in zip(named.to_dict("records"), heights, strict=True):
        mine = token["token_id"] in marked
        colour = MARK if mine else INK
        axes.plot(
            token["token_id"],
            token[column],
            "o",
            ms=6 if mine else 3.5,
            color=colour,
            mec=PAPER,
            mew=0.7,
            zorder=3,
        )
        axes.annotate(
            f"{drawable(token['token'])}  {token['rank']:,}",
            (token["token_id"], token[column]),
            xytext=(width * 1.04, height),
            va="center",
            fontsize=8.5,
            color=colour,
            fontweight="bold" if mine else "normal",
            arrowprops={
                "arrowstyle": "-",
                "color": GRID,
                "lw": 0.9,
                "shrinkA": 2,
                "shrinkB": 4,
                "relpos": (0, 0.5),
            },
        )
    axes.set_xlim(-0.02 * width, width * 1.42)
    axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= width * 1.03])
    axes.set_xlabel("token id")


def finished(figure: Figure, title: str) -> Figure:
    """The figure in the house's ink, paper and type sizes, with its title."""
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
        lines = textwrap.fill(plain(title), int(LETTERS * figure.get_figwidth()))
        figure.suptitle(lines, fontsize=11, color=INK, x=0.01, ha="left")
    return figure


def _one_position(table: pd.DataFrame, column: str) -> None:
    if column not in table:
        raise BadHook(
            f"this figure needs the column {column!r}, and the table has {', '.join(map(str, table.columns))}"
        )
    places = table[["row", "pos"]].drop_duplicates()
    if len(places) != 1:
        raise EmptySelection(
            f"this figure is about one position, and the table has {len(places)}: choose one, "
            "table[(table.row == 0) & (table.pos == 5)]"
        )


def _watched(table: pd.DataFrame, watch: "Iterable[str | int] | str | int") -> pd.DataFrame:
    asked = [watch] if isinstance(watch, str | int) else list(watch)
    ids, names = table["token_id"].to_numpy(), table["token"].to_numpy()
    found = [
        pd.DataFrame(table[ids == token if isinstance(token, int) else names == repr(token)])
        for token in asked
    ]
    for token, rows in zip(asked, found, strict=True):
        if rows.empty:
            raise EmptySelection(
                f"the watched token {token!r} is not in the table: watch it there too, or give top=None"
            )
    return pd.concat(found) if found else table.head(0)


def _finite(table: pd.DataFrame, column: str) -> pd.DataFrame:
    return pd.DataFrame(table[np.isfinite(table[column].to_numpy(float))])


def spread(heights: np.ndarray, gap: float) -> np.ndarray:
    """Where labels go: at their heights, or as far behind their neighbour as a label needs, in the same order."""
    order = np.argsort(heights, kind="stable")
    places = heights.astype(float)
    for before, after in pairwise(order):
        places[after] = max(places[after], places[before] + gap)
    return places


def drawable(token: str) -> str:
    """A token as matplotlib can draw it."""
    return plain(readable(token))


def readable(token: str) -> str:
    """A token with the characters that the font lacks as their codes."""
    known = _characters()
    return "".join(c if ord(c) in known else c.encode("unicode_escape").decode() for c in token)


def plain(text: str) -> str:
    """A text that matplotlib draws as it stands: what is between dollars it reads as mathematics."""
    return text.replace("$", r"\$")


@cache
def _characters() -> frozenset[int]:
    return frozenset(get_font(findfont(FontProperties())).get_charmap())
