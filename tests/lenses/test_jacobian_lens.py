"""The Jacobian lens: beside torch.func.jacrev, in any batch, interrupted, merged, read back; and swaps with it."""

import os
import random
import subprocess
import sys

import pandas as pd
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import hookkit as hk
from hookkit.errors import BadFile, BadHook, EmptySelection, HarvestChanged, Unsupported
from hookkit.lenses import jacobian_fit

FAMILIES = ["llama", "gpt2", "gemma2"]
QUICK = {"skip": 2, "progress": False}


def texts(count: int = 6, seed: int = 0, least: int = 6, most: int = 15) -> list[list[int]]:
    drawn = random.Random(seed)
    return [
        [drawn.randrange(3, 300) for _ in range(drawn.randrange(least, most))] for _ in range(count)
    ]


def blocks(lm: hk.LM) -> list[torch.nn.Module]:
    root = getattr(lm.model, "model", None) or lm.model.transformer
    return list(getattr(root, "layers", None) or root.h)


def first(output):
    return output[0] if isinstance(output, tuple) else output


def by_hand(lm: hk.LM, ids: list[int], layer: int, skip: int = 2) -> torch.Tensor:
    """The Jacobian of one text by torch.func.jacrev, with plain hooks."""
    model, kept = lm.model, {}

    def last(state: torch.Tensor | None) -> torch.Tensor:
        def put(module, args, output):
            kept["state"] = first(output)
            if state is None:
                return None
            return (state[None], *output[1:]) if isinstance(output, tuple) else state[None]

        def keep(module, args, output):
            kept["last"] = first(output)[0]

        handles = [blocks(lm)[layer].register_forward_hook(put)]
        handles.append(blocks(lm)[-1].register_forward_hook(keep))
        try:
            model(input_ids=torch.tensor([ids]), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return kept["last"]

    with torch.no_grad():
        last(None)
    with sdpa_kernel(SDPBackend.MATH):  # the other kernels cannot be batched by vmap
        whole = torch.func.jacrev(last)(kept["state"][0].detach())
    inside = slice(skip, len(ids) - 1)
    return whole[inside, :, inside].sum(0).mean(1).detach()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_jacobian_is_that_of_jacrev_in_a_padded_batch_and_the_identity_at_the_last_layer(
    family,
):
    lm, rows = hk.tiny(family), texts()
    lens = hk.fit_jacobian(lm, rows, layers=range(lm.n_layers), batch_tokens=64, **QUICK)
    for layer in range(lm.n_layers):
        expected = torch.stack([by_hand(lm, row, layer) for row in rows]).mean(0)
        assert torch.allclose(lens.jacobian(f"resid_post.{layer}"), expected, atol=1e-5), layer
    last = lens.table.iloc[-1]
    assert (
        last["identity"] == pytest.approx(1)
        and max(last["identity_distance"], last["noise"]) < 1e-6
    )
    halves = [
        torch.stack([by_hand(lm, row, 0) for row in rows[half::2]]).mean(0) for half in (0, 1)
    ]
    mean = (halves[0] + halves[1]) / 2
    row = lens.table.iloc[0]
    noise = (halves[0] - halves[1]).norm() / mean.norm()
    multiple = mean.trace() / len(mean)
    distance = (mean - multiple * torch.eye(len(mean))).norm() / mean.norm()
    assert row["noise"] == pytest.approx(float(noise), rel=1e-3)
    assert row["identity"] == pytest.approx(float(multiple), rel=1e-3)
    assert row["identity_distance"] == pytest.approx(float(distance), rel=1e-3)
    state = torch.cat([torch.randn(1, len(mean)), torch.randn(2, len(mean))])
    site = hk.Site("resid_post", 0)
    assert torch.allclose(lens.translated(site, state), state @ mean.T, atol=1e-4)


def test_neither_the_order_of_the_texts_nor_their_batches_matter_and_weights_are_left_alone():
    lm, rows = hk.tiny("llama"), texts(8)
    before = {name: weight.requires_grad for name, weight in lm.model.named_parameters()}
    one = hk.fit_jacobian(lm, rows, batch_tokens=1, **QUICK)
    other = hk.fit_jacobian(lm, [*rows[4:], *rows[:4]], batch_tokens=500, **QUICK)
    again = hk.fit_jacobian(lm, rows, batch_tokens=1, **QUICK)
    for site in one.sums:
        assert torch.allclose(one.jacobian(site), other.jacobian(site), atol=1e-6)
        assert torch.equal(one.sums[site], again.sums[site])
        assert one.lengths[site] == pytest.approx(other.lengths[site], rel=1e-5)
    assert {name: weight.requires_grad for name, weight in lm.model.named_parameters()} == before
    assert all(weight.grad is None for weight in lm.model.parameters())
    run = hk.forward(lm, rows[0], hk.capture("resid_post.1"))
    assert not run["resid_post.1"].requires_grad


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rows_of_watched_tokens_are_those_of_the_whole_lens(family):
    lm, rows, tokens = hk.tiny(family), texts(), [7, 90, 30]
    whole = hk.fit_jacobian(lm, rows, **QUICK)
    some = hk.fit_jacobian(lm, rows, tokens=tokens, **QUICK)
    for token in tokens:
        one, other = whole.vector(token, 1), some.vector(token, 1)
        assert torch.allclose(one.tensor, other.tensor, atol=1e-5)
        assert one.norm == pytest.approx(other.norm, rel=1e-5) and one.site == other.site
    prompts = texts(3, seed=5)
    read = hk.logit_lens(
        lm, prompts, sites=list(whole.sums), top=0, watch=tokens, lens=whole, pos=[-1, 3]
    )
    if family == "gpt2":
        lm.model.transformer.ln_f.bias.data.normal_()
        biased = hk.fit_jacobian(lm, rows, tokens=tokens, **QUICK)
        with pytest.raises(Unsupported, match="bias"):
            biased.rank_tokens(prompts)
        return
    ranked = some.rank_tokens(prompts, pos=[-1, 3])
    key = ["row", "pos", "site", "token_id"]
    read["order"] = read.groupby(key[:3])["logit"].rank(ascending=False).astype(int)
    both = ranked.merge(read, on=key, suffixes=("", "_lens"))
    assert len(both) == len(ranked) == 3 * 2 * 2 * 3 and (both["rank"] == both["order"]).all()
    if family == "llama":  # RMSNorm: the logit is the score by the length of J h
        ratio = both["logit"] / both["score"]
        spread = ratio.groupby([both["row"], both["pos"], both["site"]]).agg(
            lambda of: of.std() / of.mean()
        )
        assert (spread.abs() < 1e-3).all()
        table = some.table
        weights = (lm.model.lm_head.weight[tokens] * lm.model.model.norm.weight).detach()
        mean = some.jacobian("resid_post.0").detach()
        multiple = (mean * weights).sum() / weights.square().sum()
        assert table["identity"][0] == pytest.approx(float(multiple), rel=1e-3)


def test_the_lens_reads_as_the_model_reads_what_it_translates_and_the_end_is_the_models_own():
    lm, rows = hk.tiny("llama"), texts()
    lens = hk.fit_jacobian(lm, rows, **QUICK)
    table = hk.logit_lens(lm, rows[0], top=4, lens=lens)
    plain = lm.model(input_ids=torch.tensor([rows[0]]), output_hidden_states=True)
    state = plain.hidden_states[1][0, -1] @ lens.jacobian("resid_post.0").T
    expected = lm.model.lm_head(lm.model.model.norm(state))
    shown = table[table["layer"] == 0]
    assert torch.allclose(
        torch.tensor(shown["logit"].tolist()), expected.topk(4).values.double().float(), atol=1e-4
    )
    assert table[table["layer"] == 2]["kl"].eq(0).all()
    with pytest.raises(Unsupported, match="rank_tokens"):
        hk.logit_lens(lm, rows[0], lens=hk.fit_jacobian(lm, rows, tokens=[7], **QUICK))
    with pytest.raises(Unsupported, match="logit_lens"):
        lens.rank_tokens(rows[0])


def test_a_fit_that_was_interrupted_anywhere_continues_with_the_same_numbers(tmp_path, monkeypatch):
    lm, rows = hk.tiny("llama"), texts(30, least=3)
    settings = {"tokens": [7, 9], "batch_tokens": 20, **QUICK}
    whole = hk.fit_jacobian(lm, iter(rows), path=tmp_path / "whole.safetensors", **settings)
    add, left = jacobian_fit.JacobianSum.add, 0

    def stop_later(self, batch):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        add(self, batch)

    path, stops = tmp_path / "cut.safetensors", 0
    monkeypatch.setattr(jacobian_fit.JacobianSum, "add", stop_later)
    while True:
        left = 4
        try:
            lens = hk.fit_jacobian(lm, iter(rows), path=path, **settings)
            break
        except KeyboardInterrupt:
            stops += 1
            partial = hk.load_lens(path, lm=lm)
            assert 0 < sum(partial.counts) < sum(whole.counts) and len(partial.table) == 2
            with pytest.raises(HarvestChanged, match="same texts"):
                hk.fit_jacobian(lm, [], path=path, **settings)
    assert stops > 2
    for site in whole.sums:
        assert torch.equal(lens.sums[site], whole.sums[site])
    assert lens.about == whole.about and lens.counts == whole.counts and lens.about["left_out"] > 0
    assert path.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    left = 0  # a finished fit computes nothing again
    assert torch.equal(
        hk.fit_jacobian(lm, rows, path=path, **settings).sums["resid_post.0"],
        whole.sums["resid_post.0"],
    )
    for changed in ({"skip": 3}, {"tokens": [7]}, {"window": 20}, {"layers": 0}):
        with pytest.raises(HarvestChanged, match="other settings"):
            hk.fit_jacobian(lm, rows, path=path, **{**settings, **changed})
    for other in ([*texts(1, seed=9), *rows[1:]], rows[:10]):
        with pytest.raises(HarvestChanged):
            hk.fit_jacobian(lm, other, path=path, **settings)


CODE = """
import os, signal, sys, torch
torch.set_num_threads(1)
import hookkit as hk
from hookkit.lenses import jacobian_fit
from test_jacobian_lens import QUICK, texts
add, left = jacobian_fit.JacobianSum.add, int(sys.argv[2])
def killed(self, batch):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    add(self, batch)
jacobian_fit.JacobianSum.add = killed
hk.fit_jacobian(hk.tiny("llama"), texts(9), tokens=[7], batch_tokens=20, path=sys.argv[1], **QUICK)
"""


def test_a_process_that_is_killed_leaves_a_lens_that_the_next_one_completes(tmp_path):
    path = tmp_path / "lens.safetensors"
    here = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    command = [sys.executable, "-c", CODE, str(path), "3"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": here}, check=False)
    assert done.returncode == -9 and path.exists()
    lm = hk.tiny("llama")
    settings = {"tokens": [7], "batch_tokens": 20, **QUICK}
    again = hk.fit_jacobian(lm, texts(9), path=path, **settings)
    whole = hk.fit_jacobian(lm, texts(9), **settings)
    assert torch.allclose(again.sums["resid_post.0"], whole.sums["resid_post.0"], rtol=1e-6, atol=0)


def test_merged_halves_are_the_whole(tmp_path):
    lm, rows = hk.tiny("llama"), texts(8)
    for settings in (QUICK, {**QUICK, "tokens": [7, 9]}):
        whole = hk.fit_jacobian(lm, rows, **settings)
        parts = [
            hk.fit_jacobian(lm, rows[:4], **settings),
            hk.fit_jacobian(lm, rows[4:], **settings),
        ]
        parts[1] = hk.load_lens(parts[1].save(tmp_path / "part.safetensors"), lm=lm)
        merged = parts[0].merge(parts[1])
        for site in whole.sums:
            assert torch.allclose(merged.sums[site], whole.sums[site], atol=1e-5)
        pd.testing.assert_frame_equal(merged.table, whole.table, rtol=1e-3)
        assert merged.counts == (4, 4) and merged.about["texts"] == 8
        assert merged.lengths == pytest.approx(whole.lengths)
        back = hk.load_lens(merged.save(tmp_path / "merged.safetensors"), lm=lm)
        assert torch.equal(back.vector(7, 1).tensor, merged.vector(7, 1).tensor)
    with pytest.raises(BadHook, match="skip"):
        merged.merge(hk.fit_jacobian(lm, rows, tokens=[7, 9], skip=3, progress=False))
    other = hk.fit_jacobian(hk.tiny("llama", seed=1), rows, tokens=[7, 9], **QUICK)
    with pytest.raises(hk.errors.OtherModel, match="weights"):
        merged.merge(other)
    with pytest.raises(BadHook, match="weights"):
        hk.load_lens(other.save(tmp_path / "other.safetensors"), lm=lm)


def test_a_published_lens_is_read_without_running_its_pickle(tmp_path):
    lm, rows = hk.tiny("llama"), texts()
    own = hk.fit_jacobian(lm, rows, **QUICK)
    jacobians = {layer: own.jacobian(f"resid_post.{layer}").half() for layer in (0, 1)}
    file = {"J": jacobians, "n_prompts": 6, "source_layers": [0, 1], "d_model": 32}
    path = tmp_path / "lens.pt"
    torch.save(file, path)
    lens = hk.load_lens(path, lm=lm)
    for site in own.sums:
        assert torch.allclose(lens.jacobian(site), own.jacobian(site), atol=2e-3)
    assert lens.table["noise"].isna().all() and (lens.table["texts"] == 6).all()
    direction = lens.vector(7, 1)
    assert torch.allclose(direction.tensor, own.vector(7, 1).tensor, atol=1e-2)
    assert direction.dose == pytest.approx(1.0)
    assert len(hk.logit_lens(lm, rows[0], lens=lens, top=1)) == 3
    both = lens.merge(hk.load_lens(path))
    assert torch.allclose(both.jacobian("resid_post.1"), lens.jacobian("resid_post.1"))

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    for wrong in ({"J": Evil(), "n_prompts": 1}, {"jacobian_sum": {}}, {"J": {0: torch.eye(3)}, "n_prompts": 0},
                  {"J": {"a": torch.eye(3)}, "n_prompts": 2}, {"J": {0: torch.ones(2, 3)}, "n_prompts": 2}, 5):  # fmt: skip
        torch.save(wrong, path)
        with pytest.raises(BadFile):
            hk.load_lens(path)
    assert not (tmp_path / "ran").exists()
    torch.save({"J": {0: torch.eye(3)}, "n_prompts": 2}, path)
    with pytest.raises(BadHook, match="another model"):
        hk.load_lens(path, lm=lm)


def test_what_cannot_be_fitted_or_read_says_why():
    lm, rows = hk.tiny("llama"), texts()
    with pytest.raises(EmptySelection, match="smaller skip"):
        hk.fit_jacobian(lm, rows, skip=30, progress=False)
    with pytest.raises(hk.errors.OutOfRange, match="layers 0 to 2"):
        hk.fit_jacobian(lm, rows, layers=[7], **QUICK)
    with pytest.raises(BadHook, match="window"):
        hk.fit_jacobian(lm, rows, window=3, **QUICK)
    with pytest.raises(Unsupported):
        hk.fit_jacobian(hk.tiny("t5"), rows, **QUICK)
    lens = hk.fit_jacobian(lm, rows, layers=1, tokens=[7], **QUICK)
    with pytest.raises(BadHook, match="resid_post.1"):
        lens.jacobian("resid_post.0")
    with pytest.raises(BadHook, match="not fitted for 8"):
        lens.vector(8, 1)
    long = hk.fit_jacobian(lm, [list(range(3, 100))], window=20, **QUICK)
    assert sum(long.counts) == 5


# ---- swaps


def lens_of(lm: hk.LM) -> hk.types.JacobianLens:
    return hk.fit_jacobian(lm, texts(), tokens=[7, 90], layers=range(lm.n_layers), **QUICK)


def swapped_by_hand(
    lm: hk.LM, lens, ids, layers, *, live: bool = False, pos=slice(None)
) -> torch.Tensor:
    """Logits with plain hooks that exchange the coordinates of the clean or of the live states."""
    kept, handles = {}, []
    for layer, block in enumerate(blocks(lm)):
        handles.append(
            block.register_forward_hook(lambda m, a, o, n=layer: kept.__setitem__(n, first(o)))
        )
    lm.model(input_ids=torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    handles = []
    for layer in layers:
        basis = torch.stack([lens.vector(token, layer).tensor for token in (7, 90)])
        inverse = torch.linalg.pinv(basis)

        def put(module, args, output, layer=layer, basis=basis, inverse=inverse):
            new = first(output).clone()
            source = new if live else kept[layer]
            wanted = (source[:, pos] @ inverse).flip(-1)
            new[:, pos] += (wanted - new[:, pos] @ inverse) @ basis
            return (new, *output[1:]) if isinstance(output, tuple) else new

        handles.append(blocks(lm)[layer].register_forward_hook(put))
    try:
        with torch.no_grad():
            return lm.model(input_ids=torch.tensor([ids])).logits[0]
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_swap_clamps_to_the_clean_pass_alone_and_in_a_padded_batch(family):
    lm, rows = hk.tiny(family), texts(3, seed=3)
    lens = lens_of(lm)
    for layers in ([1], [0, 1], [0, 1, 2]):
        run = hk.forward(lm, rows, hk.swap_concept(lens, 7, 90, layers=layers))
        plain = hk.forward(lm, rows)
        for row, ids in enumerate(rows):
            expected = swapped_by_hand(lm, lens, ids, layers)
            assert torch.allclose(run.logits[row, : len(ids)], expected, atol=1e-4)
            assert not torch.allclose(plain.logits[row, : len(ids)], expected, atol=1e-3)
    hook = hk.swap_concept(lens, 7, 90, layers=[0, 1], pos=-1, rows=[1])
    run = hk.forward(lm, rows, hook)
    expected = swapped_by_hand(lm, lens, rows[1], [0, 1], pos=slice(-1, None))
    assert torch.allclose(run.logits[1, : len(rows[1])], expected, atol=1e-4)
    assert torch.equal(run.logits[0], plain.logits[0])


def test_an_even_band_of_layers_does_not_undo_the_swap():
    """The trap: where blocks add nothing, a second exchange of the live coordinates gives back the first state."""
    lm = hk.tiny("llama")
    for block in lm.model.model.layers[1:]:
        block.self_attn.o_proj.weight.data.zero_()
        block.mlp.down_proj.weight.data.zero_()
    lens, ids = lens_of(lm), texts(1, seed=4)[0]
    plain = hk.forward(lm, ids).logits[0]
    one = hk.forward(lm, ids, hk.swap_concept(lens, 7, 90, layers=[1])).logits[0]
    two = hk.forward(lm, ids, hk.swap_concept(lens, 7, 90, layers=[1, 2])).logits[0]
    live = swapped_by_hand(lm, lens, ids, [1, 2], live=True)
    assert torch.allclose(live, plain, atol=1e-4)  # what swaps of live coordinates do
    assert torch.allclose(one, two, atol=1e-4) and not torch.allclose(one, plain, atol=1e-2)


def test_a_swap_in_generate_is_that_of_a_forward_over_its_text():
    lm, rows = hk.tiny("llama"), texts(3, seed=6)
    hook = hk.swap_concept(lens_of(lm), 7, 90, layers=[0, 1])
    together = hk.generate(lm, rows, hook, max_new_tokens=4, do_sample=False, logits="all")
    for row, ids in enumerate(rows):
        alone = hk.generate(lm, ids, hook, max_new_tokens=4, do_sample=False)
        text = alone.tokens[0].tolist()
        logits = hk.forward(lm, text[:-1], hook).logits[0, len(ids) - 1 :]
        assert logits.argmax(-1).tolist() == text[len(ids) :]
        plain = hk.generate(lm, ids, hook, max_new_tokens=4, do_sample=False, use_cache=False)
        assert plain.tokens[0].tolist() == text
        assert together.tokens[row].tolist()[: len(text)] == text
    only_new = hk.swap_concept(lens_of(lm), 7, 90, layers=[0, 1], pos=hk.GENERATED)
    hk.generate(lm, rows, only_new, max_new_tokens=3, do_sample=False)
    assert not any(module._forward_hooks for module in lm.model.modules())


def test_a_swap_is_a_value_and_refuses_what_it_cannot_do():
    lm = hk.tiny("llama")
    lens = lens_of(lm)
    hook = hk.swap_concept(lens, 7, 90, layers=[0, 1], pos=-1)
    assert (
        str(hook)
        == "swap_concept(resid_post.0, resid_post.1, 7, 90, vectors=tensor[2, 2, 32], pos=-1)"
    )
    assert hk.types.Hook.from_json(hook.to_json()) == hook
    assert hk.parse_hook(hk.format_hook(hook)) == hook
    with pytest.raises(BadHook, match="one direction"):
        hk.swap_concept(lens, 7, 7, layers=[0])
    with pytest.raises(BadHook, match="vectors of tokens"):
        hk.swap_concept(5, 7, 90, layers=[0])
    with pytest.raises(BadHook, match="not fitted for 8"):
        hk.swap_concept(lens, 7, 8, layers=[0])
    with pytest.raises(Unsupported, match="beside the run"):
        hk.logit_lens(lm, [5, 6, 7], hk.swap_concept(lens, 7, 90, layers=[2]))
    when = hk.swap_concept(
        lens, 7, 90, layers=[0, 1], when=hk.when.norm_above(1e9, site="resid_pre.0")
    )
    assert torch.equal(hk.forward(lm, [5, 6, 7], when).logits, hk.forward(lm, [5, 6, 7]).logits)
