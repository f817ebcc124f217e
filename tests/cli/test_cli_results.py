"""hookkit new, run and show, as a new user types them."""

import json
import subprocess
import sys

import pandas as pd
import pytest
from typer.testing import CliRunner

import hookkit as hk
from hookkit.cli import app

SCRIPT = """
import pathlib, sys
import pandas as pd
import hookkit as hk
value = float(pathlib.Path("value").read_text())
with hk.record("results/plain", question="How much?") as results:
    results.table("t", pd.DataFrame({"x": [value]}))
    results.answer(f"{value:g} of it.")
print("said")
sys.exit(int(value < 0))
"""


def hookkit(*words, status=0):
    found = CliRunner().invoke(app, [str(word) for word in words])
    assert found.exit_code == status, found.output + str(found.exception)
    return found


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "plain.py").write_text(SCRIPT)
    (tmp_path / "value").write_text("1")
    return tmp_path


def test_a_new_experiment_is_short_and_it_and_its_test_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = hookkit(
        "new", "milk_or_tea", "--question", 'What does "it" \\do?', "--prompt", 'He said "tea" and'
    )
    assert found.stdout.splitlines() == ["experiments/milk_or_tea.py", "tests/test_milk_or_tea.py"]
    assert "hookkit run experiments/milk_or_tea.py" in found.stderr
    words = (tmp_path / "experiments" / "milk_or_tea.py").read_text()
    assert words.startswith('"""What does "it" \\\\do?') and 25 <= len(words.splitlines()) <= 40
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr
    hookkit("run", "experiments/milk_or_tea.py")
    about = json.loads((tmp_path / "results" / "milk_or_tea" / "about.json").read_text())
    assert about["question"] == 'What does "it" \\do?' and "goes from rank" in about["answer"]
    assert about["command"] == "python -m experiments.milk_or_tea"
    assert about["settings"] == {"prompt": 'He said "tea" and', "token": " coffee", "layer": 15}


def test_a_new_experiment_takes_another_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    hookkit("new", "one", "--model", "model")
    hookkit("new", "two", "--model", "some/hub-id", "--folder", "deep")
    assert (
        f"hk.load({str(tmp_path / 'model')!r})" in (tmp_path / "experiments" / "one.py").read_text()
    )
    assert "hk.load('some/hub-id')" in (tmp_path / "deep" / "experiments" / "two.py").read_text()


def test_new_overwrites_nothing_and_wants_a_name_and_a_question(place):
    for words, said in (
        (("plain",), "experiments/plain.py already exist"),
        (("Plain Tea",), "'Plain Tea' cannot name an experiment"),
        (("class",), "'class' cannot name an experiment"),
        (("tea", "--question", "Tea."), "'Tea.' is not a question"),
    ):
        assert said in hookkit("new", *words, status=2).stderr
    assert (place / "experiments" / "plain.py").read_text() == SCRIPT
    assert not (place / "tests").exists()


def test_run_says_how_each_ended_and_writes_the_index(place):
    (place / "experiments" / "wrong.py").write_text("raise ZeroDivisionError")
    found = hookkit("run", "experiments/plain.py", "experiments/wrong.py", status=1)
    rows = [line.split() for line in found.stdout.splitlines()]
    assert rows[0] == ["experiment", "seconds", "ended"]
    assert rows[1][0] == "plain" and rows[1][2] == "finished"
    assert rows[2][0] == "wrong" and rows[2][2:] == ["status", "1"]
    assert "1 of it." in (place / "results" / "index.html").read_text()
    assert "there is no file none.py" in hookkit("run", "none.py", status=2).stderr


def test_run_and_show_tell_what_moved_and_end_with_1(place):
    (place / "experiments" / "silent.py").write_text("")
    first = hookkit(
        "run", "experiments/plain.py", "experiments/silent.py", "--against", "last", status=1
    )
    assert (
        "has no run before this one" in first.stderr and "writes no results/silent" in first.stderr
    )
    assert [line.split()[3:5] for line in first.stdout.splitlines()[1:]] == [
        ["0", "False"],
        ["0", "True"],
    ]
    assert (
        "has no run before this one"
        in hookkit("show", "results/plain", "--against", "last", status=2).stderr
    )
    same = hookkit("run", "experiments/plain.py", "--against", "last")
    assert same.stdout.split()[-3:] == ["1", "True", "0.0000"]
    (place / "value").write_text("1.5")
    assert (
        "t: 1 of 1 cells moved, x by 0.5"
        in hookkit("run", "experiments/plain.py", "--against", "last", status=1).stderr
    )
    hookkit("run", "experiments/plain.py", "--against", "last", "--tolerance", "1")
    found = json.loads(hookkit("show", "results/plain", "--against", "last", "--json").stdout)
    assert found["moved"][0]["table"] == "t" and found["moved"][0]["same"] is True
    assert found["settings"] == [] and found["cells"] == []
    hookkit("show", "results/plain", "--against", "results/plain")


def test_show_names_the_cells_and_the_settings_that_changed(place):
    hookkit("run", "experiments/plain.py")
    (place / "value").write_text("2")
    hookkit("run", "experiments/plain.py")
    said = hookkit("show", "results/plain", "--against", "last", status=1).stdout.splitlines()
    cells = said[said.index("Cells that changed, the largest change first") + 2].split()
    assert cells[:5] == ["t", "line", "0:", "x", "1"] and cells[5] == "2"
    settings = said[said.index("Settings that changed") + 2]
    assert settings.split("  ")[0] == "answer" and '"1 of it."' in settings
    table = hookkit("show", "results/plain", "--against", "last", "--csv", status=1).stdout
    assert table.splitlines()[1].startswith("t,False,1,1,1.0,x")


def test_run_replace_leaves_no_earlier_file_and_a_failure_changes_nothing(place):
    folder = place / "results" / "plain"
    hookkit("run", "experiments/plain.py")
    (folder / "old.txt").write_text("by hand")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (place / "value").write_text("-1")  # the experiment ends with status 1
    assert "status 1" in hookkit("run", "experiments/plain.py", "--replace", status=1).stdout
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (place / "value").write_text("2")
    hookkit("run", "experiments/plain.py", "--replace")
    assert sorted(path.name for path in folder.iterdir()) == [
        ".last", "README.md", "about.json", "report.html", "t.csv"
    ]  # fmt: skip
    assert (folder / ".last" / "old.txt").read_text() == "by hand"
    (place / "value").write_text("3")
    words = ("run", "experiments/plain.py", "--replace", "--against", "last")
    assert "1 of 1 cells moved, x by 1" in hookkit(*words, status=1).stderr
    assert sorted(path.name for path in (place / "results").iterdir() if path.is_dir()) == ["plain"]


def test_run_replace_brings_back_what_a_killed_run_set_aside(place):
    folder, aside = place / "results" / "plain", place / "results" / ".plain.replaced"
    hookkit("run", "experiments/plain.py")
    folder.rename(aside)
    folder.mkdir()
    (folder / "half").write_text("of the killed run")
    hookkit("run", "experiments/plain.py", "--replace")
    assert not aside.exists() and not (folder / "half").exists()
    assert (folder / ".last" / "t.csv").is_file()


def test_run_replace_refuses_a_folder_that_no_record_wrote(place):
    folder = place / "results" / "plain"
    folder.mkdir(parents=True)
    (folder / "mine.txt").write_text("mine")
    assert "is not replaced" in hookkit("run", "experiments/plain.py", "--replace", status=2).stderr
    assert (folder / "mine.txt").read_text() == "mine"


def test_show_prints_a_result_and_lists_a_folder_of_them(place):
    hookkit("run", "experiments/plain.py")
    words = hookkit("show", "results/plain").stdout
    for said in ("How much?", "1 of it.", "python -m experiments.plain", "t\n"):
        assert said in words
    told = json.loads(hookkit("show", "results/plain", "--json").stdout)
    assert told["about"][0]["answer"] == "1 of it." and told["t"] == [{"x": 1.0}]
    listed = [line.split("  ") for line in hookkit("show", "results").stdout.splitlines()]
    assert [[cell.strip() for cell in line if cell] for line in listed] == [
        ["result", "question", "answer"], ["plain", "How much?", "1 of it."],
    ]  # fmt: skip
    assert pd.DataFrame(json.loads(hookkit("show", "results", "--json").stdout)).equals(
        hk.results.list_results("results")
    )
    assert "there is no folder" in hookkit("show", "nowhere", status=2).stderr
