"""The rows of towers: the stacks that read images or sound in a multimodal model.

A tower reads each image by itself, and its positions are patches. Most towers have a tensor
[image, patch, ...]; others join the patches of all images of a batch on one axis. `Tower` says
which, and where the numbers of patches are read. Nothing here imports torch.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

from .schema import (
    FUSED,
    NO_ROUTER,
    NOT_ROTARY,
    ROTARY,
    STREAM,
    Family,
    ModuleLocation,
    Tower,
    attention_sites,
    fused_qkv,
    input_of,
    mlp_sites,
    output_of,
    rotary_sites,
    separate_qkv,
)

NO_TEXT = dict.fromkeys(
    ("lm_head", "logits"), "a tower writes no text; the text model's are lm_head and logits"
)
CONVOLUTION = {
    "embed": "a convolution gives patches on two axes, height and width; resid_pre.0 is what the "
    "first block reads"
}
IN_A_WEIGHT = {"pos_embed": "positions are a weight that is added by itself, without a module"}
READS_BLOCK = {
    "final_norm": "the text model reads the stream after a block, before the norm at the tower's "
    "end"
}
Locations: TypeAlias = dict[str, ModuleLocation]


def _row(
    name: str, locations: Locations, missing: Mapping[str, str], tower: Tower, **fields: Any
) -> Family:
    missing = {**NO_ROUTER, **NO_TEXT, **missing}
    return Family(name, locations, missing, tower=tower, **fields)


def _last_block(config: Any) -> int:
    """Returns the number of the last block that the text model reads, counted from the end."""
    layers = getattr(config, "vision_feature_layer", None)
    if layers is None:
        return -1
    last = max(layers) if isinstance(layers, list | tuple) else layers
    if last >= 0:  # of the streams, of which the first one is before the blocks
        last -= config.vision_config.num_hidden_layers + 1
    return last


def clip_like(config: Any, path: str) -> Family:
    """Returns the row of CLIP's and SigLIP's module tree, in a model with this configuration."""
    kind = config.vision_config.model_type
    is_clip = kind == "clip_vision_model"
    counts = "pixels"
    if config.model_type == "llava_next":
        counts = "crops"
    if kind in ("idefics3_vision", "smolvlm_vision"):
        counts = "pixel mask"
    tower = Tower(path, counts, before=int(is_clip), last_block=_last_block(config))
    locations: Locations = {
        "pos_embed": output_of(f"{path}.embeddings.position_embedding"),
        **STREAM,
        **attention_sites(".self_attn", "out_proj"),
        **separate_qkv(".self_attn"),
        "resid_mid": input_of(".layer_norm2", shared=True),
        **mlp_sites(".mlp", "fc1", "fc2"),
    }
    missing = {**CONVOLUTION, **NOT_ROTARY}
    if is_clip or hasattr(config, "vision_feature_layer"):
        missing |= READS_BLOCK
    else:
        locations["final_norm"] = output_of(f"{path}.post_layernorm")
    block = f"{path}.encoder.layers.{{layer}}"
    return _row("vision tower", locations, missing, tower, block=block)


def pixtral(config: Any, path: str) -> Family:
    """Returns the row of Pixtral, which joins all images and hides them from one another."""
    locations: Locations = {
        "embed": input_of(f"{path}.ln_pre"),
        **STREAM,
        **attention_sites(".attention"),
        **separate_qkv(".attention"),
        **rotary_sites(".attention"),
        "resid_mid": input_of(".ffn_norm", shared=True),
        **mlp_sites(".feed_forward", "gate_proj", "down_proj"),
    }
    tower = Tower(path, "image sizes", packed=True, last_block=_last_block(config))
    missing = {**ROTARY, **READS_BLOCK}
    block = f"{path}.transformer.layers.{{layer}}"
    return _row("vision tower", locations, missing, tower, block=block)


def llama4_vision(config: Any, path: str) -> Family:
    """Returns the row of Llama 4's tower, whose class token is an image's last position."""
    locations: Locations = {
        "resid_pre": input_of(".", item="hidden_state"),
        "resid_post": output_of("."),
        **attention_sites(".self_attn"),
        **separate_qkv(".self_attn"),
        **rotary_sites(".self_attn"),
        "resid_mid": input_of(".post_attention_layernorm", shared=True),
        **mlp_sites(".mlp", "fc1", "fc2"),
        "final_norm": output_of(f"{path}.layernorm_post"),
    }
    missing = {
        **IN_A_WEIGHT,
        "embed": "the class token is joined to the patches, and a norm follows, before the first "
        "block; resid_pre.0 is what that reads",
    }
    block = f"{path}.model.layers.{{layer}}"
    return _row("vision tower", locations, missing, Tower(path, "pixels", after=1), block=block)


def gemma4_vision(config: Any, path: str) -> Family:
    """Returns the row of Gemma 4's tower, which pads images to one number of patches."""
    del config
    locations: Locations = {
        "embed": output_of(f"{path}.patch_embedder"),
        **STREAM,
        **attention_sites(".self_attn"),
        **separate_qkv(".self_attn"),
        **rotary_sites(".self_attn"),
        "attn_out": output_of(".post_attention_layernorm"),
        "resid_mid": input_of(".pre_feedforward_layernorm", shared=True),
        **mlp_sites(".mlp", "gate_proj", "down_proj"),
        "mlp_out": output_of(".post_feedforward_layernorm"),
    }
    missing = {**ROTARY, "final_norm": "the tower ends without a norm"}
    block = f"{path}.encoder.layers.{{layer}}"
    tower = Tower(path, "patch positions")
    return _row("vision tower", locations, missing, tower, block=block)


QWEN_MLPS = {
    "qwen2_vl_vision": ("fc1", "fc2"),
    "qwen2_5_vl_vision": ("gate_proj", "down_proj"),
    "qwen3_vl_vision": ("linear_fc1", "linear_fc2"),
    "qwen3_5_vision": ("linear_fc1", "linear_fc2"),
    "glm4v_vision": ("gate_proj", "down_proj"),
}
QWEN_LAST_NORMS = {
    "qwen3_vl_vision": "merger.norm",
    "qwen3_5_vision": "merger.norm",
    "glm4v_vision": "post_layernorm",
}
POSITIONS = {
    "qwen3_vl_vision": "positions are interpolated from four embeddings for each patch",
    "qwen3_5_vision": "positions are interpolated from four embeddings for each patch",
    "glm4v_vision": "positions are interpolated and added in one module, model.visual.embeddings",
}
DEEPSTACK_BLOCKS = "deepstack_visual_indexes"
DEEPSTACK = {
    "one stream resid_post": "the text model also reads the stream after some of the blocks"
}
BY_WINDOW = {
    "embed": "the blocks read the patches in the order of windows, and embed has them in that of "
    "the image; resid_pre.0 is what the first block reads"
}


def qwen_like(config: Any, path: str) -> Family:
    """Returns the row of Qwen's towers and GLM's, whose attention runs once for each image."""
    kind = config.vision_config.model_type
    locations: Locations = {
        "embed": output_of(f"{path}.patch_embed"),
        **STREAM,
        **attention_sites(".attn", "proj"),
        **fused_qkv(".attn.qkv", FUSED),
        **rotary_sites(".attn"),
        "resid_mid": input_of(".norm2", shared=True),
        **mlp_sites(".mlp", *QWEN_MLPS[kind]),
        "final_norm": output_of(f"{path}.{QWEN_LAST_NORMS.get(kind, 'merger.ln_q')}"),
    }
    flat = {site: replace(location, flat=True) for site, location in locations.items()}
    missing = {**ROTARY}
    if kind in POSITIONS:
        missing["pos_embed"] = POSITIONS[kind]
    if kind == "qwen2_5_vl_vision":
        missing |= BY_WINDOW
        del flat["embed"]
    return _row(
        "vision tower",
        flat,
        missing,
        Tower(path, "grid", packed=True),
        block=f"{path}.blocks.{{layer}}",
        sizes=_qwen_sizes,
        exceptions=DEEPSTACK if getattr(config.vision_config, DEEPSTACK_BLOCKS, None) else {},
    )


def _qwen_sizes(config: Any, layer: int | None) -> dict[str, int]:
    # Qwen2-VL calls the width of what the merger gives hidden_size.
    width = getattr(config, "embed_dim", None) or config.hidden_size
    return {"d_model": width, "d_head": width // config.num_heads}


def qwen2_audio(config: Any, path: str) -> Family:
    """Returns the row of Qwen2-Audio's encoder, which is that of Whisper."""
    locations: Locations = {
        **STREAM,
        **attention_sites(".self_attn", "out_proj"),
        **separate_qkv(".self_attn"),
        "resid_mid": input_of(".final_layer_norm", shared=True),
        "mlp_in": input_of(".fc1"),
        "mlp_pre": output_of(".fc1"),
        "mlp_post": input_of(".fc2"),
        "mlp_out": output_of(".fc2"),
    }
    missing = {
        **NOT_ROTARY,
        **IN_A_WEIGHT,
        "embed": "the encoder reads sound: its first layers are convolutions",
        "final_norm": "the norm at the end stands after each two frames have become one",
    }
    block = f"{path}.layers.{{layer}}"
    return _row("audio tower", locations, missing, Tower(path, "frames"), block=block)


TOWERS: Mapping[str, Callable[[Any, str], Family]] = {
    **dict.fromkeys(("clip_vision_model", "siglip_vision_model"), clip_like),
    **dict.fromkeys(("idefics3_vision", "smolvlm_vision"), clip_like),
    **dict.fromkeys(QWEN_MLPS, qwen_like),
    "gemma4_vision": gemma4_vision,
    "pixtral": pixtral,
    "llama4_vision_model": llama4_vision,
    "qwen2_audio_encoder": qwen2_audio,
}
"""By the type of a tower's configuration: its row, from the model's configuration and its path."""
