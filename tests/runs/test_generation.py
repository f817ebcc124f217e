"""Every way of decoding that transformers has: what hooks mean in it, or why it is refused."""

import by_hand
import pytest
import torch
from conftest import PROMPTS
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    TextIteratorStreamer,
)

import hookkit as hk
from hookkit.errors import NeverFired, OutOfRange, UnknownKeyword, Unsupported
from hookkit.hooks import capture as capture_module

SITE = "resid_post.1"
VECTOR = torch.linspace(-1, 1, 32)
GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}


def ids_of(lm, text=PROMPTS[0]):
    return torch.tensor([lm.tokenizer.encode(text)])


@pytest.mark.parametrize(
    "way",
    [
        {},
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"typical_p": 0.9},
        {"repetition_penalty": 1.3},
        {"num_return_sequences": 3},
        {"no_repeat_ngram_size": 2},
    ],
    ids=str,
)
def test_without_edits_the_draws_are_transformers_own(lm, way):
    ids = ids_of(lm)
    settings = {
        "max_new_tokens": 6,
        "do_sample": True,
        "eos_token_id": None,
        "pad_token_id": 0,
        **way,
    }
    torch.manual_seed(3)
    expected = lm.model.generate(ids, **settings)
    torch.manual_seed(3)
    assert torch.equal(hk.generate(lm, ids, hk.capture(SITE), **settings).tokens, expected)
    state = torch.random.get_rng_state()
    assert torch.equal(hk.generate(lm, ids, seed=3, **settings).tokens, expected)
    assert torch.equal(torch.random.get_rng_state(), state), (
        "seed= left torch's own generator changed"
    )


def test_force_and_ban_hold_in_every_draw(lm):
    settings = {
        "max_new_tokens": 20,
        "do_sample": True,
        "temperature": 5.0,
        "eos_token_id": None,
        "num_return_sequences": 10,
    }
    forced = hk.generate(
        lm,
        PROMPTS[0],
        hk.force(7, margin=float("inf"), step=slice(0, 10)),
        hk.ban(3, step=slice(10, None)),
        **settings,
    )
    new = forced.tokens[:, forced.prompt_lengths[0] :]
    assert (new[:, :10] == 7).all()
    assert (new[:, 10:] != 3).all()


def test_several_sequences_of_a_prompt_are_rows_of_their_own(lm):
    settings = {
        "max_new_tokens": 4,
        "do_sample": True,
        "eos_token_id": None,
        "num_return_sequences": 2,
        "seed": 1,
    }
    run = hk.generate(
        lm, PROMPTS[:2], hk.steer(SITE, VECTOR, rows=1, scale=3.0), hk.capture(SITE), **settings
    )
    assert run.prompt_rows == (0, 0, 1, 1)
    assert run[SITE].shape[0] == run.logits.shape[0] == 4
    assert run.captured(SITE).rows == (0, 0, 1, 1)
    for row, prompt in enumerate(run.prompt_rows):
        ids = run.tokens[row, : run.lengths[row]]
        hooks = [hk.steer(SITE, VECTOR, scale=3.0)] if prompt == 1 else []
        again = hk.forward(lm, [ids[:-1]], *hooks, hk.capture(SITE))
        length = again.lengths[0]
        assert torch.allclose(run[SITE][row, :length], again[SITE][0], atol=1e-4)
        assert torch.allclose(
            run.logits[row], again.logits[0, run.prompt_lengths[row] - 1 :], atol=1e-4
        )


@pytest.mark.parametrize(
    "way",
    [{}, {"use_cache": False}, {"num_return_sequences": 2}, {"prefill_chunk_size": 3}],
    ids=str,
)
def test_beams_keep_the_values_of_the_beam_that_survives(lm, way):
    settings = {
        "max_new_tokens": 6,
        "num_beams": 3,
        "do_sample": False,
        "eos_token_id": [1, 30, 60],
        "pad_token_id": 0,
        **way,
    }
    hooks = [hk.steer("resid_post.0", VECTOR, pos=hk.GENERATED, scale=2.0), hk.boost(5, by=1.0)]
    run = hk.generate(lm, PROMPTS[:2], *hooks, hk.capture(SITE), **settings)
    for row, prompt in enumerate(run.prompt_rows):
        ids = run.tokens[row, : run.lengths[row]].tolist()
        start = run.prompt_lengths[row]
        if len(ids) == start + 1:
            continue
        edited = by_hand.with_hook(
            by_hand.module_of(lm.model, "resid_post", 0)[0],
            "out",
            lambda x, start=start: x + 2.0 * VECTOR * (torch.arange(x.shape[1]) >= start)[:, None],
        )
        expected = by_hand.captured(lm.model, ids[:-1], "resid_post", 1)
        said = by_hand.logits(lm.model, ids[:-1])[0, start - 1 :]
        edited.remove()
        said[:, 5] += 1.0
        assert torch.allclose(run[SITE][row, : len(ids) - 1], expected[0], atol=1e-4)
        assert torch.allclose(run.logits[row, : len(said)], said, atol=1e-4)
        assert run.text[row].startswith(PROMPTS[prompt])


def test_beams_without_edits_are_transformers_own(lm):
    ids = ids_of(lm)
    settings = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    assert torch.equal(
        hk.generate(lm, ids, hk.capture(SITE), **settings).tokens,
        lm.model.generate(ids, **settings),
    )


def test_a_row_that_ends_early_counts_to_its_end_token(lm):
    run = hk.generate(
        lm,
        PROMPTS[:2],
        hk.force(1, step=2, rows=0),
        hk.ban(1, rows=1),
        hk.capture([SITE, "logits"]),
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=1,
    )
    start = run.prompt_lengths[0]
    assert run.lengths[0] == start + 3
    assert int(run.tokens[0, start + 2]) == 1
    assert run.captured(SITE).positions[0].max() == start + 1
    assert run.captured("logits").positions[0].tolist() == [start - 1, start, start + 1, -1, -1, -1]
    assert (run.logits[0, 3:] == 0).all()
    assert run.generated[0].endswith("</s>")


def test_a_wish_for_a_step_that_a_row_does_not_live_to_see_is_an_error_that_brings_the_run(lm):
    hooks = [hk.force(1, step=1), hk.capture(SITE, pos=-1), hk.boost(3, by=1.0, step=4)]
    with pytest.raises(NeverFired, match=r"boost\(3, by=1.0, step=4\)") as caught:
        hk.generate(lm, PROMPTS[0], *hooks, max_new_tokens=6, do_sample=False, eos_token_id=1)
    assert caught.value.run.lengths[0] == caught.value.run.prompt_lengths[0] + 2
    assert caught.value.run[SITE].shape == (1, 1, 32)


@pytest.mark.parametrize(
    ("hook", "words"),
    [
        (
            hk.force(3, step=5),
            "means step 5 of row 0, and at most 5 tokens are generated: steps count from 0",
        ),
        (
            hk.force(3, pos=2),
            r"means position 2 of row 0, where no logits are computed; they are at positions \d+ to",
        ),
        (
            hk.capture(SITE, pos=99),
            "means position 99 of row 0, and with 5 new tokens the model reads positions 0 to",
        ),
    ],
    ids=str,
)
def test_a_wish_beyond_the_generation_is_refused_before_the_first_token(lm, hook, words):
    calls = []
    mine = lm.model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(OutOfRange, match=words):
        hk.generate(lm, PROMPTS[0], hook, **GREEDY)
    mine.remove()
    assert not calls


def test_generated_positions_are_never_read_when_one_token_is_generated(lm):
    with pytest.raises(Exception, match="selects nothing in row 0"):
        hk.generate(lm, PROMPTS[0], hk.steer(SITE, VECTOR, pos=hk.GENERATED), max_new_tokens=1)


def test_every_argument_of_generate_passes_through(lm):
    run = hk.generate(
        lm,
        PROMPTS[0],
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        **GREEDY,
    )
    assert torch.equal(torch.stack(run.output.logits, 1), run.logits)
    config = GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0)
    before = config.to_dict()
    assert hk.generate(lm, PROMPTS[0], hk.force(9), generation_config=config).tokens[
        0, -3:
    ].tolist() == [9, 9, 9]
    assert config.to_dict() == before, "the user's own configuration was changed"


class Downwards(LogitsProcessor):
    """Takes the token after the largest."""

    def __call__(self, input_ids, scores):
        seen.append(scores.clone())
        return scores.scatter(1, scores.argmax(1, keepdim=True), -torch.inf)


seen: list[torch.Tensor] = []


def test_a_users_processor_works_after_the_edits(lm):
    seen.clear()
    run = hk.generate(
        lm,
        PROMPTS[0],
        hk.force(9, margin=10.0),
        logits_processor=LogitsProcessorList([Downwards()]),
        **GREEDY,
    )
    new = run.tokens[0, run.prompt_lengths[0] :]
    assert (new != 9).all()
    assert all(int(scores.argmax()) == 9 for scores in seen)
    assert torch.equal(torch.stack(seen, 1), run.logits)


class After(StoppingCriteria):
    def __call__(self, input_ids, scores, **_):
        return torch.full((input_ids.shape[0],), bool((input_ids[:, -1] == 9).all()))


def test_a_users_stopping_criterion_and_streamer_work(lm):
    streamer = TextIteratorStreamer(lm.tokenizer, skip_prompt=True)
    run = hk.generate(
        lm,
        PROMPTS[0],
        hk.force(9, step=2),
        stopping_criteria=[After()],
        streamer=streamer,
        **GREEDY,
    )
    assert run.lengths[0] == run.prompt_lengths[0] + 3
    assert "".join(streamer) == run.generated[0]


def test_a_stop_string_ends_a_row(smol):
    settings = {"max_new_tokens": 8, "do_sample": False, "stop_strings": [" coffee"]}
    run = hk.generate(
        smol,
        ["I like oat milk in my", "The capital of France is"],
        hk.force(" coffee", rows=1, step=3),
        **settings,
    )
    assert run.generated[0] == " coffee"
    assert run.generated[1].endswith(" coffee")
    assert run.lengths[1] == run.prompt_lengths[1] + 4


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            {"assistant_model": object()},
            "assistant_model= was given: hooks need one forward of this model for each token",
        ),
        (
            {"prompt_lookup_num_tokens": 2},
            "prompt_lookup_num_tokens runs the model on tokens that may be taken back",
        ),
        (
            {"assistant_early_exit": 1},
            "assistant_early_exit runs the model on tokens that may be taken back",
        ),
        ({"guidance_scale": 1.5}, "guidance_scale runs the model twice for each token"),
        (
            {"penalty_alpha": 0.6, "top_k": 4},
            "the decoding mode 'contrastive_search' is not offered with hooks",
        ),
        ({"dola_layers": "low"}, "dola_layers runs the model"),
        ({"custom_generate": lambda *_: None}, "custom_generate= was given"),
        ({"cache_implementation": "paged"}, "packs prompts into one row"),
    ],
    ids=lambda more: str(list(more)) if isinstance(more, dict) else "",
)
def test_a_mode_in_which_an_edit_has_no_meaning_is_refused_before_the_first_token(lm, more, words):
    calls = []
    mine = lm.model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    try:
        with pytest.raises(Unsupported, match=words):
            hk.generate(lm, PROMPTS[0], hk.force(3), max_new_tokens=4, **more)
        with pytest.raises(Unsupported, match=words), hk.attach(lm, hk.force(3)):
            lm.model.generate(ids_of(lm), max_new_tokens=4, **more)
    finally:
        mine.remove()
    assert not calls


def test_right_padding_is_refused_in_foreign_generate(lm):
    ids = torch.tensor([[5, 6, 0], [5, 6, 7]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    with (
        pytest.raises(Unsupported, match="a row ends in padding: pad on the left"),
        hk.attach(lm, hk.force(3)),
    ):
        lm.model.generate(ids, attention_mask=mask, max_new_tokens=3)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            {"max_new_token": 3},
            r"generate\(\) has no keyword 'max_new_token'; did you mean 'max_new_tokens'",
        ),
        ({"temprature": 0.5}, "no keyword 'temprature'; did you mean 'temperature'"),
        (
            {"attention_mask": torch.ones(1, 3)},
            "attention_mask= is made from the prompts: give the ids, and a mask with them",
        ),
    ],
)
def test_an_unknown_argument_of_generate_is_refused(lm, more, words):
    with pytest.raises(UnknownKeyword, match=words):
        hk.generate(lm, PROMPTS[0], **more)


def test_a_plain_module_cannot_generate():
    with pytest.raises(Unsupported, match=r"Linear has no generate\(\)"):
        hk.generate(hk.LM(torch.nn.Linear(2, 2)), [[1]])


def test_embeddings_as_the_prompt_have_positions_but_no_tokens(lm):
    ids = ids_of(lm)
    embeds = lm.model.get_input_embeddings()(ids).detach()
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 4}
    with hk.attach(lm, hk.capture(SITE), hk.steer(SITE, VECTOR, pos=-1)) as manager:
        tokens = lm.model.generate(inputs_embeds=embeds, **settings)
    expected = hk.generate(lm, ids, hk.capture(SITE), hk.steer(SITE, VECTOR, pos=-1), **settings)
    assert torch.equal(tokens[0], expected.tokens[0, -4:])
    assert torch.allclose(manager[SITE], expected[SITE], atol=1e-5)
    with (
        pytest.raises(
            Unsupported, match="the model was given embeddings, whose tokens are unknown"
        ),
        hk.attach(lm, hk.scale(SITE, 1.0, pos=hk.at("oat"))),
    ):
        lm.model.generate(inputs_embeds=embeds, **settings)


def test_going_on_from_a_cache_counts_what_is_in_it(lm):
    ids = ids_of(lm)
    with torch.no_grad():
        cache = lm.model(ids[:, :-2], use_cache=True).past_key_values
    with hk.attach(lm, hk.capture(SITE)) as manager:
        lm.model.generate(ids, past_key_values=cache, **GREEDY)
    length = ids.shape[1]
    assert manager.captured(SITE).positions.tolist() == [list(range(length - 2, length + 4))]
    expected = hk.generate(lm, ids, hk.capture(SITE), **GREEDY)
    assert torch.allclose(manager[SITE], expected[SITE][:, length - 2 :], atol=1e-4)


@pytest.mark.parametrize("way", [{}, {"num_return_sequences": 1}, {"use_cache": False}], ids=str)
def test_a_hook_that_meets_the_padding_of_an_ended_row_alone_never_fired(llama, way):
    prompts = [[5, 6, 7], [9, 10]]
    settings = {"do_sample": False, "pad_token_id": 0, **way}
    first = hk.generate(llama, prompts, max_new_tokens=1, eos_token_id=None, **settings)
    end = int(first.tokens[1, 2])
    free = hk.generate(llama, prompts, max_new_tokens=3, eos_token_id=[end], **settings)
    assert list(free.lengths) == [6, 3]
    settings |= {"max_new_tokens": 3, "eos_token_id": [end]}
    for hook in (
        hk.ablate(SITE, pos=hk.GENERATED, rows=1),
        hk.force(7, step=slice(1, None), rows=1),
        hk.capture(SITE, pos=hk.GENERATED, rows=1),
    ):
        with pytest.raises(NeverFired, match="had ended before they came") as caught:
            hk.generate(llama, prompts, hook, **settings)
        assert caught.value.run.log.empty
        with pytest.raises(hk.errors.NotCaptured):
            caught.value.run[SITE]
    everywhere = hk.generate(llama, prompts, hk.scale(SITE, 1.5), hk.capture(SITE), **settings)
    log = everywhere.log.query("row == 1 and hook == 0")
    counted = everywhere.lengths[1] - 1
    if not way:
        assert (log["changed"].sum(), log["numbers"].sum()) == (32 * counted, 32 * counted)
    assert everywhere.captured(SITE).positions[1].max() == counted - 1


@pytest.mark.parametrize("way", ["greedy", "sample", "several", "beams", "no cache"])
def test_logits_of_the_last_step_are_the_last_of_all_and_no_others_are_held(way, monkeypatch):
    lm = hk.tiny("llama", config={"vocab_size": 12})
    settings = {
        "greedy": {"do_sample": False},
        "sample": {"do_sample": True},
        "several": {"do_sample": True, "num_return_sequences": 3},
        "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
        "no cache": {"do_sample": True, "use_cache": False},
    }[way]
    for seed, ends in ((0, None), (1, [4]), (2, [3, 7])):
        given = {
            "max_new_tokens": 6,
            "eos_token_id": ends,
            "pad_token_id": 0,
            "seed": seed,
            **settings,
        }
        every = hk.generate(lm, [[5, 6, 7], [8, 9]], **given).captured_logits()
        last = hk.generate(lm, [[5, 6, 7], [8, 9]], logits="last", **given).captured_logits()
        for row, positions in enumerate(every.positions.tolist()):
            count = sum(place >= 0 for place in positions)
            assert torch.equal(last.values[row, 0], every.values[row, count - 1])
            assert int(last.positions[row, 0]) == positions[count - 1]
    held = []
    real = capture_module.join_chunks
    monkeypatch.setattr(
        "hookkit.hooks.capture.join_chunks",
        lambda pieces, *more: held.append(len(pieces)) or real(pieces, *more),
    )
    monkeypatch.setattr("hookkit.runs.run.join_chunks", capture_module.join_chunks)
    hk.generate(lm, [[5, 6, 7]], logits="last", max_new_tokens=6, eos_token_id=None, **settings)
    assert held == [1]
