"""Finds the sites of attention by value: which projections give what attention multiplies."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..attention import compute_scores_and_pattern
from ..families.schema import ModuleLocation
from ..families.shared import NOT_ROTARY, OWN_ATTENTION
from .dry_run import FunctionCall, ModuleCall, Recording
from .matching import Match, equal_values, find_heads, is_flat, scale_factor

HEADED = ("q", "k", "v", "q_rot", "k_rot", "scores", "pattern", "z")
UNPROVED = "hookkit could not prove where it is: "


@dataclass
class Attention:
    """The attention of one block: its call, the tensors in it, and where its sites are.

    Query, key and value are [batch, head, pos, d_head].
    """

    call: ModuleCall
    style: Literal["interface", "own"]
    query: Tensor
    key: Tensor
    value: Tensor
    scores: Tensor | None
    pattern: Tensor | None
    sizes: dict[str, int | None] = field(default_factory=dict)
    locations: dict[str, ModuleLocation] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    output_projection: ModuleCall | None = None
    has_head_axis: bool = True  # scores and pattern are [batch, head, query, key] in the model
    repeats_keys: bool = False  # attention receives keys and values repeated for each query head
    rotates: bool = True  # q_rot and k_rot differ from q and k


def find_attention(recording: Recording, block: ModuleCall) -> Attention | str:
    """Returns the attention of a block with its locations, or the reason why there is none."""
    attentions = _interface_attentions(recording, block) or _own_attentions(recording, block)
    if not attentions:
        return "no attention (a softmax of queries by keys) was seen in this block"
    if len(attentions) > 1:
        return f"this block has {len(attentions)} attentions, and one is meant"
    (attention,) = attentions
    if not recording.runs_once(attention.call):
        return (
            "the module of this block's attention runs in several blocks, so that its calls cannot "
            "be told apart"
        )
    _measure_heads(attention)
    _locate_projections(recording, attention)
    _locate_rotated(attention)
    _locate_input(recording, attention)
    _locate_z(recording, attention)
    _locate_scores(recording, attention)
    return attention


def _interface_attentions(recording: Recording, block: ModuleCall) -> list[Attention]:
    """Returns the attentions that call transformers' AttentionInterface."""
    attentions = []
    for call in recording.calls_within(block):
        tensors = call.attention_tensors
        if "query" in tensors:
            query, key, value = tensors["query"], tensors["key"], tensors["value"]
            scores, pattern = tensors.get("scores"), tensors.get("pattern")
            attentions.append(Attention(call, "interface", query, key, value, scores, pattern))
    return attentions


def _own_attentions(recording: Recording, block: ModuleCall) -> list[Attention]:
    """Returns the attentions that a family computes in its own code."""
    attentions = []
    for call in (block, *recording.calls_within(block)):
        for function_call in call.function_calls:
            if not _is_attention(function_call, recording):
                continue
            owner = _enclosing_with_projections(recording, call)
            if owner is None or block not in owner.enclosing:
                continue
            if function_call.kind == "fused":
                attention = _from_fused(owner, function_call)
            else:
                attention = _from_softmax(recording, owner, function_call)
            if attention is not None:
                attentions.append(attention)
    return attentions


def _is_attention(function_call: FunctionCall, recording: Recording) -> bool:
    """True for a softmax over keys, or torch's fused attention."""
    if function_call.kind == "fused":
        return len(function_call.inputs) >= 3
    shape = function_call.output.shape
    if function_call.kind != "softmax" or shape[-2:] != (recording.width, recording.width):
        return False
    if len(shape) == 4:
        return shape[0] == recording.rows
    return len(shape) == 3 and shape[0] > recording.rows


def _enclosing_with_projections(recording: Recording, call: ModuleCall) -> ModuleCall | None:
    """Returns the innermost call around a call, or itself, that contains a linear map."""
    for candidate in (call, *reversed(call.enclosing)):
        if any(inner.is_linear for inner in recording.calls_within(candidate)):
            return candidate
    return None


def _from_fused(owner: ModuleCall, fused: FunctionCall) -> Attention | None:
    query, key, value, *further = fused.inputs
    if query.ndim != 4:
        return None
    wide_key, wide_value = key, value
    shared = query.shape[1] // key.shape[1]
    if shared > 1:
        wide_key = key.repeat_interleave(shared, dim=1)
        wide_value = value.repeat_interleave(shared, dim=1)
    settings = {name: setting for name, setting in fused.keywords.items() if name != "enable_gqa"}
    tensors = compute_scores_and_pattern(query, wide_key, wide_value, *further, **settings)
    return Attention(owner, "own", query, key, value, tensors["scores"], tensors["pattern"])


def _from_softmax(
    recording: Recording, owner: ModuleCall, softmax: FunctionCall
) -> Attention | None:
    """Reads query, key and value from the two matrix products around a softmax."""
    rows, width = recording.rows, recording.width
    score_product = value_product = None
    for product in recording.function_calls_within(owner):
        if product.kind != "product" or len(product.inputs) < 2:
            continue
        if product.start < softmax.start and product.output.shape[-2:] == (width, width):
            score_product = product  # the last one counts
        weights = product.inputs[-2]
        follows = value_product is None and product.start > softmax.start
        if follows and equal_values(weights, softmax.output.to(weights.dtype)):
            value_product = product
    if score_product is None or value_product is None:
        return None

    def with_head_axis(tensor: Tensor) -> Tensor:
        return tensor.reshape(rows, -1, *tensor.shape[-2:])

    return Attention(
        owner,
        "own",
        query=with_head_axis(score_product.inputs[-2]),
        key=with_head_axis(score_product.inputs[-1].transpose(-1, -2)),
        value=with_head_axis(value_product.inputs[-1]),
        scores=with_head_axis(softmax.inputs[0]),
        pattern=with_head_axis(softmax.output),
        has_head_axis=softmax.output.ndim == 4,
    )


def _measure_heads(attention: Attention) -> None:
    """Fills the sizes, and removes the repeated heads of keys and values."""
    heads, key_heads = attention.query.shape[1], attention.key.shape[1]
    kv_heads = _count_distinct_heads(attention.key, attention.value)
    if key_heads != kv_heads:
        attention.repeats_keys = True
        attention.key = attention.key[:, :: key_heads // kv_heads]
        attention.value = attention.value[:, :: attention.value.shape[1] // kv_heads]
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
    """Returns the number of heads [batch, head, …] that differ."""
    heads = key.shape[1]
    for count in range(1, heads):
        repeats = heads // count
        if heads % count == 0 and _repeats(key, repeats) and _repeats(value, repeats):
            return count
    return heads


def _repeats(tensor: Tensor, repeats: int) -> bool:
    """True if each head is followed by copies of itself, `repeats` in all."""
    groups = tensor.unflatten(1, (-1, repeats))
    return torch.equal(groups, groups[:, :, :1].expand_as(groups))


def _locate_projections(recording: Recording, attention: Attention) -> None:
    """Locates q, k and v. Sets `rotates` if q or k are transformed before they are multiplied."""
    tensors = {"q": attention.query, "k": attention.key, "v": attention.value}
    transformed = {"q": True, "k": True}
    for name, tensor in tensors.items():
        projection = _find_projection(
            recording, attention, tensor.transpose(1, 2), rotates=name != "v"
        )
        if projection is None:
            class_name = type(attention.call.module).__name__
            attention.missing[name] = (
                f"{UNPROVED}no projection in {class_name} gives what attention multiplies"
            )
            continue
        call, heads = projection
        transformed[name] = heads.transformed
        if recording.by_token(call.output) is not None:
            attention.locations[name] = ModuleLocation(
                call.path, cut=heads.cut, part=heads.part, flat=is_flat(call.output)
            )
        elif name == "v" and attention.style == "interface" and not heads.transformed:
            attention.locations[name] = ModuleLocation(attention.call.path, "inside", "value")
        else:
            attention.missing[name] = (
                f"the output of its projection {call.name!r}, where it stands, "
                "is not [batch, pos, …]"
            )
    attention.rotates = transformed["q"] or transformed["k"]


def _locate_rotated(attention: Attention) -> None:
    names: tuple[tuple[Literal["q_rot", "k_rot"], str], ...] = (
        ("q_rot", "query"),
        ("k_rot", "key"),
    )
    for name, item in names:
        if not attention.rotates:
            attention.missing[name] = NOT_ROTARY[name]
        elif attention.style == "own":
            attention.missing[name] = OWN_ATTENTION[name]
        elif name == "k_rot" and attention.repeats_keys:
            attention.missing[name] = (
                UNPROVED + "keys are repeated for each query's head before attention is given them"
            )
        else:
            attention.locations[name] = ModuleLocation(attention.call.path, "inside", item)


def _find_projection(
    recording: Recording, attention: Attention, target: Tensor, *, rotates: bool
) -> tuple[ModuleCall, Match] | None:
    """Returns the projection that heads [batch, pos, head, d_head] come from, and where in it."""
    for call in _projections(recording, attention):
        output = _projection_output(recording, call.output)
        if output is None:
            continue
        heads = find_heads(output, target, attention.sizes, rotates)
        if heads is not None:
            return call, heads
    return _find_projection_before_norm(recording, attention, target, rotates=rotates)


def _find_projection_before_norm(
    recording: Recording, attention: Attention, target: Tensor, *, rotates: bool
) -> tuple[ModuleCall, Match] | None:
    for call in recording.calls_within(attention.call):
        if call.is_linear or recording.calls_within(call):
            continue
        before, after = _as_heads(call.input, target), _as_heads(call.output, target)
        if before is None or after is None or equal_values(before, target):
            continue
        compared = slice(0, 1) if rotates else slice(None)
        if scale_factor(after[:, compared], target[:, compared]) is None:
            continue
        projection = _find_projection(recording, attention, before, rotates=rotates)
        if projection is not None:
            linear, heads = projection
            return linear, Match(heads.cut, heads.part, transformed=True)
    return None


def _projection_output(recording: Recording, tensor: Tensor | None) -> Tensor | None:
    """Returns a projection's output as [batch, pos, …], also for one head [batch, 1, pos, …]."""
    if tensor is not None and tensor.ndim == 4 and tensor.shape[1] == 1:
        tensor = tensor[:, 0]
    return recording.by_token(tensor)


def _as_heads(tensor: Tensor | None, target: Tensor) -> Tensor | None:
    """Returns the input or output of a norm with the target's axes, [batch, pos, head, d_head]."""
    if tensor is None or tensor.numel() != target.numel():
        return None
    batch, pos, heads, d_head = target.shape
    if tensor.shape == (batch, heads, pos, d_head):
        return tensor.transpose(1, 2)
    return tensor.reshape(target.shape)


def _projections(recording: Recording, attention: Attention) -> list[ModuleCall]:
    calls = recording.calls_within(attention.call)
    return [call for call in calls if call.is_linear and recording.runs_once(call)]


def _locate_input(recording: Recording, attention: Attention) -> None:
    call = attention.call
    value = recording.by_token(call.input)
    projections = _projections(recording, attention)
    if value is None or not any(equal_values(linear.input, value) for linear in projections):
        attention.missing["attn_in"] = (
            UNPROVED + "no projection of attention reads what the module is given first"
        )
        return
    attention.locations["attn_in"] = ModuleLocation(call.path, "input", flat=is_flat(call.input))


def _locate_z(recording: Recording, attention: Attention) -> None:
    """Locates z at the input of the last projection, if it reads the heads' weighted values."""
    projections = _projections(recording, attention)
    if projections:
        last = attention.output_projection = projections[-1]
        weighted = recording.by_token(last.input)
        if weighted is not None and _are_weighted_values(attention, weighted):
            same_width = attention.sizes["d_qk"] == attention.sizes["d_v"]
            head_width = "d_head" if same_width else "d_v"
            attention.locations["z"] = ModuleLocation(
                last.path, "input", cut=f"head {head_width}", flat=is_flat(last.input)
            )
            return
    attention.missing["z"] = (
        UNPROVED + "the last projection of attention does not read the heads' outputs in order"
    )


def _are_weighted_values(attention: Attention, tensor: Tensor) -> bool:
    """True if a tensor [batch, pos, …] is pattern times value by head.

    It may be gated or normed afterwards, which does not change the signs.
    """
    heads, d_head = attention.query.shape[1], attention.value.shape[-1]
    if tensor.shape[-1] != heads * d_head or attention.pattern is None:
        return False
    repeats = heads // attention.value.shape[1]
    value = attention.value.repeat_interleave(repeats, dim=1).double()
    expected = (attention.pattern.double() @ value).transpose(1, 2).flatten(2)
    if scale_factor(tensor, expected) is not None:
        return True
    equal_signs = expected.sign() == tensor.double().sign()
    return float(equal_signs.double().mean()) > 0.98


def _locate_scores(recording: Recording, attention: Attention) -> None:
    """Locates scores and pattern, if interception would reach this attention's softmax."""
    reachable = attention.has_head_axis and _softmax_comes_first(recording, attention)
    for name, tensor in (("scores", attention.scores), ("pattern", attention.pattern)):
        if tensor is not None and reachable:
            attention.locations[name] = ModuleLocation(attention.call.path, "inside", name)
        else:
            reason = "the softmax of this attention was not seen, or not by head"
            attention.missing[name] = UNPROVED + (recording.attention_error or reason)


def _softmax_comes_first(recording: Recording, attention: Attention) -> bool:
    """True if the attention's softmax is the first one in its module."""
    if attention.style == "interface":
        return True
    for function_call in recording.function_calls_within(attention.call):
        if function_call.kind == "fused":
            query, key = function_call.inputs[:2]
            return key.shape[1] in (
                1,
                query.shape[1],
            )  # interception does not support grouped heads
        if function_call.kind == "softmax":
            return equal_values(function_call.output, attention.pattern)
    return False
