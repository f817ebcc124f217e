"""Figures of a generation, step by step, from the table of `decoding(run)`.

    run = hk.generate(lm, prompt, hk.ban(" coffee"), trace=hk.trace(watch=" tea"))
    hk.figures.rank_lines(hk.candidates(run)).savefig("ranks.png")

`rank_lines` and `prob_against` show the ranks and probabilities of watched tokens as lines over the
steps. Every figure is about one row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import ceil, floor
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from ..arguments import check_arguments, check_choice
from ..display import quote_token
from ..errors import BadHook, NotCaptured
from ..models.words import WordLike, tokens_in_table
from . import style
from .style import GRID, MARK, MUTED, PointLabel, apply_style, new_figure, short_label

STAGES = {
    "model": "before logit edits",
    "source": "of the source",
    "edited": "after logit edits",
    "processed": "after the decoding rules",
}
COLUMNS = ("row", "step", "stage", "token", "token_id",
           "logit", "logprob", "prob", "rank", "drawn", "why")  # fmt: skip
MAX_LINES = 12  # that can be told apart
HEIGHT, AXES_HEIGHT = 4.8, 2.2  # inches; of the axes at least, above long labels
BASELINE_STYLE = {"color": MUTED, "marker": "s", "ls": "--"}
EDITED_STYLE = {"color": MARK, "marker": "o", "ls": "-"}


def select_row(table: pd.DataFrame, row: int, stage: str) -> pd.DataFrame:
    """One row of the batch at one stage, ordered by step, with one chosen token in each step.

    Raises `BadHook` for another table or stage, and `OutOfRange` for a row that does not exist.
    """
    style.check_columns(table, COLUMNS, "decoding(run)")
    check_choice(stage, "stage", STAGES)
    part = style.select_row(table, row)
    part = part[part["stage"] == stage].sort_values("step", kind="stable")
    choices_of_steps: Any = part.groupby("step")["drawn"].sum()
    if not (choices_of_steps == 1).all() or part.duplicated(["step", "token_id"]).any():
        raise BadHook(
            "this figure is drawn from decoding(run) of one run, with the chosen token of every "
            f"step, and of row {row} at the stage {stage!r} this table has none, or several: give "
            "it unfiltered, and one run at a time"
        )
    return part


def token_name(token: Any) -> str:
    """A token in quotes, with its id where it is a part of a character: such parts look alike."""
    name = style.token_label(token["token"])
    if "\ufffd" in name:
        return f"{name} {token['token_id']}"
    return name


def has_reason(why: str, reason: str) -> bool:
    """True if this is one of the reasons for which a token is in the table."""
    return reason in why.split(", ")


@check_arguments
def rank_lines(
    decoding_table: pd.DataFrame,
    *,
    watch: Iterable[WordLike] | WordLike = (),
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
        last = part.iloc[-1]
        rank = "×" if np.isneginf(last["logit"]) else f"{last['rank']:,}"
        name = f"{short_label(token_name(last), 1.7)}  {rank}"
        lines.append(_build_line(part, "rank", name, style.line_style(number)))
    figure, axes = new_figure(_figure_width(len(lines[0].steps)), HEIGHT)
    lowest = max(10.0, *(line.values.max() for line in lines))
    style.rank_axis(axes, 1.25 * lowest)
    _draw_lines(axes, lines)
    _label_steps(axes, table, "step, and the token chosen there")
    prompt = style.describe_prompt(table)
    return apply_style(figure, title or f"Ranks at each step, {STAGES[stage]}", prompt)


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
    check_choice(scale, "scale", ["log", "linear"])
    edited = select_row(edited_table, row, stage)
    if baseline_row is None:
        baseline_row = row
    baseline = select_row(baseline_table, baseline_row, stage)
    baseline_part = _select_token(baseline, token)
    lines = [  # the edited run's line is drawn over the baseline's
        _build_line(baseline_part, "prob", "baseline", BASELINE_STYLE),
        _build_line(_select_token(edited, token), "prob", "edited", EDITED_STYLE),
    ]
    figure, axes = new_figure(_figure_width(max(len(line.steps) for line in lines)), HEIGHT)
    prob_axis = {"log": _log_prob_axis, "linear": _linear_prob_axis}[scale]
    lines = prob_axis(axes, lines)
    choices: Any = edited[edited["drawn"]].merge(baseline[baseline["drawn"]], on="step")
    parted_steps = choices["step"][choices["token_id_x"] != choices["token_id_y"]]
    if parted_steps.empty:
        _draw_lines(axes, lines)
        _label_steps(axes, edited, "step, and the token chosen in both")
    else:
        _draw_lines(axes, lines, "┊ from here the texts differ")
        _label_steps(axes, edited, "step, and the token chosen in the edited run")
        axes.axvline(parted_steps.iloc[0] + 0.5, color=MUTED, lw=1.2, ls=":")
        _label_baseline_steps(axes, baseline)
    name = style.shorten(token_name(baseline_part.iloc[0]), 2.0, 11)
    title = title or f"Probability of {name} at each step, {STAGES[stage]}"
    return apply_style(figure, title, style.describe_prompt(edited_table))


@dataclass(frozen=True, eq=False)
class _Line:
    name: str
    steps: np.ndarray
    values: np.ndarray
    is_zero: np.ndarray  # where the probability is 0: a cross is drawn, and no line
    is_drawn: np.ndarray  # where the token was chosen
    look: dict[str, Any]  # colour, dashes and marker

    @property
    def is_marked(self) -> np.ndarray:
        """Where the token was chosen, and the line is drawn."""
        return self.is_drawn & ~self.is_zero


def _build_line(part: pd.DataFrame, column: str, name: str, look: dict[str, Any]) -> _Line:
    is_zero = np.isneginf(part["logit"].to_numpy(float))
    steps, values = part["step"].to_numpy(int), part[column].to_numpy(float)
    return _Line(name, steps, values, is_zero, part["drawn"].to_numpy(bool), look)


def _draw_lines(axes: Axes, lines: list[_Line], *notes: str) -> None:
    """Draw the lines with their names at their ends, and with notes above the axes."""
    for line in lines:
        values = np.where(line.is_zero, np.nan, line.values)
        axes.plot(line.steps, values, lw=1.8, ms=4, clip_on=False, **line.look)
        mark_style: dict[str, Any] = {"color": line.look["color"], "clip_on": False}
        for mask, mark, size in ((line.is_zero, "x", 6), (line.is_marked, "o", 8)):
            if mask.any():
                axes.plot(line.steps[mask], line.values[mask], mark, ms=size, **mark_style)
    labels = []
    for line in lines:
        end = (line.steps[-1], line.values[-1])
        labels.append(PointLabel(line.name, *end, line.look["color"]))
    style.label_column(axes, labels, AXES_HEIGHT)
    _explain_marks(axes, lines, *notes)


def _explain_marks(axes: Axes, lines: list[_Line], *notes: str) -> None:
    """Write what the marks on the lines mean, and the notes, above the axes."""
    marks = []
    if any(line.is_marked.any() for line in lines):
        marks.append("● chosen here")
    if any(line.is_zero.any() for line in lines):
        marks.append("× probability 0")
    axes.set_title("     ".join([*marks, *notes]), fontsize=8, color=MUTED, loc="left")


def _linear_prob_axis(axes: Axes, lines: list[_Line]) -> list[_Line]:
    """Make the y axis one of probabilities. Returns the lines as they are drawn on it."""
    largest = float(np.concatenate([line.values for line in lines]).max())
    axes.set_ylim(0, 1.08 * (largest or 1.0))
    axes.set_ylabel("probability")
    return [replace(line, is_zero=np.zeros_like(line.is_zero)) for line in lines]


def _log_prob_axis(axes: Axes, lines: list[_Line]) -> list[_Line]:
    """Make the y axis a log axis of probabilities, with a separate line for 0 at the bottom.

    Returns the lines as they are drawn on it.
    """
    probs = np.concatenate([line.values for line in lines])
    positive = probs[probs > 0]
    last = ceil(np.log10(positive.max(initial=0.0) or 1.0))
    first = min(floor(np.log10(positive.min(initial=1.0))), last - 1)
    decades = range(last, first - 1, -ceil((last - first) / 7))
    ticks = {10.0**power: f"{10.0**power:g}" for power in decades}
    zero_height = 10.0 ** (first - max(0.5, 0.1 * (last - first)))
    bottom = 10.0**first
    if len(positive) < len(probs):
        bottom = zero_height
        ticks[zero_height] = "0"
        axes.axhline(zero_height, color=MUTED, lw=0.9, ls="--")
    axes.set_yscale("log")
    axes.set_ylim(bottom * 0.8, 10.0**last * 1.25)
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("probability (log axis)")
    drawn_lines = []
    for line in lines:
        values = np.maximum(line.values, zero_height)
        drawn_lines.append(replace(line, values=values, is_zero=line.values == 0))
    return drawn_lines


def _label_baseline_steps(axes: Axes, baseline: pd.DataFrame) -> None:
    """Label the steps above the axes with the tokens that the baseline run chose."""
    top_axis = axes.secondary_xaxis("top")
    _label_steps(top_axis, baseline, "the token chosen in the baseline", align="left")
    top_axis.tick_params(colors=MUTED, labelsize=8.5)
    top_axis.xaxis.label.set(color=MUTED, fontsize=9)
    top_axis.spines["top"].set_color(GRID)


def _label_steps(
    axes: Any, table: pd.DataFrame, label: str, *, align: Literal["left", "right"] = "right"
) -> None:
    """Label steps along the x axis with their chosen tokens, as many as there is room for."""
    drawn = table[table["drawn"]]
    label_width = 0.17  # inches
    stride = ceil(len(drawn) * label_width / (_figure_width(len(drawn)) - 2.5))
    labelled = drawn.iloc[::stride]
    names = []
    for token in labelled.to_dict("records"):
        names.append(f"{short_label(token_name(token), 1.2)}  {token['step']}")
    steps = labelled["step"].tolist()
    axes.set_xticks(steps, names, rotation=60, ha=align, rotation_mode="anchor")
    axes.set_xlabel(label)


def _figure_width(steps: int) -> float:
    return float(np.clip(0.32 * steps + 2.5, 6.5, 14))  # inches


def _select_watched(
    table: pd.DataFrame, watch: Iterable[WordLike] | WordLike
) -> Sequence[str | int]:
    """The watched tokens, or all that were recorded because they were watched or named."""
    tokens = tokens_in_table(watch, "watch", table["token"])
    if not tokens:
        why: Any = table["why"]
        is_watched = why.str.contains("(?:^|, )(?:watched|named)(?:,|$)")
        tokens = list(dict.fromkeys(table["token_id"][is_watched].tolist()))
    if not tokens:
        raise NotCaptured(
            "no token was watched in this run or named by a hook: generate with trace(watch=...)"
        )
    if len(tokens) > MAX_LINES:
        raise BadHook(
            f"{len(tokens)} lines are more than can be told apart: choose up to {MAX_LINES} "
            "with watch="
        )
    return tokens


def _select_token(table: pd.DataFrame, token: str | int) -> pd.DataFrame:
    """The rows of one token, one for every step. Raises `NotCaptured` if a step lacks the token."""
    ids = sorted(set(table.loc[table["token"] == token, "token_id"].tolist()))
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
        steps_of_tokens: Any = table.groupby("token")["step"].nunique()
        complete = steps_of_tokens.index[steps_of_tokens == n_steps]
        raise NotCaptured(
            f"the token {token!r} was recorded at {len(part)} of {n_steps} steps, and a line needs "
            f"all: generate with trace(watch=[{token!r}]). At every step there is "
            f"{', '.join(map(quote_token, complete)) or 'no token'}."
        )
    return part
