"""A figure of a text that shows how much each token surprised the model.

run = hk.forward(lm, "We love deep learning")
hk.figures.surprisal_strip(hk.surprisal(run)).savefig("passage.png")
"""

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from ..arguments import check_arguments
from ..errors import OutOfRange
from .decoding import (
    LINE_WIDTH,
    add_sheet,
    draw_box,
    draw_caption,
    draw_opacity_bar,
    format_number,
    token_name,
)
from .style import INK, MARK, MUTED, apply_style, check_columns, fit_text, text_width

COLUMNS = ("row", "pos", "token", "token_id", "loss", "rank")
MOST_TOKENS = 600  # tokens of a text that can be read in one figure
PITCH = 0.55  # inches from line to line
CELL_WIDTHS = (0.42, 2.2)  # inches, smallest and largest
CAPTION = (
    "In a cell: the token, at the left its loss, at the right its rank among all tokens that could "
    "have come."
)


@check_arguments
def surprisal_strip(table: pd.DataFrame, *, row: int = 0, title: str = "") -> Figure:
    """The tokens of a text in order, each in a cell with its loss and rank.

    The larger the loss, the stronger the colour. `table` is `surprisal(run)` or `score(lm, texts)`.
    Losses are in nats. A token that is a part of a character is followed by its id. Raises
    `OutOfRange` for a row that does not exist, or that has more than 600 tokens.
    """
    cells = _select_row(table, row)
    boxes, n_lines = _place_cells(cells)
    finite = [cell["loss"] for cell in cells if cell["loss"] < float("inf")]
    largest = max([*finite, 1e-3])
    # The title and the caption need at least 6.5 inches.
    span = max(6.5, max(x + width for x, _, width in boxes) + 0.1)
    figure = Figure(figsize=(span, 0.42 + n_lines * PITCH + 0.8))
    axes = add_sheet(figure)
    small: dict[str, Any] = {"fontsize": 6.5, "va": "center"}
    for cell, (x, line, width) in zip(cells, boxes, strict=True):
        y = 0.42 + line * PITCH
        draw_box(axes, (x, y), width, MARK, min(1.0, cell["loss"] / largest))
        name, size = fit_text(cell["token"], width - 0.08, 9)
        axes.text(x + width / 2, y + 0.14, name, fontsize=size, color=INK, ha="center", va="center")
        axes.text(x + 0.04, y + 0.32, format_number(cell["loss"], 1), color=INK, **small)
        rank = f"{cell['rank']:,}"
        axes.text(x + width - 0.04, y + 0.32, rank, color=MUTED, ha="right", **small)
    draw_caption(axes, CAPTION)
    apply_style(figure, title or "What each token cost the model")
    draw_opacity_bar(figure, 0.42 + n_lines * PITCH, largest, MARK, "loss of the token (nats)")
    return figure


def _select_row(table: pd.DataFrame, row: int) -> list[dict]:
    check_columns(table, COLUMNS, "surprisal(run)")
    part = pd.DataFrame(table[table["row"] == row]).sort_values("pos", kind="stable")
    if part.empty:
        rows = sorted(set(table["row"].tolist()))
        raise OutOfRange(f"row {row} is not in the table, which has rows {rows}")
    if len(part) > MOST_TOKENS:
        raise OutOfRange(
            f"row {row} has {len(part):,} tokens, and {MOST_TOKENS} can be read: draw a part, "
            "table[table.pos < 300]"
        )
    return [cell | {"token": token_name(cell)} for cell in part.to_dict("records")]


def _place_cells(cells: list[dict]) -> tuple[list[tuple[float, int, float]], int]:
    """The left edge, the line and the width of each cell, and the number of lines. In inches."""
    boxes, x, line = [], 0.1, 0
    for cell in cells:
        n_digits = len(f"{cell['loss']:.1f}") + len(f"{cell['rank']:,}")
        width = max(text_width(cell["token"], 9) + 0.12, 0.055 * n_digits + 0.16)
        width = min(CELL_WIDTHS[1], max(CELL_WIDTHS[0], width))
        if x + width > LINE_WIDTH and x > 0.1:
            x, line = 0.1, line + 1
        boxes.append((x, line, width))
        x += width
    return boxes, line + 1
