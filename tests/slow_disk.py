"""A slow disk for the processes of Ray's actors, and for this one where `install` is called.

A file takes SLOW_DISK seconds a megabyte to reach the disk, and a process writes one at a time. SLOW_DISK_LOG is a file
to which each process adds a line for a file: its process, when it began and ended, and its size.
"""

import json
import os
import threading
import time
from pathlib import Path

from hookkit.files import atomic

sync, writing = atomic._sync, threading.Lock()
SECONDS, LOG = "SLOW_DISK", "SLOW_DISK_LOG"


def slowly(path: Path) -> None:
    size = path.stat().st_size
    with writing:
        began = time.time()
        time.sleep(float(os.environ[SECONDS]) * size / 1e6)
        sync(path)
    if LOG in os.environ:
        with open(os.environ[LOG], "a") as log:
            log.write(json.dumps([os.getpid(), began, time.time(), size]) + "\n")


def install() -> None:
    atomic._sync = slowly
