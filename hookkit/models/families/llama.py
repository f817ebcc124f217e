"""Families with the module tree of Llama: what each of them has in another way than Llama.

Every block has attention and an MLP, or a mixture of experts. Nothing here imports torch.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from .schema import (
    BY_HEAD,
    EXPERT_NEURONS,
    HEAD,
    LATENT_KEYS,
    NO_ROUTER,
    PARALLEL_BLOCK,
    ROTARY,
    STREAM,
    Family,
    ModuleLocation,
    SiteLocations,
    attention_sites,
    fused_qkv,
    input_of,
    inside,
    mixture_sites,
    mlp_sites,
    multi_head_sizes,
    output_of,
    rotary_sites,
    separate_qkv,
)

LLAMA_SITES: Mapping[str, ModuleLocation] = {
    "embed": output_of("model.embed_tokens"),
    **STREAM,
    **attention_sites(".self_attn"),
    **separate_qkv(".self_attn"),
    **rotary_sites(".self_attn"),
    "resid_mid": input_of(".post_attention_layernorm", shared=True),
    **mlp_sites(".mlp", "gate_proj", "down_proj"),
    "final_norm": output_of("model.norm"),
    **HEAD,
}
LLAMA_MISSING = {**ROTARY, **NO_ROUTER}


def like_llama(
    *changes: SiteLocations,
    without: Collection[str] = (),
    missing: Mapping[str, str] | None = None,
    **fields: Any,
) -> Family:
    """Returns a row with the sites of Llama, except for `changes` and the names in `without`."""
    sites: dict[str, ModuleLocation | tuple[ModuleLocation, ...]] = dict(LLAMA_SITES)
    for change in changes:
        sites |= change
    for name in without:
        sites.pop(name, None)
    return Family("llama", sites, {**LLAMA_MISSING, **(missing or {})}, **fields)


LLAMA = like_llama()

# What several of them have in another way than Llama.
PLAIN = mlp_sites(".mlp", "up_proj", "down_proj")
GATED_TOGETHER = {"mlp_pre": output_of(".mlp.gate_up_proj", cut="d_mlp | d_mlp")}
DENSE_MLP = mlp_sites(".mlp", "dense_h_to_4h", "dense_4h_to_h")
FINAL_LAYERNORM = {"final_norm": output_of("model.final_layernorm")}
# Norms after attention and MLP: their outputs are added to the residual stream.
POST_NORMED = {
    "attn_out": output_of(".post_attention_layernorm"),
    "resid_mid": input_of(".pre_feedforward_layernorm", shared=True),
    "mlp_out": output_of(".post_feedforward_layernorm"),
}
ONLY_POST_NORMED = POST_NORMED | {"resid_mid": input_of(".mlp", shared=True)}
SCALED = {
    "attn_out": output_of(".self_attn", times="residual_multiplier"),
    "mlp_out": output_of(".mlp", times="residual_multiplier"),
}
# A router and experts instead of the MLP, in some blocks or in all.
MIXED: dict[str, str] = dict.fromkeys(
    NO_ROUTER, "this block's MLP is one network, without a router"
)
MIXTURE = like_llama(mixture_sites(), missing=MIXED)
PARALLEL = like_llama(without=["resid_mid"], missing=PARALLEL_BLOCK)
# Multi-head latent attention (DeepSeek-AI 2024): keys and values are expanded from a latent.
LATENT: SiteLocations = {
    "q": (
        output_of(".self_attn.q_proj", cut="head d_qk"),
        output_of(".self_attn.q_b_proj", cut="head d_qk"),
    ),
    "v": inside(".self_attn", "value"),
    "z": input_of(".self_attn.o_proj", cut="head d_v"),
}


def latent_sizes(config: Any, layer: int | None) -> dict[str, int]:
    """Returns the sizes of heads that are expanded from a latent."""
    return {
        "kv_head": config.num_attention_heads,
        "d_head": config.v_head_dim,
        "d_qk": config.qk_nope_head_dim + config.qk_rope_head_dim,
        "d_v": config.v_head_dim,
    }


DEEPSEEK = like_llama(
    LATENT, mixture_sites(), without=["k"], missing=MIXED | LATENT_KEYS, sizes=latent_sizes
)
YOUTU = like_llama(LATENT, without=["k"], missing=LATENT_KEYS, sizes=latent_sizes)
AXK2 = like_llama(
    LATENT,
    # The query of each head, then the gate of its output.
    {"q": output_of(".self_attn.q_gate_proj", cut="head: d_qk | d_v")},
    mixture_sites(),
    without=["k"],
    missing=MIXED | LATENT_KEYS,
    sizes=latent_sizes,
)
MINICPM3 = like_llama(
    LATENT,
    {
        "attn_out": output_of(".self_attn", times="residual_scale"),
        "mlp_out": output_of(".mlp", times="residual_scale"),
        "final_norm": output_of("model.norm", over="logits_scaling"),
    },
    without=["k"],
    missing=LATENT_KEYS,
    sizes=latent_sizes,
)
PERSIMMON = like_llama(
    attention_sites(".self_attn", "dense"),
    fused_qkv(".self_attn.query_key_value", BY_HEAD),
    DENSE_MLP,
    FINAL_LAYERNORM,
    sizes=multi_head_sizes,
)
PHI = like_llama(
    attention_sites(".self_attn", "dense"),
    mlp_sites(".mlp", "fc1", "fc2"),
    FINAL_LAYERNORM,
    without=["resid_mid"],
    missing=PARALLEL_BLOCK,
)
ROUTER_MIXTURE = like_llama(mixture_sites(".mlp.router"), missing=MIXED)
ARIA = replace(
    ROUTER_MIXTURE,
    sizes=lambda config, layer: {"expert": config.moe_num_experts, "choice": config.moe_topk},
)
FLEX_OLMO = like_llama(ONLY_POST_NORMED, mixture_sites(), missing=MIXED)
COHERE2_MOE = like_llama(mixture_sites(), without=["resid_mid"], missing=MIXED | PARALLEL_BLOCK)
AFMOE = like_llama(
    {
        "attn_out": output_of(".post_attention_layernorm"),
        "resid_mid": input_of(".pre_mlp_layernorm", shared=True),
        "mlp_out": output_of(".post_mlp_layernorm"),
    },
    mixture_sites(".mlp.router"),
    missing=MIXED,
)
HYPERCLOVAX = like_llama(
    {
        "attn_out": output_of(".post_norm1", times="residual_multiplier"),
        "mlp_out": output_of(".post_norm2", times="residual_multiplier"),
    }
)
VAULTGEMMA = like_llama({"resid_mid": input_of(".pre_feedforward_layernorm", shared=True)})
BITNET = like_llama(
    exceptions={
        "one head": "z is read after a norm over all heads: without one head, the others' z is "
        "larger"
    }
)
NANOCHAT = like_llama(
    mlp_sites(".mlp", "fc1", "fc2"),
    without=["final_norm"],
    missing={
        "final_norm": "the same norm module acts on the embedding and before the head, and a hook "
        "cannot tell its calls apart"
    },
)
WEIGHTED_STREAM = "the block multiplies the stream by a learned weight before it adds to it"
DOGE = like_llama(exceptions={"sum": WEIGHTED_STREAM})
TWO_ATTENTIONS = (
    "attention is computed twice in a forward, each time with one half of the values' heads, and "
    "a hook cannot tell its calls apart"
)
DIFFLLAMA_MISSING = {
    **dict.fromkeys(("v", "q_rot", "k_rot", "scores", "pattern"), TWO_ATTENTIONS),
    "z": "the output projection reads differences of the outputs of two heads, normed",
}
DIFFLLAMA = like_llama(without=DIFFLLAMA_MISSING, missing=DIFFLLAMA_MISSING)
LLAMA4 = like_llama(
    mlp_sites(".feed_forward", "gate_proj", "down_proj"),
    {
        "mlp_out": output_of(".feed_forward", flat=True),
        "router_logits": inside(".feed_forward.router", "router", flat=True),
    },
    missing=MIXED
    | dict.fromkeys(
        ("experts", "expert_weights"),
        "the router weights all experts, and gives 0 to those that are not chosen; see "
        "router_logits",
    )
    | dict.fromkeys(
        EXPERT_NEURONS,
        "each expert reads every token, multiplied by its weight, which is 0 where it is not "
        "chosen: there are no neurons of the chosen experts alone; see mlp_in and mlp_out",
    ),
)
GRANITE_MOE = like_llama(
    SCALED,
    {
        "mlp_in": input_of(".block_sparse_moe"),
        "mlp_out": output_of(".block_sparse_moe", times="residual_multiplier"),
    },
    mixture_sites(".block_sparse_moe.router"),
    missing=MIXED,
)
SHARED_MLP = (
    "the block adds the sum of what its experts and its shared MLP give, each multiplied: reach "
    "them with hk.module"
)
SHARED_MIXTURE: SiteLocations = {
    "mlp_in": input_of(".block_sparse_moe", shared=True),
    **mixture_sites(".block_sparse_moe.router"),
}
MLP_OF_GRANITE: SiteLocations = {
    "mlp_in": input_of(".shared_mlp"),
    "mlp_pre": output_of(".shared_mlp.input_linear", cut="d_mlp | d_mlp"),
    "mlp_post": input_of(".shared_mlp.output_linear"),
    "mlp_out": output_of(".shared_mlp", times="residual_multiplier"),
}


def granitemoeshared(config: Any) -> Family:
    """Returns the row with a shared MLP beside the experts, or without."""
    if config.shared_intermediate_size == 0:
        return GRANITE_MOE
    return like_llama(
        SCALED,
        SHARED_MIXTURE,
        without=["mlp_out"],
        missing=MIXED | {"mlp_out": SHARED_MLP},
    )


GLM4 = like_llama(
    GATED_TOGETHER,
    {
        "attn_out": output_of(".post_self_attn_layernorm"),
        "mlp_out": output_of(".post_mlp_layernorm"),
    },
)
# Blocks may take keys and values from earlier blocks.
GEMMA4 = like_llama(
    POST_NORMED,
    missing={
        "k": "this block takes its keys from an earlier one",
        "v": "this block takes its values from an earlier one, or uses its keys as values",
    },
    exceptions=dict.fromkeys(
        ("sum", "one stream mlp_out"),
        "each block also adds a token embedding of its own, and multiplies the stream by a scalar",
    ),
)


def stablelm(config: Any) -> Family:
    """Returns the row for attention and MLP in parallel, or one after the other."""
    return PARALLEL if config.use_parallel_residual else LLAMA


def _hunyuan_sizes(config: Any, layer: int | None) -> dict[str, int]:
    choices = config.moe_topk  # one number, or one for each block
    if isinstance(choices, list):
        choices = choices[layer or 0]
    return {"choice": choices}


def _laguna_sizes(config: Any, layer: int | None) -> dict[str, int]:
    return {"head": config.num_attention_heads_per_layer[layer or 0]}


HUNYUAN_MOE = replace(MIXTURE, sizes=_hunyuan_sizes)
LAGUNA = replace(MIXTURE, sizes=_laguna_sizes)


def _mimo_sizes(config: Any, layer: int | None) -> dict[str, int]:
    is_sliding = layer is not None and config.layer_types[layer] == "sliding_attention"
    return {
        "kv_head": config.num_key_value_heads * (2 if is_sliding else 1),
        "d_head": config.v_head_dim,
        "d_qk": config.head_dim,
        "d_v": config.v_head_dim,
    }


def mimo_v2_flash(config: Any) -> Family:
    """Returns the row: keys and values have other widths, and sliding blocks have more heads."""
    return like_llama(
        {
            "q": output_of(".self_attn.q_proj", cut="head d_qk"),
            "k": output_of(".self_attn.k_proj", cut="kv_head d_qk"),
        },
        mixture_sites(),
        missing=MIXED,
        sizes=_mimo_sizes,
    )
