"""`hk.feature`: numbers and texts as a plain loop has them, promoted tokens by hand, clamps by a hook."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import TEXTS
from dictionaries import encode, random_weights, write

import hookkit as hk
from hookkit.errors import BadHook, EmptySelection, NotCaptured, OtherModel

SITE = "feat.resid_post.1"
CORPUS = [TEXTS[n % 3][5 * n % 31 : 5 * n % 31 + 3 + 11 * n % 60] for n in range(40)]
SMALL = {"batch_tokens": 64, "shard_size": 60, "progress": False}


@pytest.fixture(scope="module")
def lm(tmp_path_factory, llama) -> hk.LM:
    folder = write(tmp_path_factory.mktemp("sae"), "topk")
    return llama.with_dictionaries(hk.load_dictionary(folder), check=False)


@pytest.fixture(scope="module")
def dense(lm) -> list[torch.Tensor]:
    """All features of each text, by the formula, from plain transformers with a hook."""
    states = []
    layer = lm.model.model.layers[1]
    handle = layer.register_forward_hook(lambda _m, _a, output: states.append(output))
    with torch.no_grad():
        for text in CORPUS:
            lm.model(torch.tensor([lm.tokenizer.encode(text)]))
    handle.remove()
    values = [state[0] if isinstance(state, tuple) else state for state in states]
    return [encode(random_weights("topk"), one.flatten(0, -2), "topk") for one in values]


@pytest.fixture(scope="module")
def everything(lm) -> hk.types.FeatureReport:
    return hk.feature(lm, CORPUS, SITE, top=3, effects=2, progress=False)


def test_densities_means_and_histograms_are_those_of_a_loop(everything, dense):
    later = torch.cat([values[1:] for values in dense])
    summary = everything.summary
    assert summary["feature"].tolist() == list(range(96)) and everything.n_tokens == len(later)
    density = (later != 0).double().mean(0)
    assert summary["density"].tolist() == pytest.approx(density.tolist())
    assert summary["max"].tolist() == pytest.approx(later.amax(0).tolist(), abs=1e-4)
    counts = everything.tables["histogram"].groupby("feature")["count"].sum()
    assert counts.tolist() == (later != 0).sum(0).tolist()
    for number in (0, 31):
        active = later[:, number][later[:, number] > 0]
        assert summary["mean"][number] == pytest.approx(active.mean().item(), abs=1e-4)
        bins = everything.tables["histogram"].query(f"feature == {number}")
        expected = torch.histc(active, 20, 0, float(active.max()))
        assert (torch.tensor(bins["count"].tolist()) - expected).abs().sum() <= 2  # at an edge


def test_the_top_texts_are_those_of_a_loop_each_text_once(everything, dense, lm):
    examples = everything.tables["examples"]
    for number in range(96):
        best = []
        for text, values in enumerate(dense):
            column = values[1:, number]
            if len(column) and column.max() > 0:
                best.append((-float(column.max()), text, int(column.argmax()) + 1))
        best.sort()
        top = examples.query(f"feature == {number} and kind == 'top'")
        assert top["activation"].tolist() == pytest.approx([-b[0] for b in best[:3]], abs=1e-4)
        for row in top.to_dict("records"):
            ids = lm.tokenizer.encode(CORPUS[row["text"]])
            assert dense[row["text"]][row["pos"], number] == pytest.approx(
                row["activation"], abs=1e-4
            )
            assert row["token_id"] == ids[row["pos"]] and row["token"] in row["context"]
            start, end = max(0, row["pos"] - 16), row["pos"] + 9
            assert row["context"] == "".join(map(lm.string, ids[start:end]))
    sampled = examples.query("kind != 'top'")
    for row in sampled.to_dict("records"):
        value = float(dense[row["text"]][row["pos"], row["feature"]])
        assert value == pytest.approx(row["activation"], abs=1e-4) and value > 0
    assert len(sampled.groupby("kind")) == 5


def test_a_middle_quantile_is_the_median_where_few_tokens_are_active(everything, dense):
    later = torch.cat([values[1:] for values in dense])
    checked = 0
    for number in range(96):
        active = later[:, number][later[:, number] > 0]
        if 3 <= len(active) <= 100 and len(active) % 2:
            rows = everything.tables["examples"].query(f"feature == {number}")
            assert float(active.median()) == pytest.approx(
                min(rows["activation"], key=lambda x: abs(x - float(active.median()))), abs=1e-4
            )
            checked += 1
    assert checked > 3


def test_the_colours_are_the_activations_at_each_token(everything, dense, lm):
    example = everything.tables["examples"].query("feature == 4 and kind == 'top'").iloc[0]
    passage = everything.passages[4][0].passages[0]
    values = dense[example["text"]][:, 4]
    ids = lm.tokenizer.encode(CORPUS[example["text"]])
    start, end = max(0, example["pos"] - 16), example["pos"] + 9
    assert [text for text, _ in passage.tokens] == list(map(lm.string, ids[start:end]))
    assert passage.tokens[passage.focus][0] == example["token"]
    shares = (values[start:end] / values[1:].max()).clamp(min=0).tolist()
    largest = everything.summary["max"][4]
    expected = [share * float(values[1:].max()) / largest for share in shares]
    assert [share for _, share in passage.tokens] == pytest.approx(expected, abs=1e-4)


def test_a_harvest_gives_the_same_tables_whatever_its_shards(everything, lm, tmp_path):
    made = hk.harvest(lm, CORPUS, SITE, tmp_path, **SMALL)
    report = hk.feature(lm, made, SITE, top=3, effects=2, progress=False)
    assert len(made.shards) > 5
    for name, table in everything.tables.items():
        other = report.tables[name].drop(columns="row", errors="ignore")
        numbers = table.drop(columns="row", errors="ignore")
        torch.testing.assert_close(
            torch.tensor(numbers.select_dtypes("number").to_numpy(float)),
            torch.tensor(other.select_dtypes("number").to_numpy(float)),
            atol=1e-4,
            rtol=1e-4,
            equal_nan=True,
        )
    alone = hk.feature(lm, made, f"{SITE}.31", top=3, progress=False)
    assert alone.summary["feature"].tolist() == [31]
    for name in ("histogram", "examples", "logits", "nearest"):
        same = report.tables[name].query("feature == 31").reset_index(drop=True)
        pd.testing.assert_frame_equal(alone.tables[name], same)


def test_promoted_tokens_and_nearest_features_are_the_products_by_hand(everything, lm):
    weights = random_weights("topk")["W_dec"]
    root = lm.model
    direction = weights[31]
    scaled = direction / direction.square().mean().sqrt()
    logits = (root.lm_head.weight @ (root.model.norm.weight * scaled)).detach()
    table = everything.tables["logits"].query("feature == 31")
    assert table["kind"].tolist() == ["promoted"] * 3 + ["demoted"] * 3
    assert table["token_id"].tolist()[:3] == logits.topk(3).indices.tolist()
    assert table["token_id"].tolist()[3:] == (-logits).topk(3).indices.tolist()
    assert table["logit"].tolist()[0] == pytest.approx(float(logits.max()), rel=1e-3)
    unit = weights / weights.norm(dim=1, keepdim=True)
    cosines = unit @ unit[31]
    cosines[31] = -2
    near = everything.tables["nearest"].query("feature == 31")
    assert near["nearest"].tolist() == cosines.topk(5).indices.tolist()
    assert near["cosine"].tolist() == pytest.approx(cosines.topk(5).values.tolist(), abs=1e-5)


def test_the_effect_of_a_clamp_is_that_of_a_hand_written_hook(everything, lm, dense):
    weights = random_weights("topk")
    effects = everything.tables["effects"]
    assert set(effects["feature"]) == {0, 1}
    for row in effects.to_dict("records"):
        number = row["feature"]
        ids = lm.tokenizer.encode(CORPUS[row["text"]])
        prefix, came = ids[: row["pos"] + 1], ids[row["pos"] + 1]
        old = dense[row["text"]][row["pos"], number]
        new = 0.0 if row["edit"] == "to 0" else 2 * float(everything.summary["max"][number])
        added = (new - old) * weights["W_dec"][number]

        def change(_m, _a, output, added=added):
            hidden = output[0] if isinstance(output, tuple) else output
            hidden[:, -1] += added
            return output

        with torch.no_grad():
            before = lm.model(torch.tensor([prefix])).logits[0, -1].log_softmax(-1)
            handle = lm.model.model.layers[1].register_forward_hook(change)
            after = lm.model(torch.tensor([prefix])).logits[0, -1].log_softmax(-1)
            handle.remove()
        assert row["loss_delta"] == pytest.approx(float(before[came] - after[came]), abs=1e-4)
        kl = (before.exp() * (before - after)).sum()
        assert row["kl"] == pytest.approx(float(kl), abs=1e-4)
        token = row["token_id"]
        assert row["rank_after"] == 1 + int((after > after[token]).sum())
        assert row["control_kl_max"] >= row["control_kl"] >= 0


def test_a_page_has_a_part_for_each_feature_and_escapes_tokens(everything, lm, tmp_path):
    path = everything.write(tmp_path / "page")
    html = path.read_text()
    assert html.count('<ul class="passages">') == 20 and "--share: 100%" in html
    assert {"summary.csv", "examples.csv", "effects.csv"} <= {
        p.name for p in Path(path.parent).iterdir()
    }
    assert "- " in (path.parent / "README.md").read_text()
    assert "96 features" in repr(everything) and "96 features" in everything._repr_html_()


def test_what_has_no_feature_page_is_refused(lm, llama, tmp_path):
    with pytest.raises(BadHook, match="no feature"):
        hk.feature(lm, CORPUS, "resid_post.1", progress=False)
    with pytest.raises(EmptySelection, match="pos"):
        hk.feature(lm, ["T"], f"{SITE}.1", pos=slice(50, None), progress=False)
    made = hk.harvest(lm, CORPUS[:3], "resid_post.1", tmp_path / "a", **SMALL)
    with pytest.raises(NotCaptured, match="not harvested"):
        hk.feature(lm, made, f"{SITE}.1", progress=False)
    made = hk.harvest(lm, CORPUS[:3], SITE, tmp_path / "b", **SMALL)
    folder = write(tmp_path / "sae", "topk", random_weights("topk", seed=1))
    other = llama.with_dictionaries(hk.load_dictionary(folder), check=False)
    with pytest.raises(OtherModel, match="another dictionary"):
        hk.feature(other, made, f"{SITE}.1", progress=False)


def test_a_feature_that_is_never_active_and_a_site_without_logits(llama, tmp_path):
    weights = random_weights("jumprelu")
    weights["threshold"][5] = 1e9
    folder = write(tmp_path, "jumprelu", weights, metadata={})
    dictionary = hk.load_dictionary(folder, at="mlp_in.1")
    lm = llama.with_dictionaries(dictionary, check=False)
    report = hk.feature(lm, CORPUS[:4], ["feat.mlp_in.1.5", "feat.mlp_in.1.6"], progress=False)
    assert report.summary["density"][0] == 0 and report.summary["density"][1] > 0
    assert "residual stream" in report.missing["logits"]
    page = report.page().html()
    assert "active at none of" in page and "not available" in page
