"""The table of families: every row's places are in the model, and what is missing says why."""

import pytest
from conftest import tiny
from transformers import BertConfig, BertForMaskedLM, MistralConfig, MistralForCausalLM

import hookkit as hk
from hookkit.errors import MissingSite
from hookkit.families import FAMILIES
from hookkit.sites import AXES


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_place_is_in_the_model_and_every_site_has_a_place_or_a_reason(family):
    lm = hk.LM(tiny(family.name))
    assert set(family.places) | set(family.missing) == set(AXES)
    assert not set(family.places) & set(family.missing)
    for site in lm.sites():
        lm.submodule(lm.place(site).path)


def test_a_family_that_is_not_in_the_table_has_head_and_logits_and_says_so():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    lm = hk.LM(MistralForCausalLM(MistralConfig(vocab_size=32, num_key_value_heads=1, **sizes)).eval())
    with pytest.raises(
        MissingSite, match=r"no family in hookkit's table has model type 'mistral' .* use hk.module\(path\)"
    ):
        lm.sites("resid_post")
    run = hk.forward(lm, [[1, 2, 3]], hk.force(5), hk.capture(hk.module("model.layers.0")))
    assert int(run.logits[0, -1].argmax()) == 5
    assert run[hk.module("model.layers.0")].shape == (1, 3, 16)
    bert = hk.LM(BertForMaskedLM(BertConfig(vocab_size=32, **sizes)).eval())
    assert hk.forward(bert, [[1, 2, 3]], hk.capture("lm_head")).logits.shape == (1, 3, 32)
