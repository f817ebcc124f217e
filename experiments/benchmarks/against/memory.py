"""How much memory does a sweep take?

The peak of a process of its own for one plain forward, for a batch by hand, and for a sweep.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import torch

import hookkit as hk

from ..overhead import resident
from .by_hand import by_hand
from .serving import answered
from .workloads import swept, workloads

RUNS = ("one forward by hand", "batch by hand", "hk.sweep")


def memory() -> pd.DataFrame:
    """Returns peaks in MB and their ratios to the batch by hand: in all, and beyond the model."""
    # glibc's own threshold moves by chance, and a third of the peak with it; where it is fixed,
    # every tensor is freed at once
    settings = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144"}
    found = []
    for letter in ("a", "b", "c"):
        peaks = {}
        for run in RUNS:
            words = [sys.executable, "-m", "experiments.benchmarks.sweeps", "--peak", letter, run]
            done = subprocess.run(words, env=settings, capture_output=True, text=True, check=True)
            peaks[run] = json.loads(done.stdout)
        whole, beside = peaks["batch by hand"]
        found += [
            [letter, run, *peak, peak[0] / whole, peak[1] / beside] for run, peak in peaks.items()
        ]
    names = [
        "workload",
        "run",
        "process_mb",
        "beside_model_mb",
        "ratio_process",
        "ratio_beside_model",
    ]
    return pd.DataFrame(found, columns=names)


def peak_of(letter: str, run: str) -> list[float]:
    """The peak of this process, and by how much it is above what the loaded model takes; MB."""
    torch.set_num_threads(2)
    lm = hk.load(device="cpu")
    task, cells = workloads(lm)[letter]
    hk.forward(lm, [[1, 2]], hk.capture("resid_post"))
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew
    source, ways = by_hand(lm.model)
    if run == "hk.sweep":
        answered(*swept(lm), task, cells)
    elif run == "batch by hand":
        answered(source, ways["batched"], task, cells)
    else:
        answered(source, ways["one by one"], task, cells[:1])
    return [resident("VmHWM"), resident("VmHWM") - before]
