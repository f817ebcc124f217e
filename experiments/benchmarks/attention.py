"""What does it cost to see one layer's attention pattern?

At most that layer's attention, computed step by step.

A model runs with fused attention (sdpa), which never has the pattern. The pattern of one layer is
computed separately. The model here is one block of SmolLM2's sizes, since in thirty the cost of one
is lost in the noise; the limit is what the block's own step-by-step attention takes alone, with the
queries, keys and values of this forward and its mask.

python -m experiments.benchmarks.attention
    a minute on two cores; writes results/benchmarks_attention/
"""

import sys
from collections.abc import Mapping
from typing import Any

import pandas as pd
import torch

import hookkit as hk

from .overhead import Work, compared, plainly

ROUNDS = 100
SHAPES = [(1, 16), (8, 128), (1, 512)]  # rows and tokens
THREADS = 2
ALONE = "its attention alone, step by step"
SIZES = {  # of SmolLM2-135M, but for one block and a small vocabulary
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 1024,
    "num_hidden_layers": 1,
}
QUESTION = "What does it cost to see one layer's attention pattern?"


def main() -> None:
    torch.set_num_threads(THREADS)
    lm = hk.tiny("llama", config=SIZES)
    with hk.record(
        "results/benchmarks_attention", title="What a pattern costs", question=QUESTION, lm=lm
    ) as results:
        table = pd.concat([measured(lm, *shape) for shape in SHAPES], ignore_index=True)
        caption = (
            f"Medians of {ROUNDS} rounds in turn, {THREADS} threads. added_ms: to plain "
            "transformers, by round."
        )
        results.table("attention", table, caption=caption)
        results.answer(answer({"attention": table}))
    print(table.round(2).to_string(index=False))


def answer(tables: Mapping[str, Any]) -> str:
    """The answer, from the tables that were written."""
    table = tables["attention"].set_index("workload")
    shares = []
    for shape, rows in table.groupby("shape", sort=False):
        added = rows["added_ms"]
        pattern, whole = added["capture of pattern.0"], added["its attention alone, step by step"]
        shares.append(f"{pattern:.1f} ms beside {whole:.1f} ms for {shape} tokens")
    return (
        "It adds the time in which the attention of that layer is computed step by step, or less, "
        "except for short prompts, where the hook itself counts. Added by the capture, beside the "
        f"step-by-step attention alone: {', '.join(shares)}."
    )


def measured(lm: hk.LM, rows: int, width: int) -> pd.DataFrame:
    ids = torch.randint(0, 300, (rows, width), generator=torch.Generator().manual_seed(0))
    work: Work = {
        "plain transformers": plainly(lm.model, ids),
        ALONE: alone(lm, ids),
        "nothing attached": lambda: hk.forward(lm, ids),
        "capture of q_rot.0": lambda: hk.forward(lm, ids, hk.capture("q_rot.0")),
        "capture of pattern.0": lambda: hk.forward(lm, ids, hk.capture("pattern.0")),
        "capture of pattern.0.3, one head": lambda: hk.forward(lm, ids, hk.capture("pattern.0.3")),
        "knockout(0, 3, query=-1, key=0)": lambda: hk.forward(
            lm, ids, hk.knockout(0, 3, query=-1, key=0)
        ),
    }
    table = compared(f"{rows}x{width}", work, ROUNDS).rename(columns={"what": "shape"})
    by_itself = table["workload"] == ALONE  # it is no forward, to which something was added
    return table.assign(added_ms=table["median_ms"].where(by_itself, table["added_ms"]))


def alone(lm: hk.LM, ids: torch.Tensor) -> Any:
    """The block's step-by-step attention, from its modelling file, on this forward's inputs."""
    run = hk.forward(
        lm, ids, hk.capture([f"{name}.0" for name in ("q_rot", "k_rot", "v")]), logits=False
    )
    query, key, value = (
        run[f"{name}.0"].transpose(1, 2).contiguous() for name in ("q_rot", "k_rot", "v")
    )
    module: Any = lm.submodule(lm.location(hk.Site("attn_out", 0)).path)
    own = sys.modules[type(module).__module__].eager_attention_forward
    width = ids.shape[1]

    @torch.no_grad()
    def compute() -> object:
        mask = torch.full((width, width), torch.finfo(torch.float32).min).triu(1)
        return own(module, query, key, value, mask, scaling=module.scaling)

    return compute


if __name__ == "__main__":
    main()
