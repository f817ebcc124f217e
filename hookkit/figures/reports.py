"""Figures of the reports about two runs or two models: `shift_report` and `model_diff`. No torch.

Figures of a shift report have a panel for each edit, two in a row. Of many edits the first are
drawn.
"""

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from ..display import quote_token
from ..tables.intervals import MIN_FOR_INTERVAL
from . import style
from .style import GRID, INK, MARK, MUTED, POINT, apply_style, label_point, rank_axis, short_label
from .sweeps import heat_map

PANELS = 4  # edits that are drawn
LINES = (MARK, style.UP, "#8a5bb5", "#b8862b", POINT, MUTED)
CELLS = 56  # of the map of all tokens, along each side
SPREADS = {True: "prompts", False: "95 % interval"}  # by whether there are few prompts
NAMED = 9  # tokens that get their names
MOST_TOKENS = 60  # tokens of a prompt that are drawn
# The sites that have a line, in this order, as far as the table has them.
DIFF_SITES = ("resid_post", "attn_out", "mlp_out", "z", "mlp_post", "q")


# ---- two runs


def _make_panels(
    names: Sequence[str], height: float, left: float = 0.8
) -> tuple[Figure, list[Axes]]:
    """A figure with a panel for each name, which is its title. `height`, `left` (margin) in inches.

    The margins are set by hand, because a layout engine draws everything a second time whenever a
    figure is saved.
    """
    columns, width = 2, 11.0
    if len(names) == 1:
        columns, width = 1, 7.0
    rows = ceil(len(names) / columns)
    top, bottom, right = 0.72, 0.6, 0.2
    full_height = height * rows + 0.4
    panel_width = width / columns - left - right
    panel_height = (full_height - top - bottom - (rows - 1) * (bottom + 0.36)) / rows
    figure = Figure(figsize=(width, full_height))
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    figure.subplots_adjust(
        left=left / width,
        right=1 - right / width,
        top=1 - top / full_height,
        bottom=bottom / full_height,
        wspace=(left + right) / panel_width,
        hspace=(bottom + 0.36) / panel_height,
    )
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    for axes, name in zip(panels, names, strict=False):
        axes.set_title(short_label(name, 4.4, 9.5), fontsize=9.5, color=INK, loc="left")
    return figure, panels[: len(names)]


def rank_against_rank(
    parts: Mapping[str, tuple[pd.DataFrame, np.ndarray, np.ndarray]], *, title: str = ""
) -> Figure:
    """Every token's rank before (x) and after (y), and the names of the tokens of a shift table.

    `parts` has for each edit its shift table, and all tokens' ranks before and after.
    """
    figure, panels = _make_panels(list(parts), 4.3)
    for axes, (table, before, after) in zip(panels, parts.values(), strict=True):
        lowest = 1.3 * max(10.0, float(before.max()), float(after.max()))
        _draw_density(axes, before, after, lowest)
        axes.plot([1, lowest], [1, lowest], color=MUTED, lw=0.9, ls="--")
        axes.set_xscale("log")
        axes.set_xlim(0.8, lowest * 60)  # room for the names
        rank_axis(axes, lowest)
        axes.set_xticks(axes.get_yticks(), [f"{rank:,.0f}" for rank in axes.get_yticks()])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("rank before (log axis)")
        axes.set_ylabel("rank after (log axis; 1 is the most likely)")
        _name_tokens(axes, table, lowest)
    return apply_style(figure, title)


def _draw_density(axes: Axes, before: np.ndarray, after: np.ndarray, lowest: float) -> None:
    """Draw how many tokens are in each cell of the ranks: the darker the more, on a log scale."""
    edges = np.geomspace(0.8, lowest, CELLS + 1)
    counts = np.histogram2d(after, before, bins=[edges, edges])[0]
    opacities = 0.12 + 0.68 * np.log1p(counts) / np.log1p(counts.max())
    shades = np.zeros((CELLS, CELLS, 4))
    shades[..., :3] = to_rgb(POINT)
    shades[..., 3] = np.where(counts > 0, opacities, 0.0)
    axes.pcolormesh(edges, edges, shades, rasterized=True, linewidth=0)


def _name_tokens(axes: Axes, table: pd.DataFrame, lowest: float) -> None:
    """Name the watched, edited and top tokens and the largest movers in the right margin."""
    order = table.assign(
        _is_unrequested=~table["why"].str.contains("watched|edited"),
        _is_not_top=table[["rank_before", "rank_after"]].min(axis=1) > 1,
        _closeness=-table["log10_rank_ratio"].abs(),
    ).sort_values(["_is_unrequested", "_is_not_top", "_closeness"], kind="stable")
    named = order.head(NAMED).sort_values("rank_after", kind="stable")
    gap = 0.056 * np.log10(lowest / 0.85)
    heights = _spread_ranks(named["rank_after"].to_numpy(float), gap, lowest)
    for token, height in zip(named.to_dict("records"), heights, strict=True):
        point = (float(token["rank_before"]), float(token["rank_after"]))
        colour = style.change_colour(-token["rank_delta"])
        axes.plot(*point, "o", ms=5.5, color=colour, mec=GRID, mew=0.6, zorder=3)
        name = short_label(quote_token(token["token"]), 0.9)
        text = f"{name}  {token['rank_before']:,} → {token['rank_after']:,}"
        is_requested = "watched" in token["why"] or "edited" in token["why"]
        text_style: dict[str, Any] = {"fontsize": 8, "color": INK, "bold": is_requested}
        label_point(axes, text, point, (lowest * 1.15, height), shrink=(1, 4), **text_style)


def _spread_ranks(ranks: np.ndarray, gap: float, lowest: float) -> np.ndarray:
    """The ranks at which labels stand: `gap` powers of ten apart, none below the rank `lowest`."""
    heights = style.spread_apart(np.log10(ranks), gap)
    n_labels_below = np.arange(len(heights))[::-1]
    return 10.0 ** np.minimum(heights, np.log10(lowest) - gap * (0.5 + n_labels_below))


def shift_through_layers(layers: pd.DataFrame, edits: Sequence[str], *, title: str = "") -> Figure:
    """Each token's rank by the lens at each layer, before (dashed) and after; edits are shaded."""
    figure, panels = _make_panels(edits, 3.6)
    for axes, edit in zip(panels, edits, strict=True):
        part: Any = layers[layers["edit"] == edit]
        ranks = part[["rank_before", "rank_after"]].to_numpy(float)
        lowest = max(1.4 * float(ranks.max()), 10.0)
        last_layer = int(part["layer"].max())
        for layer in sorted(set(part[part["edited"]]["layer"])):
            axes.axvspan(layer - 0.5, layer + 0.5, color=(*to_rgb(POINT), 0.22), lw=0)
        line_ends = []
        for number, (_, line) in enumerate(part.groupby("token_id", sort=False)):
            colour = LINES[number % len(LINES)]
            axes.plot(line["layer"], line["rank_before"], color=colour, lw=1.2, ls="--", alpha=0.75)
            axes.plot(line["layer"], line["rank_after"], color=colour, lw=1.9)
            line_ends.append((float(line["rank_after"].iloc[-1]), line["token"].iloc[0], colour))
        rank_axis(axes, lowest)
        axes.set_xlim(-0.6, last_layer * 1.32 + 1)
        axes.set_xticks(range(0, last_layer + 1, max(1, ceil(last_layer / 8))))
        axes.set_xlabel("layer (the stream behind it)")
        _name_line_ends(axes, line_ends, last_layer, lowest)
    return apply_style(figure, title)


def _name_line_ends(
    axes: Axes, line_ends: list[tuple[float, str, str]], last_layer: int, lowest: float
) -> None:
    """Write the names of lines at their ends, with the rank after. An end is rank, name, colour."""
    line_ends.sort(key=lambda end: end[0])
    ranks = np.array([rank for rank, _, _ in line_ends])
    heights = _spread_ranks(ranks, 0.065 * np.log10(lowest / 0.85), lowest)
    for (rank, token, colour), height in zip(line_ends, heights, strict=True):
        text = f"{short_label(quote_token(token), 1.0)}  {rank:,.0f}"
        position = (last_layer * 1.03 + 0.4, height)
        label_point(axes, text, (last_layer, rank), position, shrink=(1, 1), color=colour)


def component_bars(parts: Mapping[str, pd.DataFrame], *, title: str = "") -> Figure:
    """The components of `most_moved` as bars, and the logit's change, for each edit."""
    height = 0.24 * max(map(len, parts.values())) + 1.1
    figure, panels = _make_panels(list(parts), height, left=1.5)
    for axes, table in zip(panels, parts.values(), strict=True):
        values = table["logit_delta"].to_numpy(float)
        style.draw_signed_bars(axes, table["component"].tolist(), values.tolist())
        limit = 1.28 * (float(np.abs(values).max()) or 1.0)
        axes.set_xlim(-limit, limit)
        axes.set_xlabel("change of the logit, after minus before")
    return apply_style(figure, title)


def mean_changes(summary: pd.DataFrame, watched: pd.DataFrame, *, title: str = "") -> Figure:
    """The mean change of each watched token's log-probability under each edit and control.

    Each mean has its interval. Below 10 prompts the prompts are drawn in place of the interval; for
    a control, each prompt's mean over the draws.
    """
    finite: Any = summary[np.isfinite(summary["logprob_delta"].to_numpy(float))]
    names = list(dict.fromkeys(finite["watched"]))[:PANELS]
    controls = dict(zip(finite["edit"], finite["control"], strict=True))
    figure, panels = _make_panels(names, 0.3 * len(controls) + 1.2, left=2.2)
    labels = [short_label(edit, 1.9) for edit in controls]
    has_few_prompts = bool((summary["n"] < MIN_FOR_INTERVAL).all())
    for axes, name in zip(panels, names, strict=True):
        means = finite[finite["watched"] == name].set_index("edit")
        points = watched[watched["watched"] == name]
        for position, (edit, control) in enumerate(controls.items()):
            if edit in means.index:
                prompts = points[points["edit"] == edit]
                _draw_mean(axes, means.loc[edit], prompts, position, is_control=bool(control))
        axes.axvline(0, color=MUTED, lw=0.8)
        axes.set_yticks(range(len(controls)), labels)
        axes.set_ylim(len(controls) - 0.5, -0.5)
        axes.set_xlabel(f"Δ log-probability (nats), mean and {SPREADS[has_few_prompts]}")
    return apply_style(figure, title)


def _draw_mean(axes: Axes, summary: Any, points: Any, position: int, *, is_control: bool) -> None:
    """Draw a mean with its interval, or with its prompts where they are few."""
    mean = float(summary["logprob_delta"])
    colour = fill = style.sign_colour(mean)
    if is_control:
        colour, fill = MUTED, "none"
    if float(summary["n"]) < MIN_FOR_INTERVAL:
        values = points.groupby("row")["logprob_delta"].mean()
        values = values[np.isfinite(values)]
        heights = np.full(len(values), position)
        axes.plot(values, heights, ls="", marker=".", ms=5, alpha=0.6, color=colour)
    else:
        interval = [float(summary["logprob_delta_low"]), float(summary["logprob_delta_high"])]
        axes.plot(interval, [position] * 2, color=colour, lw=2.2, solid_capstyle="round")
    axes.plot(mean, position, "o", ms=6, color=colour, mfc=fill)


# ---- two models


def diff_through_layers(sites: pd.DataFrame, tolerance: float, *, title: str = "") -> Figure | None:
    """The difference of two models at each layer, and 1 - CKA. None if there is nothing to draw."""
    in_layers = sites[sites["layer"].notna()]
    columns = {
        "‖after − before‖ / ‖before‖, mean": in_layers["difference"],
        "1 − CKA": 1 - in_layers["cka"],
    }
    panels = {}
    for label, values in columns.items():
        is_drawable = np.isfinite(values) & (values > 0)  # on a log axis
        if is_drawable.any():
            panels[label] = in_layers.assign(value=values)[is_drawable]
    if not panels:
        return None
    figure, all_axes = style.new_panels(5.2 * len(panels) + 1.2, 3.6, len(panels))
    for axes, (label, table) in zip(all_axes, panels.items(), strict=True):
        _draw_site_lines(axes, table)
        axes.set_ylabel(label)
        if label != "1 − CKA":
            axes.axhline(tolerance, color=MUTED, lw=0.9, ls="--")
    return apply_style(figure, title)


def _draw_site_lines(axes: Axes, table: pd.DataFrame) -> None:
    lines: Any = dict(iter(table.groupby("name", sort=False)))
    names = list(filter(lines.__contains__, DIFF_SITES)) or list(lines)
    for colour, name in zip(style.LINES, names, strict=False):
        line = lines[name].sort_values("layer")
        line_style = {"color": colour, "lw": 1.6, "marker": "o", "ms": 3.2}
        layers, label = line["layer"].astype(int), style.drawable(name)
        axes.plot(layers, line["value"], label=label, **line_style)
    axes.set_yscale("log")
    axes.set_xlabel("layer")
    style.add_legend(axes)


def token_bars(tokens: pd.DataFrame, *, title: str = "") -> Figure:
    """The KL after each token of one prompt as bars, red where the most likely token changes."""
    table = tokens.head(MOST_TOKENS)
    values = table["kl"].to_numpy(float)
    largest = style.largest_finite(values) or 1.0
    colours = np.where(table["top1_changed"], MARK, POINT).tolist()
    texts = [style.format_finite(value, ".2g", "∞") for value in values]
    figure, axes = style.new_figure(7, 0.24 * len(table) + 1.1)
    lengths = np.minimum(values, largest)
    style.draw_bars(axes, _token_labels(table), lengths, colours, texts, height=0.72)
    axes.set_xlim(0, largest * 1.12)
    axes.set_xlabel("KL after the token (nats); red: another token is first")
    axes.spines["left"].set_color(GRID)
    return apply_style(figure, title)


def _token_labels(table: pd.DataFrame) -> list[str]:
    return list(map("{}  {}".format, map(style.token_label, table["read"]), table["pos"]))


def stream_map(stream: pd.DataFrame, *, title: str = "") -> Figure | None:
    """The difference of the stream, layer by token. None for no difference, or a long prompt."""
    finite: Any = stream[np.isfinite(stream["difference"].to_numpy(float))]
    labels = dict(zip(finite["pos"], _token_labels(finite), strict=True))
    has_difference = (finite["difference"] > 0).any()
    if not has_difference or len(labels) > MOST_TOKENS:
        return None
    return heat_map(finite, value="difference", x="pos", y="layer", labels=labels, title=title)
