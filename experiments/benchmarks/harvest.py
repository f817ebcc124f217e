"""Does harvesting pay for its writing?

Yes, if it is faster than the plain forwards over the same texts.

Layers 5, 15 and 25 of 30 are kept, for every token, in float32: the model runs no further than
block 25, and what that saves has to pay for copies, shards, checksums and fsync. A plain forward
computes all logits, as calling the model does; beside it stands the one that computes those of the
last position only. The limit is the same forward with a hook by hand that stops behind block 25, of
which nothing is kept.

Rounds in turn, each in a new order, of some of the texts; and all 512 texts of 128 tokens once. One
thread computes, and speeds are compared in seconds of the processor, all threads together: on a
machine that others use too, those of the clock say more about the others.

python -m experiments.benchmarks.harvest
    half an hour on two cores; writes results/benchmarks_harvest/
"""

import random
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
import torch

import hookkit as hk
from hookkit.files.atomic import write_tensors
from hookkit.models.provenance import weights_hash

from .overhead import Work

TEXTS, WIDTH = 512, 128
SOME, ROUNDS = 24, 5  # texts of a round
BATCH = 16  # texts that run together
SITES = ["resid_post.5", "resid_post.15", "resid_post.25"]
THREADS = 1
QUESTION = "Does harvesting pay for its writing?"


def main() -> None:
    torch.set_num_threads(THREADS)
    lm = hk.load(device="cpu")
    ids = torch.randint(0, 49000, (TEXTS, WIDTH), generator=torch.Generator().manual_seed(0))
    with (
        tempfile.TemporaryDirectory() as folder,
        hk.record(
            "results/benchmarks_harvest",
            title="What harvesting costs",
            question=QUESTION,
            lm=lm,
            seed=0,
        ) as results,
    ):
        work = workloads(lm, Path(folder))
        rounds = compared(work, ids[:SOME], ROUNDS)
        chosen = ("plain forward, all logits", "harvest")
        once = compared({label: work[label] for label in chosen}, ids, 1, warm=False)
        caption = (
            f"Medians of rounds, {THREADS} thread, batches of {BATCH}. speed: tokens a second of "
            "the processor, beside the plain forward with all logits in the same round; by_clock: "
            "the same by the clock."
        )
        table = results.table(
            "harvest", pd.concat([rounds, once], ignore_index=True), caption=caption
        )
        parts = results.table(
            "parts", costs(lm, Path(folder)), caption="What of it is not the model, alone."
        )
        results.answer(answer({"harvest": table}))
    print(table.round(3).to_string(index=False), parts.round(3).to_string(index=False), sep="\n\n")


def answer(tables: Mapping[str, Any]) -> str:
    """The answer, from the tables that were written."""
    speeds = tables["harvest"].set_index(["texts", "workload"])["speed"]
    some = speeds[SOME]
    verdict = "Yes" if some["harvest"] > 1 else "No"
    return (
        f"{verdict}: a harvest of layers up to 25 is {some['harvest']:.2f} times as fast as plain "
        f"forwards with all logits over {SOME} texts, and {speeds[TEXTS, 'harvest']:.2f} times "
        f"over {TEXTS} texts. The plain forward with the last logits only is "
        f"{some['plain forward, last logits']:.2f} times as fast, and a forward by hand up to "
        f"block 25 that keeps nothing {some['by hand up to block 25, nothing kept']:.2f} times: "
        "that is the limit."
    )


def workloads(lm: hk.LM, folder: Path) -> dict[str, Callable[[torch.Tensor], object]]:
    model: Any = lm.model

    @torch.no_grad()
    def plain(ids: torch.Tensor, keep: int) -> None:
        for rows in ids.split(BATCH):
            _ = model(rows, use_cache=False, logits_to_keep=keep).logits

    def harvest(ids: torch.Tensor) -> None:
        shutil.rmtree(folder / "harvest", ignore_errors=True)
        hk.harvest(lm, ids, SITES, folder / "harvest", batch_tokens=BATCH * WIDTH, progress=False)

    return {
        "plain forward, all logits": lambda ids: plain(ids, 0),
        "plain forward, last logits": lambda ids: plain(ids, 1),
        "by hand up to block 25, nothing kept": lambda ids: by_hand(model, ids),
        "harvest": harvest,
    }


@torch.no_grad()
def by_hand(model: Any, ids: torch.Tensor) -> None:
    def stop(*_: object) -> None:
        raise StopIteration

    handle = model.model.layers[25].register_forward_hook(stop)
    for rows in ids.split(BATCH):
        with suppress(StopIteration):
            model(rows, use_cache=False)
    handle.remove()


def compared(
    work: dict[str, Callable[[torch.Tensor], object]],
    ids: torch.Tensor,
    rounds: int,
    warm: bool = True,
) -> pd.DataFrame:
    """Returns how long each workload takes, and its speed relative to the first one's, by round."""
    taken: dict[str, list[tuple[float, float]]] = {label: [] for label in work}
    for number in range(rounds + warm):
        for label in random.Random(number).sample(list(work), len(work)):
            started, used = time.perf_counter(), time.process_time()
            work[label](ids)
            taken[label].append((time.process_time() - used, time.perf_counter() - started))
    plain = taken[next(iter(work))][warm:]
    found = []
    for label, both in taken.items():
        pairs = list(zip(both[warm:], plain, strict=True))
        speed, by_clock = (median(other[n] / mine[n] for mine, other in pairs) for n in (0, 1))
        used, seconds = (median(each[n] for each in both[warm:]) for n in (0, 1))
        found.append((len(ids), rounds, label, used, seconds, ids.numel() / used, speed, by_clock))
    names = [
        "texts",
        "rounds",
        "workload",
        "processor_s",
        "clock_s",
        "tokens_per_s",
        "speed",
        "by_clock",
    ]
    return pd.DataFrame(found, columns=names)


def costs(lm: hk.LM, folder: Path) -> pd.DataFrame:
    """The work beside the forwards: once, and for each shard of 128 MiB in a thread of its own."""
    values = {site: torch.randn(2**25 // 3 // 576, 576) for site in SITES}
    parts: Work = {
        "sha256 of the weights, once": lambda: weights_hash(lm),
        "a shard of 128 MiB: written, sha256, fsync": lambda: write_tensors(
            folder / "shard.safetensors", values
        ),
    }
    found = []
    for label, run in parts.items():
        started, used = time.perf_counter(), time.process_time()
        run()
        found.append((label, time.process_time() - used, time.perf_counter() - started))
    return pd.DataFrame(found, columns=["part", "processor_s", "clock_s"])


if __name__ == "__main__":
    main()
