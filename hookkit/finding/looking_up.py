"""The row for any model: of the table, found out, or one that says why there is none."""

from dataclasses import replace
from typing import Any

from torch import nn

from ..families import FAMILIES, Family
from ..layout import family_of, no_decoder
from .whole import found_out


def row_of(model: nn.Module, config: Any, head: str | None) -> Family:
    """The table's row for a model; for a causal language model that the table lacks, the row found out by a dry run.

    `head` is the path of the output embedding, or None where there is none. Encoders, encoder-decoders and models
    without a head have what can be said of them, and the reason why the rest is missing.
    """
    refused = no_decoder(model, config, head)
    if refused is not None:
        return refused
    known = family_of(config, head)
    listed = getattr(config, "model_type", None) in FAMILIES
    if head is None or listed or not _is_causal(model):
        return known
    try:
        return found_out(model, config)
    except Exception as error:  # noqa: BLE001  what a model of any kind may raise; it is told with each reason
        said = " ".join(str(error).split())[:200] or type(error).__name__
        reason = f"no row of hookkit's table has this model type, and a dry run of it ended with: {said}"
        return replace(known, missing=dict.fromkeys(known.missing, f"{reason}; use hk.module(path)"))


def _is_causal(model: nn.Module) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = type(model).__name__
    return "CausalLM" in kind or "LMHead" in kind or kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
