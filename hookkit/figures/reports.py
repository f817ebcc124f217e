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
from matplotlib.ticker import NullFormatter, PercentFormatter

from ..tables.intervals import MIN_FOR_INTERVAL
from . import style
from .style import GRID, INK, MARK, MUTED, POINT, PointLabel, apply_style, rank_axis, short_label
from .sweeps import heat_map

PANELS = 4  # edits that are drawn
PANEL_HEIGHT = 4.3  # inches of a panel of ranks
CELLS = 56  # of the map of all tokens, along each side
SPREADS = {True: "prompts", False: "95 % interval"}  # by whether there are few prompts
NAMED = 9  # tokens that get their names
MAX_LABELS = 14  # lines that get their names
NAMED_TOKENS = 20  # of a corpus that are drawn
MAX_TOKENS = 60  # tokens of a prompt that are drawn
# The sites that have a line, in this order, as far as the table has them.
DIFF_SITES = ("resid_post", "attn_out", "mlp_out", "z", "mlp_post", "q")


# ---- two runs


def _make_panels(names: Sequence[str], height: float) -> tuple[Figure, list[Axes]]:
    """A figure with a panel for each name, which is its title. `height` is that of a panel."""
    columns = min(2, len(names))
    rows = ceil(len(names) / columns)
    figure, panels = style.new_panels(7.2 * columns, height * rows, len(names), rows=rows)
    for axes, name in zip(panels, names, strict=True):
        axes.set_title(short_label(name, 4.4, 9.5), fontsize=9.5, color=INK, loc="left")
    return figure, panels


def rank_against_rank(
    parts: Mapping[str, tuple[pd.DataFrame, np.ndarray, np.ndarray]], *, title: str = ""
) -> Figure:
    """Every token's rank before (x) and after (y), and the names of the tokens of a shift table.

    `parts` has for each edit its shift table, and all tokens' ranks before and after.
    """
    figure, panels = _make_panels(list(parts), PANEL_HEIGHT)
    for axes, (table, before, after) in zip(panels, parts.values(), strict=True):
        lowest = 1.3 * max(10.0, float(before.max()), float(after.max()))
        _draw_density(axes, before, after, lowest)
        axes.plot([1, lowest], [1, lowest], color=MUTED, lw=0.9, ls="--")
        axes.set_xscale("log")
        axes.set_xlim(0.8, lowest)
        rank_axis(axes, lowest)
        axes.set_xticks(axes.get_yticks(), [f"{rank:,.0f}" for rank in axes.get_yticks()])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("rank before (log axis)")
        axes.set_ylabel("rank after (log axis; 1 is the most likely)")
        _name_tokens(axes, table)
    first = next(iter(parts.values()))[0]
    return apply_style(figure, title or "Rank against rank", style.describe_prompt(first))


def _draw_density(axes: Axes, before: np.ndarray, after: np.ndarray, lowest: float) -> None:
    """Draw how many tokens are in each cell of the ranks: the darker the more, on a log scale."""
    edges = np.geomspace(0.8, lowest, CELLS + 1)
    counts = np.histogram2d(after, before, bins=[edges, edges])[0]
    opacities = 0.12 + 0.68 * np.log1p(counts) / np.log1p(counts.max())
    shades = np.zeros((CELLS, CELLS, 4))
    shades[..., :3] = to_rgb(POINT)
    shades[..., 3] = np.where(counts > 0, opacities, 0.0)
    axes.pcolormesh(edges, edges, shades, rasterized=True, linewidth=0)


def _name_tokens(axes: Axes, table: pd.DataFrame) -> None:
    """Name the watched, edited and top tokens and the largest movers at the right of the axes."""
    order = table.assign(
        _is_unrequested=~table["why"].str.contains("watched|edited"),
        _is_not_top=table[["rank_before", "rank_after"]].min(axis=1) > 1,
        _closeness=-table["log10_rank_ratio"].abs(),
    ).sort_values(["_is_unrequested", "_is_not_top", "_closeness"], kind="stable")
    named = order.head(NAMED).sort_values("rank_after", kind="stable")
    labels = []
    for token in named.to_dict("records"):
        point = (float(token["rank_before"]), float(token["rank_after"]))
        colour = style.change_colour(-token["rank_delta"])
        axes.plot(*point, "o", ms=5.5, color=colour, mec=GRID, mew=0.6, zorder=3, clip_on=False)
        name = short_label(style.token_label(token["token"]), 1.3)
        text = f"{name}  {token['rank_before']:,} → {token['rank_after']:,}"
        is_requested = "watched" in token["why"] or "edited" in token["why"]
        labels.append(PointLabel(text, *point, bold=is_requested))
    style.label_column(axes, labels, PANEL_HEIGHT - 1.1)


def shift_through_layers(layers: pd.DataFrame, edits: Sequence[str], *, title: str = "") -> Figure:
    """Each token's rank by the lens at each layer, before (dashed) and after; edits are shaded."""
    figure, panels = _make_panels(edits, 3.8)
    for axes, edit in zip(panels, edits, strict=True):
        part: Any = layers[layers["edit"] == edit]
        ranks = part[["rank_before", "rank_after"]].to_numpy(float)
        rank_axis(axes, max(1.4 * style.largest_finite(ranks), 10.0))
        last_layer = int(part["layer"].max())
        axes.set_xlim(-0.6, last_layer + 0.6)
        for layer in sorted(set(part[part["edited"]]["layer"])):
            axes.axvspan(layer - 0.5, layer + 0.5, color=(*to_rgb(POINT), 0.22), lw=0)
        labels = []
        for number, (_, line) in enumerate(part.groupby("token_id", sort=False)):
            colour = style.LINES[number % len(style.LINES)]
            axes.plot(line["layer"], line["rank_before"], color=colour, lw=1.2, ls="--", alpha=0.75)
            axes.plot(line["layer"], line["rank_after"], color=colour, lw=1.9)
            rank, token = float(line["rank_after"].iloc[-1]), line["token"].iloc[0]
            text = f"{short_label(style.token_label(token), 1.3)}  {rank:,.0f}"
            labels.append(PointLabel(text, last_layer, rank, colour))
        style.integer_axis(axes, part["layer"].astype(int))
        axes.set_xlabel("layer (dashed: before, solid: after, shaded: edited)")
        style.label_column(axes, labels[:MAX_LABELS], 2.6)
    title = title or "What each layer would predict"
    return apply_style(figure, title, style.describe_prompt(layers))


def component_bars(parts: Mapping[str, pd.DataFrame], *, title: str = "") -> Figure:
    """The components of `most_moved` as bars, and the logit's change, for each edit."""
    height = 0.24 * max(map(len, parts.values())) + 0.9
    figure, panels = _make_panels(list(parts), height)
    for axes, table in zip(panels, parts.values(), strict=True):
        names = list(map(str, table["component"]))
        style.draw_signed_bars(axes, names, table["logit_delta"].tolist(), width=7.0)
        axes.set_xlabel("change of the logit, after minus before")
    first = next(iter(parts.values()))
    return apply_style(figure, title or "What made the change", style.describe_prompt(first))


def mean_changes(summary: pd.DataFrame, watched: pd.DataFrame, *, title: str = "") -> Figure:
    """The mean change of each watched token's log-probability under each edit and control.

    Each mean has its interval. Below 10 prompts the prompts are drawn in place of the interval; for
    a control, each prompt's mean over the draws.
    """
    names = list(dict.fromkeys(summary["watched"]))[:PANELS]
    controls = dict(zip(summary["edit"], summary["control"], strict=True))
    figure, panels = _make_panels(names, 0.3 * len(controls) + 0.9)
    labels = [short_label(edit, 1.9) for edit in controls]
    has_few_prompts = bool((summary["n"] < MIN_FOR_INTERVAL).all())
    for axes, name in zip(panels, names, strict=True):
        means: Any = summary[summary["watched"] == name].set_index("edit")
        points = watched[watched["watched"] == name]
        for position, (edit, control) in enumerate(controls.items()):
            if edit in means.index:
                prompts = points[points["edit"] == edit]
                _draw_mean(axes, means.loc[edit], prompts, position, is_control=bool(control))
        axes.axvline(0, color=MUTED, lw=0.8)
        axes.set_yticks(range(len(controls)), labels)
        axes.set_ylim(len(controls) - 0.5, -0.5)
        axes.set_xlabel(f"Δ log-probability (nats), mean and {SPREADS[has_few_prompts]}")
    prompt = style.describe_prompt(watched)
    return apply_style(figure, title or "What became more and less likely", prompt)


def _draw_mean(axes: Axes, summary: Any, points: Any, position: int, *, is_control: bool) -> None:
    """Draw a mean with its interval, or with its prompts where they are few.

    A mean without end is an arrow at the edge.
    """
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
    if np.isfinite(mean):
        axes.plot(mean, position, "o", ms=6, color=colour, mfc=fill)
    elif np.isinf(mean):
        _draw_endless_mean(axes, mean, position, colour)


def _draw_endless_mean(axes: Axes, mean: float, position: int, colour: str) -> None:
    side, marker, align, shift = (0.02, "<", "left", 7)
    if mean > 0:
        side, marker, align, shift = (0.98, ">", "right", -7)
    edge = axes.get_yaxis_transform()
    axes.plot(side, position, marker, ms=8, color=colour, transform=edge)
    location: dict[str, Any] = {"textcoords": "offset points", "va": "center", "ha": align}
    text = style.format_number(mean, "")
    axes.annotate(
        text, (side, position), xycoords=edge, xytext=(shift, 0), fontsize=8.5, **location
    )


# ---- two models


def diff_through_layers(sites: pd.DataFrame, tolerance: float, *, title: str = "") -> Figure | None:
    """The difference of two models at each layer, and 1 - CKA. None if there is nothing to draw."""
    panels = _difference_panels(sites)
    if not panels:
        return None
    figure, all_axes = style.new_panels(5.2 * len(panels) + 1.2, 3.6, len(panels))
    for axes, (label, table) in zip(all_axes, panels.items(), strict=True):
        _draw_site_lines(axes, table)
        axes.set_ylabel(label)
        if label != "1 − CKA":
            axes.axhline(tolerance, color=MUTED, lw=0.9, ls="--", label="tolerance")
            axes.set_ylim(min(axes.get_ylim()[0], tolerance / 1.5))
        style.add_legend(axes)
    return apply_style(figure, title or "The difference of two models at each layer")


def _difference_panels(sites: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Returns the points of each panel by its label: of the difference, and of 1 - CKA."""
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
    return panels


def _draw_site_lines(axes: Axes, table: pd.DataFrame) -> None:
    lines: Any = dict(iter(table.groupby("name", sort=False)))
    names = list(filter(lines.__contains__, DIFF_SITES)) or list(lines)
    axes.set_yscale("log")
    values = table["value"].to_numpy(float)
    axes.set_ylim(float(values.min()) / 1.5, float(values.max()) * 1.5)
    for number, name in enumerate(names[: style.MAX_LINES]):
        line = lines[name].sort_values("layer")
        layers = line["layer"].astype(int)
        axes.plot(layers, line["value"], label=name, lw=1.6, ms=3.5, **style.line_style(number))
    axes.set_xlabel("layer")
    style.integer_axis(axes, table["layer"].astype(int))


def token_bars(tokens: pd.DataFrame, *, title: str = "") -> Figure:
    """The KL after each token of one prompt as bars, orange where the most likely token changes."""
    table, title = tokens.head(MAX_TOKENS), title or "How far apart they are after each token"
    if len(tokens) > MAX_TOKENS:
        title = f"{title}: the first {MAX_TOKENS} of {len(tokens):,}"
    colours = np.where(table["top1_changed"], MARK, POINT).tolist()
    figure, axes = style.new_figure(7, 0.24 * len(table) + 0.8)
    style.draw_bars(axes, _token_labels(table), table["kl"].tolist(), colours, ".2g", width=7)
    axes.set_xlabel("KL after the token (nats); orange: another token becomes the most likely")
    return apply_style(figure, title, style.describe_prompt(tokens))


def _token_labels(table: pd.DataFrame) -> list[str]:
    return list(map("{}  {}".format, map(style.token_label, table["read"]), table["pos"]))


def stream_map(stream: pd.DataFrame, *, title: str = "") -> Figure | None:
    """The difference of the stream, layer by token. None for no difference, or a long prompt."""
    finite: Any = stream[np.isfinite(stream["difference"].to_numpy(float))]
    labels = dict(zip(finite["pos"], _token_labels(finite), strict=True))
    has_difference = (finite["difference"] > 0).any()
    if not has_difference or len(labels) > MAX_TOKENS:
        return None
    settings: dict[str, Any] = {"value": "difference", "x": "pos", "y": "layer", "labels": labels}
    title = title or "The difference of the residual stream after each layer"
    return heat_map(finite, title=title, **settings)


# ---- a corpus


def token_shares(table: pd.DataFrame, name: str, top: int, *, title: str = "") -> Figure:
    """At which share of the positions each token was among those that moved most, and the control.

    `table` has rows of the table of `token_shifts`; `name` is "promoted" or "demoted". Below 10
    texts there are no intervals.
    """
    rows = table.head(NAMED_TOKENS)
    figure, axes = style.new_figure(7.0, 0.3 * len(rows) + 1.3)
    colour = style.UP if name == "promoted" else style.DOWN
    share, heights = f"share_{name}", np.arange(len(rows))
    for column, shade, offset in ((f"control_{share}", MUTED, 0.18), (share, colour, -0.05)):
        values = rows[column].to_numpy(float)
        limits = rows[[f"{column}_low", f"{column}_high"]].to_numpy(float).T
        axes.hlines(heights + offset, *limits, color=shade, lw=2.0, alpha=0.6)
        face = "none" if shade == MUTED else shade
        axes.plot(values, heights + offset, "o", ms=5, color=shade, mfc=face, clip_on=False)
    axes.set_yticks(heights, [short_label(repr(token), 1.9) for token in rows["token"]])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel(f"positions at which it is among the {top} {name} tokens, 95 % interval")
    return apply_style(figure, title)


# ---- features


def activation_histogram(histogram: pd.DataFrame, *, title: str = "") -> Figure:
    """How often a feature has which activation, where it is active, on a log axis."""
    figure, axes = style.new_figure(6.0, 2.4)
    low, high = histogram["low"].to_numpy(float), histogram["high"].to_numpy(float)
    counts = histogram["count"].to_numpy(float)
    axes.bar(low, counts, width=0.92 * (high - low), align="edge", color=POINT)
    axes.set_yscale("log")
    axes.set_ylim(0.7, 1.5 * counts.max())
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(0, float(high.max()))
    axes.set_xlabel("activation, where it is not 0")
    axes.set_ylabel("tokens (log axis)")
    return apply_style(figure, title or "How often it has which activation")
