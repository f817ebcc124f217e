"""Edited beside unedited: the same draws where nothing differs, the same text where steps are compared."""

import math

import pandas as pd
import pytest
import torch
from conftest import PROMPTS
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, StoppingCriteria

import hookkit as hk
from hookkit.errors import BadHook, HookkitError, OutOfRange, Unsupported

GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
NOTHING = hk.boost(3, by=0.0)


def test_both_texts_are_those_of_two_generates(lm):
    hook = hk.boost(7, by=30.0, step=2)
    both = hk.compare_generations(lm, PROMPTS, hook, **GREEDY)
    alone, edited = hk.generate(lm, PROMPTS, **GREEDY), hk.generate(lm, PROMPTS, hook, **GREEDY)
    assert both.texts["baseline"].tolist() == alone.generated
    assert both.texts["edited"].tolist() == edited.generated
    for row, parts_at in enumerate(both.texts["first_difference"]):
        one, two = (run.tokens[row, run.prompt_lengths[row] :].tolist() for run in (alone, edited))
        differ = [step for step in range(5) if one[step] != two[step]]
        assert (parts_at is pd.NA and not differ) or parts_at == differ[0]


def test_an_edit_that_changes_nothing_draws_the_same_in_both(lm):
    for seed in range(5):
        both = hk.compare_generations(
            lm,
            PROMPTS,
            NOTHING,
            max_new_tokens=12,
            do_sample=True,
            top_p=0.95,
            temperature=1.5,
            seed=seed,
        )
        assert both.texts["first_difference"].isna().all()


def test_the_shared_draws_are_distributed_as_softmax_says(llama):
    prompts, count, temperature = [PROMPTS[0]] * 200, 4, 1.3
    logits = hk.forward(llama, PROMPTS[0], logits="last").logits[0, -1] / temperature
    expected = logits.softmax(dim=-1)
    drawn = torch.cat(
        [
            hk.compare_generations(
                llama,
                prompts,
                NOTHING,
                max_new_tokens=1,
                do_sample=True,
                top_k=0,
                temperature=temperature,
                seed=seed,
            ).run.tokens[:200, -1]
            for seed in range(count)
        ]
    )
    found = torch.bincount(drawn, minlength=len(expected)) / len(drawn)
    spread = (expected * (1 - expected) / len(drawn)).sqrt()
    assert ((found - expected).abs() < 5 * spread + 1e-9).all()


@pytest.mark.parametrize("along", ["baseline", "edited"])
def test_steps_are_compared_where_both_read_the_same_text(lm, along):
    hook = hk.steer("resid_post.1", torch.ones(32))
    both = hk.compare_generations(lm, PROMPTS[:2], hook, along=along, **GREEDY)
    for row, prompt in enumerate(PROMPTS[:2]):
        ids = lm.tokenizer.encode(prompt)
        text = [*ids, *both.tokens(row, along)]
        with torch.no_grad():
            plain = lm.model(torch.tensor([text])).logits[0]
            handle = (
                lm.model.model.layers if hasattr(lm.model, "model") else lm.model.transformer.h
            )[1].register_forward_hook(
                lambda _m, _a, out: (out[0] + 1, *out[1:]) if isinstance(out, tuple) else out + 1
            )
            steered = lm.model(torch.tensor([text])).logits[0]
            handle.remove()
        for step in range(5):
            p, q = (said[len(ids) - 1 + step].double().log_softmax(-1) for said in (plain, steered))
            kl = float((p.exp() * (p - q)).sum())
            mine = both.summary.query("row == @row and step == @step")["kl"].iloc[0]
            assert mine == pytest.approx(kl, rel=1e-3, abs=1e-6)
            moved = both.shifts.query("row == @row and step == @step")
            for found in moved.itertuples():
                assert found.rank_before == int((p > p[found.token_id]).sum()) + 1
                assert found.logprob_after == pytest.approx(float(q[found.token_id]), abs=1e-4)


def test_hooks_of_single_rows_stay_with_their_rows(lm):
    both = hk.compare_generations(lm, PROMPTS[:2], hk.force(7, rows=1), **GREEDY)
    assert both.tokens(1, "edited") == [7] * 5
    assert both.tokens(0, "edited") == both.tokens(0, "baseline")


def test_a_fork_says_the_same_until_its_step_and_then_goes_its_own_way(lm):
    run = hk.generate(
        lm,
        PROMPTS[:2],
        hk.ban(4),
        max_new_tokens=6,
        do_sample=True,
        seed=3,
        trace=hk.trace(),
        eos_token_id=None,
    )
    other = hk.fork(run, step=3, token=9, row=1)
    start = run.prompt_lengths[1]
    assert other.tokens[1, start : start + 3].tolist() == run.tokens[1, start : start + 3].tolist()
    assert int(other.tokens[1, start + 3]) == 9
    assert torch.equal(other.tokens[0], run.tokens[0]), "another row was changed"
    assert hk.decisions(other, rows=1)["why"][3].startswith("forced by force(word(")
    text = torch.tensor([other.tokens[1, : other.lengths[1]].tolist()])
    with torch.no_grad():
        plain = lm.model(text).logits[0, start + 3 : -1]
    mine = hk.candidates(other, rows=1).query("stage == 'model' and drawn and step > 3")["logit"]
    drawn = other.tokens[1, start + 4 : other.lengths[1]]
    assert mine.tolist() == pytest.approx(plain.gather(1, drawn[:, None])[:, 0].tolist(), abs=1e-4)


def test_a_fork_to_the_token_that_was_said_is_the_run_again(lm):
    run = hk.generate(lm, PROMPTS[0], max_new_tokens=8, do_sample=True, seed=1, eos_token_id=None)
    said = int(run.tokens[0, run.prompt_lengths[0] + 2])
    assert torch.equal(hk.fork(run, step=2, token=said).tokens, run.tokens)


def test_what_cannot_be_compared_or_forked_is_refused(lm):
    run = hk.generate(lm, PROMPTS[0], max_new_tokens=3, do_sample=False, eos_token_id=None)
    for make, error, words in (
        (lambda: hk.compare_generations(lm, "Tea", max_new_tokens=2), BadHook, "was given no hook"),
        (
            lambda: hk.compare_generations(lm, "Tea", NOTHING, along="both", max_new_tokens=2),
            BadHook,
            "along='both' is unknown",
        ),
        (
            lambda: hk.compare_generations(lm, "Tea", NOTHING, num_beams=2),
            Unsupported,
            "one text for each prompt is needed",
        ),
        (
            lambda: hk.fork(run, step=3, token=4),
            OutOfRange,
            "step=3 was asked for, and row 0 has steps 0 to 2",
        ),
        (lambda: hk.fork(run, step=0, token=4, row=1), OutOfRange, "row 1 was asked for"),
        (
            lambda: hk.fork(hk.forward(lm, "Tea"), step=0, token=4),
            Unsupported,
            "only what was generated",
        ),
    ):
        with pytest.raises(error, match=words):
            make()
    assert math.isfinite(float(run.logits.sum()))


def test_what_is_asked_for_prompts_or_rows_sees_those_of_the_user(llama):
    prompts = [[5, 9, 13], [6, 7]]
    asked, shapes = set(), set()
    allowed = {0: [10, 11, 12], 1: [20, 21, 22]}

    def only(number, _ids):
        asked.add(int(number))
        return allowed[int(number)]

    class PerRow(LogitsProcessor):
        def __init__(self) -> None:
            self.step = 0

        def __call__(self, input_ids, scores):
            self.step += 1
            shapes.add(len(scores))
            scores = scores.clone()
            scores[
                torch.arange(len(scores)), 10 * torch.arange(1, len(scores) + 1) + self.step
            ] += 50.0
            return scores

    class Second(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.tensor([False, input_ids.shape[1] >= 5])

    settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for more in (
        lambda: {"prefix_allowed_tokens_fn": only},
        lambda: {"logits_processor": [PerRow()]},
        lambda: {"stopping_criteria": [Second()]},
    ):
        both = hk.compare_generations(llama, prompts, NOTHING, **more(), **settings)
        alone = hk.generate(llama, prompts, **more(), **settings)
        for row in (0, 1):
            expected = alone.tokens[row, alone.prompt_lengths[row] : alone.lengths[row]].tolist()
            assert both.tokens(row, "baseline") == both.tokens(row, "edited") == expected
    assert asked == {0, 1}
    assert shapes == {2}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("past_key_values", DynamicCache()),
        ("streamer", object()),
        ("position_ids", torch.ones(2, 3)),
    ],
)
def test_what_has_a_row_for_each_prompt_is_refused(llama, name, value):
    with pytest.raises(HookkitError, match=name):
        hk.compare_generations(llama, [[5, 9, 13], [6, 7, 8]], NOTHING, **{name: value}, **GREEDY)


def test_several_sequences_in_a_generation_config_are_refused_too(llama):
    config = GenerationConfig(max_new_tokens=2, num_beams=2, do_sample=False)
    with pytest.raises(Unsupported, match="num_beams is 2"):
        hk.compare_generations(llama, [[5, 9, 13]], NOTHING, generation_config=config)
