"""What does the first sweep of a process cost, beside a later one?

Each is measured in a process of its own, which loads the model and runs it once by hand, so that
its weights are in memory. The first of two processes finds no trial of the model on disk, and the
second one finds that of the first.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile

import pandas as pd
import torch

import hookkit as hk
from hookkit.models.cache import default_folder

from .serving import answered
from .workloads import swept, workloads

WORKLOAD = "a"
COLUMNS = ["workload", "process", "first_s", "later_s", "times", "times_processor"]
PROCESSES = ("the very first: no trial on disk", "a new process: the trial is on disk")
LATER = 3  # sweeps after the first


def first_sweeps(rounds: int, threads: int) -> pd.DataFrame:
    """Returns the seconds of the first sweep of a process, and times a later one in it."""
    taken: dict[str, list[list[float]]] = {process: [] for process in PROCESSES}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            for process in PROCESSES:
                taken[process].append(_measure(threads, cache))
    rows = []
    for process, measured in taken.items():
        medians = [statistics.median(column) for column in zip(*measured, strict=True)]
        rows.append([WORKLOAD, process, *medians])
    return pd.DataFrame(rows, columns=COLUMNS)


def _measure(threads: int, cache: str) -> list[float]:
    words = [sys.executable, "-m", "experiments.benchmarks.sweeps", "--first"]
    words += [str(threads), str(default_folder())]
    settings = os.environ | {"HOOKKIT_CACHE": cache}
    done = subprocess.run(words, env=settings, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@torch.no_grad()
def first_of(threads: str, folder: str) -> list[float]:
    """Returns the clock's seconds of this process's first sweep and of a later one, and how many
    times longer the first takes by the clock and in seconds of the processor."""
    torch.set_num_threads(int(threads))
    lm = hk.load(folder, device="cpu")
    task, cells = workloads(lm)[WORKLOAD]
    assert hk.types.Hook  # what the sweep's own functions import is no part of the sweep
    for _ in range(2):
        lm.model(torch.tensor([task["prompt"]]), use_cache=False)
    taken = []
    for _ in range(1 + LATER):
        answer = answered(*swept(lm), task, cells)
        taken.append([sum(parts) for parts in zip(answer["source"], answer["cells"], strict=True)])
    clock, used = zip(*taken, strict=True)
    later, later_used = statistics.median(clock[1:]), statistics.median(used[1:])
    return [clock[0], later, clock[0] / later, used[0] / later_used]
