"""What a sweep has found so far, on disk: killed at any moment, it goes on where it was.

A folder has `sweep.json`, which says what the sweep is, and `cells.jsonl`, a line for each forward that was finished.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TextIO

from ..about import about_model, config_hash, tokenizer_hash, weights_hash
from ..arguments import folder_of
from ..errors import BadHook, Unsupported
from ..hooks import codec
from ..metrics import Metric
from ..runs import Run
from ..wrapped import adapters_in_use
from .planning import Plan
from .saying import UNEDITED, Values

ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # in how Python shows a function: another one in every process


@dataclass(eq=False)
class Journal:
    """The file in which values are kept as they come. Without a folder, nothing is written."""

    folder: Path | None = None
    values: Values = field(default_factory=dict)  # what is known already
    file: TextIO | None = None

    @property
    def done(self) -> int:
        """How many cells, counted for each prompt, are known."""
        return sum(cell != UNEDITED for cell, _ in self.values)

    def add(self, found: Values) -> None:
        """Keep values, on disk before this returns."""
        if self.file is not None:
            self.file.write(json.dumps([[*key, *values] for key, values in found.items()]) + "\n")
            self.file.flush()
            os.fsync(self.file.fileno())
        self.values |= found


@contextmanager
def journal(folder: str | os.PathLike[str] | None, plan: Plan, settings: Mapping[str, Any]) -> Iterator[Journal]:
    """A block with the journal of a sweep and what an earlier run of it has found; another sweep's folder raises."""
    if folder is None:
        yield Journal()
        return
    path, ranks = folder_of(folder, "save"), plan.lm.ranks
    if ranks is not None and ranks.rank:
        _about(plan, settings)  # weights are read by all ranks
        yield Journal(values=ranks.first(None))  # what the first one knows
        return
    with _locked(path):
        about, target = _about(plan, settings), path / "sweep.json"
        if not target.exists():
            making = target.with_name(".sweep.json.making")
            making.write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            making.replace(target)
        known = json.loads(target.read_text(encoding="utf-8"))
        differ = [name for name in about if name != "name" and known.get(name) != about[name]]
        if differ:
            raise BadHook(
                f"{path} holds another sweep: it differs in {', '.join(differ)}. Give this one a folder of its own, or "
                "remove that one"
            )
        values = _read(path / "cells.jsonl")
        values = values if ranks is None else ranks.first(values)
        with (path / "cells.jsonl").open("a", encoding="utf-8") as file:
            yield Journal(path, values, file)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """A block in which no other process keeps a sweep in the folder; the lock goes with the process."""
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise Unsupported(
            f"another process is running the sweep in {folder}: wait for it, or give another folder"
        ) from None
    try:
        yield
    finally:
        with suppress(OSError):
            (folder / ".lock").unlink()
        lock.release()


def _read(path: Path) -> Values:
    """What the finished lines say. A last line that was cut off is taken away, so that others can follow."""
    if not path.exists():
        return {}
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        os.truncate(path, len(whole))
    found: Values = {}
    for line in whole.decode().splitlines():
        for cell, row, *values in json.loads(line):
            found.setdefault((cell, row), values)
    return found


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
        "name": [model.pop("model"), model.pop("revision")],  # for the reader: the weights say what it is
        "model": model,
        "prompts": [list(row) for row in plan.reading.rows],
        "cells": {"count": len(plan.cells), "sha256": cells.hexdigest()},
        "metrics": [_metric(metric) for metric in plan.metrics],
        **settings,
    }


def _metric(metric: Metric) -> dict[str, Any]:
    """A metric as values of JSON: its function's source, the numbers of its reference."""
    return {"metric": type(metric).__name__} | {each.name: _told(getattr(metric, each.name)) for each in fields(metric)}


def _told(value: Any) -> Any:
    if isinstance(value, Run):
        kept = value.captured_logits()
        return {"tokens": value.tokens.tolist(), "logits": codec.tensor_as_json(kept.values, "digest")}
    if isinstance(value, list | tuple):
        return [_told(each) for each in value]
    if callable(value):
        return codec.function_as_json(value)
    return value
