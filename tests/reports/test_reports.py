"""Reports: one page that stands by itself, with its files beside it, and nothing in it that runs."""

import io
import itertools
import re
from html.parser import HTMLParser
from importlib.resources import files

import numpy as np
import pandas as pd
import pytest
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

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


class Structure(HTMLParser):
    """The elements of a page with their attributes, and the texts of the titles of its figures."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.titles, self.inside = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.inside = tag

    def handle_data(self, data):
        if self.inside == "title":
            self.titles.append(data)

    def handle_endtag(self, tag):
        self.inside = ""

    def all(self, *tags):
        return [attrs for tag, attrs in self.elements if tag in tags]


def check_structure(text):
    """What a screen reader needs: a language, landmarks, headings in order, names, no id twice."""
    parser = Structure()
    parser.feed(text)
    assert parser.all("html")[0]["lang"] == "en"
    assert len(parser.all("h1")) == len(parser.all("main")) == 1
    levels = [int(tag[1]) for tag, _ in parser.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(new <= old + 1 for old, new in itertools.pairwise(levels))
    ids = [attrs["id"] for _, attrs in parser.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    for attrs in parser.all("img"):
        assert attrs["alt"]
    for attrs in parser.all("th"):
        assert attrs["scope"] in ("col", "colgroup", "row")
    for attrs in parser.all("svg"):
        assert attrs["role"] == "img" and attrs["aria-labelledby"] in ids
    for attrs in parser.all("table"):
        assert attrs["aria-describedby"] in ids
    scrolling = [attrs for attrs in parser.all("div") if attrs.get("class") == "scroll"]
    assert len(scrolling) == len(parser.all("svg")) + len(parser.all("table"))
    for attrs in scrolling:
        assert attrs["tabindex"] == "0" and attrs["role"] == "group" and attrs["aria-label"]
    references = re.findall(r'(?:url\(|href=")#([^)"]+)', text)
    assert set(references) <= set(ids)
    return parser


def test_a_page_has_the_structure_that_a_screen_reader_needs(llama):
    edits = {"forced": hk.force(5), "head": hk.ablate("z.1.2")}
    check_structure(
        hk.shift_report(llama, ["I like", "We love"], edits, figures=2, controls=3).html()
    )
    page = hk.model_diff(llama, llama, ["I like oat milk"], hooks_after=hk.ban(7)).page()
    check_structure(page.html())
    mixed = hk.report("Mixed", "## Small first", table(4), "# Large", "## Small", figure())
    parsed = check_structure(mixed.html())
    assert [tag for tag, _ in parsed.elements if tag in ("h2", "h3")] == ["h2", "h2", "h3"]


def test_the_alternative_text_of_a_figure_is_its_title_its_axes_and_the_caption():
    made = figure("<b>")
    made.axes[0].set_xlabel("layer")
    made.axes[0].set_ylabel("rank & more")
    made.suptitle("All layers")
    page = hk.report("Page", Part(made, "drawn", "A caption.")).html()
    wanted = "All layers. rank &amp; more against layer. A caption"
    assert f'<title id="drawn-title">{wanted}</title>' in page


def test_a_token_that_rose_has_another_colour_and_another_arrow_than_one_that_fell():
    ranks = pd.DataFrame({"token": ["a", "b", "c"], "rank_delta": [-90, 4, 0]})
    page = hk.report("Ranks", ranks).html()
    rows = re.findall(r'<td class="([^"]+)">(.+?)</td>', page)
    assert rows == [("number up rank", "-90"), ("number down rank", "4"), ("number rank", "0")]
    assert 'td.rank.up::before { content: "▲ " / "rose "; }' in page


def luminance(colour):
    """The relative luminance of a colour (WCAG 2.2)."""
    channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(np.multiply(linear, [0.2126, 0.7152, 0.0722]))


def test_all_texts_contrast_with_what_is_behind_them_in_light_in_dark_and_in_print():
    css = files("hookkit.reports").joinpath("templates", "page.css").read_text(encoding="utf-8")
    themes = [dict(re.findall(r"--(\w+): (#\w{6})\b", rule)) for rule in css.split(":root {")[1:]]
    assert len(themes) == 3
    for theme in themes:
        for text in ("ink", "muted", "up", "down"):
            for paper in ("paper", "page"):
                pair = sorted([luminance(theme[text]), luminance(theme[paper])])
                assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5, (text, paper, theme)


def test_a_picture_has_few_colours_and_no_mark_of_its_own_colour_is_lost(tmp_path):
    axes = (drawn := Figure(figsize=(6, 4))).subplots()
    points = np.random.default_rng(0).normal(size=(2, 20000))
    axes.scatter(*points, s=3, color="#0a78bf", alpha=0.35, linewidths=0, rasterized=True)
    axes.scatter([0], [6], color="#d55e00", s=12)
    hk.report("x", Part(drawn, "cloud")).write(tmp_path)
    full = io.BytesIO()
    drawn.savefig(full, dpi=100)
    exact, written = (Image.open(file) for file in (full, tmp_path / "cloud.png"))
    assert len(written.getcolors()) <= 64 and written.info["dpi"][0] == pytest.approx(100, abs=1)
    before, after = (np.array(image.convert("RGB")).astype(int) for image in (exact, written))
    errors = np.abs(after - before).max(axis=-1)
    orange = (before == (0xD5, 0x5E, 0x00)).all(axis=-1)
    white = (before == 255).all(axis=-1)
    assert orange.sum() >= 9 and errors[orange].max() == 0 and errors[white].max() == 0
    assert errors.max() < 60 and np.sqrt((errors**2).mean()) < 8
    assert (tmp_path / "cloud.png").stat().st_size < len(full.getvalue()) / 3


def test_an_svg_is_small_and_its_texts_points_and_references_are_all_there(tmp_path):
    axes = (drawn := figure("A title")).axes[0]
    axes.set_xlabel("3.14159265 of what")
    axes.set_ylabel("x", rotation=30)
    raw = io.StringIO()
    with rc_context({"svg.fonttype": "none"}):
        drawn.savefig(raw, format="svg")
    page = hk.report("x", Part(drawn, "drawn")).html()
    svg = page[page.index("<svg") : page.index("</svg>")]
    for mark in ("<path", "<use", "<text", "rotate(-30"):
        assert svg.count(mark) == raw.getvalue().count(mark), mark
    assert ">3.14159265 of what<" in svg
    ids = set(re.findall(r'id="([^"]+)"', svg))
    assert set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg)) == ids - {"drawn-title"}
    assert len(svg) < 0.7 * len(raw.getvalue())
