"""Dictionaries in the format of SAELens: cfg.json and sae_weights.safetensors.

Files of SAELens 3 to 6 are read, and objects of the library; those of SAELens 6 are written. The
library itself is not needed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..arguments import describe
from ..errors import BadFile, Unsupported
from ..files.atomic import write_tensors, write_text
from ..files.untrusted import check_mapping, read_json, read_tensors
from ..models.sites import Site
from .dictionary import Activation, Normalization
from .dictionary_parts import PLACES, DictionaryParts, refuse_unknown

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"

# What each architecture computes, and whether it is a transcoder.
ARCHITECTURES: dict[str, tuple[Activation, bool]] = {
    "standard": ("relu", False),
    "topk": ("topk", False),
    "jumprelu": ("jumprelu", False),
    "gated": ("gated", False),
    "batchtopk": ("jumprelu", False),  # its threshold is that of training
    "matryoshka_batchtopk": ("jumprelu", False),
    "transcoder": ("relu", True),
    "skip_transcoder": ("relu", True),
    "jumprelu_transcoder": ("jumprelu", True),
    "jumprelu_skip_transcoder": ("jumprelu", True),
}
TENSORS: dict[Activation, tuple[str, ...]] = {
    "gated": ("b_gate", "b_mag", "r_mag"),
    "jumprelu": ("b_enc", "threshold", "topk_threshold"),
}
MEANINGFUL = (
    *("architecture", "d_in", "d_sae", "d_out", "metadata", "model_name"),
    *("hook_name", "hook_point", "hook_head_index", "hook_point_head_index", "hook_name_out"),
    *("hook_head_index_out", "apply_b_dec_to_input", "normalize_activations"),
    *("reshape_activations", "activation_fn", "activation_fn_str", "activation_fn_kwargs"),
    *("k", "rescale_acts_by_decoder_norm", "finetuning_scaling_factor"),
)
# Settings that change no number: where the model's values came from, and how it was trained.
WITHOUT_EFFECT = (
    *("dtype", "device", "seed", "verbose", "context_size", "prepend_bos", "neuronpedia_id"),
    *("dataset_path", "dataset_trust_remote_code", "is_dataset_tokenized", "seqpos_slice"),
    *("model_class_name", "model_from_pretrained_kwargs", "model_kwargs", "hook_layer"),
    *("hook_point_layer", "hook_layer_out", "hook_eval", "hook_point_eval", "sae_lens_version"),
    *("sae_lens_training_version", "exclude_special_tokens", "autocast", "autocast_lm"),
    *("compile_llm", "llm_compilation_mode", "compile_sae", "sae_compilation_mode", "streaming"),
    *("use_cached_activations", "cached_activations_path", "from_pretrained_path", "run_name"),
    *("expansion_factor", "b_dec_init_method", "decoder_init_norm", "decoder_orthogonal_init"),
    *("decoder_heuristic_init", "decoder_heuristic_init_norm", "init_encoder_as_decoder_transpose"),
    *(
        "normalize_sae_decoder",
        "noise_scale",
        "mse_loss_normalization",
        "scale_sparsity_penalty_by_decoder_norm",
        "l1_coefficient",
        "lp_norm",
        "l1_warm_up_steps",
        "l0_coefficient",
    ),
    *("l0_warm_up_steps", "sparsity_penalty_coefficient", "jumprelu_init_threshold"),
    *("jumprelu_bandwidth", "jumprelu_sparsity_loss_mode", "jumprelu_tanh_scale", "target_l0"),
    *("jumprelu_ste_to_input", "pre_act_loss_coefficient", "topk_threshold_lr"),
    *("use_sparse_activations", "aux_loss_coefficient", "matryoshka_widths"),
    *("use_matryoshka_aux_loss", "use_ghost_grads", "ghost_grads", "feature_sampling_window"),
    *("dead_feature_window", "dead_feature_threshold", "dead_feature_estimation_method"),
    *("feature_reinit_scale", "resample_batches", "lr", "lr_end", "lr_scheduler_name"),
    *("lr_warm_up_steps", "lr_decay_steps", "n_restart_cycles", "adam_beta1", "adam_beta2"),
    *("train_batch_size", "train_batch_size_tokens", "n_batches_in_buffer", "store_batch_size"),
    *("store_batch_size_prompts", "training_tokens", "total_training_tokens"),
    *("total_training_steps", "finetuning_tokens", "finetuning_method", "tokens_per_buffer"),
    *("eval_every_n_wandb_logs", "eval_batch_size_prompts", "n_eval_batches", "n_eval_seqs"),
    *("log_to_wandb", "log_activations_store_to_wandb", "log_optimizer_state_to_wandb"),
    *("log_weights_to_wandb", "wandb_project", "wandb_id", "wandb_entity", "wandb_log_frequency"),
    *("log_frequency", "n_checkpoints", "checkpoint_path", "resume", "act_store_device"),
)


def read_folder(folder: Path, *, transcoder: bool) -> DictionaryParts:
    """Returns the parts of a dictionary in a folder that SAELens wrote, which says what it is."""
    config = check_mapping(read_json(folder / CONFIG), f"{CONFIG} of {folder.name!r}")
    tensors, _ = read_tensors(folder / WEIGHTS)
    return read_config(config, tensors, str(folder))


def read_object(sae: Any) -> DictionaryParts:
    """Returns the parts of an object of SAELens."""
    config = sae.cfg.to_dict()
    return read_config(config, sae.state_dict(), f"{type(sae).__name__} of SAELens")


def read_config(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str
) -> DictionaryParts:
    """Returns the parts of a dictionary from its settings and tensors."""
    refuse_unknown(config, (*MEANINGFUL, *WITHOUT_EFFECT), f"the cfg of {source}")
    facts = {**config, **check_mapping(config.get("metadata") or {}, "metadata")}
    activation, is_transcoder = _architecture(config, source)
    normalization, centred = _normalization(config, source), _is_centred(config, is_transcoder)
    weights = _weights(config, tensors, activation, source)
    if activation == "jumprelu" and "topk_threshold" in weights:
        threshold = weights.pop("topk_threshold")
        weights["threshold"] = torch.full_like(weights["b_enc"], float(threshold))
    k = config.get("k", (config.get("activation_fn_kwargs") or {}).get("k"))
    return DictionaryParts(
        weights,
        activation,
        source,
        k=k if activation == "topk" else None,
        normalization=normalization,
        centred=centred,
        rescaled=_is_rescaled(config),
        transcoder=is_transcoder,
        model_name=str(facts.get("model_name") or ""),
        hook=str(facts.get("hook_name") or facts.get("hook_point") or ""),
        head=_head(facts),
        hook_out=str(facts.get("hook_name_out") or ""),
    )


def _architecture(config: Mapping[str, Any], source: str) -> tuple[Activation, bool]:
    name = config.get("architecture", "standard")
    if name not in ARCHITECTURES:
        raise Unsupported(
            f"{source} is a {describe(name)} dictionary, and hookkit reads "
            f"{', '.join(ARCHITECTURES)}"
        )
    activation, is_transcoder = ARCHITECTURES[name]
    function = config.get("activation_fn_str", config.get("activation_fn", "relu")) or "relu"
    settings = config.get("activation_fn_kwargs") or {}
    refuse_unknown(settings, ("k", "signed"), f"activation_fn_kwargs of {source}")
    if function == "topk" and activation in ("relu", "topk") and not settings.get("signed"):
        return "topk", is_transcoder
    if function != "relu" or settings.get("signed"):
        raise Unsupported(
            f"{source} has the activation function {describe(function)} ({dict(settings)}), and "
            "hookkit reads relu and topk"
        )
    return activation, is_transcoder


def _normalization(config: Mapping[str, Any], source: str) -> Normalization:
    value = config.get("normalize_activations") or "none"
    # The scale of expected_average_only_in is folded into the weights after training.
    if value in ("none", "expected_average_only_in", True):
        return "none"
    if value not in ("constant_norm_rescale", "layer_norm"):
        raise Unsupported(
            f"{source} has normalize_activations={describe(value)}, and hookkit reads none, "
            "expected_average_only_in, constant_norm_rescale and layer_norm"
        )
    return value


def _is_centred(config: Mapping[str, Any], is_transcoder: bool) -> bool:
    value = config.get("apply_b_dec_to_input", not is_transcoder)
    if not isinstance(value, bool) or (value and is_transcoder):
        raise BadFile(
            f"apply_b_dec_to_input={describe(value)}: it is true or false, and false for a "
            "transcoder, whose bias is of another site"
        )
    return value


def _is_rescaled(config: Mapping[str, Any]) -> bool:
    """True if activations are rescaled; the default is SAELens' own, which differs in training."""
    is_in_training = config.get("architecture") in ("batchtopk", "matryoshka_batchtopk")
    return bool(config.get("rescale_acts_by_decoder_norm", is_in_training))


def _head(facts: Mapping[str, Any]) -> int | None:
    """Returns the head that a dictionary is of; SAELens writes -1 for none."""
    head = facts.get("hook_head_index", facts.get("hook_point_head_index"))
    return head if isinstance(head, int) and head >= 0 else None


def _weights(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], activation: Activation, source: str
) -> dict[str, Tensor]:
    """Returns the weights. Raises for a tensor that the architecture does not have."""
    names_of_kind = TENSORS.get(activation, ("b_enc",))
    refuse_unknown(
        tensors,
        ("W_enc", "W_dec", "b_dec", "W_skip", "scaling_factor", *names_of_kind),
        f"a {activation} dictionary of {source}",
    )
    weights = dict(tensors)
    scaling = weights.pop("scaling_factor", None)
    if scaling is not None and not bool((scaling == 1).all()):
        if not config.get("finetuning_scaling_factor"):
            raise BadFile(
                f"{source} has a scaling_factor that is not 1, and finetuning_scaling_factor is "
                "false"
            )
        weights["W_dec"] = weights["W_dec"] * scaling[:, None]
    return weights


# ---- writing


def write_folder(
    folder: Path,
    weights: Mapping[str, Tensor],
    k: int | None,
    site: Site,
    metadata: Mapping[str, Any],
) -> None:
    """Writes a topk dictionary, or without `k` a jumprelu one, that is centred and not normalized.

    cfg.json is written last: a folder with it is complete.
    """
    has_heads = site.name in ("q", "k", "v", "z")
    config = {
        "architecture": "jumprelu" if k is None else "topk",
        "d_in": weights["W_enc"].shape[0],
        "d_sae": weights["W_enc"].shape[1],
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if has_heads else "none",
        "metadata": dict(metadata),
    }
    if k is not None:
        config |= {"k": k, "rescale_acts_by_decoder_norm": False}
    write_tensors(folder / WEIGHTS, weights)
    write_text(folder / CONFIG, json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def hook_of_site(site: Site) -> str:
    """Returns TransformerLens' name of a site. Raises `Unsupported` if it has none."""
    for hook, name in PLACES.items():
        if name == site.name and not site.stack and site.head is None:
            return f"blocks.{site.layer}.{hook}"
    raise Unsupported(
        f"{site} has no name in SAELens' format, in which dictionaries are saved: train at one of "
        f"{', '.join(dict.fromkeys(PLACES.values()))}"
    )


def read_training(folder: Path) -> dict[str, Any]:
    """Returns the settings of the training of a dictionary; none of one from elsewhere."""
    config = check_mapping(read_json(folder / CONFIG), f"{CONFIG} of {folder.name!r}")
    metadata = check_mapping(config.get("metadata") or {}, "metadata")
    return check_mapping(metadata.get("training") or {}, "training")
