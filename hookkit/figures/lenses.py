"""Figures of where a prediction comes from: what each layer would say, and what each component adds. No torch.

hk.lens_map(hk.logit_lens(lm, prompt, pos=None, top=1), labels=tokens)     # layer x position
hk.logit_bars(hk.direct_logits(run, " coffee"))                            # the components of a logit
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize, to_rgb
from matplotlib.figure import Figure

from ..arguments import checks_arguments
from ..errors import BadHook, EmptySelection
from .ranks import DOWN, GRID, INK, MUTED, UP, drawable, finished

SHADES = 256


@checks_arguments
def lens_map(
    lens: pd.DataFrame,
    *,
    labels: Sequence[str] | None = None,
    value: str = "prob",
    row: int | None = None,
    title: str = "",
) -> Figure:
    """The first token of every layer at every position, the stronger the colour the larger its `value`.

    `lens` is what `logit_lens` gave for one row; `labels` are the texts of the positions, such as the prompt's tokens.
    The model's own prediction is the uppermost row.
    """
    found: Any = lens if row is None else lens[lens["row"] == row]
    missing = [name for name in ("row", "pos", "site", "token", "rank", value) if name not in lens]
    if missing:
        raise BadHook(f"the table has no column {missing[0]!r}: give what logit_lens gave")
    if found.empty or found["row"].nunique() > 1:
        raise EmptySelection(
            f"the table has {found['row'].nunique()} rows to draw, and a lens map is of one: say row="
        )
    sites, places = list(dict.fromkeys(found["site"])), sorted(set(found["pos"]))
    first = (
        found.sort_values(["rank", "token_id"])
        .drop_duplicates(["pos", "site"])
        .set_index(["site", "pos"])
    )
    numbers = np.array([[float(first.loc[(site, pos), value]) for pos in places] for site in sites])
    figure = Figure(
        figsize=(1.6 + 0.95 * len(places), 1.3 + 0.24 * len(sites)), layout="constrained"
    )
    axes = figure.subplots()
    most = 1.0 if value == "prob" else float(np.nanmax(np.abs(numbers))) or 1.0
    shades = ListedColormap([(*to_rgb(UP), 0.75 * shade) for shade in np.linspace(0, 1, SHADES)])
    axes.pcolormesh(np.abs(numbers), cmap=shades, vmin=0, vmax=most, edgecolors=GRID, linewidth=0.4)
    for up, site in enumerate(sites):
        for across, pos in enumerate(places):
            word = drawable(str(first.loc[(site, pos), "token"]))
            size = 7.5 if len(word) <= 11 else 7.5 * 11 / len(word)
            axes.text(
                across + 0.5,
                up + 0.45,
                word,
                ha="center",
                va="center",
                fontsize=max(size, 4.0),
                color=INK,
            )
    names = [str(pos) if labels is None else drawable(str(labels[pos])) for pos in places]
    axes.set_xticks(
        np.arange(len(places)) + 0.5, names, rotation=30, ha="right", rotation_mode="anchor"
    )
    axes.set_yticks(np.arange(len(sites)) + 0.5, sites)
    axes.set_xlabel("after reading" if labels is not None else "position")
    finished(figure, title)
    axes.grid(visible=False)
    bar = figure.colorbar(
        ScalarMappable(Normalize(0, most), shades), ax=axes, fraction=0.03, pad=0.01
    )
    bar.set_label(value, fontsize=9, color=INK)
    bar.ax.tick_params(colors=MUTED, labelcolor=INK, labelsize=8)
    bar.outline.set_edgecolor(GRID)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    return figure


@checks_arguments
def logit_bars(
    parts: pd.DataFrame, *, top: int = 20, row: int | None = None, title: str = ""
) -> Figure:
    """The components that add most to a logit, or take most from it, as bars; the others are summed in one.

    `parts` is what `direct_logits` gave for one row and position. The bars sum to the logit.
    """
    if missing := [name for name in ("row", "pos", "component", "logit") if name not in parts]:
        raise BadHook(f"the table has no column {missing[0]!r}: give what direct_logits gave")
    found: Any = parts if row is None else parts[parts["row"] == row]
    if len(set(zip(found["row"], found["pos"], strict=True))) != 1:
        raise EmptySelection(
            "the table has several rows and positions, and these bars are of one: say row=, and one pos"
        )
    order = found["logit"].abs().sort_values(ascending=False, kind="stable").index
    shown, others = found.loc[order[:top]], found.loc[order[top:]]
    shown = shown.sort_values("logit", ascending=False, kind="stable")
    names, values = [drawable(name) for name in shown["component"]], shown["logit"].tolist()
    if len(others):
        names.append(f"the other {len(others)}")
        values.append(float(others["logit"].sum()))
    names, values = [*names, "all together"], [*values, float(found["logit"].sum())]
    figure = Figure(figsize=(7, 0.24 * len(values) + 1.2), layout="constrained")
    axes = figure.subplots()
    colours = [*[UP if value >= 0 else DOWN for value in values[:-1]], INK]
    axes.barh(np.arange(len(values)), values, color=colours, height=0.7)
    for place, value in enumerate(values):
        axes.annotate(
            f"{value:+.2f}",
            (value, place),
            xytext=(4 if value >= 0 else -4, 0),
            textcoords="offset points",
            ha="left" if value >= 0 else "right",
            va="center",
            fontsize=8,
            color=INK,
        )
    axes.set_yticks(np.arange(len(names)), names)
    axes.invert_yaxis()
    axes.axvline(0, color=MUTED, lw=0.8)
    axes.margins(x=0.14)
    axes.set_xlabel("what it adds to the logit")
    return finished(figure, title)
