"""Figures of a generation, step by step: what each token was chosen from, and how watched tokens fared.

    run = hk.generate(lm, prompt, hk.ban(" coffee"), trace=hk.trace(watch=" tea"), max_new_tokens=10)
    hk.decision_strip(hk.decoding(run)).savefig("strip.png")

Every figure is about one row of `decoding(run)`, the table with every step's candidates at each stage.

Lines over the steps of a generation: how the ranks and probabilities of watched tokens went.

    table = hk.decoding(hk.generate(lm, prompt, hk.ban(" coffee"), trace=hk.trace(watch=" tea"), max_new_tokens=10))
    hk.rank_lines(table).savefig("ranks.png")

Every figure is about one row of `decoding(run)`, and the tokens that were chosen stand along its axis.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
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
from matplotlib.ticker import MaxNLocator, NullLocator

from ..arguments import checks_arguments
from ..errors import BadHook, NotCaptured, OutOfRange, did_you_mean
from .ranks import GRID, INK, MARK, MUTED, UP, finished, plain, rank_axis, readable, spread

STAGES = {
    "model": "before logit edits",
    "edited": "after logit edits",
    "processed": "after the decoding rules",
}
COLUMNS = (
    "row",
    "step",
    "stage",
    "token",
    "token_id",
    "logit",
    "logprob",
    "prob",
    "rank",
    "drawn",
    "why",
)
COLOURS = {
    "surprisal": (MARK, "surprisal of the chosen token (nats)"),
    "margin": (UP, "margin: largest logit minus the second (logits)"),
}
CANDIDATES = 5  # written under a step at most
CELL, BAND, STRONGEST = (
    (0.84, 1.4),
    10.8,
    0.62,
)  # a cell's and a line's width in inches; a cell's greatest opacity


@dataclass(frozen=True)
class _Cell:
    """One step of the strip."""

    step: int
    token: str
    value: float  # surprisal or margin; inf where nothing else was left
    candidates: list[dict[Any, Any]]


@checks_arguments
def decision_strip(
    decoding_table: pd.DataFrame,
    *,
    row: int = 0,
    stage: str = "processed",
    colour: str = "surprisal",
    title: str = "",
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
        raise BadHook(
            f"colour={colour!r} is not one of {', '.join(COLOURS)}{did_you_mean(colour, COLOURS)}"
        )
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
    top = max(
        [cell.value for cell in cells if cell.value < inf] + [1.0]
    )  # a text of sure tokens stays pale
    for place, cell in enumerate(cells):
        corner = (0.1 + place % per_line * width, 0.42 + place // per_line * pitch)
        _draw_cell(axes, cell, corner, width - 0.05, min(cell.value / top, 1.0), COLOURS[colour][0])
    axes.text(
        0.1,
        figure.get_figheight() - 0.08,
        "\n".join(written),
        fontsize=7.5,
        color=MUTED,
        va="bottom",
    )
    finished(figure, title or f"What each token was chosen from, {STAGES[stage]}")
    colour_bar(figure, 0.42 + lines * pitch, top, *COLOURS[colour])
    return figure


def _cells(table: pd.DataFrame, colour: str) -> list[_Cell]:
    cells = []
    for step, part in table.groupby("step"):
        ordered = part.sort_values(["logit", "token_id"], ascending=[False, True])
        tokens = [token | {"token": name_of(token)} for token in ordered.to_dict("records")]
        (chosen,) = (token for token in tokens if token["drawn"])
        leading = [
            token for token in tokens if has(token["why"], "top") and np.isfinite(token["logit"])
        ][:CANDIDATES]
        value = -float(chosen["logprob"]) if colour == "surprisal" else _margin(ordered)
        shown = leading if chosen in leading else [*leading, chosen]
        cells.append(
            _Cell(int(str(step)), chosen["token"], abs(value), shown)
        )  # abs: -0.0 is written 0.00
    return cells


def _margin(ordered: pd.DataFrame) -> float:
    """The largest logit minus the second, if the table has both."""
    if sum(has(why, "top") for why in ordered["why"]) < 2:
        raise NotCaptured(
            "a margin needs the two first tokens of each step: record them with trace(top=2) or more"
        )
    first, second = ordered["logit"].to_numpy(float)[:2]
    return first - second


def _cell_width(cells: list[_Cell]) -> float:
    """Inches that the longest token needs, within reason."""
    chosen = max(width_of(readable(cell.token), 9.5) for cell in cells) + 0.16
    below = (
        max(width_of(readable(token["token"]), 7) for cell in cells for token in cell.candidates)
        + 0.52
    )
    return float(np.clip(max(chosen, below), *CELL))


def sheet(figure: Figure) -> Axes:
    """Axes over the whole figure whose unit is the inch, counted from the top left corner, without a frame."""
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, figure.get_figwidth())
    axes.set_ylim(figure.get_figheight(), 0)
    axes.set_axis_off()
    return axes


def _draw_cell(
    axes: Axes, cell: _Cell, corner: tuple[float, float], width: float, share: float, colour: str
) -> None:
    """A coloured cell with its token, and its candidates below. Opacity says the value, so that any paper will do."""
    x, y = corner
    axes.add_patch(
        Rectangle(
            corner, width, 0.42, facecolor=(*to_rgb(colour), STRONGEST * share), edgecolor="none"
        )
    )
    axes.add_patch(Rectangle(corner, width, 0.42, facecolor="none", edgecolor=GRID, lw=0.8))
    small = {"fontsize": 6.5, "color": INK, "va": "center"}
    axes.text(x + 0.04, y + 0.085, f"{cell.step}", **small)
    axes.text(
        x + width - 0.04,
        y + 0.085,
        f"{cell.value:.2f}" if cell.value < inf else "∞",
        ha="right",
        **small,
    )
    name, size = fitted(cell.token, width - 0.1, 9.5)
    axes.text(x + width / 2, y + 0.27, name, fontsize=size, color=INK, ha="center", va="center")
    for place, token in enumerate(cell.candidates):
        height, ink = y + 0.52 + 0.135 * place, INK if token["drawn"] else MUTED
        name, size = fitted(token["token"], width - 0.47, 7)
        if token["drawn"]:
            axes.text(x, height, "▸", fontsize=7, color=colour, va="center")
        axes.text(x + 0.09, height, name, fontsize=size, color=ink, va="center")
        axes.text(
            x + width - 0.04,
            height,
            written_prob(token["prob"]),
            fontsize=7,
            color=ink,
            ha="right",
            va="center",
        )


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
        raise BadHook(
            f"stage={stage!r} is not one of {', '.join(STAGES)}{did_you_mean(str(stage), STAGES)}"
        )
    rows = sorted({int(each) for each in table["row"]})
    if row not in rows:
        raise OutOfRange(f"row {row} is not in the table, which has {_listed(rows, 'row')}")
    found = pd.DataFrame(table[(table["row"] == row) & (table["stage"] == stage)]).sort_values(
        "step", kind="stable"
    )
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
        f"{noun}s {', '.join(map(str, numbers))}"
        if len(numbers) > 1
        else f"{noun} {numbers[0]}"
        if numbers
        else "none"
    )


def width_of(text: str, size: float) -> float:
    """Inches that a text takes."""
    return (
        text_to_path.get_text_width_height_descent(plain(text), FontProperties(size=size), False)[0]
        * 1.04
        / 72
    )


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


LINES = (
    "#e0522d",
    "#4f78c8",
    "#1f9e89",
    "#a565c4",
    "#b07a1e",
    "#c2557f",
    "#7f8a2a",
    "#3a93b5",
)  # seen on either paper
MOST_LINES = 12  # that can be told apart


@checks_arguments
def rank_lines(
    decoding_table: pd.DataFrame,
    *,
    watch: "Iterable[str | int] | str | int" = (),
    row: int = 0,
    stage: str = "model",
    title: str = "",
) -> Figure:
    """The rank of each watched token at every step as a line, with 1 at the top and the chosen tokens along the axis.

    `decoding_table` is `decoding(run)`; `watch` is the watched tokens, as text or ids: where none is given, all that
    the trace watched and that hooks name. Where a token's logit is -inf, and its rank says nothing, there is a cross.

    Raises `BadHook` for another table or stage, or for more lines than can be told apart, `OutOfRange` for a row that
    is not in the table, and `NotCaptured` for a token that was not recorded at every step.
    """
    table = of_row(decoding_table, row, stage)
    found = [_of_token(table, token) for token in _watched(table, watch)]
    lines = [
        _line(part, "rank", place, f"{part['rank'].iloc[-1]:,}") for place, part in enumerate(found)
    ]
    figure = Figure(figsize=(_figure_width(len(lines[0].steps)), 4.6), layout="constrained")
    axes = figure.subplots()
    rank_axis(axes, 1.25 * max(10.0, *(line.values.max() for line in lines)))
    _draw_lines(axes, lines)
    _step_axis(axes, table, "step, and the token chosen there")
    return finished(figure, title or f"Ranks at each step, {STAGES[stage]}")


@checks_arguments
def prob_against(
    edited_table: pd.DataFrame,
    baseline_table: pd.DataFrame,
    *,
    token: str | int,
    row: int = 0,
    baseline_row: int | None = None,
    stage: str = "edited",
    scale: str = "log",
    title: str = "",
) -> Figure:
    """The probability of one token at every step of an edited run and of a baseline run, as two lines.

    Both tables are `decoding(run)`, of runs that watched `token` (text or id) or whose hooks name it. `baseline_row` is
    the baseline's row, the same as `row` if not given. `scale` is "log" or "linear"; on a log axis a probability of 0
    is a cross on a line of its own at the bottom. After a dotted line the two texts differ, and that alone moves the
    probabilities.

    Raises `BadHook` for another table, stage or scale, `OutOfRange` for a row that is not in its table, and
    `NotCaptured` for a token that was not recorded at every step.
    """
    if scale not in ("log", "linear"):
        raise BadHook(
            f"scale={scale!r} is not one of log, linear{did_you_mean(scale, ('log', 'linear'))}"
        )
    edited = of_row(edited_table, row, stage)
    baseline = of_row(baseline_table, row if baseline_row is None else baseline_row, stage)
    parts = [
        _of_token(baseline, token),
        _of_token(edited, token),
    ]  # the edited run's line is drawn over the other
    lines = [
        replace(
            _line(part, "prob", 0, written_prob(part["prob"].iloc[-1])), name=name, colour=colour
        )
        for part, name, colour in zip(parts, ("baseline", "edited"), (MUTED, MARK), strict=True)
    ]
    figure = Figure(
        figsize=(_figure_width(max(len(line.steps) for line in lines)), 4.6), layout="constrained"
    )
    axes = figure.subplots()
    lines = _prob_axis(axes, lines, logarithmic=scale == "log")
    parted = _parting(edited, baseline)
    _draw_lines(axes, lines, *["┊ from here the texts differ"] * (parted is not None))
    _step_axis(
        axes,
        edited,
        "step, and the token chosen " + ("in both" if parted is None else "in the edited run"),
    )
    if parted is not None:
        axes.axvline(parted + 0.5, color=MUTED, lw=1.2, ls=":")
        _baseline_axis(axes, baseline)
    return finished(
        figure,
        title
        or f"Probability of {readable(parts[0]['token'].iloc[0])} at each step, {STAGES[stage]}",
    )


@dataclass(frozen=True, eq=False)
class _Line:
    """One line over the steps."""

    name: str
    steps: np.ndarray
    values: np.ndarray
    zero: np.ndarray  # where the probability is 0: there is a cross, and no line
    chosen: np.ndarray
    colour: str
    dashes: str


def _line(part: pd.DataFrame, column: str, place: int, end: str) -> _Line:
    zero = np.isneginf(part["logit"].to_numpy(float))
    return _Line(
        f"{plain(cut(readable(name_of(part.iloc[0].to_dict())), 1.7, 8.5))}  {'×' if zero[-1] else end}",
        part["step"].to_numpy(int),
        part[column].to_numpy(float),
        zero,
        part["drawn"].to_numpy(bool),
        LINES[place % len(LINES)],
        "-" if place < len(LINES) else "--",
    )


def _draw_lines(axes: Axes, lines: list[_Line], *notes: str) -> None:
    """Draw them with their names at their ends, and say above the axes what the marks mean."""
    for line in lines:
        shown = np.where(line.zero, np.nan, line.values)
        axes.plot(
            line.steps,
            shown,
            color=line.colour,
            ls=line.dashes,
            lw=1.8,
            marker="o",
            ms=3,
            clip_on=False,
        )
        for which, mark, size in ((line.zero, "x", 6), (line.chosen & ~line.zero, "o", 8)):
            if which.any():
                axes.plot(
                    line.steps[which],
                    line.values[which],
                    mark,
                    color=line.colour,
                    ms=size,
                    clip_on=False,
                )
    for line, height in zip(lines, _apart(axes, [line.values[-1] for line in lines]), strict=True):
        axes.annotate(
            line.name,
            (line.steps[-1], line.values[-1]),
            xytext=(1.025, height),
            textcoords="axes fraction",
            va="center",
            fontsize=8.5,
            color=line.colour,
            arrowprops={
                "arrowstyle": "-",
                "color": GRID,
                "lw": 0.9,
                "shrinkA": 1,
                "shrinkB": 4,
                "relpos": (0, 0.5),
            },
        )
    marks = {"● chosen here": any((line.chosen & ~line.zero).any() for line in lines)}
    marks["× probability 0"] = any(line.zero.any() for line in lines)
    said = [*(mark for mark, there in marks.items() if there), *notes]
    axes.set_title("     ".join(said), fontsize=8, color=MUTED, loc="left")


def _apart(axes: Axes, values: list[float]) -> np.ndarray:
    """Where the names of lines that end at these values go, in shares of the axes' height, with room for each."""
    pixels = axes.transData.transform([(0, value) for value in values])
    shares, gap = axes.transAxes.inverted().transform(pixels)[:, 1], 0.07
    places = -spread(-shares, gap)
    below = np.argsort(np.argsort(places, kind="stable"), kind="stable")  # how many stand lower
    return np.maximum(places, gap * below)


def _prob_axis(axes: Axes, lines: list[_Line], *, logarithmic: bool) -> list[_Line]:
    """Make the y axis one of probabilities; the lines as they are drawn: on a log axis 0 has a place of its own."""
    probs = np.concatenate([line.values for line in lines])
    if not logarithmic:
        axes.set_ylim(0, 1.08 * (probs.max() or 1.0))
        axes.set_ylabel("probability")
        return [replace(line, zero=np.zeros_like(line.zero)) for line in lines]
    positive = probs[probs > 0] if (probs > 0).any() else np.ones(1)
    first, last = floor(np.log10(positive.min())), ceil(np.log10(positive.max()))
    first = min(first, last - 1)
    decades = list(range(last, first - 1, -ceil((last - first) / 7)))
    ticks = {10.0**power: f"{10.0**power:g}" for power in decades}
    nothing = 10.0 ** (first - max(0.5, 0.1 * (last - first)))
    if (probs == 0).any():
        ticks[nothing] = "0"
        axes.axhline(nothing, color=MUTED, lw=0.9, ls="--")
    axes.set_yscale("log")
    axes.set_ylim((nothing if (probs == 0).any() else 10.0**first) * 0.8, 10.0**last * 1.25)
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("probability (log axis)")
    return [
        replace(line, values=np.maximum(line.values, nothing), zero=line.values == 0)
        for line in lines
    ]


def _step_axis(axes: Axes, table: pd.DataFrame, label: str) -> None:
    """Steps along the x axis, each with its chosen token, or every second, third … where they are too many."""
    steps, names = _labels(axes, table)
    axes.set_xticks(steps, names, rotation=60, ha="right", rotation_mode="anchor")
    axes.set_xlabel(label)


def _baseline_axis(axes: Axes, table: pd.DataFrame) -> None:
    """The tokens that the baseline chose, above."""
    above = axes.secondary_xaxis("top")
    steps, names = _labels(axes, table)
    above.set_xticks(steps, names, rotation=60, ha="left", rotation_mode="anchor")
    above.tick_params(colors=MUTED, labelsize=8.5)
    above.set_xlabel("the token chosen in the baseline", color=MUTED, fontsize=9)
    above.spines["top"].set_color(GRID)


def _labels(axes: Axes, table: pd.DataFrame) -> tuple[list[int], list[str]]:
    chosen = table[table["drawn"]]
    every = ceil(
        len(chosen) * 0.17 / (_figure_width(len(chosen)) - 2.5)
    )  # inches that a label needs
    shown = chosen.iloc[::every]
    names = [plain(cut(readable(token), 1.2, 8.5)) for token in shown["token"]]
    return shown["step"].tolist(), [
        f"{name}  {step}" for name, step in zip(names, shown["step"], strict=True)
    ]


def _figure_width(steps: int) -> float:
    return float(np.clip(0.32 * steps + 2.5, 6.5, 14))  # inches


def _parting(edited: pd.DataFrame, baseline: pd.DataFrame) -> int | None:
    """The first step at which the two runs chose different tokens, if there is one."""
    mine, theirs = (table[table["drawn"]] for table in (edited, baseline))
    other = dict(zip(theirs["step"], theirs["token_id"], strict=True))
    both = zip(mine["step"], mine["token_id"], strict=True)
    return next((int(step) for step, token in both if other.get(step, token) != token), None)


def _watched(table: pd.DataFrame, watch: "Iterable[str | int] | str | int") -> list[str | int]:
    """The tokens asked for, or all that were recorded for their own sake."""
    asked: list[str | int] = [watch] if isinstance(watch, str | int) else list(watch)
    mine = [has(why, "watched") or has(why, "named") for why in table["why"]]
    asked = asked or list(dict.fromkeys(int(token) for token in table["token_id"][mine]))
    if not asked:
        raise NotCaptured(
            "no token was watched in this run or named by a hook: generate with trace(watch=...)"
        )
    if len(asked) > MOST_LINES:
        raise BadHook(
            f"{len(asked)} lines are more than can be told apart: choose up to {MOST_LINES} with watch="
        )
    return asked


def _of_token(table: pd.DataFrame, token: str | int) -> pd.DataFrame:
    """One token's line of the table at every step."""
    ids = sorted({int(i) for i in table["token_id"][table["token"] == repr(token)]})
    if len(ids) > 1:
        raise BadHook(
            f"{token!r} is the text of several tokens here: give the id of one, {' or '.join(map(str, ids))}"
        )
    number = token if isinstance(token, int) else ids[0] if ids else -1
    found = pd.DataFrame(table[table["token_id"] == number])
    steps = len(set(table["step"]))
    if len(found) < steps:
        names = ", ".join(
            str(name) for name, part in table.groupby("token") if len(set(part["step"])) == steps
        )
        raise NotCaptured(
            f"the token {token!r} was recorded at {len(found)} of {steps} steps, and a line needs all: generate with "
            f"trace(watch=[{token!r}]). At every step there is {names or 'no token'}."
        )
    return found
