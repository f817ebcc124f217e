"""Where do the seconds of a sweep go?

torch's profiler counts the seconds of the operators in one sweep. What is left of the seconds of a
sweep without the profiler is Python's: making the cells and their hooks, the plan, the modules'
calls, and the table.
"""

import statistics

import pandas as pd
from torch.profiler import ProfilerActivity, profile

import hookkit as hk

from .serving import answered
from .workloads import swept, workloads

PARTS = {
    "matrix products of the linear layers": ("aten::addmm", "aten::mm", "aten::linear"),
    "attention": ("aten::_scaled_dot_product", "aten::scaled_dot_product", "aten::bmm"),
    "copies: cat, clone, copy, index": ("aten::cat", "aten::copy_", "aten::clone", "aten::index"),
}
OTHER, PYTHON = "other operators: norms, activations, rotary, adds", "Python"
SWEEPS = 3


def parts(lm: hk.LM) -> pd.DataFrame:
    """Returns the seconds and the share of each part of a sweep, for each workload."""
    rows = []
    for letter, (task, cells) in workloads(lm).items():
        clock = []
        for _ in range(SWEEPS):
            answer = answered(*swept(lm), task, cells)
            clock.append(answer["source"][0] + answer["cells"][0])
        whole = statistics.median(clock)
        seconds = dict.fromkeys([*PARTS, OTHER], 0.0)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            answered(*swept(lm), task, cells)
        for event in profiler.key_averages():
            seconds[_part_of(event.key)] += event.self_cpu_time_total / 1e6
        seconds[PYTHON] = max(0.0, whole - sum(seconds.values()))
        rows += [[letter, part, spent, spent / whole] for part, spent in seconds.items()]
    return pd.DataFrame(rows, columns=["workload", "part", "seconds", "share"])


def _part_of(operator: str) -> str:
    for part, names in PARTS.items():
        if operator.startswith(names):
            return part
    return OTHER
