"""Attribution: the first-order estimate of patching, which it equals where the model is linear."""

import sys

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import hookkit as hk
from hookkit.errors import BadHook, BadPrompt, EmptySelection, MissingSite, OutOfRange, Unsupported

CLEAN = [[5, 6, 7, 8, 9, 30], [9, 10, 3], [11, 12, 13]]
CORRUPTED = [[5, 6, 17, 8, 9, 30], [9, 11, 3], [11, 12, 14]]
DIFF = hk.metrics.logit_diff(5, 7)


@pytest.fixture(scope="module")
def linear_end():
    """A GPT-2 whose head reads the stream as it is: all that the last block adds is in the logits linearly."""
    lm = hk.tiny("gpt2")
    lm.model.transformer.ln_f = nn.Identity()
    return lm


def both(lm, sites, **settings):
    estimate = hk.attribution(lm, CLEAN, CORRUPTED, sites, DIFF, **settings)
    return estimate, hk.patching(lm, CLEAN, CORRUPTED, sites, DIFF, **settings)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("site", ["resid_post", "mlp_out"])
def test_attribution_is_patching_where_nothing_behind_the_site_bends(linear_end, site, direction):
    estimate, truth = both(linear_end, site, layers=[2], direction=direction)
    pd.testing.assert_frame_equal(estimate, truth, check_like=False, atol=1e-4, rtol=1e-4)
    assert truth["logit_diff_delta"].abs().max() > 0.1
    agreed = hk.stats.compare_attributions(estimate, truth)
    assert agreed["pearson"][0] > 0.999999 and agreed["same_sign"][0] == 1


def test_a_model_without_a_final_norm_is_linear_at_its_last_block_of_its_own():
    lm = hk.tiny("opt", config={"do_layer_norm_before": False})
    estimate, truth = both(lm, "resid_post", layers=[2])
    pd.testing.assert_frame_equal(estimate, truth, atol=1e-4, rtol=1e-4)


def test_each_neuron_is_its_patch_where_nothing_bends_and_they_sum_to_the_site(linear_end):
    table = hk.attribution(linear_end, CLEAN, CORRUPTED, "mlp_post", DIFF, layers=[2], by="neuron")
    assert (
        list(table.columns[:3]) == ["layer", "unit", "row"]
        and len(table) == 3 * linear_end.sizes["d_mlp"]
    )
    source = hk.forward(linear_end, CLEAN, hk.capture("mlp_post.2"))["mlp_post.2"]
    for unit in (0, 17):

        def put(values, unit=unit):
            values = values.clone()
            values[..., unit] = source[..., unit]
            return values

        run = hk.forward(linear_end, CORRUPTED, hk.edit("mlp_post.2", put))
        found = table[table["unit"] == unit]["logit_diff"].tolist()
        assert found == pytest.approx(DIFF(run).tolist(), abs=1e-4)
    whole = hk.attribution(linear_end, CLEAN, CORRUPTED, "mlp_post", DIFF, layers=[2])
    for row in range(3):
        parts = [each[each["row"] == row]["logit_diff_delta"].sum() for each in (table, whole)]
        assert parts[0] == pytest.approx(parts[1], abs=1e-5)


@pytest.mark.parametrize(
    ("sites", "settings"),
    [
        ("resid_pre", {}),
        (["attn_out", "mlp_out"], {"pos": [-1, slice(1, 3)]}),
        ("z", {}),
        ("k", {"heads": [1]}),
        ("pattern", {"pos": [-1]}),
        ("embed", {}),
        ("z", {"pos": {"differs": [2, 1, 2], "end": -1}}),
    ],
)
def test_the_table_is_that_of_patching(llama, sites, settings):
    estimate, truth = both(llama, sites, **settings)
    assert list(estimate.columns) == list(truth.columns)
    cells = [name for name in truth.columns if "logit_diff" not in name]
    assert estimate[cells].astype(str).equals(truth[cells].astype(str))
    assert estimate["logit_diff_before"].tolist() == pytest.approx(
        truth["logit_diff_before"].tolist(), abs=1e-5
    )
    assert np.allclose(
        estimate["logit_diff_effect"] * truth["logit_diff_delta"],
        truth["logit_diff_effect"] * estimate["logit_diff_delta"],
        atol=1e-4,
        equal_nan=True,
    )
    hk.stats.mean_over_prompts(estimate)


def test_a_heads_attribution_is_what_hooks_by_hand_make_of_it(llama):
    """Torch's own hooks alone: z of both prompts, its gradient, and their product for one head."""
    kept = {}

    def keep(module, args):
        kept["z"] = args[0]
        args[0].retain_grad()

    projection = llama.model.model.layers[1].self_attn.o_proj
    handle = projection.register_forward_pre_hook(keep)
    with torch.enable_grad():
        llama.model(torch.tensor([CLEAN[0]]), use_cache=False)
        clean = kept["z"].detach()
        logits = llama.model(torch.tensor([CORRUPTED[0]]), use_cache=False).logits[0, -1]
        (logits[5] - logits[7]).backward()
    handle.remove()
    llama.model.zero_grad()
    by = ((clean - kept["z"].detach()) * kept["z"].grad)[0]
    wanted = by.unflatten(-1, (4, 8)).sum(-1)  # [pos, head]
    table = hk.attribution(llama, CLEAN, CORRUPTED, "z", DIFF, layers=[1])
    assert table[table["row"] == 0]["logit_diff_delta"].tolist() == pytest.approx(
        wanted.sum(0).tolist(), abs=1e-4
    )
    placed = hk.attribution(llama, CLEAN, CORRUPTED, "z", DIFF, layers=[1], pos=[2])
    assert placed[placed["row"] == 0]["logit_diff_delta"].tolist() == pytest.approx(
        wanted[2].tolist(), abs=1e-4
    )


def test_prompts_of_several_lengths_and_in_several_batches_give_what_each_gives_alone(
    llama, monkeypatch
):
    together = hk.attribution(llama, CLEAN, CORRUPTED, "z", DIFF)
    for row in range(3):
        alone = hk.attribution(llama, CLEAN[row : row + 1], CORRUPTED[row : row + 1], "z", DIFF)
        found = together[together["row"] == row]["logit_diff_delta"].tolist()
        assert found == pytest.approx(alone["logit_diff_delta"].tolist(), abs=1e-4)
    for size in (2, 1):
        monkeypatch.setattr(sys.modules["hookkit.attributions.attribution_patching"], "BATCH", size)
        split = hk.attribution(llama, CLEAN, CORRUPTED, "z", DIFF)
        assert split["logit_diff_delta"].tolist() == pytest.approx(
            together["logit_diff_delta"].tolist(), abs=1e-4
        )


def test_places_before_the_token_that_differs_carry_nothing(llama):
    table = hk.attribution(llama, CLEAN[:1], CORRUPTED[:1], "resid_pre", DIFF)
    assert (table[table["pos"] < 2]["logit_diff_delta"] == 0).all()


def test_the_integral_over_the_embeddings_is_all_of_the_change(llama):
    everywhere = {"pos": [slice(None)]}
    table = hk.attribution(
        llama,
        CLEAN,
        CORRUPTED,
        "embed",
        DIFF,
        method="integrated",
        steps=60,
        points="middle",
        **everywhere,
    )
    wanted = DIFF(hk.forward(llama, CLEAN)) - DIFF(hk.forward(llama, CORRUPTED))
    assert table["logit_diff_delta"].tolist() == pytest.approx(wanted.tolist(), abs=0.02)
    assert (
        table["logit_diff_effect"].tolist() == pytest.approx([1, 1, 1], abs=0.02)
        and table.attrs["steps"] == 60
    )
    one = hk.attribution(llama, CLEAN, CORRUPTED, "embed", DIFF, **everywhere)
    assert np.abs(one["logit_diff_delta"] - wanted.tolist()).max() > 0.1


@pytest.mark.parametrize("points", ["start", "middle"])
def test_the_points_of_the_integral_are_the_papers_or_the_middles(llama, points):
    """EAP-IG: the gradient at z' + k/m (z - z') for k = 1 … m, where z is of the prompts that are run. By hand, with the
    embeddings as inputs and torch's own gradient at the output of the last MLP."""
    model, steps, row = llama.model, 3, 0
    embed = model.get_input_embeddings()
    clean, corrupted = (embed(torch.tensor([ids[row]])).detach() for ids in (CLEAN, CORRUPTED))
    outputs = []
    handle = model.model.layers[2].mlp.register_forward_hook(
        lambda m, a, output: outputs.append(output)
    )

    def logits(embeddings):
        return model(inputs_embeds=embeddings, use_cache=False).logits[0, -1]

    slopes = []
    for k in range(1, steps + 1):
        share = k / steps if points == "start" else (k - 0.5) / steps
        logit = logits(
            corrupted + share * (clean - corrupted)
        )  # the clean prompt is run, as in the paper
        slopes.append(torch.autograd.grad(logit[5] - logit[7], outputs[-1])[0])
    with torch.no_grad():
        logits(clean), logits(corrupted)
    handle.remove()
    wanted = ((outputs[-1] - outputs[-2]) * torch.stack(slopes).mean(0))[0].sum(-1).detach()
    given = {"layers": [2], "direction": "noise", "method": "integrated", "steps": steps}
    chosen = {} if points == "start" else {"points": points}
    table = hk.attribution(
        llama, CLEAN[row : row + 1], CORRUPTED[row : row + 1], "mlp_out", DIFF, **given, **chosen
    )
    assert table["logit_diff_delta"].tolist() == pytest.approx(wanted.tolist(), abs=1e-5)


def test_one_step_at_the_start_is_the_plain_gradient(llama):
    one = hk.attribution(llama, CLEAN, CORRUPTED, "z", DIFF, method="integrated", steps=1)
    plain = hk.attribution(llama, CLEAN, CORRUPTED, "z", DIFF)
    assert one["logit_diff_delta"].tolist() == pytest.approx(
        plain["logit_diff_delta"].tolist(), abs=1e-5
    )


@pytest.fixture(scope="module")
def linear_beside():
    """A GPT-NeoX whose head reads the stream as it is: its last MLP stands beside its attention, not behind it."""
    lm = hk.tiny("gpt_neox")
    lm.model.gpt_neox.final_layer_norm = nn.Identity()
    return lm


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("site", ["q", "k"])
@pytest.mark.parametrize("pos", [None, [-1, slice(1, 3)]])
def test_the_qk_fix_is_patching_where_only_the_softmax_bends(linear_beside, site, pos, direction):
    given = {"layers": [2], "pos": pos, "direction": direction}
    fixed = hk.attribution(linear_beside, CLEAN, CORRUPTED, site, DIFF, **given, method="qk_fix")
    plain, truth = both(linear_beside, site, **given)
    far = "logit_diff_effect"  # of a pair whose metric hardly differs
    pd.testing.assert_frame_equal(
        fixed.drop(columns=far), truth.drop(columns=far), atol=1e-4, rtol=1e-4
    )
    apart = (plain["logit_diff_delta"] - truth["logit_diff_delta"]).abs().max()
    assert apart > 0.1 * truth["logit_diff_delta"].abs().max() > 0


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "qwen3", "gpt_oss", "bloom", "gpt_neox", "mixtral", "gpt_neo"]
)
def test_the_qk_fix_is_the_gradient_where_prompts_hardly_differ(family):
    """Between two runs that hardly differ, the change of a pattern is its slope."""
    lm = hk.tiny(family)
    near = [row.copy() for row in CLEAN]
    embedding = lm.model.get_input_embeddings().weight
    with torch.no_grad():
        embedding[20:23] = embedding[[17, 11, 14]] * 0.999 + embedding[[7, 10, 13]] * 0.001
    for row, (place, token) in zip(near, ((2, 20), (1, 21), (2, 22)), strict=True):
        row[place] = token
    given = {"pos": [-1, 1], "layers": [lm.n_layers - 1]}
    for site in ("q", "k"):
        fixed = hk.attribution(lm, near, CORRUPTED, site, DIFF, **given, method="qk_fix")
        plain = hk.attribution(lm, near, CORRUPTED, site, DIFF, **given)
        assert list(fixed.columns) == list(plain.columns)
        scale = plain["logit_diff_delta"].abs().max()
        assert scale > 0
        assert (fixed["logit_diff_delta"] - plain["logit_diff_delta"]).abs().max() <= 0.02 * scale


def test_the_qk_fix_in_several_batches_is_that_in_one(llama, monkeypatch):
    given = (llama, CLEAN, CORRUPTED, ["q", "k"], DIFF)
    together = hk.attribution(*given, method="qk_fix", pos=[-1, 1])
    monkeypatch.setattr(sys.modules["hookkit.attributions.attribution_patching"], "BATCH", 2)
    split = hk.attribution(*given, method="qk_fix", pos=[-1, 1])
    assert split["logit_diff_delta"].tolist() == pytest.approx(
        together["logit_diff_delta"].tolist(), abs=1e-4
    )


def by_pattern(lm, site, layer, head, pos):
    """The QK fix by its definition: the metric's gradient at the pattern times the pattern that the model itself has
    once the other prompt's query or key stands there, less its own."""
    source = hk.forward(lm, CLEAN, hk.capture(f"{site}.{layer}"))
    place = f"pattern.{layer}"
    slopes = hk.gradients(lm, CORRUPTED, DIFF, place)
    patched = hk.forward(
        lm, CORRUPTED, hk.patch(f"{site}.{layer}.{head}", source, pos=pos), hk.capture(place)
    )
    moved = patched[place].double() - slopes.values(place).double()
    return (slopes.of(place).double() * moved).flatten(1).sum(1).tolist()


def assert_fixed(lm, sites, layer=1):
    for site in sites:
        given = {"layers": [layer], "pos": [-1, 1], "method": "qk_fix"}
        table = hk.attribution(lm, CLEAN, CORRUPTED, site, DIFF, **given)
        largest = table["logit_diff_delta"].abs().max()
        assert largest > 0
        for (head, pos), cell in table.groupby(["head", "pos"]):
            wanted = by_pattern(lm, site, layer, head, pos)
            assert cell["logit_diff_delta"].tolist() == pytest.approx(wanted, abs=1e-4 * largest), (
                site,
                head,
                pos,
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "family",
    ["llama", "gpt2", "gemma", "gemma2", "qwen3", "bloom", "mpt", "gpt_neo", "gemma4_text"],
)
def test_the_qk_fix_is_the_slope_of_the_pattern_times_the_pattern_of_the_patched_model(
    family, dtype
):
    assert_fixed(hk.LM(hk.tiny(family).model.to(dtype)), ["q", "k"])


def test_the_qk_fix_of_attention_with_a_sink_whose_share_cannot_be_read_off_the_pattern():
    assert_fixed(hk.tiny("gpt_oss"), ["q", "k"])


@pytest.mark.parametrize("cap", [0.5, 3.0])
def test_the_qk_fix_holds_under_a_soft_cap(cap):
    assert_fixed(hk.tiny("gemma2", config={"attn_logit_softcapping": cap}), ["q", "k"])


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3_text"])
def test_the_qk_fix_holds_where_the_pattern_is_saturated(family):
    lm = hk.tiny(family)
    for layer in lm.model.model.layers:
        layer.self_attn.scaling *= 60
    pattern = hk.forward(lm, CORRUPTED, hk.capture("pattern.1"))["pattern.1"]
    assert float((pattern[0].amax(-1) > 0.99).float().mean()) >= 0.4
    assert_fixed(lm, ["q", "k"])


def test_a_pattern_that_is_not_the_softmax_of_queries_and_keys_is_refused(llama):
    with pytest.raises(Unsupported, match="a hook on the way"):
        hk.attribution(
            llama,
            CLEAN,
            CORRUPTED,
            "q",
            DIFF,
            method="qk_fix",
            layers=[1],
            base_hooks=[hk.edit("scores.1", torch.sin)],
        )
    with pytest.raises(BadHook, match="'z' is neither"):
        hk.attribution(llama, CLEAN, CORRUPTED, ["q", "z"], DIFF, method="qk_fix")


def test_hooks_under_both_runs_act_in_both(linear_end):
    under = [hk.ablate("z.0.1"), hk.scale("mlp_out.2", 2.0, rows=[1])]
    estimate, truth = both(linear_end, "mlp_post", layers=[2], base_hooks=under)
    columns = ["logit_diff", "logit_diff_before", "logit_diff_effect"]
    pd.testing.assert_frame_equal(estimate[columns], truth[columns], atol=1e-4, rtol=1e-4)


def test_agreement_counts_what_it_says():
    cells = {"layer": [0, 1, 2, 3], "row": [0] * 4}
    one = pd.DataFrame({**cells, "m": 0.0, "m_before": 0.0, "m_delta": [1.0, 2.0, 0.0, -4.0]})
    two = pd.DataFrame({**cells, "m": 0.0, "m_before": 0.0, "m_delta": [2.0, 1.0, 0.0, 4.0]})
    found = hk.stats.compare_attributions(one, two.iloc[::-1], top=2).iloc[0]
    assert found["pearson"] == pytest.approx(np.corrcoef(one["m_delta"], two["m_delta"])[0, 1])
    assert found["spearman"] == pytest.approx(np.corrcoef([2, 3, 1, 0], [2, 1, 0, 3])[0, 1])
    assert (found["n"], found["top"]) == (4, 2)
    assert found["same_sign"] == pytest.approx(2 / 3) and found["overlap"] == pytest.approx(1 / 2)
    assert hk.stats.compare_attributions(one, two, by="layer")["layer"].tolist() == [0, 1, 2, 3]
    assert list(found.index) == ["value", "n", "pearson", "spearman", "same_sign", "top", "overlap"]
    with pytest.raises(EmptySelection, match="no cell in common by layer, row"):
        hk.stats.compare_attributions(one, two.assign(layer=9))
    with pytest.raises(BadHook, match="stands several times"):
        hk.stats.compare_attributions(pd.concat([one, one]), two)
    with pytest.raises(BadHook, match="say value="):
        hk.stats.compare_attributions(one, two, value="q")
    with pytest.raises(BadHook, match="by='site' is no column"):
        hk.stats.compare_attributions(one, two, by="site")


# ---- tokens


def test_a_tokens_attribution_is_its_embedding_times_the_gradient(gpt2):
    ids = torch.tensor([CLEAN[0]])
    embedded = gpt2.model.transformer.wte(ids).detach().requires_grad_()
    logits = gpt2.model(inputs_embeds=embedded).logits[0, -1]
    (slope,) = torch.autograd.grad(logits[5] - logits[7], embedded)
    wanted = (slope * embedded)[0].sum(-1).tolist()
    table = hk.token_attribution(gpt2, CLEAN, DIFF)
    assert table[table["row"] == 0]["attribution"].tolist() == pytest.approx(wanted, abs=1e-4)
    assert table["token_id"].tolist() == [token for row in CLEAN for token in row]
    assert table.groupby("row").size().tolist() == [6, 3, 3] and table["pos"].tolist()[:8] == [
        0,
        1,
        2,
        3,
        4,
        5,
        0,
        1,
    ]


@pytest.mark.parametrize("baseline", [20, torch.full((32,), 0.1)])
def test_integrated_gradients_share_out_all_of_the_change(gpt2, baseline):
    coarse, fine = (
        hk.token_attribution(gpt2, CLEAN, DIFF, method="integrated", steps=steps, baseline=baseline)
        for steps in (2, 80)
    )
    assert fine["gap"].abs().max() < 0.05 < coarse["gap"].abs().max()
    change = [
        now - was for now, was in zip(fine.attrs["metric"], fine.attrs["baseline"], strict=True)
    ]
    sums = fine.groupby("row")["attribution"].sum()
    assert (sums + fine.groupby("row")["gap"].first()).tolist() == pytest.approx(change, abs=1e-4)
    if isinstance(baseline, int):
        same = [[baseline] * len(row) for row in CLEAN]
        assert fine.attrs["baseline"] == pytest.approx(
            DIFF(hk.forward(gpt2, same)).tolist(), abs=1e-4
        )


def test_each_token_has_its_own_part_of_the_integral(gpt2):
    table = hk.token_attribution(gpt2, CLEAN, DIFF, method="integrated", steps=100, baseline=20)
    for row, ids in enumerate(CLEAN):
        embedding = gpt2.model.transformer.wte.weight.detach()
        start, end = embedding[20].expand(1, len(ids), 32), embedding[torch.tensor([ids])]
        way = torch.linspace(0, 1, 200)[
            :, None, None
        ]  # trapezoids, cut elsewhere than the code cuts the way
        at = (start + (end - start) * way).requires_grad_()
        logits = gpt2.model(inputs_embeds=at).logits[:, -1]
        (slopes,) = torch.autograd.grad((logits[:, 5] - logits[:, 7]).sum(), at)
        total = torch.trapezoid(slopes, dx=1 / 199, dim=0)[None]
        wanted = (total * (end - start))[0].sum(-1)
        found = table[table["row"] == row]["attribution"].tolist()
        assert found == pytest.approx(wanted.tolist(), abs=2e-2 * float(wanted.abs().max()))
        assert abs(table[table["row"] == row]["gap"].iloc[0]) < 2e-2 * float(wanted.abs().sum())


# ---- edges


def by_small_steps(lm, edge, row, of, to, width=2e-2):
    """The steepness of one edge by hand: a part of what the sender writes in the prompts `of`, in place of what it
    writes in the prompts `to`, reaches the receiver alone."""
    (kind, layer, *head), (name, at, *receiver) = (
        part.split(".") if "." in part else (part, 0) for part in edge
    )
    layers = lm.model.model.layers if lm.family.name == "llama" else lm.model.transformer.h
    layer, at, d_head = int(layer), int(at), lm.sizes["d_head"]
    site = {"embed": "resid_pre.0", "z": f"z.{layer}", "mlp_out": f"mlp_out.{layer}"}[kind]
    clean, here = (hk.forward(lm, [ids[row]], hk.capture(site))[site] for ids in (of, to))
    change = clean - here
    if kind == "z":
        only = torch.zeros_like(change)
        only[:, :, int(head[0])] = change[:, :, int(head[0])]
        attention = layers[layer].self_attn if lm.family.name == "llama" else layers[layer].attn
        project = attention.o_proj if lm.family.name == "llama" else attention.c_proj
        change = (project(only.flatten(2)) - project(torch.zeros_like(only.flatten(2)))).detach()
    block = layers[at]
    norms = (
        ("input_layernorm", "post_attention_layernorm")
        if lm.family.name == "llama"
        else ("ln_1", "ln_2")
    )

    def value(step):
        def whole(module, args):
            return (args[0] + step * change,)

        def head_alone(module, args, output):
            norm = getattr(block, norms[0])
            other = module.forward(norm.forward(streams[-1] + step * change))
            start = int(receiver[0]) * d_head
            if lm.family.name != "llama":
                start += "qkv".index(name) * lm.sizes["d_model"]
            output = output.clone()
            output[..., start : start + d_head] = other[..., start : start + d_head]
            return output

        streams, handles = [], []
        if name == "logits":
            final = lm.model.model.norm if lm.family.name == "llama" else lm.model.transformer.ln_f
            handles.append(final.register_forward_pre_hook(whole))
        elif name == "mlp_in":
            handles.append(getattr(block, norms[1]).register_forward_pre_hook(whole))
        else:
            reads = (
                getattr(block.self_attn, f"{name}_proj")
                if lm.family.name == "llama"
                else block.attn.c_attn
            )
            handles.append(
                getattr(block, norms[0]).register_forward_pre_hook(
                    lambda m, a: streams.append(a[0]) or None
                )
            )
            handles.append(reads.register_forward_hook(head_alone))
        with torch.no_grad():
            logits = lm.model(torch.tensor([to[row]]), use_cache=False).logits[0, -1]
        for handle in handles:
            handle.remove()
        return float(logits[5] - logits[7])

    return (value(width) - value(-width)) / (2 * width)


EDGES = [
    ("embed", "q.0.1"),
    ("embed", "logits"),
    ("z.0.2", "mlp_in.0"),
    ("z.0.1", "k.1.1"),
    ("z.1.3", "v.2.0"),
    ("mlp_out.0", "q.2.3"),
    ("mlp_out.1", "mlp_in.2"),
    ("z.2.0", "logits"),
    ("mlp_out.2", "logits"),
]


@pytest.mark.parametrize("direction", [{}, {"direction": "noise"}, {"direction": "denoise"}])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_edge_is_as_steep_as_small_steps_by_hand_say(family, direction):
    """The papers' direction is the default: the clean prompts run, and an edge carries what is corrupted."""
    lm = hk.tiny(family)
    table = hk.edge_attribution(lm, CLEAN, CORRUPTED, DIFF, **direction)
    table = table.set_index(["sender", "receiver"])["logit_diff_delta"]
    of, to = (CLEAN, CORRUPTED) if direction.get("direction") == "denoise" else (CORRUPTED, CLEAN)
    for edge in EDGES:
        wanted = np.mean([by_small_steps(lm, edge, row, of, to) for row in range(len(CLEAN))])
        assert table[edge] == pytest.approx(wanted, abs=0.02, rel=0.02), edge
    assert ("z.1.0", "q.1.0") not in table.index and ("mlp_out.1", "mlp_in.1") not in table.index


@pytest.mark.parametrize("family", ["gemma2", "gptj", "granite", "olmo2", "mixtral"])
def test_a_last_heads_edges_sum_to_its_attribution(family):
    """Of a head of the last block only its MLP and the logits read; norms and factors behind a head are in both."""
    lm = hk.tiny(family)
    edges = hk.edge_attribution(lm, CLEAN, CORRUPTED, DIFF)
    heads = hk.attribution(lm, CLEAN, CORRUPTED, "z", DIFF, layers=[2], direction="noise")
    for head, found in heads.groupby("head"):
        mine = edges[edges["sender"] == f"z.2.{head}"]
        assert set(mine["receiver"]) == ({"logits"} if family == "gptj" else {"logits", "mlp_in.2"})
        wanted = pytest.approx(found["logit_diff_delta"].mean(), abs=1e-4, rel=1e-3)
        assert mine["logit_diff_delta"].sum() == wanted


def test_edges_in_a_parallel_block_do_not_lead_from_its_heads_to_its_mlp():
    table = hk.edge_attribution(hk.tiny("gptj"), CLEAN, CORRUPTED, DIFF)
    edges = set(zip(table["sender"], table["receiver"], strict=True))
    assert ("z.0.1", "mlp_in.0") not in edges and ("z.0.1", "mlp_in.1") in edges


def test_integrated_edges_to_the_logits_of_a_linear_end_are_the_plain_ones(linear_end):
    one, many = (
        hk.edge_attribution(linear_end, CLEAN, CORRUPTED, DIFF, **settings)
        for settings in ({}, {"method": "integrated", "steps": 3})
    )
    plain, mean = (t[t["receiver"] == "logits"]["logit_diff_delta"].tolist() for t in (one, many))
    assert plain == pytest.approx(mean, abs=1e-4)
    assert hk.stats.compare_attributions(one, many)["pearson"][0] < 0.9999


# ---- errors


def test_models_without_edges_say_why():
    with pytest.raises(
        Unsupported, match="not the sum of its embedding.*adds a token embedding of its own"
    ):
        hk.edge_attribution(hk.tiny("gemma4_text"), CLEAN, CORRUPTED, DIFF)
    with pytest.raises(MissingSite, match="has no 'k'"):
        hk.edge_attribution(hk.tiny("deepseek_v3"), CLEAN, CORRUPTED, DIFF)


def test_a_way_that_does_not_end_at_the_other_prompt_is_refused():
    with pytest.raises(Unsupported, match="does not end at the other prompt"):
        hk.attribution(
            hk.tiny("gemma4_text"), CLEAN, CORRUPTED, "resid_pre", DIFF, method="integrated"
        )


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"direction": "up"}, BadHook, "direction='up' is unknown"),
        ({"method": "exact"}, BadHook, "method='exact' is unknown: say 'gradient' or 'integrated'"),
        ({"by": "head"}, BadHook, "by='head' is unknown"),
        ({"sites": "z", "by": "neuron"}, BadHook, "z has them: leave by= out"),
        ({"corrupted": CORRUPTED[:1]}, BadPrompt, "are to be patched into"),
        (
            {"method": "integrated", "steps": 0},
            BadHook,
            "steps=0: give how many parts of the way, at least 1",
        ),
        (
            {"method": "integrated", "points": "end"},
            BadHook,
            "points='end' is unknown: say 'start' or 'middle'",
        ),
        ({"steps": 3}, BadHook, "are of method='integrated', and have no effect with 'gradient'"),
        ({"points": "middle"}, BadHook, "have no effect with 'gradient'"),
        ({"metric": hk.metrics.rank(5)}, Unsupported, "gives no gradient"),
        ({"metric": hk.metrics.loss((8, 9))}, Unsupported, "attribution is of prompts in pairs"),
        ({"pos": [5]}, OutOfRange, "position 5 of row 1"),
        (
            {"pos": [3]},
            OutOfRange,
            "position 3 of row 1 was asked for .*, and it has 3 tokens, 0 to 2",
        ),
        ({"sites": ["resid_pre", "z"]}, Unsupported, "some have heads and some do not"),
        ({"metrics": DIFF}, hk.errors.UnknownKeyword, "did you mean 'metric'"),
    ],
)
def test_a_mistake_in_attribution_says_what_to_do(llama, change, error, words):
    given = {"clean": CLEAN, "corrupted": CORRUPTED, "sites": "resid_pre", "metric": DIFF} | change
    with pytest.raises(error, match=words):
        hk.attribution(llama, **given)


def test_a_mistake_at_tokens_says_what_to_do(llama):
    with pytest.raises(BadHook, match=r"baseline has shape \[3\]: give finite numbers \[32\]"):
        hk.token_attribution(llama, CLEAN, DIFF, baseline=torch.zeros(3))
    with pytest.raises(BadHook, match="method='both' is unknown"):
        hk.token_attribution(llama, CLEAN, DIFF, method="both")
    with pytest.raises(Unsupported, match="take hk.metrics.logprob"):
        hk.token_attribution(llama, CLEAN, hk.metrics.loss((8, 9)))


def drop_by_hand(lm, ids, other, path, layer_dropped):
    """A site's values in both prompts, and the gradient there with a block's contributions detached."""
    model, kept = lm.model, []

    def keep(module, arguments):
        values = arguments[0] * 1.0
        if values.requires_grad:
            values.retain_grad()
        kept.append(values)
        return (values, *arguments[1:])

    def detach(module, arguments, output):
        return (output[0].detach(), *output[1:]) if isinstance(output, tuple) else output.detach()

    handles = [model.get_submodule(path).register_forward_pre_hook(keep)]
    block = model.model.layers[layer_dropped]
    handles += [part.register_forward_hook(detach) for part in (block.self_attn, block.mlp)]
    try:
        with torch.no_grad():
            model(torch.tensor([other]))
        embeddings = model.get_input_embeddings()(torch.tensor([ids])).detach().requires_grad_()
        logits = model(inputs_embeds=embeddings).logits[0, -1]
        (logits[5] - logits[7]).backward()
    finally:
        for handle in handles:
            handle.remove()
    other_values, values = kept
    gradient = torch.zeros_like(values) if values.grad is None else values.grad
    return ((other_values - values.detach()) * gradient)[0]


def test_grad_drop_is_the_mean_size_over_gradients_without_one_block_by_hand():
    lm = hk.tiny("llama")
    clean, corrupted = [5, 6, 7, 8, 9], [5, 6, 17, 8, 10]
    metric = hk.metrics.logit_diff(5, 7)
    for name, path, n_parts in (("z", "self_attn.o_proj", 4), ("mlp_post", "mlp.down_proj", 1)):
        table = hk.attribution(
            lm, [clean], [corrupted], name, metric, direction="noise", method="grad_drop", pos=[-1]
        )
        plain = hk.attribution(lm, [clean], [corrupted], name, metric, direction="noise", pos=[-1])
        for layer in range(3):
            full = f"model.layers.{layer}.{path}"
            sizes = [
                drop_by_hand(lm, clean, corrupted, full, dropped)[-1]
                .unflatten(-1, (n_parts, -1))
                .sum(-1)
                .abs()
                for dropped in range(3)
                if dropped != layer
            ]
            expected = sum(sizes) / 2
            own = table[table["layer"] == layer]["logit_diff_delta"].to_numpy()
            assert abs(own) == pytest.approx(expected.numpy(), abs=1e-4), (name, layer)
            signs = plain[plain["layer"] == layer]["logit_diff_delta"].to_numpy()
            assert (own * signs >= 0).all()
    with pytest.raises(hk.errors.BadHook, match="not inside a block"):
        hk.attribution(lm, [clean], [corrupted], "resid_pre", metric, method="grad_drop")
    with pytest.raises(hk.errors.BadHook, match="steps and points"):
        hk.attribution(lm, [clean], [corrupted], "z", metric, method="grad_drop", steps=3)
