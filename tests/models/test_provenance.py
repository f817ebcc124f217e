"""How a result came to be: hashes that follow the weights, and words ready for JSON."""

import json

import torch
from conftest import tiny

import hookkit as hk
from hookkit.models.provenance import about_model, git_commit, tokenizer_hash, weights_hash


def test_the_hash_is_of_the_weights_and_of_nothing_else(small_tokenizer):
    one, two = hk.LM(tiny("llama")), hk.LM(tiny("llama"), small_tokenizer, name="another name")
    assert weights_hash(one) == weights_hash(two)
    with torch.no_grad():
        two.model.model.norm.weight[0] += 1e-6
    assert weights_hash(one) != weights_hash(two)
    assert tokenizer_hash(one) is None and len(tokenizer_hash(two)) == 64


def test_what_is_said_of_a_model_is_ready_for_json(llama):
    about = json.loads(json.dumps(about_model(llama)))
    assert about["dtype"] == ["float32"] and about["device"] == "cpu" and about["family"] == "llama"
    assert about["parameters"] == sum(weight.numel() for weight in llama.model.parameters())
    assert (
        about["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    )  # a build may say more


def test_outside_git_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert git_commit() is None


def test_the_hash_of_the_weights_tells_models_apart(tmp_path, llama, gpt2, small_tokenizer):

    other = hk.LM(tiny("llama"), small_tokenizer)
    assert weights_hash(llama) == weights_hash(other)
    with torch.no_grad():
        other.model.lm_head.weight[0, 0] += 1
    assert len({weights_hash(llama), weights_hash(other), weights_hash(gpt2)}) == 3
    assert tokenizer_hash(llama) == tokenizer_hash(other)
    assert tokenizer_hash(hk.LM(llama.model)) is None
