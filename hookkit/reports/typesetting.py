"""Tables for other programs: Markdown, LaTeX and JSON. No torch.

A token is written as a Python literal, `' coffee'`. Characters with a meaning in Markdown or LaTeX
are escaped, so that a token may be "|", "$" or "<script>". Numbers have four digits in Markdown and
LaTeX, and all digits in JSON.
"""

import json
import re
from typing import Any, Literal, TypeAlias

import numpy as np
import pandas as pd

Kind: TypeAlias = Literal["number", "token", ""]

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
    return "token" if name.startswith(("token", "top1", "read")) else ""


def format_value(value: Any) -> str:
    """A value as a page shows it, "" for a missing value."""
    if value is None or value is pd.NA:
        return ""
    if not isinstance(value, float | np.floating):
        return str(value)
    if np.isnan(value):
        return ""
    if np.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:.4g}"


def as_json(table: pd.DataFrame) -> str:
    """A list of records, one for each row.

    An infinite number is the text "Infinity" or "-Infinity", a missing one null.

    >>> as_json(pd.DataFrame({"token": ["' a'"], "logit": [-float("inf")]}))
    '[\\n{"token": "\\' a\\'", "logit": "-Infinity"}\\n]\\n'
    """
    names = [str(name) for name in table.columns]
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
    if isinstance(value, float) and np.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, bool | int | float | str):
        return value
    return str(value)


def as_markdown(table: pd.DataFrame) -> str:
    """A table in GitHub's Markdown; tokens are code.

    >>> print(as_markdown(pd.DataFrame({"token": ["' a|b'"], "rank": [3]})))
    | token | rank |
    | :--- | ---: |
    | `' a\\|b'` | 3 |
    """
    kinds = _column_kinds(table)
    rule = ["---:" if kind == "number" else ":---" for kind in kinds.values()]
    lines = [[escape_markdown(name) for name in kinds], rule]
    for row in table.itertuples(index=False, name=None):
        cells = []
        for value, kind in zip(row, kinds.values(), strict=True):
            escape = _markdown_code if kind == "token" else escape_markdown
            cells.append(escape(format_value(value)))
        lines.append(cells)
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

    >>> print(as_latex(pd.DataFrame({"token": ["' $5'"], "rank": [3]})))
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
    header = " & ".join(_escape_latex(name) for name in kinds)
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\hline", header + r" \\", r"\hline"]
    for row in table.itertuples(index=False, name=None):
        cells = []
        for value, kind in zip(row, kinds.values(), strict=True):
            text = _escape_latex(format_value(value))
            if text and kind == "token":
                text = r"\texttt{" + text.replace(" ", r"\textvisiblespace{}") + "}"
            cells.append(text)
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\hline", r"\end{tabular}"])


def _escape_latex(text: str) -> str:
    """Text for LaTeX. A letter beyond ASCII that LATEX does not have is written as its code."""
    letters = []
    for letter in text:
        if letter in LATEX:
            letters.append(LATEX[letter])
        elif " " <= letter <= "~":
            letters.append(letter)
        else:
            code = letter.encode("unicode_escape").decode("ascii")[1:]
            letters.append(r"\textbackslash{}" + code)
    return "".join(letters)


def _column_kinds(table: pd.DataFrame) -> dict[str, Kind]:
    return {str(name): column_kind(str(name), kind) for name, kind in table.dtypes.items()}
