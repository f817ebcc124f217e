"""One row per model family: where each site is in the module tree, and why one is missing. Nothing here knows torch.

A row holds facts about the code in transformers. tests/test_laws.py proves each of them on a tiny random model, and
`hk.doctor` proves them on the user's own. Families that are built alike share the part of the row that says so.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from .llama import (
    LFM2,
    LLAMA,
    LLAMA_MISSING,
    LLAMA_PLACES,
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
    latent,
    mixture,
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
    GATED_TOGETHER,
    NEURONS,
    PARALLEL,
    PLAIN,
    ROTARY,
    ROUTER_ELSEWHERE,
    into,
    mlp,
    out,
    routed,
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
    "nemotron": Family("nemotron", LLAMA_PLACES | PLAIN, LLAMA_MISSING),
    "arcee": Family("arcee", LLAMA_PLACES | PLAIN, LLAMA_MISSING),
    "stablelm": stablelm,
    "starcoder2": Family("starcoder2", LLAMA_PLACES | mlp(".mlp", "c_fc", "c_proj"), LLAMA_MISSING),
    "mixtral": mixture("mixtral"),
    "qwen2_moe": mixture("qwen2_moe"),
    "qwen3_moe": mixture("qwen3_moe"),
    "olmoe": mixture("olmoe"),
    "qwen3_next": QWEN3_NEXT,
    "gpt_oss": mixture("gpt_oss", router=".mlp.router"),
    "gemma2": Family("gemma2", POST_NORMED, LLAMA_MISSING),
    "gemma3_text": Family("gemma3_text", POST_NORMED, LLAMA_MISSING),
    "gemma4_text": gemma4,
    "olmo2": Family("olmo2", ONLY_POST_NORMED, LLAMA_MISSING),
    "olmo3": Family("olmo3", ONLY_POST_NORMED, LLAMA_MISSING),
    "exaone4": Family("exaone4", ONLY_POST_NORMED, LLAMA_MISSING),
    "cohere": Family("cohere", WITHOUT_MID, {**LLAMA_MISSING, **PARALLEL}),
    "cohere2": Family("cohere2", WITHOUT_MID, {**LLAMA_MISSING, **PARALLEL}),
    "granite": Family("granite", LLAMA_PLACES | SCALED, LLAMA_MISSING),
    "granitemoe": mixture(
        "granitemoe",
        {
            **LLAMA_PLACES,
            "attn_out": SCALED["attn_out"],
            "mlp_in": into(".block_sparse_moe"),
            "mlp_out": out(".block_sparse_moe", times="residual_multiplier"),
        },
        router=".block_sparse_moe.router",
    ),
    "deepseek_v2": latent(
        "deepseek_v2", LLAMA_PLACES | routed(), {**ROTARY, **NEURONS, **ROUTER_ELSEWHERE}
    ),
    "deepseek_v3": latent(
        "deepseek_v3", LLAMA_PLACES | routed(), {**ROTARY, **NEURONS, **ROUTER_ELSEWHERE}
    ),
    "minicpm3": MINICPM3,
    "glm": Family("glm", LLAMA_PLACES | GATED_TOGETHER, LLAMA_MISSING),
    "glm4": Family(
        "glm4",
        {
            **LLAMA_PLACES,
            **GATED_TOGETHER,
            "attn_out": out(".post_self_attn_layernorm"),
            "mlp_out": out(".post_mlp_layernorm"),
        },
        LLAMA_MISSING,
    ),
    "apertus": Family(
        "apertus",
        {**LLAMA_PLACES, **PLAIN, "resid_mid": into(".feedforward_layernorm", shared=True)},
        LLAMA_MISSING,
    ),
    "lfm2": LFM2,
    "mamba": MAMBA,
    "mamba2": MAMBA,
}
