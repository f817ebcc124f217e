"""Rows of the vocabulary that are no token, as padded checkpoints have: they have probability, and no rank anywhere."""

import by_hand
import pytest
import torch

import hookkit as hk

IDS = [[5, 6, 7, 8, 9, 10], [11, 12, 13]]
EDIT = hk.ablate("attn_out.1")


@pytest.fixture(scope="module")
def wide(small_tokenizer) -> hk.LM:
    """A model with 16 rows behind its tokens, which its head likes better than any token."""
    lm = hk.tiny(
        "llama", tokenizer=small_tokenizer, config={"vocab_size": len(small_tokenizer) + 16}
    )
    bias = torch.zeros(len(small_tokenizer) + 16)
    bias[len(small_tokenizer) :] = 12.0
    lm.model.lm_head.bias = torch.nn.Parameter(bias)
    return lm


def without_attention(lm, ids):
    """The logits of plain transformers where block 1's attention adds nothing."""
    return by_hand.edited_logits(lm.model, ids, "attn_out", 1, torch.zeros_like)


def test_a_lens_ranks_the_tokens_alone(wide):
    count = len(wide.tokenizer)
    lens = hk.logit_lens(wide, IDS, top=4, watch=40)
    for row, ids in enumerate(IDS):
        logits = by_hand.logits(wide.model, ids)[0, -1]
        assert logits.argmax() >= count
        last = lens[(lens["row"] == row) & (lens["site"] == "resid_post.2")].set_index("rank")
        top = logits[:count].topk(4)
        assert last.loc[1:4, "token_id"].tolist()[:4] == top.indices.tolist()
        assert last["prob"].iloc[0] == pytest.approx(
            float(logits.softmax(-1)[top.indices[0]]), rel=1e-4
        )
        rank = 1 + int((logits[:count] > logits[40]).sum())
        assert last[last["token_id"] == 40].index.tolist() == [rank]
        entropy = torch.special.entr(logits.double().softmax(-1)).sum()
        assert last["entropy"].iloc[0] == pytest.approx(float(entropy), abs=1e-4)
    anywhere = hk.logit_lens(wide, IDS, top=4, choose="anywhere")
    assert lens["token_id"].max() < count and anywhere["token_id"].max() < count


def test_a_lens_has_finite_numbers_however_large_such_a_row_is(small_tokenizer):
    count = len(small_tokenizer)
    lm = hk.tiny("llama", tokenizer=small_tokenizer, config={"vocab_size": count + 1})
    bias = torch.zeros(count + 1)
    bias[count] = 200.0
    lm.model.lm_head.bias = torch.nn.Parameter(bias)
    lens = hk.logit_lens(lm, IDS, top=1)
    logprobs = by_hand.logits(lm.model, IDS[0])[0, -1].double().log_softmax(-1)
    last = lens[(lens["row"] == 0) & (lens["layer"] == 2)].iloc[0]
    assert last["logprob"] == pytest.approx(float(logprobs[:count].max()), rel=1e-5)
    assert lens["entropy"].max() < 1e-6 and lens["kl"].max() < 1e-4


def test_a_report_says_which_token_was_first(wide):
    count = len(wide.tokenizer)
    tables = hk.shift_report(wide, IDS, {"cut": EDIT}, watch=40, figures=0, controls=0).tables
    before = [by_hand.logits(wide.model, ids)[0, -1, :count] for ids in IDS]
    after = [without_attention(wide, ids)[0, -1, :count] for ids in IDS]
    first = tables["watched"][tables["watched"]["watched"] == "what was first"]
    assert first["token_id"].tolist() == [int(logits.argmax()) for logits in before]
    assert first["rank_before"].tolist() == [1, 1]
    leading = first["token_id"].tolist()
    ranks = [1 + int((now > now[token]).sum()) for now, token in zip(after, leading, strict=True)]
    assert first["rank_after"].tolist() == ranks
    for name, logits in (("top1_before", before), ("top1_after", after)):
        words = [by_hand.token_text(wide.tokenizer, int(said.argmax())) for said in logits]
        assert tables["distances"][name].tolist() == words
    changed = [
        int(was.argmax()) != int(now.argmax()) for was, now in zip(before, after, strict=True)
    ]
    assert tables["distances"]["top1_changed"].tolist() == changed
    assert tables["shifts"]["token_id"].max() < count and tables["layers"]["token_id"].max() < count


def test_a_difference_of_models_is_one_of_their_tokens(wide):
    count = len(wide.tokenizer)
    other = hk.LM(wide.model, wide.tokenizer, "cut")
    found = hk.model_diff(wide, other, IDS, hooks_after=EDIT, sites="embed")
    for row, ids in enumerate(IDS):
        before, after = (
            by_hand.logits(wide.model, ids)[0, :, :count],
            without_attention(wide, ids)[0, :, :count],
        )
        mine = found.tokens[found.tokens["row"] == row]
        assert mine["top1_before"].tolist() == [
            by_hand.token_text(wide.tokenizer, token) for token in before.argmax(-1).tolist()
        ]
        assert mine["top1_after"].tolist() == [
            by_hand.token_text(wide.tokenizer, token) for token in after.argmax(-1).tolist()
        ]
        assert mine["top1_changed"].tolist() == (before.argmax(-1) != after.argmax(-1)).tolist()
    rows = [by_hand.logits(wide.model, ids)[0, :, :count] for ids in IDS]
    cut = [without_attention(wide, ids)[0, :, :count] for ids in IDS]
    apart = torch.cat(
        [(now - was).norm(dim=-1) / was.norm(dim=-1) for was, now in zip(rows, cut, strict=True)]
    )
    logits = found.sites.set_index("site").loc["logits"]
    assert logits["difference"] == pytest.approx(float(apart.mean()), rel=1e-4)
    assert found.shifts["token_id"].max() < count


@pytest.mark.parametrize("above", [True, False])
def test_a_condition_on_the_margin_is_between_the_two_first_tokens(wide, above):
    count = len(wide.tokenizer)
    logits = by_hand.logits(wide.model, IDS[0])[0, -1]
    best, second = logits[:count].topk(2).values.tolist()
    of_all = logits.topk(2).values
    assert abs((best - second) - float(of_all[0] - of_all[1])) > 0.01
    limit = (best - second) * (0.99 if above else 1.01)
    run = hk.forward(wide, IDS[0], hk.boost(7, by=1.0, when=hk.when.margin_above(limit)))
    assert float(run.logits[0, -1, 7] - logits[7]) == pytest.approx(1.0 if above else 0.0, abs=1e-4)


def test_a_token_that_is_set_to_a_rank_has_it_among_the_tokens(wide):
    count = len(wide.tokenizer)
    for rank in (1, 3):
        run = hk.forward(wide, IDS[0], hk.set_rank(7, rank))
        logits = run.logits[0, -1]
        assert 1 + int((logits[:count] > logits[7]).sum()) == rank
    condition = hk.when.rank_of(7, at_most=3)
    run = hk.forward(wide, IDS[0], hk.set_rank(7, 3), hk.ban(7, when=condition))
    assert run.logits[0, -1, 7] == -torch.inf, "a condition counts the same rank"


def test_what_was_decided_is_listed_among_the_tokens(wide):
    count = len(wide.tokenizer)
    unused = list(range(count, count + 16))
    settings = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None}
    run = hk.generate(wide, IDS[0], hk.ban(unused), trace=hk.trace(top=3), **settings)
    logits = by_hand.logits(wide.model, IDS[0])[0, -1, :count]
    listed = hk.candidates(run)
    top = listed[listed["why"].str.contains("top")]
    first = top[(top["step"] == 0) & (top["stage"] == "model")]
    assert first["token_id"].tolist() == logits.topk(3).indices.tolist()
    assert first["rank"].tolist() == [1, 2, 3]
    assert top["token_id"].max() < count


def test_a_part_of_a_character_is_its_bytes_in_angle_brackets(llama, smol):
    for lm, character in ((llama, "é"), (smol, "🜁")):
        parts = [lm.string(token) for token in lm.encode(character)]
        data = bytes.fromhex("".join(parts).replace("<0x", "").replace(">", ""))
        assert len(parts) > 1 and data.decode() == character
    texts = [smol.string(token) for token in range(smol.n_tokens)]
    assert texts == [by_hand.token_text(smol.tokenizer, token) for token in range(len(texts))]
    assert len(set(texts)) == len(texts)
