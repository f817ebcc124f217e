"""Every family of the table, on a tiny random model: the laws, and what plain transformers has at each site."""

import dataclasses
import re

import by_hand_families
import pytest
import torch
from tiny_families import ALL, NOT_BY_HAND, made

import hookkit as hk
from hookkit.checks.laws import LAWS
from hookkit.errors import MissingSite, Unsupported
from hookkit.models.views import is_hidden

IDS = [5, 9, 17, 200, 33, 41, 7, 90, 12]


@pytest.fixture(scope="module", params=ALL)
def case(request) -> tuple[str, hk.LM]:
    return request.param, made(request.param)


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    expected = expected.detach()
    return float((found - expected).abs().max()) / max(1e-3, float(expected.abs().max()))


def test_every_law_holds_or_the_exception_stands_in_the_table(case):
    _, lm = case
    proof = hk.check_laws(lm)
    broken = proof[~proof["holds"] & ~proof["note"].str.startswith("exception: ")]
    assert broken.empty, broken.to_string()
    excused = proof[~proof["holds"]]
    used = {*excused["law"], *(excused["law"] + " " + excused["site"])}
    assert {*lm.family.exceptions} <= used, "an exception is claimed that is none"
    for law in LAWS:
        assert {*proof.query(f"law == {law.name!r}")["site"]} <= {"", *law.sites}, (
            "a site that the law does not name"
        )


def test_every_site_holds_what_plain_transformers_has_there(case):
    name, lm = case
    if name in NOT_BY_HAND:
        pytest.skip("the second route is not written for this configuration; the laws hold for it")
    expected = by_hand_families.sites(lm.model, IDS)
    run = hk.forward(lm, [IDS], hk.capture(lm.sites()))
    mine = {str(site) for site in lm.sites()}
    assert mine == set(expected)
    for site, value in expected.items():
        found = run.logits if site == "logits" else run[site]
        if site.startswith("experts."):
            assert torch.equal(found.sort(-1).values, value.sort(-1).values)
            continue
        if site.startswith("scores."):
            seen = ~is_hidden(found)
            assert torch.equal(seen, ~is_hidden(value)) or name == "falcon alibi"
            found, value = found.where(seen, 0), value.where(seen, 0)
            if name in (
                "mpt",
                "bloom",
                "falcon alibi",
                "gpt_oss",
                "mimo_v2_flash",
            ):  # known up to a number for each query
                found, value = (
                    x - (x * seen).sum(-1, keepdim=True) / seen.sum(-1, keepdim=True)
                    for x in (found, value)
                )
                found, value = found * seen, value * seen
        assert apart(found, value) < 2e-5, site


def test_one_head_is_that_head_of_the_whole_site_read_and_written(case):
    name, lm = case
    if name in NOT_BY_HAND:
        pytest.skip("the second route is not written for this configuration; the laws hold for it")
    expected = by_hand_families.sites(lm.model, IDS)
    with_heads = [
        lm.sites(site)[-1]
        for site in ("q", "k", "v", "z", "q_rot", "k_rot")
        if site in lm.layout.names
    ]
    hooks, wholes = [], {}
    for site in with_heads:
        count = expected[str(site)].shape[2]
        heads = [hk.Site(site.name, site.layer, head) for head in range(count)]
        wholes[site] = heads
        hooks.append(hk.capture(heads))
    run = hk.forward(lm, [IDS], *hooks)
    for site, heads in wholes.items():
        for head in heads:
            assert apart(run[head], expected[str(site)][:, :, head.head]) < 2e-5, head
    for site, heads in wholes.items():
        head = heads[-1]
        edit = hk.edit(head, lambda values: values + 1.0)
        edited = hk.forward(lm, [IDS], edit, hk.capture(site))[site]
        moved = edited - expected[str(site)]
        assert apart(moved[:, :, head.head], torch.ones_like(moved[:, :, 0])) < 1e-4, head
        others = [number for number in range(len(heads)) if number != head.head]
        assert moved[:, :, others].abs().max() < 1e-4 if others else True, head


def test_an_edit_does_what_a_hand_written_edit_does(case):
    name, lm = case
    if name in NOT_BY_HAND:
        pytest.skip("the second route is not written for this configuration; the laws hold for it")
    for site in ("resid_post.1", "attn_out.1", "mlp_out.1", "z.1", "mlp_post.1", "final_norm"):
        if (
            site.partition(".")[0] not in lm.layout.names
            or lm.layout.find(site.partition(".")[0], 1) is None
        ):
            continue
        if by_hand_families.is_other_mixer(lm.model, site):
            continue

        def change(values: torch.Tensor) -> torch.Tensor:
            return values * 1.5 + 0.25

        expected = by_hand_families.edited(lm.model, IDS, site, change)
        assert apart(hk.forward(lm, [IDS], hk.edit(site, change)).logits, expected) < 2e-5, site


def test_an_attn_out_before_the_post_norm_is_caught_by_the_laws():
    lm = hk.tiny("gemma2")
    locations = {**lm.family.locations, "attn_out": lm.family.locations["attn_in"]}
    locations["attn_out"] = dataclasses.replace(locations["attn_out"], side="output")
    broken = hk.LM(lm.model, row=dataclasses.replace(lm.family, locations=locations))
    proof = hk.check_laws(broken)
    failed = proof[~proof["holds"]]
    assert {"sum", "one stream"} <= set(failed["law"]) and "attn_out" in set(failed["site"])
    assert hk.check_laws(lm)["holds"].all()


def test_a_resid_mid_that_reaches_the_mlp_only_is_caught_by_the_laws():
    lm = hk.tiny("llama")
    shared = dataclasses.replace(lm.family.locations["resid_mid"], shared=False)
    broken = hk.LM(
        lm.model,
        row=dataclasses.replace(lm.family, locations={**lm.family.locations, "resid_mid": shared}),
    )
    failed = hk.check_laws(broken).query("~holds")
    assert "one stream" in set(failed["law"])


@pytest.mark.parametrize(
    "name", ["mistral", "gemma2", "gpt2", "bloom", "gpt_oss", "deepseek_v3", "falcon"]
)
def test_patterns_while_generating_are_those_of_the_whole_text_in_every_way_of_decoding(name):
    lm = made(name)
    prompts = [IDS, IDS[:3]]
    ways = [{}, {"use_cache": False}, {"prefill_chunk_size": 2}, {"num_beams": 2}]
    ways += [] if name in ("bloom", "falcon") else [{"cache_implementation": "static"}]
    for way in ways:
        run = hk.generate(
            lm,
            prompts,
            hk.capture(["pattern.0", "pattern.1.2"]),
            max_new_tokens=4,
            do_sample=False,
            eos_token_id=None,
            **way,
        )
        for row, length in enumerate(run.lengths):
            ids = run.tokens[row, : length - 1].tolist()
            whole = by_hand_families.sites(lm.model, ids)
            seen = length - 1
            assert apart(run["pattern.0"][row, :, :seen, :seen], whole["pattern.0"][0]) < 1e-5, way
            assert apart(run["pattern.1.2"][row, :seen, :seen], whole["pattern.1"][0, 2]) < 1e-5, (
                way
            )
            assert (run["pattern.0"][row, :, :, seen:] == 0).all()


def test_a_site_that_only_some_blocks_have_is_there_in_those_and_refused_in_words_elsewhere():
    lm = hk.tiny("qwen3_next")
    assert [site.layer for site in lm.sites("pattern")] == [1]
    with pytest.raises(MissingSite, match=re.escape("a gated delta rule), without a pattern")):
        lm.sites("pattern", layers=[0])


def test_a_multiplier_that_the_user_changes_between_two_runs_is_the_one_that_counts():
    lm = hk.tiny("granite")
    hook = hk.capture("attn_out.1")
    before = hk.forward(lm, [IDS], hook)["attn_out.1"]
    lm.model.model.layers[1].residual_multiplier *= 2
    assert torch.equal(hk.forward(lm, [IDS], hook)["attn_out.1"], 2 * before)


# Families whose blocks are of a kind of their own: what is at each site, module by module. A path begins in the block,
# and "in" and "out" are its sides; attention's input may be a keyword.
MODULE_BY_MODULE = {
    "gemma3n_text": {
        "attn_in": "self_attn in",
        "q": "self_attn.q_proj out",
        "k": "self_attn.k_proj out",
        "v": "self_attn.v_proj out",
        "z": "self_attn.o_proj in",
        "attn_out": "post_attention_layernorm out",
        "mlp_in": "pre_feedforward_layernorm out",
        "mlp_pre": "mlp.gate_proj out",
        "mlp_post": "mlp.down_proj in",
        "mlp_out": "post_feedforward_layernorm out",
    },
    "deepseek_v4": {
        "attn_in": "input_layernorm out",
        "q": "self_attn.q_b_proj out",
        "attn_out": "self_attn.o_b_proj out",
        "mlp_in": "post_attention_layernorm out",
        "mlp_out": "mlp out",
    },
    "diffllama": {
        "resid_pre": "input_layernorm in",
        "attn_in": "input_layernorm out",
        "q": "self_attn.q_proj out",
        "k": "self_attn.k_proj out",
        "attn_out": "self_attn.o_proj out",
        "resid_mid": "post_attention_layernorm in",
        "mlp_in": "post_attention_layernorm out",
        "mlp_pre": "mlp.gate_proj out",
        "mlp_post": "mlp.down_proj in",
        "mlp_out": "mlp.down_proj out",
    },
    "zamba": {
        "q": "shared_transf.self_attn.q_proj out",
        "k": "shared_transf.self_attn.k_proj out",
        "v": "shared_transf.self_attn.v_proj out",
        "z": "shared_transf.self_attn.o_proj in",
    },
    "zamba2": {
        "q": "shared_transformer.self_attn.q_proj out",
        "k": "shared_transformer.self_attn.k_proj out",
        "v": "shared_transformer.self_attn.v_proj out",
        "z": "shared_transformer.self_attn.o_proj in",
    },
}


@pytest.mark.parametrize("name", MODULE_BY_MODULE)
def test_a_family_of_its_own_kind_has_at_each_site_what_plain_hooks_see_there(name):
    lm = made(name)
    sites = MODULE_BY_MODULE[name]
    blocks = lm.model.get_submodule("model").layers
    seen: dict[str, torch.Tensor] = {}
    handles = []
    for layer, block in enumerate(blocks):
        for site, place in sites.items():
            path, side = place.split()
            if path.split(".")[0] not in dict(block.named_children()):
                continue

            def before(module, args, kwargs, key=f"{site}.{layer}"):
                seen[key] = (args or tuple(kwargs.values()))[0].clone()

            def after(module, args, output, key=f"{site}.{layer}"):
                seen[key] = (output[0] if isinstance(output, tuple) else output).clone()

            module = dict(block.named_modules()).get(path)
            if module is None:
                continue
            if side == "in":
                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(after))
    with torch.no_grad():
        logits = lm.model(torch.tensor([IDS]), use_cache=False).logits
    for handle in handles:
        handle.remove()
    run = hk.forward(lm, [IDS], hk.capture(lm.sites([*sites])))
    assert torch.equal(run.logits, logits)
    assert {str(site) for site in lm.sites([*sites])} == {*seen}
    for site in lm.sites([*sites]):
        expected = seen[str(site)]
        assert torch.equal(run[site].flatten(2), expected.reshape(1, len(IDS), -1)), site


@pytest.mark.parametrize("name", ["gemma3n_text", "diffllama", "zamba2"])
def test_an_edit_of_a_family_of_its_own_kind_does_what_a_hand_written_hook_does(name):
    lm = made(name)
    paths = {
        "gemma3n_text": "model.layers.1.mlp.down_proj",
        "diffllama": "model.layers.1.mlp.down_proj",
        "zamba2": "model.layers.1.shared_transformer.self_attn.o_proj",
    }
    site = "z.1" if name == "zamba2" else "mlp_post.1"
    handle = lm.model.get_submodule(paths[name]).register_forward_pre_hook(
        lambda module, args: (args[0] * 1.5 + 0.25, *args[1:])
    )
    with torch.no_grad():
        expected = lm.model(torch.tensor([IDS]), use_cache=False).logits
    handle.remove()
    edited = hk.forward(lm, [IDS], hk.edit(site, lambda values: values * 1.5 + 0.25)).logits
    assert apart(edited, expected) < 2e-6


def test_keys_that_an_indexer_leaves_out_have_no_share_of_the_pattern():
    lm = made("deepseek_v32")
    chosen: dict[int, torch.Tensor] = {}
    handles = [
        block.self_attn.indexer.register_forward_hook(
            lambda module, args, output, layer=layer: chosen.update({layer: output})
        )
        for layer, block in enumerate(lm.model.model.layers)
    ]
    run = hk.forward(lm, [IDS], hk.capture("pattern"))
    with torch.no_grad():
        plain = lm.model(torch.tensor([IDS]), use_cache=False).logits
    for handle in handles:
        handle.remove()
    assert torch.equal(run.logits, plain)
    for layer, indices in chosen.items():
        left_out = torch.ones(1, len(IDS), len(IDS), dtype=torch.bool).scatter(-1, indices, False)
        pattern = run[f"pattern.{layer}"]
        assert left_out.any() and (pattern.masked_select(left_out[:, None]) == 0).all()
        assert torch.allclose(pattern.sum(-1), torch.ones(()))


def test_prompts_of_several_lengths_are_refused_where_a_state_takes_in_the_padding():
    for name in ("recurrent_gemma", "minimax", "deepseek_v4"):
        lm = made(name)
        with pytest.raises(Unsupported, match="padded on the left"):
            hk.generate(lm, [IDS, IDS[:4]], max_new_tokens=2, do_sample=False)
        alone = hk.generate(lm, [IDS[:4]], max_new_tokens=3, do_sample=False, eos_token_id=None)
        with torch.no_grad():
            text = lm.model.generate(
                torch.tensor([IDS[:4]]), max_new_tokens=3, do_sample=False, eos_token_id=None
            )
        assert alone.tokens.tolist() == text.tolist()
