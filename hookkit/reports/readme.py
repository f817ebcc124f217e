"""README.md beside a page: the same title, texts, tables and figures, for a code host to show."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from .parts import Folded, Part
from .typesetting import as_markdown, escape_markdown

README = "README.md"
MARK = "<!-- Written by hookkit. -->"  # the first line
README_HASHES = re.compile(rb"<!-- hookkit-files (.*) -->")
MOST_ROWS = 8  # of a table; its CSV has all of it
MOST_COLUMNS = 10
DETAILS = ("_se", "_n")  # ends of the names of columns that a wide table leaves out first


def is_own_readme(path: Path) -> bool:
    """True for a README.md that hookkit wrote."""
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MARK)) == MARK.encode()


def render_readme(
    title: str,
    parts: Iterable[str | Part | Folded],
    footer: str = "",
    hashes: Mapping[str, str] | None = None,
) -> str:
    """The page in GitHub's Markdown, with links to the files beside it and with their sha256."""
    blocks = [MARK]
    if hashes:
        noted = json.dumps(hashes).replace(">", r"\u003e")  # "-->" would end the comment
        blocks.append(f"<!-- hookkit-files {noted} -->")
    blocks.append(f"# {escape_markdown(title)}")
    for part in parts:
        if isinstance(part, str):
            blocks.append(_render_text(part))
        elif isinstance(part, Folded):
            continue  # details such as hooks in full, which about.json has
        elif isinstance(part.content, Figure):
            blocks.append(f"![{escape_markdown(part.caption or part.name)}]({part.name}.png)")
            if part.caption:
                blocks.append(escape_markdown(part.caption))
        else:
            blocks += _render_table(part)
    if footer:
        blocks.append(escape_markdown(footer))
    return "\n\n".join(blocks) + "\n"


def _render_text(words: str) -> str:
    heading = re.fullmatch(r"(#{1,2}) (.*)", words, flags=re.DOTALL)
    if heading:
        return f"#{heading[1]} {escape_markdown(heading[2])}"
    return "\\\n".join(map(escape_markdown, words.split("\n")))


def _render_table(part: Part) -> list[str]:
    table: pd.DataFrame = part.content  # pyright: ignore[reportAssignmentType]
    visible = table.head(MOST_ROWS).dropna(axis="columns", how="all")
    if visible.shape[1] > MOST_COLUMNS:
        names = [name for name in visible if not str(name).endswith(DETAILS)]
        visible = visible.loc[:, names[:MOST_COLUMNS]]
    file = f"{part.file or part.name}.csv"
    words = f"[{file}]({file})"
    if visible.shape != table.shape:
        words += f" has {len(table)} rows and {table.shape[1]} columns"
    if part.caption:
        words = f"{escape_markdown(part.caption)} {words}"
    if visible.empty:
        return [words]
    return [as_markdown(visible), words]
