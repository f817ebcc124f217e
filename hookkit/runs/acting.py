"""Applies one hook to the tensor at its hook point: selected cells are captured, or edited.

An edit whose result is infinite or NaN where the model's own value was finite raises `BadEdit`.
On a CPU the result is checked at once. On other devices this would wait for the device after each
edit, so the flags of all edits are read together, at the end of the forward.
"""

from collections.abc import Iterable
from typing import TypeAlias

import torch
from torch import Tensor

from ..errors import BadEdit, BadHook, Unsupported
from ..hooks.base import EditContext
from ..hooks.capture import Capture, CapturedChunk, CaptureLast, swap_head_and_query
from ..hooks.values import convert_dtype
from ..models.batch_positions import ForwardPass, Selection
from ..models.layout import SiteView
from ..models.positions import Where
from ..models.sites import LOGIT_SITES, QUERY_KEY_SITES, ModuleSite
from .taps import BoundHook, HookPoint

Firing: TypeAlias = tuple[BoundHook, int, Selection | None, torch.Size, Tensor | None]
"""One hook at one site in one forward.

The bound hook, the forward's number, the selection, the shape of one cell (of the whole tensor if
there is no selection), and for an edit how many numbers it changed in each cell.
"""

# where the model itself may have -inf, as a mask, which an edit may set
SITES_WITH_MASKS = LOGIT_SITES | QUERY_KEY_SITES
AT_ONCE = frozenset({"cpu", "meta"})  # devices whose results can be read without waiting


def apply_hook(
    bound_hook: BoundHook,
    hook_point: HookPoint,
    forward_pass: ForwardPass,
    tensor: Tensor,
    module_input: Tensor | None,
) -> tuple[Firing | None, Tensor]:
    """Applies one hook to the tensor at its hook point.

    Returns the firing, None if the hook selects no cell, and the tensor with which the model goes
    on. `module_input` is for edits that need it. The tensor itself is written to only at a shared
    location, where the block reads it twice.
    """
    if not forward_pass.placed:
        return _apply_to_whole_tensor(bound_hook, forward_pass, tensor)
    view = bound_hook.view
    if not view.plain:
        forward_pass = view.call(forward_pass, tensor)
    full = _with_positions(bound_hook, forward_pass, tensor)
    if full is None:
        return _apply_to_whole_tensor(bound_hook, forward_pass, tensor)
    at_head = bound_hook.head or full.shape[1] != forward_pass.width
    is_capture = bound_hook.change is None
    selection = forward_pass.cells(bound_hook.where, at_head, is_capture)
    if selection is None:
        return None, tensor
    _count_firing(bound_hook, forward_pass)
    if view.plain:
        raw = values = selection.gather(full)
    else:
        raw = selection.gather(view.view(full))
        values = view.read(raw, selection, forward_pass)
    if bound_hook.change is None:
        new, changed = _capture(bound_hook, forward_pass, selection, raw, values), None
    else:
        new = _edit(bound_hook, selection, values, module_input)
        changed = selection.real(new != values)
        if not view.plain:
            new = view.write(new, values, raw, selection, forward_pass)
    if new is not None:
        tensor = _put(bound_hook, hook_point, forward_pass, selection, tensor, new)
    return (bound_hook, forward_pass.number, selection, values.shape[2:], changed), tensor


def _edit(
    bound_hook: BoundHook, selection: Selection, values: Tensor, module_input: Tensor | None
) -> Tensor:
    """Returns the edited values; raises if they are not finite, or of another dtype."""
    assert bound_hook.change is not None
    selected_input = None
    if module_input is not None:
        selected_input = selection.gather(module_input)
    new = bound_hook.change(
        values, EditContext(bound_hook.site, bound_hook.where, selection, selected_input)
    )
    check_result(bound_hook, selection, values, new)
    if new.dtype != values.dtype:
        raise BadEdit(
            f"{bound_hook.hook} gives {new.dtype}, and {bound_hook.site} is {values.dtype}: "
            "edit it with hk.edit"
        )
    assert new.shape == values.shape, f"{bound_hook.hook} changed {values.shape} to {new.shape}"
    return new


def _put(
    bound_hook: BoundHook,
    hook_point: HookPoint,
    forward_pass: ForwardPass,
    selection: Selection,
    tensor: Tensor,
    new: Tensor,
) -> Tensor:
    """Returns the tensor with the selected cells replaced."""
    view = bound_hook.view
    if hook_point.location.shared:
        # the block reads this same tensor again: a replacement would reach only the module, and
        # not the residual stream
        selection.scatter(view.batch_view(tensor, forward_pass), new)
        return tensor
    if selection.whole and type(view) is SiteView:
        # modules may take a view of what they are called with, which needs a contiguous tensor
        return new.contiguous() if tensor.is_contiguous() else new
    laid_out = view.batch_view(tensor, forward_pass)
    expanded = _with_batch_axis(laid_out, forward_pass.rows)
    source = tensor if expanded is laid_out else expanded
    copy = source.clone(memory_format=torch.contiguous_format)
    selection.scatter(view.view(view.batch_view(copy, forward_pass)), new)
    return copy


def _capture(
    bound_hook: BoundHook,
    forward_pass: ForwardPass,
    selection: Selection,
    raw: Tensor,
    values: Tensor,
) -> Tensor | None:
    """Stores the values.

    Returns the cells with which the model has to go on; None if they are unchanged.
    """
    capture, number = bound_hook.hook, forward_pass.number
    assert isinstance(capture, Capture)
    if not capture.grad:
        is_copy = selection.scattered or (values is not raw and values.data_ptr() != raw.data_ptr())
        detached = values.detach() if values.requires_grad else values
        stored = _stored_copy(detached, capture, is_copy)
        if isinstance(capture, CaptureLast) and bound_hook.pieces:
            previous = bound_hook.pieces.pop()
            bound_hook.pieces += previous.of_rows(forward_pass.text.ended_rows())
        bound_hook.pieces.append(CapturedChunk(number, selection, stored))
        return None
    if not torch.is_grad_enabled():
        raise Unsupported(
            f"{capture} needs gradients, which are off here (generate always runs without)"
        )
    leaf = swap_head_and_query(bound_hook.site, values)
    if not leaf.requires_grad:
        leaf = leaf.detach()
    leaf = leaf.clone().requires_grad_()
    leaf.retain_grad()
    values = swap_head_and_query(bound_hook.site, leaf)
    bound_hook.pieces.append(CapturedChunk(number, selection, values, leaf))
    # the model continues with the stored values, so that they get a gradient
    if bound_hook.view.plain:
        return values.clone()
    return bound_hook.view.write(values, None, raw, selection, forward_pass)


def _stored_copy(values: Tensor, capture: Capture, is_copy: bool) -> Tensor:
    """Returns values on the capture's device and in its dtype, as a tensor of their own.

    It is made outside inference mode, so that autograd can use it later. `is_copy` is True if the
    values share no memory with the model's tensor.
    """
    inference_mode = torch.is_inference_mode_enabled()
    if capture.dtype is capture.device is None and not inference_mode:
        return values if is_copy else values.clone()
    dtype = getattr(torch, capture.dtype) if capture.dtype else values.dtype
    if values.is_floating_point() and not dtype.is_floating_point:
        raise BadHook(
            f"{capture}: dtype={capture.dtype!r} cannot hold the real numbers there: say a "
            "floating dtype, such as 'float16'"
        )
    device = torch.device(capture.device) if capture.device else values.device
    if dtype != values.dtype and values.is_floating_point():
        values = convert_dtype(values, dtype, f"what {capture} keeps")
    with torch.inference_mode(False):
        return values.to(
            device=device,
            dtype=dtype,
            copy=inference_mode or not is_copy,
            memory_format=torch.contiguous_format,
        )


def _apply_to_whole_tensor(
    bound_hook: BoundHook, forward_pass: ForwardPass, tensor: Tensor
) -> tuple[Firing, Tensor]:
    """Applies a hook without pos, rows and step to all of a tensor without axes batch and pos."""
    if bound_hook.where != Where():
        if not forward_pass.placed:
            raise BadHook(
                f"an encoder-decoder reads two texts, so a position at {bound_hook.site} may be of "
                f"either: leave pos, rows and step out of {bound_hook.hook}"
            )
        raise BadHook(
            f"{bound_hook.site} has shape {list(tensor.shape)}, without axes batch and pos "
            f"({forward_pass.rows} rows of {forward_pass.width} positions ran): leave pos, rows "
            f"and step out of {bound_hook.hook}"
        )
    _count_firing(bound_hook, forward_pass)
    if bound_hook.change is None:
        assert isinstance(bound_hook.hook, Capture)
        if bound_hook.pieces:
            raise Unsupported(
                f"{bound_hook.site} has shape {list(tensor.shape)}, without axes batch and pos "
                "along which several forwards of one text could be joined: capture it in one "
                "forward"
            )
        stored = _stored_copy(tensor.detach(), bound_hook.hook, False)
        bound_hook.pieces.append(CapturedChunk(forward_pass.number, None, stored))
        return (bound_hook, forward_pass.number, None, tensor.shape, None), tensor
    new = bound_hook.change(tensor, EditContext(bound_hook.site, bound_hook.where, None))
    check_result(bound_hook, None, tensor, new)
    changed = (new != tensor).sum()
    return (bound_hook, forward_pass.number, None, tensor.shape, changed), new


def _count_firing(bound_hook: BoundHook, forward_pass: ForwardPass) -> None:
    """Counts a forward in which a hook acts; `Unsupported` if it has acted in this one before."""
    if bound_hook.last_pass is forward_pass:
        raise Unsupported(
            f"the module at {bound_hook.site} ran twice or more in one forward, and "
            f"{bound_hook.hook} cannot tell which run is meant: put the hook at a module that runs "
            "once, before it or after it; where the whole model runs several times in one call, "
            "attach to the model inside"
        )
    bound_hook.last_pass = forward_pass
    bound_hook.fired += 1


def _with_batch_axis(tensor: Tensor, rows: int) -> Tensor:
    """Expands a tensor that is the same for all rows, such as position embeddings [1, pos, d]."""
    if tensor.ndim > 1 and tensor.shape[0] == 1 and rows > 1:
        return tensor.expand(rows, *tensor.shape[1:])
    return tensor


def _with_positions(
    bound_hook: BoundHook, forward_pass: ForwardPass, tensor: Tensor
) -> Tensor | None:
    """The tensor as [batch, pos, ...]; None if it has no such axes. Those of named sites have."""
    rows, width = forward_pass.rows, forward_pass.width
    full = tensor
    if not bound_hook.view.plain:
        full = bound_hook.view.batch_view(tensor, forward_pass)
    if full.shape[:2] == forward_pass.shape:
        return full
    full = _with_batch_axis(full, rows)
    fits = full.ndim > 1 and full.shape[0] == rows
    fits = fits and full.shape[1] in (width, len(forward_pass.head))
    if isinstance(bound_hook.site, ModuleSite):
        is_head_first = full.ndim > 3 and full.shape[1] != width == full.shape[2]
        return full if fits and not is_head_first else None  # not [batch, head, pos, d_head]
    if not fits:
        raise BadEdit(
            f"{bound_hook.site} has shape {list(full.shape)}, and {rows} rows of {width} positions "
            "ran"
        )
    return full


# ---- results that are not finite


def check_result(
    bound_hook: BoundHook, selection: Selection | None, old: Tensor, new: Tensor
) -> None:
    """Raises `BadEdit`, here or in `settle`, if an edit made a finite number infinite or NaN."""
    hook, site = bound_hook.hook, bound_hook.site
    if not new.is_floating_point() or getattr(hook, "gives_infinity", False):
        return
    new, old = new.detach(), old.detach()
    has_masks = isinstance(site, ModuleSite) or site.name in SITES_WITH_MASKS
    if new.device.type not in AT_ONCE:
        if has_masks:
            flag = _lost(bound_hook, selection, old, new, has_masks).any()
        else:
            # two sums cost less than a comparison of every number; float64 cannot overflow in them
            new_sum, old_sum = new.sum(dtype=torch.float64), old.sum(dtype=torch.float64)
            flag = torch.isfinite(old_sum) & ~torch.isfinite(new_sum)
        bound_hook.overflow_flags.append(flag)
        return
    if bool(torch.isfinite(new.sum(dtype=torch.float32))):
        return
    count = int(_lost(bound_hook, selection, old, new, has_masks).sum())
    if count == 1:
        _raise_bad_edit(bound_hook, "a number", "is")
    if count:
        _raise_bad_edit(bound_hook, f"{count} numbers", "are")


def _lost(
    bound_hook: BoundHook,
    selection: Selection | None,
    old: Tensor,
    new: Tensor,
    has_masks: bool,
) -> Tensor:
    """Where an edit made a finite number infinite or NaN; with a selection, how often by cell."""
    lost = ~torch.isfinite(new) & torch.isfinite(old)
    # an edit that inserts other values may insert -inf; arithmetic gives it by overflow only
    if has_masks and getattr(bound_hook.hook, "puts_in", False):
        lost = lost & ~torch.isneginf(new)
    return lost if selection is None else selection.real(lost)


def settle(bound_hooks: Iterable[BoundHook]) -> None:
    """Raises `BadEdit` for the first edit of a forward whose result is not finite."""
    for bound_hook in bound_hooks:
        flags = bound_hook.overflow_flags
        if flags:
            bound_hook.overflow_flags = []
            device = flags[0].device
            if bool(torch.stack([flag.to(device) for flag in flags]).any()):
                _raise_bad_edit(bound_hook, "numbers", "are")


def forget(bound_hooks: Iterable[BoundHook]) -> None:
    """Drops the flags of a forward that was interrupted."""
    for bound_hook in bound_hooks:
        bound_hook.overflow_flags = []


def _raise_bad_edit(bound_hook: BoundHook, numbers: str, verb: str) -> None:
    source = f"{bound_hook.hook} gives"
    if hasattr(bound_hook.hook, "fn"):
        source = f"the function of {bound_hook.hook} returned"
    raise BadEdit(
        f"{source} {numbers} at {bound_hook.site} that {verb} infinite or NaN, where there was "
        "none: use smaller values than the dtype can hold, and look for 0/0 and inf-inf"
    )
