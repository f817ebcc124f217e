"""Dictionaries in other formats: Gemma Scope's params.npz, dictionary_learning and sparsify."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..arguments import describe
from ..errors import BadFile, Unsupported
from ..files.untrusted import check_mapping, error_message, read_json, read_tensors
from .dictionary import Activation
from .dictionary_parts import DictionaryParts, refuse_unknown

# ---- Gemma Scope (Lieberum et al. 2024)

NPZ = "params.npz"
NPZ_NAMES = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")


def read_npz(folder: Path, *, transcoder: bool) -> DictionaryParts:
    """Returns the parts of a JumpReLU dictionary in Gemma Scope's format, which names no site."""
    import numpy as np

    path = folder / NPZ
    try:
        with np.load(path, allow_pickle=False) as arrays:
            tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except (OSError, ValueError, TypeError, KeyError, EOFError) as error:
        raise BadFile(f"{str(path)!r} cannot be read as npz: {error_message(error)}") from error
    weights = {re.sub("^w_", "W_", name): tensor for name, tensor in tensors.items()}
    refuse_unknown(weights, NPZ_NAMES, str(path))
    return DictionaryParts(weights, "jumprelu", str(folder), transcoder=transcoder)


# ---- dictionary_learning (https://github.com/saprmarks/dictionary_learning)

PICKLE = "ae.pt"
# For each class: the activation, whether the decoder's bias is subtracted first, and its tensors
# beside the encoder and the decoder, by their names here.
CLASSES: dict[str, tuple[Activation, bool, Mapping[str, str]]] = {
    "AutoEncoder": ("relu", True, {"bias": "b_dec"}),
    "AutoEncoderNew": ("relu", False, {"decoder.bias": "b_dec"}),
    "GatedAutoEncoder": (
        "gated",
        True,
        {
            "decoder_bias": "b_dec",
            "r_mag": "r_mag",
            "gate_bias": "b_gate",
            "mag_bias": "b_mag",
        },
    ),
    "AutoEncoderTopK": ("topk", True, {"b_dec": "b_dec"}),
    "BatchTopKSAE": ("jumprelu", True, {"b_dec": "b_dec", "threshold": "threshold"}),
    "MatryoshkaBatchTopKSAE": ("jumprelu", True, {"b_dec": "b_dec", "threshold": "threshold"}),
    "JumpReluAutoEncoder": ("jumprelu", False, {"b_dec": "b_dec", "threshold": "threshold"}),
}
OWN_NAMES = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec"}
SAME_NAMES = {"W_enc": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec"}
OF_TRAINING = ("k", "threshold", "group_sizes")  # tensors that encoding does not read
TRAINER = (
    *("trainer_class", "dict_class", "activation_dim", "dict_size", "k", "layer", "lm_name"),
    *("submodule_name", "wandb_name", "device", "seed", "lr", "steps", "warmup_steps"),
    *("decay_start", "auxk_alpha", "threshold_beta", "threshold_start_step", "top_k_aux"),
    *("k_anneal_steps", "group_fractions", "group_sizes", "group_weights", "bandwidth"),
    *("sparsity_penalty", "sparsity_warmup_steps", "target_l0", "l1_penalty", "resample_steps"),
    *("sparsity_function", "anneal_start", "p_start", "p_end", "n_sparsity_updates"),
    *("sparsity_queue_length", "norm_factor"),
)


def read_dictionary_learning(folder: Path, *, transcoder: bool) -> DictionaryParts:
    """Returns the parts of a dictionary that dictionary_learning wrote: ae.pt and config.json."""
    name = f"config.json of {folder.name!r}"
    config = check_mapping(read_json(folder / "config.json"), name)
    trainer = check_mapping(config.get("trainer"), f"'trainer' in {name}")
    refuse_unknown(trainer, TRAINER, f"'trainer' in {name}")
    dict_class = trainer.get("dict_class")
    if dict_class not in CLASSES:
        raise Unsupported(
            f"{name} has the class {describe(dict_class)}, and hookkit reads {', '.join(CLASSES)}"
        )
    activation, centred, class_names = CLASSES[dict_class]
    tensors = _load_pickle(folder / PICKLE)
    names = {**(SAME_NAMES if "W_enc" in tensors else OWN_NAMES), **class_names}
    refuse_unknown(tensors, (*names, *OF_TRAINING), f"{PICKLE} of {folder.name!r}")
    weights = _rename(tensors, names)
    return DictionaryParts(
        weights,
        activation,
        str(folder),
        k=trainer.get("k") if activation == "topk" else None,
        centred=centred,
        rescaled=dict_class == "AutoEncoder" and not _has_unit_rows(weights["W_dec"]),
        transcoder=transcoder,
        model_name=str(trainer.get("lm_name") or ""),
        hook=_hook_of_trainer(trainer, config.get("buffer")),
    )


def _rename(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Returns the weights under hookkit's names, in hookkit's shapes."""
    weights = {names[key]: tensor for key, tensor in tensors.items() if key in names}
    if "encoder.weight" in tensors:  # torch's linear layers have their output first
        weights["W_enc"], weights["W_dec"] = weights["W_enc"].T, weights["W_dec"].T
    if "threshold" in weights:
        n_features = weights["W_dec"].shape[0]
        weights["threshold"] = weights["threshold"].expand(n_features)
    return weights


def _load_pickle(path: Path) -> dict[str, Tensor]:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling raises many classes of errors
        raise BadFile(f"{str(path)!r} cannot be read: {error_message(error)}") from error
    if not isinstance(tensors, dict) or not all(isinstance(v, Tensor) for v in tensors.values()):
        raise BadFile(f"{str(path)!r} holds no tensors by name, as a state dict does")
    return tensors


def _has_unit_rows(directions: Tensor) -> bool:
    """True if decoder rows have norm 1. If not, dictionary_learning moves norms into features."""
    norms = directions.norm(dim=-1)
    return torch.allclose(norms, torch.ones_like(norms))


def _hook_of_trainer(trainer: Mapping[str, Any], buffer: Any) -> str:
    """Returns TransformerLens' name of the site, or "" if the file does not name it."""
    match = re.fullmatch(r"resid_post_layer_(\d+)", str(trainer.get("submodule_name")))
    reads_output = not isinstance(buffer, dict) or buffer.get("io", "out") == "out"
    if match is None or not reads_output or trainer.get("layer") not in (None, int(match[1])):
        return ""
    return f"blocks.{match[1]}.hook_resid_post"


# ---- sparsify (https://github.com/EleutherAI/sparsify)

SPARSIFY = "sae.safetensors"
SPARSIFY_NAMES = {
    "encoder.weight": "W_enc",
    "encoder.bias": "b_enc",
    "W_dec": "W_dec",
    "b_dec": "b_dec",
    "W_skip": "W_skip",
}
SPARSIFY_SETTINGS = (
    *("activation", "d_in", "expansion_factor", "k", "multi_topk", "normalize_decoder"),
    *("num_latents", "signed", "skip_connection", "transcode"),
)


def read_sparsify(folder: Path, *, transcoder: bool) -> DictionaryParts:
    """Returns the parts of a dictionary that sparsify wrote: cfg.json and sae.safetensors."""
    name = f"cfg.json of {folder.name!r}"
    config = check_mapping(read_json(folder / "cfg.json"), name)
    refuse_unknown(config, SPARSIFY_SETTINGS, name)
    tensors, _ = read_tensors(folder / SPARSIFY)
    refuse_unknown(tensors, SPARSIFY_NAMES, f"{SPARSIFY} of {folder.name!r}")
    weights = {SPARSIFY_NAMES[key]: tensor for key, tensor in tensors.items()}
    if "W_enc" in weights:
        weights["W_enc"] = weights["W_enc"].T
    activation = config.get("activation", "topk")
    if activation not in ("topk", "groupmax") or config.get("signed"):
        raise Unsupported(
            f"{name} has activation={describe(activation)} and signed="
            f"{describe(config.get('signed', False))}: hookkit reads topk and groupmax, unsigned"
        )
    is_transcoder = bool(config.get("transcode", False))
    reads, writes = _hooks_of_folder(folder.name, is_transcoder)
    return DictionaryParts(
        weights,
        activation,
        str(folder),
        k=config.get("k", 32),
        centred=not is_transcoder,
        transcoder=is_transcoder,
        hook=reads,
        hook_out=writes,
    )


def _hooks_of_folder(name: str, is_transcoder: bool) -> tuple[str, str]:
    """Returns TransformerLens' names of what a folder named after a module reads and writes."""
    match = re.fullmatch(r"(?:layers|h)\.(\d+)(\.mlp)?", name)
    if match is None or (is_transcoder and not match[2]):
        return "", ""
    block = f"blocks.{match[1]}."
    if is_transcoder:
        return block + "mlp.hook_in", block + "hook_mlp_out"
    hook_name = block + ("hook_mlp_out" if match[2] else "hook_resid_post")
    return hook_name, hook_name
