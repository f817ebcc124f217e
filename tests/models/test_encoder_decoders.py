"""Encoder-decoders: the sites of both stacks and of the attention between them, by plain transformers and hooks."""

import copy
import functools

import pytest
import torch
from torch import Tensor
from transformers import GenerationMixin

import hookkit as hk
from hookkit.errors import BadPrompt, MissingSite, OutOfRange, UnknownKeyword, Unsupported
from hookkit.hooks.base import Hook
from hookkit.models.prompts import as_batch
from hookkit.models.tiny_settings import ENCODER_DECODERS

NAMES = sorted(ENCODER_DECODERS)
# Their positions count the padding in, so that a decoder cannot be padded on the left.
ABSOLUTE = ("bart", "blenderbot", "blenderbot-small", "m2m_100", "marian", "mbart", "pegasus")
POST_NORM = ("bart", "blenderbot-small", "marian")


@functools.cache
def model_of(name: str) -> hk.LM:
    return hk.tiny(name)


def prompt(lm: hk.LM, seed: int, source: int = 6, target: int = 4) -> dict[str, Tensor]:
    """A source, and a beginning of what the decoder writes."""
    generator = torch.Generator().manual_seed(seed)
    start = lm.config.decoder_start_token_id
    written = torch.randint(20, 300, (1, target - 1), generator=generator)
    inputs = {"decoder_input_ids": torch.cat([torch.tensor([[start]]), written], 1)}
    if "input_features" in lm.takes:
        return {"input_features": torch.randn(1, 8, 40, generator=generator), **inputs}
    return {"input_ids": torch.randint(20, 300, (1, source), generator=generator), **inputs}


def source_of(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: values for name, values in inputs.items() if not name.startswith("decoder_")}


@pytest.fixture(params=NAMES)
def lm(request) -> hk.LM:
    return model_of(request.param)


def type_of(lm: hk.LM) -> str:
    return lm.config.model_type


def plain_logits(lm: hk.LM, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return lm.model(**inputs).logits[0]


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-3))


def with_hook(lm: hk.LM, site: str, change, run):
    """What `run` returns under a hook written by hand at the module of a site."""
    location = lm.location(lm.sites(site)[0])
    module = lm.model.get_submodule(location.path)

    def after(module, arguments, output):
        if isinstance(output, tuple):
            return change(output[0]), *output[1:]
        return change(output)

    def before(module, arguments, keywords):
        if arguments:
            return (change(arguments[0]), *arguments[1:]), keywords
        return arguments, {**keywords, "hidden_states": change(keywords["hidden_states"])}

    if location.side == "input":
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = module.register_forward_hook(after)
    try:
        return run()
    finally:
        handle.remove()


def test_logits_are_those_of_transformers_alone_and_in_a_padded_batch(lm):
    first, second = prompt(lm, 1), prompt(lm, 2, source=9, target=6)
    assert torch.equal(hk.forward(lm, first).logits[0], plain_logits(lm, first))
    both = hk.forward(lm, [first, second]).logits
    last = hk.forward(lm, [first, second], logits="last").logits
    for row, inputs in enumerate((first, second)):
        expected = plain_logits(lm, inputs)
        assert apart(both[row, : len(expected)], expected) < 1e-5
        assert apart(last[row, -1], expected[-1]) < 1e-5


def test_a_source_alone_is_a_prompt_whose_decoder_begins(lm):
    inputs = source_of(prompt(lm, 1))
    start = torch.tensor([[lm.config.decoder_start_token_id]])
    run = hk.forward(lm, inputs)
    assert run.tokens.tolist() == start.tolist()
    assert torch.equal(run.logits[0], plain_logits(lm, {**inputs, "decoder_input_ids": start}))


def test_every_law_holds_for_the_decoder(lm):
    lengths = ((7, 4, 5), (7, 7, 7))[type_of(lm) in ABSOLUTE]
    prompts = [
        prompt(lm, seed, 3 + 2 * seed, length)
        for seed, length in zip((1, 2, 3), lengths, strict=True)
    ]
    proof = hk.check_laws(lm, prompts=prompts, layers=[1])
    broken = proof[~proof["holds"] & ~proof["note"].str.startswith("exception: ")]
    assert broken.empty, broken.to_string()


def test_what_each_block_adds_is_what_the_stream_becomes(lm):
    encoder_names = lm.layout.stacks["encoder"].names
    sites = [*lm.sites(), *lm.expand([f"encoder.{name}" for name in encoder_names])]
    first, second = prompt(lm, 1), prompt(lm, 2, source=9, target=6)
    run = hk.forward(lm, [first, second], hk.capture(sites))
    width = run["encoder.resid_post.0"].shape[1]
    assert run["resid_post.1"].shape[:2] == (2, 6) and run["cross_k.1"].shape[:2] == (2, width)
    heads = lm.sizes["head"]
    assert run["cross_pattern.1"].shape == (2, heads, 6, width)
    assert run["encoder.pattern.1"].shape == (2, heads, width, width)
    assert apart(run["cross_pattern.1"][1].sum(-1), torch.ones(heads, 6)) < 1e-5
    if "input_ids" in first:  # what is padded is not seen
        assert float(run["cross_pattern.1"][0, :, :4, 6:].abs().max()) == 0
    if type_of(lm) in POST_NORM:
        return
    total = run["resid_pre.1"] + run["attn_out.1"] + run["cross_out.1"] + run["mlp_out.1"]
    assert apart(total, run["resid_post.1"]) < 1e-6
    total = run["encoder.resid_pre.1"] + run["encoder.attn_out.1"] + run["encoder.mlp_out.1"]
    assert apart(total, run["encoder.resid_post.1"]) < 1e-6


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_patterns_are_those_that_transformers_returns(lm, attention):
    if type_of(lm) == "t5gemma" and attention == "sdpa":
        pytest.skip("transformers has no sdpa attention for it")
    lm = hk.LM(copy.deepcopy(lm.model))
    lm.model.set_attn_implementation(attention)
    inputs = prompt(lm, 1)
    sites = ["pattern.1", "cross_pattern.1", "encoder.pattern.2"]
    run = hk.forward(lm, inputs, hk.capture(sites))
    plain = copy.deepcopy(lm.model)  # transformers leaves hooks of its own on it
    plain.set_attn_implementation("eager")
    with torch.no_grad():
        output = plain(**inputs, output_attentions=True)
    expected = (
        output.decoder_attentions[1],
        output.cross_attentions[1],
        output.encoder_attentions[2],
    )
    for site, value in zip(sites, expected, strict=True):
        assert apart(run[site], value) < 1e-5, site


def test_edits_in_both_stacks_equal_hooks_by_hand(lm):
    inputs = prompt(lm, 1)

    def at_position_2(values: Tensor) -> Tensor:
        values = values.clone()
        values[:, 2] *= -1.0
        return values

    for site in (
        "encoder.resid_post.1",
        "encoder.mlp_out.2",
        "encoder.z.1",
        "cross_out.1",
        "resid_post.0",
        "cross_q.1",
    ):
        expected = with_hook(lm, site, at_position_2, lambda: plain_logits(lm, inputs))
        edited = hk.forward(lm, inputs, hk.edit(site, lambda values: -values, pos=2)).logits[0]
        assert apart(edited, expected) < 1e-6, site
        assert apart(edited, plain_logits(lm, inputs)) > 1e-5, site


def test_a_cross_head_without_pattern_is_without_z(lm):
    inputs = prompt(lm, 1)
    width = lm.sizes["d_head"]

    def without_head_2(values: Tensor) -> Tensor:
        values = values.clone()
        values[..., 2 * width : 3 * width] = 0
        return values

    expected = with_hook(lm, "cross_z.1", without_head_2, lambda: plain_logits(lm, inputs))
    for site in ("cross_z.1.2", "cross_pattern.1.2"):
        assert apart(hk.forward(lm, inputs, hk.ablate(site)).logits[0], expected) < 1e-5, site


def plain_text(lm: hk.LM, inputs: dict, options: dict) -> list[int]:
    """What transformers alone writes, without what Whisper's own generate does to long sounds."""
    return GenerationMixin.generate(lm.model, **inputs, **options)[0].tolist()


def encoder_width(inputs: dict) -> int:
    """The positions of the encoder: tokens, or pairs of frames of sound."""
    if "input_ids" in inputs:
        return inputs["input_ids"].shape[1]
    return inputs["input_features"].shape[-1] // 2


def test_generate_forces_captures_and_edits_the_encoder(lm):
    prompts = [source_of(prompt(lm, 1)), source_of(prompt(lm, 2, source=9))]
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    sites = ["resid_post.1", "cross_k.0", "encoder.resid_post.1"]
    run = hk.generate(lm, prompts, hk.force(37, step=1), hk.capture(sites), **options)
    whole = hk.forward(lm, run.rows, hk.capture(sites))
    for row, inputs in enumerate(prompts):
        plain = plain_text(lm, inputs, options)
        assert list(run.rows[row])[:2] == plain[:2] and run.rows[row][2] == 37
        count = run.captured("resid_post.1").by_position[row].shape[0]
        assert apart(run["resid_post.1"][row, :count], whole["resid_post.1"][row, :count]) < 1e-5
        length = encoder_width(inputs)
        for site in sites[1:]:
            assert apart(run[site][row, :length], whole[site][row, :length]) < 1e-5

    def triple(values: Tensor) -> Tensor:
        return values * 3.0

    def generate() -> list[int]:
        return plain_text(lm, prompts[1], options)

    expected = with_hook(lm, "encoder.resid_post.2", triple, generate)
    edited = hk.generate(lm, prompts[1], hk.scale("encoder.resid_post.2", 3.0), **options)
    assert list(edited.rows[0]) == expected


@pytest.mark.parametrize("name", ["t5", "mbart", "t5gemma", "whisper"])
def test_beams_samples_and_traces_are_those_of_transformers(name):
    lm = model_of(name)
    prompts = [source_of(prompt(lm, 1)), source_of(prompt(lm, 2, source=9))]
    hook = hk.capture(["encoder.resid_post.1", "cross_v.1"])
    beams = hk.generate(lm, prompts, hook, num_beams=3, max_new_tokens=4, do_sample=False)
    for row, inputs in enumerate(prompts):
        plain = plain_text(lm, inputs, {"num_beams": 3, "max_new_tokens": 4, "do_sample": False})
        assert list(beams.rows[row]) == plain[: len(beams.rows[row])]
    assert beams["encoder.resid_post.1"].shape[0] == 2
    options = {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 3}
    samples = hk.generate(lm, prompts, seed=3, **options)
    assert samples.prompt_rows == (0, 0, 1, 1) and samples.rows[2].source == samples.rows[3].source
    traced = hk.generate(
        lm, prompts, hk.ban(37), trace=hk.trace(), max_new_tokens=3, do_sample=False
    )
    assert set(hk.decisions(traced)["row"]) == {0, 1}


def test_losses_lenses_direct_logits_and_shifts_read_the_source(lm):
    inputs = prompt(lm, 1)
    logits = plain_logits(lm, inputs)
    ids = inputs["decoder_input_ids"][0]
    expected = -logits.log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]]
    losses = torch.tensor(hk.token_losses(lm, [inputs])["loss"].to_numpy())
    assert torch.allclose(losses.float(), expected, atol=1e-5)
    parts = hk.direct_logits(hk.forward(lm, inputs), [37])
    assert abs(parts["logit"].sum() - float(logits[-1, 37])) < 1e-4
    assert "cross_out.1" in set(parts["component"])
    lens = hk.logit_lens(lm, [inputs], watch=[37])
    last = lens[lens["layer"] == 1]
    assert not last.empty
    moved = hk.rank_shift(hk.forward(lm, inputs), hk.forward(lm, inputs, hk.ablate("cross_out.1")))
    assert (moved["delta_logit"].abs() > 0).any() if "delta_logit" in moved else not moved.empty


def test_texts_follow_a_source_given_as_prefix():
    lm = model_of("t5")
    source, target = [30, 31, 32, 33], [40, 41, 42]
    table = hk.token_losses(lm, [target], prefix=[source])
    inputs = {
        "input_ids": torch.tensor([source]),
        "decoder_input_ids": torch.tensor([[2, *target]]),
    }
    expected = -plain_logits(lm, inputs).log_softmax(-1)[torch.arange(3), torch.tensor(target)]
    assert torch.allclose(torch.tensor(table["loss"].to_numpy()).float(), expected, atol=1e-5)


def test_cells_of_the_last_block_alone_equal_forwards(lm):
    """The blocks before it are skipped, and T5's first block gives its position bias to the others."""
    prompts = [prompt(lm, 1, source=5), prompt(lm, 2, source=7)]

    def hooks(pos: int) -> Hook:
        return hk.edit("q.1", lambda values: -3 * values, pos=pos)

    table = hk.sweep(lm, prompts, {"pos": [1, 3]}, hooks, hk.metrics.logit(37), progress=False)
    expected = [
        float(hk.forward(lm, [inputs], hooks(pos)).logits[0, -1, 37])
        for pos in (1, 3)
        for inputs in prompts
    ]
    assert table["logit"].to_list() == pytest.approx(expected, abs=1e-4)
    assert table.loc[table["pos"] == 3, "logit_delta"].abs().min() > 1e-4


def test_a_sweep_of_cross_heads_equals_a_loop_of_forwards(lm):
    prompts = [prompt(lm, 1), prompt(lm, 2, source=9)]
    metric = hk.metrics.logit(37)
    grid = {"layer": [0, 1], "head": [0, 3]}
    table = hk.sweep(
        lm, prompts, grid, lambda layer, head: hk.ablate(hk.Site("cross_z", layer, head)), metric
    )
    for cell in table.itertuples():
        hook = hk.ablate(hk.Site("cross_z", cell.layer, cell.head))
        expected = float(hk.forward(lm, prompts[cell.row], hook).logits[0, -1, 37])
        assert abs(cell._asdict()[metric.name] - expected) < 1e-4 * max(1, abs(expected))
    with pytest.raises(Unsupported, match="positions of the source"):
        hk.sweep(
            lm,
            prompts,
            {"layer": [0]},
            lambda layer: hk.ablate(f"encoder.resid_post.{layer}"),
            metric,
        )


def test_positions_in_the_encoder_are_those_of_the_source():
    lm = model_of("t5")
    inputs = prompt(lm, 1)
    whole = hk.forward(lm, inputs, hk.capture("encoder.resid_post.1"))["encoder.resid_post.1"]
    last = hk.forward(lm, inputs, hk.capture("encoder.resid_post.1", pos=-1))[
        "encoder.resid_post.1"
    ]
    assert torch.equal(last, whole[:, -1:])
    with pytest.raises(OutOfRange, match="6 tokens"):
        hk.forward(lm, inputs, hk.ablate("encoder.resid_post.1", pos=6))
    with pytest.raises(OutOfRange):
        hk.forward(lm, inputs, hk.ablate("resid_post.1", pos=5))


def test_names_and_reasons():
    lm = model_of("t5")
    assert str(hk.Site("z", 2, 1, stack="encoder")) == "encoder.z.2.1"
    assert (
        lm.sites("encoder.z")[2] == hk.Site("z", 2, stack="encoder")
        and len(lm.sites("encoder.z")) == 3
    )
    assert len(lm.sites("cross_z")) == 2
    hook = hk.parse_hook("ablate:encoder.z.2.1")
    assert hk.format_hook(hook) == "ablate:encoder.z.2.1"
    table = lm.describe()
    assert {"cross_z", "encoder.z"} <= set(table["site"])
    assert not hk.tiny("llama").describe()["site"].str.startswith("cross_").any()
    with pytest.raises(MissingSite, match="no encoder"):
        hk.forward(hk.tiny("llama"), [[3, 4]], hk.ablate("encoder.z.1"))
    with pytest.raises(MissingSite):
        hk.forward(hk.tiny("llama"), [[3, 4]], hk.ablate("cross_z.1"))


def test_decoders_whose_positions_count_padding_are_refused_where_they_would_be_wrong():
    lm = model_of("bart")
    prompts = [prompt(lm, 1, target=4), prompt(lm, 2, target=6)]
    with pytest.raises(Unsupported, match="padded on the left"):
        hk.generate(lm, prompts, max_new_tokens=2, do_sample=False)


def test_a_prompt_without_its_source_raises():
    lm = model_of("t5")
    with pytest.raises(BadPrompt, match="'one_too_many', which would be ignored"):
        hk.forward(lm, {**prompt(lm, 1), "one_too_many": torch.ones(1, 2)})
    equally_long = prompt(lm, 1, source=5, target=5)
    assert torch.equal(hk.forward(lm, equally_long).logits[0], plain_logits(lm, equally_long))
    row = as_batch(lm, prompt(lm, 1)).rows[0]
    assert len(row.source) == 6 and row != as_batch(lm, prompt(lm, 2)).rows[0]


def test_the_doctor_finds_nothing_wrong(lm):
    checkup = hk.doctor(lm, layers=[1])
    if "input_features" in lm.takes:
        assert {problem.split("'")[1] for problem in checkup.problems} <= {
            "writing",
            "without cache",
        }
        return
    assert not checkup.problems, checkup.problems


def test_whisper_decodes_one_piece_of_sound_with_the_tokens_of_its_language_and_task():
    lm = model_of("whisper")
    first, second = prompt(lm, 1, target=4), prompt(lm, 2, target=4)
    options = {
        "max_new_tokens": 3,
        "min_new_tokens": 3,
        "do_sample": False,
        "suppress_tokens": [5, 37],
    }
    run = hk.generate(lm, [first, second], **options)
    for row, inputs in enumerate((first, second)):
        assert list(run.rows[row]) == plain_text(lm, inputs, options)
        own = lm.model.generate(**inputs, **options)[0].tolist()  # without the prompt
        assert list(run.rows[row][4:]) == own
    with pytest.raises(UnknownKeyword, match="language"):
        hk.generate(lm, first, language="en", max_new_tokens=3)
    with (
        pytest.raises(Unsupported, match="decodes a long sound in pieces"),
        hk.attach(lm, hk.capture("resid_post.1")),
    ):
        lm.model.generate(**first, **options)
