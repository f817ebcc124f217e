"""How one hook acts on the tensor at its hook point: it captures or edits the selected cells.

An edit whose result is infinite or NaN where the model's own value was finite raises `BadEdit`.
On a CPU the result is checked at once. On other devices this would wait for the device after each
edit, so the flags of all edits are read together, at the end of the forward.
"""

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ..errors import BadEdit, BadHook, Unsupported
from ..hooks.base import EditContext, EditHook
from ..hooks.capture import Capture, CapturedChunk, CaptureLast, swap_head_and_query
from ..hooks.conditions import BoundCondition, Outcome, edit_where
from ..hooks.values import convert_dtype
from ..models.batch_positions import ForwardPass, Selection
from ..models.positions import Where
from ..models.sites import LOGIT_SITES, QUERY_KEY_SITES, ModuleSite
from ..models.views import SiteView
from .hook_points import BoundHook, Firing, HookPoint

# where the model itself may have -inf, as a mask, which an edit may set
SITES_WITH_MASKS = LOGIT_SITES | QUERY_KEY_SITES
AT_ONCE = frozenset({"cpu", "meta"})  # devices whose results can be read without waiting


def apply_hook(
    bound_hook: BoundHook,
    hook_point: HookPoint,
    forward_pass: ForwardPass,
    tensor: Tensor,
    module_input: Tensor | None,
    *,
    count_changes: bool = False,
) -> tuple[Firing | None, Tensor]:
    """Applies one hook to the tensor at its hook point.

    Returns the firing, None if the hook selects no cell, and the tensor with which the model goes
    on. `module_input` is for edits that need it. The tensor itself is written to only at a shared
    location, where the block reads it twice. With `count_changes`, the firing says how many numbers
    an edit changed.
    """
    if bound_hook.elsewhere:
        return _apply_to_whole_tensor(bound_hook, forward_pass, tensor)
    view = bound_hook.view
    forward_pass = view.call(forward_pass, tensor)
    full = _with_positions(bound_hook, forward_pass, tensor)
    if full is None:
        return _apply_to_whole_tensor(bound_hook, forward_pass, tensor)
    at_head = bound_hook.head or full.shape[1] != forward_pass.width
    is_capture = bound_hook.change is None and bound_hook.receive is None
    selection = forward_pass.cells(bound_hook.where, at_head, is_capture)
    if selection is None:
        return None, tensor
    _count_firing(bound_hook, forward_pass)
    raw = selection.gather(view.view(full))
    values = view.read(raw, selection, forward_pass)
    changed = outcome = None
    if bound_hook.receive is not None:
        bound_hook.receive(forward_pass, selection, values)
        new = None
    elif is_capture:
        new = _capture(bound_hook, forward_pass, selection, raw, values)
    else:
        new, outcome = _edit(bound_hook, selection, values, module_input, forward_pass.number)
        if count_changes:
            changed = selection.real(new != values)
        new = view.write(new, values, raw, selection, forward_pass)
    if new is not None:
        tensor = _put(bound_hook, hook_point, forward_pass, selection, tensor, new)
    firing = bound_hook, forward_pass.number, selection, values.shape[2:], changed, outcome
    return firing, tensor


def _edit(
    bound_hook: BoundHook,
    selection: Selection,
    values: Tensor,
    module_input: Tensor | None,
    forward: int,
) -> tuple[Tensor, Outcome | None]:
    """Returns the edited values, and where the hook's condition held.

    Raises if the values are not finite, or of another dtype.
    """
    assert bound_hook.change is not None
    selected_input, outcome = None, None
    if module_input is not None:
        selected_input = selection.gather(module_input)
    context = EditContext(bound_hook.site, bound_hook.where, selection, selected_input)
    if bound_hook.condition is None:
        new = bound_hook.change(values, context)
    else:
        new, outcome = _edit_where(bound_hook, bound_hook.condition, values, context, forward)
    _check_result(bound_hook, selection, values, new)
    if new.dtype != values.dtype:
        raise BadEdit(
            f"{bound_hook.hook} gives {new.dtype}, and {bound_hook.site} is {values.dtype}: "
            "edit it with hk.edit"
        )
    assert new.shape == values.shape, f"{bound_hook.hook} changed {values.shape} to {new.shape}"
    return new, outcome


def _edit_where(
    bound_hook: BoundHook,
    condition: BoundCondition,
    values: Tensor,
    here: EditContext,
    forward: int,
) -> tuple[Tensor, Outcome]:
    """Returns the values, edited where the condition holds, and where that is."""
    assert bound_hook.change is not None and isinstance(bound_hook.hook, EditHook)
    outcome = condition.evaluate(values, here, forward)
    new = bound_hook.change(values, replace(here, condition_mask=outcome.holds))
    if bound_hook.hook.applies_condition or new.dtype != values.dtype:
        return new, outcome
    return edit_where(outcome.holds, new, values), outcome


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
    if selection.whole and type(view) is SiteView and not view.flat:
        # modules may take a view of what they are called with, which needs a contiguous tensor
        return new.contiguous() if tensor.is_contiguous() else new
    laid_out = view.batch_view(tensor, forward_pass)
    expanded = _with_batch_axis(laid_out, forward_pass.shape)
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

    Returns the values that replace the cells in the model; None if they are unchanged.
    """
    capture, number = bound_hook.hook, forward_pass.number
    assert isinstance(capture, Capture)
    if capture.grad:
        # the model continues with the stored values, so that they get a gradient
        values = _capture_with_gradient(bound_hook, number, selection, values)
        return bound_hook.view.write(values.clone(), None, raw, selection, forward_pass)
    if capture.sparse:
        values = values.detach().to_sparse()
    is_copy = capture.sparse or selection.scattered or _has_own_memory(values, raw)
    stored = _stored_copy(values, capture, is_copy)
    if isinstance(capture, CaptureLast) and bound_hook.pieces:
        previous = bound_hook.pieces.pop()
        bound_hook.pieces += previous.of_rows(forward_pass.text.ended_rows())
    bound_hook.pieces.append(CapturedChunk(number, selection, stored))
    return None


def _capture_with_gradient(
    bound_hook: BoundHook, number: int, selection: Selection, values: Tensor
) -> Tensor:
    """Stores the values as a leaf of the graph of gradients, and returns them."""
    if bound_hook.pieces and bound_hook.pieces[-1].call == number:
        raise Unsupported(
            f"the attention at {bound_hook.site} runs for each image by itself, so that there "
            "is no one tensor with a gradient: give one image, or capture q, k or z"
        )
    leaf = _leaf_with_gradient(bound_hook, values)
    values = swap_head_and_query(bound_hook.site, leaf)
    bound_hook.pieces.append(CapturedChunk(number, selection, values, leaf))
    return values


def _has_own_memory(values: Tensor, raw: Tensor) -> bool:
    return values is not raw and values.data_ptr() != raw.data_ptr()


def _leaf_with_gradient(bound_hook: BoundHook, values: Tensor) -> Tensor:
    """A copy of the values that keeps its gradient, with axes as a run has them."""
    if not torch.is_grad_enabled():
        raise Unsupported(
            f"{bound_hook.hook} needs gradients, which are off here (generate always runs without)"
        )
    leaf = swap_head_and_query(bound_hook.site, values)
    if not leaf.requires_grad:
        leaf = leaf.detach()
    leaf = leaf.clone().requires_grad_()
    leaf.retain_grad()
    return leaf


def _stored_copy(values: Tensor, capture: Capture, is_copy: bool) -> Tensor:
    """Returns values on the capture's device and in its dtype, as a tensor of their own.

    It is made outside inference mode, so that autograd can use it later. `is_copy` is True if the
    values share no memory with the model's tensor.
    """
    if values.requires_grad:
        values = values.detach()
    inference_mode = torch.is_inference_mode_enabled()
    if capture.dtype is capture.device is None and not inference_mode:
        return values if is_copy else values.clone()
    values = _in_dtype_of(capture, values)
    memory_format = torch.contiguous_format
    if values.is_sparse:  # which has no other format
        memory_format = torch.preserve_format
    with torch.inference_mode(False):
        return values.to(
            device=capture.device or values.device,
            copy=inference_mode or not is_copy,
            memory_format=memory_format,
        )


def _in_dtype_of(capture: Capture, values: Tensor) -> Tensor:
    """Returns the values in the dtype of a capture. Raises if it cannot hold them."""
    if capture.dtype is None:
        return values
    dtype = getattr(torch, capture.dtype)
    if not values.is_floating_point() or dtype == values.dtype:
        return values.to(dtype)
    if not dtype.is_floating_point:
        raise BadHook(
            f"{capture}: dtype={capture.dtype!r} cannot hold the real numbers there: say a "
            "floating dtype, such as 'float16'"
        )
    return convert_dtype(values, dtype, f"what {capture} keeps")


def _apply_to_whole_tensor(
    bound_hook: BoundHook, forward_pass: ForwardPass, tensor: Tensor
) -> tuple[Firing, Tensor]:
    """Applies a hook without pos, rows and step to all of a tensor without axes batch and pos."""
    shape, hook = list(tensor.shape), bound_hook.hook
    if bound_hook.where != Where():
        reason = (
            f"{bound_hook.site} has shape {shape}, without axes batch and pos "
            f"({forward_pass.rows} rows of {forward_pass.width} positions ran)"
        )
        reason = bound_hook.elsewhere or reason
        raise BadHook(f"{reason}: leave pos, rows and step out of {hook}")
    _refuse_condition(bound_hook, shape)
    _count_firing(bound_hook, forward_pass)
    changed = None
    if isinstance(hook, Capture):
        if bound_hook.pieces:
            raise Unsupported(
                f"{bound_hook.site} has shape {shape}, without axes batch and pos along which "
                "several forwards of one text could be joined: capture it in one forward"
            )
        stored = _stored_copy(tensor, hook, False)
        bound_hook.pieces.append(CapturedChunk(forward_pass.number, None, stored))
        new = tensor
    else:
        assert bound_hook.change is not None
        new = bound_hook.change(tensor, EditContext(bound_hook.site, bound_hook.where, None))
        _check_result(bound_hook, None, tensor, new)
        changed = (new != tensor).sum()
    return (bound_hook, forward_pass.number, None, tensor.shape, changed, None), new


def _refuse_condition(bound_hook: BoundHook, shape: list[int]) -> None:
    """Raises `BadHook` for a condition where no cell has a row and a position."""
    if bound_hook.condition is not None or bound_hook.receive is not None:
        raise BadHook(
            f"{bound_hook.hook} asks for each row and position, and {bound_hook.site} has shape "
            f"{shape}, whose axes batch and pos are not known: leave when= out, or name another "
            "site"
        )


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


def _with_batch_axis(tensor: Tensor, shape: tuple[int, int]) -> Tensor:
    """Expands a tensor that is the same for all rows, such as position embeddings [1, pos, d].

    `shape` is the numbers of rows and positions; the first axis may be missing.
    """
    rows, width = shape
    if tensor.ndim == 2 and tensor.shape[0] == width:
        tensor = tensor[None]
    if tensor.ndim > 1 and tensor.shape[0] == 1 and rows > 1:
        return tensor.expand(rows, *tensor.shape[1:])
    return tensor


def _with_positions(
    bound_hook: BoundHook, forward_pass: ForwardPass, tensor: Tensor
) -> Tensor | None:
    """The tensor as [batch, pos, ...]; None for a module's tensor that has no such axes."""
    rows, width = forward_pass.shape
    full = bound_hook.view.batch_view(tensor, forward_pass)
    if full.shape[:2] == forward_pass.shape:
        return full
    is_module = isinstance(bound_hook.site, ModuleSite)
    if full.ndim > 2 or not is_module:
        full = _with_batch_axis(full, forward_pass.shape)
    if full.shape[:2] in ((rows, width), (rows, len(forward_pass.head))):
        is_head_first = full.ndim > 3 and full.shape[2] == width != full.shape[1]
        return None if is_module and is_head_first else full  # [batch, head, pos, d_head]
    if is_module:
        return None
    raise BadEdit(
        f"{bound_hook.site} has shape {list(full.shape)}, and {rows} rows of {width} positions ran"
    )


# ---- results that are not finite


def _check_result(
    bound_hook: BoundHook, selection: Selection | None, old: Tensor, new: Tensor
) -> None:
    """Raises `BadEdit`, here or in `settle`, if an edit made a finite number infinite or NaN."""
    hook, site = bound_hook.hook, bound_hook.site
    assert isinstance(hook, EditHook)
    if not new.is_floating_point() or hook.gives_infinity:
        return
    new, at_once = new.detach(), new.device.type in AT_ONCE
    if at_once and math.isfinite(new.sum(dtype=torch.float32).item()):
        return
    old = old.detach()
    may_have_masks = isinstance(site, ModuleSite) or site.name in SITES_WITH_MASKS
    # an edit that inserts other values may insert -inf; arithmetic gives it by overflow only
    lost = partial(_lost, selection, old, new, allows_masks=may_have_masks and hook.puts_in)
    if at_once:
        _refuse_lost(bound_hook, int(lost().sum()))
        return
    flag = lost().any() if may_have_masks else _overflows(old, new)
    bound_hook.overflow_flags.append(flag)


def _refuse_lost(bound_hook: BoundHook, count: int) -> None:
    if count == 1:
        _raise_bad_edit(bound_hook, "a number", "is")
    if count:
        _raise_bad_edit(bound_hook, f"{count} numbers", "are")


def _overflows(old: Tensor, new: Tensor) -> Tensor:
    """`_lost` as one flag. Two sums cost less than comparisons; float64 cannot overflow in them."""
    new_sum, old_sum = new.sum(dtype=torch.float64), old.sum(dtype=torch.float64)
    return torch.isfinite(old_sum) & ~torch.isfinite(new_sum)


def _lost(selection: Selection | None, old: Tensor, new: Tensor, *, allows_masks: bool) -> Tensor:
    """Where an edit made a finite number infinite or NaN; with a selection, how often by cell."""
    lost = ~torch.isfinite(new) & torch.isfinite(old)
    if allows_masks:
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
