"""Families that are built like llama, and what each of them does otherwise."""

from collections.abc import Mapping
from typing import Any

from .schema import Family, ModuleLocation
from .shared import (
    BY_HEAD,
    DENSE,
    GATED,
    GATED_TOGETHER,
    HEAD,
    LATENT_KEYS,
    NEURONS,
    PARALLEL,
    ROTARY,
    ROUTER_ELSEWHERE,
    STREAM,
    as_many,
    attention,
    fused,
    inside,
    into,
    mlp,
    out,
    routed,
    separate,
    turned,
)

LLAMA_PLACES: dict[str, ModuleLocation] = {
    "embed": out("model.embed_tokens"),
    **STREAM,
    **attention(".self_attn"),
    **separate(".self_attn"),
    **turned(".self_attn"),
    "resid_mid": into(".post_attention_layernorm", shared=True),
    **GATED,
    "final_norm": out("model.norm"),
    **HEAD,
}
LLAMA_MISSING = {**ROTARY, **DENSE}
LLAMA = Family("llama", LLAMA_PLACES, LLAMA_MISSING)

# Norms behind attention and MLP: what they give is what is added to the stream.
POST_NORMED = LLAMA_PLACES | {
    "attn_out": out(".post_attention_layernorm"),
    "resid_mid": into(".pre_feedforward_layernorm", shared=True),
    "mlp_out": out(".post_feedforward_layernorm"),
}
ONLY_POST_NORMED = POST_NORMED | {"resid_mid": into(".mlp", shared=True)}
SCALED = {
    name: out(LLAMA_PLACES[name].path, times="residual_multiplier")
    for name in ("attn_out", "mlp_out")
}
WITHOUT_MID = {name: place for name, place in LLAMA_PLACES.items() if name != "resid_mid"}


def mixture(
    name: str, places: Mapping[str, ModuleLocation] | None = None, router: str = ".mlp.gate"
) -> Family:
    """A router and its experts in the place of the MLP, in some blocks or in all."""
    return Family(
        name,
        {**(places or LLAMA_PLACES), **routed(router)},
        {**ROTARY, **NEURONS, **ROUTER_ELSEWHERE},
    )


def latent(name: str, places: Mapping[str, ModuleLocation], missing: Mapping[str, str]) -> Family:
    """Multi-head latent attention (DeepSeek-AI 2024): keys and values are expanded from a latent."""
    given = {
        **places,
        "q": (
            out(".self_attn.q_proj", cut="head d_qk"),
            out(".self_attn.q_b_proj", cut="head d_qk"),
        ),
        "v": inside(".self_attn", "value"),
        "z": into(".self_attn.o_proj", cut="head d_v"),
    }
    given.pop("k")
    return Family(name, given, {**missing, **LATENT_KEYS}, sizes=_latent_sizes)


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
        **attention(".self_attn", "dense"),
        **mlp(".mlp", "fc1", "fc2"),
        "final_norm": out("model.final_layernorm"),
    },
    {**LLAMA_MISSING, **PARALLEL},
)
PHI3 = Family(
    "phi3", {**LLAMA_PLACES, **fused(".self_attn.qkv_proj"), **GATED_TOGETHER}, LLAMA_MISSING
)
PERSIMMON = Family(
    "persimmon",
    {
        **LLAMA_PLACES,
        **attention(".self_attn", "dense"),
        **fused(".self_attn.query_key_value", BY_HEAD),
        **mlp(".mlp", "dense_h_to_4h", "dense_4h_to_h"),
        "final_norm": out("model.final_layernorm"),
    },
    LLAMA_MISSING,
    sizes=as_many,
)


def stablelm(config: Any) -> Family:
    """Attention and MLP in parallel, or in turn."""
    if config.use_parallel_residual:
        return Family("stablelm", WITHOUT_MID, {**LLAMA_MISSING, **PARALLEL})
    return Family("stablelm", LLAMA_PLACES, LLAMA_MISSING)


QWEN3_NEXT = Family(
    "qwen3_next",
    {
        **LLAMA_PLACES,
        "attn_in": (into(".self_attn"), into(".linear_attn")),
        "attn_out": (out(".self_attn"), out(".linear_attn")),
        "q": out(
            ".self_attn.q_proj", cut="head: d_head | d_head"
        ),  # each head's query, then the gate of its output
        **routed(),
    },
    {
        **ROTARY,
        **NEURONS,
        **ROUTER_ELSEWHERE,
        **dict.fromkeys(
            ("q", "k", "v", "q_rot", "k_rot", "scores", "pattern", "z"),
            "this block's attention is linear (a gated delta rule), which has no pattern and no heads of this kind",
        ),
    },
)


PER_LAYER_INPUT = (
    "each block also adds a token embedding of its own, and multiplies the stream by a scalar"
)


def gemma4(config: Any) -> Family:
    """Some blocks may take their keys and values from earlier ones."""
    missing = {
        **LLAMA_MISSING,
        "k": "this block takes its keys from an earlier one",
        "v": "this block takes its values from an earlier one, or uses its keys as values",
    }
    exceptions: dict[str, str] = dict.fromkeys(("sum", "one stream mlp_out"), PER_LAYER_INPUT)
    return Family("gemma4_text", POST_NORMED, missing, exceptions=exceptions)


MINICPM3 = latent(
    "minicpm3",
    {
        **LLAMA_PLACES,
        "attn_out": out(".self_attn", times="residual_scale"),
        "mlp_out": out(".mlp", times="residual_scale"),
        "final_norm": out("model.norm", over="logits_scaling"),
    },
    LLAMA_MISSING,
)

LFM2 = Family(
    "lfm2",
    {
        **LLAMA_PLACES,
        **attention(".self_attn", "out_proj"),
        "attn_in": (into(".self_attn"), into(".conv")),
        "attn_out": (out(".self_attn"), out(".conv")),
        "resid_mid": into(".ffn_norm", shared=True),
        **mlp(".feed_forward", "w1", "w2"),
        "final_norm": out("model.embedding_norm"),
    },
    {
        **LLAMA_MISSING,
        **dict.fromkeys(
            ("q", "k", "v", "q_rot", "k_rot", "scores", "pattern", "z"),
            "this block is a convolution, without heads; attn_out is what it adds",
        ),
    },
)
