"""Figures of the logits and ranks of all tokens at one position, and of how edits change them.

    table = hk.ranks(run, top=None)              # the whole vocabulary
    hk.figures.logit_panels(table, watch=" coffee").savefig("panels.png")

Every figure is about one position of one row. Tokens are in quotes, so that a leading space can be
seen. A character that the font lacks is written as its code.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..arguments import check_arguments
from ..errors import BadHook, EmptySelection
from ..models.tokens import check_tokens
from . import style
from .style import INK, MARK, MUTED, PAPER, POINT, apply_style, label_point, new_figure, token_label

POINT_STYLES = {False: (INK, 3.5), True: (MARK, 6)}  # colour and size, by whether it is watched
LABELLED = 6  # the most likely tokens that get their names
PANELS = (  # column, label of the axis, title, tokens that get their names
    ("logit", "logit (raw)", "Raw logits", 0),
    ("prob", "probability", "Softmax: they sum to 1", LABELLED),
    ("logprob", "log-probability (nats)", "Log-softmax: logits, shifted by one number", 0),
)


@check_arguments
def logit_scatter(
    table: pd.DataFrame, *, watch: Iterable[str | int] | str | int = (), title: str = ""
) -> Figure:
    """Every token's logit at one position, by token id. Watched tokens are marked, the top named.

    `table` is `ranks(run, top=None)`. Raises `EmptySelection` for a table of several positions, or
    for a watched token that is not in the table.
    """
    _check_one_position(table, "logit")
    figure, axes = new_figure(8, 4.2)
    _draw_scatter(axes, table, "logit", _select_watched(table, watch), labelled=LABELLED)
    axes.set_ylabel("logit (raw)")
    return apply_style(figure, title or "Every token's logit")


@check_arguments
def logit_panels(
    table: pd.DataFrame, *, watch: Iterable[str | int] | str | int = (), title: str = ""
) -> Figure:
    """The same tokens three times: raw logits, after softmax, after log-softmax.

    `table` is `ranks(run, top=None)`.
    """
    _check_one_position(table, "logit")
    figure, panels = style.new_panels(11, 3.8, len(PANELS))
    watched = _select_watched(table, watch)
    for axes, (column, unit, name, labelled) in zip(panels, PANELS, strict=True):
        _draw_scatter(axes, table, column, watched, labelled=labelled)
        axes.set_ylabel(unit)
        axes.set_title(name, fontsize=10, color=INK)
    return apply_style(figure, title)


@check_arguments
def rank_bump(
    shift: pd.DataFrame, *, title: str = "", names: tuple[str, str] = ("before", "after")
) -> Figure:
    """Each token's rank before and after as a line, on a log axis with rank 1 at the top.

    `shift` is `rank_shift(before, after)`. Lines that rise are green, lines that fall red, edited
    tokens bold. Tokens without a rank, whose logits are NaN, are left out.
    """
    _check_one_position(shift, "rank_after")
    columns = ["rank_before", "rank_after"]
    shift = shift.dropna(subset=columns)
    if shift.empty:
        raise EmptySelection(
            "no token of this table has a rank before and after: the model's logits are NaN there"
        )
    figure_height = max(4.2, 0.26 * len(shift) + 1.2)  # inches
    figure, axes = new_figure(7, figure_height)
    lowest = max(float(shift[columns].to_numpy().max()), 10.0) * 1.25
    # A label needs 0.2 inches of the height inside the frame.
    gap = np.log(lowest / 0.85) * 0.2 / (figure_height - 0.9)
    left, right = [_spread_ranks(shift[column], gap) for column in columns]
    style.rank_axis(axes, max(lowest, float(max(*left, *right)) * 1.1))
    tokens = shift.to_dict("records")
    for token, left_height, right_height in zip(tokens, left, right, strict=True):
        name, is_edited = token_label(token["token"]), "edited" in token["why"]
        before, after = token["rank_before"], token["rank_after"]
        text_style: dict[str, Any] = {"shrink": (2, 3), "bold": is_edited, "color": INK}
        position = (-0.12, left_height)
        label_point(axes, f"{before:,}  {name}", (0, before), position, align="right", **text_style)
        position = (1.12, right_height)
        label_point(axes, f"{name}  {after:,}", (1, after), position, **text_style)
        colour, width = style.change_colour(-token["rank_delta"]), (1.3, 2.4)[is_edited]
        axes.plot([0, 1], [before, after], color=colour, lw=width, marker="o", ms=4)
    axes.set_xlim(-0.75, 1.75)
    axes.set_xticks([0, 1], names)
    return apply_style(figure, title or "How the ranking moved")


def _spread_ranks(ranks: Any, gap: float) -> np.ndarray:
    """The heights of the labels of some ranks, apart on a log axis."""
    return np.exp(style.spread_apart(np.log(ranks.to_numpy(float)), gap))


@check_arguments
def delta_bars(shift: pd.DataFrame, *, title: str = "") -> Figure:
    """The change of each token's log-probability as bars, risen tokens first.

    `shift` is `rank_shift(before, after)`; the delta is after minus before. The bar of a banned
    token runs off the axis.
    """
    _check_one_position(shift, "logprob_delta")
    ordered = shift.sort_values("logprob_delta", ascending=False)
    deltas = ordered["logprob_delta"].to_numpy(float)
    is_finite = np.isfinite(deltas)
    largest = 1.0
    if is_finite.any():
        largest = style.largest_finite(np.abs(deltas), 1e-3)
    limit = 1.15 * largest
    lengths = np.clip(deltas, -limit, limit)
    names = list(map(token_label, ordered["token"]))
    texts = [style.format_finite(delta, "+.2f", "") for delta in deltas]
    figure, axes = new_figure(7, max(2.4, 0.27 * len(ordered) + 1))
    style.draw_bars(axes, names, lengths, list(map(style.sign_colour, deltas)), texts)
    for position in np.flatnonzero(~is_finite):
        text = "+∞" if deltas[position] > 0 else "−∞"
        style.annotate_bar(axes, text, lengths[position], float(position), inside=True)
    axes.axvline(0, color=MUTED, lw=0.8)
    left, right = np.where([(deltas < 0).any(), (deltas > 0).any()], 1.12, 0.05)
    axes.set_xlim(-limit * left, limit * right)
    axes.set_xlabel("Δ log-probability (nats, after minus before)")
    return apply_style(figure, title or "What became more and less likely")


def _draw_scatter(
    axes: Axes, table: pd.DataFrame, column: str, watched: pd.DataFrame, *, labelled: int
) -> None:
    """Points by token id, with the watched ones and the top `labelled` ones named at the right."""
    points = _select_finite(table, column)
    point_style = {"s": 3, "color": POINT, "alpha": 0.35, "linewidths": 0, "rasterized": True}
    axes.scatter(points["token_id"], points[column], **point_style)
    top_tokens = table.sort_values("rank").head(labelled)
    candidates = pd.concat([top_tokens, watched]).drop_duplicates("token_id")
    named = _select_finite(candidates, column).sort_values(column, ascending=False)
    values = points[column].to_numpy(float)
    highest, lowest = values.max(), values.min()
    extent = (highest - lowest) or 1.0
    axes.set_ylim(lowest - 0.06 * extent, highest + 0.08 * extent)
    heights = -style.spread_apart(-named[column].to_numpy(float), 0.062 * extent)
    width = table["token_id"].to_numpy(float).max() or 1.0
    watched_ids = set(watched["token_id"])
    for token, label_height in zip(named.to_dict("records"), heights, strict=True):
        is_watched = token["token_id"] in watched_ids
        colour, size = POINT_STYLES[is_watched]
        point = (token["token_id"], token[column])
        axes.plot(*point, "o", ms=size, color=colour, mec=PAPER, mew=0.7, zorder=3)
        text = f"{token_label(token['token'])}  {token['rank']:,}"
        position = (width * 1.04, label_height)
        label_point(axes, text, point, position, shrink=(2, 4), bold=is_watched, color=colour)
    axes.set_xlim(-0.02 * width, width * 1.42)
    ticks = axes.get_xticks()
    axes.set_xticks(ticks[(ticks >= 0) & (ticks <= width * 1.03)])
    axes.set_xlabel("token id")


def _check_one_position(table: pd.DataFrame, column: str) -> None:
    if column not in table:
        columns = ", ".join(map(str, table.columns))
        raise BadHook(f"this figure needs the column {column!r}, and the table has {columns}")
    positions = table[["row", "pos"]].drop_duplicates()
    if len(positions) != 1:
        raise EmptySelection(
            f"this figure is about one position, and the table has {len(positions)}: choose one, "
            "table[(table.row == 0) & (table.pos == 5)]"
        )


def _select_watched(table: pd.DataFrame, watch: Iterable[str | int] | str | int) -> pd.DataFrame:
    parts = [table.head(0)]
    for token in check_tokens(watch, "watch"):
        column, name = ("token_id", token) if isinstance(token, int) else ("token", token)
        rows = table[table[column].to_numpy() == name]
        if rows.empty:
            raise EmptySelection(
                f"the watched token {token!r} is not in the table: watch it in the call that made "
                "the table too, or give top=None"
            )
        parts.append(pd.DataFrame(rows))
    return pd.concat(parts)


def _select_finite(table: pd.DataFrame, column: str) -> pd.DataFrame:
    return pd.DataFrame(table[np.isfinite(table[column].to_numpy(float))])
