"""README.md beside a page and beside the results: what a code host shows of them."""

import io
import re

import numpy as np
import pandas as pd
import pytest
from markdown_it import MarkdownIt
from matplotlib.figure import Figure
from PIL import Image

import hookkit as hk
from hookkit.reports.parts import Part, part_files

NASTY = "<script>alert(1)</script> | `x` [a](b) *c* $d$"


def drawn() -> Figure:
    figure = Figure(figsize=(3, 2))
    axes = figure.subplots()
    axes.imshow(np.linspace(0, 1, 400).reshape(20, 20), cmap="RdBu")
    axes.set_title("title", color="red")
    return figure


def rendered(path) -> str:
    """A Markdown file as a code host renders it."""
    return MarkdownIt("commonmark", {"html": False}).enable("table").render(path.read_text())


def test_a_readme_has_the_title_texts_tables_and_figures_of_the_page(tmp_path):
    table = pd.DataFrame({"token": [NASTY] * 40, "prob": np.linspace(0, 1, 40)})
    table["empty"] = np.nan
    parts = [
        NASTY,
        "# Before",
        "one\ntwo",
        Part(table, "ranks", "All."),
        Part(drawn(), "map", "A map."),
    ]
    hk.report("A <b>title", *parts, footer="Made by hand.").write(tmp_path)
    page = rendered(tmp_path / "README.md")
    words = re.sub(r"<[^>]+>", "", page)
    assert "<h1>A &lt;b&gt;title</h1>" in page and "<h2>Before</h2>" in page
    assert "<script" not in page and "alert(1)" in words and "<em>" not in page
    assert page.count("<tr>") == 1 + 4 and "ranks.csv has 40 rows and 3 columns" in words
    assert "empty" not in words and "Made by hand." in words
    assert '<a href="ranks.csv">' in page and '<img src="map.png" alt="A map." />' in page
    assert "one<br />\ntwo" in page
    assert page.count("|") == 1 + 4  # a bar in a token does not end its cell
    assert all(row.count("<td") == 2 for row in page.split("<tr>")[2:])


def test_a_wide_table_shows_its_first_columns_without_their_details(tmp_path):
    names = [name for number in range(9) for name in (f"m{number}", f"m{number}_se")]
    hk.report("R", pd.DataFrame([range(18)], columns=names)).write(tmp_path)
    words = re.sub(r"<[^>]+>", " ", rendered(tmp_path / "README.md"))
    assert "m8" in words and "_se" not in words and "has 1 rows and 18 columns" in words


def test_a_long_table_has_no_link_since_a_repository_may_leave_it_out(tmp_path):
    long = pd.DataFrame({"pos": range(201), "loss": 0.5})
    parts = Part(long, "long"), Part(long[:5], "first", file="long"), Part(long[:200], "short")
    hk.report("R", *parts).write(tmp_path)
    page = rendered(tmp_path / "README.md")
    assert re.findall(r'href="([^"]+)"', page) == ["short.csv"]
    assert page.count("<code>long.csv</code>") == 2
    assert page.count("has 201 rows and 2 columns") == 1
    assert (tmp_path / "long.csv").is_file()


@pytest.mark.parametrize("write", ["report", "record", "index"])
def test_a_readme_of_ones_own_stays_as_it_is_and_an_own_one_is_replaced(tmp_path, write):
    def make(answer: str) -> None:
        if write == "report":
            hk.report("R", answer).write(tmp_path)
            return
        with hk.record(tmp_path / "one" if write == "index" else tmp_path) as results:
            results.answer(answer)
        if write == "index":
            hk.results.write_index(tmp_path)

    readme = tmp_path / "README.md"
    readme.write_text("# My project\n")
    make("Coffee")
    assert readme.read_text() == "# My project\n"
    readme.unlink()
    make("Tea")
    assert "Tea" in readme.read_text()
    make("Milk")
    assert "Milk" in readme.read_text() and "Tea" not in readme.read_text()


def test_results_without_their_pages_are_listed_and_shown(tmp_path, hookkit):
    with hk.record(tmp_path / "oat milk", question="What?") as results:
        results.figure("bump", drawn())
        results.table("t", pd.DataFrame({"x": [1.0]}))
        results.answer("Coffee.")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "README.md").write_text("by hand")
    (tmp_path / "oat milk" / "report.html").unlink()
    assert hk.results.list_results(tmp_path)[["result", "page"]].to_numpy().tolist() == [
        ["oat milk", "oat milk/README.md"]
    ]
    assert 'href="oat%20milk/README.md"' in hk.results.write_index(tmp_path).read_text()
    readme = (tmp_path / "README.md").read_text()
    assert 'src="oat%20milk/bump.png"' in readme and "Coffee." in readme
    assert "Coffee." in hookkit("show", str(tmp_path / "oat milk")).stdout


def test_a_report_without_its_page_is_written_again_and_a_changed_file_is_not(tmp_path):
    def make(number: float) -> None:
        hk.report("R", Part(pd.DataFrame({"x": [number]}), "t")).write(tmp_path)

    make(1.0)
    (tmp_path / "report.html").unlink()
    make(2.0)
    assert (tmp_path / "t.csv").read_text() == "x\n2\n"
    (tmp_path / "report.html").unlink()
    (tmp_path / "t.csv").write_text("x\n3\n")
    with pytest.raises(hk.errors.BadFile, match=r"t\.csv"):
        make(4.0)
    assert (tmp_path / "t.csv").read_text() == "x\n3\n"


def test_a_figure_is_a_png_of_few_colours_that_nobody_tells_from_the_drawing():
    figure = drawn()
    full = io.BytesIO()
    figure.savefig(full, format="png", dpi=100)
    data = part_files(Part(figure, "map"))["map.png"]
    image = Image.open(io.BytesIO(data))
    assert image.mode == "P" and len(data) < 0.7 * len(full.getvalue())
    pixels = [
        np.asarray(Image.open(source).convert("RGB"), int) for source in (full, io.BytesIO(data))
    ]
    far = np.abs(pixels[0] - pixels[1]).max(-1)
    assert far.mean() < 2 and (far > 48).mean() < 1e-3
    figure.patch.set_alpha(0)
    clear = Image.open(io.BytesIO(part_files(Part(figure, "map"))["map.png"])).convert("RGBA")
    assert clear.getpixel((0, 0))[3] == 0
