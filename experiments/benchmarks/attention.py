"""What does it cost to see one layer's attention pattern? At most that layer's attention, computed step by step.

A model runs with fused attention (sdpa), which never has the pattern. One layer's is told of by computing it beside.
The model here is one block of SmolLM2's sizes, since in thirty the cost of one is lost in the noise; the limit is what
the block's own step-by-step attention takes alone, with the queries, keys and values of this forward and its mask.

python -m experiments.benchmarks.attention        a minute on two cores; writes results/benchmarks_attention/
"""

import sys
import time
from statistics import median
from typing import Any

import pandas as pd
import torch

import hookkit as hk

from .overhead import Work, plainly

ROUNDS = 100
SHAPES = [(1, 16), (8, 128), (1, 512)]  # rows and tokens
THREADS = 2
SIZES = {  # of SmolLM2-135M, but for one block and a small vocabulary
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 1024,
    "num_hidden_layers": 1,
}


def main() -> None:
    torch.set_num_threads(THREADS)
    lm = hk.tiny("llama", config=SIZES)
    with hk.record("results/benchmarks_attention", title="What a pattern costs", lm=lm) as results:
        table = pd.concat([measured(lm, *shape) for shape in SHAPES], ignore_index=True)
        caption = f"Medians of {ROUNDS} rounds in turn, {THREADS} threads. added_ms: to plain transformers, by round."
        results.table("attention", table, caption=caption)
    print(table.round(2).to_string(index=False))


def measured(lm: hk.LM, rows: int, width: int) -> pd.DataFrame:
    ids = torch.randint(0, 300, (rows, width), generator=torch.Generator().manual_seed(0))
    work: Work = {
        "plain transformers": plainly(lm.model, ids),
        "its attention alone, step by step": alone(lm, ids),
        "nothing attached": lambda: hk.forward(lm, ids),
        "capture of q_rot.0": lambda: hk.forward(lm, ids, hk.capture("q_rot.0")),
        "capture of pattern.0": lambda: hk.forward(lm, ids, hk.capture("pattern.0")),
        "capture of pattern.0.3, one head": lambda: hk.forward(lm, ids, hk.capture("pattern.0.3")),
        "knockout(0, 3, query=-1, key=0)": lambda: hk.forward(lm, ids, hk.knockout(0, 3, query=-1, key=0)),
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
    """The block's step-by-step attention, of its own modelling file, on what this forward gives it."""
    run = hk.forward(lm, ids, hk.capture([f"{name}.0" for name in ("q_rot", "k_rot", "v")]), logits=False)
    query, key, value = (run[f"{name}.0"].transpose(1, 2).contiguous() for name in ("q_rot", "k_rot", "v"))
    module: Any = lm.submodule(lm.place(hk.Site("attn_out", 0)).path)
    own = sys.modules[type(module).__module__].eager_attention_forward
    width = ids.shape[1]

    @torch.no_grad()
    def compute() -> object:
        mask = torch.full((width, width), torch.finfo(torch.float32).min).triu(1)
        return own(module, query, key, value, mask, scaling=module.scaling)

    return compute


if __name__ == "__main__":
    main()
