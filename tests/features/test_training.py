"""Training: planted features are recovered, a killed training continues, and what is saved is loaded."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from dictionaries import encode
from safetensors.torch import load_file

import hookkit as hk
from hookkit.errors import (
    BadHook,
    HarvestChanged,
    ModelNotFound,
    NotCaptured,
    OtherModel,
    TooFew,
    Unsupported,
)
from hookkit.features import training
from hookkit.features.dictionary_files import default_dictionary_folder

N_PLANTED = 48
TEXTS = [[(text * 7 + pos * 13) % 318 + 2 for pos in range(33)] for text in range(80)]


@pytest.fixture(scope="module")
def lm() -> hk.LM:
    return hk.tiny("llama")


@pytest.fixture(scope="module")
def harvest(lm, tmp_path_factory) -> hk.types.Harvest:
    folder = tmp_path_factory.mktemp("harvest")
    return hk.harvest(lm, TEXTS, "resid_post.1", folder, progress=False)


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> tuple[hk.LM, hk.types.Harvest, torch.Tensor]:
    """A model whose embeddings are sums of three of 48 directions, and a harvest of them."""
    lm = hk.tiny("llama", config={"vocab_size": 6000})
    draws = torch.Generator().manual_seed(0)
    directions = torch.randn(N_PLANTED, 32, generator=draws)
    directions /= directions.norm(dim=-1, keepdim=True)
    chosen = torch.rand(6000, N_PLANTED, generator=draws).topk(3).indices
    amounts = 1 + torch.rand(6000, 3, generator=draws)
    with torch.no_grad():
        embeddings = torch.zeros(6000, N_PLANTED).scatter(1, chosen, amounts) @ directions + 0.5
        lm.model.model.embed_tokens.weight.copy_(embeddings)
    texts = torch.randperm(6000, generator=draws).view(60, 100).tolist()
    folder = tmp_path_factory.mktemp("planted")
    return lm, hk.harvest(lm, texts, "resid_pre.0", folder, progress=False), directions


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_the_features_that_were_planted_are_found(planted, architecture, tmp_path: Path):
    lm, harvest, directions = planted
    dictionary = hk.train_dictionary(
        lm,
        harvest,
        out=tmp_path,
        features=64,
        k=3,
        architecture=architecture,
        epochs=30,
        batch_size=128,
        progress=False,
    )
    similarity = directions @ dictionary.weights["W_dec"].T
    best = similarity.max(dim=-1).values
    assert (best > 0.9).float().mean() >= 0.9, best.sort().values[:5]
    values = harvest["resid_pre.0"][:]
    features = dictionary.encode(values)
    error = (values - dictionary.decode(features)).square().sum()
    assert error / (values - values.mean(0)).square().sum() < 0.1
    assert (features > 0).sum(-1).float().mean() == pytest.approx(3, abs=0.2)


def test_dead_features_come_back_to_life(planted, tmp_path: Path, monkeypatch):
    _, harvest, _ = planted
    rows = training.read_training_rows(harvest, hk.Site("resid_pre", 0))
    settings = training.TrainingSettings("topk", 64, 3, 15, 128, 3e-3, 0)
    alive = {}
    for weight in (0.0, 1 / 32):
        monkeypatch.setattr(training, "AUXILIARY", weight)
        trainer = training._Trainer(rows, settings, tmp_path / str(weight), {})
        with torch.no_grad():
            trainer.weights["W_enc"][:, :32] *= 0.01  # never among the three largest
        trainer.run(progress=False)
        alive[weight] = int((trainer.silent[:32] < training.DEAD_AFTER).sum())
    assert alive[0.0] == 0, "without the loss of dead features nothing changes them"
    assert alive[1 / 32] >= 8, alive


def test_a_step_is_that_of_the_formulas(planted, tmp_path: Path):
    _, harvest, _ = planted
    rows = training.read_training_rows(harvest, hk.Site("resid_pre", 0))
    settings = training.TrainingSettings("topk", 64, 3, 10, 128, 3e-3, 0)
    trainer = training._Trainer(rows, settings, tmp_path / "none", {})
    trainer.silent[:20] = training.DEAD_AFTER
    with torch.no_grad():
        trainer.weights["W_enc"][:, :20] *= 0.01  # never among the three largest
    w = {name: weight.detach().clone() for name, weight in trainer.weights.items()}
    for weight in w.values():
        weight.requires_grad_()
    x = rows.read(torch.arange(128)) * trainer.scale
    before = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    third = before.sort(dim=-1, descending=True).values[:, 2:3]
    features = torch.where(before >= third, before.clamp(min=0), 0.0)
    error = x - (features @ w["W_dec"] + w["b_dec"])
    loss = error.square().sum() / (x - x.mean(0)).square().sum()
    assert not (features[:, :20] > 0).any()
    dead, directions = before[:, :20], w["W_dec"][:20]
    sixteenth = dead.sort(dim=-1, descending=True).values[:, :16][:, -1:]
    kept = torch.where(dead >= sixteenth, dead.clamp(min=0), 0.0)
    target = error.detach()
    left = (target - kept @ directions).square().sum() / (target - target.mean(0)).square().sum()
    (loss + left / 32).backward()
    with torch.enable_grad():
        assert trainer._train(x) == pytest.approx(float(loss.detach()), rel=1e-5)
    for name in ("W_enc", "b_enc", "b_dec"):
        torch.testing.assert_close(trainer.weights[name].grad, w[name].grad, rtol=1e-4, atol=1e-6)
    along = (w["W_dec"].grad * w["W_dec"]).sum(-1, keepdim=True) * w["W_dec"]
    torch.testing.assert_close(
        trainer.weights["W_dec"].grad, (w["W_dec"].grad - along).detach(), rtol=1e-4, atol=1e-6
    )
    assert torch.allclose(trainer.weights["W_dec"].norm(dim=-1), torch.ones(64))


KILLED = """
import sys, torch
import hookkit as hk
from hookkit.features import training
torch.set_num_threads(int(sys.argv[3]))
training.CHECKPOINT_STEPS = 7
made = hk.open_harvest(sys.argv[1])
hk.train_dictionary(hk.tiny("llama"), made, out=sys.argv[2], k=4, epochs=60, batch_size=64, progress=False)
"""


def test_a_training_that_was_killed_continues_and_gives_the_same_numbers(
    lm, harvest, tmp_path: Path, monkeypatch
):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    words = [str(harvest.shards.folder), str(killed), str(torch.get_num_threads())]
    with subprocess.Popen([sys.executable, "-c", KILLED, *words]) as child:
        started = time.monotonic()
        while not (killed / training.CHECKPOINT).is_file():
            assert child.poll() is None and time.monotonic() - started < 60
        child.send_signal(signal.SIGKILL)
    assert not (killed / "cfg.json").exists(), "it was killed before its end"
    settings = {"k": 4, "epochs": 60, "batch_size": 64, "progress": False}
    with pytest.raises(HarvestChanged, match="k 4 there and 5 now"):
        hk.train_dictionary(lm, harvest, out=killed, **{**settings, "k": 5})
    continued = hk.train_dictionary(lm, harvest, out=killed, **settings)
    assert continued == hk.train_dictionary(lm, harvest, out=whole, **settings)
    names = ["cfg.json", "sae_weights.safetensors"]
    assert sorted(path.name for path in killed.iterdir()) == names
    for name in names:
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    again = hk.train_dictionary(lm, harvest, out=killed, **settings)
    assert again == continued, "a finished training is read, and not done again"


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_what_is_saved_is_what_sae_lens_reads(lm, harvest, architecture, tmp_path: Path):
    settings = {"k": 8, "epochs": 2, "batch_size": 256, "architecture": architecture}
    dictionary = hk.train_dictionary(lm, harvest, out=tmp_path, progress=False, **settings)
    weights = load_file(tmp_path / "sae_weights.safetensors")
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    kind = {"topk": "topk", "batchtopk": "jumprelu"}[architecture]
    assert (cfg["architecture"], cfg["d_in"], cfg["d_sae"]) == (kind, 32, 128)
    assert cfg["metadata"]["hook_name"] == "blocks.1.hook_resid_post"
    assert cfg["metadata"]["training"]["k"] == 8 and cfg["metadata"]["model_name"] == "tiny llama"
    values = harvest["resid_post.1"][:500]
    expected = encode(weights, values, kind)
    torch.testing.assert_close(dictionary.encode(values), expected)
    for name, weight in weights.items():
        assert torch.equal(weight, dictionary.weights[name]), name
    torch.testing.assert_close(weights["W_dec"].norm(dim=-1), torch.ones(128))
    assert lm.with_dictionaries(dictionary).dictionaries == (dictionary,)


def test_a_threshold_keeps_as_many_features_as_training_did(lm, harvest, tmp_path: Path):
    settings = {"k": 6, "epochs": 20, "batch_size": 256, "architecture": "batchtopk"}
    dictionary = hk.train_dictionary(lm, harvest, out=tmp_path, progress=False, **settings)
    active = (dictionary.encode(harvest["resid_post.1"][:]) > 0).sum(-1).float()
    assert active.mean() == pytest.approx(6, rel=0.1) and active.std() > 0.5


def test_first_positions_and_outliers_are_left_out(lm, tmp_path: Path):
    loud = hk.tiny("llama")
    with torch.no_grad():
        loud.model.model.embed_tokens.weight[7] *= 1000
    texts = [[5, *range(8, 40)], [6, 7, *range(8, 40)], [8, 9, 10, 7]]
    made = hk.harvest(loud, texts, "resid_pre.0", tmp_path / "harvest", progress=False)
    rows = training.read_training_rows(made, hk.Site("resid_pre", 0))
    tokens = made["token"][:][rows.numbers].tolist()
    assert tokens == [*range(8, 40), *range(8, 40), 9, 10] and rows.left_out == 5


def test_a_training_that_is_impossible_says_why(lm, harvest, tmp_path: Path):
    def train(**settings):
        words = {"out": tmp_path / "out", "progress": False, "batch_size": 64, "epochs": 1}
        return hk.train_dictionary(
            settings.pop("lm", lm), settings.pop("harvest", harvest), **{**words, **settings}
        )

    two = hk.harvest(lm, TEXTS[:4], ["attn_in.1", "embed"], tmp_path / "two", progress=False)
    with pytest.raises(OtherModel, match="harvest this one"):
        train(lm=hk.tiny("llama", seed=1))
    with pytest.raises(NotCaptured, match="was not harvested"):
        train(site="resid_post.2")
    with pytest.raises(BadHook, match="site="):
        train(harvest=two)
    with pytest.raises(BadHook, match="one site in one block"):
        train(harvest=two, site="embed")
    with pytest.raises(Unsupported, match="no name in SAELens"):
        train(harvest=two, site="attn_in.1")
    with pytest.raises(TooFew, match="smaller batch_size"):
        train(batch_size=10_000)
    with pytest.raises(BadHook, match="at most 128"):
        train(k=129)
    with pytest.raises(BadHook, match="learning_rate"):
        train(learning_rate=0.0)
    with pytest.raises(BadHook, match="batchtopk"):
        train(architecture="relu")
    assert not (tmp_path / "out" / "cfg.json").exists()


def test_without_the_default_dictionary_the_command_that_makes_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HOOKKIT_CACHE", str(tmp_path))
    with pytest.raises(ModelNotFound, match="`hookkit dictionary`"):
        hk.load_dictionary()


@pytest.mark.slow
def test_the_default_dictionary_describes_the_default_model(smol):
    folder = default_dictionary_folder()
    if not (folder / training.QUALITY).is_file():
        pytest.skip("`hookkit dictionary` was not run on this machine")
    dictionary = hk.load_dictionary()
    assert str(dictionary.site) == "resid_post.12"
    smol.with_dictionaries(dictionary)
    texts = hk.datasets.labelled("97_news_class", 40, seed=9)["text"].tolist()
    table = dictionary.quality(smol, texts, context=128).set_index("measure")["value"]
    assert table["l0"] <= 40 and table["loss_recovered"] >= 0.95 and table["fvu"] < 0.35
