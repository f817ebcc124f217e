"""One row per model family: where each site is in the module tree, and why one is missing. Nothing here knows torch.

A row holds facts about the code in transformers. The laws in tests/test_laws.py prove each of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .sites import AXES


@dataclass(frozen=True)
class Place:
    """Where a site is: the module (`{layer}` stands for the block's number), its side, and the part of the tensor.

    `split` says in einops' words of what the last axis is made, `part` which one of several fused thirds is meant.
    `shared` marks an input that the block goes on using beside the module: an edit is written into the tensor itself,
    since a replacement would reach the module only.
    """

    path: str
    side: Literal["input", "output"] = "output"
    item: int | str = 0
    split: str = ""
    part: int = 0
    shared: bool = False


@dataclass(frozen=True)
class Family:
    """The facts about one family: `places` by site name, `missing` with the reason, and where the sizes are written."""

    name: str
    model_types: tuple[str, ...]
    places: Mapping[str, Place]
    missing: Mapping[str, str] = field(default_factory=dict)
    d_mlp: Callable[[Any], int | None] = lambda config: getattr(config, "intermediate_size", None)

    def why_missing(self, site: str) -> str:
        """The reason why the family has no such site, in words for the user."""
        return self.missing.get(site, f"hookkit's table has no place for it in the {self.name} family")


NOT_YET = "attention's own arithmetic is not offered yet; q, k and v go into it and z comes out of it"
ATTENTION_INSIDE: Mapping[str, str] = {"scores": NOT_YET, "pattern": NOT_YET}

LLAMA = Family(
    name="llama",
    model_types=("llama",),
    places={
        "embed": Place("model.embed_tokens"),
        "resid_pre": Place("model.layers.{layer}", "input"),
        "attn_in": Place("model.layers.{layer}.self_attn", "input"),
        "q": Place("model.layers.{layer}.self_attn.q_proj", split="(head d_head)"),
        "k": Place("model.layers.{layer}.self_attn.k_proj", split="(kv_head d_head)"),
        "v": Place("model.layers.{layer}.self_attn.v_proj", split="(kv_head d_head)"),
        "z": Place("model.layers.{layer}.self_attn.o_proj", "input", split="(head d_head)"),
        "attn_out": Place("model.layers.{layer}.self_attn"),
        "resid_mid": Place("model.layers.{layer}.post_attention_layernorm", "input", shared=True),
        "mlp_in": Place("model.layers.{layer}.mlp", "input"),
        "mlp_pre": Place("model.layers.{layer}.mlp.gate_proj"),
        "mlp_post": Place("model.layers.{layer}.mlp.down_proj", "input"),
        "mlp_out": Place("model.layers.{layer}.mlp"),
        "resid_post": Place("model.layers.{layer}"),
        "final_norm": Place("model.norm"),
        "lm_head": Place("lm_head"),
        "logits": Place("", item="logits"),
    },
    missing={
        "pos_embed": "positions are rotary: they turn q and k and are never added to the stream",
        **ATTENTION_INSIDE,
    },
)

GPT2 = Family(
    name="gpt2",
    model_types=("gpt2",),
    places={
        "embed": Place("transformer.wte"),
        "pos_embed": Place("transformer.wpe"),
        "resid_pre": Place("transformer.h.{layer}", "input"),
        "attn_in": Place("transformer.h.{layer}.attn", "input"),
        "q": Place("transformer.h.{layer}.attn.c_attn", split="(part head d_head)", part=0),
        "k": Place("transformer.h.{layer}.attn.c_attn", split="(part kv_head d_head)", part=1),
        "v": Place("transformer.h.{layer}.attn.c_attn", split="(part kv_head d_head)", part=2),
        "z": Place("transformer.h.{layer}.attn.c_proj", "input", split="(head d_head)"),
        "attn_out": Place("transformer.h.{layer}.attn"),
        "resid_mid": Place("transformer.h.{layer}.ln_2", "input", shared=True),
        "mlp_in": Place("transformer.h.{layer}.mlp", "input"),
        "mlp_pre": Place("transformer.h.{layer}.mlp.c_fc"),
        "mlp_post": Place("transformer.h.{layer}.mlp.c_proj", "input"),
        "mlp_out": Place("transformer.h.{layer}.mlp"),
        "resid_post": Place("transformer.h.{layer}"),
        "final_norm": Place("transformer.ln_f"),
        "lm_head": Place("lm_head"),
        "logits": Place("", item="logits"),
    },
    missing=ATTENTION_INSIDE,
    d_mlp=lambda config: config.n_inner or 4 * config.n_embd,
)

FAMILIES: tuple[Family, ...] = (LLAMA, GPT2)


def family_of(model_type: str | None, head: str | None) -> Family:
    """The row for a model type. For one without a row: the head and the logits, and a reason for all the rest.

    `head` is the path of the output embedding, or None where the model is no causal language model of transformers.
    """
    if head is None:
        reason = "the model has no unembedding head (a ...ForCausalLM has one); name its modules with hk.module(path)"
        return Family("module", (), {}, dict.fromkeys(AXES, reason))
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    reason = f"no family in hookkit's table has model type {model_type!r} (it knows {known}); use hk.module(path)"
    places = {"lm_head": Place(head), "logits": Place("", item="logits")}
    return Family(model_type or "unknown", (), places, dict.fromkeys(AXES, reason))
