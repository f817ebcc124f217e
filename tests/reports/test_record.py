"""A result's folder: what it holds, what it refuses, and what it says of the run before."""

import json

import pandas as pd
import pytest
import torch
from conftest import PROMPTS

import hookkit as hk
from hookkit.errors import BadHook, OtherSettings


def record(folder, lm, fail=False):
    with hk.record(folder, question="Does it?", lm=lm, seed=0) as results:
        run = results.run("forced", hk.forward(lm, PROMPTS[0], hk.force(3), hk.capture("z.1")))
        plain = hk.forward(lm, PROMPTS[0])
        shift = results.table("shift", hk.rank_shift(plain, run), caption="after minus before")
        results.figure("bump", hk.figures.rank_bump(shift))
        results.text("# Heading")
        results.tensors("z", run)
        if fail:
            raise ZeroDivisionError("mine")
    return results


def test_a_record_writes_page_tables_pictures_tensors_and_how(tmp_path, llama):
    record(tmp_path / "oat_milk", llama)
    names = sorted(path.name for path in (tmp_path / "oat_milk").iterdir())
    assert names == [
        "README.md",
        "about.json",
        "bump.png",
        "report.html",
        "shift.csv",
        "z.safetensors",
    ]
    about = json.loads((tmp_path / "oat_milk" / "about.json").read_text())
    assert about["title"] == "Oat milk"
    assert about["ended"] == "finished"
    assert about["files"] == ["shift.csv", "bump.png", "z.safetensors", "report.html", "README.md"]
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
    assert hk.types.Hook.from_json(forced["hooks"][0]) == hk.force(3)


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
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "README.md",
        "a.csv",
        "about.json",
        "report.html",
    ]
    assert not (tmp_path.parent / "b.csv").exists()


def made(folder, lm, *, value=1.0, seed=0, fail=False, **settings):
    with hk.record(folder, lm=lm, seed=seed, **settings) as results:
        results.table("numbers", pd.DataFrame({"x": [value, 2.0]}))
        results.tensors("kept", {"x": torch.tensor([value])})
        if fail:
            raise ZeroDivisionError("mine")
        results.answer(f"It is {value}.")
    return results


def test_the_answer_stands_under_the_question_and_in_about_and_is_said_once(tmp_path, llama):
    with hk.record(tmp_path, question="Does it?", lm=llama) as results:
        results.answer("It does <b>.")
        with pytest.raises(BadHook, match="has its answer already"):
            results.answer("It does not.")
    assert json.loads((tmp_path / "about.json").read_text())["answer"] == "It does <b>."
    page = (tmp_path / "report.html").read_text()
    assert page.index("Does it?") < page.index("It does &lt;b&gt;.")


def test_a_second_run_says_what_moved_and_keeps_the_first(tmp_path, llama, capfd):
    made(tmp_path, llama)
    assert not (tmp_path / ".last").exists() and "against" not in capfd.readouterr().err
    again = made(tmp_path, llama, value=1.5)
    assert "against the run before: numbers: 1 of 2 cells moved, x by 0.5" in capfd.readouterr().err
    assert again.moved()["moved"].tolist() == [1]
    last = tmp_path / ".last"
    assert pd.read_csv(last / "numbers.csv")["x"].tolist() == [1.0, 2.0]
    assert json.loads((last / "about.json").read_text())["answer"] == "It is 1.0."
    assert {path.name for path in last.iterdir()} == {
        ".gitignore", "README.md", "about.json", "kept.safetensors", "numbers.csv", "report.html",
    }  # fmt: skip
    made(tmp_path, llama, value=1.5)
    assert "against the run before: 1 tables are the same" in capfd.readouterr().err
    assert pd.read_csv(last / "numbers.csv")["x"].tolist() == [1.5, 2.0]


def test_what_only_the_run_before_had_is_not_left_among_the_results(tmp_path, llama):
    with hk.record(tmp_path, lm=llama) as results:
        results.table("old", pd.DataFrame({"x": [1]}))
    (tmp_path / "mine.txt").write_text("a note of my own")
    made(tmp_path, llama, seed=None)
    assert not (tmp_path / "old.csv").exists() and (tmp_path / ".last" / "old.csv").exists()
    assert (tmp_path / "mine.txt").read_text() == "a note of my own"


def test_results_of_other_settings_are_not_mixed_in_one_folder(tmp_path, llama, gpt2):
    made(tmp_path, llama, settings={"count": 3, "of": "tea"})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for lm, given, words in (
        (llama, {"seed": 1, "settings": {"count": 3, "of": "tea"}}, "seed was 0 and is 1"),
        (llama, {"settings": {"count": 4, "of": "tea"}}, r"\(count was 3 and is 4\)"),
        (llama, {}, "count was 3 and is None, of was 'tea' and is None"),
        (gpt2, {"settings": {"count": 3, "of": "tea"}}, "another model.*replace=True"),
    ):
        with pytest.raises(OtherSettings, match=words):
            made(tmp_path, lm, **given)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    made(tmp_path, gpt2, replace=True)
    assert json.loads((tmp_path / "about.json").read_text())["settings"] == {}
    assert json.loads((tmp_path / ".last" / "about.json").read_text())["settings"] == {
        "count": 3,
        "of": "tea",
    }
    with pytest.raises(BadHook, match="settings are kept as JSON"):
        hk.record(tmp_path, settings={"lm": llama})


def test_a_run_that_stopped_is_replaced_and_the_finished_one_before_it_is_kept(tmp_path, llama):
    made(tmp_path, llama, value=1.0)
    with pytest.raises(ZeroDivisionError):
        made(tmp_path, llama, value=2.0, fail=True)
    assert pd.read_csv(tmp_path / ".last" / "numbers.csv")["x"][0] == 1.0
    made(
        tmp_path, llama, value=3.0, seed=7
    )  # of a run that did not finish, nothing has to be kept apart
    assert pd.read_csv(tmp_path / "numbers.csv")["x"][0] == 3.0
    assert pd.read_csv(tmp_path / ".last" / "numbers.csv")["x"][0] == 1.0


def test_what_a_run_that_stopped_had_written_is_gone_with_the_next(tmp_path, llama):
    with pytest.raises(ZeroDivisionError), hk.record(tmp_path, lm=llama) as results:
        results.table("halfway", pd.DataFrame({"x": [1.0]}))
        raise ZeroDivisionError
    assert (tmp_path / "halfway.csv").exists()
    made(tmp_path, llama)
    assert not (tmp_path / "halfway.csv").exists()


def test_the_page_shows_a_table_as_it_was_when_it_was_written(tmp_path):
    table = pd.DataFrame({"x": [1.25]})
    with hk.record(tmp_path) as results:
        results.table("numbers", table)
        table["x"] = 7.75
    page = (tmp_path / "report.html").read_text()
    assert (
        "1.25" in page and "7.75" not in page and "1.25" in (tmp_path / "numbers.csv").read_text()
    )


def test_the_command_in_about_has_no_path_of_a_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "sys.argv", [str(tmp_path / "mine.py"), str(tmp_path / "texts.txt"), "--seed", "3"]
    )
    with hk.record(tmp_path):
        pass
    command = json.loads((tmp_path / "about.json").read_text())["command"]
    assert str(tmp_path) not in command and command.endswith("--seed 3")


def test_about_names_only_files_of_the_folder_itself(tmp_path, llama):
    (tmp_path / "mine.txt").write_text("mine")
    folder = tmp_path / "result"
    made(folder, llama)
    about = json.loads((folder / "about.json").read_text())
    (folder / "about.json").write_text(
        json.dumps(about | {"files": ["../mine.txt", "numbers.csv"]})
    )
    made(folder, llama)
    assert (tmp_path / "mine.txt").exists()
