"""Files: tensors kept whole, and a result's folder that says how to make it again."""

import json

import pytest
import torch
from conftest import PROMPTS

import hookkit as hk
from hookkit.errors import BadHook


def test_tensors_come_back_as_they_were(tmp_path):
    tensors = {"a": torch.randn(3, 4).bfloat16(), "b": torch.arange(5), "c": torch.randn(4, 4).T}
    path = hk.save_tensors(tensors, tmp_path / "deep" / "t.safetensors", about={"site": "resid_post.6"})
    back = hk.load_tensors(path)
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    assert [file.name for file in path.parent.iterdir()] == ["t.safetensors"]


def test_a_runs_captures_are_saved_by_site_and_name(tmp_path, lm):
    run = hk.forward(lm, PROMPTS, hk.capture("z.1"), hk.capture("resid_post.0", name="x"))
    back = hk.load_tensors(hk.save_tensors(run, tmp_path / "t.safetensors"))
    assert torch.equal(back["z.1"], run["z.1"])
    assert torch.equal(back["resid_post.0/x"], run["resid_post.0", "x"])


def test_nothing_to_save_is_refused(tmp_path, lm):
    with pytest.raises(BadHook, match="there are no tensors to save"):
        hk.save_tensors(hk.forward(lm, "Tea"), tmp_path / "t.safetensors")


def record(folder, lm, fail=False):
    with hk.record(folder, question="Does it?", lm=lm, seed=0) as results:
        run = results.run("forced", hk.forward(lm, PROMPTS[0], hk.force(3), hk.capture("z.1")))
        plain = hk.forward(lm, PROMPTS[0])
        shift = results.table("shift", hk.rank_shift(plain, run), caption="after minus before")
        results.figure("bump", hk.rank_bump(shift))
        results.text("# Heading")
        results.tensors("z", run)
        if fail:
            raise ZeroDivisionError("mine")
    return results


def test_a_record_writes_page_tables_pictures_tensors_and_how(tmp_path, llama):
    record(tmp_path / "oat_milk", llama)
    names = sorted(path.name for path in (tmp_path / "oat_milk").iterdir())
    assert names == ["about.json", "bump.png", "report.html", "shift.csv", "z.safetensors"]
    about = json.loads((tmp_path / "oat_milk" / "about.json").read_text())
    assert about["title"] == "Oat milk"
    assert about["ended"] == "finished"
    assert about["files"] == ["shift.csv", "bump.png", "z.safetensors", "report.html"]
    assert {
        "versions",
        "weights_sha256",
        "tokenizer_sha256",
        "seed",
        "dtype",
        "device",
        "attention",
        "git_commit",
        "seconds",
        "command",
        "revision",
    } <= set(about)
    forced = about["runs"]["forced"]
    assert forced["prompts"] == [PROMPTS[0]]
    assert hk.Hook.from_json(forced["hooks"][0]) == hk.force(3)


def test_the_same_record_twice_has_the_same_tables_byte_for_byte(tmp_path, llama):
    for folder in ("a", "b"):
        record(tmp_path / folder, llama)
    for name in ("shift.csv", "bump.png", "z.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_record_that_fails_keeps_what_was_written_and_says_how_it_ended(tmp_path, llama):
    with pytest.raises(ZeroDivisionError):
        record(tmp_path, llama, fail=True)
    about = json.loads((tmp_path / "about.json").read_text())
    assert about["ended"] == "stopped: ZeroDivisionError: mine"
    assert (tmp_path / "shift.csv").exists()
    assert not (tmp_path / "report.html").exists()


def test_the_hash_of_the_weights_tells_models_apart(tmp_path, llama, gpt2, small_tokenizer):
    from conftest import tiny

    from hookkit.about import tokenizer_hash, weights_hash

    other = hk.LM(tiny("llama"), small_tokenizer)
    assert weights_hash(llama) == weights_hash(other)
    with torch.no_grad():
        other.model.lm_head.weight[0, 0] += 1
    assert len({weights_hash(llama), weights_hash(other), weights_hash(gpt2)}) == 3
    assert tokenizer_hash(llama) == tokenizer_hash(other)
    assert tokenizer_hash(hk.LM(llama.model)) is None


def test_names_that_stand_twice_or_leave_the_folder_are_refused(tmp_path, llama):
    run = hk.forward(llama, "Tea", hk.capture("z.1"))
    table = hk.ranks(run)
    with hk.record(tmp_path, lm=llama) as results:
        results.table("a", table)
        results.run("r", run)
        for again, words in (
            (lambda: results.table("a", table), "'a' is recorded already"),
            (lambda: results.run("r", run), "a run named 'r' is recorded already"),
            (lambda: results.table("../b", table), "cannot name a file here"),
            (lambda: results.tensors("a/b", run), "cannot name a file here"),
        ):
            with pytest.raises(BadHook, match=words):
                again()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.csv", "about.json", "report.html"]
    assert not (tmp_path.parent / "b.csv").exists()
