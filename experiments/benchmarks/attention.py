"""What does it cost to see one layer's attention pattern? At most that layer's attention, computed step by step.

The model runs with fused attention (sdpa), which never has the pattern. One layer's is told of by computing it beside;
the limit is what the layer's own step-by-step attention takes alone, with the queries, keys and values of this forward.

python -m experiments.benchmarks.attention        3 minutes on two cores; writes results/benchmarks_attention/
"""

import sys
import time
from statistics import median
from typing import Any

import pandas as pd
import torch

import hookkit as hk

from .overhead import Work, plainly

LAYER = 10
ROUNDS = 12
SHAPES = [(8, 128), (1, 16), (1, 512)]  # rows and tokens
THREADS = 2


def main() -> None:
    torch.set_num_threads(THREADS)
    lm = hk.load(device="cpu")
    with hk.record("results/benchmarks_attention", title="What a pattern costs", lm=lm) as results:
        table = pd.concat([measured(lm, *shape) for shape in SHAPES], ignore_index=True)
        caption = f"Medians of {ROUNDS} rounds in turn, {THREADS} threads. added_ms: to plain transformers."
        results.table("attention", table, caption=caption)
    print(table.to_string(index=False))


def measured(lm: hk.LM, rows: int, width: int) -> pd.DataFrame:
    ids = torch.randint(0, 49000, (rows, width), generator=torch.Generator().manual_seed(0))
    work: Work = {
        "plain transformers": plainly(lm.model, ids),
        "that layer's attention alone, step by step": alone(lm, ids),
        "nothing attached": lambda: hk.forward(lm, ids),
        f"capture of pattern.{LAYER}": lambda: hk.forward(lm, ids, hk.capture(f"pattern.{LAYER}")),
        f"capture of one head, pattern.{LAYER}.0": lambda: hk.forward(lm, ids, hk.capture(f"pattern.{LAYER}.0")),
        f"knockout({LAYER}, 0, query=-1, key=0)": lambda: hk.forward(lm, ids, hk.knockout(LAYER, 0, query=-1, key=0)),
        "capture of all 30 patterns": lambda: hk.forward(lm, ids, hk.capture("pattern")),
    }
    taken: dict[str, list[float]] = {label: [] for label in work}
    for _ in range(ROUNDS + 1):  # the first round warms up
        for label, run in work.items():
            started = time.perf_counter()
            run()
            taken[label].append(1000 * (time.perf_counter() - started))
    plain = taken["plain transformers"][1:]
    found = []
    for label, times in taken.items():
        added = median(mine - other for mine, other in zip(times[1:], plain, strict=True))
        added = median(times[1:]) if "alone" in label else added
        ratio = median(mine / other for mine, other in zip(times[1:], plain, strict=True))
        found.append((f"{rows}x{width}", label, median(times[1:]), ratio, added))
    return pd.DataFrame(found, columns=["shape", "workload", "median_ms", "ratio", "added_ms"])


def alone(lm: hk.LM, ids: torch.Tensor) -> Any:
    """The layer's step-by-step attention of its own modelling file, on what this forward gives it."""
    run = hk.forward(lm, ids, hk.capture([f"{name}.{LAYER}" for name in ("q_rot", "k_rot", "v")]), logits=False)
    query, key, value = (run[f"{name}.{LAYER}"].transpose(1, 2).contiguous() for name in ("q_rot", "k_rot", "v"))
    module: Any = lm.submodule(lm.place(hk.Site("attn_out", LAYER)).path)
    own = sys.modules[type(module).__module__].eager_attention_forward
    mask = torch.full((ids.shape[1], ids.shape[1]), torch.finfo(torch.float32).min).triu(1)[None, None]

    @torch.no_grad()
    def compute() -> object:
        return own(module, query, key, value, mask, scaling=module.scaling)

    return compute


if __name__ == "__main__":
    main()
