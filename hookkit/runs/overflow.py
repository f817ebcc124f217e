"""The check that an edit has given finite numbers.

An edit whose result is infinite or NaN where the model's own value was finite raises `BadEdit`.
On a CPU the result is checked at once. On other devices this would wait for the device after each
edit, so the flags of all edits are read together, at the end of the forward.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Bool
from torch import Tensor

from ..errors import BadEdit
from ..models.batch_positions import Selection
from ..models.sites import LOGIT_SITES, QUERY_KEY_SITES, ModuleSite
from .taps import BoundHook

AT_ONCE = frozenset({"cpu", "meta"})  # devices whose results can be read without waiting


def check_result(
    bound_hook: BoundHook, selection: Selection | None, old: Tensor, new: Tensor
) -> None:
    """Raises `BadEdit`, here or in `settle`, if an edit made a finite number infinite or NaN."""
    hook = bound_hook.hook
    if not new.is_floating_point() or getattr(hook, "gives_infinity", False):
        return
    new, old = new.detach(), old.detach()
    if new.device.type in AT_ONCE:
        if not bool(torch.isfinite(new.sum(dtype=torch.float32))):
            _raise_bad_edit(bound_hook, int(broken(bound_hook, selection, old, new).sum()))
        return
    if _may_have_infinity(bound_hook):
        flag = broken(bound_hook, selection, old, new).any()
    else:
        # two sums cost less than a comparison of every number; float64 cannot overflow in them
        new_sum, old_sum = new.sum(dtype=torch.float64), old.sum(dtype=torch.float64)
        flag = torch.isfinite(old_sum) & ~torch.isfinite(new_sum)
    bound_hook.overflow_flags.append(flag)


def settle(bound_hooks: Iterable[BoundHook]) -> None:
    """Raises `BadEdit` for the first edit of a forward whose result is not finite."""
    for bound_hook in bound_hooks:
        flags = bound_hook.overflow_flags
        if flags:
            bound_hook.overflow_flags = []
            device = flags[0].device
            if bool(torch.stack([flag.to(device) for flag in flags]).any()):
                _raise_bad_edit(bound_hook, None)


def forget(bound_hooks: Iterable[BoundHook]) -> None:
    """Drops the flags of a forward that was interrupted."""
    for bound_hook in bound_hooks:
        bound_hook.overflow_flags = []


def broken(
    bound_hook: BoundHook, selection: Selection | None, old: Tensor, new: Tensor
) -> Bool[Tensor, "row pos ..."]:
    """Returns where an edit made a finite number infinite or NaN.

    A logit or a score of -inf is a mask, which an edit may set.
    """
    lost = ~torch.isfinite(new) & torch.isfinite(old)
    # an edit that inserts other values may insert -inf; arithmetic gives it by overflow only
    if _may_have_infinity(bound_hook) and getattr(bound_hook.hook, "puts_in", False):
        lost = lost & ~torch.isneginf(new)
    if selection is not None and selection.valid is not None:
        valid = selection.valid.to(lost.device)
        lost = lost & valid.reshape(*valid.shape, *[1] * (lost.ndim - 2))
    return lost


def _may_have_infinity(bound_hook: BoundHook) -> bool:
    """True at sites where the model itself may have -inf."""
    site = bound_hook.site
    return isinstance(site, ModuleSite) or site.name in LOGIT_SITES or site.name in QUERY_KEY_SITES


def _raise_bad_edit(bound_hook: BoundHook, count: int | None) -> None:
    """Raises `BadEdit` for this many numbers; None if their count is not known."""
    if count == 0:
        return
    numbers, verb = "numbers", "are"
    if count == 1:
        numbers, verb = "a number", "is"
    elif count is not None:
        numbers = f"{count} numbers"
    source = f"{bound_hook.hook} gives"
    if hasattr(bound_hook.hook, "fn"):
        source = f"the function of {bound_hook.hook} returned"
    raise BadEdit(
        f"{source} {numbers} at {bound_hook.site} that {verb} infinite or NaN, where there was "
        "none: use smaller values than the dtype can hold, and look for 0/0 and inf-inf"
    )
