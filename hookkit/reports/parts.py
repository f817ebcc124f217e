"""The parts of a page: texts, tables and figures, their files, and README.md, which shows them.

README.md is beside a page and has the same title, texts, tables and figures, for a code host.
"""

import base64
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

from ..errors import BadHook
from ..figures.style import GRID, INK, MUTED, PAPER
from ..files.atomic import format_csv
from .typesetting import as_json, as_latex, as_markdown, escape_markdown

MAX_PAPER_ROWS = 200  # a longer table is not written as Markdown or LaTeX
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
README_ROWS = 8  # of a table; of a longer one README.md has its first rows, and its CSV all
README_FIRST_ROWS = 4
README_COLUMNS = 10
DETAILS = ("_se", "_n")  # ends of the names of columns that a wide table leaves out first

FILE_DPI = 100  # of a figure's file: figures of 8 to 10 inches are as wide as a page on a code host
COLOURS = 64  # of a picture, at most; fewer are seen as steps in a colour map
FEW_COLOURS = 8  # of a cloud of points in an SVG, which has shades of one or two colours
NOTICED = 7  # a squared distance of colours times the root of a share of the pixels; see below
FARTHEST = 4 * 255**2  # the squared distance of two colours is not larger
THEMED = {INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--paper"}
STYLE = re.compile(r' style="([^"]*)"(?=[^<>]*>)')  # of an element of an SVG, not in a text
EMBEDDED = re.compile(r"data:image/png;base64,\s*([A-Za-z0-9+/=\s]+)")  # a picture in an SVG


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


@dataclass(frozen=True)
class Passage:
    """A text with a label: its tokens, each with a share of 0 to 1; NaN for an unknown one.

    `focus` is the index of the token that the label is about.
    """

    label: str
    tokens: tuple[tuple[str, float], ...]
    focus: int


@dataclass(frozen=True)
class Passages:
    """Texts whose tokens are coloured: the larger the share, the stronger the colour."""

    caption: str
    passages: tuple[Passage, ...]


PagePart: TypeAlias = str | Part | Folded | Passages
Content: TypeAlias = str | pd.DataFrame | Figure | Part | Folded | Passages


def part_files(part: Part, formats: tuple[str, ...] = ("csv",)) -> dict[str, bytes]:
    """The files of a part: a table as CSV and in the other formats, or a figure as PNG.

    The same content always gives the same bytes.
    """
    if isinstance(part.content, Figure):
        return {f"{part.name}.png": as_png(part.content)}
    table = part.content
    csv = format_csv(table, float_format="%.6g")
    data = {f"{part.name}.csv": encode_text(csv)}
    for kind in _table_formats(table, formats):
        if kind != "csv":
            data[f"{part.name}.{kind}"] = encode_text(FORMATS[kind](table).rstrip("\n") + "\n")
    return data


def table_files(name: str, table: pd.DataFrame, formats: tuple[str, ...]) -> list[str]:
    """The names of the files of a table."""
    return [f"{name}.{kind}" for kind in _table_formats(table, formats)]


def _table_formats(table: pd.DataFrame, formats: tuple[str, ...]) -> tuple[str, ...]:
    """The formats in which a table is written: a long one is not written as Markdown or LaTeX."""
    if len(table) <= MAX_PAPER_ROWS:
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
    parts: Iterable[PagePart],
    footer: str = "",
    hashes: Mapping[str, str] | None = None,
    long_tables: Collection[str] = (),
) -> str:
    """The page in GitHub's Markdown, with links to the files beside it and with their sha256.

    Of `long_tables` the files have names without links, since a repository may leave them out.
    """
    blocks = [MARK]
    if hashes:
        noted = json.dumps(hashes).replace(">", r"\u003e")  # "-->" would end the comment
        blocks.append(f"<!-- hookkit-files {noted} -->")
    blocks.append(f"# {escape_markdown(title)}")
    for part in parts:
        blocks += _render_part(part, long_tables)
    if footer:
        blocks.append(escape_markdown(footer))
    return "\n\n".join(blocks) + "\n"


def _render_part(part: PagePart, long_tables: Collection[str]) -> list[str]:
    match part:
        case Passages():
            return ["\n".join(map(_render_passage, part.passages)), escape_markdown(part.caption)]
        case str():
            return [_render_text(part)]
        case Folded():  # details such as hooks in full, which about.json has
            return []
        case Part(content=Figure()):
            caption = escape_markdown(part.caption)
            image = f"![{caption or escape_markdown(part.name)}]({part.name}.png)"
            return [image, *filter(None, [caption])]
    return _render_table(part, long_tables)


def _render_text(words: str) -> str:
    heading = re.fullmatch(r"(#{1,2}) (.*)", words, flags=re.DOTALL)
    if heading:
        return f"#{heading[1]} {escape_markdown(heading[2])}"
    return "\\\n".join(map(escape_markdown, words.split("\n")))


def _render_passage(passage: Passage) -> str:
    """A text as an item of a list, with the token of its label in bold."""
    words = ""
    for index, (token, _) in enumerate(passage.tokens):
        text = escape_markdown(token)
        if index == passage.focus and text.strip():
            bold = f"**{text.strip()}**"
            text = text.replace(text.strip(), bold, 1)
        words += text
    return f"- {escape_markdown(passage.label)}: {words.strip()}"


def _render_table(part: Part, long_tables: Collection[str]) -> list[str]:
    table: pd.DataFrame = part.content  # pyright: ignore[reportAssignmentType]
    visible = table if len(table) <= README_ROWS else table.head(README_FIRST_ROWS)
    visible = visible.dropna(axis="columns", how="all")
    if visible.shape[1] > README_COLUMNS:
        names = [name for name in visible if not str(name).endswith(DETAILS)]
        visible = visible.loc[:, names[:README_COLUMNS]]
    name = part.file or part.name
    words = f"[{name}.csv]({name}.csv)"
    if name in long_tables:
        words = f"`{name}.csv`"
    if visible.shape != table.shape:
        words += f" has {len(table)} rows and {table.shape[1]} columns"
    if part.caption:
        words = f"{escape_markdown(part.caption)} {words}"
    if visible.empty:
        return [words]
    return [as_markdown(visible), words]


# ---- figures as files


def as_png(figure: Figure) -> bytes:
    """A figure as PNG of at most `COLOURS` colours, a fifth of the size of one with all."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=FILE_DPI, metadata={"Software": None})
    return compress_png(drawn.getvalue())


def compress_png(data: bytes, colours: int = COLOURS) -> bytes:
    """A PNG with a palette of at most this many colours."""
    output = io.BytesIO()
    with Image.open(io.BytesIO(data)) as picture:
        resolution = picture.info.get("dpi", (FILE_DPI, FILE_DPI))
        indexed = _with_palette(picture, colours)
        indexed.save(output, "PNG", optimize=True, dpi=resolution)
    return output.getvalue()


def _with_palette(picture: Image.Image, most: int) -> Image.Image:
    """A picture in which every colour is the nearest one of a palette.

    The palette begins with the most frequent colour. Each further one is the colour with the
    largest squared distance from the palette, times the root of its share of the pixels, until that
    is less than `NOTICED`. A small mark of its own colour keeps it, and so does a large area.
    """
    pixels = np.array(picture.convert("RGBA")).view(np.uint32)[..., 0]
    codes, places, counts = np.unique(pixels, return_inverse=True, return_counts=True)
    colours = codes.view(np.uint8).reshape(-1, 4)
    channels = colours.astype(np.int64)
    distances = np.full(len(codes), FARTHEST)
    nearest = np.zeros(len(codes), np.uint8)
    palette = []
    for index in range(min(most, len(codes))):
        weighted = distances * np.sqrt(counts / pixels.size)
        chosen = int(np.argmax(weighted))
        if weighted[chosen] < NOTICED:
            break
        palette.append(colours[chosen])
        squares = np.square(channels - channels[chosen]).sum(axis=1)
        nearest[squares < distances] = index
        distances = np.minimum(distances, squares)
    indexed = Image.fromarray(nearest[places].reshape(pixels.shape))
    if (np.array(palette)[:, 3] == 255).all():
        indexed.putpalette(np.array(palette)[:, :3].tobytes(), "RGB")
    else:
        indexed.putpalette(np.array(palette).tobytes(), "RGBA")
    return indexed


def describe_figure(figure: Figure, caption: str = "") -> str:
    """The alternative text of a figure: its title, what its axes show, and the caption."""
    sentences = [figure.get_suptitle().replace("\n", " ")]
    for axes in figure.axes:
        labels = axes.get_ylabel(), axes.get_xlabel()
        panel = " against ".join(filter(None, labels))
        sentences.append(": ".join(filter(None, (axes.get_title(loc="left"), panel))))
    sentences = [sentence.strip().rstrip(".") for sentence in (*sentences, caption)]
    return ". ".join(dict.fromkeys(filter(None, sentences)))


def as_svg(figure: Figure, name: str, caption: str) -> str:
    """A figure as SVG whose ink and paper follow the page's theme. matplotlib escapes its texts.

    The ids begin with `name`, since figures of one page have the same ids: figure_1, axes_1 and so
    on.
    """
    output = io.StringIO()
    # The salt makes ids different between the figures of a page, and equal in every run.
    fonts: dict[Any, Any] = {
        "svg.fonttype": "none",
        "font.family": "DejaVu Sans",
        "font.sans-serif": ["DejaVu Sans"],
    }
    with rc_context({"svg.hashsalt": name, **fonts}):
        # Clouds of points are pictures in the SVG: their dots an inch decide the page's size
        figure.savefig(output, format="svg", dpi=80, metadata={"Date": None, "Creator": None})
    svg = output.getvalue()
    svg = _compress_svg(svg[svg.index("<svg") :])
    for colour, variable in THEMED.items():
        svg = svg.replace(colour, f"var({variable})")
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = _share_styles(svg, name)
    inches = figure.get_figwidth()
    min_width = max(4.3 * inches, min(34, 5.5 * inches))  # the smallest text has 8 to 10 pixels
    max_width = min(76, 7 * inches)
    style = f"min-width: {min_width:g}rem; max-width: {max_width:g}rem"
    title = f'<title id="{name}-title">{escape(describe_figure(figure, caption) or name)}</title>'
    svg = svg.replace("<svg", f'<svg role="img" aria-labelledby="{name}-title"', 1)
    svg = re.sub(r"(<svg[^>]*>)", lambda start: start[1] + title, svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return re.sub(r'(<svg[^>]*?) width="[^"]*"', rf'\1 style="{style}"', svg, count=1)


def _compress_svg(svg: str) -> str:
    """An SVG of matplotlib without what nobody sees, a half of its size.

    Removed are the metadata, the ids that nothing refers to, groups without attributes, rotations
    by 0, the font, which the page sets, indentation, and the digits of coordinates beyond a
    hundredth of a point.
    """
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, count=1, flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda name: name[0] if name[1] in used else "", svg)
    svg = _without_plain_groups(svg)
    svg = re.sub(r' transform="rotate\(-?0 [^"]*"', "", svg)
    svg = svg.replace("font-family: 'DejaVu Sans', sans-serif; ", "")
    svg = re.sub(r">\n\s*<", ">\n<", svg)
    svg = re.sub(r' (d|x|y)="[^"]*"', _round_coordinates, svg)
    return EMBEDDED.sub(_compress_embedded, svg)


def _without_plain_groups(svg: str) -> str:
    is_plain: list[bool] = []  # of the groups that are open

    def keep_or_remove(tag: re.Match[str]) -> str:
        if tag[0] != "</g>":
            is_plain.append(tag[0] == "<g>")
        removes = is_plain[-1] if tag[0] != "</g>" else is_plain.pop()
        return "" if removes else tag[0]

    return re.sub(r"<g\b[^>]*>|</g>", keep_or_remove, svg)


def _share_styles(svg: str, name: str) -> str:
    """An SVG whose repeated styles are classes, with names that begin with the figure's name."""
    counts = Counter(STYLE.findall(svg))
    shared = [style for style, count in counts.items() if count > 1]
    classes = {style: f"{name}-{number}" for number, style in enumerate(shared)}

    def replace_style(attribute: re.Match[str]) -> str:
        label = classes.get(attribute[1])
        return f' class="{label}"' if label else attribute[0]

    rules = "".join(f".{label} {{{style}}}\n" for style, label in classes.items())
    return STYLE.sub(replace_style, svg).replace("</style>", f"\n{rules}</style>", 1)


def _round_coordinates(attribute: re.Match[str]) -> str:
    return re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", attribute[0])


def _compress_embedded(picture: re.Match[str]) -> str:
    data = compress_png(base64.b64decode(picture[1]), FEW_COLOURS)
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"
