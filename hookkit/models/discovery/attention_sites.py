"""Finds the sites of attention by value: which projections give what attention multiplies."""

from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ..families.schema import ModuleLocation
from ..families.shared import NOT_ROTARY, OWN_ATTENTION
from .dry_run import ROWS, WIDTH, FunctionCall, ModuleCall, by_token
from .matching import Match, equal_values, find_heads, scale_factor

HEADED = ("q", "k", "v", "q_rot", "k_rot", "scores", "pattern", "z")
UNPROVED = "hookkit could not prove where it is: "

FoundSites: TypeAlias = dict[str, ModuleLocation | str]
"""By site: its location, or the reason why it has none."""


@dataclass
class Attention:
    """The attention of one block: its call, and the tensors in it.

    Query, key and value are [batch, head, pos, d_head]. `weighted_values` [batch, pos, (head
    d_head)] is the pattern times the values.
    """

    call: ModuleCall
    style: Literal["interface", "own"]
    query: Tensor
    key: Tensor
    value: Tensor
    weighted_values: Tensor | None
    has_scores: bool  # interception reaches its softmax, by head
    sizes: dict[str, int | None] = field(default_factory=dict)
    repeats_keys: bool = False  # attention receives keys and values repeated for each query head
    rotates: bool = True  # q_rot and k_rot differ from q and k

    @property
    def projections(self) -> list[ModuleCall]:
        return [call for call in self.call.inner if call.is_linear and call.runs_once]


def find_attention(block: ModuleCall) -> Attention | str:
    """Returns the attention of a block, or the reason why there is none."""
    attentions = _interface_attentions(block) or _own_attentions(block)
    if not attentions:
        return "no attention (a softmax of queries by keys) was seen in this block"
    if len(attentions) > 1:
        return f"this block has {len(attentions)} attentions, and one is meant"
    if not attentions[0].call.runs_once:
        return (
            "the module of this block's attention runs in several blocks, so that its calls cannot "
            "be told apart"
        )
    return attentions[0]


def locate_attention_sites(attention: Attention, attention_error: str) -> FoundSites:
    """Returns the sites of an attention. `attention_error` is why it was not intercepted."""
    _measure_heads(attention)
    sites = _locate_projections(attention)
    sites |= locate_rotated_sites(attention)
    sites["attn_in"] = _locate_input(attention)
    sites["z"] = _locate_z(attention)
    for name in ("scores", "pattern"):
        sites[name] = ModuleLocation(attention.call.path, "inside", name)
        if not attention.has_scores:
            reason = "the softmax of this attention was not seen, or not by head"
            sites[name] = UNPROVED + (attention_error or reason)
    return sites


def _interface_attentions(block: ModuleCall) -> list[Attention]:
    """Returns the attentions that call transformers' AttentionInterface."""
    attentions = []
    for call in block.inner:
        tensors = call.attention_tensors
        if "query" not in tensors:
            continue
        query, key, value = tensors["query"], tensors["key"], tensors["value"]
        weighted_values = None
        if "pattern" in tensors:
            values = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
            weighted_values = _join_heads(tensors["pattern"].double() @ values.double())
        attention = Attention(
            call, "interface", query, key, value, weighted_values, has_scores="scores" in tensors
        )
        attentions.append(attention)
    return attentions


def _join_heads(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2).flatten(2)


def _own_attentions(block: ModuleCall) -> list[Attention]:
    """Returns the attentions that a family computes in its own code."""
    attentions = []
    for function_call in block.function_calls:
        if not _is_attention(function_call):
            continue
        owner = _enclosing_with_projections(function_call.owner)
        if owner is None or block not in owner.enclosing:
            continue
        if function_call.kind == "fused":
            attention = _from_fused(owner, function_call)
        else:
            attention = _from_softmax(owner, function_call)
        if attention is not None:
            attentions.append(attention)
    return attentions


def _is_attention(function_call: FunctionCall) -> bool:
    """True for a softmax over keys, or torch's fused attention."""
    if function_call.kind == "fused":
        return len(function_call.inputs) >= 3 and function_call.inputs[0].ndim == 4
    shape = function_call.output.shape
    if function_call.kind != "softmax" or shape[-2:] != (WIDTH, WIDTH):
        return False
    if len(shape) == 4:
        return shape[0] == ROWS
    return len(shape) == 3 and shape[0] > ROWS


def _enclosing_with_projections(call: ModuleCall) -> ModuleCall | None:
    """Returns the innermost call around a call, or itself, that contains a linear map."""
    for candidate in (call, *reversed(call.enclosing)):
        if any(inner.is_linear for inner in candidate.inner):
            return candidate
    return None


def _from_fused(owner: ModuleCall, fused: FunctionCall) -> Attention:
    query, key, value = fused.inputs[:3]
    is_grouped = key.shape[1] not in (1, query.shape[1])  # interception does not support this
    has_scores = not is_grouped and _comes_first(owner, fused)
    return Attention(owner, "own", query, key, value, _join_heads(fused.output), has_scores)


def _from_softmax(owner: ModuleCall, softmax: FunctionCall) -> Attention | None:
    """Reads query, key and value from the two matrix products around a softmax."""
    index = owner.function_calls.index(softmax)
    score_product = value_product = None
    for product in owner.function_calls[:index]:
        if _is_product(product) and product.output.shape[-2:] == (WIDTH, WIDTH):
            score_product = product  # the last one counts
    for product in reversed(owner.function_calls[index:]):
        if _is_product(product):
            weights = product.inputs[-2]
            if equal_values(weights, softmax.output.to(weights.dtype)):
                value_product = product
    if score_product is None or value_product is None:
        return None

    def with_head_axis(tensor: Tensor) -> Tensor:
        return tensor.reshape(ROWS, -1, *tensor.shape[-2:])

    return Attention(
        owner,
        "own",
        query=with_head_axis(score_product.inputs[-2]),
        key=with_head_axis(score_product.inputs[-1].transpose(-1, -2)),
        value=with_head_axis(value_product.inputs[-1]),
        weighted_values=_join_heads(with_head_axis(value_product.output)),
        has_scores=softmax.output.ndim == 4 and _comes_first(owner, softmax),
    )


def _is_product(function_call: FunctionCall) -> bool:
    return function_call.kind == "product" and len(function_call.inputs) >= 2


def _comes_first(owner: ModuleCall, function_call: FunctionCall) -> bool:
    """True for the first softmax of a module, which is the one that interception reaches."""
    softmaxes = [call for call in owner.function_calls if call.kind in ("softmax", "fused")]
    return softmaxes[0] is function_call


def _measure_heads(attention: Attention) -> None:
    """Fills the sizes, and removes the repeated heads of keys and values."""
    heads, key_heads = attention.query.shape[1], attention.key.shape[1]
    kv_heads = _count_distinct_heads(attention.key, attention.value)
    if key_heads != kv_heads:
        attention.repeats_keys = True
        attention.key = attention.key[:, :: key_heads // kv_heads]
        attention.value = attention.value[:, :: key_heads // kv_heads]
    d_qk, d_v = attention.query.shape[-1], attention.value.shape[-1]
    attention.sizes = {
        "head": heads,
        "kv_head": kv_heads,
        "d_head": d_v,
        "d_qk": d_qk,
        "d_v": d_v,
        "share": heads // kv_heads,
        "quarter": heads // 4,
    }


def _count_distinct_heads(key: Tensor, value: Tensor) -> int:
    """Returns the number of heads [batch, head, …] that are no copy of the head before them."""
    count = key.shape[1]
    for head in range(1, key.shape[1]):
        if all(torch.equal(tensor[:, head], tensor[:, head - 1]) for tensor in (key, value)):
            count -= 1
    return count


def _locate_projections(attention: Attention) -> FoundSites:
    """Locates q, k and v. Sets `rotates` if q or k are transformed before they are multiplied."""
    sites: FoundSites = {}
    transformed = {"q": True, "k": True}
    for name, tensor in (("q", attention.query), ("k", attention.key), ("v", attention.value)):
        projection = _find_projection(attention, tensor.transpose(1, 2), rotates=name != "v")
        if projection is None:
            class_name = type(attention.call.module).__name__
            sites[name] = f"{UNPROVED}no projection in {class_name} gives what attention multiplies"
            continue
        call, heads = projection
        transformed[name] = heads.transformed
        if call.output_by_token is not None:
            sites[name] = call.location(cut=heads.cut, part=heads.part)
        elif name == "v" and attention.style == "interface" and not heads.transformed:
            sites[name] = ModuleLocation(attention.call.path, "inside", "value")
        else:
            sites[name] = (
                f"the output of its projection {call.name!r}, where it stands, "
                "is not [batch, pos, …]"
            )
    attention.rotates = transformed["q"] or transformed["k"]
    return sites


def locate_rotated_sites(attention: Attention) -> FoundSites:
    """Returns q_rot and k_rot."""
    if not attention.rotates:
        return {**NOT_ROTARY}
    if attention.style == "own":
        return {**OWN_ATTENTION}
    path = attention.call.path
    sites: FoundSites = {
        "q_rot": ModuleLocation(path, "inside", "query"),
        "k_rot": ModuleLocation(path, "inside", "key"),
    }
    if attention.repeats_keys:
        sites["k_rot"] = (
            UNPROVED + "keys are repeated for each query's head before attention is given them"
        )
    return sites


def _find_projection(
    attention: Attention, target: Tensor, *, rotates: bool
) -> tuple[ModuleCall, Match] | None:
    """Returns the projection that heads [batch, pos, head, d_head] come from, and where in it.

    A norm may act between the projection and the heads.
    """
    for heads in _heads_before_norms(attention, target, rotates):
        for call in attention.projections:
            output = call.output
            if output is not None and output.ndim == 4 and output.shape[1] == 1:  # a single head
                output = output[:, 0]
            match = find_heads(by_token(output), heads, attention.sizes, rotates)
            if match is not None:
                is_transformed = match.transformed or heads is not target
                return call, replace(match, transformed=is_transformed)
    return None


def _heads_before_norms(attention: Attention, target: Tensor, rotates: bool) -> list[Tensor]:
    """Returns the heads, then what they were before each module (such as a norm) that acts on them.

    A rotation may follow these modules.
    """
    compared = slice(0, 1) if rotates else slice(None)
    stages = [target]
    for call in reversed(attention.call.inner):
        before, after = _as_heads(call.input, target), _as_heads(call.output, target)
        if call.is_linear or before is None or after is None or equal_values(before, after):
            continue
        for heads in stages:
            if scale_factor(after[:, compared], heads[:, compared]) is not None:
                stages.append(before)
                break
    return stages


def _as_heads(tensor: Tensor | None, target: Tensor) -> Tensor | None:
    """Returns the input or output of a norm with the target's axes, [batch, pos, head, d_head]."""
    if tensor is None or tensor.numel() != target.numel():
        return None
    batch, pos, heads, d_head = target.shape
    if tensor.shape == (batch, heads, pos, d_head):
        return tensor.transpose(1, 2)
    return tensor.reshape(target.shape)


def _locate_input(attention: Attention) -> ModuleLocation | str:
    value = attention.call.input_by_token
    for projection in attention.projections:
        if equal_values(projection.input, value):
            return attention.call.location("input")
    return UNPROVED + "no projection of attention reads what the module is given first"


def _locate_z(attention: Attention) -> ModuleLocation | str:
    """Locates z at the input of the last projection, if it reads the heads' weighted values."""
    for last in attention.projections[-1:]:
        if _are_weighted_values(attention, last.input_by_token):
            return last.location("input", cut="head d_head")
    return UNPROVED + "the last projection of attention does not read the heads' outputs in order"


def _are_weighted_values(attention: Attention, tensor: Tensor | None) -> bool:
    """True if a tensor [batch, pos, …] is pattern times value by head.

    It may be gated or normed afterwards, which does not change the signs.
    """
    expected = attention.weighted_values
    if tensor is None or expected is None or tensor.shape != expected.shape:
        return False
    if scale_factor(tensor, expected) is not None:
        return True
    equal_signs = expected.sign() == tensor.sign()
    return float(equal_signs.double().mean()) > 0.98
