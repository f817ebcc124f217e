"""Why a site is not there: the reasons that several rows of the families' table give, by site."""

ROTARY = {"pos_embed": "positions are rotary: they turn q and k and are never added to the stream"}
ALIBI = {"pos_embed": "positions are ALiBi, a slope added to the attention scores, and are never added to the stream"}
UNTURNED = {
    "q_rot": "positions are not rotary: q is what goes into attention",
    "k_rot": "positions are not rotary: k is what goes into attention",
}
DENSE = dict.fromkeys(("router_logits", "experts", "expert_weights"), "the MLP is one network, without a router")
ROUTER_ELSEWHERE = dict.fromkeys(DENSE, "this block's MLP is one network, without a router")
PARALLEL = {"resid_mid": "attention and MLP run in parallel: nothing of the stream stands between them"}
OWN = dict.fromkeys(
    ("q_rot", "k_rot"), "this family turns q and k inside its own attention code, which has no boundary there"
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
