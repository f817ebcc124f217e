"""hk.tiny: returns a small random model of any family, made from its configuration class.

It needs no network and takes milliseconds. The laws are tested on it, and tests of your own code
can use it too.
"""

from __future__ import annotations

from typing import Any

import torch

from ..arguments import check_arguments
from ..errors import ModelNotFound, did_you_mean
from .lm import LM

# 3 blocks, d_model 32, 4 heads of 8, 2 key-value heads. Settings that a family lacks are left out.
SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
}
LATENT: dict[str, Any] = {  # multi-head latent attention
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "num_key_value_heads": 4,
}
DEEPSEEK = {
    **EXPERTS,
    **LATENT,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
SLIDING: dict[str, Any] = {
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
GRANITE = {"residual_multiplier": 0.5, "embedding_multiplier": 2.0, "logits_scaling": 4.0}
STATE_SPACE_PARAMETERS = ("A_log", "dt_bias", "dt_proj.bias", ".D")  # keep their initial values

# What a family needs besides the sizes. None removes a setting.
HEADS = {"head_dim": 8}
FEED_FORWARD_ELSEWHERE = {"num_key_value_heads": None, "intermediate_size": None}
FAMILIES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("ernie4_5", "gemma", "glm", "glm4", "helium", "hunyuan_v1_dense", "seed_oss"), HEADS
    ),
    "codegen": {"rotary_dim": 4},
    "cohere2": {**SLIDING, **HEADS},
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": DEEPSEEK,
    "exaone4": SLIDING,
    "falcon": FEED_FORWARD_ELSEWHERE,
    "gemma2": {**SLIDING, **HEADS, "query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0},
    "gemma3_text": {**SLIDING, **HEADS, "query_pre_attn_scalar": 8},
    "gemma4_text": {
        **SLIDING,
        **HEADS,
        # the last one must be full
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "global_head_dim": 16,
        "vocab_size_per_layer_input": 320,
        "hidden_size_per_layer_input": 8,
    },
    "gpt_neo": {
        "num_layers": 3,
        "attention_types": [[["global", "local", "global"], 1]],
        "window_size": 6,
        "num_hidden_layers": None,
    },
    "gpt_oss": {**EXPERTS, **SLIDING, **HEADS},
    "gptj": {"rotary_dim": 4},
    "granite": {**GRANITE, "attention_multiplier": 0.4},
    "granitemoe": {**EXPERTS, **GRANITE},
    "lfm2": {
        "layer_types": ["full_attention", "conv", "full_attention"],
        "block_auto_adjust_ff_dim": False,
    },
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2, "state_size": 8, "chunk_size": 4},
    "minicpm3": {**LATENT, "dim_model_base": 16},
    "llama4_text": {**EXPERTS, **HEADS, "intermediate_size_mlp": 48},
    "ministral": {**SLIDING, **HEADS},
    "mistral": {"sliding_window": 6},
    "mixtral": EXPERTS,
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 128},
    "olmo3": SLIDING,
    "olmoe": EXPERTS,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, **FEED_FORWARD_ELSEWHERE},
    "qwen2_moe": {**EXPERTS, "mlp_only_layers": [0]},
    "qwen3": {"head_dim": 16},  # wider than d_model / heads
    "qwen3_moe": {**EXPERTS, **HEADS, "mlp_only_layers": [0]},
    "qwen3_next": {
        **EXPERTS,
        **HEADS,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "smollm3": {"no_rope_layers": [1, 0, 1]},
}


@check_arguments
def tiny(
    model_type: str, *, seed: int = 0, tokenizer: Any = None, config: dict[str, Any] | None = None
) -> LM:
    """Returns a random model of a family with 3 blocks, d_model 32, 4 heads and 320 tokens.

    It is in float32 and evaluation mode. `model_type` is the name in transformers ("llama",
    "gpt_neox", "qwen3_moe"); `config` changes or adds settings of its configuration. Weights are
    normal with a standard deviation of 0.3, so that no activation is near zero. Without a
    tokenizer, prompts are token ids. Raises `ModelNotFound` for a type that transformers does not
    have or that cannot be made small.

    >>> tiny("gpt_neox").n_layers
    3
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    if model_type not in CONFIG_MAPPING:
        raise ModelNotFound(
            "transformers has no model type "
            f"{model_type!r}{did_you_mean(model_type, CONFIG_MAPPING.keys())}"
        )
    config_class: Any = CONFIG_MAPPING[model_type]
    settings = _tiny_settings(model_type, config_class(), config or {})
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        model: Any = AutoModelForCausalLM.from_config(config_class(**settings), dtype=torch.float32)
        _randomize_weights(model)
    except Exception as error:
        raise ModelNotFound(
            f"no small {model_type!r} could be made of {settings}: give what it needs with "
            f"config={{…}}. {error}"
        ) from error
    finally:
        torch.random.set_rng_state(state)
    return LM(model.eval(), tokenizer, f"tiny {model_type}")


def _tiny_settings(model_type: str, default_config: Any, changes: dict[str, Any]) -> dict[str, Any]:
    settings = {name: value for name, value in SIZES.items() if hasattr(default_config, name)}
    settings |= FAMILIES.get(model_type, {}) | changes
    for name, value in list(settings.items()):
        if value is None and name != "pad_token_id":
            del settings[name]
    return settings


def _randomize_weights(model: torch.nn.Module) -> None:
    """Fills matrices with a standard deviation of 0.3, scales around 1, and biases around 0."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.3)
            elif not name.endswith(STATE_SPACE_PARAMETERS):
                is_scale = any(word in name for word in ("norm", "ln_", "ln1", "ln2"))
                weight.normal_(mean=float(is_scale), std=0.1)
