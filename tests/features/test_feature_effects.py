"""What features do to a logit: by ablation, by gradients, and as parts that add up."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from dictionaries import random_weights, write

import hookkit as hk
from hookkit.errors import BadHook

CLEAN = [(5, 6, 7, 8, 9), (10, 11, 12, 13, 14)]
CORRUPTED = [(5, 6, 17, 8, 9), (10, 31, 12, 13, 14)]
SITE = "feat.resid_post.1"
METRIC = hk.metrics.logit_diff(7, 9)


def with_dictionaries(family: str, folder: Path) -> hk.LM:
    """A model with a jumprelu dictionary of its stream and a topk dictionary of an MLP's output."""
    stream = hk.load_dictionary(write(folder / "stream", "jumprelu"))
    mlp = write(
        folder / "mlp",
        "topk",
        random_weights("topk", seed=1),
        normalize_activations="layer_norm",
        metadata={"hook_name": "blocks.2.hook_mlp_out"},
    )
    return hk.tiny(family).with_dictionaries(stream, hk.load_dictionary(mlp), check=False)


@pytest.fixture(scope="module")
def lm(tmp_path_factory) -> hk.LM:
    return with_dictionaries("llama", tmp_path_factory.mktemp("features"))


def test_an_ablation_of_each_feature_is_a_forward_without_it(lm):
    active = hk.forward(lm, CLEAN, hk.capture(SITE))[SITE].amax((0, 1)).topk(4).indices.tolist()
    table = hk.ablations(
        lm, CLEAN, "feat.resid_post", METRIC, layers=[1], units=active, progress=False
    )
    for unit, row, value in zip(table["unit"], table["row"], table["logit_diff"], strict=True):
        logits = hk.forward(lm, CLEAN, hk.ablate(f"{SITE}.{unit}")).logits[row, -1]
        assert value == pytest.approx(float(logits[7] - logits[9]), abs=1e-4)
    both = hk.sweep(
        lm,
        CLEAN,
        {"dose": [0.0, 4.0]},
        lambda dose: [hk.steer(f"{SITE}.3", dose), hk.ablate("feat.mlp_out.2", units=[1, 2])],
        METRIC,
        progress=False,
    )
    hooks = [hk.steer(f"{SITE}.3", 4.0), hk.ablate("feat.mlp_out.2", units=[1, 2])]
    logits = hk.forward(lm, CLEAN, *hooks).logits[:, -1]
    expected = (logits[:, 7] - logits[:, 9]).tolist()
    assert both.query("dose == 4")["logit_diff"].tolist() == pytest.approx(expected, abs=1e-4)


def test_attribution_of_each_feature_agrees_with_patching_it(lm):
    settings = {"layers": [1], "pos": [-1]}
    estimate = hk.attribution(
        lm, CLEAN, CORRUPTED, "feat.resid_post", METRIC, by="neuron", **settings
    )
    moved = estimate.query("logit_diff_delta != 0")["unit"].dropna().unique().tolist()
    source = hk.forward(lm, CLEAN, hk.capture(SITE))
    truth = hk.sweep(
        lm,
        CORRUPTED,
        {"layer": [1], "pos": [-1], "unit": moved},
        lambda layer, pos, unit: hk.patch(SITE, source, units=[unit], pos=pos),
        METRIC,
        target=CLEAN,
        progress=False,
    )
    agreement = hk.stats.compare_attributions(estimate.dropna(subset="unit"), truth)
    assert agreement["pearson"].item() > 0.95 and agreement["n"].item() == len(truth)
    # with the error, all of what the site does is divided
    whole = hk.attribution(lm, CLEAN, CORRUPTED, "resid_post", METRIC, **settings)
    total = estimate.groupby("row")["logit_diff_delta"].sum()
    pd.testing.assert_series_equal(
        total.reset_index(drop=True), whole["logit_diff_delta"], check_names=False, rtol=1e-5
    )
    assert estimate["unit"].isna().sum() == 2


def test_the_direct_share_of_a_feature_is_its_decoder_row_through_norm_and_head(tmp_path):
    lm = with_dictionaries("llama", tmp_path)
    last = lm.n_layers - 1
    folder = write(tmp_path / "last", metadata={"hook_name": f"blocks.{last}.hook_resid_post"})
    lm = lm.with_dictionaries(hk.load_dictionary(folder), check=False)
    site = f"feat.resid_post.{last}"
    run = hk.forward(lm, CLEAN, hk.capture([site, f"resid_post.{last}"]))
    table = hk.direct_logits(run, 7, features=site).query("kind == 'feature' and row == 0")
    x, f = run[f"resid_post.{last}"][0, -1], run[site][0, -1]
    norm, head = lm.root.model.norm, lm.root.lm_head
    scale = torch.rsqrt(x.square().mean() + norm.variance_epsilon)
    directions = lm.dictionaries[2].weights["W_dec"]
    expected = f * (directions * scale * norm.weight @ head.weight[7]).detach()
    for unit, logit in zip(table["neuron"], table["logit"], strict=True):
        assert logit == pytest.approx(float(expected[unit]), abs=1e-4)
    assert set(table["neuron"]) == set(f.nonzero().flatten().tolist())


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_features_and_error_sum_to_the_logit(family, tmp_path):
    lm = with_dictionaries(family, tmp_path)
    run = hk.forward(lm, [CLEAN[0], CLEAN[1][:3]], hk.ablate(f"{SITE}.3"))
    expected = [float(run.logits[0, 4, 7]), float(run.logits[1, 2, 7])]
    for features in (SITE, "feat.mlp_out.2", [SITE, "feat.mlp_out.2"]):
        table = hk.direct_logits(run, 7, features=features)
        assert table.groupby("row")["logit"].sum().tolist() == pytest.approx(expected, abs=1e-4)
        assert abs(table.attrs["residual"]) < 1e-4
        assert {"feature", "error", "bias"} <= set(table["kind"])
    dropped = {"embedding", "attention"} & set(table.query("layer < 2")["kind"].dropna())
    assert not dropped and "embed" not in set(table["component"])


def test_parts_that_would_be_counted_twice_are_refused(lm, tmp_path):
    early = write(tmp_path / "early", metadata={"hook_name": "blocks.1.hook_mlp_out"})
    middle = write(tmp_path / "middle", metadata={"hook_name": "blocks.1.hook_resid_mid"})
    lm = lm.with_dictionaries(*map(hk.load_dictionary, (early, middle)), check=False)
    run = hk.forward(lm, CLEAN)
    with pytest.raises(BadHook, match="stand in place of everything before"):
        hk.direct_logits(run, 7, features=[SITE, "feat.mlp_out.1"])
    for features in ("feat.resid_mid.1", f"{SITE}.3", "resid_post.1"):
        with pytest.raises(BadHook, match="all features of a dictionary"):
            hk.direct_logits(run, 7, features=features)


def test_a_gradient_at_features_leaves_the_gradients_before_them_as_they_are(lm):
    plain = hk.gradients(lm, CLEAN, METRIC, ["resid_pre.1", "resid_post.1"])
    result = hk.gradients(lm, CLEAN, METRIC, ["resid_pre.1", SITE])
    torch.testing.assert_close(result.of("resid_pre.1"), plain.of("resid_pre.1"))
    directions = lm.dictionaries[0].weights["W_dec"]
    torch.testing.assert_close(result.of(SITE), plain.of("resid_post.1") @ directions.T)


def test_a_shift_report_says_which_features_moved_the_token(lm):
    edit = hk.scale(f"{SITE}.3", 3.0)
    report = hk.shift_report(lm, list(CLEAN), edit, watch=7)
    table = report.tables["features"]
    for name, hooks in (("before", []), ("after", [edit])):
        run = hk.forward(lm, CLEAN, *hooks)
        first = table.groupby("row")[f"logit_{name}"].sum() / len(lm.dictionaries)
        assert first.tolist() == pytest.approx(run.logits[:, -1, 7].tolist(), abs=1e-3)
    assert {"feature", "error"} <= set(table["kind"])
    tripled = table[(table["component"] == f"{SITE}.3") & (table["row"] == 0)].iloc[0]
    direct = hk.direct_logits(hk.forward(lm, CLEAN, edit), 7, features=SITE)
    expected = direct[(direct["component"] == f"{SITE}.3") & (direct["row"] == 0)]["logit"].item()
    assert tripled["logit_after"] == pytest.approx(expected, abs=1e-5)
    assert "Which features moved it" in report.html()
    plain = hk.shift_report(hk.tiny("llama"), list(CLEAN), hk.ban(9), watch=7)
    assert "features" not in plain.tables and "Which features" not in plain.html()
