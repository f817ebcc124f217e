"""Discovery: a model that is not in the table of families has correct sites, and a reason for each missing one.

Each row of the table is ignored in turn. Discovery then finds the same sites of all model types of the table in the same blocks,
with the same values.
"""

import pytest
import torch

import hookkit as hk
from hookkit.errors import BadHook, MissingSite, UnknownKeyword, UnknownSite
from hookkit.models.discovery.discover import discover_family
from hookkit.models.families.table import FAMILIES
from hookkit.models.sites import AXES, CROSS_SITES, LOGIT_SITES, QUERY_KEY_SITES

IDS = [[3, 14, 15, 92, 65, 35, 89, 79, 200], [31, 41, 59]]
ROUTER = {"router_logits", "experts", "expert_weights"}
NEURONS = {"mlp_pre", "mlp_post"}
# What is not offered of families that have no row, or whose row is put aside here.
UNKNOWN: dict[str, set[str]] = {
    "llama4_text": {"pos_embed", "experts", "expert_weights"},
    "ernie4_5_moe": {"pos_embed"},
    "phimoe": {"pos_embed"},
    "olmo_hybrid": {"pos_embed", *ROUTER},
    "jamba": {"pos_embed", "q_rot", "k_rot"},
    "nemotron_h": {"pos_embed", "q_rot", "k_rot", "resid_mid", "mlp_in", "mlp_out", *NEURONS, *ROUTER},
    "nanochat": {"pos_embed", "final_norm", *ROUTER},
    "vaultgemma": {"pos_embed", *ROUTER},
    "biogpt": {"q_rot", "k_rot", *ROUTER},
    "xglm": {"q_rot", "k_rot", "scores", "pattern", *ROUTER},
    "gpt_neox_japanese": {"pos_embed", "q_rot", "k_rot", *ROUTER},
    "granitemoeshared": {"pos_embed", "mlp_in", "mlp_out", *NEURONS, *ROUTER},
    "falcon_h1": {"pos_embed", "attn_out", *ROUTER},
    "zamba2": {
        "pos_embed", "attn_in", "q_rot", "k_rot", "attn_out", "resid_mid", "mlp_in", "mlp_out", *NEURONS, *ROUTER,
    },
    "diffllama": {"pos_embed", "q_rot", "k_rot", "scores", "pattern", "v", "z", *ROUTER},
    "youtu": {"pos_embed", "k", *ROUTER},
    "doge": {"pos_embed", "attn_out", "mlp_out", "resid_mid", *ROUTER},
}  # fmt: skip
CONFIGS = {
    "gpt_neox_japanese": {"intermediate_multiple_size": 2},
    "xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": 3, "attention_heads": 4},
}
STREAM_OF_MANY = (
    set(AXES)
    - CROSS_SITES
    - {
        "pos_embed",
        "resid_pre",
        "resid_mid",
        "resid_post",
        "lm_head",
        "logits",
    }
)
# Sites that discovery cannot prove by value, or not in every block, and the row has by the code.
ONLY_IN_ROW: dict[str, set[str]] = {
    "nemotron_h": {"attn_in", "attn_out", "mlp_in", "mlp_out", *NEURONS, *ROUTER},
    "falcon_h1": {"attn_out"},
    "granitemoehybrid": {"mlp_in", *NEURONS, *ROUTER},
    "granitemoeshared": {"mlp_in", *NEURONS, *ROUTER},
    "granitemoe_swa": {"mlp_in", *NEURONS, *ROUTER},
    "minimax": {"attn_in", "attn_out", "resid_mid", "mlp_in", "mlp_out", *NEURONS, *ROUTER},
    "deepseek_v4": STREAM_OF_MANY - {"k", "v", "z"},
    "gemma3n_text": STREAM_OF_MANY - {*ROUTER},
    "gemma4_unified_text": {"mlp_out"},
    "doge": {"attn_out", "resid_mid", "mlp_out"},
}
TINY: dict[str, hk.LM] = {}


def made(model_type: str) -> hk.LM:
    if model_type not in TINY:
        TINY[model_type] = without_row(hk.tiny(model_type, config=CONFIGS.get(model_type)))
    return TINY[model_type]


def without_row(lm: hk.LM) -> hk.LM:
    return hk.LM(lm.model, row=discover_family(lm.root, lm.config))


def state_of(model: torch.nn.Module) -> dict[str, dict[str, object]]:
    """All that each module has of its own, with its hooks written out."""
    return {
        path: {
            name: [*value.items()] if isinstance(value, dict) else value
            for name, value in vars(module).items()
        }
        for path, module in model.named_modules()
    }


# ---- the families of the table


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_family_of_the_table_is_found_again_with_every_site_and_value(model_type):
    lm = hk.tiny(model_type)
    found = without_row(lm)
    assert found.family.found and not lm.family.found
    only_in_row = {str(site) for site in lm.sites()} - {str(site) for site in found.sites()}
    assert {site.split(".")[0] for site in only_in_row} == ONLY_IN_ROW.get(model_type, set())
    assert set(found.sites()) <= set(lm.sites())
    for name in AXES:
        if name in found.layout.names and name not in ONLY_IN_ROW.get(model_type, ()):
            assert found.layout.layers(name) == lm.layout.layers(name), name
    sites = found.sites()
    expected, values = (hk.forward(each, IDS, hk.capture(sites)) for each in (lm, found))
    for site in sites:
        assert site.name in QUERY_KEY_SITES or found.shape(site) == lm.shape(site), site
        assert torch.equal(values[site], expected[site]), site


@pytest.mark.parametrize(
    "model_type", ["llama", "gpt2", "gemma2", "granite", "bloom", "falcon", "deepseek_v3"]
)
def test_a_model_in_half_precision_has_the_same_sites(model_type):
    lm = hk.tiny(model_type)
    lm.root.to(torch.bfloat16)
    assert without_row(lm).sites() == lm.sites()


def test_the_numbers_that_the_configuration_says_in_other_words_are_found():
    sizes = without_row(hk.tiny("deepseek_v3")).sizes
    assert (sizes["kv_head"], sizes["d_qk"], sizes["d_v"]) == (4, 12, 6)
    assert made("ernie4_5_moe").sizes["choice"] == 2


def test_the_same_place_in_other_configurations_of_a_family():
    for model_type, config in (
        ("gpt_neox", {"use_parallel_residual": False}),
        ("gpt_bigcode", {"multi_query": False}),
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
        ("falcon", {"alibi": True, "parallel_attn": False}),
        ("falcon", {"multi_query": False, "parallel_attn": False}),
        ("stablelm", {"use_parallel_residual": True}),
        ("olmo", {"clip_qkv": 0.5}),
    ):
        lm = hk.tiny(model_type, config=config)
        found = without_row(lm)
        both = [site for site in found.sites() if site in set(lm.sites())]
        assert len(both) == len(found.sites()), (model_type, config)
        expected, values = (hk.forward(each, IDS, hk.capture(both)) for each in (lm, found))
        for site in both:
            assert torch.equal(values[site], expected[site]), (model_type, config, site)


# ---- families that the table does not have


@pytest.mark.parametrize("model_type", UNKNOWN)
def test_what_is_offered_of_an_unknown_family(model_type):
    lm = made(model_type)
    assert set(AXES) - CROSS_SITES - set(lm.layout.names) == UNKNOWN[model_type]
    for name in AXES:
        everywhere = (
            lm.layout.layers(name) in (None, list(range(lm.n_layers)))
            if name in lm.layout.names
            else False
        )
        assert everywhere or len(lm.family.missing[name]) > 20, name
    run = hk.forward(lm, IDS, hk.capture(lm.sites()))
    for site in lm.sites():
        assert site.name in QUERY_KEY_SITES or tuple(run[site].shape[2:]) == lm.shape(site), site


@pytest.mark.parametrize("model_type", UNKNOWN)
def test_what_blocks_of_an_unknown_family_add_is_the_stream(model_type):
    lm = made(model_type)
    sites = lm.sites(
        [
            n
            for n in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
            if n in lm.layout.names
        ]
    )
    run = hk.forward(lm, IDS, hk.capture(sites))
    laws = (("resid_pre", "attn_out", "resid_mid"), ("resid_mid", "mlp_out", "resid_post"))
    for layer in range(lm.n_layers):
        there = {site.name: run[site] for site in sites if site.layer == layer}
        for *parts, total in (*laws, ("resid_pre", "attn_out", "mlp_out", "resid_post")):
            if {*parts, total} <= {*there}:
                added = sum(there[part] for part in parts)
                far = (added - there[total]).abs().max() / there[total].abs().max()
                assert far < 1e-5, (layer, parts, total)


@pytest.mark.parametrize(
    "model_type", ["llama4_text", "biogpt", "falcon_h1", "xglm"]
)  # others take seconds each
def test_an_edit_at_any_site_of_an_unknown_family_reaches_the_logits(model_type):
    lm = made(model_type)
    plain = hk.forward(lm, IDS).logits
    kept = ("router_logits", "experts", "expert_weights")  # a choice of experts may stay the same
    first = {site.name: site for site in reversed(lm.sites())}
    for site in first.values():
        if site.name not in kept and site.name not in LOGIT_SITES:
            assert not torch.equal(hk.forward(lm, IDS, hk.scale(site, 0.5)).logits, plain), site


@pytest.mark.parametrize(
    "model_type", [each for each in UNKNOWN if "resid_mid" not in UNKNOWN[each]]
)
def test_an_edit_between_attention_and_mlp_goes_on_in_the_stream(model_type):
    lm = made(model_type)
    for layer in lm.layout.layers("resid_mid"):
        mid, post = f"resid_mid.{layer}", f"resid_post.{layer}"
        if layer not in (lm.layout.layers("mlp_out") if "mlp_out" in lm.layout.names else []):
            continue
        captured = hk.capture([mid, f"mlp_out.{layer}", post])
        run = hk.forward(lm, IDS, hk.scale(mid, 1.5), captured)
        plain = hk.forward(lm, IDS, hk.capture(mid))
        added = plain[mid] * 1.5 + run[f"mlp_out.{layer}"]
        assert (added - run[post]).abs().max() < 1e-5 * run[post].abs().max(), layer


def test_weights_times_values_are_what_the_output_projection_reads():
    for model_type in (
        "llama4_text",
        "biogpt",
        "vaultgemma",
        "glm4_moe",
        "gpt_neox_japanese",
        "youtu",
    ):
        lm = made(model_type)
        run = hk.forward(lm, IDS[:1], hk.capture(lm.sites(["pattern", "v", "z"])))
        for layer in range(lm.n_layers):
            pattern, v, z = (run[f"{name}.{layer}"] for name in ("pattern", "v", "z"))
            v = v.repeat_interleave(z.shape[2] // v.shape[2], dim=2)
            assert torch.allclose(torch.einsum("bhqk,bkhd->bqhd", pattern, v), z, atol=1e-5), (
                model_type,
                layer,
            )


# ---- the model, and when


def test_the_model_is_left_as_found_and_its_own_hooks_notice_nothing():
    lm = made("phimoe")
    model = hk.tiny("phimoe").root.train()
    fired = []
    handle = model.model.layers[1].register_forward_hook(lambda *_: fired.append(1))
    before = state_of(model)
    row = discover_family(model, model.config)
    after = state_of(model)
    assert before.keys() == after.keys()
    for path in before:
        assert before[path].keys() == after[path].keys(), path
        assert all(
            before[path][n] is after[path][n] or before[path][n] == after[path][n]
            for n in before[path]
        ), path
    assert fired == [] and set(row.locations) == set(lm.family.locations)
    handle.remove()
    assert not model.model.layers[1]._forward_hooks


def test_a_model_that_cannot_be_run_is_left_as_found_and_has_head_and_logits(monkeypatch):
    lm = hk.tiny("biogpt")

    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("the second block is broken")

    monkeypatch.setattr(lm.root.biogpt.layers[1].fc1, "forward", broken)
    before = {path: set(state) for path, state in state_of(lm.root).items()}
    assert lm.layout.names == ["lm_head", "logits"]
    assert {path: set(state) for path, state in state_of(lm.root).items()} == before
    with pytest.raises(MissingSite, match="the second block is broken"):
        lm.sites("resid_post")


def test_the_row_is_found_out_once_and_only_when_it_is_asked_for(monkeypatch):
    model = hk.tiny("biogpt").root
    runs = []
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda *args, **kwargs: runs.append(1) or forward(*args, **kwargs)
    )
    lm = hk.LM(model)
    assert runs == []
    assert lm.family is lm.family and "found out by a dry run" in repr(lm)
    assert runs == [1]
    assert hk.LM(hk.tiny("llama").model).family.found is False


# ---- a row by hand


def test_a_row_is_corrected_in_a_few_lines():
    lm = made("glm4_moe")
    row = hk.family(
        "mine",
        like=lm,
        locations={
            "resid_mid": hk.location(".self_attn.o_proj"),
            "k": hk.location(".self_attn.k_proj", cut="kv_head d_head"),
        },
        missing={"mlp_out": "I do not trust it"},
        exceptions={"sum": "mine"},
    )
    mine = hk.LM(lm.model, row=row)
    assert (
        mine.family.name == "mine"
        and not mine.family.found
        and mine.family.exceptions["sum"] == "mine"
    )
    run = hk.forward(mine, IDS, hk.capture(["resid_mid.1", "attn_out.1", "k.1"]))
    assert torch.equal(run["resid_mid.1"], run["attn_out.1"])
    with pytest.raises(MissingSite, match="I do not trust it"):
        mine.sites("mlp_out")


def test_a_row_like_one_of_the_table_or_from_nothing():
    llama = hk.tiny("llama")
    row = hk.family("mine", like="llama", sizes={"kv_head": 2})
    assert hk.LM(llama.model, row=row).sites() == llama.sites()
    bare = hk.family(
        "mine", block="model.layers.{layer}", locations={"resid_post": hk.location(".")}
    )
    lm = hk.LM(llama.model, row=bare)
    assert lm.layout.names == ["resid_post", "logits"]
    run = hk.forward(lm, IDS, hk.capture("resid_post.2"))
    assert torch.equal(
        run["resid_post.2"], hk.forward(llama, IDS, hk.capture("resid_post.2"))["resid_post.2"]
    )


def test_a_place_may_hold_in_some_blocks_only():
    lm = hk.tiny("llama")
    row = hk.family(
        "mine", like="llama", locations={"attn_out": hk.location(".self_attn", layers=(0, 2))}
    )
    assert hk.LM(lm.model, row=row).layout.layers("attn_out") == [0, 2]


def test_every_mistake_in_a_row_says_what_is_there():
    llama = hk.tiny("llama")
    with pytest.raises(UnknownSite, match="no site 'atn_out'; did you mean 'attn_out'"):
        hk.family("mine", locations={"atn_out": hk.location(".")})
    with pytest.raises(UnknownSite, match="no site 'nothing'"):
        hk.family("mine", missing={"nothing": "it is not there"})
    with pytest.raises(
        BadHook, match="like='lama' is no model type of hookkit's table; did you mean 'llama'"
    ):
        hk.family("mine", like="lama")
    with pytest.raises(BadHook, match="depends on the configuration"):
        hk.family("mine", like="falcon")
    with pytest.raises(BadHook, match=r"give hk\.location"):
        hk.family("mine", locations={"attn_out": ".self_attn"})
    with pytest.raises(BadHook, match="say one of them"):
        hk.family("mine", locations={"k": hk.location(".")}, missing={"k": "none"})
    with pytest.raises(UnknownSite, match=r"no module 'model\.layers\.0\.atn'"):
        hk.family("mine", like=llama, locations={"attn_out": hk.location(".atn")})
    with pytest.raises(BadHook, match="where the number stands"):
        hk.family("mine", block="model.layers")
    with pytest.raises(BadHook, match="attention='mine' is unknown: say 'interface' or 'own'"):
        hk.family("mine", attention="mine")
    with pytest.raises(BadHook, match="give whole numbers"):
        hk.family("mine", sizes={"heads": 3})
    with pytest.raises(UnknownKeyword, match="no keyword 'likes'"):
        hk.family("mine", likes="llama")
    with pytest.raises(BadHook, match="a reason|give a sentence"):
        hk.family("mine", missing={"k": ""})


def test_every_mistake_in_a_place_says_what_is_there():
    with pytest.raises(BadHook, match="side='inputs'"):
        hk.location(".", side="inputs")
    with pytest.raises(BadHook, match="name one of query, key"):
        hk.location(".self_attn", side="inside", item="queries")
    with pytest.raises(BadHook, match="has the word 'heads'; did you mean 'head'"):
        hk.location(".q", cut="heads d_head")
    with pytest.raises(BadHook, match="part=2 was asked for"):
        hk.location(".q", cut="head: d_head | d_head", part=2)
    with pytest.raises(UnknownKeyword):
        hk.location(".q", path2=".")
