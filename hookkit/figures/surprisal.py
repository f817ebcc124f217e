"""A figure of a text: each token with what it cost the model, so that one sees where a passage surprises.

run = hk.forward(lm, "We love deep learning")
hk.surprisal_strip(hk.surprisal(run)).savefig("passage.png")
"""

import pandas as pd
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ..arguments import checks_arguments
from ..errors import BadHook, OutOfRange
from .decoding import BAND, STRONGEST, colour_bar, fitted, name_of, sheet, width_of
from .ranks import GRID, INK, MARK, MUTED, finished

MOST = 600  # tokens that can be drawn to be read
LINE, HIGH = 0.55, 0.42  # inches from line to line, and of a cell
ROOM = (0.42, 2.2)  # inches that a cell may have
CAPTION = "In a cell: the token, at the left its loss, at the right its rank among all tokens that could have come."


@checks_arguments
def surprisal_strip(table: pd.DataFrame, *, row: int = 0, title: str = "") -> Figure:
    """The tokens of a text in their order, the deeper in colour the more they surprised; in a cell loss and rank.

    `table` is `surprisal(run)` or `score(lm, texts)`. Losses are in nats. A token that is a part of a character has its
    id behind it. Raises `OutOfRange` for a row that is not there, or one of more than 600 tokens.
    """
    cells = _of_row(table, row)
    placed, lines = _flowed(cells)
    finite = [cell["loss"] for cell in cells if cell["loss"] < float("inf")]
    top = max([*finite, 1e-3])
    span = max(
        6.5, max(x + wide for x, _, wide in placed) + 0.1
    )  # the least that a title and the caption need
    figure = Figure(figsize=(span, 0.42 + lines * LINE + 0.8))
    axes = sheet(figure)
    small = {"fontsize": 6.5, "va": "center"}
    for cell, (x, line, wide) in zip(cells, placed, strict=True):
        y = 0.42 + line * LINE
        shade = (*to_rgb(MARK), STRONGEST * min(1.0, cell["loss"] / top))
        axes.add_patch(Rectangle((x, y), wide, HIGH, facecolor=shade, edgecolor="none"))
        axes.add_patch(Rectangle((x, y), wide, HIGH, facecolor="none", edgecolor=GRID, lw=0.8))
        name, size = fitted(cell["token"], wide - 0.08, 9)
        axes.text(x + wide / 2, y + 0.14, name, fontsize=size, color=INK, ha="center", va="center")
        axes.text(
            x + 0.04,
            y + 0.32,
            f"{cell['loss']:.1f}" if cell["loss"] < float("inf") else "∞",
            color=INK,
            **small,
        )
        axes.text(x + wide - 0.04, y + 0.32, f"{cell['rank']:,}", color=MUTED, ha="right", **small)
    axes.text(0.1, figure.get_figheight() - 0.08, CAPTION, fontsize=7.5, color=MUTED, va="bottom")
    finished(figure, title or "What each token cost the model")
    colour_bar(figure, 0.42 + lines * LINE, top, MARK, "loss of the token (nats)")
    return figure


def _of_row(table: pd.DataFrame, row: int) -> list[dict]:
    missing = [
        column
        for column in ("row", "pos", "token", "token_id", "loss", "rank")
        if column not in table
    ]
    if missing:
        raise BadHook(
            f"this figure is drawn from surprisal(run), and this table has no column {', '.join(map(repr, missing))}: "
            f"it has {', '.join(map(str, table.columns))}"
        )
    found = pd.DataFrame(table[table["row"] == row]).sort_values("pos", kind="stable")
    if found.empty:
        raise OutOfRange(
            f"row {row} is not in the table, which has rows {sorted(set(table['row'].tolist()))}"
        )
    if len(found) > MOST:
        raise OutOfRange(
            f"row {row} has {len(found):,} tokens, and {MOST} can be read: draw a part, table[table.pos < 300]"
        )
    return [cell | {"token": name_of(cell)} for cell in found.to_dict("records")]


def _flowed(cells: list[dict]) -> tuple[list[tuple[float, int, float]], int]:
    """Where each cell goes, as its left edge, its line and its width in inches; and how many lines there are."""
    placed, x, line = [], 0.1, 0
    for cell in cells:
        numbers = 0.055 * (len(f"{cell['loss']:.1f}") + len(f"{cell['rank']:,}")) + 0.16
        wide = min(ROOM[1], max(ROOM[0], width_of(cell["token"], 9) + 0.12, numbers))
        if x + wide > BAND and x > 0.1:
            x, line = 0.1, line + 1
        placed.append((x, line, wide))
        x += wide
    return placed, line + 1
