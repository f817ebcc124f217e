"""Models that several processes hold together: torchrun, two and three ranks, each check of tests/ranks.py on each rank."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import ALONE, CHECKS

import hookkit as hk

HERE = Path(__file__).parents[1]
EVEN = {"llama": {}, "qwen3": {}, "qwen3_moe": {}}
LIMITS = {
    "attributed": 1e-4,
    "swept": 1e-4,
    "journalled": 1e-4,
}  # differences of logits; the rest: 1e-5
ODD = {
    "llama": {
        "hidden_size": 48,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "intermediate_size": 50,
    }
}
NAMES = [each.__name__ for each in (*CHECKS, *ALONE)]


def ran(
    folder: Path, count: int, families: dict[str, dict[str, int]]
) -> list[dict[str, float | str]]:
    """What came of the checks, on each of so many ranks."""
    (folder / "models").mkdir()
    for family, sizes in families.items():
        hk.tiny(family, config=sizes).model.save_pretrained(folder / "models" / family)  # pyright: ignore
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(HERE.parent),
    }
    for word in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "PYTEST_XDIST_WORKER"):
        environment.pop(word, None)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(count),
    ]
    command += [str(HERE / "ranks.py"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"results-{rank}.json").read_text()) for rank in range(count)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float | str]]:
    return ran(tmp_path_factory.mktemp("two"), 2, EVEN)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float | str]]:
    return ran(tmp_path_factory.mktemp("default"), 3, ODD)


@pytest.mark.parametrize("check", NAMES)
@pytest.mark.parametrize("family", EVEN)
def test_two_ranks_come_to_what_one_process_does(two, family, check):
    for rank in two:
        found = rank[f"{family} {check}"]
        assert isinstance(found, float), found
        assert found < LIMITS.get(check, 1e-5)


@pytest.mark.parametrize("check", NAMES)
def test_three_ranks_with_parts_of_different_sizes_come_to_what_one_process_does(three, check):
    for rank in three:
        found = rank[f"llama {check}"]
        assert isinstance(found, float), found
        assert found < LIMITS.get(check, 1e-5)


def test_three_ranks_come_to_what_one_process_does_on_the_default_model(three):
    assert [rank["default"] < 1e-5 for rank in three] == [True] * 3, [
        rank["default"] for rank in three
    ]


def test_a_plan_needs_torchrun(tmp_path):
    hk.tiny("llama").model.save_pretrained(tmp_path)  # pyright: ignore
    with pytest.raises(
        hk.errors.Unsupported,
        match=r"start the script with `torchrun --nproc-per-node N script\.py`",
    ):
        hk.load(tmp_path, tp_plan="auto")
    with pytest.raises(hk.errors.BadHook, match="leave device= and device_map= out"):
        hk.load(tmp_path, tp_plan="auto", device="cpu")


def test_a_whole_model_has_no_ranks():
    lm = hk.tiny("llama")
    assert lm.ranks is None
    assert "split" not in lm.describe()
    assert torch.is_tensor(hk.forward(lm, [[5, 6]]).logits)
