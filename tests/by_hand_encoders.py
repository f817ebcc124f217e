"""The second route for masked language models: each site from transformers' own outputs and the weights.

No hookkit here. The stream is `output_hidden_states`, the pattern is `output_attentions` of eager attention; all other
sites are computed from these with the weights, as the modelling files of transformers 5.23 do it.
"""

from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu


@dataclass(frozen=True)
class Names:
    """Where a family keeps things: the blocks and the embedding in the model, the rest in a block or in the head."""

    blocks: str
    embed: str
    query: str = "attention.self.query"
    key: str = "attention.self.key"
    value: str = "attention.self.value"
    out: str = "attention.output.dense"
    norm_after_attn: str = "attention.output.LayerNorm"
    up: str = "intermediate.dense"
    down: str = "output.dense"
    norm_after_mlp: str = "output.LayerNorm"
    head: tuple[str, str, str] = ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.decoder")  # fmt: skip


def _bert(body: str, **changes: Any) -> Names:
    return Names(f"{body}.encoder.layer", f"{body}.embeddings.word_embeddings", **changes)


ROBERTA_HEAD = ("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder")
ROBERTA = _bert("roberta", head=ROBERTA_HEAD)
DEBERTA_2 = _bert("deberta", query="attention.self.query_proj", key="attention.self.key_proj", value="attention.self.value_proj")  # fmt: skip
ELECTRA_HEAD = (
    "generator_predictions.dense",
    "generator_predictions.LayerNorm",
    "generator_lm_head",
)
NAMES = {
    "bert": _bert("bert"),
    "ernie": _bert("ernie"),
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
    "camembert": ROBERTA,
    "data2vec-text": _bert("data2vec_text", head=ROBERTA_HEAD),
    "electra": _bert("electra", head=ELECTRA_HEAD),
    "deberta-v2": DEBERTA_2,
    "distilbert": Names(
        "distilbert.transformer.layer", "distilbert.embeddings.word_embeddings", "attention.q_lin", "attention.k_lin",
        "attention.v_lin", "attention.out_lin", "sa_layer_norm", "ffn.lin1", "ffn.lin2", "output_layer_norm",
        ("vocab_transform", "vocab_layer_norm", "vocab_projector"),
    ),
    "mpnet": _bert(
        "mpnet", query="attention.attn.q", key="attention.attn.k", value="attention.attn.v", out="attention.attn.o",
        norm_after_attn="attention.LayerNorm", head=ROBERTA_HEAD,
    ),
}  # fmt: skip


def outputs(model: Any, ids: list[int]) -> Any:
    """What transformers returns with its own hidden states and patterns."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            return model(torch.tensor([ids]), output_hidden_states=True, output_attentions=True)
    finally:
        model.set_attn_implementation(before)


def sites(model: Any, ids: list[int], model_type: str) -> dict[str, Tensor]:
    """What is at each site: all but `scores`, `pos_embed` and rotated queries and keys."""
    plain = outputs(model, ids)
    with torch.no_grad():
        if model_type == "modernbert":
            values = _modernbert(model, plain)
        elif model_type == "esm":
            values = _esm(model, plain)
        else:
            values = _post_norm(model, plain, NAMES[model_type])
        embed = NAMES[model_type].embed if model_type in NAMES else EMBED[model_type]
        values["embed"] = attrgetter(embed)(model).weight[ids][None]
    return values | {"logits": plain.logits}


EMBED = {"modernbert": "model.embeddings.tok_embeddings", "esm": "esm.embeddings.word_embeddings"}


def _heads(tensor: Tensor, count: int) -> Tensor:
    return tensor.unflatten(-1, (count, -1))


def _weighted(pattern: Tensor, value: Tensor) -> Tensor:
    """[batch, head, query, key] and [batch, key, head, d] give [batch, query, head, d]."""
    return torch.einsum("bhqk,bkhd->bqhd", pattern, value)


def _post_norm(model: Any, plain: Any, names: Names) -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}
    heads = model.config.num_attention_heads
    for layer, block in enumerate(attrgetter(names.blocks)(model)):
        part = {name: attrgetter(path)(block) for name, path in vars(names).items() if name not in ("blocks", "embed", "head")}  # fmt: skip
        pre, pattern = plain.hidden_states[layer], plain.attentions[layer]
        value = _heads(part["value"](pre), heads)
        z = _weighted(pattern, value)
        attn_out = part["out"](z.flatten(2))
        middle = part["norm_after_attn"](pre + attn_out)
        mlp_pre = part["up"](middle)
        mlp_post = gelu(mlp_pre)
        mlp_out = part["down"](mlp_post)
        found = {
            "resid_pre": pre, "attn_in": pre, "q": _heads(part["query"](pre), heads), "k": _heads(part["key"](pre), heads),
            "v": value, "pattern": pattern, "z": z, "attn_out": attn_out, "resid_mid": middle, "mlp_in": middle,
            "mlp_pre": mlp_pre, "mlp_post": mlp_post, "mlp_out": mlp_out,
            "resid_post": part["norm_after_mlp"](middle + mlp_out),
        }  # fmt: skip
        assert torch.allclose(found["resid_post"], plain.hidden_states[layer + 1], atol=1e-5)
        values |= {f"{name}.{layer}": value for name, value in found.items()}
    return values | _head(model, plain.hidden_states[-1], names.head)


def _head(model: Any, stream: Tensor, paths: tuple[str, str, str]) -> dict[str, Tensor]:
    dense, norm, decoder = [attrgetter(path)(model) for path in paths]
    normed = norm(gelu(dense(stream)))
    return {"final_norm": normed, "lm_head": decoder(normed)}


def _esm(model: Any, plain: Any) -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}
    for layer, block in enumerate(model.esm.encoder.layer):
        pre, pattern = plain.hidden_states[layer], plain.attentions[layer]
        attn_in = block.attention.LayerNorm(pre)
        parts = {
            name[0]: _heads(getattr(block.attention.self, name)(attn_in), 4)
            for name in ("query", "key", "value")
        }
        z = _weighted(pattern, parts["v"])
        attn_out = block.attention.output.dense(z.flatten(2))
        middle = pre + attn_out
        mlp_in = block.LayerNorm(middle)
        mlp_pre = block.intermediate.dense(mlp_in)
        mlp_out = block.output.dense(gelu(mlp_pre))
        found = parts | {
            "resid_pre": pre, "attn_in": attn_in, "pattern": pattern, "z": z, "attn_out": attn_out, "resid_mid": middle,
            "mlp_in": mlp_in, "mlp_pre": mlp_pre, "mlp_post": gelu(mlp_pre), "mlp_out": mlp_out, "resid_post": middle + mlp_out,
        }  # fmt: skip
        values |= {f"{name}.{layer}": value for name, value in found.items()}
    last = model.esm.encoder.emb_layer_norm_after(values["resid_post.2"])
    return values | _head(model, last, ROBERTA_HEAD)


def _modernbert(model: Any, plain: Any) -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}
    for layer, block in enumerate(model.model.layers):
        pre, pattern = plain.hidden_states[layer], plain.attentions[layer]
        attn_in = block.attn_norm(pre)
        query, key, value = block.attn.Wqkv(attn_in).chunk(3, dim=-1)
        z = _weighted(pattern, _heads(value, 4))
        attn_out = block.attn.Wo(z.flatten(2))
        middle = pre + attn_out
        mlp_in = block.mlp_norm(middle)
        mlp_pre, gate = block.mlp.Wi(mlp_in).chunk(2, dim=-1)
        mlp_post = gelu(mlp_pre) * gate
        mlp_out = block.mlp.Wo(mlp_post)
        found = {
            "resid_pre": pre, "attn_in": attn_in, "q": _heads(query, 4), "k": _heads(key, 4), "v": _heads(value, 4),
            "pattern": pattern, "z": z, "attn_out": attn_out, "resid_mid": middle, "mlp_in": mlp_in, "mlp_pre": mlp_pre,
            "mlp_post": mlp_post, "mlp_out": mlp_out, "resid_post": middle + mlp_out,
        }  # fmt: skip
        values |= {f"{name}.{layer}": value for name, value in found.items()}
    last = model.model.final_norm(values["resid_post.2"])
    return values | _head(model, last, ("head.dense", "head.norm", "decoder"))
