"""Writers that are killed, interrupted, or find the disk full, at random moments. Run by test_killing_writers.

python killing_writers.py FOLDER SEED ROUNDS [WRITER ...]: each round runs a writer in a child, which is sent a signal, or
may write no more than some bytes; then the writer runs undisturbed in the same folder. What is printed is, as JSON, what
was counted for each writer.
"""

import json
import os
import random
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

import hookkit as hk
from hookkit.errors import HookkitError
from hookkit.reports.parts import Part

# tqdm's own lock is shared with children: one killed while it holds the lock would stop this process
tqdm.set_lock(threading.RLock())

TABLE = pd.DataFrame({"x": range(2000), "token": [" tea"] * 2000})
TENSORS = {"x": torch.arange(200_000, dtype=torch.float32)}
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "interrupt": signal.SIGINT}
PRECIOUS = "mine.txt"


def recorded(folder: Path) -> None:
    with hk.record(folder, seed=0) as results:
        for number in range(4):
            results.table(f"t{number}", TABLE)
        results.tensors("k", TENSORS)


def reported(folder: Path) -> None:
    hk.report("R", *(Part(TABLE, f"t{number}") for number in range(4))).write(folder)


def indexed(folder: Path) -> None:
    for number in range(30):
        one = folder / f"r{number}"
        one.mkdir(parents=True, exist_ok=True)
        (one / "report.html").write_text("x")
    for _ in range(5):
        hk.results.write_index(folder)


def vector_kept(folder: Path) -> None:
    for _ in range(10):
        hk.Vector("resid_post.1", TENSORS["x"], norm=1.0).save(folder / "v.safetensors")


def statistics_kept(folder: Path) -> None:
    for _ in range(10):
        STATISTICS.save(folder / "s.safetensors")


def lens_kept(folder: Path) -> None:
    for _ in range(10):
        LENS.save(folder / "l.safetensors")


def harvested(folder: Path) -> None:
    texts = [[5, 6, 7 + number] for number in range(40)]
    hk.harvest(LM, texts, "resid_post.1", folder, shard_size=12, batch_tokens=12, progress=False)


def swept(folder: Path) -> None:
    grid = {"layer": range(3), "head": range(4)}
    settings = {"save": folder, "progress": False, "memory": 20_000}
    hk.sweep(
        LM,
        [[5, 6, 7]],
        grid,
        lambda layer, head: hk.ablate(hk.Site("z", layer, head)),
        hk.metrics.prob(3),
        **settings,
    )


WRITERS: dict[str, Callable[[Path], None]] = {
    each.__name__: each
    for each in (
        recorded,
        reported,
        indexed,
        vector_kept,
        statistics_kept,
        lens_kept,
        harvested,
        swept,
    )
}
LM = hk.tiny("llama")
STATISTICS = hk.stats.activation_statistics(LM, [[5, 6, 7]], "resid_post.1", progress=False)
LENS = hk.train_lens(LM, [list(range(2, 90))], window=16, steps=1, progress=False)


def contents(folder: Path) -> dict[str, bytes]:
    """What is in a folder. A record's about.json has its time, and the run before is beside it."""
    return {
        str(path.relative_to(folder)): b"" if path.name == "about.json" else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and ".last" not in path.parts
        and path.name not in ("report.html", "README.md", "cells.jsonl")
    }


def in_a_child(
    write: Callable[[Path], None], folder: Path, how: str, after: float, most: int
) -> str:
    """How a writer ended that was disturbed: done, refused, or by a signal."""
    child = os.fork()
    if child == 0:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        status = 0
        try:
            if how == "full":
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
            write(folder)
        except HookkitError:
            status = 3
        except KeyboardInterrupt:
            status = 4
        except BaseException:  # noqa: BLE001
            status = 5
        os._exit(status)
    end = time.monotonic() + after
    while how in SIGNALS and time.monotonic() < end:
        if os.waitpid(child, os.WNOHANG)[0]:
            return "done"
        time.sleep(0.0005)
    if how in SIGNALS:
        os.kill(child, SIGNALS[how])
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return "by a signal"
    return {0: "done", 3: "refused", 4: "by a signal", 5: "raw"}[os.WEXITSTATUS(status)]


def rounds(name: str, top: Path, drawn: random.Random, count: int) -> dict:
    write, seen = (
        WRITERS[name],
        {"done": 0, "refused": 0, "by a signal": 0, "raw": 0, "lost": 0, "left": 0},
    )
    write(top / "undisturbed")
    started = time.monotonic()
    write(top / "again")
    whole, wanted = time.monotonic() - started, contents(top / "undisturbed")
    for number in range(count):
        for how in (*SIGNALS, "full"):
            folder = top / f"{how}{number}"
            folder.mkdir(parents=True)
            (folder / PRECIOUS).write_text("precious")
            if drawn.random() < 0.5:
                write(folder)  # there is something already that must not be lost
            seen[
                in_a_child(
                    write, folder, how, drawn.uniform(0.05, 1.0) * whole, drawn.randrange(1, 60_000)
                )
            ] += 1
            write(folder)
            found = contents(folder)
            seen["lost"] += found.pop(PRECIOUS, b"") != b"precious" or found != wanted
            seen["left"] += any(
                path.name.endswith((".making", ".lock")) for path in folder.rglob("*")
            )
    return seen


def main(folder: str, seed: str, count: str, *names: str) -> None:
    torch.set_num_threads(1)  # no threads, so that a fork is whole
    signal.signal(signal.SIGINT, signal.default_int_handler)
    drawn = random.Random(int(seed))
    print(
        json.dumps(
            {
                name: rounds(name, Path(folder) / name, drawn, int(count))
                for name in names or WRITERS
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
