"""The families of the table and variants of their configurations, as tiny random models."""

import hookkit as hk
from hookkit.models.families.table import FAMILIES

VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "falcon new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon new, one norm": (
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "falcon many heads": ("falcon", {"multi_query": False}),
    "falcon in turn": ("falcon", {"parallel_attn": False}),
    "falcon alibi": ("falcon", {"alibi": True}),
    "gpt_bigcode many heads": ("gpt_bigcode", {"multi_query": False}),
    "gpt_neox in turn": ("gpt_neox", {"use_parallel_residual": False}),
    "stablelm parallel": ("stablelm", {"use_parallel_residual": True}),
    "phi qk norm": ("phi", {"qk_layernorm": True}),
    "deepseek_v3 one query projection": ("deepseek_v3", {"q_lora_rank": None}),
    "gemma4 shared keys": (
        "gemma4_text",
        {
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "granitemoehybrid without experts": (
        "granitemoehybrid",
        {"num_local_experts": 0, "position_embedding_type": "rope"},
    ),
    "granitemoeshared without a shared MLP": ("granitemoeshared", {"shared_intermediate_size": 0}),
    "opt normed stream": ("opt", {"do_layer_norm_before": False}),
    "opt projected": ("opt", {"word_embed_proj_dim": 16}),
    "bloom after norm": ("bloom", {"apply_residual_connection_post_layernorm": True}),
}
NOT_BY_HAND = {"opt normed stream", "opt projected", "bloom after norm"}
# Blocks of a kind of their own, whose sites `test_every_family` names module by module.
NOT_BY_HAND |= {"diffllama", "deepseek_v4", "gemma3n_text", "zamba", "zamba2"}
ALL = [*FAMILIES, *VARIANTS]
# The laws and the second route try every type. The tests of other rooms leave out those that differ from another one
# in names only, or that have no stream to look at.
LAWS_ONLY = [
    "afmoe",
    "aria_text",
    "axk1",
    "axk2",
    "bailing_hybrid",
    "bitnet",
    "cohere2_moe",
    "cwm",
    "deepseek_v32",
    "deepseek_v4",
    "diffllama",
    "doge",
    "dots1",
    "ernie4_5_moe",
    "exaone_moe",
    "falcon_mamba",
    "flex_olmo",
    "flint",
    "gemma3n_text",
    "gemma4_unified_text",
    "glm4_moe",
    "glm4_moe_lite",
    "granite_swa",
    "granitemoe_swa",
    "granitemoeshared",
    "hunyuan_v1_moe",
    "hy_v3",
    "internlm3",
    "iquestcoder",
    "jais2",
    "jamba",
    "laguna",
    "lfm2_moe",
    "lfm3",
    "mellum",
    "minimax",
    "minimax_m2",
    "ministral3",
    "mistral4",
    "nanochat",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "recurrent_gemma",
    "solar_open",
    "youtu",
    "zamba",
    "zamba2",
]
LAWS_ONLY.append("phimoe")  # whose router has a gradient of its own, which is no slope
LAWS_ONLY.append("olmo_hybrid")  # whose norms in float32 hide the effect of small steps
ONE_OF_EACH = [model_type for model_type in FAMILIES if model_type not in LAWS_ONLY]

# The types and variants for which `by_hand_programs` knows every boundary.
OTHER_BOUNDARIES = ("nemotron_h", "mimo_v2_flash", "granitemoehybrid")
PROGRAMMED = [
    name
    for name in (*ONE_OF_EACH, *VARIANTS)
    if name not in NOT_BY_HAND and not name.startswith((*OTHER_BOUNDARIES, "granitemoeshared"))
]


def made(name: str) -> hk.LM:
    kind, config = VARIANTS.get(name, (name, None))
    return hk.tiny(kind, config=config)
