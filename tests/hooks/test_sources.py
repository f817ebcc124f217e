"""Edits with a source as values: how they print, travel, and what they do to numbers."""

import json

import pytest
import torch

import hookkit as hk
from hookkit.errors import BadHook
from hookkit.hooks.base import Binding, EditContext
from hookkit.models.positions import Where

LOGITS = hk.Site("logits")


def change(hook, lm, logits, source):
    """What the edit makes of logits [vocab] where its source has these."""
    binding = Binding(lm, LOGITS, lambda _: None, lambda here: source[None, None])
    here = EditContext(LOGITS, Where(), None)
    return hook.change(binding)(logits[None, None], here)[0, 0]


def numbers(seed):
    return torch.randn(320, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize(
    ("hook", "text", "words"),
    [
        (hk.toward("Tea", by=1), "toward('Tea', by=1.0)", "the pull toward the prompt 'Tea'"),
        (
            hk.away_from(["Tea", "No"], by=2, plausible=0.1, rows=0),
            "away_from(['Tea', 'No'], by=2.0, plausible=0.1, rows=0)",
            "contrast with another prompt for each row",
        ),
        (
            hk.away_from(hk.UNEDITED, by=1, step=0),
            "away_from(UNEDITED, by=1.0, step=0)",
            "contrast with the unedited model",
        ),
        (
            hk.away_from(hk.Site("resid_post", 6), by=1),
            "away_from(resid_post.6, by=1.0)",
            "contrast with resid_post.6",
        ),
        (hk.toward([5, 6], by=1), "toward((5, 6), by=1.0)", "the pull toward the prompt (5, 6)"),
    ],
)
def test_an_edit_with_a_source_prints_travels_and_is_named(hook, text, words):
    assert str(hook) == text and hook.in_words() == words and words
    again = hk.types.Hook.from_json(hook.to_json())
    assert again == hook and hash(again) == hash(hook) and again.to_json() == hook.to_json()
    assert "by=" in hook._repr_html_()


def test_a_chat_is_a_source_and_travels():
    chat = hk.chat(user="Who are you?")
    hook = hk.away_from(chat, by=0.5)
    assert hk.types.Hook.from_json(hook.to_json()) == hook
    assert hook == hk.away_from([{"role": "user", "content": "Who are you?"}], by=0.5)


def test_a_tuned_lens_travels_with_its_numbers(llama):
    lens = hk.train_lens(llama, [list(range(2, 200))], window=16, steps=2, progress=False)
    hook = hk.away_from(hk.Site("resid_post", 0), by=1.0, lens=lens)
    again = hk.types.Hook.from_json(hook.to_json())
    assert again == hook != hk.away_from(hk.Site("resid_post", 0), by=1.0)
    assert torch.equal(
        hk.forward(llama, "Tea", again).logits, hk.forward(llama, "Tea", hook).logits
    )


def test_another_model_is_written_by_its_name_and_does_not_come_back(llama):
    hook = hk.toward(hk.LM(llama.model, llama.tokenizer, "amateur"), by=1.0)
    assert str(hook) == "toward(amateur, by=1.0)"
    written = json.loads(hook.to_json(tensors="digest"))
    assert written["source"]["lm"]["$model"]["name"] == "amateur"
    with pytest.raises(BadHook, match="another model as its source, 'amateur', .* not the weights"):
        hk.types.Hook.from_json(hook.to_json())


def test_the_formula_is_that_of_its_docstring(llama):
    logits, source = numbers(0), numbers(1)
    shift = source.log_softmax(-1) - logits.log_softmax(-1)
    for by in (0.0, 0.5, 2.0, -1.0):
        new = change(hk.toward("a", by=by), llama, logits, source)
        assert torch.allclose(new, logits + by * shift, atol=1e-5)
        away = change(hk.away_from("a", by=by), llama, logits, source)
        assert torch.allclose(away, logits - by * shift, atol=1e-5)
    one = change(hk.toward("a", by=1.0), llama, logits, source)
    assert torch.allclose(one.softmax(-1), source.softmax(-1), atol=1e-6)
    assert torch.equal(change(hk.toward("a", by=0.0), llama, logits, source), logits)


def test_implausible_tokens_are_cut_and_impossible_ones_stay_so(llama):
    logits, source = numbers(0), numbers(1)
    logits[5] = -torch.inf
    probs = logits.softmax(-1)
    new = change(hk.away_from("a", by=1.0, plausible=0.05), llama, logits, source)
    assert torch.equal(new == -torch.inf, probs < 0.05 * probs.max())
    for nothing in (None, 0):
        new = change(hk.away_from("a", by=1.0, plausible=nothing), llama, logits, source)
        assert (new == -torch.inf).nonzero().flatten().tolist() == [5]
    assert hk.toward("a", by=1.0, plausible=0) == hk.toward("a", by=1.0)


def test_half_precision_is_computed_in_float32(llama):
    logits, source = numbers(0).bfloat16(), numbers(1).bfloat16()
    new = change(hk.toward("a", by=0.5), llama, logits, source)
    wide = change(hk.toward("a", by=0.5), llama, logits.float(), source.float())
    assert new.dtype == torch.bfloat16 and torch.equal(new, wide.bfloat16())
    assert torch.equal(change(hk.toward("a", by=0.0), llama, logits, source), logits)


def test_a_source_with_more_or_fewer_rows_after_the_vocabulary_leaves_those_alone(llama):
    logits, source = numbers(0), numbers(1)
    wider = torch.cat([source, torch.full((8,), -torch.inf)])
    same = change(hk.toward("a", by=0.5), llama, logits, source)
    assert torch.allclose(change(hk.toward("a", by=0.5), llama, logits, wider), same, atol=1e-6)
    narrower = change(hk.toward("a", by=0.5), llama, logits, source[:300])
    assert torch.equal(narrower[300:], logits[300:])


def test_a_token_that_only_the_source_excludes_cannot_be_moved_away_from(llama):
    with pytest.raises(hk.errors.BadEdit, match="infinite or NaN"):
        hk.forward(
            llama,
            "Tea",
            hk.away_from(silent(llama), by=1.0),
        )


def silent(lm):
    """A copy of a model whose last token is impossible."""
    import copy

    model = copy.deepcopy(lm.model)

    def exclude(_module, _args, output):
        output.logits[..., -1] = -torch.inf
        return output

    model.register_forward_hook(exclude)
    return hk.LM(model, lm.tokenizer, "silent")
