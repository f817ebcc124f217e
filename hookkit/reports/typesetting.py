"""Tables as other programs read them: Markdown, LaTeX and JSON. No torch.

A token stands in a table as a Python literal, `' coffee'`; what a character means to Markdown or LaTeX is escaped, so
that a token may be "|", "$" or "<script>". Numbers have four digits on paper, and all that they have in JSON.
"""

import json
import re
from typing import Any, Literal, TypeAlias

import numpy as np
import pandas as pd

Kind: TypeAlias = Literal["number", "token", ""]

MEANT = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "_": r"\_", "%": r"\%",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "−": "$-$", "∞": r"$\infty$", "Δ": r"$\Delta$", "‖": r"$\Vert$", "×": r"$\times$", "–": "--",
    "…": r"\ldots{}", "“": "``", "”": "''", "→": r"$\to$", "┊": r"\textbar{}",
}  # fmt: skip


def kind_of(name: str, dtype: Any) -> Kind:
    """How a column is set: a number to the right, a token in letters of one width."""
    if pd.api.types.is_numeric_dtype(dtype) and not pd.api.types.is_bool_dtype(dtype):
        return "number"
    return "token" if name.startswith(("token", "top1", "read")) else ""


def written(value: Any) -> str:
    """A value as a page shows it; nothing where there is none."""
    if (
        value is None
        or value is pd.NA
        or (isinstance(value, float | np.floating) and np.isnan(value))
    ):
        return ""
    if isinstance(value, float | np.floating):
        return "−∞" if value == -np.inf else "∞" if value == np.inf else f"{value:.4g}"
    return str(value)


def as_json(table: pd.DataFrame) -> str:
    """A list of records, one a row. An infinite number is the text "Infinity" or "-Infinity", a missing one null.

    >>> as_json(pd.DataFrame({"token": ["' a'"], "logit": [-float("inf")]}))
    '[\\n{"token": "\\' a\\'", "logit": "-Infinity"}\\n]\\n'
    """
    names = [str(name) for name in table.columns]
    rows = [
        json.dumps(
            dict(zip(names, map(_plain, row), strict=True)), ensure_ascii=False, allow_nan=False
        )
        for row in table.itertuples(index=False, name=None)
    ]
    return "[\n" + ",\n".join(rows) + "\n]\n"


def _plain(value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    if value is None or value is pd.NA or value != value:
        return None
    if isinstance(value, float) and np.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return value if isinstance(value, bool | int | float | str) else str(value)


def as_markdown(table: pd.DataFrame) -> str:
    """A table of GitHub's Markdown; tokens are code.

    >>> print(as_markdown(pd.DataFrame({"token": ["' a|b'"], "rank": [3]})))
    | token | rank |
    | :--- | ---: |
    | `' a\\|b'` | 3 |
    """
    kinds = _kinds(table)
    lines = [
        [_words(name) for name in kinds],
        ["---:" if kind == "number" else ":---" for kind in kinds.values()],
    ]
    for row in table.itertuples(index=False, name=None):
        cells = zip(row, kinds.values(), strict=True)
        lines.append(
            [_code(written(v)) if kind == "token" else _words(written(v)) for v, kind in cells]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _words(text: str) -> str:
    escaped = re.sub(r"([\\`*_\[\]<>|#&~!$])", r"\\\1", text)
    return escaped.replace("\r", "").replace("\n", " ⏎ ")


def _code(text: str) -> str:
    """A span of code. GitHub splits a row at | first, so that it is escaped in code as well."""
    if not text:
        return ""
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    room = " " if "`" in text else ""
    return f"{fence}{room}{text}{room}{fence}".replace("|", "\\|").replace("\n", " ⏎ ")


def as_latex(table: pd.DataFrame) -> str:
    """A tabular that needs no package, and no other letters than ASCII; a space in a token is shown as ␣.

    >>> print(as_latex(pd.DataFrame({"token": ["' $5'"], "rank": [3]})))
    \\begin{tabular}{lr}
    \\hline
    token & rank \\\\
    \\hline
    \\texttt{'\\textvisiblespace{}\\$5'} & 3 \\\\
    \\hline
    \\end{tabular}
    """
    kinds = _kinds(table)
    lines = [" & ".join(_tex(name) for name in kinds) + r" \\", r"\hline"]
    for row in table.itertuples(index=False, name=None):
        cells = zip(row, kinds.values(), strict=True)
        lines.append(" & ".join(_set(written(value), kind) for value, kind in cells) + r" \\")
    columns = "".join("r" if kind == "number" else "l" for kind in kinds.values())
    return "\n".join(
        [rf"\begin{{tabular}}{{{columns}}}", r"\hline", *lines, r"\hline", r"\end{tabular}"]
    )


def _set(text: str, kind: Kind) -> str:
    if kind != "token":
        return _tex(text)
    return r"\texttt{" + _tex(text).replace(" ", r"\textvisiblespace{}") + "}" if text else ""


def _tex(text: str) -> str:
    """Text as LaTeX sets it; a letter beyond ASCII as its code."""
    found = []
    for letter in text:
        if letter in MEANT:
            found.append(MEANT[letter])
        elif " " <= letter <= "~":
            found.append(letter)
        else:
            found.append(r"\textbackslash{}" + letter.encode("unicode_escape").decode("ascii")[1:])
    return "".join(found)


def _kinds(table: pd.DataFrame) -> dict[str, Kind]:
    return {str(name): kind_of(str(name), kind) for name, kind in table.dtypes.items()}
