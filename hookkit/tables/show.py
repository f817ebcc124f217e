"""`hk.show`: what a person sees of a table or of another outcome, in a terminal or a notebook.

hk.show(hk.rank_shift(before, after))

The columns that matter are shown, with rounded numbers and with tokens in quotes. The DataFrame
itself keeps all columns and digits. This module does not import torch.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from itertools import chain, filterfalse
from typing import TYPE_CHECKING, Any

import pandas as pd

from ..arguments import check_arguments, check_integer, describe
from ..display import (
    count_of,
    direction_of,
    is_quoted,
    printable,
    printable_lines,
    quote_token,
    render_html,
)
from ..errors import BadArgument

if TYPE_CHECKING:
    from rich.console import JustifyMethod

MAX_ROWS = 20
TERMINAL = (100, 24)  # columns and lines, where the output is not a terminal
WIDEST_TEXT = 28  # characters of a text that is still shown in one line
GAP = 2  # characters between two columns
INDEX_COLUMNS = ("row", "pos", "step")
# Columns that say more exactly what others say, and are not shown unless they are asked for.
DETAILS = frozenset(
    ("token_id", "logprob", "bits", "varentropy", "prob_margin", "kl_reverse", "tv", "js",
     "logit_before", "logit_after", "logprob_before", "logprob_after", "logprob_delta",
     "log10_rank_ratio")
)  # fmt: skip
DETAIL_ENDINGS = ("_se", "_n", "_id")
# Columns that stay where the terminal is too narrow for all, the most important one first.
IMPORTANT = ("token", "rank_delta", "rank_after", "rank", "prob", "row", "pos", "step", "edit",
             "site", "layer", "head", "rank_before", "effect", "loss", "entropy", "kl",
             "prob_after", "prob_before", "why")  # fmt: skip
INFINITY = {float("inf"): "∞", -float("inf"): "−∞"}
COLOURS = {1: "green", -1: "red", 0: ""}
JUSTIFY: Mapping[bool, JustifyMethod] = {True: "right", False: "left"}  # numbers, other cells


@check_arguments
def show(value: Any, *, columns: Sequence[str] | None = None, rows: int = MAX_ROWS) -> None:
    """Shows a table, several tables by their names, or another outcome of hookkit.

    In a notebook it is displayed as HTML. Elsewhere it is printed in the width of the terminal;
    columns that have no room are named below the table. `rank_delta` is green for a token that rose
    and red for one that fell, where there are colours.

    value    a DataFrame, a Series, a mapping from names to them, or an object of hookkit, such as
             a run or a report
    columns  the columns to show; by default those that matter
    rows     the number of rows to show

    Raises `BadArgument` for another value, or for a column that the table does not have.

    >>> show(ranks(run, top=2))
    row 0, pos 5
    token       logit    prob  rank
    ' coffee'   20.37  0.1523     1
    ' morning'  20.28  0.1386     2
    more columns: token_id, logprob; choose with columns=[...]
    """
    check_integer(rows, "rows", least=1, meaning="how many rows to show,")
    if isinstance(value, Mapping):
        for name, table in value.items():
            _show_line(f"{name}:")
            show(table, columns=columns, rows=rows)
    elif isinstance(value, pd.DataFrame | pd.Series):
        table = _with_index(value)
        missing = sorted(set(columns or ()) - set(table.columns))
        if missing:
            raise BadArgument(
                f"columns={missing} are not in the table, which has {', '.join(table.columns)}"
            )
        _show_table(table, columns, rows)
    elif type(value).__module__.startswith(("hookkit.", "matplotlib.")):
        _show_object(value)
    else:
        raise BadArgument(
            f"{describe(value)} cannot be shown: give a table, a mapping from names to tables, or "
            "what a function of hookkit returned"
        )


def _show_line(text: str) -> None:
    if _display() is None:
        _print_line(text)
    else:
        _show_html(render_html(text))


def _show_object(value: Any) -> None:
    display = _display()
    if display is not None:
        display(value)
    elif hasattr(value, "savefig"):
        raise BadArgument(
            "a figure cannot be shown in a terminal: save it, figure.savefig('figure.png')"
        )
    else:
        _print_line(repr(value))


def _display() -> Any:
    """Returns the function that displays an object in a notebook; None outside a notebook."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    if getattr(shell, "kernel", None) is None:
        return None
    from IPython.display import display  # pyright: ignore[reportMissingImports]

    return display


def _show_html(html: str) -> None:
    from IPython.display import HTML  # pyright: ignore[reportMissingImports]

    _display()(HTML(html))


def _with_index(table: pd.DataFrame | pd.Series) -> pd.DataFrame:
    """Returns the table with its index as columns, if the index has names."""
    names = table.index.names
    if isinstance(table, pd.Series) or any(name is not None for name in names):
        table = table.reset_index()
    return table.set_axis(list(map(str, table.columns)), axis="columns")


def _show_table(table: pd.DataFrame, columns: Sequence[str] | None, rows: int) -> None:
    constants: dict[str, Any] = {}
    names = list(columns or ())
    if columns is None:
        constants = _constant_columns(table)
        names = [name for name in important_columns(table) if name not in constants]
    visible: Any = table[names].head(rows)
    caption = ", ".join(f"{name} {value}" for name, value in constants.items())
    if _display() is not None:
        notes = _notes(table, {*names, *constants}, rows, chosen=columns is not None)
        title = "; ".join(filter(None, (count_of(len(table), "row"), caption)))
        _show_html(render_html(title, notes, visible.to_dict("records"), most=rows))
        return
    if caption:
        _print_line(caption)
    printed_names = {*constants, *_print_columns(visible, chosen=columns is not None)}
    for name, note in _notes(table, printed_names, rows, chosen=columns is not None).items():
        _print_line(f"{name} {note}")


def _print_columns(table: Any, *, chosen: bool) -> list[str]:
    """Prints the columns that fit, or all if a user chose them. Returns those that it printed."""
    width = shutil.get_terminal_size(TERMINAL).columns
    blocks = _blocks_that_fit(table, width) if chosen else [_columns_that_fit(table, width)]
    for block in blocks:
        draw_table(table[block], width)
    return list(chain(*blocks))


def _print_line(text: str) -> None:
    sys.stdout.write(f"{printable_lines(text)}\n")


def _notes(table: pd.DataFrame, shown: set[str], rows: int, *, chosen: bool) -> dict[str, object]:
    """Returns what says how to see the rows, and unless they were chosen the columns, not shown."""
    notes: dict[str, object] = {}
    if len(table) > rows:
        notes["more rows:"] = f"{len(table) - rows}, with rows={len(table)}"
    hidden = filterfalse(shown.__contains__, table.columns)
    hidden_names = ", ".join(hidden)
    if hidden_names and not chosen:
        notes["more columns:"] = f"{hidden_names}; choose with columns=[...]"
    return notes


def _constant_columns(table: Any) -> dict[str, Any]:
    """Returns the index columns with the same value in all rows, beside other columns."""
    constants = {}
    for name in INDEX_COLUMNS:
        if name in table and table[name].nunique(dropna=False) == 1:
            constants[name] = table[name].iloc[0]
    return constants if len(constants) < table.shape[1] else {}


def important_columns(table: Any) -> list[str]:
    """Returns the columns of a table that matter to a reader: all but details and empty columns."""
    names = []
    for name in table.columns:
        is_detail = name in DETAILS or name.endswith(DETAIL_ENDINGS)
        if not is_detail and not (len(table) and table[name].isna().all()):
            names.append(name)
    return names or list(table.columns)


def _columns_that_fit(table: pd.DataFrame, width: int) -> list[str]:
    """Returns the columns that fit into a line, without the least important ones."""
    widths = _column_widths(table)
    by_importance = dict.fromkeys([*filter(widths.__contains__, IMPORTANT), *table.columns])
    dropped = list(by_importance)
    while len(widths) > 1 and sum(widths.values()) + GAP * (len(widths) - 1) > width:
        del widths[dropped.pop()]
    return list(widths)


def _blocks_that_fit(table: pd.DataFrame, width: int) -> list[list[str]]:
    """Returns all columns, in blocks that each fit into a line."""
    widths = _column_widths(table)
    blocks: list[list[str]] = [[]]
    room = width
    for name in table.columns:
        if widths[name] > room and blocks[-1]:
            blocks.append([])
            room = width
        blocks[-1].append(name)
        room -= widths[name] + GAP
    return blocks


def _column_widths(table: pd.DataFrame) -> dict[str, int]:
    """Returns the characters that each column needs; a longer text can be broken into lines."""
    from rich.cells import cell_len

    widths = {}
    for name, column in table.items():
        lengths = list(map(cell_len, format_cells(str(name), column)))
        needed = max(lengths, default=0)
        if not is_number_column(column):
            needed = min(needed, WIDEST_TEXT)
        widths[str(name)] = max(needed, cell_len(str(name)))
    return widths


def largest_rows(table: Any, name: str, count: int) -> pd.DataFrame:
    """Returns the rows with the largest absolute values of a column, in descending order."""
    ordered = table.sort_values(name, key=abs, ascending=False, kind="stable", ignore_index=True)
    return ordered.head(count)


def is_number_column(column: Any) -> bool:
    """True for a column of numbers, which is aligned right."""
    kind = column.dtype
    return pd.api.types.is_numeric_dtype(kind) and not pd.api.types.is_bool_dtype(kind)


def format_cells(name: str, column: Any) -> list[str]:
    """Returns the cells of a column as texts: numbers rounded alike, tokens in quotes."""
    if not is_number_column(column) or column.dtype.kind != "f":
        return [printable(_format_cell(name, value)) for value in column]
    is_small = (column[column.abs() != float("inf")].dropna().abs() <= 1).all()
    return [_format_float(name, value, 4 if is_small else 2) for value in column]


def _format_cell(name: str, value: Any) -> str:
    if value is None or value is pd.NA or value is pd.NaT:
        return ""
    if is_quoted(name, value):
        return quote_token(value)
    if isinstance(value, float):
        return _format_float(name, value, 4)
    if name.endswith("_delta") and isinstance(value, int) and value:
        return f"{value:+d}"
    return str(value)


def _format_float(name: str, value: float, decimals: int) -> str:
    if value != value:
        return ""
    sign = "+" if name.endswith("_delta") and value else ""
    if abs(value) == float("inf"):
        return INFINITY[value]
    if 0 < abs(value) < 0.5 * 10**-decimals or abs(value) >= 1e9:
        return f"{value:{sign}.1e}"
    return f"{value:{sign}.{decimals}f}"


def draw_table(table: pd.DataFrame, width: int | None = None) -> None:
    """Prints a table with rich, in this width; in colours where the terminal has them."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=None, header_style="dim", pad_edge=False, padding=(0, GAP, 0, 0))
    cells = []
    for name, column in table.items():
        is_number = is_number_column(column)
        heading = Text(printable(str(name)))
        drawn.add_column(heading, justify=JUSTIFY[is_number], no_wrap=is_number, overflow="fold")
        texts = format_cells(str(name), column)
        colours = [COLOURS[direction_of(name, value)] for value in column]
        cells.append(list(map(Text, texts, colours)))  # a token may be "[red]" or ":smile:"
    for row in zip(*cells, strict=True):
        drawn.add_row(*row)
    console = Console(highlight=False, width=width)
    with console.capture() as output:
        console.print(drawn)
    for line in output.get().splitlines():
        console.file.write(f"{line.rstrip()}\n")
