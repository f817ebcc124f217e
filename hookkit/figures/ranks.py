"""Figures of the logits and ranks of all tokens at one position, and of how edits change them.

    table = hk.ranks(run, top=None)              # the whole vocabulary
    hk.figures.logit_panels(table, watch=" coffee").savefig("panels.png")

Every figure is about one position of one row. Tokens are in quotes, so that a leading space can be
seen. A character that no installed font has is written as its code.
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
from ..models.words import WordLike, tokens_in_table
from . import style
from .style import INK, MARK, MUTED, PAPER, POINT, PointLabel, apply_style, new_figure, short_label

POINT_STYLES = {False: (INK, 3.5), True: (MARK, 6)}  # colour and size, by whether it is watched
LABELLED = 6  # the most likely tokens that get their names
PANELS = (  # column, label of the axis, title, tokens that get their names
    ("logit", "logit (raw)", "Raw logits", 0),
    ("prob", "probability", "Softmax: they sum to 1", LABELLED),
    ("logprob", "log-probability (nats)", "Log-softmax: logits minus a constant", 0),
)


@check_arguments
def logit_scatter(
    table: pd.DataFrame, *, watch: Iterable[WordLike] | WordLike = (), title: str = ""
) -> Figure:
    """Every token's logit at one position, by token id. Watched tokens are marked.

    `table` is `ranks(run, top=None)`. A token whose logit is -inf stands on a separate line at the
    bottom. Raises `EmptySelection` for a table of several positions, or for a watched token that
    is not in the table.
    """
    _check_one_position(table, "logit")
    watched = _select_watched(table, watch)
    height = max(4.2, 0.2 * (LABELLED + len(watched)) + 1)
    figure, axes = new_figure(8, height)
    _draw_scatter(axes, table, "logit", watched, labelled=LABELLED, height=height - 1)
    axes.set_ylabel("logit (raw)")
    return apply_style(figure, title or "Every token's logit", style.describe_prompt(table))


@check_arguments
def logit_panels(
    table: pd.DataFrame, *, watch: Iterable[WordLike] | WordLike = (), title: str = ""
) -> Figure:
    """The same tokens three times: raw logits, after softmax, after log-softmax.

    `table` is `ranks(run, top=None)`.
    """
    _check_one_position(table, "logit")
    watched = _select_watched(table, watch)
    height = max(3.6, 0.2 * (LABELLED + len(watched)) + 1.2)
    figure, panels = style.new_panels(13, height, len(PANELS))
    for axes, (column, unit, name, labelled) in zip(panels, PANELS, strict=True):
        _draw_scatter(axes, table, column, watched, labelled=labelled, height=height - 1.2)
        axes.set_ylabel(unit)
        axes.set_title(name, fontsize=10, color=INK, loc="left")
    default = "Every token's logit, probability and log-probability"
    return apply_style(figure, title or default, style.describe_prompt(table))


@check_arguments
def rank_bump(
    shift: pd.DataFrame, *, title: str = "", names: tuple[str, str] = ("before", "after")
) -> Figure:
    """Each token's rank before and after as a line, on a log axis with rank 1 at the top.

    `shift` is `rank_shift(before, after)`. Lines that rise are green, lines that fall orange,
    edited tokens bold. Tokens without a rank, whose logits are NaN, are left out. Of more than 60
    tokens those whose ranks changed by the largest factor are drawn.
    """
    _check_one_position(shift, "rank_after")
    prompt, columns = style.describe_prompt(shift), ["rank_before", "rank_after"]
    shift = shift.dropna(subset=columns)
    if shift.empty:
        raise EmptySelection(
            "no token of this table has a rank before and after: the model's logits are NaN there"
        )
    title = title or "How the ranking moved"
    if len(shift) > style.MAX_BARS:
        title = f"{title}: the {style.MAX_BARS} of {len(shift):,} tokens that moved most"
        ratios = np.log(shift["rank_after"].to_numpy(float) / shift["rank_before"].to_numpy(float))
        shift = shift.iloc[np.sort(np.argsort(-np.abs(ratios), kind="stable")[: style.MAX_BARS])]
    height = max(4.2, 0.22 * len(shift) + 1)  # inches
    figure, axes = new_figure(8, height)
    lowest = max(float(shift[columns].to_numpy().max()), 10.0) * 1.25
    style.rank_axis(axes, lowest)
    _draw_bumps(axes, shift, height - 0.7)
    axes.set_xticks([0, 1], [short_label(name, 2) for name in names])
    return apply_style(figure, title, prompt)


def _draw_bumps(axes: Axes, shift: pd.DataFrame, height: float) -> None:
    """Draw the lines of `rank_bump`, with labels at both ends. `height` is that of the axes."""
    left, right = [], []
    for token in shift.to_dict("records"):
        name = short_label(style.token_label(token["token"]), 1.7)
        before, after, bold = token["rank_before"], token["rank_after"], "edited" in token["why"]
        left.append(PointLabel(f"{before:,}  {name}", 0, before, bold=bold))
        right.append(PointLabel(f"{name}  {after:,}", 1, after, bold=bold))
        colour = style.change_colour(-token["rank_delta"])
        axes.plot([0, 1], [before, after], color=colour, lw=(1.3, 2.4)[bold], marker="o", ms=4)
    left_room, right_room = map(_room_of_labels, (left, right))
    inch = 1 / max(1.5, 7.0 - left_room - right_room)  # on the x axis
    axes.set_xlim(-left_room * inch, 1 + right_room * inch)
    location: dict[str, Any] = {"coords": axes.get_xaxis_transform()}
    style.label_column(axes, left, height, x=-0.2 * inch, align="right", **location)
    style.label_column(axes, right, height, x=1 + 0.2 * inch, **location)


def _room_of_labels(labels: list[PointLabel]) -> float:
    """The width in inches that labels need, with the lines to their points."""
    return max(style.text_width(label.text, 9.2) for label in labels) + 0.3


@check_arguments
def delta_bars(shift: pd.DataFrame, *, title: str = "") -> Figure:
    """The change of each token's log-probability as bars, risen tokens first.

    `shift` is `rank_shift(before, after)`; the delta is after minus before. The bar of a banned
    token is hatched, ends in an arrow and is labelled −∞. Of more than 60 tokens those with the
    largest changes are drawn.
    """
    _check_one_position(shift, "logprob_delta")
    ordered = shift.sort_values("logprob_delta", ascending=False)
    title = title or "What became more and less likely"
    if len(ordered) > style.MAX_BARS:
        title = f"{title}: the {style.MAX_BARS} largest changes of {len(ordered):,} tokens"
        sizes = ordered["logprob_delta"].abs().to_numpy(float)
        order = np.argsort(-np.nan_to_num(sizes, nan=-1.0), kind="stable")
        ordered = ordered.iloc[np.sort(order[: style.MAX_BARS])]
    deltas = ordered["logprob_delta"].to_numpy(float)
    names = list(map(style.token_label, ordered["token"]))
    figure, axes = new_figure(7, max(1.6, 0.24 * len(ordered) + 0.7))
    style.draw_bars(axes, names, deltas, list(map(style.sign_colour, deltas)), "+.2f", width=7)
    axes.set_xlabel("Δ log-probability (nats), after minus before")
    return apply_style(figure, title, style.describe_prompt(shift))


def _draw_named(axes: Axes, token: dict[str, Any], column: str, is_watched: bool) -> PointLabel:
    """Draw the point of a token that has a label. Returns the label."""
    colour, size = POINT_STYLES[is_watched]
    point = (token["token_id"], token["_height"])
    axes.plot(*point, "o", ms=size, color=colour, mec=PAPER, mew=0.7, zorder=3)
    text = f"{short_label(style.token_label(token['token']), 1.5)}  {token['rank']:,}"
    if np.isinf(token[column]):
        text = f"{text} ({style.format_number(token[column], '')})"
    return PointLabel(text, *point, colour, is_watched)


def _draw_scatter(
    axes: Axes,
    table: pd.DataFrame,
    column: str,
    watched: pd.DataFrame,
    *,
    labelled: int,
    height: float,
) -> None:
    """Draw a point for each token, and name the watched and the `labelled` likeliest ones."""
    values = table[column].to_numpy(float)
    finite = values[np.isfinite(values)]
    highest, lowest = finite.max(initial=-np.inf), finite.min(initial=np.inf)
    if not len(finite):
        highest, lowest = 1.0, 0.0
    extent = (highest - lowest) or 1.0
    floor = lowest - 0.1 * extent  # where tokens stand that have no finite value
    bottom = lowest - 0.05 * extent
    n_banned = int(np.isneginf(values).sum())
    if n_banned:
        bottom = floor - 0.06 * extent
        axes.axhline(floor, color=MUTED, lw=0.9, ls="--")
        note = f"−∞: {n_banned:,} of {len(values):,} tokens"
        axes.annotate(
            note, (0.01, floor), xycoords=axes.get_yaxis_transform(), xytext=(0, 3),
            textcoords="offset points", fontsize=8, color=MUTED,
        )  # fmt: skip
    axes.set_ylim(bottom, highest + 0.06 * extent)
    heights = np.clip(values, floor, highest + 0.04 * extent)  # NaN stays NaN
    points = table.assign(_height=heights)
    point_style = {"s": 3, "color": POINT, "alpha": 0.35, "linewidths": 0, "rasterized": True}
    axes.scatter(points["token_id"], heights, **point_style)
    top_ids = table.sort_values("rank")["token_id"].head(labelled).tolist()
    watched_ids = set(watched["token_id"])
    named: Any = points[points["token_id"].isin([*top_ids, *watched_ids])]
    named = named.dropna(subset=["_height"])
    width = table["token_id"].to_numpy(float).max() or 1.0
    axes.set_xlim(-0.02 * width, 1.02 * width)
    labels = []
    for token in named.sort_values("rank").to_dict("records"):
        labels.append(_draw_named(axes, token, column, token["token_id"] in watched_ids))
    if labels:
        style.label_column(axes, labels, height)
    axes.set_xlabel("token id")


def _check_one_position(table: pd.DataFrame, column: str) -> None:
    if column not in table:
        columns = ", ".join(map(str, table.columns)) or "no columns"
        raise BadHook(f"this figure needs the column {column!r}, and the table has {columns}")
    positions = table[["row", "pos"]].drop_duplicates()
    if len(positions) != 1:
        raise EmptySelection(
            f"this figure is about one position, and the table has {len(positions)}: choose one, "
            "table[(table.row == 0) & (table.pos == 5)]"
        )


def _select_watched(table: pd.DataFrame, watch: Iterable[WordLike] | WordLike) -> pd.DataFrame:
    parts = [table.head(0)]
    for token in tokens_in_table(watch, "watch", table["token"]):
        column, name = ("token_id", token) if isinstance(token, int) else ("token", token)
        rows = table[table[column].to_numpy() == name]
        if rows.empty:
            raise EmptySelection(
                f"the watched token {token!r} is not in the table: watch it in the call that made "
                "the table too, or give top=None"
            )
        parts.append(pd.DataFrame(rows))
    return pd.concat(parts)
