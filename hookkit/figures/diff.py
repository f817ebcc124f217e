"""Figures of a comparison of two models: through the layers, and token by token. No torch."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import style
from .sweeps import heat_map

MOST_TOKENS = 60  # tokens of a prompt that are drawn
# The sites that have a line, in this order, as far as the table has them.
LINE_SITES = ("resid_post", "attn_out", "mlp_out", "z", "mlp_post", "q")


def through_layers(sites: pd.DataFrame, tolerance: float, *, title: str = "") -> Figure | None:
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
    figure = Figure(figsize=(5.2 * len(panels) + 1.2, 3.6), layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (label, table) in zip(all_axes, panels.items(), strict=True):
        _draw_site_lines(axes, table)
        axes.set_ylabel(label)
        if label != "1 − CKA":
            axes.axhline(tolerance, color=style.MUTED, lw=0.9, ls="--")
    return style.apply_style(figure, title)


def _draw_site_lines(axes: Axes, table: pd.DataFrame) -> None:
    all_names = list(dict.fromkeys(table["name"]))
    names = [name for name in LINE_SITES if name in all_names]
    for colour, name in zip(style.LINES, names or all_names, strict=False):
        line = pd.DataFrame(table[table["name"] == name]).sort_values("layer")
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
    largest = float(values[np.isfinite(values)].max(initial=0.0)) or 1.0
    colours = [style.MARK if changed else style.POINT for changed in table["top1_changed"]]
    texts = [f"{value:.2g}" if np.isfinite(value) else "∞" for value in values]
    figure, axes = style.new_figure(7, 0.24 * len(table) + 1.1)
    lengths = np.minimum(values, largest)
    style.draw_bars(axes, _token_labels(table), lengths, colours, texts, height=0.72)
    axes.set_xlim(0, largest * 1.12)
    axes.set_xlabel("KL after the token (nats); red: another token is first")
    axes.spines["left"].set_color(style.GRID)
    return style.apply_style(figure, title)


def _token_labels(table: pd.DataFrame) -> list[str]:
    return [
        f"{style.drawable(token)}  {pos}"
        for token, pos in zip(table["read"], table["pos"], strict=True)
    ]


def stream_map(stream: pd.DataFrame, *, title: str = "") -> Figure | None:
    """The difference of the stream, layer by token. None for no difference, or a long prompt."""
    finite: Any = stream[np.isfinite(stream["difference"].to_numpy(float))]
    labels = dict(zip(finite["pos"], _token_labels(finite), strict=True))
    if finite.empty or not (finite["difference"] > 0).any() or len(labels) > MOST_TOKENS:
        return None
    return heat_map(finite, value="difference", x="pos", y="layer", labels=labels, title=title)
