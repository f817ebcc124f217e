"""Before its first run, an engine proves itself against transformers, or raises."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from served_models import needs_vllm
from typer.testing import CliRunner

import hookkit as hk
from hookkit.cli import app
from hookkit.runs.engines.vllm_hooks import ServedResult
from hookkit.runs.engines.vllm_probe import check_proved, count_blocks, prove_engine, read_blocks

LAYER = "model.layers.1"


@pytest.mark.parametrize(
    "family, config, blocks",
    [
        ("llama", {"num_hidden_layers": 5}, 2),
        ("llama", {"num_hidden_layers": 1}, 1),
        ("gemma2", {}, 2),
        ("smollm3", {"num_hidden_layers": 6, "no_rope_layers": [1, 1, 1, 0, 1, 1]}, 4),
        ("qwen2_moe", {"num_hidden_layers": 4, "mlp_only_layers": [0, 1]}, 3),
    ],
)
def test_one_block_of_each_kind_is_read(family, config, blocks):
    assert count_blocks(hk.tiny(family, config=config)) == blocks


class TracedSlice:
    """A weight of a file; its name is noted when its numbers are read."""

    def __init__(self, stored, name, reads):
        self.stored, self.name, self.reads = stored, name, reads

    def __getitem__(self, index):
        self.reads.add(self.name)
        return self.stored[index]

    def __getattr__(self, name):
        return getattr(self.stored, name)


class TracedFile(TracedSlice):
    def get_slice(self, name):
        return TracedSlice(self.stored.get_slice(name), name, self.reads)

    def get_tensor(self, name):
        return self.get_slice(name)[...]

    def __enter__(self):
        self.stored.__enter__()
        return self

    def __exit__(self, *error):
        return self.stored.__exit__(*error)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_only_the_weights_of_the_first_blocks_are_read(family, tmp_path, monkeypatch):
    lm = hk.tiny(family, config={"num_hidden_layers": 6})
    lm.model.save_pretrained(tmp_path, max_shard_size="60KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) >= 4
    reads = set()
    monkeypatch.setattr(
        "transformers.modeling_utils.safe_open",
        lambda file, *args, **kwargs: TracedFile(safe_open(file, *args, **kwargs), file, reads),
    )
    engine = SimpleNamespace(source=str(tmp_path), arguments={})
    served = SimpleNamespace(config=lm.config, engine=engine, tokenizer=None, name=family)
    first_blocks = read_blocks(served, 2, torch.float32)
    prefixes = ("model.layers.0.", "model.layers.1.")
    in_blocks = {name for name in index["weight_map"] if name.startswith(prefixes)}
    assert reads == in_blocks | {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for layer in (0, 1):
        expected = dict(lm.submodule(f"model.layers.{layer}").named_parameters())
        for name, weight in first_blocks.submodule(f"model.layers.{layer}").named_parameters():
            assert torch.equal(weight, expected[name])


# ---- engines


@pytest.fixture
def unproved(served, monkeypatch):
    """The engine of the transformers backend, as before its first run."""
    monkeypatch.setattr(served.engine, "proof", None)
    return served


@needs_vllm
@pytest.mark.parametrize("engine", ["served", "own_code", "narrow"])
def test_a_healthy_engine_is_proved_at_every_site(engine, request):
    lm = request.getfixturevalue(engine)
    proof = prove_engine(lm)
    assert proof.broken.empty
    assert proof.table["difference"].max() <= 5e-5
    names = [name for name in lm.layout.names if name != "logits"]
    for compared in ("values", "edit"):
        sites = proof.table["site"][proof.table["compared"] == compared]
        assert {site.split(".")[0] for site in sites} == set(names)
    assert proof.blocks == 2
    assert prove_engine(lm) is proof


def swapped(weights):
    key, value = f"{LAYER}.self_attn.k_proj.weight", f"{LAYER}.self_attn.v_proj.weight"
    weights[key], weights[value] = weights[value].clone(), weights[key].clone()


def other_tokens(weights):
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"].roll(1, 0)


def rolled_heads(weights):
    name = f"{LAYER}.self_attn.q_proj.weight"
    weights[name] = weights[name].roll(32, 0)


def gate_is_up(weights):
    gate, up = f"{LAYER}.mlp.gate_proj.weight", f"{LAYER}.mlp.up_proj.weight"
    weights[gate], weights[up] = weights[up].clone(), weights[gate].clone()


def doubled_norm(weights):
    weights["model.norm.weight"] = 2 * weights["model.norm.weight"]


def doubled_head(weights):
    weights["lm_head.weight"] = 2 * weights["lm_head.weight"]


@needs_vllm
@pytest.mark.parametrize(
    "fault, place",
    [
        (other_tokens, "the values at embed differ"),
        (swapped, "the values at k.1 differ"),
        (rolled_heads, "the values at q.1 differ"),
        (gate_is_up, "the values at mlp_pre.1 differ"),
        (doubled_norm, "the values at final_norm differ"),
        (doubled_head, "the logits of the same last residual stream differ"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_other_weights_than_those_of_the_engine_raise(
    fault, place, unproved, model_folder, tmp_path, monkeypatch
):
    folder = shutil.copytree(model_folder, tmp_path / "faulty")
    weights = load_file(folder / "model.safetensors")
    if fault is doubled_head:
        weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"].clone())
        monkeypatch.setattr(unproved.config, "tie_word_embeddings", False)
    fault(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr(unproved.engine, "source", str(folder))
    for _ in range(2):
        with pytest.raises(hk.errors.Unsupported, match=place) as error:
            hk.generate(unproved, "Tea", max_new_tokens=1)
        assert "model_impl='vllm'" in str(error.value)


def rows_reversed(result):
    captures = [
        replace(kept, values=kept.values.flip(0), positions=kept.positions.flip(0))
        for kept in result.captures
    ]
    return replace(result, captures=captures)


def rows_exchanged(result):
    captures = []
    for kept in result.captures:
        order = torch.arange(len(kept.rows))
        order[-2:] = order[-2:].flip(0)  # rows of the same length, where there are edits
        captures.append(replace(kept, values=kept.values[order]))
    return replace(result, captures=captures)


def positions_shifted(result):
    captures = [replace(kept, values=kept.values.roll(1, 1)) for kept in result.captures]
    return replace(result, captures=captures)


def larger_logits(result):
    captures = []
    for kept in result.captures:
        factor = 4 if str(kept.site) == "logits" else 1
        captures.append(replace(kept, values=factor * kept.values))
    return replace(result, captures=captures)


def edits_forgotten(result):
    captures = []
    for kept in result.captures:
        values = kept.values
        if kept.name == "after":
            values = values.clone()
            values[3:, 1] = values[3:, 0]
        captures.append(replace(kept, values=values))
    return replace(result, captures=captures)


def other_token(result):
    rows = [[*row[:-1], (row[-1] + 1) % 7] for row in result.rows]
    return replace(result, rows=rows)


@needs_vllm
@pytest.mark.parametrize(
    "fault, place",
    [
        (rows_reversed, "gave 6 positions of row 0, which has 8 tokens"),
        (rows_exchanged, "the values at embed differ in row"),
        (positions_shifted, "the values at embed differ"),
        (larger_logits, "the logits of the same last residual stream differ"),
        (edits_forgotten, "after an edit at embed, the values after block 1 differ"),
        (other_token, "the tokens of row 0 are not those of the logits"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_faulty_answer_of_the_engine_raises(fault, place, unproved, monkeypatch):
    call = unproved.engine.call

    def faulty_call(name, value):
        answer = call(name, value)
        return fault(answer) if isinstance(answer, ServedResult) else answer

    monkeypatch.setattr(unproved.engine, "call", faulty_call)
    with pytest.raises(hk.errors.Unsupported, match=place):
        check_proved(unproved)


@needs_vllm
def test_a_window_longer_than_every_prompt_is_named(unproved, monkeypatch):
    monkeypatch.setattr(unproved.config, "sliding_window", 4096, raising=False)
    assert prove_engine(unproved).windows == (4096,)
    assert "4096 tokens" in " ".join(hk.doctor(unproved).notes)


@needs_vllm
def test_the_proof_leaves_random_numbers_and_messages_as_they_are(unproved, capfd):
    state = torch.random.get_rng_state()
    prove_engine(unproved)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert capfd.readouterr() == ("", "")


# ---- doctor


@needs_vllm
def test_doctor_compares_a_served_model_with_transformers(served):
    checkup = hk.doctor(served)
    assert checkup.healthy
    assert checkup.facts["dtype"] == "float32"
    assert checkup.facts["vllm"].startswith("0.32")
    sites = checkup.sites.set_index("site")
    for name in ("z", "logits"):
        assert sites.loc[name, "editable"] and sites.loc[name, "proved"]
    assert 0 < sites.loc["z", "difference"] < 5e-5
    assert "one kernel" in sites.loc["pattern", "why"]
    with pytest.raises(hk.errors.Unsupported, match="leave layers out"):
        hk.doctor(served, layers=[0])


@needs_vllm
def test_hookkit_doctor_ends_with_the_status_of_the_proof(unproved, monkeypatch):
    monkeypatch.setattr("hookkit.models.loading.load", lambda *names, **arguments: unproved)
    words = ["doctor", "tiny", "--engine", "vllm"]
    healthy = CliRunner().invoke(app, words)
    assert healthy.exit_code == 0, healthy.output
    assert "the transformers backend" in healthy.output
    call = unproved.engine.call
    monkeypatch.setattr(unproved.engine, "proof", None)
    monkeypatch.setattr(
        unproved.engine, "call", lambda name, value: larger_logits(call(name, value))
    )
    broken = CliRunner().invoke(app, [*words, "--json"])
    assert broken.exit_code == 1
    [problem] = json.loads(broken.stdout)["problems"]
    assert "logits" in problem and "by 3 of the largest value" in problem


@pytest.mark.parametrize(
    "words, message",
    [
        (["--engine", "ray"], "say vllm"),
        (["--engine-argument", "model_impl=vllm"], "add --engine vllm"),
    ],
)
def test_options_of_an_engine_are_checked_first(words, message):
    result = CliRunner().invoke(app, ["doctor", "tiny", *words])
    assert result.exit_code == 2
    assert message in result.output
