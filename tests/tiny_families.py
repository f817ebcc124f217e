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
    "opt normed stream": ("opt", {"do_layer_norm_before": False}),
    "opt projected": ("opt", {"word_embed_proj_dim": 16}),
    "bloom after norm": ("bloom", {"apply_residual_connection_post_layernorm": True}),
}
NOT_BY_HAND = {"opt normed stream", "opt projected", "bloom after norm"}
ALL = [*FAMILIES, *VARIANTS]


def made(name: str) -> hk.LM:
    kind, config = VARIANTS.get(name, (name, None))
    return hk.tiny(kind, config=config)
