"""Tables in a terminal and in a pipe: no token can break one."""

import io

import pandas as pd

from hookkit.cli import output
from hookkit.reports.scan import leading_tokens
from hookkit.tables.show import largest_rows

NASTY = [
    "'[red]hot[/red]'",
    "':smile:'",
    "'\\n'",
    "a\nb",
    "\x1b[31mred\x07",
    "'\u202eltr'",
    "'שלום'",
    "'茶'",
    "'🍵'",
    "�",
]


def in_a_terminal(monkeypatch) -> io.StringIO:
    """Standard output as a terminal, from here on."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    made = Terminal()
    monkeypatch.setattr("sys.stdout", made)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    return made


def test_a_token_stands_as_it_is_in_a_terminal(monkeypatch):
    terminal = in_a_terminal(monkeypatch)
    output.print_table(pd.DataFrame({"token": NASTY, "rank": range(len(NASTY))}))
    said = terminal.getvalue()
    assert (
        "[red]hot[/red]" in said
        and ":smile:" in said
        and r"\x1b[31mred\x07" in said
        and "\\u202e" in said
    )
    assert len(said.splitlines()) == len(NASTY) + 1
    assert "\x1b[31m" not in said and "\x07" not in said


def test_columns_are_aligned_by_the_width_of_letters_and_are_never_cut(capsys):
    table = pd.DataFrame(
        {"token": NASTY, "why": ["x" * 300] * len(NASTY), "rank": range(len(NASTY))}
    )
    output.print_table(table)
    from rich.cells import cell_len

    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(NASTY) + 1 and all("x" * 300 in line for line in lines[1:])
    assert len({cell_len(line) for line in lines}) == 1


def test_numbers_of_a_column_have_as_many_digits_and_small_ones_an_exponent(capsys):
    nan, inf = float("nan"), float("inf")
    output.print_table(
        pd.DataFrame({"prob": [0.5, 1e-7, 0.0], "logit": [20.375, nan, -inf], "rank": [1, 2, 3]})
    )
    assert capsys.readouterr().out.splitlines() == [
        "   prob  logit  rank", " 0.5000  20.38     1", "1.0e-07            2", " 0.0000     −∞     3"]  # fmt: skip


def test_a_text_reaches_a_terminal_without_what_would_move_it(monkeypatch):
    terminal = in_a_terminal(monkeypatch)
    output.print_line("one\ntwo\x1b[2J\r")
    assert terminal.getvalue() == "one\ntwo\\x1b[2J\\r\n"


def test_a_place_that_is_the_same_everywhere_is_left_out_for_a_reader():
    shown = output.TableView(pd.DataFrame({"row": [0, 0], "pos": [1, 2], "token": ["a", "b"]}))
    assert list(shown.for_reader().columns) == ["pos", "token"]


def test_the_strongest_rows_are_the_largest_whatever_their_sign():
    table = pd.DataFrame(
        {"place": list("abcdef"), "effect": [0.5, -3.0, 1.0, -0.25, 2.0, float("nan")]}
    )
    assert largest_rows(table, "effect", 3)["place"].tolist() == ["b", "e", "c"]
    assert largest_rows(table, "effect", 3)["effect"].tolist() == [-3.0, 2.0, 1.0], (
        "and keep their sign"
    )
    assert largest_rows(table, "effect", 9)["place"].tolist() == [
        "b",
        "e",
        "c",
        "a",
        "d",
        "f",
    ]
    tied = pd.DataFrame({"place": list("abc"), "effect": [-1.0, 1.0, -1.0]})
    assert largest_rows(tied, "effect", 2)["place"].tolist() == ["a", "b"], "of equals the first"


def test_layers_in_which_one_token_leads_stand_together():
    rows = [
        ("a", 0, 5, 1),
        ("b", 1, 5, 1),
        ("c", 2, 8, 1),
        ("d", 3, 5, 1),
        ("a", 0, 8, 7),
        ("b", 1, 8, 4),
        ("d", 3, 8, 2),
    ]
    lens = pd.DataFrame(rows, columns=["site", "layer", "token_id", "rank"])
    lens = lens.assign(token=lens["token_id"].astype(str), prob=lens["layer"] / 10)
    found = leading_tokens(lens, 8)
    assert found["layers"].tolist() == ["0 to 1", "2", "3"]
    assert found["token"].tolist() == ["5", "8", "5"] and found["prob"].tolist() == [0.1, 0.2, 0.3]
    assert found["rank"].tolist() == ["7 to 4", "1", "2"], "of the token that is asked for"
