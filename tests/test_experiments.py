"""Each experiment is short, asks one question, and gives the same tables twice."""

import ast
import importlib
import json
import math
from pathlib import Path

import pytest
import torch

import hookkit as hk

HERE = Path(__file__).parent.parent / "experiments"
SCRIPTS = sorted(path for path in HERE.glob("*.py") if path.name != "__init__.py")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_an_experiment_is_short_and_stands_in_the_index(path):
    words = path.read_text()
    question = (ast.get_docstring(ast.parse(words)) or "").splitlines()[0]
    assert len(words.splitlines()) < 200
    assert question.endswith("?")
    assert f"({path.name})" in (HERE / "README.md").read_text()


def test_oat_milk_gives_the_same_tables_twice_and_finds_what_it_looks_for(smol, tmp_path, monkeypatch, capsys):
    oat_milk = importlib.import_module("experiments.oat_milk")
    before = {name: weight.clone() for name, weight in smol.model.state_dict().items()}
    folders = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        if folders:  # figures are drawn once
            monkeypatch.setattr(hk.Record, "figure", lambda self, name, figure, caption="": figure)
        folder.mkdir()
        monkeypatch.chdir(folder)
        oat_milk.main()
        folders.append(folder / "results" / "oat_milk")
    one, two = ({path.name: path.read_bytes() for path in folder.glob("*.csv")} for folder in folders)
    assert len(one) >= 7 and one == two
    assert "' coffee'" in capsys.readouterr().out
    assert all(torch.equal(weight, before[name]) for name, weight in smol.model.state_dict().items())

    about = json.loads((folders[0] / "about.json").read_text())
    assert about["ended"] == "finished" and about["runs"]["forced"]["hooks"]
    page = (folders[0] / "report.html").read_text()
    assert "bit for bit? True" in page
    shift = (folders[0] / "forced_shift.csv").read_text().splitlines()
    assert "' coffee'" in shift[1] and "edited" in shift[1]
    assert any(
        "' coffee'" in line and ",0," in line for line in (folders[0] / "banned_shift.csv").read_text().splitlines()
    )


def test_the_loop_of_gradient_descent_learns_the_same_sentence_twice_in_the_same_way():
    experiment = importlib.import_module("experiments.loss_and_gradient_descent")
    one, two = (experiment.trained(experiment.made(), experiment.SENTENCE) for _ in range(2))
    assert one.equals(two)
    assert one["loss"].iloc[0] == pytest.approx(math.log(len(experiment.WORDS)), abs=0.1)
    assert one["loss"].iloc[-1] < 0.05 and (one.iloc[-1][["'love'", "'deep'", "'learning'"]] > 0.9).all()
