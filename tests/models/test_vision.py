"""The towers that read images and sound: their sites against hooks by hand in plain transformers."""

import copy
import functools

import pytest
import torch
from images import PLACEHOLDER, TOKENS, image_prompt
from torch import Tensor

import hookkit as hk
from hookkit.errors import (
    BadHook,
    EmptySelection,
    HookkitError,
    MissingSite,
    OutOfRange,
    Unsupported,
)

# Where the block 1 of each tower is, by hand.
BLOCKS = {
    "gemma3": "model.vision_tower.encoder.layers.1",
    "gemma4": "model.vision_tower.encoder.layers.1",
    "glm4v": "model.visual.blocks.1",
    "idefics3": "model.vision_model.encoder.layers.1",
    "llama4": "vision_model.model.layers.1",
    "llava": "model.vision_tower.encoder.layers.1",
    "llava_next": "model.vision_tower.encoder.layers.1",
    "mistral3": "model.vision_tower.transformer.layers.1",
    "paligemma": "model.vision_tower.encoder.layers.1",
    "qwen2_5_vl": "model.visual.blocks.1",
    "qwen2_audio": "model.audio_tower.layers.1",
    "qwen2_vl": "model.visual.blocks.1",
    "qwen3_5": "model.visual.blocks.1",
    "qwen3_vl": "model.visual.blocks.1",
    "smolvlm": "model.vision_model.encoder.layers.1",
}
PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
PACKED = ("glm4v", "mistral3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")
PADDING = {"gemma4": 4}  # patches of each image that are no part of it
EVERYWHERE = {
    "resid_pre", "attn_in", "q", "k", "v", "scores", "pattern", "z", "attn_out", "resid_mid", "mlp_in",
    "mlp_pre", "mlp_post", "mlp_out", "resid_post",
}  # fmt: skip
MODULES = ("resid_post", "attn_out", "mlp_out", "mlp_pre", "mlp_post", "z")


@functools.cache
def model_of(name: str) -> hk.LM:
    return hk.tiny(name)


@pytest.fixture(params=sorted(TOKENS))
def name(request) -> str:
    return request.param


def stack_of(name: str) -> str:
    return "audio" if name == "qwen2_audio" else "vision"


def two_images(name: str) -> tuple[dict, dict, dict]:
    """A prompt with two images, and the two prompts of which it is made."""
    first, second = image_prompt(name, 5, 2, 3), image_prompt(name, 6, 1, 2)
    both = {}
    for key, values in first.items():
        in_one_row = key in PER_TOKEN or (values.ndim == 5 and name != "llava_next")
        both[key] = torch.cat([values, second[key]], 1 if in_one_row else 0)
    return both, first, second


def text_only(name: str) -> dict:
    """A prompt without an image."""
    keys = image_prompt(name, 1).keys()
    ids = torch.tensor([[30, 31, 32, 33]])
    return {key: ids if key == "input_ids" else torch.zeros_like(ids) for key in PER_TOKEN if key in keys} | {
        "attention_mask": torch.ones_like(ids)
    }  # fmt: skip


def by_hand(lm: hk.LM, inputs: dict, site: str, change=None) -> tuple[Tensor, Tensor]:
    """What a module hooked by hand has at a site in plain transformers, and the logits."""
    location = lm.location(lm.sites(site)[0])
    seen = []

    def act(values: Tensor) -> Tensor:
        seen.append(values.detach().clone())
        return values if change is None else change(values)

    def after(module, arguments, output):
        return (act(output[0]), *output[1:]) if isinstance(output, tuple) else act(output)

    def before(module, arguments):
        return (act(arguments[0]), *arguments[1:])

    module = lm.model.get_submodule(location.path)
    is_input = location.side == "input"
    handle = (
        module.register_forward_pre_hook(before)
        if is_input
        else module.register_forward_hook(after)
    )
    try:
        with torch.no_grad():
            logits = lm.model(**inputs).logits[0]
    finally:
        handle.remove()
    return seen[0], logits


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-3))


def test_a_tower_has_the_sites_that_every_stack_has(name):
    lm, stack = model_of(name), stack_of(name)
    layout = lm.layout.stacks[stack]
    assert set(layout.names) >= EVERYWHERE
    assert lm.location(lm.sites(f"{stack}.resid_post.1")[0]).path == BLOCKS[name]
    table = lm.describe().set_index("site")
    for missing in set(table.index[table["missing"] != ""]):
        assert len(table.loc[missing, "missing"]) > 20  # a reason
    assert len(repr(lm.towers)) < 1000
    with pytest.raises(MissingSite, match="writes no text"):
        lm.sites(f"{stack}.logits")
    with pytest.raises(OutOfRange, match="2 layers"):
        lm.sites(f"{stack}.z.2")


def test_captures_are_what_hooks_by_hand_see(name):
    lm, stack = model_of(name), stack_of(name)
    both, *_ = two_images(name)
    names = [f"{stack}.{site}.1" for site in MODULES]
    run = hk.forward(lm, both, hk.capture(names))
    plain = by_hand(lm, both, names[0])[1]
    assert torch.equal(run.logits[0], plain)
    for site in names:
        values, _ = by_hand(lm, both, site)
        if name not in PACKED:
            patches = values.shape[1] - PADDING.get(name, 0)
            values = values[:, :patches].flatten(0, 1)[None]
        expected = values.reshape(run[site].shape)
        assert torch.equal(run[site], expected), site


def test_a_row_has_the_patches_of_its_own_images(name):
    lm, stack = model_of(name), stack_of(name)
    both, first, second = two_images(name)
    sites = lm.expand([f"{stack}.{site}" for site in lm.layout.stacks[stack].names])
    run = hk.forward(lm, [text_only(name), both, image_prompt(name, 9, 4, 1)], hk.capture(sites))
    of_first, of_second = (hk.forward(lm, one, hk.capture(sites)) for one in (first, second))
    width = of_first[f"{stack}.resid_post.1"].shape[1]
    assert run.captured(f"{stack}.resid_post.1").rows == (1, 2)
    for site in sites:
        captured = run.captured(site)
        assert captured.positions.tolist()[0] == list(range(2 * width))
        assert captured.positions.tolist()[1] == [*range(width), *[-1] * width]
        values = captured.by_position[0]
        for start, alone in ((0, of_first), (width, of_second)):
            part, expected = values[start : start + width], alone.captured(site).by_position[0]
            if site.name in ("scores", "pattern"):
                others = torch.cat([part[..., :start], part[..., start + width :]], -1)
                assert site.name == "scores" or float(others.abs().max()) == 0
                part = part[..., start : start + width]
            assert apart(part, expected) < 1e-5, site


def test_an_edit_of_a_patch_equals_one_by_hand(name):
    lm, stack = model_of(name), stack_of(name)
    both, first, _ = two_images(name)
    site = f"{stack}.resid_post.0"
    width = hk.forward(lm, first, hk.capture(site))[site].shape[1]

    def change(values: Tensor) -> Tensor:
        values = values.clone()
        if values.ndim == 2:
            values[width + 2] *= -3
        elif name == "mistral3":
            values[:, width + 2] *= -3
        else:
            patches = values.shape[1] - PADDING.get(name, 0)
            values[divmod(width + 2, patches)] *= -3
        return values

    expected = by_hand(lm, both, site, change)[1]
    hook = hk.edit(site, lambda values: -3 * values, pos=width + 2, rows=1)
    run = hk.forward(lm, [text_only(name), both], hook)
    assert apart(run.logits[1, : len(expected)], expected) < 2e-5
    assert apart(expected, by_hand(lm, both, site)[1]) > 1e-6
    assert run.log[["row", "positions", "changed"]].values.tolist() == [[1, str(width + 2), 16]]
    last = hk.forward(lm, both, hk.capture(site, pos=-1))[site]
    assert torch.equal(last, hk.forward(lm, both, hk.capture(site))[site][:, -1:])


def test_generate_reads_and_edits_the_tower_once(name):
    lm, stack = model_of(name), stack_of(name)
    prompts = [image_prompt(name, 1), image_prompt(name, 2, before=5, after=6)]
    site, options = (
        f"{stack}.resid_post.1",
        {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False},
    )
    run = hk.generate(lm, prompts, hk.capture(site), **options)
    whole = hk.forward(lm, prompts, hk.capture(site))
    assert apart(run[site], whole[site]) < 1e-5
    assert set(run.log["forward"]) == {0}

    def change(values: Tensor) -> Tensor:
        return values.flip(-1) * 2

    edited = hk.generate(lm, prompts[1], hk.edit(site, change), **options)
    module = lm.model.get_submodule(BLOCKS[name])
    handle = module.register_forward_hook(
        lambda module, arguments, output: (
            (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)
        ),
        prepend=True,  # before transformers reads the stream of this block
    )
    try:
        plain = lm.model.generate(**prompts[1], **options)[0].tolist()
    finally:
        handle.remove()
    assert list(edited.rows[0]) == plain


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "idefics3", "mistral3"])
def test_beams_and_steps_without_a_cache_have_one_row_of_patches_for_each_prompt(name):
    lm, site = model_of(name), "vision.resid_post.1"
    prompts = [image_prompt(name, 1), image_prompt(name, 2, before=5, after=6)]
    whole = hk.forward(lm, prompts, hk.capture(site))
    for options in ({"num_beams": 2, "do_sample": False}, {"use_cache": False}):
        run = hk.generate(lm, prompts, hk.capture(site), max_new_tokens=2, **options)
        assert run.captured(site).rows == (0, 1) and apart(run[site], whole[site]) < 1e-5
    beams = hk.generate(
        lm, prompts, hk.scale(site, -2.0, rows=1), max_new_tokens=2, num_beams=2, do_sample=False
    )
    alone = hk.generate(
        lm, prompts[1], hk.scale(site, -2.0), max_new_tokens=2, num_beams=2, do_sample=False
    )
    assert beams.rows[1] == alone.rows[0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen2_5_vl", "mistral3"])
def test_the_patterns_are_those_of_the_towers_own_eager_attention(name, attention):
    lm = hk.LM(copy.deepcopy(model_of(name).model))
    lm.model.set_attn_implementation(attention)
    inputs = image_prompt(name, 1)
    run = hk.forward(lm, inputs, hk.capture(["vision.pattern.1", "vision.v.1", "vision.z.1"]))
    mixed = torch.einsum("rhqk,rkhd->rqhd", run["vision.pattern.1"], run["vision.v.1"])
    assert apart(mixed, run["vision.z.1"]) < 1e-5
    assert apart(run["vision.pattern.1"].sum(-1), torch.ones(1, 2, mixed.shape[1])) < 1e-5


def grid_prompt(side: int) -> dict[str, Tensor]:
    """A prompt for Qwen2.5-VL with an image of this many patches in height and width."""
    generator = torch.Generator().manual_seed(side)
    ids = torch.tensor([[30, 31, 11, *[PLACEHOLDER] * (side * side // 4), 12, 40, 41]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(side * side, 96, generator=generator),
        "image_grid_thw": torch.tensor([[1, side, side]]),
        "mm_token_type_ids": (ids == PLACEHOLDER).long(),
    }


def test_a_tower_with_windows_has_the_patches_of_a_window_one_after_another():
    lm = model_of("qwen2_5_vl")
    inputs = grid_prompt(8)
    sites = ["vision.pattern.0", "vision.pattern.1", "vision.v.0", "vision.z.0", "vision.q_rot.0"]
    run = hk.forward(lm, inputs, hk.capture(sites))
    in_windows, everywhere = run["vision.pattern.0"][0], run["vision.pattern.1"][0]
    assert in_windows.shape == everywhere.shape == (2, 64, 64)
    assert int((in_windows[0] > 0).sum()) == 64 * 16 and int((everywhere[0] > 0).sum()) == 64 * 64
    mixed = torch.einsum("rhqk,rkhd->rqhd", run["vision.pattern.0"], run["vision.v.0"])
    assert apart(mixed, run["vision.z.0"]) < 1e-5
    zeroed = hk.forward(lm, inputs, hk.ablate("vision.pattern.0.1")).logits
    assert apart(zeroed, hk.forward(lm, inputs, hk.ablate("vision.z.0.1")).logits) < 1e-5
    assert apart(zeroed, run.logits) > 1e-6


def test_the_padding_of_an_image_has_no_positions():
    """Idefics reads small images with the padding that their mask hides."""
    lm = model_of("idefics3")
    large, small = image_prompt("idefics3", 1), image_prompt("idefics3", 2, before=3)
    large["pixel_attention_mask"] = torch.ones(1, 1, 8, 8)
    small["pixel_attention_mask"] = torch.zeros(1, 1, 8, 8)
    small["pixel_attention_mask"][..., :4] = 1  # the patches on the left
    run = hk.forward(lm, [large, small], hk.capture(["vision.resid_post.1", "vision.pattern.1"]))
    captured = run.captured("vision.resid_post.1")
    assert captured.positions.tolist() == [[0, 1, 2, 3], [0, 1, -1, -1]]
    pixels = {**small, "pixel_values": small["pixel_values"]}
    values, _ = by_hand(lm, pixels, "vision.resid_post.1")
    assert apart(captured.values[1, :2], values[0, [0, 2]]) < 1e-5
    assert apart(run["vision.pattern.1"][1, :, :2].sum(-1), torch.ones(2, 2)) < 1e-5


def test_only_blocks_that_the_text_model_reads_are_proved():
    lm = model_of("llava")
    config = copy.deepcopy(lm.model.config)
    config.vision_feature_layer = -2
    model = hk.LM(type(lm.model)(config).eval())
    laws = hk.check_laws(model, prompts=[image_prompt("llava", seed) for seed in (1, 2, 3)])
    assert laws["holds"].all() and laws["site"].str.startswith("vision.").sum() > 50
    run = hk.forward(model, image_prompt("llava"), hk.ablate("vision.mlp_out.1"))
    assert torch.equal(run.logits, hk.forward(model, image_prompt("llava")).logits)


def test_what_cannot_be_meant_raises():
    lm, inputs = model_of("llava"), image_prompt("llava", 1)
    site = "vision.resid_post.1"
    with pytest.raises(OutOfRange, match="5 patches: positions 0 to 4"):
        hk.forward(lm, inputs, hk.ablate(site, pos=5))
    with pytest.raises(OutOfRange, match="5 patches"):
        hk.generate(lm, inputs, hk.ablate(site, pos=7), max_new_tokens=8)
    with pytest.raises(EmptySelection, match="no prompt has anything for it"):
        hk.forward(lm, text_only("llava"), hk.ablate(site))
    with pytest.raises(EmptySelection, match="row 0, which has no input for the vision tower"):
        hk.forward(lm, [text_only("llava"), inputs], hk.ablate(site, rows=0))
    with pytest.raises(HookkitError, match="give numbers"):
        hk.forward(lm, inputs, hk.ablate(site, pos=hk.IMAGE))
    with pytest.raises(MissingSite, match="no audio"):
        hk.forward(lm, inputs, hk.ablate("audio.z.1"))


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_a_position_at_a_towers_module_is_never_that_of_the_text(name):
    """Also where there are as many patches as tokens."""
    lm = model_of(name)
    inputs = image_prompt(name, 1)
    missing = 5 - inputs["input_ids"].shape[1] if name == "llava" else 0
    if missing < 0:  # an image of five patches, in a text of five tokens
        inputs = {
            **inputs,
            "input_ids": inputs["input_ids"][:, 2:7],
            "attention_mask": torch.ones(1, 5),
        }
    assert hk.forward(lm, inputs).tokens.shape[1] == (5 if name == "llava" else 12)
    for path in (
        BLOCKS[name],
        "model.multi_modal_projector" if name == "llava" else "model.visual.merger",
    ):
        with pytest.raises(BadHook, match="outside the text model"):
            hk.forward(lm, inputs, hk.capture(hk.module(path), pos=-1))
        whole = hk.forward(lm, inputs, hk.capture(hk.module(path)))
        assert whole.captured(hk.module(path)).positions is None
    inside = hk.module(lm.location(lm.sites("resid_post.1")[0]).path)
    assert hk.forward(lm, inputs, hk.capture(inside, pos=-1))[inside].shape[1] == 1


def test_the_modules_of_a_model_that_writes_no_text_can_be_captured():
    from transformers import CLIPConfig, CLIPModel

    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    vision = {**sizes, "image_size": 8, "patch_size": 4}
    clip = CLIPModel(
        CLIPConfig(text_config=sizes | {"vocab_size": 60}, vision_config=vision)
    ).eval()
    site = hk.module("text_model.encoder.layers.0")
    with hk.attach(clip, hk.capture(site)) as manager, torch.no_grad():
        clip(input_ids=torch.tensor([[5, 6, 7]]), pixel_values=torch.ones(1, 3, 8, 8))
    assert manager[site].shape == (1, 3, 16)


def test_in_a_block_each_row_has_its_image_or_it_is_said_that_this_is_unknown():
    lm = model_of("llava")
    prompts = [image_prompt("llava", seed) for seed in (1, 2)]
    joined = {key: torch.cat([prompt[key] for prompt in prompts]) for key in prompts[0]}
    site = "vision.resid_post.1"
    with hk.attach(lm, hk.capture(site)) as manager, torch.no_grad():
        lm.model(**joined)
    assert torch.equal(manager[site], hk.forward(lm, prompts, hk.capture(site))[site])
    joined["input_ids"] = joined["input_ids"].clone()
    both = two_images("llava")[0]["pixel_values"]
    joined["input_ids"] = torch.tensor([[30, *[PLACEHOLDER] * 8], [*range(30, 39)]])
    joined["attention_mask"] = torch.ones(2, 9, dtype=torch.long)
    with pytest.raises(Unsupported, match="not known here"), hk.attach(lm, hk.capture(site)):
        lm.model(**{**joined, "pixel_values": both})
    ids = joined.pop("input_ids")
    with pytest.raises(Unsupported, match="not known here"), hk.attach(lm, hk.capture(site)):
        lm.model.generate(ids, **{**joined, "pixel_values": both}, max_new_tokens=1)
    with hk.attach(lm, hk.capture(site)) as manager:
        first = prompts[0]
        pixels = first["pixel_values"]
        lm.model.generate(first["input_ids"], pixel_values=pixels, max_new_tokens=1)
    assert manager[site].shape == (1, 5, 16)


def test_vectors_means_and_patches_of_a_tower():
    lm = model_of("llava")
    first, second = image_prompt("llava", 1), image_prompt("llava", 2)
    site = "vision.resid_post.0"
    values = [hk.forward(lm, one, hk.capture(site))[site] for one in (first, second)]
    patched = hk.forward(lm, second, hk.patch(site, hk.forward(lm, first, hk.capture(site))))
    expected = by_hand(lm, second, site, lambda _: values[0])[1]
    assert torch.equal(patched.logits[0], expected)
    mean = torch.cat(values).mean(0)
    averaged = hk.forward(lm, second, hk.ablate(site, to="mean", over=[first, second]))
    expected = by_hand(lm, second, site, lambda old: mean.expand_as(old))[1]
    assert apart(averaged.logits[0], expected) < 1e-5
    grad = hk.forward(lm, first, hk.capture(site, grad=True))
    (gradient,) = torch.autograd.grad(grad.logits[0, -1, 37], grad[site])
    assert gradient.shape == (1, 5, 16) and float(gradient.abs().max()) > 0
    gradients = hk.gradients(lm, [first], hk.metrics.logit(37), site)
    assert apart(gradients.gradient[site], gradient) < 1e-6


def test_names_texts_and_json_of_sites_in_a_tower():
    lm = model_of("llava")
    assert lm.sites("vision.z", layers=[1])[0] == hk.Site("z", 1, stack="vision")
    assert [str(site) for site in lm.sites("vision.z", layers=[0, 1], heads=[1])] == [
        "vision.z.0.1",
        "vision.z.1.1",
    ]
    hook = hk.parse_hook("ablate:vision.z.1.1@pos=-1")
    assert hk.format_hook(hook) == "ablate:vision.z.1.1@pos=-1"
    run = hk.forward(lm, image_prompt("llava"), hk.capture("vision.z"))
    assert run["vision.z.1.1"].shape == (1, 5, 8) and run.stack("vision.z").shape == (2, 1, 5, 2, 8)


def test_lenses_and_sweeps_say_that_a_tower_has_other_positions(tmp_path):
    lm, inputs = model_of("llava"), image_prompt("llava")
    metric = hk.metrics.logit(37)
    for refuse in (
        lambda: hk.logit_lens(lm, inputs, sites="vision.resid_post", watch=[37]),
        lambda: hk.patching(lm, [inputs], [inputs], "vision.resid_post", metric),
        lambda: hk.attribution(lm, [inputs], [inputs], "vision.z", metric),
        lambda: hk.ablations(lm, [inputs], "vision.z", metric),
        lambda: hk.harvest(lm, [inputs], ["vision.z.1"], tmp_path / "harvest", progress=False),
    ):
        with pytest.raises(Unsupported, match="patches of the row's images as positions"):
            refuse()
    packed, two = model_of("qwen2_vl"), two_images("qwen2_vl")[0]
    with pytest.raises(Unsupported, match="for each image by itself"):
        hk.forward(packed, two, hk.capture("vision.pattern.1", grad=True))
    with pytest.raises(Unsupported, match="patches"):
        hk.sweep(
            lm,
            [inputs],
            {"layer": [0, 1]},
            lambda layer: hk.ablate(f"vision.resid_post.{layer}"),
            hk.metrics.logit(37),
        )


def test_the_doctor_has_a_row_for_each_site_of_a_tower():
    checkup = hk.doctor(model_of("qwen2_vl"), layers=[1])
    assert not checkup.problems, checkup.problems
    rows = checkup.sites[checkup.sites["site"].str.startswith("vision.")].set_index("site")
    assert rows.loc["vision.z", "blocks"] == "2 of 2"
    present = rows[rows["blocks"] != ""]
    assert len(present) >= 18 and present["proved"].all() and present["editable"].all()
    assert (rows[rows["blocks"] == ""]["why"] != "").all()
