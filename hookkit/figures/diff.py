"""Figures of two models beside one another: through the layers, and token by token. No torch."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .ranks import GRID, INK, MARK, MUTED, POINT, drawable, finished
from .sweeps import LINES, heat_map

MOST = 60  # tokens of a prompt that are drawn
LINED = (
    "resid_post",
    "attn_out",
    "mlp_out",
    "z",
    "mlp_post",
    "q",
)  # sites that have a line, the first of them that are there


def through_layers(sites: pd.DataFrame, tolerance: float, *, title: str = "") -> Figure | None:
    """How far two models are apart at each layer, and how much of that is more than a turn: 1 - CKA. Log axes.

    None where nothing differs, or nothing can be compared.
    """
    layered = pd.DataFrame(sites[sites["layer"].notna()])
    panels = {
        "difference": layered.assign(value=layered["difference"]),
        "1 − CKA": layered.assign(value=1 - layered["cka"]),
    }
    panels = {name: pd.DataFrame(table[_drawn(table["value"])]) for name, table in panels.items()}
    panels = {name: table for name, table in panels.items() if not table.empty}
    if not panels:
        return None
    figure = Figure(figsize=(5.2 * len(panels) + 1.2, 3.6), layout="constrained")
    for axes, (name, table) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        _lines(axes, table)
        axes.set_ylabel("‖after − before‖ / ‖before‖, mean" if name == "difference" else name)
        if name == "difference":
            axes.axhline(tolerance, color=MUTED, lw=0.9, ls="--")
    return finished(figure, title)


def _drawn(values: Any) -> Any:
    """The numbers that a log axis can show."""
    return values.notna() & (values > 0) & (values < np.inf)


def _lines(axes: Axes, table: pd.DataFrame) -> None:
    names = [name for name in LINED if name in set(table["name"])] or list(
        dict.fromkeys(table["name"])
    )
    for colour, name in zip(LINES, names, strict=False):
        mine = pd.DataFrame(table[table["name"] == name]).sort_values("layer")
        axes.plot(
            mine["layer"].astype(int),
            mine["value"],
            color=colour,
            lw=1.6,
            marker="o",
            ms=3.2,
            label=drawable(name),
        )
    axes.set_yscale("log")
    axes.set_xlabel("layer")
    axes.legend(frameon=False, fontsize=8.5, labelcolor=INK)


def token_bars(tokens: pd.DataFrame, *, title: str = "") -> Figure:
    """KL after each token of one prompt as bars, those after which another token comes first in red."""
    shown = tokens.head(MOST)
    values = shown["kl"].to_numpy(float)
    reach = float(values[np.isfinite(values)].max(initial=0.0)) or 1.0
    figure = Figure(figsize=(7, 0.24 * len(shown) + 1.1), layout="constrained")
    axes = figure.subplots()
    colours = [MARK if changed else POINT for changed in shown["top1_changed"]]
    axes.barh(np.arange(len(shown)), np.minimum(values, reach), color=colours, height=0.72)
    for place, value in enumerate(values):
        text = f"{value:.2g}" if np.isfinite(value) else "∞"
        axes.annotate(
            text,
            (min(value, reach), place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=INK,
        )
    labels = [
        f"{drawable(read)}  {pos}" for read, pos in zip(shown["read"], shown["pos"], strict=True)
    ]
    axes.set_yticks(np.arange(len(shown)), labels, fontsize=8.5)
    axes.invert_yaxis()
    axes.set_xlim(0, reach * 1.12)
    axes.set_xlabel("KL after the token (nats); red: another token is first")
    axes.spines["left"].set_color(GRID)
    return finished(figure, title)


def stream_map(stream: pd.DataFrame, *, title: str = "") -> Figure | None:
    """How far the stream of one prompt is apart, layer by token; None where nothing differs, or it is too long."""
    known: Any = stream[np.isfinite(stream["difference"].to_numpy(float))]
    labels = dict(
        zip(
            known["pos"],
            [
                f"{drawable(read)}  {pos}"
                for read, pos in zip(known["read"], known["pos"], strict=True)
            ],
            strict=True,
        )
    )
    if known.empty or not (known["difference"] > 0).any() or len(labels) > MOST:
        return None
    return heat_map(known, value="difference", x="pos", y="layer", labels=labels, title=title)
