"""Features as sites: every verb at them, against hooks written by hand on plain transformers."""

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from dictionaries import encode, random_weights, write
from torch import Tensor

import hookkit as hk
from hookkit.errors import BadHook

IDS = [(5, 6, 7, 8, 9), (10, 11, 12)]
SITE = "feat.resid_post.1"
PADDED = torch.tensor([[5, 6, 7, 8, 9], [0, 0, 10, 11, 12]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
ARCHITECTURES = ("standard", "topk", "jumprelu", "gated")


@pytest.fixture(scope="module")
def plain() -> hk.LM:
    return hk.tiny("llama")


def with_dictionary(lm: hk.LM, folder: Path, architecture: str = "topk", **settings) -> hk.LM:
    dictionary = hk.load_dictionary(write(folder, architecture, **settings))
    return lm.with_dictionaries(dictionary, check=False)


@pytest.fixture(scope="module")
def lm(plain: hk.LM, tmp_path_factory) -> hk.LM:
    return with_dictionary(plain, tmp_path_factory.mktemp("topk"))


def by_hand(lm: hk.LM, change: Callable[[Tensor], Tensor], run: Callable[[], Tensor]) -> Tensor:
    """What plain transformers gives with a hook on block 1 that changes the stream."""
    handle = lm.root.model.layers[1].register_forward_hook(lambda _, __, output: change(output))
    try:
        with torch.no_grad():
            return run()
    finally:
        handle.remove()


def at_real(logits: Tensor) -> Tensor:
    return torch.cat([logits[0], logits[1, 2:]])


def of_run(run: hk.types.Run) -> Tensor:
    return torch.cat([run.logits[0], run.logits[1, :3]])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_changed_leaves_the_logits_as_they_are_bit_for_bit(plain, tmp_path, architecture):
    lm = with_dictionary(plain, tmp_path, architecture)
    hooks = [
        hk.capture(SITE),
        hk.scale(SITE, 1.0),
        hk.edit(f"{SITE}.3", lambda values: values),
        hk.steer(f"{SITE}.3", 0.0),
        hk.capture(f"{SITE}.3", pos=-1),
    ]
    assert torch.equal(hk.forward(lm, IDS, *hooks).logits, hk.forward(plain, IDS).logits)
    written = hk.generate(lm, IDS, *hooks, max_new_tokens=4)
    expected = hk.generate(plain, IDS, max_new_tokens=4)
    assert torch.equal(written.logits, expected.logits)
    assert torch.equal(written.tokens, expected.tokens)


@pytest.mark.parametrize("normalization", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_edit_adds_the_change_times_the_decoder_and_keeps_the_error(
    plain, tmp_path, architecture, normalization
):
    lm = with_dictionary(plain, tmp_path, architecture, normalize_activations=normalization)
    w = random_weights(architecture)

    def change(x: Tensor) -> Tensor:
        scale = torch.ones(())
        inputs = x
        if normalization == "layer_norm":
            scale = x.std(-1, keepdim=True)
            inputs = (x - x.mean(-1, keepdim=True)) / (scale + 1e-5)
        elif normalization == "constant_norm_rescale":
            scale = x.norm(dim=-1, keepdim=True) / 32**0.5
            inputs = x / scale
        f = encode(w, inputs, architecture)
        new = f.clone()
        new[..., 3], new[..., 40:50] = 2.5, 0.0
        return x + scale * ((new - f) @ w["W_dec"])

    model = lambda: plain.root(PADDED, attention_mask=MASK).logits  # noqa: E731
    expected = at_real(by_hand(plain, change, model))
    hooks = [hk.ablate(f"{SITE}.3", to=torch.tensor(2.5)), hk.ablate(SITE, units=range(40, 50))]
    run = hk.forward(lm, IDS, *hooks, hk.capture(SITE))
    torch.testing.assert_close(of_run(run), expected, rtol=0, atol=1e-4)
    # a later hook reads what the earlier ones left
    assert torch.equal(run[SITE][0, :, 3], torch.full((5,), 2.5))
    assert not run[SITE][..., 40:50].any()

    generate = lambda: plain.root.generate(  # noqa: E731
        PADDED, attention_mask=MASK, max_new_tokens=4, do_sample=False, pad_token_id=0
    )
    expected = by_hand(plain, change, generate)
    written = hk.generate(lm, IDS, *hooks, max_new_tokens=4)
    assert [list(row)[-4:] for row in expected.tolist()] == [
        written.tokens[0, 5:9].tolist(),
        written.tokens[1, 3:7].tolist(),
    ]


def test_rows_with_edits_of_their_own_are_single_runs(lm):
    edits = [
        hk.ablate(SITE, rows=0),
        hk.steer(f"{SITE}.7", 3.0, rows=1, pos=-1),
        hk.scale(f"{SITE}.9", -2.0, rows=2, pos=[0, 2]),
        hk.edit(SITE, lambda f: f.flip(-1), rows=3),
    ]
    alone = [
        hk.ablate(SITE),
        hk.steer(f"{SITE}.7", 3.0, pos=-1),
        hk.scale(f"{SITE}.9", -2.0, pos=[0, 2]),
        hk.edit(SITE, lambda f: f.flip(-1)),
    ]
    prompts = [*IDS, (13, 14, 15, 16), (17, 18)]
    together = hk.forward(lm, prompts, *edits)
    written = hk.generate(lm, prompts, *edits, max_new_tokens=3)
    for row, (prompt, hook) in enumerate(zip(prompts, alone, strict=True)):
        one = hk.forward(lm, [prompt], hook).logits[0]
        torch.testing.assert_close(together.logits[row, : len(prompt)], one, rtol=0, atol=1e-4)
        one = hk.generate(lm, [prompt], hook, max_new_tokens=3).tokens[0]
        assert written.tokens[row, : len(one)].tolist() == one.tolist()


def test_every_verb_works_at_features(plain, lm):
    w = random_weights("topk")
    base = hk.forward(lm, IDS, hk.capture([SITE, "resid_post.1"]))
    f, x = base[SITE], base["resid_post.1"]
    torch.testing.assert_close(f[0], encode(w, x[0], "topk"))
    assert not f[1, 3:].any() and f.shape == (2, 5, 96)
    feature = int(f[0, -1].argmax())
    one = f"{SITE}.{feature}"
    others = hk.forward(lm, [(20, 21, 22, 23, 24), (25, 26, 27)], hk.capture(SITE))

    def streams(*hooks):
        return hk.forward(lm, IDS, *hooks, hk.capture("resid_post.1"))["resid_post.1"]

    def expect(new: Tensor) -> Tensor:
        return x + (new - f) @ w["W_dec"]

    def real(values: Tensor) -> Tensor:
        return torch.cat([values[0], values[1, :3]])

    def with_value(value) -> Tensor:
        new = f.clone()
        new[..., feature] = value
        return new

    cases = {
        hk.ablate(one): with_value(0),
        hk.steer(one, 4.0): with_value(f[..., feature] + 4),
        hk.scale(one, 3.0): with_value(f[..., feature] * 3),
        hk.edit(one, lambda values: values + 1): with_value(f[..., feature] + 1),
        hk.ablate(SITE, to="mean", over=others, per="all"): real_mean(others).expand_as(f),
        hk.patch(SITE, others): others[SITE],
        hk.patch(one, others): with_value(others[SITE][..., feature]),
        hk.ablate(SITE, to="resample", over=others): None,
    }
    for hook, new in cases.items():
        changed = streams(hook)
        if new is not None:
            torch.testing.assert_close(real(changed), real(expect(new)), rtol=0, atol=1e-4)
        assert not torch.equal(changed, x), str(hook)
    direction = torch.zeros(96)
    direction[feature] = 2.0
    torch.testing.assert_close(
        real(streams(hk.project_out(SITE, direction))),
        real(expect(with_value(0))),
        rtol=0,
        atol=1e-4,
    )
    with pytest.raises(BadHook, match="one number"):
        streams(hk.project_out(one, torch.ones(1)))
    assert str(hk.parse_hook(f"ablate:{one}")) == f"ablate({one})"
    again = hk.types.Hook.from_json(hk.scale(one, 2.0).to_json())
    assert again == hk.scale(one, 2.0)


def real_mean(run) -> Tensor:
    values = run[SITE]
    return torch.cat([values[0], values[1, :3]]).mean(0)


def test_hooks_on_the_stream_and_on_features_act_in_their_order(plain, lm):
    w = random_weights("topk")

    def change(x: Tensor) -> Tensor:
        f = encode(w, x, "topk")
        x = x + (1 - f[..., [3]]) * w["W_dec"][3] + 0.5
        moved = x - (1 - f[..., [3]]) * w["W_dec"][3]  # what the dictionary reads: without its edit
        return x - encode(w, moved, "topk")[..., [8]] * w["W_dec"][8]

    hooks = [
        hk.ablate(f"{SITE}.3", to=torch.tensor(1.0)),
        hk.steer("resid_post.1", torch.full((32,), 0.5)),
        hk.ablate(f"{SITE}.8"),
        hk.capture(f"{SITE}.3"),
    ]
    run = hk.forward(lm, IDS[0], *hooks)
    expected = by_hand(plain, change, lambda: plain.root(PADDED[:1]).logits)
    torch.testing.assert_close(run.logits, expected, rtol=0, atol=1e-4)


def test_an_edit_asks_a_feature_first(lm):
    f = hk.forward(lm, IDS, hk.capture(SITE))[SITE]
    feature = int(
        (f > 0).sum((0, 1)).sub(4).abs().argmin()
    )  # active at about half of the positions
    one, active = f"{SITE}.{feature}", f[..., feature] > 0
    assert 0 < active.sum() < 8
    asks = hk.when.norm_above(1e-6, site=one)
    clamped = hk.forward(lm, IDS, hk.ablate(one, to=torch.tensor(4.0), when=asks), hk.capture(one))
    assert torch.equal(clamped[one] == 4, active)
    hooks = [hk.capture("resid_post.2"), hk.steer("resid_post.2", torch.ones(32), when=asks)]
    run = hk.forward(lm, IDS, *hooks, hk.capture("resid_post.2", name="after"))
    before, after = (captured.values for captured in run.captures.all)
    assert torch.equal((after != before).any(-1), active)
    written = hk.generate(lm, IDS, hk.scale(one, 3.0, when=asks), hk.capture(one), max_new_tokens=3)
    everywhere = hk.generate(lm, IDS, hk.scale(one, 3.0), hk.capture(one), max_new_tokens=3)
    assert torch.equal(written.tokens, everywhere.tokens)
    assert torch.equal(written[one], everywhere[one])


def test_a_sparse_capture_holds_what_the_dense_one_does(lm):
    hooks = [
        hk.capture(SITE, name="dense"),
        hk.capture(SITE, sparse=True, name="sparse"),
        hk.capture(SITE, pos=[-1, -2], name="last dense"),
        hk.capture(SITE, pos=[-1, -2], sparse=True, name="last sparse"),
    ]
    for run in (hk.forward(lm, IDS, *hooks), hk.generate(lm, IDS, *hooks, max_new_tokens=4)):
        for name in ("", "last "):
            dense, sparse = run[SITE, f"{name}dense"], run[SITE, f"{name}sparse"]
            assert sparse.is_sparse and torch.equal(sparse.to_dense(), dense)
            assert sparse.values().numel() == int((dense != 0).sum())
            assert torch.equal(run[f"{SITE}.5", f"{name}sparse"], dense[..., 5])
    source = hk.forward(lm, IDS, hk.capture(SITE, sparse=True))
    assert torch.equal(hk.forward(lm, IDS, hk.patch(SITE, source)).logits, source.logits)
    with pytest.raises(BadHook, match="few zeros"):
        hk.capture("resid_post.1", sparse=True)
    with pytest.raises(BadHook, match="leave sparse=True or grad=True out"):
        hk.capture(SITE, sparse=True, grad=True)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("architecture", ["transcoder", "skip_transcoder", "jumprelu_transcoder"])
def test_a_transcoder_reads_the_mlp_input_and_writes_its_output(tmp_path, family, architecture):
    plain = hk.tiny(family)
    lm = with_dictionary(plain, tmp_path, architecture)
    site, w = "feat.mlp_out.1", random_weights(architecture)
    base = hk.forward(lm, IDS, hk.capture(["mlp_in.1", "mlp_out.1", site]))
    f = encode(w, base["mlp_in.1"], architecture, centred=False)
    torch.testing.assert_close(of_values(base[site]), of_values(f))
    assert torch.equal(base.logits, hk.forward(plain, IDS).logits)
    run = hk.forward(lm, IDS, hk.ablate(site, units=[2, 3, 4]), hk.capture("mlp_out.1"))
    lost = f[..., 2:5] @ w["W_dec"][2:5]
    torch.testing.assert_close(
        of_values(run["mlp_out.1"]), of_values(base["mlp_out.1"] - lost), rtol=0, atol=1e-4
    )
    expected = hk.forward(plain, IDS, hk.steer("mlp_out.1", -lost)).logits
    torch.testing.assert_close(run.logits, expected, rtol=0, atol=1e-4)
    written = hk.generate(lm, IDS, hk.scale(site, 1.0), hk.capture(site), max_new_tokens=3)
    assert torch.equal(written.tokens, hk.generate(plain, IDS, max_new_tokens=3).tokens)


def of_values(values: Tensor) -> Tensor:
    return torch.cat([values[0], values[1, :3]])


def test_a_change_of_what_a_transcoder_reads_changes_its_features(tmp_path, plain):
    lm = with_dictionary(plain, tmp_path, "transcoder")
    vector = torch.linspace(-1, 1, 32)
    run = hk.forward(
        lm, IDS, hk.capture("feat.mlp_out.1"), hk.steer("mlp_in.1", vector), hk.capture("mlp_in.1")
    )
    expected = encode(random_weights("transcoder"), run["mlp_in.1"], "transcoder", centred=False)
    torch.testing.assert_close(of_values(run["feat.mlp_out.1"]), of_values(expected))


def test_heads_are_one_axis_to_a_dictionary(tmp_path, plain):
    folder = write(
        tmp_path, metadata={"hook_name": "blocks.1.attn.hook_z"}, reshape_activations="hook_z"
    )
    lm = plain.with_dictionaries(hk.load_dictionary(folder), check=False)
    w, site = random_weights("topk"), "feat.z.1"
    z = hk.forward(plain, IDS, hk.capture("z.1"))["z.1"]
    run = hk.forward(lm, IDS, hk.capture(site), hk.ablate(site), hk.capture("z.1"))
    f = encode(w, z.flatten(2), "topk")
    torch.testing.assert_close(of_values(run[site]), of_values(f))
    expected = z - (f @ w["W_dec"]).unflatten(-1, z.shape[2:])
    torch.testing.assert_close(of_values(run["z.1"]), of_values(expected))


def test_the_reconstruction_replaces_the_values_only_by_name(tmp_path, plain):
    dictionary = hk.load_dictionary(write(tmp_path))
    lm = plain.with_dictionaries(dictionary, check=False, replace=True)
    assert "replaces the values: loss" in repr(lm)
    w = random_weights("topk")

    def change(x: Tensor) -> Tensor:
        f = encode(w, x, "topk")
        f[..., 3] = 2.0
        return f @ w["W_dec"] + w["b_dec"]

    expected = at_real(
        by_hand(plain, change, lambda: plain.root(PADDED, attention_mask=MASK).logits)
    )
    run = hk.forward(lm, IDS, hk.ablate(f"{SITE}.3", to=torch.tensor(2.0)))
    torch.testing.assert_close(of_run(run), expected, rtol=0, atol=1e-4)
    looked = hk.forward(lm, IDS, hk.capture(SITE))
    assert torch.equal(looked.logits, hk.forward(plain, IDS).logits)


def test_a_copy_of_an_lm_and_the_record_of_a_run_have_the_dictionaries(lm):
    copied = pickle.loads(pickle.dumps(lm))
    hook = hk.steer(f"{SITE}.7", 3.0)
    assert torch.equal(hk.forward(copied, IDS, hook).logits, hk.forward(lm, IDS, hook).logits)
    about = hk.forward(lm, IDS).about["dictionaries"]
    assert about[0]["site"] == "resid_post.1" and about[0]["sha256"] == lm.dictionaries[0].hash
    table = lm.describe()
    assert table.query("site == @SITE")["sizes"].item() == "batch pos 96"
    assert SITE in lm.sites._ipython_key_completions_()
