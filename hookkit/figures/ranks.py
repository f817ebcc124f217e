"""Figures of the logits and ranks of all tokens at one position, and of how edits change them.

    table = hk.ranks(run, top=None)              # the whole vocabulary
    hk.figures.logit_panels(table, watch=" coffee").savefig("panels.png")

Every figure is about one position of one row. Tokens are in quotes, so that a leading space can be
seen. A character that the font lacks is written as its code.
"""

from collections.abc import Hashable, Iterable
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..arguments import check_arguments
from ..errors import BadHook, EmptySelection
from .style import (
    INK,
    MARK,
    MUTED,
    PAPER,
    POINT,
    annotate_bar,
    apply_style,
    change_colour,
    drawable,
    label_point,
    rank_axis,
    sign_colour,
    spread_apart,
)

LABELLED = 6  # the most likely tokens that get their names
PANELS = (
    ("logit", "logit (raw)", "Raw logits"),
    ("prob", "probability", "Softmax: they sum to 1"),
    ("logprob", "log-probability (nats)", "Log-softmax: logits, shifted by one number"),
)


@check_arguments
def logit_scatter(
    table: pd.DataFrame, *, watch: "Iterable[str | int] | str | int" = (), title: str = ""
) -> Figure:
    """Every token's logit at one position, by token id. Watched tokens are marked, the top named.

    `table` is `ranks(run, top=None)`. Raises `EmptySelection` for a table of several positions, or
    for a watched token that is not in the table.
    """
    _check_one_position(table, "logit")
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    _draw_scatter(axes, table, "logit", _select_watched(table, watch), labelled=LABELLED)
    axes.set_ylabel("logit (raw)")
    return apply_style(figure, title or "Every token's logit")


@check_arguments
def logit_panels(
    table: pd.DataFrame, *, watch: "Iterable[str | int] | str | int" = (), title: str = ""
) -> Figure:
    """The same tokens three times: raw logits, after softmax, after log-softmax.

    `table` is `ranks(run, top=None)`.
    """
    _check_one_position(table, "logit")
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    watched = _select_watched(table, watch)
    for axes, (column, unit, name) in zip(figure.subplots(1, 3), PANELS, strict=True):
        labelled = LABELLED if column == "prob" else 0
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
    figure = Figure(figsize=(7, figure_height), layout="constrained")
    axes = figure.subplots()
    lowest = max(float(shift[columns].to_numpy().max()), 10.0) * 1.25
    # A label needs 0.2 inches of the height inside the frame.
    gap = np.log(lowest / 0.85) * 0.2 / (figure_height - 0.9)
    label_heights = [
        np.exp(spread_apart(np.log(shift[name].to_numpy(float)), gap)) for name in columns
    ]
    rank_axis(axes, max(lowest, float(np.max(label_heights)) * 1.1))
    tokens = shift.to_dict("records")
    for side, heights in enumerate(label_heights):
        for token, height in zip(tokens, heights, strict=True):
            _draw_rank_label(axes, token, side, height)
    for token in tokens:
        ranks = [token[name] for name in columns]
        width = 2.4 if "edited" in token["why"] else 1.3
        axes.plot([0, 1], ranks, color=change_colour(token["shift"]), lw=width, marker="o", ms=4)
    axes.set_xlim(-0.75, 1.75)
    axes.set_xticks([0, 1], names)
    return apply_style(figure, title or "How the ranking moved")


def _draw_rank_label(axes: Axes, token: dict[Hashable, Any], side: int, height: float) -> None:
    """Write a token's name and rank beside its point, with a thin line to the point.

    `side` is 0 for the rank before, at the left, and 1 for the rank after, at the right.
    """
    name, is_edited = drawable(token["token"]), "edited" in token["why"]
    style: dict[str, Any] = {"shrink": (2, 3), "bold": is_edited, "color": INK}
    if side == 0:
        rank = token["rank_before"]
        label_point(axes, f"{rank:,}  {name}", (0, rank), (-0.12, height), align="right", **style)
    else:
        rank = token["rank_after"]
        label_point(axes, f"{name}  {rank:,}", (1, rank), (1.12, height), **style)


@check_arguments
def delta_bars(shift: pd.DataFrame, *, title: str = "") -> Figure:
    """The change of each token's log-probability as bars, risen tokens first.

    `shift` is `rank_shift(before, after)`; the delta is after minus before. The bar of a banned
    token runs off the axis.
    """
    _check_one_position(shift, "logprob_delta")
    ordered = shift.sort_values("logprob_delta", ascending=False)
    deltas = ordered["logprob_delta"].to_numpy(float)
    finite = np.abs(deltas[np.isfinite(deltas)])
    largest = finite.max() if len(finite) else 1.0
    limit = 1.15 * max(1e-3, float(largest))
    lengths = np.clip(deltas, -limit, limit)
    positions = np.arange(len(lengths))
    figure = Figure(figsize=(7, max(2.4, 0.27 * len(ordered) + 1)), layout="constrained")
    axes = figure.subplots()
    axes.barh(positions, lengths, color=list(map(sign_colour, deltas)), height=0.7)
    for position, (delta, length) in enumerate(zip(deltas, lengths, strict=True)):
        if np.isfinite(delta):
            annotate_bar(axes, f"{delta:+.2f}", length, position)
        else:
            annotate_bar(axes, "+∞" if delta > 0 else "−∞", length, position, inside=True)
    names = [drawable(str(token)) for token in ordered["token"]]
    axes.set_yticks(positions, names, fontsize=8.5)
    axes.invert_yaxis()
    axes.axvline(0, color=MUTED, lw=0.8)
    left_margin = 1.12 if (deltas < 0).any() else 0.05
    right_margin = 1.12 if (deltas > 0).any() else 0.05
    axes.set_xlim(-limit * left_margin, limit * right_margin)
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
    heights = -spread_apart(-named[column].to_numpy(float), 0.062 * extent)
    width = table["token_id"].to_numpy(float).max() or 1.0
    watched_ids = set(watched["token_id"])
    for token, height in zip(named.to_dict("records"), heights, strict=True):
        is_watched = token["token_id"] in watched_ids
        _draw_named_token(axes, token, column, (width * 1.04, height), is_watched=is_watched)
    axes.set_xlim(-0.02 * width, width * 1.42)
    axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= width * 1.03])
    axes.set_xlabel("token id")


def _draw_named_token(
    axes: Axes,
    token: dict[Hashable, Any],
    column: str,
    label_position: tuple[float, float],
    *,
    is_watched: bool,
) -> None:
    colour, size = (MARK, 6) if is_watched else (INK, 3.5)
    point = (token["token_id"], token[column])
    text = f"{drawable(token['token'])}  {token['rank']:,}"
    axes.plot(*point, "o", ms=size, color=colour, mec=PAPER, mew=0.7, zorder=3)
    label_point(axes, text, point, label_position, shrink=(2, 4), bold=is_watched, color=colour)


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


def _select_watched(table: pd.DataFrame, watch: "Iterable[str | int] | str | int") -> pd.DataFrame:
    watched_tokens = [watch] if isinstance(watch, str | int) else list(watch)
    parts = []
    for token in watched_tokens:
        if isinstance(token, int):
            rows = table[table["token_id"].to_numpy() == token]
        else:
            rows = table[table["token"].to_numpy() == repr(token)]
        if rows.empty:
            raise EmptySelection(
                f"the watched token {token!r} is not in the table: watch it in the call that made "
                "the table too, or give top=None"
            )
        parts.append(pd.DataFrame(rows))
    return pd.concat(parts) if parts else table.head(0)


def _select_finite(table: pd.DataFrame, column: str) -> pd.DataFrame:
    return pd.DataFrame(table[np.isfinite(table[column].to_numpy(float))])
