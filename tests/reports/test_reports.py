"""Reports: one page that stands by itself, with its files beside it, and nothing in it that runs."""

import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

import hookkit as hk
from hookkit.errors import BadHook
from hookkit.figures.style import INK
from hookkit.reports.parts import Part

NASTY = "<script>alert(1)</script>"


def figure(words: str = "title") -> Figure:
    made = Figure(figsize=(2, 2))
    made.subplots().set_title(words)
    return made


def table(count: int = 2) -> pd.DataFrame:
    return pd.DataFrame(
        {"token": [NASTY] * count, "prob": [0.123456789] * count, "logit": [-np.inf] * count}
    )


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags, self.words, self.links = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.words.append(data)


def read(page) -> Page:
    parser = Page()
    parser.feed(page.read_text(encoding="utf-8"))
    return parser


def test_a_report_is_one_page_with_its_tables_and_pictures_beside_it(tmp_path):
    page = hk.report(
        "Oat milk", "Why?", "# A table", table(), figure(), Part(figure(), "named", "A caption.")
    ).write(tmp_path / "a" / "b")
    assert page.name == "report.html"
    assert sorted(path.name for path in page.parent.iterdir()) == [
        "README.md",
        "figure_1.png",
        "named.png",
        "report.html",
        "table_1.csv",
    ]
    parsed = read(page)
    assert parsed.tags.count("svg") == 2
    assert parsed.tags.count("h2") == 1
    assert "A table" in parsed.words
    assert "A caption. " in parsed.words
    outside = [link for link in parsed.links if re.match(r"(https?:)?//", link)]
    assert not outside, "the page needs a network"
    assert pd.read_csv(page.parent / "table_1.csv")["token"].tolist() == [NASTY] * 2


def test_what_a_model_or_user_says_is_shown_and_never_run(tmp_path):
    made = hk.report(
        NASTY, NASTY, "# " + NASTY, table(), figure(NASTY), Part(table(), "t", NASTY), footer=NASTY
    )
    parsed = read(made.write(tmp_path))
    assert "script" not in parsed.tags
    assert "".join(parsed.words).count(NASTY) >= 8


def test_the_page_follows_the_readers_theme(tmp_path):
    page = hk.report("x", figure()).write(tmp_path).read_text()
    assert "prefers-color-scheme: dark" in page
    drawn = page[page.index("<svg") : page.index("</svg>")]
    assert "var(--ink)" in page
    assert INK not in drawn


def test_columns_before_after_and_delta_stand_under_one_name(tmp_path, llama):
    before, after = hk.forward(llama, "Tea"), hk.forward(llama, "Tea", hk.force(3))
    page = hk.report("x", hk.rank_shift(before, after)).write(tmp_path).read_text()
    head = page[page.index("<thead>") : page.index("</thead>")]
    assert head.count('colspan="3"') == 4
    assert re.findall(r">(logit|logprob|prob|rank)<", head) == ["logit", "logprob", "prob", "rank"]
    assert head.count(">before<") == head.count(">after<") == head.count(">Δ<") == 4


def test_a_long_table_shows_its_beginning_and_the_csv_has_all(tmp_path):
    page = hk.report("x", table(100)).write(tmp_path)
    assert "The first 24 of 100 rows." in "".join(read(page).words)
    assert len(pd.read_csv(tmp_path / "table_1.csv")) == 100


def test_a_row_and_position_that_all_share_are_said_once(tmp_path, llama):
    ranks = hk.ranks(hk.forward(llama, ["Tea", "I like"]), rows=1, top=3)
    page = hk.report("x", Part(ranks, "ranks", "The top.")).write(tmp_path).read_text()
    assert f"The top. Row 1, pos {ranks['pos'][0]}." in page
    assert not re.search(r">(row|pos)<", page)
    assert list(pd.read_csv(tmp_path / "ranks.csv").columns[:2]) == ["row", "pos"]


def test_the_same_report_twice_is_the_same_bytes(tmp_path):
    for folder in ("a", "b"):
        hk.report("x", table(), figure()).write(tmp_path / folder)
    for name in ("report.html", "table_1.csv", "figure_1.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([3], "parts=3: give a text, or a pandas table"),
        ([Part(table(), "a"), Part(figure(), "a")], "'a' cannot name a part: names stand once"),
        ([Part(table(), "../a")], "cannot name a part"),
        ([Part(table(), "")], "cannot name a part"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_part_that_cannot_be_is_refused(parts, words):
    with pytest.raises(BadHook, match=words):
        hk.report("x", *parts)


def test_a_column_without_any_value_is_in_the_csv_only(tmp_path):
    means = pd.DataFrame({"prob": [0.25, 0.5], "prob_se": [float("nan")] * 2})
    page = hk.report("Means", Part(means, "means")).write(tmp_path)
    assert "prob_se" not in page.read_text() and "0.25" in page.read_text()
    assert list(pd.read_csv(tmp_path / "means.csv").columns) == ["prob", "prob_se"]
