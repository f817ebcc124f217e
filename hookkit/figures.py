"""Figures: from a table to a matplotlib Figure. No torch, no display, no global state of pyplot.

    table = hk.ranks(run, top=None)              # the whole vocabulary
    hk.logit_panels(table, watch=" coffee").savefig("panels.png")

Every figure is about one position of one row. Tokens are in quotes, so that a leading space is seen; a character that
the font lacks is written as its code. The colours of ink and paper are the constants below, so that a report can follow
the reader's light or dark theme.
"""

from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from .errors import BadHook, EmptySelection, checks_keywords

INK, MUTED, GRID, PAPER = "#1f2430", "#6b7283", "#dcdfe6", "#ffffff"
POINT, MARK, UP, DOWN = "#7d93c9", "#e0522d", "#1f9e89", "#e0522d"
LABELLED = 6  # the most likely tokens that get their names


@checks_keywords
def logit_scatter(table: pd.DataFrame, *, watch: "Iterable[str | int] | str | int" = (), title: str = "") -> Figure:
    """Every token's logit at one position, by token id, with the watched tokens marked and the top ones named.

    `table` is `ranks(run, top=None)`. Raises `EmptySelection` for a table of several positions, or for a watched token
    that is not in it.
    """
    _one_position(table, "logit")
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    _scatter(axes, table, "logit", _watched(table, watch), names=True)
    axes.set_ylabel("logit (raw)")
    return _finished(figure, title or "Every token's logit")


@checks_keywords
def logit_panels(table: pd.DataFrame, *, watch: "Iterable[str | int] | str | int" = (), title: str = "") -> Figure:
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
        _scatter(axes, table, column, watched, names=column == "prob")
        axes.set_ylabel(unit)
        axes.set_title(name, fontsize=10, color=INK)
    return _finished(figure, title)


@checks_keywords
def rank_bump(shift: pd.DataFrame, *, title: str = "", names: tuple[str, str] = ("before", "after")) -> Figure:
    """Each token's rank before and after as a line, on a log axis with rank 1 at the top.

    `shift` is `rank_shift(before, after)`. Lines that rise are green, lines that fall red, edited tokens bold.
    """
    _one_position(shift, "rank_after")
    figure = Figure(figsize=(7, max(4.2, 0.26 * len(shift) + 1.2)), layout="constrained")
    axes = figure.subplots()
    worst = max(shift["rank_before"].max(), shift["rank_after"].max(), 2)
    axes.set_yscale("log")
    axes.set_ylim(worst * 1.3, 0.8)
    for side, column in enumerate(("rank_before", "rank_after")):
        heights = _spread(np.log(shift[column].to_numpy(float)), np.log(worst * 1.3 / 0.8) / (len(shift) + 2))
        for (_, row), height in zip(shift.iterrows(), heights, strict=True):
            words = f"{_drawable(row['token'])}  {row[column]}"
            axes.annotate(
                words if side else f"{row[column]}  {_drawable(row['token'])}",
                (side, row[column]),
                xytext=(side + (0.06 if side else -0.06), np.exp(height)),
                ha="left" if side else "right",
                va="center",
                fontsize=8.5,
                color=INK,
                fontweight="bold" if "edited" in row["why"] else "normal",
                arrowprops={"arrowstyle": "-", "color": GRID, "lw": 0.8, "shrinkA": 0, "shrinkB": 2},
            )
    for _, row in shift.iterrows():
        colour = UP if row["shift"] > 0 else DOWN if row["shift"] < 0 else MUTED
        width = 2.4 if "edited" in row["why"] else 1.3
        axes.plot([0, 1], [row["rank_before"], row["rank_after"]], color=colour, lw=width, marker="o", ms=4)
    axes.set_xlim(-0.75, 1.75)
    axes.set_xticks([0, 1], names)
    axes.set_ylabel("rank (log axis; 1 is the most likely)")
    axes.yaxis.set_major_locator(FixedLocator([n for n in (1, 2, 5, *_decades(worst)) if n <= worst * 1.3]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda rank, _: f"{rank:,.0f}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    return _finished(figure, title or "How the ranking moved")


@checks_keywords
def delta_bars(shift: pd.DataFrame, *, title: str = "") -> Figure:
    """The change of each token's log-probability as bars, risen tokens first; a banned token's bar runs off the axis.

    `shift` is `rank_shift(before, after)`; the delta is after minus before.
    """
    _one_position(shift, "logprob_delta")
    ordered = shift.sort_values("logprob_delta", ascending=False)
    deltas = ordered["logprob_delta"].to_numpy(float)
    finite = deltas[np.isfinite(deltas)]
    reach = max(1e-3, np.abs(finite).max() if len(finite) else 1.0) * 1.15
    figure = Figure(figsize=(7, max(2.4, 0.27 * len(ordered) + 1)), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(ordered))
    drawn = np.clip(deltas, -reach, reach)
    axes.barh(places, drawn, color=[UP if delta > 0 else DOWN for delta in deltas], height=0.7)
    for place, delta, length in zip(places, deltas, drawn, strict=True):
        number = f"{delta:+.2f}" if np.isfinite(delta) else ("+∞" if delta > 0 else "−∞")
        inside = not np.isfinite(delta)
        axes.annotate(
            number,
            (length, place),
            xytext=((-4 if inside else 4) * (1 if length >= 0 else -1), 0),
            textcoords="offset points",
            ha="left" if (length >= 0) != inside else "right",
            va="center",
            fontsize=8,
            color=PAPER if inside else INK,
        )
    axes.set_yticks(places, [_drawable(token) for token in ordered["token"]], fontsize=8.5)
    axes.invert_yaxis()
    axes.axvline(0, color=MUTED, lw=0.8)
    axes.set_xlim(
        -reach * 1.12 if (deltas < 0).any() else -reach * 0.05, reach * 1.12 if (deltas > 0).any() else reach * 0.05
    )
    axes.set_xlabel("Δ log-probability (nats, after minus before)")
    return _finished(figure, title or "What became more and less likely")


def _scatter(axes: Axes, table: pd.DataFrame, column: str, watched: pd.DataFrame, *, names: bool) -> None:
    shown = table[np.isfinite(table[column])]
    axes.scatter(shown["token_id"], shown[column], s=3, color=POINT, alpha=0.35, linewidths=0, rasterized=True)
    axes.scatter(watched["token_id"], watched[column], s=42, color=MARK, zorder=3, edgecolors=PAPER, linewidths=0.8)
    named = pd.concat([table.sort_values("rank").head(LABELLED) if names else table.head(0), watched])
    for _, row in named.drop_duplicates("token_id").iterrows():
        if not np.isfinite(row[column]):
            continue
        mine = row["token_id"] in set(watched["token_id"])
        right = row["token_id"] < table["token_id"].max() * 0.8
        axes.annotate(
            f"{_drawable(row['token'])} (rank {row['rank']})" if mine else _drawable(row["token"]),
            (row["token_id"], row[column]),
            xytext=(6 if right else -6, 4 if mine else 0),
            textcoords="offset points",
            ha="left" if right else "right",
            va="bottom" if mine else "center",
            fontsize=8.5,
            color=MARK if mine else INK,
            fontweight="bold" if mine else "normal",
        )
    axes.set_xlabel("token id")
    axes.margins(y=0.12)


def _finished(figure: Figure, title: str) -> Figure:
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
        figure.suptitle(_plain(title), fontsize=11, color=INK, x=0.01, ha="left")
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
    found = [
        table[(table["token_id"] == token) if isinstance(token, int) else (table["token"] == repr(token))]
        for token in asked
    ]
    for token, rows in zip(asked, found, strict=True):
        if rows.empty:
            raise EmptySelection(
                f"the watched token {token!r} is not in the table: watch it there too, or give top=None"
            )
    return pd.concat(found) if found else table.head(0)


def _spread(heights: np.ndarray, gap: float) -> np.ndarray:
    """The same heights, moved apart so that labels of neighbours do not overlap, in the same order."""
    order = np.argsort(heights, kind="stable")
    spread = heights[order].astype(float)
    for _ in range(200):
        close = np.diff(spread) < gap - 1e-9
        if not close.any():
            break
        push = np.where(close, (gap - np.diff(spread)) / 2, 0)
        spread[:-1] -= push
        spread[1:] += push
    result = np.empty_like(spread)
    result[order] = spread
    return result


def _decades(worst: float) -> Sequence[int]:
    return [10**power for power in range(1, int(np.log10(max(worst, 10))) + 1)]


def _drawable(token: str) -> str:
    """A token as the font can draw it: characters that it lacks as their codes."""
    known = _characters()
    return _plain("".join(c if ord(c) in known else c.encode("unicode_escape").decode() for c in token))


def _plain(text: str) -> str:
    return text.replace("$", r"\$")  # matplotlib reads text between dollars as mathematics


@cache
def _characters() -> frozenset[int]:
    return frozenset(get_font(findfont(FontProperties())).get_charmap())
