"""Families with other module trees: GPT-2 and its descendants, and models without attention."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .schema import (
    ALIBI,
    BY_HEAD,
    FUSED,
    HEAD,
    NO_ATTENTION,
    NO_ROUTER,
    NOT_ROTARY,
    OWN_ATTENTION,
    PARALLEL_BLOCK,
    ROTARY,
    STREAM,
    Family,
    ModuleLocation,
    attention_sites,
    fused_qkv,
    input_of,
    mlp_sites,
    multi_head_sizes,
    output_of,
    rotary_sites,
    separate_qkv,
)

GPT2_SITES: Mapping[str, ModuleLocation] = {
    "embed": output_of("transformer.wte"),
    "pos_embed": output_of("transformer.wpe"),
    **STREAM,
    **attention_sites(".attn", "c_proj"),
    **fused_qkv(".attn.c_attn"),
    "resid_mid": input_of(".ln_2", shared=True),
    **mlp_sites(".mlp", "c_fc", "c_proj"),
    "final_norm": output_of("transformer.ln_f"),
    **HEAD,
}
GPT2 = Family(
    "gpt2",
    GPT2_SITES,
    {**NOT_ROTARY, **NO_ROUTER},
    block="transformer.h.{layer}",
    sizes=multi_head_sizes,
)


def gpt_bigcode(config: Any) -> Family:
    """Returns the row for one key-value head after all queries, or for one head after another."""
    cut, sizes = BY_HEAD, {"kv_head": config.num_attention_heads}
    if config.multi_query:
        cut, sizes = FUSED, {"kv_head": 1}
    sites = {**GPT2_SITES, **fused_qkv(".attn.c_attn", cut)}
    return replace(GPT2, locations=sites, sizes=lambda config, layer: sizes)


GPT_NEO = replace(
    GPT2,
    locations={
        **GPT2_SITES,
        **attention_sites(".attn.attention", "out_proj"),
        **separate_qkv(".attn.attention"),
    },
    attention="own",
)

GPTJ_SITES: Mapping[str, ModuleLocation] = {
    "embed": output_of("transformer.wte"),
    **STREAM,
    **attention_sites(".attn", "out_proj"),
    **separate_qkv(".attn"),
    **mlp_sites(".mlp", "fc_in", "fc_out"),
    "final_norm": output_of("transformer.ln_f"),
    **HEAD,
}
GPTJ = replace(
    GPT2,
    locations=GPTJ_SITES,
    missing={**ROTARY, **PARALLEL_BLOCK, **OWN_ATTENTION, **NO_ROUTER},
    attention="own",
)
FOUR_SLICES = "4: quarter d_head | quarter d_head | quarter d_head"
# The projection has four slices, for four devices: the queries, values and keys of their heads.
CODEGEN = replace(
    GPTJ, locations={**GPTJ_SITES, **fused_qkv(".attn.qkv_proj", FOUR_SLICES, order="qvk")}
)


def gpt_neox(config: Any) -> Family:
    """Returns the row for attention and MLP in parallel, or one after the other."""
    sites = {
        "embed": output_of("gpt_neox.embed_in"),
        **STREAM,
        **attention_sites(".attention", "dense"),
        **fused_qkv(".attention.query_key_value", BY_HEAD),
        **rotary_sites(".attention"),
        **mlp_sites(".mlp", "dense_h_to_4h", "dense_4h_to_h"),
        "final_norm": output_of("gpt_neox.final_layer_norm"),
        **HEAD,
    }
    missing = {**ROTARY, **NO_ROUTER}
    if config.use_parallel_residual:
        missing |= PARALLEL_BLOCK
    else:
        sites["resid_mid"] = input_of(".post_attention_layernorm", shared=True)
    return Family(
        "gpt_neox", sites, missing, block="gpt_neox.layers.{layer}", sizes=multi_head_sizes
    )


NORMED_STREAM = (
    "this OPT normalises the stream itself after attention and after the MLP "
    "(do_layer_norm_before=False)"
)


def opt(config: Any) -> Family:
    """Returns the row for norms before attention and MLP, or on the stream after them."""
    sites: dict[str, ModuleLocation | tuple[ModuleLocation, ...]] = {
        "embed": output_of("model.decoder.embed_tokens"),
        "pos_embed": output_of("model.decoder.embed_positions"),
        **STREAM,
        **attention_sites(".self_attn", "out_proj"),
        **separate_qkv(".self_attn"),
        "mlp_in": input_of(".fc1", flat=True),
        "mlp_pre": output_of(".fc1", flat=True),
        "mlp_post": input_of(".fc2", flat=True),
        "mlp_out": output_of(".fc2", flat=True),
        "final_norm": (
            output_of("model.decoder.project_out"),
            output_of("model.decoder.final_layer_norm"),
        ),
        **HEAD,
    }
    missing = {**NOT_ROTARY, **NO_ROUTER}
    exceptions: dict[str, str] = {}
    if config.do_layer_norm_before:
        sites["resid_mid"] = input_of(".final_layer_norm", shared=True, flat=True)
    else:
        missing["resid_mid"] = NORMED_STREAM
        missing["final_norm"] = NORMED_STREAM + ": the last block's output is read as it is"
        laws = ("sum", "one stream attn_out", "one stream mlp_out")
        exceptions = dict.fromkeys(laws, NORMED_STREAM)
    return Family(
        "opt",
        sites,
        missing,
        block="model.decoder.layers.{layer}",
        sizes=multi_head_sizes,
        exceptions=exceptions,
    )


AFTER_NORM = "this BLOOM adds to the normed stream (apply_residual_connection_post_layernorm=True)"


def bloom(config: Any) -> Family:
    """Returns the row for a residual stream that is not normed, or that is normed."""
    sites = {
        "embed": output_of("transformer.word_embeddings"),
        **STREAM,
        **attention_sites(".self_attention", "dense"),
        # The outputs of the attention and the MLP modules have the stream added to them already.
        "attn_out": output_of(".self_attention.dense"),
        **fused_qkv(".self_attention.query_key_value", BY_HEAD),
        "resid_mid": input_of(".post_attention_layernorm", shared=True),
        **mlp_sites(".mlp", "dense_h_to_4h", "dense_4h_to_h"),
        "mlp_out": output_of(".mlp.dense_4h_to_h"),
        "final_norm": output_of("transformer.ln_f"),
        **HEAD,
    }
    missing = {**ALIBI, **NOT_ROTARY, **NO_ROUTER}
    exceptions: dict[str, str] = {}
    if config.apply_residual_connection_post_layernorm:
        sites.pop("resid_mid")
        missing["resid_mid"] = AFTER_NORM
        exceptions = dict.fromkeys(("sum", "one stream attn_out"), AFTER_NORM)
    return replace(GPT2, locations=sites, missing=missing, attention="own", exceptions=exceptions)


def falcon(config: Any) -> Family:
    """Returns the row of a configuration.

    Falcon has three layouts of queries and keys, attention and MLP in parallel or one after the
    other, and rotary positions or ALiBi.
    """
    parallel = config.parallel_attn or config.new_decoder_architecture
    if config.new_decoder_architecture:
        cut, kv_heads = "kv_head: share d_head | d_head | d_head", config.num_kv_heads
    elif config.multi_query:
        cut, kv_heads = FUSED, 1
    else:
        cut, kv_heads = BY_HEAD, config.num_attention_heads
    sites = {
        "embed": output_of("transformer.word_embeddings"),
        **STREAM,
        **attention_sites(".self_attention", "dense"),
        **fused_qkv(".self_attention.query_key_value", cut),
        **mlp_sites(".mlp", "dense_h_to_4h", "dense_4h_to_h"),
        "final_norm": output_of("transformer.ln_f"),
        **HEAD,
    }
    missing = {**NO_ROUTER, **ROTARY, **OWN_ATTENTION}
    if config.alibi:
        missing = {**NO_ROUTER, **ALIBI, **NOT_ROTARY}
    if parallel:
        missing |= PARALLEL_BLOCK
    else:
        sites["resid_mid"] = input_of(".post_attention_layernorm", shared=True)
    return replace(
        GPT2,
        locations=sites,
        missing=missing,
        attention="own",
        sizes=lambda config, layer: {"kv_head": kv_heads},
    )


COUNTED_BACK = (
    "ALiBi is counted back from the last column of the batch: scores are known up to a number for "
    "each query and head, which the softmax takes out"
)
MPT = Family(
    "mpt",
    {
        "embed": output_of("transformer.wte"),
        **STREAM,
        **attention_sites(".attn", "out_proj"),
        **fused_qkv(".attn.Wqkv"),
        "resid_mid": input_of(".norm_2", shared=True),
        **mlp_sites(".ffn", "up_proj", "down_proj"),
        # The output of the MLP module has the stream added to it already.
        "mlp_out": output_of(".ffn.down_proj"),
        "final_norm": output_of("transformer.norm_f"),
        **HEAD,
    },
    {**ALIBI, **NOT_ROTARY, **NO_ROUTER},
    block="transformer.blocks.{layer}",
    attention="own",
    sizes=multi_head_sizes,
    exceptions=dict.fromkeys(("batch scores", "writing scores"), COUNTED_BACK),
)

MAMBA = Family(
    "mamba",
    {
        "embed": output_of("backbone.embeddings"),
        **STREAM,
        "final_norm": output_of("backbone.norm_f"),
        **HEAD,
    },
    {
        "pos_embed": "a state-space model has no positions: it reads the text in order",
        **NO_ATTENTION,
        **dict.fromkeys(
            ("mlp_in", "mlp_pre", "mlp_post", "mlp_out"), "a state-space block has no MLP"
        ),
        **NO_ROUTER,
    },
    block="backbone.layers.{layer}",
)
