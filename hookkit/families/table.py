"""One row per model family: where each site is in the module tree, and why one is missing. Nothing here knows torch.

A row holds facts about the code in transformers. tests/test_laws.py proves each of them on a tiny random model, and
`hk.doctor` proves them on the user's own. Families that are built alike share the part of the row that says so.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from .places import Family, Place


def _out(path: str, **facts: Any) -> Place:
    return Place(path, "output", **facts)


def _into(path: str, **facts: Any) -> Place:
    return Place(path, "input", **facts)


def _inside(path: str, what: str, **facts: Any) -> Place:
    return Place(path, "inside", what, **facts)


# ---- parts that rows share

HEAD: Mapping[str, Place] = {"lm_head": _out("lm_head"), "logits": _out("", item="logits")}
STREAM: Mapping[str, Place] = {"resid_pre": _into("."), "resid_post": _out(".")}
HEADS, KEY_HEADS = "head d_head", "kv_head d_head"
FUSED = "head d_head | kv_head d_head | kv_head d_head"  # all queries, all keys, all values
BY_HEAD = "head: d_head | d_head | d_head"  # query, key and value of each head in turn


def _attention(path: str, out: str = "o_proj") -> dict[str, Place]:
    """What every attention has, whatever it is called."""
    return {
        "attn_in": _into(path),
        "scores": _inside(path, "scores"),
        "pattern": _inside(path, "pattern"),
        "z": _into(f"{path}.{out}", cut=HEADS),
        "attn_out": _out(path),
    }


def _turned(path: str) -> dict[str, Place]:
    """Queries and keys after the rotation, as the attention interface is given them."""
    return {"q_rot": _inside(path, "query"), "k_rot": _inside(path, "key")}


def _separate(path: str) -> dict[str, Place]:
    return {
        "q": _out(f"{path}.q_proj", cut=HEADS),
        "k": _out(f"{path}.k_proj", cut=KEY_HEADS),
        "v": _out(f"{path}.v_proj", cut=KEY_HEADS),
    }


def _fused(path: str, cut: str = FUSED, order: str = "qkv") -> dict[str, Place]:
    return {name: _out(path, cut=cut, part=order.index(name)) for name in "qkv"}


def _mlp(path: str, pre: str, post: str) -> dict[str, Place]:
    return {
        "mlp_in": _into(path),
        "mlp_pre": _out(f"{path}.{pre}"),
        "mlp_post": _into(f"{path}.{post}"),
        "mlp_out": _out(path),
    }


GATED = _mlp(".mlp", "gate_proj", "down_proj")
GATED_TOGETHER = GATED | {"mlp_pre": _out(".mlp.gate_up_proj", cut="d_mlp | d_mlp")}
PLAIN = _mlp(".mlp", "up_proj", "down_proj")


def _routed(router: str = ".mlp.gate") -> dict[str, Place]:
    """What a router says of each token. Where a block has a plain MLP in its place, the paths are not there."""
    return {
        "router_logits": _inside(router, "router", flat=True),
        "experts": _out(router, item=2, flat=True),
        "expert_weights": _out(router, item=1, flat=True),
    }


# ---- reasons

ROTARY = {"pos_embed": "positions are rotary: they turn q and k and are never added to the stream"}
ALIBI = {"pos_embed": "positions are ALiBi, a slope added to the attention scores, and are never added to the stream"}
UNTURNED = {
    "q_rot": "positions are not rotary: q is what goes into attention",
    "k_rot": "positions are not rotary: k is what goes into attention",
}
DENSE = dict.fromkeys(("router_logits", "experts", "expert_weights"), "the MLP is one network, without a router")
PARALLEL = {"resid_mid": "attention and MLP run in parallel: nothing of the stream stands between them"}
OWN = dict.fromkeys(
    ("q_rot", "k_rot"), "this family turns q and k inside its own attention code, which has no boundary there"
)
NEURONS = dict.fromkeys(
    ("mlp_pre", "mlp_post"),
    "the block's MLP is a mixture of experts: each token's neurons are those of the experts that it chose, and their "
    "code computes an expert's tokens together; see router_logits, experts, expert_weights and mlp_out",
)
NO_ATTENTION = dict.fromkeys(
    ("attn_in", "q", "k", "v", "q_rot", "k_rot", "scores", "pattern", "z", "attn_out", "resid_mid"),
    "a state-space block has no attention; its mixer is hk.module('backbone.layers.L.mixer')",
)
LATENT_KEYS = {
    "k": "each head's keys are expanded, in the attention's own code, from a latent that all heads share and a rotary "
    "part; see k_rot"
}


# ---- sizes


def _as_many(config: Any, layer: int | None) -> dict[str, int]:
    """As many key-value heads as heads."""
    return {"kv_head": config.num_attention_heads}


# ---- rows

LLAMA_PLACES: Mapping[str, Place] = {
    "embed": _out("model.embed_tokens"),
    **STREAM,
    **_attention(".self_attn"),
    **_separate(".self_attn"),
    **_turned(".self_attn"),
    "resid_mid": _into(".post_attention_layernorm", shared=True),
    **GATED,
    "final_norm": _out("model.norm"),
    **HEAD,
}
LLAMA_MISSING = {**ROTARY, **DENSE}
LLAMA = Family("llama", LLAMA_PLACES, LLAMA_MISSING)

# Norms behind attention and MLP: what they give is what is added to the stream.
POST_NORMED = LLAMA_PLACES | {
    "attn_out": _out(".post_attention_layernorm"),
    "resid_mid": _into(".pre_feedforward_layernorm", shared=True),
    "mlp_out": _out(".post_feedforward_layernorm"),
}
ONLY_POST_NORMED = POST_NORMED | {"resid_mid": _into(".mlp", shared=True)}
SCALED = {name: _out(LLAMA_PLACES[name].path, times="residual_multiplier") for name in ("attn_out", "mlp_out")}
WITHOUT_MID = {name: place for name, place in LLAMA_PLACES.items() if name != "resid_mid"}


def _mixture(name: str, places: Mapping[str, Place] | None = None, router: str = ".mlp.gate") -> Family:
    return Family(name, {**(places or LLAMA_PLACES), **_routed(router)}, {**ROTARY, **NEURONS, **_no_router()})


def _no_router() -> dict[str, str]:
    return dict.fromkeys(DENSE, "this block's MLP is one network, without a router")


def _latent(name: str, places: Mapping[str, Place], missing: Mapping[str, str]) -> Family:
    """Multi-head latent attention (DeepSeek-AI 2024): keys and values are expanded from a latent."""
    given = {
        **places,
        "q": (_out(".self_attn.q_proj", cut="head d_qk"), _out(".self_attn.q_b_proj", cut="head d_qk")),
        "v": _inside(".self_attn", "value"),
        "z": _into(".self_attn.o_proj", cut="head d_v"),
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


GPT2_PLACES: Mapping[str, Place] = {
    "embed": _out("transformer.wte"),
    "pos_embed": _out("transformer.wpe"),
    **STREAM,
    **_attention(".attn", "c_proj"),
    **_fused(".attn.c_attn"),
    "resid_mid": _into(".ln_2", shared=True),
    **_mlp(".mlp", "c_fc", "c_proj"),
    "final_norm": _out("transformer.ln_f"),
    **HEAD,
}
GPT2 = Family("gpt2", GPT2_PLACES, {**UNTURNED, **DENSE}, block="transformer.h.{layer}", sizes=_as_many)


def _gpt_bigcode(config: Any) -> Family:
    """One key-value head behind all queries, or the old layout, head by head."""
    cut = FUSED if config.multi_query else BY_HEAD
    sizes = {"kv_head": 1 if config.multi_query else config.num_attention_heads}
    return Family(
        "gpt_bigcode",
        {**GPT2_PLACES, **_fused(".attn.c_attn", cut)},
        GPT2.missing,
        block=GPT2.block,
        sizes=lambda config, layer: sizes,
    )


GPT_NEO = Family(
    "gpt_neo",
    GPT2_PLACES | _attention(".attn.attention", "out_proj") | _separate(".attn.attention"),
    GPT2.missing,
    block=GPT2.block,
    attention="own",
    sizes=_as_many,
)

GPTJ_PLACES: Mapping[str, Place] = {
    "embed": _out("transformer.wte"),
    **STREAM,
    **_attention(".attn", "out_proj"),
    **_separate(".attn"),
    **_mlp(".mlp", "fc_in", "fc_out"),
    "final_norm": _out("transformer.ln_f"),
    **HEAD,
}
GPTJ = Family(
    "gptj",
    GPTJ_PLACES,
    {**ROTARY, **PARALLEL, **OWN, **DENSE},
    block="transformer.h.{layer}",
    attention="own",
    sizes=_as_many,
)
CODEGEN = Family(
    "codegen",
    # four slices, made for as many devices, each with its heads' queries, values and keys
    GPTJ_PLACES | _fused(".attn.qkv_proj", "4: quarter d_head | quarter d_head | quarter d_head", order="qvk"),
    GPTJ.missing,
    block=GPTJ.block,
    attention="own",
    sizes=_as_many,
)


def _gpt_neox(config: Any) -> Family:
    parallel = config.use_parallel_residual
    places = {
        "embed": _out("gpt_neox.embed_in"),
        **STREAM,
        **_attention(".attention", "dense"),
        **_fused(".attention.query_key_value", BY_HEAD),
        **_turned(".attention"),
        **_mlp(".mlp", "dense_h_to_4h", "dense_4h_to_h"),
        "final_norm": _out("gpt_neox.final_layer_norm"),
        **HEAD,
    }
    if not parallel:
        places["resid_mid"] = _into(".post_attention_layernorm", shared=True)
    missing = {**ROTARY, **DENSE, **(PARALLEL if parallel else {})}
    return Family("gpt_neox", places, missing, block="gpt_neox.layers.{layer}", sizes=_as_many)


NORMED_STREAM = "this OPT normalises the stream itself after attention and after the MLP (do_layer_norm_before=False)"


def _opt(config: Any) -> Family:
    before = config.do_layer_norm_before
    places: dict[str, Place | tuple[Place, ...]] = {
        "embed": _out("model.decoder.embed_tokens"),
        "pos_embed": _out("model.decoder.embed_positions"),
        **STREAM,
        **_attention(".self_attn", "out_proj"),
        **_separate(".self_attn"),
        "mlp_in": _into(".fc1", flat=True),
        "mlp_pre": _out(".fc1", flat=True),
        "mlp_post": _into(".fc2", flat=True),
        "mlp_out": _out(".fc2", flat=True),
        "final_norm": (_out("model.decoder.project_out"), _out("model.decoder.final_layer_norm")),
        **HEAD,
    }
    missing = {**UNTURNED, **DENSE}
    if before:
        places["resid_mid"] = _into(".final_layer_norm", shared=True, flat=True)
        return Family("opt", places, missing, block="model.decoder.layers.{layer}", sizes=_as_many)
    missing |= {"resid_mid": NORMED_STREAM, "final_norm": NORMED_STREAM + ": the last block's output is read as it is"}
    return Family(
        "opt",
        places,
        missing,
        block="model.decoder.layers.{layer}",
        sizes=_as_many,
        exceptions=dict.fromkeys(("sum", "one stream attn_out", "one stream mlp_out"), NORMED_STREAM),
    )


AFTER_NORM = "this BLOOM adds to the normed stream (apply_residual_connection_post_layernorm=True)"


def _bloom(config: Any) -> Family:
    places = {
        "embed": _out("transformer.word_embeddings"),
        **STREAM,
        **_attention(".self_attention", "dense"),
        "attn_out": _out(".self_attention.dense"),  # the attention's own output has the stream added to it already
        **_fused(".self_attention.query_key_value", BY_HEAD),
        "resid_mid": _into(".post_attention_layernorm", shared=True),
        **_mlp(".mlp", "dense_h_to_4h", "dense_4h_to_h"),
        "mlp_out": _out(".mlp.dense_4h_to_h"),  # the same of the MLP
        "final_norm": _out("transformer.ln_f"),
        **HEAD,
    }
    missing = {**ALIBI, **UNTURNED, **DENSE}
    exceptions: dict[str, str] = {}
    if config.apply_residual_connection_post_layernorm:
        places.pop("resid_mid")
        missing["resid_mid"] = AFTER_NORM
        exceptions |= dict.fromkeys(("sum", "one stream attn_out"), AFTER_NORM)
    return Family(
        "bloom", places, missing, block="transformer.h.{layer}", attention="own", sizes=_as_many, exceptions=exceptions
    )


def _falcon(config: Any) -> Family:
    parallel = config.parallel_attn or config.new_decoder_architecture
    if config.new_decoder_architecture:
        cut, kv_heads = "kv_head: share d_head | d_head | d_head", config.num_kv_heads
    else:
        cut, kv_heads = (FUSED, 1) if config.multi_query else (BY_HEAD, config.num_attention_heads)
    places = {
        "embed": _out("transformer.word_embeddings"),
        **STREAM,
        **_attention(".self_attention", "dense"),
        **_fused(".self_attention.query_key_value", cut),
        **_mlp(".mlp", "dense_h_to_4h", "dense_4h_to_h"),
        "final_norm": _out("transformer.ln_f"),
        **HEAD,
    }
    if not parallel:
        places["resid_mid"] = _into(".post_attention_layernorm", shared=True)
    missing = {**(ALIBI | UNTURNED if config.alibi else ROTARY | OWN), **DENSE, **(PARALLEL if parallel else {})}
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
        "embed": _out("transformer.wte"),
        **STREAM,
        **_attention(".attn", "out_proj"),
        **_fused(".attn.Wqkv"),
        "resid_mid": _into(".norm_2", shared=True),
        **_mlp(".ffn", "up_proj", "down_proj"),
        "mlp_out": _out(".ffn.down_proj"),  # the MLP's own output has the stream added to it already
        "final_norm": _out("transformer.norm_f"),
        **HEAD,
    },
    {**ALIBI, **UNTURNED, **DENSE},
    block="transformer.blocks.{layer}",
    attention="own",
    sizes=_as_many,
    exceptions=dict.fromkeys(("batch scores", "writing scores"), COUNTED_BACK),
)

PHI = Family(
    "phi",
    {
        **WITHOUT_MID,
        **_attention(".self_attn", "dense"),
        **_mlp(".mlp", "fc1", "fc2"),
        "final_norm": _out("model.final_layernorm"),
    },
    {**LLAMA_MISSING, **PARALLEL},
)
PHI3 = Family("phi3", {**LLAMA_PLACES, **_fused(".self_attn.qkv_proj"), **GATED_TOGETHER}, LLAMA_MISSING)
PERSIMMON = Family(
    "persimmon",
    {
        **LLAMA_PLACES,
        **_attention(".self_attn", "dense"),
        **_fused(".self_attn.query_key_value", BY_HEAD),
        **_mlp(".mlp", "dense_h_to_4h", "dense_4h_to_h"),
        "final_norm": _out("model.final_layernorm"),
    },
    LLAMA_MISSING,
    sizes=_as_many,
)


def _stablelm(config: Any) -> Family:
    if config.use_parallel_residual:
        return Family("stablelm", WITHOUT_MID, {**LLAMA_MISSING, **PARALLEL})
    return Family("stablelm", LLAMA_PLACES, LLAMA_MISSING)


QWEN3_NEXT = Family(
    "qwen3_next",
    {
        **LLAMA_PLACES,
        "attn_in": (_into(".self_attn"), _into(".linear_attn")),
        "attn_out": (_out(".self_attn"), _out(".linear_attn")),
        "q": _out(".self_attn.q_proj", cut="head: d_head | d_head"),  # each head's query, then the gate of its output
        **_routed(),
    },
    {
        **ROTARY,
        **NEURONS,
        **_no_router(),
        **dict.fromkeys(
            ("q", "k", "v", "q_rot", "k_rot", "scores", "pattern", "z"),
            "this block's attention is linear (a gated delta rule), which has no pattern and no heads of this kind",
        ),
    },
)


PER_LAYER_INPUT = "each block also adds a token embedding of its own, and multiplies the stream by a scalar"
LAST_ONLY = (
    "while generating, the blocks that share the keys of earlier ones read the last position of the prompt only: their "
    "sites are not there at the others"
)


def _gemma4(config: Any) -> Family:
    missing = {
        **LLAMA_MISSING,
        "k": "this block takes its keys from an earlier one",
        "v": "this block takes its values from an earlier one, or uses its keys as values",
    }
    exceptions: dict[str, str] = dict.fromkeys(("sum", "one stream mlp_out"), PER_LAYER_INPUT)
    if config.num_kv_shared_layers:
        exceptions |= dict.fromkeys(("writing", "without cache"), LAST_ONLY)
    return Family("gemma4_text", POST_NORMED, missing, exceptions=exceptions)


MINICPM3 = _latent(
    "minicpm3",
    {
        **LLAMA_PLACES,
        "attn_out": _out(".self_attn", times="residual_scale"),
        "mlp_out": _out(".mlp", times="residual_scale"),
        "final_norm": _out("model.norm", over="logits_scaling"),
    },
    LLAMA_MISSING,
)

LFM2 = Family(
    "lfm2",
    {
        **LLAMA_PLACES,
        **_attention(".self_attn", "out_proj"),
        "attn_in": (_into(".self_attn"), _into(".conv")),
        "attn_out": (_out(".self_attn"), _out(".conv")),
        "resid_mid": _into(".ffn_norm", shared=True),
        **_mlp(".feed_forward", "w1", "w2"),
        "final_norm": _out("model.embedding_norm"),
    },
    {
        **LLAMA_MISSING,
        **dict.fromkeys(
            ("q", "k", "v", "q_rot", "k_rot", "scores", "pattern", "z"),
            "this block is a convolution, without heads; attn_out is what it adds",
        ),
    },
)

MAMBA = Family(
    "mamba",
    {"embed": _out("backbone.embeddings"), **STREAM, "final_norm": _out("backbone.norm_f"), **HEAD},
    {
        "pos_embed": "a state-space model has no positions: it reads the text in order",
        **NO_ATTENTION,
        **dict.fromkeys(("mlp_in", "mlp_pre", "mlp_post", "mlp_out"), "a state-space block has no MLP"),
        **DENSE,
    },
    block="backbone.layers.{layer}",
)

Row: TypeAlias = Family | Callable[[Any], Family]
"""A family, or the function that makes it of a configuration where that decides."""

FAMILIES: Mapping[str, Row] = {
    **dict.fromkeys(
        (
            "llama",
            "mistral",
            "ministral",
            "qwen2",
            "qwen3",
            "gemma",
            "olmo",
            "helium",
            "smollm3",
            "seed_oss",
            "ernie4_5",
        ),
        LLAMA,
    ),
    "hunyuan_v1_dense": LLAMA,
    "gpt2": GPT2,
    "gpt_bigcode": _gpt_bigcode,
    "gpt_neo": GPT_NEO,
    "gptj": GPTJ,
    "codegen": CODEGEN,
    "gpt_neox": _gpt_neox,
    "opt": _opt,
    "bloom": _bloom,
    "falcon": _falcon,
    "mpt": MPT,
    "phi": PHI,
    "phi3": PHI3,
    "persimmon": PERSIMMON,
    "nemotron": Family("nemotron", LLAMA_PLACES | PLAIN, LLAMA_MISSING),
    "arcee": Family("arcee", LLAMA_PLACES | PLAIN, LLAMA_MISSING),
    "stablelm": _stablelm,
    "starcoder2": Family("starcoder2", LLAMA_PLACES | _mlp(".mlp", "c_fc", "c_proj"), LLAMA_MISSING),
    "mixtral": _mixture("mixtral"),
    "qwen2_moe": _mixture("qwen2_moe"),
    "qwen3_moe": _mixture("qwen3_moe"),
    "olmoe": _mixture("olmoe"),
    "qwen3_next": QWEN3_NEXT,
    "gpt_oss": _mixture("gpt_oss", router=".mlp.router"),
    "gemma2": Family("gemma2", POST_NORMED, LLAMA_MISSING),
    "gemma3_text": Family("gemma3_text", POST_NORMED, LLAMA_MISSING),
    "gemma4_text": _gemma4,
    "olmo2": Family("olmo2", ONLY_POST_NORMED, LLAMA_MISSING),
    "olmo3": Family("olmo3", ONLY_POST_NORMED, LLAMA_MISSING),
    "exaone4": Family("exaone4", ONLY_POST_NORMED, LLAMA_MISSING),
    "cohere": Family("cohere", WITHOUT_MID, {**LLAMA_MISSING, **PARALLEL}),
    "cohere2": Family("cohere2", WITHOUT_MID, {**LLAMA_MISSING, **PARALLEL}),
    "granite": Family("granite", LLAMA_PLACES | SCALED, LLAMA_MISSING),
    "granitemoe": _mixture(
        "granitemoe",
        {
            **LLAMA_PLACES,
            "attn_out": SCALED["attn_out"],
            "mlp_in": _into(".block_sparse_moe"),
            "mlp_out": _out(".block_sparse_moe", times="residual_multiplier"),
        },
        router=".block_sparse_moe.router",
    ),
    "deepseek_v2": _latent("deepseek_v2", LLAMA_PLACES | _routed(), {**ROTARY, **NEURONS, **_no_router()}),
    "deepseek_v3": _latent("deepseek_v3", LLAMA_PLACES | _routed(), {**ROTARY, **NEURONS, **_no_router()}),
    "minicpm3": MINICPM3,
    "glm": Family("glm", LLAMA_PLACES | GATED_TOGETHER, LLAMA_MISSING),
    "glm4": Family(
        "glm4",
        {
            **LLAMA_PLACES,
            **GATED_TOGETHER,
            "attn_out": _out(".post_self_attn_layernorm"),
            "mlp_out": _out(".post_mlp_layernorm"),
        },
        LLAMA_MISSING,
    ),
    "apertus": Family(
        "apertus", {**LLAMA_PLACES, **PLAIN, "resid_mid": _into(".feedforward_layernorm", shared=True)}, LLAMA_MISSING
    ),
    "lfm2": LFM2,
    "mamba": MAMBA,
    "mamba2": MAMBA,
}
