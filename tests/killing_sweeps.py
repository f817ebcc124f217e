"""A process that is killed while it sweeps, at random moments, until it comes to the end. Run by test_sweep_files.

python -c "import killing_sweeps; killing_sweeps.main(FOLDER, SEED, KILLS)": each sweep runs in a child of this process,
which imports everything once. What is printed is, as JSON, how often a child was killed, and how the interrupted one
ended.
"""

import json
import os
import random
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

import hookkit as hk

# tqdm's own lock is shared with children: one killed while it holds the lock would stop this process
tqdm.set_lock(threading.RLock())

PROMPTS = [[17, 250, 3, 88, 41], [5, 9, 11], [200, 14, 77, 120, 31, 8, 300, 66]]
REST = 0.02  # seconds that each edit takes


def gap(logits: torch.Tensor) -> torch.Tensor:
    """Between the two largest logits."""
    first, second = logits.topk(2, dim=-1).values.unbind(-1)
    return first - second


def slowed(values: torch.Tensor) -> torch.Tensor:
    time.sleep(REST)
    return values * 0.5


def swept(lm: hk.LM, folder: Path | None = None, **settings) -> pd.DataFrame:
    """The sweep: 24 cells of three prompts, in several forwards."""
    return hk.sweep(
        lm,
        PROMPTS,
        {"site": ["z", "mlp_out"], "layer": range(3), "pos": [-3, -1], "by": [1, 2]},
        lambda site, layer, pos, by: [
            hk.edit(hk.Site(site, layer), slowed, pos=pos),
            hk.scale(hk.Site("resid_pre", layer), by, pos=pos),
        ],
        [hk.metrics.logit_diff(5, 7), gap, hk.metrics.kl()],
        **{
            "save": folder,
            "progress": False,
            "target": [row[::-1] for row in PROMPTS],
            "memory": 60_000,
            **settings,
        },
    )


def in_a_child(work: Callable[[], object], until: Callable[[float], bool], sign: int) -> bool:
    """Run something in a child that is sent a signal when it is time; False if it ended before."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0 if sys.exc_info()[0] is None else 1)
    started = time.monotonic()
    while not until(time.monotonic() - started):
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.001)
    os.kill(child, sign)
    os.waitpid(child, 0)
    return True


def lines(folder: Path) -> int:
    path = folder / "cells.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def interrupted(lm: hk.LM, folder: Path) -> dict:
    """How a sweep ends that is sent a Ctrl-C in the middle."""
    report = folder.with_suffix(".json")

    def work() -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            table = swept(lm, folder)
        hooks = sum(
            len(module._forward_hooks) + len(module._forward_pre_hooks)
            for module in lm.model.modules()
        )
        said = [
            str(each.message) for each in caught if issubclass(each.category, hk.errors.Interrupted)
        ]
        found = {
            "complete": table.attrs["complete"],
            "rows": len(table),
            "hooks": hooks,
            "said": said,
        }
        report.write_text(
            json.dumps(found | {"files": sorted(path.name for path in folder.iterdir())})
        )

    in_a_child(work, lambda seconds: lines(folder) >= 4, signal.SIGINT)
    return json.loads(report.read_text())


def main(folder: str, seed: str, kills: str) -> None:
    torch.set_num_threads(1)  # no threads, so that a fork is whole
    lm, where = hk.tiny("llama"), Path(folder)
    swept(lm)  # what is found out about the model once
    started = time.monotonic()
    swept(lm, where / "undisturbed")
    whole = time.monotonic() - started
    drawn, count, seen = random.Random(int(seed)), 0, []
    while count < int(kills):
        after = drawn.uniform(0.2, 0.5) * whole
        if not in_a_child(
            lambda: swept(lm, where / "killed"), lambda s, end=after: s > end, signal.SIGKILL
        ):
            break
        count += 1
        seen.append(lines(where / "killed"))
    swept(lm, where / "killed")
    print(
        json.dumps(
            {"killed": count, "seen": seen, "interrupted": interrupted(lm, where / "stopped")}
        )
    )
