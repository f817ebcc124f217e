"""What do token shifts cost beside the forwards that they need?

The goals: at most 1.1 of the forwards, and memory that does not grow with the corpus.

    cost    hk.token_shifts over some texts, with a steering vector and its control, beside the
            three forwards of the same batches (before, after, the control) with hk.forward, which
            keep all logits and look at none. In turn, and in a new order each round.
    memory  100,000 tokens from a generator, with a random model of three blocks that has the
            default model's vocabulary: what the process holds at a hundred places on the way, with
            and without what was freed and not yet returned by the allocator.

One thread computes, and the cost is compared in seconds of the processor, all threads together: on
a machine that others use too, those of the clock say more about the others.

python -m experiments.benchmarks.token_shifts
    ten minutes; writes results/benchmarks_token_shifts/
"""

import ctypes
import random
import time
from collections.abc import Callable, Iterator, Mapping
from statistics import median
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure

import hookkit as hk
from hookkit.figures.style import INK, apply_style

from .long_harvest import resident

TEXTS, WIDTH, BATCH = 64, 64, 8  # of the cost; texts that run together
ROUNDS = 3
LONG_TEXTS = 1000  # of 100 tokens on average
GOAL = 1.1
THREADS = 1
SAMPLES = 100  # of the memory
QUESTION = "Do token shifts cost more than the forwards that they need?"


def main() -> None:
    torch.set_num_threads(THREADS)
    lm = hk.load(device="cpu")
    about: Any = {"title": "What token shifts cost", "question": QUESTION, "lm": lm, "seed": 0}
    with hk.record("results/benchmarks_token_shifts", **about) as results:
        table = results.table(
            "cost",
            compare_cost(lm),
            caption=f"Medians of {ROUNDS} rounds, {THREADS} thread. ratio: seconds of the "
            f"processor by those of the forwards in the same round; the goal is {GOAL}.",
        )
        samples = measure_memory(lm)
        late: Any = samples[samples["tokens"] >= samples["tokens"].max() / 10]
        summary = pd.DataFrame(
            {
                "tokens": [samples["tokens"].max()],
                "median_mb": late["own_mb"].median(),
                "growth_mb": late["own_mb"].iloc[-10:].median() - late["own_mb"].iloc[:10].median(),
                "most_with_freed_mb": samples["with_freed_mb"].max(),
            }
        )
        caption = (
            "The memory of the process without mapped files, once the allocator has returned what "
            "was freed. growth_mb: the median of the last ten samples minus that of the first ten "
            "after a tenth of the way. most_with_freed_mb: the most with what was freed since the "
            "sample before."
        )
        memory = results.table("memory", summary, caption=caption)
        results.table("samples", samples, caption="Every sample.")
        results.figure("memory_figure", draw_memory(samples), caption="Own memory on the way.")
        results.answer(answer({"cost": table, "memory": memory}))
    print(table.round(3).to_string(index=False), summary.to_string(index=False), sep="\n\n")


def answer(tables: Mapping[str, Any]) -> str:
    """The answer, from the tables that were written."""
    cost = tables["cost"].set_index("way").loc["hk.token_shifts"]
    memory = tables["memory"].iloc[0]
    verdict = f"No, not more than {GOAL} times" if cost["ratio"] <= GOAL else "Yes"
    return (
        f"{verdict}: token shifts over {cost['positions']:,.0f} positions take {cost['ratio']:.2f} "
        f"times as long as the three forwards (rounds from {cost['ratio_min']:.2f} to "
        f"{cost['ratio_max']:.2f}). Over {memory['tokens']:,.0f} tokens the memory of "
        f"{memory['median_mb']:.0f} MB grows by {memory['growth_mb']:.1f} MB after the first "
        "tenth: examples of tokens that had not moved before, at most three in each direction. "
        f"With what was freed and not yet returned it is {memory['most_with_freed_mb']:.0f} MB at "
        "most."
    )


def compare_cost(lm: hk.LM) -> pd.DataFrame:
    """Returns the seconds of each way, and their ratio to the forwards', round by round."""
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(0, 49000, (TEXTS, WIDTH), generator=generator).tolist()
    vector, other = torch.randn(2, 576, generator=generator)
    hook, control = (hk.steer("resid_post.12", each, scale=0.5) for each in (vector, other))

    def forwards() -> None:
        for start in range(0, TEXTS, BATCH):
            rows = texts[start : start + BATCH]
            kept = [hk.forward(lm, rows), hk.forward(lm, rows, hook), hk.forward(lm, rows, control)]
            assert len(kept) == 3

    def shifts() -> None:
        hk.token_shifts(lm, texts, hook, batch_tokens=BATCH * WIDTH, progress=False)

    ways: dict[str, Callable[[], None]] = {"three forwards": forwards, "hk.token_shifts": shifts}
    taken: dict[str, list[tuple[float, float]]] = {label: [] for label in ways}
    for number in range(ROUNDS + 1):  # the first is not counted
        for label in random.Random(number).sample(list(ways), len(ways)):
            started, used = time.perf_counter(), time.process_time()
            ways[label]()
            taken[label].append((time.process_time() - used, time.perf_counter() - started))
    records = []
    for label, rounds in taken.items():
        pairs = list(zip(rounds[1:], taken["three forwards"][1:], strict=True))
        ratios = [mine[0] / forward[0] for mine, forward in pairs]
        records.append(
            {
                "way": label,
                "positions": TEXTS * WIDTH,
                "processor_s": median(each[0] for each in rounds[1:]),
                "clock_s": median(each[1] for each in rounds[1:]),
                "ratio": median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
            }
        )
    return pd.DataFrame(records)


def measure_memory(lm: hk.LM) -> pd.DataFrame:
    """Returns the memory of the process whenever some texts of a long corpus were taken."""
    settings = {"vocab_size": 49152, "max_position_embeddings": 512}
    small = hk.tiny("llama", tokenizer=lm.tokenizer, config=settings)
    drawn, samples = random.Random(0), []
    libc = ctypes.CDLL("libc.so.6")

    def add_sample(tokens: int) -> None:
        with_freed = resident("RssAnon")
        libc.malloc_trim(0)
        own = resident("RssAnon")
        samples.append({"tokens": tokens, "own_mb": own, "with_freed_mb": with_freed})

    def texts() -> Iterator[list[int]]:
        tokens = 0
        for number in range(LONG_TEXTS):
            if number % (LONG_TEXTS // SAMPLES) == 0:
                add_sample(tokens)
            row = [drawn.randrange(49000) for _ in range(drawn.randrange(50, 152))]
            tokens += len(row)
            yield row
        add_sample(tokens)

    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    hk.token_shifts(small, texts(), hk.steer("resid_post.1", vector), progress=False)
    return pd.DataFrame(samples)


def draw_memory(samples: pd.DataFrame) -> Figure:
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    label = "with what was freed since the sample before"
    axes.plot(samples["tokens"], samples["with_freed_mb"], color=INK, alpha=0.3, label=label)
    axes.plot(samples["tokens"], samples["own_mb"], color=INK, label="held")
    axes.legend(loc="lower right")
    axes.set(xlabel="tokens read", ylabel="own memory (MB)")
    axes.set_ylim(bottom=0)
    return apply_style(figure, "Memory over a long corpus")


if __name__ == "__main__":
    main()
