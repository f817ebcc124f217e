"""Figures of where a prediction comes from: what each layer would say, and what components add.

    hk.figures.lens_map(hk.logit_lens(lm, prompt, pos=None, top=1), labels=tokens)
    hk.figures.logit_bars(hk.direct_logits(run, " coffee"))

`lens_map` is layer x position. `logit_bars` has a bar for each component of a logit. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.colors import ListedColormap, to_rgb
from matplotlib.figure import Figure

from ..arguments import check_arguments
from ..errors import EmptySelection
from . import style
from .style import apply_style, check_columns, drawable, new_figure

WORD_SIZE = 7.5  # points, of a token of at most WORD_LETTERS letters
WORD_LETTERS = 11


@check_arguments
def lens_map(
    lens: pd.DataFrame,
    *,
    labels: Sequence[str] | None = None,
    value: str = "prob",
    row: int | None = None,
    title: str = "",
) -> Figure:
    """The top token of every layer at every position, coloured by its `value`.

    `lens` is the table of `logit_lens` for one row. `labels` are the texts of the positions, such
    as the prompt's tokens. The larger the value, the stronger the colour. The model's own
    prediction is the uppermost row.
    """
    check_columns(lens, ("row", "pos", "site", "token", "rank", value), "logit_lens(lm, prompts)")
    table: Any = lens if row is None else lens[lens["row"] == row]
    n_rows = table["row"].nunique()
    if n_rows != 1:
        raise EmptySelection(
            f"the table has {n_rows} rows to draw, and a lens map is of one: say row="
        )
    sites, positions = list(dict.fromkeys(table["site"])), sorted(set(table["pos"]))
    top = table.sort_values(["rank", "token_id"]).drop_duplicates(["pos", "site"])
    numbers = top.pivot(index="site", columns="pos", values=value).loc[sites, positions]
    numbers = np.abs(numbers.to_numpy(float))
    words = top.pivot(index="site", columns="pos", values="token").loc[sites, positions]
    figure, axes = new_figure(1.6 + 0.95 * len(positions), 1.3 + 0.24 * len(sites))
    text_style: dict[str, Any] = {"ha": "center", "va": "center", "color": style.INK}
    for (y, x), token in np.ndenumerate(words.to_numpy()):
        word = drawable(str(token))
        size = WORD_SIZE
        if len(word) > WORD_LETTERS:
            size = max(WORD_SIZE * WORD_LETTERS / len(word), 4.0)
        axes.text(x + 0.5, y + 0.45, word, fontsize=size, **text_style)
    largest = 1.0
    if value != "prob":
        largest = float(np.nanmax(numbers)) or 1.0
    opacities = 0.75 * np.linspace(0, 1, style.SHADES)
    shades = ListedColormap([(*to_rgb(style.UP), opacity) for opacity in opacities])
    style.draw_cells(axes, numbers, shades, 0, high=largest, lw=0.4)
    names, axis_label = map(str, positions), "position"
    if labels is not None:
        names, axis_label = [drawable(str(labels[pos])) for pos in positions], "after reading"
    rotation: dict[str, Any] = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(np.arange(len(positions)) + 0.5, list(names), **rotation)
    axes.set_yticks(np.arange(len(sites)) + 0.5, sites)
    axes.set_xlabel(axis_label)
    apply_style(figure, title)
    style.add_colour_bar(figure, shades, (0, largest), value, fraction=0.03, pad=0.01)
    return figure


@check_arguments
def logit_bars(
    parts: pd.DataFrame, *, top: int = 20, row: int | None = None, title: str = ""
) -> Figure:
    """The components that add most to a logit, or take most from it, as bars.

    `parts` is the table of `direct_logits` for one row and position. The other components are
    summed in one bar. The bars sum to the logit, which is the last bar.
    """
    check_columns(parts, ("row", "pos", "component", "logit"), "direct_logits(run, token)")
    table: Any = parts if row is None else parts[parts["row"] == row]
    if len(table[["row", "pos"]].drop_duplicates()) != 1:
        raise EmptySelection(
            "the table has several rows and positions, and these bars are of one: say row=, and "
            "one pos"
        )
    order = table["logit"].abs().sort_values(ascending=False, kind="stable").index
    largest = table.loc[order[:top]].sort_values("logit", ascending=False, kind="stable")
    smaller = table.loc[order[top:]]
    names = list(map(drawable, largest["component"]))
    values = largest["logit"].tolist()
    if len(smaller):
        names.append(f"the other {len(smaller)}")
        values.append(float(smaller["logit"].sum()))
    names.append("all together")
    values.append(float(table["logit"].sum()))
    figure, axes = new_figure(7, 0.24 * len(values) + 1.2)
    style.draw_signed_bars(axes, names, values)
    axes.margins(x=0.14)
    axes.set_xlabel("what it adds to the logit")
    return apply_style(figure, title)
