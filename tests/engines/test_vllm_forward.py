"""`hk.forward` inside vLLM: captures, edits and logits are those of hookkit on transformers."""

import pytest
import torch
from served_models import PROMPTS, difference, needs_vllm

import hookkit as hk

pytestmark = needs_vllm

ENGINES = ["served", "own_code", "narrow"]
STEER = hk.steer("resid_post.0", torch.randn(128, generator=torch.Generator().manual_seed(0)))
HOOKS = {
    "captures at all positions": [hk.capture(["resid_post", "z", "k", "mlp_post"])],
    "the last position": [hk.capture("resid_post.1", pos=-1)],
    "some rows": [hk.capture("attn_out.1", pos=[0, 2], rows=[0, 3])],
    "a phrase": [hk.capture("resid_pre.1", pos=hk.at("the store"), rows=2)],
    "an edit before a capture": [STEER, hk.capture("resid_post.1")],
    "an edit at some positions": [hk.scale("z.1.2", 3.0, pos=slice(0, 1)), hk.capture("z.1")],
    "a forced token": [hk.force(" coffee"), hk.capture("resid_post.1")],
    "logits that an edit changes": [hk.ban("e"), hk.capture("logits", pos=-1, name="own")],
    "values of other prompts": [hk.ablate("mlp_out.1", to="mean", over=PROMPTS, per="all")],
}


def compare_forwards(lm: hk.LM, reference: hk.LM, *hooks: hk.types.Hook, logits="last") -> None:
    run = hk.forward(lm, PROMPTS, *hooks, logits=logits)
    expected = hk.forward(reference, PROMPTS, *hooks, logits=logits)
    assert torch.equal(run.tokens, expected.tokens)
    assert torch.equal(run.mask, expected.mask)
    assert run.prompt_lengths == expected.prompt_lengths
    for captured, expected_values in zip(run.captures.all, expected.captures.all, strict=True):
        assert captured.site == expected_values.site
        assert captured.name == expected_values.name
        assert captured.rows == expected_values.rows
        assert torch.equal(captured.positions, expected_values.positions)
        assert difference(captured.values, expected_values.values) <= 2e-5, captured.site
    if logits:
        assert difference(run.logits, expected.logits) <= 1e-4
        positions = expected.captured_logits().positions
        assert torch.equal(run.captured_logits().positions, positions)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", HOOKS)
def test_a_forward_in_the_engine_is_the_forward_in_transformers(name, engine, reference, request):
    compare_forwards(request.getfixturevalue(engine), reference, *HOOKS[name])


def test_without_logits_the_captures_are_the_same(served, reference):
    compare_forwards(served, reference, hk.capture(["embed", "final_norm"]), logits=False)


def test_tables_take_the_last_logits(served, reference):
    tables = []
    for lm in (served, reference):
        run = hk.forward(lm, PROMPTS, logits="last")
        tables.append(hk.ranks(run, top=3)[["row", "pos", "token_id", "rank"]])
    assert tables[0].equals(tables[1])


def test_logits_at_every_position_are_refused(served):
    with pytest.raises(hk.errors.Unsupported, match="logits='last'"):
        hk.forward(served, PROMPTS)
    for pos in (None, slice(-2, None)):
        with pytest.raises(hk.errors.Unsupported, match="pos=-1"):
            hk.forward(served, PROMPTS[0], hk.capture("logits", pos=pos), logits="last")


MISUSES = {
    "a generated position": [hk.capture("resid_post.1", pos=hk.GENERATED)],
    "a later step": [hk.force(" coffee", step=1)],
    "a position after the end": [hk.capture("resid_post.1", pos=50)],
    "a row that is not there": [hk.capture("resid_post.1", rows=9)],
    "nothing": [],
}


@pytest.mark.parametrize("name", MISUSES)
def test_a_misuse_raises_what_it_raises_in_transformers(name, served, reference):
    errors = []
    for lm in (served, reference):
        with pytest.raises(hk.errors.HookkitError) as caught:
            hk.forward(lm, PROMPTS, *MISUSES[name], logits=False)
        errors.append(caught.value)
    assert type(errors[0]) is type(errors[1])
    assert str(errors[0]) == str(errors[1])


def test_a_prompt_as_long_as_the_engine_reads(served):
    longest = served.context
    run = hk.forward(served, [list(range(1, longest + 1))], hk.capture("z.0"), logits=False)
    assert run["z.0"].shape[1] == longest
    with pytest.raises(hk.errors.BadPrompt, match=f"context is {longest}"):
        hk.forward(served, [list(range(longest + 1))], hk.capture("z.0"), logits=False)


def test_other_inputs_of_a_prompt_are_refused(served):
    inputs = {"input_ids": torch.tensor([[1, 2, 3]]), "token_type_ids": torch.tensor([[0, 0, 1]])}
    with pytest.raises(hk.errors.HookkitError, match="token_type_ids"):
        hk.forward(served, inputs, hk.capture("z.0"), logits=False)


def test_a_record_names_the_engine(served):
    run = hk.forward(served, PROMPTS, logits="last")
    engine = run.about["engine"]
    assert engine["name"] == "vllm"
    assert engine["model_impl"] == "transformers"
    assert engine["version"]
    assert run.about["dtype"] == ["float32"]
