"""Do the laws hold on a GPU, and what do hooks cost there?

Every law on ten small models, in float32 and in bfloat16; then a random Llama of 1.2 billion
parameters in bfloat16: a forward, generation, a sweep, the lens and a harvest, each beside the same
by hand or in plain transformers, by ratios in one run; and the peak of the GPU's memory.

python -m experiments.benchmarks.gpu
    four minutes on one GPU; writes results/benchmarks_gpu/. Without a GPU it runs a small model on
    the CPU, and writes nothing but what it prints
"""

import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hookkit as hk

FAMILIES = [
    "llama", "gpt2", "gpt_neox", "gemma2", "qwen3", "qwen3_moe", "falcon", "bloom", "olmo2", "phi3",
]  # fmt: skip
DTYPES = ["float32", "bfloat16"]
ROUNDS = 5
QUESTION = "Do the laws hold on a GPU, and what do hooks cost there?"
BILLION: dict[str, Any] = {  # the shape of Llama 3.2 1B
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
SMALL: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
Work = dict[str, Callable[[], object]]


def main(device: str | None = None) -> None:
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    laws = check_families(device)
    lm = random_llama(device)
    costs = pd.concat(
        [compared(what, work, device) for what, work in workloads(lm).items()], ignore_index=True
    )
    memory = peaks(lm, device)
    tables = {"laws": laws, "costs": costs, "memory": memory}
    if device == "cpu":
        print("No GPU is here: nothing is written.")
    else:
        write_results(lm, tables)
    for table in tables.values():
        print(table.round(3).to_string(index=False), end="\n\n")
    print(answer(tables))


def write_results(lm: hk.LM, tables: Mapping[str, pd.DataFrame]) -> None:
    captions = {
        "laws": "difference: the largest of a law's, as a share of its limit.",
        "costs": f"Medians of {ROUNDS} rounds; ratio: to the first workload, round by round.",
        "memory": "The GPU's peak in one forward beside the model, and what the captures keep, MB.",
    }
    folder = "results/benchmarks_gpu"
    title = "Laws and costs on a GPU"
    with hk.record(folder, title=title, question=QUESTION, lm=lm, seed=0) as results:
        for name, table in tables.items():
            results.table(name, table, caption=captions[name])
        results.answer(answer(tables))


def answer(tables: Mapping[str, pd.DataFrame]) -> str:
    """The answer, from the tables that were written."""
    laws = tables["laws"]
    broken = laws[~laws["holds"]]
    verdict = f"All laws hold in {len(laws)} checks"
    if len(broken):
        names = sorted(set(broken["family"] + " in " + broken["dtype"]))
        verdict = f"Not all laws hold: {', '.join(names)}"
    costs = tables["costs"].set_index(["what", "workload"])["ratio"]
    loops = 1 / costs["sweep", "hk.sweep"]
    return (
        f"{verdict}. A forward with the residual stream of all layers captured takes "
        f"{costs['forward', 'capture of all resid_post']:.2f} times as long as in plain "
        f"transformers, generation with a force and a steer "
        f"{costs['generate', 'force and steer']:.2f} times, and a sweep is {loops:.0f} times as "
        f"fast as a loop of forwards. The lens of all layers takes "
        f"{costs['lens', 'hk.logit_lens']:.2f} times as long as by hand, and a harvest "
        f"{costs['harvest', 'hk.harvest']:.2f} times as long as the plain forwards."
    )


# ---- the laws


def check_families(device: str) -> pd.DataFrame:
    """The worst of each law by family and dtype."""
    tables = []
    for family in FAMILIES:
        for dtype in DTYPES:
            lm = hk.tiny(family)
            lm.model.to(device=device, dtype=getattr(torch, dtype))
            checks = hk.check_laws(lm)
            exceptions = checks["note"].str.startswith("exception: ")
            is_counted = ~exceptions & (checks["limit"] > 0)
            share = (checks["difference"] / checks["limit"]).where(is_counted)
            checks = checks.assign(family=family, dtype=dtype, share=share)
            checks["holds"] |= exceptions
            tables.append(checks)
    by_law = pd.concat(tables).groupby(["family", "dtype", "law"], sort=False)
    worst = by_law.agg(sites=("site", "size"), difference=("share", "max"), holds=("holds", "all"))
    return worst.reset_index()


# ---- costs


def random_llama(device: str) -> hk.LM:
    """A random model of 1.2 billion parameters in bfloat16; a small one in float32 on a CPU."""
    is_cpu = device == "cpu"
    config = LlamaConfig(**(SMALL if is_cpu else BILLION))
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = LlamaForCausalLM(config)
    dtype = torch.float32 if is_cpu else torch.bfloat16
    return hk.LM(model.to(dtype).eval(), name="random Llama")


def random_ids(lm: hk.LM, rows: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(10, lm.n_tokens, (rows, width), generator=generator)


def workloads(lm: hk.LM) -> dict[str, Work]:
    """By the task, what is compared; the first workload of each is what the others stand beside."""
    model: Any = lm.model
    ids = random_ids(lm, 8, 128)
    on_device = ids.to(lm.device)
    prompt = ids[:1, :16].tolist()
    settings = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False}
    steer = hk.steer("resid_post.2", torch.ones(lm.sizes["d_model"] or 0))
    whole = ids[:, :64].tolist()

    @torch.no_grad()
    def plain() -> object:
        return model(on_device, use_cache=False).logits

    @torch.no_grad()
    def generate() -> object:
        rows = on_device[:1, :16]
        mask = torch.ones_like(rows)
        return model.generate(rows, attention_mask=mask, pad_token_id=0, **settings)

    @torch.no_grad()
    def forwards() -> object:
        return [model(rows, use_cache=False).logits for rows in on_device.split(4)]

    return {
        "forward": {
            "plain transformers": plain,
            "nothing attached": lambda: hk.forward(lm, ids),
            "capture of all resid_post": lambda: hk.forward(lm, ids, hk.capture("resid_post")),
        },
        "generate": {
            "plain transformers": generate,
            "force and steer": lambda: hk.generate(
                lm, prompt, hk.force(7), steer, pad_token_id=0, **settings
            ),
        },
        "sweep": {
            "a loop of forwards": lambda: loop(lm, prompt),
            "hk.sweep": lambda: sweep(lm, prompt),
        },
        "lens": {
            "by hand: all layers, top 5": lambda: lens_by_hand(lm, on_device[:1]),
            "hk.logit_lens": lambda: hk.logit_lens(lm, ids[:1].tolist(), pos=None, top=5),
        },
        "harvest": {
            "plain forwards": forwards,
            "hk.harvest": lambda: harvest(lm, whole),
        },
    }


def cell(layer: int, pos: int) -> hk.types.Hook:
    return hk.ablate(f"resid_post.{layer}", pos=pos)


def sweep(lm: hk.LM, prompt: list[list[int]]) -> pd.DataFrame:
    grid = {"layer": range(lm.n_layers), "pos": range(len(prompt[0]))}
    return hk.sweep(lm, prompt, grid, cell, hk.metrics.logit(7), progress=False)


def loop(lm: hk.LM, prompt: list[list[int]]) -> list[float]:
    values = []
    for layer in range(lm.n_layers):
        for pos in range(len(prompt[0])):
            run = hk.forward(lm, prompt, cell(layer, pos), logits="last")
            values.append(float(run.logits[0, -1, 7]))
    return values


@torch.no_grad()
def lens_by_hand(lm: hk.LM, ids: torch.Tensor) -> object:
    model: Any = lm.model
    streams: list[torch.Tensor] = []
    handles = []
    for block in model.model.layers:
        handles.append(block.register_forward_hook(lambda _m, _a, out: streams.append(out.clone())))
    try:
        model(ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return model.lm_head(model.model.norm(torch.cat(streams))).topk(5)


def harvest(lm: hk.LM, texts: list[list[int]]) -> None:
    folder = Path(tempfile.mkdtemp())
    site = f"resid_post.{lm.n_layers - 1}"
    try:
        hk.harvest(lm, texts, site, folder / "harvest", batch_tokens=4 * 64, progress=False)
    finally:
        shutil.rmtree(folder)


def compared(what: str, work: Work, device: str) -> pd.DataFrame:
    """Seconds of each workload, and how they compare with the first one's in the same round."""
    taken: dict[str, list[float]] = {label: [] for label in work}
    for number in range(ROUNDS + 1):  # the first round warms up
        for label in random.Random(number).sample(list(work), len(work)):
            wait_for(device)
            started = time.perf_counter()
            work[label]()
            wait_for(device)
            taken[label].append(time.perf_counter() - started)
    first = taken[next(iter(work))][1:]
    rows = []
    for label, seconds in taken.items():
        ratio = statistics.median(
            mine / other for mine, other in zip(seconds[1:], first, strict=True)
        )
        rows.append([what, label, statistics.median(seconds[1:]) * 1000, ratio])
    return pd.DataFrame(rows, columns=["what", "workload", "median_ms", "ratio"])


def wait_for(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


# ---- memory


def peaks(lm: hk.LM, device: str) -> pd.DataFrame:
    """The peak of a forward beside the model, and what its captures keep. NaN on a CPU."""
    ids = random_ids(lm, 8, 128)
    kept = lm.n_layers * ids.numel() * (lm.sizes["d_model"] or 0) * 2 / 1e6
    rows = []
    for label, hooks, kept_mb in (
        ("nothing attached", [], 0.0),
        ("capture of all resid_post", [hk.capture("resid_post")], kept),
    ):
        peak = float("nan")
        if device != "cpu":
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            run = hk.forward(lm, ids, *hooks)
            peak = (torch.cuda.max_memory_allocated() - before) / 1e6
            del run
        rows.append([label, peak, kept_mb])
    return pd.DataFrame(rows, columns=["workload", "peak_mb", "kept_mb"])


if __name__ == "__main__":
    main()
