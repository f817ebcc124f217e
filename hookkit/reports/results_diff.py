"""Against: what moved between two runs of one experiment, table by table.

hk.moved("results/oat_milk", "elsewhere/oat_milk")      # two folders
hk.moved("results/oat_milk@HEAD", "results/oat_milk")   # what is committed, and what stands there now
"""

import io
import os
import subprocess
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

from ..arguments import checks_arguments
from ..errors import BadHook
from ..files.untrusted import inside, table_of

LAST = ".last"  # in a result's folder: the files of the run before
TOLERANCE = 1e-4
COLUMNS = ["table", "same", "cells", "moved", "largest", "column", "note"]

Tables: TypeAlias = "str | os.PathLike[str] | Mapping[str, pd.DataFrame]"


@checks_arguments
def moved(before: Tables, after: Tables, *, tolerance: float = TOLERANCE) -> pd.DataFrame:
    """What differs between the tables of two results: one row for each table that either of them has.

    before, after  folders, of which every CSV counts, in folders below too; "FOLDER@REVISION" is a folder as git has
                   it; or mappings from names to tables
    tolerance      two numbers a and b are the same where |a - b| is at most tolerance x max(1, |a|, |b|): absolute for
                   small numbers, relative for large ones. Texts are the same letter by letter, and so are rows and
                   columns by their order

    Columns: table · same · cells, that were compared · moved, those that differ · largest, the largest difference
    between two numbers, also where it is within the tolerance · column, in which it is · note, on tables that only one
    side has or that have other rows or columns. Raises `BadHook` for a folder or a revision that is not there, and
    `BadFile` for a table that cannot be read.

    >>> moved({"ranks": ranks(run)}, {"ranks": ranks(run)})[["table", "same", "moved"]]
       table  same  moved
    0  ranks  True      0
    """
    old, new = _tables(before), _tables(after)
    rows = [
        _compared(name, old.get(name), new.get(name), tolerance)
        for name in dict.fromkeys([*old, *new])
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def in_words(table: pd.DataFrame) -> str:
    """What `moved` found, in one line."""
    if table.empty:
        return "there are no tables"
    other: Any = table[~table["same"]]
    found: list[Any] = other.to_dict("records")
    if not found:
        return f"{len(table)} tables are the same"
    said = [f"{each['table']}: {each['note'] or _cells(each)}" for each in found]
    rest = len(table) - len(found)
    return "; ".join([*said, f"{rest} other tables are the same"] if rest else said)


def _cells(row: Mapping[str, Any]) -> str:
    most = f", {row['column']} by {row['largest']:.3g}" if row["column"] else ""
    return f"{row['moved']} of {row['cells']} cells moved{most}"


def _tables(source: Tables) -> dict[str, pd.DataFrame]:
    if isinstance(source, Mapping):
        return dict(source)
    folder, at, revision = os.fspath(source).rpartition("@")
    if at and folder and not Path(source).exists():
        return _committed(Path(folder), revision)
    if not Path(source).is_dir():
        raise BadHook(
            f"there is no folder {os.fspath(source)!r} to compare: name a folder of results"
        )
    tables: dict[str, pd.DataFrame] = {}
    for path in sorted(Path(source).rglob("*.csv")):
        within = path.relative_to(source)
        if LAST not in within.parts and path.is_file():
            tables[_name(within)] = table_of(inside(path.parent, path.name))
    return tables


def _committed(folder: Path, revision: str) -> dict[str, pd.DataFrame]:
    """The tables of a folder as they stand in a commit; it may be gone from the disk since."""
    if revision.startswith("-"):
        raise BadHook(f"{revision!r} is no revision of git: give a commit, a branch or a tag")
    here = next((str(place) for place in folder.resolve().parents if place.is_dir()), ".")
    try:
        top = Path(_git(here, "rev-parse", "--show-toplevel").decode().strip())
        packed = _git(
            str(top),
            "archive",
            f"{revision}:{folder.resolve().relative_to(top.resolve()).as_posix()}",
        )
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", b"") or str(error).encode()
        raise BadHook(
            f"git has no {str(folder)!r} at {revision!r}: {said.decode().strip()}"
        ) from None
    with tarfile.open(fileobj=io.BytesIO(packed)) as files:
        members = [
            member
            for member in files.getmembers()
            if member.name.endswith(".csv") and member.isreg()
        ]
        return {
            _name(Path(member.name)): table_of(_opened(files, member), member.name)
            for member in members
        }


def _git(where: str, *words: str) -> bytes:
    return subprocess.run(["git", "-C", where, *words], capture_output=True, check=True).stdout


def _opened(files: tarfile.TarFile, member: tarfile.TarInfo) -> io.BytesIO:
    found = files.extractfile(member)
    return io.BytesIO(found.read() if found else b"")


def _name(path: Path) -> str:
    return path.with_suffix("").as_posix()


def _compared(
    name: str, old: pd.DataFrame | None, new: pd.DataFrame | None, tolerance: float
) -> dict[str, Any]:
    note = ""
    if old is None or new is None:
        note = "is new" if old is None else "is gone"
    elif list(old.columns) != list(new.columns):
        changed = sorted(set(map(str, old.columns)) ^ set(map(str, new.columns)))
        note = (
            f"has other columns: {', '.join(changed)}"
            if changed
            else "has its columns in another order"
        )
    elif len(old) != len(new):
        note = f"has {len(new)} rows, and had {len(old)}"
    if old is None or new is None or note:
        return dict(zip(COLUMNS, (name, False, 0, 0, float("nan"), "", note), strict=True))
    cells, largest, column = 0, 0.0, ""
    for place, title in enumerate(old.columns):
        differs, by = _column(old.iloc[:, place], new.iloc[:, place], tolerance)
        cells += differs
        if by > largest:
            largest, column = by, str(title)
    return dict(zip(COLUMNS, (name, cells == 0, old.size, cells, largest, column, ""), strict=True))


def _column(old: Any, new: Any, tolerance: float) -> tuple[int, float]:
    """How many cells of a column moved, and by how much at most."""
    numbers = all(pd.api.types.is_numeric_dtype(each) and each.dtype != bool for each in (old, new))
    if not numbers:
        return int((old.astype("string").fillna("") != new.astype("string").fillna("")).sum()), 0.0
    a, b = old.to_numpy(float, na_value=np.nan), new.to_numpy(float, na_value=np.nan)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        by = np.where(same, 0.0, np.abs(a - b))
        near = by <= tolerance * np.maximum(1.0, np.maximum(np.abs(a), np.abs(b)))
    finite = by[np.isfinite(by)]
    return int((~(same | (near & np.isfinite(by)))).sum()), float(
        finite.max()
    ) if finite.size else 0.0
