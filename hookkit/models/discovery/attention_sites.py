"""Finds the sites of attention by value: which projections give what attention multiplies."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ..families.schema import NOT_ROTARY, OWN_ATTENTION, ModuleLocation, split_axis
from ..views import FusedView
from .dry_run import (
    RELATIVE_TOLERANCE,
    ROWS,
    WIDTH,
    FunctionCall,
    ModuleCall,
    by_token,
    equal_values,
    scale_factor,
)

HEADED = ("q", "k", "v", "q_rot", "k_rot", "scores", "pattern", "z")
UNPROVED = "hookkit could not prove where it is: "
SEVERAL_ATTENTIONS = (
    "the module of this block computes attention several times in one forward, and a hook cannot "
    "tell its calls apart"
)

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
        return [call for call in self.call.linear_calls if call.runs_once]

    @property
    def output_width(self) -> int | None:
        """The number of values that attention gives for each token."""
        output = self.call.output_by_token
        return None if output is None else output.shape[-1]


@dataclass(frozen=True)
class Projection:
    """A part of a projection's output, which is heads.

    `transformed` is True if attention receives them after a norm or a rotation.
    """

    call: ModuleCall
    cut: str
    part: int
    transformed: bool


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
    """Returns the sites of an attention, without q_rot and k_rot.

    `attention_error` is the reason why it was not intercepted.
    """
    _measure_heads(attention)
    sites = _locate_projections(attention)
    sites["attn_in"] = _locate_input(attention)
    sites["z"] = _locate_z(attention)
    for name in ("scores", "pattern"):
        sites[name] = ModuleLocation(attention.call.path, "inside", name)
        if attention.call.attends_again:
            sites[name] = SEVERAL_ATTENTIONS
        elif not attention.has_scores:
            reason = "the softmax of this attention was not seen, or not by head"
            sites[name] = UNPROVED + (attention_error or reason)
    return sites


def _interface_attentions(block: ModuleCall) -> list[Attention]:
    """Returns the attentions that call transformers' AttentionInterface."""
    return [_from_interface(call) for call in block.inner if "query" in call.attention_tensors]


def _from_interface(call: ModuleCall) -> Attention:
    tensors = call.attention_tensors
    query, key, value = tensors["query"], tensors["key"], tensors["value"]
    weighted_values = None
    if "pattern" in tensors:
        values = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        weighted_values = _join_heads(tensors["pattern"].double() @ values.double())
    return Attention(
        call, "interface", query, key, value, weighted_values, has_scores="scores" in tensors
    )


def _join_heads(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2).flatten(2)


def _own_attentions(block: ModuleCall) -> list[Attention]:
    """Returns the attentions that a family computes in its own code."""
    function_calls = filter(_is_attention, block.function_calls)
    attentions = [_from_own_code(block, function_call) for function_call in function_calls]
    return list(filter(None, attentions))


def _is_attention(function_call: FunctionCall) -> bool:
    """True for a softmax over keys, or torch's fused attention."""
    match function_call.kind, tuple(function_call.output.shape):
        case "softmax", (batch, _, queries, keys):
            return (batch, queries, keys) == (ROWS, WIDTH, WIDTH)
        case "softmax", (batch_and_heads, queries, keys):
            return batch_and_heads > ROWS and (queries, keys) == (WIDTH, WIDTH)
        case "fused", _:
            return len(function_call.inputs) >= 3 and function_call.inputs[0].ndim == 4
    return False


def _from_own_code(block: ModuleCall, function_call: FunctionCall) -> Attention | None:
    owner = _enclosing_with_projections(function_call.owner)
    if owner is None or block not in owner.enclosing:
        return None
    if function_call.kind == "fused":
        return _from_fused(owner, function_call)
    return _from_softmax(owner, function_call)


def _enclosing_with_projections(call: ModuleCall) -> ModuleCall | None:
    """Returns the innermost call around a call, or itself, that contains a linear map."""
    for candidate in (call, *reversed(call.enclosing)):
        if candidate.linear_calls:
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
    score_product = _last_score_product(owner.function_calls[:index])
    value_product = _first_value_product(owner.function_calls[index:], softmax.output)
    if score_product is None or value_product is None:
        return None
    return Attention(
        owner,
        "own",
        query=_with_head_axis(score_product.inputs[-2]),
        key=_with_head_axis(score_product.inputs[-1].transpose(-1, -2)),
        value=_with_head_axis(value_product.inputs[-1]),
        weighted_values=_join_heads(_with_head_axis(value_product.output)),
        has_scores=softmax.output.ndim == 4 and _comes_first(owner, softmax),
    )


def _with_head_axis(tensor: Tensor) -> Tensor:
    return tensor.reshape(ROWS, -1, *tensor.shape[-2:])


def _last_score_product(function_calls: list[FunctionCall]) -> FunctionCall | None:
    for product in reversed(function_calls):
        if product.is_matrix_product and product.output.shape[-2:] == (WIDTH, WIDTH):
            return product
    return None


def _first_value_product(
    function_calls: list[FunctionCall], pattern: Tensor
) -> FunctionCall | None:
    for product in filter(lambda call: call.is_matrix_product, function_calls):
        weights = product.inputs[-2]
        if equal_values(weights, pattern.to(weights.dtype)):
            return product
    return None


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
    pairs = zip(key.unbind(1), value.unbind(1), strict=False)
    heads = [torch.cat((keys.flatten(), values.flatten())) for keys, values in pairs]
    copies = itertools.starmap(torch.equal, itertools.pairwise(heads))
    return len(heads) - sum(copies)


def _locate_projections(attention: Attention) -> FoundSites:
    """Locates q, k and v. Sets `rotates` if q or k are transformed before they are multiplied."""
    query = _find_projection(attention, attention.query, rotates=True)
    key = _find_projection(attention, attention.key, rotates=True)
    value = _find_projection(attention, attention.value, rotates=False)
    attention.rotates = _is_transformed(query) or _is_transformed(key)
    sites: FoundSites = {
        "q": _projection_site(attention, query),
        "k": _projection_site(attention, key),
        "v": _projection_site(attention, value),
    }
    if (
        isinstance(sites["v"], str)
        and attention.style == "interface"
        and not _is_transformed(value)
    ):
        sites["v"] = ModuleLocation(attention.call.path, "inside", "value")
    return sites


def _is_transformed(projection: Projection | None) -> bool:
    return projection is None or projection.transformed


def _projection_site(attention: Attention, projection: Projection | None) -> ModuleLocation | str:
    if projection is None:
        class_name = type(attention.call.module).__name__
        return f"{UNPROVED}no projection in {class_name} gives what attention multiplies"
    call = projection.call
    if call.output_by_token is None:
        return (
            f"the output of its projection {call.name!r}, where it stands, is not [batch, pos, …]"
        )
    return call.location(cut=projection.cut, part=projection.part)


def locate_rotated_sites(attention: Attention, any_rotates: bool) -> FoundSites:
    """Returns q_rot and k_rot, which all blocks have if the queries of any block are rotated."""
    if attention.style == "own":
        return {**OWN_ATTENTION} if attention.rotates else {**NOT_ROTARY}
    if not any_rotates:
        return {**NOT_ROTARY}
    if attention.call.attends_again:
        return dict.fromkeys(("q_rot", "k_rot"), SEVERAL_ATTENTIONS)
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


def _find_projection(attention: Attention, target: Tensor, *, rotates: bool) -> Projection | None:
    """Returns the projection that heads [batch, head, pos, d_head] come from, and where in it.

    A norm may act between the projection and the heads.
    """
    target = target.transpose(1, 2)
    for heads in _heads_before_norms(attention, target, rotates):
        for call in attention.projections:
            projection = _match_projection(call, heads, attention.sizes, rotates)
            if projection is not None:
                is_transformed = projection.transformed or heads is not target
                return replace(projection, transformed=is_transformed)
    return None


def _heads_before_norms(attention: Attention, target: Tensor, rotates: bool) -> list[Tensor]:
    """Returns the heads, then what they were before each module (such as a norm) that acts on them.

    A rotation may follow these modules.
    """
    compared = slice(0, 1) if rotates else slice(None)
    stages = [target]
    for before, after in _changes_of_heads(attention.call, target):
        factors = (scale_factor(after[:, compared], stage[:, compared]) for stage in stages)
        if any(factors):  # a factor is not 0
            stages.append(before)
    return stages


def _changes_of_heads(attention: ModuleCall, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the input and output of modules that may act on heads, the last module first."""
    for call in reversed(attention.inner):
        before, after = _as_heads(call.input, target), _as_heads(call.output, target)
        if call.is_linear or before is None or after is None:
            continue
        if not equal_values(before, after):
            yield before, after


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
    # as wide as what attention adds to the stream; some read the token's embedding too
    is_like_stream = value is not None and value.shape[-1] == attention.output_width
    for projection in attention.projections:
        if is_like_stream and equal_values(projection.input, value):
            return attention.call.location("input")
    return UNPROVED + "no projection of attention reads what the module is given first"


def _locate_z(attention: Attention) -> ModuleLocation | str:
    """Locates z at the input of the last projection, if it reads the heads' weighted values.

    In BERT, that projection is in the module after attention.
    """
    for projection in (*attention.projections[-1:], *_projections_after(attention)):
        if _are_weighted_values(attention, projection.input_by_token):
            return projection.location("input", cut="head d_head")
    return UNPROVED + "the last projection of attention does not read the heads' outputs in order"


def _projections_after(attention: Attention) -> Iterator[ModuleCall]:
    """Yields the matrices beside the attention module that read its output."""
    call = attention.call
    for later in call.parent.linear_calls:
        if later.start > call.end and later.runs_once and equal_values(later.input, call.output):
            yield later


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


# ---- heads in the output of a projection


def _match_projection(
    call: ModuleCall, target: Tensor, sizes: dict[str, int | None], rotates: bool
) -> Projection | None:
    """Returns where in a projection's output the heads [batch, pos, head, d_head] are.

    With `rotates` only the first position is compared, where a rotation is the identity (but may
    reorder the numbers of a head).
    """
    for cut, part, heads in _possible_heads(call, target, sizes):
        if scale_factor(heads, target) is not None:
            return Projection(call, cut, part, transformed=False)
        if rotates and _equal_up_to_order(heads[:, 0], target[:, 0]):
            return Projection(call, cut, part, transformed=True)
    return None


def _equal_up_to_order(heads: Tensor, target: Tensor) -> bool:
    if scale_factor(heads, target) is not None:
        return True
    factor = scale_factor(heads.sort(dim=-1).values, target.sort(dim=-1).values)
    return factor is not None and abs(factor - 1) < RELATIVE_TOLERANCE


def _possible_heads(
    call: ModuleCall, target: Tensor, sizes: dict[str, int | None]
) -> Iterator[tuple[str, int, Tensor]]:
    """Yields the parts of an output that have the shape of the heads, with their cut and number."""
    output = call.output
    if output is not None and output.ndim == 4:
        output = output.squeeze(1)  # the axis of a single head
    output = by_token(output)
    if output is None:
        return
    for cut in _possible_cuts(output.shape[-1], target.shape[2], target.shape[3], sizes):
        for part in range(cut.count("|") + 1):
            split = split_axis(ModuleLocation("", cut=cut, part=part), sizes)
            is_whole = split.outer * split.total == output.shape[-1]
            if is_whole and (*output.shape[:2], *split.shape) == target.shape:
                yield cut, part, FusedView(cut=split).view(output).reshape(target.shape)


def _possible_cuts(width: int, heads: int, d_head: int, sizes: dict[str, int | None]) -> list[str]:
    """Returns the cuts that a projection with these heads may have, the likeliest first."""
    q = "d_head" if sizes["d_qk"] == sizes["d_head"] else "d_qk"
    v = "d_head"
    head_width = q if d_head == sizes["d_qk"] else v
    head_count = "head" if heads == sizes["head"] else "kv_head"
    cuts = [
        f"{head_count} {head_width}",
        f"head {q} | kv_head {q} | kv_head {v}",
        f"head: {q} | {q} | {v}",
        f"kv_head: share {q} | {q} | {v}",
        f"4: quarter {q} | quarter {v} | quarter {q}",
        f"head: {q} | {q}",
        f"kv_head {q} | kv_head {v}",
        f"kv_head: {q} | {v}",
    ]
    extra, extra_of_head = width - heads * d_head, width // heads - d_head
    if extra > 0:
        cuts += [
            f"{head_count}: {head_width} | {extra_of_head}",
            f"{head_count}: {extra_of_head} | {head_width}",
            f"{head_count} {head_width} | {extra}",
            f"{extra} | {head_count} {head_width}",
        ]
    return cuts
