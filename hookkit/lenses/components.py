"""The components that the residual stream is the sum of, and each one's share along a direction.

The components are the embedding and what each block adds, whole or by heads and neurons. Their
shares in a logit are exact, since every norm is treated as the linear map that it is once its scale
is held at the value of this forward.

A norm is f(x) = P D (x - m) / s + f(0), where m is the mean (0 for RMSNorm) and s depends on x.
With s held, each part c of x adds A c to the output, and the parts' shares sum to the norm's output
exactly. The transpose of A is computed without the norm's weights: from the vector-Jacobian product
of f, plus what the held s would otherwise subtract.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import BadHook, Unsupported
from ..models.dictionaries import find_dictionary
from ..models.layout import Layout
from ..models.lm import LM
from ..models.sites import AnySite, Site, Sites, SitesLike
from ..runs.dispatch import forward_of_site
from ..runs.model_end import Cells
from ..runs.run import Run

Map = Callable[[Tensor], Tensor]

# What a block adds: the site, its kind, and the site by which it can be split.
ADDITIONS = (
    ("attn_out", "attention", "z"),
    ("cross_out", "attention", "cross_z"),
    ("mlp_out", "mlp", "mlp_post"),
)
# By how much parts may miss their sum. Norms of transformers compute float64 in float32.
AGREE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class FrozenNorm:
    """A norm, or a linear map, at some states [state, d_in] with its scale fixed.

    `offset` [d_out] is the image of zero. Raises `Unsupported` if the map is neither a norm nor
    linear; `what` names it in the message.
    """

    def __init__(self, map: Map, inputs: Float[Tensor, "state d_in"], what: str) -> None:
        self.map, self.inputs = map, inputs
        with torch.no_grad():
            self.outputs, self.offset = map(inputs), map(torch.zeros_like(inputs[:1]))[0]
            shifted = map(inputs + inputs.abs().mean(-1, keepdim=True))
        change, images = (shifted - self.outputs).abs().max(), self.outputs - self.offset
        self.centred = inputs.double()
        if float(change) <= 1e-3 * float(images.abs().max()):  # a norm that subtracts the mean
            self.centred = (inputs - inputs.mean(-1, keepdim=True)).double()
        images = images.double()
        gradient = vector_jacobian_product(map, inputs, images)
        along = (gradient * inputs).double().sum(-1, keepdim=True)
        # [state, 1]: 1 if the map is a norm, up to its epsilon; 0 if it is linear
        self.is_norm = 1 - along / _squared_norm(images)
        self._check(what)

    def backward(self, outward: Float[Tensor, "state d_out"]) -> Float[Tensor, "state d_in"]:
        """Returns the input direction whose product with a part is its share in outward · f(x)."""
        outward = outward.to(self.outputs)
        shares = outward.double() * (self.outputs - self.offset).double()
        subtracted = shares.sum(-1, keepdim=True) * self.is_norm
        gradient = vector_jacobian_product(self.map, self.inputs, outward).double()
        return gradient + self.centred * subtracted / _squared_norm(self.centred)

    def forward(self, parts: Float[Tensor, "state d_in"]) -> Float[Tensor, "state d_out"]:
        """Returns what parts of the inputs add to the outputs."""
        added = torch.func.jvp(self.map, (self.inputs,), (parts.to(self.inputs),))[1]
        along = (self.scale_gradient * parts).sum(-1, keepdim=True)
        return added + ((self.outputs - self.offset).double() * along).to(added)

    @property
    def scale_gradient(self) -> Float[Tensor, "state d_in"]:
        """The gradient of the logarithm of each state's scale, with which the map divides."""
        return self.centred * self.is_norm / _squared_norm(self.centred)

    def _check(self, what: str) -> None:
        """Raises `Unsupported` if the frozen map is wrong for the same numbers in another order,
        which have the same scale."""
        flipped = self.inputs.flip(-1)
        with torch.no_grad():
            expected = (self.map(flipped) - self.offset).double()
        length = expected.norm(dim=-1).clamp(min=1e-30)
        probe = expected / length[:, None]
        share = (self.backward(probe) * flipped).sum(-1)
        error = float(((share - (probe * expected).sum(-1)) / length).abs().max())
        if not error <= AGREE.get(self.inputs.dtype, 1e-4):
            raise Unsupported(
                f"{what} is neither a LayerNorm, an RMSNorm nor linear (its parts' shares miss by "
                f"{error:.1g}), so what passes it cannot be split into parts that add up"
            )


def vector_jacobian_product(map: Map, inputs: Tensor, outward: Tensor) -> Tensor:
    """Returns the vector-Jacobian product of a map at some states."""
    with torch.enable_grad():
        leaf = inputs.detach().clone().requires_grad_()
        outputs = map(leaf)
        return torch.autograd.grad(outputs, leaf, outward.to(outputs))[0]


def _squared_norm(values: Tensor) -> Tensor:
    return values.square().sum(-1, keepdim=True).clamp(min=1e-30)


@dataclass(frozen=True, eq=False)
class Part:
    """A component, and its share for each cell; `shares` [cell] or, for neurons, [cell, neuron]."""

    name: str
    kind: str
    layer: int | None
    shares: Float[Tensor, "cell ..."]
    head: int | None = None

    @property
    def total(self) -> Float[Tensor, " cell"]:
        """The share of the whole part."""
        return self.shares.sum(1) if self.shares.ndim > 1 else self.shares


@dataclass(frozen=True, eq=False)
class ResidualStream:
    """The residual stream of a run at some cells.

    Shares are measured along the direction `along` [cell, d_model], in float64 on its device:
    blocks may be on several devices.
    """

    run: Run
    cells: Cells
    along: Float[Tensor, "cell d_model"]

    def values(self, site: Site) -> Tensor:
        """Returns the values of a site at the cells, as they were captured."""
        return self.run[site][self.cells.index, self.cells.column]

    def at(self, name: str, layer: int | None = None) -> Tensor | None:
        """Returns the values of a site in float64; None if the block has no such site."""
        if not has_site(self.run.lm.layout, name, layer):
            return None
        return self.values(Site(name, layer)).double().to(self.along.device)

    def share(self, values: Tensor) -> Tensor:
        """Returns the share of a component's values."""
        return torch.einsum("cd,cd->c", self.along, values)

    def remainder(
        self, name: str, kind: str, layer: int | None, values: Tensor, stream: Tensor
    ) -> Iterator[Part]:
        """Yields a part that remains, if it is larger than the rounding error of the sum."""
        dtype = self.run[Site("resid_post", 0)].dtype
        if values.abs().max() > 32 * torch.finfo(dtype).eps * stream.abs().max():
            yield Part(name, kind, layer, self.share(values))


def has_site(layout: Layout, name: str, layer: int | None) -> bool:
    """True if a model has a site in this block."""
    return name in layout.names and layout.find(name, layer) is not None


def is_projected(layout: Layout, name: str, layer: int | None) -> bool:
    """True if a block has a site that one matrix reads, which neurons of experts are not."""
    location = layout.find(name, layer) if name in layout.names else None
    return location is not None and location.side != "inside"


def required_sites(lm: LM, *, heads: bool, neurons: bool) -> list[Site]:
    """Returns the sites to capture: the stream into and out of each block, and what blocks add."""
    lm.location(Site("resid_post", lm.n_layers - 1))  # raises if there are several streams
    has_cross = "cross_z" in lm.layout.names
    inner = ["z"] * heads + ["cross_z"] * (heads and has_cross) + ["mlp_post"] * neurons
    for name in inner:
        lm.expand(name)  # raises if no block has it
        if not any(is_projected(lm.layout, name, layer) for layer in range(lm.n_layers)):
            raise Unsupported(
                "the neurons here are those of experts: what one adds depends on the expert that "
                "it belongs to, and on its weight at this token: leave neurons= out, or compute "
                "mlp_post @ down_proj from mlp_post, experts and expert_weights"
            )
    sites = [Site("embed"), Site("pos_embed")]
    for name in ["resid_pre", "attn_out", "cross_out", "mlp_out", "resid_post", *inner]:
        sites += [Site(name, layer) for layer in range(lm.n_layers)]
    return [site for site in sites if has_site(lm.layout, site.name, site.layer)]


def parts_of(stream: ResidualStream, inner_sites: Collection[str]) -> Iterator[Part]:
    """Returns every component, in the order of the model.

    Their shares sum to the share of the stream after the last block. `inner_sites` are the sites by
    whose heads ("z") or neurons ("mlp_post") components are split.
    """
    features = _features_by_base(stream)
    start = _start_of_features(features)
    if start is None:
        yield from _entering(stream)
    for layer in range(stream.run.lm.n_layers):
        before, after = Site("resid_pre", layer), Site("resid_post", layer)
        if before == start:
            yield from _parts_of_features(stream, features[before])
            start = None
        if start is None:
            yield from _parts_of_block(stream, layer, inner_sites, features)
        if after == start:
            yield from _parts_of_features(stream, features[after])
            start = None
        if start is None:
            yield from _after_block(stream, layer)


# ---- features of dictionaries

WITH_FEATURES = ("resid_pre", "attn_out", "mlp_out", "resid_post")


def check_feature_sites(lm: LM, sites: SitesLike) -> Sites:
    """Returns the sites of features into which a logit is split. Raises for others."""
    expanded = lm.expand(sites)
    for site in expanded:
        if not isinstance(site, Site) or not _is_split(site):
            names = ", ".join(f"feat.{name}.L" for name in WITH_FEATURES)
            raise BadHook(
                f"features={str(site)!r}: a logit is split by all features of a dictionary that "
                f"adds to the residual stream, {names}"
            )
    start = _start_of_features(expanded)
    if start is not None:
        _check_after(expanded, start)
    return expanded


def _check_after(sites: Sites, start: Site) -> None:
    for site in sites:
        if site != start and not _is_after(site, start):
            raise BadHook(
                f"features={list(map(str, sites))}: the features of {start} stand in place of "
                f"everything before them, and so of {site}: leave one of the two out"
            )


def _is_split(site: Site) -> bool:
    """True for all features of a dictionary whose site is in a sum of the stream."""
    return site.of_features and site.head is None and site.base_name in WITH_FEATURES


def _is_after(site: AnySite, start: Site) -> bool:
    """True if a component is added to the stream after a site of the stream."""
    assert isinstance(site, Site) and site.layer is not None and start.layer is not None
    first = start.layer + (start.base_name == "resid_post")
    return not site.base_name.startswith("resid") and site.layer >= first


def sites_of_features(lm: LM, sites: Iterable[AnySite]) -> list[AnySite]:
    """Returns the sites to capture for features, and for what their dictionaries read."""
    captured: list[AnySite] = []
    for site in sites:
        assert isinstance(site, Site)
        dictionary = find_dictionary(lm.layout.dictionaries, site)
        captured += [site, dictionary.reads, dictionary.site]
    return captured


def _features_by_base(stream: ResidualStream) -> dict[Site, Site]:
    """Returns the captured sites of features by the site that their dictionary writes."""
    dictionaries = stream.run.lm.layout.dictionaries
    by_base: dict[Site, Site] = {}
    for site in stream.run.sites:
        if isinstance(site, Site) and site.of_features:
            by_base[find_dictionary(dictionaries, site).site] = site
    return by_base


def _start_of_features(sites: Iterable[AnySite]) -> Site | None:
    """Returns the first site of the stream, in place of whose components features stand."""
    for site in sites:
        if isinstance(site, Site) and site.base_name.startswith("resid"):
            return site
    return None


def _parts_of_features(stream: ResidualStream, site: Site) -> Iterator[Part]:
    """Yields the features of a dictionary, the rest of its reconstruction, and its error."""
    dictionary = find_dictionary(stream.run.lm.layout.dictionaries, site)
    inputs, values = stream.values(dictionary.reads), stream.values(dictionary.site)
    along = stream.along.to(values.device)
    shares, bias = dictionary.shares(stream.values(site), inputs.flatten(1), along)
    shares, bias = shares.to(stream.along.device), bias.to(stream.along.device)
    yield Part(str(site), "feature", site.layer, shares)
    yield Part(f"{site} bias", "bias", site.layer, bias)
    total = stream.share(values.double().to(stream.along.device))
    yield Part(f"{site} error", "error", site.layer, total - shares.sum(1) - bias)


# ---- blocks


def _parts_of_block(
    stream: ResidualStream,
    layer: int,
    inner_sites: Collection[str],
    features: Mapping[Site, Site],
) -> Iterator[Part]:
    layout = stream.run.lm.layout
    before, after = stream.at("resid_pre", layer), stream.at("resid_post", layer)
    assert before is not None and after is not None
    remainder, kind = after - before, "block"
    for name, part_kind, inner in ADDITIONS:
        added = stream.at(name, layer)
        if added is None:
            continue
        remainder, kind = remainder - added, "rest"
        if Site(name, layer) in features:
            yield from _parts_of_features(stream, features[Site(name, layer)])
        elif inner in inner_sites and is_projected(layout, inner, layer):
            yield from _split(stream, Site(name, layer), Site(inner, layer))
        else:
            yield Part(f"{name}.{layer}", part_kind, layer, stream.share(added))
    yield from stream.remainder(f"{kind}.{layer}", kind, layer, remainder, after)


def _after_block(stream: ResidualStream, layer: int) -> Iterator[Part]:
    """Yields what changes the stream between a block and the next one."""
    after = stream.at("resid_post", layer)
    assert after is not None
    following = after
    if layer + 1 < stream.run.lm.n_layers:
        following = stream.values(Site("resid_pre", layer + 1)).double().to(after.device)
    # an edit between the blocks, or a part of the model
    name = f"between.{layer}.{layer + 1}"
    yield from stream.remainder(name, "rest", layer, following - after, after)


def _entering(stream: ResidualStream) -> Iterator[Part]:
    """Returns what enters block 0: the embeddings of token and position, and a remainder."""
    entering = stream.at("resid_pre", 0)
    assert entering is not None
    token, position = stream.at("embed"), stream.at("pos_embed")
    if token is None or position is None or token.shape != entering.shape:
        yield Part("embed", "embedding", None, stream.share(entering))
        return
    yield Part("embed", "embedding", None, stream.share(token))
    yield Part("pos_embed", "embedding", None, stream.share(position))
    yield from stream.remainder("rest.embed", "rest", None, entering - token - position, entering)


def _split(stream: ResidualStream, site: Site, inner: Site) -> Iterator[Part]:
    """Returns what a block adds at a site, by heads or neurons, and the biases after them."""
    layer, along = site.layer, stream.along
    added, values = stream.values(site), stream.values(inner)
    flat = values.flatten(1)
    project = forward_of_site(stream.run.lm, inner)
    outward, offset = _after_projection(stream, site, project, flat, added)
    direction = vector_jacobian_product(project, flat, outward).double()
    shares, offset = (direction * flat.double()).to(along.device), offset.to(along.device)
    if inner.name in ("z", "cross_z"):
        by_head = shares.unflatten(1, (values.shape[1], -1)).sum(-1)
        for head in range(by_head.shape[1]):
            yield Part(f"{inner}.{head}", "head", layer, by_head[:, head], head)
    else:
        yield Part(str(inner), "neuron", layer, shares)
    yield Part(f"{site} bias", "bias", layer, offset)
    remainder = stream.share(added.double().to(along.device)) - shares.sum(1) - offset
    if float(remainder.abs().max()) > 1e-4 * max(1.0, float(shares.abs().sum(1).max())):
        yield Part(f"{site} rest", "rest", layer, remainder)


def _after_projection(
    stream: ResidualStream, site: Site, project: Map, flat: Tensor, added: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns how the output of a projection enters what its block adds.

    The first value is the direction [cell, d] in the projection's output. The second is the share
    [cell] of everything that does not depend on the projection's input.
    """
    lm = stream.run.lm
    factor = lm.layout.factor(site)
    outward = stream.along.to(added.device) * factor
    with torch.no_grad():
        raw, zero = project(flat), project(torch.zeros_like(flat[:1]))
    if agree(raw * factor, added):
        return outward.to(raw), (outward * zero.double()).sum(-1)
    path = lm.location(site).path
    norm = lm.submodule(path).forward
    is_block = path == lm.location(Site("resid_post", site.layer)).path
    if is_block or not _gives(norm, raw, added, factor):
        raise Unsupported(
            f"what block {site.layer} adds as {site.name} is not its projection's output, nor that "
            "output after one norm, so it cannot be split: leave heads= and neurons= out, or edits "
            "at that site"
        )
    frozen_norm = FrozenNorm(norm, raw, f"the norm {path!r}")
    inward = frozen_norm.backward(outward.to(raw))
    offset = (outward * frozen_norm.offset.double()).sum(-1)
    return inward.to(raw), offset + (inward * zero.double()).sum(-1)


def _gives(norm: Map, raw: Tensor, added: Tensor, factor: float) -> bool:
    if raw.shape[-1] != added.shape[-1]:
        return False
    try:
        with torch.no_grad():
            return agree(norm(raw) * factor, added)
    except (TypeError, RuntimeError):  # it is no norm, and takes other arguments
        return False


def agree(one: Tensor, other: Tensor) -> bool:
    """True if two tensors differ by no more than rounding."""
    if one.shape != other.shape:
        return False
    limit = 1e-4 if one.dtype in (torch.float32, torch.float64) else 3e-2
    return float((one - other).abs().max()) <= limit * float(other.abs().max())
