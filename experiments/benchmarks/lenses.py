"""What does it cost to read every layer?

The lens of all layers and positions, beside a forward and a lens by hand.

It is answered by ratios in one run, in turn and in a new order each round. By hand: hooks that keep
30 residual streams, the final norm and the head over all of them at once, and torch.topk: the least
that the first five tokens of each can cost. hookkit's table has their probabilities, entropy and
divergence too. Peak memory is that of a process of its own, over 8 x 128 tokens.

python -m experiments.benchmarks.lenses  two minutes on two cores; writes results/benchmarks_lenses/
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import hookkit as hk

from .overhead import Work, compared, plainly, resident, some_ids

ROUNDS, THREADS = 15, 2
PROMPT = "When Mary and John went to the store, John gave a drink to"
QUESTION = "What does it cost to read every layer?"


def main() -> None:
    torch.set_num_threads(THREADS)
    lm = hk.load(device="cpu")
    ids = torch.tensor([lm.encode(PROMPT)])
    run = hk.forward(lm, PROMPT)
    work: Work = {
        "plain transformers": plainly(lm.model, ids),
        "by hand: all layers, top 5": by_hand(lm.model, ids),
        "logit_lens, all layers and positions, top 5": lambda: hk.logit_lens(
            lm, PROMPT, pos=None, top=5
        ),
        "the same at the last position": lambda: hk.logit_lens(lm, PROMPT, top=5),
        "direct_logits, components": lambda: hk.direct_logits(run, " Mary"),
        "direct_logits, heads": lambda: hk.direct_logits(run, " Mary", heads=True),
    }
    with hk.record(
        "results/benchmarks_lenses", title="What a lens costs", question=QUESTION, lm=lm
    ) as results:
        caption = (
            f"Medians of {ROUNDS} rounds, {THREADS} threads. ratio and added_ms: to plain "
            "transformers, by round."
        )
        table = results.table("lenses", compared("15 tokens", work, ROUNDS), caption=caption)
        peaks = results.table(
            "memory", memory(), caption="Peak of 8 x 128 tokens beside the loaded model, MB."
        )
        results.answer(answer({"lenses": table, "memory": peaks}))
    print(table.round(2).to_string(index=False), peaks.round(0).to_string(index=False), sep="\n\n")


def answer(tables: Mapping[str, Any]) -> str:
    """The answer, from the tables that were written."""
    ratios = tables["lenses"].set_index("workload")["ratio"]
    peaks = tables["memory"].set_index("workload")["peak_mb"]
    lens = "logit_lens, all layers and positions, top 5"
    return (
        f"The logit lens of all layers and positions takes {ratios[lens]:.2f} times as long as a "
        f"plain forward, and {ratios['by hand: all layers, top 5']:.2f} times if it is written by "
        f"hand without probabilities and entropy. At the last position it takes "
        f"{ratios['the same at the last position']:.2f} times as long. Its peak of memory beside "
        f"the model is {peaks[lens]:.0f} MB, that of a plain forward "
        f"{peaks['plain forward with logits']:.0f} MB."
    )


def by_hand(model: Any, ids: torch.Tensor) -> Any:
    @torch.no_grad()
    def run() -> object:
        kept: list[torch.Tensor] = []
        hooks = [
            layer.register_forward_hook(lambda _m, _a, out: kept.append(out.clone()))
            for layer in model.model.layers
        ]
        model.model(ids, use_cache=False)
        for hook in hooks:
            hook.remove()
        return model.lm_head(model.model.norm(torch.cat(kept))).topk(5)

    return run


def memory() -> pd.DataFrame:
    words = [sys.executable, "-m", "experiments.benchmarks.lenses", "--peak"]
    # glibc's own threshold moves by chance, and a third of the peak with it; where it is fixed,
    # every tensor is freed at once
    settings = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144"}
    names = ("plain forward with logits", "logit_lens, all layers and positions, top 5")
    runs = [
        subprocess.run([*words, each], env=settings, capture_output=True, text=True, check=True)
        for each in names
    ]
    return pd.DataFrame({"workload": names, "peak_mb": [json.loads(run.stdout) for run in runs]})


def peak_of(workload: str) -> float:
    torch.set_num_threads(THREADS)
    lm = hk.load(device="cpu")
    hk.logit_lens(lm, [[1, 2]])
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew
    if workload.startswith("plain"):
        plainly(lm.model, some_ids())()
    else:
        hk.logit_lens(lm, some_ids(), pos=None, top=5)
    return resident("VmHWM") - before


if __name__ == "__main__":
    print(peak_of(sys.argv[2])) if "--peak" in sys.argv else main()
