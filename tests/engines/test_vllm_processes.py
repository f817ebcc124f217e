"""The process of an engine ends with its owner, and its end is an error that says what to do."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from served_models import MEMORY, PROMPTS, needs_vllm, serve

import hookkit as hk

pytestmark = needs_vllm

OWNER = """
import sys, time
import hookkit as hk
from served_models import MEMORY, serve


def slow(values):
    time.sleep(1.0)
    return values * 1.5


if __name__ == "__main__":
    lm = serve(sys.argv[1], **MEMORY)
    hk.generate(lm, "Tea", max_new_tokens=2)
    print(lm.engine.process_id, flush=True)
    hk.generate(lm, "Tea", hk.edit("resid_post.1", slow), max_new_tokens=100)
"""


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_for_end(process: int, seconds: float = 30.0) -> None:
    ends = time.monotonic() + seconds
    while is_running(process):
        assert time.monotonic() < ends, f"the process {process} still runs"
        time.sleep(0.1)


def children_of(process: int) -> list[int]:
    text = Path(f"/proc/{process}/task/{process}/children").read_text()
    return [int(word) for word in text.split()]


def slow(values: torch.Tensor) -> torch.Tensor:
    time.sleep(0.2)
    return values * 1.5


def test_this_process_never_imports_vllm(served):
    from transformers.models.llama import modeling_llama

    hk.generate(served, PROMPTS, hk.capture("z.1"), max_new_tokens=2)
    assert "vllm" not in sys.modules
    assert modeling_llama.LlamaModel.__module__ == modeling_llama.__name__
    assert "vllm" not in str(type(served.root).__mro__)


def test_a_killed_engine_is_lost_and_the_error_says_what_to_do(model_folder):
    lm = serve(model_folder, **MEMORY)
    process = lm.engine.process_id
    assert hk.generate(lm, PROMPTS, max_new_tokens=3).text
    threading.Timer(1.0, os.kill, (process, signal.SIGKILL)).start()
    with pytest.raises(hk.errors.EngineLost, match="load the model again"):
        hk.generate(lm, PROMPTS, hk.edit("resid_post.1", slow), max_new_tokens=100)
    with pytest.raises(hk.errors.EngineLost, match="closed"):
        hk.generate(lm, PROMPTS, max_new_tokens=3)
    wait_for_end(process)
    assert "closed" in repr(lm.engine)


def test_an_engine_that_nothing_refers_to_leaves_no_process_and_no_file(model_folder):
    lm = serve(model_folder, **MEMORY)
    process, folder = lm.engine.process_id, Path(lm.engine._folder.name)
    children = children_of(process)
    assert hk.generate(lm, PROMPTS, max_new_tokens=3).text
    assert folder.exists()
    del lm
    gc.collect()
    for number in (process, *children):
        wait_for_end(number)
    assert not folder.exists()


def test_ctrl_c_in_a_run_ends_the_engine(model_folder):
    lm = serve(model_folder, **MEMORY)
    process = lm.engine.process_id

    os.kill(
        process, signal.SIGINT
    )  # a terminal sends it to both: the engine leaves it to its owner
    assert hk.generate(lm, PROMPTS, max_new_tokens=3).text
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        hk.generate(lm, PROMPTS, hk.edit("resid_post.1", slow), max_new_tokens=100)
    wait_for_end(process)
    with pytest.raises(hk.errors.EngineLost, match="closed"):
        hk.generate(lm, PROMPTS, max_new_tokens=3)


def test_the_engine_ends_when_its_owner_is_killed_in_a_run(model_folder, tmp_path):
    program = tmp_path / "owner.py"
    program.write_text(OWNER)
    paths = os.pathsep.join(path for path in sys.path if path)
    owner = subprocess.Popen(
        [sys.executable, program, str(model_folder)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    try:
        assert owner.stdout is not None
        process = int(owner.stdout.readline())
        time.sleep(1.0)
        assert is_running(process)
    finally:
        owner.kill()
        owner.wait()
        owner.stdout.close()
    wait_for_end(process)


def test_an_engine_that_cannot_start_says_why_and_leaves_no_process(model_folder):
    children = children_of(os.getpid())
    with pytest.raises(Exception, match="max_model_len|context") as caught:
        serve(model_folder, **{**MEMORY, "max_model_len": 100_000})
    assert "in the process of the engine" in "\n".join(caught.value.__notes__)
    assert "vllm" not in sys.modules
    assert children_of(os.getpid()) == children
