"""Does a harvest on Ray cost more than one in this process?

No, if one actor is at most a tenth slower.

The texts and layers are those of the benchmark of harvesting: 512 texts of 128 tokens, layers 5, 15
and 25 of 30, in float32. One actor of one CPU stands beside one thread here; both are measured by
the clock, since most of what Ray does is done by processes of its own. Ray runs before the first
round, as it does on a cluster; an actor's start, with its imports and the model, is counted. Rounds
in turn, each in a new order.

More actors are set beside one actor: on as many cores as there are actors, twice as many should be
near twice as fast.

python -m experiments.benchmarks.ray_engine    an hour on two cores; writes results/benchmarks_ray/
"""

import argparse
import logging
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
import ray
import torch

import hookkit as hk

TEXTS, WIDTH = 512, 128
ROUNDS = 3
BATCH = 16  # texts that run together
SITES = ["resid_post.5", "resid_post.15", "resid_post.25"]
LIMIT = 1.1  # times as long as in this process
QUESTION = "Does a harvest on Ray cost more than one in this process?"


def main() -> None:
    asked = argparse.ArgumentParser()
    asked.add_argument("--texts", type=int, default=TEXTS)
    asked.add_argument("--rounds", type=int, default=ROUNDS)
    given = asked.parse_args()
    torch.set_num_threads(1)
    lm = hk.load(device="cpu")
    ids = torch.randint(
        0, 49000, (given.texts, WIDTH), generator=torch.Generator().manual_seed(0)
    ).tolist()
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    actors = [count for count in (1, 2, 4) if count <= cores]
    ray.init(
        address="local", num_cpus=max(actors), include_dashboard=False, logging_level=logging.ERROR
    )
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            hk.record(
                "results/benchmarks_ray",
                title="What Ray costs, and what it brings",
                question=QUESTION,
                lm=lm,
                seed=0,
            ) as results,
        ):
            seconds = in_turn(workloads(lm, ids, Path(folder), actors), given.rounds)
            same = all(equal(Path(folder) / "here", Path(folder) / f"{count}") for count in actors)
            caption = (
                f"{given.texts} texts of {WIDTH} tokens, medians of {given.rounds} rounds, {cores} "
                f"cores. times: as long as in this process, in the same round; at most {LIMIT} is "
                f"wanted of one actor. Files the same, byte for byte? {same}."
            )
            table = results.table("ray", compared(seconds, given.texts * WIDTH), caption=caption)
            results.answer(answer({"ray": table}))
    finally:
        ray.shutdown()
    print(table.round(3).to_string(index=False), caption, sep="\n\n")


def answer(tables: Mapping[str, Any]) -> str:
    """The answer, from the tables that were written."""
    table = tables["ray"].set_index("workload")
    one = table.loc["1 actor of one CPU"]
    verdict = "No" if one["times"] <= LIMIT else "Yes"
    sentences = [f"{verdict}: one actor takes {one['times']:.2f} times as long as this process."]
    for count in (2, 4):
        name = f"{count} actors of one CPU"
        if name in table.index:
            speed = table["speed_of_one_actor"][name]
            sentences.append(f"{count} actors are {speed:.2f} times as fast as one.")
    return " ".join(sentences)


def workloads(
    lm: hk.LM, ids: list[list[int]], folder: Path, actors: list[int]
) -> dict[str, Callable[[], object]]:
    def harvest(name: str, engine: hk.Ray | None) -> None:
        shutil.rmtree(folder / name, ignore_errors=True)
        hk.harvest(
            lm, ids, SITES, folder / name, batch_tokens=BATCH * WIDTH, progress=False, engine=engine
        )

    found: dict[str, Callable[[], object]] = {
        "this process, one thread": lambda: harvest("here", None)
    }
    for count in actors:
        label = f"{count} actor{'' if count == 1 else 's'} of one CPU"
        found[label] = partial(harvest, f"{count}", hk.Ray(actors=count))
    return found


def in_turn(work: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """The seconds of each workload in each round."""
    taken: dict[str, list[float]] = {label: [] for label in work}
    for number in range(rounds):
        for label in random.Random(number).sample(list(work), len(work)):
            started = time.perf_counter()
            work[label]()
            taken[label].append(time.perf_counter() - started)
    return taken


def compared(seconds: dict[str, list[float]], tokens: int) -> pd.DataFrame:
    """How long each workload takes, beside the first one and beside one actor."""
    here, one = (seconds[label] for label in list(seconds)[:2])
    found = []
    for label, mine in seconds.items():
        times, speed = (
            median(a / b for a, b in zip(*pair, strict=True))
            for pair in ((mine, here), (one, mine))
        )
        found.append((label, len(mine), median(mine), tokens / median(mine), times, speed))
    return pd.DataFrame(
        found,
        columns=["workload", "rounds", "seconds", "tokens_per_s", "times", "speed_of_one_actor"],
    )


def equal(one: Path, other: Path) -> bool:
    """True where two folders have the same files."""
    both = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in (one, other)]
    return both[0] == both[1]


if __name__ == "__main__":
    main()
