"""`hk.harvest` inside vLLM: the rows of hookkit on transformers, in the same order."""

import json

import pytest
import torch
from served_models import difference, needs_vllm, serve

import hookkit as hk
from hookkit.models.provenance import weights_hash

pytestmark = needs_vllm

TEXTS = [f"text {number} on {'tea and milk ' * (number % 5)}" for number in range(30)]
SITES = ["resid_post.1", "z.0"]
SETTINGS = {"batch_tokens": 150, "shard_size": 70, "progress": False, "context": 100}


@pytest.mark.parametrize("engine", ["served", "own_code", "narrow"])
@pytest.mark.parametrize("pos", [None, -1, slice(1, 4)])
def test_a_harvest_has_the_rows_of_transformers(pos, engine, reference, request, tmp_path):
    lm = request.getfixturevalue(engine)
    made = hk.harvest(lm, TEXTS, SITES, tmp_path / "vllm", pos=pos, **SETTINGS)
    expected = hk.harvest(reference, TEXTS, SITES, tmp_path / "plain", pos=pos, **SETTINGS)
    for column in ("text", "piece", "pos", "token"):
        assert torch.equal(made[column][:], expected[column][:])
    for site in SITES:
        assert difference(made[site][:], expected[site][:]) <= 1e-5
    made.verify()


def test_an_interrupted_harvest_continues(served, tmp_path):
    def some_texts():
        yield from TEXTS[:20]
        raise KeyboardInterrupt

    whole = hk.harvest(served, TEXTS, SITES, tmp_path / "whole", **SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        hk.harvest(served, some_texts(), SITES, tmp_path / "parts", **SETTINGS)
    assert 0 < len(hk.open_harvest(tmp_path / "parts")) < len(whole)
    parts = hk.harvest(served, TEXTS, SITES, tmp_path / "parts", **SETTINGS)
    assert torch.equal(parts["token"][:], whole["token"][:])
    assert difference(parts[SITES[0]][:], whole[SITES[0]][:]) <= 1e-5


def test_one_engine_does_not_continue_what_another_began(served, reference, own_code, tmp_path):
    hk.harvest(reference, TEXTS, SITES, tmp_path / "plain", **SETTINGS)
    with pytest.raises(hk.errors.HarvestChanged, match=r"engine\.name None there and 'vllm' now"):
        hk.harvest(served, TEXTS, SITES, tmp_path / "plain", **SETTINGS)
    hk.harvest(served, TEXTS, SITES, tmp_path / "vllm", **SETTINGS)
    with pytest.raises(hk.errors.HarvestChanged, match=r"engine\.name 'vllm' there and None now"):
        hk.harvest(reference, TEXTS, SITES, tmp_path / "vllm", **SETTINGS)
    with pytest.raises(hk.errors.HarvestChanged, match="model_impl 'transformers' there"):
        hk.harvest(own_code, TEXTS, SITES, tmp_path / "vllm", **SETTINGS)
    about = json.loads((tmp_path / "vllm" / "harvest.json").read_text())["model"]
    assert about["engine"]["name"] == "vllm"


def test_other_weights_are_another_harvest(served, model_folder, tmp_path):
    other_folder = tmp_path / "other"
    other = hk.load(model_folder, dtype="float32", device="cpu")
    with torch.no_grad():
        other.root.get_parameter("model.layers.0.mlp.down_proj.weight").mul_(2)
    other.save(other_folder)
    hk.harvest(served, TEXTS, SITES, tmp_path / "values", **SETTINGS)
    lm = serve(other_folder, max_num_seqs=4, kv_cache_memory_bytes=2**25)
    with pytest.raises(hk.errors.HarvestChanged, match="weights_sha256"):
        hk.harvest(lm, TEXTS, SITES, tmp_path / "values", **SETTINGS)
    lm.engine.close()


def test_a_vector_that_was_found_on_transformers_steers_in_the_engine(
    served, reference, own_code, tmp_path
):
    assert weights_hash(served) == weights_hash(own_code) == weights_hash(reference)
    [vector] = hk.mean_difference(reference, ["I love it"], ["I hate it"], "resid_post.1")
    path = vector.save(tmp_path / "vector.safetensors")
    loaded = hk.load_vector(served, path)
    run = hk.generate(served, TEXTS[:2], loaded.steer(dose=0.5), max_new_tokens=4)
    expected = hk.generate(reference, TEXTS[:2], vector.steer(dose=0.5), max_new_tokens=4)
    assert torch.equal(run.tokens, expected.tokens)


def test_texts_beyond_the_engine_are_split_at_what_it_reads(served, tmp_path):
    made = hk.harvest(
        served, ["tea " * 300], "z.0", tmp_path, long="split", batch_tokens=512, progress=False
    )
    assert int(made["pos"][:].max()) == served.context - 1
    assert int(made["piece"][:].max()) >= 2


def test_statistics_are_those_of_transformers(served, reference):
    tables = []
    for lm in (served, reference):
        statistics = hk.stats.activation_statistics(lm, TEXTS, SITES, progress=False)
        tables.append(statistics.table().select_dtypes("number"))
    largest = (tables[0] - tables[1]).abs().max().max()
    assert largest <= 1e-5 * tables[1].abs().max().max()


def test_actors_of_ray_do_not_hold_a_served_model(served, tmp_path):
    with pytest.raises(hk.errors.Unsupported, match=r"actors.*process of vLLM"):
        hk.harvest(served, TEXTS, SITES, tmp_path, engine="ray")
