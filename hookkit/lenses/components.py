"""What the stream is the sum of: the embedding and what each block adds, whole or by heads and neurons.

A norm with the scale of this very forward: the linear map that it is once its denominator stands still.

A norm is f(x) = P D (x - m) / s + f(0), where m is the mean (0 for RMSNorm) and s depends on x. With s as it was, each
part c of x adds A c to the output, and the parts' shares sum to what the norm gave, exactly. The map's transpose is
found without knowing the norm's weights: from its vector-Jacobian product, plus what holding s still takes away.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import Unsupported
from ..models.layout import Layout
from ..models.lm import LM
from ..models.sites import Site
from ..runs.run import Run
from ..runs.taps import reader

Map = Callable[[Tensor], Tensor]

AGREE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True, eq=False)
class Frozen:
    """A norm, or any map that is linear itself, at some states with its scale held still.

    at       [state, d_in]   the states, and their images `gives` [state, d_out]; `offset` [d_out] is that of zero
    mean     [state, 1]      what the norm takes off each state; 0 for RMSNorm
    held     [state, 1]      1 where the map is a norm, up to its epsilon; 0 where it is linear
    """

    map: Map
    at: Float[Tensor, "state d_in"]
    gives: Float[Tensor, "state d_out"]
    offset: Float[Tensor, " d_out"]
    mean: Float[Tensor, "state 1"]
    held: Float[Tensor, "state 1"]

    def back(self, outward: Float[Tensor, "state d_out"]) -> Float[Tensor, "state d_in"]:
        """The direction in what goes in whose product with a part is that part's share in outward · f(x)."""
        outward = outward.to(self.gives)
        centred = (self.at - self.mean).double()
        lost = (outward.double() * (self.gives - self.offset).double()).sum(
            -1, keepdim=True
        ) * self.held
        return back(self.map, self.at, outward).double() + centred * lost / _square(centred)


def back(map: Map, at: Tensor, outward: Tensor) -> Tensor:
    """The vector-Jacobian product of a map at some states."""
    with torch.enable_grad():
        given = at.detach().clone().requires_grad_()
        return torch.autograd.grad(map(given), given, outward.to(at))[0]


def _square(centred: Tensor) -> Tensor:
    return centred.square().sum(-1, keepdim=True).clamp(min=1e-30)


def frozen(map: Map, at: Float[Tensor, "state d_in"], what: str) -> Frozen:
    """A map at some states with its scale held still. `Unsupported` where it is neither a norm nor linear."""
    with torch.no_grad():
        gives, offset = map(at), map(torch.zeros_like(at[:1]))[0]
        shifted = map(at + at.abs().mean(-1, keepdim=True))
    kept = float((shifted - gives).abs().max()) <= 1e-3 * float((gives - offset).abs().max())
    mean = at.mean(-1, keepdim=True) if kept else torch.zeros_like(at[:, :1])
    out = (gives - offset).double()
    along = (back(map, at, out) * at).double().sum(-1, keepdim=True)
    held = 1 - along / _square(out)
    found = Frozen(map, at, gives, offset, mean, held)
    _check(found, what)
    return found


def _check(found: Frozen, what: str) -> None:
    """The same numbers in another order have the same scale: what the frozen map says of them has to be so."""
    other = found.at.flip(-1)
    with torch.no_grad():
        wanted = (found.map(other) - found.offset).double()
    probe = wanted / wanted.norm(dim=-1, keepdim=True).clamp(min=1e-30)
    said = (found.back(probe.to(found.gives)) * other).sum(-1)
    apart = float(
        ((said - (probe * wanted).sum(-1)) / wanted.norm(dim=-1).clamp(min=1e-30)).abs().max()
    )
    if not apart <= AGREE.get(found.at.dtype, 1e-4):
        raise Unsupported(
            f"{what} is neither a LayerNorm, an RMSNorm nor linear (its parts' shares miss by {apart:.1g}), so what "
            "passes it cannot be split into parts that add up"
        )


Cells = tuple[list[int], list[int]]
"""Of each cell, its row and its column in what was captured."""


@dataclass(frozen=True, eq=False)
class Part:
    """A component, and its share for each cell; `shares` [cell] or, for neurons, [cell, neuron]."""

    name: str
    kind: str
    layer: int | None
    shares: Float[Tensor, "cell ..."]
    head: int | None = None


@dataclass(frozen=True, eq=False)
class Stream:
    """The stream of a run at some cells, and the direction [cell, d_model] along which shares are measured."""

    lm: LM
    run: Run
    cells: Cells
    along: Float[Tensor, "cell d_model"]

    def at(self, name: str, layer: int | None = None) -> Tensor | None:
        """The values of a site at the cells, float64; None where the block has none."""
        if not has(self.lm.layout, name, layer):
            return None
        return self.run[Site(name, layer)][self.cells]

    def along_on(self, values: Tensor) -> Float[Tensor, "cell d_model"]:
        """The direction, where these values are."""
        return self.along.to(values.device)

    def share(self, values: Tensor) -> Tensor:
        """The share of a component's values."""
        return torch.einsum("cd,cd->c", self.along, values.double().to(self.along.device))


def has(layout: Layout, name: str, layer: int | None) -> bool:
    """True where a model has a site, in this block."""
    return name in layout.names and layout.find(name, layer) is not None


def needed(lm: LM, *, heads: bool, neurons: bool) -> list[Site]:
    """The sites that are read: the stream into and out of each block, and what the block adds."""
    inner = ["z"] * heads + ["mlp_post"] * neurons
    for name in inner:
        lm.expand(name)  # raises where no block has it
    names = ["resid_pre", "attn_out", "mlp_out", "resid_post", *inner]
    found = [
        Site(name, layer)
        for name in names
        for layer in range(lm.n_layers)
        if has(lm.layout, name, layer)
    ]
    return [*(Site(name) for name in ("embed", "pos_embed") if has(lm.layout, name, None)), *found]


def parts_of(stream: Stream, *, heads: bool, neurons: bool) -> Iterator[Part]:
    """Every component, in the order of the model; their shares sum to that of the stream behind the last block."""
    yield from _entering(stream)
    for layer in range(stream.lm.n_layers):
        before, after = stream.at("resid_pre", layer), stream.at("resid_post", layer)
        assert before is not None and after is not None
        rest, whole = after.double() - _beside(before, after), True
        for name, kind in (("attn_out", "attention"), ("mlp_out", "mlp")):
            added = stream.at(name, layer)
            if added is None:
                continue
            rest, whole = rest - _beside(added, rest), False
            split = {"attn_out": "z" if heads else "", "mlp_out": "mlp_post" if neurons else ""}[
                name
            ]
            if split and has(stream.lm.layout, split, layer):
                yield from _split(stream, name, split, layer, added)
            else:
                yield Part(f"{name}.{layer}", kind, layer, stream.share(added))
        if _counts(rest, after):
            name, kind = ("block", "block") if whole else ("rest", "rest")
            yield Part(f"{name}.{layer}", kind, layer, stream.share(rest))
        yield from _between(stream, layer, after)


def _entering(stream: Stream) -> Iterator[Part]:
    """What enters block 0: the token's embedding, that of its position, and what else is there."""
    entering = stream.at("resid_pre", 0)
    assert entering is not None
    token, place = stream.at("embed"), stream.at("pos_embed")
    if token is None or place is None or token.shape != entering.shape:
        yield Part("embed", "embedding", None, stream.share(entering))
        return
    yield Part("embed", "embedding", None, stream.share(token))
    yield Part("pos_embed", "embedding", None, stream.share(place))
    rest = entering.double() - _beside(token, entering) - _beside(place, entering)
    if _counts(rest, entering):
        yield Part("rest.embed", "rest", None, stream.share(rest))


def _between(stream: Stream, layer: int, after: Tensor) -> Iterator[Part]:
    """What came to the stream between two blocks: an edit, or what the model adds there."""
    following = stream.at("resid_pre", layer + 1) if layer + 1 < stream.lm.n_layers else None
    change = None if following is None else _beside(following, after) - after.double()
    if change is not None and _counts(change, after):
        yield Part(f"between.{layer}.{layer + 1}", "rest", layer, stream.share(change))


def _beside(values: Tensor, others: Tensor) -> Tensor:
    """The values in float64 on the device of others: blocks may be on several."""
    return values.double().to(others.device)


def _counts(rest: Tensor, stream: Tensor) -> bool:
    """True for more than what rounding leaves of a sum."""
    return bool(rest.abs().max() > 32 * torch.finfo(stream.dtype).eps * stream.abs().max())


def _split(stream: Stream, name: str, inner: str, layer: int, added: Tensor) -> Iterator[Part]:
    """What a block adds, by heads or neurons, and the biases behind them."""
    lm = stream.lm
    given = stream.at(inner, layer)
    assert given is not None
    flat = given.flatten(1)
    project = reader(lm, Site(inner, layer))
    through, offset = _behind(stream, name, layer, project, flat, added)
    direction = back(project, flat, through).double()
    shares, offset = (
        _beside(direction * flat.double(), stream.along),
        offset.to(stream.along.device),
    )
    if inner == "z":
        by_head = shares.unflatten(1, (given.shape[1], -1)).sum(-1)
        for head in range(by_head.shape[1]):
            yield Part(f"z.{layer}.{head}", "head", layer, by_head[:, head], head)
    else:
        yield Part(f"mlp_post.{layer}", "neuron", layer, shares)
    if bool((offset != 0).any()):
        yield Part(f"{name}.{layer} bias", "bias", layer, offset)
    rest = stream.share(added) - shares.sum(1) - offset
    if float(rest.abs().max()) > 1e-4 * max(1.0, float(shares.abs().sum(1).max())):
        yield Part(f"{name}.{layer} rest", "rest", layer, rest)


def _behind(
    stream: Stream,
    name: str,
    layer: int,
    project: Callable[[Tensor], Tensor],
    flat: Tensor,
    added: Tensor,
) -> tuple[Tensor, Tensor]:
    """From what a projection gives to what is added: the direction in the former [cell, d], and the share of all that
    does not depend on what the projection read."""
    lm, along = stream.lm, stream.along_on(added)
    factor = lm.layout.factor(Site(name, layer))
    with torch.no_grad():
        raw, zero = project(flat), project(torch.zeros_like(flat[:1]))
    if _same(raw * factor, added):
        through = along * factor
        return through.to(raw), (through * zero.double()).sum(-1)
    path = lm.place(Site(name, layer)).path
    norm = lm.submodule(path).forward
    with torch.no_grad():
        fits = raw.shape[-1] == added.shape[-1] and path != lm.place(Site("resid_post", layer)).path
        passes = fits and _passes(norm, raw, added, factor)
    if not passes:
        raise Unsupported(
            f"what block {layer} adds as {name} is not its projection's output, nor that behind one norm, so it cannot "
            "be split: leave heads= and neurons= out, or edits at that place"
        )
    still: Frozen = frozen(norm, raw, f"the norm {path!r}")
    through = still.back((along * factor).to(raw))
    offset = (along * factor * still.offset.double()).sum(-1) + (through * zero.double()).sum(-1)
    return through.to(raw), offset


def _passes(norm: Callable[[Tensor], Tensor], raw: Tensor, added: Tensor, factor: float) -> bool:
    try:
        return _same(norm(raw) * factor, added)
    except (TypeError, RuntimeError):  # it is no norm, and takes something else
        return False


def _same(one: Tensor, other: Tensor) -> bool:
    limit = 1e-4 if one.dtype in (torch.float32, torch.float64) else 3e-2
    return one.shape == other.shape and float((one - other).abs().max()) <= limit * float(
        other.abs().max()
    )
