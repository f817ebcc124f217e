"""What do hooks cost where vLLM serves the model?

Next to nothing, if generation with a steering vector at one block and a token forced at one step
takes at most a tenth longer than without hooks.

It is answered by ratios in one run, the workloads in turn and in a new order each round: vLLM
without and with these hooks, hk.generate on transformers without and with them, and plain
transformers. 64 prompts of 8 to 32 tokens continue for 64 tokens each, on the default model in
float32; vLLM and transformers have one thread each. No logits are kept.

make test-vllm, and then: .venv-vllm/bin/python -m experiments.benchmarks.served
    a quarter of an hour on two cores; writes results/benchmarks_served/
"""

import argparse
import os
import random
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import pandas as pd
import torch

import hookkit as hk

PROMPTS, NEW_TOKENS, ROUNDS = 64, 64, 3
LAYER, STEP = 15, 8
LIMIT = 1.10  # times as long as without hooks
QUESTION = "What do hooks cost where vLLM serves the model?"
SERVED, HOOKED = "vLLM", "vLLM, steer and force"
PLAIN, OWN, OWN_HOOKED = "transformers", "hk.generate", "hk.generate, steer and force"
BESIDE = {SERVED: PLAIN, HOOKED: SERVED, PLAIN: PLAIN, OWN: PLAIN, OWN_HOOKED: OWN}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # in vLLM's process


def main() -> None:
    asked = argparse.ArgumentParser()
    asked.add_argument("--prompts", type=int, default=PROMPTS)
    asked.add_argument("--tokens", type=int, default=NEW_TOKENS)
    asked.add_argument("--rounds", type=int, default=ROUNDS)
    asked.add_argument("--out", default="results/benchmarks_served")
    given = asked.parse_args()
    torch.set_num_threads(1)
    os.environ.update(ONE_THREAD)
    served = hk.load(
        engine="vllm",
        max_model_len=256,
        max_num_seqs=given.prompts,
        kv_cache_memory_bytes=2**30,
    )
    lm = hk.load(device="cpu")
    with hk.record(
        given.out, title="What hooks cost in vLLM", question=QUESTION, lm=served, seed=0
    ) as results:
        work = workloads(served, lm, some_prompts(given.prompts), given.tokens)
        seconds = in_turn(work, given.rounds)
        caption = (
            f"{given.prompts} prompts, {given.tokens} new tokens each, {given.rounds} rounds, one "
            "thread. times: as long as the workload in `beside`, in the same round (median, lowest "
            "and highest)."
        )
        table = compared(seconds, given.prompts * given.tokens)
        table = results.table("served", table, caption=caption)
        results.answer(answer({"served": table}))
    print(table.round(3).to_string(index=False))


def some_prompts(count: int) -> list[list[int]]:
    """Prompts of 8 to 32 tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 49000, (count, 32), generator=generator).tolist()
    return [row[: 8 + number % 25] for number, row in enumerate(ids)]


def workloads(
    served: hk.LM, lm: hk.LM, prompts: list[list[int]], tokens: int
) -> dict[str, Callable[[], object]]:
    settings: Any = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None}
    vector = torch.randn(576, generator=torch.Generator().manual_seed(1))
    hooks = [hk.steer(f"resid_post.{LAYER}", vector), hk.force(" coffee", step=STEP)]
    return {
        SERVED: lambda: hk.generate(served, prompts, logits=False, **settings),
        HOOKED: lambda: hk.generate(served, prompts, *hooks, logits=False, **settings),
        PLAIN: plainly(lm, prompts, settings),
        OWN: lambda: hk.generate(lm, prompts, logits=False, **settings),
        OWN_HOOKED: lambda: hk.generate(lm, prompts, *hooks, logits=False, **settings),
    }


def plainly(lm: hk.LM, prompts: list[list[int]], settings: Mapping[str, Any]) -> Any:
    """transformers' generate, on prompts that are padded on the left."""
    padded = lm.tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    model: Any = lm.model
    pad = lm.tokenizer.pad_token_id

    @torch.no_grad()
    def run() -> object:
        return model.generate(**padded, pad_token_id=pad, **settings)

    return run


def in_turn(work: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each workload, in rounds of a new order; the first warms up."""
    seconds: dict[str, list[float]] = {label: [] for label in work}
    for number in range(rounds + 1):
        for label in random.Random(number).sample(list(work), len(work)):
            started = time.perf_counter()
            work[label]()
            if number:
                seconds[label].append(time.perf_counter() - started)
    return seconds


def compared(seconds: Mapping[str, list[float]], tokens: int) -> pd.DataFrame:
    """A row for each workload, with the ratios to the one that it stands beside."""
    rows: list[dict[str, Any]] = []
    for label, times in seconds.items():
        beside = BESIDE[label]
        pairs = zip(times, seconds[beside], strict=True)
        ratios = [own / other for own, other in pairs]
        row: dict[str, Any] = {"workload": label, "median_s": median(times)}
        row["tokens_per_s"] = tokens / median(times)
        row |= {"beside": beside, "times": median(ratios)}
        rows.append(row | {"lowest": min(ratios), "highest": max(ratios)})
    return pd.DataFrame(rows)


def answer(tables: Mapping[str, Any]) -> str:
    """The answer, from the table that was written."""
    table = tables["served"].set_index("workload")
    times, hooked = table["times"], table.loc[HOOKED]
    verdict = "Next to nothing" if hooked["times"] <= LIMIT else "More than was set as the limit"
    return (
        f"{verdict}: generation with a steering vector and a forced token takes "
        f"{hooked['times']:.2f} times as long as without hooks ({hooked['lowest']:.2f} to "
        f"{hooked['highest']:.2f} by round, limit {LIMIT:.2f}). Without hooks vLLM takes "
        f"{times[SERVED]:.2f} times as long as plain transformers, and hk.generate on transformers "
        f"{times[OWN]:.2f} times; the two hooks there cost {times[OWN_HOOKED]:.2f} times."
    )


if __name__ == "__main__":
    main()
