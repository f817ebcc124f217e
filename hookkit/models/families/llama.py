"""Families with the module tree of llama, and how each of them differs."""

from collections.abc import Mapping
from typing import Any

from .schema import Family, ModuleLocation
from .shared import (
    BY_HEAD,
    EXPERT_NEURONS,
    GATED,
    GATED_TOGETHER,
    HEAD,
    LATENT_KEYS,
    NO_ROUTER,
    PARALLEL_BLOCK,
    ROTARY,
    ROUTER_ELSEWHERE,
    STREAM,
    attention_sites,
    fused_qkv,
    input_of,
    inside,
    mlp_sites,
    multi_head_sizes,
    output_of,
    rotary_sites,
    router_sites,
    separate_qkv,
)

LLAMA_SITES: dict[str, ModuleLocation] = {
    "embed": output_of("model.embed_tokens"),
    **STREAM,
    **attention_sites(".self_attn"),
    **separate_qkv(".self_attn"),
    **rotary_sites(".self_attn"),
    "resid_mid": input_of(".post_attention_layernorm", shared=True),
    **GATED,
    "final_norm": output_of("model.norm"),
    **HEAD,
}
LLAMA_MISSING = {**ROTARY, **NO_ROUTER}
LLAMA = Family("llama", LLAMA_SITES, LLAMA_MISSING)

# Norms after attention and MLP: their outputs are added to the residual stream.
POST_NORMED = LLAMA_SITES | {
    "attn_out": output_of(".post_attention_layernorm"),
    "resid_mid": input_of(".pre_feedforward_layernorm", shared=True),
    "mlp_out": output_of(".post_feedforward_layernorm"),
}
ONLY_POST_NORMED = POST_NORMED | {"resid_mid": input_of(".mlp", shared=True)}
SCALED = {
    name: output_of(LLAMA_SITES[name].path, times="residual_multiplier")
    for name in ("attn_out", "mlp_out")
}
WITHOUT_MID = {site: location for site, location in LLAMA_SITES.items() if site != "resid_mid"}


def mixture_of_experts(
    name: str, sites: Mapping[str, ModuleLocation] = LLAMA_SITES, router: str = ".mlp.gate"
) -> Family:
    """Returns a family with a router and experts instead of the MLP, in some blocks or in all."""
    return Family(
        name,
        {**sites, **router_sites(router)},
        {**ROTARY, **EXPERT_NEURONS, **ROUTER_ELSEWHERE},
    )


def latent_attention(
    name: str, sites: Mapping[str, ModuleLocation], missing: Mapping[str, str]
) -> Family:
    """Returns a family with multi-head latent attention (DeepSeek-AI 2024).

    Keys and values are expanded from a latent.
    """
    locations = {
        **sites,
        "q": (
            output_of(".self_attn.q_proj", cut="head d_qk"),
            output_of(".self_attn.q_b_proj", cut="head d_qk"),
        ),
        "v": inside(".self_attn", "value"),
        "z": input_of(".self_attn.o_proj", cut="head d_v"),
    }
    locations.pop("k")
    return Family(name, locations, {**missing, **LATENT_KEYS}, sizes=_latent_sizes)


def _latent_sizes(config: Any, layer: int | None) -> dict[str, int]:
    return {
        "kv_head": config.num_attention_heads,
        "d_head": config.v_head_dim,
        "d_qk": config.qk_nope_head_dim + config.qk_rope_head_dim,
        "d_v": config.v_head_dim,
    }


PHI = Family(
    "phi",
    {
        **WITHOUT_MID,
        **attention_sites(".self_attn", "dense"),
        **mlp_sites(".mlp", "fc1", "fc2"),
        "final_norm": output_of("model.final_layernorm"),
    },
    {**LLAMA_MISSING, **PARALLEL_BLOCK},
)
PHI3 = Family(
    "phi3", {**LLAMA_SITES, **fused_qkv(".self_attn.qkv_proj"), **GATED_TOGETHER}, LLAMA_MISSING
)
PERSIMMON = Family(
    "persimmon",
    {
        **LLAMA_SITES,
        **attention_sites(".self_attn", "dense"),
        **fused_qkv(".self_attn.query_key_value", BY_HEAD),
        **mlp_sites(".mlp", "dense_h_to_4h", "dense_4h_to_h"),
        "final_norm": output_of("model.final_layernorm"),
    },
    LLAMA_MISSING,
    sizes=multi_head_sizes,
)


def stablelm(config: Any) -> Family:
    """Returns the row for attention and MLP in parallel, or one after the other."""
    if config.use_parallel_residual:
        return Family("stablelm", WITHOUT_MID, {**LLAMA_MISSING, **PARALLEL_BLOCK})
    return Family("stablelm", LLAMA_SITES, LLAMA_MISSING)


QWEN3_NEXT = Family(
    "qwen3_next",
    {
        **LLAMA_SITES,
        "attn_in": (input_of(".self_attn"), input_of(".linear_attn")),
        "attn_out": (output_of(".self_attn"), output_of(".linear_attn")),
        # The query of each head, then the gate of its output.
        "q": output_of(".self_attn.q_proj", cut="head: d_head | d_head"),
        **router_sites(),
    },
    {
        **ROTARY,
        **EXPERT_NEURONS,
        **ROUTER_ELSEWHERE,
        **dict.fromkeys(
            ("q", "k", "v", "q_rot", "k_rot", "scores", "pattern", "z"),
            "this block's attention is linear (a gated delta rule), which has no pattern and no "
            "heads of this kind",
        ),
    },
)


PER_LAYER_INPUT = (
    "each block also adds a token embedding of its own, and multiplies the stream by a scalar"
)


def gemma4(config: Any) -> Family:
    """Returns the row for blocks that may take keys and values from earlier blocks."""
    missing = {
        **LLAMA_MISSING,
        "k": "this block takes its keys from an earlier one",
        "v": "this block takes its values from an earlier one, or uses its keys as values",
    }
    exceptions: dict[str, str] = dict.fromkeys(("sum", "one stream mlp_out"), PER_LAYER_INPUT)
    return Family("gemma4_text", POST_NORMED, missing, exceptions=exceptions)


MINICPM3 = latent_attention(
    "minicpm3",
    {
        **LLAMA_SITES,
        "attn_out": output_of(".self_attn", times="residual_scale"),
        "mlp_out": output_of(".mlp", times="residual_scale"),
        "final_norm": output_of("model.norm", over="logits_scaling"),
    },
    LLAMA_MISSING,
)

LFM2 = Family(
    "lfm2",
    {
        **LLAMA_SITES,
        **attention_sites(".self_attn", "out_proj"),
        "attn_in": (input_of(".self_attn"), input_of(".conv")),
        "attn_out": (output_of(".self_attn"), output_of(".conv")),
        "resid_mid": input_of(".ffn_norm", shared=True),
        **mlp_sites(".feed_forward", "w1", "w2"),
        "final_norm": output_of("model.embedding_norm"),
    },
    {
        **LLAMA_MISSING,
        **dict.fromkeys(
            ("q", "k", "v", "q_rot", "k_rot", "scores", "pattern", "z"),
            "this block is a convolution, without heads; attn_out is what it adds",
        ),
    },
)
