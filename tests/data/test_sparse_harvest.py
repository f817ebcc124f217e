"""A harvest of a dictionary's features: the active ones of each token, as a loop over forwards has them."""

import os
import subprocess
import sys
from pathlib import Path

import killing
import pytest
import torch
from dictionaries import encode, random_weights, write
from killing import texts
from safetensors.torch import load_file, save_file

import hookkit as hk
from hookkit.errors import BadHook, DamagedHarvest, HarvestChanged, OutOfRange

SITE = "feat.resid_post.1"
SETTINGS = {"batch_tokens": 64, "shard_size": 60, "progress": False}


@pytest.fixture(scope="module")
def dictionary(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("sae"), "topk")


@pytest.fixture(scope="module")
def lm(dictionary) -> hk.LM:
    return hk.tiny("llama").with_dictionaries(hk.load_dictionary(dictionary), check=False)


@pytest.fixture(scope="module")
def made(lm, tmp_path_factory) -> hk.types.Harvest:
    sites = [SITE, "resid_post.1", f"{SITE}.7"]
    return hk.harvest(lm, texts(), sites, tmp_path_factory.mktemp("harvest"), **SETTINGS)


@pytest.fixture(scope="module")
def dense(lm) -> torch.Tensor:
    """All features of every token, by the formula, from plain transformers with a hook."""
    states = []
    layer = lm.model.model.layers[1]
    handle = layer.register_forward_hook(lambda _m, _a, output: states.append(output))
    with torch.no_grad():
        for ids in texts():
            lm.model(torch.tensor([ids]))
    handle.remove()
    parts = [state[0] if isinstance(state, tuple) else state for state in states]
    return encode(
        random_weights("topk"), torch.cat([part.flatten(0, -2) for part in parts]), "topk"
    )


def test_the_active_features_of_every_token_are_those_of_a_loop_over_forwards(made, dense, lm):
    column = made[SITE]
    rows = column[:]
    assert rows.is_sparse and rows.shape == column.shape == (len(dense), 96)
    assert (rows.to_dense() - dense).abs().max() < 1e-5 * dense.abs().max()
    assert rows.values().numel() == int((dense != 0).sum()) and len(made.shards) > 20
    token, feature = rows.indices()
    assert (dense[token, feature] - rows.values()).abs().max() < 1e-4
    looped = []
    for ids in texts()[:40]:
        looped.append(hk.forward(lm, [ids], hk.capture(SITE))[SITE][0])
    start = torch.cat(looped)
    assert torch.allclose(column[: len(start)].to_dense(), start, atol=1e-4)


def test_rows_are_read_by_number_in_any_order_and_one_feature_is_dense(made, dense):
    numbers = [700, 3, 3, -1, 61, 0]
    assert torch.allclose(made[SITE][numbers].to_dense(), dense[numbers], atol=1e-4)
    assert torch.allclose(made[SITE][17].to_dense(), dense[17], atol=1e-4)
    assert made[SITE][5:5].shape == (0, 96)
    seven = made[f"{SITE}.7"]
    assert torch.allclose(seven[:], dense[:, 7], atol=1e-4)
    one = made[f"{SITE}.9"]
    assert torch.allclose(one[numbers], dense[numbers, 9], atol=1e-4) and one[3].shape == ()
    table = made.table(slice(0, 30), sites=[f"{SITE}.9"])
    assert table[f"{SITE}.9"].tolist() == pytest.approx(dense[:30, 9].tolist(), abs=1e-4)
    total = 0
    for batch in made.batches(100, sites=[SITE, "resid_post.1"], seed=0):
        expected = encode(random_weights("topk"), batch["resid_post.1"], "topk")
        assert (batch[SITE].to_dense() - expected).abs().max() < 1e-4
        total += len(batch["pos"])
    assert total == len(dense)


def test_statistics_of_a_sparse_harvest_are_those_of_the_dense_values(made, dense, monkeypatch):
    monkeypatch.setattr("hookkit.data.harvest.harvest.CHUNK_NUMBERS", 96 * 50)
    statistics = made.statistics(SITE, top=2)[SITE]
    assert torch.allclose(statistics.mean.float(), dense.mean(0), atol=1e-4)
    best = statistics.top(7)["value"]
    assert best.tolist() == pytest.approx(dense[:, 7].topk(2).values.tolist(), abs=1e-4)


def test_a_gap_in_the_positions_and_another_dtype(lm, dense, tmp_path):
    rows = [row for ids in texts() for row in range(len(ids))]
    made = hk.harvest(lm, texts(), SITE, tmp_path, pos=slice(1, None), dtype="float16", **SETTINGS)
    later = dense[[number for number, pos in enumerate(rows) if pos]]
    values = made[SITE][:]
    assert values.dtype == torch.float16
    assert (values.to_dense().float() - later).abs().max() < 2e-3 * later.abs().max()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_sparse_harvest_killed_five_times_is_the_undisturbed_one_byte_for_byte(
    dictionary, tmp_path
):
    words = [sys.executable, killing.__file__, str(tmp_path), "0", "5", str(dictionary)]
    ran = subprocess.run(words, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    undisturbed = {path.name: path.read_bytes() for path in (tmp_path / "undisturbed").iterdir()}
    killed = {path.name: path.read_bytes() for path in (tmp_path / "killed").iterdir()}
    assert killed == undisturbed and len(undisturbed) > 20
    assert hk.open_harvest(tmp_path / "killed")[SITE].shape[1] == 96


def test_another_dictionary_does_not_continue_a_harvest(made, tmp_path):
    other = write(tmp_path, "topk", random_weights("topk", seed=1))
    lm = hk.tiny("llama").with_dictionaries(hk.load_dictionary(other), check=False)
    sites = [SITE, "resid_post.1", f"{SITE}.7"]
    with pytest.raises(HarvestChanged, match="sha256"):
        hk.harvest(lm, texts(), sites, made.shards.folder, **SETTINGS)


def test_what_a_sparse_column_cannot_do_is_refused(made):
    with pytest.raises(OutOfRange, match="96 features"):
        made[f"{SITE}.96"]
    with pytest.raises(BadHook, match="name features"):
        made.table(slice(2), sites=[SITE])


@pytest.mark.parametrize("change", ["features", "starts", "missing"])
def test_a_shard_whose_sparse_tensors_do_not_fit_is_refused(lm, tmp_path, change):
    made = hk.harvest(lm, texts()[:5], SITE, tmp_path, progress=False)
    path = tmp_path / made.shards.all[0].file
    tensors = load_file(path)
    if change == "missing":
        del tensors[f"{SITE}/starts"]
    else:
        tensors[f"{SITE}/{change}"][-1] += 1000
    save_file(tensors, path)
    with pytest.raises(DamagedHarvest, match=r"verify\(\)"):
        hk.open_harvest(tmp_path)[SITE][:]
