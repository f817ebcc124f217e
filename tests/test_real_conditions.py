"""hookkit where models are not small, whole, plain and in float32: dtypes, adapters, offloading, quantised weights,
training mode, code of one's own, other kinds of model, the wrong tokenizer."""

import contextlib
import json
import math
import warnings

import by_hand
import pytest
import torch
from conftest import PROMPTS, hooks_on
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)

import hookkit as hk
from hookkit.errors import (
    BadHook,
    BadPrompt,
    DroppedOut,
    MissingSite,
    ModelNotFound,
    NotOneToken,
    Unsupported,
)
from hookkit.models.provenance import weights_hash

IDS = [[5, 6, 7, 8, 9, 10], [11, 12, 13]]
ONE = torch.tensor(IDS[:1])
VECTOR = torch.linspace(-1, 1, 32)
HALVES = [torch.bfloat16, torch.float16]
KINDS = ["llama", "gpt2", "gemma2", "mixtral", "deepseek_v3", "gpt_oss", "gptj"]
GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models as small as these are slower with two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@torch.no_grad()
def plain(model: nn.Module, ids: torch.Tensor = ONE) -> torch.Tensor:
    return model(input_ids=ids).logits


@contextlib.contextmanager
def seen(module: nn.Module, side: str = "out", edit=None):
    """What a hand-written hook sees of a module's first tensor, each call; `edit` makes what goes on."""
    found = []

    def before(_module, args, kwargs):
        found.append((args[0] if args else kwargs["hidden_states"]).detach().clone())

    def after(_module, _args, output):
        value = output[0] if isinstance(output, tuple) else output
        found.append(value.detach().clone())
        if edit is None:
            return None
        return (edit(value), *output[1:]) if isinstance(output, tuple) else edit(value)

    handle = (
        module.register_forward_pre_hook(before, with_kwargs=True)
        if side == "in"
        else module.register_forward_hook(after)
    )
    try:
        yield found
    finally:
        handle.remove()


# ---- sixteen bits


@pytest.fixture(
    scope="module", params=[(kind, dtype) for kind in KINDS for dtype in HALVES], ids=str
)
def half(request) -> hk.LM:
    kind, dtype = request.param
    lm = hk.tiny(kind)
    lm.model.to(dtype)
    return lm


def test_in_sixteen_bits_looking_changes_nothing_and_keeps_the_models_dtype(half):
    run = hk.forward(half, IDS[0], hk.capture(half.sites()))
    assert torch.equal(run.logits, plain(half.model))
    assert torch.equal(hk.forward(half, IDS[0]).logits, plain(half.model))
    computed_wider = ("scores", "pattern", "router_logits", "experts", "expert_weights")
    assert {run[site].dtype for site in half.sites() if site.name not in computed_wider} == {
        half.model.dtype
    }


def test_in_sixteen_bits_patching_a_run_with_itself_is_the_identity_bit_for_bit(half):
    source = hk.forward(half, IDS, hk.capture(half.sites()))
    everything = hk.forward(half, IDS, hk.patch(half.sites(), source))
    assert torch.equal(everything.logits, source.logits)
    for site in [site for site in half.sites() if site.layer in (1, None)]:
        assert torch.equal(hk.forward(half, IDS, hk.patch(site, source)).logits, source.logits), (
            site
        )


def test_in_sixteen_bits_an_edit_does_what_a_hand_written_one_does(half):
    block = half.submodule(half.location(hk.Site("resid_post", 1)).path)
    vector = VECTOR.to(half.model.dtype)
    with seen(block, edit=lambda x: x + vector):
        expected = plain(half.model)
    assert torch.equal(hk.forward(half, IDS[0], hk.steer("resid_post.1", VECTOR)).logits, expected)
    with seen(block, edit=lambda x: x * 0.5):
        expected = plain(half.model)
    assert torch.equal(hk.forward(half, IDS[0], hk.scale("resid_post.1", 0.5)).logits, expected)
    with seen(block, edit=torch.zeros_like):
        expected = plain(half.model)
    assert torch.equal(hk.forward(half, IDS[0], hk.ablate("resid_post.1")).logits, expected)
    direction = VECTOR / VECTOR.norm()
    with seen(
        block,
        edit=lambda x: (x.float() - (x.float() @ direction)[..., None] * direction).to(x.dtype),
    ):
        expected = plain(half.model)
    found = hk.forward(half, IDS[0], hk.project_out("resid_post.1", VECTOR)).logits
    assert torch.allclose(found, expected, rtol=0.1, atol=0.1)


def test_in_sixteen_bits_logits_are_forced_banned_and_boosted_in_generation(half):
    run = hk.generate(
        half, IDS, hk.force(7, step=1), hk.ban(8), hk.boost(9, by=4.0, step=0), **GREEDY
    )
    untouched = hk.generate(half, IDS, **GREEDY)
    for row, ids in enumerate(IDS):
        assert run.tokens[row, len(ids) + 1] == 7
        assert 8 not in run.tokens[row, len(ids) : len(ids) + 4].tolist()
    assert torch.equal(run.logits[:, 0, 9], untouched.logits[:, 0, 9] + 4.0)
    assert run.logits.dtype == half.model.dtype


def test_in_sixteen_bits_what_a_mask_hides_stays_hidden(half):
    """Even if all scores are made equal: attention is then even over what is seen."""
    run = hk.forward(
        half, IDS, hk.edit("scores.1", lambda x: torch.zeros_like(x) + 3.0), hk.capture("pattern.1")
    )
    for row, ids in enumerate(IDS):
        pattern = run["pattern.1"][row, :, : len(ids), : len(ids)].float()
        later = torch.ones(len(ids), len(ids)).triu(1).bool()
        assert (pattern[:, later] == 0).all()
        if half.family.name != "gpt_oss":  # whose sink takes a part
            expected = torch.ones(len(ids), len(ids)).tril()
            assert torch.allclose(pattern, expected / expected.sum(-1, keepdim=True), atol=1e-2)
    edited = hk.forward(half, IDS, hk.edit("pattern.1", lambda x: x.flip(1) * 0.5)).logits
    assert torch.isfinite(edited).all()


def test_in_sixteen_bits_tables_are_computed_in_float32(half):
    run = hk.forward(half, IDS[0])
    table = hk.ranks(run, pos=-1, top=5)
    expected = plain(half.model)[0, -1].float().log_softmax(-1)
    for token, logprob in zip(table["token_id"], table["logprob"], strict=True):
        assert logprob == pytest.approx(float(expected[token]), abs=1e-6)
    entropy = float(-(expected.exp() * expected).sum())
    assert float(hk.uncertainty(run)["entropy"].iloc[-1]) == pytest.approx(entropy, abs=1e-4)


def test_the_default_model_in_bfloat16_patched_with_itself_is_the_same(smol_in_bfloat16):
    lm = smol_in_bfloat16
    source = hk.forward(lm, PROMPTS, hk.capture(lm.sites(layers=[3, 17])))
    assert torch.equal(
        hk.forward(lm, PROMPTS, hk.patch(source.sites, source)).logits, source.logits
    )
    ids = torch.tensor([lm.tokenizer.encode(PROMPTS[0])])
    assert torch.equal(
        hk.forward(lm, PROMPTS[0], hk.capture(lm.sites())).logits, plain(lm.model, ids)
    )


@pytest.fixture(scope="module")
def smol_in_bfloat16() -> hk.LM:
    from hookkit.models import cache as zoo

    if not any(zoo.cache_folder().glob(f"{zoo.DEFAULT}-*/config.json")):
        pytest.skip("the default model is not on this machine")
    return hk.load(dtype=torch.bfloat16, device="cpu")


# ---- adapters of PEFT


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft")


@contextlib.contextmanager
def adapting():
    """PEFT asks transformers for what is deprecated, and corrects its own settings for Conv1D with a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def with_lora(peft, kind: str = "llama", task: str | None = "CAUSAL_LM", **more) -> nn.Module:
    torch.manual_seed(3)
    config = peft.LoraConfig(
        r=4, target_modules="all-linear", task_type=task, init_lora_weights=False, **more
    )
    with adapting():
        return peft.get_peft_model(hk.tiny(kind).model, config).eval()


TASKS = [("llama", "CAUSAL_LM"), ("llama", None), ("gpt2", "CAUSAL_LM")]


@pytest.fixture(scope="module", params=TASKS, ids=str)
def lora(request, peft) -> hk.LM:
    return hk.LM(with_lora(peft, *request.param))


def test_a_model_with_adapters_has_the_sites_of_its_base_and_names_the_adapters(lora):
    base = hk.tiny(lora.family.name)
    assert lora.sites() == base.sites()
    assert lora.sizes == base.sizes
    assert "adapters: default" in repr(lora)
    table = lora.describe().set_index("site")
    assert table.loc["q", "adapters"] == "default" and table.loc["resid_post", "adapters"] == ""
    assert "adapters" not in base.describe()


def test_captures_of_a_model_with_adapters_are_those_of_hooks_on_its_modules(lora):
    run = hk.forward(lora, IDS[0], hk.capture(lora.sites()))
    assert torch.equal(run.logits, plain(lora.model))
    assert torch.equal(run["logits"], plain(lora.model))
    inner = lora.model.get_base_model()
    for name in ("q", "z", "mlp_post", "mlp_pre", "resid_post", "resid_pre"):
        module, side, view = by_hand.module_of(inner, name, 1)
        with seen(module, side) as found:
            plain(lora.model)
        assert torch.equal(run[f"{name}.1"], view(found[0])), name
    assert not torch.equal(run.logits, plain(hk.tiny(lora.family.name).model))


def test_a_hook_acts_once_whichever_of_the_modules_is_called(lora):
    expected = plain(lora.model)
    for model in (lora.model, lora.model.base_model, lora.model.get_base_model()):
        with (
            torch.no_grad(),
            hk.attach(lora, hk.capture("logits"), hk.scale("logits", 2.0)) as manager,
        ):
            out = model(ONE).logits
        assert torch.equal(manager["logits"], expected) and torch.equal(out, expected * 2)
        assert manager.log["forward"].tolist() == [0, 0]


def test_a_model_with_adapters_generates_with_hooks_as_by_hand(lora):
    plainly = lora.model.generate(input_ids=ONE, **GREEDY)
    assert torch.equal(
        hk.generate(lora, IDS[0], hk.capture(lora.sites()), **GREEDY).tokens, plainly
    )
    block = by_hand.module_of(lora.root, "resid_post", 1)[0]
    with seen(block, edit=lambda x: x + VECTOR):
        expected = lora.model.generate(input_ids=ONE, **GREEDY)
    run = hk.generate(lora, IDS[0], hk.steer("resid_post.1", VECTOR), hk.capture("q.1"), **GREEDY)
    assert torch.equal(run.tokens, expected)
    assert run["q.1"].shape[:2] == (1, 9)
    with hk.attach(lora, hk.force(7, step=2)):
        assert lora.model.generate(input_ids=ONE, **GREEDY)[0, 8] == 7
    edited = hk.generate(lora, IDS, hk.edit("pattern.1", lambda x: x * 0.5), **GREEDY)
    assert edited.tokens.shape == (2, 10)


def test_with_adapters_disabled_or_merged_the_numbers_are_those_of_that_model(lora):
    base = hk.tiny(lora.family.name)
    adapted = hk.forward(lora, IDS[0], hk.capture("q.1"))
    with lora.model.disable_adapter():
        off = hk.forward(lora, IDS[0], hk.capture("q.1"))
    expected = hk.forward(base, IDS[0], hk.capture("q.1"))
    assert torch.equal(off.logits, expected.logits) and torch.equal(off["q.1"], expected["q.1"])
    lora.model.merge_adapter()
    try:
        merged = hk.forward(lora, IDS[0], hk.capture("q.1"))
    finally:
        lora.model.unmerge_adapter()
    assert torch.allclose(merged.logits, adapted.logits, atol=1e-4)
    assert torch.allclose(merged["q.1"], adapted["q.1"], atol=1e-4)


def test_a_model_with_adapters_is_left_as_found(lora):
    lora.model.generate(input_ids=ONE, **GREEDY)  # the first of peft's own leaves an attribute
    before = hooks_on(lora.model)
    hk.forward(lora, IDS, hk.capture(lora.sites()), hk.scale("logits", 2.0))
    assert hooks_on(lora.model) == before
    with pytest.raises(ZeroDivisionError):
        hk.generate(lora, IDS, hk.edit("logits", lambda x: 1 / 0), max_new_tokens=2)
    assert hooks_on(lora.model) == before


def test_an_interrupted_forward_of_adapters_does_not_confuse_the_next_generation(lora):
    def interrupt(x, hits=[]):  # noqa: B006
        hits.append(1)
        if len(hits) == 1:
            raise KeyboardInterrupt
        return x

    with hk.attach(lora, hk.edit("mlp_out.1", interrupt), hk.capture("resid_post.2")) as manager:
        with pytest.raises(KeyboardInterrupt):
            lora.model(input_ids=ONE)
        lora.model.generate(input_ids=ONE[:, :3], **GREEDY)
    assert manager.texts[-1]["resid_post.2"].shape[1] == 6


def test_adapters_that_transformers_itself_put_in_are_found_too(peft):
    lm = hk.tiny("llama")
    lm.model.add_adapter(
        peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False),
        adapter_name="mine",
    )
    lm.model.eval()
    run = hk.forward(lm, IDS[0], hk.capture("q.1"))
    with seen(lm.model.model.layers[1].self_attn.q_proj) as found:
        assert torch.equal(run.logits, plain(lm.model))
    assert torch.equal(run["q.1"].flatten(2), found[0])
    assert "adapters: mine" in repr(lm)


def test_adapters_around_and_inside_a_compiled_model_work(peft):
    model = with_lora(peft)
    compiled = torch.compile(model, backend="eager")
    expected = plain(model)
    assert torch.allclose(plain(compiled), expected, atol=1e-5)
    lm = hk.LM(compiled)
    run = hk.forward(lm, IDS[0], hk.capture("q.1"), hk.scale("logits", 2.0))
    assert torch.equal(run.logits, expected * 2)
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["PrefixTuningConfig", "PromptTuningConfig"])
def test_adapters_that_add_tokens_are_refused_unless_they_are_off(peft, kind):
    config = getattr(peft, kind)(num_virtual_tokens=3, task_type="CAUSAL_LM")
    with adapting():
        lm = hk.LM(peft.get_peft_model(hk.tiny("llama").model, config).eval())
    for run in (hk.forward, hk.generate):
        with pytest.raises(
            Unsupported,
            match=r"the adapter 'default' \(P.*_TUNING\) puts 3 tokens of its own in front",
        ):
            run(lm, IDS[0], hk.capture("resid_post.1"))
    with (
        pytest.raises(Unsupported, match="puts 3 tokens of its own"),
        hk.attach(lm, hk.capture("resid_post.1")),
    ):
        pass
    with lm.model.disable_adapter():
        assert torch.equal(hk.forward(lm, IDS[0]).logits, plain(hk.tiny("llama").model))


# ---- offloading


PLACES = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.layers.2": "disk",
    "model.norm": "cpu",
    "lm_head": "disk",
}


@pytest.fixture(scope="module", params=["cpu_offload", "dispatch_model", "from_pretrained"])
def offloaded(request, tmp_path_factory) -> hk.LM:
    import accelerate
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("offload")
    model = hk.tiny("llama").model
    if request.param == "cpu_offload":
        return hk.LM(accelerate.cpu_offload(model, execution_device=torch.device("cpu")))
    if request.param == "dispatch_model":
        options = {"offload_dir": folder, "main_device": "cpu", "force_hooks": True}
        return hk.LM(accelerate.dispatch_model(model, PLACES, **options))
    model.save_pretrained(folder / "model")
    return hk.LM(
        AutoModelForCausalLM.from_pretrained(
            folder / "model", device_map=PLACES, offload_folder=folder / "weights"
        )
    )


def test_an_offloaded_model_gives_the_numbers_of_the_model_in_memory(offloaded):
    whole = hk.tiny("llama")
    assert offloaded.device == torch.device("cpu")
    assert any(weight.device.type == "meta" for weight in offloaded.model.parameters())
    assert offloaded.sizes == whole.sizes
    for prompts in (IDS[0], IDS):
        found, expected = (
            hk.forward(lm, prompts, hk.capture(lm.sites())) for lm in (offloaded, whole)
        )
        assert torch.equal(found.logits, expected.logits)
        for site in whole.sites():
            assert torch.equal(found[site], expected[site]), site


@pytest.mark.parametrize(
    "hooks",
    [
        [hk.steer("resid_post.1", VECTOR, pos=-1)],
        [hk.edit("scores.1", lambda x: x * 0.5), hk.edit("pattern.2", lambda x: x * 0.5)],
        [hk.scale("z.1.2", 0.0), hk.ablate("mlp_out.2"), hk.force(7, step=0)],
    ],
    ids=["steer", "attention", "heads"],
)
def test_edits_and_generations_of_an_offloaded_model_equal_those_of_the_model_in_memory(
    offloaded, hooks
):
    whole = hk.tiny("llama")
    assert torch.equal(
        hk.forward(offloaded, IDS, *hooks).logits, hk.forward(whole, IDS, *hooks).logits
    )
    found, expected = (
        hk.generate(lm, IDS, *hooks, hk.capture("k_rot"), **GREEDY) for lm in (offloaded, whole)
    )
    assert torch.equal(found.tokens, expected.tokens) and torch.equal(found.logits, expected.logits)
    assert torch.equal(found["k_rot.2"], expected["k_rot.2"])


def test_accelerates_own_wrappers_are_the_very_same_after_a_block(offloaded):
    def attributes():
        return {
            path: {name: id(value) for name, value in vars(module).items()}
            for path, module in offloaded.model.named_modules()
        }

    before = attributes()
    hk.forward(offloaded, IDS, hk.edit("pattern", lambda x: x * 0.5), hk.capture(offloaded.sites()))
    with pytest.raises(ZeroDivisionError):
        hk.generate(offloaded, IDS, hk.edit("scores.1", lambda x: 1 / 0), max_new_tokens=2)
    assert attributes() == before


def test_the_hash_of_an_offloaded_models_weights_is_that_of_the_weights(offloaded):
    assert weights_hash(offloaded) == weights_hash(hk.tiny("llama"))


# ---- quantised weights


def torchao_int8() -> hk.LM:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    lm = hk.tiny("llama")
    quantize_(lm.model, Int8WeightOnlyConfig())
    return lm


def torchao_by_transformers(tmp_path) -> hk.LM:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import AutoModelForCausalLM, TorchAoConfig

    hk.tiny("llama").model.save_pretrained(tmp_path)
    config = TorchAoConfig(Int8WeightOnlyConfig())
    return hk.LM(AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config).eval())


def dynamic() -> hk.LM:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch means to drop it
        return hk.LM(
            torch.ao.quantization.quantize_dynamic(
                hk.tiny("llama").model, {nn.Linear}, dtype=torch.qint8
            )
        )


@pytest.fixture(params=["torchao", "torchao by transformers", "dynamic"])
def quantised(request, tmp_path) -> hk.LM:
    if request.param == "torchao":
        return torchao_int8()
    return dynamic() if request.param == "dynamic" else torchao_by_transformers(tmp_path)


def test_sites_of_a_quantised_model_are_what_hand_written_hooks_find(quantised):
    whole = hk.tiny("llama")
    assert quantised.sites() == whole.sites() and quantised.sizes == whole.sizes
    run = hk.forward(quantised, IDS[0], hk.capture(quantised.sites()))
    expected = plain(quantised.model)
    assert torch.equal(run.logits, expected)
    assert 1e-6 < float((expected - plain(whole.model)).abs().max()) < 2.0
    for name in by_hand_names(quantised):
        module, side, view = by_hand.module_of(quantised.model, name, 1)
        with seen(module, side) as found:
            plain(quantised.model)
        assert torch.equal(run[f"{name}.1"], view(found[0])), name


def by_hand_names(lm: hk.LM) -> list[str]:
    return [
        "q",
        "k",
        "v",
        "z",
        "attn_in",
        "attn_out",
        "resid_mid",
        "mlp_pre",
        "mlp_post",
        "mlp_out",
        "resid_post",
    ]


def test_edits_of_a_quantised_model_are_those_of_hand_written_hooks(quantised):
    module = quantised.model.model.layers[1].mlp.down_proj
    with seen(module, edit=lambda x: x * 0.5):
        expected = plain(quantised.model)
        tokens = quantised.model.generate(ONE, **GREEDY)
    assert torch.equal(hk.forward(quantised, IDS[0], hk.scale("mlp_out.1", 0.5)).logits, expected)
    assert torch.equal(
        hk.generate(quantised, IDS[0], hk.scale("mlp_out.1", 0.5), **GREEDY).tokens, tokens
    )
    halved = hk.forward(
        quantised, IDS[0], hk.edit("pattern.1", lambda x: x * 0.5), hk.capture("z.1")
    )
    z = hk.forward(quantised, IDS[0], hk.capture("z.1"))["z.1"]
    assert torch.allclose(halved["z.1"], z * 0.5, atol=1e-5)
    source = hk.forward(quantised, IDS[0], hk.capture(quantised.sites()))
    assert torch.equal(
        hk.forward(quantised, IDS[0], hk.patch(quantised.sites(), source)).logits, source.logits
    )


def test_dynamic_quantisation_scales_by_the_whole_batch_so_padded_batches_are_refused():
    model = dynamic()
    with pytest.raises(Unsupported, match="rows of one batch change one another"):
        hk.forward(model, IDS)
    assert torch.equal(hk.forward(model, IDS[0]).logits, plain(model.model))


def test_a_quantised_models_weights_have_a_hash():
    assert weights_hash(dynamic()) == weights_hash(dynamic()) != weights_hash(hk.tiny("llama"))
    assert weights_hash(torchao_int8()) == weights_hash(torchao_int8()) != weights_hash(dynamic())


# ---- training mode


def given_warnings(action) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        action()
    return [each for each in found if issubclass(each.category, DroppedOut)]


def attached(lm: hk.LM) -> None:
    with torch.no_grad(), hk.attach(lm, hk.capture("embed")):
        lm.model(ONE)
        lm.model(ONE)


ACTIONS = {
    "forward": lambda lm: hk.forward(lm, IDS, hk.capture("embed")),
    "generate": lambda lm: hk.generate(lm, IDS, max_new_tokens=3),
    "attach": attached,
}


@pytest.mark.parametrize("action", ACTIONS.values(), ids=ACTIONS)
@pytest.mark.parametrize(
    ("kind", "config", "words"),
    [
        ("gpt2", {}, "transformer.drop: p = 0.1"),
        ("llama", {"attention_dropout": 0.25}, "attention_dropout = 0.25"),
    ],
    ids=["modules", "numbers"],
)
def test_a_model_in_training_mode_that_drops_out_is_warned_of_once_a_run(
    kind, config, words, action
):
    lm = hk.tiny(kind, config=config)
    assert not given_warnings(lambda: action(lm))
    lm.model.train()
    (warning,) = given_warnings(lambda: action(lm))
    assert words in str(warning.message) and "call model.eval() first" in str(warning.message)
    assert warning.filename == __file__


def test_a_model_in_training_mode_without_dropout_is_not_warned_of():
    lm = hk.tiny("llama")
    lm.model.train()
    for action in ACTIONS.values():
        assert not given_warnings(lambda action=action: action(lm))


CAUSES = {
    "inside a block": ("mlp_out.1", [hk.steer("z.0", torch.ones(4, 8), pos=1), hk.capture("q.1")]),
    "in the stream": ("resid_mid.1", [hk.steer("resid_mid.0", VECTOR)]),
    "on a block": ("resid_post.1", [hk.steer("resid_post.0", VECTOR)]),
    "in attention": ("pattern.1", [hk.edit("scores.0", lambda x: x * 0.5)]),
    "in a projection": ("q.1", [hk.scale("v.1", 2.0, pos=-1)]),
}


def checkpointed(lm: hk.LM) -> None:
    with adapting():  # transformers is about to give it another name
        lm.model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )


@pytest.mark.parametrize("cause", CAUSES.values(), ids=CAUSES)
@pytest.mark.parametrize("kind", ["llama", "gemma2", "mixtral"])
def test_gradients_with_checkpointing_are_those_without_it(kind, cause):
    site, hooks = cause
    found = []
    for checkpoints in (False, True):
        lm = hk.tiny(kind)
        lm.model.train()
        if checkpoints:
            checkpointed(lm)
        with hk.attach(lm, hk.capture(site, grad=True), *hooks) as manager:
            for ids in (
                ONE,
                ONE + 3,
            ):  # two forwards, so that each block has to run again in its own
                lm.model(ids, use_cache=False).logits[0, -1, 7].backward()
            grads = [text[site].grad for text in manager.texts]
            log = manager.log
        found.append(
            (
                grads,
                {name: w.grad for name, w in lm.model.named_parameters() if w.grad is not None},
                log,
            )
        )
    (plainly, weights, log), (again, weights_again, log_again) = found
    assert all(torch.equal(one, two) for one, two in zip(plainly, again, strict=True))
    assert min(float(grad.abs().max()) for grad in plainly) > 0
    assert weights.keys() == weights_again.keys()
    assert all(torch.equal(weights[name], weights_again[name]) for name in weights)
    assert log.equals(log_again)


def test_a_model_that_is_put_in_training_mode_inside_the_block_is_checkpointed_with_the_hooks():
    found = []
    for checkpoints in (False, True):
        lm = hk.tiny("llama")
        if checkpoints:
            checkpointed(lm)
        with hk.attach(lm, hk.scale("attn_out.1", 2.0)):
            lm.model.train()
            lm.model(ONE, use_cache=False).logits[0, -1, 7].backward()
        found.append([weight.grad for weight in lm.model.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_one_backward_through_two_checkpointed_forwards_edits_each_in_its_own_positions():
    found = []
    for checkpoints in (False, True):
        lm = hk.tiny("llama")
        lm.model.train()
        if checkpoints:
            checkpointed(lm)
        with hk.attach(lm, hk.scale("mlp_out.1", 3.0, pos=-1)):
            outs = [lm.model(torch.tensor([ids]), use_cache=False).logits[0, -1, 7] for ids in IDS]
            sum(outs).backward()
        found.append(lm.model.model.embed_tokens.weight.grad)
    assert torch.equal(*found)


def test_a_checkpointed_block_with_a_hook_whose_backward_comes_too_late_is_refused():
    lm = hk.tiny("llama")
    lm.model.train()
    checkpointed(lm)
    words = r"capture\(mlp_out.1, grad=True\) stands in a block with gradient checkpointing, .* inside a block of hk.attach"
    ran = []
    handle = lm.model.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(Unsupported, match=words):
        hk.forward(lm, IDS, hk.capture("mlp_out.1", grad=True))
    handle.remove()
    assert not ran
    with hk.attach(lm, hk.scale("mlp_out.1", 2.0)):
        logits = lm.model(ONE, use_cache=False).logits
    with pytest.raises(Unsupported, match=r"backward\(\) ran after the block was left"):
        logits.sum().backward()
    assert torch.isfinite(hk.forward(lm, IDS, hk.scale("mlp_out.1", 2.0)).logits).all(), (
        "without gradients it may be"
    )


def test_hooks_on_the_blocks_themselves_may_be_gone_before_backward():
    found = []
    for checkpoints in (False, True):
        lm = hk.tiny("llama")
        lm.model.train()
        if checkpoints:
            checkpointed(lm)
        run = hk.forward(
            lm, IDS[0], hk.capture("resid_post.1", grad=True), hk.steer("resid_post.0", VECTOR)
        )
        run.logits[0, -1, 7].backward()
        found.append(run["resid_post.1"].grad)
    assert torch.equal(*found)


# ---- code of one's own

CODE = """
import torch
from torch import nn
from transformers import GenerationMixin, LlamaConfig, LlamaForCausalLM


class MineConfig(LlamaConfig):
    model_type = "mine"


class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 2.0
        return output
"""


def test_a_folder_with_code_of_its_own_loads_only_where_it_is_trusted(
    tmp_path, small_tokenizer, monkeypatch
):
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    lm = hk.tiny("llama")
    folder = tmp_path / "mine"
    lm.model.save_pretrained(folder)
    small_tokenizer.save_pretrained(folder)
    (folder / "modeling_mine.py").write_text(CODE)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "mine",
        "architectures": ["MineForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_mine.MineConfig",
            "AutoModelForCausalLM": "modeling_mine.MineForCausalLM",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ModelNotFound,
        match=r"has code of its own, .* read it, and if you trust it, add trust_remote_code",
    ):
        hk.load(folder, device="cpu")
    mine = hk.load(folder, device="cpu", trust_remote_code=True)
    run = hk.forward(mine, "Tea", hk.capture("logits"), hk.capture("lm_head"), hk.force(7))
    ids = torch.tensor([small_tokenizer.encode("Tea")])
    assert torch.equal(run["logits"], plain(lm.model, ids) * 2)
    assert torch.equal(run["lm_head"], plain(lm.model, ids))
    assert run.logits[0, -1].argmax() == 7


# ---- other kinds of model

SMALL = {"vocab_size": 64, "decoder_start_token_id": 0, "pad_token_id": 0}


def t5() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_ff": 32, "num_layers": 2, "num_heads": 2, "d_kv": 8}
    return T5ForConditionalGeneration(T5Config(**SMALL, **sizes)).eval()


def bart() -> nn.Module:
    torch.manual_seed(0)
    layers = {
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
    }
    widths = {
        "d_model": 16,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "max_position_embeddings": 32,
    }
    return BartForConditionalGeneration(BartConfig(**SMALL, **layers, **widths)).eval()


TWO_TEXTS = {
    "T5ForConditionalGeneration": (t5, "encoder.block.1", "decoder.block.1.layer.2"),
    "BartForConditionalGeneration": (bart, "model.encoder.layers.1", "model.decoder.layers.1.fc2"),
}


@pytest.mark.parametrize("kind", TWO_TEXTS)
def test_an_encoder_decoder_says_what_it_is_and_what_can_be_done(kind):
    model = TWO_TEXTS[kind][0]()
    assert hk.LM(model).layout.names  # its type is in the table
    model.config.model_type = "mine"
    lm = hk.LM(model)
    reason = "no row of hookkit's table has the encoder-decoder 'mine'"
    assert set(lm.describe()["missing"]) == {f"{reason}; name its modules with hk.module(path)"}
    assert kind in repr(lm)
    with pytest.raises(MissingSite, match=reason):
        hk.attach(lm, hk.capture("resid_post.1"))
    for run in (hk.forward, hk.generate):
        with pytest.raises(
            Unsupported,
            match=rf"{kind} is an encoder-decoder, .* run it yourself in a block of hk.attach",
        ):
            run(lm, [[1, 2, 3]])


@pytest.mark.parametrize("length", [3, 5], ids=["as long", "longer"])
@pytest.mark.parametrize("kind", TWO_TEXTS)
def test_modules_of_an_encoder_decoder_are_captured_and_edited_whole(kind, length):
    make, encoder, decoder = TWO_TEXTS[kind]
    model = make()
    ids, mask = torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    given = {
        "input_ids": ids,
        "attention_mask": mask,
        "decoder_input_ids": torch.arange(2 * length).view(2, length),
    }
    with torch.no_grad():
        with (
            seen(model.get_submodule(encoder)) as read,
            seen(model.get_submodule(decoder)) as written,
        ):
            untouched = model(**given).logits
        with seen(model.get_submodule(decoder), edit=lambda x: x * 0.5):
            expected = model(**given).logits
        hooks = [
            hk.capture(hk.module(encoder)),
            hk.capture(hk.module(decoder)),
            hk.scale(hk.module(decoder), 0.5),
        ]
        with hk.attach(model, *hooks) as manager:
            out = model(**given).logits
    assert torch.equal(manager[f"{encoder}:output"], read[0])
    assert torch.equal(manager[f"{decoder}:output"], written[0])
    assert torch.equal(out, expected) and not torch.equal(out, untouched)


def test_what_has_no_meaning_in_an_encoder_decoder_is_refused():
    model = t5()
    given = {"input_ids": torch.tensor([[5, 6, 7]]), "decoder_input_ids": torch.tensor([[1, 2, 3]])}
    for hook in (
        hk.capture(hk.module("decoder.block.1"), pos=-1),
        hk.force(3, site=hk.module("lm_head")),
    ):
        with (
            pytest.raises(
                BadHook,
                match="an encoder-decoder reads two texts, so a position at .* may be of either",
            ),
            hk.attach(model, hook),
            torch.no_grad(),
        ):
            model(**given)
    layer = hk.capture(hk.module("decoder.block.1"))
    model.config.model_type = "mine"  # the table has no row of this type
    with (
        pytest.raises(Unsupported, match=r"generate of an encoder-decoder .* runs its two parts"),
        hk.attach(model, layer),
    ):
        model.generate(given["input_ids"], max_new_tokens=3)


def test_a_masked_model_has_head_and_logits_and_says_why_it_writes_no_text():
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    bert = hk.LM(BertForMaskedLM(BertConfig(vocab_size=32, **sizes)).eval())
    run = hk.forward(bert, [[1, 2, 3]], hk.capture("lm_head"))
    assert torch.equal(run.logits, plain(bert.model, torch.tensor([[1, 2, 3]])))
    with pytest.raises(Unsupported, match="BertForMaskedLM has no generate"):
        hk.generate(bert, [[1, 2, 3]])


def test_a_model_without_its_head_says_how_to_load_it_with_one():
    body = hk.LM(LlamaModel(hk.tiny("llama").config).eval())
    words = "the model has no unembedding head: it is a LlamaModel, load it with AutoModelForCausalLM; name its modules"
    for hooks in ([], [hk.capture("resid_post.1")]):
        with pytest.raises(MissingSite, match=words):
            hk.forward(body, IDS, *hooks)
    run = hk.forward(body, IDS[0], hk.capture(hk.module("layers.1")), logits=False)
    with seen(body.model.layers[1]) as found, torch.no_grad():
        body.model(ONE)
    assert torch.equal(run["layers.1:output"], found[0])


# ---- the wrong tokenizer


def test_a_tokenizer_with_more_tokens_than_the_model_is_found_out_by_the_text_that_needs_them(
    small_tokenizer,
):
    small = hk.LM(hk.tiny("llama", config={"vocab_size": 200}).model, small_tokenizer)
    assert small.n_tokens == 200
    large = max(small_tokenizer.encode(PROMPTS[0]))
    words = r"prompt 0 has token id \d+, and the vocabulary has ids 0 to 199: the tokenizer is not this model's"
    assert large >= 200
    for prompts in (PROMPTS[0], [PROMPTS[0]], small_tokenizer(PROMPTS[0])):
        with pytest.raises(BadPrompt, match=words):
            hk.forward(small, prompts)
    with pytest.raises(
        BadPrompt, match="prompt 1 has token id 200, and the vocabulary has ids 0 to 199$"
    ):
        hk.forward(small, [[1, 2], [3, 200]])
    word = next(
        token
        for i in range(319, 200, -1)
        if len(small_tokenizer.encode(token := small_tokenizer.decode([i]))) == 1
    )
    with pytest.raises(
        NotOneToken, match=r"is token \d+ of the tokenizer, and the model has ids 0 to 199"
    ):
        hk.forward(small, [[1, 2]], hk.ban(word))
    low = small_tokenizer.decode([60])
    assert hk.forward(small, low).logits.shape[-1] == 200
    assert math.isfinite(float(hk.ranks(hk.forward(small, low), top=3)["logit"].max()))


def test_a_module_that_runs_twice_in_one_forward_cannot_be_captured_whole():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return self.linear(self.linear(x))

    with (
        pytest.raises(
            Unsupported, match="the module at linear:output ran twice or more in one forward"
        ),
        hk.attach(Twice(), hk.capture(hk.module("linear"))) as manager,
    ):
        manager.lm.model(torch.ones(4))


def test_scores_and_patterns_of_prompts_of_several_lengths_are_edited_each_in_its_own_row():
    lm = hk.tiny("llama")
    for site in ("scores.1", "pattern.1", "pattern.1.2"):
        together = hk.forward(lm, IDS, hk.edit(site, lambda x: x * 0.5))
        for row, ids in enumerate(IDS):
            alone = hk.forward(lm, ids, hk.edit(site, lambda x: x * 0.5)).logits[0]
            assert torch.allclose(together.logits[row, : len(ids)], alone, atol=1e-5)


def test_a_pattern_captured_with_gradients_has_them():
    """By hand: from the values that it is multiplied with."""
    lm = hk.tiny("llama")
    run = hk.forward(
        lm,
        IDS[0],
        hk.capture("pattern.2", grad=True),
        hk.capture("z.2", grad=True),
        hk.capture("v.2"),
    )
    run.logits[0, -1, 7].backward()
    values = run["v.2"].repeat_interleave(2, dim=2)  # of each query head
    expected = torch.einsum("bqhd,bkhd->bhqk", run["z.2"].grad, values)
    assert torch.allclose(run["pattern.2"].grad, expected, atol=1e-5)
