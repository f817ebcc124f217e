"""Each experiment is short, asks one question, and gives the same tables twice."""

import ast
import importlib
import json
import math
from pathlib import Path

import pandas as pd
import pytest
import torch

import hookkit as hk

HERE = Path(__file__).parent.parent / "experiments"
ANSWERED = ("indirect_object", "coffee_everywhere", "steer_a_mood", "where_is_paris", "attribution")
SCRIPTS = sorted(path for path in HERE.glob("*.py") if path.name != "__init__.py")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_an_experiment_asks_a_question_and_stands_in_the_index(path):
    words = path.read_text()
    question = (ast.get_docstring(ast.parse(words)) or "").splitlines()[0]
    assert question.endswith("?")
    assert f"({path.name})" in (HERE / "README.md").read_text()


def test_oat_milk_gives_the_same_tables_twice_and_finds_what_it_looks_for(
    smol, tmp_path, monkeypatch, capsys
):
    oat_milk = importlib.import_module("experiments.oat_milk")
    before = {name: weight.clone() for name, weight in smol.model.state_dict().items()}
    folders = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        if folders:  # figures are drawn once
            monkeypatch.setattr(
                hk.types.Record, "figure", lambda self, name, figure, caption="": figure
            )
        folder.mkdir()
        monkeypatch.chdir(folder)
        oat_milk.main()
        folders.append(folder / "results" / "oat_milk")
    one, two = (
        {path.name: path.read_bytes() for path in folder.glob("*.csv")} for folder in folders
    )
    assert len(one) >= 7 and one == two
    assert "' coffee'" in capsys.readouterr().out
    assert all(
        torch.equal(weight, before[name]) for name, weight in smol.model.state_dict().items()
    )

    about = json.loads((folders[0] / "about.json").read_text())
    assert about["ended"] == "finished" and about["runs"]["forced"]["hooks"]
    page = (folders[0] / "report.html").read_text()
    assert "bit for bit? True" in page
    shift = (folders[0] / "forced_shift.csv").read_text().splitlines()
    assert "' coffee'" in shift[1] and "edited" in shift[1]
    assert any(
        "' coffee'" in line and ",0," in line
        for line in (folders[0] / "banned_shift.csv").read_text().splitlines()
    )


def tables_of(name: str) -> dict[str, pd.DataFrame]:
    """The tables of a result."""
    return {path.stem: pd.read_csv(path) for path in (HERE.parent / "results" / name).glob("*.csv")}


@pytest.mark.parametrize("name", ANSWERED)
def test_an_answer_says_what_its_tables_say(name):
    experiment = importlib.import_module(f"experiments.{name}")
    about = json.loads((HERE.parent / "results" / name / "about.json").read_text())
    assert about["answer"] == experiment.answer(tables_of(name))


def test_a_vector_within_the_spread_of_random_ones_is_not_called_better():
    experiment = importlib.import_module("experiments.steer_a_mood")
    tables = tables_of("steer_a_mood")
    assert "Yes for 3 of 4 vectors" in experiment.answer(tables)
    equal = tables["equal_damage"]
    own = ~equal["control"]
    equal.loc[own, "logit_diff_gain_low"] = -0.1
    words = experiment.answer(tables)
    assert words.startswith("Yes for 0 of 4") and words.count("not told from a random one") == 4
    equal.loc[own, "logit_diff_gain_high"] = -0.05
    assert experiment.answer(tables).count("worse than a random one") == 4


def test_a_head_is_far_above_its_control_at_twice_as_much_and_has_its_sign():
    experiment = importlib.import_module("experiments.indirect_object")
    tables = tables_of("indirect_object")
    control = tables["control"]
    own = control[~control["control"]].set_index("head")["logit_diff_effect"]
    for scale, verdict in ((0.4, "Yes."), (0.6, "No.")):
        control.loc[control["control"], "logit_diff_effect"] = (
            scale * own[control[control["control"]]["head"]].to_numpy()
        )
        assert experiment.answer(tables).startswith(verdict)
    words = experiment.answer(tables)
    for head, effect in own.items():
        part = words.split(f"{head} ")[1].split(", from other pairs")[0]
        assert part.startswith(f"{effect:+.2f} [") and ("against the answer" in part) == (
            effect < 0
        )


def test_both_damages_are_told_where_they_disagree():
    experiment = importlib.import_module("experiments.coffee_everywhere")
    rows = [("unedited", "nothing", 0, 0.1, 0.0, 0.0), ("boost", "control", 8, 0.2, 1.0, 0.1)]
    rows += [("boost", "coffee", 8, 0.6, 1.2, 0.003), ("steer", "coffee", 0.4, 0.55, 0.9, 0.5)]
    doses = pd.DataFrame(
        rows, columns=["way", "toward", "dose", "said", "likelihood_drop", "kl_neutral"]
    ).assign(n=20)
    for name in ("said", "likelihood_drop", "kl_neutral"):
        doses[f"{name}_low"], doses[f"{name}_high"] = doses[name] - 0.01, doses[name] + 0.01
    words = experiment.answer({"doses": doses})
    assert words.startswith(
        "It depends on the damage: by likelihood steer 0.4 is cheapest, by KL on neutral text boost 8."
    )
    assert "Without an edit 0.10 of the texts say it, with a control at most 0.20" in words
    near = doses.assign(likelihood_drop_low=doses["likelihood_drop"] - 0.5)
    assert "its interval is not apart from that of boost 8" in experiment.answer({"doses": near})
    doses["kl_neutral"] = doses["likelihood_drop"]
    assert experiment.answer({"doses": doses}).startswith("Least by both damages: steer 0.4.")


def test_the_loop_of_gradient_descent_learns_the_same_sentence_twice_in_the_same_way():
    experiment = importlib.import_module("experiments.loss_and_gradient_descent")
    one, two = (experiment.trained(experiment.made(), experiment.SENTENCE) for _ in range(2))
    assert one.equals(two)
    assert one["loss"].iloc[0] == pytest.approx(math.log(len(experiment.WORDS)), abs=0.1)
    assert (
        one["loss"].iloc[-1] < 0.05
        and (one.iloc[-1][["'love'", "'deep'", "'learning'"]] > 0.9).all()
    )
