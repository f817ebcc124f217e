"""Other libraries, each in a virtual environment and a process of its own, asked a line at a time.

The environments are made once, with pip, in the folder that HOOKKIT_PEERS names, or in the cache of
hookkit. Where pip takes a build of torch for other machines, install torch there first.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hookkit.models.cache import cache_folder, default_folder

from .serving import Answer, Cells, Task

PEERS = {"nnsight": "nnsight==0.8.1", "transformer_lens": "transformer-lens==4.3.0"}
FIRST = "torch==2.13.0"  # the same as hookkit's


class Peer:
    """A library that sweeps the default model when it is asked to. `why_not` says why it cannot."""

    def __init__(self, name: str, threads: int) -> None:
        self.why_not, self.ways = "", []
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  as long as the process
        try:
            words = [
                _environment(name),
                "-m",
                f"{__package__}.{name}_sweeps",
                default_folder(),
                str(threads),
            ]
            quiet = os.environ | {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
            pipes: Any = {
                "stdin": subprocess.PIPE,
                "stdout": subprocess.PIPE,
                "stderr": self._errors,
                "text": True,
            }
            self._process = subprocess.Popen(words, env=quiet, **pipes)
            self.ways = json.loads(self._line())
        except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
            self.why_not = f"{PEERS[name]} skipped: {error}"

    def __call__(self, way: str, task: Task, cells: Cells) -> Answer:
        """The metrics of some cells, and the seconds that they took there."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"way": way, "task": task, "cells": cells}) + "\n")
        self._process.stdin.flush()
        return json.loads(self._line())

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            said = self._errors.read().strip().splitlines() or ["it ended without a word"]
            raise RuntimeError(said[-1][:200])
        return line

    def close(self) -> None:
        """End its process."""
        if not self.why_not:
            self._process.communicate()


def _environment(name: str) -> Path:
    """The Python of an environment with this library; made where there is none."""
    folder = Path(os.environ.get("HOOKKIT_PEERS") or cache_folder() / "peers") / name
    python, ready = folder / "bin" / "python", folder / f"{PEERS[name]}.ready"
    if not ready.exists():
        steps = [[sys.executable, "-m", "venv", folder]]
        steps += [
            [python, "-m", "pip", "install", "--quiet", package] for package in (FIRST, PEERS[name])
        ]
        for step in steps:
            done = subprocess.run(step, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(done.stderr.strip().splitlines()[-1][:200])
        ready.touch()
    return python
