"""What a page consists of: texts, tables and figures; and the files of a table or a figure."""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import pandas as pd
from matplotlib.figure import Figure

from ..errors import BadHook
from .typesetting import as_json, as_latex, as_markdown

MOST_PAPER_ROWS = 200  # a longer table is not written as Markdown or LaTeX
DPI = 120  # 1,300 pixels for a figure as wide as a page
FORMATS: dict[str, Callable[[pd.DataFrame], str]] = {
    "json": as_json,
    "md": as_markdown,
    "tex": as_latex,
}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


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
    csv = table.to_csv(index=False, float_format="%.6g", lineterminator="\n")
    data = {f"{part.name}.csv": encode_text(csv)}
    for kind in table_formats(table, formats):
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


def table_formats(table: pd.DataFrame, formats: tuple[str, ...]) -> list[str]:
    """The formats in which a table is written: a long one is not written as Markdown or LaTeX."""
    if len(table) <= MOST_PAPER_ROWS:
        return list(formats)
    return [kind for kind in formats if kind in ("csv", "json")]


def encode_text(text: str) -> bytes:
    """A text as the bytes of a file; half a surrogate pair is written as an escape."""
    return text.encode("utf-8", errors="backslashreplace")


def check_name(name: str) -> None:
    """Raises `BadHook` for a name that cannot be the name of a file without its suffix."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise BadHook(f"{name!r} cannot name a file here: use letters, digits, '-' and '_'")
