"""A norm with the scale of this very forward: the linear map that it is once its denominator stands still.

A norm is f(x) = P D (x - m) / s + f(0), where m is the mean (0 for RMSNorm) and s depends on x. With s as it was, each
part c of x adds A c to the output, and the parts' shares sum to what the norm gave, exactly. The map's transpose is
found without knowing the norm's weights: from its vector-Jacobian product, plus what holding s still takes away.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import Unsupported

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
        lost = (outward.double() * (self.gives - self.offset).double()).sum(-1, keepdim=True) * self.held
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
    apart = float(((said - (probe * wanted).sum(-1)) / wanted.norm(dim=-1).clamp(min=1e-30)).abs().max())
    if not apart <= AGREE.get(found.at.dtype, 1e-4):
        raise Unsupported(
            f"{what} is neither a LayerNorm, an RMSNorm nor linear (its parts' shares miss by {apart:.1g}), so what "
            "passes it cannot be split into parts that add up"
        )
