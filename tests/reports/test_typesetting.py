"""Tables for other programs: what stands in Markdown, LaTeX and JSON is what was in the table."""

import json
import math
import re

import numpy as np
import pandas as pd
import pytest
from markdown_it import MarkdownIt

from hookkit.reports.typesetting import LATEX, as_json, as_latex, as_markdown

HOSTILE = [
    "<script>alert(1)</script>",
    " |",
    "`",
    "``x`|",
    "\n",
    "\t",
    "$5_000 & 10% #1 {x} ~^\\",
    " שלום",
    "*a* [b](c)",
    "🙂",
]


def table() -> pd.DataFrame:
    numbers = [-math.inf, math.inf, math.nan, 0.123456789, *range(6)]
    missing = pd.Series([None, *range(9)], dtype="Int64")
    return pd.DataFrame({"token": HOSTILE, "words": HOSTILE, "prob": numbers, "rank": missing})


def test_json_has_every_value_in_full():
    rows = json.loads(
        as_json(table()), parse_constant=lambda word: pytest.fail(f"{word} is no JSON")
    )
    assert [row["token"] for row in rows] == HOSTILE
    assert [row["words"] for row in rows] == HOSTILE
    assert [row["prob"] for row in rows[:4]] == ["-Infinity", "Infinity", None, 0.123456789]
    assert [row["rank"] for row in rows[:2]] == [None, 0]


def cells_of(markdown: str) -> list[list[str]]:
    parser = MarkdownIt("commonmark").enable("table")
    rows: list[list[str]] = []
    for token in parser.parse(markdown):
        if token.type == "tr_open":
            rows.append([])
        if token.type == "inline":
            rows[-1].append("".join(part.content for part in token.children or []))
            assert not [
                part
                for part in token.children or []
                if part.type not in ("text", "code_inline", "text_special")
            ]
    return rows


def test_markdown_shows_what_was_in_the_table_and_means_nothing_else():
    rows = cells_of(as_markdown(table()))
    assert rows[0] == ["token", "words", "prob", "rank"]
    assert [row[0] for row in rows[1:]] == [repr(t) for t in HOSTILE]
    assert [row[1] for row in rows[1:]] == [t.replace("\n", " ⏎ ").strip() for t in HOSTILE]
    assert [row[2] for row in rows[1:5]] == ["−∞", "∞", "", "0.1235"]


def test_latex_is_ascii_and_can_be_read_back():
    text = as_latex(table())
    assert text.isascii()
    lines = text.splitlines()
    assert lines[0] == r"\begin{tabular}{llrr}" and lines[-1] == r"\end{tabular}"
    rows = [line.removesuffix(r" \\").split(" & ") for line in lines[4:-2]]
    assert len(rows) == len(HOSTILE) and {len(row) for row in rows} == {4}
    for row, token in zip(rows, HOSTILE, strict=True):
        inner = row[0].removeprefix(r"\texttt{").removesuffix("}")
        assert " " not in inner
        inner = inner.replace(r"\textvisiblespace{}", " ")
        back = {tex: letter for letter, tex in LATEX.items() if letter.isascii()}
        inner = re.sub(
            "|".join(re.escape(tex) for tex in sorted(back, key=len, reverse=True)),
            lambda m, back=back: back[m[0]],
            inner,
        )
        assert inner == "".join(
            c if c.isascii() else c.encode("unicode_escape").decode() for c in repr(token)
        )
    assert [row[2] for row in rows[:3]] == [r"$-$$\infty$", r"$\infty$", ""]


def test_a_missing_number_is_an_empty_cell():
    assert as_markdown(pd.DataFrame({"rank": [np.nan]})).endswith("|  |")
