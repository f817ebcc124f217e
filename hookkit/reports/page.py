"""Reports: one self-contained page of texts, tables and figures, with the files beside it.

    figure = hk.figures.rank_bump(shift)
    hk.report("Oat milk", "What moved?", shift, figure).write("results/oat_milk")

Each table is also written as CSV, each figure as PNG. The page needs no network, follows the
reader's light or dark theme, fits a phone, and can be printed. All text from a model or a user is
escaped: a token may be "<script>". The only script on the page sorts tables; the page's policy
names it by its hash, so that the browser runs no other.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from html import unescape
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup
from matplotlib.figure import Figure

from ..arguments import check_arguments, shorten
from ..display import count_of, describe_outcome, direction_of, render_html
from ..errors import BadFile, BadHook
from ..files.atomic import make_folder, remove_leftovers, sha256, write_bytes, write_text
from ..files.untrusted import check_mapping, is_bare_name, parse_json
from .parts import (
    MAX_PAPER_ROWS,
    NAME,
    README,
    README_HASHES,
    Content,
    Folded,
    PagePart,
    Part,
    Passage,
    Passages,
    as_svg,
    check_name,
    encode_text,
    is_own_readme,
    part_files,
    read_head,
    render_readme,
    table_files,
)
from .typesetting import column_kind, format_cell

MAX_ROWS = 60  # of a table on the page; of a longer one the page has its first rows
FIRST_ROWS = 24  # of a longer table; its CSV has all rows
SORTABLE_ROWS = 3  # the fewest rows of a table that the reader can sort
PROSE_LETTERS = 40  # a longer text in a cell may break into lines
DIRECTION_STYLES = {1: "number up", -1: "number down", 0: "number"}
COMPARED = {"before": "before", "after": "after", "delta": "Δ"}
INDEX_COLUMNS = ("row", "pos", "step")
HEADINGS = {"#": "heading", "##": "smaller"}
PAGE = "report.html"
GENERATOR = b'<meta name="generator" content="hookkit">'  # in the head of every page
HASHES = re.compile(rb'<meta name="hookkit-files" content="([^"]*)">')


@dataclass(frozen=True, eq=False)
class Report:
    """A page that is not written yet. Made by `report` and by `shift_report`.

    data     tables that are written beside the page and are not on it
    formats  how tables are written: "csv", "json", "md" (Markdown), "tex" (LaTeX)
    files    other texts that are written beside the page, by name
    """

    title: str
    parts: tuple[PagePart, ...]
    footer: str = ""
    data: tuple[Part, ...] = ()
    formats: tuple[str, ...] = ("csv",)
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """The tables by the names of their files."""
        return {
            part.name: part.content
            for part in self._written_parts()
            if isinstance(part.content, pd.DataFrame)
        }

    def _written_parts(self) -> list[Part]:
        """The parts that have a file of their own."""
        parts = (*self.parts, *self.data)
        return [part for part in parts if isinstance(part, Part) and not part.file]

    def html(self) -> str:
        """The page as text."""
        return self._render({})

    def readme(self) -> str:
        """The page in Markdown, with links to the files that `write` puts beside it."""
        return self._render_readme({})

    def _render_readme(self, hashes: Mapping[str, str]) -> str:
        long_tables = [name for name, table in self.tables.items() if len(table) > MAX_PAPER_ROWS]
        return render_readme(self.title, self.parts, self.footer, hashes, long_tables)

    def _render(self, hashes: Mapping[str, str]) -> str:
        """The page with the sha256 of its files, by which later reports recognize them."""
        parts = [_render_part(part, self.formats) for part in self.parts]
        _order_headings(parts)
        has_sortable = any(part.get("sorts") for part in parts)
        data = []
        for part in self.data:
            assert isinstance(part.content, pd.DataFrame)
            files = table_files(part.name, part.content, self.formats)
            data.append({"files": files, "caption": part.caption})
        return render_page(
            "report.html",
            _read_template("report.js") if has_sortable else "",
            title=self.title,
            footer=self.footer,
            parts=parts,
            data=data,
            files=list(self.files),
            hashes=json.dumps(hashes) if hashes else "",
        )

    def write(self, folder: str | os.PathLike[str]) -> Path:
        """Write report.html, NAME.csv for every table, NAME.png for every figure, and README.md.

        README.md has the page in Markdown, as code hosts show it; a README.md that hookkit did not
        write is not changed. Returns the page's path. What an earlier report wrote in the folder is
        replaced. Raises `BadFile`, before anything is written, if a file with one of these names
        was not written by a report, or was changed since.
        """
        # These imports bring torch, which a page that is only read does not need.
        from ..models.devices import is_writing_process

        target = Path(folder)
        page = target / PAGE
        if not is_writing_process():
            return page
        readme = target / README
        data = self._build_files()
        _check_files(target, data)
        hashes = {name: hashlib.sha256(content).hexdigest() for name, content in data.items()}
        make_folder(target)
        remove_leftovers(target)
        for name, content in data.items():
            write_bytes(target / name, content)
        write_text(page, self._render(hashes))
        if is_own_readme(readme) or not os.path.lexists(readme):
            write_text(readme, self._render_readme(hashes))
        return page

    def _build_files(self) -> dict[str, bytes]:
        data: dict[str, bytes] = {}
        for part in self._written_parts():
            check_name(part.name)
            data |= part_files(part, self.formats)
        for name, text in self.files.items():
            if not is_bare_name(name) or name in (PAGE, README) or name in data:
                raise BadHook(
                    f"{name!r} cannot name a file of a report: names stand once, and lead to no "
                    "other folder"
                )
            data[name] = encode_text(text)
        return data

    def __repr__(self) -> str:
        names: dict[str, list[str]] = {"table": [], "figure": []}
        for part in self._written_parts():
            kind = "table" if isinstance(part.content, pd.DataFrame) else "figure"
            names[kind].append(part.name)
        counts = ", ".join(count_of(len(parts), kind) for kind, parts in names.items())
        text = f"Report({shorten(self.title)!r}: {counts})\n  tables: {', '.join(self.tables)}"
        return describe_outcome(shorten(text, 800), "report.write(folder)", "report.tables[name]")

    def _repr_html_(self) -> str:
        rows = []
        for part in self._written_parts():
            kind = "figure"
            if isinstance(part.content, pd.DataFrame):
                kind = f"table of {len(part.content)} rows"
            rows.append({"name": part.name, "what": kind, "caption": part.caption})
        facts = {"to see it": "write(folder), which gives the page's path"}
        return render_html(f"Report: {self.title}", facts, rows)


@check_arguments
def report(title: str, *parts: Content, footer: str = "") -> Report:
    """A page of these parts, in order: texts, tables, figures, or `Part(content, name, caption)`.

    A text that begins with "# " is a heading, one with "## " a smaller one. A `Part` names the file
    of its table or figure; without it they are named table_1, figure_1 and so on. Raises `BadHook`
    for names that are used twice, or that cannot name a file.

    >>> report("Oat milk", "# Before", ranks(run)).write("results/oat_milk").name
    'report.html'
    """
    page_parts: list[PagePart] = []
    names: list[str] = []
    for part in parts:
        part = _with_name(part, names)
        if isinstance(part, Part):
            names.append(part.name)
        page_parts.append(part)
    for name in names:
        if names.count(name) > 1 or not NAME.fullmatch(name):
            raise BadHook(
                f"{name!r} cannot name a part: names stand once, and are letters, digits, '-' and "
                "'_'"
            )
    return Report(title, tuple(page_parts), footer)


def _with_name(part: Content, names: Sequence[str]) -> PagePart:
    """A table or figure as a part with a name that is not among `names`; a text as it is."""
    match part:
        case str() | Part() | Folded() | Passages():
            return part
        case pd.DataFrame():
            kind = "table"
        case Figure():
            kind = "figure"
        case _:
            raise BadHook(
                f"a report has texts, tables and figures, and was given a {type(part).__name__}"
            )
    count = sum(name.startswith(f"{kind}_") for name in names)
    return Part(part, f"{kind}_{count + 1}")


def _check_files(folder: Path, data: Mapping[str, bytes]) -> None:
    """Raises `BadFile` if a file that no report wrote would be overwritten."""
    page = folder / PAGE
    hashes = _read_hashes(page)
    foreign = []
    if os.path.lexists(page) and not is_own_page(page):
        foreign.append(PAGE)
    for name, content in data.items():
        path = folder / name
        allowed = hashes.get(name), hashlib.sha256(content).hexdigest()
        if os.path.lexists(path) and not has_hash(path, allowed):
            foreign.append(name)
    if foreign:
        raise BadFile(
            f"{str(folder)!r} has {', '.join(foreign)}, which no report wrote, or which was "
            "changed since: give another folder, or move that away"
        )


def has_hash(path: Path, hashes: tuple[str | None, ...]) -> bool:
    """True for a regular file with one of these sha256."""
    return path.is_file() and not path.is_symlink() and sha256(path) in hashes


def is_own_page(path: Path) -> bool:
    """True for a page that hookkit wrote: its head says so."""
    return GENERATOR in read_head(path)


def _read_hashes(page: Path) -> Mapping[str, str]:
    """The sha256 of the files beside a page, as an earlier report noted them.

    They are on the page, and in README.md for a folder whose page is not there.
    """
    if is_own_page(page):
        path, pattern = page, HASHES
    elif is_own_readme(page.with_name(README)):
        path, pattern = page.with_name(README), README_HASHES
    else:
        return {}
    match = pattern.search(read_head(path))
    if match is None:
        return {}
    try:
        return check_mapping(parse_json(unescape(match[1].decode()), path.name), path.name)
    except BadFile:
        return {}


def _render_part(part: PagePart, formats: tuple[str, ...]) -> dict[str, Any]:
    if isinstance(part, str):
        heading = re.fullmatch(r"(#{1,2}) (.*)", part, flags=re.DOTALL)
        if heading is None:
            return {"kind": "text", "text": part}
        return {"kind": HEADINGS[heading[1]], "text": heading[2]}
    if isinstance(part, Folded):
        return {"kind": "folded", "summary": part.summary, "text": part.text}
    if isinstance(part, Passages):
        passages = list(map(_render_passage, part.passages))
        return {"kind": "passages", "caption": part.caption, "passages": passages}
    if isinstance(part.content, Figure):
        svg = Markup(as_svg(part.content, part.name, part.caption))
        return {"kind": "figure", "name": part.name, "caption": part.caption, "svg": svg}
    if part.file:  # the part with this file links the other formats
        formats = ("csv",)
    files = table_files(part.file or part.name, part.content, formats)
    table = _render_table(part.content, part.caption)
    return {"kind": "table", "name": part.name, "files": files, **table}


def _render_passage(passage: Passage) -> dict[str, Any]:
    """A text's label, and its tokens with the percentages of their colour."""
    tokens = []
    for index, (text, share) in enumerate(passage.tokens):
        percent = 0 if share != share else round(100 * min(share, 1.0))
        token = {"text": text.replace("\n", "⏎"), "percent": percent}
        tokens.append({**token, "focus": index == passage.focus})
    return {"label": passage.label, "tokens": tokens}


def _order_headings(parts: Sequence[dict[str, Any]]) -> None:
    """Make smaller headings that no heading precedes headings, so that no level is left out."""
    for part in parts:
        if part["kind"] == "heading":
            return
        if part["kind"] == "smaller":
            part["kind"] = "heading"


def _render_table(table: pd.DataFrame, caption: str) -> dict[str, Any]:
    """The header, the cells and the caption of a table for the template."""
    visible, caption = _visible_part(table, caption)
    names = list(map(str, visible.columns))
    styles = list(map(column_kind, names, visible.dtypes))
    rows = []
    for row in visible.itertuples(index=False):
        cells = list(map(_render_cell, row, names, styles))
        if cells and styles[0] != "number":
            cells[0]["heads"] = True  # the first cell says what the row is about
        rows.append(cells)
    header = _render_header(names, styles)
    is_sortable = len(rows) >= SORTABLE_ROWS
    return {"header": header, "rows": rows, "caption": caption, "sorts": is_sortable}


def _visible_part(table: pd.DataFrame, caption: str) -> tuple[pd.DataFrame, str]:
    """The rows and columns that are on the page, and the caption, which mentions the others."""
    visible = table if len(table) <= MAX_ROWS else table.head(FIRST_ROWS)
    # Empty columns, such as the intervals of a mean over one prompt, are only in the CSV.
    empty = table.columns[table.isna().all()]
    if len(table) and len(empty) < table.shape[1]:
        visible = visible.drop(columns=empty)
    # The caption names an index column with one value, which leaves room for the other columns.
    constant = _constant_columns(table)
    if constant and len(constant) < visible.shape[1]:
        words = ", ".join(f"{name} {value}" for name, value in constant.items()).capitalize()
        caption = f"{caption} {words}.".strip()
        visible = visible.drop(columns=list(constant))
    if len(table) > len(visible):
        caption = f"{caption} The first {len(visible)} of {len(table)} rows.".strip()
    return visible, caption


def _constant_columns(table: pd.DataFrame) -> dict[str, Any]:
    """The index columns with the same value in all rows of a table with several rows."""
    if len(table) < 2:
        return {}
    index: Any = table.filter(INDEX_COLUMNS)
    return {name: column.iloc[0] for name, column in index.items() if len(set(column)) == 1}


def _render_cell(value: Any, name: str, style: str) -> dict[str, Any]:
    text = format_cell(name, value)
    if style == "number":
        return _render_number(value, text, name)
    if not style and len(text) > PROSE_LETTERS:
        style = "prose"
    return {"text": text, "style": style, "value": None, "heads": False}


def _render_number(value: Any, text: str, name: str) -> dict[str, Any]:
    """A cell with a number, by which the page's script sorts, and with the colour of its sign."""
    if not text:
        return {"text": text, "style": "number", "value": "", "heads": False}
    style = DIRECTION_STYLES[direction_of(name, value)]
    if name == "rank_delta":
        style += " rank"  # which has an arrow, too
    number: str | None = f"{value:.8g}"
    if number == text:
        number = None  # the script reads the text
    return {"text": text, "style": style, "value": number, "heads": False}


def _render_header(names: Sequence[str], styles: Sequence[str]) -> list[list[dict[str, Any]]]:
    """The header cells of a table, in one line or two.

    Columns NAME_before, NAME_after and NAME_delta in this order share a cell in the first line.
    """
    columns = list(zip(names, styles, strict=True))
    first_line: list[dict[str, Any]] = []
    second_line: list[dict[str, Any]] = []
    index = 0
    while index < len(columns):
        name, style = columns[index]
        group = name.removesuffix("_before")
        compared = [(f"{group}_{part}", style) for part in COMPARED]
        if name != group and columns[index : index + 3] == compared:
            first_line.append(_header_cell(group, "group", None, columns=3))
            for number, text in enumerate(COMPARED.values()):
                second_line.append(_header_cell(text, style, index + number))
            index += 3
        else:
            first_line.append(_header_cell(name, style, index))
            index += 1
    return list(filter(None, (first_line, second_line)))


def _header_cell(text: str, style: str, place: int | None, *, columns: int = 1) -> dict[str, Any]:
    """A header cell. `place` is the column's index, by which the page's script sorts."""
    return {"text": text, "style": style, "columns": columns, "place": place}


def render_page(template: str, script: str = "", **values: Any) -> str:
    """A page from a template, on which the browser may run this script and no other."""
    style, script = Markup(_read_template("page.css")), Markup(script)
    source = "'none'"
    if script:
        digest = hashlib.sha256(script.encode()).digest()
        source = f"'sha256-{base64.b64encode(digest).decode()}'"
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; img-src 'self' data:; "
        f"script-src {source}; base-uri 'none'"
    )
    return _load_template(template).render(style=style, script=script, policy=policy, **values)


@cache
def _load_template(name: str) -> Template:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_read_template(name))


@cache
def _read_template(name: str) -> str:
    return files("hookkit.reports").joinpath("templates", name).read_text(encoding="utf-8")
