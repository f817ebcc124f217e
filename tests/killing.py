"""A process that is killed while it harvests, at random moments, until it comes to the end. Run by test_harvest.

python killing.py FOLDER SEED KILLS [DICTIONARY]: the harvest runs in a child of this process, which imports everything once.
What is printed is how often the child was killed before it ended by itself. Of a dictionary the features are harvested too.
"""

import os
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from tqdm import tqdm

import hookkit as hk

# tqdm's own lock is shared with children: one killed while it holds the lock would stop this process
tqdm.set_lock(threading.RLock())

SITES = ["resid_post.1", "z.2"]
DICTIONARY = sys.argv[4] if len(sys.argv) == 5 and __name__ == "__main__" else None
SETTINGS = {"batch_tokens": 64, "shard_size": 60, "progress": False}


def texts(seed: int = 0, count: int = 150) -> list[list[int]]:
    """Rows of token ids, 1 to 24 of them."""
    drawn = random.Random(seed)
    return [[drawn.randrange(320) for _ in range(drawn.randrange(1, 25))] for _ in range(count)]


def harvest(folder: Path) -> hk.types.Harvest:
    if DICTIONARY is None:
        return hk.harvest(hk.tiny("llama"), iter(texts()), SITES, folder, **SETTINGS)
    lm = hk.tiny("llama").with_dictionaries(hk.load_dictionary(DICTIONARY), check=False)
    return hk.harvest(lm, iter(texts()), [*SITES, "feat.resid_post.1"], folder, **SETTINGS)


def killed(folder: Path, after: float) -> bool:
    """Harvest in a child that is killed after some seconds; False if it ended before."""
    child = os.fork()
    if child == 0:
        try:
            harvest(folder)
        finally:
            os._exit(0 if sys.exc_info()[0] is None else 1)
    end = time.monotonic() + after
    while time.monotonic() < end:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def main(folder: str, seed: str, kills: str) -> None:
    torch.set_num_threads(1)  # no threads, so that a fork is whole
    harvest(Path(folder) / "undisturbed")
    started = time.monotonic()
    harvest(Path(folder) / "again")  # without the imports
    whole = time.monotonic() - started
    drawn, count = random.Random(int(seed)), 0
    while count < int(kills):
        if killed(Path(folder) / "killed", drawn.uniform(0.02, 0.3) * whole):
            count += 1
            continue
        shutil.rmtree(Path(folder) / "killed")  # it ended between the kills: begin again, faster
        whole *= 0.7
    if count == int(kills):
        harvest(Path(folder) / "killed")
    print(count)


if __name__ == "__main__":
    main(*sys.argv[1:4])
