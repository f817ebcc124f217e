"""How a command prints its results: tables for a reader, or CSV, JSON and pages for programs.

Results go to standard output, and messages to standard error. Tokens are printed in quotes (CSV and
JSON have their plain text), and characters that cannot be printed as escapes: no text of a model
can break a table or control the terminal.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

import hookkit as hk

from ..display import printable, printable_lines
from ..errors import BadHook
from ..files.atomic import atomic_file, disk_errors_as_bad_file, format_csv

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from ..reports.parts import Content

FORMATS = ("csv", "json", "html", "md", "tex")
INDEX_COLUMNS = ("row", "pos", "step")


def is_terminal(stream: Any) -> bool:
    """True for a stream to a terminal; False for a closed one."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # the stream was closed
        return False


def print_text(text: str) -> None:
    """Prints a text on standard output; on a terminal, control characters become escapes."""
    if is_terminal(sys.stdout):
        text = printable_lines(text)
    typer.echo(text, nl=False)


def print_line(text: str, *, bold: bool = False) -> None:
    """Prints a line on standard output, as `print_text` does; bold on a terminal only."""
    if is_terminal(sys.stdout):
        text = printable_lines(text)
        if bold:
            text = typer.style(text, bold=True)
    typer.echo(text)


def print_message(text: str) -> None:
    """Prints a line on standard error, in which control characters become escapes."""
    typer.echo(f"hookkit: {printable_lines(text)}", err=True)


def show_status(text: str) -> None:
    """Shows a message on a terminal until the next message replaces it."""
    if is_terminal(sys.stderr):
        sys.stderr.write(f"\r\x1b[2K{printable(text)}\r")
        sys.stderr.flush()


@dataclass(frozen=True, eq=False)
class TableView:
    """A table, and what a reader sees of it: these columns (by default all) of `reader_table`."""

    table: "pd.DataFrame"
    columns: tuple[str, ...] = ()
    caption: str = ""
    reader_table: "pd.DataFrame | None" = None
    figure: "Callable[[], Figure] | None" = None

    def for_reader(self) -> "pd.DataFrame":
        """Returns the table for a reader, without a row, pos or step that never changes."""
        index: Any = self.table.filter(INDEX_COLUMNS)
        n_values = index.nunique()
        reader_table = self.table if self.reader_table is None else self.reader_table
        visible = reader_table.drop(columns=n_values.index[n_values <= 1], errors="ignore")
        return visible.filter(self.columns) if self.columns else visible


Parts = Mapping[str, TableView | str]


@dataclass(frozen=True)
class OutputOptions:
    """The options for the format and the destination of a result."""

    csv: Annotated[bool, Option("--csv", help="Print the table as CSV.")] = False
    json: Annotated[bool, Option("--json", help="Print all results as JSON.")] = False
    html: Annotated[bool, Option("--html", help="Print a page in HTML.")] = False
    out: Annotated[
        Path | None,
        Option(help="Write to a .csv, .json, .html, .md or .tex file, or all results to a folder."),
    ] = None
    quiet: Annotated[bool, Option("--quiet", "-q", help="Print no messages and no progress.")] = (
        False
    )

    @property
    def format(self) -> str:
        """The requested format: one of `FORMATS`, "folder", or "" for a table for readers."""
        suffix = "" if self.out is None else self.out.suffix.removeprefix(".").lower()
        flags = {"csv": self.csv, "json": self.json, "html": self.html}
        formats = {name for name, is_set in flags.items() if is_set}
        formats |= {suffix}.intersection(FORMATS)
        if len(formats) > 1:
            names = ", ".join(sorted(formats))
            raise BadHook(f"{names} were requested at once: give one of them")
        if formats:
            return formats.pop()
        if suffix:
            raise BadHook(
                f"--out {self.out} ends in .{suffix}: "
                "give .csv, .json, .html, .md or .tex, or a folder"
            )
        return "" if self.out is None else "folder"

    def check(self, *, several: bool = False) -> None:
        """Raises `BadHook` for two formats, or with `several` tables for a format of one."""
        output_format = self.format
        if several and output_format in ("csv", "md", "tex"):
            raise BadHook(
                f"these are several tables, and {output_format} holds one: "
                "say --json, or --out FOLDER for all"
            )

    def note(self, text: str) -> None:
        """Prints a message on standard error, unless --quiet is set."""
        if not self.quiet:
            print_message(text)

    def write(self, title: str, parts: Parts, *, main: str | None = None) -> None:
        """Writes tables and texts in the requested format.

        CSV, Markdown and LaTeX have one table: `main`, or the first. Only readers and pages get
        texts.
        """
        output_format = self.format
        if output_format == "":
            _print_parts(parts)
        elif output_format in ("html", "folder"):
            self.write_page(_build_page(title, parts))
        else:
            self._write_text(_format_tables(output_format, parts, main))

    def write_page(self, page: "hk.types.Report") -> None:
        """Writes a page to standard output, to a file, or with its tables to a folder."""
        if self.format != "folder":
            self._write_text(page.html())
            return
        assert self.out is not None
        with disk_errors_as_bad_file(self.out):
            path = page.write(self.out)
        self.note(f"wrote {path}")

    def _write_text(self, text: str) -> None:
        if self.out is None:
            print_text(text)
            return
        write_file(self.out, lambda path: path.write_text(text, encoding="utf-8", newline="\n"))
        self.note(f"wrote {self.out}")


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file completely or not at all; writes directly to a device such as /dev/stdout."""
    if path.exists() and not path.is_file() and not path.is_dir():
        with disk_errors_as_bad_file(path):
            write(path)
        return
    with atomic_file(path) as temporary_path:
        write(temporary_path)


def _format_tables(output_format: str, parts: Parts, main: str | None) -> str:
    from ..reports.typesetting import as_json, as_latex, as_markdown

    tables = {name: part.table for name, part in parts.items() if isinstance(part, TableView)}
    if output_format == "json" and len(tables) > 1:
        entries = [f"{json.dumps(name)}: {as_json(t).strip()}" for name, t in tables.items()]
        return "{\n" + ",\n".join(entries) + "\n}\n"
    table = tables[main or next(iter(tables))]
    if output_format == "csv":
        return format_csv(table)
    formatters = {"json": as_json, "md": as_markdown, "tex": as_latex}
    return formatters[output_format](table).rstrip("\n") + "\n"


def _build_page(title: str, parts: Parts) -> "hk.types.Report":
    page_parts: list[Any] = []
    for name, part in parts.items():
        if isinstance(part, str):
            page_parts += [f"# {name}", *filter(None, part.splitlines())]
        else:
            page_parts += _page_parts(name, part)
    return hk.report(title, *page_parts)


def _page_parts(name: str, view: TableView) -> "Iterator[Content]":
    """Yields the caption of a table, its figure and the table, as they are on a page."""
    from ..reports.parts import Part

    if view.caption:
        yield f"# {view.caption}"
    if view.figure is not None:
        yield Part(view.figure(), f"{name}_figure")
    yield Part(view.table, name)


def _print_parts(parts: Parts) -> None:
    gap = ""  # no empty line before the first part
    for name, part in parts.items():
        heading = name if isinstance(part, str) else part.caption
        if heading and len(parts) > 1:
            print_line(gap + heading, bold=True)
        gap = "\n"
        if isinstance(part, str):
            print_line(part)
        else:
            print_table(part.for_reader())


def print_table(table: "pd.DataFrame") -> None:
    """Prints a table: drawn by rich on a terminal, else in aligned lines of any length."""
    from ..tables.show import draw_table, format_cells, is_number_column

    if is_terminal(sys.stdout):
        draw_table(table)
        return
    columns = [column for _, column in table.items()]
    names = [printable(str(name)) for name in table.columns]
    rows = list(zip(*map(format_cells, names, columns), strict=True))
    typer.echo(align_columns([names, *rows], list(map(is_number_column, columns))))


def align_columns(lines: Sequence[Sequence[str]], right: Sequence[bool]) -> str:
    """Returns lines of cells, padded to the widest cell of each column.

    A column is aligned to the right where `right` is True. A wide character counts as two.
    """
    from rich.cells import cell_len

    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    aligned_lines = []
    for line in lines:
        cells = ""
        for cell, width, is_right in zip(line, widths, right, strict=True):
            padding = " " * (width - cell_len(cell))
            cells += f"{padding}{cell}  " if is_right else f"{cell}{padding}  "
        aligned_lines.append(cells.rstrip())
    return "\n".join(aligned_lines)


def rows_as_dicts(table: Any) -> list[dict[str, Any]]:
    """Returns the rows of a table as plain values; a number that is not finite is None."""
    return json.loads(table.to_json(orient="records"))
