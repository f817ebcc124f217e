"""HTML for notebooks: a title, facts and a small table. This module does not import torch.

All texts are escaped: a token can be "<script>", and "$x$" is not read as mathematics. Colours are
those of the notebook, so that the HTML can be read on a light and on a dark theme.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import starmap
from typing import Any

MAX_ROWS = 12  # rows of a table
MAX_CHARACTERS = 160  # characters of a cell
LINE = "border-bottom:1px solid rgba(128,128,128,.35);padding:.15em .6em"
CELL = f"{LINE};text-align:left;vertical-align:top;white-space:pre-wrap;unicode-bidi:isolate"
FAINT = "opacity:.7"
# The columns that are coloured by their sign: with 1 positive numbers are green, with -1 negative.
SIGNED = {"logit_delta": 1, "logprob_delta": 1, "prob_delta": 1, "rank_delta": -1}
CELL_COLOURS = {1: "#1f9e89", -1: "#e0522d", 0: ""}  # legible on light and on dark
# The columns of tables whose texts are tokens, and those whose texts a model wrote. Where they are
# shown, the texts stand in quotes, so that a leading space or a line end can be seen.
TOKEN_COLUMNS = frozenset(
    ("token", "read", "came", "answer_token", "wrong_token", "top1", "top2",
     "top1_before", "top1_after", "top1_model", "token_predicted", "token_that_came")
)  # fmt: skip
WRITTEN_COLUMNS = frozenset(
    ("both", "then_before", "then_after", "baseline", "edited", "generated", "written", "context")
)


def render_html(
    title: str,
    facts: Mapping[str, object] | None = None,
    rows: Iterable[Mapping[str, object]] = (),
    *,
    text: str = "",
    most: int = MAX_ROWS,
) -> str:
    """Returns HTML of a title, of facts by their names, of a table's first rows and of a text.

    >>> render_html("Tea", {"token": "<script>"})[-39:]
    'token</span> &lt;script&gt;</div></div>'
    """
    parts = [f"<div><b>{escape(title)}</b></div>"]
    for name, value in (facts or {}).items():
        label = f'<span style="{FAINT}">{escape(name)}</span>'
        parts.append(f"<div>{label} {escape(format_value(value))}</div>")
    parts += _table(list(rows), most)
    if text:
        style = "margin:.3em 0;background:none;color:inherit"
        parts.append(f'<pre style="{style}">{escape(text)}</pre>')
    style = "font-size:.9em;line-height:1.45;color:inherit"
    return f'<div class="tex2jax_ignore mathjax_ignore" style="{style}">{"".join(parts)}</div>'


def _table(rows: Sequence[Mapping[str, object]], most: int) -> list[str]:
    if not rows:
        return []
    style = f"{LINE};text-align:left"
    heads = [f'<th style="{style}">{escape(str(name))}</th>' for name in rows[0]]
    lines: list[str] = []
    for row in rows[:most]:
        lines.append(f"<tr>{''.join(starmap(_cell, row.items()))}</tr>")
    style = "border-collapse:collapse;margin:.4em 0;background:none;color:inherit"
    head = f"<thead><tr>{''.join(heads)}</tr></thead>"
    body = f"<tbody>{''.join(lines)}</tbody>"
    table = f'<div style="overflow-x:auto"><table style="{style}">{head}{body}</table></div>'
    hidden = len(rows) - most
    if hidden <= 0:
        return [table]
    return [table, f'<div style="{FAINT}">and {hidden} more</div>']


def _cell(column: str, value: object) -> str:
    """Returns the HTML of a cell. Numbers are aligned right, and deltas coloured by direction."""
    style = CELL
    if isinstance(value, int | float) and not isinstance(value, bool):
        style = f"{LINE};text-align:right"
        colour = CELL_COLOURS[direction_of(column, value)]
        style += f";color:{colour}" * bool(colour)
    return f'<td style="{style}">{escape(format_cell(column, value))}</td>'


def direction_of(column: object, value: Any) -> int:
    """Returns 1 for a delta of a token that became more likely, -1 for less likely, else 0.

    A `rank_delta` below 0 is that of a token that rose.
    """
    if column not in SIGNED or value is None or value != value:
        return 0
    change = SIGNED[str(column)] * value
    return int(change > 0) - int(change < 0)


def progress_bar(progress: bool | None, **settings: Any) -> Any:
    """Returns a bar of tqdm with these settings. With `progress=None` it is shown in a terminal."""
    from tqdm.auto import tqdm

    return tqdm(disable=None if progress is None else not progress, **settings)


def format_value(value: Any) -> str:
    """Returns a short text of a value: numbers with four digits, and "" for a missing value."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    if value is None or text in ("nan", "<NA>", "NaT"):
        return ""
    return text if len(text) <= MAX_CHARACTERS else f"{text[: MAX_CHARACTERS - 1]}…"


def quote_token(token: object) -> str:
    """Returns a token in quotes, with escapes for what cannot be printed; "" for a missing one.

    >>> quote_token(" coffee"), quote_token("\\n")
    ("' coffee'", "'\\\\n'")
    """
    return repr(str(token)) if isinstance(token, str) else ""


def is_quoted(column: object, value: object) -> bool:
    """True for a text in a column of tokens, or of texts that a model wrote."""
    return isinstance(value, str) and column in TOKEN_COLUMNS | WRITTEN_COLUMNS


def format_cell(column: object, value: Any) -> str:
    """Returns a short text of a table's cell: see `format_value`. Tokens are in quotes."""
    return format_value(repr(str(value)) if is_quoted(column, value) else value)


def describe_outcome(text: str, *calls: str) -> str:
    """Returns the text of an outcome's `repr`: what it holds, and what to call next."""
    return f"{text}\n  next: {', '.join(calls)}"


def count_of(number: int, noun: str) -> str:
    """Returns a number with its noun: "1 text", "2 texts"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def first_rows(table: Any, *names: str, most: int = MAX_ROWS) -> list[dict[str, object]]:
    """Returns the first rows of a DataFrame, and an empty dict for each row after them."""
    if names:
        table = table[list(names)]
    rows = table.rename(columns=str).head(most).to_dict("records")
    return rows + [{}] * (len(table) - len(rows))


def printable(text: str) -> str:
    """Returns the text with escapes for characters that cannot be printed.

    Nothing in it moves a terminal's cursor, changes its colours or the direction of the text.

    >>> printable("tea\\x1b[2J\\u202e")
    'tea\\\\x1b[2J\\\\u202e'
    """
    if text.isprintable():
        return text
    return "".join(map(_printable_character, text))


def printable_lines(text: str) -> str:
    """Returns the text as `printable` does, but keeps line ends and tabs."""
    return re.sub(r"[^\n\t]+", lambda match: printable(match[0]), text)


def _printable_character(character: str) -> str:
    return character if character.isprintable() else repr(character)[1:-1]
