"""Figures: what is drawn is what the table says, with names that can be read, and without a display."""

import gc
import itertools
import subprocess
import sys
import weakref

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
    heights = [text.xyann[1] for text in axes.texts]  # as shares of the axes' height
    assert 0 < min(heights) < max(heights) < 1, "a label fell off the axes"
    drawn(figure)


def test_labels_do_not_stand_on_each_other(shift):
    figure = hk.figures.rank_bump(shift)
    figure.canvas.draw()
    (axes,) = figure.axes
    for side in (0, 1):
        heights = [t.xyann[1] for t in axes.texts if (t.xyann[0] > 1) == side]
        pixels = np.sort(axes.transAxes.transform([(0, height) for height in heights])[:, 1])
        assert np.diff(pixels).min() >= 8.5 / 72 * figure.dpi, "closer than a line of text is high"


def test_bars_are_the_deltas_and_a_banned_tokens_bar_has_no_end(shift):
    figure = hk.figures.delta_bars(shift)
    (axes,) = figure.axes
    finite = shift.sort_values("logprob_delta", ascending=False)["logprob_delta"].to_numpy()
    widths = np.array([patch.get_width() for patch in axes.patches])
    assert np.allclose(widths[np.isfinite(finite)], finite[np.isfinite(finite)])
    assert words_of(figure)[-1] == "−∞"
    assert [bool(patch.get_hatch()) for patch in axes.patches] == np.isinf(finite).tolist()
    assert axes.get_xlabel() == "Δ log-probability (nats), after minus before"
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
        "sum of all",
    ]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx(
        [2.0, -1.0, -3.0, 0.625, sum(logits)]
    )
    every = hk.figures.logit_bars(parts, top=6).axes[0]
    assert [label.get_text() for label in every.get_yticklabels()] == [*"dacefb", "sum of all"]


# ---- in a notebook


def shown_by_a_notebook(*cells: str) -> list[list[str]]:
    """The kinds of data of each output of the cells of a notebook, in a fresh kernel."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    code_cells = [nbformat.v4.new_code_cell(cell) for cell in cells]
    notebook = nbformat.v4.new_notebook(cells=code_cells)
    nbclient.NotebookClient(notebook, kernel_name="python3", timeout=120).execute()
    outputs = itertools.chain.from_iterable(cell.outputs for cell in notebook.cells)
    return [sorted(output.data) for output in outputs]


BARS = (
    "import sys, pandas as pd, hookkit as hk\n"
    "parts = pd.DataFrame({'row': 0, 'pos': 4, 'component': ['a', 'b'], 'logit': [1.0, 2.0]})"
)


def test_a_notebook_shows_a_figure_once_with_or_without_pyplot():
    outputs = shown_by_a_notebook(
        BARS,
        "figure = hk.figures.logit_bars(parts); assert 'matplotlib.pyplot' not in sys.modules",
        "hk.figures.logit_bars(parts)",
        "%matplotlib inline",
        "import matplotlib.pyplot as plt; hk.figures.logit_bars(parts)",
        "assert not plt.get_fignums()",
    )
    assert outputs == [["image/png", "text/plain"]] * 2


def test_a_figures_memory_is_freed_with_it():
    parts = pd.DataFrame({"row": 0, "pos": 4, "component": ["a", "b"], "logit": [1.0, 2.0]})
    figure = hk.figures.logit_bars(parts)
    picture, size = figure._repr_png_()
    assert picture.startswith(b"\x89PNG")
    assert size["width"] == round(96 * figure.get_figwidth())
    watched = weakref.ref(figure)
    del figure
    gc.collect()
    assert watched() is None


# ---- colours, axes, and what has no number


def grid_of(*rows: list[float]) -> pd.DataFrame:
    cells = itertools.product(range(len(rows)), range(len(rows[0])))
    table = pd.DataFrame(list(cells), columns=["layer", "head"])
    return table.assign(m_delta=np.ravel(rows))


def test_numbers_of_which_none_is_negative_have_a_scale_from_0_on():
    assert hk.figures.heat_map(grid_of([0.0, 2.0], [1.0, 4.0])).axes[-1].get_ylim() == (0, 4)
    bar = hk.figures.heat_map(grid_of([0.0, 2.0], [-1.0, 4.0])).axes[-1]
    assert bar.get_ylim() == (-4, 4)
    assert "0 is the centre" in bar.get_ylabel().replace("\n", " ")


def test_noise_is_not_written_in_cells_and_a_cell_without_a_number_is_hatched():
    figure = hk.figures.heat_map(grid_of([90.0, 0.5, float("nan")], [0.2, -80.0, 0.1]))
    assert [text.get_text() for text in figure.axes[0].texts] == ["90", "-80"]
    assert [cells.get_hatch() for cells in figure.axes[0].collections] == [None, "//////"]


def test_a_logit_of_minus_infinity_stands_on_a_line_of_its_own(everything):
    banned = everything.copy()
    is_tea = banned["token_id"] == 7188
    banned.loc[is_tea, "logit"] = -np.inf
    figure = hk.figures.logit_scatter(banned, watch=7188)
    (axes,) = figure.axes
    assert "−∞: 1 of 49,152 tokens" in words_of(figure)
    heights = np.asarray(axes.collections[0].get_offsets())[:, 1]
    assert axes.get_ylim()[0] < heights[is_tea.to_numpy()].item() < everything["logit"].min()


def test_layers_are_whole_numbers_on_an_axis():
    rows = [{"layer": float(layer), "m_delta": 0.5 * layer} for layer in range(14, 18)]
    figure = hk.figures.interval_lines(pd.DataFrame(rows), value="m_delta")
    figure.canvas.draw()
    texts = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert set(texts) <= {"13", "14", "15", "16", "17", "18"}
    assert len(set(texts)) == len(texts)


def test_a_curve_of_doses_has_the_means_and_the_band_of_the_random_vectors():
    cells = itertools.product([-0.2, 0.1, 0.3], range(3), range(12))
    table = pd.DataFrame(list(cells), columns=["dose", "sample", "row"])
    table = table.assign(vector="v", site="resid_post.3", layer=3, prompt=table["row"])
    table = table.assign(length=1.0, control=table["sample"] > 0, m_before=0.0)
    table["m"] = np.where(table["control"], 0.01, 1.0) * table["dose"] * (table["row"] + 1)
    table["m_delta"] = table["m"]
    (axes,) = hk.figures.dose(table, labels={"v": "mood"}).axes
    lines = {line.get_label(): line for line in axes.lines}
    assert lines["mood"].get_xdata().tolist() == [-0.2, 0.1, 0.3]
    assert lines["mood"].get_ydata() == pytest.approx(6.5 * np.array([-0.2, 0.1, 0.3]))
    control = lines["random vectors of equal length"]
    assert control.get_ydata() == pytest.approx(0.065 * np.array([-0.2, 0.1, 0.3]))
    assert control.get_linestyle() == "--"
    assert len(axes.collections) == 2  # the band of the control, and that of the vector
    few = hk.figures.dose(table[table["row"] < 4]).axes[0]
    dots = [line for line in few.lines if line.get_marker() == "."]
    assert not few.collections
    assert sum(len(line.get_xdata()) for line in dots) == 3 * 3 * 4


def test_a_character_that_another_installed_font_has_is_drawn(tmp_path, monkeypatch):
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen
    from matplotlib import font_manager

    from hookkit.figures import style

    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    pen.lineTo((900, 0))
    pen.lineTo((900, 900))
    pen.closePath()
    triangle = pen.glyph()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "han"])
    builder.setupCharacterMap({ord("漢"): "han"})
    builder.setupGlyf({".notdef": triangle, "han": triangle})
    builder.setupHorizontalMetrics({".notdef": (1000, 0), "han": (1000, 0)})
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": "Noto Emoji", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "font.ttf")
    parts = pd.DataFrame({"row": 0, "pos": 4, "component": ["漢", "字"], "logit": [2.0, 1.0]})
    manager = font_manager.fontManager
    monkeypatch.setattr(manager, "ttflist", list(manager.ttflist))
    manager.addfont(tmp_path / "font.ttf")
    monkeypatch.setattr(style, "FALLBACK_FONTS", ("Noto Emoji",))  # whatever else is installed
    for cached in (style.fallback_fonts, style._font_characters):
        monkeypatch.setattr(style, cached.__name__, cached.__wrapped__)
    figure = hk.figures.logit_bars(parts)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    drawn(figure)  # without a warning about a missing character
    assert labels[:2] == ["漢", r"\u5b57"]
    monkeypatch.setattr(style, "FALLBACK_FONTS", ())
    plain = hk.figures.logit_bars(parts).axes[0].get_yticklabels()
    assert plain[0].get_text() == r"\u6f22"


# ---- the prompt


def test_a_figure_says_its_prompt_and_labels_positions_by_tokens(smol):
    clean, corrupted = "I like oat milk in my", "I like oat milk in her"
    lens = hk.logit_lens(smol, clean, pos=None, top=1)
    metric = hk.metrics.prob(" tea")
    patched = hk.patching(smol, clean, corrupted, "resid_pre", metric, layers=[3, 20])
    figures = ((clean, hk.figures.lens_map(lens)), (corrupted, hk.figures.heat_map(patched)))
    for prompt, figure in figures:
        figure.canvas.draw()
        tokens = map(smol.tokenizer.decode, smol.tokenizer(prompt)["input_ids"])
        labels = [f"{token!r}  {pos}" for pos, token in enumerate(tokens)]
        assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == labels
        assert figure.texts[-1].get_text() == f"“{prompt}”"
    ranked = hk.ranks(hk.forward(smol, [clean, "Tea is"]), top=5)
    part = hk.figures.logit_scatter(ranked[ranked["row"] == 1])
    assert part.texts[-1].get_text() == "“Tea is”"


def test_several_prompts_have_the_tokens_that_all_have_as_labels(smol):
    prompts = ["I like oat milk in my", "I like rice milk in my"]
    hook = {"hooks": lambda pos: hk.ablate("resid_pre.5", pos=pos), "metrics": hk.metrics.entropy()}
    table = hk.sweep(smol, prompts, {"pos": range(6)}, **hook).assign(layer=5)
    figure = hk.figures.heat_map(table)
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert labels == ["'I'  0", "' like'  1", "…  2", "' milk'  3", "' in'  4", "' my'  5"]
    assert figure.texts[-1].get_text() == f"2 prompts, the first: “{prompts[0]}”"
