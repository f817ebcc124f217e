"""Killed, interrupted or on a full disk: every writer goes on, loses nothing, and leaves nothing half-written."""

import json
import subprocess
import sys
from pathlib import Path

FINE = {"raw": 0, "lost": 0, "left": 0}


def test_a_writer_that_is_disturbed_at_any_moment_loses_nothing_and_leaves_nothing(tmp_path):
    program = Path(__file__).parents[1] / "killing_writers.py"
    words = [sys.executable, str(program), str(tmp_path), "0", "1"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name, seen in json.loads(done.stdout.splitlines()[-1]).items():
        assert {word: seen[word] for word in FINE} == FINE, name
        assert seen["done"] + seen["refused"] + seen["by a signal"] == 4, name
