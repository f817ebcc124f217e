"""Figures of what is inside a model: what each layer would say, what components add to a logit,
and where heads attend.

    hk.figures.lens_map(hk.logit_lens(lm, prompt, pos=None, top=1), labels=tokens)
    hk.figures.logit_bars(hk.direct_logits(run, " coffee"))
    hk.figures.attention_view(hk.forward(lm, prompt, hk.capture("pattern.5")), 5)

`lens_map` is layer x position. `logit_bars` has a bar for each component of a logit.
`attention_view` is drawn by circuitsvis, for a notebook. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..arguments import check_arguments
from ..errors import EmptySelection, MissingExtra, NotCaptured, OutOfRange
from . import style
from .style import apply_style, check_columns, new_figure

if TYPE_CHECKING:
    from ..runs.run import Run

WORD_SIZES = (6.5, 7.5)  # points of a token in a cell, smallest and largest
CELL_WIDTH, CELL_HEIGHT = 0.95, 0.24  # inches of a cell with a token
MAX_WORDS = 40  # positions with a token in each cell; of more there are the colours alone
NARROW_CELL = 0.12  # inches of a cell without a token


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

    `lens` is the table of `logit_lens` for one row. `labels` are the texts of the positions, by
    default the prompt's tokens. The larger the value, the stronger the colour. The model's own
    prediction is the uppermost row. Of more than 40 positions the cells have no tokens.
    """
    check_columns(lens, ("row", "pos", "site", "token", "rank", value), "logit_lens(lm, prompts)")
    table = _select_row(lens, row)
    n_rows = table["row"].nunique()
    if n_rows != 1:
        raise EmptySelection(
            f"the table has {n_rows} rows to draw, and a lens map is of one: say row="
        )
    sites, positions = list(dict.fromkeys(table["site"])), sorted(set(table["pos"]))
    top = table.sort_values(["rank", "token_id"]).drop_duplicates(["pos", "site"])
    numbers: Any = top.pivot(index="site", columns="pos", values=value).loc[sites, positions]
    numbers = numbers.to_numpy(float)
    tokens = top.pivot(index="site", columns="pos", values="token").loc[sites, positions]
    has_words = len(positions) <= MAX_WORDS
    cell_width = (NARROW_CELL, CELL_WIDTH)[has_words]
    width, height = cell_width * len(positions), CELL_HEIGHT * len(sites)
    figure, axes = new_figure(1.8 + max(3.0, width), 1.6 + max(1.0, height))
    shades, limits = style.choose_colours(numbers)
    if value == "prob":
        limits = (0.0, 1.0)
    if has_words:
        _write_tokens(axes, tokens)
    frame = {"lw": 0.4} if has_words else {"lw": 0.0}
    style.draw_cells(axes, numbers, shades, limits[0], high=limits[1], **frame)
    _label_positions(axes, positions, labels or style.tokens_of(table), width)
    axes.set_yticks(np.arange(len(sites)) + 0.5, sites)
    axes.set_ylabel("site that the lens reads")
    default = f"The top token that each layer predicts, and its {style.describe_column(value)}"
    apply_style(figure, title or default, style.describe_prompt(table))
    label = style.describe_column(value)
    style.add_colour_bar(figure, shades, limits, label, fraction=0.03, pad=0.01)
    return figure


def _select_row(table: pd.DataFrame, row: int | None) -> Any:
    return table if row is None else style.select_row(table, row)


def _label_positions(axes: Axes, positions: list[int], labels: Sequence[str], width: float) -> None:
    """Label the columns with the tokens and positions, as many as there is room for."""
    names = list(map(str, positions))
    axes.set_xlabel("position")
    if labels:
        axes.set_xlabel("token and position (the prediction is for the token after it)")
        for index, position in enumerate(positions):
            names[index] = f"{style.short_label(str(labels[position]), 1.2)}  {position}"
    stride = style.label_stride(len(names), width, 0.19)
    rotation: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(np.arange(len(names))[::stride] + 0.5, names[::stride], **rotation)


def _write_tokens(axes: Axes, tokens: pd.DataFrame) -> None:
    """Write a token into each cell, shortened where it is too long."""
    for (y, x), token in np.ndenumerate(tokens.to_numpy()):
        if not pd.isna(token):
            name = style.token_label(token)
            word, size = style.fit_text(name, 0.92 * CELL_WIDTH, WORD_SIZES[1])
            style.write_centred(axes, (x + 0.5, y + 0.45), word, size)


@check_arguments
def logit_bars(
    parts: pd.DataFrame, *, top: int = 20, row: int | None = None, title: str = ""
) -> Figure:
    """The components that add most to a logit, or take most from it, as bars.

    `parts` is the table of `direct_logits` for one row and position. The other components are
    summed in one bar. The bars sum to the logit, which is the last bar, hollow and dashed.
    """
    check_columns(parts, ("row", "pos", "component", "logit"), "direct_logits(run, token)")
    table = _select_row(parts, row)
    if len(table[["row", "pos"]].drop_duplicates()) != 1:
        raise EmptySelection(
            "the table has several rows and positions, and these bars are of one: say row=, and "
            "one pos"
        )
    order = table["logit"].abs().sort_values(ascending=False, kind="stable").index
    largest = table.loc[order[:top]].sort_values("logit", ascending=False, kind="stable")
    smaller = table.loc[order[top:]]
    names = list(map(str, largest["component"]))
    values = largest["logit"].tolist()
    if len(smaller):
        names.append(f"the other {len(smaller)}")
        values.append(float(smaller["logit"].sum()))
    names.append("sum of all")
    values.append(float(table["logit"].sum()))
    figure, axes = new_figure(7, 0.24 * len(values) + 0.7)
    style.draw_signed_bars(axes, names, values, width=7)
    what = _describe_logit(table)
    axes.set_xlabel("what the component adds (logits)")
    return apply_style(figure, title or f"What makes {what}", style.describe_prompt(table))


def _describe_logit(table: pd.DataFrame) -> str:
    """The logit, or the difference of two, that the components of a table sum to."""
    token, against = table.attrs.get("token"), table.attrs.get("against")
    if not token:
        return "the logit"
    if against:
        return f"the logit of {token} minus that of {against}"
    return f"the logit of {token}"


@dataclass(frozen=True, repr=False)
class AttentionView:
    """A drawing that a notebook shows. `html` is the same drawing, for a page of your own."""

    html: str
    title: str

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return f"AttentionView({self.title}; show it in a notebook, or write its .html)"


@check_arguments
def attention_view(
    run: Run, layer: int, *, row: int = 0, heads: Collection[int] | None = None, cdn: bool = False
) -> AttentionView:
    """The attention patterns of a layer's heads for one prompt, drawn by circuitsvis.

    Needs `pip install circuitsvis`, and a run with the pattern, `hk.capture("pattern.5")`, at every
    position. Every view contains the script of circuitsvis (1.3 MB), so that no network is needed.
    With `cdn` the view is small, and the browser loads the script from unpkg.com each time. A
    notebook has to be trusted to run either.

    Raises `MissingExtra` without circuitsvis, `NotCaptured` without the pattern, and `OutOfRange`
    for a row or head that does not exist.

    >>> run = hk.forward(lm, "I like oat milk in my", hk.capture("pattern.5"))  # doctest: +SKIP
    >>> attention_view(run, 5, heads=[0, 1])  # doctest: +SKIP
    AttentionView(pattern.5 of 'I like oat milk in my'; show it in a notebook, or write its .html)
    """
    captured = run.captured(f"pattern.{layer}")
    if row not in captured.rows:
        raise OutOfRange(f"row {row} was asked for, and the pattern has rows {list(captured.rows)}")
    index, length = captured.rows.index(row), run.lengths[row]
    pattern = captured.values[index].detach().float().cpu()
    assert captured.positions is not None
    positions = captured.positions[index]
    if positions[positions >= 0].tolist() != list(range(length)):
        raise NotCaptured(
            f"pattern.{layer} was captured at some positions only: capture it without pos="
        )
    every_head = range(len(pattern))
    selected = list(every_head if heads is None else heads)
    if missing := set(selected).difference(every_head):
        raise OutOfRange(
            f"head {min(missing)} of pattern.{layer} was asked for, and it has heads 0 to "
            f"{len(pattern) - 1}"
        )
    ids = run.tokens[row, :length].tolist()
    tokens = list(map(run.lm.string, ids))
    names = [f"{layer}.{head}" for head in selected]
    html = _draw_heads(pattern[selected, :length, :length], tokens, names, cdn)
    return AttentionView(html, f"pattern.{layer} of {run.lm.text(ids)!r}")


def _draw_heads(pattern: object, tokens: list[str], heads: list[str], cdn: bool) -> str:
    """The HTML of circuitsvis. It escapes no tokens: it gets placeholders in their place."""
    try:
        from circuitsvis.attention import attention_heads  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingExtra(
            f"attention_view needs circuitsvis, which cannot be imported ({error}): "
            "pip install 'hookkit[notebook]'"
        ) from error
    placeholders = [f"hookkit-token-{number}" for number in range(len(tokens))]
    view = attention_heads(attention=pattern, tokens=placeholders, attention_head_names=heads)
    html = view.cdn_src if cdn else view.local_src
    escapes = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})
    for placeholder, token in zip(placeholders, tokens, strict=True):
        html = html.replace(f'"{placeholder}"', json.dumps(token).translate(escapes))
    return html
