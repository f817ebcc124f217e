"""The parts of a page: texts, tables and figures, their files, and README.md, which shows them.

README.md is beside a page and has the same title, texts, tables and figures, for a code host.
"""

import io
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import pandas as pd
from matplotlib.figure import Figure

from ..errors import BadHook
from ..figures.style import DPI
from ..files.atomic import format_csv
from .typesetting import as_json, as_latex, as_markdown, escape_markdown

MOST_PAPER_ROWS = 200  # a longer table is not written as Markdown or LaTeX
FORMATS: dict[str, Callable[[pd.DataFrame], str]] = {
    "json": as_json,
    "md": as_markdown,
    "tex": as_latex,
}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")

README = "README.md"
MARK = "<!-- Written by hookkit. -->"  # the first line
LONGEST_HEAD = 2**20  # bytes at the beginning of a page that contain its head
README_HASHES = re.compile(rb"<!-- hookkit-files (.*) -->")
README_ROWS = 8  # of a table; its CSV has all of it
README_COLUMNS = 10
DETAILS = ("_se", "_n")  # ends of the names of columns that a wide table leaves out first


@dataclass(frozen=True, eq=False)
class Part:
    """A table or a figure with its name, which is also the name of its file, and a caption.

    If `file` is the name of another part, that part's file has these rows too, and this part is not
    written to a file of its own.
    """

    content: pd.DataFrame | Figure
    name: str
    caption: str = ""
    file: str = ""


@dataclass(frozen=True)
class Folded:
    """A preformatted text that the reader unfolds by its summary."""

    summary: str
    text: str


Content: TypeAlias = str | pd.DataFrame | Figure | Part | Folded


def part_files(part: Part, formats: tuple[str, ...] = ("csv",)) -> dict[str, bytes]:
    """The files of a part: a table as CSV and in the other formats, or a figure as PNG.

    The same content always gives the same bytes.
    """
    if isinstance(part.content, Figure):
        return {f"{part.name}.png": _draw_png(part.content)}
    table = part.content
    csv = format_csv(table, float_format="%.6g")
    data = {f"{part.name}.csv": encode_text(csv)}
    for kind in _table_formats(table, formats):
        if kind != "csv":
            data[f"{part.name}.{kind}"] = encode_text(FORMATS[kind](table).rstrip("\n") + "\n")
    return data


def _draw_png(figure: Figure) -> bytes:
    """A figure as PNG with a palette of 256 colours, a third of the size of one without."""
    from PIL import Image

    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI, metadata={"Software": None})
    with Image.open(drawn) as image:
        opacity = image.convert("RGBA").getchannel("A")
        if opacity.getextrema() != (255, 255):  # a palette would lose transparency
            return drawn.getvalue()
        colours = image.convert("RGB")
    output = io.BytesIO()
    palette = colours.quantize(256, kmeans=3, dither=Image.Dither.NONE)
    palette.save(output, "PNG", optimize=True, dpi=(DPI, DPI))
    return output.getvalue()


def table_files(name: str, table: pd.DataFrame, formats: tuple[str, ...]) -> list[str]:
    """The names of the files of a table."""
    return [f"{name}.{kind}" for kind in _table_formats(table, formats)]


def _table_formats(table: pd.DataFrame, formats: tuple[str, ...]) -> tuple[str, ...]:
    """The formats in which a table is written: a long one is not written as Markdown or LaTeX."""
    if len(table) <= MOST_PAPER_ROWS:
        return formats
    return tuple(kind for kind in formats if kind in ("csv", "json"))


def encode_text(text: str) -> bytes:
    """A text as the bytes of a file; half a surrogate pair is written as an escape."""
    return text.encode("utf-8", errors="backslashreplace")


def check_name(name: str) -> None:
    """Raises `BadHook` for a name that cannot be the name of a file without its suffix."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise BadHook(f"{name!r} cannot name a file here: use letters, digits, '-' and '_'")


def is_own_readme(path: Path) -> bool:
    """True for a README.md that hookkit wrote."""
    return read_head(path).startswith(MARK.encode())


def read_head(path: Path) -> bytes:
    """The beginning of a page or README.md; nothing if the path is not a regular file."""
    if path.is_symlink() or not path.is_file():
        return b""
    with path.open("rb") as file:
        return file.read(LONGEST_HEAD)


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
        blocks += _render_part(part)
    if footer:
        blocks.append(escape_markdown(footer))
    return "\n\n".join(blocks) + "\n"


def _render_part(part: str | Part | Folded) -> list[str]:
    match part:
        case str():
            return [_render_text(part)]
        case Folded():  # details such as hooks in full, which about.json has
            return []
        case Part(content=Figure()):
            caption = escape_markdown(part.caption)
            image = f"![{caption or escape_markdown(part.name)}]({part.name}.png)"
            return [image, *filter(None, [caption])]
    return _render_table(part)


def _render_text(words: str) -> str:
    heading = re.fullmatch(r"(#{1,2}) (.*)", words, flags=re.DOTALL)
    if heading:
        return f"#{heading[1]} {escape_markdown(heading[2])}"
    return "\\\n".join(map(escape_markdown, words.split("\n")))


def _render_table(part: Part) -> list[str]:
    table: pd.DataFrame = part.content  # pyright: ignore[reportAssignmentType]
    visible = table.head(README_ROWS).dropna(axis="columns", how="all")
    if visible.shape[1] > README_COLUMNS:
        names = [name for name in visible if not str(name).endswith(DETAILS)]
        visible = visible.loc[:, names[:README_COLUMNS]]
    file = f"{part.file or part.name}.csv"
    words = f"[{file}]({file})"
    if visible.shape != table.shape:
        words += f" has {len(table)} rows and {table.shape[1]} columns"
    if part.caption:
        words = f"{escape_markdown(part.caption)} {words}"
    if visible.empty:
        return [words]
    return [as_markdown(visible), words]
