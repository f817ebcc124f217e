"""What a sweep has found so far, on disk: killed at any moment, it goes on where it was.

A folder has `sweep.json`, which says what the sweep is, and `cells.jsonl`, a line for each forward that was finished.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO, TypeAlias

from ..about import about_model, tokenizer_hash, weights_hash
from ..errors import BadHook
from ..metrics import KL, Metric
from .planning import Plan

Values: TypeAlias = dict[tuple[int, int], list[float]]
"""What the metrics gave, by the cell's number and the prompt's."""


@dataclass(eq=False)
class Journal:
    """The file in which values are kept as they come. Without a folder, nothing is written."""

    folder: Path | None = None
    values: Values = field(default_factory=dict)  # what is known already
    _file: TextIO | None = None

    def add(self, found: Values) -> None:
        """Keep values, on disk before this returns."""
        self.values |= found
        if self._file is not None:
            self._file.write(json.dumps([[*key, *values] for key, values in found.items()]) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def __enter__(self) -> "Journal":
        if self.folder is not None:
            self._file = (self.folder / "cells.jsonl").open("a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


def journal(folder: str | os.PathLike[str] | None, plan: Plan, settings: Mapping[str, Any]) -> Journal:
    """The journal of a sweep, with what an earlier run of the same sweep has found; another sweep's folder raises."""
    if folder is None:
        return Journal()
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    about, target = _about(plan, settings), path / "sweep.json"
    if not target.exists():
        making = target.with_name(".sweep.json.making")
        making.write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        making.replace(target)
    known = json.loads(target.read_text(encoding="utf-8"))
    differ = [name for name in about if known.get(name) != about[name]]
    if differ:
        raise BadHook(
            f"{path} holds another sweep: it differs in {', '.join(differ)}. Give this one a folder of its own, or "
            "remove that one"
        )
    return Journal(path, _read(path / "cells.jsonl"))


def _read(path: Path) -> Values:
    """What the finished lines say. A last line that was cut off is taken away, so that others can follow."""
    if not path.exists():
        return {}
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        with path.open("r+", encoding="utf-8") as file:
            file.truncate(len(whole.encode()))
    found: Values = {}
    for line in whole.splitlines():
        found |= {(cell, row): values for cell, row, *values in json.loads(line)}
    return found


def _about(plan: Plan, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a sweep this one: the model with its weights, the prompts, every cell's hooks, the metrics."""
    lm = plan.lm
    model = {**about_model(lm), "weights_sha256": weights_hash(lm), "tokenizer_sha256": tokenizer_hash(lm)}
    del model["versions"]
    cells = hashlib.sha256()
    for cell in plan.cells:
        hooks = [hook.to_json(tensors="digest") for hook in cell.hooks]
        cells.update(json.dumps([str(cell), cell.control, hooks]).encode())
    return {
        "model": model,
        "prompts": [list(row) for row in plan.reading.fed],
        "cells": {"count": len(plan.cells), "sha256": cells.hexdigest()},
        "metrics": [_metric(metric) for metric in plan.metrics],
        **settings,
    }


def _metric(metric: Metric) -> str:
    if isinstance(metric, KL) and metric.reference is not None:
        tokens = metric.reference.tokens.tolist()
        return f"KL to a run of {tokens}"
    return str(metric)
