"""Model against model: what differs is what plain transformers and hooks written by hand say, and where it begins."""

import copy
import io
import json
import math
import subprocess
import sys
import warnings
from random import Random

import by_hand
import pandas as pd
import peft
import pytest
import torch
from conftest import tokenizer
from typer.testing import CliRunner

import hookkit as hk
from hookkit.cli import app
from hookkit.errors import (
    BadHook,
    EmptySelection,
    MissingSite,
    OtherVocabulary,
    OutOfRange,
    Unsupported,
)
from hookkit.reports.diff.similarity import RunningCKA, cka_bytes, keeps_rows, linear_cka
from hookkit.sweeps.cells import turn

PROMPTS = ["I like oat milk in my", "We love", "The capital of France is"]
NASTY = ["<script>alert(1)</script>", " שלום", "\n\t"]


@pytest.fixture(scope="module")
def two(small_tokenizer):
    return tuple(
        hk.LM(hk.tiny("llama", seed=seed).model, small_tokenizer, f"seed {seed}") for seed in (0, 1)
    )


def deep(seed=0, **config):
    return hk.tiny(
        "llama", seed=seed, tokenizer=tokenizer(), config={"num_hidden_layers": 5, **config}
    )


def copied(lm, change=None):
    model = copy.deepcopy(lm.model)
    if change is not None:
        with torch.no_grad():
            change(model)
    return hk.LM(model, lm.tokenizer, lm.name)


def tokens_of(lm):
    return [lm.tokenizer.encode(prompt) for prompt in PROMPTS]


def at_site(lm, site, layer):
    """What is at a site, for every token of every prompt, each prompt by itself."""
    return torch.cat(
        [by_hand.captured(lm.model, ids, site, layer)[0].flatten(1) for ids in tokens_of(lm)]
    )


def definition(x, y):
    """HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with explicit Gram and centring matrices."""
    x, y = x.double(), y.double()
    h = torch.eye(len(x), dtype=torch.float64) - torch.full(
        (len(x), len(x)), 1 / len(x), dtype=torch.float64
    )

    def hsic(k, m):
        return torch.trace(k @ h @ m @ h) / (len(x) - 1) ** 2

    k, m = x @ x.T, y @ y.T
    return float(hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt())


@pytest.mark.parametrize(("tokens", "widths"), [(7, (5, 3)), (90, (5, 3)), (40, (2, 30))])
def test_cka_is_that_of_its_definition_in_one_piece_and_in_batches(tokens, widths):
    torch.manual_seed(0)
    x = torch.randn(tokens, widths[0]) + 100.0  # a large mean
    y = torch.randn(tokens, widths[1]) + x[:, :1]
    assert linear_cka(x, y) == pytest.approx(definition(x, y), abs=1e-9)
    running = RunningCKA(tokens, widths)
    for start in range(0, tokens, 4):
        running.add(x[start : start + 4], y[start : start + 4])
    assert running.value() == pytest.approx(definition(x, y), abs=1e-9)
    turned = torch.linalg.qr(torch.randn(widths[0], widths[0])).Q
    assert linear_cka(x, 3 * x @ turned - 1) == pytest.approx(1, abs=1e-6)


def test_cka_keeps_rows_or_sums_and_both_ways_are_tried_above():
    assert keeps_rows(7, (5, 3)) and not keeps_rows(90, (5, 3))
    assert math.isnan(linear_cka(torch.randn(4, 3), torch.ones(4, 2)))
    assert cka_bytes(7, (5, 3)) == 7 * 8 * 4, "rows in float32"
    assert cka_bytes(90, (5, 3)) == 8 * 8 * 8, "sums of products in float64"


def test_every_site_is_as_alike_as_hooks_written_by_hand_say(two):
    before, after = two
    found = hk.model_diff(
        before,
        after,
        PROMPTS,
        sites=["embed", "q", "attn_out", "mlp_post", "resid_post", "final_norm"],
    )
    table = found.sites.set_index("site")
    for site, layer in [
        ("embed", None),
        ("q", 1),
        ("attn_out", 2),
        ("mlp_post", 0),
        ("resid_post", 2),
        ("final_norm", None),
    ]:
        x, y = (at_site(lm, site, layer) for lm in two)
        row = table.loc[site if layer is None else f"{site}.{layer}"]
        cosines = torch.cosine_similarity(x, y)
        apart = (y - x).norm(dim=-1) / x.norm(dim=-1)
        assert row["tokens"] == len(x)
        assert row["cosine"] == pytest.approx(float(cosines.mean()), abs=1e-5)
        assert row["cosine_min"] == pytest.approx(float(cosines.min()), abs=1e-5)
        assert row["difference"] == pytest.approx(float(apart.mean()), rel=1e-5)
        assert row["difference_max"] == pytest.approx(float(apart.max()), rel=1e-5)
        assert row["norm_after"] == pytest.approx(float(y.norm(dim=-1).mean()), rel=1e-5)
        assert row["cka"] == pytest.approx(definition(x, y), abs=1e-4)
    stream = found.stream[(found.stream["row"] == 1) & (found.stream["layer"] == 2)]
    ids = tokens_of(before)[1]
    x, y = (by_hand.captured(lm.model, ids, "resid_post", 2)[0] for lm in two)
    assert stream["difference"].tolist() == pytest.approx(
        ((y - x).norm(dim=-1) / x.norm(dim=-1)).tolist(), rel=1e-4
    )


def test_what_is_said_after_each_token_is_what_plain_transformers_says(two):
    found = hk.model_diff(*two, PROMPTS, rank_pos=None, top=4, watch=40, sites="embed")
    for row, ids in enumerate(tokens_of(two[0])):
        p, q = (by_hand.logits(lm.model, ids)[0].double().log_softmax(-1) for lm in two)
        mine = found.tokens[found.tokens["row"] == row]
        assert mine["pos"].tolist() == list(range(len(ids)))
        assert mine["kl"].tolist() == pytest.approx((p.exp() * (p - q)).sum(-1).tolist(), rel=1e-3)
        assert mine["kl_reverse"].tolist() == pytest.approx(
            (q.exp() * (q - p)).sum(-1).tolist(), rel=1e-3
        )
        middle = (p.exp() + q.exp()) / 2
        js = ((p.exp() * (p - middle.log())).sum(-1) + (q.exp() * (q - middle.log())).sum(-1)) / 2
        assert mine["js"].tolist() == pytest.approx(js.tolist(), rel=1e-3)
        assert mine["entropy_after"].tolist() == pytest.approx(
            (-(q.exp() * q).sum(-1)).tolist(), rel=1e-4
        )
        assert mine["top1_changed"].tolist() == (p.argmax(-1) != q.argmax(-1)).tolist()
        losses = [
            -said[place, ids[place + 1]].item() for said in (p, q) for place in range(len(ids) - 1)
        ]
        told = [*mine["loss_before"].tolist()[:-1], *mine["loss_after"].tolist()[:-1]]
        assert told == pytest.approx(losses, rel=1e-4)
        assert mine["loss_delta"].isna().tolist() == [False] * (len(ids) - 1) + [True]
        shifts = found.shifts[(found.shifts["row"] == row) & (found.shifts["pos"] == 1)]
        for token in shifts.to_dict("records"):
            for when, said in (("before", p[1]), ("after", q[1])):
                assert token[f"rank_{when}"] == 1 + int((said > said[token["token_id"]]).sum())
                assert token[f"prob_{when}"] == pytest.approx(
                    float(said[token["token_id"]].exp()), abs=1e-5
                )
        assert set(p[1].topk(4).indices.tolist()) <= set(shifts["token_id"]) and 40 in set(
            shifts["token_id"]
        )
    assert len(found.shifts[["row", "pos"]].drop_duplicates()) == sum(map(len, tokens_of(two[0])))
    prompts = found.prompts
    assert prompts["kl"].tolist() == pytest.approx(
        found.tokens.groupby("row")["kl"].mean().tolist()
    )
    assert prompts["tokens"].tolist() == [len(ids) for ids in tokens_of(two[0])]
    for row, ids in enumerate(tokens_of(two[0])):
        p, q = (by_hand.logits(lm.model, ids)[0].double().log_softmax(-1) for lm in two)
        kl = (p.exp() * (p - q)).sum(-1)
        assert prompts["kl_max"][row] == pytest.approx(float(kl.max()), rel=1e-4)
        assert prompts["kl_max_pos"][row] == int(kl.argmax())
        assert prompts["top1_changed"][row] == int((p.argmax(-1) != q.argmax(-1)).sum())
        for name, said in (("before", p), ("after", q)):
            losses = [-said[place, ids[place + 1]].item() for place in range(len(ids) - 1)]
            assert prompts[f"loss_{name}"][row] == pytest.approx(
                sum(losses) / len(losses), rel=1e-4
            )
        change = prompts["loss_after"][row] - prompts["loss_before"][row]
        assert prompts["loss_delta"][row] == pytest.approx(change, abs=1e-5)
    assert (prompts["kl_max"] > prompts["kl"]).all()


EDITS = {
    "q.3": lambda model: model.model.layers[3].self_attn.q_proj.weight.mul_(1.01),
    "v.3": lambda model: model.model.layers[3].self_attn.v_proj.weight.mul_(1.01),
    "attn_out.3": lambda model: model.model.layers[3].self_attn.o_proj.weight.mul_(1.01),
    "attn_in.3": lambda model: model.model.layers[3].input_layernorm.weight.mul_(1.01),
    "mlp_in.3": lambda model: model.model.layers[3].post_attention_layernorm.weight.mul_(1.01),
    "mlp_post.3": lambda model: model.model.layers[3].mlp.up_proj.weight.mul_(1.01),
    "mlp_out.3": lambda model: model.model.layers[3].mlp.down_proj.weight.mul_(1.01),
    "embed": lambda model: model.model.embed_tokens.weight.mul_(1.01),
    "final_norm": lambda model: model.model.norm.weight.mul_(1.01),
    "logits": lambda model: model.lm_head.weight.mul_(1.01),
}


@pytest.mark.parametrize("site", EDITS)
def test_an_edit_of_weights_is_found_where_it_was_made(site):
    lm = deep(tie_word_embeddings=False)
    found = hk.model_diff(lm, copied(lm, EDITS[site]), PROMPTS)
    assert str(found.first) == site and f"part at {site}" in repr(found)
    assert set(found.parting["site"]) == {site} and found.parting["pos"].tolist() == [0, 0, 0]
    assert found.parting["layer"].tolist() == [3 if "." in site else pd.NA] * 3
    before = found.sites[: found.sites["site"].tolist().index(site)]
    assert (before["difference_max"] == 0).all() and (before["parts"] == False).all()  # noqa: E712
    assert found.parting["difference"].tolist() == pytest.approx([0.01] * 3, rel=0.05)


def test_an_edit_of_one_token_parts_at_that_token_and_in_no_other_prompt():
    lm = deep(tie_word_embeddings=False)
    oat = lm.tokenizer.encode(PROMPTS[0])[2]
    after = copied(lm, lambda model: model.model.embed_tokens.weight[oat].mul_(2.0))
    found = hk.model_diff(lm, after, [PROMPTS[0], [5, 6, 7]])
    assert found.parting["site"].tolist() == ["embed", ""] and found.parting["pos"].tolist() == [
        2,
        pd.NA,
    ]
    assert found.parting["read"].tolist() == [lm.string(oat), ""]
    assert (found.tokens[found.tokens["row"] == 1]["kl"] == 0).all()


def test_two_copies_never_part(two):
    found = hk.model_diff(two[0], copied(two[0]), PROMPTS)
    assert found.first is None and "never part" in repr(found)
    assert (found.tokens["kl"] == 0).all() and (found.sites["difference_max"] == 0).all()
    assert found.parting["site"].tolist() == ["", "", ""]
    assert "Nowhere" in found.page().html()


def test_bfloat16_parts_at_the_embedding_by_what_bfloat16_rounds(two):
    rounded = hk.LM(copy.deepcopy(two[0].model).to(torch.bfloat16), two[0].tokenizer, two[0].name)
    found = hk.model_diff(two[0], rounded, PROMPTS)
    assert str(found.first) == "embed" and found.names[1].endswith("in bfloat16")
    weight = two[0].model.model.embed_tokens.weight.detach()
    ids = torch.tensor([token for row in tokens_of(two[0]) for token in row])
    lost = (weight[ids].bfloat16().float() - weight[ids]).norm(dim=-1) / weight[ids].norm(dim=-1)
    assert found.sites["difference_max"].iloc[0] == pytest.approx(float(lost.max()), rel=1e-4)
    assert 1e-4 < found.sites["difference"].iloc[0] < 4e-3
    assert hk.model_diff(two[0], rounded, PROMPTS, tolerance=1.0).first is None


def adapted():
    config = peft.LoraConfig(
        target_modules=["v_proj"], layers_to_transform=[1], r=4, init_lora_weights=False
    )
    torch.manual_seed(0)
    with warnings.catch_warnings():  # of transformers, about a word that peft still asks for
        warnings.simplefilter("ignore", FutureWarning)
        return peft.get_peft_model(hk.tiny("llama").model, config).eval()


def test_an_adapter_is_compared_on_and_off_in_one_model_and_with_a_copy_of_its_base():
    model, words, base = adapted(), tokenizer(), hk.tiny("llama", tokenizer=tokenizer())
    lm = hk.LM(model, words)
    one = hk.model_diff(lm, lm, PROMPTS, while_before=model.disable_adapter)
    other = hk.model_diff(base, lm, PROMPTS)
    ids = words.encode(PROMPTS[0])
    with torch.no_grad():
        q = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    p = by_hand.logits(base.model, ids)[0].double().log_softmax(-1)
    for found in (one, other):
        assert str(found.first) == "v.1"
        assert found.tokens["kl"].tolist()[: len(ids)] == pytest.approx(
            (p.exp() * (p - q)).sum(-1).tolist(), rel=1e-3
        )
    assert one.about["before"]["within"].endswith("disable_adapter") and one.about["after"][
        "adapters"
    ] == ["default"]
    with pytest.raises(BadHook, match="both are one model.*disable_adapter"):
        hk.model_diff(base, base, PROMPTS)


def test_hooks_on_one_side_act_on_the_rows_that_they_name(llama):
    edit = hk.steer("resid_post.1", torch.ones(32), rows=[2])
    found = hk.model_diff(llama, llama, PROMPTS, hooks_after=edit, batch_tokens=1)
    assert found.parting["site"].tolist() == ["", "", "resid_post.1"]
    banned = hk.model_diff(llama, llama, PROMPTS[:1], hooks_after=hk.ban(7, pos=slice(None)))
    assert math.isinf(banned.tokens["kl"].iloc[0]) and str(banned.first) == "logits"
    assert "edited" in banned.shifts.set_index("token_id").loc[7, "why"]
    assert "∞" in banned.page().html()


def test_the_rows_that_a_hook_names_are_the_prompts_however_few_tokens_run_together(llama):
    hook = hk.ablate("attn_out.1", rows=[2])
    found = hk.model_diff(llama, llama, PROMPTS, sites="embed", batch_tokens=4, hooks_after=hook)
    kl = found.prompts.set_index("row")["kl_max"]
    assert kl[2] > 1e-4 and kl[0] == kl[1] == 0


def test_base_hooks_act_on_both_sides(llama):
    base, edit = hk.steer("resid_post.0", torch.ones(32)), hk.ablate("attn_out.1")
    found = hk.model_diff(llama, llama, PROMPTS[:1], base_hooks=base, hooks_after=edit)
    before = hk.forward(llama, PROMPTS[:1], base).logits[0].log_softmax(-1)
    after = hk.forward(llama, PROMPTS[:1], base, edit).logits[0].log_softmax(-1)
    wanted = (before.exp() * (before - after)).sum(-1)
    assert found.tokens["kl"].tolist() == pytest.approx(wanted.tolist(), abs=1e-5)
    with pytest.raises(BadHook, match="both are one model"):
        hk.model_diff(llama, llama, PROMPTS[:1], base_hooks=base)


@pytest.mark.parametrize(("asked", "rows"), [({}, {0, 1, 2}), ({"details": 1}, {0})])
def test_the_stream_token_by_token_is_that_of_the_prompts_that_are_shown(two, asked, rows):
    found = hk.model_diff(*two, [*PROMPTS, "Tea"], sites=["resid_post.1", "mlp_out.1"], **asked)
    assert set(found.stream["row"]) == rows and set(found.stream["layer"]) == {1}
    assert len(found.stream) == sum(len(tokens_of(two[0])[row]) for row in rows)


def test_models_of_other_depth_are_compared_by_the_names_that_both_have():
    one, other = deep(), deep(num_hidden_layers=3)
    found = hk.model_diff(one, other, PROMPTS)
    said = found.left_out.set_index("what")["why"]
    back = hk.model_diff(other, one, PROMPTS[:1], sites=None).left_out["why"].tolist()
    assert "only the second model has it" in back and "only the first model has it" not in back
    assert "only the first model has it" in said.tolist() and any(
        "layer" not in str(s) and ".3" in str(s) for s in said.index
    )
    assert said["the site where they part first"] == "they have 5 and 3 layers"
    assert found.parting.empty and set(found.sites["layer"].dropna()) == {0, 1, 2}
    with pytest.raises(Unsupported, match="cannot be said: they have 5 and 3 layers"):
        _ = found.first
    assert "they have 5 and 3 layers" in found.page().html() and "part" not in repr(found)


def test_of_models_of_other_width_cka_alone_is_given():
    one, other = (
        hk.tiny("llama", tokenizer=tokenizer(), config={"hidden_size": size}) for size in (32, 64)
    )
    found = hk.model_diff(one, other, PROMPTS, sites=["resid_post", "k"])
    table = found.sites.set_index("site")
    x, y = (at_site(lm, "resid_post", 1) for lm in (one, other))
    assert table.loc["resid_post.1", "cka"] == pytest.approx(definition(x, y), abs=1e-4)
    assert table.loc["resid_post.1", ["cosine", "difference", "parts"]].isna().all()
    assert table.loc["resid_post.1", "norm_after"] == pytest.approx(
        float(y.norm(dim=-1).mean()), rel=1e-5
    )
    assert table.loc["logits", "difference"] > 0
    assert any(
        "they have other sizes, 2 x 8 and 2 x 16 at k.0" in why for why in found.left_out["why"]
    )
    assert "only CKA" not in found.page().html() and found.stream.empty


def test_the_same_comes_of_small_batches_and_little_memory(two):
    asked = {"sites": ["resid_post", "z", "q.1"], "cka": ["resid_post", "z"]}
    whole, pieces = (
        hk.model_diff(*two, PROMPTS, **asked, **small)
        for small in ({}, {"batch_tokens": 1, "memory": 1})
    )
    for name in ("tokens", "shifts", "sites", "parting", "stream"):
        pd.testing.assert_frame_equal(
            getattr(whole, name), getattr(pieces, name), rtol=1e-3, atol=1e-5
        )
    assert whole.sites.set_index("site")["cka"].notna().sum() == 6


@pytest.mark.parametrize(
    ("memory", "batch_tokens", "forwards"),
    [(10**9, 10**6, "one"), (10**9, 1, "one a prompt"), (1, 10**6, "one a site")],
)
def test_as_few_forwards_run_as_memory_and_batch_allow(two, memory, batch_tokens, forwards):
    counts, sites = [], ["embed", "resid_post.0", "mlp_out.1", "resid_post.2"]
    hk.model_diff(*two, PROMPTS, sites="embed")  # what is tried once for a model has been tried
    handles = [
        lm.model.model.embed_tokens.register_forward_hook(lambda m, a, o: counts.append(len(o)))
        for lm in two
    ]
    try:
        hk.model_diff(
            *two, PROMPTS, sites=sites, memory=memory, batch_tokens=batch_tokens, controls=0
        )
    finally:
        for handle in handles:
            handle.remove()
    prompts = len(PROMPTS)
    assert len({len(row) for row in tokens_of(two[0])}) == prompts, "all of other lengths"
    expected = {"one": [prompts], "one a prompt": [1] * prompts, "one a site": [prompts] * 4}
    probe = [2]  # rows of the forward that finds the sizes of the sites
    assert sorted(counts) == sorted(2 * (probe + expected[forwards]))


def test_positions_and_sites_are_those_asked_for(two):
    found = hk.model_diff(*two, PROMPTS, pos=slice(1, None), sites=["z.1", "z.2.3"], cka=False)
    assert (
        found.sites["site"].tolist() == ["z.1", "z.2.3", "logits"]
        and found.sites["cka"].isna().all()
    )
    assert found.tokens["pos"].min() == 1
    x, y = (
        torch.cat([by_hand.captured(lm.model, ids, "z", 2)[0, 1:, 3] for ids in tokens_of(lm)])
        for lm in two
    )
    cosine = float(torch.cosine_similarity(x, y).mean())
    assert found.sites.set_index("site").loc["z.2.3", "cosine"] == pytest.approx(cosine, abs=1e-5)


def test_the_first_token_of_the_vocabulary_has_a_loss_as_any_other(two):
    bare = [hk.LM(lm.model) for lm in two]
    found = hk.model_diff(*bare, [[7, 0, 1, 0]], sites="embed")
    p, q = (by_hand.logits(lm.model, [7, 0, 1, 0])[0].double().log_softmax(-1) for lm in two)
    for name, said in (("loss_before", p), ("loss_after", q)):
        losses = [-float(said[place, following]) for place, following in enumerate([0, 1, 0])]
        assert found.tokens[name].tolist()[:3] == pytest.approx(losses, rel=1e-4)
        assert found.tokens[name].isna().tolist() == [False, False, False, True]


def test_a_difference_shows_itself_in_a_notebook_with_the_site_where_the_models_part(two):
    found = hk.model_diff(*two, PROMPTS, details=0)
    assert found.stream.empty, "of no prompt the stream is kept"
    page = found._repr_html_()
    assert "part first at" in page and str(found.first) in page
    same = hk.model_diff(two[0], hk.LM(copy.deepcopy(two[0].model), two[0].tokenizer), PROMPTS)
    assert "no site" in same._repr_html_()


def test_models_without_tokenizers_and_modules_by_path_are_compared(two):
    bare = [hk.LM(lm.model) for lm in two]
    found = hk.model_diff(
        *bare, [[3, 4, 5], [6]], sites=[hk.module("model.layers.1.mlp.gate_proj"), "embed"]
    )
    assert found.tokens["read"].tolist() == ["<3>", "<4>", "<5>", "<6>"]
    assert found.sites["site"].tolist()[:2] == ["embed", "model.layers.1.mlp.gate_proj:output"]
    assert (
        "is a module"
        in found.left_out.set_index("what").loc["the site where they part first", "why"]
    )
    one_reads = hk.model_diff(hk.LM(two[0].model), two[1], PROMPTS[0])
    second = two[1].encode(PROMPTS[0])[1]
    assert one_reads.tokens["read"].iloc[1] == two[1].string(second)


def reordered():
    words = json.loads(tokenizer().backend_tokenizer.to_str())
    words["model"]["merges"] = words["model"]["merges"][:-20]
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(words)))


def test_models_that_do_not_read_the_same_tokens_are_refused(two):
    larger = hk.tiny("llama", config={"vocab_size": 330})
    with pytest.raises(OtherVocabulary, match="vocabularies of 320 and 330 tokens"):
        hk.model_diff(two[0], larger, PROMPTS)
    more = tokenizer()
    more.add_tokens(["<extra>"])
    with pytest.raises(
        OtherVocabulary,
        match="differ in 1 tokens: id 320 is 'not there' in the first and '<extra>'",
    ):
        hk.model_diff(two[0], hk.LM(two[1].model, more), PROMPTS)
    words = r"read prompt 0, .*, as different tokens: at position \d+ '.+' \(id \d+\) and '.+' \(id \d+\)"
    with pytest.raises(OtherVocabulary, match=words):
        hk.model_diff(two[0], hk.LM(two[1].model, reordered()), [" ".join(PROMPTS)])


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"sites": "resid_pots"}, hk.errors.UnknownSite, "did you mean 'resid_post'"),
        ({"sites": "pos_embed"}, MissingSite, "pos_embed"),
        ({"sites": "pattern"}, BadHook, "hk.model_diff keeps as many numbers for every token"),
        ({"sites": "z", "cka": "q"}, BadHook, "which is not compared: name it in sites="),
        ({"hooks_after": hk.capture("embed")}, BadHook, "which changes nothing"),
        ({"top": 0}, OutOfRange, "top=0: give a whole number, at least 1"),
        ({"tolerance": -1.0}, OutOfRange, "tolerance=-1.0"),
        ({"pos": slice(90, None)}, EmptySelection, "means no token of these prompts"),
        ({"pos": 5}, OutOfRange, "position 5 was asked for"),
        ({"sights": "z"}, hk.errors.UnknownKeyword, "has no keyword 'sights'"),
    ],
    ids=str,
)
def test_a_wish_that_cannot_be_is_refused(two, settings, error, words):
    with pytest.raises(error, match=words):
        hk.model_diff(*two, PROMPTS, **settings)


def test_the_page_says_it_all_again_and_runs_nothing_of_the_tokens(tmp_path):
    words = tokenizer()
    words.add_tokens(NASTY)
    one, other = (
        hk.tiny("llama", seed=seed, tokenizer=words, config={"vocab_size": len(words)})
        for seed in (0, 1)
    )
    ids = [words.convert_tokens_to_ids(word) for word in NASTY]
    found = hk.model_diff(one, other, [ids, [5, 6]], watch=ids, names=("<b>one", "other"))
    page = found.page(question="<i>Which?</i>", figures=2).write(tmp_path)
    text = page.read_text(encoding="utf-8")
    assert text.count("<script>") == 1 and "<b>one" not in text and "<i>" not in text
    assert "&lt;script&gt;alert(1)" in text
    about = json.loads((tmp_path / "about.json").read_text(encoding="utf-8"))
    assert about["tokens"] == [ids, [5, 6]] and about["versions"]["torch"]
    for name in ("prompts", "tokens", "shifts", "sites", "parting", "stream", "left_out"):
        table = pd.read_csv(tmp_path / f"{name}.csv")
        assert (
            len(table)
            == len(getattr(found, name))
            == len(json.loads((tmp_path / f"{name}.json").read_text()))
        )
    for name in ("tokens_0", "stream_0", "through_layers"):
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
    assert (tmp_path / "tokens_1.png").exists(), "two prompts are drawn"
    one_drawn = found.page().write(tmp_path / "one").parent
    assert (one_drawn / "tokens_0.png").exists() and not (one_drawn / "tokens_1.png").exists(), (
        "unless one asks for more"
    )


def test_the_page_says_which_model_is_which(two):
    found = hk.model_diff(*two, PROMPTS[:1], sites="embed", hooks_after=hk.ablate("z.1"))
    text = found.page().html()
    before, after = (text.split(f"{when}: ")[1].splitlines()[0] for when in ("Before", "After"))
    assert "seed 0" in before and "hook" not in before
    assert "seed 1" in after and "with 1 hook" in after


def test_the_command_prints_what_the_call_gives(two, tmp_path):
    for lm, name in zip(two, ("one", "other"), strict=True):
        lm.model.save_pretrained(tmp_path / name)
        lm.tokenizer.save_pretrained(tmp_path / name)
    words = [
        "diff",
        str(tmp_path / "one"),
        str(tmp_path / "other"),
        *PROMPTS[:2],
        "--device",
        "cpu",
    ]
    command = [sys.executable, "-c", "from hookkit.cli import app; app(prog_name='hookkit')"]
    done = subprocess.run([*command, *words, "--csv"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = hk.model_diff(*two, PROMPTS[:2])
    table = pd.read_csv(io.StringIO(done.stdout))
    assert list(table) == list(found.tokens) and len(table) == len(found.tokens)
    assert table["kl"].tolist() == pytest.approx(found.tokens["kl"].tolist(), rel=1e-4)
    assert "they part at embed" in done.stderr
    written = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "out")])
    assert written.exit_code == 0 and (tmp_path / "out" / "report.html").exists()
    told = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert len(told["sites"]) == len(found.sites) and told["parting"][0]["site"] == "embed"
    wrong = CliRunner().invoke(app, [*words[:3], ""])
    assert (wrong.exit_code, wrong.stdout) == (2, "") and "prompt 0 is empty" in wrong.stderr


def test_logits_that_are_nan_are_said_and_no_mean_passes_over_them(tmp_path):
    before = hk.tiny("llama")
    broken = copy.deepcopy(before.model)
    with torch.no_grad():
        broken.model.embed_tokens.weight[9] = torch.nan  # 0 times NaN is NaN: all of its row
    found = hk.model_diff(before, hk.LM(broken), [[5, 6, 7], [5, 9, 7]])
    nan = found.tokens["kl"].isna().tolist()
    assert nan == [False] * 3 + [True] * 3
    assert found.tokens["top1_after"].isna().tolist() == nan
    assert found.tokens["top1_changed"].tolist() == nan
    table = found.prompts.set_index("row")
    numbers = ["kl", "kl_max", "loss_before", "loss_after", "loss_delta"]
    assert table.loc[0, numbers].notna().all() and table.loc[1, numbers].isna().all()
    assert table["kl_max_pos"][1] == 0 and "KL nan" in repr(found)
    page = found.write(tmp_path).read_text()
    words = "cannot be compared after 3 of 6 tokens of 2 prompts, first after"
    assert words in page and "in prompt 1: the logits of one of them are NaN there" in page


def test_the_control_of_two_models_is_as_large_a_change_of_the_last_stream_turned(two):
    """By hand: the difference of the last streams, turned, put before the norm and the head."""
    before, after = two
    rows = [[5, 6, 7, number + 8] for number in range(12)]
    found = hk.model_diff(before, after, rows, controls=3, seed=4, sites="resid_post")
    summary = found.against_control.iloc[0]
    last = before.n_layers - 1
    streams = []
    for lm in two:
        kept = []
        handle = lm.model.model.norm.register_forward_pre_hook(
            lambda _m, args, kept=kept: kept.append(args[0][:, -1])
        )
        with torch.no_grad():
            lm.model(torch.tensor(rows))
        handle.remove()
        streams.append(kept[0])
    change = streams[1] - streams[0]
    with torch.no_grad():
        plain = before.model.lm_head(before.model.model.norm(streams[0])).double().log_softmax(-1)
        for draw in range(3):
            turned = turn(change, Random(f"4 {draw}").randrange(2**31))
            assert turned.norm(dim=-1).tolist() == pytest.approx(
                change.norm(dim=-1).tolist(), rel=1e-4
            )
            logits = before.model.lm_head(before.model.model.norm(streams[0] + turned))
            moved = logits.double().log_softmax(-1)
            kl = (plain.exp() * (plain - moved)).sum(-1)
            table = found.control[found.control["draw"] == draw]
            assert table["row"].tolist() == list(range(12))
            assert table["kl"].tolist() == pytest.approx(kl.tolist(), rel=2e-3, abs=1e-7)
    assert last == 2 and summary["n"] == 12 and summary["draws"] == 3
    tokens = found.tokens[found.tokens["pos"] == 3]
    assert summary["effect"] == pytest.approx(tokens["kl"].mean())
    answer = json.loads(found.page().files["about.json"])["answer"]
    assert "drawn 3 times" in answer and "95 % interval" in answer


def test_the_control_of_hooks_is_that_of_a_shift_report_and_can_be_left_out(two):
    lm = two[0]
    settings = {"hooks_after": hk.ablate("z.1.2"), "sites": "resid_post"}
    found = hk.model_diff(lm, lm, PROMPTS, controls=4, **settings)
    assert "the same edit at other parts of the same kind" in found.page().html()
    assert len(found.control) == 4 * len(PROMPTS)
    off = hk.model_diff(lm, lm, PROMPTS, controls=0, **settings)
    assert (
        off.control.empty and "control" not in json.loads(off.page().files["about.json"])["answer"]
    )
    first = hk.model_diff(lm, lm, PROMPTS, pos=0, **settings)
    assert (
        "There is no control: the control is measured after the last token" in first.page().html()
    )
    with pytest.raises(Unsupported, match="after the last token of each prompt"):
        hk.model_diff(lm, lm, PROMPTS, pos=0, controls=2, **settings)
