"""Tables for other programs: Markdown, LaTeX and JSON. No torch.

A token is in quotes in Markdown and LaTeX, `' coffee'`, and plain text in JSON. Characters with a
meaning in Markdown or LaTeX are escaped, so that a token may be "|", "$" or "<script>". Numbers
have four digits in Markdown and LaTeX, and all digits in JSON.
"""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeAlias

import numpy as np
import pandas as pd

from ..display import TOKEN_COLUMNS, WRITTEN_COLUMNS, is_quoted

Kind: TypeAlias = Literal["number", "token", ""]
INFINITY = {np.inf: "∞", -np.inf: "−∞"}
JSON_INFINITY = {np.inf: "Infinity", -np.inf: "-Infinity"}

# The LaTeX of characters that have a meaning there, and of hookkit's characters beyond ASCII.
LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#",
    "_": r"\_", "%": r"\%", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "−": "$-$",
    "∞": r"$\infty$", "Δ": r"$\Delta$", "‖": r"$\Vert$", "×": r"$\times$", "–": "--",
    "…": r"\ldots{}", "“": "``", "”": "''", "→": r"$\to$", "┊": r"\textbar{}",
}  # fmt: skip


def column_kind(name: str, dtype: Any) -> Kind:
    """The kind of a column: numbers are aligned right, tokens are in a monospaced font."""
    if pd.api.types.is_numeric_dtype(dtype) and not pd.api.types.is_bool_dtype(dtype):
        return "number"
    return "token" if name in TOKEN_COLUMNS | WRITTEN_COLUMNS else ""


def format_value(value: Any) -> str:
    """A value as a page shows it, "" for a missing value."""
    if value is None or value is pd.NA:
        return ""
    if not isinstance(value, float | np.floating):
        return str(value)
    if np.isnan(value):
        return ""
    return INFINITY.get(float(value), f"{value:.4g}")


def format_cell(column: str, value: Any) -> str:
    """A value as a page shows it in this column: a token is in quotes."""
    return repr(str(value)) if is_quoted(column, value) else format_value(value)


def as_json(table: pd.DataFrame) -> str:
    """A list of records, one for each row.

    An infinite number is the text "Infinity" or "-Infinity", a missing one null.

    >>> as_json(pd.DataFrame({"token": [" a"], "logit": [-float("inf")]}))
    '[\\n{"token": " a", "logit": "-Infinity"}\\n]\\n'
    """
    names = list(map(str, table.columns))
    lines = []
    for row in table.itertuples(index=False, name=None):
        record = dict(zip(names, map(_json_value, row), strict=True))
        lines.append(json.dumps(record, ensure_ascii=False, allow_nan=False))
    return "[\n" + ",\n".join(lines) + "\n]\n"


def _json_value(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or value is pd.NA or value != value:
        return None
    if isinstance(value, float):
        return JSON_INFINITY.get(value, value)
    return value if isinstance(value, bool | int | str) else str(value)


def as_markdown(table: pd.DataFrame) -> str:
    """A table in GitHub's Markdown; tokens are code.

    >>> print(as_markdown(pd.DataFrame({"token": [" a|b"], "rank": [3]})))
    | token | rank |
    | :--- | ---: |
    | `' a\\|b'` | 3 |
    """
    kinds = _column_kinds(table)
    rule = ["---:" if kind == "number" else ":---" for kind in kinds.values()]
    lines = [map(escape_markdown, kinds), rule, *_cells(table, escape_markdown, _markdown_code)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escape_markdown(text: str) -> str:
    """A text with the characters escaped that have a meaning in Markdown."""
    escaped = re.sub(r"([\\`*_\[\]<>|#&~!$])", r"\\\1", text)
    return escaped.replace("\r", "").replace("\n", " ⏎ ")


def _markdown_code(text: str) -> str:
    """A code span. GitHub splits a row at | before it reads code, so that | is escaped too."""
    if not text:
        return ""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    padding = " " if "`" in text else ""
    return f"{fence}{padding}{text}{padding}{fence}".replace("|", "\\|").replace("\n", " ⏎ ")


def as_latex(table: pd.DataFrame) -> str:
    """A tabular in ASCII that needs no package; a space in a token is written as ␣.

    >>> print(as_latex(pd.DataFrame({"token": [" $5"], "rank": [3]})))
    \\begin{tabular}{lr}
    \\hline
    token & rank \\\\
    \\hline
    \\texttt{'\\textvisiblespace{}\\$5'} & 3 \\\\
    \\hline
    \\end{tabular}
    """
    kinds = _column_kinds(table)
    columns = "".join("r" if kind == "number" else "l" for kind in kinds.values())
    header = " & ".join(map(_escape_latex, kinds))
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\hline", header + r" \\", r"\hline"]
    lines += [" & ".join(row) + r" \\" for row in _cells(table, _escape_latex, _latex_code)]
    return "\n".join([*lines, r"\hline", r"\end{tabular}"])


def _escape_latex(text: str) -> str:
    """Text for LaTeX. A letter beyond ASCII that LATEX does not have is written as its code."""
    return "".join(map(_latex_letter, text))


def _latex_letter(letter: str) -> str:
    if letter in LATEX:
        return LATEX[letter]
    if " " <= letter <= "~":
        return letter
    code = letter.encode("unicode_escape").decode("ascii")[1:]
    return r"\textbackslash{}" + code


def _latex_code(text: str) -> str:
    """A text in a monospaced font, whose spaces are visible."""
    if not text:
        return ""
    return r"\texttt{" + _escape_latex(text).replace(" ", r"\textvisiblespace{}") + "}"


def _cells(
    table: pd.DataFrame, escape: Callable[[str], str], escape_token: Callable[[str], str]
) -> Iterator[list[str]]:
    """The cells of each row as escaped texts."""
    by_kind = {"token": escape_token}
    escapes = [by_kind.get(kind, escape) for kind in _column_kinds(table).values()]
    names = list(map(str, table.columns))
    for row in table.itertuples(index=False, name=None):
        texts = map(format_cell, names, row)
        yield [function(text) for function, text in zip(escapes, texts, strict=True)]


def _column_kinds(table: pd.DataFrame) -> dict[str, Kind]:
    return {str(name): column_kind(str(name), kind) for name, kind in table.dtypes.items()}
