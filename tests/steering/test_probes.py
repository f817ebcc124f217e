"""Probes against scikit-learn by hand and against values that plain transformers gives."""

import dataclasses
import json

import pytest
import torch

import hookkit as hk
from hookkit.errors import BadArgument, BadHook, NotCaptured, OtherModel
from hookkit.hooks import serialization

SITE, LAYER = "resid_post.1", 1


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models as small as these are slower with two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def probe() -> hk.types.Probe:
    direction = torch.randn(32, generator=torch.Generator().manual_seed(3))
    return hk.types.Probe(SITE, direction, bias=-0.5, norm=2.0, about={"labels": ["no", "yes"]})


def values_by_hand(lm, ids):
    """The values at the site, [pos, d], with transformers alone."""
    kept = []
    block = lm.model.model.layers[LAYER]
    handle = block.register_forward_hook(lambda module, args, output: kept.append(output))
    with torch.no_grad():
        lm.model(torch.tensor([ids]))
    handle.remove()
    return (kept[0][0] if isinstance(kept[0], tuple) else kept[0])[0]


# ---- the value


def test_a_probe_reads_each_token_of_a_prompt_and_of_what_the_model_writes(llama, probe):
    prompts = ["I like oat milk in my", "Tea"]
    run = hk.generate(llama, prompts, hk.capture(SITE), max_new_tokens=4, do_sample=False)
    table = probe.read(run)
    assert list(table) == ["row", "pos", "token", "token_id", "generated", "logit", "score"]
    for row, length in enumerate(run.lengths):
        ids = run.tokens[row, :length].tolist()
        logits = values_by_hand(llama, ids) @ probe.direction.tensor - 0.5
        of_row = table[table["row"] == row].reset_index(drop=True)
        assert list(of_row["pos"]) == list(range(length - 1))  # the last token is never read
        assert list(of_row["token_id"]) == ids[:-1]
        assert list(of_row["token"]) == [llama.string(token) for token in ids[:-1]]
        assert list(of_row["generated"]) == (of_row["pos"] >= run.prompt_lengths[row]).tolist()
        assert torch.allclose(torch.tensor(of_row["logit"]), logits[:-1].double(), atol=1e-5)
        scores = torch.tensor(of_row["score"])
        assert torch.allclose(scores, logits[:-1].double().sigmoid(), atol=1e-5)


def test_a_probe_reads_several_texts_of_one_prompt_and_some_positions_of_some_rows(llama, probe):
    settings = {"num_return_sequences": 3, "do_sample": True, "max_new_tokens": 3, "seed": 1}
    run = hk.generate(llama, ["Tea", "I like"], hk.capture(SITE), **settings)
    table = probe.read(run)
    assert sorted(set(table["row"])) == list(range(6))
    for row in range(6):
        ids = run.tokens[row, : run.lengths[row]].tolist()
        assert table.query(f"row == {row}")["token_id"].tolist() == ids[:-1]
    some = hk.forward(llama, ["Tea", "I like", "We"], hk.capture(SITE, pos=-1, rows=[2, 1]))
    table = probe.read(some)
    assert table["row"].tolist() == [1, 2]
    assert table["pos"].tolist() == [some.lengths[1] - 1, some.lengths[2] - 1]


def test_the_vector_of_a_probe_steers_and_is_projected_out(llama, probe):
    vector = probe.vector
    assert torch.equal(vector.tensor, probe.direction.tensor) and vector.site == probe.site
    before = hk.forward(llama, "I like", hk.capture(SITE))
    steered = hk.forward(llama, "I like", vector.steer(dose=0.5), hk.capture(SITE))
    rise = probe.read(steered)["logit"] - probe.read(before)["logit"]
    assert rise.to_numpy() == pytest.approx(0.5 * 2.0 * vector.length, rel=1e-4)
    without = hk.project_out(SITE, vector.tensor)
    table = probe.read(hk.forward(llama, "I like", without, hk.capture(SITE)))
    assert table["logit"].to_numpy() == pytest.approx(-0.5, abs=1e-5)


def test_a_saved_probe_is_read_back_equal_and_only_for_its_own_model(llama, gpt2, probe, tmp_path):
    about = {**hk.mean_difference(llama, ["a"], ["b"], SITE)[0].about, **probe.about}
    probe = dataclasses.replace(probe, about=about)
    path = probe.save(tmp_path / "probe.safetensors")
    loaded = hk.load_probe(llama, path)
    assert loaded == probe and hash(loaded) == hash(probe) and loaded.about == about
    with pytest.raises(OtherModel, match="the probe was made with"):
        hk.load_probe(gpt2, path)
    assert hk.load_probe(gpt2, path, any_model=True) == probe
    narrow = dataclasses.replace(probe, direction=torch.ones(7))
    with pytest.raises(BadHook, match="reads 7 numbers"):
        hk.load_probe(llama, narrow.save(tmp_path / "narrow.safetensors"))
    with pytest.raises(BadHook, match="has no probe"):
        hk.load_probe(llama, probe.vector.save(tmp_path / "vector.safetensors"))


def test_a_probe_inside_a_hook_is_written_as_json_and_read_back_equal(probe):
    text = json.dumps(serialization._encode(probe, "inline"))
    assert serialization._decode(json.loads(text)) == probe


def test_what_a_probe_cannot_read_is_refused(llama, probe):
    with pytest.raises(NotCaptured, match="resid_post.1"):
        probe.read(hk.forward(llama, "Tea", hk.capture("resid_post.0")))
    with pytest.raises(BadHook, match="reads"):
        probe.score(torch.zeros(3, 31))
    with pytest.raises(BadArgument, match="a run"):
        probe.read(llama)
