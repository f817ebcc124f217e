"""Families with a module tree of their own: GPT-2 and what came of it, and models without attention."""

from collections.abc import Mapping
from typing import Any

from .schema import Family, ModuleLocation
from .shared import (
    ALIBI,
    BY_HEAD,
    DENSE,
    FUSED,
    HEAD,
    NO_ATTENTION,
    OWN,
    PARALLEL,
    ROTARY,
    STREAM,
    UNTURNED,
    as_many,
    attention,
    fused,
    into,
    mlp,
    out,
    separate,
    turned,
)

GPT2_PLACES: Mapping[str, ModuleLocation] = {
    "embed": out("transformer.wte"),
    "pos_embed": out("transformer.wpe"),
    **STREAM,
    **attention(".attn", "c_proj"),
    **fused(".attn.c_attn"),
    "resid_mid": into(".ln_2", shared=True),
    **mlp(".mlp", "c_fc", "c_proj"),
    "final_norm": out("transformer.ln_f"),
    **HEAD,
}
GPT2 = Family(
    "gpt2", GPT2_PLACES, {**UNTURNED, **DENSE}, block="transformer.h.{layer}", sizes=as_many
)


def gpt_bigcode(config: Any) -> Family:
    """One key-value head behind all queries, or the old layout, head by head."""
    cut = FUSED if config.multi_query else BY_HEAD
    sizes = {"kv_head": 1 if config.multi_query else config.num_attention_heads}
    return Family(
        "gpt_bigcode",
        {**GPT2_PLACES, **fused(".attn.c_attn", cut)},
        GPT2.missing,
        block=GPT2.block,
        sizes=lambda config, layer: sizes,
    )


GPT_NEO = Family(
    "gpt_neo",
    GPT2_PLACES | attention(".attn.attention", "out_proj") | separate(".attn.attention"),
    GPT2.missing,
    block=GPT2.block,
    attention="own",
    sizes=as_many,
)

GPTJ_PLACES: Mapping[str, ModuleLocation] = {
    "embed": out("transformer.wte"),
    **STREAM,
    **attention(".attn", "out_proj"),
    **separate(".attn"),
    **mlp(".mlp", "fc_in", "fc_out"),
    "final_norm": out("transformer.ln_f"),
    **HEAD,
}
GPTJ = Family(
    "gptj",
    GPTJ_PLACES,
    {**ROTARY, **PARALLEL, **OWN, **DENSE},
    block="transformer.h.{layer}",
    attention="own",
    sizes=as_many,
)
CODEGEN = Family(
    "codegen",
    # four slices, made for as many devices, each with its heads' queries, values and keys
    GPTJ_PLACES
    | fused(".attn.qkv_proj", "4: quarter d_head | quarter d_head | quarter d_head", order="qvk"),
    GPTJ.missing,
    block=GPTJ.block,
    attention="own",
    sizes=as_many,
)


def gpt_neox(config: Any) -> Family:
    """Attention and MLP in parallel, or in turn."""
    parallel = config.use_parallel_residual
    places = {
        "embed": out("gpt_neox.embed_in"),
        **STREAM,
        **attention(".attention", "dense"),
        **fused(".attention.query_key_value", BY_HEAD),
        **turned(".attention"),
        **mlp(".mlp", "dense_h_to_4h", "dense_4h_to_h"),
        "final_norm": out("gpt_neox.final_layer_norm"),
        **HEAD,
    }
    if not parallel:
        places["resid_mid"] = into(".post_attention_layernorm", shared=True)
    missing = {**ROTARY, **DENSE, **(PARALLEL if parallel else {})}
    return Family("gpt_neox", places, missing, block="gpt_neox.layers.{layer}", sizes=as_many)


NORMED_STREAM = "this OPT normalises the stream itself after attention and after the MLP (do_layer_norm_before=False)"


def opt(config: Any) -> Family:
    """Norms before attention and MLP, or on the stream behind them."""
    before = config.do_layer_norm_before
    places: dict[str, ModuleLocation | tuple[ModuleLocation, ...]] = {
        "embed": out("model.decoder.embed_tokens"),
        "pos_embed": out("model.decoder.embed_positions"),
        **STREAM,
        **attention(".self_attn", "out_proj"),
        **separate(".self_attn"),
        "mlp_in": into(".fc1", flat=True),
        "mlp_pre": out(".fc1", flat=True),
        "mlp_post": into(".fc2", flat=True),
        "mlp_out": out(".fc2", flat=True),
        "final_norm": (out("model.decoder.project_out"), out("model.decoder.final_layer_norm")),
        **HEAD,
    }
    missing = {**UNTURNED, **DENSE}
    if before:
        places["resid_mid"] = into(".final_layer_norm", shared=True, flat=True)
        return Family("opt", places, missing, block="model.decoder.layers.{layer}", sizes=as_many)
    missing |= {
        "resid_mid": NORMED_STREAM,
        "final_norm": NORMED_STREAM + ": the last block's output is read as it is",
    }
    return Family(
        "opt",
        places,
        missing,
        block="model.decoder.layers.{layer}",
        sizes=as_many,
        exceptions=dict.fromkeys(
            ("sum", "one stream attn_out", "one stream mlp_out"), NORMED_STREAM
        ),
    )


AFTER_NORM = "this BLOOM adds to the normed stream (apply_residual_connection_post_layernorm=True)"


def bloom(config: Any) -> Family:
    """The stream goes on as it was before the norm, or normed."""
    places = {
        "embed": out("transformer.word_embeddings"),
        **STREAM,
        **attention(".self_attention", "dense"),
        "attn_out": out(
            ".self_attention.dense"
        ),  # the attention's own output has the stream added to it already
        **fused(".self_attention.query_key_value", BY_HEAD),
        "resid_mid": into(".post_attention_layernorm", shared=True),
        **mlp(".mlp", "dense_h_to_4h", "dense_4h_to_h"),
        "mlp_out": out(".mlp.dense_4h_to_h"),  # the same of the MLP
        "final_norm": out("transformer.ln_f"),
        **HEAD,
    }
    missing = {**ALIBI, **UNTURNED, **DENSE}
    exceptions: dict[str, str] = {}
    if config.apply_residual_connection_post_layernorm:
        places.pop("resid_mid")
        missing["resid_mid"] = AFTER_NORM
        exceptions |= dict.fromkeys(("sum", "one stream attn_out"), AFTER_NORM)
    return Family(
        "bloom",
        places,
        missing,
        block="transformer.h.{layer}",
        attention="own",
        sizes=as_many,
        exceptions=exceptions,
    )


def falcon(config: Any) -> Family:
    """Three layouts of queries and keys; attention and MLP in parallel, or in turn; rotary positions, or ALiBi."""
    parallel = config.parallel_attn or config.new_decoder_architecture
    if config.new_decoder_architecture:
        cut, kv_heads = "kv_head: share d_head | d_head | d_head", config.num_kv_heads
    else:
        cut, kv_heads = (FUSED, 1) if config.multi_query else (BY_HEAD, config.num_attention_heads)
    places = {
        "embed": out("transformer.word_embeddings"),
        **STREAM,
        **attention(".self_attention", "dense"),
        **fused(".self_attention.query_key_value", cut),
        **mlp(".mlp", "dense_h_to_4h", "dense_4h_to_h"),
        "final_norm": out("transformer.ln_f"),
        **HEAD,
    }
    if not parallel:
        places["resid_mid"] = into(".post_attention_layernorm", shared=True)
    missing = {
        **(ALIBI | UNTURNED if config.alibi else ROTARY | OWN),
        **DENSE,
        **(PARALLEL if parallel else {}),
    }
    return Family(
        "falcon",
        places,
        missing,
        block="transformer.h.{layer}",
        attention="own",
        sizes=lambda config, layer: {"kv_head": kv_heads},
    )


COUNTED_BACK = (
    "ALiBi is counted back from the last column of the batch: scores are known up to a number for each query and head, "
    "which the softmax takes out"
)
MPT = Family(
    "mpt",
    {
        "embed": out("transformer.wte"),
        **STREAM,
        **attention(".attn", "out_proj"),
        **fused(".attn.Wqkv"),
        "resid_mid": into(".norm_2", shared=True),
        **mlp(".ffn", "up_proj", "down_proj"),
        "mlp_out": out(".ffn.down_proj"),  # the MLP's own output has the stream added to it already
        "final_norm": out("transformer.norm_f"),
        **HEAD,
    },
    {**ALIBI, **UNTURNED, **DENSE},
    block="transformer.blocks.{layer}",
    attention="own",
    sizes=as_many,
    exceptions=dict.fromkeys(("batch scores", "writing scores"), COUNTED_BACK),
)

MAMBA = Family(
    "mamba",
    {"embed": out("backbone.embeddings"), **STREAM, "final_norm": out("backbone.norm_f"), **HEAD},
    {
        "pos_embed": "a state-space model has no positions: it reads the text in order",
        **NO_ATTENTION,
        **dict.fromkeys(
            ("mlp_in", "mlp_pre", "mlp_post", "mlp_out"), "a state-space block has no MLP"
        ),
        **DENSE,
    },
    block="backbone.layers.{layer}",
)
