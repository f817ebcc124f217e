"""Interchanges within subspaces against hooks written by hand, and fits against planted subspaces."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.linalg import subspace_angles

import hookkit as hk
from hookkit.errors import BadHook, BadPrompt, OtherModel, TooFew

SITE, LAYER = "resid_post.1", 1
TABLE = ["site", "k", "intervention", "iia", "iia_low", "iia_high", "loss", "epochs", "n", "n_fit"]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def directions(k: int, width: int = 32, seed: int = 3) -> torch.Tensor:
    return torch.randn(k, width, generator=torch.Generator().manual_seed(seed))


def logits_by_hand(lm, base, source, basis, base_pos, source_pos):
    """The base's logits [pos, vocab] with the component of the source, by transformers alone."""
    block, kept = lm.model.model.layers[LAYER], []
    handle = block.register_forward_hook(lambda module, args, output: kept.append(output))
    with torch.no_grad():
        lm.model(torch.tensor([source]))
    handle.remove()
    value = (kept[0][0] if isinstance(kept[0], tuple) else kept[0])[..., source_pos, :].reshape(-1)
    projection = torch.linalg.pinv(basis) @ basis

    def put_in(module, args, output):
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden[0, base_pos] += (value - hidden[0, base_pos]) @ projection
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = block.register_forward_hook(put_in)
    with torch.no_grad():
        logits = lm.model(torch.tensor([base])).logits[0]
    handle.remove()
    return logits


def test_an_interchange_puts_in_the_component_of_each_rows_own_source_also_in_a_padded_batch(llama):
    bases, sources = (
        ["I like oat milk in my", "Tea", "The store is"],
        ["We love tea", "Mary", "John gave a"],
    )
    basis = directions(3)
    source_run = hk.forward(llama, sources, hk.capture(SITE))
    subspace = hk.types.Subspace(SITE, basis)
    run = hk.forward(llama, bases, subspace.interchange(source_run, pos=-1))
    raw = hk.forward(llama, bases, hk.patch(SITE, source_run, subspace=basis, pos=-1))
    for row, (base, source) in enumerate(zip(bases, sources, strict=True)):
        base_ids, source_ids = (llama.tokenizer(text)["input_ids"] for text in (base, source))
        expected = logits_by_hand(llama, base_ids, source_ids, basis, -1, -1)
        assert torch.allclose(run.logits[row, : len(base_ids)], expected, atol=1e-4)
        assert torch.allclose(raw.logits[row, : len(base_ids)], expected, atol=1e-4)
        assert not torch.allclose(hk.forward(llama, base).logits[0], expected, atol=1e-3)


def test_the_source_may_be_read_at_other_positions_than_those_that_change(llama):
    base, source, basis = "I like oat milk in my", "Mary and John went", directions(2)
    base_ids, source_ids = (llama.tokenizer(text)["input_ids"] for text in (base, source))
    expected = logits_by_hand(llama, base_ids, source_ids, basis, 2, 1)
    run = hk.forward(llama, source, hk.capture(SITE))
    for origin in (run, source):
        hook = hk.patch(SITE, origin, subspace=basis, pos=2, source_pos=1)
        assert torch.allclose(hk.forward(llama, base, hook).logits[0], expected, atol=1e-4)
        assert hk.parse_hook(hk.format_hook(hook)) == hook
    plain = hk.patch(SITE, run, pos=2, source_pos=1)
    everything = logits_by_hand(llama, base_ids, source_ids, torch.eye(32), 2, 1)
    assert torch.allclose(hk.forward(llama, base, plain).logits[0], everything, atol=1e-4)


def test_generate_and_a_sweep_do_the_same_as_a_forward(llama):
    prompt, source = "I like oat milk in my", "Mary and John went to"
    run = hk.forward(llama, source, hk.capture(SITE))
    hook = hk.patch(SITE, run, subspace=directions(2), pos=3, source_pos=0)
    generated = hk.generate(llama, prompt, hook, max_new_tokens=3, do_sample=False)
    ids = generated.tokens[0, : generated.lengths[0]].tolist()
    whole = hk.forward(llama, tuple(ids), hook)
    expected = whole.logits[0, generated.prompt_lengths[0] - 1 : -1]
    assert torch.allclose(generated.logits[0], expected, atol=1e-4)

    def at_position(pos, k):
        return [hk.patch(SITE, run, subspace=directions(k), pos=pos, source_pos=0)]

    table = hk.sweep(
        llama, prompt, {"pos": [0, 2, 4], "k": [1, 2]}, at_position, hk.metrics.logit(5)
    )
    value = next(name for name in table if name.endswith("5") or name == "logit")
    for line in table.to_dict("records"):
        single = hk.forward(llama, prompt, *at_position(line["pos"], line["k"]))
        assert line[value] == pytest.approx(float(single.logits[0, -1, 5]), abs=1e-4)


def test_a_sweep_reads_other_positions_of_a_source_that_begins_as_the_prompt_does(llama):
    prompt, source = "I like oat milk in my", "I like oat milk in Paris"
    run = hk.forward(llama, source, hk.capture(SITE))

    def at_position(pos):
        return [hk.patch(SITE, run, pos=pos, source_pos=-1)]

    table = hk.sweep(llama, prompt, {"pos": [0, 1, 2]}, at_position, hk.metrics.logit(5))
    value = next(name for name in table if name.endswith("5") or name == "logit")
    for line in table.to_dict("records"):
        single = hk.forward(llama, prompt, *at_position(line["pos"]))
        assert line[value] == pytest.approx(float(single.logits[0, -1, 5]), abs=1e-4)


def test_a_patch_with_a_subspace_of_the_run_itself_is_the_identity_bit_for_bit(llama):
    run = hk.forward(llama, "I like oat milk", hk.capture(SITE))
    hook = hk.patch(SITE, run, subspace=directions(4))
    assert torch.equal(hk.forward(llama, "I like oat milk", hook).logits, run.logits)


def test_hooks_and_subspaces_are_read_back_from_files(llama, tmp_path):
    subspace = hk.types.Subspace(SITE, directions(3))
    hook = subspace.interchange("Mary and", pos=-1)
    (tmp_path / "hooks.yaml").write_text(f"- '{hook.to_json()}'\n")
    assert list(hk.load_hooks(tmp_path / "hooks.yaml")) == [hook]
    path = subspace.save(tmp_path / "three.safetensors")
    assert hk.load_subspace(llama, path, any_model=True) == subspace
    with pytest.raises(OtherModel):
        hk.load_subspace(llama, path)
    with pytest.raises(BadHook, match="fit one of this site"):
        hk.load_subspace(
            llama, hk.types.Subspace(SITE, directions(2, 16)).save(path), any_model=True
        )


def test_principal_angles_are_those_of_scipy():
    for k, seed in ((2, 5), (4, 6), (4, 3)):
        first, second = (
            hk.types.Subspace(SITE, directions(4)),
            hk.types.Subspace(SITE, directions(k, seed=seed)),
        )
        expected = np.sort(
            subspace_angles(first.basis.tensor.T.numpy(), second.basis.tensor.T.numpy())
        )
        assert np.allclose(first.angles(second).numpy(), expected, atol=1e-5)
    random = first.random(seed=1)
    assert random.k == 4 and random == first.random(seed=1) != first.random(seed=2)


# ---- fits


def planted_model():
    """A model whose last token's variable a is read along two directions, and b along two others.

    Answer 30 + 4a + b follows token 10 + 4a + b. Returns the directions of a too.
    """
    lm = hk.tiny("llama")
    model = lm.model
    width, count = model.config.hidden_size, model.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator))[0].T
    angles = torch.arange(4) * math.pi / 2
    codes = torch.stack([angles.cos(), angles.sin()], dim=1)
    embedding = torch.randn(count, width, generator=generator) * 0.1
    head = torch.zeros(count, width)
    for a in range(4):
        for b in range(4):
            value = codes[a] @ basis[:2] + codes[b] @ basis[2:4]
            embedding[10 + 4 * a + b], head[30 + 4 * a + b] = value, value
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.norm.weight.fill_(1)
    model.lm_head.weight = torch.nn.Parameter(head)
    model.model.embed_tokens.weight = torch.nn.Parameter(embedding)
    return lm, basis[:2]


def all_pairs():
    """Every base and source; the answer has the source's a and the base's b."""
    pairs = []
    for base in range(16):
        for source in range(16):
            pairs.append(((5, 10 + base), (6, 7, 10 + source), 30 + 4 * (source // 4) + base % 4))
    return pairs


@pytest.fixture(scope="module")
def planted():
    return planted_model()


def test_a_planted_subspace_is_recovered_to_a_thousandth_of_a_radian(planted):
    lm, truth = planted
    settings = {"epochs": 50, "patience": 50, "lr": 0.3, "batch": 32, "controls": []}
    fit = hk.fit_subspace(lm, all_pairs(), "resid_post.0", 2, held_out=all_pairs(), **settings)
    angles = subspace_angles(fit.subspace.basis.tensor.T.double().numpy(), truth.T.double().numpy())
    assert angles.max() < 1e-3
    assert fit.table["iia"].tolist()[:1] == [1.0] and fit.table["n"][0] == 128


def test_the_controls_of_a_planted_subspace_fail_and_the_fit_does_not(planted):
    lm, _ = planted
    frame = pd.DataFrame(all_pairs(), columns=["base", "source", "answer"])
    fit = hk.fit_subspace(lm, frame, "resid_post.0", 2, epochs=8)
    assert list(fit.table) == TABLE
    accuracy = fit.table.set_index("intervention")
    assert accuracy.loc["subspace", "iia"] == 1.0
    for name in (
        "none",
        "whole site",
        "random subspaces",
        "shuffled answers",
        "reinitialised model",
    ):
        assert accuracy.loc[name, "iia"] < 0.7
        assert accuracy.loc[name, "iia_high"] < accuracy.loc["subspace", "iia_low"] + 1e-9
    assert all(fit.table["iia_low"] <= fit.table["iia"]) and all(
        fit.table["iia"] <= fit.table["iia_high"]
    )
    again = hk.fit_subspace(lm, all_pairs(), "resid_post.0", 2, epochs=8)
    pd.testing.assert_frame_equal(fit.table, again.table)
    assert torch.equal(fit.subspace.basis.tensor, again.subspace.basis.tensor)
    assert fit.subspace.about["data_sha256"] == again.subspace.about["data_sha256"]


def test_the_accuracy_is_the_share_of_held_out_pairs_that_interchanges_answer(planted):
    lm, _ = planted
    fit = hk.fit_subspace(
        lm, all_pairs(), "resid_post.0", 1, held_out=all_pairs()[::3], epochs=2, controls=[]
    )
    order = torch.randperm(86, generator=torch.Generator().manual_seed(0)).tolist()[43:]
    hits, losses = [], []
    for index in order:
        base, source, answer = all_pairs()[::3][index]
        run = hk.forward(lm, source, hk.capture("resid_post.0"))
        logits = hk.forward(lm, base, fit.subspace.interchange(run, pos=-1)).logits[0, -1]
        hits.append(int(logits.argmax()) == answer)
        losses.append(-float(logits.log_softmax(-1)[answer]))
    assert fit.table["iia"][0] == pytest.approx(np.mean(hits))
    assert fit.table["loss"][0] == pytest.approx(np.mean(losses), abs=1e-4)


def test_more_dimensions_than_the_variable_has_work_up_to_the_whole_site(planted):
    lm, _ = planted
    for k in (1, 31, 32):
        fit = hk.fit_subspace(
            lm, all_pairs()[::4], "resid_post.0", k, epochs=1, controls=["random"]
        )
        basis = fit.subspace.basis.tensor
        assert torch.allclose(basis @ basis.T, torch.eye(k), atol=1e-5)
    whole = fit.table.set_index("intervention")["loss"]
    assert whole["subspace"] == pytest.approx(whole["whole site"], abs=1e-4)


def test_pairs_of_several_lengths_in_a_model_with_attention_are_fitted(llama):
    words = ["Tea", "I like milk", "The store is in the", "Mary", "John gave a drink to"]
    pairs = [(base, source, 40 + len(source)) for base in words for source in words]
    before = {name: weight.requires_grad for name, weight in llama.model.named_parameters()}
    fit = hk.fit_subspace(llama, pairs, "z.1.2", 3, epochs=3, batch=5, controls=[])
    curve = fit.subspace.about["curve"]
    assert len(curve) == 3 and all(map(math.isfinite, curve))
    assert {name: weight.requires_grad for name, weight in llama.model.named_parameters()} == before
    assert all(weight.grad is None for weight in llama.model.parameters())


MISTAKES = {
    "hk.fit_subspace(lm, pairs, SITE, 33)": (BadHook, "give fewer"),
    "hk.fit_subspace(lm, pairs[:3], SITE, 2)": (TooFew, "at least 4"),
    "hk.fit_subspace(lm, ['Tea'], SITE, 2)": (BadPrompt, "base, source, answer"),
    "hk.fit_subspace(lm, pairs, 'z.1', 2)": (BadHook, "name one head"),
    "hk.fit_subspace(lm, pairs, ['z.1.1', 'z.1.2'], 2)": (Exception, "one|site"),
    "hk.fit_subspace(lm, pairs, SITE, 2, controls=['luck'])": (Exception, "shuffled"),
    "hk.types.Subspace(SITE, torch.ones(2, 32))": (BadHook, "independent"),
    "hk.types.Subspace('resid_post', torch.ones(32))": (BadHook, "one site"),
    "hk.patch(SITE, 'Tea', subspace=torch.ones(32), units=[1], pos=-1)": (BadHook, "one of them"),
    "hk.forward(lm, (5, 6), hk.patch(SITE, hk.forward(lm, (7, 8), hk.capture(SITE)), subspace=torch.ones(16)))": (
        BadHook,
        "16",
    ),
}


@pytest.mark.parametrize("call", MISTAKES)
def test_what_cannot_be_raises(planted, call):
    error, words = MISTAKES[call]
    with pytest.raises(error, match=words):
        eval(call, {"hk": hk, "torch": torch, "lm": planted[0], "pairs": all_pairs(), "SITE": SITE})
