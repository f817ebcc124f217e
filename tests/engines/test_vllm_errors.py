"""Errors of a run inside vLLM arrive as they are, and the engine goes on."""

import pytest
import torch
from served_models import PROMPTS, compare, needs_vllm

import hookkit as hk

pytestmark = needs_vllm


class MilkError(Exception):
    """An error of the user's own."""


def fail(values: torch.Tensor) -> torch.Tensor:
    raise MilkError("no milk today")


@pytest.mark.parametrize("engine", ["served", "narrow", "own_code"])
@pytest.mark.parametrize("site", ["embed", "resid_mid.1", "z.2", "logits"])
def test_an_error_of_a_function_arrives_and_the_engine_answers_again(
    site, engine, reference, request
):
    lm = request.getfixturevalue(engine)
    with pytest.raises(MilkError, match="no milk today") as caught:
        hk.generate(lm, PROMPTS, hk.edit(site, fail), max_new_tokens=8)
    notes = "\n".join(caught.value.__notes__)
    assert "in the process of the engine" in notes and "in fail" in notes
    compare(lm, reference, PROMPTS)


def test_an_error_in_a_late_step_arrives(served, reference):
    hooks = [
        hk.edit("resid_post.1", fail, pos=hk.GENERATED, when=hk.when.contains("e", prompt=False))
    ]
    with pytest.raises(MilkError):
        hk.generate(served, PROMPTS, hk.force("e", step=3), *hooks, max_new_tokens=8)
    compare(served, reference, PROMPTS)


def test_an_error_of_a_condition_arrives(served, reference):
    def ask(values: torch.Tensor, here: hk.types.EditContext) -> bool:
        raise MilkError("asked")

    with pytest.raises(MilkError, match="asked"):
        hk.generate(served, PROMPTS, hk.scale("z.1", 0.5, when=ask), max_new_tokens=2)
    compare(served, reference, PROMPTS)


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values * float("inf"),
        lambda values: values * float("nan"),
        lambda values: values[..., :1],
        lambda values: None,
    ],
    ids=["infinite", "not a number", "shape", "None"],
)
def test_an_impossible_value_raises_bad_edit(change, served, reference):
    with pytest.raises(hk.errors.BadEdit):
        hk.generate(served, PROMPTS, hk.edit("resid_post.1", change), max_new_tokens=3)
    compare(served, reference, PROMPTS)


def test_an_error_that_cannot_be_sent_arrives_as_text(served):
    def fail_with_lock(values: torch.Tensor) -> torch.Tensor:
        import threading

        error = MilkError("with a lock")
        error.lock = threading.Lock()
        raise error

    with pytest.raises(RuntimeError, match="MilkError: with a lock"):
        hk.generate(served, PROMPTS, hk.edit("resid_post.1", fail_with_lock), max_new_tokens=3)


def test_a_function_that_cannot_be_sent_is_an_error_here(served, reference):
    import threading

    lock = threading.Lock()
    with pytest.raises(hk.errors.HookkitError, match="cannot be sent"):
        hk.generate(
            served,
            PROMPTS,
            hk.edit("resid_post.1", lambda values: lock and values),
            max_new_tokens=3,
        )
    compare(served, reference, PROMPTS)


@pytest.mark.parametrize("engine", ["served", "narrow"])
def test_a_hook_that_never_fires_raises(engine, request):
    lm = request.getfixturevalue(engine)
    hooks = [hk.force("</s>", step=0), hk.steer("resid_post.1", torch.ones(128), pos=hk.GENERATED)]
    with pytest.raises(hk.errors.NeverFired):
        hk.generate(lm, PROMPTS, *hooks, max_new_tokens=4)


def test_a_token_that_a_rule_of_the_engine_leaves_out_raises(served, reference):
    with pytest.raises(hk.errors.BadEdit, match="vLLM took token"):
        hk.generate(served, PROMPTS, hk.force("</s>", step=1), min_new_tokens=6, max_new_tokens=8)
    compare(served, reference, PROMPTS)


def test_a_run_that_does_not_fit_the_context_raises(served):
    with pytest.raises(hk.errors.Unsupported, match="max_model_len"):
        hk.generate(served, PROMPTS, max_new_tokens=200)


def test_a_site_and_a_head_are_checked_in_both_processes(served):
    with pytest.raises(hk.errors.HookkitError):
        hk.generate(served, "Tea", hk.capture("z.1.4"), max_new_tokens=1)


def test_arguments_that_vllm_refuses_are_a_bad_argument(served, reference):
    with pytest.raises(hk.errors.BadArgument, match="temperature must be in"):
        hk.generate(served, PROMPTS, do_sample=True, temperature=5.0, max_new_tokens=2)
    compare(served, reference, PROMPTS)
