"""The rows of encoder-decoders: T5, BART and their kin, T5Gemma, Whisper.

A row is of the decoder, whose sites have plain names; its stack "encoder" is the row of the
encoder. Nothing here imports torch.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .schema import (
    HEAD,
    HEADS,
    NO_ROUTER,
    NOT_ROTARY,
    ROTARY,
    STREAM,
    Family,
    ModuleLocation,
    SiteLocations,
    attention_sites,
    input_of,
    inside,
    mlp_sites,
    output_of,
    rotary_sites,
    separate_qkv,
)

NO_HEAD = dict.fromkeys(
    ("lm_head", "logits"), "an encoder writes no text; the decoder's are lm_head and logits"
)
AFTER_THE_ADD = (
    "a norm stands after each addition, so that the stream is not the sum of what was added"
)
POST_NORM = dict.fromkeys(("sum", "one stream"), AFTER_THE_ADD)
SHARED_EMBEDDING = {
    "embed": "encoder and decoder call one embedding module; resid_pre.0 is what it gives"
}
RELATIVE = {"pos_embed": "positions are a bias of the attention scores"}


def cross_sites(path: str, q: str = "q_proj", projection: str = "o_proj") -> SiteLocations:
    """Returns the sites of the attention to the source."""
    kind = q.removeprefix("q")  # "_proj", or nothing
    return {
        "cross_in": input_of(path),
        "cross_q": output_of(f"{path}.{q}", cut=HEADS),
        "cross_k": output_of(f"{path}.k{kind}", cut="kv_head d_head"),
        "cross_v": output_of(f"{path}.v{kind}", cut="kv_head d_head"),
        "cross_scores": inside(path, "scores"),
        "cross_pattern": inside(path, "pattern"),
        "cross_z": input_of(f"{path}.{projection}", cut=HEADS),
        "cross_out": output_of(path),
    }


def _row(
    sites: SiteLocations,
    decoder: SiteLocations,
    encoder: SiteLocations,
    blocks: tuple[str, str],
    missing: Mapping[str, str],
    **fields: Any,
) -> Family:
    """Returns the row of a decoder with its encoder; `sites` are those of each block of both."""
    missing = {**NO_ROUTER, **missing}
    encoder_row = Family(
        "encoder", {**sites, **encoder}, {**missing, **NO_HEAD}, block=blocks[1], **fields
    )
    stacks = {"encoder": encoder_row}
    return Family(
        "decoder", {**sites, **HEAD, **decoder}, missing, block=blocks[0], stacks=stacks, **fields
    )


# ---- T5


def _t5_mlp(number: int, gated: bool) -> dict[str, ModuleLocation]:
    path = f".layer.{number}.DenseReluDense"
    return mlp_sites(path, "wi_0" if gated else "wi", "wo")


def t5(config: Any) -> Family:
    """Returns the row of T5, mT5 and UMT5, whose MLP may be gated."""
    attention = ".layer.0.SelfAttention"
    sites = {
        **STREAM,
        **attention_sites(attention, "o"),
        "q": output_of(f"{attention}.q", cut=HEADS),
        "k": output_of(f"{attention}.k", cut=HEADS),
        "v": output_of(f"{attention}.v", cut=HEADS),
        "resid_mid": input_of(".layer.1.layer_norm", shared=True),
    }
    decoder = {
        **cross_sites(".layer.1.EncDecAttention", "q", "o"),
        "cross_mid": input_of(".layer.2.layer_norm", shared=True),
        **_t5_mlp(2, config.is_gated_act),
        "final_norm": input_of("lm_head"),
    }
    encoder = {
        **_t5_mlp(1, config.is_gated_act),
        "final_norm": output_of("encoder.final_layer_norm"),
    }
    return _row(
        sites,
        decoder,
        encoder,
        ("decoder.block.{layer}", "encoder.block.{layer}"),
        {**RELATIVE, **NOT_ROTARY, **SHARED_EMBEDDING},
        sizes=_t5_sizes,
    )


def _t5_sizes(config: Any, layer: int | None) -> dict[str, int]:
    return {"d_head": config.d_kv}


# ---- BART and its kin


def _bart(*, norm_first: bool) -> Family:
    """Returns a row of BART's module tree.

    `norm_first` is True if a norm stands before each part of a block, and one at the end.
    """
    sites = {
        **STREAM,
        **attention_sites(".self_attn", "out_proj"),
        **separate_qkv(".self_attn"),
        "mlp_in": input_of(".fc1"),
        "mlp_pre": output_of(".fc1"),
        "mlp_post": input_of(".fc2"),
        "mlp_out": output_of(".fc2"),
    }
    before_cross = ".encoder_attn_layer_norm" if norm_first else ".encoder_attn"
    before_mlp = ".final_layer_norm" if norm_first else ".fc1"
    decoder: dict[str, ModuleLocation] = {
        "embed": output_of("model.decoder.embed_tokens"),
        "pos_embed": output_of("model.decoder.embed_positions"),
        "resid_mid": input_of(before_cross, shared=True),
        **cross_sites(".encoder_attn", projection="out_proj"),  # pyright: ignore[reportAssignmentType]
        "cross_mid": input_of(before_mlp, shared=True),
    }
    encoder: dict[str, ModuleLocation] = {
        "embed": output_of("model.encoder.embed_tokens"),
        "pos_embed": output_of("model.encoder.embed_positions"),
        "resid_mid": input_of(before_mlp, shared=True),
    }
    missing = dict(NOT_ROTARY)
    if norm_first:
        decoder["final_norm"] = output_of("model.decoder.layer_norm")
        encoder["final_norm"] = output_of("model.encoder.layer_norm")
    else:
        missing["final_norm"] = "each block ends in a norm: the last resid_post is what is read"
    exceptions = {} if norm_first else POST_NORM
    blocks = "model.decoder.layers.{layer}", "model.encoder.layers.{layer}"
    return _row(sites, decoder, encoder, blocks, missing, exceptions=exceptions)


BART = _bart(norm_first=False)
MBART = _bart(norm_first=True)


def whisper(config: Any) -> Family:
    """Returns the row of Whisper, whose encoder reads sound and has no token embedding."""
    row = replace(MBART, locations={**MBART.locations, "lm_head": output_of("proj_out")})
    encoder = row.stacks["encoder"]
    locations = {name: place for name, place in encoder.locations.items() if name != "embed"}
    locations["pos_embed"] = output_of("model.encoder.embed_positions")
    reason = {"embed": "the encoder reads sound: its first layers are convolutions"}
    encoder = replace(encoder, locations=locations, missing={**encoder.missing, **reason})
    return replace(row, stacks={"encoder": encoder})


# ---- T5Gemma


def _t5gemma() -> Family:
    sites = {
        **STREAM,
        **attention_sites(".self_attn"),
        **separate_qkv(".self_attn"),
        **rotary_sites(".self_attn"),
        "attn_out": output_of(".post_self_attn_layernorm"),
        **mlp_sites(".mlp", "gate_proj", "down_proj"),
        "mlp_out": output_of(".post_feedforward_layernorm"),
    }
    before_mlp = input_of(".pre_feedforward_layernorm", shared=True)
    decoder: dict[str, ModuleLocation] = {
        "embed": output_of("model.decoder.embed_tokens"),
        "resid_mid": input_of(".pre_cross_attn_layernorm", shared=True),
        **cross_sites(".cross_attn"),  # pyright: ignore[reportAssignmentType]
        "cross_out": output_of(".post_cross_attn_layernorm"),
        "cross_mid": before_mlp,
        "final_norm": output_of("model.decoder.norm"),
        "lm_head": output_of("lm_head.out_proj"),
    }
    encoder: dict[str, ModuleLocation] = {
        "embed": output_of("model.encoder.embed_tokens"),
        "resid_mid": before_mlp,
        "final_norm": output_of("model.encoder.norm"),
    }
    blocks = "model.decoder.layers.{layer}", "model.encoder.layers.{layer}"
    exceptions = dict.fromkeys(
        ("writing q_rot", "writing k_rot"),
        "generate counts the decoder's positions with the padding before a shorter prompt; "
        "attention sees their differences only",
    )
    return _row(sites, decoder, encoder, blocks, ROTARY, exceptions=exceptions)


ENCODER_DECODERS: Mapping[str, Any] = {
    "t5": t5,
    "mt5": t5,
    "umt5": t5,
    "bart": BART,
    "marian": BART,
    "blenderbot-small": BART,
    "mbart": MBART,
    "pegasus": MBART,
    "m2m_100": MBART,
    "blenderbot": MBART,
    "whisper": whisper,
    "t5gemma": _t5gemma(),
}
"""The rows by model type, or functions that return the row of a configuration."""
