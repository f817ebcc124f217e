"""`hk.results.compare_results`: what changed between two runs of one experiment, table by table.

hk.results.compare_results("results/oat_milk", "elsewhere/oat_milk")      # two folders
hk.results.compare_results("results/oat_milk@HEAD", "results/oat_milk")   # the commit, and the
files on disk
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

from ..arguments import check_arguments, shorten
from ..display import format_cell
from ..errors import BadHook
from ..files import untrusted
from ..files.untrusted import check_file, path_inside

LAST = ".last"  # in a result's folder: the files of the run before
TOLERANCE = 1e-4
ABOUT = "about.json"
# What about.json has besides settings: of the record itself, and what differs in every run.
OTHER_FACTS = frozenset(("title", "ended", "command", "git_commit", "made_by", "runs", "files",
                         "sha256", "seconds"))  # fmt: skip
PLACES = ("row", "pos", "step", "layer", "head", "token_id", "draw")  # numbers that name a line
CELL_COLUMNS = ["table", "cell", "column", "before", "after", "change", "_size"]
COLUMNS = ["table", "same", "cells", "moved", "largest", "column", "note"]

Folder: TypeAlias = str | os.PathLike[str]
Tables: TypeAlias = "str | os.PathLike[str] | Mapping[str, pd.DataFrame]"


@check_arguments
def compare_results(before: Tables, after: Tables, *, tolerance: float = TOLERANCE) -> pd.DataFrame:
    """The differences between the tables of two results, one row for each table.

    before, after  folders, with every CSV in them and in folders below; "FOLDER@REVISION" is a
                   folder as git has it, and tables that git ignores are not compared with it; or
                   mappings from names to tables
    tolerance      two numbers a and b are the same if |a - b| is at most tolerance x max(1, |a|,
                   |b|): absolute for small numbers, relative for large ones. Texts are compared
                   letter by letter, rows and columns in their order

    Columns: table · same · cells, the number compared · moved, the number that differ · largest,
    the largest difference between two numbers, also if it is within the tolerance · column, where
    that is · note, for tables that only one side has or that have other rows or columns. Raises
    `BadHook` for a folder or a revision that does not exist, and `BadFile` for a table that cannot
    be read.

    >>> compare_results({"ranks": ranks(run)}, {"ranks": ranks(run)})[["table", "same", "moved"]]
       table  same  moved
    0  ranks  True      0
    """
    old_tables, new_tables = _read_both(before, after)
    records = []
    for name in dict.fromkeys([*old_tables, *new_tables]):
        changes = _compare(old_tables.get(name), new_tables.get(name), tolerance)
        records.append({"table": name, **changes})
    return pd.DataFrame(records, columns=COLUMNS)


@check_arguments
def read_table(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Returns the table of a CSV file that hookkit wrote, with every token as it was.

    A column of tokens has texts, also where a token is "NA", "nan" or "1". Raises `BadFile` for a
    file that does not exist or is no CSV.
    """
    return untrusted.read_table(check_file(path))


def describe_changes(table: pd.DataFrame) -> str:
    """The result of `compare_results` in one line."""
    if table.empty:
        return "there are no tables"
    changed: Any = table[~table["same"]]
    n_same = len(table) - len(changed)
    if changed.empty:
        return f"{len(table)} tables are the same"
    words = list(map(_describe_table, changed.to_dict("records")))
    if n_same:
        words.append(f"{n_same} other tables are the same")
    return "; ".join(words)


def _describe_table(row: Mapping[str, Any]) -> str:
    text = row["note"] or f"{row['moved']} of {row['cells']} cells moved"
    if row["column"]:
        text += f", {row['column']} by {row['largest']:.3g}"
    return f"{row['table']}: {text}"


@check_arguments
def changed_cells(before: Tables, after: Tables, *, tolerance: float = TOLERANCE) -> pd.DataFrame:
    """The cells that differ between the tables of two results, the largest change first.

    Columns: table · cell, which line of the table after it is: its number from 0, and its texts
    and places · column · before and after, as texts, with tokens in quotes · change: after minus
    before; infinite for a change of a text, or to or from a missing or infinite number. A line or
    column that only one side has is one row, with "(row)" or "(column)" as its column. The order is
    that of the change relative to the value, or to 1 for a smaller one. The arguments are those of
    `compare_results`.

    >>> changed_cells({"t": ranks(run, top=2)}, {"t": ranks(run, top=3)})["after"].tolist()
    ["line 2: row 0, pos 5, token ' breakfast', token_id 13848"]
    """
    old_tables, new_tables = _read_both(before, after)
    records: list[dict[str, Any]] = []
    for name in dict.fromkeys([*old_tables, *new_tables]):
        old, new = old_tables.get(name), new_tables.get(name)
        if old is not None and new is not None:
            for record in _changed_cells(old, new, tolerance):
                records.append({"table": name, **record})
    table = pd.DataFrame(records, columns=CELL_COLUMNS)
    size: Any = table.pop("_size")
    order = size.astype(float).sort_values(ascending=False, kind="stable").index
    return table.loc[order].reset_index(drop=True)


def _changed_cells(
    old: pd.DataFrame, new: pd.DataFrame, tolerance: float
) -> Iterator[dict[str, Any]]:
    """Yields the rows of `changed_cells` for one table, with the relative size of the change."""
    yield from _lone_columns(old, new, "before")
    yield from _lone_columns(new, old, "after")
    shared = old.columns[old.columns.isin(new.columns)].tolist()
    old_lines, new_lines = _lines_of(old, shared), _lines_of(new, shared)
    old_rows, new_rows = list(range(len(old))), list(range(len(new)))
    if len(old) != len(new):
        old_rows, new_rows = _matching_rows(old_lines, new_lines)
        for number in sorted(set(range(len(old))).difference(old_rows)):
            yield _record("(row)", "before", _name_line(old_lines, number))
        for number in sorted(set(range(len(new))).difference(new_rows)):
            yield _record("(row)", "after", _name_line(new_lines, number))
    for name in shared:
        columns = old[name].iloc[old_rows], new[name].iloc[new_rows]
        for index, record in _changed_values(name, *columns, tolerance):
            yield {"cell": _name_line(new_lines, new_rows[index]), **record}


def _lone_columns(table: pd.DataFrame, other: pd.DataFrame, side: str) -> Iterator[dict[str, Any]]:
    for name in table.columns[~table.columns.isin(other.columns)]:
        yield _record("(column)", side, name)


def _changed_values(
    name: Any, old: pd.Series, new: pd.Series, tolerance: float
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the places at which two columns of the same rows differ, and what differs there."""
    moved, change = _changes(old, new, tolerance)
    for index in np.flatnonzero(moved).tolist():
        before, after = old.iloc[index], new.iloc[index]
        yield (
            index,
            {
                "column": str(name),
                "before": format_cell(name, before),
                "after": format_cell(name, after),
                "change": _signed(before, after, change[index]),
                "_size": change[index] / max([1.0, *_magnitudes(before, after)]),
            },
        )


def _name_line(lines: list[str], number: int) -> str:
    return f"line {number}: {lines[number]}"


def _record(column: str, which: str, text: str) -> dict[str, Any]:
    """Returns the line of a row or column that only one side has."""
    sides = {"before": "", "after": ""} | {which: str(text)}
    return {"cell": "", "column": column, **sides, "change": np.inf, "_size": np.inf}


def _signed(before: Any, after: Any, change: float) -> float:
    return float(after) - float(before) if np.isfinite(change) else np.inf


def _magnitudes(*values: Any) -> list[float]:
    """Returns the absolute values of those that are finite numbers."""
    numbers = [value for value in values if isinstance(value, int | float | np.number)]
    return [abs(float(number)) for number in numbers if np.isfinite(number)]


def _lines_of(table: pd.DataFrame, shared: list[str]) -> list[str]:
    """Returns a text that identifies each row: its values in the columns of texts and places."""
    parts: list[str] = []
    columns = [name for name in shared if name in PLACES or table[name].dtype.kind not in "biuf"]
    for _, row in table[columns].iterrows():
        cells = [f"{name} {format_cell(name, value)}" for name, value in row.items()]
        parts.append(shorten(", ".join(cells), 100))
    return parts


def _matching_rows(old: list[str], new: list[str]) -> tuple[list[int], list[int]]:
    """Returns the numbers of the rows that are in both tables, in order: in each of the two."""
    blocks = SequenceMatcher(None, old, new, autojunk=False).get_matching_blocks()
    old_rows: list[int] = []
    new_rows: list[int] = []
    for start, other_start, count in blocks:
        old_rows += range(start, start + count)
        new_rows += range(other_start, other_start + count)
    return old_rows, new_rows


@check_arguments
def changed_settings(before: Folder, after: Folder) -> pd.DataFrame:
    """The settings that differ between two results, as their about.json have them.

    Columns: setting, before, after, the values as JSON; a setting that one side lacks is empty
    there. They are the result's own settings, the seed, the model with its hashes, its dtype and
    device, the question, the answer, and the versions of packages. A folder may be one of a commit,
    as in `compare_results`.
    """
    old, new = _flat_settings(_read_about(before)), _flat_settings(_read_about(after))
    rows = []
    for name in dict.fromkeys([*old, *new]):
        if old.get(name) != new.get(name):
            rows.append({"setting": name, "before": old.get(name, ""), "after": new.get(name, "")})
    return pd.DataFrame(rows, columns=["setting", "before", "after"])


def _flat_settings(about: Mapping[str, Any]) -> dict[str, str]:
    """Returns the settings as JSON, by their names; those in a mapping as MAPPING.NAME."""
    settings: dict[str, str] = {}
    for name, value in about.items():
        if name in OTHER_FACTS:
            continue
        if isinstance(value, Mapping):
            for key, inner in value.items():
                settings[f"{name}.{key}"] = json.dumps(inner, ensure_ascii=False)
        else:
            settings[name] = json.dumps(value, ensure_ascii=False)
    return settings


def _read_about(source: Folder) -> Mapping[str, Any]:
    """Returns the about.json of a folder, or of a folder in a commit; empty if it has none."""
    if _is_commit(source):
        folder, _, revision = os.fspath(source).rpartition("@")
        archive = _git_archive(Path(folder), revision)
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            if ABOUT not in files.getnames():
                return {}
            data: Any = files.extractfile(ABOUT)
            return untrusted.parse_json(data.read().decode(), ABOUT, finite=False)
    path = Path(source) / ABOUT
    return untrusted.read_json(path, finite=False) if path.is_file() else {}


def _is_commit(source: Tables) -> bool:
    """True for the name of a folder in a commit."""
    if isinstance(source, Mapping):
        return False
    folder, at, _ = os.fspath(source).rpartition("@")
    return bool(at and folder) and not Path(source).exists()


def _read_both(
    before: Tables, after: Tables
) -> tuple[dict[str, pd.DataFrame], dict[str, pd.DataFrame]]:
    """The tables of two results. Tables that git ignores are not compared with a commit."""
    old_tables, new_tables = _read_tables(before), _read_tables(after)
    if _is_commit(before) and not _is_commit(after) and not isinstance(after, Mapping):
        for name in _ignored_names(Path(after), new_tables.keys() - old_tables.keys()):
            del new_tables[name]
    return old_tables, new_tables


def _ignored_names(folder: Path, names: Iterable[str]) -> list[str]:
    """The tables of a folder whose files git ignores."""
    command = ["git", "-C", str(folder), "check-ignore", "-z", "--stdin"]
    paths = "\0".join(f"{name}.csv" for name in names)
    ended = subprocess.run(command, input=paths.encode(), capture_output=True, check=False)
    return [path.removesuffix(".csv") for path in ended.stdout.decode().split("\0") if path]


def _read_tables(source: Tables) -> dict[str, pd.DataFrame]:
    if isinstance(source, Mapping):
        return dict(source)
    if _is_commit(source):
        folder, _, revision = os.fspath(source).rpartition("@")
        return _read_committed(Path(folder), revision)
    if not Path(source).is_dir():
        raise BadHook(
            f"there is no folder {os.fspath(source)!r} to compare: name a folder of results"
        )
    return _read_folder(Path(source))


def _read_folder(folder: Path) -> dict[str, pd.DataFrame]:
    tables: dict[str, pd.DataFrame] = {}
    for path in sorted(filter(Path.is_file, folder.rglob("*.csv"))):
        relative = path.relative_to(folder)
        if LAST not in relative.parts:
            tables[_table_name(relative)] = untrusted.read_table(
                path_inside(path.parent, path.name)
            )
    return tables


def _read_committed(folder: Path, revision: str) -> dict[str, pd.DataFrame]:
    """The tables of a folder in a commit. The folder may be gone from the disk since."""
    archive = _git_archive(folder, revision)
    tables = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        for member in files.getmembers():
            if member.name.endswith(".csv") and member.isreg():
                data: Any = files.extractfile(member)  # never None for a regular file
                content = io.BytesIO(data.read())
                tables[_table_name(Path(member.name))] = untrusted.read_table(content, member.name)
    return tables


def _git_archive(folder: Path, revision: str) -> bytes:
    """A folder in a commit, as a tar file."""
    if revision.startswith("-"):
        raise BadHook(f"{revision!r} is no revision of git: give a commit, a branch or a tag")
    full = folder.resolve()
    existing = next(filter(Path.is_dir, full.parents), Path())
    try:
        top = _git(str(existing), "rev-parse", "--show-toplevel")
        root = Path(top.decode().strip())
        relative = full.relative_to(root.resolve()).as_posix()
        return _git(str(root), "archive", f"{revision}:{relative}")
    except (OSError, subprocess.CalledProcessError) as error:
        output = getattr(error, "stderr", b"") or str(error).encode()
        raise BadHook(
            f"git has no {str(folder)!r} at {revision!r}: {output.decode().strip()}"
        ) from None


def _git(folder: str, *words: str) -> bytes:
    return subprocess.run(["git", "-C", folder, *words], capture_output=True, check=True).stdout


def _table_name(path: Path) -> str:
    return path.with_suffix("").as_posix()


def _compare(
    old: pd.DataFrame | None, new: pd.DataFrame | None, tolerance: float
) -> dict[str, Any]:
    """The columns of a row of `compare_results`, without the table's name."""
    result: dict[str, Any] = {"same": False, "cells": 0, "moved": 0, "largest": float("nan")}
    result |= {"column": "", "note": _describe_shape(old, new)}
    if result["note"]:
        return result
    assert old is not None and new is not None
    result |= {"cells": old.size, "largest": 0.0}
    for index, title in enumerate(old.columns):
        count, largest = _compare_columns(old.iloc[:, index], new.iloc[:, index], tolerance)
        result["moved"] += count
        if largest > result["largest"]:
            result |= {"largest": largest, "column": str(title)}
    result["same"] = result["moved"] == 0
    return result


def _describe_shape(old: pd.DataFrame | None, new: pd.DataFrame | None) -> str:
    """Why two tables cannot be compared cell by cell; "" if they can."""
    if old is None:
        return "is new"
    if new is None:
        return "is gone"
    if list(old.columns) != list(new.columns):
        changed = sorted(set(map(str, old.columns)) ^ set(map(str, new.columns)))
        other = f"has other columns: {', '.join(changed)}"
        return other if changed else "has its columns in another order"
    if len(old) != len(new):
        return f"has {len(new)} rows, and had {len(old)}"
    return ""


def _compare_columns(old: Any, new: Any, tolerance: float) -> tuple[int, float]:
    """The number of cells of a column that changed, and the largest change of a number."""
    moved, change = _changes(old, new, tolerance)
    is_finite = np.isfinite(change)
    return int(moved.sum()), float(change[is_finite].max(initial=0.0))


def _changes(old: Any, new: Any, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """Which cells of a column changed, and by how much; a text that changed did so infinitely."""
    if not (_is_numeric(old) and _is_numeric(new)):
        texts = [column.astype("string").fillna("").to_numpy(str) for column in (old, new)]
        differs = texts[0] != texts[1]
        return differs, np.where(differs, np.inf, 0.0)
    a, b = old.to_numpy(float, na_value=np.nan), new.to_numpy(float, na_value=np.nan)
    is_equal = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        change = np.where(is_equal, 0.0, np.abs(a - b))
        is_near = change <= tolerance * np.maximum(1.0, np.maximum(np.abs(a), np.abs(b)))
    moved = ~(is_equal | (is_near & np.isfinite(change)))
    return moved, np.where(np.isnan(change), np.inf, change)


def _is_numeric(column: Any) -> bool:
    return pd.api.types.is_numeric_dtype(column) and column.dtype != bool
