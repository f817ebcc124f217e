"""Each experiment is short, asks one question, and gives the same tables twice."""

import ast
import importlib
import json
import math
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from dictionaries import fitted

import hookkit as hk

HERE = Path(__file__).parent.parent / "experiments"
# The modules of experiments, and the folders of their results
ANSWERED = {
    "edit_while_generating": "edit_while_generating",
    "patch_one_grid": "patch_one_grid",
    "attribution": "attribution",
    "bfloat16": "bfloat16",
    "circuit_of_ioi": "circuit_of_ioi",
    "coffee_everywhere": "coffee_everywhere",
    "context_shapes_predictions": "context_shapes_predictions",
    "contrast": "contrast",
    "datasets": "datasets",
    "families": "families",
    "features_of_milk": "features_of_milk",
    "how_sure": "how_sure",
    "indirect_object": "indirect_object",
    "jacobian_lens": "jacobian_lens",
    "lens_of_paris": "lens_of_paris",
    "logits_are_dot_products": "logits_are_dot_products",
    "loss_and_gradient_descent": "loss_and_gradient_descent",
    "oat_milk": "oat_milk",
    "one_decision": "one_decision",
    "probes": "probes",
    "ask_first": "ask_first",
    "softmax_and_temperature": "softmax_and_temperature",
    "steer_a_mood": "steer_a_mood",
    "system_prompt_or_vector": "system_prompt_or_vector",
    "where_is_paris": "where_is_paris",
    "benchmarks.attention": "benchmarks_attention",
    "benchmarks.conditions": "benchmarks_conditions",
    "benchmarks.features": "benchmarks_features",
    "benchmarks.served": "benchmarks_served",
    "benchmarks.gradients": "benchmarks_gradients",
    "benchmarks.grammar": "benchmarks_grammar",
    "benchmarks.harvest": "benchmarks_harvest",
    "benchmarks.lenses": "benchmarks_lenses",
    "benchmarks.long_harvest": "benchmarks_long_harvest",
    "benchmarks.overhead": "benchmarks",
    "benchmarks.ray_engine": "benchmarks_ray",
    "benchmarks.report": "benchmarks_report",
    "benchmarks.scale": "scale",
    "benchmarks.sources": "benchmarks_sources",
    "benchmarks.sweeps": "benchmarks_sweeps",
    "benchmarks.token_shifts": "benchmarks_token_shifts",
}
RECORDS = sorted(HERE.parent.glob("results/*/about.json"))
TO_COPY = ("edit_while_generating", "patch_one_grid", "one_shift_report")
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
    assert ", coffee," in shift[1] and "edited" in shift[1]
    assert any(
        ", coffee," in line and ",0," in line
        for line in (folders[0] / "banned_shift.csv").read_text().splitlines()
    )


def tables_of(folder: str) -> dict[str, pd.DataFrame]:
    """The tables of a result."""
    tables = {}
    for path in (HERE.parent / "results" / folder).glob("*.csv"):
        tables[path.stem] = hk.results.read_table(path)
    return tables


@pytest.mark.parametrize("name", ANSWERED)
def test_an_answer_says_what_its_tables_say(name):
    experiment = importlib.import_module(f"experiments.{name}")
    folder = ANSWERED[name]
    about = json.loads((HERE.parent / "results" / folder / "about.json").read_text())
    assert about["answer"] == experiment.answer(tables_of(folder))


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.parent.name)
def test_every_result_has_a_question_and_an_answer_in_sentences(path):
    about = json.loads(path.read_text())
    assert about["question"].endswith(("?", "."))
    words = about["answer"].split()
    assert words[0][0] not in "0123456789+-"
    assert about["answer"].endswith(".") and len(words) >= 8


def test_the_experiments_to_copy_are_short_and_stand_first_in_the_index():
    index = (HERE / "README.md").read_text()
    rows = [line for line in index.splitlines() if line.startswith("| [")]
    for row, name in zip(rows, TO_COPY, strict=False):
        assert row.startswith(f"| [{name}]")
        code = ast.parse((HERE / f"{name}.py").read_text())
        imported = [node for node in code.body if isinstance(node, ast.Import | ast.ImportFrom)]
        modules = {getattr(node, "module", None) or node.names[0].name for node in imported}
        assert modules <= {"hookkit", "pandas", "typing"}


def test_the_word_is_not_gone_if_one_text_still_names_the_city():
    experiment = importlib.import_module("experiments.edit_while_generating")
    tables = tables_of("edit_while_generating")
    texts = tables["texts"]
    for row in texts.to_dict("records"):
        assert row["named"] == (row["city"] in row["text"])
    n = len(texts) // 3
    assert experiment.answer(tables).startswith(f"Yes: with the city's token banned, 0 of {n}")
    texts.loc[texts["edit"] == "ban", "named"] = [True] + [False] * (n - 1)
    assert experiment.answer(tables).startswith("Not always")


def test_the_layer_of_the_grid_is_where_the_last_token_overtakes_the_country():
    experiment = importlib.import_module("experiments.patch_one_grid")
    tables = tables_of("patch_one_grid")
    means = tables["means"]
    own = means[~means["control"]].pivot(index="layer", columns="pos", values="prob_effect")
    ahead = own[experiment.LAST] > own[experiment.COUNTRY]
    layer = next(number for number, is_ahead in ahead.items() if is_ahead)
    assert f"At layer {layer}:" in experiment.answer(tables)
    means["prob_effect"] = means["prob_effect"].where(means["layer"] != 5, 0.05 * means["pos"])
    assert "At layer 5:" in experiment.answer(tables)


def test_a_system_prompt_or_a_vector_says_no_where_the_table_says_so():
    experiment = importlib.import_module("experiments.system_prompt_or_vector")
    means = tables_of("system_prompt_or_vector")["means"]
    means = means.assign(gain_low=0.1, control_largest=means["log10_rise"] - 0.1)
    for low, high, words in ((0.1, 0.4, "The vector"), (-0.4, -0.1, "The system prompt"), (-0.1, 0.1, "No difference")):  # fmt: skip
        table = means.assign(vector_minus_prompt_low=low, vector_minus_prompt_high=high)
        assert experiment.answer({"means": table}).startswith(words)
    one = means.assign(gain_low=[-0.1, 0.1])
    assert experiment.answer({"means": one}).startswith("Only the vector is beyond its control")
    none = means.assign(control_largest=means["log10_rise"] + 0.1)
    assert experiment.answer({"means": none}).startswith("Neither works: none is beyond")


def test_a_vector_of_mood_answers_yes_if_both_words_move_beyond_the_control():
    experiment = importlib.import_module("experiments.one_shift_report")
    great = {"effect": 1.25, "control": 0.1, "gain_low": 0.9, "gain_high": 1.4}
    terrible = {"effect": -0.75, "control": 0.05, "gain_low": -1.0, "gain_high": -0.6}
    both = pd.DataFrame([great, terrible]).assign(n=12, draws=20, measure="logprob_delta")
    other = both.assign(measure="kl", effect=7.0)
    words = experiment.answer({"against_control": pd.concat([other, both])})
    assert words.startswith("Yes: over 12 openings") and "20 random vectors" in words
    assert "by +1.25 nats" in words and "by -0.75 on average" in words
    assert words.endswith("by +0.10 and +0.05.")
    both.loc[1, "gain_high"] = 0.1
    assert experiment.answer({"against_control": both}).startswith("No: over 12")


def test_a_vector_within_the_spread_of_random_ones_is_not_called_better():
    experiment = importlib.import_module("experiments.steer_a_mood")
    tables = tables_of("steer_a_mood")
    assert "3 of 4 vectors move the mood further" in experiment.answer(tables)
    equal = tables["equal_damage"]
    own = ~equal["control"]
    equal.loc[own, "logit_diff_gain_low"] = -0.1
    words = experiment.answer(tables)
    assert words.startswith("No: 0 of 4") and words.count("does not tell it from a random") == 4
    equal.loc[own, "logit_diff_gain_high"] = -0.05
    assert experiment.answer(tables).count("less than a random vector") == 4


def test_a_feature_within_the_spread_of_random_ones_is_no_answer():
    experiment = importlib.import_module("experiments.features_of_milk")
    tables = tables_of("features_of_milk")
    effects = tables["effects"]
    off = effects["edit"] == "to 0"
    effects.loc[off, ["effect", "control_lowest", "gain_high"]] = [-0.1, -0.2, -0.05]
    words = experiment.answer(tables)
    assert words.startswith("No: for 0 of 6") and "random features have down to -0.20" in words
    effects.loc[off, "control_lowest"] = -0.05
    assert experiment.answer(tables).startswith("Yes: for 6 of 6")
    effects.loc[off, "gain_high"] = 0.01
    assert experiment.answer(tables).startswith("No: for 0 of 6")


def test_the_features_of_milk_are_clamped_as_by_a_hand_written_hook(smol, tmp_path, monkeypatch):
    experiment = importlib.import_module("experiments.features_of_milk")
    monkeypatch.setattr(experiment, "DRAWS", 1)
    dictionary = hk.load_dictionary(fitted(smol, tmp_path))
    lm = smol.with_dictionaries(dictionary)
    table = experiment.measure(lm, dictionary, [0])
    own = table.query("draw == -1 and edit == 'to 0'").set_index("row")["logprob_delta"]
    ids = torch.tensor([lm.encode(experiment.PROMPTS[1])])
    coffee = lm.token(experiment.COFFEE)

    def switch_off(_module, _inputs, output):
        feature = dictionary.encode(output)[..., 0]
        feature[:, 0] = 0
        return output - feature[..., None] * dictionary.direction(0)

    with torch.no_grad():
        before = lm.model(ids).logits[0, -1].log_softmax(-1)[coffee]
        handle = lm.model.model.layers[12].register_forward_hook(switch_off)
        after = lm.model(ids).logits[0, -1].log_softmax(-1)[coffee]
        handle.remove()
    assert own[1] == pytest.approx(float(after - before), abs=1e-3)


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
        assert part.startswith(f"brings back {effect:+.2f} [") and (
            "against the answer" in part
        ) == (effect < 0)


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
    steer, boost = "steering by 0.4 of the stream's length", "a boost of 8 logits"
    assert f"{steer} costs least by likelihood and {boost} by KL on neutral text." in words
    assert "Without an edit 0.10 of the texts say it, and with the controls" in words
    assert words.endswith("at most 0.20.")
    near = doses.assign(likelihood_drop_low=doses["likelihood_drop"] - 0.5)
    assert f"is not apart from that of {boost}" in experiment.answer({"doses": near})
    doses["kl_neutral"] = doses["likelihood_drop"]
    assert f"{steer} costs least, by both damages." in experiment.answer({"doses": doses})


def test_the_loop_of_gradient_descent_learns_the_same_sentence_twice_in_the_same_way():
    experiment = importlib.import_module("experiments.loss_and_gradient_descent")
    one, two = (experiment.trained(experiment.made(), experiment.SENTENCE) for _ in range(2))
    assert one.equals(two)
    assert one["loss"].iloc[0] == pytest.approx(math.log(len(experiment.WORDS)), abs=0.1)
    assert (
        one["loss"].iloc[-1] < 0.05
        and (one.iloc[-1][["'love'", "'deep'", "'learning'"]] > 0.9).all()
    )


def test_the_benchmark_of_a_gpu_runs_small_on_a_cpu_and_writes_nothing(
    tmp_path, monkeypatch, capsys
):
    gpu = importlib.import_module("experiments.benchmarks.gpu")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu, "FAMILIES", ["gpt2"])
    monkeypatch.setattr(gpu, "ROUNDS", 1)
    gpu.main("cpu")
    assert "All laws hold in 3" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


IOI_ROWS = [
    {
        "prompt": f"When {a} and {b} went to the store, {b} gave a drink to",
        "s2_io_flip_counterfactual": {
            "prompt": f"When {a} and {b} went to the store, {a} gave a drink to"
        },
        "metadata": {"indirect_object": a, "subject": b},
    }
    for a, b in [("Mary", "John"), ("Tom", "Anna"), ("Paul", "Mark"), ("Jane", "Bob")]
]


def test_mibs_tasks_give_prompts_and_answers():
    examples = importlib.import_module("experiments.mib").examples
    clean, corrupted, right, wrong = next(examples("ioi", IOI_ROWS))
    assert clean.endswith("John gave a drink to") and corrupted.endswith("Mary gave a drink to")
    assert (right, wrong) == (" Mary", " John")
    other = {"prompt": "2+2=", "label": 4}
    sums = [
        {"prompt": "1+2=", "label": 3, "operator": "+", "random_counterfactual": other},
        {"prompt": "1+3=", "label": 4, "operator": "+", "random_counterfactual": None},
        {"prompt": "3-2=", "label": 1, "operator": "-", "random_counterfactual": other},
    ]
    assert list(examples("arithmetic_addition", sums)) == [("1+2=", "2+2=", "3", "4")]
    choice = {"prompt": "A red B blue", "choices": {"label": ["A", "B"]}, "answerKey": 1}
    row = choice | {"symbol_counterfactual": choice | {"prompt": "C D", "answerKey": 0}}
    assert list(examples("mcqa", [row])) == [("A red B blue", "C D", "B", "A")]


def test_mib_scores_one_split_and_measures_the_other_by_the_sign_of_the_scores(smol):
    mib = importlib.import_module("experiments.mib")
    config = {"vocab_size": smol.model.config.vocab_size}
    lm = hk.tiny("llama", tokenizer=smol.tokenizer, config=config)
    train, validation = IOI_ROWS[:2], IOI_ROWS[2:]
    curve, areas = mib.measure(lm, "ioi", "EAP", train, validation, 2)
    scores = hk.edge_attribution(lm, *mib.select_pairs(lm, "ioi", train, 2))
    circuit = hk.circuit(scores, share=0.5, signed="negative")
    clean, corrupted, metric = mib.select_pairs(lm, "ioi", validation, 2)
    run = hk.run_circuit(lm, clean, corrupted, circuit)
    row = curve[(curve["circuit"] == "circuit") & (curve["size"] == 0.5)].iloc[0]
    assert row[metric.name] == pytest.approx(float(metric(run).mean()), abs=1e-4)
    table = mib.beside_paper(areas, "ioi", "gpt2", "EAP").set_index("circuit")
    assert table.loc["EAP", "cpr_paper"] == 1.2 and table.loc["random", "cmd_paper"] == 0.75
    assert "(in the paper 1.20)" in mib.answer({"areas": table.reset_index()})


def test_mib_says_that_it_needs_the_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    mib = importlib.import_module("experiments.mib")
    with pytest.raises(hk.errors.Unsupported, match="'mib-bench/ioi' is on the Hugging Face Hub"):
        mib.read_rows("ioi", "train")
