"""The table of families, one row each: where each site is in the module tree, or why it is missing.

A row holds facts about the code in transformers. tests/checks/test_every_family.py checks them on
a tiny random model of each family, and `hk.doctor` on the user's own model. Families with the same
structure share parts of their rows. Nothing here imports torch.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from .llama import (
    LFM2,
    LLAMA,
    LLAMA_MISSING,
    LLAMA_SITES,
    MINICPM3,
    ONLY_POST_NORMED,
    PERSIMMON,
    PHI,
    PHI3,
    POST_NORMED,
    QWEN3_NEXT,
    SCALED,
    WITHOUT_MID,
    gemma4,
    latent_attention,
    mixture_of_experts,
    stablelm,
)
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
from .schema import Family
from .shared import (
    EXPERT_NEURONS,
    GATED_TOGETHER,
    PARALLEL_BLOCK,
    PLAIN,
    ROTARY,
    ROUTER_ELSEWHERE,
    input_of,
    mlp_sites,
    output_of,
    router_sites,
)

Row: TypeAlias = Family | Callable[[Any], Family]
"""A family, or a function that returns the family of a configuration."""

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
    "phi3": PHI3,
    "persimmon": PERSIMMON,
    "nemotron": Family("nemotron", LLAMA_SITES | PLAIN, LLAMA_MISSING),
    "arcee": Family("arcee", LLAMA_SITES | PLAIN, LLAMA_MISSING),
    "stablelm": stablelm,
    "starcoder2": Family(
        "starcoder2", LLAMA_SITES | mlp_sites(".mlp", "c_fc", "c_proj"), LLAMA_MISSING
    ),
    "mixtral": mixture_of_experts("mixtral"),
    "qwen2_moe": mixture_of_experts("qwen2_moe"),
    "qwen3_moe": mixture_of_experts("qwen3_moe"),
    "olmoe": mixture_of_experts("olmoe"),
    "qwen3_next": QWEN3_NEXT,
    "gpt_oss": mixture_of_experts("gpt_oss", router=".mlp.router"),
    "gemma2": Family("gemma2", POST_NORMED, LLAMA_MISSING),
    "gemma3_text": Family("gemma3_text", POST_NORMED, LLAMA_MISSING),
    "gemma4_text": gemma4,
    "olmo2": Family("olmo2", ONLY_POST_NORMED, LLAMA_MISSING),
    "olmo3": Family("olmo3", ONLY_POST_NORMED, LLAMA_MISSING),
    "exaone4": Family("exaone4", ONLY_POST_NORMED, LLAMA_MISSING),
    "cohere": Family("cohere", WITHOUT_MID, {**LLAMA_MISSING, **PARALLEL_BLOCK}),
    "cohere2": Family("cohere2", WITHOUT_MID, {**LLAMA_MISSING, **PARALLEL_BLOCK}),
    "granite": Family("granite", LLAMA_SITES | SCALED, LLAMA_MISSING),
    "granitemoe": mixture_of_experts(
        "granitemoe",
        {
            **LLAMA_SITES,
            "attn_out": SCALED["attn_out"],
            "mlp_in": input_of(".block_sparse_moe"),
            "mlp_out": output_of(".block_sparse_moe", times="residual_multiplier"),
        },
        router=".block_sparse_moe.router",
    ),
    "deepseek_v2": latent_attention(
        "deepseek_v2",
        LLAMA_SITES | router_sites(),
        {**ROTARY, **EXPERT_NEURONS, **ROUTER_ELSEWHERE},
    ),
    "deepseek_v3": latent_attention(
        "deepseek_v3",
        LLAMA_SITES | router_sites(),
        {**ROTARY, **EXPERT_NEURONS, **ROUTER_ELSEWHERE},
    ),
    "minicpm3": MINICPM3,
    "glm": Family("glm", LLAMA_SITES | GATED_TOGETHER, LLAMA_MISSING),
    "glm4": Family(
        "glm4",
        {
            **LLAMA_SITES,
            **GATED_TOGETHER,
            "attn_out": output_of(".post_self_attn_layernorm"),
            "mlp_out": output_of(".post_mlp_layernorm"),
        },
        LLAMA_MISSING,
    ),
    "apertus": Family(
        "apertus",
        {**LLAMA_SITES, **PLAIN, "resid_mid": input_of(".feedforward_layernorm", shared=True)},
        LLAMA_MISSING,
    ),
    "lfm2": LFM2,
    "mamba": MAMBA,
    "mamba2": MAMBA,
}
