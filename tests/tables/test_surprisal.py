"""Surprisal and score: against F.cross_entropy, plain transformers and a loop by hand; and what is refused."""

import math

import pandas as pd
import pytest
import torch
from conftest import PROMPTS, TEXTS
from torch.nn import functional as F

import hookkit as hk
from hookkit.errors import (
    BadArgument,
    BadHook,
    BadPrompt,
    EmptySelection,
    NotCaptured,
    OutOfRange,
    UnknownKeyword,
)
from hookkit.tables import surprisal as surprisals

COLUMNS = [
    "row",
    "pos",
    "token",
    "token_id",
    "logprob",
    "loss",
    "bits",
    "rank",
    "prob",
    "mean_loss",
    "perplexity",
]
NAMES = ("logprob", "loss", "prob", "rank")
SHIFT = [
    "row",
    "pos",
    "token",
    "token_id",
    *(f"{n}_{w}" for n in NAMES for w in ("before", "after", "delta")),
    "worse",
]
LONG = " ".join(TEXTS) + " We love deep learning."


def plain_losses(lm: hk.LM, ids: list[int]) -> list[float]:
    """The loss of each token but the first, by transformers and torch alone."""
    with torch.no_grad():
        logits = lm.model(torch.tensor([ids])).logits[0]
    return F.cross_entropy(logits[:-1].float(), torch.tensor(ids[1:]), reduction="none").tolist()


def strided_losses(lm: hk.LM, ids: list[int], window: int, stride: int) -> list[float]:
    """Hugging Face's loop on the perplexity of fixed-length models, with a loss for each token."""
    losses, before = [], 0
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        losses += (
            plain_losses(lm, ids[begin:end])[-(end - before - (begin == 0)) :]
            if end > before
            else []
        )
        before = end
        if end == len(ids):
            break
    return losses


def test_the_mean_loss_is_what_the_model_itself_returns_with_labels(lm):
    run = hk.forward(lm, PROMPTS[2])
    table = hk.surprisal(run)
    ids = run.tokens
    with torch.no_grad():
        own = lm.model(input_ids=ids, labels=ids).loss.item()
    assert list(table.columns) == COLUMNS
    assert table["mean_loss"].iloc[-1] == pytest.approx(own, abs=1e-5)
    assert table["perplexity"].iloc[-1] == pytest.approx(math.exp(own), rel=1e-5)
    assert table["token_id"].tolist() == ids[0, 1:].tolist() and table["pos"].tolist() == list(
        range(1, ids.shape[1])
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "granite"])
def test_every_row_of_a_padded_batch_has_the_losses_that_it_has_alone(family, small_tokenizer):
    lm = hk.tiny(family, tokenizer=small_tokenizer)
    table = hk.surprisal(hk.forward(lm, PROMPTS))
    for row, prompt in enumerate(PROMPTS):
        ids = small_tokenizer.encode(prompt)
        mine = table[table["row"] == row]
        assert mine["loss"].tolist() == pytest.approx(plain_losses(lm, ids), abs=2e-4)
        assert mine["token_id"].tolist() == ids[1:]


def test_what_a_padded_batch_says_does_not_depend_on_the_side(lm):
    padded = [lm.tokenizer.encode(prompt) for prompt in PROMPTS]
    width = max(map(len, padded))
    left = {
        "input_ids": [[0] * (width - len(row)) + row for row in padded],
        "attention_mask": [[0] * (width - len(row)) + [1] * len(row) for row in padded],
    }
    right = {
        "input_ids": [row + [0] * (width - len(row)) for row in padded],
        "attention_mask": [[1] * len(row) + [0] * (width - len(row)) for row in padded],
    }
    pd.testing.assert_frame_equal(*(hk.surprisal(hk.forward(lm, each)) for each in (left, right)))


def test_the_numbers_of_a_row_follow_from_its_logits(llama):
    run = hk.forward(llama, PROMPTS[0])
    table = hk.surprisal(run, top=3)
    logprobs = run.logits[0].double().log_softmax(-1)
    for number, row in table.iterrows():
        place, token = row["pos"] - 1, row["token_id"]
        assert row["logprob"] == pytest.approx(float(logprobs[place, token]), abs=1e-5)
        assert row["loss"] == -row["logprob"]
        assert row["bits"] == pytest.approx(row["loss"] / math.log(2))
        assert row["prob"] == pytest.approx(math.exp(row["logprob"]))
        assert row["rank"] == 1 + int((run.logits[0, place] > run.logits[0, place, token]).sum())
        assert row["mean_loss"] == pytest.approx(table["loss"][: number + 1].mean())
        assert row["perplexity"] == pytest.approx(math.exp(row["mean_loss"]))
        best = hk.ranks(run, pos=place, top=3)
        said = [
            f"{token!r} {prob:.2g}" for token, prob in zip(best["token"], best["prob"], strict=True)
        ]
        assert row["alternatives"] == ", ".join(said)


def test_a_generates_own_tokens_are_scored_where_they_were_chosen(lm):
    run = hk.generate(lm, PROMPTS, max_new_tokens=4, do_sample=False, eos_token_id=None)
    table = hk.surprisal(run)
    assert table.groupby("row").size().tolist() == [4, 4, 4]
    for row, start in enumerate(run.prompt_lengths):
        ids = run.tokens[row, : start + 4].tolist()
        mine = table[table["row"] == row]
        assert mine["pos"].tolist() == list(range(start, start + 4))
        assert mine["loss"].tolist() == pytest.approx(plain_losses(lm, ids)[start - 1 :], abs=2e-4)
        assert set(mine["rank"]) == {1}


def test_a_row_that_ended_early_has_only_the_tokens_that_it_wrote(llama):
    stop = hk.generate(llama, PROMPTS, max_new_tokens=1, do_sample=False, eos_token_id=None).tokens[
        0
    ]
    first = int(stop[len(llama.tokenizer.encode(PROMPTS[0]))])
    run = hk.generate(
        llama, PROMPTS, max_new_tokens=4, do_sample=False, eos_token_id=first, pad_token_id=0
    )
    counts = [length - start for length, start in zip(run.lengths, run.prompt_lengths, strict=True)]
    assert counts[0] == 1 and hk.surprisal(run).groupby("row").size().tolist() == counts


def test_beam_search_scores_the_tokens_that_it_returned(llama):
    run = hk.generate(
        llama, PROMPTS[:2], max_new_tokens=3, do_sample=False, num_beams=3, eos_token_id=None
    )
    for row, part in hk.surprisal(run).groupby("row"):
        ids = run.tokens[row, : run.lengths[row]].tolist()
        assert part["loss"].tolist() == pytest.approx(plain_losses(llama, ids)[-3:], abs=2e-4)


def test_going_through_the_logits_in_pieces_changes_nothing(llama, monkeypatch):
    whole = hk.surprisal(hk.forward(llama, PROMPTS), top=2)
    monkeypatch.setattr(surprisals, "NUMBERS_AT_ONCE", 700)
    pd.testing.assert_frame_equal(whole, hk.surprisal(hk.forward(llama, PROMPTS), top=2))


def test_a_banned_token_costs_without_end_and_a_forced_one_next_to_nothing(llama):
    ids = [[5, 6, 7, 8]]
    banned = hk.surprisal(hk.forward(llama, ids, hk.ban(7, pos=1)))
    assert banned["loss"].tolist()[1] == math.inf and banned["perplexity"].tolist()[1:] == [
        math.inf,
        math.inf,
    ]
    assert banned["prob"].tolist()[1] == 0 and banned["rank"].tolist()[1] == 320
    forced = hk.surprisal(hk.forward(llama, ids, hk.force(7, margin=100, pos=1)))
    assert forced["loss"].tolist()[1] == 0 and math.copysign(1, forced["loss"].tolist()[1]) == 1
    assert forced["rank"].tolist()[1] == 1


def test_a_shift_is_after_minus_before_and_puts_the_worst_first(llama):
    runs = hk.forward(llama, PROMPTS), hk.forward(llama, PROMPTS, hk.ablate("mlp_out.1"))
    table = hk.surprisal_shift(*runs)
    was, now = map(hk.surprisal, runs)
    assert list(table.columns) == SHIFT
    assert table["loss_delta"].tolist() == (now["loss"] - was["loss"]).tolist()
    assert table["rank_delta"].tolist() == (now["rank"] - was["rank"]).tolist()
    assert table["worse"].tolist() == (now["loss"] > was["loss"]).tolist() and set(
        table["worse"]
    ) == {True, False}
    worst = hk.surprisal_shift(was, now, worst_first=True)
    assert worst["loss_delta"].tolist() == sorted(table["loss_delta"], reverse=True)
    assert sorted(worst["token_id"]) == sorted(table["token_id"])
    one = hk.surprisal_shift(*runs, rows=2)
    assert one["loss_delta"].tolist() == table[table["row"] == 2]["loss_delta"].tolist()
    assert hk.surprisal_shift(was, now, rows=2)["loss_delta"].tolist() == one["loss_delta"].tolist()


def test_a_table_that_lacks_what_is_compared_is_no_surprisal(llama):
    table = hk.surprisal(hk.forward(llama, "I like oat milk"))
    with pytest.raises(BadHook, match="was given a table without loss, rank: give two runs"):
        hk.surprisal_shift(table, table.drop(columns=["loss", "rank"]))


def test_a_token_that_is_banned_before_and_after_did_not_move(llama):
    run = hk.forward(llama, [[5, 6, 7]], hk.ban(6, pos=0))
    shift = hk.surprisal_shift(run, run)
    assert shift["loss_delta"].tolist() == [0, 0] and not shift["worse"].any()


def test_rows_of_the_vocabulary_that_are_no_tokens_have_no_rank(small_tokenizer):
    lm = hk.tiny("llama", tokenizer=small_tokenizer, config={"vocab_size": 352})
    with torch.no_grad():
        lm.model.lm_head.weight[320:] = 9.0 * lm.model.lm_head.weight[:1].sign()
    run = hk.forward(lm, PROMPTS[2])
    logits, ids = run.logits[0, :-1], run.tokens[0, 1:]
    own = logits.gather(1, ids[:, None])
    wanted = 1 + (logits[:, :320] > own).sum(1)
    assert (
        hk.surprisal(run)["rank"].tolist()
        == wanted.tolist()
        != (1 + (logits > own).sum(1)).tolist()
    )


def test_two_models_with_the_same_tokens_can_be_compared(llama, gpt2):
    table = hk.surprisal_shift(hk.token_losses(llama, LONG), hk.token_losses(gpt2, LONG))
    ids = llama.tokenizer.encode(LONG)
    assert table["loss_before"][:100].tolist() == pytest.approx(
        plain_losses(llama, ids[:101]), abs=2e-4
    )
    assert table["loss_after"][:100].tolist() == pytest.approx(
        plain_losses(gpt2, ids[:101]), abs=2e-4
    )


@pytest.mark.parametrize(("window", "stride"), [(32, 16), (32, 31), (40, 13), (128, 64), (128, 1)])
def test_a_long_text_is_scored_as_the_loop_by_hand_scores_it(lm, window, stride):
    ids = lm.tokenizer.encode(LONG)
    assert len(ids) > 100
    table = hk.token_losses(lm, LONG, window=window, stride=stride)
    assert table["token_id"].tolist() == ids[1:] and table["pos"].tolist() == list(
        range(1, len(ids))
    )
    assert table["loss"].tolist() == pytest.approx(
        strided_losses(lm, ids, window, stride), abs=2e-4
    )
    assert list(table.columns) == COLUMNS


def test_every_token_of_a_long_text_has_the_context_that_was_promised(llama):
    """A token far behind is scored as the last one of a text that begins as far before it as the window did."""
    ids = llama.tokenizer.encode(LONG)
    table = hk.token_losses(llama, LONG, window=20, stride=8)
    for place in (19, 20, 27, 28, 60):
        start = 0 if place < 20 else 8 * ((place - 20) // 8 + 1)
        assert place - start >= 12
        assert table["loss"][place - 1] == pytest.approx(
            plain_losses(llama, ids[start : place + 1])[-1], abs=2e-4
        )


def test_texts_of_all_lengths_are_scored_together_as_one_by_one(lm):
    texts = [*PROMPTS, LONG, *TEXTS]
    together = hk.token_losses(lm, texts, window=24, stride=10, batch_tokens=100, top=2)
    for row, text in enumerate(texts):
        if len(lm.tokenizer.encode(text)) > 1:
            alone = hk.token_losses(lm, text, window=24, stride=10, batch_tokens=1, top=2).drop(
                columns="row"
            )
            mine = together[together["row"] == row].drop(columns="row").reset_index(drop=True)
            pd.testing.assert_frame_equal(alone, mine, atol=2e-4, rtol=2e-4)
    assert together["row"].is_monotonic_increasing


def test_no_forward_has_more_tokens_than_asked_for(llama, monkeypatch):
    seen = []
    call = llama.model.forward

    def watched(input_ids, **words):
        seen.append(input_ids.numel())
        return call(input_ids, **words)

    lm = hk.LM(llama.model, llama.tokenizer)
    lm.takes  # noqa: B018  read before the forward is watched
    monkeypatch.setattr(llama.model, "forward", watched)
    hk.token_losses(lm, [*PROMPTS, LONG, *TEXTS], window=24, batch_tokens=100)
    assert max(seen) <= 100 and len(seen) > 3


def test_short_texts_are_scored_as_a_forward_says(lm):
    pd.testing.assert_frame_equal(
        hk.token_losses(lm, PROMPTS), hk.surprisal(hk.forward(lm, PROMPTS)), atol=1e-5, rtol=1e-5
    )


def test_windows_begin_with_the_token_that_begins_texts(llama):
    ids = [0, *llama.tokenizer.encode(LONG)]
    table = hk.token_losses(llama, [ids], window=20, stride=8)
    second = [0, *ids[8:27]]  # the second window: the beginning token, and 19 more
    assert table["token_id"].tolist() == ids[1:]
    assert table["loss"][19:26].tolist() == pytest.approx(
        plain_losses(llama, second)[12:], abs=2e-4
    )


def test_a_text_behind_a_prompt_is_scored_as_a_part_of_the_whole(lm):
    prompts, texts = PROMPTS[:2], [" coffee, tea", " and milk"]
    table = hk.token_losses(lm, texts, prefix=prompts, window=16, stride=4)
    for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        before, ids = lm.tokenizer.encode(prompt), lm.tokenizer.encode(text)
        mine = table[table["row"] == row]
        assert mine["token_id"].tolist() == ids
        assert mine["pos"].tolist() == list(range(len(before), len(before) + len(ids)))
        assert mine["loss"].tolist() == pytest.approx(
            strided_losses(lm, before + ids, 16, 4)[len(before) - 1 :], abs=2e-4
        )
        assert mine["mean_loss"].iloc[-1] == pytest.approx(mine["loss"].mean())
    same = hk.token_losses(lm, texts, prefix=prompts[0])
    assert same[same["row"] == 1]["pos"].iloc[0] == len(lm.tokenizer.encode(prompts[0]))


def test_an_edit_acts_in_every_window(llama):
    edits = [
        hk.ablate("mlp_out.1"),
        hk.steer("resid_post.0", torch.ones(32)),
        hk.ban(7, pos=slice(None)),
    ]
    table = hk.token_losses(llama, LONG, *edits, window=20, stride=8)
    ids = llama.tokenizer.encode(LONG)
    by_hand = hk.surprisal(hk.forward(llama, [ids[8:28]], *edits))
    assert table["loss"][19:27].tolist() == pytest.approx(by_hand["loss"][11:].tolist(), abs=2e-4)
    assert hk.token_losses(llama, PROMPTS[0], hk.ban(7, pos=0))["row"].tolist()


def test_the_default_models_numbers_are_transformers_own(smol):
    text = "We love deep learning, and the capital of France is Paris."
    ids = smol.tokenizer.encode(text)
    assert hk.surprisal(hk.forward(smol, text))["loss"].tolist() == pytest.approx(
        plain_losses(smol, ids), abs=1e-4
    )
    strided = hk.token_losses(smol, text, window=8, stride=4)["loss"].tolist()
    assert strided == pytest.approx(strided_losses(smol, ids, 8, 4), abs=1e-4)


@pytest.mark.parametrize(
    ("ask", "error", "words"),
    [
        (lambda m, r: hk.surprisal(r, top=-1), OutOfRange, "top=-1: give how many alternatives to show"),
        (lambda m, r: hk.surprisal(r, rows=3), OutOfRange, "row 3 was asked for, and the batch has 3 rows"),
        (lambda m, r: hk.surprisal(r, row=1), UnknownKeyword, r"surprisal\(\) has no keyword 'row'; did you mean"),
        (
            lambda m, r: hk.surprisal(hk.forward(m, "Tea", hk.capture("embed"), logits=False)),
            NotCaptured,
            "kept no logits",
        ),
        (
            lambda m, r: hk.surprisal(hk.forward(m, PROMPTS, logits="last")),
            EmptySelection,
            "logits='last' of a forward predict what follows the last",
        ),
        (lambda m, r: hk.token_losses(m, [[5], [6]]), EmptySelection, "the first token of a text has nothing before it"),
        (
            lambda m, r: hk.surprisal_shift(r, hk.forward(m, [PROMPTS[0], PROMPTS[2], PROMPTS[1]])),
            OutOfRange,
            "the two read different tokens: .* Compare both on one text",
        ),
        (
            lambda m, r: hk.surprisal_shift(r, hk.forward(m, PROMPTS[0])),
            OutOfRange,
            r"there are \d+ tokens before and \d+ after",
        ),
        (lambda m, r: hk.surprisal_shift(r, "x"), BadArgument, "after='x': give a run: .*, or a pandas table"),
        (lambda m, r: hk.surprisal_shift(r, hk.ranks(r)), BadHook, "was given a table without loss"),
        (lambda m, r: hk.token_losses(m, LONG, window=999), BadHook, "window=999: give a number of tokens within the model's context, at most 128"),
        (lambda m, r: hk.token_losses(m, LONG, window=16, stride=16), BadHook, "give a stride that is smaller than the window"),
        (lambda m, r: hk.token_losses(m, LONG, window=1), BadHook, "window=1: give a number of tokens within the model's context, at least 2"),
        (lambda m, r: hk.token_losses(m, LONG, stride=0), BadHook, "stride=0: give a number of tokens, at least 1"),
        (lambda m, r: hk.token_losses(m, LONG, batch_tokens=0), BadHook, "batch_tokens=0"),
        (lambda m, r: hk.token_losses(m, ""), BadPrompt, "prompt 0 is empty"),
        (lambda m, r: hk.token_losses(m, [[5, 999]]), BadPrompt, "token id 999, and the vocabulary has ids 0 to 319"),
        (lambda m, r: hk.token_losses(m, PROMPTS, prefix=["a", "b"]), BadPrompt, r"there are 3 texts and 2 prompts in prefix="),
        (lambda m, r: hk.token_losses(m, PROMPTS, hk.capture("embed")), BadHook, "keeps no captures; see hk.harvest"),
        (lambda m, r: hk.token_losses(m, PROMPTS, "embed"), BadArgument, "hooks='embed': give hooks"),
        (lambda m, r: hk.token_losses(m, PROMPTS, hk.ban(7)), BadHook, r"not scored: say pos=slice\(None\)"),
        (lambda m, r: hk.token_losses(m, PROMPTS, hk.ablate("embed", rows=0)), BadHook, "names rows, and token_losses makes batches"),
        (
            lambda m, r: hk.token_losses(m, LONG, hk.ablate("embed", pos=3), window=16),
            BadHook,
            "names positions, and there are texts that are read in several windows",
        ),
        (
            lambda m, r: hk.token_losses(m, LONG, hk.knockout(1, key=3, query=slice(4, None)), window=16),
            BadHook,
            "names positions",
        ),
        (
            lambda m, r: hk.token_losses(m, PROMPTS, hk.patch("embed", hk.forward(m, PROMPTS, hk.capture("embed")), pos=0)),
            BadHook,
            "puts in values for each row or position",
        ),
        (
            lambda m, r: hk.token_losses(m, PROMPTS, hk.steer("embed", torch.ones(3, 32), pos=slice(0, 1))),
            BadHook,
            "puts in values for each row or position",
        ),
        (
            lambda m, r: hk.token_losses(m, LONG, hk.ablate("embed", to="mean", over=[LONG[:80]], per="position"), window=16),
            BadHook,
            "puts in values for each row or position",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_scored_as_asked_is_refused(llama, ask, error, words):
    with pytest.raises(error, match=words):
        ask(llama, hk.forward(llama, PROMPTS))
