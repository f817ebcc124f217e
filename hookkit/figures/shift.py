"""Figures of a report: rank against rank, rank through the layers, what made the change, and the means. No torch.

Each has a panel for each edit, two beside one another; of many edits the first are drawn.
"""

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from ..tables.intervals import DRAWN
from .decoding import cut
from .ranks import (
    DOWN,
    GRID,
    INK,
    MARK,
    MUTED,
    POINT,
    UP,
    finished,
    plain,
    rank_axis,
    readable,
    spread,
)

PANELS = 4  # edits that are drawn
LINES = (MARK, UP, "#8a5bb5", "#b8862b", POINT, MUTED)
CELLS = 56  # of the map of all tokens, along each side
NAMED = 9  # tokens that get their names


def _panels(names: Sequence[str], height: float, left: float = 0.8) -> tuple[Figure, list[Axes]]:
    """A figure with a panel for each name, which is its title. Inches; `left` is what labels take.

    The margins are set by hand: a layout engine draws everything once more each time a figure is saved.
    """
    columns = min(2, len(names))
    rows = ceil(len(names) / columns)
    width, above, below, right = (7.0 if columns == 1 else 11.0), 0.72, 0.6, 0.2
    full = height * rows + 0.4
    across = width / columns - left - right
    upwards = (full - above - below - (rows - 1) * (below + 0.36)) / rows
    figure = Figure(figsize=(width, full))
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    figure.subplots_adjust(
        left=left / width, right=1 - right / width, top=1 - above / full, bottom=below / full,
        wspace=(left + right) / across, hspace=(below + 0.36) / upwards,
    )  # fmt: skip
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    for axes, name in zip(panels, names, strict=False):
        axes.set_title(cut(plain(readable(name)), 4.4, 9.5), fontsize=9.5, color=INK, loc="left")
    return figure, panels[: len(names)]


def rank_against_rank(
    parts: Mapping[str, tuple[pd.DataFrame, np.ndarray, np.ndarray]], *, title: str = ""
) -> Figure:
    """Every token's rank before (across) and after (upwards), on log axes, with the tokens of the table named.

    `parts` has for each edit its rows of the shift table, and all tokens' ranks before and after.
    """
    figure, panels = _panels(list(parts), 4.3)
    for axes, (table, before, after) in zip(panels, parts.values(), strict=True):
        low = 1.3 * max(10.0, float(before.max()), float(after.max()))
        _map_of(axes, before, after, low)
        axes.plot([1, low], [1, low], color=MUTED, lw=0.9, ls="--")
        axes.set_xscale("log")
        axes.set_xlim(0.8, low * 60)  # room for the names
        rank_axis(axes, low)
        axes.set_xticks(axes.get_yticks(), [f"{rank:,.0f}" for rank in axes.get_yticks()])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("rank before (log axis)")
        axes.set_ylabel("rank after (log axis; 1 is the most likely)")
        _name(axes, table, low)
    return finished(figure, title)


def _map_of(axes: Axes, before: np.ndarray, after: np.ndarray, low: float) -> None:
    """How many tokens are where, as shades: the darker the more, on a log scale."""
    edges = np.geomspace(0.8, low, CELLS + 1)
    counts = np.histogram2d(after, before, bins=[edges, edges])[0]
    shades = np.zeros((CELLS, CELLS, 4))
    shades[..., :3] = to_rgb(POINT)
    shades[..., 3] = np.where(
        counts > 0, 0.12 + 0.68 * np.log1p(counts) / np.log1p(counts.max()), 0.0
    )
    axes.pcolormesh(edges, edges, shades, rasterized=True, linewidth=0)


def _name(axes: Axes, table: pd.DataFrame, low: float) -> None:
    """The watched and edited tokens, those that lead, and the largest movers, by name in the right margin."""
    order = table.assign(
        _first=~table["why"].str.contains("watched|edited"),
        _second=table[["rank_before", "rank_after"]].min(axis=1) > 1,
        _third=-table["decades"].abs(),
    ).sort_values(["_first", "_second", "_third"], kind="stable")
    chosen = order.head(NAMED).sort_values("rank_after", kind="stable")
    heights = np.log10(chosen["rank_after"].to_numpy(float))
    gap = 0.056 * np.log10(low / 0.85)
    places = spread(heights, gap)
    places = np.minimum(places, np.log10(low) - gap * (0.5 + np.arange(len(places))[::-1]))
    for token, height in zip(chosen.to_dict("records"), places, strict=True):
        colour = UP if token["shift"] > 0 else DOWN if token["shift"] < 0 else MUTED
        there = (float(token["rank_before"]), float(token["rank_after"]))
        axes.plot(*there, "o", ms=5.5, color=colour, mec=GRID, mew=0.6, zorder=3)
        axes.annotate(
            f"{plain(cut(readable(token['token']), 0.9, 8.5))}  {token['rank_before']:,} → {token['rank_after']:,}",
            there,
            xytext=(low * 1.15, 10.0**height),
            va="center",
            fontsize=8,
            color=INK,
            fontweight="bold"
            if "watched" in token["why"] or "edited" in token["why"]
            else "normal",
            arrowprops={
                "arrowstyle": "-",
                "color": GRID,
                "lw": 0.9,
                "shrinkA": 1,
                "shrinkB": 4,
                "relpos": (0, 0.5),
            },
        )


def through_layers(layers: pd.DataFrame, edits: Sequence[str], *, title: str = "") -> Figure:
    """Each token's rank by what each layer would say, before (dashed) and after; edited blocks are shaded."""
    figure, panels = _panels(edits, 3.6)
    for axes, edit in zip(panels, edits, strict=True):
        mine: Any = layers[layers["edit"] == edit]
        low = 1.4 * float(mine[["rank_before", "rank_after"]].to_numpy(float).max())
        last = int(mine["layer"].max())
        for layer in sorted(set(mine[mine["edited"]]["layer"])):
            axes.axvspan(layer - 0.5, layer + 0.5, color=(*to_rgb(POINT), 0.22), lw=0)
        ends = []
        for number, (_, line) in enumerate(mine.groupby("token_id", sort=False)):
            colour = LINES[number % len(LINES)]
            axes.plot(line["layer"], line["rank_before"], color=colour, lw=1.2, ls="--", alpha=0.75)
            axes.plot(line["layer"], line["rank_after"], color=colour, lw=1.9)
            ends.append((line["token"].iloc[0], float(line["rank_after"].iloc[-1]), colour))
        rank_axis(axes, max(low, 10.0))
        axes.set_xlim(-0.6, last * 1.32 + 1)
        axes.set_xticks(range(0, last + 1, max(1, ceil(last / 8))))
        axes.set_xlabel("layer (the stream behind it)")
        _ends(axes, ends, last, max(low, 10.0))
    return finished(figure, title)


def _ends(axes: Axes, ends: Sequence[tuple[str, float, str]], last: int, low: float) -> None:
    """The names of lines at their ends, with the rank after."""
    order = sorted(ends, key=lambda end: end[1])
    gap = 0.065 * np.log10(low / 0.85)
    heights = spread(np.log10([rank for _, rank, _ in order]), gap)
    heights = np.minimum(heights, np.log10(low) - gap * (0.5 + np.arange(len(heights))[::-1]))
    for (token, rank, colour), height in zip(order, heights, strict=True):
        axes.annotate(
            f"{plain(cut(readable(token), 1.0, 8.5))}  {rank:,.0f}",
            (last, rank),
            xytext=(last * 1.03 + 0.4, 10.0**height),
            va="center",
            fontsize=8.5,
            color=colour,
            arrowprops={
                "arrowstyle": "-",
                "color": GRID,
                "lw": 0.9,
                "shrinkA": 1,
                "shrinkB": 1,
                "relpos": (0, 0.5),
            },
        )


def what_made_it(parts: Mapping[str, pd.DataFrame], *, title: str = "") -> Figure:
    """The components whose share of the logit changed most, as bars; all of them together are the logit's change.

    `parts` has `most_moved` of each edit.
    """
    figure, panels = _panels(list(parts), 0.24 * max(map(len, parts.values())) + 1.1, left=1.5)
    for axes, table in zip(panels, parts.values(), strict=True):
        values = table["logit_delta"].to_numpy(float)
        colours = [*[UP if value > 0 else DOWN for value in values[:-1]], INK]
        axes.barh(np.arange(len(values)), values, color=colours, height=0.7)
        reach = float(np.abs(values).max()) or 1.0
        for place, value in enumerate(values):
            axes.annotate(
                f"{value:+.2f}", (value, place), xytext=(4 if value >= 0 else -4, 0), textcoords="offset points",
                ha="left" if value >= 0 else "right", va="center", fontsize=8, color=INK,
            )  # fmt: skip
        axes.set_yticks(np.arange(len(values)), table["component"].tolist(), fontsize=8.5)
        axes.invert_yaxis()
        axes.axvline(0, color=MUTED, lw=0.8)
        axes.set_xlim(-reach * 1.28, reach * 1.28)
        axes.set_xlabel("change of the logit, after minus before")
    return finished(figure, title)


def means_of(summary: pd.DataFrame, watched: pd.DataFrame, *, title: str = "") -> Figure:
    """The mean change of each watched token's log-probability under each edit and control, with its interval.

    Below 10 prompts the prompts themselves in place of the interval (of a control, each its mean over the draws).
    """
    found: Any = summary[np.isfinite(summary["logprob_delta"].to_numpy(float))]
    names = list(dict.fromkeys(found["watched"]))[:PANELS]
    each = list(dict.fromkeys(zip(found["edit"], found["control"], strict=True)))
    figure, panels = _panels(names, 0.3 * len(each) + 1.2, left=2.2)
    for axes, name in zip(panels, names, strict=True):
        mine = found[found["watched"] == name].set_index("edit")
        for place, (edit, control) in enumerate(each):
            if edit not in mine.index:
                continue
            mean, low, high = (
                float(mine.loc[edit, f"logprob_delta{end}"]) for end in ("", "_low", "_high")
            )
            colour = MUTED if control else UP if mean > 0 else DOWN
            if float(mine.loc[edit, "n"]) < DRAWN:
                own: Any = watched[(watched["edit"] == edit) & (watched["watched"] == name)]
                points = own.groupby("row")["logprob_delta"].mean()
                points = points[np.isfinite(points)]
                axes.plot(
                    points,
                    np.full(len(points), place),
                    ls="",
                    marker=".",
                    ms=5,
                    alpha=0.6,
                    color=colour,
                )
            else:
                axes.plot([low, high], [place, place], color=colour, lw=2.2, solid_capstyle="round")
            axes.plot(mean, place, "o", ms=6, color=colour, mfc="none" if control else colour)
        axes.axvline(0, color=MUTED, lw=0.8)
        axes.set_yticks(
            range(len(each)), [cut(plain(readable(edit)), 1.9, 8.5) for edit, _ in each]
        )
        axes.set_ylim(len(each) - 0.5, -0.5)
        few = bool((summary["n"] < DRAWN).all())
        words = "prompts" if few else "95 % interval"
        axes.set_xlabel(f"Δ log-probability (nats), mean and {words}")
    return finished(figure, title)
