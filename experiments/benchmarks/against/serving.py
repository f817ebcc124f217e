"""The task that every way to sweep gets, and the answer that it returns.

A library in an environment of its own reads each task, and writes each answer, as one line.

A cell is (layer, position) where the stream of another prompt is patched in, and (layer, head)
where a head is zeroed.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TypedDict


class Task(TypedDict):
    """The tokens of a sweep. What is patched in comes from `clean`; without it heads are zeroed."""

    prompt: list[int]
    clean: list[int] | None
    right: int
    wrong: int


class Answer(TypedDict):
    """[wall-clock, CPU] seconds of the source and of the cells, and the metric of each cell."""

    source: tuple[float, float]
    cells: tuple[float, float]
    values: list[float]


Cells = Sequence[tuple[int, int]]
Source = Callable[[Task], Any]
Way = Callable[[Task, Any, Cells], list[float]]


def answered(source: Source, way: Way, task: Task, cells: Cells) -> Answer:
    """The cells' metrics with the seconds that they took; all threads of the process count."""
    started = time.perf_counter(), time.process_time()
    found = source(task) if task["clean"] is not None else None
    ready = time.perf_counter(), time.process_time()
    values = way(task, found, cells)
    ended = time.perf_counter(), time.process_time()
    first, then = (
        (ready[0] - started[0], ready[1] - started[1]),
        (ended[0] - ready[0], ended[1] - ready[1]),
    )
    return {"source": first, "cells": then, "values": values}


def serve(source: Source, ways: dict[str, Way]) -> None:
    """Answer until the input ends. What the library itself prints goes to the error output."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps(list(ways)), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(
            json.dumps(answered(source, ways[asked["way"]], asked["task"], asked["cells"])),
            file=answers,
            flush=True,
        )


def loaded() -> tuple[Any, Any, str]:
    """The model, its tokenizer and their folder, with the threads that the command line says."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, threads = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder), folder
