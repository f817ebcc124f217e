"""Tables: columns, closed forms, and what is said of ties, padding rows and several positions."""

import math

import numpy as np
import pytest
import torch
from conftest import PROMPTS, tiny
from torch.nn import functional as F

import hookkit as hk
from hookkit.errors import EmptySelection, NotCaptured, NotOneToken, OutOfRange, UnknownKeyword

RANKS = ["row", "pos", "token", "token_id", "logit", "logprob", "prob", "rank"]
NAMES = ("logit", "logprob", "prob", "rank")
SHIFT = [
    "row",
    "pos",
    "token",
    "token_id",
    *(f"{n}_{w}" for n in NAMES for w in ("before", "after", "delta")),
    "why",
]
SUMMARY = ["row", "pos", "kl", "kl_reverse", "js", "tv", "entropy_before", "entropy_after", "entropy_delta", "margin_before",
           "margin_after", "margin_delta", "top1_before", "top1_after", "top1_changed", "top_overlap"]  # fmt: skip
SURE = [
    "row",
    "pos",
    "read",
    "entropy",
    "varentropy",
    "perplexity",
    "margin",
    "prob_margin",
    "top1",
    "top1_prob",
    "nucleus_90",
    "top2",
    "top2_prob",
    "scenario",
]


@pytest.fixture(scope="module")
def runs(llama):
    return hk.forward(llama, PROMPTS), hk.forward(
        llama, PROMPTS, hk.steer("resid_post.1", torch.ones(32)), hk.boost(7, by=3.0)
    )


def test_columns_are_as_documented(runs):
    before, after = runs
    assert list(hk.ranks(before).columns) == RANKS
    assert list(hk.rank_shift(before, after).columns) == SHIFT
    assert list(hk.stats.shift_summary(before, after).columns) == SUMMARY
    assert list(hk.uncertainty(before).columns) == SURE


def test_ranks_are_a_full_sort_and_probabilities_a_softmax(runs):
    before, _ = runs
    table = hk.ranks(before, rows=0, top=None)
    logits = before.logits[0, before.lengths[0] - 1]
    assert (
        table["token_id"].tolist() == torch.argsort(logits, descending=True, stable=True).tolist()
    )
    assert table["rank"].tolist() == list(range(1, 321))
    assert table["prob"].sum() == pytest.approx(1, abs=1e-6)
    assert np.allclose(
        table["logprob"], F.log_softmax(logits, -1)[torch.tensor(table["token_id"].tolist())]
    )
    assert table["pos"].unique().tolist() == [before.lengths[0] - 1]


def test_each_row_of_the_batch_is_read_at_its_own_last_token(runs):
    before, _ = runs
    table = hk.ranks(before, top=2)
    assert table.groupby("row").size().tolist() == [2, 2, 2]
    assert table.groupby("row")["pos"].first().tolist() == [length - 1 for length in before.lengths]
    for row, length in enumerate(before.lengths):
        best = before.logits[row, length - 1].topk(2).indices.tolist()
        assert table[table["row"] == row]["token_id"].tolist() == best


def test_watched_tokens_are_in_the_table_wherever_they_stand(smol):
    table = hk.ranks(hk.forward(smol, "I like oat milk in my"), top=2, watch=[" Paris", 6728])
    logits = hk.forward(smol, "I like oat milk in my").logits[0, -1]
    assert table["token"].tolist() == [" coffee", " morning", " Paris"]
    assert table["rank"].iloc[2] == int((logits > logits[smol.token(" Paris")]).sum()) + 1
    with pytest.raises(NotOneToken, match="'oat milk' is 2 tokens"):
        hk.ranks(hk.forward(smol, "Tea"), watch="oat milk")


def test_equal_logits_share_a_rank(llama):
    run = hk.forward(
        llama,
        "Tea",
        hk.edit("logits", lambda x: torch.cat([torch.full_like(x[..., :3], 50.0), x[..., 3:]], -1)),
    )
    table = hk.ranks(run, top=4)
    assert table["rank"].tolist() == [1, 1, 1, 4]
    assert table["token_id"].tolist()[:3] == [0, 1, 2]


def test_rows_of_the_vocabulary_without_a_token_are_never_ranked(small_tokenizer):
    model = tiny("llama")
    wide = tiny("llama")
    wide.resize_token_embeddings(330)
    assert model.config.vocab_size == 320
    lm = hk.LM(wide.eval(), small_tokenizer)
    assert (lm.sizes["vocab"], lm.n_tokens) == (330, 320)
    run = hk.forward(
        lm,
        "Tea",
        hk.edit(
            "logits", lambda x: torch.cat([x[..., :325], torch.full_like(x[..., 325:], 99.0)], -1)
        ),
    )
    table = hk.ranks(run, top=None)
    assert table["token_id"].max() == 319
    assert table["rank"].min() == 1
    assert table["prob"].sum() < 1e-6, (
        "the padding rows hold the probability, as they would in decoding"
    )
    assert lm.string(325) == "<unused 325>"
    with pytest.raises(Exception, match="token 325 is a row of the vocabulary without a token"):
        hk.forward(lm, "Tea", hk.set_rank(325, 2))


def test_a_shift_is_after_minus_before_and_positive_for_a_token_that_rose(runs):
    before, after = runs
    table = hk.rank_shift(before, after, rows=0, watch=9)
    for name in NAMES:
        assert np.allclose(table[f"{name}_delta"], table[f"{name}_after"] - table[f"{name}_before"])
    assert (table["rank_delta"] == table["rank_after"] - table["rank_before"]).all()
    for when, run in (("before", before), ("after", after)):
        logits = run.logits[0, run.lengths[0] - 1]
        assert np.allclose(table[f"logit_{when}"], logits[torch.tensor(table["token_id"].tolist())])
        ranks = [int((logits > logits[token]).sum()) + 1 for token in table["token_id"]]
        assert table[f"rank_{when}"].tolist() == ranks


def test_why_tells_how_a_token_came_into_the_table(runs):
    before, after = runs
    table = hk.rank_shift(before, after, rows=0, top=3, movers=2, watch=9).set_index("token_id")
    first = {
        when: run.logits[0, run.lengths[0] - 1].topk(3).indices.tolist()
        for when, run in (("before", before), ("after", after))
    }
    for when, ids in first.items():
        assert {token for token, why in table["why"].items() if f"top {when}" in why} == set(ids)
    assert "watched" in table.loc[9, "why"]
    assert "edited" in table.loc[7, "why"]
    everything = hk.rank_shift(before, after, rows=0, top=320, movers=0).set_index("token_id")
    factor = np.log(everything["rank_before"]) - np.log(everything["rank_after"])
    movers = {token for token, why in table["why"].items() if "mover" in why}
    assert movers == {*factor.nlargest(2).index, *factor.nsmallest(2).index}


def test_a_token_that_did_not_move_is_no_mover(runs):
    before, _ = runs
    assert not hk.rank_shift(before, before)["why"].str.contains("mover").any()


def test_a_banned_token_stands_last_with_an_infinite_delta(llama):
    before, after = hk.forward(llama, "Tea"), hk.forward(llama, "Tea", hk.ban(5))
    row = hk.rank_shift(before, after).set_index("token_id").loc[5]
    assert (row["logit_after"], row["logprob_delta"], row["prob_after"], row["rank_after"]) == (
        -math.inf,
        -math.inf,
        0,
        320,
    )
    again = hk.rank_shift(after, after).set_index("token_id").loc[5]
    assert again["logit_delta"] == again["logprob_delta"] == 0


def test_divergences_are_their_closed_forms(runs):
    before, after = runs
    table = hk.stats.shift_summary(before, after)
    for row, length in enumerate(before.lengths):
        p, q = (run.logits[row, length - 1].double().softmax(-1) for run in runs)
        middle = (p + q) / 2
        expected = {
            "kl": F.kl_div(q.log(), p, reduction="sum"),
            "kl_reverse": F.kl_div(p.log(), q, reduction="sum"),
            "js": (
                F.kl_div(middle.log(), p, reduction="sum")
                + F.kl_div(middle.log(), q, reduction="sum")
            )
            / 2,
            "tv": (p - q).abs().sum() / 2,
            "entropy_before": torch.distributions.Categorical(p).entropy(),
            "entropy_after": torch.distributions.Categorical(q).entropy(),
        }
        for name, value in expected.items():
            assert table[name][row] == pytest.approx(float(value), abs=1e-5), name
        assert table["top1_changed"][row] == bool(p.argmax() != q.argmax())
        assert table["top_overlap"][row] == len(
            {*p.topk(10).indices.tolist()} & {*q.topk(10).indices.tolist()}
        )


def test_a_summary_of_a_ban_is_infinite_one_way_and_finite_the_other(llama):
    before, after = hk.forward(llama, "Tea"), hk.forward(llama, "Tea", hk.ban(5))
    row = hk.stats.shift_summary(before, after).iloc[0]
    p = before.logits[0, -1].softmax(-1)[5]
    assert row["kl"] == math.inf
    assert row["kl_reverse"] == pytest.approx(float(-torch.log1p(-p)), rel=1e-3)
    assert 0 < row["js"] <= math.log(2)
    assert row["tv"] == pytest.approx(float(p), rel=1e-3)


def test_a_run_beside_itself_has_moved_nowhere(runs):
    row = hk.stats.shift_summary(runs[0], runs[0]).iloc[0]
    assert row[
        ["kl", "kl_reverse", "js", "tv", "entropy_delta", "margin_delta"]
    ].tolist() == pytest.approx([0] * 6, abs=1e-15)
    assert not row["top1_changed"]


def test_uncertainty_is_its_closed_form(llama):
    def shaped(x):
        x = x.clone()
        x[..., 0, :] = 0  # an even choice among 320
        x[..., 1, :] = -torch.inf
        x[..., 1, 4] = 3  # certain
        x[..., 2, :] = -torch.inf
        x[..., 2, :2] = torch.tensor([math.log(3.0), 0.0])  # 3/4 and 1/4
        return x

    ids = [[5, 6, 7]]
    run = hk.forward(llama, ids, hk.edit("logits", shaped, pos=slice(0, None), step=None))
    even, certain, odds = (row for _, row in hk.uncertainty(run).iterrows())
    assert (even["entropy"], even["varentropy"], even["perplexity"]) == pytest.approx(
        (math.log(320), 0, 320), abs=1e-4
    )
    assert even["nucleus_90"] == 288
    assert (
        certain["entropy"],
        certain["varentropy"],
        certain["perplexity"],
        certain["nucleus_90"],
    ) == (0, 0, 1, 1)
    assert certain["margin"] == math.inf
    h = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    v = 0.75 * (-math.log(0.75) - h) ** 2 + 0.25 * (-math.log(0.25) - h) ** 2
    assert (odds["entropy"], odds["varentropy"]) == pytest.approx((h, v), abs=1e-6)
    assert (odds["margin"], odds["prob_margin"], odds["top1_prob"]) == pytest.approx(
        (math.log(3), 0.5, 0.75), abs=1e-6
    )
    assert odds["read"] == llama.string(7)


def test_tables_of_a_generate_go_by_step_and_position(lm):
    run = hk.generate(lm, PROMPTS[:2], max_new_tokens=3, do_sample=False, eos_token_id=None)
    table = hk.ranks(run, step=2, top=1)
    assert table["step"].tolist() == [2, 2]
    for row, start in enumerate(run.prompt_lengths):
        assert table["pos"][row] == start + 1
        assert table["token_id"][row] == int(run.tokens[row, start + 2])
    assert hk.uncertainty(run).groupby("row").size().tolist() == [3, 3]
    assert hk.ranks(run, top=1)["pos"].tolist() == [length - 1 for length in run.prompt_lengths]
    steps = hk.stats.shift_summary(run, run, step=slice(0, None))
    assert steps["step"].tolist() == [0, 1, 2, 0, 1, 2]


def test_positions_are_taken_in_each_runs_own_text(llama):
    short, long = hk.forward(llama, PROMPTS[1]), hk.forward(llama, PROMPTS[2])
    table = hk.rank_shift(short, long)
    assert table["pos"].unique().tolist() == [long.lengths[0] - 1]
    assert np.allclose(
        table["logit_before"], short.logits[0, -1][torch.tensor(table["token_id"].tolist())]
    )


@pytest.mark.parametrize(
    ("ask", "error", "words"),
    [
        (
            lambda a, b: hk.ranks(a, pos=99),
            OutOfRange,
            r"pos=99 was asked for in row 0, where this run has logits at positions 0 to \d+",
        ),
        (lambda a, b: hk.ranks(a, step=1), OutOfRange, "step=1 was asked for in row 0"),
        (lambda a, b: hk.ranks(a, pos=1, step=1), EmptySelection, "were both given"),
        (
            lambda a, b: hk.ranks(a, top=0),
            OutOfRange,
            "top=0: give how many tokens to show, at least 1",
        ),
        (
            lambda a, b: hk.ranks(a, position=1),
            UnknownKeyword,
            r"ranks\(\) has no keyword 'position'; did you mean 'pos'",
        ),
        (
            lambda a, b: hk.ranks(a, rows=5),
            OutOfRange,
            "row 5 was asked for, and the batch has 3 rows",
        ),
        (
            lambda a, b: hk.rank_shift(a, b),
            OutOfRange,
            "the runs have 3 and 1 positions to compare",
        ),
        (
            lambda a, b: hk.uncertainty(hk.forward(a.lm, "Tea", hk.capture("embed"), logits=False)),
            NotCaptured,
            "kept no logits",
        ),
    ],
)
def test_a_table_that_cannot_be_made_is_refused(llama, runs, ask, error, words):
    with pytest.raises(error, match=words):
        ask(runs[0], hk.forward(llama, "Tea"))
