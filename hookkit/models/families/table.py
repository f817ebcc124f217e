"""The table of families, one row each: where each site is in the module tree, or why it is missing.

A row holds facts about the code in transformers. tests/checks/test_every_family.py checks them on
a tiny random model of each family, and `hk.doctor` on the user's own model. Here are the rows of
the families with the module tree of Llama, and then the whole table; a model type is the name of
its row. Nothing here imports torch.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from .encoders import ENCODERS
from .others import (
    CODEGEN,
    GPT2,
    GPT_NEO,
    GPTJ,
    MAMBA,
    MPT,
    bloom,
    falcon,
    gpt_bigcode,
    gpt_neox,
    opt,
)
from .schema import (
    BY_HEAD,
    EXPERT_NEURONS,
    HEAD,
    LATENT_KEYS,
    NO_ROUTER,
    PARALLEL_BLOCK,
    ROTARY,
    ROUTER_ELSEWHERE,
    STREAM,
    Family,
    ModuleLocation,
    SiteLocations,
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
    without: str = "",
    missing: Mapping[str, str] | None = None,
    **fields: Any,
) -> Family:
    """Returns a row with the sites of Llama, except for `changes` and `without`."""
    sites: dict[str, ModuleLocation | tuple[ModuleLocation, ...]] = dict(LLAMA_SITES)
    for change in changes:
        sites |= change
    sites.pop(without, None)
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
MIXED = {**EXPERT_NEURONS, **ROUTER_ELSEWHERE}
MIXTURE = like_llama(router_sites(), missing=MIXED)
PARALLEL = like_llama(without="resid_mid", missing=PARALLEL_BLOCK)
# Multi-head latent attention (DeepSeek-AI 2024): keys and values are expanded from a latent.
LATENT: SiteLocations = {
    "q": (
        output_of(".self_attn.q_proj", cut="head d_qk"),
        output_of(".self_attn.q_b_proj", cut="head d_qk"),
    ),
    "v": inside(".self_attn", "value"),
    "z": input_of(".self_attn.o_proj", cut="head d_v"),
}


def _latent_sizes(config: Any, layer: int | None) -> dict[str, int]:
    return {
        "kv_head": config.num_attention_heads,
        "d_head": config.v_head_dim,
        "d_qk": config.qk_nope_head_dim + config.qk_rope_head_dim,
        "d_v": config.v_head_dim,
    }


DEEPSEEK = like_llama(
    LATENT, router_sites(), without="k", missing=MIXED | LATENT_KEYS, sizes=_latent_sizes
)
MINICPM3 = like_llama(
    LATENT,
    {
        "attn_out": output_of(".self_attn", times="residual_scale"),
        "mlp_out": output_of(".mlp", times="residual_scale"),
        "final_norm": output_of("model.norm", over="logits_scaling"),
    },
    without="k",
    missing=LATENT_KEYS,
    sizes=_latent_sizes,
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
    without="resid_mid",
    missing=PARALLEL_BLOCK,
)
GRANITE_MOE = like_llama(
    SCALED,
    {
        "mlp_in": input_of(".block_sparse_moe"),
        "mlp_out": output_of(".block_sparse_moe", times="residual_multiplier"),
    },
    router_sites(".block_sparse_moe.router"),
    missing=MIXED,
)
GLM4 = like_llama(
    GATED_TOGETHER,
    {
        "attn_out": output_of(".post_self_attn_layernorm"),
        "mlp_out": output_of(".post_mlp_layernorm"),
    },
)
WITH_HEADS = ("q", "k", "v", "q_rot", "k_rot", "scores", "pattern", "z")
QWEN3_NEXT = like_llama(
    {
        "attn_in": (input_of(".self_attn"), input_of(".linear_attn")),
        "attn_out": (output_of(".self_attn"), output_of(".linear_attn")),
        # The query of each head, then the gate of its output.
        "q": output_of(".self_attn.q_proj", cut="head: d_head | d_head"),
    },
    router_sites(),
    missing=MIXED
    | dict.fromkeys(
        WITH_HEADS,
        "this block's attention is linear (a gated delta rule), which has no pattern and no "
        "heads of this kind",
    ),
)
LFM2 = like_llama(
    attention_sites(".self_attn", "out_proj"),
    {
        "attn_in": (input_of(".self_attn"), input_of(".conv")),
        "attn_out": (output_of(".self_attn"), output_of(".conv")),
        "resid_mid": input_of(".ffn_norm", shared=True),
        "final_norm": output_of("model.embedding_norm"),
    },
    mlp_sites(".feed_forward", "w1", "w2"),
    missing=dict.fromkeys(
        WITH_HEADS, "this block is a convolution, without heads; attn_out is what it adds"
    ),
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


Row: TypeAlias = Family | Callable[[Any], Family]
"""A family, or a function that returns the family of a configuration."""

FAMILIES: Mapping[str, Row] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "ministral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text"), LLAMA),
    "gemma": LLAMA,
    "olmo": LLAMA,
    "helium": LLAMA,
    "smollm3": LLAMA,
    "seed_oss": LLAMA,
    "ernie4_5": LLAMA,
    "hunyuan_v1_dense": LLAMA,
    "gpt2": GPT2,
    "gpt_bigcode": gpt_bigcode,
    "gpt_neo": GPT_NEO,
    "gptj": GPTJ,
    "codegen": CODEGEN,
    "gpt_neox": gpt_neox,
    "opt": opt,
    "bloom": bloom,
    "falcon": falcon,
    "mpt": MPT,
    "phi": PHI,
    "phi3": like_llama(fused_qkv(".self_attn.qkv_proj"), GATED_TOGETHER),
    "persimmon": PERSIMMON,
    "nemotron": like_llama(PLAIN),
    "arcee": like_llama(PLAIN),
    "stablelm": stablelm,
    "starcoder2": like_llama(mlp_sites(".mlp", "c_fc", "c_proj")),
    "mixtral": MIXTURE,
    "qwen2_moe": MIXTURE,
    "qwen3_moe": MIXTURE,
    "olmoe": MIXTURE,
    "qwen3_next": QWEN3_NEXT,
    "gpt_oss": like_llama(router_sites(".mlp.router"), missing=MIXED),
    "gemma2": like_llama(POST_NORMED),
    "gemma3_text": like_llama(POST_NORMED),
    "gemma4_text": GEMMA4,
    "olmo2": like_llama(ONLY_POST_NORMED),
    "olmo3": like_llama(ONLY_POST_NORMED),
    "exaone4": like_llama(ONLY_POST_NORMED),
    "cohere": PARALLEL,
    "cohere2": PARALLEL,
    "granite": like_llama(SCALED),
    "granitemoe": GRANITE_MOE,
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": DEEPSEEK,
    "minicpm3": MINICPM3,
    "glm": like_llama(GATED_TOGETHER),
    "glm4": GLM4,
    "glm4v_text": GLM4,
    "apertus": like_llama(PLAIN, {"resid_mid": input_of(".feedforward_layernorm", shared=True)}),
    "lfm2": LFM2,
    "mamba": MAMBA,
    "mamba2": MAMBA,
}
"""The rows of models that write text."""

TABLE: Mapping[str, Row] = {**FAMILIES, **ENCODERS}
"""All rows: masked language models too."""

IN_AN_IMAGE = "attention sees all patches of an image from each of them, also the later ones"
MULTIMODAL_EXCEPTIONS: Mapping[str | None, Mapping[str, str]] = {
    "gemma3": {"pattern pattern": IN_AN_IMAGE},
    "gemma4": {"pattern pattern": IN_AN_IMAGE},
    "paligemma": {"pattern pattern": "attention sees the whole prompt from each of its tokens"},
}
"""By the type of a model that reads images, exceptions that the row of its text model lacks."""
