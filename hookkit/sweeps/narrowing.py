"""Behind the last attention no position reads another: there only those where the metric looks have to run."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from ..errors import Unsupported
from ..lent import Lent
from ..model import LM
from ..sites import AnySite, Site
from ..taps import Action, Tap
from .reach import BEHIND_ATTENTION, together

ENTERED = "z", "mlp_in"  # what the last block's modules are given that work on each position by itself
INSIDE = frozenset({"mlp_pre", "mlp_post", "router_logits", "experts", "expert_weights"})  # such modules


def may_narrow(lm: LM, taps: Sequence[Tap]) -> bool:
    """True where nothing that is done needs the last block's other positions behind its attention."""
    return all(_may(lm, action) for tap in taps for action in tap.actions)


def _may(lm: LM, action: Action) -> bool:
    site: AnySite = action.site
    if not isinstance(site, Site):
        return False
    if site.layer is not None and site.layer < lm.n_layers - 1:
        return True
    return site.name not in INSIDE and not (site.name in BEHIND_ATTENTION and together(action))


@contextmanager
def narrowed(lm: LM, looks: int) -> Iterator[None]:
    """A block in which those modules run over the last `looks` positions only, and give zeros for the others."""
    with Lent() as lent:
        for name in ENTERED:
            place = lm.layout.find(name, lm.n_layers - 1)
            if place is not None and place.side == "input":
                lent.around(lm.submodule(place.path), "forward", partial(_over_the_last, looks))
        yield


def _over_the_last(looks: int, inner: Any, /, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    shape = hidden.shape[:2]
    if hidden.ndim != 3:
        raise Unsupported(f"what the last block's modules are given is no [batch, pos, d]: {list(hidden.shape)}")

    def cut(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.shape[:2] != shape:
            return value
        return value[:, -looks:].contiguous()  # modules may take a view of what they are given

    output = inner(cut(hidden), *map(cut, args), **{name: cut(value) for name, value in kwargs.items()})
    found, *others = output if isinstance(output, tuple) else (output,)
    if not isinstance(found, Tensor) or found.shape[:2] != (shape[0], looks):
        raise Unsupported("what the last block's modules give is no [batch, pos, d]")
    whole = found.new_zeros(*shape, found.shape[-1])
    whole[:, -looks:] = found
    return (whole, *others) if isinstance(output, tuple) else whole
