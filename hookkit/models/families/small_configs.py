"""The settings of the small random models that `hk.tiny` makes of each family.

A model has 3 blocks (4 where its kinds of blocks need them), with every kind of block that the
family has: attention and its replacements, dense MLPs and mixtures of experts. Nothing here imports
torch.
"""

from collections.abc import Mapping
from typing import Any

SIZES: Mapping[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
EXPERTS: Mapping[str, Any] = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    "mlp_layer_types": ["dense", "sparse", "sparse"],
}
LATENT: Mapping[str, Any] = {  # multi-head latent attention
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "num_key_value_heads": 4,
}
INDEXED: Mapping[str, Any] = {  # sparse attention, to the keys that an indexer chooses
    "index_topk": 4,
    "index_head_dim": 8,
    "index_n_heads": 4,
    "layer_types": ["indexed_attention"] * 3,
    "indexer_types": ["full", "shared", "full"],
}
LINEAR: Mapping[str, Any] = {  # linear attention beside full attention
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
}
STATE_SPACE: Mapping[str, Any] = {  # Mamba 2 under the names of several families
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 8),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size"), 8),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 4),
    **dict.fromkeys(("mamba_n_groups", "mamba_ngroups", "n_groups"), 2),
    "mamba_d_ssm": 64,
    "mamba_dt_rank": 2,
    "time_step_rank": 2,
}
SHARED_SETTINGS = frozenset({*SIZES, *EXPERTS, *LATENT, *INDEXED, *LINEAR, *STATE_SPACE})
"""Settings under the names of several families, which a family that lacks them goes without."""

# Special tokens of masked language models; the padding's id counts positions in RoBERTa.
MASKED: Mapping[str, Any] = {
    "pad_token_id": 1,
    "cls_token_id": 0,
    "sep_token_id": 2,
    "eos_token_id": 2,
    "mask_token_id": 4,
}
SLIDING: Mapping[str, Any] = {
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
HEADS: Mapping[str, Any] = {"head_dim": 8}
GRANITE = {"residual_multiplier": 0.5, "embedding_multiplier": 2.0, "logits_scaling": 4.0}
OLD_EXPERTS = {**EXPERTS, "mlp_layer_types": None, "first_k_dense_replace": 1}
FEED_FORWARD_ELSEWHERE = {"num_key_value_heads": None, "intermediate_size": None}
FIRST_DENSE = {**EXPERTS, **HEADS, "first_k_dense_replace": 1}

LATENT_EXPERTS: Mapping[str, Any] = {**EXPERTS, **LATENT}
INDEXED_LATENT: Mapping[str, Any] = {**EXPERTS, **LATENT, **INDEXED}
LINEAR_EXPERTS: Mapping[str, Any] = {**EXPERTS, **LINEAR, **HEADS}

FAMILIES: Mapping[str, Mapping[str, Any]] = {
    **dict.fromkeys(
        ("ernie4_5", "gemma", "glm", "glm4", "helium", "hunyuan_v1_dense", "seed_oss"), HEADS
    ),
    **dict.fromkeys(("internlm3", "iquestcoder", "ministral3"), HEADS),
    **dict.fromkeys(("axk1", "glm4_moe_lite"), LATENT_EXPERTS),
    **dict.fromkeys(("deepseek_v32", "glm_moe_dsa", "axk2"), INDEXED_LATENT),
    **dict.fromkeys(("flex_olmo", "solar_open", "minimax_m2", "hy_v3", "glm4_moe"), FIRST_DENSE),
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"), LINEAR_EXPERTS),
    "afmoe": {**EXPERTS, **SLIDING, **HEADS, "num_dense_layers": 1, "num_shared_experts": 1},
    "aria_text": {**HEADS, "moe_num_experts": 4},
    "bailing_hybrid": {**EXPERTS, **LATENT, **LINEAR, "num_key_value_heads": 4},
    "bamba": {**STATE_SPACE, "attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 4},
    "cohere2": {**SLIDING, **HEADS},
    "cohere2_moe": {**EXPERTS, **SLIDING, **HEADS, "num_shared_experts": 1},
    "cwm": {**SLIDING, **HEADS},
    "albert": {"embedding_size": 16},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
        "position_biased_input": False,
        "position_buckets": 4,
    },
    "electra": {"embedding_size": 16},
    "esm": {"position_embedding_type": "rotary", "token_dropout": True, "mask_token_id": 4},
    "modernbert": {"local_attention": 6, "global_attn_every_n_layers": 2},
    "xmod": {"default_language": "en_XX"},
    "deepseek_v2": {**OLD_EXPERTS, **LATENT},
    "deepseek_v3": {**OLD_EXPERTS, **LATENT},
    "deepseek_v4": {
        **EXPERTS,
        "head_dim": 8,
        "q_lora_rank": 24,
        "qk_rope_head_dim": 4,
        "num_key_value_heads": 1,
        "o_groups": 2,
        "o_lora_rank": 12,
        "index_topk": 2,
        "index_head_dim": 8,
        "index_n_heads": 4,
        "sliding_window": 6,
        "hc_mult": 2,
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "layer_types": [
            "sliding_attention",
            "compressed_sparse_attention",
            "heavily_compressed_attention",
        ],
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
    },
    "dots1": {**FIRST_DENSE, "n_shared_experts": 1},
    "hyperclovax": {"residual_multiplier": 0.5, "use_post_norm": True},
    "doge": {**EXPERTS, "keep_window_size": 4},
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 24,
        "moe_num_shared_experts": 1,
    },
    "exaone4": SLIDING,
    "exaone_moe": {**EXPERTS, **SLIDING},
    "falcon": FEED_FORWARD_ELSEWHERE,
    "falcon_h1": {**STATE_SPACE, "attention_out_multiplier": 0.5, "ssm_out_multiplier": 0.7},
    "falcon_mamba": {"state_size": 8, "time_step_rank": 2},
    "flint": {**EXPERTS, **SLIDING, **HEADS, "mlp_only_layers": [0]},
    "gemma2": {**SLIDING, **HEADS, "query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0},
    "gemma3_text": {**SLIDING, **HEADS, "query_pre_attn_scalar": 8},
    "gemma3n_text": {
        **SLIDING,
        **HEADS,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "vocab_size_per_layer_input": 320,
        "hidden_size_per_layer_input": 8,
        "altup_num_inputs": 2,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    },
    "gemma4_text": {
        **SLIDING,
        **HEADS,
        # the last one must be full
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "global_head_dim": 16,
        "vocab_size_per_layer_input": 320,
        "hidden_size_per_layer_input": 8,
    },
    "gemma4_unified_text": {
        **SLIDING,
        **HEADS,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "global_head_dim": 16,
    },
    "gpt_neo": {
        "num_layers": 3,
        "attention_types": [[["global", "local", "global"], 1]],
        "window_size": 6,
        "num_hidden_layers": None,
    },
    "gpt_oss": {**EXPERTS, **SLIDING, **HEADS},
    "gptj": {"rotary_dim": 4},
    "granite": {**GRANITE, "attention_multiplier": 0.4},
    "granite_swa": {**GRANITE, **SLIDING, "layer_rope_theta": [10000.0] * 3},
    "granitemoe": {**EXPERTS, **GRANITE},
    "granitemoe_swa": {
        **EXPERTS,
        **GRANITE,
        **SLIDING,
        "layer_rope_theta": [10000.0] * 3,
        "shared_intermediate_size": 24,
    },
    "granitemoehybrid": {
        **EXPERTS,
        **GRANITE,
        **STATE_SPACE,
        "layer_types": LINEAR["layer_types"],
        "shared_intermediate_size": 24,
    },
    "granitemoeshared": {**EXPERTS, **GRANITE, "shared_intermediate_size": 24},
    "hunyuan_v1_moe": {**HEADS, "num_experts": 4, "moe_topk": [2, 2, 2]},
    "jamba": {
        **EXPERTS,
        **STATE_SPACE,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "kimi_linear": {**EXPERTS, **LATENT, **LINEAR, "num_shared_experts": 1},
    "laguna": {**EXPERTS, **SLIDING, **HEADS, "num_attention_heads_per_layer": [4, 8, 4]},
    "lfm2": {
        "layer_types": ["full_attention", "conv", "full_attention"],
        "block_auto_adjust_ff_dim": False,
    },
    "lfm2_moe": {
        **EXPERTS,
        "layer_types": ["full_attention", "conv", "full_attention"],
        "num_dense_layers": 1,
    },
    "lfm3": {**HEADS, **SLIDING, "layer_types": ["sliding_attention", "conv", "full_attention"]},
    "llama4_text": {
        **EXPERTS,
        **HEADS,
        "intermediate_size_mlp": 48,
        "moe_layers": [1, 2],
        "no_rope_layers": [1, 1, 0],
        "attention_chunk_size": 4,
        "num_experts_per_tok": 1,
    },
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2, "state_size": 8, "chunk_size": 4},
    "mellum": {**EXPERTS, **SLIDING, **HEADS},
    "mimo_v2_flash": {**EXPERTS, **SLIDING, **HEADS, "v_head_dim": 6},
    "minicpm3": {**LATENT, "dim_model_base": 16},
    "minimax": {
        **EXPERTS,
        **HEADS,
        "layer_types": LINEAR["layer_types"],
        "block_size": 4,
        "linear_attn_alpha_factor": 1.5,
        "mlp_alpha_factor": 1.25,
    },
    "ministral": {**SLIDING, **HEADS},
    "mistral": {"sliding_window": 6},
    "mistral4": {**OLD_EXPERTS, **LATENT},
    "mixtral": EXPERTS,
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 128},
    "nemotron_h": {
        **EXPERTS,
        **HEADS,
        **STATE_SPACE,
        "num_hidden_layers": None,
        "layers_block_type": ["linear_attention", "full_attention", "mlp", "moe"],
        "moe_shared_expert_intermediate_size": 24,
    },
    "olmo3": SLIDING,
    "olmo_hybrid": LINEAR,
    "olmoe": EXPERTS,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, **FEED_FORWARD_ELSEWHERE},
    "phimoe": EXPERTS,
    "qwen2_moe": {**EXPERTS, "mlp_only_layers": [0]},
    "qwen3": {"head_dim": 16},  # wider than d_model / heads
    "qwen3_moe": {**EXPERTS, **HEADS, "mlp_only_layers": [0]},
    "recurrent_gemma": {
        **HEADS,
        "lru_width": 32,
        "attention_window_size": 6,
        "block_types": ["recurrent", "attention", "recurrent"],
    },
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "vaultgemma": {**SLIDING, **HEADS, "query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0},
    "youtu": LATENT,
    "zamba": {
        **STATE_SPACE,
        "n_mamba_heads": 2,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zamba2": {
        **STATE_SPACE,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "kv_channels": 8,
        "adapter_rank": 4,
    },
}
"""What a family needs besides the sizes, by model type. None removes a setting."""
