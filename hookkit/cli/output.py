"""What a command says: tables for a reader, clean text for a pipe, CSV, JSON or a page for other programs.

What was asked for goes to standard output, and messages to standard error. Tokens stand as Python literals, and a
character that cannot be printed as its escape: nothing that a model says can break a table or reach the terminal.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..display import printable, printable_lines
from .app import is_terminal

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from ..reports.page import Report

KINDS = ("csv", "json", "html", "md", "tex")
PLACES = ("row", "pos", "step")


@dataclass(frozen=True)
class Form:
    """In what form it is said, and where."""

    csv: Annotated[bool, typer.Option("--csv", help="The table, as CSV.")] = False
    json: Annotated[bool, typer.Option("--json", help="All that was found, as JSON.")] = False
    html: Annotated[bool, typer.Option("--html", help="A page, in HTML.")] = False
    out: Annotated[
        Path | None,
        typer.Option(
            help="Where to: a .csv, .json, .html, .md or .tex file, or a folder for all of it."
        ),
    ] = None
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No messages and no progress.")] = (
        False
    )

    @property
    def kind(self) -> str:
        """What is asked for: one of `KINDS`, "folder", or "" for a reader."""
        from ..errors import BadHook

        flags = [name for name in ("csv", "json", "html") if getattr(self, name)]
        suffix = self.out.suffix.removeprefix(".").lower() if self.out is not None else ""
        found = {*flags, *([suffix] if suffix in KINDS else [])}
        if len(found) > 1:
            raise BadHook(f"{', '.join(sorted(found))} were asked for at once: say one of them")
        if suffix and not found:
            raise BadHook(
                f"--out {self.out} ends in .{suffix}: say .csv, .json, .html, .md or .tex, or a folder"
            )
        return found.pop() if found else "folder" if self.out is not None else ""

    def check(self, *, several: bool = False) -> None:
        """Raise `BadHook` for a form that cannot be, before anything runs; of `several` tables, one that holds one."""
        from ..errors import BadHook

        kind = self.kind
        if several and kind in ("csv", "md", "tex"):
            raise BadHook(
                f"these are several tables, and {kind} holds one: say --json, or --out FOLDER for all"
            )

    def note(self, text: str) -> None:
        """A message on standard error."""
        if not self.quiet:
            tell_aside(text)

    @property
    def progress(self) -> bool | None:
        """What a sweep is told: no line where it is to be quiet, else as it finds right."""
        return False if self.quiet else None


def tell_text(text: str) -> None:
    """A text on standard output as it is; in a terminal without what would move its cursor, colour it or turn it."""
    typer.echo(printable_lines(text) if is_terminal(sys.stdout) else text, nl=False)


def tell_aside(text: str) -> None:
    """A line on standard error, in which nothing moves the cursor of a terminal."""
    typer.echo(f"hookkit: {printable_lines(text)}", err=True)


def passing(text: str) -> None:
    """A message on a terminal that the next one takes the place of."""
    if is_terminal(sys.stderr):
        sys.stderr.write(f"\r\x1b[2K{printable(text)}\r")
        sys.stderr.flush()


@dataclass(frozen=True, eq=False)
class Shown:
    """A table. A reader is shown these columns (all unless named), of `reader` where that is given."""

    table: "pd.DataFrame"
    columns: tuple[str, ...] = ()
    caption: str = ""
    reader: "pd.DataFrame | None" = None
    figure: "Callable[[], Figure] | None" = None

    def for_reader(self) -> "pd.DataFrame":
        """What a reader is shown; a place that is the same in all rows is left out."""
        table: Any = self.table if self.reader is None else self.reader
        names = [name for name in (self.columns or table.columns) if name in table]
        whole: Any = self.table
        same = {name for name in PLACES if name in whole and whole[name].nunique() <= 1}
        return table[[name for name in names if name not in same]]


def tell(
    form: Form, title: str, parts: "Mapping[str, Shown | str]", *, main: str | None = None
) -> None:
    """Say it in the form asked for. CSV, Markdown and LaTeX have one table, `main`; a text is for readers alone."""
    kind = form.kind
    if kind == "":
        _to_reader(parts)
    elif kind in ("html", "folder"):
        tell_page(form, _page(title, parts))
    else:
        _text(form, _as_text(kind, parts, main))


def tell_page(form: Form, page: "Report") -> None:
    """A page: on standard output or in a file, or in a folder with its tables beside it."""
    if form.kind == "folder":
        _written(form, lambda path: str(page.write(path)))
    else:
        _text(form, page.html())


def _text(form: Form, text: str) -> None:
    if form.out is None:
        tell_text(text)
    else:
        _written(form, lambda path: _write(path, text))


def _written(form: Form, write: Callable[[Path], str]) -> None:
    from ..errors import BadFile

    assert form.out is not None
    try:
        path = write(form.out)
    except BadFile:
        raise
    except OSError as error:
        raise BadFile(f"{str(form.out)!r} cannot be written: {error.strerror or error}") from error
    form.note(f"wrote {path}")


def _write(path: Path, text: str) -> str:
    write_out(path, lambda making: making.write_text(text, encoding="utf-8", newline="\n"))
    return str(path)


def write_out(path: Path, write: Callable[[Path], object]) -> None:
    """Write the file that an option names, whole; a pipe or a device, such as /dev/stdout, is written into."""
    from ..files.atomic import whole_file

    if path.exists() and not path.is_file() and not path.is_dir():
        write(path)
        return
    with whole_file(path) as making:
        write(making)


def _as_text(kind: str, parts: "Mapping[str, Shown | str]", main: str | None) -> str:
    from ..reports.typesetting import as_json, as_latex, as_markdown

    tables = {name: part.table for name, part in parts.items() if isinstance(part, Shown)}
    if kind == "json" and len(tables) > 1:
        return (
            "{\n"
            + ",\n".join(f"{json.dumps(name)}: {as_json(t).strip()}" for name, t in tables.items())
            + "\n}\n"
        )
    table = tables[main] if main is not None else next(iter(tables.values()))
    if kind == "csv":
        return table.to_csv(index=False, lineterminator="\n")
    return {"json": as_json, "md": as_markdown, "tex": as_latex}[kind](table).rstrip("\n") + "\n"


def _page(title: str, parts: "Mapping[str, Shown | str]") -> "Report":
    from ..reports.page import Part, report

    found: list[Any] = []
    for name, part in parts.items():
        if isinstance(part, str):
            found += [f"# {name}", *(line for line in part.splitlines() if line)]
            continue
        found += [f"# {part.caption}"] if part.caption else []
        found += [Part(part.figure(), f"{name}_figure")] if part.figure is not None else []
        found.append(Part(part.table, name))
    return report(title, *found)


def _to_reader(parts: "Mapping[str, Shown | str]") -> None:
    for number, (name, part) in enumerate(parts.items()):
        heading = name if isinstance(part, str) else part.caption
        if heading and len(parts) > 1:
            said(("\n" if number else "") + heading, style="bold")
        if isinstance(part, str):
            said(part)
        else:
            show(part.for_reader())


def said(text: str, *, style: str = "") -> None:
    """A text on standard output; in a terminal without what would move its cursor or colour it."""
    if is_terminal(sys.stdout):
        text = printable_lines(text)
        text = typer.style(text, bold=True) if style else text
    typer.echo(text)


def show(table: "pd.DataFrame") -> None:
    """A table on standard output: by rich in a terminal, else as lines as long as they have to be."""
    from ..reports.typesetting import kind_of

    names = [printable(str(name)) for name in table.columns]
    right = [
        kind_of(str(name), kind) == "number"
        for name, kind in zip(table.columns, table.dtypes, strict=True)
    ]
    columns = [
        _cells(table[name], number) for name, number in zip(table.columns, right, strict=True)
    ]
    rows = [list(row) for row in zip(*columns, strict=True)]
    if is_terminal(sys.stdout):
        _by_rich(names, rows, right)
    else:
        typer.echo(aligned([names, *rows], right))


def _cells(column: Any, number: bool) -> list[str]:
    """The cells of a column: numbers with as many digits behind the point as one another."""
    from ..reports.typesetting import written

    if not number or column.dtype.kind != "f":
        return [printable(written(value)) for value in column]
    digits = 4 if (column.dropna().abs() <= 1).all() else 2
    least = 0.5 * 10**-digits
    return [
        f"{v:.1e}" if 0 < abs(v) < least else f"{v:.{digits}f}" if abs(v) < 1e9 else written(v)
        for v in column
    ]


def _by_rich(names: list[str], rows: list[list[str]], right: list[bool]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="dim", pad_edge=False)
    for name, number in zip(names, right, strict=True):
        table.add_column(
            Text(name), justify="right" if number else "left", no_wrap=number, overflow="fold"
        )
    for row in rows:
        table.add_row(*map(Text, row))  # a token may be "[red]" or ":smile:"
    Console(highlight=False).print(table)


def aligned(lines: Sequence[Sequence[str]], right: Sequence[bool]) -> str:
    """Lines of cells, each column as wide as its widest cell; a wide character counts as two."""
    from rich.cells import cell_len

    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    found = []
    for line in lines:
        gaps = [" " * (width - cell_len(cell)) for cell, width in zip(line, widths, strict=True)]
        cells = [
            gap + cell if end else cell + gap
            for cell, gap, end in zip(line, gaps, right, strict=True)
        ]
        found.append("  ".join(cells).rstrip())
    return "\n".join(found)


def strongest(table: "pd.DataFrame", name: str, count: int) -> "pd.DataFrame":
    """The rows with the largest values of a column, whatever their sign, the largest first."""
    values: Any = table[name]
    order = values.abs().sort_values(ascending=False, kind="stable").index
    return table.loc[order].head(count).reset_index(drop=True)


def records(table: Any) -> list[dict[str, Any]]:
    """The rows of a table as plain values; what is no finite number is None."""
    return json.loads(table.to_json(orient="records"))
