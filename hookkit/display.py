"""HTML for notebooks: a title, facts and a small table. This module does not import torch.

All texts are escaped: a token can be "<script>", and "$x$" is not read as mathematics. Colours are
those of the notebook, so that the HTML can be read on a light and on a dark theme.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

MAX_ROWS = 12  # rows of a table
MAX_CHARACTERS = 160  # characters of a cell
LINE = "border-bottom:1px solid rgba(128,128,128,.35);padding:.15em .6em"
CELL = f"{LINE};text-align:left;vertical-align:top;white-space:pre-wrap;unicode-bidi:isolate"
FAINT = "opacity:.7"


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
        cells = [f'<td style="{CELL}">{escape(format_value(value))}</td>' for value in row.values()]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    style = "border-collapse:collapse;margin:.4em 0;background:none;color:inherit"
    head = f"<thead><tr>{''.join(heads)}</tr></thead>"
    body = f"<tbody>{''.join(lines)}</tbody>"
    table = f'<div style="overflow-x:auto"><table style="{style}">{head}{body}</table></div>'
    hidden = len(rows) - most
    if hidden <= 0:
        return [table]
    return [table, f'<div style="{FAINT}">and {hidden} more</div>']


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
