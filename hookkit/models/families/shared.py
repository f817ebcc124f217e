"""Parts that rows of the families' table share: the stream, attention, the MLP and a router, as most have them.

Why a site is not there: the reasons that several rows of the families' table give, by site.
"""

from collections.abc import Mapping
from typing import Any

from .schema import ModuleLocation


def out(path: str, **facts: Any) -> ModuleLocation:
    """What a module gives."""
    return ModuleLocation(path, "output", **facts)


def into(path: str, **facts: Any) -> ModuleLocation:
    """What a module is given."""
    return ModuleLocation(path, "input", **facts)


def inside(path: str, what: str, **facts: Any) -> ModuleLocation:
    """What is told of in the midst of a module's forward."""
    return ModuleLocation(path, "inside", what, **facts)


HEAD: Mapping[str, ModuleLocation] = {"lm_head": out("lm_head"), "logits": out("", item="logits")}
STREAM: Mapping[str, ModuleLocation] = {"resid_pre": into("."), "resid_post": out(".")}
HEADS, KEY_HEADS = "head d_head", "kv_head d_head"
FUSED = "head d_head | kv_head d_head | kv_head d_head"  # all queries, all keys, all values
BY_HEAD = "head: d_head | d_head | d_head"  # query, key and value of each head in turn


def attention(path: str, projection: str = "o_proj") -> dict[str, ModuleLocation]:
    """What every attention has, whatever it is called."""
    return {
        "attn_in": into(path),
        "scores": inside(path, "scores"),
        "pattern": inside(path, "pattern"),
        "z": into(f"{path}.{projection}", cut=HEADS),
        "attn_out": out(path),
    }


def turned(path: str) -> dict[str, ModuleLocation]:
    """Queries and keys after the rotation, as the attention interface is given them."""
    return {"q_rot": inside(path, "query"), "k_rot": inside(path, "key")}


def separate(path: str) -> dict[str, ModuleLocation]:
    """A projection each for queries, keys and values."""
    return {
        "q": out(f"{path}.q_proj", cut=HEADS),
        "k": out(f"{path}.k_proj", cut=KEY_HEADS),
        "v": out(f"{path}.v_proj", cut=KEY_HEADS),
    }


def fused(path: str, cut: str = FUSED, order: str = "qkv") -> dict[str, ModuleLocation]:
    """One projection for queries, keys and values, which its output has behind one another in this order."""
    return {name: out(path, cut=cut, part=order.index(name)) for name in "qkv"}


def mlp(path: str, pre: str, post: str) -> dict[str, ModuleLocation]:
    """An MLP, with the projection before its neurons and the one behind them."""
    return {
        "mlp_in": into(path),
        "mlp_pre": out(f"{path}.{pre}"),
        "mlp_post": into(f"{path}.{post}"),
        "mlp_out": out(path),
    }


GATED = mlp(".mlp", "gate_proj", "down_proj")
GATED_TOGETHER = GATED | {"mlp_pre": out(".mlp.gate_up_proj", cut="d_mlp | d_mlp")}
PLAIN = mlp(".mlp", "up_proj", "down_proj")


def routed(router: str = ".mlp.gate") -> dict[str, ModuleLocation]:
    """What a router says of each token. Where a block has a plain MLP in its place, the paths are not there."""
    return {
        "router_logits": inside(router, "router", flat=True),
        "experts": out(router, item=2, flat=True),
        "expert_weights": out(router, item=1, flat=True),
    }


def as_many(config: Any, layer: int | None) -> dict[str, int]:
    """As many key-value heads as heads."""
    return {"kv_head": config.num_attention_heads}


ROTARY = {"pos_embed": "positions are rotary: they turn q and k and are never added to the stream"}
ALIBI = {
    "pos_embed": "positions are ALiBi, a slope added to the attention scores, and are never added to the stream"
}
UNTURNED = {
    "q_rot": "positions are not rotary: q is what goes into attention",
    "k_rot": "positions are not rotary: k is what goes into attention",
}
DENSE = dict.fromkeys(
    ("router_logits", "experts", "expert_weights"), "the MLP is one network, without a router"
)
ROUTER_ELSEWHERE = dict.fromkeys(DENSE, "this block's MLP is one network, without a router")
PARALLEL = {
    "resid_mid": "attention and MLP run in parallel: nothing of the stream stands between them"
}
OWN = dict.fromkeys(
    ("q_rot", "k_rot"),
    "this family turns q and k inside its own attention code, which has no boundary there",
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
