"""Whether an edit gave numbers: a result that is infinite or NaN where the model's own value was finite is refused.

On a CPU this is asked at once. Elsewhere the answer would have to be waited for: it is asked for all edits together,
at the end of the forward.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Bool
from torch import Tensor

from ..errors import BadEdit
from ..models.batch_positions import Selection
from ..models.sites import LOGITS, SQUARE, ModuleSite
from .taps import BoundHook

AT_ONCE = frozenset(
    {"cpu", "meta"}
)  # devices whose results are there as soon as they are asked for


def check_result(action: BoundHook, cells: Selection | None, old: Tensor, new: Tensor) -> None:
    """Raise `BadEdit` where an edit made an infinite number or NaN of a finite one, now or in `settle`."""
    hook = action.hook
    if not new.is_floating_point() or getattr(hook, "gives_infinity", False):
        return
    new, old = new.detach(), old.detach()
    if new.device.type in AT_ONCE:
        if not bool(torch.isfinite(new.sum(dtype=torch.float32))):
            _refuse(action, int(broken(action, cells, old, new).sum()))
        return
    if _may_have_infinity(action):
        action.doubts.append(broken(action, cells, old, new).any())
    else:  # two sums cost less than a comparison of every number; float64 cannot overflow in them
        sums = new.sum(dtype=torch.float64), old.sum(dtype=torch.float64)
        action.doubts.append(torch.isfinite(sums[1]) & ~torch.isfinite(sums[0]))


def settle(actions: Iterable[BoundHook]) -> None:
    """Raise `BadEdit` for the first edit of a forward whose result was refused."""
    for action in actions:
        if action.doubts:
            doubts, action.doubts = action.doubts, []
            if bool(torch.stack([doubt.to(doubts[0].device) for doubt in doubts]).any()):
                _refuse(action, None)


def forget(actions: Iterable[BoundHook]) -> None:
    """Drop what was not settled, of a forward that was interrupted."""
    for action in actions:
        action.doubts = []


def broken(
    action: BoundHook, cells: Selection | None, old: Tensor, new: Tensor
) -> Bool[Tensor, "row pos ..."]:
    """Where the result is no number though the value was. A logit or a score of -inf is a mask, which may be given."""
    lost = ~torch.isfinite(new) & torch.isfinite(old)
    if _may_have_infinity(action):
        lost = lost & ~(torch.isneginf(new) & _masks(action))
    if cells is not None and cells.valid is not None:
        valid = cells.valid.to(lost.device)
        lost = lost & valid.reshape(*valid.shape, *[1] * (lost.ndim - 2))
    return lost


def _may_have_infinity(action: BoundHook) -> bool:
    """True at sites where the model itself may have -inf."""
    site = action.site
    return isinstance(site, ModuleSite) or site.name in LOGITS or site.name in SQUARE


def _masks(action: BoundHook) -> bool:
    """True for an edit that puts in other values, of which -inf is one; arithmetic gives it by overflow only."""
    return getattr(action.hook, "puts_in", False)


def _refuse(action: BoundHook, count: int | None) -> None:
    if count == 0:
        return
    numbers = "numbers" if count is None else f"{count} numbers" if count > 1 else "a number"
    source = (
        f"the function of {action.hook} returned"
        if hasattr(action.hook, "fn")
        else f"{action.hook} gives"
    )
    raise BadEdit(
        f"{source} {numbers} at {action.site} that {'is' if count == 1 else 'are'} infinite or NaN, where there was "
        "none: use smaller values than the dtype can hold, and look for 0/0 and inf-inf"
    )
