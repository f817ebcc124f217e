"""Families in which some blocks have a state-space model or linear attention, and some attention.

In all of them, attn_in and attn_out are what the block's mixer reads and adds to the residual
stream, whether it is attention or not. Sites with heads are there in blocks with attention. At the
end are families whose blocks carry several residual streams. Nothing here imports torch.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, TypeAlias

from .llama import (
    DEEPSEEK,
    LLAMA_SITES,
    MIXED,
    MLP_OF_GRANITE,
    ONLY_POST_NORMED,
    POST_NORMED,
    SHARED_MIXTURE,
    SHARED_MLP,
    like_llama,
)
from .schema import (
    HEADS,
    LATENT_KEYS,
    Family,
    ModuleLocation,
    SiteLocations,
    attention_sites,
    input_of,
    mixture_sites,
    mlp_sites,
    output_of,
    rotary_sites,
    separate_qkv,
)

Locations: TypeAlias = ModuleLocation | tuple[ModuleLocation, ...]

WITH_HEADS = ("q", "k", "v", "q_rot", "k_rot", "scores", "pattern", "z")
NO_POSITIONS = dict.fromkeys(
    ("q_rot", "k_rot"),
    "attention has no positions, because the state-space blocks read the text in order",
)
FEED_FORWARD = mlp_sites(".feed_forward", "gate_proj", "down_proj")
BEFORE_FEED_FORWARD = {"resid_mid": input_of(".pre_ff_layernorm", shared=True)}
FINAL_LAYERNORM = {"final_norm": output_of("model.final_layernorm")}


def mixers(*modules: str) -> SiteLocations:
    """Returns attn_in and attn_out, at the one of these modules that a block has."""
    return {
        "attn_in": tuple(map(input_of, modules)),
        "attn_out": tuple(map(output_of, modules)),
    }


def without_heads(mixer: str) -> dict[str, str]:
    """Returns why the blocks whose mixer is no attention have no site with heads."""
    reason = f"this block has {mixer}, without a pattern and heads of this kind"
    return dict.fromkeys(WITH_HEADS, reason)


def in_blocks(locations: Locations, blocks: Iterable[int]) -> tuple[ModuleLocation, ...]:
    """Returns the locations in these blocks only: others have other modules of the same name."""
    if isinstance(locations, ModuleLocation):
        locations = (locations,)
    numbers = tuple(blocks)
    if not numbers:
        return ()
    return tuple(replace(location, layers=numbers) for location in locations)


def with_heads_in(family: Family, blocks: Iterable[int]) -> Family:
    """Returns a row whose sites with heads are in these blocks only."""
    located: dict[str, Locations] = dict(family.locations)
    for name in WITH_HEADS:
        if name in located:
            located[name] = in_blocks(located[name], blocks)
    return replace(family, locations=located)


def blocks_of(kinds: Iterable[str], *wanted: str) -> list[int]:
    """Returns the numbers of the blocks of these kinds."""
    return [number for number, kind in enumerate(kinds) if kind in wanted]


GATED_QUERY = {"q": output_of(".self_attn.q_proj", cut="head: d_head | d_head")}  # query, then gate
DELTA_RULE = without_heads("linear attention (a gated delta rule)")
STATE_SPACE = without_heads("a state-space mixer")
QWEN3_NEXT = like_llama(
    mixers(".self_attn", ".linear_attn"), GATED_QUERY, mixture_sites(), missing=MIXED | DELTA_RULE
)
QWEN3_5 = like_llama(mixers(".self_attn", ".linear_attn"), GATED_QUERY, missing=DELTA_RULE)
CONVOLUTION = without_heads("a convolution, whose output is attn_out")
LFM2_SITES: SiteLocations = {
    **attention_sites(".self_attn", "out_proj"),
    **mixers(".self_attn", ".conv"),
    "resid_mid": input_of(".ffn_norm", shared=True),
    "final_norm": output_of("model.embedding_norm"),
    **mlp_sites(".feed_forward", "w1", "w2"),
}
LFM2 = like_llama(LFM2_SITES, missing=CONVOLUTION)
LFM2_MOE = like_llama(
    LFM2_SITES, mixture_sites(".feed_forward.gate", "w1", "w2"), missing=MIXED | CONVOLUTION
)
LFM3 = like_llama(
    LFM2_SITES,
    attention_sites(".self_attn"),
    {
        "attn_in": input_of(".self_attn"),
        "attn_out": output_of(".post_operator_norm"),
        "mlp_out": output_of(".post_ffn_norm"),
    },
    missing=CONVOLUTION
    | {"attn_in": "this block is a convolution: its module is hk.module('model.layers.L.conv')"},
)
BAMBA = like_llama(
    mixers(".self_attn", ".mamba"),
    FEED_FORWARD,
    BEFORE_FEED_FORWARD,
    FINAL_LAYERNORM,
    missing=STATE_SPACE,
)
JAMBA = like_llama(
    mixers(".self_attn", ".mamba"),
    FEED_FORWARD,
    BEFORE_FEED_FORWARD,
    FINAL_LAYERNORM,
    mixture_sites(".feed_forward.router"),
    without=["q_rot", "k_rot"],
    missing=MIXED | STATE_SPACE | NO_POSITIONS,
)
FALCON_H1 = like_llama(
    FEED_FORWARD,
    BEFORE_FEED_FORWARD,
    FINAL_LAYERNORM,
    {"attn_out": output_of(".self_attn", times="attn_out_multiplier")},
    exceptions={
        "sum": "a state-space mixer adds to the stream beside attention: "
        "hk.module('model.layers.L.mamba'), multiplied by the block's ssm_out_multiplier"
    },
)


def granitemoehybrid(config: Any) -> Family:
    """Returns the row with experts beside the shared MLP or without, and with positions or not."""
    scaled = {
        "attn_out": tuple(
            output_of(path, times="residual_multiplier") for path in (".self_attn", ".mamba")
        )
    }
    mlp, without, missing = MLP_OF_GRANITE, [], dict(STATE_SPACE)
    if config.num_local_experts > 0:
        mlp, without = SHARED_MIXTURE, ["mlp_out"]
        missing |= {**MIXED, "mlp_out": SHARED_MLP}
    if config.position_embedding_type != "rope":
        without += NO_POSITIONS
        missing |= NO_POSITIONS
    return like_llama(mixers(".self_attn", ".mamba"), scaled, mlp, without=without, missing=missing)


def olmo_hybrid(config: Any) -> Family:
    """Returns the row: blocks with attention norm what they add, the others what they read."""
    attention = blocks_of(config.layer_types, "full_attention")
    linear = blocks_of(config.layer_types, "linear_attention")
    before_norm = {
        "attn_out": output_of(".linear_attn"),
        "resid_mid": LLAMA_SITES["resid_mid"],
        "mlp_out": LLAMA_SITES["mlp_out"],
    }
    sites: dict[str, Locations] = {}
    for name, location in ONLY_POST_NORMED.items():
        sites[name] = (*in_blocks(location, attention), *in_blocks(before_norm[name], linear))
    return like_llama(mixers(".self_attn", ".linear_attn"), sites, missing=DELTA_RULE)


def latent_and_linear(config: Any) -> Family:
    """Returns the row of latent attention in some blocks and linear attention in the others."""
    family = replace(DEEPSEEK, missing={**DEEPSEEK.missing, **DELTA_RULE, **LATENT_KEYS})
    return with_heads_in(family, blocks_of(config.layer_types, "full_attention"))


NORMED_STREAM = "each part of a block multiplies the normed stream and what it adds by numbers"


def minimax(config: Any) -> Family:
    """Returns the row of a stream that is normed, and attention that is linear in some blocks."""
    family = like_llama(
        {
            "attn_out": output_of(".self_attn", times="attn_beta_factor"),
            "mlp_out": output_of(".mlp", times="mlp_beta_factor"),
        },
        mixture_sites(),
        missing=MIXED | without_heads("lightning attention, which is linear"),
        exceptions={"sum": NORMED_STREAM},
    )
    return with_heads_in(family, blocks_of(config.layer_types, "full_attention"))


def recurrent_gemma(config: Any) -> Family:
    """Returns the row of attention in some blocks and a gated recurrence in the others."""
    family = like_llama(
        attention_sites(".temporal_block"),
        separate_qkv(".temporal_block"),
        rotary_sites(".temporal_block"),
        {"resid_mid": input_of(".channel_pre_norm", shared=True)},
        mlp_sites(".mlp_block", "gate_proj", "down_proj"),
        {"final_norm": output_of("model.final_norm")},
        missing=without_heads("a recurrence"),
    )
    return with_heads_in(family, blocks_of(config.layers_block_type, "sliding_attention"))


ONE_PART = "a block of this family has one part only: attention, a state-space mixer or an MLP"


def nemotron_h(config: Any) -> Family:
    """Returns the row of blocks with one part each, which are all named `mixer`."""
    kinds = config.layers_block_type
    with_mlp = blocks_of(kinds, "mlp", "moe")
    with_mixer = blocks_of(kinds, "full_attention", "linear_attention")
    sites: dict[str, Locations] = {
        "embed": output_of("model.embeddings"),
        **attention_sites(".mixer"),
        **separate_qkv(".mixer"),
        **mlp_sites(".mixer", "up_proj", "down_proj"),
        **mixture_sites(".mixer.gate", "up_proj", "down_proj"),
        "final_norm": output_of("model.norm_f"),
    }
    for name in ("attn_in", "attn_out"):
        sites[name] = in_blocks(sites[name], with_mixer)
    for name in ("mlp_in", "mlp_out"):
        sites[name] = in_blocks(sites[name], with_mlp)
    neurons = ("mlp_in", "mlp_pre", "mlp_post", "mlp_out")
    names = ("attn_in", "attn_out", "resid_mid", *neurons, *WITH_HEADS, *MIXED)
    family = like_llama(
        sites,
        without=["q_rot", "k_rot", "resid_mid"],
        missing=dict.fromkeys(names, ONE_PART) | NO_POSITIONS,
    )
    return with_heads_in(family, blocks_of(kinds, "full_attention"))


INTO_THE_MIXER = (
    "attention and its MLP read the stream and the embedding together, and what they give is an "
    "input of the block's state-space mixer: only the mixer adds to the stream"
)


def zamba(path: str, **row: Any) -> Family:
    """Returns the row of blocks with a state-space mixer, before which some have attention."""
    attention = f"{path}.self_attn"
    not_there = ("attn_in", "attn_out", "resid_mid", "mlp_in", "mlp_pre", "mlp_post", "mlp_out")
    return like_llama(
        attention_sites(attention),
        separate_qkv(attention),
        FINAL_LAYERNORM,
        without=[*not_there, "q_rot", "k_rot"],
        missing={**dict.fromkeys(not_there, INTO_THE_MIXER), **STATE_SPACE, **NO_POSITIONS},
        **row,
    )


ZAMBA = zamba(".shared_transf")
ZAMBA2 = zamba(
    ".shared_transformer",
    exceptions=dict.fromkeys(
        ("writing", "without cache"),
        "transformers limits the time step of the state-space mixer from below in a forward over a "
        "text, and not when it reads one more token with the cache",
    ),
)


# ---- several residual streams

SEVERAL_STREAMS = (
    "the blocks carry several residual streams, mix them, and add to each of them by weights that "
    "depend on the token; hk.module('model.layers.L') has all of them"
)
NO_STREAM = dict.fromkeys(("resid_pre", "resid_mid", "resid_post"), SEVERAL_STREAMS)
GEMMA3N = like_llama(
    POST_NORMED,
    without=NO_STREAM,
    missing=NO_STREAM
    | {
        "k": "this block takes its keys from an earlier one",
        "v": "this block takes its values from an earlier one",
    },
)
COMPRESSED_KEYS = "the keys of this block are not those of tokens: several are compressed into one"


def deepseek_v4(config: Any) -> Family:
    """Returns the row of several streams, and of keys that most blocks compress."""
    not_there = {
        **NO_STREAM,
        **dict.fromkeys(("k", "v"), "one vector of each token is the key and value of all heads"),
        "z": "the heads' outputs are turned back and projected in groups",
    }
    family = like_llama(
        {"q": output_of(".self_attn.q_b_proj", cut=HEADS)},
        mixture_sites(),
        without=not_there,
        missing={
            **MIXED,
            **not_there,
            **dict.fromkeys(("k_rot", "scores", "pattern"), COMPRESSED_KEYS),
        },
    )
    sites: dict[str, Locations] = dict(family.locations)
    for name in ("k_rot", "scores", "pattern"):
        sites[name] = in_blocks(sites[name], blocks_of(config.layer_types, "sliding_attention"))
    return replace(family, locations=sites)
