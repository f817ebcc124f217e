"""What a notebook shows of a value: a title, facts and a small table, as HTML that stands by itself. No torch.

Everything is escaped: a token may be "<script>". Colours are the notebook's own, so that it is read on a light and on a
dark theme, and nothing in it is mathematics, though a token may be "$".
"""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

MOST = 12  # rows that are shown
LONG = 160  # letters of a cell
LINE = "border-bottom:1px solid rgba(128,128,128,.35);padding:.15em .6em"
CELL = f"{LINE};text-align:left;vertical-align:top;white-space:pre-wrap;unicode-bidi:isolate"
FAINT = "opacity:.7"


def shown(
    title: str,
    facts: Mapping[str, object] | None = None,
    rows: Iterable[Mapping[str, object]] = (),
    *,
    text: str = "",
    most: int = MOST,
) -> str:
    """HTML of a title, of facts by their names, of a table's first rows, and of a text as it stands.

    >>> shown("Tea", {"token": "<script>"})[:46], "&lt;script&gt;" in shown("Tea", {"token": "<script>"})
    ('<div class="tex2jax_ignore mathjax_ignore" sty', True)
    """
    parts = [f"<div><b>{escape(title)}</b></div>"]
    for name, value in (facts or {}).items():
        parts.append(
            f'<div><span style="{FAINT}">{escape(name)}</span> {escape(written(value))}</div>'
        )
    parts += _table(list(rows), most)
    if text:
        parts.append(
            f'<pre style="margin:.3em 0;background:none;color:inherit">{escape(text)}</pre>'
        )
    style = "font-size:.9em;line-height:1.45;color:inherit"
    return f'<div class="tex2jax_ignore mathjax_ignore" style="{style}">{"".join(parts)}</div>'


def printable(text: str) -> str:
    """The text, with the characters that cannot be printed as their escapes: nothing in it moves a terminal's cursor,
    colours it, or turns the direction of what is read.

    >>> printable("tea\\x1b[2J\\u202e")
    'tea\\\\x1b[2J\\\\u202e'
    """
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def printable_lines(text: str) -> str:
    """The text as `printable` gives it, whose lines and tabs stay."""
    return "".join(letter if letter in "\n\t" else printable(letter) for letter in text)


def _table(rows: Sequence[Mapping[str, object]], most: int) -> list[str]:
    if not rows:
        return []
    heads = "".join(
        f'<th style="{LINE};text-align:left">{escape(str(name))}</th>' for name in rows[0]
    )
    lines = [
        "<tr>"
        + "".join(f'<td style="{CELL}">{escape(written(value))}</td>' for value in row.values())
        + "</tr>"
        for row in rows[:most]
    ]
    style = "border-collapse:collapse;margin:.4em 0;background:none;color:inherit"
    table = f'<table style="{style}"><thead><tr>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
    table = f'<div style="overflow-x:auto">{table}</div>'
    more = len(rows) - most
    return [table, f'<div style="{FAINT}">and {more} more</div>'] if more > 0 else [table]


def written(value: Any) -> str:
    """A value in few letters: four digits of a number, the beginning of a long text; nothing where there is none."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    if value is None or text in ("nan", "<NA>", "NaT"):
        return ""
    return text if len(text) <= LONG else f"{text[: LONG - 1]}…"


def records(table: Any, *names: str, most: int = MOST) -> list[dict[str, object]]:
    """The first rows of a DataFrame, of these columns or all; the rest are empty ones, so that they are counted."""
    chosen = table[list(names)] if names else table
    found = [
        {str(name): value for name, value in row.items()}
        for row in chosen.head(most).to_dict("records")
    ]
    return found + [{}] * (len(chosen) - len(found))
