"""Gemma Scope, dictionary_learning and sparsify: each file by its library's formula, in plain torch."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from dictionaries import encode, random_weights
from safetensors.torch import save_file

import hookkit as hk
from hookkit.errors import BadFile, BadHook, Unsupported

X = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))


def check(dictionary, features: torch.Tensor, decoded: torch.Tensor) -> None:
    torch.testing.assert_close(dictionary.encode(X), features, rtol=1e-6, atol=1e-6)
    actual = dictionary.decode(features, inputs=X)
    torch.testing.assert_close(actual, decoded, rtol=1e-6, atol=2e-6)


def test_gemma_scope_is_a_jumprelu_dictionary_without_a_place(tmp_path: Path):
    w = random_weights("jumprelu")
    np.savez(tmp_path / "params.npz", **{name: weight.numpy() for name, weight in w.items()})
    with pytest.raises(BadHook, match="with at="):
        hk.load_dictionary(tmp_path)
    features = encode(w, X, "jumprelu", centred=False)
    decoded = features @ w["W_dec"] + w["b_dec"]
    check(hk.load_dictionary(tmp_path, at="resid_post.1"), features, decoded)
    transcoder = hk.load_dictionary(tmp_path / "params.npz", at="mlp_out.1", reads="mlp_in.1")
    assert (str(transcoder.reads), transcoder.kind) == ("mlp_in.1", "jumprelu transcoder")
    check(transcoder, features, decoded)
    np.savez(tmp_path / "params.npz", W_enc=np.array([{}], dtype=object))
    with pytest.raises(BadFile, match="cannot be read as npz"):
        hk.load_dictionary(tmp_path, at="resid_post.1")


def write_learned(folder: Path, dict_class: str, tensors: dict, **settings) -> Path:
    trainer = {"dict_class": dict_class, "layer": 1, "lm_name": "tiny/llama", "lr": 1e-3}
    trainer |= {"submodule_name": "resid_post_layer_1", **settings}
    config = {"trainer": trainer, "buffer": {"io": "out", "ctx_len": 128}}
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(tensors, folder / "ae.pt")
    return folder


def linear(w: dict) -> dict[str, torch.Tensor]:
    """The names of torch's linear layers, whose weights have their output first."""
    named = {"encoder.weight": w["W_enc"].T.clone(), "decoder.weight": w["W_dec"].T.clone()}
    if "b_enc" in w:
        named["encoder.bias"] = w["b_enc"]
    return named


def learned_cases() -> dict[str, tuple]:
    plain, gated, jump = map(random_weights, ("standard", "gated", "jumprelu"))
    unit = plain | {"W_dec": torch.nn.functional.normalize(plain["W_dec"], dim=-1)}
    norms = plain["W_dec"].norm(dim=-1)
    relu, topk = encode(plain, X, "standard"), encode(plain, X, "topk")
    jumped = encode(jump | {"threshold": torch.tensor(0.2)}, X, "jumprelu")
    own = {"b_dec": plain["b_dec"]}
    gates = {"decoder_bias": "b_dec", "r_mag": "r_mag", "gate_bias": "b_gate", "mag_bias": "b_mag"}
    matryoshka = {name: jump[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    matryoshka |= {
        "threshold": torch.tensor(0.2),
        "k": torch.tensor(8),
        "group_sizes": torch.tensor([48, 48]),
    }
    return {
        # rows of other norms are moved into the features
        "AutoEncoder": (linear(plain) | {"bias": plain["b_dec"]}, relu * norms, plain),
        "AutoEncoder unit": (linear(unit) | {"bias": plain["b_dec"]}, relu, unit),
        "AutoEncoderNew": (
            linear(plain) | {"decoder.bias": plain["b_dec"]},
            encode(plain, X, "standard", centred=False),
            plain,
        ),
        "GatedAutoEncoder": (
            linear(gated) | {name: gated[key] for name, key in gates.items()},
            encode(gated, X, "gated"),
            gated,
        ),
        "AutoEncoderTopK": (
            linear(plain) | own | {"k": torch.tensor(8), "threshold": torch.tensor(0.3)},
            topk,
            plain,
        ),
        "BatchTopKSAE": (
            linear(jump) | {"b_dec": jump["b_dec"], "threshold": torch.tensor(0.2)},
            jumped,
            jump,
        ),
        "MatryoshkaBatchTopKSAE": (matryoshka, jumped, jump),
        "JumpReluAutoEncoder": (jump, encode(jump, X, "jumprelu", centred=False), jump),
    }


@pytest.mark.parametrize("case", learned_cases())
def test_every_class_of_dictionary_learning(tmp_path: Path, case: str):
    tensors, features, w = learned_cases()[case]
    settings = {"k": 8} if "TopK" in case else {}
    dictionary = hk.load_dictionary(write_learned(tmp_path, case.split()[0], tensors, **settings))
    assert (str(dictionary.site), dictionary.model_name) == ("resid_post.1", "tiny/llama")
    rows = w["W_dec"]
    if case == "AutoEncoder":
        rows = torch.nn.functional.normalize(rows, dim=-1)
    check(dictionary, features, features @ rows + w["b_dec"])


def test_a_folder_of_dictionary_learning_that_is_not_known_is_refused(tmp_path: Path):
    w = random_weights("standard")
    tensors = linear(w) | {"bias": w["b_dec"]}
    for settings, message, error in (
        ({"slope": 1}, "'slope'", BadFile),
        ({"dict_class": "CrossCoder"}, "CrossCoder", Unsupported),
        ({"submodule_name": "attention_layer1"}, "with at=", BadHook),
    ):
        with pytest.raises(error, match=message):
            hk.load_dictionary(
                write_learned(
                    tmp_path, **{"dict_class": "AutoEncoder", **settings}, tensors=tensors
                )
            )
    with pytest.raises(BadFile, match="'bias_2'"):
        hk.load_dictionary(write_learned(tmp_path, "AutoEncoder", tensors | {"bias_2": w["b_dec"]}))
    write_learned(tmp_path, "AutoEncoder", tensors)
    torch.save({"encoder.weight": Path("x")}, tmp_path / "ae.pt")
    with pytest.raises(BadFile, match=r"ae\.pt' cannot be read"):
        hk.load_dictionary(tmp_path)


@pytest.mark.parametrize(
    ("name", "transcode", "activation"),
    [("layers.1", False, "topk"), ("layers.1.mlp", True, "topk"), ("layers.1", False, "groupmax")],
)
def test_sparsify(tmp_path: Path, name: str, transcode: bool, activation: str):
    folder = tmp_path / name
    folder.mkdir()
    w = random_weights("skip" if transcode else "topk")
    cfg = {"activation": activation, "d_in": 32, "k": 8, "num_latents": 96, "transcode": transcode}
    cfg |= {
        "skip_connection": transcode,
        "normalize_decoder": True,
        "multi_topk": False,
        "expansion_factor": 3,
    }
    (folder / "cfg.json").write_text(json.dumps(cfg))
    tensors = {"encoder.weight": w["W_enc"].T.contiguous(), "encoder.bias": w["b_enc"]}
    tensors |= {key: w[key] for key in ("W_dec", "b_dec", "W_skip") if key in w}
    save_file(tensors, folder / "sae.safetensors")
    features = encode(w, X, "topk", centred=not transcode)
    if activation == "groupmax":
        before = (X - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
        groups = before.relu().unflatten(-1, (8, 12))
        features = torch.where(groups == groups.amax(-1, keepdim=True), groups, 0.0).flatten(-2)
    decoded = features @ w["W_dec"] + w["b_dec"]
    if transcode:
        decoded = decoded + X @ w["W_skip"].T
    dictionary = hk.load_dictionary(folder)
    places = ("mlp_in.1", "mlp_out.1") if transcode else ("resid_post.1", "resid_post.1")
    assert (str(dictionary.reads), str(dictionary.site)) == places
    check(dictionary, features, decoded)
    (folder / "cfg.json").write_text(json.dumps(cfg | {"signed": True}))
    with pytest.raises(Unsupported, match="signed=True"):
        hk.load_dictionary(folder)
    (folder / "cfg.json").write_text(json.dumps(cfg | {"slope": True}))
    with pytest.raises(BadFile, match="'slope'"):
        hk.load_dictionary(folder)
