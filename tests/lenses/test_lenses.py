"""Lenses: each layer's state through the model's own end, beside plain transformers and closed forms."""

import pandas as pd
import pytest
import torch
from tiny_families import ONE_OF_EACH
from torch.nn import functional

import hookkit as hk
from hookkit.lenses import readout as reading

IDS = [[5, 6, 7, 8, 9, 10], [11, 12, 13]]


def states_by_hand(model, ids):
    """What enters the first block and what each block gives, seen by hooks of torch: [layer + 1, pos, d_model]."""
    layers = model.model.layers if hasattr(model, "model") else model.transformer.h
    seen = []

    def entering(module, args, kwargs):
        seen.append((args[0] if args else kwargs["hidden_states"]).detach().clone())

    def leaving(module, args, output):
        seen.append((output[0] if isinstance(output, tuple) else output).detach().clone())

    handles = [layers[0].register_forward_pre_hook(entering, with_kwargs=True)]
    handles += [layer.register_forward_hook(leaving) for layer in layers]
    with torch.no_grad():
        model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return torch.stack(seen)[:, 0]


def end_by_hand(model, states):
    """The final norm, the head and the soft-cap, as transformers' code has them."""
    norm = model.model.norm if hasattr(model, "model") else model.transformer.ln_f
    with torch.no_grad():
        logits = model.lm_head(norm(states))
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def asked(table, row, pos, site):
    part = table[(table["row"] == row) & (table["pos"] == pos) & (table["site"] == str(site))]
    return part.sort_values("token_id")


@pytest.mark.parametrize("family", sorted(ONE_OF_EACH))
def test_the_last_layer_of_the_lens_is_what_the_model_says_in_every_family(family):
    lm = hk.tiny(family)
    logits = hk.forward(lm, IDS).logits
    lens = hk.logit_lens(lm, IDS, pos=None, top=lm.n_tokens)
    assert len(lens) == 9 * lm.n_layers * lm.n_tokens
    last = lens[lens["site"] == f"resid_post.{lm.n_layers - 1}"]
    said = logits[last["row"].tolist(), last["pos"].tolist(), last["token_id"].tolist()]
    assert torch.allclose(said.float(), torch.tensor(last["logit"].tolist()), atol=1e-4)
    assert (last["kl"] == 0).all()
    others = lens[lens["site"] == "resid_post.0"]
    assert others["kl"].max() > 1e-4, "another layer says something else"


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3"])
def test_every_layer_equals_the_models_end_applied_by_hand(family):
    lm = hk.tiny(family)
    lens = hk.logit_lens(
        lm, IDS, sites=["resid_pre.0", *lm.sites("resid_post")], pos=None, top=lm.n_tokens
    )
    for row, ids in enumerate(IDS):
        states = states_by_hand(lm.model, ids)
        logits = end_by_hand(lm.model, states)
        for number, site in enumerate(["resid_pre.0", *lm.sites("resid_post")]):
            for pos in range(len(ids)):
                part, wanted = asked(lens, row, pos, site), logits[number, pos].float()
                logprobs = wanted.log_softmax(-1)
                assert torch.allclose(torch.tensor(part["logit"].tolist()), wanted, atol=1e-4)
                assert torch.allclose(torch.tensor(part["logprob"].tolist()), logprobs, atol=1e-4)
                assert part["entropy"].iloc[0] == pytest.approx(
                    -float((logprobs.exp() * logprobs).sum()), abs=1e-4
                )
                end = logits[-1, pos].float().log_softmax(-1)
                assert part["kl"].iloc[0] == pytest.approx(
                    float((end.exp() * (end - logprobs)).sum()), abs=1e-4
                )
                ranks = 1 + (wanted[None] > wanted[:, None]).sum(-1)
                assert (
                    abs(torch.tensor(part["rank"].tolist()) - ranks).max() <= 1
                )  # two that differ by rounding


def test_edits_of_the_stream_are_in_what_the_lens_reads(llama):
    edit = hk.ablate("attn_out.1")
    lens = hk.logit_lens(llama, IDS, edit, top=llama.n_tokens)
    run = hk.forward(llama, IDS, edit, hk.capture("resid_post"))
    plain = hk.logit_lens(llama, IDS, top=llama.n_tokens)
    for row, ids in enumerate(IDS):
        for layer in range(llama.n_layers):
            wanted = end_by_hand(llama.model, run[f"resid_post.{layer}"][row, len(ids) - 1])
            found = torch.tensor(
                asked(lens, row, len(ids) - 1, f"resid_post.{layer}")["logit"].tolist()
            )
            assert torch.allclose(found, wanted.float(), atol=1e-4)
            before = torch.tensor(
                asked(plain, row, len(ids) - 1, f"resid_post.{layer}")["logit"].tolist()
            )
            assert torch.allclose(before, found, atol=1e-6) is (layer == 0)


def test_hooks_of_an_outer_block_act_on_the_states_and_see_no_forward_of_the_lens(llama):
    edit = hk.steer("resid_mid.1", torch.ones(32), scale=3.0)
    wanted = hk.logit_lens(llama, IDS, edit)
    with hk.attach(llama, edit, hk.capture("resid_post.2")) as manager:
        found = hk.logit_lens(llama, IDS)
    pd.testing.assert_frame_equal(found, wanted)
    assert manager["resid_post.2"].shape == (2, 6, 32), (
        "one text ran in the block, as far as it can tell"
    )


def test_an_edit_of_an_outer_block_behind_the_blocks_is_refused(llama):
    with (
        pytest.raises(hk.errors.Unsupported, match="give it to the lens itself"),
        hk.attach(llama, hk.force(7)),
    ):
        hk.logit_lens(llama, IDS)


def test_edits_behind_the_blocks_act_on_every_layer_at_their_own_rows_and_positions(llama):
    boost = hk.boost(7, by=4.0, rows=[1], step=0)
    lens = hk.logit_lens(llama, IDS, boost, pos=[-2, -1], top=llama.n_tokens)
    plain = hk.logit_lens(llama, IDS, pos=[-2, -1], top=llama.n_tokens)
    both = lens.merge(plain, on=["row", "pos", "site", "token_id"], suffixes=("", "_plain"))
    raised = both["logit"] - both["logit_plain"]
    there = (both["row"] == 1) & (both["pos"] == 2) & (both["token_id"] == 7)
    assert there.sum() == llama.n_layers
    assert raised[there].tolist() == pytest.approx([4.0] * llama.n_layers, abs=1e-4)
    assert raised[~there].abs().max() < 1e-5
    last = asked(lens, 1, 2, f"resid_post.{llama.n_layers - 1}")
    run = hk.forward(llama, IDS, boost)
    assert torch.allclose(torch.tensor(last["logit"].tolist()), run.logits[1, 2].float(), atol=1e-4)


def test_banned_tokens_take_nothing_from_the_numbers(llama):
    lens = hk.logit_lens(llama, IDS[0], hk.ban([7, 8]), top=3)
    assert lens[["entropy", "kl", "prob"]].notna().all().all()
    assert not {7, 8} & set(lens["token_id"])


def test_the_users_own_hook_behind_the_blocks_counts_and_one_inside_them_is_not_heard_twice(llama):
    handles = [
        llama.model.model.norm.register_forward_hook(lambda module, args, output: output * 2),
        llama.model.model.layers[1].register_forward_hook(lambda module, args, output: output + 1),
    ]
    try:
        lens = hk.logit_lens(llama, IDS[0], top=llama.n_tokens)
        with torch.no_grad():
            said = llama.model(torch.tensor([IDS[0]])).logits[0, -1]
    finally:
        for handle in handles:
            handle.remove()
    last = asked(lens, 0, 5, "resid_post.2")
    assert torch.allclose(torch.tensor(last["logit"].tolist()), said.float(), atol=1e-4)


def test_tokens_can_be_chosen_by_their_best_rank_at_any_layer(llama):
    every = hk.logit_lens(llama, IDS[0], top=llama.n_tokens)
    best = every.groupby("token_id")["rank"].min()
    chosen = hk.logit_lens(llama, IDS[0], top=2, choose="anywhere")
    tokens = set(chosen["token_id"])
    assert len(tokens) == 2 and all(best[token] == 1 for token in tokens)
    assert len(chosen) == 2 * llama.n_layers, "the same tokens at every layer"
    both = chosen.merge(every, on=["site", "token_id"])
    assert (both["rank_x"] == both["rank_y"]).all()


def test_each_layer_shows_its_own_first_tokens(llama):
    lens = hk.logit_lens(llama, IDS, top=2)
    for row, ids in enumerate(IDS):
        said = end_by_hand(llama.model, states_by_hand(llama.model, ids)[1:, -1])
        for layer, logits in enumerate(said):
            part = lens[(lens["row"] == row) & (lens["layer"] == layer)]
            assert part["token_id"].tolist() == logits.topk(2).indices.tolist()
            assert part["rank"].tolist() == [1, 2]
    assert lens.groupby(["row", "layer"])["token_id"].apply(tuple).nunique() > 2


def test_watched_tokens_stand_at_every_layer_once(llama):
    every = hk.logit_lens(llama, IDS[0], top=llama.n_tokens)
    first = int(every[(every["site"] == "resid_post.2") & (every["rank"] == 1)]["token_id"].iloc[0])
    lens = hk.logit_lens(llama, IDS[0], top=1, watch=[first, 9])
    assert (lens[lens["token_id"] == 9].groupby("site").size() == 1).all()
    assert (lens[lens["token_id"] == first].groupby("site").size() == 1).all()
    both = lens.merge(every, on=["site", "token_id"])
    assert (both["rank_x"] == both["rank_y"]).all() and both["logprob_x"].equals(both["logprob_y"])


def test_the_summary_says_where_a_token_first_leads_and_since_when(llama):
    rows = [("a", 3, 0.1), ("b", 1, 0.5), ("c", 2, 0.2), ("d", 1, 0.6), ("e", 1, 0.7)]
    lens = pd.DataFrame(
        [
            {
                "row": 0,
                "pos": 4,
                "site": site,
                "token": " x",
                "token_id": 5,
                "rank": rank,
                "prob": prob,
            }
            for site, rank, prob in rows
        ]
    )
    found = hk.stats.lens_summary(lens).iloc[0]
    assert (found["best_rank"], found["best_site"], found["first"], found["since"]) == (
        1,
        "b",
        "b",
        "d",
    )
    assert (found["last_rank"], found["last_prob"]) == (1, 0.7)
    with pytest.raises(hk.errors.BadHook, match="give what logit_lens gave"):
        hk.stats.lens_summary(lens.drop(columns="prob"))


def test_chunks_make_no_difference(llama, monkeypatch):
    whole = hk.logit_lens(llama, IDS, pos=None, watch=9)
    monkeypatch.setitem(reading.CHUNK, "cpu", 1)
    parts = hk.logit_lens(llama, IDS, pos=None, watch=9)
    numbers = ["logit", "logprob", "prob", "entropy", "kl"]
    pd.testing.assert_frame_equal(parts.drop(columns=numbers), whole.drop(columns=numbers))
    assert (parts[numbers] - whole[numbers]).abs().max().max() < 1e-5


def test_what_a_lens_cannot_read_is_refused(llama):
    with pytest.raises(hk.errors.BadHook, match=r"states of the residual stream.*z\.1"):
        hk.logit_lens(llama, IDS, sites="z.1")
    with pytest.raises(hk.errors.OutOfRange, match="top=0"):
        hk.logit_lens(llama, IDS, top=0)
    with pytest.raises(hk.errors.BadHook, match="choose='best'"):
        hk.logit_lens(llama, IDS, choose="best")


# ---- the tuned lens


def fit(lm, **settings):
    draws = torch.Generator().manual_seed(3)
    texts = [torch.randint(2, lm.n_tokens, (40,), generator=draws).tolist() for _ in range(12)]
    return hk.train_lens(
        lm, texts, window=20, progress=False, **{"steps": 20, "lr": 1e-3, **settings}
    ), texts


@pytest.fixture(scope="module")
def trained():
    lm = hk.tiny("llama")
    return lm, *fit(lm)


def test_a_tuned_lens_does_better_than_the_logit_lens_on_text_that_it_has_not_seen(trained):
    lm, lens, _ = trained
    draws = torch.Generator().manual_seed(9)
    fresh = [torch.randint(2, lm.n_tokens, (20,), generator=draws).tolist() for _ in range(20)]
    plain = hk.logit_lens(lm, fresh, pos=None, top=1).groupby("layer")["kl"].mean()
    tuned = hk.logit_lens(lm, fresh, pos=None, top=1, lens=lens).groupby("layer")["kl"].mean()
    assert (tuned[:-1] < plain[:-1]).all(), (tuned, plain)
    assert tuned[lm.n_layers - 1] == 0


def test_a_tuned_lens_says_what_its_translator_and_the_models_end_say(trained):
    lm, lens, _ = trained
    table = hk.logit_lens(lm, IDS[0], top=lm.n_tokens, lens=lens)
    states = states_by_hand(lm.model, IDS[0])
    moved = (
        states[1, -1] + states[1, -1] @ lens.change["resid_post.0"] + lens.offset["resid_post.0"]
    )
    wanted = end_by_hand(lm.model, moved)
    found = torch.tensor(asked(table, 0, 5, "resid_post.0")["logit"].tolist())
    assert torch.allclose(found, wanted.float(), atol=1e-4)
    assert float(lens.change["resid_post.0"].abs().max()) > 0


def test_the_history_is_the_mean_kl_on_held_out_text(trained):
    _, lens, _ = trained
    assert lens.history["site"].tolist() == ["resid_post.0", "resid_post.1"]
    assert (lens.history["kl_after"] < lens.history["kl_before"]).all()


def windows_read(lm, read):
    """The prompts of every forward that the model ran, seen by a hook of torch: [[tokens of a row, …], …]."""
    forwards = []

    def entering(module, args, kwargs):
        if "input_ids" in kwargs:
            forwards.append(kwargs["input_ids"].tolist())

    handle = lm.model.register_forward_pre_hook(entering, with_kwargs=True)
    try:
        lens = read()
    finally:
        handle.remove()
    return lens, forwards


def kl_by_hand(model, ids, layer, change=None, offset=None):
    """The mean over a text's tokens of KL(final ‖ what the layer's state says), as the paper writes it."""
    states = states_by_hand(model, ids)
    state, end = states[layer + 1], states[-1]
    if change is not None:
        state = state + state @ change + offset
    now, final = (end_by_hand(model, values).double().log_softmax(-1) for values in (state, end))
    return float((final.exp() * (final - now)).sum(-1).mean())


def test_the_history_is_the_divergence_of_the_lens_from_the_end_on_the_last_window_alone():
    lm = hk.tiny("llama")
    text = torch.randint(2, 320, (8 * 16,), generator=torch.Generator().manual_seed(1)).tolist()
    lens = hk.train_lens(lm, [text], window=16, steps=10, lr=1e-3, progress=False)
    assert lens.about["windows"] == 7, "a tenth of the windows is held out, and at least one"
    for layer in (0, 1):
        site = f"resid_post.{layer}"
        row = lens.history.set_index("site").loc[site]
        before = kl_by_hand(lm.model, text[-16:], layer)
        after = kl_by_hand(lm.model, text[-16:], layer, lens.change[site], lens.offset[site])
        assert row["kl_before"] == pytest.approx(before, rel=1e-4)
        assert row["kl_after"] == pytest.approx(after, rel=1e-4)
        assert after < before


def test_the_steps_of_a_training_lower_the_divergence_below_that_of_the_regression():
    lm = hk.tiny("llama")
    texts = torch.randint(2, 40, (24, 16), generator=torch.Generator().manual_seed(5)).tolist()
    start, trained = (
        hk.train_lens(lm, texts, window=16, progress=False, **settings).history["kl_after"]
        for settings in ({"steps": 1, "lr": 1e-12}, {"steps": 40, "lr": 3e-3})
    )
    assert trained[0] < 0.97 * start[0] and trained[1] < start[1]


def test_a_window_of_one_token_is_no_text_to_learn_from():
    lm = hk.tiny("llama")
    text = list(range(2, 2 + 33))
    assert hk.train_lens(lm, [text], window=16, steps=1, progress=False).about["windows"] == 1
    assert (
        hk.train_lens(lm, [[*text, 40]], window=16, steps=1, progress=False).about["windows"] == 2
    )


def test_a_tuned_lens_is_judged_at_every_tenth_step_and_at_the_last():
    lm = hk.tiny("llama")
    text = list(range(2, 2 + 64))
    sizes = []
    handle = lm.model.lm_head.register_forward_pre_hook(
        lambda _m, args: sizes.append(args[0].shape[:-1].numel())
    )
    hk.train_lens(lm, [text], window=16, states=5, steps=25, progress=False)
    handle.remove()
    looks = sizes.count(16) / 3  # two sites and the end
    assert looks == 1 + 4 + 3, "the logit lens, four ridges, and steps 10, 20 and 25"


@pytest.mark.parametrize("progress", [True, False])
def test_the_line_of_a_training_is_shown_or_not(progress, capfd):
    hk.train_lens(hk.tiny("llama"), [list(range(2, 34))], window=16, steps=1, progress=progress)
    assert ("tuned lens" in capfd.readouterr().err) is progress


def test_a_tuned_lens_never_reads_its_held_out_text_while_it_learns():
    lm = hk.tiny("llama")
    texts = torch.randint(2, 320, (24, 16), generator=torch.Generator().manual_seed(2)).tolist()
    _, forwards = windows_read(
        lm, lambda: hk.train_lens(lm, texts, window=16, steps=30, progress=False)
    )
    read = [[row for row in rows if len(row) == 16] for rows in forwards]
    read = [rows for rows in read if rows]
    assert read[0] == texts[-2:], "the two windows that are held out are read once, to judge by"
    learned = [row for rows in read[1:] for row in rows]
    assert not [row for row in learned if row in texts[-2:]]
    assert all(row in learned for row in texts[:-2])


def test_before_any_step_a_tuned_lens_is_a_ridge_regression_of_the_last_state_on_the_training_text():
    lm = hk.tiny("llama")
    texts = torch.randint(2, 320, (10, 30), generator=torch.Generator().manual_seed(3)).tolist()
    lens = hk.train_lens(lm, texts, window=30, steps=1, lr=1e-12, progress=False)
    states = torch.cat([states_by_hand(lm.model, row) for row in texts[:-1]], dim=1)[1:].double()
    weight = (
        states[-1].pow(2).mean(-1, keepdim=True).rsqrt()
    )  # what the final norm will multiply by
    for layer in (0, 1):
        inputs = torch.cat([states[layer], torch.ones(len(weight), 1)], dim=1) * weight
        outputs = (states[-1] - states[layer]) * weight
        gram = inputs.T @ inputs
        solved = {}
        for ridge in (1e-3, 1e-2, 1e-1, 1.0):
            penalty = torch.eye(33, dtype=torch.float64) * ridge * gram.diagonal()[:-1].mean()
            penalty[-1, -1] = 0
            solution = torch.linalg.solve(gram + penalty, inputs.T @ outputs).float()
            solved[ridge] = (
                kl_by_hand(lm.model, texts[-1], layer, solution[:-1], solution[-1]),
                solution,
            )
        best_kl, best = min(solved.values(), key=lambda pair: pair[0])
        assert lens.history["kl_after"][layer] == pytest.approx(best_kl, rel=1e-3)
        assert torch.allclose(lens.change[f"resid_post.{layer}"], best[:-1], atol=1e-3)
        assert torch.allclose(lens.offset[f"resid_post.{layer}"], best[-1], atol=1e-3)


def test_training_twice_gives_the_same_lens_and_leaves_the_weights_alone(trained):
    lm, lens, _ = trained
    before = {name: weight.clone() for name, weight in lm.model.named_parameters()}
    again, _ = fit(lm)
    assert all(torch.equal(again.change[site], lens.change[site]) for site in lens.change)
    assert all(torch.equal(weight, before[name]) for name, weight in lm.model.named_parameters())
    assert all(weight.grad is None and weight.requires_grad for weight in lm.model.parameters())


def test_a_saved_lens_is_the_same_and_knows_its_model(trained, tmp_path):
    lm, lens, _ = trained
    path = lens.save(tmp_path / "lens.safetensors")
    back = hk.load_lens(path, lm=lm)
    assert all(torch.equal(back.change[site], lens.change[site]) for site in lens.change)
    pd.testing.assert_frame_equal(back.history, lens.history, check_exact=False)
    with pytest.raises(hk.errors.BadHook, match="whose weights are not those"):
        hk.load_lens(path, lm=hk.tiny("llama", seed=1))
    hk.results.save_tensors({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(hk.errors.BadHook, match="is no lens"):
        hk.load_lens(tmp_path / "other.safetensors")


def test_a_tuned_lens_is_refused_where_it_was_not_trained(trained):
    lm, lens, _ = trained
    with pytest.raises(hk.errors.BadHook, match=r"not trained at resid_mid\.1"):
        hk.logit_lens(lm, IDS, sites="resid_mid.1", lens=lens)
    with pytest.raises(hk.errors.BadPrompt, match="give more text"):
        hk.train_lens(lm, [[5, 6, 7]], progress=False)


# ---- patchscopes


def test_a_patchscope_equals_a_hook_by_hand(llama):
    target, source = [20, 21, 22, 23], IDS[0]
    found = hk.patchscope(
        llama, source, target=target, target_pos=1, max_new_tokens=4, sites="resid_post"
    )
    states = states_by_hand(llama.model, source)
    for layer in range(llama.n_layers):

        def put(module, args, output, layer=layer):
            if output.shape[1] > 1:  # the prompt, not the steps behind it
                output = output.clone()
                output[:, 1] = states[layer + 1, -1]
            return output

        handle = llama.model.model.layers[layer].register_forward_hook(put)
        ids = llama.model.generate(
            torch.tensor([target]), attention_mask=torch.ones(1, 4).long(), max_new_tokens=4, do_sample=False,
            pad_token_id=0,
        )[0, 4:]  # fmt: skip
        handle.remove()
        assert found["text"][layer] == llama.text(ids.tolist())
        assert found["token_id"][layer] == int(ids[0])
    assert found["target_site"].tolist() == [
        f"resid_post.{layer}" for layer in range(llama.n_layers)
    ]


def test_a_patchscope_into_its_own_place_changes_nothing_and_another_layer_does(llama):
    plain = hk.generate(llama, IDS[0], max_new_tokens=4, do_sample=False).generated[0]
    own = hk.patchscope(llama, IDS[0], target=IDS[0], target_pos=-1, max_new_tokens=4)
    assert own["text"].tolist() == [plain] * llama.n_layers
    moved = hk.patchscope(
        llama, IDS[0], target=IDS[0], target_layer=0, sites="resid_post.2", max_new_tokens=4
    )
    assert moved["target_site"].tolist() == ["resid_post.0"]


def test_a_patchscopes_default_target_is_the_papers_and_is_patched_at_its_question_mark(llama):
    """The prompt of identities ends in "?", and what is read is the token after it."""
    target = llama.tokenizer.encode("cat -> cat\n1135 -> 1135\nhello -> hello\n?")
    assert llama.string(target[-1]) == "?"
    by_default = hk.patchscope(llama, IDS[0], max_new_tokens=2)
    named = hk.patchscope(
        llama, IDS[0], target=target, target_pos=len(target) - 1, max_new_tokens=2
    )
    pd.testing.assert_frame_equal(by_default, named)
    before = hk.patchscope(
        llama, IDS[0], target=target, target_pos=len(target) - 2, max_new_tokens=2
    )
    assert before["prob"].tolist() != by_default["prob"].tolist()


def test_a_patchscope_into_another_layer_says_what_a_hook_by_hand_makes_of_it(llama):
    target = llama.encode("cat -> cat\n1135 -> 1135\nhello -> hello\n?")
    found = hk.patchscope(
        llama, IDS[0], pos=2, sites=["resid_post.1", "resid_post.2"], target_layer=0
    )
    states = states_by_hand(llama.model, IDS[0])
    for row, layer in enumerate((1, 2)):

        def put(module, args, output, layer=layer):
            output = output.clone()
            output[:, -1] = states[layer + 1, 2]
            return output

        handle = llama.model.model.layers[0].register_forward_hook(put)
        with torch.no_grad():
            said = llama.model(torch.tensor([target])).logits[0, -1].softmax(-1)
        handle.remove()
        assert found["token_id"][row] == int(said.argmax())
        assert found["token"][row] == llama.string(int(said.argmax()))
        assert found["prob"][row] == pytest.approx(float(said.max()), rel=1e-4)
        assert found["layer"][row] == layer


def test_a_patchscope_takes_one_state(llama):
    with pytest.raises(hk.errors.BadPrompt, match="2 prompts and 1 positions"):
        hk.patchscope(llama, IDS, target=[5, 6])


def test_the_kl_objective_is_the_divergence(trained):
    lm, lens, _ = trained
    table = hk.logit_lens(lm, IDS[0], top=lm.n_tokens, lens=lens)
    end, first = (asked(table, 0, 5, f"resid_post.{layer}") for layer in (lm.n_layers - 1, 0))
    logprobs = [torch.tensor(part["logprob"].tolist()) for part in (end, first)]
    wanted = functional.kl_div(logprobs[1], logprobs[0], log_target=True, reduction="sum")
    assert first["kl"].iloc[0] == pytest.approx(float(wanted), abs=1e-5)


# ---- exactness over a whole vocabulary


def test_entropy_and_divergence_keep_their_digits_over_49152_tokens(smol):
    prompt = "When Mary and John went to the store, John gave a drink to"
    lens = hk.logit_lens(smol, prompt, pos=None, top=1)
    states = torch.stack([states_by_hand(smol.model, smol.encode(prompt))[1:]]).flatten(0, 1)
    states[-1] = hk.forward(smol, prompt, hk.capture("resid_post.29"))["resid_post.29"][0]
    logprobs = (
        end_by_hand(smol.model, states).double().log_softmax(-1).transpose(0, 1)
    )  # [pos, layer, vocab]
    end = logprobs[:, -1:]
    entropy, kl = -(logprobs.exp() * logprobs).sum(-1), (end.exp() * (end - logprobs)).sum(-1)
    assert lens["entropy"].tolist() == pytest.approx(entropy.flatten().tolist(), abs=2e-5)
    assert lens["kl"].tolist() == pytest.approx(kl.flatten().tolist(), abs=4e-5)


@pytest.mark.parametrize("vocab", [49152, 50257, 1000, 300])
def test_the_largest_of_blocks_are_the_largest(vocab):
    values = torch.randn(2, 3, vocab, generator=torch.Generator().manual_seed(0))
    values[0, 0, -1] = values[0, 1, 7] = 9.0  # one behind the last whole block
    values[1, 2] = -torch.inf  # where but few tokens are allowed
    values[1, 2, 290:293] = torch.tensor([1.0, 3.0, 2.0])
    for top in (1, 3, 20):
        found, ids = reading.largest(values, top)
        assert torch.equal(found, values.topk(top).values)
        assert torch.equal(values.gather(-1, ids), found)
        assert all(len(set(each)) == top for each in ids.flatten(0, 1).tolist())
