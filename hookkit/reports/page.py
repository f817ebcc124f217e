"""Reports: one self-contained page from texts, tables and figures, with the tables' CSV and figures' PNG beside it.

    hk.report("Oat milk", "What moved?", shift, hk.rank_bump(shift)).write("results/oat_milk")

The page needs no network, follows the reader's light or dark theme, fits a phone, and can be printed. Everything that
comes from a model or a user is escaped: a token may be "<script>". The one script on it, which sorts tables, is named
by its hash in the page's policy, so that the browser runs no other.
"""

import base64
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from html import unescape
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd
from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure

from ..arguments import checks_arguments
from ..display import shown
from ..errors import BadFile, BadHook
from ..figures.style import GRID, INK, MUTED, PAPER
from ..files.atomic import make_folder, remove_leftovers, sha256, write_bytes, write_text
from ..files.untrusted import is_bare_name, json_of, strings_of
from .typesetting import as_json, as_latex, as_markdown, kind_of, written

ROWS_SHOWN = 60  # of a longer table the page shows the beginning, and the CSV has all
ROWS_OF_LONGER = 24
THEMED = {INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--paper"}
SORTED = 3  # rows that a table has at least for the reader to sort it
SIGNED = {
    "logit_delta": 1,
    "logprob_delta": 1,
    "prob_delta": 1,
    "shift": 1,
    "rank_delta": -1,
}  # 1: more is green
PAPER_ROWS = 200  # of a longer table there is no Markdown and no LaTeX
LONG = 40  # letters of a text that goes on in the next line
FORMATS: dict[str, Callable[[pd.DataFrame], str]] = {
    "json": as_json,
    "md": as_markdown,
    "tex": as_latex,
}
COMPARED = {"before": "before", "after": "after", "delta": "Δ"}
PLACES = ("row", "pos", "step")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
PAGE = "report.html"
OWN = b'<meta name="generator" content="hookkit">'  # in the head of every page
HASHES = re.compile(rb'<meta name="hookkit-files" content="([^"]*)">')
LONGEST_HEAD = 2**20  # bytes of a page in which its head stands


@dataclass(frozen=True, eq=False)
class Part:
    """A table or a figure with its name, which is the name of its file, and a caption.

    `file` is the name of the part whose file has these rows as well; a part with one is written to no file of its own.
    """

    content: pd.DataFrame | Figure
    name: str
    caption: str = ""
    file: str = ""


@dataclass(frozen=True)
class Folded:
    """A text as it stands, line by line, that is folded away behind its summary."""

    summary: str
    text: str


Content: TypeAlias = str | pd.DataFrame | Figure | Part | Folded


@dataclass(frozen=True, eq=False)
class Report:
    """A page that is not written yet. Made by `report`, and by `shift_report`.

    data     tables that are written beside the page and do not stand on it
    formats  how tables are written: "csv", "json", "md" (Markdown), "tex" (LaTeX)
    files    other texts that are written beside it, by name
    """

    title: str
    parts: tuple[str | Part | Folded, ...]
    footer: str = ""
    data: tuple[Part, ...] = ()
    formats: tuple[str, ...] = ("csv",)
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """The tables by the names of their files."""
        named = [
            part for part in (*self.parts, *self.data) if isinstance(part, Part) and not part.file
        ]
        return {part.name: part.content for part in named if isinstance(part.content, pd.DataFrame)}

    def html(self) -> str:
        """The page as text."""
        return self._page({})

    def _page(self, hashes: Mapping[str, str]) -> str:
        """The page, and in it the sha256 of the files beside it, by which a later report knows them as its own."""
        parts = [_rendered(part, self.formats) for part in self.parts]
        sorts = any(part.get("sorts") for part in parts)
        script = _source("report.js") if sorts else ""
        return rendered(
            "report.html", script, title=self.title, footer=self.footer, parts=parts,
            data=[_listed(part, self.formats) for part in self.data], files=list(self.files),
            hashes=json.dumps(hashes) if hashes else "",
        )  # fmt: skip

    def write(self, folder: str | os.PathLike[str]) -> Path:
        """Write report.html, and beside it NAME.csv for every table and NAME.png for every figure; the page's path.

        What an earlier report wrote in the folder is replaced. Raises `BadFile`, before anything is written, where a
        file has one of these names that no report wrote, or that was changed since.
        """
        target = Path(folder)
        page = target / PAGE
        from ..models.tensor_parallel import (
            is_writing_process,  # which brings torch, and a page that is only read needs none
        )

        if not is_writing_process():
            return page
        data = self._files()
        _check_own(target, data)
        hashes = {name: hashlib.sha256(content).hexdigest() for name, content in data.items()}
        make_folder(target)
        remove_leftovers(target)
        for name, content in data.items():
            write_bytes(target / name, content)
        write_text(page, self._page(hashes))
        return page

    def write_page(self, folder: str | os.PathLike[str]) -> Path:
        """Write report.html alone, into a folder that has the files of its tables and figures already; its path."""
        from ..models.tensor_parallel import is_writing_process

        page = Path(folder) / PAGE
        if is_writing_process():
            _check_own(page.parent, {})
            make_folder(page.parent)
            write_text(page, self.html())
        return page

    def _files(self) -> dict[str, bytes]:
        """What is written beside the page, by the names of the files."""
        data: dict[str, bytes] = {}
        for part in (*self.parts, *self.data):
            if isinstance(part, Part) and not part.file:
                check_name(part.name)
                data |= part_files(part, self.formats)
        for name, text in self.files.items():
            if not is_bare_name(name) or name == PAGE or name in data:
                raise BadHook(
                    f"{name!r} cannot name a file of a report: names stand once, and lead to no other folder"
                )
            data[name] = text.encode("utf-8", errors="backslashreplace")
        return data

    def _repr_html_(self) -> str:
        named = [
            part for part in (*self.parts, *self.data) if isinstance(part, Part) and not part.file
        ]
        rows = [{"name": part.name, "what": _kind(part), "caption": part.caption} for part in named]
        return shown(
            f"Report: {self.title}",
            {"to see it": "write(folder), which gives the page's path"},
            rows,
        )


@checks_arguments
def report(title: str, *parts: Content, footer: str = "") -> Report:
    """A page of these parts, in order: text, tables, figures, or `Part(content, name, caption)` to name their files.

    A text that begins with "# " is a heading, one with "## " a smaller one. Unnamed parts are table_1, figure_1 and so
    on. Names that stand twice, or that are no file names, raise `BadHook`.

    >>> report("Oat milk", "# Before", ranks(run)).write("results/oat_milk").name
    'report.html'
    """
    named: list[str | Part | Folded] = []
    for part in parts:
        if isinstance(part, pd.DataFrame | Figure):
            kind = "table" if isinstance(part, pd.DataFrame) else "figure"
            count = sum(isinstance(p, Part) and p.name.startswith(f"{kind}_") for p in named)
            part = Part(part, f"{kind}_{count + 1}")
        if not isinstance(part, str | Part | Folded):
            raise BadHook(
                f"a report has texts, tables and figures, and was given a {type(part).__name__}"
            )
        named.append(part)
    names = [part.name for part in named if isinstance(part, Part)]
    for name in names:
        if names.count(name) > 1 or not NAME.fullmatch(name):
            raise BadHook(
                f"{name!r} cannot name a part: names stand once, and are letters, digits, '-' and '_'"
            )
    return Report(title, tuple(named), footer)


def _kind(part: Part) -> str:
    return (
        f"table of {len(part.content)} rows" if isinstance(part.content, pd.DataFrame) else "figure"
    )


def part_files(part: Part, formats: tuple[str, ...] = ("csv",)) -> dict[str, bytes]:
    """One table as CSV, and in the other formats, or one figure as PNG; the same content gives the same bytes."""
    if isinstance(part.content, Figure):
        drawing = io.BytesIO()
        part.content.savefig(drawing, format="png", dpi=150, metadata={"Software": None})
        return {f"{part.name}.png": drawing.getvalue()}
    files = {
        f"{part.name}.csv": part.content.to_csv(
            index=False, float_format="%.6g", lineterminator="\n"
        )
    }
    for kind in written_as(part.content, formats):
        if kind != "csv":
            files[f"{part.name}.{kind}"] = FORMATS[kind](part.content).rstrip("\n") + "\n"
    return {name: text.encode("utf-8", errors="backslashreplace") for name, text in files.items()}


def check_name(name: str) -> None:
    """Raise `BadHook` for what cannot name a file without its ending."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise BadHook(f"{name!r} cannot name a file here: use letters, digits, '-' and '_'")


def _check_own(folder: Path, data: Mapping[str, bytes]) -> None:
    """Raise `BadFile` where a file would be overwritten that is no report's."""
    page = folder / PAGE
    known = _hashes(page)
    foreign = [PAGE] if os.path.lexists(page) and not is_own_page(page) else []
    for name, content in data.items():
        path = folder / name
        own = known.get(name), hashlib.sha256(content).hexdigest()
        if os.path.lexists(path) and (
            path.is_symlink() or not path.is_file() or sha256(path) not in own
        ):
            foreign.append(name)
    if foreign:
        raise BadFile(
            f"{str(folder)!r} has {', '.join(foreign)}, which no report wrote, or which was changed since: give "
            "another folder, or move that away"
        )


def is_own_page(path: Path) -> bool:
    """True for a page that hookkit wrote, which says so at its beginning."""
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        return OWN in file.read(LONGEST_HEAD)


def _hashes(page: Path) -> Mapping[str, str]:
    """The sha256 of the files beside a page, as an earlier report noted them."""
    if not is_own_page(page):
        return {}
    with page.open("rb") as file:
        noted = HASHES.search(file.read(LONGEST_HEAD))
    try:
        return strings_of(json_of(unescape(noted[1].decode()), PAGE), (), PAGE) if noted else {}
    except BadFile:
        return {}


def _listed(part: Part, formats: tuple[str, ...]) -> dict[str, Any]:
    kinds = written_as(part.content, formats) if isinstance(part.content, pd.DataFrame) else ["png"]
    return {"files": [f"{part.name}.{kind}" for kind in kinds], "caption": part.caption}


def written_as(table: pd.DataFrame, formats: tuple[str, ...]) -> list[str]:
    """Those of the formats that a table is written in."""
    return [kind for kind in formats if kind in ("csv", "json") or len(table) <= PAPER_ROWS]


def _rendered(part: str | Part | Folded, formats: tuple[str, ...]) -> dict[str, Any]:
    if isinstance(part, str):
        marks = {"# ": "heading", "## ": "smaller"}
        mark = next((mark for mark in marks if part.startswith(mark)), "")
        return {"kind": marks.get(mark, "text"), "text": part.removeprefix(mark)}
    if isinstance(part, Folded):
        return {"kind": "folded", "summary": part.summary, "text": part.text}
    if isinstance(part.content, Figure):
        return {
            "kind": "figure",
            "name": part.name,
            "caption": part.caption,
            "svg": Markup(_svg(part)),
        }
    if part.file:  # all of the file's formats are named among the files
        formats = ("csv",)
    files = [f"{part.file or part.name}.{kind}" for kind in written_as(part.content, formats)]
    return {"kind": "table", "name": part.name, "files": files} | _cells(part.content, part.caption)


def _cells(table: pd.DataFrame, caption: str) -> dict[str, Any]:
    shown = table if len(table) <= ROWS_SHOWN else table.head(ROWS_OF_LONGER)
    empty = [name for name in table if len(table) and bool(table[name].isna().all())]
    if (
        len(empty) < table.shape[1]
    ):  # such as the intervals of a mean over one prompt; the CSV has them
        shown = shown.drop(columns=empty)
    same = [
        name for name in PLACES if name in table and len(table) > 1 and len(set(table[name])) == 1
    ]
    if same and len(same) < shown.shape[1]:  # said once, there is room for the others
        caption = f"{caption} {', '.join(f'{name} {table[name].iloc[0]}' for name in same).capitalize()}.".strip()
        shown = shown.drop(columns=same)
    names = [str(name) for name in shown.columns]
    styles = [kind_of(name, kind) for name, kind in zip(names, shown.dtypes, strict=True)]
    rows = [
        [_cell(value, name, style) for value, name, style in zip(row, names, styles, strict=True)]
        for row in shown.itertuples(index=False)
    ]
    if len(table) > len(shown):
        caption = f"{caption} The first {len(shown)} of {len(table)} rows.".strip()
    header = _header(names, list(styles))
    return {"header": header, "rows": rows, "caption": caption, "sorts": len(rows) >= SORTED}


def _cell(value: Any, name: str, style: str) -> dict[str, Any]:
    text = written(value)
    if style == "number":
        rises = SIGNED.get(name, 0) * value if text else 0
        sign = " up" if rises > 0 else " down" if rises < 0 else ""
        return {"text": text, "style": f"number{sign}", "value": f"{value:.12g}" if text else ""}
    return {"text": text, "style": style or ("prose" if len(text) > LONG else ""), "value": None}


def _header(names: list[str], styles: list[str]) -> list[list[dict[str, Any]]]:
    """The header cells of a table in one line, or in two where columns come as NAME_before, NAME_after, NAME_delta."""
    first: list[dict[str, Any]] = []
    second: list[dict[str, Any]] = []
    columns = list(zip(names, styles, strict=True))
    while columns:
        place = len(names) - len(columns)
        (name, style), group = columns[0], columns[0][0].removesuffix("_before")
        parts = [part for part in COMPARED if (f"{group}_{part}", style) in columns[:3]]
        if name != group and len(parts) == 3:
            first.append({"text": group, "style": "group", "columns": 3, "lines": 1, "place": None})
            for number, part in enumerate(parts):
                second.append(
                    {
                        "text": COMPARED[part],
                        "style": style,
                        "columns": 1,
                        "lines": 1,
                        "place": place + number,
                    }
                )
            columns = columns[3:]
        else:
            first.append({"text": name, "style": style, "columns": 1, "lines": 2, "place": place})
            columns = columns[1:]
    return [first, second] if second else [[cell | {"lines": 1} for cell in first]]


def _svg(part: Part) -> str:
    """A figure as SVG whose ink and paper follow the page's theme. matplotlib escapes the texts in it."""
    assert isinstance(part.content, Figure)
    words = io.StringIO()
    # the salt keeps ids apart between figures of one page, and the same from run to run
    with rc_context(
        {"svg.hashsalt": part.name, "svg.fonttype": "none", "font.family": "DejaVu Sans"}
    ):
        part.content.savefig(words, format="svg", metadata={"Date": None, "Creator": None})
    drawing = words.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    for colour, name in THEMED.items():
        drawing = drawing.replace(colour, f"var({name})")
    drawing = drawing.replace(
        "font-family: 'DejaVu Sans'", "font-family: 'DejaVu Sans', Verdana, sans-serif"
    )
    inches = part.content.get_figwidth()
    widths = (
        f"min-width: {max(34, 4.3 * inches):g}rem; max-width: {min(76, max(56, 6.7 * inches)):g}rem"
    )
    sized = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", drawing, count=1)
    return re.sub(r'(<svg[^>]*?) width="[^"]*"', rf'\1 style="{widths}"', sized, count=1)


def rendered(template: str, script: str = "", **values: Any) -> str:
    """A page in the house's style, on which the browser may run this script and no other."""
    style, script = Markup(_source("page.css")), Markup(script)
    return _template(template).render(style=style, script=script, policy=_policy(script), **values)


@cache
def _template(name: str) -> Template:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_source(name))


@cache
def _source(name: str) -> str:
    return files("hookkit.reports").joinpath("templates", name).read_text(encoding="utf-8")


def _policy(script: str) -> str:
    """What the browser may do with the page: show it, and run this one script."""
    runs = (
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
        if script
        else "'none'"
    )
    return f"default-src 'none'; style-src 'unsafe-inline'; img-src 'self' data:; script-src {runs}; base-uri 'none'"
