"""Files: tensors kept whole."""

import pytest
import torch
from conftest import PROMPTS

import hookkit as hk
from hookkit.errors import BadHook


def test_tensors_come_back_as_they_were(tmp_path):
    tensors = {"a": torch.randn(3, 4).bfloat16(), "b": torch.arange(5), "c": torch.randn(4, 4).T}
    path = hk.results.save_tensors(
        tensors, tmp_path / "deep" / "t.safetensors", about={"site": "resid_post.6"}
    )
    back = hk.results.load_tensors(path)
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    assert [file.name for file in path.parent.iterdir()] == ["t.safetensors"]


def test_a_runs_captures_are_saved_by_site_and_name(tmp_path, lm):
    run = hk.forward(lm, PROMPTS, hk.capture("z.1"), hk.capture("resid_post.0", name="x"))
    back = hk.results.load_tensors(hk.results.save_tensors(run, tmp_path / "t.safetensors"))
    assert torch.equal(back["z.1"], run["z.1"])
    assert torch.equal(back["resid_post.0/x"], run["resid_post.0", "x"])


def test_nothing_to_save_is_refused(tmp_path, lm):
    with pytest.raises(BadHook, match="there are no tensors to save"):
        hk.results.save_tensors(hk.forward(lm, "Tea"), tmp_path / "t.safetensors")
