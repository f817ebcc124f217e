"""Reports: one self-contained page from texts, tables and figures, with the tables' CSV and figures' PNG beside it.

    hk.report("Oat milk", "What moved?", shift, hk.rank_bump(shift)).write("results/oat_milk")

The page needs no network, follows the reader's light or dark theme, and can be printed. Everything that comes from a
model or a user is escaped: a token may be "<script>".
"""

import io
import os
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure

from .errors import BadHook
from .figures import GRID, INK, MUTED, PAPER
from .sharding import writes

ROWS_SHOWN = 60  # of a longer table the page shows the beginning, and the CSV has all
THEMED = {INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--paper"}
COMPARED = {"before": "before", "after": "after", "delta": "Δ"}
PLACES = ("row", "pos", "step")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclass(frozen=True, eq=False)
class Part:
    """A table or a figure with its name, which is the name of its file, and a caption."""

    content: pd.DataFrame | Figure
    name: str
    caption: str = ""


Content: TypeAlias = str | pd.DataFrame | Figure | Part


@dataclass(frozen=True, eq=False)
class Report:
    """A page that is not written yet. Made by `report`."""

    title: str
    parts: tuple[str | Part, ...]
    footer: str = ""

    def html(self) -> str:
        """The page as text."""
        return _template().render(title=self.title, footer=self.footer, parts=[_rendered(part) for part in self.parts])

    def write(self, folder: str | os.PathLike[str]) -> Path:
        """Write report.html, and beside it NAME.csv for every table and NAME.png for every figure; the page's path."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        for part in self.parts:
            if isinstance(part, Part):
                save_part(part, target)
        page = target / "report.html"
        if writes():
            page.write_text(self.html(), encoding="utf-8")
        return page


def report(title: str, *parts: Content, footer: str = "") -> Report:
    """A page of these parts, in order: text, tables, figures, or `Part(content, name, caption)` to name their files.

    A text that begins with "# " is a heading. Unnamed parts are table_1, figure_1 and so on. Names that stand twice, or
    that are no file names, raise `BadHook`.

    >>> report("Oat milk", "# Before", ranks(run)).write("results/oat_milk").name
    'report.html'
    """
    named: list[str | Part] = []
    for part in parts:
        if isinstance(part, pd.DataFrame | Figure):
            kind = "table" if isinstance(part, pd.DataFrame) else "figure"
            count = sum(isinstance(p, Part) and p.name.startswith(f"{kind}_") for p in named)
            part = Part(part, f"{kind}_{count + 1}")
        if not isinstance(part, str | Part):
            raise BadHook(f"a report has texts, tables and figures, and was given a {type(part).__name__}")
        named.append(part)
    names = [part.name for part in named if isinstance(part, Part)]
    for name in names:
        if names.count(name) > 1 or not NAME.fullmatch(name):
            raise BadHook(f"{name!r} cannot name a part: names stand once, and are letters, digits, '-' and '_'")
    return Report(title, tuple(named), footer)


def save_part(part: Part, folder: Path) -> Path:
    """Write one table as CSV or one figure as PNG; the same content gives the same bytes."""
    if isinstance(part.content, pd.DataFrame):
        path = folder / f"{part.name}.csv"
        if writes():
            part.content.to_csv(path, index=False, float_format="%.6g", lineterminator="\n")
        return path
    path = folder / f"{part.name}.png"
    if writes():
        part.content.savefig(path, dpi=150, metadata={"Software": None})
    return path


def _rendered(part: str | Part) -> dict[str, Any]:
    if isinstance(part, str):
        heading = part.startswith("# ")
        return {"kind": "heading" if heading else "text", "text": part.removeprefix("# ")}
    if isinstance(part.content, Figure):
        return {"kind": "figure", "name": part.name, "caption": part.caption, "svg": Markup(_svg(part))}
    return {"kind": "table", "name": part.name} | _cells(part.content, part.caption)


def _cells(table: pd.DataFrame, caption: str) -> dict[str, Any]:
    shown = table.head(ROWS_SHOWN)
    same = [name for name in PLACES if name in table and len(table) > 1 and len(set(table[name])) == 1]
    if same and len(same) < table.shape[1]:  # said once, there is room for the others
        caption = f"{caption} {', '.join(f'{name} {table[name].iloc[0]}' for name in same).capitalize()}.".strip()
        shown = shown.drop(columns=same)
    styles = [_style(str(name), kind) for name, kind in shown.dtypes.items()]
    rows = [
        [{"text": _written(value), "style": style} for value, style in zip(row, styles, strict=True)]
        for row in shown.itertuples(index=False)
    ]
    if len(table) > len(shown):
        caption = f"{caption} The first {len(shown)} of {len(table)} rows.".strip()
    return {"header": _header([str(name) for name in shown.columns], styles), "rows": rows, "caption": caption}


def _style(name: str, kind: Any) -> str:
    if pd.api.types.is_numeric_dtype(kind) and not pd.api.types.is_bool_dtype(kind):
        return "number"
    return "token" if name.startswith(("token", "top1", "read")) else ""


def _header(names: list[str], styles: list[str]) -> list[list[dict[str, Any]]]:
    """The header cells of a table in one line, or in two where columns come as NAME_before, NAME_after, NAME_delta."""
    first: list[dict[str, Any]] = []
    second: list[dict[str, Any]] = []
    columns = list(zip(names, styles, strict=True))
    while columns:
        (name, style), group = columns[0], columns[0][0].removesuffix("_before")
        parts = [part for part in COMPARED if (f"{group}_{part}", style) in columns[:3]]
        if name != group and len(parts) == 3:
            first.append({"text": group, "style": "group", "columns": 3, "lines": 1})
            second += [{"text": COMPARED[part], "style": style, "columns": 1, "lines": 1} for part in parts]
            columns = columns[3:]
        else:
            first.append({"text": name, "style": style, "columns": 1, "lines": 2})
            columns = columns[1:]
    return [first, second] if second else [[cell | {"lines": 1} for cell in first]]


def _written(value: Any) -> str:
    if isinstance(value, float | np.floating):
        return "−∞" if value == -np.inf else "∞" if value == np.inf else f"{value:.4g}"
    return str(value)


def _svg(part: Part) -> str:
    """A figure as SVG whose ink and paper follow the page's theme. matplotlib escapes the texts in it."""
    assert isinstance(part.content, Figure)
    words = io.StringIO()
    # the salt keeps ids apart between figures of one page, and the same from run to run
    with rc_context({"svg.hashsalt": part.name, "svg.fonttype": "none", "font.family": "DejaVu Sans"}):
        part.content.savefig(words, format="svg", metadata={"Date": None, "Creator": None})
    drawing = words.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    for colour, name in THEMED.items():
        drawing = drawing.replace(colour, f"var({name})")
    drawing = drawing.replace("font-family: 'DejaVu Sans'", "font-family: 'DejaVu Sans', Verdana, sans-serif")
    return re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", drawing, count=1), count=1
    )


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(files("hookkit").joinpath("report.html").read_text(encoding="utf-8"))
