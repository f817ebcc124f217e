"""How a model's blocks read the residual stream and write into it, as functions.

An edge ends at what one head reads, which differs from what its neighbours read. So each block's
norms and projections are applied to other streams than the model's own. Which modules these are is
found by their values on the user's own prompt, and each function is checked against the values
that the model has there: a block that computes anything else is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import Unsupported
from ..hooks.capture import Captured, capture
from ..models.lm import LM
from ..models.prompts import Row
from ..models.sites import AnySite, ModuleSite, Site, module
from ..models.views import FusedView, view_of
from ..runs.forward import forward
from .backward import CAPTURE_NAME, read_captures
from .edges import HEAD_INPUTS, check_stream_is_sum, required_sites

StreamMap = Callable[[Tensor], Tensor]
CLOSE = {torch.float64: 1e-6, torch.float32: 1e-4}


@dataclass(frozen=True, eq=False)
class BlockMaps:
    """The functions of one block.

    read        the norm before attention: from the stream to what q, k and v are projected from
    read_mlp    the norm before the MLP
    after       what is done to attention's projected output before it is added to the stream; None
                if it is only multiplied by `factor`
    mlp_stream  the site of the stream that the MLP reads
    """

    lm: LM
    layer: int
    read: StreamMap
    read_mlp: StreamMap
    after: StreamMap | None
    factor: float
    mlp_stream: Site

    def head_weights(self, name: str) -> tuple[Tensor, Tensor]:
        """Returns the weights of q, k or v by head, [d_model, head, d_head], and the bias."""
        location = self.lm.location(Site(name, self.layer))
        weight, bias = _linear(self.lm.submodule(location.path))
        columns = _columns(self.lm, Site(name, self.layer), len(bias))
        return weight[:, columns], bias[columns]

    def output_weights(self) -> Float[Tensor, "head d_head d_model"]:
        """Returns the weights of the output projection by head, without its bias."""
        site = Site("z", self.layer)
        weight, _ = _linear(self.lm.submodule(self.lm.location(site).path))
        return weight[_columns(self.lm, site, len(weight))]

    def project(self, z: Float[Tensor, "row pos head d_head"]) -> Float[Tensor, "row pos d_model"]:
        """Returns attention's output from all heads, before a norm after it."""
        return self.lm.submodule(self.lm.location(Site("z", self.layer)).path).forward(z.flatten(2))


def _linear(projection: nn.Module) -> tuple[Float[Tensor, "d_in d_out"], Float[Tensor, " d_out"]]:
    """Returns the weight and the bias of a module that computes a linear function."""
    if type(projection) is nn.Linear:
        weight, bias = projection.weight, projection.bias
        return weight.T, weight.new_zeros(len(weight)) if bias is None else bias
    width: Any = getattr(projection, "in_features", None)
    if width is None:  # transformers' Conv1D
        width = len(projection.get_parameter("weight"))
    like = next(projection.parameters())
    dtype = like.dtype if like.is_floating_point() else torch.get_default_dtype()
    zero = projection.forward(torch.zeros(1, width, dtype=dtype, device=like.device))[0]
    eye = torch.eye(width, dtype=dtype, device=like.device)
    return projection.forward(eye) - zero, zero


def _columns(lm: LM, site: Site, width: int) -> Tensor:
    """Returns which numbers of a module's last axis a site's heads are: [head, d_head]."""
    view = view_of(lm.layout, site, lm.location(site))
    if not isinstance(view, FusedView):
        raise Unsupported(
            f"{site} is not the output of a projection by heads, so that an edge has no end there"
        )
    numbers = view.view(torch.arange(width)[None, None])
    return numbers.reshape(1, 1, -1, numbers.shape[-1])[0, 0]


def find_block_maps(lm: LM, row: Row) -> list[BlockMaps]:
    """Returns the functions of every block, checked on one prompt. Raises `Unsupported`."""
    if lm.ranks is not None:
        raise Unsupported(
            "a model that is split among processes has no circuits here: load it whole"
        )
    sites: list[AnySite] = list(required_sites(lm))
    for layer in range(lm.n_layers):
        location = lm.location(Site("z", layer))
        sites += [Site("attn_in", layer), module(location.path, side="output")]
    run = forward(lm, [row], capture(sites, name=CAPTURE_NAME), logits=False)
    values = read_captures(run, sites)
    check_stream_is_sum(lm, values)
    with torch.no_grad():
        return [_find_maps(lm, layer, values) for layer in range(lm.n_layers)]


def _find_maps(lm: LM, layer: int, captured: Mapping[AnySite, Captured]) -> BlockMaps:
    def values(name: str) -> Tensor:
        return captured[Site(name, layer)].values

    z_path = lm.location(Site("z", layer)).path
    projected = captured[ModuleSite(z_path, "output")].values
    mlp_stream = Site("resid_mid", layer)
    if lm.layout.find("resid_mid", layer) is None:
        mlp_stream = Site("resid_pre", layer)
    factor = lm.layout.factor(Site("attn_out", layer))
    after = None
    if not _is_close(projected * factor, values("attn_out")):
        inner = _find_norm(lm, layer, projected, values("attn_out") / factor, "attn_out")
        after = _times(inner, factor)
    maps = BlockMaps(
        lm,
        layer,
        _find_norm(lm, layer, values("resid_pre"), values("attn_in"), "attn_in"),
        _find_norm(lm, layer, captured[mlp_stream].values, values("mlp_in"), "mlp_in"),
        after,
        factor,
        mlp_stream,
    )
    for name in HEAD_INPUTS:
        weight, bias = maps.head_weights(name)
        result = torch.einsum("npd,dhk->nphk", values("attn_in"), weight) + bias
        _check(result, values(name), lm, f"{name}.{layer} is no linear function of attn_in")
    result = maps.project(values("z"))
    zero = maps.project(torch.zeros_like(values("z")))
    parts = torch.einsum("nphk,hkd->npd", values("z"), maps.output_weights())
    _check(result, projected, lm, f"z.{layer} is not all that attention's projection reads")
    _check(parts + zero, projected, lm, f"attention's output is no linear function of z.{layer}")
    return maps


def _times(inner: StreamMap, factor: float) -> StreamMap:
    return inner if factor == 1.0 else lambda values: inner(values) * factor


def _identity(values: Tensor) -> Tensor:
    return values


def _find_norm(lm: LM, layer: int, source: Tensor, target: Tensor, name: str) -> StreamMap:
    """Returns the module of a block that makes one value from another, or the identity."""
    if torch.equal(source, target):
        return _identity
    block = lm.submodule(lm.family.block.format(layer=layer))
    best, least = None, float("inf")
    for candidate in block.modules():
        error = float("inf")
        if not next(candidate.children(), None):
            error = _error(candidate, source, target)
        if error < least:
            best, least = candidate.forward, error
    if best is None or not _is_close(best(source), target):
        raise Unsupported(
            f"{name}.{layer} of this {lm.family.name} model is not made by one module of its block "
            "from the residual stream, so that a circuit cannot give each head a stream of its own"
        )
    return best


def _error(candidate: nn.Module, source: Tensor, target: Tensor) -> float:
    try:
        result = candidate.forward(source)
    except (TypeError, RuntimeError, ValueError, AttributeError, IndexError):
        return float("inf")  # it takes other arguments
    if not isinstance(result, Tensor) or result.shape != target.shape:
        return float("inf")
    error = float((result - target).abs().max())
    return error if error == error else float("inf")


def _is_close(actual: Tensor, expected: Tensor) -> bool:
    limit = CLOSE.get(expected.dtype, 3e-2) * float(expected.abs().max())
    return actual.shape == expected.shape and float((actual - expected).abs().max()) <= limit


def _check(actual: Tensor, expected: Tensor, lm: LM, reason: str) -> None:
    if not _is_close(actual, expected):
        raise Unsupported(
            f"{reason} in this {lm.family.name} model, so that its edges cannot be separated: "
            "hk.attribution and hk.path_patching do not need them"
        )
