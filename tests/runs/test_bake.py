"""Hooks as weights: a saved copy in plain transformers has the logits of the hooked model."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
import transformers
from tiny_families import ALL, made

import hookkit as hk
from hookkit.errors import EmptySelection, MissingSite, Unsupported

IDS = [5, 9, 17, 200, 33, 41, 7, 90, 12]
STREAM = ("resid_pre", "resid_mid", "resid_post")
Edits = Callable[[hk.LM], list[hk.types.Hook]]


@pytest.fixture(autouse=True)
def no_bars():
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def of_shape(lm: hk.LM, site: str) -> torch.Tensor:
    return numbers(*lm.shape(lm.expand(site)[0]))


def wide(lm: hk.LM) -> torch.Tensor:
    return numbers(lm.sizes["d_model"] or 0)


def whole_stream(lm: hk.LM):
    return lm.sites([name for name in STREAM if name in lm.layout.names])


EDITS: dict[str, Edits] = {
    "steer attention": lambda lm: [hk.steer("attn_out.1", wide(lm))],
    "steer the MLP and the stream": lambda lm: [
        hk.steer("resid_post.1", wide(lm), scale=0.5),
        hk.scale("mlp_out.1", 0.3),
        hk.steer("resid_mid.1" if "resid_mid" in lm.layout.names else "mlp_out.0", wide(lm)),
    ],
    "steer the embedding": lambda lm: [hk.steer("embed", of_shape(lm, "embed"))],
    "scale both parts": lambda lm: [hk.scale("attn_out.1", 0.3), hk.scale("mlp_out.0", -0.3)],
    "project out of both parts": lambda lm: [
        hk.project_out(["mlp_out.0", "attn_out.1"], numbers(2, lm.sizes["d_model"] or 0))
    ],
    "project out of the stream": lambda lm: [hk.project_out(whole_stream(lm), wide(lm))],
    "ablate a head": lambda lm: [hk.ablate("z.1.1")],
    "heads to a constant": lambda lm: [hk.ablate("z.1", to=of_shape(lm, "z.1"))],
    "ablate neurons": lambda lm: [hk.ablate("mlp_post.1", units=[3, 7])],
    "queries, keys, values": lambda lm: [
        hk.scale("q.1", 0.5),
        hk.ablate("v.1.0"),
        hk.project_out("k.1", of_shape(lm, "k.1.0")),
    ],
    "skip a block": lambda lm: [hk.skip_block(1)],
    "the head and the embedding": lambda lm: [hk.scale("lm_head", 2.0), hk.scale("embed", 0.5)],
    "boost": lambda lm: [hk.boost(7, 8, by=2.0)],
}
EVERY = set(EDITS)
NO_BOOST = EVERY - {"boost"}
NO_BIAS = NO_BOOST - {"steer attention", "steer the MLP and the stream", "heads to a constant"}
AFTER_NORM = {
    "steer the embedding",
    "ablate a head",
    "ablate neurons",
    "queries, keys, values",
    "skip a block",
    "the head and the embedding",
}
# What the weights of some families express: with biases by nature, by a setting, without any, tied embeddings, a
# multiplier on what a block adds, parts in parallel, queries and keys in one matrix, norms after each part.
CAN = {
    "llama": NO_BOOST,
    "gpt2": NO_BOOST,
    "phi": EVERY,
    "granite": NO_BOOST,
    "gpt_neox": NO_BOOST,
    "falcon new": NO_BOOST,
    "mistral": NO_BIAS,
    "qwen3": NO_BIAS | {"steer attention", "heads to a constant"},
    "gemma2": AFTER_NORM | {"heads to a constant"},
    "olmo2": AFTER_NORM | {"heads to a constant"},
}


def reloaded_logits(baked: hk.LM, folder) -> torch.Tensor:
    """The logits of plain transformers, from the folder of the copy."""
    kind = getattr(transformers, type(baked.root).__name__)
    model = kind.from_pretrained(baked.save(folder), dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([IDS])).logits


def baked_in(lm: hk.LM, folder) -> Iterator[tuple[str, str]]:
    """The names of the edits and "" for those that are baked, or the reason why not."""
    weights = {name: value.clone() for name, value in lm.root.state_dict().items()}
    plain = hk.forward(lm, [IDS]).logits
    for name, edits in EDITS.items():
        try:
            hooks = edits(lm)
            baked = hk.bake(lm, *hooks)
        except (Unsupported, MissingSite, EmptySelection) as error:
            yield name, str(error)
            continue
        logits = reloaded_logits(baked, folder / name)
        expected = hk.forward(lm, [IDS], *hooks).logits
        if name == "boost":  # which acts where a token is chosen
            logits, expected = logits[:, -1], expected[:, -1]
        limit = 1e-4 * max(1.0, float(expected.abs().max()))
        assert float((logits - expected).abs().max()) <= limit, name
        moved = float((expected - plain).abs().max()) if name != "boost" else math.inf
        yield name, "" if moved > 10 * limit else "it moves these logits too little to tell"
    assert all(torch.equal(value, weights[key]) for key, value in lm.root.state_dict().items())
    assert torch.equal(hk.forward(lm, [IDS]).logits, plain), "the model is as it was"


@pytest.mark.parametrize("family", CAN)
def test_a_saved_copy_has_the_logits_of_the_hooked_model(family, tmp_path):
    outcomes = dict(baked_in(made(family), tmp_path))
    assert {name for name, reason in outcomes.items() if not reason} == CAN[family]


@pytest.mark.slow
def test_in_every_family_a_copy_has_the_logits_of_the_hooked_model_or_there_is_a_reason(tmp_path):
    counts = dict.fromkeys(EDITS, 0)
    for number, family in enumerate(ALL):
        for name, reason in baked_in(made(family), tmp_path / str(number)):
            counts[name] += not reason
    assert counts["ablate a head"] >= 110 and counts["the head and the embedding"] >= 120
    assert counts["scale both parts"] >= 75 and counts["steer attention"] >= 75
    assert (
        counts["steer the MLP and the stream"] >= 30 and counts["project out of the stream"] >= 45
    )


def test_the_copy_does_what_a_hand_written_hook_does(tmp_path):
    lm = hk.tiny("llama")
    vector = wide(lm)
    baked = hk.bake(lm, hk.steer("resid_post.1", vector, scale=0.5), hk.ablate("z.2.1"))

    def add(module, args, output):
        return output + 0.5 * vector

    def without_head(module, args):
        z = args[0].clone()
        z[..., 8:16] = 0
        return (z,)

    handles = [
        lm.root.model.layers[1].register_forward_hook(add),
        lm.root.model.layers[2].self_attn.o_proj.register_forward_pre_hook(without_head),
    ]
    with torch.no_grad():
        expected = lm.root(torch.tensor([IDS])).logits
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(reloaded_logits(baked, tmp_path), expected, atol=1e-4, rtol=0)
    assert baked.config.attention_bias is False and baked.config.mlp_bias is True
    assert lm.config.mlp_bias is False


def test_hooks_of_several_places_are_baked_together_in_any_order(tmp_path):
    lm = hk.tiny("gpt2")
    hooks = [
        hk.steer("resid_mid.1", wide(lm)),
        hk.scale("z.1.0", 0.2),
        hk.steer("attn_out.1", wide(lm), scale=0.1),
        hk.scale("attn_out.1", -0.7),
        hk.ablate("mlp_post.2", units=range(20)),
        hk.steer("mlp_post.2", of_shape(lm, "mlp_post.2")),
        hk.project_out("mlp_out.2", wide(lm)),
        hk.steer("resid_pre.0", wide(lm), scale=0.3),
    ]
    baked = hk.bake(lm, *hooks)
    expected = hk.forward(lm, [IDS], *hooks).logits
    torch.testing.assert_close(reloaded_logits(baked, tmp_path), expected, atol=1e-4, rtol=0)
    run = hk.generate(lm, [IDS], *hooks, max_new_tokens=8, do_sample=False)
    again = hk.generate(baked, [IDS], max_new_tokens=8, do_sample=False)
    assert again.tokens.tolist() == run.tokens.tolist()


def test_a_mean_of_a_reference_is_one_value_only_over_all_positions():
    lm = hk.tiny("gpt2")
    over = [[1, 2, 3], [4, 5, 6, 7]]
    hooks = [hk.ablate("attn_out.1", to="mean", over=over, per="all")]
    logits = hk.forward(hk.bake(lm, *hooks), [IDS]).logits
    torch.testing.assert_close(logits, hk.forward(lm, [IDS], *hooks).logits, atol=1e-4, rtol=0)
    with pytest.raises(Unsupported, match="other values at each position"):
        hk.bake(lm, hk.ablate("attn_out.1", to="mean", over=over))
    with pytest.raises(Unsupported, match="other values at each position"):
        hk.bake(lm, hk.steer("attn_out.1", numbers(9, 32)))


def test_the_default_model_is_baked_in_its_own_dtype(smol, tmp_path):
    (mood,) = hk.mean_difference(smol, ["I love it"], ["I hate it"], "resid_post.16")
    hook = hk.project_out(smol.sites(list(STREAM)), mood.tensor)
    baked = hk.bake(smol, hook, hk.ablate("z.20.1"))
    baked.save(tmp_path)
    again = hk.load(str(tmp_path), device="cpu")
    prompt = "I like oat milk in my"
    expected = hk.forward(smol, prompt, hook, hk.ablate("z.20.1")).logits
    torch.testing.assert_close(hk.forward(again, prompt).logits, expected, atol=2e-3, rtol=0)
    assert again.tokenizer.get_vocab() == smol.tokenizer.get_vocab()


REFUSED: dict[str, tuple[Callable[[], hk.types.Hook], str]] = {
    "positions": (lambda: hk.scale("mlp_out.1", 0.5, pos=-1), "acts at some positions"),
    "rows": (lambda: hk.scale("mlp_out.1", 0.5, rows=0), "acts at some positions, rows or steps"),
    "step": (lambda: hk.boost(7, by=1.0, step=0), "acts at some positions, rows or steps"),
    "when": (
        lambda: hk.boost(7, by=1.0, when=hk.when.entropy_above(1.0)),
        "acts where a condition holds",
    ),
    "condition on the state": (
        lambda: hk.scale("mlp_out.1", 0.5, when=hk.when.norm_above(1.0)),
        "acts where a condition holds",
    ),
    "function": (lambda: hk.edit("mlp_out.1", torch.relu), "edit is no linear change"),
    "force": (lambda: hk.force(7), "force is no linear change"),
    "capture": (lambda: hk.capture("mlp_out.1"), "capture is no linear change"),
    "knockout": (lambda: hk.knockout(1, key=0), "knockout is no linear change"),
    "patch": (lambda: hk.patch("mlp_out.1", "Tea"), "patch is no linear change"),
    "module": (lambda: hk.scale(hk.module("model.norm"), 2.0), "named sites"),
    "stream": (lambda: hk.scale("resid_post.1", 0.5), "is the sum of what all blocks"),
    "part of the stream": (
        lambda: hk.project_out(["resid_pre.1", "resid_post.1"], torch.ones(32)),
        "it leaves out resid_pre.0",
    ),
    "scores": (lambda: hk.scale("scores.1", 0.5), "computed inside model.layers.1.self_attn"),
    "several readers": (lambda: hk.scale("mlp_in.1", 0.5), "which is no single matrix"),
    "final norm": (lambda: hk.scale("final_norm", 0.5), "which is a norm"),
    "no bias": (lambda: hk.boost(7, by=1.0), "lm_head has no bias, and the configuration of llama"),
}


@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_weights_cannot_express_is_refused_with_the_reason(llama, make, reason):
    with pytest.raises(Unsupported, match=reason):
        hk.bake(llama, make())


@pytest.mark.filterwarnings("ignore")
def test_a_model_whose_weights_are_not_plain_is_refused(llama):
    with pytest.raises(EmptySelection, match="bake was given no hook"):
        hk.bake(llama)
    quantised = torch.ao.quantization.quantize_dynamic(made("llama").model, {torch.nn.Linear})
    with pytest.raises(Unsupported, match=r"no plain matrix|no single matrix"):
        hk.bake(hk.LM(quantised), hk.scale("mlp_out.1", 0.5))
    shared = made("llama")
    shared.model.model.layers[2].mlp.down_proj = shared.model.model.layers[1].mlp.down_proj
    with pytest.raises(Unsupported, match="share their weights"):
        hk.bake(hk.LM(shared.model), hk.scale("mlp_out.1", 0.5))
    training = made("llama")
    training.model.train()
    with pytest.raises(Unsupported, match=r"call model\.eval\(\) first"):
        hk.bake(hk.LM(training.model), hk.scale("mlp_out.1", 0.5))
    capped = hk.tiny("gemma2", config={"final_logit_softcapping": 5.0})
    with pytest.raises(Unsupported, match="the weights of Gemma2ForCausalLM do not express"):
        hk.bake(capped, hk.scale("logits", 0.5))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_adapters_are_merged_before():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["o_proj"], init_lora_weights=False)
    lm = hk.LM(peft.get_peft_model(made("llama").model, config))
    lm.model.eval()
    with pytest.raises(Unsupported, match=r"merge them first, model\.merge_and_unload"):
        hk.bake(lm, hk.scale("mlp_out.1", 0.5))
    merged = hk.LM(lm.model.merge_and_unload().eval())
    logits = hk.forward(hk.bake(merged, hk.scale("attn_out.1", 0.5)), [IDS]).logits
    expected = hk.forward(merged, [IDS], hk.scale("attn_out.1", 0.5)).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_only_a_model_of_transformers_has_a_folder(tmp_path):
    with pytest.raises(Unsupported, match="Linear is no model of transformers"):
        hk.LM(torch.nn.Linear(2, 2)).save(tmp_path)


def test_a_stream_to_which_another_matrix_brings_the_embedding_is_refused():
    lm = made("opt projected")
    with pytest.raises(Unsupported, match="embed has 16 numbers, which another matrix brings"):
        hk.bake(lm, hk.project_out(whole_stream(lm), wide(lm)))
