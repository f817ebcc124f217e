"""Dictionaries: what their files say is what they compute, and what is not known is refused."""

import json
from pathlib import Path

import pytest
import torch
from dictionaries import HOOK, encode, random_weights, write
from safetensors import safe_open

import hookkit as hk
from hookkit.errors import (
    BadFile,
    BadHook,
    MissingSite,
    ModelNotFound,
    OtherModel,
    OutOfRange,
    Unsupported,
)

IDS = [(5, 6, 7, 8, 9), (10, 11, 12)]
# Written by SAELens 6.54.12 with random numbers, and what it encodes and decodes with them.
SAE_LENS = Path(__file__).with_name("sae_lens_dictionaries.safetensors")


@pytest.fixture(scope="module")
def lm() -> hk.LM:
    return hk.tiny("llama")


def sae_lens_cases() -> dict[str, dict]:
    with safe_open(SAE_LENS, "pt") as file:
        return json.loads(file.metadata()["cfgs"])


@pytest.mark.parametrize("case", sae_lens_cases())
def test_every_architecture_computes_what_sae_lens_does(case: str, tmp_path: Path):
    cfg, parts = sae_lens_cases()[case], {"weights": {}, "expected": {}}
    with safe_open(SAE_LENS, "pt") as file:
        for name in file.keys():  # noqa: SIM118  the file is no dict
            owner, part, tensor = name.split("/")
            if owner == case:
                parts[part][tensor] = file.get_tensor(name)
    folder = write(tmp_path, weights=parts["weights"], k=None, rescale_acts_by_decoder_norm=None)
    (folder / "cfg.json").write_text(json.dumps(cfg))
    dictionary, expected = hk.load_dictionary(folder), parts["expected"]
    features = dictionary.encode(expected["x"])
    decoded = dictionary.decode(features, inputs=expected["x"])
    torch.testing.assert_close(features, expected["features"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(decoded, expected["decoded"], rtol=1e-6, atol=1e-6)
    one = dictionary.encode(expected["x"], features=[3])
    torch.testing.assert_close(one, expected["features"][..., [3]], rtol=1e-6, atol=1e-6)


def test_the_norm_that_sae_lens_had_before_is_undone_after_decoding(tmp_path: Path):
    weights = random_weights("standard")
    cfg = {
        "hook_point": HOOK,
        "activation_fn_str": "relu",
        "metadata": None,
        "apply_b_dec_to_input": None,
        "l1_coefficient": 3.0,
    }
    folder = write(
        tmp_path, "standard", weights, normalize_activations="constant_norm_rescale", **cfg
    )
    dictionary, x = hk.load_dictionary(folder), torch.randn(2, 5, 32)
    factor = 32**0.5 / x.norm(dim=-1, keepdim=True)
    features = encode(weights, x * factor, "standard")
    decoded = (features @ weights["W_dec"] + weights["b_dec"]) / factor
    torch.testing.assert_close(dictionary.encode(x), features)
    torch.testing.assert_close(dictionary.decode(features, inputs=x), decoded)
    with pytest.raises(BadHook, match="inputs=values"):
        dictionary.decode(features)


def test_a_scaling_factor_from_finetuning_multiplies_the_features(tmp_path: Path):
    weights = random_weights("standard")
    scaled = weights | {"scaling_factor": torch.linspace(0.5, 2, 96)}
    folder = write(tmp_path, "standard", scaled, finetuning_scaling_factor=True)
    dictionary, features = hk.load_dictionary(folder), torch.rand(3, 96)
    expected = (features * scaled["scaling_factor"]) @ weights["W_dec"] + weights["b_dec"]
    torch.testing.assert_close(dictionary.decode(features), expected)
    write(tmp_path, "standard", scaled)
    with pytest.raises(BadFile, match="finetuning_scaling_factor"):
        hk.load_dictionary(folder)


@pytest.mark.parametrize(
    ("settings", "message", "error"),
    [
        ({"whitening": 2}, "'whitening'", BadFile),
        ({"activation_fn_kwargs": {"slope": 2}}, "'slope'", BadFile),
        ({"normalize_activations": "covariance_whitening"}, "covariance_whitening", Unsupported),
        ({"architecture": "temporal"}, "temporal", Unsupported),
        ({"activation_fn": "tanh-relu"}, "tanh-relu", Unsupported),
        ({"k": 97}, "k=97", BadFile),
        ({"apply_b_dec_to_input": "no"}, "apply_b_dec_to_input", BadFile),
        ({"metadata": {"hook_name": "blocks.1.ln2.hook_normalized"}}, "no site here", BadHook),
        ({"metadata": {}}, "does not name its site", BadHook),
    ],
)
def test_a_setting_that_is_not_known_is_refused_by_name(tmp_path: Path, settings, message, error):
    with pytest.raises(error, match=message):
        hk.load_dictionary(write(tmp_path, **settings))


def test_a_tensor_that_does_not_belong_there_is_refused_by_name(tmp_path: Path):
    weights = random_weights("topk")
    with pytest.raises(BadFile, match="'b_gate'"):
        hk.load_dictionary(write(tmp_path, weights=weights | {"b_gate": torch.zeros(96)}))
    with pytest.raises(BadFile, match=r"b_enc .*\[95\]"):
        hk.load_dictionary(write(tmp_path, weights=weights | {"b_enc": torch.zeros(95)}))
    with pytest.raises(BadFile, match="has no threshold"):
        hk.load_dictionary(write(tmp_path, "jumprelu", weights))
    with pytest.raises(BadFile, match="infinite or NaN"):
        hk.load_dictionary(
            write(tmp_path, weights=weights | {"b_enc": torch.full((96,), torch.nan)})
        )


def test_the_place_in_the_file_and_the_argument_have_to_agree(tmp_path: Path):
    folder = write(tmp_path)
    assert str(hk.load_dictionary(folder, at="resid_post.1").site) == "resid_post.1"
    with pytest.raises(BadHook, match="which is resid_post.1"):
        hk.load_dictionary(folder, at="resid_post.2")
    with pytest.raises(BadHook, match="is no transcoder"):
        hk.load_dictionary(folder, reads="mlp_in.1")
    with pytest.raises(BadHook, match="one site in one block"):
        hk.load_dictionary(write(tmp_path, metadata={}), at="logits")
    other = write(tmp_path, metadata={"hook_name": "blocks.1.ln2.hook_normalized"})
    assert str(hk.load_dictionary(other, at="mlp_in.1").site) == "mlp_in.1"
    with pytest.raises(ModelNotFound, match="no folder"):
        hk.load_dictionary(tmp_path / "nothing")
    with pytest.raises(BadFile, match=r"sae_weights\.safetensors"):
        (tmp_path / "empty").mkdir()
        hk.load_dictionary(tmp_path / "empty")


def test_an_object_of_sae_lens_is_read_without_the_library(tmp_path: Path):
    folder = write(tmp_path)
    cfg = json.loads((folder / "cfg.json").read_text())

    class Sae(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.cfg = type("Cfg", (), {"to_dict": lambda self: cfg})()
            for name, weight in random_weights("topk").items():
                self.register_parameter(name, torch.nn.Parameter(weight))

    dictionary = hk.load_dictionary(Sae())
    assert dictionary == hk.load_dictionary(folder)
    assert dictionary != hk.load_dictionary(write(tmp_path, k=9))
    assert not any(weight.requires_grad for weight in dictionary.weights.values())


def planted(lm: hk.LM) -> dict[str, torch.Tensor]:
    """A dictionary that describes a model: the directions of its values, and their opposites."""
    ids = [tuple(number * 7 % 320 for number in range(1, 65))]
    values = hk.forward(lm, ids, hk.capture("resid_post.1", pos=slice(1, None)))["resid_post.1"][0]
    directions = torch.linalg.svd(values - values.mean(0), full_matrices=False).Vh
    both = torch.cat([directions, -directions])
    shift = 20 * torch.ones(32)
    return {
        "W_enc": both.T.contiguous(),
        "W_dec": both,
        "b_dec": shift,
        "b_enc": both @ (shift - values.mean(0)) - 0.05,
    }


def test_a_dictionary_is_tried_on_the_model_and_a_setting_read_wrongly_shows(lm, tmp_path: Path):
    weights = planted(lm)
    # The decoder's bias is that of the values; the encoder's takes the difference back.
    mean = (weights["b_enc"] + 0.05) @ weights["W_dec"] / 2
    weights["b_dec"] = weights["b_dec"] - mean
    weights["b_enc"] = torch.full((64,), -0.05)
    folder = write(tmp_path, "standard", weights)
    fits = lm.with_dictionaries(hk.load_dictionary(folder))
    assert [str(site) for site in fits.sites["feat.resid_post"]] == ["feat.resid_post.1"]
    wrong = hk.load_dictionary(
        write(
            tmp_path,
            "standard",
            weights,
            normalize_activations="layer_norm",
            apply_b_dec_to_input=False,
        )
    )
    with pytest.raises(OtherModel, match=r"\d+\.\d features \(\d+\.\d%\).*unexplained is \d"):
        lm.with_dictionaries(wrong)
    dead = weights | {"b_enc": torch.full((64,), -1e4)}
    with pytest.raises(OtherModel, match=r"0\.0 features"):
        lm.with_dictionaries(hk.load_dictionary(write(tmp_path, "standard", dead)))
    assert lm.with_dictionaries(wrong, check=False).dictionaries == (wrong,)


def test_a_dictionary_of_another_model_or_width_is_refused(lm, tmp_path: Path):
    folder = write(tmp_path, metadata={"hook_name": HOOK, "model_name": "gpt2-small"})
    with pytest.raises(OtherModel, match="'gpt2-small'"):
        lm.with_dictionaries(hk.load_dictionary(folder))
    narrow = hk.load_dictionary(write(tmp_path, weights=random_weights("topk", d=16)))
    with pytest.raises(OtherModel, match="16 numbers at resid_post.1, and this model has 32"):
        lm.with_dictionaries(narrow, check=False)
    deep = hk.load_dictionary(write(tmp_path, metadata={}), at="resid_post.9")
    with pytest.raises(OutOfRange, match="3 layers"):
        lm.with_dictionaries(deep, check=False)
    dictionary = hk.load_dictionary(write(tmp_path))
    with pytest.raises(BadHook, match="one for each site"):
        lm.with_dictionaries(dictionary, dictionary, check=False)
    with pytest.raises(BadHook, match="load_dictionary"):
        lm.with_dictionaries(str(folder))
    with pytest.raises(MissingSite, match=r"has none.*at='resid_post.1'"):
        hk.forward(lm, IDS, hk.capture("feat.resid_post.1"))
    with pytest.raises(OutOfRange, match="0 to 95"):
        hk.forward(
            lm.with_dictionaries(dictionary, check=False), IDS, hk.capture("feat.resid_post.1.96")
        )
