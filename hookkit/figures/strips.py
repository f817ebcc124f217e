"""Figures of a text as a strip of cells, one for each token, from left to right and line by line.

    run = hk.generate(lm, prompt, hk.ban(" coffee"), trace=hk.trace(watch=" tea"))
    hk.figures.decision_strip(hk.candidates(run)).savefig("strip.png")
    hk.figures.surprisal_strip(hk.surprisal(hk.forward(lm, text))).savefig("passage.png")

`decision_strip` shows what each generated token was chosen from, `surprisal_strip` how much each
token of a text surprised the model. Every figure is about one row.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor
from textwrap import wrap
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from ..arguments import check_arguments, check_choice
from ..errors import NotCaptured, OutOfRange
from . import style
from .decoding import STAGES, has_reason, select_row, token_name
from .style import GRID, INK, MARK, MUTED, UP

COLOURS = {
    "surprisal": (MARK, "surprisal of the chosen token (nats)"),
    "margin": (UP, "margin: largest logit minus the second (logits)"),
}
CANDIDATES = 5  # written under a step at most
CELL_WIDTHS = (0.84, 1.4)  # inches, smallest and largest
CELL_HEIGHT = 0.42  # inches
LINE_WIDTH = 10.8  # inches of the cells of one line
LEAST_WIDTH = 6.5  # inches, which the title and the caption need
TOP = 0.1  # inches above the first line
STRONGEST = 0.62  # the greatest opacity of a cell
SURPRISAL_COLUMNS = ("row", "pos", "token", "token_id", "loss", "rank")
MAX_TOKENS = 600  # tokens of a text that can be read in one figure
PITCH = 0.55  # inches from line to line of a text
TOKEN_WIDTHS = (0.42, 2.2)  # inches of a token's cell in a text, smallest and largest
SURPRISAL_CAPTION = (
    "In a cell: the token, at the left its loss, at the right its rank among all tokens that could "
    "have come."
)


@dataclass(frozen=True)
class _Cell:
    step: int
    token: str
    value: float  # surprisal or margin; inf where no other token was possible
    candidates: list[dict[Any, Any]]


@check_arguments
def decision_strip(
    decoding_table: pd.DataFrame,
    *,
    row: int = 0,
    stage: str = "processed",
    colour: str = "surprisal",
    title: str = "",
) -> Figure:
    """The steps from left to right: a cell with the chosen token, and its candidates below.

    `decoding_table` is `decoding(run)`. Up to five of the recorded top tokens are written, and
    always the chosen one, which is marked. `colour` is "surprisal" (-log of the chosen token's
    probability at `stage`, in nats) or "margin" (the largest logit at `stage` minus the second).
    Long strips continue in the next line. A token that is a part of a character is followed by its
    id.

    Raises `BadHook` for another table, stage or colour, `OutOfRange` for a row that is not in the
    table, and `NotCaptured` for margins of a trace with top=1.
    """
    check_choice(colour, "colour", COLOURS)
    table = select_row(decoding_table, row, stage)
    cells = [_build_cell(step, part, colour) for step, part in table.groupby("step")]
    width = _cell_width(cells)
    n_lines = ceil(len(cells) / floor(LINE_WIDTH / width))
    per_line = ceil(len(cells) / n_lines)
    pitch = 0.66 + 0.135 * max(len(cell.candidates) for cell in cells)  # inches from line to line
    caption = (
        f"In a cell: the step, the {colour}, the chosen token. Below: the most likely tokens with "
        f"their probabilities {STAGES[stage]}; ▸ is the chosen one."
    )
    span = max(per_line * width + 0.2, LEAST_WIDTH)
    caption_lines = wrap(caption, int(span / 0.062))
    bottom = TOP + n_lines * pitch
    figure, axes = style.new_sheet(span, bottom + 0.6 + 0.15 * len(caption_lines))
    # The largest value is at least 1, so that a text of sure tokens stays pale.
    largest = style.largest_finite(np.array([cell.value for cell in cells]), 1.0)
    for number, cell in enumerate(cells):
        line, column = divmod(number, per_line)
        corner = (0.1 + column * width, TOP + line * pitch)
        share = min(cell.value / largest, 1.0)
        _draw_cell(axes, cell, corner, width - 0.05, share, COLOURS[colour][0])
    _draw_caption(axes, "\n".join(caption_lines))
    _draw_opacity_bar(figure, bottom, largest, *COLOURS[colour])
    title = title or f"What each token was chosen from, {STAGES[stage]}"
    return style.apply_style(figure, title, style.describe_prompt(decoding_table))


def _build_cell(step: Any, table: pd.DataFrame, colour: str) -> _Cell:
    """The cell of one step: its chosen token, and the first of its top tokens."""
    ordered: Any = table.sort_values(["logit", "token_id"], ascending=[False, True])
    ordered["token"] = ordered.apply(token_name, axis=1)
    is_top = ordered["why"].map(lambda why: has_reason(why, "top"))
    is_candidate = is_top & np.isfinite(ordered["logit"].to_numpy(float))
    choice: Any = ordered[ordered["drawn"].astype(bool)]
    candidates = pd.concat([ordered[is_candidate].head(CANDIDATES), choice])
    candidates = candidates.drop_duplicates("token_id").to_dict("records")
    value = -float(choice["logprob"].iloc[0])
    if colour == "margin":
        value = _margin(ordered[is_top])
    # abs, because -0.0 would be written as -0.00
    return _Cell(int(step), choice["token"].iloc[0], abs(value), candidates)


def _margin(top: pd.DataFrame) -> float:
    """The largest logit minus the second. Raises `NotCaptured` if the table lacks one of them."""
    if len(top) < 2:
        raise NotCaptured(
            "a margin needs the two first tokens of each step: record them with trace(top=2) or "
            "more"
        )
    largest, second = top["logit"].to_numpy(float)[:2]
    return largest - second


def _cell_width(cells: list[_Cell]) -> float:
    """The width in inches that the longest token needs, within CELL_WIDTHS."""
    widths = []
    for cell in cells:
        widths.append(style.text_width(style.escape_missing_glyphs(cell.token), 9.5) + 0.16)
        for token in cell.candidates:
            name = style.escape_missing_glyphs(token["token"])
            widths.append(style.text_width(name, 7) + 0.52)
    return float(np.clip(max(widths), *CELL_WIDTHS))


def _draw_cell(
    axes: Axes, cell: _Cell, corner: tuple[float, float], width: float, share: float, colour: str
) -> None:
    x, y = corner
    _draw_box(axes, corner, width, colour, share)
    small = {"fontsize": 6.5, "color": INK, "va": "center"}
    axes.text(x + 0.04, y + 0.085, f"{cell.step}", **small)
    value = style.format_number(cell.value, ".2f").removeprefix("+")
    axes.text(x + width - 0.04, y + 0.085, value, ha="right", **small)
    name, size = style.fit_text(cell.token, width - 0.1, 9.5)
    style.write_centred(axes, (x + width / 2, y + 0.27), name, size)
    for number, token in enumerate(cell.candidates):
        text_y = y + 0.52 + 0.135 * number
        text_style: dict[str, Any] = {"color": MUTED, "va": "center"}
        if token["drawn"]:
            text_style["color"] = INK
            axes.text(x, text_y, "▸", fontsize=7, color=colour, va="center")
        name, size = style.fit_text(token["token"], width - 0.47, 7)
        axes.text(x + 0.09, text_y, name, fontsize=size, **text_style)
        prob = _format_prob(token["prob"])
        axes.text(x + width - 0.04, text_y, prob, fontsize=7, ha="right", **text_style)


def _format_prob(prob: float) -> str:
    """A probability in at most five characters, never rounded to 0 or 1."""
    if prob in (0, 1):
        return f"{prob:.0f}"
    if prob < 0.01:
        return "<0.01"
    if prob > 0.99:
        return ">0.99"
    return f"{prob:.2f}"


@check_arguments
def surprisal_strip(table: pd.DataFrame, *, row: int = 0, title: str = "") -> Figure:
    """The tokens of a text in order, each in a cell with its loss and rank.

    The larger the loss, the stronger the colour. `table` is `surprisal(run)` or `score(lm, texts)`.
    Losses are in nats. A token that is a part of a character is followed by its id. Raises
    `OutOfRange` for a row that does not exist, or that has more than 600 tokens.
    """
    style.check_columns(table, SURPRISAL_COLUMNS, "surprisal(run)")
    part = style.select_row(table, row).sort_values("pos", kind="stable")
    if len(part) > MAX_TOKENS:
        raise OutOfRange(
            f"row {row} has {len(part):,} tokens, and {MAX_TOKENS} can be read: draw a part, "
            "table[table.pos < 300]"
        )
    cells = part.assign(token=part.apply(token_name, axis=1)).to_dict("records")
    boxes, n_lines = _place_cells(cells)
    largest = style.largest_finite(part["loss"].to_numpy(float), 1e-3)
    span = max(LEAST_WIDTH, max(x + width for x, _, width in boxes) + 0.1)
    bottom = TOP + n_lines * PITCH
    figure, axes = style.new_sheet(span, bottom + 0.8)
    small: dict[str, Any] = {"fontsize": 6.5, "va": "center"}
    for cell, (x, line, width) in zip(cells, boxes, strict=True):
        y = TOP + line * PITCH
        _draw_box(axes, (x, y), width, MARK, min(1.0, cell["loss"] / largest))
        name, size = style.fit_text(cell["token"], width - 0.08, 9)
        style.write_centred(axes, (x + width / 2, y + 0.14), name, size)
        loss = style.format_number(cell["loss"], ".1f").removeprefix("+")
        axes.text(x + 0.04, y + 0.32, loss, color=INK, **small)
        rank = f"{cell['rank']:,}"
        axes.text(x + width - 0.04, y + 0.32, rank, color=MUTED, ha="right", **small)
    _draw_caption(axes, SURPRISAL_CAPTION)
    _draw_opacity_bar(figure, bottom, largest, MARK, "loss of the token (nats)")
    return style.apply_style(figure, title or "What each token cost the model")


def _place_cells(cells: list[dict]) -> tuple[list[tuple[float, int, float]], int]:
    """The left edge, the line and the width of each cell, and the number of lines. In inches."""
    boxes, x, line = [], 0.1, 0
    for cell in cells:
        n_digits = len(f"{cell['loss']:.1f}") + len(f"{cell['rank']:,}")
        name = style.escape_missing_glyphs(cell["token"])
        width = max(style.text_width(name, 9) + 0.12, 0.055 * n_digits + 0.16)
        width = min(TOKEN_WIDTHS[1], max(TOKEN_WIDTHS[0], width))
        if x + width > LINE_WIDTH and x > 0.1:
            x, line = 0.1, line + 1
        boxes.append((x, line, width))
        x += width
    return boxes, line + 1


def _draw_box(
    axes: Axes, corner: tuple[float, float], width: float, colour: str, share: float
) -> None:
    """Draw a framed cell with a colour of this opacity, which suits paper of any colour."""
    fill = (*to_rgb(colour), STRONGEST * share)
    axes.add_patch(Rectangle(corner, width, CELL_HEIGHT, facecolor=fill, edgecolor="none"))
    frame = {"facecolor": "none", "edgecolor": GRID, "lw": 0.8}
    axes.add_patch(Rectangle(corner, width, CELL_HEIGHT, **frame))


def _draw_caption(axes: Axes, text: str) -> None:
    bottom, _ = axes.get_ylim()
    axes.text(0.1, bottom - 0.08, text, fontsize=7.5, color=MUTED, va="bottom")


def _draw_opacity_bar(
    figure: Figure, offset: float, largest: float, colour: str, label: str
) -> None:
    """Draw the scale of the opacities, `offset` inches under the top edge."""
    width, height = figure.get_size_inches()
    axes = figure.add_axes((0.2 / width, 1 - (offset + 0.11) / height, 2.6 / width, 0.11 / height))
    shades = np.zeros((1, 128, 4))
    shades[..., :3], shades[..., 3] = to_rgb(colour), np.linspace(0, STRONGEST, 128)
    axes.imshow(shades, extent=(0, largest, 0, 1), aspect="auto")
    axes.set_facecolor("none")
    axes.set_yticks([])
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.tick_params(colors=MUTED, labelcolor=INK, labelsize=7.5, length=2, pad=2)
    axes.set_xlabel(label, fontsize=8, color=INK, labelpad=1)
    for spine in axes.spines.values():
        spine.set_color(GRID)
