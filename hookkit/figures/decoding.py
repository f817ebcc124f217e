"""Figures of a generation, step by step, from the table of `decoding(run)`.

    run = hk.generate(lm, prompt, hk.ban(" coffee"), trace=hk.trace(watch=" tea"))
    hk.figures.decision_strip(hk.decoding(run)).savefig("strip.png")
    hk.figures.rank_lines(hk.decoding(run)).savefig("ranks.png")

`decision_strip` shows what each token was chosen from. `rank_lines` and `prob_against` show the
ranks and probabilities of watched tokens as lines over the steps. Every figure is about one row.
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
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, NullLocator

from ..arguments import check_arguments
from ..errors import BadHook, NotCaptured, OutOfRange, did_you_mean
from .style import (
    GRID,
    INK,
    MARK,
    MUTED,
    UP,
    apply_style,
    check_columns,
    escape_missing_glyphs,
    fit_text,
    label_point,
    rank_axis,
    short_label,
    spread_apart,
    text_width,
)

STAGES = {
    "model": "before logit edits",
    "edited": "after logit edits",
    "processed": "after the decoding rules",
}
COLUMNS = ("row", "step", "stage", "token", "token_id",
           "logit", "logprob", "prob", "rank", "drawn", "why")  # fmt: skip
COLOURS = {
    "surprisal": (MARK, "surprisal of the chosen token (nats)"),
    "margin": (UP, "margin: largest logit minus the second (logits)"),
}
CANDIDATES = 5  # written under a step at most
CELL_WIDTHS = (0.84, 1.4)  # inches, smallest and largest
CELL_HEIGHT = 0.42  # inches
LINE_WIDTH = 10.8  # inches of the cells of one line
STRONGEST = 0.62  # the greatest opacity of a cell
LINE_COLOURS = ("#e0522d", "#4f78c8", "#1f9e89", "#a565c4",
                "#b07a1e", "#c2557f", "#7f8a2a", "#3a93b5")  # fmt: skip
MOST_LINES = 12  # that can be told apart


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
    if colour not in COLOURS:
        raise BadHook(
            f"colour={colour!r} is not one of {', '.join(COLOURS)}{did_you_mean(colour, COLOURS)}"
        )
    cells = _build_cells(select_row(decoding_table, row, stage), colour)
    width = _cell_width(cells)
    n_lines = ceil(len(cells) / floor(LINE_WIDTH / width))
    per_line = ceil(len(cells) / n_lines)
    most_candidates = max(len(cell.candidates) for cell in cells)
    pitch = 0.46 + 0.135 * most_candidates + 0.2  # inches from line to line
    caption = (
        f"In a cell: the step, the {colour}, the chosen token. Below: the most likely tokens with "
        f"their probabilities {STAGES[stage]}; ▸ is the chosen one."
    )
    span = max(per_line * width + 0.2, 6.5)  # the title and the caption need at least 6.5
    caption_lines = wrap(caption, int(span / 0.062))
    height = 0.42 + n_lines * pitch + 0.6 + 0.15 * len(caption_lines)
    figure = Figure(figsize=(span, height))
    axes = add_sheet(figure)
    finite_values = [cell.value for cell in cells if cell.value < inf]
    largest = max([*finite_values, 1.0])  # at least 1, so that a text of sure tokens stays pale
    for number, cell in enumerate(cells):
        line, column = divmod(number, per_line)
        corner = (0.1 + column * width, 0.42 + line * pitch)
        share = min(cell.value / largest, 1.0)
        _draw_cell(axes, cell, corner, width - 0.05, share, COLOURS[colour][0])
    draw_caption(axes, "\n".join(caption_lines))
    apply_style(figure, title or f"What each token was chosen from, {STAGES[stage]}")
    draw_opacity_bar(figure, 0.42 + n_lines * pitch, largest, *COLOURS[colour])
    return figure


def _build_cells(table: pd.DataFrame, colour: str) -> list[_Cell]:
    cells = []
    for step, part in table.groupby("step"):
        ordered = part.sort_values(["logit", "token_id"], ascending=[False, True])
        tokens = [token | {"token": token_name(token)} for token in ordered.to_dict("records")]
        (choice,) = [token for token in tokens if token["drawn"]]
        candidates = [
            token
            for token in tokens
            if has_reason(token["why"], "top") and np.isfinite(token["logit"])
        ]
        candidates = candidates[:CANDIDATES]
        if choice not in candidates:
            candidates.append(choice)
        value = -float(choice["logprob"]) if colour == "surprisal" else _margin(ordered)
        # abs, because -0.0 would be written as -0.00
        cells.append(_Cell(int(str(step)), choice["token"], abs(value), candidates))
    return cells


def _margin(ordered: pd.DataFrame) -> float:
    """The largest logit minus the second. Raises `NotCaptured` if the table lacks one of them."""
    if sum(has_reason(why, "top") for why in ordered["why"]) < 2:
        raise NotCaptured(
            "a margin needs the two first tokens of each step: record them with trace(top=2) or "
            "more"
        )
    largest, second = ordered["logit"].to_numpy(float)[:2]
    return largest - second


def _cell_width(cells: list[_Cell]) -> float:
    """The width in inches that the longest token needs, within CELL_WIDTHS."""
    token_width, candidate_width = 0.0, 0.0
    for cell in cells:
        token_width = max(token_width, text_width(escape_missing_glyphs(cell.token), 9.5))
        for token in cell.candidates:
            candidate_width = max(
                candidate_width, text_width(escape_missing_glyphs(token["token"]), 7)
            )
    return float(np.clip(max(token_width + 0.16, candidate_width + 0.52), *CELL_WIDTHS))


def add_sheet(figure: Figure) -> Axes:
    """Axes over the whole figure, in inches from the top left corner, without a frame."""
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, figure.get_figwidth())
    axes.set_ylim(figure.get_figheight(), 0)
    axes.set_axis_off()
    return axes


def draw_box(
    axes: Axes, corner: tuple[float, float], width: float, colour: str, share: float
) -> None:
    """Draw a coloured cell with a frame.

    `share` (0 to 1) is written as opacity, so that the cell can stand on paper of any colour.
    """
    fill = (*to_rgb(colour), STRONGEST * share)
    axes.add_patch(Rectangle(corner, width, CELL_HEIGHT, facecolor=fill, edgecolor="none"))
    frame = {"facecolor": "none", "edgecolor": GRID, "lw": 0.8}
    axes.add_patch(Rectangle(corner, width, CELL_HEIGHT, **frame))


def draw_caption(axes: Axes, text: str) -> None:
    """Write a caption at the bottom of a sheet."""
    y = axes.figure.get_figheight() - 0.08  # pyright: ignore[reportAttributeAccessIssue]
    axes.text(0.1, y, text, fontsize=7.5, color=MUTED, va="bottom")


def format_number(value: float, digits: int) -> str:
    """A number with some decimals, ∞ for infinity."""
    return f"{value:.{digits}f}" if value < inf else "∞"


def _draw_cell(
    axes: Axes, cell: _Cell, corner: tuple[float, float], width: float, share: float, colour: str
) -> None:
    x, y = corner
    draw_box(axes, corner, width, colour, share)
    small = {"fontsize": 6.5, "color": INK, "va": "center"}
    axes.text(x + 0.04, y + 0.085, f"{cell.step}", **small)
    axes.text(x + width - 0.04, y + 0.085, format_number(cell.value, 2), ha="right", **small)
    name, size = fit_text(cell.token, width - 0.1, 9.5)
    axes.text(x + width / 2, y + 0.27, name, fontsize=size, color=INK, ha="center", va="center")
    for number, token in enumerate(cell.candidates):
        text_y = y + 0.52 + 0.135 * number
        style: dict[str, Any] = {"color": INK if token["drawn"] else MUTED, "va": "center"}
        name, size = fit_text(token["token"], width - 0.47, 7)
        prob = format_prob(token["prob"])
        if token["drawn"]:
            axes.text(x, text_y, "▸", fontsize=7, color=colour, va="center")
        axes.text(x + 0.09, text_y, name, fontsize=size, **style)
        axes.text(x + width - 0.04, text_y, prob, fontsize=7, ha="right", **style)


def format_prob(prob: float) -> str:
    """A probability in at most five characters, never rounded to 0 or 1."""
    if prob in (0, 1):
        return f"{prob:.0f}"
    if prob < 0.01:
        return "<0.01"
    return ">0.99" if prob > 0.99 else f"{prob:.2f}"


def draw_opacity_bar(
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


def select_row(table: pd.DataFrame, row: int, stage: str) -> pd.DataFrame:
    """One row of the batch at one stage, ordered by step, with one chosen token in each step.

    Raises `BadHook` for another table or stage, and `OutOfRange` for a row that does not exist.
    """
    check_columns(table, COLUMNS, "decoding(run)")
    if stage not in STAGES:
        raise BadHook(
            f"stage={stage!r} is not one of {', '.join(STAGES)}{did_you_mean(str(stage), STAGES)}"
        )
    rows = sorted({int(number) for number in table["row"]})
    if row not in rows:
        raise OutOfRange(f"row {row} is not in the table, which has {_list_rows(rows)}")
    part = pd.DataFrame(table[(table["row"] == row) & (table["stage"] == stage)])
    part = part.sort_values("step", kind="stable")
    drawn_steps = part["step"].to_numpy()[part["drawn"].to_numpy(bool)].tolist()
    has_one_choice = bool(drawn_steps) and drawn_steps == sorted(set(part["step"]))
    if not has_one_choice or bool(part.duplicated(["step", "token_id"]).any()):
        raise BadHook(
            "this figure is drawn from decoding(run) of one run, with the chosen token of every "
            f"step, and of row {row} at the stage {stage!r} this table has none, or several: give "
            "it unfiltered, and one run at a time"
        )
    return part


def _list_rows(rows: list[int]) -> str:
    if not rows:
        return "none"
    noun = "rows" if len(rows) > 1 else "row"
    return f"{noun} {', '.join(map(str, rows))}"


def token_name(token: dict[Any, Any]) -> str:
    """A token's text, with its id where it is a part of a character: such parts look all alike."""
    if "\ufffd" in token["token"]:
        return f"{token['token']} {token['token_id']}"
    return token["token"]


def has_reason(why: str, reason: str) -> bool:
    """True if this is one of the reasons for which a token is in the table."""
    return reason in why.split(", ")


@check_arguments
def rank_lines(
    decoding_table: pd.DataFrame,
    *,
    watch: "Iterable[str | int] | str | int" = (),
    row: int = 0,
    stage: str = "model",
    title: str = "",
) -> Figure:
    """The rank of each watched token at every step as a line, with the chosen tokens at the axis.

    `decoding_table` is `decoding(run)`. `watch` is the watched tokens, as text or ids; without it,
    all tokens that the trace watched or that hooks name. Rank 1 is at the top. Where a token's
    logit is -inf, so that its rank has no meaning, there is a cross.

    Raises `BadHook` for another table or stage, or for more lines than can be told apart,
    `OutOfRange` for a row that is not in the table, and `NotCaptured` for a token that was not
    recorded at every step.
    """
    table = select_row(decoding_table, row, stage)
    lines = []
    for number, token in enumerate(_select_watched(table, watch)):
        part = _select_token(table, token)
        lines.append(_build_line(part, "rank", number, f"{part['rank'].iloc[-1]:,}"))
    figure = Figure(figsize=(_figure_width(len(lines[0].steps)), 4.6), layout="constrained")
    axes = figure.subplots()
    lowest = max(10.0, *(line.values.max() for line in lines))
    rank_axis(axes, 1.25 * lowest)
    _draw_lines(axes, lines)
    _label_steps(axes, table, "step, and the token chosen there")
    return apply_style(figure, title or f"Ranks at each step, {STAGES[stage]}")


@check_arguments
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
    """One token's probability at every step of an edited run and of a baseline run, as two lines.

    Both tables are `decoding(run)`, of runs that watched `token` (text or id) or whose hooks name
    it. `baseline_row` is the baseline's row, by default the same as `row`. `scale` is "log" or
    "linear"; on a log axis a probability of 0 is a cross on a separate line at the bottom. After a
    dotted line the two texts differ, and that alone changes the probabilities.

    Raises `BadHook` for another table, stage or scale, `OutOfRange` for a row that is not in its
    table, and `NotCaptured` for a token that was not recorded at every step.
    """
    if scale not in ("log", "linear"):
        raise BadHook(
            f"scale={scale!r} is not one of log, linear{did_you_mean(scale, ('log', 'linear'))}"
        )
    edited = select_row(edited_table, row, stage)
    if baseline_row is None:
        baseline_row = row
    baseline = select_row(baseline_table, baseline_row, stage)
    baseline_part = _select_token(baseline, token)
    edited_part = _select_token(edited, token)
    lines = [  # the edited run's line is drawn over the baseline's
        _build_prob_line(baseline_part, "baseline", MUTED),
        _build_prob_line(edited_part, "edited", MARK),
    ]
    width = _figure_width(max(len(line.steps) for line in lines))
    figure = Figure(figsize=(width, 4.6), layout="constrained")
    axes = figure.subplots()
    lines = _prob_axis(axes, lines, logarithmic=scale == "log")
    parting_step = _parting_step(edited, baseline)
    if parting_step is None:
        _draw_lines(axes, lines)
        _label_steps(axes, edited, "step, and the token chosen in both")
    else:
        _draw_lines(axes, lines, "┊ from here the texts differ")
        _label_steps(axes, edited, "step, and the token chosen in the edited run")
        axes.axvline(parting_step + 0.5, color=MUTED, lw=1.2, ls=":")
        _label_baseline_tokens(axes, baseline)
    name = escape_missing_glyphs(baseline_part["token"].iloc[0])
    return apply_style(figure, title or f"Probability of {name} at each step, {STAGES[stage]}")


@dataclass(frozen=True, eq=False)
class _Line:
    name: str
    steps: np.ndarray
    values: np.ndarray
    is_zero: np.ndarray  # where the probability is 0: a cross is drawn, and no line
    is_drawn: np.ndarray  # where the token was chosen
    colour: str
    dashes: str


def _build_line(part: pd.DataFrame, column: str, number: int, last_value: str) -> _Line:
    is_zero = np.isneginf(part["logit"].to_numpy(float))
    name = short_label(token_name(part.iloc[0].to_dict()), 1.7)
    return _Line(
        f"{name}  {'×' if is_zero[-1] else last_value}",
        part["step"].to_numpy(int),
        part[column].to_numpy(float),
        is_zero,
        part["drawn"].to_numpy(bool),
        LINE_COLOURS[number % len(LINE_COLOURS)],
        "-" if number < len(LINE_COLOURS) else "--",
    )


def _build_prob_line(part: pd.DataFrame, name: str, colour: str) -> _Line:
    line = _build_line(part, "prob", 0, "")
    return replace(line, name=name, colour=colour)


def _draw_lines(axes: Axes, lines: list[_Line], *notes: str) -> None:
    """Draw the lines with their names at their ends, and explain the marks above the axes."""
    has_choice, has_zero = False, False
    for line in lines:
        is_marked = line.is_drawn & ~line.is_zero
        has_choice = has_choice or bool(is_marked.any())
        has_zero = has_zero or bool(line.is_zero.any())
        values = np.where(line.is_zero, np.nan, line.values)
        style: dict[str, Any] = {"color": line.colour, "clip_on": False}
        axes.plot(line.steps, values, ls=line.dashes, lw=1.8, marker="o", ms=3, **style)
        for mask, mark, size in ((line.is_zero, "x", 6), (is_marked, "o", 8)):
            if mask.any():
                axes.plot(line.steps[mask], line.values[mask], mark, ms=size, **style)
    heights = _label_heights(axes, [line.values[-1] for line in lines])
    for line, height in zip(lines, heights, strict=True):
        end = (line.steps[-1], line.values[-1])
        style = {"textcoords": "axes fraction", "color": line.colour}
        label_point(axes, line.name, end, (1.025, height), shrink=(1, 4), **style)
    legend = {"● chosen here": has_choice, "× probability 0": has_zero}
    marks = [text for text, is_used in legend.items() if is_used]
    axes.set_title("     ".join([*marks, *notes]), fontsize=8, color=MUTED, loc="left")


def _label_heights(axes: Axes, values: list[float]) -> np.ndarray:
    """Heights for the names of lines that end at these values, in shares of the axes' height."""
    pixels = axes.transData.transform([(0, value) for value in values])
    shares, gap = axes.transAxes.inverted().transform(pixels)[:, 1], 0.07
    heights = -spread_apart(-shares, gap)
    n_lower_labels = np.argsort(np.argsort(heights, kind="stable"), kind="stable")
    return np.maximum(heights, gap * n_lower_labels)


def _prob_axis(axes: Axes, lines: list[_Line], *, logarithmic: bool) -> list[_Line]:
    """Make the y axis an axis of probabilities, and return the lines as they are drawn on it.

    On a log axis a probability of 0 is drawn on a separate line at the bottom.
    """
    probs = np.concatenate([line.values for line in lines])
    if not logarithmic:
        axes.set_ylim(0, 1.08 * (probs.max() or 1.0))
        axes.set_ylabel("probability")
        return [replace(line, is_zero=np.zeros_like(line.is_zero)) for line in lines]
    positive = probs[probs > 0] if (probs > 0).any() else np.ones(1)
    first, last = floor(np.log10(positive.min())), ceil(np.log10(positive.max()))
    first = min(first, last - 1)
    decades = range(last, first - 1, -ceil((last - first) / 7))
    ticks = {10.0**power: f"{10.0**power:g}" for power in decades}
    zero_height = 10.0 ** (first - max(0.5, 0.1 * (last - first)))
    bottom = 10.0**first
    if (probs == 0).any():
        bottom = zero_height
        ticks[zero_height] = "0"
        axes.axhline(zero_height, color=MUTED, lw=0.9, ls="--")
    axes.set_yscale("log")
    axes.set_ylim(bottom * 0.8, 10.0**last * 1.25)
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("probability (log axis)")
    return [
        replace(line, values=np.maximum(line.values, zero_height), is_zero=line.values == 0)
        for line in lines
    ]


def _label_steps(axes: Axes, table: pd.DataFrame, label: str) -> None:
    """Label steps along the x axis with their chosen tokens, as many as there is room for."""
    steps, names = _step_labels(table)
    axes.set_xticks(steps, names, rotation=60, ha="right", rotation_mode="anchor")
    axes.set_xlabel(label)


def _label_baseline_tokens(axes: Axes, table: pd.DataFrame) -> None:
    top_axis = axes.secondary_xaxis("top")
    steps, names = _step_labels(table)
    top_axis.set_xticks(steps, names, rotation=60, ha="left", rotation_mode="anchor")
    top_axis.tick_params(colors=MUTED, labelsize=8.5)
    top_axis.set_xlabel("the token chosen in the baseline", color=MUTED, fontsize=9)
    top_axis.spines["top"].set_color(GRID)


def _step_labels(table: pd.DataFrame) -> tuple[list[int], list[str]]:
    drawn = table[table["drawn"]]
    label_width = 0.17  # inches
    stride = ceil(len(drawn) * label_width / (_figure_width(len(drawn)) - 2.5))
    labelled = drawn.iloc[::stride]
    steps = labelled["step"].tolist()
    labels = [
        f"{short_label(token, 1.2)}  {step}"
        for token, step in zip(labelled["token"], steps, strict=True)
    ]
    return steps, labels


def _figure_width(steps: int) -> float:
    return float(np.clip(0.32 * steps + 2.5, 6.5, 14))  # inches


def _parting_step(edited: pd.DataFrame, baseline: pd.DataFrame) -> int | None:
    """The first step at which the two runs chose different tokens, or None."""
    choices = edited[edited["drawn"]]
    baseline_choices = baseline[baseline["drawn"]]
    baseline_tokens = dict(zip(baseline_choices["step"], baseline_choices["token_id"], strict=True))
    for step, token in zip(choices["step"], choices["token_id"], strict=True):
        if baseline_tokens.get(step, token) != token:
            return int(step)
    return None


def _select_watched(
    table: pd.DataFrame, watch: "Iterable[str | int] | str | int"
) -> list[str | int]:
    """The watched tokens, or all that were recorded because they were watched or named."""
    tokens: list[str | int] = [watch] if isinstance(watch, str | int) else list(watch)
    if not tokens:
        is_watched = [
            has_reason(why, "watched") or has_reason(why, "named") for why in table["why"]
        ]
        tokens = list(dict.fromkeys(int(token) for token in table["token_id"][is_watched]))
    if not tokens:
        raise NotCaptured(
            "no token was watched in this run or named by a hook: generate with trace(watch=...)"
        )
    if len(tokens) > MOST_LINES:
        raise BadHook(
            f"{len(tokens)} lines are more than can be told apart: choose up to {MOST_LINES} "
            "with watch="
        )
    return tokens


def _select_token(table: pd.DataFrame, token: str | int) -> pd.DataFrame:
    """The rows of one token, one for every step. Raises `NotCaptured` if a step lacks the token."""
    ids = sorted({int(i) for i in table["token_id"][table["token"] == repr(token)]})
    if len(ids) > 1:
        raise BadHook(
            f"{token!r} is the text of several tokens here: give the id of one, "
            f"{' or '.join(map(str, ids))}"
        )
    if isinstance(token, int):
        ids = [token]
    part = pd.DataFrame(table[table["token_id"].isin(ids)])
    n_steps = len(set(table["step"]))
    if len(part) < n_steps:
        complete = [
            str(name) for name, rows in table.groupby("token") if len(set(rows["step"])) == n_steps
        ]
        raise NotCaptured(
            f"the token {token!r} was recorded at {len(part)} of {n_steps} steps, and a line needs "
            f"all: generate with trace(watch=[{token!r}]). At every step there is "
            f"{', '.join(complete) or 'no token'}."
        )
    return part
