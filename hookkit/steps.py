"""Lines over the steps of a generation: how the ranks and probabilities of watched tokens went.

    table = hk.decoding(hk.generate(lm, prompt, hk.ban(" coffee"), trace=hk.trace(watch=" tea"), max_new_tokens=10))
    hk.rank_lines(table).savefig("ranks.png")

Every figure is about one row of `decoding(run)`, and the tokens that were chosen stand along its axis.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import ceil, floor

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from .arguments import checks_arguments
from .errors import BadHook, NotCaptured, did_you_mean
from .figures import GRID, MARK, MUTED, finished, plain, rank_axis, readable, spread
from .strips import STAGES, cut, has, name_of, of_row, written_prob

LINES = ("#e0522d", "#4f78c8", "#1f9e89", "#a565c4", "#b07a1e", "#c2557f", "#7f8a2a", "#3a93b5")  # seen on either paper
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
    lines = [_line(part, "rank", place, f"{part['rank'].iloc[-1]:,}") for place, part in enumerate(found)]
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
        raise BadHook(f"scale={scale!r} is not one of log, linear{did_you_mean(scale, ('log', 'linear'))}")
    edited = of_row(edited_table, row, stage)
    baseline = of_row(baseline_table, row if baseline_row is None else baseline_row, stage)
    parts = [_of_token(baseline, token), _of_token(edited, token)]  # the edited run's line is drawn over the other
    lines = [
        replace(_line(part, "prob", 0, written_prob(part["prob"].iloc[-1])), name=name, colour=colour)
        for part, name, colour in zip(parts, ("baseline", "edited"), (MUTED, MARK), strict=True)
    ]
    figure = Figure(figsize=(_figure_width(max(len(line.steps) for line in lines)), 4.6), layout="constrained")
    axes = figure.subplots()
    lines = _prob_axis(axes, lines, logarithmic=scale == "log")
    parted = _parting(edited, baseline)
    _draw_lines(axes, lines, *["┊ from here the texts differ"] * (parted is not None))
    _step_axis(axes, edited, "step, and the token chosen " + ("in both" if parted is None else "in the edited run"))
    if parted is not None:
        axes.axvline(parted + 0.5, color=MUTED, lw=1.2, ls=":")
        _baseline_axis(axes, baseline)
    return finished(
        figure, title or f"Probability of {readable(parts[0]['token'].iloc[0])} at each step, {STAGES[stage]}"
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
        axes.plot(line.steps, shown, color=line.colour, ls=line.dashes, lw=1.8, marker="o", ms=3, clip_on=False)
        for which, mark, size in ((line.zero, "x", 6), (line.chosen & ~line.zero, "o", 8)):
            if which.any():
                axes.plot(line.steps[which], line.values[which], mark, color=line.colour, ms=size, clip_on=False)
    for line, height in zip(lines, _apart(axes, [line.values[-1] for line in lines]), strict=True):
        axes.annotate(
            line.name,
            (line.steps[-1], line.values[-1]),
            xytext=(1.025, height),
            textcoords="axes fraction",
            va="center",
            fontsize=8.5,
            color=line.colour,
            arrowprops={"arrowstyle": "-", "color": GRID, "lw": 0.9, "shrinkA": 1, "shrinkB": 4, "relpos": (0, 0.5)},
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
    return [replace(line, values=np.maximum(line.values, nothing), zero=line.values == 0) for line in lines]


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
    every = ceil(len(chosen) * 0.17 / (_figure_width(len(chosen)) - 2.5))  # inches that a label needs
    shown = chosen.iloc[::every]
    names = [plain(cut(readable(token), 1.2, 8.5)) for token in shown["token"]]
    return shown["step"].tolist(), [f"{name}  {step}" for name, step in zip(names, shown["step"], strict=True)]


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
        raise NotCaptured("no token was watched in this run or named by a hook: generate with trace(watch=...)")
    if len(asked) > MOST_LINES:
        raise BadHook(f"{len(asked)} lines are more than can be told apart: choose up to {MOST_LINES} with watch=")
    return asked


def _of_token(table: pd.DataFrame, token: str | int) -> pd.DataFrame:
    """One token's line of the table at every step."""
    ids = sorted({int(i) for i in table["token_id"][table["token"] == repr(token)]})
    if len(ids) > 1:
        raise BadHook(f"{token!r} is the text of several tokens here: give the id of one, {' or '.join(map(str, ids))}")
    number = token if isinstance(token, int) else ids[0] if ids else -1
    found = pd.DataFrame(table[table["token_id"] == number])
    steps = len(set(table["step"]))
    if len(found) < steps:
        names = ", ".join(str(name) for name, part in table.groupby("token") if len(set(part["step"])) == steps)
        raise NotCaptured(
            f"the token {token!r} was recorded at {len(found)} of {steps} steps, and a line needs all: generate with "
            f"trace(watch=[{token!r}]). At every step there is {names or 'no token'}."
        )
    return found
