"""Figures of a generation, step by step: what each token was chosen from, and how watched tokens fared.

    run = hk.generate(lm, prompt, hk.ban(" coffee"), trace=hk.trace(watch=" tea"), max_new_tokens=10)
    hk.decision_strip(hk.decoding(run)).savefig("strip.png")

Every figure is about one row of `decoding(run)`, the table with every step's candidates at each stage.
"""

from dataclasses import dataclass
from math import ceil, floor, inf
from textwrap import wrap
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from matplotlib.textpath import text_to_path
from matplotlib.ticker import MaxNLocator

from .arguments import checks_arguments
from .errors import BadHook, NotCaptured, OutOfRange, did_you_mean
from .figures import GRID, INK, MARK, MUTED, UP, finished, plain, readable

STAGES = {"model": "before logit edits", "edited": "after logit edits", "processed": "after the decoding rules"}
COLUMNS = ("row", "step", "stage", "token", "token_id", "logit", "logprob", "prob", "rank", "drawn", "why")
COLOURS = {
    "surprisal": (MARK, "surprisal of the chosen token (nats)"),
    "margin": (UP, "margin: largest logit minus the second (logits)"),
}
CANDIDATES = 5  # written under a step at most
CELL, BAND, STRONGEST = (0.84, 1.4), 10.8, 0.62  # a cell's and a line's width in inches; a cell's greatest opacity


@dataclass(frozen=True)
class _Cell:
    """One step of the strip."""

    step: int
    token: str
    value: float  # surprisal or margin; inf where nothing else was left
    candidates: list[dict[Any, Any]]


@checks_arguments
def decision_strip(
    decoding_table: pd.DataFrame, *, row: int = 0, stage: str = "processed", colour: str = "surprisal", title: str = ""
) -> Figure:
    """The steps from left to right, each a cell with its chosen token, and below it what it was chosen from.

    `decoding_table` is `decoding(run)`; up to five of the recorded top tokens are written, and the chosen one in any
    case, marked. `colour` is "surprisal" (-log of the chosen token's probability at `stage`, in nats) or "margin" (the
    largest logit at `stage` minus the second). Long strips go on in the next line. A token that is a part of a
    character has its id behind it.

    Raises `BadHook` for another table, stage or colour, `OutOfRange` for a row that is not in the table, and
    `NotCaptured` for margins of a trace with top=1.
    """
    if colour not in COLOURS:
        raise BadHook(f"colour={colour!r} is not one of {', '.join(COLOURS)}{did_you_mean(colour, COLOURS)}")
    cells = _cells(of_row(decoding_table, row, stage), colour)
    width = _cell_width(cells)
    lines = ceil(len(cells) / floor(BAND / width))
    per_line = ceil(len(cells) / lines)
    rows = max(len(cell.candidates) for cell in cells)
    pitch = 0.46 + 0.135 * rows + 0.2
    caption = (
        f"In a cell: the step, the {colour}, the chosen token. Below: the most likely tokens with their probabilities "
        f"{STAGES[stage]}; ▸ is the chosen one."
    )
    span = max(per_line * width + 0.2, 6.5)  # the least that a title and the caption need
    written = wrap(caption, int(span / 0.062))
    figure = Figure(figsize=(span, 0.42 + lines * pitch + 0.6 + 0.15 * len(written)))
    axes = sheet(figure)
    top = max([cell.value for cell in cells if cell.value < inf] + [1.0])  # a text of sure tokens stays pale
    for place, cell in enumerate(cells):
        corner = (0.1 + place % per_line * width, 0.42 + place // per_line * pitch)
        _draw_cell(axes, cell, corner, width - 0.05, min(cell.value / top, 1.0), COLOURS[colour][0])
    axes.text(0.1, figure.get_figheight() - 0.08, "\n".join(written), fontsize=7.5, color=MUTED, va="bottom")
    finished(figure, title or f"What each token was chosen from, {STAGES[stage]}")
    colour_bar(figure, 0.42 + lines * pitch, top, *COLOURS[colour])
    return figure


def _cells(table: pd.DataFrame, colour: str) -> list[_Cell]:
    cells = []
    for step, part in table.groupby("step"):
        ordered = part.sort_values(["logit", "token_id"], ascending=[False, True])
        tokens = [token | {"token": name_of(token)} for token in ordered.to_dict("records")]
        (chosen,) = (token for token in tokens if token["drawn"])
        leading = [token for token in tokens if has(token["why"], "top") and np.isfinite(token["logit"])][:CANDIDATES]
        value = -float(chosen["logprob"]) if colour == "surprisal" else _margin(ordered)
        shown = leading if chosen in leading else [*leading, chosen]
        cells.append(_Cell(int(str(step)), chosen["token"], abs(value), shown))  # abs: -0.0 is written 0.00
    return cells


def _margin(ordered: pd.DataFrame) -> float:
    """The largest logit minus the second, if the table has both."""
    if sum(has(why, "top") for why in ordered["why"]) < 2:
        raise NotCaptured("a margin needs the two first tokens of each step: record them with trace(top=2) or more")
    first, second = ordered["logit"].to_numpy(float)[:2]
    return first - second


def _cell_width(cells: list[_Cell]) -> float:
    """Inches that the longest token needs, within reason."""
    chosen = max(width_of(readable(cell.token), 9.5) for cell in cells) + 0.16
    below = max(width_of(readable(token["token"]), 7) for cell in cells for token in cell.candidates) + 0.52
    return float(np.clip(max(chosen, below), *CELL))


def sheet(figure: Figure) -> Axes:
    """Axes over the whole figure whose unit is the inch, counted from the top left corner, without a frame."""
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, figure.get_figwidth())
    axes.set_ylim(figure.get_figheight(), 0)
    axes.set_axis_off()
    return axes


def _draw_cell(axes: Axes, cell: _Cell, corner: tuple[float, float], width: float, share: float, colour: str) -> None:
    """A coloured cell with its token, and its candidates below. Opacity says the value, so that any paper will do."""
    x, y = corner
    axes.add_patch(Rectangle(corner, width, 0.42, facecolor=(*to_rgb(colour), STRONGEST * share), edgecolor="none"))
    axes.add_patch(Rectangle(corner, width, 0.42, facecolor="none", edgecolor=GRID, lw=0.8))
    small = {"fontsize": 6.5, "color": INK, "va": "center"}
    axes.text(x + 0.04, y + 0.085, f"{cell.step}", **small)
    axes.text(x + width - 0.04, y + 0.085, f"{cell.value:.2f}" if cell.value < inf else "∞", ha="right", **small)
    name, size = fitted(cell.token, width - 0.1, 9.5)
    axes.text(x + width / 2, y + 0.27, name, fontsize=size, color=INK, ha="center", va="center")
    for place, token in enumerate(cell.candidates):
        height, ink = y + 0.52 + 0.135 * place, INK if token["drawn"] else MUTED
        name, size = fitted(token["token"], width - 0.47, 7)
        if token["drawn"]:
            axes.text(x, height, "▸", fontsize=7, color=colour, va="center")
        axes.text(x + 0.09, height, name, fontsize=size, color=ink, va="center")
        axes.text(x + width - 0.04, height, written_prob(token["prob"]), fontsize=7, color=ink, ha="right", va="center")


def written_prob(prob: float) -> str:
    """A probability in at most five characters, and never rounded to 0 or 1."""
    if prob in (0, 1):
        return f"{prob:.0f}"
    return "<0.01" if prob < 0.01 else ">0.99" if prob > 0.99 else f"{prob:.2f}"


def colour_bar(figure: Figure, below: float, top: float, colour: str, label: str) -> None:
    """What the opacities mean, `below` inches under the top edge."""
    width, height = figure.get_size_inches()
    axes = figure.add_axes((0.2 / width, 1 - (below + 0.11) / height, 2.6 / width, 0.11 / height))
    shades = np.zeros((1, 128, 4))
    shades[..., :3], shades[..., 3] = to_rgb(colour), np.linspace(0, STRONGEST, 128)
    axes.imshow(shades, extent=(0, top, 0, 1), aspect="auto")
    axes.set_facecolor("none")
    axes.set_yticks([])
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.tick_params(colors=MUTED, labelcolor=INK, labelsize=7.5, length=2, pad=2)
    axes.set_xlabel(label, fontsize=8, color=INK, labelpad=1)
    for spine in axes.spines.values():
        spine.set_color(GRID)


def of_row(table: pd.DataFrame, row: int, stage: str) -> pd.DataFrame:
    """One row of the batch at one stage, in the order of the steps, with one chosen token in each."""
    missing = [column for column in COLUMNS if column not in table]
    if missing:
        raise BadHook(
            f"this figure is drawn from decoding(run), and this table has no column {', '.join(map(repr, missing))}: "
            f"it has {', '.join(map(str, table.columns))}"
        )
    if stage not in STAGES:
        raise BadHook(f"stage={stage!r} is not one of {', '.join(STAGES)}{did_you_mean(str(stage), STAGES)}")
    rows = sorted({int(each) for each in table["row"]})
    if row not in rows:
        raise OutOfRange(f"row {row} is not in the table, which has {_listed(rows, 'row')}")
    found = pd.DataFrame(table[(table["row"] == row) & (table["stage"] == stage)]).sort_values("step", kind="stable")
    chosen = found["step"].to_numpy()[found["drawn"].to_numpy(bool)].tolist()
    if (
        not chosen
        or chosen != sorted(set(found["step"]))
        or len(found[["step", "token_id"]].drop_duplicates()) < len(found)
    ):
        raise BadHook(
            "this figure is drawn from decoding(run) of one run, with the chosen token of every step, and of row "
            f"{row} at the stage {stage!r} this table has none, or several: give it unfiltered, and one run at a time"
        )
    return found


def name_of(token: dict[Any, Any]) -> str:
    """A token as it stands in the table, and with its id if it is a part of a character, which all look alike."""
    return f"{token['token']} {token['token_id']}" if "\ufffd" in token["token"] else token["token"]


def has(why: str, reason: str) -> bool:
    """Whether this is one of the reasons for which a token is in the table."""
    return reason in why.split(", ")


def _listed(numbers: list[int], noun: str) -> str:
    return (
        f"{noun}s {', '.join(map(str, numbers))}" if len(numbers) > 1 else f"{noun} {numbers[0]}" if numbers else "none"
    )


def width_of(text: str, size: float) -> float:
    """Inches that a text takes."""
    return text_to_path.get_text_width_height_descent(plain(text), FontProperties(size=size), False)[0] * 1.04 / 72


def fitted(token: str, room: float, size: float) -> tuple[str, float]:
    """A token's text, and the type size at which it fits: a little smaller if that is enough, or its middle cut."""
    word = readable(token)
    size *= float(np.clip(room / width_of(word, size), 0.8, 1.0))
    return plain(cut(word, room, size)), size


def cut(word: str, room: float, size: float) -> str:
    """The word, or its two ends with … between, as long as fits into `room` inches."""
    short, kept = word, len(word) - 1
    while width_of(short, size) > room * 1.001 and kept > 3:
        short = f"{word[: ceil(kept / 2)]}…{word[-(kept // 2) :]}"
        kept -= 1
    return short
