"""Figures: what is drawn is what the table says, with names that can be read, and without a display."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import PROMPTS
from matplotlib.figure import Figure

import hookkit as hk
from hookkit.errors import BadHook, EmptySelection, UnknownKeyword


@pytest.fixture(scope="module")
def shift(smol):
    before = hk.forward(smol, "I like oat milk in my")
    return hk.rank_shift(
        before,
        hk.forward(smol, "I like oat milk in my", hk.ban(" coffee"), hk.boost(" tea", by=2.0)),
    )


@pytest.fixture(scope="module")
def everything(smol):
    return hk.ranks(hk.forward(smol, "I like oat milk in my"), top=None)


def words_of(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def drawn(figure: Figure) -> None:
    """Draw it for real, in both formats; warnings are errors here."""
    import io

    figure.savefig(io.BytesIO(), format="png")
    figure.savefig(io.BytesIO(), format="svg")


def test_the_scatter_holds_every_token_and_marks_the_watched_one(everything):
    figure = hk.figures.logit_scatter(everything, watch=" coffee")
    (axes,) = figure.axes
    points = np.asarray(axes.collections[0].get_offsets())
    assert len(points) == 49152
    assert np.allclose(points[:, 1], everything["logit"])
    assert any(text.startswith("' coffee'") for text in words_of(figure))
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("token id", "logit (raw)")
    drawn(figure)


def test_the_panels_show_logits_softmax_and_log_softmax(everything):
    figure = hk.figures.logit_panels(everything, watch=[" coffee", 7188])
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "logit (raw)",
        "probability",
        "log-probability (nats)",
    ]
    for axes, column in zip(figure.axes, ("logit", "prob", "logprob"), strict=True):
        assert np.allclose(np.asarray(axes.collections[0].get_offsets())[:, 1], everything[column])
    drawn(figure)


def test_the_bump_chart_joins_each_tokens_ranks_with_1_at_the_top(shift):
    figure = hk.figures.rank_bump(shift)
    (axes,) = figure.axes
    lines = [line.get_ydata().tolist() for line in axes.lines if len(line.get_ydata()) == 2]
    assert lines == shift[["rank_before", "rank_after"]].to_numpy().tolist()
    assert axes.get_yscale() == "log"
    low, high = axes.get_ylim()
    assert low > high
    assert any("49,152" in text for text in words_of(figure))
    heights = sorted(text.xyann[1] for text in axes.texts if text.xyann[0] > 1)
    assert low > max(heights), "a label fell off the axes"
    drawn(figure)


def test_labels_do_not_stand_on_each_other(shift):
    figure = hk.figures.rank_bump(shift)
    figure.canvas.draw()
    (axes,) = figure.axes
    for side in (0, 1):
        heights = [t.xyann[1] for t in axes.texts if (t.xyann[0] > 1) == side]
        pixels = np.sort(axes.transData.transform([(0, height) for height in heights])[:, 1])
        assert np.diff(pixels).min() >= 8.5 / 72 * figure.dpi, "closer than a line of text is high"


def test_bars_are_the_deltas_and_a_banned_tokens_bar_has_no_end(shift):
    figure = hk.figures.delta_bars(shift)
    (axes,) = figure.axes
    finite = shift.sort_values("logprob_delta", ascending=False)["logprob_delta"].to_numpy()
    widths = np.array([patch.get_width() for patch in axes.patches])
    assert np.allclose(widths[np.isfinite(finite)], finite[np.isfinite(finite)])
    assert words_of(figure)[-1] == "−∞"
    assert axes.get_xlabel() == "Δ log-probability (nats, after minus before)"
    drawn(figure)


def test_tokens_that_a_font_lacks_or_that_look_like_mathematics_are_drawn_as_text(shift):
    odd = shift.copy()
    odd["token"] = [
        repr(t)
        for t in ["$x$", " 漢", "🧋", "\n", "<script>", "$", "a_b^c", "\\", "%", "é", "ﷺ", "\t"][
            : len(odd)
        ]
    ]
    for figure in (hk.figures.rank_bump(odd), hk.figures.delta_bars(odd)):
        drawn(figure)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (
            lambda s, e: hk.figures.rank_bump(e),
            BadHook,
            "this figure needs the column 'rank_after', and the table has row, pos, token",
        ),
        (
            lambda s, e: hk.figures.logit_scatter(e.head(3), watch=" zebra"),
            EmptySelection,
            "the watched token ' zebra' is not in the table",
        ),
        (
            lambda s, e: hk.figures.delta_bars(s, titel="x"),
            UnknownKeyword,
            r"delta_bars\(\) has no keyword 'titel'; did you mean 'title'",
        ),
    ],
)
def test_a_figure_that_cannot_be_drawn_is_refused(shift, everything, make, error, words):
    with pytest.raises(error, match=words):
        make(shift, everything)


def test_a_table_of_several_positions_is_refused(smol):
    table = hk.ranks(hk.forward(smol, PROMPTS))
    with pytest.raises(
        EmptySelection, match="this figure is about one position, and the table has 3: choose one"
    ):
        hk.figures.logit_scatter(table)


def test_figures_need_neither_torch_nor_a_display_nor_pyplot():
    code = (
        "import sys, hookkit.figures.ranks as f, pandas as pd; "
        "t = pd.DataFrame({'row': 0, 'pos': 0, 'token': [\"'a'\"], 'token_id': [0], 'logit': [1.0], 'rank': [1]}); "
        "f.logit_scatter(t).savefig(__import__('io').BytesIO()); "
        "assert not {'torch', 'transformers', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, env={"PATH": ""})


def test_bars_of_a_logit_are_its_largest_parts_the_others_together_and_their_sum():
    logits = [0.5, -3.0, 0.25, 2.0, -0.125, -1.0]
    parts = pd.DataFrame({"row": 0, "pos": 4, "component": list("abcdef"), "logit": logits})
    axes = hk.figures.logit_bars(parts, top=3).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "d",
        "f",
        "b",
        "the other 3",
        "all together",
    ]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx(
        [2.0, -1.0, -3.0, 0.625, sum(logits)]
    )
    every = hk.figures.logit_bars(parts, top=6).axes[0]
    assert [label.get_text() for label in every.get_yticklabels()] == [*"dacefb", "all together"]
