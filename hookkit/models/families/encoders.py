"""Families of masked language models: BERT and its descendants, which read the whole text at once.

BERT's blocks normalise the stream itself, after attention and after the MLP. `attn_out` and
`mlp_out` are what is added to the stream before that norm, and `resid_mid` and `resid_post` are the
stream after it: `Family.stream_norms` names the two norms. `final_norm` is what the unembedding
reads: the last module of the head's own transformation.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeAlias

from .schema import (
    BY_HEAD,
    FUSED,
    HEAD,
    HEADS,
    KEY_HEADS,
    NO_ROUTER,
    NOT_ROTARY,
    ROTARY,
    STREAM,
    Family,
    ModuleLocation,
    SiteLocations,
    attention_sites,
    fused_qkv,
    input_of,
    mlp_sites,
    multi_head_sizes,
    output_of,
    rotary_sites,
)

Locations: TypeAlias = dict[str, ModuleLocation | tuple[ModuleLocation, ...]]

BERT_HEAD = ("cls.predictions.transform.LayerNorm", "cls.predictions.decoder")
ROBERTA_HEAD = ("lm_head.layer_norm", "lm_head.decoder")
BERT_NORMS = {"resid_mid": ".attention.output.LayerNorm", "resid_post": ".output.LayerNorm"}


def _named_qkv(path: str, query: str, key: str, value: str) -> dict[str, ModuleLocation]:
    """Returns the sites of separate projections with these names."""
    return {
        "q": output_of(f"{path}.{query}", cut=HEADS),
        "k": output_of(f"{path}.{key}", cut=KEY_HEADS),
        "v": output_of(f"{path}.{value}", cut=KEY_HEADS),
    }


def _bert_sites(body: str, head: tuple[str, str]) -> Locations:
    """Returns the sites of BERT for a model with this path and these paths of its head."""
    final_norm, unembedding = head
    return {
        "embed": output_of(f"{body}.embeddings.word_embeddings"),
        "pos_embed": output_of(f"{body}.embeddings.position_embeddings"),
        **STREAM,
        **attention_sites(".attention.self"),
        **_named_qkv(".attention.self", "query", "key", "value"),
        "z": input_of(".attention.output.dense", cut=HEADS),
        "attn_out": output_of(".attention.output.dense"),
        "resid_mid": output_of(".attention.output.LayerNorm"),
        "mlp_in": input_of(".intermediate"),
        "mlp_pre": output_of(".intermediate.dense"),
        "mlp_post": input_of(".output.dense"),
        "mlp_out": output_of(".output.dense"),
        "final_norm": output_of(final_norm),
        "lm_head": output_of(unembedding),
        "logits": HEAD["logits"],
    }


def like_bert(
    body: str,
    head: tuple[str, str] = BERT_HEAD,
    changes: SiteLocations | None = None,
    **fields: Any,
) -> Family:
    """Returns a row with the sites of BERT, except for `changes`."""
    fields = {"missing": {**NOT_ROTARY, **NO_ROUTER}, "stream_norms": BERT_NORMS, **fields}
    return Family(
        "bert",
        {**_bert_sites(body, head), **(changes or {})},
        block=f"{body}.encoder.layer.{{layer}}",
        sizes=multi_head_sizes,
        **fields,
    )


ROBERTA = like_bert("roberta", ROBERTA_HEAD)
ADAPTER = "the adapter of the text's language changes the stream after the MLP"
XMOD = replace(
    ROBERTA,
    stream_norms={"resid_mid": BERT_NORMS["resid_mid"]},
    exceptions=dict.fromkeys(("sum", "one stream mlp_out"), ADAPTER),
)

RELATIVE = {
    "pos_embed": "positions are relative: they act inside attention and are not added to the stream"
}


def _without(row: Family, reasons: Mapping[str, str]) -> Family:
    """Returns a row without the sites that have a reason here."""
    locations = {site: where for site, where in row.locations.items() if site not in reasons}
    return replace(row, locations=locations, missing={**row.missing, **reasons})


def deberta(config: Any) -> Family:
    """Returns the row for positions inside attention only, or in the embedding too."""
    is_version_1 = config.model_type == "deberta"
    changes: Locations = {}
    if is_version_1:
        changes |= fused_qkv(".attention.self.in_proj", BY_HEAD)
    else:
        changes |= _named_qkv(".attention.self", "query_proj", "key_proj", "value_proj")
    row = like_bert("deberta", BERT_HEAD, changes, attention="own")
    exceptions: dict[str, str] = {}
    if is_version_1:
        row = _without(
            row, dict.fromkeys("qv", "a bias is added to it in the attention's own code")
        )
    if getattr(config, "conv_kernel_size", 0):
        exceptions["one stream resid_post"] = (
            "a convolution of the embedding is added to the stream after the first block"
        )
    if not config.position_biased_input:
        row = _without(row, RELATIVE)
    return replace(row, exceptions=exceptions)


DISTILBERT = Family(
    "distilbert",
    {
        "embed": output_of("distilbert.embeddings.word_embeddings"),
        "pos_embed": output_of("distilbert.embeddings.position_embeddings"),
        **STREAM,
        **attention_sites(".attention", "out_lin"),
        **_named_qkv(".attention", "q_lin", "k_lin", "v_lin"),
        "resid_mid": output_of(".sa_layer_norm"),
        **mlp_sites(".ffn", "lin1", "lin2"),
        "final_norm": output_of("vocab_layer_norm"),
        "lm_head": output_of("vocab_projector"),
        "logits": HEAD["logits"],
    },
    {**NOT_ROTARY, **NO_ROUTER},
    block="distilbert.transformer.layer.{layer}",
    sizes=multi_head_sizes,
    stream_norms={"resid_mid": ".sa_layer_norm", "resid_post": ".output_layer_norm"},
)

MPNET = like_bert(
    "mpnet",
    ROBERTA_HEAD,
    {
        **attention_sites(".attention.attn", "o"),
        "attn_out": output_of(".attention.attn.o"),
        **_named_qkv(".attention.attn", "q", "k", "v"),
        "resid_mid": output_of(".attention.LayerNorm"),
    },
    attention="own",
    stream_norms={"resid_mid": ".attention.LayerNorm", "resid_post": ".output.LayerNorm"},
)

MODERNBERT = Family(
    "modernbert",
    {
        "embed": output_of("model.embeddings.tok_embeddings"),
        **STREAM,
        **attention_sites(".attn", "Wo"),
        **fused_qkv(".attn.Wqkv", FUSED),
        **rotary_sites(".attn"),
        "resid_mid": input_of(".mlp_norm", shared=True),
        **mlp_sites(".mlp", "Wi", "Wo"),
        "mlp_pre": output_of(".mlp.Wi", cut="d_mlp | d_mlp"),
        "final_norm": output_of("head.norm"),
        "lm_head": output_of("decoder"),
        "logits": HEAD["logits"],
    },
    {**ROTARY, **NO_ROUTER},
    block="model.layers.{layer}",
    sizes=multi_head_sizes,
)


def esm(config: Any) -> Family:
    """Returns the row for rotary or for absolute positions."""
    norm_before = {"resid_mid": input_of(".LayerNorm", shared=True)}
    if config.position_embedding_type != "rotary":
        return like_bert("esm", ROBERTA_HEAD, norm_before, stream_norms={})
    changes = {**norm_before, **rotary_sites(".attention.self")}
    row = like_bert("esm", ROBERTA_HEAD, changes, missing=NO_ROUTER, stream_norms={})
    return _without(row, ROTARY)


ONE_BLOCK = (
    "the model runs the same block at every layer, so that a module does not say which layer is "
    "meant; hk.module of a module in the block acts at all layers"
)
ALBERT = Family(
    "albert",
    {
        "embed": output_of("albert.embeddings.word_embeddings"),
        "pos_embed": output_of("albert.embeddings.position_embeddings"),
        "final_norm": output_of("predictions.LayerNorm"),
        "lm_head": output_of("predictions.decoder"),
        "logits": HEAD["logits"],
    },
    {
        **dict.fromkeys((*STREAM, *attention_sites(""), "q", "k", "v", "resid_mid"), ONE_BLOCK),
        **dict.fromkeys(mlp_sites("", "", ""), ONE_BLOCK),
        **NOT_ROTARY,
        **NO_ROUTER,
    },
    block="",
)

ENCODERS = {
    "bert": like_bert("bert"),
    "ernie": like_bert("ernie"),
    **dict.fromkeys(("roberta", "camembert", "xlm-roberta"), ROBERTA),
    "data2vec-text": like_bert("data2vec_text", ROBERTA_HEAD),
    "electra": like_bert("electra", ("generator_predictions.LayerNorm", "generator_lm_head")),
    "deberta": deberta,
    "deberta-v2": deberta,
    "distilbert": DISTILBERT,
    "albert": ALBERT,
    "mpnet": MPNET,
    "xmod": XMOD,
    "modernbert": MODERNBERT,
    "esm": esm,
}
"""The rows of masked language models, by model type."""
