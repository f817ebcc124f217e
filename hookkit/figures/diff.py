"""Figures of a comparison of two models: through the layers, and token by token. No torch."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .style import GRID, INK, MARK, MUTED, POINT, annotate_bar, apply_style, drawable
from .sweeps import LINES, heat_map

MOST_TOKENS = 60  # tokens of a prompt that are drawn
# The sites that have a line, in this order, as far as the table has them.
LINE_SITES = ("resid_post", "attn_out", "mlp_out", "z", "mlp_post", "q")


def through_layers(sites: pd.DataFrame, tolerance: float, *, title: str = "") -> Figure | None:
    """The difference of two models at each layer, and 1 - CKA, which no rotation changes. Log axes.

    Returns None if nothing differs, or if nothing can be compared.
    """
    in_layers = pd.DataFrame(sites[sites["layer"].notna()])
    difference = _positive(in_layers.assign(value=in_layers["difference"]))
    dissimilarity = _positive(in_layers.assign(value=1 - in_layers["cka"]))
    panels = [
        (difference, "‖after − before‖ / ‖before‖, mean"),
        (dissimilarity, "1 − CKA"),
    ]
    panels = [(table, label) for table, label in panels if not table.empty]
    if not panels:
        return None
    figure = Figure(figsize=(5.2 * len(panels) + 1.2, 3.6), layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (table, label) in zip(all_axes, panels, strict=True):
        _draw_site_lines(axes, table)
        axes.set_ylabel(label)
        if table is difference:
            axes.axhline(tolerance, color=MUTED, lw=0.9, ls="--")
    return apply_style(figure, title)


def _positive(table: pd.DataFrame) -> pd.DataFrame:
    """The rows whose value a log axis can show."""
    values: Any = table["value"]
    return pd.DataFrame(table[values.notna() & (values > 0) & (values < np.inf)])


def _draw_site_lines(axes: Axes, table: pd.DataFrame) -> None:
    all_names = list(dict.fromkeys(table["name"]))
    names = [name for name in LINE_SITES if name in all_names]
    for colour, name in zip(LINES, names or all_names, strict=False):
        line = pd.DataFrame(table[table["name"] == name]).sort_values("layer")
        style = {"color": colour, "lw": 1.6, "marker": "o", "ms": 3.2, "label": drawable(name)}
        axes.plot(line["layer"].astype(int), line["value"], **style)
    axes.set_yscale("log")
    axes.set_xlabel("layer")
    axes.legend(frameon=False, fontsize=8.5, labelcolor=INK)


def token_bars(tokens: pd.DataFrame, *, title: str = "") -> Figure:
    """The KL after each token of one prompt as bars, red where the most likely token changes."""
    table = tokens.head(MOST_TOKENS)
    values = table["kl"].to_numpy(float)
    largest = float(values[np.isfinite(values)].max(initial=0.0)) or 1.0
    lengths = np.minimum(values, largest)
    positions = np.arange(len(table))
    figure = Figure(figsize=(7, 0.24 * len(table) + 1.1), layout="constrained")
    axes = figure.subplots()
    colours = [MARK if changed else POINT for changed in table["top1_changed"]]
    axes.barh(positions, lengths, color=colours, height=0.72)
    for position, value in enumerate(values):
        text = f"{value:.2g}" if np.isfinite(value) else "∞"
        annotate_bar(axes, text, min(value, largest), position)
    axes.set_yticks(positions, _token_labels(table), fontsize=8.5)
    axes.invert_yaxis()
    axes.set_xlim(0, largest * 1.12)
    axes.set_xlabel("KL after the token (nats); red: another token is first")
    axes.spines["left"].set_color(GRID)
    return apply_style(figure, title)


def _token_labels(table: pd.DataFrame) -> list[str]:
    return [
        f"{drawable(token)}  {pos}" for token, pos in zip(table["read"], table["pos"], strict=True)
    ]


def stream_map(stream: pd.DataFrame, *, title: str = "") -> Figure | None:
    """The difference of the stream of one prompt, layer by token.

    Returns None if nothing differs, or if the prompt is too long to be drawn.
    """
    finite: Any = stream[np.isfinite(stream["difference"].to_numpy(float))]
    labels = dict(zip(finite["pos"], _token_labels(finite), strict=True))
    if finite.empty or not (finite["difference"] > 0).any() or len(labels) > MOST_TOKENS:
        return None
    return heat_map(finite, value="difference", x="pos", y="layer", labels=labels, title=title)
