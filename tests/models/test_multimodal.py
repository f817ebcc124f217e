"""Models that read images and sound: the other inputs of a prompt, and the sites of their text model."""

import copy
import functools
import pickle

import pytest
import torch
from images import IN_GRIDS, PLACEHOLDER, TOKENS, image_prompt
from torch import Tensor

import hookkit as hk
from hookkit.errors import BadPrompt, HookkitError, OutOfRange, Unsupported
from hookkit.models.prompt_row import PromptRow, crop_row, extend_row, piece_of_row
from hookkit.models.prompts import as_batch

SITES = (
    "resid_pre.1",
    "attn_out.1",
    "z.1",
    "mlp_post.1",
    "mlp_out.1",
    "resid_post.1",
    "final_norm",
)


@functools.cache
def model_of(model_type: str) -> hk.LM:
    return hk.tiny(model_type)


@pytest.fixture(params=sorted(TOKENS))
def case(request) -> tuple[str, hk.LM, dict, dict]:
    first, second = (
        image_prompt(request.param, 1),
        image_prompt(request.param, 2, before=5, after=6),
    )
    return request.param, model_of(request.param), first, second


def plain_logits(lm: hk.LM, inputs: dict) -> Tensor:
    with torch.no_grad():
        return lm.model(**inputs).logits[0]


def with_hook(lm: hk.LM, inputs: dict, path: str, change, *, before: bool = False) -> Tensor:
    """The logits under a hook written by hand."""
    module = lm.model.get_submodule(path)

    def after_forward(module, arguments, output):
        if isinstance(output, tuple):
            return change(output[0]), *output[1:]
        return change(output)

    def before_forward(module, arguments):
        return change(arguments[0]), *arguments[1:]

    handle = module.register_forward_pre_hook(before_forward) if before else None
    handle = handle or module.register_forward_hook(after_forward)
    try:
        return plain_logits(lm, inputs)
    finally:
        handle.remove()


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-3))


def test_logits_with_an_image_are_those_of_transformers_bit_for_bit(case):
    _, lm, first, _ = case
    assert torch.equal(hk.forward(lm, first).logits[0], plain_logits(lm, first))
    text_only = {"input_ids": first["input_ids"].clone()}
    text_only["input_ids"][text_only["input_ids"] == PLACEHOLDER] = 20
    assert torch.equal(hk.forward(lm, text_only).logits[0], plain_logits(lm, text_only))


def test_prompts_with_images_in_a_padded_batch_equal_each_alone(case):
    _, lm, first, second = case
    both = hk.forward(lm, [first, second]).logits
    last = hk.forward(lm, [first, second], logits="last").logits
    for row, inputs in enumerate((first, second)):
        expected = plain_logits(lm, inputs)
        assert apart(both[row, : len(expected)], expected) < 5e-5
        assert apart(last[row, -1], expected[-1]) < 5e-5
    other = (
        {**second, "pixel_values": -second["pixel_values"]} if "pixel_values" in second else second
    )
    if other is not second:  # the image matters, and only to its own row
        changed = hk.forward(lm, [first, other]).logits
        assert apart(changed[0], both[0]) < 2e-5 and apart(changed[1], both[1]) > 1e-3


def test_every_law_holds_with_images(case):
    name, lm, *_ = case
    prompts = [
        image_prompt(name, seed, before, after)
        for seed, before, after in ((1, 3, 4), (2, 1, 2), (3, 2, 3))
    ]
    proof = hk.check_laws(lm, prompts=prompts, layers=[1])
    broken = proof[~proof["holds"] & ~proof["note"].str.startswith("exception: ")]
    if (
        name == "qwen2_audio"
    ):  # a token of sound that the model writes asks for sound that was not given
        broken = broken[broken["law"] != "without cache"]
    assert broken.empty, broken.to_string()
    assert len(lm.layout.names) >= 15


def test_edits_at_sites_equal_hooks_by_hand(case):
    _, lm, first, _ = case

    def change(values: Tensor) -> Tensor:
        return values * 1.5 + 0.25

    for site in SITES:
        if site.partition(".")[0] not in lm.layout.names:
            continue
        try:
            location = lm.location(lm.sites(site)[0])
        except HookkitError:
            continue
        by_hand = with_hook(lm, first, location.path, change, before=location.side == "input")
        assert apart(hk.forward(lm, first, hk.edit(site, change)).logits[0], by_hand) < 2e-5, site


def test_generate_forces_and_captures_at_steps_with_images(case):
    _, lm, first, second = case
    run = hk.generate(
        lm,
        [first, second],
        hk.force(37, step=1),
        hk.capture("resid_post.1"),
        max_new_tokens=3,
        min_new_tokens=3,
        do_sample=False,
    )
    for row, inputs in enumerate((first, second)):
        length = inputs["input_ids"].shape[1]
        written = run.rows[row][length:]
        plain = lm.model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)[
            0, length
        ]
        assert written[0] == int(plain) and written[1] == 37
        if PLACEHOLDER in written:  # forward would ask for its image
            continue
        whole = hk.forward(lm, [run.rows[row]], hk.capture("resid_post.1"))
        captured = run.captured("resid_post.1").by_position[row]
        assert apart(captured[: length + 2], whole["resid_post.1"][0, : length + 2]) < 1e-4


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "idefics3", "qwen2_audio"])
def test_beams_and_samples_keep_the_image_of_their_prompt(name):
    lm, prompts = model_of(name), [image_prompt(name, 1), image_prompt(name, 2, before=5, after=6)]
    beams = hk.generate(lm, prompts, num_beams=2, max_new_tokens=2, do_sample=False)
    for row, inputs in enumerate(prompts):
        alone = lm.model.generate(**inputs, num_beams=2, max_new_tokens=2, do_sample=False)[0]
        assert list(beams.rows[row]) == alone.tolist()[: len(beams.rows[row])]
    samples = hk.generate(
        lm, prompts, do_sample=True, num_return_sequences=2, max_new_tokens=2, seed=0
    )
    assert samples.prompt_rows == (0, 0, 1, 1)
    assert [len(row.inputs) > 0 for row in samples.rows] == [True] * 4


def test_a_sweep_with_an_image_equals_a_loop_of_hooks(case):
    _, lm, first, second = case
    if "resid_post" not in lm.layout.names:
        pytest.skip("no named sites")
    metric = hk.metrics.logit(37)

    def zero_last(values: Tensor) -> Tensor:
        values = values.clone()
        values[:, -1] = 0
        return values

    hooks = lambda layer: hk.ablate(f"resid_post.{layer}", pos=-1)  # noqa: E731
    table = hk.sweep(lm, [first, second], {"layer": [0, 2]}, hooks, metric)
    for cell in table.itertuples():
        path = lm.family.block.format(layer=cell.layer)
        by_hand = with_hook(lm, (first, second)[cell.row], path, zero_last)[-1, 37]
        assert abs(cell._asdict()[metric.name] - float(by_hand)) < 2e-4 * max(
            1, abs(float(by_hand))
        )


def test_patching_between_two_images_with_the_same_tokens_changes_the_logits():
    """Positions before the first other token are copied, unless an image stands there."""
    lm = model_of("llava")
    clean, corrupted = image_prompt("llava", 1), image_prompt("llava", 1)
    corrupted["pixel_values"] = -corrupted["pixel_values"]
    table = hk.patching(lm, [clean], [corrupted], "resid_pre", hk.metrics.logit(37))
    expected = float(plain_logits(lm, clean)[-1, 37] - plain_logits(lm, corrupted)[-1, 37])
    at_image = table[(table["layer"] == 0) & table["pos"].between(2, 5)]
    effects = at_image.filter(like="delta").iloc[:, 0]
    assert abs(expected) > 1e-3 and effects.abs().max() > 1e-4


def test_losses_lenses_gradients_and_harvests_read_the_image(tmp_path):
    lm, inputs = model_of("llava"), image_prompt("llava", 1)
    logits = plain_logits(lm, inputs)
    ids = inputs["input_ids"][0]
    expected = -logits.log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]]
    losses = hk.token_losses(lm, [inputs])
    assert torch.allclose(torch.tensor(losses["loss"].to_numpy()), expected.double(), atol=1e-5)
    stream = hk.forward(lm, inputs, hk.capture("resid_post.1"))["resid_post.1"][0]
    hk.harvest(lm, [inputs], ["resid_post.1"], tmp_path / "harvest", progress=False)
    assert (
        apart(torch.as_tensor(hk.open_harvest(tmp_path / "harvest")["resid_post.1"][:]), stream)
        < 1e-6
    )
    last = hk.logit_lens(lm, inputs, sites="resid_post", watch=[37])
    final = last[last["site"] == "resid_post.2"] if "site" in last else last
    assert not final.empty
    run = hk.forward(lm, inputs, hk.capture(lm.sites()))
    parts = hk.direct_logits(run, [37])
    assert abs(parts["logit"].sum() - float(logits[-1, 37])) < 1e-3
    shifted = hk.gradients(lm, [inputs], hk.metrics.logit(37), "resid_pre.1")
    assert shifted is not None


def test_a_row_keeps_its_inputs_through_cuts_and_extensions():
    row = as_batch(model_of("gemma3"), image_prompt("gemma3", 1)).rows[0]
    assert isinstance(row, PromptRow) and set(row.inputs) == {"pixel_values"}
    longer = extend_row(row, [4, 5])
    assert longer[-2:] == (4, 5) and torch.equal(
        longer.inputs["pixel_values"], row.inputs["pixel_values"]
    )
    assert longer.per_token["token_type_ids"].tolist() == [
        *row.per_token["token_type_ids"].tolist(),
        0,
        0,
    ]
    assert crop_row(longer, len(row)) == row and row != tuple(row)
    with pytest.raises(Unsupported, match="cannot be read in pieces"):
        piece_of_row(row, 1, 3, 5)


def test_images_are_positions():
    lm, inputs = model_of("llava"), image_prompt("llava", 1)
    run = hk.forward(lm, inputs, hk.capture("resid_post.1", pos=hk.IMAGE))
    whole = hk.forward(lm, inputs, hk.capture("resid_post.1"))["resid_post.1"]
    assert torch.equal(run["resid_post.1"], whole[:, 2:6])
    text = "ablate:resid_post.1@pos=IMAGE"
    assert hk.parse_hook(text).where.pos is hk.IMAGE and hk.format_hook(hk.parse_hook(text)) == text
    with pytest.raises(OutOfRange, match="no token that stands for image"):
        hk.forward(lm, [[3, 4]], hk.ablate("resid_post.1", pos=hk.IMAGE))
    sound = model_of("qwen2_audio")
    captured = hk.forward(
        sound, image_prompt("qwen2_audio", 1), hk.capture("resid_post.1", pos=hk.AUDIO)
    )
    assert captured["resid_post.1"].shape[1] == TOKENS["qwen2_audio"]


def joined(name: str) -> dict:
    """Two prompts as a processor returns them together, padded on the left."""
    first, second = image_prompt(name, 1), image_prompt(name, 2, before=3, after=5)
    pad = second["input_ids"].shape[1] - first["input_ids"].shape[1]
    inputs = {}
    for key, values in first.items():
        if values.ndim == 2 and key not in (
            "pixel_values",
            "image_sizes",
            "image_grid_thw",
            "feature_attention_mask",
        ):
            values = torch.nn.functional.pad(values, (pad, 0))
        inputs[key] = torch.cat([values, second[key]])
    return inputs


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3", "smolvlm", "qwen2_audio"])
def test_what_a_processor_returned_for_several_prompts_is_divided_among_them(name):
    lm = model_of(name)
    batch = as_batch(lm, joined(name))
    alone = [
        as_batch(lm, image_prompt(name, 1)).rows[0],
        as_batch(lm, image_prompt(name, 2, before=3, after=5)).rows[0],
    ]
    assert list(batch.rows) == alone


def test_images_that_cannot_be_divided_are_refused():
    inputs = joined("llava")
    inputs["pixel_values"] = torch.cat([inputs["pixel_values"], inputs["pixel_values"][:1]])
    with pytest.raises(
        BadPrompt, match="give a list, with what the processor returns for each prompt"
    ):
        hk.forward(model_of("llava"), inputs)


def test_an_image_without_its_input_and_an_input_that_the_model_lacks_raise():
    lm = model_of("llava")
    with pytest.raises(BadPrompt, match="stands for an image"):
        hk.forward(lm, image_prompt("llava", 1)["input_ids"])
    with pytest.raises(BadPrompt, match="'pixel_values', which would be ignored"):
        hk.forward(hk.tiny("llama"), image_prompt("llava", 1))
    with pytest.raises(BadPrompt, match="'position_ids', which hookkit makes itself"):
        hk.forward(lm, {**image_prompt("llava", 1), "position_ids": torch.arange(10)[None]})


EXTRA = {"input_ids": [[5, 9, 17, 200, 33, 41]], "one_key_too_many": torch.ones(1, 2)}
PROMPT_FUNCTIONS = {
    "forward": lambda lm, p: hk.forward(lm, p),
    "generate": lambda lm, p: hk.generate(lm, p, max_new_tokens=1),
    "stream": lambda lm, p: list(hk.stream(lm, p, max_new_tokens=1)),
    "compare_generations": lambda lm, p: hk.compare_generations(
        lm, p, hk.ban(37), max_new_tokens=1
    ),
    "sweep": lambda lm, p: hk.sweep(
        lm, p, {"layer": [0]}, lambda layer: hk.ablate(f"z.{layer}"), hk.metrics.logit(3)
    ),
    "ablations": lambda lm, p: hk.ablations(lm, p, "z", hk.metrics.logit(3)),
    "patching": lambda lm, p: hk.patching(lm, p, p, "z", hk.metrics.logit(3)),
    "path_patching": lambda lm, p: hk.path_patching(lm, p, p, hk.metrics.logit(3)),
    "attribution": lambda lm, p: hk.attribution(lm, p, p, "z", hk.metrics.logit(3)),
    "edge_attribution": lambda lm, p: hk.edge_attribution(lm, p, p, hk.metrics.logit(3)),
    "token_attribution": lambda lm, p: hk.token_attribution(lm, p, hk.metrics.logit(3)),
    "gradients": lambda lm, p: hk.gradients(lm, p, hk.metrics.logit(3), "resid_pre.1"),
    "logit_lens": lambda lm, p: hk.logit_lens(lm, p),
    "logit_path": lambda lm, p: hk.logit_path(lm, p),
    "patchscope": lambda lm, p: hk.patchscope(lm, p, target=[3, 4]),
    "train_lens": lambda lm, p: hk.train_lens(lm, p, steps=1),
    "token_losses": lambda lm, p: hk.token_losses(lm, p),
    "token_losses prefix": lambda lm, p: hk.token_losses(lm, [[3, 4]], prefix=p),
    "mean_difference": lambda lm, p: hk.mean_difference(lm, p, [[3, 4]], "resid_post.1"),
    "principal_direction": lambda lm, p: hk.principal_direction(lm, p, [[3, 4]], "resid_post.1"),
    "fit_vector": lambda lm, p: hk.fit_vector(lm, p, hk.metrics.logit(3), "resid_post.1", steps=1),
    "scan": lambda lm, p: hk.scan(lm, p),
    "shift_report": lambda lm, p: hk.shift_report(lm, p, hk.ban(37)),
    "model_diff": lambda lm, p: hk.model_diff(lm, hk.tiny("llama", seed=1), p),
    "token_shifts": lambda lm, p: hk.token_shifts(lm, [p], hk.ban(37, step=None, pos=slice(None))),
    "activation_statistics": lambda lm, p: hk.stats.activation_statistics(lm, [p], "resid_post.1"),
    "ablate over": lambda lm, p: hk.forward(
        lm, [[3, 4]], hk.ablate("resid_post.1", to="mean", over=p)
    ),
}


@pytest.mark.parametrize("function", sorted(PROMPT_FUNCTIONS))
def test_no_function_ignores_what_a_processor_returned(function):
    with pytest.raises(HookkitError, match="one_key_too_many|parameter"):
        PROMPT_FUNCTIONS[function](hk.tiny("llama"), EXTRA)


@pytest.mark.parametrize("name", [name for name in sorted(TOKENS) if name in IN_GRIDS])
def test_image_features_that_are_added_between_blocks_are_no_part_of_attention_or_mlp(name):
    """DeepStack in Qwen3-VL: the stream has more at an image than its blocks added."""
    lm, inputs = model_of(name), image_prompt(name, 1)
    if "resid_post" not in lm.layout.names:
        pytest.skip("no named sites")
    run = hk.forward(lm, inputs, hk.capture(["resid_post.0", "resid_pre.1"]))
    gap = (run["resid_pre.1"] - run["resid_post.0"]).abs().amax(-1)[0]
    at_image = inputs["input_ids"][0] == PLACEHOLDER
    assert float(gap[~at_image].max()) == 0
    assert bool((gap[at_image] > 1e-3).all()) == (name == "qwen3_vl")
    parts = hk.direct_logits(hk.forward(lm, inputs), [37], pos=int(at_image.nonzero()[0]))
    expected = float(plain_logits(lm, inputs)[at_image.nonzero()[0], 37])
    assert abs(parts["logit"].sum() - expected) < 1e-4
    assert (parts["component"] == "between.0.1").any() == (name == "qwen3_vl")


def test_attributions_to_embeddings_that_an_image_replaces_are_refused():
    with pytest.raises(Unsupported, match="takes the place of its tokens' embeddings"):
        hk.token_attribution(model_of("llava"), [image_prompt("llava", 1)], hk.metrics.logit(3))


def test_prompts_with_images_survive_a_copy():
    """Workers of Ray get prompts as copies."""
    row = as_batch(model_of("qwen3_vl"), image_prompt("qwen3_vl", 1)).rows[0]
    assert pickle.loads(pickle.dumps(row)) == row and copy.deepcopy(row) == row


def test_sound_with_as_many_frames_as_the_prompt_has_tokens_is_no_input_per_token():
    lm = model_of("qwen2_audio")
    first = image_prompt("qwen2_audio", 1, before=15, after=15)
    first["feature_attention_mask"][:, 36:] = 0
    first["input_ids"] = first["input_ids"][:, first["input_ids"].shape[1] - 40 :]
    assert first["input_ids"].shape == first["feature_attention_mask"].shape == (1, 40)
    row = as_batch(lm, {**first, "attention_mask": torch.ones(1, 40)}).rows[0]
    assert set(row.inputs) == {"input_features", "feature_attention_mask"} and not row.per_token
