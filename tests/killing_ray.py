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


def harvest(folder: Path, given, **settings) -> hk.types.Harvest:
    return hk.harvest(
        hk.tiny("llama"), given, killing.SITES, folder, **killing.SETTINGS, **settings
    )


class Interrupt:
    """A Ctrl-C, and which processes of Ray there were then."""

    def __init__(self) -> None:
        self.started: list[psutil.Process] = []
        self.listens: set[str] = set()

    def __call__(self) -> None:
        self.started = psutil.Process().children(recursive=True)
        for process in [psutil.Process(), *self.started]:
            places = process.net_connections(kind="inet")
            self.listens |= {
                place.laddr.ip for place in places if place.status == psutil.CONN_LISTEN
            }
        os.kill(os.getpid(), signal.SIGINT)

    def ended(self) -> dict:
        """Whether Ray is still there, and which of its processes."""
        _, left = psutil.wait_procs(self.started, timeout=30)
        names = {
            each.name()
            for each in self.started
            if each in left and each.status() != psutil.STATUS_ZOMBIE
        }
        return {
            "started": len(self.started) > 3,
            "initialised": ray.is_initialized(),
            "left": sorted(names),
        }


def interrupted_harvest(folder: Path) -> dict:
    interrupt = Interrupt()
    try:
        harvest(folder, texts(interrupt), engine=hk.Ray(actors=1))
    except KeyboardInterrupt:
        open_to = sorted(place.removeprefix("::ffff:") for place in interrupt.listens)
        token = os.environ.get("RAY_AUTH_MODE")
        return {
            "interrupted": True,
            **interrupt.ended(),
            "listens": sorted({*open_to}),
            "token": token,
        }
    return {"interrupted": False}


def interrupted_sweep(folder: Path) -> dict:
    interrupt = Interrupt()

    def watch() -> None:
        while killing_sweeps.lines(folder) < 4:
            time.sleep(0.001)
        interrupt()

    threading.Thread(target=watch, daemon=True).start()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        table = killing_sweeps.swept(hk.tiny("llama"), folder, engine=hk.Ray(actors=1))
    said = [each for each in caught if issubclass(each.category, hk.errors.Interrupted)]
    interrupted = not table.attrs["complete"] and len(said) == 1
    return {"interrupted": interrupted, "rows": len(table), **interrupt.ended()}


def cluster(folder: Path) -> dict:
    from ray.cluster_utils import Cluster

    soon = {
        "health_check_period_ms": 500,
        "health_check_failure_threshold": 2,
        "health_check_initial_delay_ms": 0,
    }
    head = {"num_cpus": 1, "include_dashboard": False, "_system_config": soon}
    nodes = Cluster(initialize_head=True, head_node_args=head)
    other = nodes.add_node(num_cpus=1)
    nodes.wait_for_nodes()

    def lose() -> None:
        nodes.remove_node(other, allow_graceful=False)

    before = []
    try:  # two actors need both nodes
        engine = hk.Ray(actors=2, address=nodes.address)
        harvest(
            folder,
            texts(lambda: (before.append(len(nodes.list_all_nodes())), lose())),
            engine=engine,
        )
        return {
            "before": before,
            "after": len(nodes.list_all_nodes()),
            "initialised": ray.is_initialized(),
        }
    finally:
        nodes.shutdown()


def main(what: str, folder: str) -> None:
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # which a shell may have taken away in the background
    torch.set_num_threads(1)
    where = Path(folder)
    if what == "cluster":
        found = cluster(where / "cluster")
    else:
        found = {
            "harvest": interrupted_harvest(where / "harvest"),
            "sweep": interrupted_sweep(where / "sweep"),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
