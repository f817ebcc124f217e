"""What happens at a tap: the chosen cells are copied out, or changed and put back."""

import torch
from torch import Tensor

from ..errors import BadEdit, BadHook, Unsupported
from ..hooks.base import Here
from ..hooks.capture import Capture, CaptureLast
from ..hooks.captured_values import CapturedChunk, in_order
from ..hooks.rounding import narrowed
from ..models.batch_positions import ForwardPass, Selection
from ..models.positions import Where
from ..models.sites import ModuleSite
from ..models.views import SiteView
from .outcomes import Firing
from .overflow import check_result
from .taps import BoundHook, HookPoint


def act(
    action: BoundHook, tap: HookPoint, call: ForwardPass, found: Tensor, before: Tensor | None
) -> tuple[Firing | None, Tensor]:
    """Do one hook's work on the tensor at its place: what fired, and the tensor that goes on.

    `before` is what the module was given, for edits that need it. The tensor itself is written into only at a shared
    place, where the block reads it twice.
    """
    if not call.placed:
        return _act_on_all(action, call, found)
    form, full = action.form, found
    if not form.plain:
        call, full = form.call(call, found), form.laid(found, call)
    shape = full.shape
    if len(shape) < 2 or shape[0] != call.rows or shape[1] != call.width:
        full = _with_batch_axis(full, call.rows)
        if not _has_positions(action, full, call):
            return _act_on_all(action, call, found)
    cells = call.cells(
        action.where, action.head or full.shape[1] != call.width, action.change is None
    )
    if cells is None:
        return None, found
    _first_run(action, call)
    raw = cells.gather(full if form.plain else form.view(full))
    old = raw if form.plain else form.read(raw, cells, call)
    if action.change is None:
        found = _keep(action, tap, call, cells, raw, old, found)
        return (action, call.number, cells, old.shape[2:], None), found
    here = Here(action.site, action.where, cells, None if before is None else cells.gather(before))
    new = action.change(old, here)
    check_result(action, cells, old, new)
    if new.dtype != old.dtype:
        raise BadEdit(
            f"{action.hook} gives {new.dtype}, and {action.site} is {old.dtype}: edit it with hk.edit"
        )
    assert new.shape == old.shape, f"{action.hook} changed {old.shape} to {new.shape}"
    changed = cells.real(new != old)
    if not form.plain:
        new = form.write(new, old, raw, cells, call)
    return (action, call.number, cells, old.shape[2:], changed), _put(
        action, tap, call, cells, found, new
    )


def _put(
    action: BoundHook,
    tap: HookPoint,
    call: ForwardPass,
    cells: Selection,
    found: Tensor,
    new: Tensor,
) -> Tensor:
    """The tensor with the chosen cells of its view replaced."""
    form = action.form
    if tap.place.shared:
        # the block goes on reading this very tensor: a replacement would reach the module and miss the residual stream
        cells.scatter(form.laid(found, call), new)
        return found
    if cells.whole and type(form) is SiteView:
        return (
            new.contiguous() if found.is_contiguous() else new
        )  # modules may take a view of what they are given
    wide = form.laid(found, call)
    served = _with_batch_axis(wide, call.rows)
    copy = (found if served is wide else served).clone(memory_format=torch.contiguous_format)
    cells.scatter(form.view(form.laid(copy, call)), new)
    return copy


def _keep(
    action: BoundHook,
    tap: HookPoint,
    call: ForwardPass,
    cells: Selection,
    raw: Tensor,
    values: Tensor,
    found: Tensor,
) -> Tensor:
    capture = action.hook
    assert isinstance(capture, Capture)
    if not capture.grad:
        fresh = cells.scattered or (values is not raw and values.data_ptr() != raw.data_ptr())
        kept = _kept(values.detach() if values.requires_grad else values, capture, fresh)
        if isinstance(capture, CaptureLast) and action.pieces:
            last = action.pieces.pop()
            action.pieces += last.of_rows(call.text.ended_rows())
        action.pieces.append(CapturedChunk(call.number, cells, kept))
        return found
    if not torch.is_grad_enabled():
        raise Unsupported(
            f"{capture} needs gradients, which are off here (generate always runs without)"
        )
    leaf = in_order(action.site, values)
    leaf = leaf.clone() if leaf.requires_grad else leaf.detach().clone().requires_grad_()
    leaf.retain_grad()
    values = in_order(action.site, leaf)
    action.pieces.append(CapturedChunk(call.number, cells, values, leaf))
    # what goes on is made of the captured values, so that they are on the path of the gradient
    new = values.clone() if action.form.plain else action.form.write(values, None, raw, cells, call)
    return _put(action, tap, call, cells, found, new)


def _kept(values: Tensor, capture: Capture, fresh: bool) -> Tensor:
    """Values as a capture wants them: a copy, free of inference mode, so that autograd can use it later."""
    if capture.dtype is capture.device is None and not torch.is_inference_mode_enabled():
        return values if fresh else values.clone()
    dtype = getattr(torch, capture.dtype) if capture.dtype else values.dtype
    if values.is_floating_point() and not dtype.is_floating_point:
        raise BadHook(
            f"{capture}: dtype={capture.dtype!r} cannot hold the real numbers there: say a floating dtype, such as "
            "'float16'"
        )
    device = torch.device(capture.device) if capture.device else values.device
    if dtype != values.dtype and values.is_floating_point():
        values = narrowed(values, dtype, f"what {capture} keeps")
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            return values.to(
                device=device, dtype=dtype, copy=True, memory_format=torch.contiguous_format
            )
    return values.to(
        device=device, dtype=dtype, copy=not fresh, memory_format=torch.contiguous_format
    )


def _act_on_all(action: BoundHook, call: ForwardPass, found: Tensor) -> tuple[Firing, Tensor]:
    """At a module whose tensor has no axes batch and pos: the whole of it, or nothing."""
    if action.where != Where() and not call.placed:
        raise BadHook(
            f"an encoder-decoder reads two texts, so a position at {action.site} may be of either: leave pos, rows and "
            f"step out of {action.hook}"
        )
    if action.where != Where():
        raise BadHook(
            f"{action.site} has shape {list(found.shape)}, without axes batch and pos ({call.rows} rows of "
            f"{call.width} positions ran): leave pos, rows and step out of {action.hook}"
        )
    _first_run(action, call)
    if action.change is None:
        assert isinstance(action.hook, Capture)
        if action.pieces:
            raise Unsupported(
                f"{action.site} has shape {list(found.shape)}, without axes batch and pos along which several forwards "
                "of one text could be joined: capture it in one forward"
            )
        action.pieces.append(
            CapturedChunk(call.number, None, _kept(found.detach(), action.hook, False))
        )
        return (action, call.number, None, found.shape, None), found
    new = action.change(found, Here(action.site, action.where, None))
    check_result(action, None, found, new)
    return (action, call.number, None, found.shape, (new != found).sum()), new


def _first_run(action: BoundHook, call: ForwardPass) -> None:
    """Count a forward in which a hook does something, or raise `Unsupported` if it has done so in it before."""
    if action.last is call:
        raise Unsupported(
            f"the module at {action.site} ran twice or more in one forward, and {action.hook} cannot tell which run "
            "is meant: put the hook at a module that runs once, before it or after it; where the whole model runs "
            "several times in one call, attach to the model inside"
        )
    action.last = call
    action.fired += 1


def _with_batch_axis(found: Tensor, rows: int) -> Tensor:
    """A tensor that serves all rows at once (position embeddings [1, pos, d_model]) as one with a row each."""
    return (
        found.expand(rows, *found.shape[1:])
        if found.ndim > 1 and found.shape[0] == 1 and rows > 1
        else found
    )


def _has_positions(action: BoundHook, full: Tensor, call: ForwardPass) -> bool:
    """True if the first axes of a tensor are batch and pos of this call. A named site that is not so raises."""
    behind = (
        full.ndim > 3 and full.shape[1] != call.width == full.shape[2]
    )  # [batch, head, pos, d_head]
    fits = (
        full.ndim >= 2
        and full.shape[0] == call.rows
        and full.shape[1] in (call.width, len(call.head))
    )
    if fits and not (behind and isinstance(action.site, ModuleSite)):
        return True
    if isinstance(action.site, ModuleSite):
        return False
    raise BadEdit(
        f"{action.site} has shape {list(full.shape)}, and {call.rows} rows of {call.width} positions ran"
    )
