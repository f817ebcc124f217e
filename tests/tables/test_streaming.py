"""A generation as it happens: the same steps as generate's, and nothing left behind when one stops listening."""

import threading

import pytest
import torch
from conftest import PROMPTS

import hookkit as hk
from hookkit.errors import Unsupported

SETTINGS = {"max_new_tokens": 5, "do_sample": True, "temperature": 0.9, "seed": 4}


def test_the_steps_are_those_of_generate_with_a_trace(lm):
    hooks = [hk.ban(5, 6), hk.force(7, step=2)]
    whole = hk.generate(lm, PROMPTS, *hooks, trace=hk.trace(top=3, watch=9), **SETTINGS)
    steps = hk.stream(lm, PROMPTS, *hooks, trace=hk.trace(top=3, watch=9), **SETTINGS)
    decided, shown = hk.decisions(whole), hk.candidates(whole)
    for number, now in enumerate(steps):
        assert now.step == number
        mine = decided.query("step == @number").reset_index(drop=True)
        assert now.decisions.equals(mine)
        assert now.candidates.equals(shown.query("step == @number").reset_index(drop=True))
    assert number == 4
    assert torch.equal(steps.run.tokens, whole.tokens)
    assert now.text == whole.text


def test_a_row_that_has_ended_says_nothing_more(lm):
    ends = hk.force(1, step=1, rows=0)  # 1 is the end token
    steps = list(
        hk.stream(lm, PROMPTS[:2], ends, max_new_tokens=4, do_sample=False, eos_token_id=1)
    )
    assert [now.decisions["row"].tolist() for now in steps] == [[0, 1], [0, 1], [1], [1]]
    assert steps[-1].text[0] == steps[1].text[0]


def test_who_stops_listening_ends_the_generation_and_leaves_the_model_as_it_was(lm):
    for now in hk.stream(
        lm, PROMPTS[0], hk.force(7), max_new_tokens=60, do_sample=False, eos_token_id=None
    ):
        if now.step == 2:
            break
    assert not [thread for thread in threading.enumerate() if thread.name == "hookkit.stream"]
    assert not lm.model._forward_hooks and "generate" not in vars(lm.model)


def test_an_exception_in_a_hook_is_raised_where_the_steps_are_read(lm):
    def fail(values):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine") as caught:
        list(hk.stream(lm, PROMPTS[0], hk.edit("mlp_out.1", fail), max_new_tokens=3))
    assert "mlp_out.1" in caught.value.__notes__[0]


def test_a_stream_is_gone_through_once_and_has_its_run_at_the_end(lm):
    steps = hk.stream(lm, PROMPTS[0], max_new_tokens=2, do_sample=False)
    with pytest.raises(Unsupported, match="has not come to its end"):
        _ = steps.run
    list(steps)
    assert steps.run.logits.shape[1] == 1  # those of the last step, unless all are asked for
    with pytest.raises(Unsupported, match="can be iterated once"):
        list(steps)


@pytest.mark.parametrize("more", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}])
def test_what_has_no_single_text_is_not_streamed(lm, more):
    with pytest.raises(Unsupported, match="have no single text to stream"):
        list(hk.stream(lm, PROMPTS[0], max_new_tokens=2, **more))
