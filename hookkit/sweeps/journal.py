"""What a sweep has found so far, on disk: killed at any moment, it goes on where it was.

A folder has `sweep.json`, which says what the sweep is, and `cells.jsonl`, a line for each forward that was finished;
and `table.csv` when all are, whose sha256 is a line of `cells.jsonl`, by which it is known later as the sweep's own.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import IO, Any

import pandas as pd

from ..arguments import folder_of
from ..errors import BadFile, BadHook
from ..files.atomic import (
    add_line,
    added_to,
    cut_to_whole_lines,
    locked,
    remove_leftovers,
    sha256,
    whole_lines,
    write_bytes,
    write_text,
)
from ..files.untrusted import inside, json_in, json_of, mapping_of
from ..hooks import serialization as codec
from ..models.provenance import about_model, config_hash, tokenizer_hash, weights_hash
from ..models.wrappers import adapters_in_use
from ..runs.run import Run
from ..tables.metrics import Metric, columns
from .cell_metrics import UNEDITED, Values
from .plan import Plan

ABOUT, CELLS, TABLE = "sweep.json", "cells.jsonl", "table.csv"
ADDRESS = re.compile(
    r" at 0x[0-9a-f]+"
)  # in how Python shows a function: another one in every process


@dataclass(eq=False)
class Journal:
    """The file in which values are kept as they come. Without a folder, nothing is written."""

    folder: Path | None = None
    values: Values = field(default_factory=dict)  # what is known already
    file: IO[bytes] | None = None
    tables: set[str] = field(default_factory=set)  # the sha256 of tables that were written

    @property
    def done(self) -> int:
        """How many cells, counted for each prompt, are known."""
        return sum(cell != UNEDITED for cell, _ in self.values)

    def add(self, found: Values) -> None:
        """Keep values, on disk before this returns."""
        self._add_line([[*key, *values] for key, values in found.items()])
        self.values |= found

    def write(self, table: pd.DataFrame) -> None:
        """Write the table beside the values, and note that it is this sweep's own."""
        if self.folder is None:
            return
        path, data = self.folder / TABLE, table.to_csv(index=False, lineterminator="\n").encode()
        value = hashlib.sha256(data).hexdigest()
        if os.path.lexists(path):
            own = {value, *self.tables}
            if path.is_symlink() or not path.is_file() or sha256(path) not in own:
                raise BadFile(
                    f"{str(path)!r} is not as the sweep wrote it: move it away and call the sweep again"
                )
        if value not in self.tables:
            self._add_line({"table": value})
            self.tables.add(value)
        if not path.exists() or sha256(path) != value:
            write_bytes(path, data)

    def _add_line(self, value: Any) -> None:
        if self.file is not None:
            add_line(self.file, json.dumps(value))


@contextmanager
def journal(
    folder: str | os.PathLike[str] | None, plan: Plan, settings: Mapping[str, Any]
) -> Iterator[Journal]:
    """A block with the journal of a sweep and what an earlier run of it has found; another sweep's folder raises."""
    if folder is None:
        yield Journal()
        return
    path, ranks = folder_of(folder, "save"), plan.lm.ranks
    if ranks is not None and ranks.rank:
        _about(plan, settings)  # weights are read by all ranks
        yield Journal(values=ranks.first(None))  # what the first one knows
        return
    with locked(path, "is running the sweep"):
        about, target = _about(plan, settings), inside(path, ABOUT)
        for name in (CELLS, TABLE):
            if not target.exists() and os.path.lexists(path / name):
                raise BadFile(
                    f"{path} has a {name} and no {ABOUT}, so it is no sweep's: give a folder of its own"
                )
        if not target.exists():
            write_text(target, json.dumps(about, indent=2, ensure_ascii=False) + "\n")
        known = mapping_of(json_in(target, finite=False), f"{ABOUT} of {path}")
        differ = [name for name in about if name != "name" and known.get(name) != about[name]]
        if differ:
            raise BadHook(
                f"{path} holds another sweep: it differs in {', '.join(differ)}. Give this one a folder of its own, or "
                "remove that one"
            )
        remove_leftovers(path)
        cut_to_whole_lines(path / CELLS)
        values, tables = _read(path / CELLS, len(columns(plan.metrics)))
        values = values if ranks is None else ranks.first(values)
        with added_to(path / CELLS) as file:
            yield Journal(path, values, file, tables)


def _read(path: Path, count: int) -> tuple[Values, set[str]]:
    """What the finished lines say: the values of each cell, `count` of them, and the hashes of tables."""
    values: Values = {}
    tables: set[str] = set()
    for number, line in enumerate(whole_lines(path), start=1):
        name = f"line {number} of {path}"
        entries = json_of(line, name, finite=False)
        if isinstance(entries, dict):
            tables.add(str(entries.get("table")))
            continue
        if not isinstance(entries, list) or not all(_is_cell(entry, count) for entry in entries):
            raise BadFile(
                f"{name} holds no cells of this sweep: delete it, and they are computed anew"
            )
        for entry in entries:
            values.setdefault((entry[0], entry[1]), entry[2:])
    return values, tables


def _is_cell(entry: Any, count: int) -> bool:
    """True for the number of a cell, of a row, and as many values as there are."""
    if (
        not isinstance(entry, list)
        or len(entry) != count + 2
        or not all(type(number) is int for number in entry[:2])
    ):
        return False
    return all(type(value) in (int, float) for value in entry[2:])


def _about(plan: Plan, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a sweep this one: the model with its weights, the prompts, every cell's hooks, the metrics."""
    lm = plan.lm
    hashes = {
        "weights_sha256": weights_hash(lm),
        "config_sha256": config_hash(lm),
        "tokenizer_sha256": tokenizer_hash(lm),
    }
    model = {**about_model(lm), **hashes}
    model["adapters"] = adapters_in_use(lm.root)
    del model["versions"]
    cells = hashlib.sha256()
    for cell in plan.cells:
        hooks = [hook.to_json(tensors="digest") for hook in cell.hooks]
        cells.update(json.dumps([ADDRESS.sub("", str(cell)), cell.control, hooks]).encode())
    return {
        "name": [
            model.pop("model"),
            model.pop("revision"),
        ],  # for the reader: the weights say what it is
        "model": model,
        "prompts": [list(row) for row in plan.reading.rows],
        "cells": {"count": len(plan.cells), "sha256": cells.hexdigest()},
        "metrics": [_metric(metric) for metric in plan.metrics],
        **settings,
    }


def _metric(metric: Metric) -> dict[str, Any]:
    """A metric as values of JSON: its function's source, the numbers of its reference."""
    return {"metric": type(metric).__name__} | {
        each.name: _told(getattr(metric, each.name)) for each in fields(metric)
    }


def _told(value: Any) -> Any:
    if isinstance(value, Run):
        kept = value.captured_logits()
        return {
            "tokens": value.tokens.tolist(),
            "logits": codec.tensor_as_json(kept.values, "digest"),
        }
    if isinstance(value, list | tuple):
        return [_told(each) for each in value]
    if callable(value):
        return codec.function_as_json(value)
    return value
