"""How sure: scenarios, warped distributions and calibration, against closed forms and transformers' own sampling."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import PROMPTS, TEXTS

import hookkit as hk
from hookkit.errors import BadHook, EmptySelection, OutOfRange, UnknownKeyword
from hookkit.tables.distributions import scenario

WARPED = [
    "row",
    "pos",
    "setting",
    "token",
    "token_id",
    "prob",
    "rank",
    "kept",
    "tokens_kept",
    "entropy",
    "perplexity",
]
BINS = ["bin", "low", "high", "count", "confidence", "accuracy", "gap", "error"]

SCENARIOS = {"very confident", "two good options", "one clear winner", "uncertain"}


def saying(lm: hk.LM, *probs: float) -> hk.types.Run:
    """A run whose last position gives the first tokens these probabilities, and the others nothing."""

    def shaped(logits):
        new = torch.full_like(logits, -torch.inf)
        new[..., : len(probs)] = torch.tensor(probs).log()
        return new

    return hk.forward(lm, [[5, 6, 7]], hk.edit("logits", shaped, pos=-1, step=None))


@pytest.mark.parametrize(
    ("probs", "name"),
    [
        ((0.91, 0.09), "very confident"),
        ((0.89, 0.11), "one clear winner"),
        ((0.5, 0.24, 0.26), "two good options"),
        ((0.52, 0.2, 0.18, 0.1), "one clear winner"),
        ((0.45, 0.4, 0.15), "two good options"),
        ((0.4, 0.25, 0.2, 0.15), "two good options"),
        ((0.3, 0.29, 0.21, 0.2), "uncertain"),
        ((0.49, 0.2, 0.2, 0.11), "uncertain"),
    ],
)
def test_a_position_is_named_by_its_two_likeliest_tokens(llama, probs, name):
    (row,) = hk.uncertainty(saying(llama, *probs), pos=-1).to_dict("records")
    first, second = sorted(probs)[::-1][:2]
    assert row["scenario"] == name
    assert (row["top1_prob"], row["top2_prob"]) == pytest.approx((first, second), abs=1e-6)
    assert row["top2"] == llama.string(sorted(range(len(probs)), key=lambda i: (-probs[i], i))[1])


def test_the_thresholds_belong_to_the_surer_name():
    assert [scenario(*pair) for pair in ((0.9, 0.0), (0.6, 0.3), (0.4, 0.2), (0.5, 0.0))] == [
        "very confident", "two good options", "two good options", "one clear winner"
    ]  # fmt: skip
    assert {
        scenario(a / 100, b / 100) for a in range(101) for b in range(min(a, 100 - a) + 1)
    } == SCENARIOS


def test_a_text_has_positions_of_several_scenarios(smol):
    found = hk.uncertainty(hk.forward(smol, [*PROMPTS, *TEXTS]))["scenario"]
    assert set(found) == SCENARIOS


def test_temperature_is_its_closed_form_and_changes_no_rank(llama):
    run = hk.forward(llama, PROMPTS)
    table = hk.sampling_distributions(run, temperature=(0.5, 1, 2), top=320)
    assert list(table.columns) == WARPED
    for row, length in enumerate(run.lengths):
        logits = run.logits[row, length - 1].double()
        for value in (0.5, 1, 2):
            mine = table[(table["row"] == row) & (table["setting"] == f"temperature={value:g}")]
            probs = (logits / value).softmax(-1)
            assert mine["prob"].tolist() == pytest.approx(
                probs[torch.tensor(mine["token_id"].tolist())].tolist(), abs=1e-6
            )
            assert (
                mine["rank"].tolist()
                == table[table["setting"] == "as it is"]["rank"].tolist()[:320]
            )
            entropy = float(-(probs * probs.log()).sum())
            assert mine["entropy"].iloc[0] == pytest.approx(entropy, abs=1e-5)
            assert mine["perplexity"].iloc[0] == pytest.approx(math.exp(entropy), rel=1e-5)
    as_it_is, one = (
        table[table["setting"] == name]["prob"].tolist() for name in ("as it is", "temperature=1")
    )
    assert as_it_is == one


def test_top_k_and_top_p_keep_what_they_say_and_share_it_out(llama):
    run = saying(llama, 0.5, 0.3, 0.15, 0.05)
    table = hk.sampling_distributions(run, top_k=(1, 2, 9), top_p=(0.4, 0.75, 0.85, 1.0), top=4)
    expected = {
        "as it is": (0.5, 0.3, 0.15, 0.05), "top_k=1": (1, 0, 0, 0), "top_k=2": (0.625, 0.375, 0, 0),
        "top_k=9": (0.5, 0.3, 0.15, 0.05), "top_p=0.4": (1, 0, 0, 0), "top_p=0.75": (0.625, 0.375, 0, 0),
        "top_p=0.85": (0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0), "top_p=1": (0.5, 0.3, 0.15, 0.05),
    }  # fmt: skip
    assert dict.fromkeys(table["setting"]) == dict.fromkeys(expected)
    for name, probs in expected.items():
        mine = table[table["setting"] == name]
        kept = [prob > 0 for prob in probs]
        assert mine["prob"].tolist() == pytest.approx(probs, abs=1e-6)
        assert mine["kept"].tolist() == kept and set(mine["tokens_kept"]) == {sum(kept)}
        assert mine["rank"].tolist() == [
            n + 1 if there else sum(kept) + 1 for n, there in enumerate(kept)
        ]
    certain = table[table["setting"] == "top_k=1"]["entropy"].iloc[0]
    assert certain == 0 and math.copysign(1, certain) == 1


@pytest.mark.parametrize("rules", [{"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.6}])
def test_a_warped_distribution_is_what_generate_draws_from(llama, rules):
    words = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "do_sample": True} | rules
    output = llama.model.generate(
        torch.tensor([llama.tokenizer.encode(PROMPTS[0])]), max_new_tokens=1, return_dict_in_generate=True,
        output_scores=True, eos_token_id=None, pad_token_id=0, **words
    )  # fmt: skip
    probs = output.scores[0][0].softmax(-1)
    table = hk.sampling_distributions(hk.forward(llama, PROMPTS[0]), **rules, top=320)
    mine = table[table["setting"] != "as it is"]
    assert mine["prob"].tolist() == pytest.approx(
        probs[torch.tensor(mine["token_id"].tolist())].tolist(), abs=1e-6
    )
    assert set(mine["tokens_kept"]) == {int((probs > 0).sum())}


@pytest.mark.parametrize(
    ("words", "error", "said"),
    [
        ({}, BadHook, "no setting was given: say temperature="),
        (
            {"temperature": 0},
            BadHook,
            r"temperature=0: give a temperature \(greedy is top_k=1\), above 0",
        ),
        ({"temperature": "hot"}, BadHook, "temperature='hot'"),
        ({"top_k": 0}, BadHook, "top_k=0: give how many tokens, at least 1"),
        ({"top_k": 2.5}, BadHook, "top_k=2.5"),
        ({"top_p": 1.5}, BadHook, "top_p=1.5: give a probability above 0 and at most 1"),
        ({"top_p": 0.5, "top": 0}, OutOfRange, "top=0: give how many tokens to show"),
        ({"top_p": 0.5, "pos": 99}, OutOfRange, "pos=99 was asked for in row 0"),
        ({"min_p": 0.5}, UnknownKeyword, r"sampling_distributions\(\) has no keyword 'min_p'"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(llama, words, error, said):
    with pytest.raises(error, match=said):
        hk.sampling_distributions(hk.forward(llama, PROMPTS[0]), **words)


def test_calibration_is_counted_as_by_hand():
    sure, right = [0.0, 0.1, 0.15, 0.55, 0.6, 0.95, 1.0, 1.0], [0, 1, 0, 1, 0, 1, 1, 0]
    table = hk.stats.calibration(sure, right)
    assert list(table.columns) == BINS and table["bin"].tolist() == list(range(10))
    assert table["count"].tolist() == [2, 1, 0, 0, 0, 2, 0, 0, 0, 3]
    assert table["accuracy"][[0, 1, 5, 9]].tolist() == pytest.approx([0.5, 0, 0.5, 2 / 3])
    assert table["confidence"][[0, 1, 5, 9]].tolist() == pytest.approx(
        [0.05, 0.15, 0.575, 2.95 / 3]
    )
    assert table["gap"][[0, 9]].tolist() == pytest.approx([-0.45, 0.95 / 3]) and math.isnan(
        table["gap"][2]
    )
    by_hand = (2 * 0.45 + 1 * 0.15 + 2 * 0.075 + 3 * 0.95 / 3) / 8
    assert table.attrs["ece"] == pytest.approx(by_hand) and table["error"].sum() == pytest.approx(
        by_hand
    )


def test_a_confidence_that_is_a_probability_has_no_calibration_error():
    generator = np.random.default_rng(0)
    sure = generator.uniform(size=200_000)
    right = generator.uniform(size=200_000) < sure
    assert hk.stats.calibration(sure, right, bins=15).attrs["ece"] < 0.01
    assert hk.stats.calibration(np.ones(10), np.zeros(10), bins=3).attrs["ece"] == 1
    assert (
        hk.stats.calibration(pd.Series([0.25] * 4), [True, False, False, False]).attrs["ece"] == 0
    )


def test_roc_is_the_part_of_pairs_that_are_in_order():
    generator = np.random.default_rng(1)
    right = generator.uniform(size=60) < 0.4
    score = np.round(generator.normal(size=60) + right, 1)  # with ties
    pairs = [(a > b) + (a == b) / 2 for a in score[right] for b in score[~right]]
    table = hk.stats.roc(score, right)
    assert table.attrs["auc"] == pytest.approx(np.mean(pairs))
    assert table.iloc[0].tolist() == [math.inf, 0, 0] and table.iloc[-1].tolist()[1:] == [1, 1]
    for threshold, false, true in table.itertuples(index=False, name=None):
        assert (false, true) == pytest.approx(
            ((score[~right] >= threshold).mean(), (score[right] >= threshold).mean())
        )
    assert hk.stats.roc(-score, right).attrs["auc"] == pytest.approx(1 - np.mean(pairs))
    assert hk.stats.roc([1, 1, 1], [1, 0, 0]).attrs["auc"] == 0.5


def test_roc_is_that_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(2)
    right, score = generator.uniform(size=80) < 0.5, np.round(generator.normal(size=80), 1)
    false, true, thresholds = metrics.roc_curve(right, score, drop_intermediate=False)
    table = hk.stats.roc(score, right)
    assert table.to_numpy().tolist() == np.stack([thresholds, false, true], 1).tolist()
    assert table.attrs["auc"] == pytest.approx(metrics.roc_auc_score(right, score))


@pytest.mark.parametrize(
    ("ask", "error", "said"),
    [
        (
            lambda: hk.stats.calibration([0.5, 1.2], [1, 0]),
            OutOfRange,
            "a probability, 0 to 1, and one is 1.2",
        ),
        (lambda: hk.stats.calibration([0.5], [1, 0]), BadHook, "there are 1 numbers and 2 answers"),
        (
            lambda: hk.stats.calibration([0.5], ["Paris"]),
            BadHook,
            "True or False, and one is 'Paris'",
        ),
        (lambda: hk.stats.calibration([], []), EmptySelection, "there is no answer to judge"),
        (lambda: hk.stats.calibration([math.nan], [1]), OutOfRange, "number 0 is NaN"),
        (
            lambda: hk.stats.calibration([0.5], [1], bins=0),
            OutOfRange,
            "bins=0: give how many bins",
        ),
        (
            lambda: hk.stats.roc([0.5, 0.6], [1, 1]),
            EmptySelection,
            "all 2 answers are right, so there is nothing to tell",
        ),
        (
            lambda: hk.figures.reliability_diagram(hk.stats.roc([1, 2], [0, 1])),
            BadHook,
            "drawn from calibration",
        ),
        (lambda: hk.figures.roc_curves({}), EmptySelection, "there is no curve to draw"),
        (
            lambda: hk.figures.roc_curves({"a": pd.DataFrame()}),
            BadHook,
            r"drawn from roc\(score, right\)",
        ),
        (
            lambda: hk.figures.surprisal_strip(pd.DataFrame({"row": [0]})),
            BadHook,
            "has no column 'pos'",
        ),
    ],
)
def test_what_cannot_be_judged_is_refused(ask, error, said):
    with pytest.raises(error, match=said):
        ask()


def test_the_figures_say_what_the_tables_say(llama):
    sure, right = [0.15, 0.55, 0.6, 0.95], [False, True, False, True]
    calibrated = hk.stats.calibration(sure, right)
    reliability = hk.figures.reliability_diagram(calibrated)
    above, below = reliability.axes
    below_title = reliability.texts[-1].get_text()
    assert f"error {calibrated.attrs['ece']:.3f}" in below_title and "4 answers" in below_title
    assert [bar.get_height() for bar in above.patches[:3]] == pytest.approx([0, 0.5, 1])
    assert sum(bar.get_height() for bar in below.patches) == 4
    curves = hk.figures.roc_curves(
        {"router": hk.stats.roc(sure, right), "other": hk.stats.roc([1, 1, 1, 1], right)}
    )
    labels = [line.get_label() for line in curves.axes[0].lines]
    # Hanley & McNeil for two right and two wrong answers: sqrt((0.1875 + 0.6 - 0.5625 +
    # 1.125 / 1.75 - 0.5625) / 4) = 0.276, and 0.75 - 1.96 * 0.276 = 0.21.
    assert labels == [
        "chance: 0.500",
        "router: 0.750 (0.21 to 1.00)",
        "other: 0.500 (0.00 to 1.00)",
    ]
    run = hk.forward(llama, TEXTS)
    table = hk.surprisal(run)
    strip = hk.figures.surprisal_strip(table, row=1)
    written = [text.get_text() for text in strip.axes[0].texts]
    assert len(written) == 3 * int((table["row"] == 1).sum()) + 1  # and the caption
    assert f"{table[table['row'] == 1]['loss'].iloc[0]:.1f}" in written
    with pytest.raises(OutOfRange, match="row 7 is not in the table, which has rows"):
        hk.figures.surprisal_strip(table, row=7)
    with pytest.raises(OutOfRange, match="has 1,200 tokens, and 600 can be read"):
        hk.figures.surprisal_strip(pd.concat([table[table["row"] == 0].head(1)] * 1200))
