"""A program that harvests and sweeps on Ray, and loses a node or is interrupted. Run by test_ray.

python killing_ray.py interrupted FOLDER: Ctrl-C in the middle of a harvest and of a sweep, on a Ray that hookkit starts.
python killing_ray.py cluster FOLDER: a cluster of two nodes, of which one is taken away in the middle of a harvest.
What is printed last is JSON: how it ended, and which of Ray's processes are left.
"""

import json
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import killing
import killing_sweeps
import psutil
import ray
import torch

import hookkit as hk

AT = 70  # the text at which it happens


def texts(act: Callable[[], object], at: int = AT) -> Iterator[list[int]]:
    """The texts of a harvest, and something that happens before one of them."""
    for number, ids in enumerate(killing.texts()):
        if number == at:
            act()
        yield ids


def harvest(folder: Path, given, **settings) -> hk.Harvest:
    return hk.harvest(hk.tiny("llama"), given, killing.SITES, folder, **killing.SETTINGS, **settings)


def rays_own() -> list[str]:
    """The processes of Ray that this one started."""
    return [each.name() for each in psutil.Process().children(recursive=True) if each.status() != psutil.STATUS_ZOMBIE]


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def interrupted_harvest(folder: Path) -> dict:
    try:
        harvest(folder, texts(interrupt), engine=hk.Ray(actors=2, cpus=0.5))
    except KeyboardInterrupt:
        return {"ended": "interrupted", "initialised": ray.is_initialized(), "left": rays_own()}
    return {"ended": "finished"}


def interrupted_sweep(folder: Path) -> dict:
    def watch() -> None:
        while killing_sweeps.lines(folder) < 5:
            time.sleep(0.001)
        interrupt()

    threading.Thread(target=watch, daemon=True).start()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        table = killing_sweeps.swept(hk.tiny("llama"), folder, engine=hk.Ray(actors=2, cpus=0.5))
    said = [each for each in caught if issubclass(each.category, hk.errors.Interrupted)]
    found = {"complete": table.attrs["complete"], "said": len(said), "rows": len(table)}
    return found | {"initialised": ray.is_initialized(), "left": rays_own()}


def cluster(folder: Path) -> dict:
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    other = nodes.add_node(num_cpus=2)
    nodes.wait_for_nodes()

    def lose() -> None:
        nodes.remove_node(other, allow_graceful=False)

    before = []
    try:  # four actors need both nodes
        engine = hk.Ray(actors=4, address=nodes.address)
        harvest(folder, texts(lambda: (before.append(len(nodes.list_all_nodes())), lose())), engine=engine)
        return {"before": before, "after": len(nodes.list_all_nodes()), "initialised": ray.is_initialized()}
    finally:
        nodes.shutdown()


def main(what: str, folder: str) -> None:
    torch.set_num_threads(1)
    where = Path(folder)
    if what == "cluster":
        found = cluster(where / "cluster")
    else:
        found = {"harvest": interrupted_harvest(where / "harvest"), "sweep": interrupted_sweep(where / "sweep")}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
