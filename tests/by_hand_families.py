"""The second route for every family: what is at each site, read from the modelling files of transformers 5.23.

No hookkit here. Where one can, a site is taken at another boundary than the obvious one (a norm's output for what
attention reads, the next block's for what a block wrote) or recomputed from the weights, so that a wrong module path
elsewhere is seen.

What a family has not: `q_rot` and `k_rot` where it does not call transformers' attention interface or has no rotary
positions; `k` with latent attention (keys are made of a latent and a shared rotary part); `resid_mid` in parallel
blocks; `mlp_pre` and `mlp_post` in llama4's blocks with experts; the sites of attention in blocks whose mixer is no attention
(mamba, qwen3_next's linear_attention, lfm2's conv); those of the MLP in mamba.

In every block with attention, resid_pre + attn_out + mlp_out is resid_post; not in gemma4, whose blocks add an input
of their own behind the MLP and multiply the stream by a scalar.
"""

import math
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu


@dataclass(frozen=True)
class Names:
    """Where a family keeps things: the body in the model, the rest in the body, in a block, in attention, in the MLP."""

    body: str = "model"
    embed: str = "embed_tokens"
    positions: str | None = None
    blocks: str = "layers"
    final: str = "norm"
    before_attn: str | None = "input_layernorm"
    attn: str = "self_attn"
    qkv: str = "q_proj"
    layout: str = "separate"
    out: str = "o_proj"
    after_attn: str | None = None
    parallel: bool = False
    before_mlp: str | None = "post_attention_layernorm"
    mlp: str = "mlp"
    gate: str = "gate_proj"
    up: str | None = "up_proj"
    act: str | None = "act_fn"
    down: str = "down_proj"
    after_mlp: str | None = None
    router: str = "gate"


LLAMA = Names()
GPT2 = Names(
    body="transformer", embed="wte", positions="wpe", blocks="h", final="ln_f", before_attn="ln_1", attn="attn",
    qkv="c_attn", layout="blocks", out="c_proj", before_mlp="ln_2", gate="c_fc", up=None, act="act", down="c_proj",
)  # fmt: skip
GPTJ = replace(
    GPT2, positions=None, qkv="q_proj", layout="separate", out="out_proj", parallel=True, before_mlp="ln_1",
    gate="fc_in", down="fc_out",
)  # fmt: skip
NEOX = Names(
    body="gpt_neox", embed="embed_in", final="final_layer_norm", attn="attention", qkv="query_key_value",
    layout="groups", out="dense", gate="dense_h_to_4h", up=None, act="act", down="dense_4h_to_h",
)  # fmt: skip
BLOOM = replace(
    NEOX,
    body="transformer",
    embed="word_embeddings",
    blocks="h",
    final="ln_f",
    attn="self_attention",
    act="gelu_impl",
)
FUSED_GATE = replace(LLAMA, gate="gate_up_proj", up="gate_up_proj", act="activation_fn")
POST_NORM = replace(
    LLAMA, before_attn=None, after_attn="post_attention_layernorm", before_mlp=None,
    after_mlp="post_feedforward_layernorm",
)  # fmt: skip
SANDWICH = replace(POST_NORM, before_attn="input_layernorm", before_mlp="pre_feedforward_layernorm")
LATENT = replace(LLAMA, layout="latent", qkv="kv_a_proj_with_mqa")
COHERE = replace(LLAMA, parallel=True, before_mlp="input_layernorm")
ROUTER = replace(LLAMA, router="router")
BAMBA = replace(ROUTER, final="final_layernorm", before_mlp="pre_ff_layernorm", mlp="feed_forward")
SHARED_MLP = replace(ROUTER, mlp="block_sparse_moe")
MAMBA = Names(body="backbone", embed="embeddings", final="norm_f", before_attn="norm")

ALIKE: dict[Names, tuple[str, ...]] = {
    LLAMA: (
        "llama", "mistral", "mixtral", "ministral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next", "gemma",
        "olmo", "olmoe", "granite", "smollm3", "helium", "stablelm", "seed_oss", "ernie4_5", "hunyuan_v1_dense",
        "cwm", "internlm3", "iquestcoder", "ministral3", "minimax_m2", "hy_v3", "glm4_moe", "ernie4_5_moe", "dots1",
        "exaone_moe", "solar_open", "mellum", "laguna", "flint", "granite_swa", "bitnet", "doge", "qwen3_5_text",
        "qwen3_5_moe_text", "mimo_v2_flash",
    ),
    GPT2: ("gpt2", "gpt_bigcode"),
    SANDWICH: ("gemma2", "gemma3_text", "gemma4_text", "gemma4_unified_text"),
    POST_NORM: ("olmo2", "olmo3", "exaone4", "flex_olmo"),
    COHERE: ("cohere", "cohere2", "cohere2_moe"),
    LATENT: (
        "deepseek_v2", "deepseek_v3", "minicpm3", "glm4_moe_lite", "glm_moe_dsa", "deepseek_v32", "mistral4", "axk1",
        "axk2", "youtu", "kimi_linear", "bailing_hybrid",
    ),
    MAMBA: ("mamba", "mamba2", "falcon_mamba"),
    ROUTER: ("phimoe", "aria_text"),
    BAMBA: ("bamba", "jamba", "falcon_h1"),
    SHARED_MLP: ("granitemoeshared", "granitemoe_swa", "granitemoehybrid"),
}  # fmt: skip

FAMILIES: dict[str, Names] = {kind: names for names, kinds in ALIKE.items() for kind in kinds} | {
    "gpt_neo": replace(GPT2, attn="attn.attention", qkv="q_proj", layout="separate", out="out_proj"),
    "gptj": GPTJ,
    "gpt_neox": NEOX,
    "codegen": replace(GPTJ, qkv="qkv_proj", layout="codegen"),
    "opt": Names(
        body="model.decoder", positions="embed_positions", final="final_layer_norm", before_attn="self_attn_layer_norm",
        out="out_proj", before_mlp="final_layer_norm", mlp="", gate="fc1", up=None, act="activation_fn", down="fc2",
    ),
    "bloom": BLOOM,
    "falcon": replace(BLOOM, act="act"),
    "mpt": replace(
        GPT2, positions=None, blocks="blocks", final="norm_f", before_attn="norm_1", qkv="Wqkv", out="out_proj",
        before_mlp="norm_2", mlp="ffn", gate="up_proj", down="down_proj",
    ),
    "phi": replace(
        COHERE, final="final_layernorm", out="dense", gate="fc1", up=None, act="activation_fn", down="fc2"
    ),
    "phi3": replace(FUSED_GATE, qkv="qkv_proj", layout="blocks"),
    "persimmon": replace(
        NEOX, body="model", embed="embed_tokens", final="final_layernorm", attn="self_attn"
    ),
    "nemotron": replace(LLAMA, gate="up_proj", up=None),
    "arcee": replace(LLAMA, gate="up_proj", up=None),
    "apertus": replace(
        LLAMA, gate="up_proj", up=None, before_attn="attention_layernorm", before_mlp="feedforward_layernorm"
    ),
    "starcoder2": replace(LLAMA, gate="c_fc", up=None, act="act", down="c_proj"),
    "granitemoe": replace(LLAMA, mlp="block_sparse_moe", router="router"),
    "gpt_oss": replace(LLAMA, router="router"),
    "glm": FUSED_GATE,
    "glm4": replace(FUSED_GATE, after_attn="post_self_attn_layernorm", after_mlp="post_mlp_layernorm"),
    "lfm2": replace(
        LLAMA, final="embedding_norm", before_attn="operator_norm", out="out_proj", before_mlp="ffn_norm",
        mlp="feed_forward", gate="w1", up="w3", act=None, down="w2",
    ),
    "hunyuan_v1_moe": replace(LLAMA, router="gate.wg"),
    "afmoe": replace(
        SANDWICH, before_mlp="pre_mlp_layernorm", after_mlp="post_mlp_layernorm", router="router.gate"
    ),
    "hyperclovax": replace(LLAMA, after_attn="post_norm1", after_mlp="post_norm2"),
    "jais2": replace(LLAMA, gate="up_proj", up=None),
    "nanochat": replace(LLAMA, gate="fc1", up=None, act="activation_fn", down="fc2"),
    "vaultgemma": replace(LLAMA, before_mlp="pre_feedforward_layernorm"),
    "lfm2_moe": replace(
        LLAMA, final="embedding_norm", before_attn="operator_norm", out="out_proj", before_mlp="ffn_norm",
        mlp="feed_forward", gate="w1", up="w3", act=None, down="w2",
    ),
    "lfm3": replace(
        LLAMA, final="embedding_norm", before_attn="operator_norm", after_attn="post_operator_norm",
        before_mlp="ffn_norm", mlp="feed_forward", gate="w1", up="w3", act=None, down="w2", after_mlp="post_ffn_norm",
    ),
    "llama4_text": replace(LLAMA, mlp="feed_forward", router="router", act="activation_fn"),
    "minimax": LLAMA,
    "olmo_hybrid": LLAMA,
    "recurrent_gemma": replace(
        LLAMA, final="final_norm", before_attn="temporal_pre_norm", attn="temporal_block",
        before_mlp="channel_pre_norm", mlp="mlp_block",
    ),
    "nemotron_h": Names(embed="embeddings", final="norm_f", before_attn="norm", attn="mixer", before_mlp="norm", mlp="mixer", gate="up_proj", up=None),
}  # fmt: skip

NO_ROTARY = ("gpt2", "gpt_bigcode", "opt", "jamba", "nemotron_h", "granitemoehybrid")


def names_of(config: Any) -> Names:
    """The names of a family, as its configuration lays out its blocks."""
    names = FAMILIES[config.model_type]
    if config.model_type == "gpt_neox":
        return replace(names, parallel=config.use_parallel_residual)
    if config.model_type == "stablelm" and config.use_parallel_residual:
        return replace(names, parallel=True, before_mlp="input_layernorm")
    if config.model_type == "falcon":
        if config.multi_query and not config.new_decoder_architecture:
            names = replace(names, layout="blocks")
        if config.new_decoder_architecture and config.num_ln_in_parallel_attn in (None, 2):
            return replace(names, parallel=True, before_attn="ln_attn", before_mlp="ln_mlp")
        if config.parallel_attn:
            return replace(names, parallel=True, before_mlp="input_layernorm")
    return names


def multiplier(config: Any, part: str = "mlp") -> float:
    """What a block multiplies a contribution with before it adds it."""
    kind = config.model_type
    if kind == "minicpm3":
        return config.scale_depth / math.sqrt(config.num_hidden_layers)
    if kind == "falcon_h1" and part == "attn":
        return config.attention_out_multiplier
    return config.residual_multiplier if kind.startswith(("granite", "hyperclovax")) else 1.0


def stream_multiplier(config: Any, layer: int, part: str) -> float:
    """What a block multiplies the stream with before it adds attention's part or the MLP's."""
    if config.model_type != "minimax":
        return 1.0
    if part == "mlp":
        return config.mlp_alpha_factor
    is_linear = config.layer_types[layer] == "linear_attention"
    return config.linear_attn_alpha_factor if is_linear else config.full_attn_alpha_factor


def heads_of(config: Any, layer: int) -> int:
    if config.model_type == "laguna":
        return config.num_attention_heads_per_layer[layer]
    return config.num_attention_heads


OTHER_MIXERS = "DeltaAttention$|LightningAttention$|RecurrentBlock$|Mamba2Mixer$|MLP$|MoE$"


class Block:
    """The modules of one block; None for what it has not."""

    def __init__(self, model: nn.Module, layer: int) -> None:
        self.names = names = names_of(model.config)
        if (
            model.config.model_type == "olmo_hybrid"
        ):  # whose blocks with attention have norms after it
            is_full = model.config.layer_types[layer] == "full_attention"
            self.names = names = POST_NORM if is_full else LLAMA
        self.whole = whole = model.get_submodule(names.body).get_submodule(names.blocks)[layer]
        has = lambda module, path: bool(path) and hasattr(module, path.split(".")[0])  # noqa: E731
        inside = lambda module, path: module.get_submodule(path) if has(module, path) else None  # noqa: E731
        if getattr(whole, "self_attn", 0) is None:  # granitemoehybrid's blocks with another mixer
            names = replace(names, attn="")
        if getattr(whole, "block_sparse_moe", 0) is None:
            names = replace(
                names,
                mlp="shared_mlp",
                gate="input_linear",
                up="input_linear",
                act="activation",
                down="output_linear",
            )
            self.names = names
        self.before_attn, self.before_mlp = (
            inside(whole, names.before_attn),
            inside(whole, names.before_mlp),
        )
        self.after_attn, self.after_mlp = (
            inside(whole, names.after_attn),
            inside(whole, names.after_mlp),
        )
        self.attn = inside(whole, names.attn)
        if re.search(OTHER_MIXERS, type(self.attn).__name__):
            self.attn = None  # another mixer, or the MLP, under the same name
        self.out = inside(self.attn, names.out) if self.attn else None
        self.qkv = inside(self.attn, names.qkv) if self.attn else None
        self.mlp = whole if names.mlp == "" else inside(whole, names.mlp)
        if names.mlp == names.attn and not re.search("(MLP|MoE)$", type(self.mlp).__name__):
            self.mlp = None
        self.experts = inside(self.mlp, "experts") if self.mlp else None
        self.dense = self.mlp is not None and self.experts is None
        self.down = self.mlp.get_submodule(names.down) if self.dense else None


def weight(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """[out, in] and the bias; GPT-2's Conv1D keeps its matrix the other way round."""
    matrix = module.weight.T if type(module).__name__ == "Conv1D" else module.weight
    return matrix, getattr(module, "bias", None)


def split_rows(block: Block, config: Any, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of a fused projection (of its matrix or its bias) as those of q, k and v, [head, d_head, ...]."""
    heads = config.num_attention_heads
    width = block.out.weight.numel() // (config.hidden_size * heads)
    by_head = rows.unflatten(0, (-1, width))
    if block.names.layout == "codegen":  # for four TPU cores; on each of them q, then v, then k
        by_core = by_head.unflatten(0, (4, 3, heads // 4))
        return by_core[:, 0].flatten(0, 1), by_core[:, 2].flatten(0, 1), by_core[:, 1].flatten(0, 1)
    grouped = block.names.layout == "groups" and config.model_type != "gpt_bigcode"
    if config.model_type == "gpt_bigcode":
        grouped = not config.multi_query
    if grouped:  # the queries of a group of heads, then their key, then their value
        groups = (
            config.num_kv_heads if getattr(config, "new_decoder_architecture", False) else heads
        )
        grouping = by_head.unflatten(0, (groups, -1))
        return grouping[:, :-2].flatten(0, 1), grouping[:, -2], grouping[:, -1]
    others = (len(by_head) - heads) // 2
    return by_head[:heads], by_head[heads : heads + others], by_head[heads + others :]


def projected(reads: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """[1, pos, head, d_head] of what is read and a matrix [head, d_head, d_model]."""
    found = torch.einsum("bpm,hdm->bphd", reads, matrix)
    return found if bias is None else found + bias


def queries_keys_values(
    block: Block, config: Any, layer: int, reads: Tensor, seen: "Seen"
) -> dict[str, Tensor]:
    """q, k and v as the projections give them, from the weights; k is not there with latent attention."""
    heads, attn = heads_of(config, layer), block.attn
    if block.names.layout == "latent":
        width = config.qk_nope_head_dim + config.qk_rope_head_dim
        names = ("q_gate_proj", "q_b_proj", "q_proj")
        last = next(filter(None, (getattr(attn, name, None) for name in names)))
        # in axk2, each head's query is followed by its output gate
        matrix = last.weight.unflatten(0, (heads, -1))[:, :width]
        q = projected(seen.before[last][0], matrix, None)
        matrix = attn.kv_b_proj.weight.unflatten(0, (heads, -1))[:, config.qk_nope_head_dim :]
        latent = seen.after[attn.kv_a_layernorm][0].reshape(*reads.shape[:2], -1)
        return {"q": q, "v": projected(latent, matrix, None)}
    if block.names.layout == "separate":
        found = {}
        for name in "qkv":  # gemma4 may read its values off the keys' projection, or keys and values off another block
            if not hasattr(attn, f"{name}_proj"):
                continue
            width = block.out.weight.shape[1] // heads
            if config.model_type == "mimo_v2_flash" and name != "v":
                width = config.head_dim
            matrix, bias = weight(getattr(attn, f"{name}_proj") or attn.k_proj)
            matrix = matrix.unflatten(0, (-1, width))
            bias = None if bias is None else bias.unflatten(0, (-1, width))
            if name == "q" and config.model_type.startswith(
                ("qwen3_next", "qwen3_5")
            ):  # each head's query is followed by its output gate
                matrix, bias = matrix[::2], None if bias is None else bias[::2]
            found[name] = projected(reads, matrix, bias)
        return found
    matrix, bias = weight(block.qkv)
    matrices = split_rows(block, config, matrix)
    biases = (None, None, None) if bias is None else split_rows(block, config, bias)
    return {
        name: projected(reads, *both)
        for name, both in zip("qkv", zip(matrices, biases, strict=True), strict=True)
    }


def rotated(x: Tensor, width: int, base: float, neighbours: bool) -> Tensor:
    """The first `width` numbers of each head [1, pos, head, d] turned by the position: neighbours or halves in pairs."""
    angle = torch.arange(x.shape[1])[:, None] * base ** (-torch.arange(0, width, 2) / width)
    turned, rest = x[..., :width], x[..., width:]
    real, imaginary = (
        turned.unflatten(-1, (-1, 2)).unbind(-1) if neighbours else turned.chunk(2, dim=-1)
    )
    pairs = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angle), angle)[:, None]
    parts = (pairs.real, pairs.imag)
    turned = torch.stack(parts, dim=-1).flatten(-2) if neighbours else torch.cat(parts, dim=-1)
    return torch.cat((turned, rest), dim=-1)


def products(q: Tensor, k: Tensor) -> Tensor:
    """[1, head, query, key] of [1, pos, head, d] and [1, pos, kv_head, d]."""
    return torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(q.shape[2] // k.shape[2], dim=2))


def own_scores(config: Any, layer: int, q: Tensor, k: Tensor) -> Tensor:
    """Scores of the families that compute attention in their own code, by hand, with their mask."""
    kind, heads, pos = config.model_type, q.shape[2], torch.arange(q.shape[1])
    scale = 1.0 if kind == "gpt_neo" else q.shape[-1] ** -0.5
    allowed = pos[:, None] >= pos
    bias = torch.zeros(())
    if kind in ("gptj", "codegen"):
        q, k = (rotated(x, config.rotary_dim, 10000.0, neighbours=True) for x in (q, k))
    alibi = (
        torch.tensor([2.0 ** (-8 * (head + 1) / heads) for head in range(heads)])[:, None, None]
        * pos
    )
    if kind == "bloom":  # the bias grows with the key's own position
        bias = alibi
    elif kind == "mpt":  # and here it ends at 0 at the last key
        bias, clip = alibi - alibi[..., -1:], config.attn_config.clip_qkv or math.inf
        q, k = q.clamp(-clip, clip), k.clamp(-clip, clip)
    elif (
        kind == "falcon" and config.alibi
    ):  # scaled too; sdpa's way: eager attention adds it a second time
        bias = alibi * scale
    elif kind == "falcon":
        q, k = (
            rotated(x, x.shape[-1], config.rope_parameters["rope_theta"], neighbours=False)
            for x in (q, k)
        )
    elif kind == "gpt_neo" and config.attention_layers[layer] == "local":
        allowed = allowed & (pos[:, None] - pos < config.window_size)
    scores = products(q, k) * scale + bias
    return scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)


class Seen:
    """What went into every module of one run and came out of it, copied before anything could write into it."""

    def __init__(self) -> None:
        self.before: dict[nn.Module, list] = {}
        self.after: dict[nn.Module, list] = {}
        self.calls: dict[nn.Module, dict] = {}

    def keep_before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.before[module] = [
            x.clone() for x in (*args, *kwargs.values()) if isinstance(x, Tensor)
        ]

    def keep_after(self, module: nn.Module, _args: tuple, output: object) -> None:
        every = output if isinstance(output, tuple) else (output,)
        self.after[module] = [x.clone() if isinstance(x, Tensor) else None for x in every]


@contextmanager
def watched(model: nn.Module) -> Iterator[Seen]:
    """Hooks on every module, and eager attention of the modelling file replaced by itself with a notebook."""
    seen = Seen()
    handles = [
        m.register_forward_pre_hook(seen.keep_before, with_kwargs=True) for m in model.modules()
    ]
    handles += [m.register_forward_hook(seen.keep_after) for m in model.modules()]
    file = sys.modules[type(model).__module__]
    eager = getattr(file, "eager_attention_forward", None)
    implementation = model.config._attn_implementation

    def noted(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        **how: Any,
    ):
        mask = attention_mask
        output, pattern = eager(module, query, key, value, mask, **how)
        seen.calls[module] = {
            "q": query,
            "k": key,
            "v": value,
            "mask": mask,
            "pattern": pattern,
            **how,
        }
        return output, pattern

    try:
        if eager is not None:
            file.eager_attention_forward = noted
            model.set_attn_implementation("eager")
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        if eager is not None:
            file.eager_attention_forward = eager
            model.set_attn_implementation(implementation)


def attention_sites(
    block: Block, config: Any, layer: int, reads: Tensor, seen: Seen
) -> dict[str, Tensor]:
    """The sites inside attention."""
    found = queries_keys_values(block, config, layer, reads, seen)
    call = seen.calls.get(block.attn)
    if call is None:
        found["scores"] = own_scores(config, layer, found["q"], found["k"])
        own = None if config.model_type == "falcon" else seen.after[block.attn][1]
        found["pattern"] = found["scores"].softmax(-1) if own is None else own
    else:
        q, k = call["q"].transpose(1, 2), call["k"].transpose(1, 2)
        is_rope = getattr(config, "position_embedding_type", None) == "rope"
        if config.model_type not in NO_ROTARY or is_rope:
            found |= {"q_rot": q, "k_rot": k}
        scores, cap = products(q, k) * call["scaling"], call.get("softcap")
        scores = scores if cap is None else cap * torch.tanh(scores / cap)
        found["scores"] = scores if call["mask"] is None else scores + call["mask"]
        found["pattern"] = call["pattern"]
    found["z"] = seen.before[block.out][0].unflatten(-1, (heads_of(config, layer), -1))
    out = linear(found["z"].flatten(2), *weight(block.out))
    out = out if block.after_attn is None else block.after_attn(out)
    found["attn_out"] = out * multiplier(config, "attn")
    return found


def mlp_sites(block: Block, config: Any, reads: Tensor) -> dict[str, Tensor]:
    """The sites inside a dense MLP, all from the weights."""
    names, mlp = block.names, block.mlp
    matrix, bias = weight(mlp.get_submodule(names.gate))
    act: Callable = silu if names.act is None else mlp.get_submodule(names.act)
    if names.up == names.gate:  # one matrix: the gate's rows, then those of the other half
        gate, up = matrix.chunk(2)
        pre, other = linear(reads, gate), linear(reads, up)
    else:
        pre = linear(reads, matrix, bias)
        other = None if names.up is None else linear(reads, *weight(mlp.get_submodule(names.up)))
    post = act(pre) if other is None else act(pre) * other
    post = mlp.ffn_sub_norm(post) if hasattr(mlp, "ffn_sub_norm") else post
    out = linear(post, *weight(block.down))
    out = (out if block.after_mlp is None else block.after_mlp(out)) * multiplier(config)
    return {"mlp_pre": pre, "mlp_post": post, "mlp_out": out}


def expert_sites(block: Block, reads: Tensor, seen: Seen) -> dict[str, Tensor]:
    """The router's numbers from its weights; the choice as the experts are given it."""
    router = block.mlp.get_submodule(block.names.router)
    logits = linear(reads, *weight(router))
    if len(seen.before[block.experts]) == 1:  # llama4's experts are given all tokens
        return {"router_logits": logits}
    read, chosen, weights = seen.before[block.experts]
    by_token = lambda x: x.reshape(1, reads.shape[1], *x.shape[1:])  # noqa: E731
    pre, post, _ = neurons_one_by_one(block.experts, read, chosen)
    return {
        "router_logits": logits,
        "experts": by_token(chosen),
        "expert_weights": by_token(weights),
        "mlp_pre": by_token(pre),
        "mlp_post": by_token(post),
    }


def neurons_one_by_one(
    experts: nn.Module,
    read: Tensor,
    chosen: Tensor,
    change: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Neurons before and after the activation [token, choice, neuron], and what each chosen expert gives, from the
    weights of one expert at a time for one token at a time. `change` edits the neurons after the activation."""
    pres, posts, outs = [], [], []
    transposed = experts.down_proj.shape[1] != read.shape[-1]  # [expert, in, out]
    for token, own in zip(read, chosen.tolist(), strict=True):
        for expert in own:
            up_and_gate = (
                experts.gate_up_proj if hasattr(experts, "gate_up_proj") else experts.up_proj
            )
            both = token @ (up_and_gate[expert] if transposed else up_and_gate[expert].T)
            both = (
                both + experts.gate_up_proj_bias[expert]
                if hasattr(experts, "gate_up_proj_bias")
                else both
            )
            half = len(both) // 2
            gate, up = both[:half], both[half:]
            if hasattr(experts, "alpha"):  # gpt_oss, whose gates and factors alternate
                gate, up = both[::2], both[1::2]
                low = gate.clamp(max=experts.limit)
                post = (
                    (up.clamp(-experts.limit, experts.limit) + 1)
                    * low
                    * torch.sigmoid(low * experts.alpha)
                )
            elif not hasattr(experts, "gate_up_proj"):  # nemotron_h
                gate, post = both, torch.relu(both) ** 2
            else:
                limit = getattr(experts, "limit", math.inf)  # deepseek_v4
                post = experts.act_fn(gate.clamp(max=limit)) * up.clamp(-limit, limit)
            post = post if change is None else change(post)
            down = experts.down_proj[expert]
            out = post @ (down if transposed else down.T)
            out = (
                out + experts.down_proj_bias[expert] if hasattr(experts, "down_proj_bias") else out
            )
            pres.append(gate), posts.append(post), outs.append(out)
    return tuple(torch.stack(rows).unflatten(0, chosen.shape) for rows in (pres, posts, outs))


@torch.no_grad()
def sites(  # noqa: C901  one statement for each thing that a family may have or not
    model: nn.Module, ids: list[int]
) -> dict[str, Tensor]:
    """Every site that a family truly has, of one prompt: "resid_post.1", "q.0", "final_norm"."""
    config, names = model.config, names_of(model.config)
    body = model.get_submodule(names.body)
    with watched(model) as seen:
        result = model(torch.tensor([ids]), use_cache=False, output_hidden_states=True)
    stream = lambda x: x.reshape(1, len(ids), -1)  # noqa: E731  opt's MLP flattens prompts and positions
    found = embedding_sites(config, body, ids)
    states = list(result.hidden_states)
    if names is MAMBA:  # whose hidden states begin after the first block
        states.insert(0, None)
    final = body.get_submodule(names.final)
    states[config.num_hidden_layers] = seen.before[final][0]
    for layer in range(config.num_hidden_layers):
        block, here = Block(model, layer), {}
        first = block.before_attn if block.before_attn is not None else block.qkv
        here["resid_pre"], here["resid_post"] = seen.before[first][0], states[layer + 1]
        if block.attn is not None:
            no_norm = block.before_attn is None
            here["attn_in"] = here["resid_pre"] if no_norm else seen.after[block.before_attn][0]
            here |= attention_sites(block, config, layer, here["attn_in"], seen)
        elif block.mlp is None or names.mlp != names.attn:  # another mixer
            here["attn_in"] = seen.after[block.before_attn][0]
        if block.mlp is not None:
            no_norm = block.before_mlp is None
            if not names.parallel and names.mlp != names.attn:
                first = names.gate if block.dense else names.router
                entered = block.mlp.get_submodule(first) if no_norm else block.before_mlp
                here["resid_mid"] = stream(seen.before[entered][0])
            here["mlp_in"] = (
                here["resid_mid"] if no_norm else stream(seen.after[block.before_mlp][0])
            )
        before_mlp = here.get("resid_mid", here["resid_pre"] + here.get("attn_out", 0))
        if config.model_type == "minimax":  # the normed stream is the one that goes on
            before_mlp = here["mlp_in"]
        if block.dense:
            here |= mlp_sites(block, config, here["mlp_in"])
        elif block.experts is not None:
            here |= expert_sites(block, here["mlp_in"], seen)
            alpha = stream_multiplier(config, layer, "mlp")
            here["mlp_out"] = here["resid_post"] - alpha * before_mlp
        if "attn_in" in here and "attn_out" not in here:
            before = here["attn_in"] if config.model_type == "minimax" else here["resid_pre"]
            alpha = stream_multiplier(config, layer, "attn")
            here["attn_out"] = here.get("resid_mid", here["resid_post"]) - alpha * before
        if block.experts is not None and getattr(block.whole, "shared_mlp", None) is not None:
            here.pop("mlp_out")  # the sum of two modules' outputs
        if config.model_type in ("mamba", "mamba2", "falcon_mamba"):
            here.pop("attn_in"), here.pop("attn_out")
        if block.attn is None and config.model_type == "lfm3":
            here.pop("attn_in")
        found |= {f"{name}.{layer}": value for name, value in here.items()}
    normed = seen.after[final][0]
    found["final_norm"] = (
        normed / config.logits_scaling if config.model_type == "minicpm3" else normed
    )
    found["lm_head"] = linear(found["final_norm"], *weight(model.lm_head))
    found["logits"] = result.logits
    if config.model_type == "nanochat":  # whose one norm is called at both ends of the stream
        found.pop("final_norm")
    return found


def embedding_sites(config: Any, body: nn.Module, ids: list[int]) -> dict[str, Tensor]:
    """Rows of the embedding matrices; granite's and bloom's first block is given them multiplied or normed."""
    kind, names = config.model_type, names_of(config)
    scale = (
        config.hidden_size**0.5
        if kind.startswith(("gemma", "vaultgemma"))
        else config.scale_emb
        if kind == "minicpm3"
        else 1.0
    )
    found = {"embed": body.get_submodule(names.embed).weight[ids][None] * scale}
    if names.positions is not None:
        first = 2 if kind == "opt" else 0
        found["pos_embed"] = body.get_submodule(names.positions).weight[first : first + len(ids)][
            None
        ]
    return found


def is_other_mixer(model: nn.Module, site: str) -> bool:
    """True for what is added by a block's mixer that is no attention, which is not edited here."""
    name, _, layer = site.partition(".")
    return name == "attn_out" and Block(model, int(layer)).attn is None


def place(model: nn.Module, name: str, layer: int) -> tuple[nn.Module | None, str, float]:
    """The module and side where a site can be changed, and what its numbers are multiplied with afterwards."""
    if name == "final_norm":
        return model.lm_head, "in", 1.0
    block, factor = Block(model, layer), multiplier(model.config)
    attn_factor = multiplier(model.config, "attn")
    mlp_end = block.mlp if block.experts is not None else block.down
    return {
        "resid_post": (block.whole, "out", 1.0),
        "attn_out": (
            block.out if block.after_attn is None else block.after_attn,
            "out",
            attn_factor,
        ),
        "mlp_out": (mlp_end if block.after_mlp is None else block.after_mlp, "out", factor),
        "z": (block.out, "in", 1.0),
        "mlp_post": (block.down, "in", 1.0) if block.dense else (block.experts, "pairs", 1.0),
    }[name]


@torch.no_grad()
def edited(
    model: nn.Module, ids: list[int], site: str, change: Callable[[Tensor], Tensor]
) -> Tensor:
    """What plain transformers says when a site is changed: resid_post, attn_out, mlp_out, z, mlp_post or final_norm."""
    name, _, layer = site.partition(".")
    module, side, factor = place(model, name, int(layer or 0))
    if module is None:
        raise KeyError(f"{model.config.model_type} has no {site}")
    heads = (heads_of(model.config, int(layer or 0)),) if name == "z" else ()

    def new(value: Tensor) -> Tensor:
        return (change(value.reshape(1, len(ids), *heads, -1) * factor) / factor).reshape(
            value.shape
        )

    def experts_by_hand(experts: nn.Module, args: tuple, _output: Tensor) -> Tensor:
        read, chosen, weights = args
        _, _, out = neurons_one_by_one(experts, read, chosen, change)
        return (out * weights[..., None]).sum(1).to(read.dtype)

    def before(_module: nn.Module, args: tuple) -> tuple:
        return (new(args[0]), *args[1:])

    def after(_module: nn.Module, _args: tuple, output: Any) -> Any:
        return (new(output[0]), *output[1:]) if isinstance(output, tuple) else new(output)

    hooks = {"out": after, "pairs": experts_by_hand}
    handle = (
        module.register_forward_pre_hook(before)
        if side == "in"
        else module.register_forward_hook(hooks[side])
    )
    try:
        return model(torch.tensor([ids]), use_cache=False).logits
    finally:
        handle.remove()
