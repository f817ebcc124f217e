"""`hk.results.compare_results`: what changed between two runs of one experiment, table by table.

hk.results.compare_results("results/oat_milk", "elsewhere/oat_milk")      # two folders
hk.results.compare_results("results/oat_milk@HEAD", "results/oat_milk")   # the commit, and the
files on disk
"""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

from ..arguments import check_arguments
from ..errors import BadHook
from ..files import untrusted
from ..files.untrusted import check_file, path_inside

LAST = ".last"  # in a result's folder: the files of the run before
TOLERANCE = 1e-4
COLUMNS = ["table", "same", "cells", "moved", "largest", "column", "note"]

Tables: TypeAlias = "str | os.PathLike[str] | Mapping[str, pd.DataFrame]"


@check_arguments
def compare_results(before: Tables, after: Tables, *, tolerance: float = TOLERANCE) -> pd.DataFrame:
    """The differences between the tables of two results, one row for each table.

    before, after  folders, with every CSV in them and in folders below; "FOLDER@REVISION" is a
                   folder as git has it; or mappings from names to tables
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
    old_tables, new_tables = _read_tables(before), _read_tables(after)
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


def _read_tables(source: Tables) -> dict[str, pd.DataFrame]:
    if isinstance(source, Mapping):
        return dict(source)
    folder, at, revision = os.fspath(source).rpartition("@")
    if at and folder and not Path(source).exists():
        return _read_committed(Path(folder), revision)
    if not Path(source).is_dir():
        raise BadHook(
            f"there is no folder {os.fspath(source)!r} to compare: name a folder of results"
        )
    tables: dict[str, pd.DataFrame] = {}
    for path in sorted(filter(Path.is_file, Path(source).rglob("*.csv"))):
        relative = path.relative_to(source)
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
    if not (_is_numeric(old) and _is_numeric(new)):
        differs = old.astype("string").fillna("") != new.astype("string").fillna("")
        return int(differs.sum()), 0.0
    a, b = old.to_numpy(float, na_value=np.nan), new.to_numpy(float, na_value=np.nan)
    is_equal = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        change = np.where(is_equal, 0.0, np.abs(a - b))
        is_near = change <= tolerance * np.maximum(1.0, np.maximum(np.abs(a), np.abs(b)))
    is_finite = np.isfinite(change)
    count = int((~(is_equal | (is_near & is_finite))).sum())
    largest = float(change[is_finite].max(initial=0.0))
    return count, largest


def _is_numeric(column: Any) -> bool:
    return pd.api.types.is_numeric_dtype(column) and column.dtype != bool
