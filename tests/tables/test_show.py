"""What hk.show prints and displays: read back from the terminal's text and from the HTML."""

import io
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from rich.cells import cell_len

import hookkit as hk
from hookkit.errors import BadArgument, OutOfRange

SHIFT = pd.DataFrame(
    {
        "row": [0, 0, 0], "pos": [5, 5, 5], "token": [" coffee", "\n", "漢字"], "token_id": [7, 8, 9],
        "prob_before": [0.1, 0.25, 1e-9], "prob_after": [0.9, 0.05, 1e-9],
        "logprob_delta": [2.2, -1.6, -np.inf], "rank_before": [12, 1, 300], "rank_after": [1, 4, 300],
        "rank_delta": [-11, 3, 0], "why": ["top after, edited"] * 3,
    }
)  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")


def test_a_table_is_printed_with_tokens_in_quotes_and_the_columns_that_matter(wide, capsys):
    hk.show(SHIFT)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "row 0, pos 5"
    assert lines[1].split() == [
        "token", "prob_before", "prob_after", "rank_before", "rank_after", "rank_delta", "why"
    ]  # fmt: skip
    assert lines[2].split() == [
        "'",
        "coffee'",
        "0.1000",
        "0.9000",
        "12",
        "1",
        "-11",
        "top",
        "after,",
        "edited",
    ]
    assert lines[3].split()[0] == r"'\n'" and lines[4].split()[:3] == [
        "'漢字'",
        "1.0e-09",
        "1.0e-09",
    ]
    assert lines[5] == "more columns: token_id, logprob_delta; choose with columns=[...]"
    assert SHIFT["token"][0] == " coffee"


def test_below_chosen_columns_nothing_is_said_of_the_others(capsys):
    hk.show(SHIFT, columns=["token", "rank_delta"])
    shown = capsys.readouterr().out
    assert "rank_delta" in shown and "more columns" not in shown


@pytest.mark.parametrize("width", [20, 40, 60, 80, 200])
def test_no_line_is_wider_than_the_terminal_and_hidden_columns_are_named(
    width, monkeypatch, capsys
):
    monkeypatch.setenv("COLUMNS", str(width))
    table = SHIFT.assign(text="word " * 60, **{f"number_{n}": 0.5 for n in range(20)})
    hk.show(table)
    lines = capsys.readouterr().out.splitlines()
    drawn, (note,) = [x for x in lines if not x.startswith("more")], lines[-1:]
    assert max(map(cell_len, drawn)) <= width and "..." not in drawn[1]
    heads = next(line for line in drawn if "token" in line.split()).split()
    named = set(re.findall(r"\w+", note.split(";")[0])) - {"more", "columns"}
    assert named | set(heads) | {"row", "pos"} == set(table.columns)


def test_columns_that_are_asked_for_are_all_shown_in_blocks(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    hk.show(SHIFT, columns=list(SHIFT.columns))
    lines = capsys.readouterr().out.splitlines()
    heads = [word for line in lines for word in line.split() if word in SHIFT.columns]
    assert heads == list(SHIFT.columns) and max(map(cell_len, lines)) <= 40


def test_rows_that_are_not_shown_are_counted(wide, capsys):
    hk.show(pd.DataFrame({"token": ["a"] * 30, "rank": range(30)}), rows=4)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and lines[-1] == "more rows: 26, with rows=30"


def test_a_rise_is_green_and_a_fall_red_in_a_terminal_with_colours(wide, monkeypatch):
    for colours in (True, False):
        made = Terminal()
        monkeypatch.setattr(sys, "stdout", made)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.delenv("NO_COLOR", raising=False)
        if not colours:
            monkeypatch.setenv("NO_COLOR", "1")
        hk.show(SHIFT, columns=["token", "rank_delta"])
        said = made.getvalue()
        assert ("\x1b[32m-11\x1b[0m" in said.replace(" ", "")) == colours
        assert ("\x1b[31m+3\x1b[0m" in said.replace(" ", "")) == colours


def test_a_hostile_token_moves_no_terminal_and_is_no_markup(wide, monkeypatch):
    made = Terminal()
    monkeypatch.setattr(sys, "stdout", made)
    monkeypatch.setenv("TERM", "dumb")
    hk.show(pd.DataFrame({"token": ["\x1b[2J", "[red]", ":smile:"], "note": ["\x1b[2J\r"] * 3}))
    said = made.getvalue()
    assert "\x1b" not in said and r"\x1b[2J" in said and "[red]" in said and ":smile:" in said


def test_any_table_can_be_shown(wide, capsys):
    for table in (
        SHIFT.head(0), SHIFT.head(1), SHIFT[["token"]], SHIFT[["row", "pos"]], pd.DataFrame(),
        SHIFT.set_index("token")["rank_after"], SHIFT.assign(prob=np.inf), SHIFT.assign(prob=np.nan),
        pd.DataFrame({("a", "b"): [1]}), pd.DataFrame({3: ["x"]}),
        pd.DataFrame({"rank": pd.array([1, None], "Int64"), "token": ["a", None]}),
    ):  # fmt: skip
        hk.show(table)
    said = capsys.readouterr().out
    assert "'漢字'" in said and "∞" in said and "nan" not in said and "NA" not in said


def test_several_tables_and_outcomes_are_shown_and_other_things_are_refused(wide, llama, capsys):
    run = hk.forward(llama, "Tea")
    hk.show({"shift": SHIFT, "run": run})
    said = capsys.readouterr().out
    assert said.startswith("shift:\nrow 0") and repr(run) in said
    for value in ([1], "text", 3.0, None):
        with pytest.raises(BadArgument, match="cannot be shown: give a table"):
            hk.show(value)
    with pytest.raises(
        BadArgument, match=r"columns=\['rnak'\] are not in the table, which has row"
    ):
        hk.show(SHIFT, columns=["rnak"])
    with pytest.raises(OutOfRange, match="rows=0"):
        hk.show(SHIFT, rows=0)
    figure = hk.figures.rank_bump(hk.rank_shift(run, run))
    with pytest.raises(BadArgument, match="savefig"):
        hk.show(figure)


class Cells(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.cells: list[tuple[str, str]] = []
        self.inside = False

    def handle_starttag(self, tag, attrs):
        self.inside = tag == "td"
        if self.inside:
            self.cells.append((dict(attrs)["style"], ""))

    def handle_data(self, data):
        if self.inside:
            style, text = self.cells.pop()
            self.cells.append((style, text + data))


def test_a_notebook_displays_html_with_colours(monkeypatch):
    display = pytest.importorskip("IPython.display")
    shown = []
    monkeypatch.setattr("hookkit.tables.show._display", lambda: shown.append)
    hk.show(SHIFT)
    assert isinstance(shown[0], display.HTML)
    read = Cells()
    read.feed(shown[0].data)
    styles = {text: style for style, text in read.cells}
    assert (
        "' coffee'" in styles
        and "color:#1f9e89" in styles["-11"]
        and "color:#e0522d" in styles["3"]
    )
    assert "color" not in styles["12"] and "text-align:right" in styles["12"]
    assert "more columns:" in shown[0].data and "row 0, pos 5" in shown[0].data
