"""hk.doctor and hookkit doctor: what works with a model, proved, and what does not, with the reason."""

import copy
import dataclasses
import importlib
import json

import pandas as pd
import pytest
import torch
from conftest import tokenizer
from typer.testing import CliRunner

import hookkit as hk
from hookkit.cli import app
from hookkit.models.sites import AXES, CROSS_SITES


def saved(lm: hk.LM, folder, **settings) -> str:
    """A folder as transformers writes one."""
    lm.model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def folder(tmp_path) -> str:
    return saved(hk.tiny("qwen3"), tmp_path / "model")


def asked(*words: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["doctor", *words])
    return result.exit_code, result.stdout, result.stderr


def test_every_site_is_proved_editable_or_missing_with_a_reason():
    checkup = hk.doctor(hk.tiny("qwen2_moe"))
    assert checkup.healthy
    assert list(checkup.sites.columns) == [
        "site",
        "blocks",
        "editable",
        "proved",
        "difference",
        "why",
    ]
    assert checkup.sites["site"].tolist() == [name for name in AXES if name not in CROSS_SITES]
    for row in checkup.sites.itertuples():
        if row.blocks:
            assert row.editable and row.proved and row.difference < 1e-3, row
        else:
            assert row.why and not row.editable, row
    table = checkup.sites.set_index("site")
    assert table.loc["router_logits", "blocks"] == "2 of 3"
    assert table.loc["mlp_pre", "blocks"] == "3 of 3"  # its second and third block have experts
    assert any("router_logits is not in 1 blocks (0)" in note for note in checkup.notes)


def test_it_says_what_the_model_and_its_tokenizer_are(small_tokenizer):
    facts = hk.doctor(hk.tiny("gpt2", tokenizer=small_tokenizer)).facts
    assert facts["dtype"] == "float32" and facts["device"] == "cpu" and facts["attention"] == "sdpa"
    assert facts["pad"] == "none" and facts["eos"] == "</s> (1)" and facts["adds a bos"] is False
    assert facts["rows without a token"] == 0 and facts["blocks"] == 3


def test_a_wrong_row_is_a_problem_with_the_law_and_the_site():
    lm = hk.tiny("gemma2")
    before_the_norm = dataclasses.replace(lm.family.locations["attn_in"], side="output")
    row = dataclasses.replace(
        lm.family, locations={**lm.family.locations, "attn_out": before_the_norm}
    )
    checkup = hk.doctor(hk.LM(lm.model, row=row))
    assert not checkup.healthy
    assert not checkup.sites.set_index("site").loc["attn_out", "proved"]
    assert any("the law 'sum' at attn_out: differs by" in problem for problem in checkup.problems)


def test_what_a_law_had_not_come_to_when_it_raised_is_not_proved():
    lm = hk.tiny("llama")
    what_attention_reads = hk.location(".self_attn", side="input", cut="head d_head")
    checkup = hk.doctor(
        hk.LM(lm.model, row=hk.family("mine", like=lm, locations={"z": what_attention_reads}))
    )
    sites = checkup.sites.set_index("site")
    assert any(
        "the law 'projection': could not be tried: TypeError" in problem
        for problem in checkup.problems
    )
    # the law is tried at z, raises, and never comes to the neurons, where the other laws hold
    others = checkup.laws.query("site == 'mlp_post' and law not in ('projection', 'all heads')")
    assert others["holds"].all() and len(others) > 3
    assert (
        not sites.loc["mlp_post", "proved"]
        and sites.loc["mlp_post", "why"] == "projection, all heads"
    )
    assert sites.loc["resid_post", "proved"] and sites.loc["resid_post", "editable"]
    assert len(checkup.problems) == len(set(checkup.problems)), (
        "an error is said once, not for every site"
    )


def test_a_tokenizer_with_more_tokens_than_the_model_is_a_problem(small_tokenizer):
    checkup = hk.doctor(hk.tiny("llama", tokenizer=small_tokenizer, config={"vocab_size": 300}))
    assert any(
        "the tokenizer has ids up to 319, and the model's vocabulary ends at 299" in p
        for p in checkup.problems
    )


def test_a_damaged_tokenizer_is_a_problem(small_tokenizer):
    from tokenizers import decoders

    damaged = copy.deepcopy(small_tokenizer)
    damaged.backend_tokenizer.decoder = decoders.Fuse()
    checkup = hk.doctor(hk.tiny("llama", tokenizer=damaged))
    assert any("does not give back a text" in problem for problem in checkup.problems)


def test_a_model_without_a_head_is_a_problem_that_says_what_to_load():
    lm = hk.tiny("llama")
    checkup = hk.doctor(hk.LM(lm.model.model))
    assert not checkup.healthy
    assert any("load it with AutoModelForCausalLM" in problem for problem in checkup.problems)


def test_a_bfloat16_model_is_proved_to_its_own_precision():
    lm = hk.tiny("llama")
    checkup = hk.doctor(hk.LM(lm.model.to(torch.bfloat16)))
    assert checkup.healthy, checkup.problems
    assert checkup.facts["dtype"] == "bfloat16"


def test_an_offloaded_model_is_proved(tmp_path):
    from accelerate import disk_offload

    lm = hk.tiny("qwen2")
    disk_offload(lm.model, str(tmp_path), execution_device=torch.device("cpu"))
    checkup = hk.doctor(lm)
    assert checkup.healthy, checkup.problems
    assert checkup.facts["device"] == "cpu, disk"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
def test_a_model_with_adapters_is_proved():
    peft = pytest.importorskip("peft")
    lm = hk.tiny("llama")
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2, init_lora_weights=False)
    checkup = hk.doctor(hk.LM(peft.get_peft_model(lm.model, config).eval()))
    assert checkup.healthy, checkup.problems


def test_a_family_that_was_found_out_is_proved_like_any_other():
    checkup = hk.doctor(hk.tiny("biogpt"))
    assert checkup.healthy, checkup.problems
    assert checkup.sites.set_index("site").loc["attn_out", "proved"]


def test_the_command_says_it_in_words_and_its_status_is_0(folder):
    status, out, _ = asked(folder)
    assert status == 0, out
    assert (
        "qwen3" in out
        and "resid_post" in out
        and "3 of 3" in out
        and "nothing was found that does not work" in out
    )


def test_the_command_gives_json_for_scripts(folder):
    status, out, _ = asked(folder, "--dtype", "bfloat16", "--json")
    said = json.loads(out)
    assert status == 0 and said["healthy"] and said["facts"]["dtype"] == "bfloat16"
    assert {row["site"] for row in said["sites"]} == ({*AXES} - CROSS_SITES)
    assert all(row["holds"] for row in said["laws"])


def test_the_status_is_1_where_something_does_not_work(tmp_path):
    lm = hk.tiny("llama", config={"vocab_size": 300})
    status, out, _ = asked(saved(lm, tmp_path / "model"))
    assert status == 1 and "problem: the tokenizer has ids up to 319" in " ".join(out.split())


def test_the_status_is_2_where_there_is_no_model(tmp_path):
    status, _, err = asked(str(tmp_path / "nothing"))
    assert status == 2 and err.startswith("hookkit: there is no")


@pytest.mark.parametrize(
    ("words", "layers"), [(["--layer", "2", "--layer", "0"], [2, 0]), ([], None)]
)
def test_the_laws_are_tried_at_the_layers_that_are_asked_for(monkeypatch, words, layers):
    lm, tried = hk.tiny("llama"), []

    def check_laws(lm, *, layers):
        tried.append(layers)
        return pd.DataFrame(columns=["law", "site", "difference", "limit", "holds", "note"])

    monkeypatch.setattr("hookkit.models.loading.load", lambda *name, **words: lm)
    monkeypatch.setattr(importlib.import_module("hookkit.checks.doctor"), "check_laws", check_laws)
    CliRunner().invoke(app, ["doctor", "--json", *words])
    assert tried == [layers]


@pytest.mark.parametrize(("words", "trusted"), [(["--trust-remote-code"], True), ([], None)])
def test_code_that_comes_with_a_model_runs_where_that_is_said_and_nowhere_else(
    monkeypatch, words, trusted
):
    told = []

    def load(*name, **settings):
        told.append(settings.get("trust_remote_code"))
        raise hk.errors.ModelNotFound("there is none")

    monkeypatch.setattr("hookkit.models.loading.load", load)
    CliRunner().invoke(app, ["doctor", "some-lab/model", *words])
    assert told == [trusted]
