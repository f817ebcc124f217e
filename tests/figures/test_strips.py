"""The strip of a generation says in its cells what the table says, and can be read whatever the tokens."""

import io
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import hookkit as hk
from hookkit.errors import BadHook, NotCaptured, OutOfRange, UnknownKeyword

PROMPT = "I like oat milk in my"
ODD = [
    "\n",
    "🧋",
    "$x$",
    " internationalization",
    " antidisestablishmentarianism" * 3,
    "$a_b$ \\$",
    " " * 40,
    "漢",
    "�",
]


@pytest.fixture(scope="module")
def table(smol):
    settings = {"max_new_tokens": 14, "do_sample": True, "top_k": 8, "seed": 2}
    return hk.candidates(
        hk.generate(smol, [PROMPT, "Tea is"], hk.ban(" coffee"), trace=hk.trace(), **settings)
    )


@pytest.fixture(scope="module")
def single(smol):
    return hk.candidates(
        hk.generate(smol, PROMPT, trace=hk.trace(top=1), max_new_tokens=2, do_sample=False)
    )


def chosen_of(table, row=0, stage="processed"):
    return table[(table.row == row) & (table.stage == stage) & table.drawn]


def cells_of(figure: Figure) -> list[Rectangle]:
    """The coloured ones; each has a frame beside it."""
    return [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)][::2]


def texts_of(figure: Figure, size: float) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts if text.get_fontsize() == size]


def drawn(figure: Figure) -> bytes:
    """Draw it for real, in both formats; warnings are errors here."""
    page = io.BytesIO()
    figure.savefig(io.BytesIO(), format="svg")
    figure.savefig(page, format="png", metadata={"Software": None})
    return page.getvalue()


@pytest.mark.parametrize("row", [0, 1])
def test_every_step_has_a_cell_with_its_token_and_its_surprisal(table, row):
    figure = hk.figures.decision_strip(table, row=row)
    chosen = chosen_of(table, row)
    assert len(cells_of(figure)) == len(chosen) == 14
    assert texts_of(figure, 9.5) == list(map(repr, chosen["token"]))
    numbers = [text for n, text in enumerate(texts_of(figure, 6.5)) if n % 2]
    assert numbers == [f"{-logprob:.2f}" for logprob in chosen["logprob"]]
    assert figure.axes[1].get_xlabel() == "surprisal of the chosen token (nats)"
    drawn(figure)


def test_a_cells_opacity_is_its_share_of_the_scale(table):
    for colour, stage in (("surprisal", "model"), ("margin", "edited")):
        figure = hk.figures.decision_strip(table, stage=stage, colour=colour)
        here = table[(table.row == 0) & (table.stage == stage)]
        expected = -here[here.drawn]["logprob"].to_numpy()
        if colour == "margin":
            two = [part["logit"].nlargest(2).tolist() for _, part in here.groupby("step")]
            expected = np.array([first - second for first, second in two])
        opacity = np.array([cell.get_facecolor()[3] for cell in cells_of(figure)])
        assert np.allclose(opacity / opacity.max(), expected / expected.max())
        assert figure.axes[1].get_xlim() == (0, expected.max())


def test_under_a_cell_stand_the_first_candidates_and_the_chosen_one_marked(table):
    figure = hk.figures.decision_strip(table)
    marks = [text.get_text() for text in figure.axes[0].texts].count("▸")
    assert marks == 14
    for step, part in table[(table.row == 0) & (table.stage == "processed")].groupby("step"):
        cell = cells_of(figure)[step]
        left, right = cell.get_x(), cell.get_x() + cell.get_width()
        below = [
            t
            for t in figure.axes[0].texts
            if left <= t.get_position()[0] < right and t.get_text() != "▸"
        ]
        below = [t for t in below if 0.45 < t.get_position()[1] - cell.get_y() < 1.4]
        top = part[part.why.str.contains("top") & np.isfinite(part.logit)].head(5)["token"].tolist()
        mine = chosen_of(table)["token"].iloc[step]
        wanted = list(map(repr, top if mine in top else [*top, mine]))
        assert [t.get_text() for t in below if t.get_text()[0] in "'\""] == wanted


def test_steps_go_from_left_to_right_and_on_in_the_next_line(table):
    corners = [(cell.get_y(), cell.get_x()) for cell in cells_of(hk.figures.decision_strip(table))]
    assert corners == sorted(corners)
    assert len({y for y, _ in corners}) == 2
    assert (
        len(
            {
                y
                for y, _ in [
                    (c.get_y(), 0)
                    for c in cells_of(hk.figures.decision_strip(table[table.step < 8]))
                ]
            }
        )
        == 1
    )


def test_no_text_leaves_its_cell_whatever_the_tokens(table):
    odd = table[table.row == 0].copy()
    names = dict(zip(dict.fromkeys(odd.token_id), ODD * 99, strict=False))
    odd["token"] = [names[token] for token in odd.token_id]
    figure = hk.figures.decision_strip(odd)
    (axes, _), renderer = figure.axes, FigureCanvasAgg(figure).get_renderer()
    drawn(figure)
    frames = [cell.get_window_extent(renderer) for cell in cells_of(figure)]
    small = [
        text
        for text in axes.texts
        if text.get_position()[1] < 0.42 + 2 * 1.4 and len(text.get_text()) > 1
    ]
    for text in small:
        box = text.get_window_extent(renderer)
        assert any(f.x0 - 2 <= box.x0 and box.x1 <= f.x1 + 2 for f in frames), text


def test_a_probability_is_not_rounded_to_0_or_1_and_nothing_else_left_is_a_margin_without_end(smol):
    run = hk.generate(
        smol, PROMPT, hk.force(" tea", margin=float("inf")), trace=hk.trace(), max_new_tokens=2
    )
    figure = hk.figures.decision_strip(hk.candidates(run), colour="margin")
    assert texts_of(figure, 6.5)[1] == "∞"
    assert {"1"} == {text for text in texts_of(figure, 7) if text[0].isdigit()}
    drawn(figure)


def test_the_same_table_gives_the_same_bytes(table):
    assert drawn(hk.figures.decision_strip(table)) == drawn(hk.figures.decision_strip(table))


@pytest.mark.parametrize(
    ("keywords", "error", "words"),
    [
        ({"row": 7}, OutOfRange, "row 7 is not in the table, which has rows 0, 1"),
        (
            {"stage": "edit"},
            BadHook,
            "stage='edit' is unknown; did you mean 'edited'.*'model', 'source', 'edited', 'processed'",
        ),
        ({"colour": "entropy"}, BadHook, "colour='entropy' is unknown.*'surprisal', 'margin'"),
        (
            {"color": "margin"},
            UnknownKeyword,
            r"decision_strip\(\) has no keyword 'color'; did you mean 'colour'",
        ),
    ],
)
def test_a_strip_that_cannot_be_drawn_is_refused(table, keywords, error, words):
    with pytest.raises(error, match=words):
        hk.figures.decision_strip(table, **keywords)


def test_other_tables_are_refused(table, single):
    with pytest.raises(
        BadHook, match="drawn from decoding.run., and this table has no column 'stage', 'prob'"
    ):
        hk.figures.decision_strip(table.drop(columns=["stage", "prob"]))
    with pytest.raises(BadHook, match="this table has none, or several: give it unfiltered"):
        hk.figures.decision_strip(table[~table.drawn])
    with pytest.raises(BadHook, match="this table has none, or several: give it unfiltered"):
        hk.figures.decision_strip(pd.concat([table, table]))
    with pytest.raises(
        NotCaptured,
        match=r"a margin needs the two first tokens of each step: record them with trace",
    ):
        hk.figures.decision_strip(single, colour="margin")


def test_strips_need_neither_torch_nor_a_display_nor_pyplot():
    code = (
        "import sys, hookkit.figures.strips as s, hookkit.figures.decoding as l, pandas as pd, io; "
        "t = pd.DataFrame({'row': 0, 'step': [0, 1], 'stage': 'model', 'token': [\"'a'\"] * 2, 'token_id': 0, "
        "'logit': 1.0, 'logprob': -0.5, 'prob': 0.6, 'rank': 1, 'drawn': True, 'why': 'top, watched'}); "
        "[f.savefig(io.BytesIO()) for f in (s.decision_strip(t, stage='model'), l.rank_lines(t))]; "
        "assert not {'torch', 'transformers', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, env={"PATH": ""})
