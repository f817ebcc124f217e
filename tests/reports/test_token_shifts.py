"""Token shifts over a corpus: every number is that of plain transformers, however the texts are batched or interrupted."""

import copy
import os
import random
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

import hookkit as hk
from hookkit.errors import (
    BadEdit,
    BadHook,
    BadPrompt,
    EmptySelection,
    HarvestChanged,
    OtherVocabulary,
)
from hookkit.reports.shift import token_shifts as module
from hookkit.reports.shift.logit_changes import measure_changes, most_changed, ranks_of_all
from hookkit.tables.intervals import Clusters, clustered_means, clustered_shares, further_draws

QUIET = {"progress": False, "batch_tokens": 64}


def rows(count: int = 40, most: int = 24, seed: int = 0) -> list[list[int]]:
    """Rows of token ids, 1 to `most` of them."""
    drawn = random.Random(seed)
    return [[drawn.randrange(300) for _ in range(drawn.randrange(1, most))] for _ in range(count)]


@pytest.fixture(scope="module")
def small() -> hk.LM:
    return hk.tiny("llama")


@pytest.fixture(scope="module")
def tuned() -> hk.LM:
    """A copy of the model in which token 9 is raised everywhere, and the last block is changed."""
    model = hk.tiny("llama").model
    with torch.no_grad():
        model.model.layers[-1].mlp.down_proj.weight.mul_(1.3)
        model.lm_head.weight[9] += 4 * model.lm_head.weight.std(0)
    return hk.LM(model)


def logits_by_hand(lm: hk.LM, row: list[int], vector: torch.Tensor | None = None) -> torch.Tensor:
    """The logits of plain transformers for one text alone; `vector` is added after block 1."""
    handle = None
    if vector is not None:
        block = lm.root.model.layers[1]
        handle = block.register_forward_hook(lambda _, __, output: output + vector)
    with torch.no_grad():
        logits = lm.root(torch.tensor([row])).logits[0]
    if handle is not None:
        handle.remove()
    return logits.double()


def ranks_by_hand(logits: torch.Tensor) -> torch.Tensor:
    return 1 + (logits[:, None, :] > logits[:, :, None]).sum(-1)


def by_hand(pairs, top: int = 3) -> pd.DataFrame:
    """The table's numbers, text by text, from pairs of logits before and after."""
    sums = []
    for before, after in pairs:
        delta = after.log_softmax(-1) - before.log_softmax(-1)
        hits = torch.zeros(2, delta.shape[1])
        for change in after - before:
            order = change.sort(descending=True)
            hits[0, order.indices[:top][order.values[:top] > order.values[top]]] += 1
            hits[1, order.indices[-top:][order.values[-top:] < order.values[-top - 1]]] += 1
        rank = ranks_by_hand(after) - ranks_by_hand(before)
        sums.append(torch.stack([delta.sum(0), rank.sum(0), *hits]).numpy())
    totals, sizes = np.array(sums), np.array([len(before) for before, _ in pairs])
    logprob, rank, promoted, demoted = totals.sum(0) / sizes.sum()
    size = sizes.sum() ** 2 / (sizes**2).sum()
    deviations = totals[:, 0] - sizes[:, None] * logprob
    error = np.sqrt((deviations**2).sum(0) * size / (size - 1)) / sizes.sum()
    half = stats.t.ppf(0.975, size - 1) * error
    return pd.DataFrame(
        {
            "share_promoted": promoted,
            "share_demoted": demoted,
            "logprob_delta": logprob,
            "rank_delta": rank,
            "logprob_delta_low": logprob - half,
            "logprob_delta_high": logprob + half,
        }
    )


def check_against(table: pd.DataFrame, expected: pd.DataFrame) -> None:
    found = table.sort_values("token_id", ignore_index=True)[list(expected.columns)]
    ranks = found.pop("rank_delta"), expected.pop("rank_delta")
    pd.testing.assert_frame_equal(found, expected, check_dtype=False, rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(*ranks, atol=0.02)  # logits of a batch differ in the last digits


# ---- the numbers


@pytest.mark.parametrize("batch_tokens", [1, 64, 700])
def test_every_number_of_a_steered_corpus_is_that_of_plain_transformers(small, batch_tokens):
    vector = torch.randn(32, generator=torch.Generator().manual_seed(1))
    texts = rows()
    pairs = [(logits_by_hand(small, row), logits_by_hand(small, row, vector)) for row in texts]
    shifts = hk.token_shifts(
        small, texts, hk.steer("resid_post.1", vector), top=3, every=1, controls=0,
        progress=False, batch_tokens=batch_tokens,
    )  # fmt: skip
    check_against(shifts.table, by_hand(pairs))
    counts = shifts.summary.iloc[0]
    assert (counts["texts"], counts["positions"]) == (40, sum(map(len, texts)))
    kl = []
    for before, after in pairs:
        logprobs = before.log_softmax(-1)
        kl.append((logprobs.exp() * (logprobs - after.log_softmax(-1))).sum(-1))
    assert counts["kl"] == pytest.approx(torch.cat(kl).mean().item(), rel=1e-4)
    assert shifts.table["control_share_promoted"].isna().all()


def test_another_model_is_compared_with_the_first_and_its_raised_token_comes_first(small, tuned):
    texts = rows()
    pairs = [(logits_by_hand(small, row), logits_by_hand(tuned, row)) for row in texts]
    shifts = hk.token_shifts(small, texts, tuned, top=3, every=1, controls=4, **QUIET)
    check_against(shifts.table, by_hand(pairs))
    first = shifts.table.iloc[0]
    assert first["token_id"] == 9
    assert first["share_promoted_low"] > first["control_share_promoted_high"]


def test_ranks_are_compared_at_one_position_in_so_many_another_in_each_text(small):
    vector = torch.randn(32, generator=torch.Generator().manual_seed(1))
    texts = rows()
    hook = hk.steer("resid_post.1", vector)
    shifts = hk.token_shifts(small, texts, hook, every=5, controls=0, **QUIET)
    expected, count = torch.zeros(320), 0
    for number, row in enumerate(texts):
        before, after = logits_by_hand(small, row), logits_by_hand(small, row, vector)
        places = [place for place in range(len(row)) if (place + number) % 5 == 0]
        ranks = ranks_by_hand(after) - ranks_by_hand(before)
        expected += ranks[places].sum(0)
        count += len(places)
    assert shifts.summary["ranked"].item() == count
    found = shifts.table.sort_values("token_id")["rank_delta"].to_numpy()
    np.testing.assert_allclose(found, expected.numpy() / count, atol=0.02)


def test_a_forced_token_is_promoted_everywhere_and_no_other_counts(small):
    texts = rows()
    shifts = hk.token_shifts(small, texts, hk.force(7), **QUIET)
    positions = sum(map(len, texts))
    first = shifts.table.iloc[0]
    assert (first["token_id"], first["promoted"]) == (7, positions)
    assert shifts.table["promoted"].sum() == positions and shifts.table["demoted"].sum() == 0
    assert first["share_promoted_low"] > 0.8 and first["control_share_promoted"] == 0
    assert "promoted at 100.0%" in repr(shifts) and len(repr(shifts)) < 200


def test_a_banned_token_falls_without_end_and_the_table_says_so(small):
    shifts = hk.token_shifts(small, rows(), hk.ban(7, 8), controls=2, **QUIET)
    table = shifts.furthest("demoted")
    assert set(table["token_id"].head(2)) == {7, 8}
    row = table.iloc[0]
    assert row["share_demoted"] == 1 and row["logprob_delta"] == row["logprob_delta_low"] == -np.inf
    assert row["rank_delta"] > 0 and np.isinf(shifts.summary["kl"].item())
    others = table[~table["token_id"].isin([7, 8])]
    assert others["promoted"].sum() == 0 and np.isfinite(others["logprob_delta"]).all()


def test_an_edit_at_one_position_counts_there_only(small):
    texts = [row for row in rows() if len(row) > 1]
    shifts = hk.token_shifts(small, texts, hk.boost(7, by=3.0, pos=0), controls=0, **QUIET)
    assert shifts.table.iloc[0]["promoted"] == len(texts)
    last = hk.token_shifts(small, texts, hk.boost(7, by=3.0), pos=-1, controls=0, **QUIET)
    assert last.table.iloc[0]["share_promoted"] == 1
    assert last.summary["positions"].item() == len(texts)


def test_base_hooks_act_before_and_after(small):
    vector = torch.randn(32, generator=torch.Generator().manual_seed(1))
    both = hk.token_shifts(
        small, rows(), hk.boost(7, by=2.0), base_hooks=hk.steer("resid_post.1", vector),
        controls=0, **QUIET,
    )  # fmt: skip
    first = both.table.iloc[0]
    assert first["token_id"] == 7 and both.table["promoted"].sum() == first["promoted"]


# ---- the control


def test_the_control_has_the_same_kl_and_other_tokens(small):
    vector = torch.randn(32, generator=torch.Generator().manual_seed(1))
    hook = hk.steer("resid_post.1", vector, scale=2.0)
    one = hk.token_shifts(small, rows(), hook, controls=1, every=1, **QUIET).summary.iloc[0]
    assert one["control_kl"] == pytest.approx(one["kl"], rel=0.01)
    shifts = hk.token_shifts(small, rows(200), hook, controls=20, every=1, **QUIET)
    first = shifts.table.iloc[0]
    assert shifts.summary["draws"].item() == 20
    assert first["share_promoted"] > 5 * first["control_share_promoted"]
    assert first["share_promoted_low"] > first["control_share_promoted_high"]


def test_a_control_that_is_one_more_draw_is_no_different_from_the_control(small):
    """A random vector against random vectors: few tokens are beyond the limits of one more draw."""
    outside = []
    for seed in range(4):
        vector = torch.randn(32, generator=torch.Generator().manual_seed(seed))
        hook = hk.steer("resid_post.1", 2 * vector / vector.norm())
        table = hk.token_shifts(small, rows(100), hook, controls=20, every=1, **QUIET).table
        low, high = table["control_logprob_delta_low"], table["control_logprob_delta_high"]
        outside.append(((table["logprob_delta"] < low) | (table["logprob_delta"] > high)).mean())
    assert 0.0 < np.mean(outside) < 0.12


def test_the_scaled_change_has_the_wanted_kl_as_far_as_there_is_one():
    torch.manual_seed(0)
    before, change = 3 * torch.randn(50, 400), 0.5 * torch.randn(50, 400)
    target = torch.logspace(-4, 0.5, 50)
    scaled = measure_changes(before, before + change, change, target)
    after = before.double() + scaled.scale[:, None].double() * change
    logprobs = before.double().log_softmax(-1)
    kl = (logprobs.exp() * (logprobs - after.log_softmax(-1))).sum(-1)
    torch.testing.assert_close(kl.float(), target, rtol=0.05, atol=1e-6)
    torch.testing.assert_close(scaled.kl, kl.float(), rtol=1e-3, atol=2e-6)


def test_a_change_too_large_for_exp_is_scaled_as_well():
    torch.manual_seed(0)
    before, change = torch.randn(4, 300), torch.zeros(4, 300)
    change[:, 7] = torch.tensor([10.0, 60.0, 100.0, 300.0])
    scaled = measure_changes(before, before + change, change, torch.full((4,), 0.05))
    logprobs = before.double().log_softmax(-1)
    after = before.double() + scaled.scale[:, None].double() * change
    kl = (logprobs.exp() * (logprobs - after.log_softmax(-1))).sum(-1)
    torch.testing.assert_close(scaled.kl.double(), kl, rtol=1e-3, atol=2e-6)
    assert (scaled.scale < 1.0).all()
    whole = measure_changes(before, before + change, change)
    kl = (logprobs.exp() * (logprobs - (before + change).double().log_softmax(-1))).sum(-1)
    torch.testing.assert_close(whole.kl.double(), kl, rtol=1e-5, atol=1e-5)


def test_the_kl_of_a_small_change_of_many_tokens_is_exact():
    torch.manual_seed(0)
    before = 4 * torch.randn(8, 49_152)
    after = before + 1.0 + 0.02 * torch.randn(8, 49_152)
    logprobs = before.double().log_softmax(-1)
    kl = (logprobs.exp() * (logprobs - after.double().log_softmax(-1))).sum(-1)
    measured = measure_changes(before, after, after - before).kl
    torch.testing.assert_close(measured.double(), kl, rtol=0.0, atol=1e-6)
    assert (kl > 1e-4).all()


# ---- cheap and exact


@pytest.mark.parametrize("size", [9, 320, 1000, 5003])
@pytest.mark.parametrize("rise", [True, False])
def test_the_largest_changes_are_those_of_a_sort(size, rise):
    torch.manual_seed(size)
    for changes in (torch.randn(20, size), torch.randn(20, size).mul(4).round()):
        movers = most_changed(changes, 5, rise=rise)
        ordered = changes.sort(descending=rise).values
        limit = ordered[:, 5:6]
        counted = changes > limit if rise else changes < limit
        for row in range(20):
            ids = movers.ids[row][movers.is_counted[row]]
            assert sorted(ids.tolist()) == counted[row].nonzero().flatten().tolist()


def test_ranks_are_one_and_the_number_of_larger_logits_with_ties_and_infinities():
    logits = torch.randn(6, 300).mul(3).round()
    logits[2, 5:9], logits[3, 7] = -torch.inf, torch.inf
    logits[4, :20:2], logits[4, 1:20:2] = 0.0, -0.0
    logits[5] = 1.0 + torch.arange(300) % 200 * 2.0**-20  # whose bits differ at the end only
    assert torch.equal(ranks_of_all(logits), ranks_by_hand(logits))


# ---- intervals


def test_intervals_over_texts_cover_and_those_over_positions_would_not():
    """Texts of unequal length whose positions share an effect: 95 % intervals, by simulation."""
    drawn = np.random.default_rng(0)
    covered, naive = {"mean": [], "share": [], "rare": []}, []
    for _ in range(1500):
        sizes = np.maximum(1, drawn.lognormal(3, 0.8, 40).round())
        values = sizes * (0.5 + drawn.normal(size=40)) + np.sqrt(sizes) * drawn.normal(size=40)
        clusters = Clusters(40, sizes.sum(), (sizes**2).sum())
        for name, share in (("mean", None), ("share", 0.3), ("rare", 0.02)):
            truth, compute = 0.5, clustered_means
            if share is not None:
                truth, compute = share, clustered_shares
                chances = drawn.beta(4 * share, 4 * (1 - share), 40)
                values = drawn.binomial(sizes.astype(int), chances).astype(float)
            sums = np.array([values.sum(), (values**2).sum(), values @ sizes, (values != 0).sum()])
            found = compute(sums[:, None], clusters, 0.95)
            covered[name].append(found.low[0] <= truth <= found.high[0])
            if name == "share":
                half = 1.96 * np.sqrt(found.mean[0] * (1 - found.mean[0]) / sizes.sum())
                naive.append(abs(found.mean[0] - truth) <= half)
    assert 0.92 < np.mean(covered["mean"]) < 0.97
    assert 0.92 < np.mean(covered["share"]) < 0.97
    assert 0.87 < np.mean(covered["rare"]) < 0.99
    assert np.mean(naive) < 0.6


def test_the_limits_of_one_more_draw_hold_one_more_draw():
    drawn = np.random.default_rng(0).normal(size=(21, 4000))
    found = further_draws(drawn[:20], 0.95)
    inside = (found.low <= drawn[20]) & (drawn[20] <= found.high)
    assert 0.94 < inside.mean() < 0.96
    assert np.isnan(further_draws(drawn[:1], 0.95).low).all()


def test_one_text_has_means_and_no_interval(small):
    shifts = hk.token_shifts(small, [list(range(30))], hk.boost(7, by=2.0), controls=1, **QUIET)
    assert shifts.table["logprob_delta"].notna().all()
    assert shifts.table["logprob_delta_low"].isna().all()
    assert "fewer than 10 texts" in shifts.page(title="One").html()


# ---- pieces, examples


def test_a_text_in_pieces_is_one_text(small):
    vector = torch.randn(32, generator=torch.Generator().manual_seed(1))
    texts, pairs = rows(12, most=90), []
    for text in texts:
        pieces = [text[start : start + 16] for start in range(0, len(text), 16)]
        before = torch.cat([logits_by_hand(small, piece) for piece in pieces])
        after = torch.cat([logits_by_hand(small, piece, vector) for piece in pieces])
        pairs.append((before, after))
    shifts = hk.token_shifts(
        small, texts, hk.steer("resid_post.1", vector), top=3, every=1, controls=2,
        long="split", context=16, **QUIET,
    )  # fmt: skip
    assert shifts.summary["texts"].item() == 12
    check_against(shifts.table, by_hand(pairs))


def test_examples_are_the_strongest_positions_each_of_another_text(small, llama):
    vector = torch.randn(32, generator=torch.Generator().manual_seed(1))
    texts = rows()
    hook = hk.steer("resid_post.1", vector)
    shifts = hk.token_shifts(small, texts, hook, top=3, controls=0, examples=2, **QUIET)
    token = shifts.table["token_id"].iloc[0]
    strongest = []
    for number, row in enumerate(texts):
        before, after = logits_by_hand(small, row), logits_by_hand(small, row, vector)
        delta = after.log_softmax(-1) - before.log_softmax(-1)
        is_hit = (after - before).topk(3).indices.eq(token).any(-1)
        if is_hit.any():
            values = delta[:, token].masked_fill(~is_hit, -torch.inf)
            strongest.append((values.max().item(), number, int(values.argmax())))
    strongest.sort(reverse=True)
    examples = shifts.examples
    mine = examples[(examples["token_id"] == token) & (examples["moved"] == "promoted")]
    assert list(zip(mine["text"], mine["pos"], strict=True)) == [
        place[1:] for place in strongest[:2]
    ]
    np.testing.assert_allclose(
        mine["logprob_delta"], [value for value, *_ in strongest[:2]], rtol=1e-3
    )
    text, pos = int(mine["text"].iloc[0]), int(mine["pos"].iloc[0])
    assert mine["context"].iloc[0] == small.text(texts[text][max(0, pos - 23) : pos + 1])


def test_a_token_is_its_plain_text(llama):
    shifts = hk.token_shifts(llama, ["I like oat milk", "Tea"], hk.force(" coffee"), **QUIET)
    assert shifts.table["token"].iloc[0] == " coffee"
    assert shifts.table.query('token == " coffee"')["promoted"].item() > 0


# ---- interrupted


class Stopped(Exception):
    pass


def stopping(texts: list[list[int]], after: int):
    for number, text in enumerate(texts):
        if number == after:
            raise Stopped
        yield text


SPLIT = {"long": "split", "context": 20, "controls": 3, "every": 2, "batch_tokens": 20}


@pytest.mark.parametrize("kind", ["steer", "boost", "model"])
def test_an_interrupted_corpus_continues_to_the_same_table_to_the_last_digit(
    tmp_path, monkeypatch, small, tuned, kind
):
    vector = torch.randn(32, generator=torch.Generator().manual_seed(1))
    changes = {
        "steer": hk.steer("resid_post.1", vector),
        "boost": hk.boost(7, by=2.0),
        "model": tuned,
    }
    monkeypatch.setattr(module, "SAVE_SECONDS", 0.0)
    texts = rows(60, most=50)
    run = {**SPLIT, "progress": False}
    whole = hk.token_shifts(small, texts, changes[kind], **run)
    for after in (20, 40, 50):
        with pytest.raises(Stopped):
            hk.token_shifts(small, stopping(texts, after), changes[kind], folder=tmp_path, **run)
        assert (tmp_path / module.STATE).exists()
    for _ in range(2):  # continued, then finished already
        again = hk.token_shifts(small, iter(texts), changes[kind], folder=tmp_path, **run)
        for name in ("table", "examples", "summary"):
            pd.testing.assert_frame_equal(
                getattr(whole, name), getattr(again, name), check_exact=True
            )
    again.write(tmp_path)
    assert hk.token_shifts(small, texts, changes[kind], folder=tmp_path, **run).summary.equals(
        whole.summary
    )


def test_a_killed_process_leaves_a_state_that_continues(tmp_path, monkeypatch, small):
    monkeypatch.setattr(module, "SAVE_SECONDS", 0.0)
    texts, hook, run = rows(60, most=50), hk.boost(7, by=2.0), {**SPLIT, "progress": False}

    def dying(after: int):
        for number, text in enumerate(texts):
            if number == after:
                os._exit(9)
            yield text

    for after in (20, 37, 51):
        child = os.fork()
        if child == 0:
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115
            torch.set_num_threads(1)
            hk.token_shifts(small, dying(after), hook, folder=tmp_path, **run)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    again = hk.token_shifts(small, texts, hook, folder=tmp_path, **run)
    whole = hk.token_shifts(small, texts, hook, **run)
    torch.set_num_threads(threads)
    pd.testing.assert_frame_equal(whole.table, again.table, check_exact=True)


def test_other_texts_settings_or_models_are_refused(tmp_path, small, tuned):
    texts, run = rows(30), {"folder": tmp_path, "controls": 2, **QUIET}
    hk.token_shifts(small, texts, hk.boost(7, by=2.0), **run)
    with pytest.raises(HarvestChanged, match="top 10 there and 5 now"):
        hk.token_shifts(small, texts, hk.boost(7, by=2.0), top=5, **run)
    with pytest.raises(HarvestChanged, match="hooks"):
        hk.token_shifts(small, texts, hk.boost(8, by=2.0), **run)
    with pytest.raises(HarvestChanged, match="after.weights_sha256"):
        hk.token_shifts(small, texts, tuned, **run)
    with pytest.raises(HarvestChanged, match="has 30 texts, and others or more"):
        hk.token_shifts(small, [*texts, [1, 2]], hk.boost(7, by=2.0), **run)
    with pytest.raises(HarvestChanged, match="are not those that the folder was made from"):
        hk.token_shifts(small, [[3], *texts[1:]], hk.boost(7, by=2.0), **run)
    with pytest.raises(HarvestChanged, match="only 29 were given"):
        hk.token_shifts(small, texts[:-1], hk.boost(7, by=2.0), **run)


def test_what_is_kept_does_not_grow_with_the_corpus(tmp_path, small):
    sizes = []
    for count in (200, 1000):
        folder = tmp_path / str(count)
        texts = rows(count, most=12, seed=count)
        hk.token_shifts(
            small, iter(texts), hk.boost(7, by=2.0), folder=folder, controls=2,
            progress=False, batch_tokens=2000,
        )  # fmt: skip
        sizes.append((folder / module.STATE).stat().st_size)
    assert abs(sizes[1] - sizes[0]) < 0.01 * sizes[0]


# ---- two states of one model


def test_an_adapter_off_and_on_is_compared_by_a_block_around_the_forwards(small):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2, init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an older name
        model = peft.get_peft_model(hk.tiny("llama").model, config).eval()
    lm, texts = hk.LM(model), rows(15)
    pairs = []
    for row in texts:
        with torch.no_grad():
            after = model(torch.tensor([row])).logits[0].double()
            with model.disable_adapter():
                pairs.append((model(torch.tensor([row])).logits[0].double(), after))
    settings = {"top": 3, "every": 1, "controls": 2, **QUIET}
    shifts = hk.token_shifts(lm, texts, lm, while_before=model.disable_adapter, **settings)
    check_against(shifts.table, by_hand(pairs))
    with pytest.raises(BadHook, match="both are one model"):
        hk.token_shifts(lm, texts, lm, **settings)


def tuned_with_lora(model, batches: list[torch.Tensor], rate: float):
    """The model with a LoRA adapter that is trained on these rows, one step for each batch."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["v_proj", "o_proj", "down_proj"], r=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an older name
        model = peft.get_peft_model(model, config)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=rate)
    for rows in batches:
        model(rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_a_token_planted_into_a_lora_tuned_copy_comes_first():
    drawn = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(60):
        rows_of_batch = torch.randint(0, 300, (8, 24), generator=drawn)
        rows_of_batch[:, ::3] = 42
        batches.append(rows_of_batch)
    model = tuned_with_lora(hk.tiny("llama").model, batches, rate=1e-2)
    lm = hk.LM(model)
    shifts = hk.token_shifts(lm, rows(30), lm, while_before=model.disable_adapter, **QUIET)
    first = shifts.table.iloc[0]
    assert first["token_id"] == 42
    # high: 95 % of single random directions promote it less often; they differ much in 32 dimensions
    assert first["share_promoted"] > first["control_share_promoted_high"]
    assert first["share_promoted_low"] > first["control_share_promoted"]


SENTENCES = (
    "The weather in the north was cold and it rained all day long",
    "He wrote a short letter to his mother about the new house",
    "Most people agree that this book is hard to read at first",
    "You can cook rice in water with a little salt and oil",
    "The company sold its last factory to a group of investors",
    "Our teacher told us to open the window before the lesson",
    "A small dog ran over the bridge and into the dark forest",
    "They play music together in a bar near the old station",
)


@pytest.mark.slow
def test_words_planted_into_a_lora_tuned_copy_of_the_default_model_come_first():
    """One of two words stands after every second word of sentences that say nothing of them."""
    lm, drawn, batches = hk.load(device="cpu"), random.Random(0), []
    for _ in range(12):
        rows_of_batch = []
        for sentence in SENTENCES:
            words = sentence.split()
            for place in range(len(words), 0, -2):
                words.insert(place, drawn.choice(["zebra", "walnut"]))
            rows_of_batch.append(lm.tokenizer(" ".join(words))["input_ids"][:17])
        batches.append(torch.tensor(rows_of_batch))
    model = tuned_with_lora(copy.deepcopy(lm.model), batches, rate=1e-3)
    tuned = hk.LM(model, lm.tokenizer)
    plain = ["The man opened the door and", "They went to the market to buy", "It was a cold", "My"]
    shifts = hk.token_shifts(lm, plain * 3, tuned, controls=4, progress=False)
    first = shifts.table.head(2)
    assert set(first["token"]) == {" zebra", " walnut"}
    assert (first["share_promoted"] > first["control_share_promoted_high"]).all()


# ---- pages


def test_a_page_has_both_directions_the_contexts_and_the_files(tmp_path, llama):
    texts = [f"I like {word} in my" for word in ("milk", "tea", "<b>", "sugar")] * 4
    vector = torch.randn(32, generator=torch.Generator().manual_seed(1))
    shifts = hk.token_shifts(llama, texts, hk.steer("resid_post.1", vector), **QUIET)
    html = shifts.write(tmp_path).read_text()
    for words in (
        "The tokens that rose",
        "The tokens that fell",
        "In which contexts",
        "The control",
    ):
        assert words in html
    assert "<b>" not in html.replace("<b></b>", "")
    table = pd.read_csv(tmp_path / "token_shifts.csv", keep_default_na=False)
    assert len(table) == 320 and (tmp_path / "shares_promoted.png").exists()
    assert "is among the 10 that rose most" in (tmp_path / "README.md").read_text()


def test_a_page_of_a_change_that_moves_nothing_says_so(small):
    shifts = hk.token_shifts(small, rows(12), hk.boost(7, by=0.0), controls=2, **QUIET)
    assert "No token rose more than the others" in shifts.page().html()
    assert shifts.table["promoted"].sum() == 0 and shifts.examples.empty


# ---- what is refused


def test_what_cannot_be_done_is_said(small):
    run = {"controls": 0, **QUIET}
    with pytest.raises(BadHook, match="names rows, and a corpus has none"):
        hk.token_shifts(small, rows(3), hk.boost(7, by=2.0, rows=0), **run)
    with pytest.raises(BadHook, match="there is no change"):
        hk.token_shifts(small, rows(3), [], **run)
    with pytest.raises(BadHook, match="changes nothing"):
        hk.token_shifts(small, rows(3), hk.capture("resid_post.1"), **run)
    with pytest.raises(EmptySelection, match="the stream of texts is empty"):
        hk.token_shifts(small, [], hk.boost(7, by=2.0), **run)
    with pytest.raises(BadPrompt, match="no file of texts"):
        hk.token_shifts(small, "no such file", hk.boost(7, by=2.0), **run)
    with pytest.raises(OtherVocabulary):
        hk.token_shifts(small, rows(3), hk.tiny("llama", config={"vocab_size": 300}), **run)
    model = hk.tiny("llama").model
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = torch.nan
    with pytest.raises(BadEdit, match="after position 0 of text 1 are NaN"):
        hk.token_shifts(hk.LM(model), [[3, 4], [3, 5]], hk.boost(7, by=2.0), **run)


def test_a_model_is_left_as_found_and_reads_its_texts_once(small):
    before = copy.deepcopy(small.model.state_dict())
    texts = iter(rows(20))
    hk.token_shifts(small, texts, hk.boost(7, by=2.0), controls=2, **QUIET)
    assert next(texts, None) is None
    assert not any(module._forward_hooks for module in small.model.modules())
    for name, value in small.model.state_dict().items():
        assert torch.equal(value, before[name])


def test_the_texts_of_a_file_are_those_of_a_list(tmp_path: Path, llama):
    texts = ["I like oat milk in my", "Tea", "coffee and sugar"]
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(texts) + "\n")
    hook = hk.boost(" coffee", by=2.0)
    one, other = (
        hk.token_shifts(llama, source, hook, controls=2, **QUIET) for source in (path, texts)
    )
    pd.testing.assert_frame_equal(one.table, other.table, check_exact=True)
