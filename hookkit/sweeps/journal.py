"""The journal of a sweep: its values on disk, so that a killed sweep continues.

A folder has `sweep.json`, which describes the sweep, and `cells.jsonl`, with a line for each
finished forward. When all are finished, `table.csv` is written. The sha256 of the table is a line
of `cells.jsonl` too, which shows later that the table is the sweep's own.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import IO, Any

import pandas as pd

from ..errors import BadFile, BadHook
from ..files.atomic import (
    add_line,
    format_csv,
    lock_folder,
    open_to_append,
    read_complete_lines,
    remove_leftovers,
    remove_partial_line,
    sha256,
    write_bytes,
    write_text,
)
from ..files.untrusted import check_folder, check_mapping, parse_json, path_inside, read_json
from ..hooks import serialization as codec
from ..hooks.base import Hook
from ..models.model_setup import active_adapter_names
from ..models.prompt_row import row_as_json
from ..models.provenance import about_model, config_hash, tokenizer_hash, weights_hash
from ..runs.run import Run
from ..tables.metrics.metric import Metric, column_names
from .inputs import Values, count_cells
from .plan import Plan

DESCRIPTION, CELLS, TABLE = "sweep.json", "cells.jsonl", "table.csv"

# The address in Python's text for a function, which is another one in every process.
ADDRESS = re.compile(r" at 0x[0-9a-f]+")


@dataclass(eq=False)
class Journal:
    """Stores the values of a sweep as they come. Without a folder nothing is written.

    values  the values that are known; this object owns them
    tables  the sha256 of each table that was written
    """

    folder: Path | None = None
    values: Values = field(default_factory=dict)
    file: IO[bytes] | None = None
    tables: set[str] = field(default_factory=set)

    @property
    def done(self) -> int:
        """How many cells are known, counted for each prompt."""
        return count_cells(self.values)

    def add(self, values: Values) -> None:
        """Stores values. They are on disk when this returns."""
        self._add_line([[*key, *numbers] for key, numbers in values.items()])
        self.values |= values

    def write(self, table: pd.DataFrame) -> None:
        """Writes the table, and stores its hash."""
        if self.folder is None:
            return
        path = self.folder / TABLE
        data = format_csv(table).encode()
        digest = hashlib.sha256(data).hexdigest()
        stored = _table_hash(path)
        if stored is not None and stored not in {digest, *self.tables}:
            raise BadFile(
                f"{str(path)!r} is not as the sweep wrote it: move it away and call the sweep again"
            )
        if digest not in self.tables:
            self._add_line({"table": digest})
            self.tables.add(digest)
        if stored != digest:
            write_bytes(path, data)

    def _add_line(self, value: Any) -> None:
        if self.file is not None:
            add_line(self.file, json.dumps(value))


def _table_hash(path: Path) -> str | None:
    """Returns the sha256 of a file, an empty text for what is no file, None if nothing is there."""
    if path.is_file() and not path.is_symlink():
        return sha256(path)
    return "" if os.path.lexists(path) else None


@contextmanager
def open_journal(
    folder: str | os.PathLike[str] | None, plan: Plan, settings: Mapping[str, Any]
) -> Iterator[Journal]:
    """Opens the journal of a sweep, with the values of its earlier runs.

    Raises `BadHook` if the folder holds another sweep.
    """
    if folder is None:
        yield Journal()
        return
    path = check_folder(folder, "save")
    ranks = plan.lm.ranks
    if ranks is not None and ranks.rank:
        _describe_sweep(plan, settings)  # all ranks take part in reading the weights
        yield Journal(values=ranks.gather_values(None)[0])  # the values that the first rank has
        return
    with lock_folder(path, "is running the sweep"):
        _check_description(path, _describe_sweep(plan, settings))
        remove_leftovers(path)
        remove_partial_line(path / CELLS)
        values, tables = _read_cells(path / CELLS, len(column_names(plan.metrics)))
        if ranks is not None:
            values = ranks.gather_values(values)[0]
        with open_to_append(path / CELLS) as file:
            yield Journal(path, values, file, tables)


def _check_description(folder: Path, description: Mapping[str, Any]) -> None:
    """Writes the description of a sweep, or raises if the folder has another one."""
    path = path_inside(folder, DESCRIPTION)
    if not path.exists():
        _check_is_new(folder)
        write_text(path, json.dumps(description, indent=2, ensure_ascii=False) + "\n")
    stored = check_mapping(read_json(path, finite=False), f"{DESCRIPTION} of {folder}")
    stored["name"] = description["name"]  # is for the reader only
    differing = [name for name in description if stored.get(name) != description[name]]
    if differing:
        raise BadHook(
            f"{folder} holds another sweep: it differs in {', '.join(differing)}. Give this one a "
            "folder of its own, or remove that one"
        )


def _check_is_new(folder: Path) -> None:
    for name in (CELLS, TABLE):
        if os.path.lexists(folder / name):
            raise BadFile(
                f"{folder} has a {name} and no {DESCRIPTION}, so it is no sweep's: give a "
                "folder of its own"
            )


def _read_cells(path: Path, count: int) -> tuple[Values, set[str]]:
    """Reads the finished lines: the `count` values of each cell, and the hashes of tables."""
    values: Values = {}
    tables: set[str] = set()
    for number, line in enumerate(read_complete_lines(path), start=1):
        name = f"line {number} of {path}"
        entries = parse_json(line, name, finite=False)
        if isinstance(entries, dict):
            tables.add(str(entries.get("table")))
            continue
        for key, numbers in _check_cells(entries, count, name).items():
            values.setdefault(key, numbers)
    return values, tables


def _check_cells(entries: Any, count: int, name: str) -> Values:
    """Returns the values of a line: each entry is a cell number, a row and `count` values."""
    if not isinstance(entries, list) or not all(_is_cell(entry, count) for entry in entries):
        raise BadFile(f"{name} holds no cells of this sweep: delete it, and they are computed anew")
    return {(cell, row): numbers for cell, row, *numbers in entries}


def _is_cell(entry: Any, count: int) -> bool:
    if not isinstance(entry, list) or len(entry) != count + 2:
        return False
    kinds = list(map(type, entry))
    return kinds[:2] == [int, int] and set(kinds) <= {int, float}


def _describe_sweep(plan: Plan, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Describes a sweep: the model with its weights, the prompts, every cell's hooks, the metrics.

    `name` is for the reader only: the weights identify the model.
    """
    lm = plan.lm
    model = {
        **about_model(lm),
        "weights_sha256": weights_hash(lm),
        "config_sha256": config_hash(lm),
        "tokenizer_sha256": tokenizer_hash(lm),
        "adapters": active_adapter_names(lm.root),
    }
    del model["versions"]
    cells = hashlib.sha256()
    for cell in plan.cells:
        hooks = hooks_as_json(cell.hooks)
        cells.update(json.dumps([ADDRESS.sub("", str(cell)), cell.control, hooks]).encode())
    return {
        "name": [model.pop("model"), model.pop("revision")],
        "model": model,
        "prompts": list(map(row_as_json, plan.inputs.rows)),
        "cells": {"count": len(plan.cells), "sha256": cells.hexdigest()},
        "metrics": list(map(_metric_as_json, plan.metrics)),
        **settings,
    }


def hooks_as_json(hooks: Iterable[Hook]) -> list[Any]:
    """Returns hooks as JSON, with digests in place of tensors."""
    return [hook.to_json(tensors="digest") for hook in hooks]


def _metric_as_json(metric: Metric) -> dict[str, Any]:
    description: dict[str, Any] = {"metric": type(metric).__name__}
    for parameter in fields(metric):
        description[parameter.name] = _value_as_json(getattr(metric, parameter.name))
    return description


def _value_as_json(value: Any) -> Any:
    """Returns a field of a metric as JSON: the source of a function, a digest of a reference."""
    if isinstance(value, Run):
        logits = codec.tensor_as_json(value.captured_logits().values, "digest")
        return {"tokens": value.tokens.tolist(), "logits": logits}
    if isinstance(value, list | tuple):
        return list(map(_value_as_json, value))
    if callable(value):
        return codec.function_as_json(value)
    return value
