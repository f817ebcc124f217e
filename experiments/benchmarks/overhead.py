"""What do hooks cost? Each workload beside plain transformers and beside hooks written by hand.

It is answered by ratios of medians in one run, the workloads in turn and in a new order each round:
the machine's speed drifts, so that seconds of different runs do not compare. Peak memory is that of
a process of its own.

python -m experiments.benchmarks.overhead        10 minutes on two cores; writes results/benchmarks/
"""

import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hookkit as hk

ROUNDS = {"forward": 12, "generate": 8, "tiny forward": 200, "tiny generate": 20}
BATCH, WIDTH = 8, 128  # rows and tokens of the forward
NEW_TOKENS, TINY_TOKENS = 64, 32
THREADS = 2
KEPT = {
    "plain": 0,
    "resid_post": 30 * BATCH * WIDTH * 576 * 4,
    "resid_post, pos=-1": 30 * BATCH * 576 * 4,
}  # bytes

Work = dict[str, Callable[[], object]]
QUESTION = "What do hooks cost?"


def main() -> None:
    torch.set_num_threads(THREADS)
    lm = hk.load(device="cpu")
    with hk.record(
        "results/benchmarks", title="What hooks cost", question=QUESTION, lm=lm
    ) as results:
        table = pd.concat([forwards(lm), generation(lm), tiny()], ignore_index=True)
        caption = (
            f"Medians, {THREADS} threads. ratio and added_ms: to plain transformers, round by "
            "round."
        )
        results.table("overhead", table, caption=caption)
        peaks = results.table(
            "memory", memory(), caption="Peak of one forward over the loaded model."
        )
        results.answer(answer({"overhead": table, "memory": peaks}))
    print(table.to_string(index=False), peaks.to_string(index=False), sep="\n\n")


def answer(tables: Mapping[str, Any]) -> str:
    """The answer, from the tables that were written."""
    table = tables["overhead"].set_index(["what", "workload"])["ratio"]
    forward, generate = table["forward"], table["generate"]
    peaks = tables["memory"].set_index("workload")
    return (
        "With nothing attached, nothing beyond the noise: a forward takes "
        f"{forward['nothing attached']:.2f} times as long as in plain transformers, and generation "
        f"{generate['nothing attached']:.2f} times. Capturing the residual stream of all 30 layers "
        f"takes {forward['capture of 30 resid_post']:.2f} times as long, and hooks by hand that "
        f"clone the same {forward['30 clones by hand']:.2f} times. Generation with a forced token "
        f"and steering takes {generate['force and steer']:.2f} times as long. The capture keeps "
        f"{peaks['kept_mb']['resid_post']:.0f} MB, and the memory beyond what it keeps is that of "
        "plain transformers."
    )


def compared(what: str, work: Work, rounds: int) -> pd.DataFrame:
    """Seconds of each workload, and how they compare with the first one's in the same round."""
    taken: dict[str, list[float]] = {label: [] for label in work}
    for number in range(rounds + 1):  # the first round warms up
        for label in random.Random(number).sample(list(work), len(work)):
            started = time.perf_counter()
            work[label]()
            taken[label].append(time.perf_counter() - started)
    plain = taken[next(iter(work))][1:]
    rows = []
    for label, seconds in taken.items():
        pairs = list(zip(seconds[1:], plain, strict=True))
        ratio = statistics.median(mine / other for mine, other in pairs)
        added = statistics.median(mine - other for mine, other in pairs) * 1000
        rows.append([what, label, statistics.median(seconds[1:]) * 1000, ratio, added])
    return pd.DataFrame(rows, columns=["what", "workload", "median_ms", "ratio", "added_ms"])


def by_hand(model: Any, ids: torch.Tensor) -> Callable[[], object]:
    """The least that keeping 30 residual streams can cost: hooks that clone, and nothing else."""

    @torch.no_grad()
    def run() -> object:
        kept = {}
        hooks = [
            layer.register_forward_hook(lambda _m, _a, out, n=n: kept.__setitem__(n, out.clone()))
            for n, layer in enumerate(model.model.layers)
        ]
        out = model(ids, use_cache=False).logits
        for hook in hooks:
            hook.remove()
        return out, kept

    return run


def plainly(model: Any, ids: torch.Tensor) -> Callable[[], object]:
    @torch.no_grad()
    def run() -> object:
        return model(ids, use_cache=False).logits

    return run


def some_ids() -> torch.Tensor:
    return torch.randint(0, 49000, (BATCH, WIDTH), generator=torch.Generator().manual_seed(0))


def forwards(lm: hk.LM) -> pd.DataFrame:
    ids = some_ids()
    work: Work = {
        "plain transformers": plainly(lm.model, ids),
        "30 clones by hand": by_hand(lm.model, ids),
        "nothing attached": lambda: hk.forward(lm, ids),
        "capture of 30 resid_post": lambda: hk.forward(lm, ids, hk.capture("resid_post")),
        "capture of layer 5, no logits": lambda: hk.forward(
            lm, ids, hk.capture("resid_post.5"), logits=False
        ),
        "capture of 30, no logits": lambda: hk.forward(
            lm, ids, hk.capture("resid_post"), logits=False
        ),
        "last logits only": lambda: hk.forward(lm, ids, logits="last"),
    }
    return compared("forward", work, ROUNDS["forward"])


def generation(lm: hk.LM) -> pd.DataFrame:
    prompt = "I like oat milk in my"
    model: Any = lm.model
    inputs = lm.tokenizer(prompt, return_tensors="pt")
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None}
    vector = torch.randn(576, generator=torch.Generator().manual_seed(0))
    hooks = [hk.force(" coffee"), hk.steer("resid_post.6", vector)]
    work: Work = {
        "plain transformers": lambda: model.generate(**inputs, **settings),
        "nothing attached": lambda: hk.generate(lm, prompt, **settings),
        "force and steer": lambda: hk.generate(lm, prompt, *hooks, **settings),
        "trace": lambda: hk.generate(
            lm, prompt, trace=hk.trace(top=5, watch=(" coffee", " tea")), **settings
        ),
    }
    return compared("generate", work, ROUNDS["generate"])


def tiny() -> pd.DataFrame:
    """A model of 30 layers with d_model 8, of which nothing is left but overhead."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=30,
        num_attention_heads=2,
    )
    model: Any = LlamaForCausalLM(config).eval()
    lm = hk.LM(model)
    ids = torch.arange(8)[None]
    settings = {
        "max_new_tokens": TINY_TOKENS,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    once: Work = {
        "plain transformers": plainly(lm.model, ids),
        "30 clones by hand": by_hand(lm.model, ids),
        "nothing attached": lambda: hk.forward(lm, ids),
        "capture of 30 resid_post": lambda: hk.forward(lm, ids, hk.capture("resid_post")),
    }
    hooks = [hk.force(3), hk.steer("resid_post.6", torch.ones(8))]
    tokens: Work = {
        "plain transformers": lambda: model.generate(
            ids, attention_mask=torch.ones_like(ids), **settings
        ),
        "force": lambda: hk.generate(lm, ids, hk.force(3), **settings),
        "force and steer": lambda: hk.generate(lm, ids, *hooks, **settings),
    }
    both = {"tiny forward": once, "tiny generate": tokens}
    return pd.concat([compared(what, work, ROUNDS[what]) for what, work in both.items()])


def memory() -> pd.DataFrame:
    """Returns the peak of each process, and its excess over the captures, relative to plain."""
    words = [sys.executable, "-m", "experiments.benchmarks.overhead", "--peak"]
    # glibc's own threshold moves by chance, and a third of the peak with it; where it is fixed,
    # every tensor is freed at once
    settings = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144"}
    runs = [
        subprocess.run([*words, each], env=settings, capture_output=True, text=True, check=True)
        for each in KEPT
    ]
    peaks = [json.loads(run.stdout) for run in runs]
    table = pd.DataFrame(
        {
            "workload": list(KEPT),
            "peak_mb": peaks,
            "kept_mb": [kept / 1e6 for kept in KEPT.values()],
        }
    )
    return table.assign(beyond=(table["peak_mb"] - table["kept_mb"]) / peaks[0] - 1)


def peak_of(workload: str) -> float:
    torch.set_num_threads(THREADS)
    lm = hk.load(device="cpu")
    hk.forward(lm, [[1, 2]], hk.capture("resid_post"))
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew
    if workload == "plain":
        plainly(lm.model, some_ids())()
    else:
        hk.forward(lm, some_ids(), hk.capture("resid_post", pos=-1 if "pos=" in workload else None))
    return resident("VmHWM") - before


def resident(name: str) -> float:
    """A figure of this process's memory, in MB."""
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)
    )
    return int(line.split()[1]) * 1024 / 1e6


if __name__ == "__main__":
    print(peak_of(sys.argv[2])) if "--peak" in sys.argv else main()
