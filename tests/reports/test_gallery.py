"""The index of results: each with its question, answer and picture."""

import base64
import io
import re

import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

import hookkit as hk
from hookkit.errors import BadHook


@pytest.fixture
def made(tmp_path):
    for name, answer in (("oat_milk", "Coffee <script>."), ("tea/green", "")):
        with hk.record(tmp_path / name, question="What comes next?") as results:
            results.table("t", pd.DataFrame({"token": [" a"], "logprob_delta": [1.0]}))
            if answer:
                results.figure("b", Figure())
                results.answer(answer)
    return tmp_path


def test_results_are_listed_with_question_and_answer_those_in_folders_below_too(made):
    found = hk.results.list_results(made)
    assert found["result"].tolist() == ["oat_milk", "tea/green"]
    assert found["title"].tolist() == ["Oat milk", "Green"]
    assert set(found["question"]) == {"What comes next?"} and found["answer"].tolist() == [
        "Coffee <script>.",
        "",
    ]


def test_the_index_shows_each_result_with_a_small_picture_and_links_to_its_page(made):
    page = hk.results.write_index(made, title="Mine & yours").read_text()
    assert (
        "<title>Mine &amp; yours</title>" in page
        and "Coffee &lt;script&gt;." in page
        and "<script" not in page
    )
    links = set(re.findall(r'href="([^"]+)"', page))
    assert links == {"oat_milk/report.html", "tea/green/report.html"}
    (picture,) = re.findall(r'src="data:image/webp;base64,([^"]+)"', page)
    assert max(Image.open(io.BytesIO(base64.b64decode(picture))).size) <= 640
    assert hk.results.write_index(made).read_text() == hk.results.write_index(made).read_text()


def test_a_run_that_stopped_and_a_page_without_about_are_listed_as_what_they_are(made):
    with pytest.raises(ZeroDivisionError), hk.record(made / "oat_milk") as results:
        results.report().write(results.folder)
        raise ZeroDivisionError
    (made / "bare").mkdir()
    (made / "bare" / "report.html").write_text("by hand")
    found = hk.results.list_results(made).set_index("result")
    assert "stopped: ZeroDivisionError" in found["made"]["oat_milk"]
    assert found["title"]["bare"] == "Bare" and found["question"]["bare"] == ""


def test_results_that_ask_nothing_stand_last_and_hidden_folders_not_at_all(made):
    with hk.record(made / "apart") as results:
        results.table("t", pd.DataFrame({"x": [1.0]}))
    for hidden in (made / ".kept", made / "oat_milk" / ".last"):
        hidden.mkdir(exist_ok=True)
        (hidden / "report.html").write_text("by hand")
    (made / "report.html").write_text("of the folder itself")
    assert hk.results.list_results(made)["result"].tolist() == [
        "apart",
        "oat_milk",
        "tea/green",
    ]
    links = re.findall(r'href="([^"]+)"', hk.results.write_index(made).read_text())
    assert list(dict.fromkeys(links)) == [
        "oat_milk/report.html",
        "tea/green/report.html",
        "apart/report.html",
    ]


def test_the_picture_is_the_first_figure_that_was_recorded(tmp_path):
    with hk.record(tmp_path / "two") as results:
        for name, colour in (("z", "red"), ("a", "blue")):
            results.figure(name, Figure(figsize=(2, 2), facecolor=colour))
    (picture,) = re.findall(
        r'src="data:image/webp;base64,([^"]+)"',
        hk.results.write_index(tmp_path).read_text(),
    )
    red, _, blue = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB").getpixel((5, 5))
    assert red > 200 > 50 > blue


def test_a_folder_without_results_is_said_to_have_none(tmp_path):
    with pytest.raises(BadHook, match="there is no folder .*nowhere"):
        hk.results.write_index(tmp_path / "nowhere")
    with pytest.raises(BadHook, match="has no results: a result is a folder with a report.html"):
        hk.results.list_results(tmp_path)
