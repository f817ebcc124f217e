"""Lines over the steps: what is drawn is what the table says, zeros are seen, and names can be read."""

from itertools import pairwise

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from test_strips import PROMPT, chosen_of, drawn

import hookkit as hk
from hookkit.errors import BadHook, NotCaptured, OutOfRange, UnknownKeyword

SETTINGS = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module")
def edited(smol):
    hooks = [hk.ban(" coffee"), hk.boost(" tea", by=4.0)]
    watch = (" tea", "\n")
    return hk.candidates(
        hk.generate(smol, [PROMPT, "Tea is"], *hooks, trace=hk.trace(watch=watch), **SETTINGS)
    )


@pytest.fixture(scope="module")
def baseline(smol):
    return hk.candidates(
        hk.generate(smol, PROMPT, trace=hk.trace(watch=(" tea", " coffee")), **SETTINGS)
    )


def of(table, token, stage, row=0):
    return table[(table.row == row) & (table.stage == stage) & (table.token == token)]


def lines_of(figure):
    return [
        line
        for line in figure.axes[0].lines
        if line.get_linestyle() in ("-", "--") and len(line.get_xdata()) > 2
    ]


def names_of(figure):
    return [text.get_text() for text in figure.axes[0].texts]


@pytest.mark.parametrize("row", [0, 1])
def test_a_line_is_the_tokens_rank_at_every_step_with_1_at_the_top(edited, row):
    figure = hk.figures.rank_lines(edited, watch=[" tea", "\n"], row=row)
    ranks = [of(edited, token, "model", row)["rank"].tolist() for token in (" tea", "\n")]
    assert [line.get_ydata().tolist() for line in lines_of(figure)] == ranks
    assert [line.get_xdata().tolist() for line in lines_of(figure)] == [list(range(6))] * 2
    assert names_of(figure) == [f"' tea'  {ranks[0][-1]:,}", f"'\\n'  {ranks[1][-1]:,}"]
    (axes,) = figure.axes
    low, high = axes.get_ylim()
    assert axes.get_yscale() == "log"
    assert low > max(map(max, ranks))
    assert high < 1
    assert axes.get_ylabel() == "rank (log axis; 1 is the most likely)"
    drawn(figure)


def test_the_chosen_tokens_stand_along_the_axis(edited):
    labels = [label.get_text() for label in hk.figures.rank_lines(edited).axes[0].get_xticklabels()]
    assert labels == [f"{token!r}  {step}" for step, token in enumerate(chosen_of(edited)["token"])]


def test_without_a_wish_the_watched_and_the_named_tokens_are_drawn(edited):
    assert sorted(name.split("  ")[0] for name in names_of(hk.figures.rank_lines(edited))) == [
        "' coffee'",
        "' tea'",
        "'\\n'",
    ]


def test_a_banned_token_has_crosses_and_no_line(edited):
    figure = hk.figures.rank_lines(edited, watch=" coffee", stage="edited")
    crosses = [line for line in figure.axes[0].lines if line.get_marker() == "x"]
    assert [line.get_ydata().tolist() for line in crosses] == [
        of(edited, " coffee", "edited")["rank"].tolist()
    ]
    assert np.isnan(lines_of(figure)[0].get_ydata()).all()
    assert names_of(figure) == ["' coffee'  ×"]
    assert "× probability 0" in figure.axes[0].get_title(loc="left")


@pytest.mark.parametrize("stage", ["model", "edited"])
def test_names_do_not_stand_on_each_other_or_outside(edited, stage):
    figure = hk.figures.rank_lines(edited, stage=stage)
    FigureCanvasAgg(figure).draw()
    boxes = sorted(
        (text.get_window_extent() for text in figure.axes[0].texts), key=lambda box: box.y0
    )
    for lower, upper in pairwise(boxes):
        assert upper.y0 >= lower.y0 + 8.5 / 72 * figure.dpi
    assert all(box.x1 <= figure.bbox.x1 for box in boxes)
    assert boxes[0].y0 >= figure.axes[0].get_window_extent().y0 - 12


@pytest.mark.parametrize("scale", ["log", "linear"])
def test_two_lines_are_the_tokens_probabilities_in_the_two_runs(edited, baseline, scale):
    figure = hk.figures.prob_against(edited, baseline, token=" tea", scale=scale)
    theirs, mine = (line.get_ydata().tolist() for line in lines_of(figure))
    assert mine == of(edited, " tea", "edited")["prob"].tolist()
    assert theirs == of(baseline, " tea", "edited")["prob"].tolist()
    assert names_of(figure) == ["baseline", "edited"]
    assert figure.axes[0].get_yscale() == scale
    assert figure.axes[0].get_ylabel() == (
        "probability (log axis)" if scale == "log" else "probability"
    )
    drawn(figure)


def test_a_probability_of_0_has_a_place_of_its_own_on_a_log_axis(edited, baseline):
    (axes,) = hk.figures.prob_against(edited, baseline, token=" coffee").axes
    (crosses,) = (line for line in axes.lines if line.get_marker() == "x")
    (height,) = set(crosses.get_ydata())
    assert len(crosses.get_ydata()) == 6
    assert 0 < height < of(baseline, " coffee", "edited")["prob"].min()
    labels = dict(
        zip(axes.get_yticks(), [label.get_text() for label in axes.get_yticklabels()], strict=True)
    )
    assert labels[height] == "0"
    assert axes.get_ylim()[0] < height


def test_a_dotted_line_stands_where_the_texts_part(edited, baseline):
    figure = hk.figures.prob_against(edited, baseline, token=" tea")
    pairs = zip(chosen_of(edited)["token_id"], chosen_of(baseline)["token_id"], strict=True)
    first = next(step for step, (mine, theirs) in enumerate(pairs) if mine != theirs)
    (dotted,) = (line for line in figure.axes[0].lines if line.get_linestyle() == ":")
    assert list(dotted.get_xdata()) == [first + 0.5] * 2
    same = hk.figures.prob_against(baseline, baseline, token=" tea")
    assert not [line for line in same.axes[0].lines if line.get_linestyle() == ":"]


def test_rows_of_the_two_runs_are_chosen_apart(edited, baseline):
    figure = hk.figures.prob_against(edited, baseline, token=" tea", row=1, baseline_row=0)
    assert (
        lines_of(figure)[1].get_ydata().tolist()
        == of(edited, " tea", "edited", row=1)["prob"].tolist()
    )
    with pytest.raises(OutOfRange, match="row 1 is not in the table, which has rows 0"):
        hk.figures.prob_against(edited, baseline, token=" tea", row=1)


@pytest.mark.parametrize(
    "token", ["$x$", "🧋", "\n", " antidisestablishmentarianism" * 2, " " * 30]
)
def test_odd_tokens_are_drawn_as_text(edited, token):
    odd = edited.copy()
    odd["token"] = [token if name == " tea" else name for name in odd["token"]]
    drawn(hk.figures.rank_lines(odd))
    drawn(hk.figures.prob_against(odd, odd, token=7188))


def test_the_same_tables_give_the_same_bytes(edited, baseline):
    assert drawn(hk.figures.rank_lines(edited)) == drawn(hk.figures.rank_lines(edited))
    make = [hk.figures.prob_against(edited, baseline, token=" coffee") for _ in range(2)]
    assert drawn(make[0]) == drawn(make[1])


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (
            lambda e, b: hk.figures.rank_lines(e, watch=" zebra"),
            NotCaptured,
            r"the token ' zebra' was recorded at 0 of 6 steps, and a line needs all: generate with trace\(watch=\[' zebra'",
        ),
        (
            lambda e, b: hk.figures.rank_lines(e, watch=3),
            NotCaptured,
            r"At every step there is '\\n', ' coffee', ' tea'",
        ),
        (
            lambda e, b: hk.figures.rank_lines(
                e[~e.why.str.contains("watched|named") | e.drawn].assign(why="top")
            ),
            NotCaptured,
            "no token was watched in this run or named by a hook",
        ),
        (
            lambda e, b: hk.figures.rank_lines(e, watch=range(20)),
            BadHook,
            "20 lines are more than can be told apart",
        ),
        (
            lambda e, b: hk.figures.rank_lines(e, row=2),
            OutOfRange,
            "row 2 is not in the table, which has rows 0, 1",
        ),
        (
            lambda e, b: hk.figures.rank_lines(e.assign(token="x"), watch="x"),
            BadHook,
            "'x' is the text of several tokens",
        ),
        (
            lambda e, b: hk.figures.prob_against(e, b, token="\n"),
            NotCaptured,
            r"the token '\\n' was recorded at \d of 6 steps",
        ),
        (
            lambda e, b: hk.figures.prob_against(e, b, token=" tea", scale="lin"),
            BadHook,
            "scale='lin' is unknown.*'log', 'linear'",
        ),
        (
            lambda e, b: hk.figures.prob_against(e, b, tokens=" tea"),
            UnknownKeyword,
            "no keyword 'tokens'; did you mean 'token'",
        ),
    ],
)
def test_a_figure_that_cannot_be_drawn_is_refused(edited, baseline, make, error, words):
    with pytest.raises(error, match=words):
        make(edited, baseline)
