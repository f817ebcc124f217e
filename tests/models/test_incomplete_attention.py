"""sdpa leaves out soft-caps and sinks of attention: either it computes what eager attention does, or hookkit warns."""

import warnings
from contextlib import suppress

import pytest
import torch
from tiny_families import FAMILIES

import hookkit as hk
from hookkit.errors import IncompleteAttention, Unsupported

IDS = torch.randint(5, 300, (2, 9), generator=torch.Generator().manual_seed(0))
FIELDS = {"attn_logit_softcapping", "sinks"}
CAP = 0.5  # scores of tiny models are larger


def as_capped(family):
    lm = hk.tiny(family)
    fields = [name for name in vars(lm.config) if "cap" in name and "att" in name]
    return hk.tiny(family, config=dict.fromkeys(fields, CAP)) if fields else lm


def logits_under(model, implementation):
    """The logits under an implementation that is set without asking transformers whether it may be."""
    model.config._attn_implementation = implementation
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def warnings_of_lm(model):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hk.LM(model)
    return [str(w.message) for w in caught if issubclass(w.category, IncompleteAttention)]


@pytest.mark.parametrize("family", FAMILIES)
def test_sdpa_agrees_with_eager_attention_or_transformers_refuses_it_or_hookkit_warns(family):
    model = as_capped(family).model
    names = {name for module in model.modules() for name in (*vars(module), *module._parameters)}
    if not model._supports_sdpa and names.isdisjoint(FIELDS):  # gptj and others: their own code
        with suppress(ValueError):
            model.set_attn_implementation("sdpa")
        assert model.config._attn_implementation == "eager"
        return
    expected = logits_under(model, "eager")
    assert not warnings_of_lm(model)
    try:
        logits = logits_under(model, "sdpa")
    except ValueError as error:
        assert "sdpa" in str(error) or "softcap" in str(error)
        return
    difference = float((logits - expected).abs().max() / expected.abs().max())
    assert bool(warnings_of_lm(model)) == (difference > 1e-4), difference


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("gemma2", "soft-cap of the attention scores .model.layers.0.self_attn: attn_logit_softcapping = 0.5"),
        ("gpt_oss", "the attention sinks .model.layers.0.self_attn: sinks.*attn_implementation='eager'"),
    ],
)  # fmt: skip
def test_the_warning_names_the_field_the_remedy_and_the_users_line(family, words):
    model = as_capped(family).model
    model.config._attn_implementation = "sdpa"
    with pytest.warns(IncompleteAttention, match=words) as caught:
        hk.LM(model)
    assert caught[0].filename == __file__ and len(caught) == 1


def test_load_uses_an_attention_that_keeps_the_soft_cap_or_warns_or_refuses(
    tmp_path, small_tokenizer
):
    as_capped("gemma2").model.save_pretrained(tmp_path)
    small_tokenizer.save_pretrained(tmp_path)
    expected = hk.forward(hk.load(tmp_path, attn_implementation="eager", device="cpu"), "Tea")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lm = hk.load(tmp_path, device="cpu")
    is_equal = torch.allclose(hk.forward(lm, "Tea").logits, expected.logits, atol=1e-4)
    assert is_equal != any(issubclass(w.category, IncompleteAttention) for w in caught)
    if not lm.model._supports_sdpa:
        with pytest.raises(
            Unsupported, match="with this attention: leave attn_implementation= out"
        ):
            hk.load(tmp_path, attn_implementation="sdpa", device="cpu")
