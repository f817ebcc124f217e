"""Parts that rows of the table of families share.

First the locations of the residual stream, attention, the MLP and a router, as most families have
them. Then the reasons why a site is missing, by site.
"""

from collections.abc import Mapping
from typing import Any

from .schema import ModuleLocation


def output_of(path: str, **fields: Any) -> ModuleLocation:
    """Returns the location of a module's output."""
    return ModuleLocation(path, "output", **fields)


def input_of(path: str, **fields: Any) -> ModuleLocation:
    """Returns the location of a module's input."""
    return ModuleLocation(path, "input", **fields)


def inside(path: str, item: str, **fields: Any) -> ModuleLocation:
    """Returns the location of a tensor inside a module's forward."""
    return ModuleLocation(path, "inside", item, **fields)


HEAD: Mapping[str, ModuleLocation] = {
    "lm_head": output_of("lm_head"),
    "logits": output_of("", item="logits"),
}
STREAM: Mapping[str, ModuleLocation] = {"resid_pre": input_of("."), "resid_post": output_of(".")}
HEADS, KEY_HEADS = "head d_head", "kv_head d_head"
FUSED = "head d_head | kv_head d_head | kv_head d_head"  # all queries, all keys, all values
BY_HEAD = "head: d_head | d_head | d_head"  # query, key and value of one head after another


def attention_sites(path: str, projection: str = "o_proj") -> dict[str, ModuleLocation]:
    """Returns the sites that every attention module has."""
    return {
        "attn_in": input_of(path),
        "scores": inside(path, "scores"),
        "pattern": inside(path, "pattern"),
        "z": input_of(f"{path}.{projection}", cut=HEADS),
        "attn_out": output_of(path),
    }


def rotary_sites(path: str) -> dict[str, ModuleLocation]:
    """Returns queries and keys after the rotation, as the attention interface receives them."""
    return {"q_rot": inside(path, "query"), "k_rot": inside(path, "key")}


def separate_qkv(path: str) -> dict[str, ModuleLocation]:
    """Returns the sites of separate projections of queries, keys and values."""
    return {
        "q": output_of(f"{path}.q_proj", cut=HEADS),
        "k": output_of(f"{path}.k_proj", cut=KEY_HEADS),
        "v": output_of(f"{path}.v_proj", cut=KEY_HEADS),
    }


def fused_qkv(path: str, cut: str = FUSED, order: str = "qkv") -> dict[str, ModuleLocation]:
    """Returns the sites of one projection whose output has queries, keys and values in `order`."""
    return {name: output_of(path, cut=cut, part=order.index(name)) for name in "qkv"}


def mlp_sites(path: str, pre: str, post: str) -> dict[str, ModuleLocation]:
    """Returns the sites of an MLP with a projection before its neurons and one after them."""
    return {
        "mlp_in": input_of(path),
        "mlp_pre": output_of(f"{path}.{pre}"),
        "mlp_post": input_of(f"{path}.{post}"),
        "mlp_out": output_of(path),
    }


def router_sites(router: str = ".mlp.gate") -> dict[str, ModuleLocation]:
    """Returns the sites of a router. A block with a plain MLP does not have these modules."""
    return {
        "router_logits": inside(router, "router", flat=True),
        "experts": output_of(router, item=2, flat=True),
        "expert_weights": output_of(router, item=1, flat=True),
    }


def multi_head_sizes(config: Any, layer: int | None) -> dict[str, int]:
    """Returns as many key-value heads as heads."""
    return {"kv_head": config.num_attention_heads}


ROTARY = {"pos_embed": "positions are rotary: they turn q and k and are never added to the stream"}
ALIBI = {
    "pos_embed": "positions are ALiBi, a slope added to the attention scores, and are never added "
    "to the stream"
}
NOT_ROTARY = {
    "q_rot": "positions are not rotary: q is what goes into attention",
    "k_rot": "positions are not rotary: k is what goes into attention",
}
NO_ROUTER = dict.fromkeys(
    ("router_logits", "experts", "expert_weights"), "the MLP is one network, without a router"
)
ROUTER_ELSEWHERE = dict.fromkeys(NO_ROUTER, "this block's MLP is one network, without a router")
PARALLEL_BLOCK = {
    "resid_mid": "attention and MLP run in parallel: nothing of the stream stands between them"
}
OWN_ATTENTION = dict.fromkeys(
    ("q_rot", "k_rot"),
    "this family turns q and k inside its own attention code, which has no boundary there",
)
EXPERT_NEURONS = dict.fromkeys(
    ("mlp_pre", "mlp_post"),
    "the block's MLP is a mixture of experts: each token's neurons are those of the experts that "
    "it chose, and their code computes an expert's tokens together; see router_logits, experts, "
    "expert_weights and mlp_out",
)
NO_ATTENTION = dict.fromkeys(
    ("attn_in", "q", "k", "v", "q_rot", "k_rot", "scores", "pattern", "z", "attn_out", "resid_mid"),
    "a state-space block has no attention; its mixer is hk.module('backbone.layers.L.mixer')",
)
LATENT_KEYS = {
    "k": "each head's keys are expanded, in the attention's own code, from a latent that all heads "
    "share and a rotary part; see k_rot"
}
