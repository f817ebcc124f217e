"""LM: the user's own model and tokenizer, and tokens as text."""

import copy

import by_hand
import pytest
import torch
from conftest import tiny
from torch import nn
from transformers import MistralConfig, MistralForCausalLM

import hookkit as hk
from hookkit.errors import MissingSite, NotOneToken


def test_an_lm_takes_what_the_user_holds_and_leaves_it_untouched(small_tokenizer):
    model = tiny("llama")
    before = (
        copy.deepcopy(model.state_dict()),
        small_tokenizer.padding_side,
        small_tokenizer.pad_token,
    )
    lm = hk.LM(model, small_tokenizer)
    hk.generate(lm, ["Tea", "I like oat milk in my"], hk.force(5, step=0), max_new_tokens=3)
    assert lm.model is model
    assert all(torch.equal(value, before[0][name]) for name, value in model.state_dict().items())
    assert (small_tokenizer.padding_side, small_tokenizer.pad_token) == before[1:]


def test_a_name_instead_of_a_model_is_refused():
    with pytest.raises(
        TypeError,
        match=r"LM needs the model itself.*given str 'gpt2'; to load one by name, use hk.load",
    ):
        hk.LM("gpt2")


def test_an_lm_prints_what_it_is(llama):
    assert (
        repr(llama) == "LM(LlamaForCausalLM: llama, 3 layers, 0.1 M parameters, on cpu)"
        or "llama, 3 layers" in repr(llama)
    )


def test_a_token_is_given_as_text_or_id(smol):
    assert smol.token(" coffee") == smol.token(6728) == 6728
    assert smol.string(6728) == " coffee"


def test_text_that_is_not_one_token_shows_its_pieces_and_the_near_spellings(smol):
    with pytest.raises(
        NotOneToken, match=r"' oat milk' is 2 tokens here \(' oat' \+ ' milk'\), and one is meant"
    ):
        smol.token(" oat milk")
    with pytest.raises(NotOneToken, match=r"'Coffeee' is .* tokens here"):
        smol.token("Coffeee")
    pieces = smol.tokenizer.encode("smoothies")
    if len(pieces) > 1:
        with pytest.raises(NotOneToken, match=r"One token each: ' smoothies'"):
            smol.token("smoothies")


def test_a_token_outside_the_vocabulary_is_refused(smol, llama):
    with pytest.raises(
        NotOneToken, match="token 49152 was asked for, and the vocabulary has ids 0 to 49151"
    ):
        hk.forward(smol, "Tea", hk.force(49152))
    with pytest.raises(NotOneToken, match="'x' is text, and this model came without a tokenizer"):
        hk.forward(hk.LM(llama.model), [1, 2], hk.force("x"))


def test_rows_of_the_vocabulary_without_a_token_are_named_as_such(small_tokenizer):
    lm = hk.LM(tiny("llama"), small_tokenizer)
    assert lm.n_tokens == 320
    assert hk.LM(lm.model).string(5) == "<5>"


def test_a_family_that_the_table_lacks_is_found_out(small_tokenizer):
    config = MistralConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    config.model_type = "mine"
    lm = hk.LM(MistralForCausalLM(config).eval(), small_tokenizer)
    run = hk.forward(lm, "Tea", hk.force(3), hk.capture(hk.module("model.layers.1")))
    assert int(run.logits[0, -1].argmax()) == 3
    ids = small_tokenizer.encode("Tea")
    assert torch.equal(run["model.layers.1:output"], by_hand_layer(lm.model, ids))
    assert lm.family.found
    assert torch.equal(
        hk.forward(lm, "Tea", hk.capture("resid_post.1"))["resid_post.1"],
        by_hand_layer(lm.model, ids),
    )


def by_hand_layer(model, ids):
    kept = []
    handle = model.model.layers[1].register_forward_hook(lambda *args: kept.append(args[2].clone()))
    by_hand.logits(model, ids)
    handle.remove()
    return kept[0]


def test_a_model_without_a_head_says_so():
    with pytest.raises(MissingSite, match="the model has no unembedding head"):
        hk.LM(nn.Linear(2, 2)).sites("logits")
    with pytest.raises(MissingSite, match="the model has no unembedding head"):
        hk.LM(tiny("llama").model).sites("resid_post")


def test_a_model_takes_the_name_of_a_site_wherever_it_takes_a_site():
    lm = hk.tiny("llama")
    assert lm.shape("z.1") == (4, 8) and lm.shape("z.1.2") == (8,)
    assert lm.location("mlp_out.1") == lm.location(hk.Site("mlp_out", 1))
    with pytest.raises(hk.errors.UnknownSite, match="mlp_ot"):
        lm.shape("mlp_ot.1")
    with pytest.raises(hk.errors.UnknownSite, match="5 is not a site"):
        lm.location(5)
    with pytest.raises(hk.errors.UnknownSite, match="one is needed: say 'k.LAYER'"):
        lm.shape("k")
    with pytest.raises(hk.errors.Unsupported, match="in a forward only"):
        lm.shape(hk.module("model.layers.0"))
