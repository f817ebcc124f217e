"""The settings with which `hk.tiny` makes small models that read images or sound, and
encoder-decoders.

The text model has the sizes of the other small models. An encoder has 3 blocks, its decoder 2.
Images have 8 times 8 pixels in patches of 4 times 4, and token 9 stands for them. Nothing here
imports torch.
"""

from collections.abc import Mapping
from typing import Any

TEXT: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "head_dim": 8,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
SLIDING: dict[str, Any] = {
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "query_pre_attn_scalar": 8,
}
LINEAR: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
EXPERTS: dict[str, Any] = {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "intermediate_size_mlp": 48,
    "num_hidden_layers": 4,  # every fourth block has no rotary positions
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
# Qwen's and GLM's towers read patches of two frames, and merge four of them into a token.
QWEN_VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 32,
    "in_channels": 3,
}
QWEN_TOKENS = {
    "image_token_id": 9,
    "video_token_id": 10,
    "vision_start_token_id": 11,
    "vision_end_token_id": 12,
}
GLM_TOKENS = {
    "image_token_id": 9,
    "video_token_id": 10,
    "image_start_token_id": 11,
    "image_end_token_id": 12,
    "video_start_token_id": 13,
    "video_end_token_id": 14,
}


def _rotary(*sections: int, part: float = 1.0) -> dict[str, Any]:
    """Returns rotary positions in which time, height and width have sections of each head."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}
    return {"rope_parameters": {**rope, "partial_rotary_factor": part}}


def _text(model_type: str) -> dict[str, Any]:
    return {"model_type": model_type, **TEXT}


def _vision(model_type: str, **settings: Any) -> dict[str, Any]:
    return {"model_type": model_type, **VISION, **settings}


LLAVA: dict[str, Any] = {
    "text_config": _text("llama"),
    "vision_config": _vision("clip_vision_model"),
    "image_token_index": 9,
    "vision_feature_layer": -1,
}
IDEFICS: dict[str, Any] = {
    "text_config": _text("llama"),
    "vision_config": VISION,
    "scale_factor": 2,
    "image_token_id": 9,
    "pad_token_id": 2,
}
# the last one must be full
GEMMA4_LAYERS = ["sliding_attention", "sliding_attention", "full_attention"]
QWEN_TEXT = TEXT | _rotary(1, 1, 2)

MULTIMODAL: Mapping[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": TEXT | SLIDING,
        "vision_config": VISION,
        "mm_tokens_per_image": 4,
        "image_token_index": 9,
        "boi_token_index": 11,
        "eoi_token_index": 12,
    },
    "gemma4": {
        "text_config": TEXT
        | SLIDING
        | {
            "head_dim": 8,
            "global_head_dim": 16,
            "layer_types": GEMMA4_LAYERS,
            "vocab_size_per_layer_input": 320,
            "hidden_size_per_layer_input": 8,
            "pad_token_id": 2,
            "use_bidirectional_attention": "vision",
        },
        "vision_config": VISION
        | {
            "num_key_value_heads": 2,
            "head_dim": 8,
            "patch_size": 2,
            "pooling_kernel_size": 2,
            "position_embedding_size": 16,
        },
        "image_token_id": 9,
        "video_token_id": 10,
        "audio_token_id": 8,
    },
    "glm4v": {
        "text_config": QWEN_TEXT,
        "vision_config": QWEN_VISION | {"image_size": 16},
        **GLM_TOKENS,
    },
    "idefics3": IDEFICS,
    "llama4": {
        "text_config": TEXT | EXPERTS,
        "vision_config": VISION
        | {
            "intermediate_size": 64,
            "pixel_shuffle_ratio": 0.5,
            "projector_input_dim": 16,
            "projector_output_dim": 16,
            "vision_output_dim": 16,
        },
        "image_token_index": 9,
    },
    "llava": LLAVA,
    "llava_next": LLAVA | {"image_grid_pinpoints": [[8, 8], [8, 16], [16, 8]]},
    "mistral3": {
        "text_config": _text("mistral"),
        "vision_config": _vision("pixtral", head_dim=8),
        "image_token_index": 9,
        "spatial_merge_size": 1,
        "vision_feature_layer": -1,
    },
    "paligemma": {
        "text_config": _text("gemma"),
        "vision_config": VISION | {"projection_dim": 32, "num_image_tokens": 4},
        "projection_dim": 32,
        "image_token_index": 9,
    },
    "qwen2_audio": {
        "text_config": _text("qwen2"),
        "audio_config": {
            "model_type": "qwen2_audio_encoder",
            "num_mel_bins": 8,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "d_model": 16,
            "max_source_positions": 20,
        },
        "audio_token_index": 9,
    },
    "qwen2_vl": {
        "text_config": QWEN_TEXT,
        "vision_config": QWEN_VISION | {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
        **QWEN_TOKENS,
    },
    "qwen2_5_vl": {
        "text_config": QWEN_TEXT,
        "vision_config": QWEN_VISION | {"fullatt_block_indexes": [1], "window_size": 16},
        **QWEN_TOKENS,
    },
    "qwen3_vl": {
        "text_config": QWEN_TEXT,
        "vision_config": QWEN_VISION
        | {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16},
        **QWEN_TOKENS,
    },
    "qwen3_5": {
        "text_config": TEXT | LINEAR | _rotary(1, 0, 1, part=0.5),
        "vision_config": QWEN_VISION | {"num_position_embeddings": 16},
        **QWEN_TOKENS,
    },
    "smolvlm": IDEFICS,
}
"""The settings of the configuration of each type of model that reads images or sound."""

# ---- encoder-decoders

START: dict[str, Any] = {
    "vocab_size": 320,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "decoder_start_token_id": 2,
}
T5: dict[str, Any] = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 4,
    **START,
}
BART: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 128,
    **START,
}
PADDED = {"pad_token_id": 3}
TWO_BLOCKS = {"num_hidden_layers": 2, "layer_types": SLIDING["layer_types"][:2]}

ENCODER_DECODERS: Mapping[str, dict[str, Any]] = {
    **dict.fromkeys(("bart", "blenderbot", "blenderbot-small", "marian", "mbart", "pegasus"), BART),
    "m2m_100": BART | {"pad_token_id": 1, "eos_token_id": 2},  # positions count from the pad id
    "mt5": T5 | {"feed_forward_proj": "gated-gelu"},
    "t5": T5,
    "t5gemma": {
        "encoder": TEXT | SLIDING | PADDED,
        "decoder": TEXT | SLIDING | PADDED | TWO_BLOCKS,
        **START,
        **PADDED,
    },
    "umt5": T5,
    "whisper": BART | {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 64},
}
"""The settings of the configuration of each encoder-decoder."""
