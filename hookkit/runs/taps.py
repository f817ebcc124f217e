"""Hook points: from the user's hooks to the modules at which they act.

`build_hook_points` turns hooks into `HookPoint`s: one for each side of a module at which something
is done, with the bound hooks that act there in their order. All that can be checked without a
forward is checked here. Nothing is registered on the model here.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadEdit, BadHook, Unsupported
from ..hooks.base import Binding, Change, EditHook, Hook
from ..hooks.capture import Capture
from ..hooks.captured_values import Captured, CapturedChunk
from ..models.families.schema import ModuleLocation
from ..models.lm import LM
from ..models.positions import Where
from ..models.sites import LOGIT_SITES, AnySite, Site
from ..models.training import refuse_no_gradient
from ..models.views import SiteView, view_of

Reference = Callable[[Sequence[AnySite], tuple[Any, ...]], dict[AnySite, Captured]]
"""A function that captures sites on the prompts of a reference."""

HIDDEN_STATES_KEYWORDS = ("hidden_states", "input", "x")


@dataclass(eq=False, slots=True)
class BoundHook:
    """One hook at one site, and what it has captured or changed.

    The fields from `pieces` on are state. They are owned by the `CaptureStore` of the manager.
    """

    number: int  # index of the hook in the order in which the hooks were passed
    hook: Hook
    site: AnySite
    where: Where  # the positions of the hook; the steps of a phrase are written out
    view: SiteView  # where the site is in the tensor of the module
    change: Change | None  # None for a capture
    head: bool  # True at the unembedding, which may compute fewer positions than the blocks
    observer: bool = False  # True for a hook of hookkit's own, which the user does not see
    pieces: list[CapturedChunk] = field(default_factory=list)  # of the current text
    fired: int = 0  # number of forwards in which the hook did something
    overflow_flags: list[Tensor] = field(default_factory=list)  # of the current forward
    last_pass: Any = None  # the last forward in which the hook did something


@dataclass(eq=False)
class HookPoint:
    """One side of one module, with the bound hooks that act there in the order of the hooks."""

    module: nn.Module
    place: ModuleLocation
    actions: list[BoundHook]
    reads_input: bool = False  # True if an edit of the output also needs the module's input
    copies_output: bool = True  # True if all that is done is to copy a whole output tensor

    @property
    def key(self) -> tuple[str, str, int | str]:
        """The path, the side and the item, which identify the tensor."""
        return self.place.path, self.place.side, self.place.item


def build_hook_points(
    lm: LM, hooks: Sequence[Hook], reference: Reference, observers: Sequence[Hook] = ()
) -> list[HookPoint]:
    """Returns the hook points of these hooks, each checked against the model.

    `reference` captures sites on the prompts of a reference. `observers` are hooks of hookkit's
    own. They act after the user's hooks.
    """
    hook_points: dict[ModuleLocation, HookPoint] = {}
    for number, hook in enumerate(hooks):
        _add_hook(lm, hook_points, hook, number, reference)
    for number, hook in enumerate(observers, start=len(hooks)):
        _add_hook(lm, hook_points, hook, number, reference, observer=True)
    # torch calls the hook that was registered first first: hooks that write into a shared input
    # have to act before the hooks that read it
    return sorted(hook_points.values(), key=lambda hook_point: not hook_point.place.shared)


def _add_hook(
    lm: LM,
    hook_points: dict[ModuleLocation, HookPoint],
    hook: Hook,
    number: int,
    reference: Reference,
    *,
    observer: bool = False,
) -> None:
    """Binds one hook to each of its sites and adds it to the hook points there."""
    _check_hook(lm, hook)
    locations = lm.located(hook.sites)
    reference_values = _ReferenceValues(tuple(locations), reference)
    edit = hook if isinstance(hook, EditHook) else None
    where = hook.placed(lm)
    for site, location in locations.items():
        change = None
        if edit is not None:
            change = _bind_edit(lm, edit, site, reference_values)
        hook_point = _hook_point_at(lm, hook_points, location.tensor)
        if edit is not None and edit.reads_input:
            hook_point.reads_input = True
        view = view_of(lm.layout, site, location)
        at_head = isinstance(site, Site) and site.name in LOGIT_SITES
        hook_point.copies_output = (
            _copies_unchanged(hook)
            and not at_head
            and view.plain
            and location.item == 0
            and not location.shared
            and not hook_point.actions
            and lm.ranks is None
        )
        bound_hook = BoundHook(number, hook, site, where, view, change, at_head, observer)
        hook_point.actions.append(bound_hook)


def _check_hook(lm: LM, hook: object) -> None:
    if not isinstance(hook, Hook):
        raise BadHook(
            f"{hook!r} is a {type(hook).__name__} and no hook: make one with hk.capture, hk.steer, "
            "hk.force …"
        )
    if isinstance(hook, Capture):
        if hook.device is not None:
            check_device(hook.device)
        if hook.grad:
            refuse_no_gradient(lm)


def _copies_unchanged(hook: Hook) -> bool:
    """True for a capture that neither converts nor moves values, and needs no gradients."""
    return isinstance(hook, Capture) and hook.dtype is hook.device is None and not hook.grad


def _hook_point_at(
    lm: LM, hook_points: dict[ModuleLocation, HookPoint], location: ModuleLocation
) -> HookPoint:
    """Returns the hook point of a whole tensor, which all sites in the tensor share."""
    hook_point = hook_points.get(location)
    if hook_point is None:
        hook_point = HookPoint(lm.submodule(location.path), location, [])
        hook_points[location] = hook_point
    return hook_point


@dataclass(eq=False)
class _ReferenceValues:
    """The values of a hook's sites on its reference prompts, captured at the first request.

    Owned by the bound edits of one hook.
    """

    sites: tuple[AnySite, ...]
    capture_sites: Reference
    values: dict[AnySite, Captured] | None = None

    def at(self, site: AnySite, prompts: tuple[Any, ...]) -> Captured:
        if self.values is None:
            self.values = self.capture_sites(self.sites, prompts)
        return self.values[site]


def _bind_edit(lm: LM, edit: EditHook, site: AnySite, reference_values: _ReferenceValues) -> Change:
    try:
        return edit.change(Binding(lm, site, partial(reference_values.at, site)))
    except Exception as error:
        error.add_note(f"in {edit}")
        raise


def check_device(name: str) -> None:
    """Raises `BadHook` if this machine has no such device."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise BadHook(f"device={name!r} is not on this machine: {reason}") from error


def logits_hook_point(lm: LM, hook_points: list[HookPoint]) -> HookPoint:
    """Returns the hook point at the logits that the model returns; adds it if no hook acts there.

    Raises `Unsupported` if an edit changes the logits before a trace can read them.
    """
    for hook_point in hook_points:
        for bound_hook in hook_point.actions:
            is_edit = bound_hook.change is not None
            if is_edit and bound_hook.head and bound_hook.site != Site("logits"):
                raise Unsupported(
                    f"{bound_hook.hook} acts at {bound_hook.site}, before the logits that a trace "
                    "reads as the model's own: let it act at 'logits', or leave trace= out"
                )
    location = lm.place(Site("logits"))
    for hook_point in hook_points:
        if hook_point.place == location:
            return hook_point
    hook_point = HookPoint(lm.submodule(location.path), location, [], copies_output=False)
    hook_points.append(hook_point)
    return hook_point


def forward_of_site(lm: LM, site: AnySite) -> Callable[[Tensor], Tensor]:
    """Returns the forward of the module that reads a site, as a function of the whole site.

    This also holds where each process of a split model has a part of the module's weights.
    """
    location = lm.place(site)
    forward = lm.submodule(location.path).forward
    ranks = lm.ranks
    if ranks is None:
        return forward
    split = ranks.splits.get((location.path, location.side, location.item))
    if split is None:
        return forward

    def forward_of_part(values: Tensor) -> Tensor:
        return forward(ranks.part(values, replace(split, axis=values.ndim - 1)))

    return forward_of_part


def pick_output(output: Any, location: ModuleLocation) -> Tensor:
    """Returns the tensor of a module's output, or one of several; `BadEdit` if it is no tensor."""
    item = location.item
    # a model may return its logits alone, or as the first item of a tuple
    is_model_logits = item == "logits" and not location.path
    tensor = None
    if isinstance(output, Tensor):
        if item == 0 or is_model_logits:
            tensor = output
    else:
        key: Any = item
        if is_model_logits and isinstance(output, tuple):
            key = 0
        with suppress(KeyError, IndexError, TypeError):
            tensor = output[key]
    if isinstance(tensor, Tensor):
        return tensor
    kind = type(output).__name__
    if isinstance(output, tuple | list):
        kind += f" of {len(output)}"
    raise BadEdit(
        f"{location.path or 'the model'} gives a {kind}, and item {item!r} of it is no tensor: "
        "say which is meant, hk.module(path, item=…)"
    )


def replace_output(output: Any, item: int | str, new: Tensor) -> Any:
    """Returns the same output with one tensor replaced; its type is the type of the output."""
    if isinstance(output, Tensor):
        return new
    if isinstance(output, tuple | list):
        items = list(output)
        items[item if isinstance(item, int) else 0] = new
        if hasattr(output, "_fields"):  # a named tuple
            return type(output)(*items)
        return type(output)(items)
    changed = copy.copy(output)  # a dict, or a ModelOutput, which is a dict that has indices too
    key = item
    if isinstance(item, int) and item not in output:
        key = list(output)[item]
    changed[key] = new
    return changed


def find_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], item: int | str, where: str
) -> tuple[Tensor, int | str]:
    """Returns a tensor that a module was called with, and its index or keyword.

    `where` names the module in the error message.
    """
    key = item
    if item == 0 and not args:
        for name in HIDDEN_STATES_KEYWORDS:
            if name in kwargs:
                key = name
                break
    tensor = kwargs.get(key) if isinstance(key, str) else None
    if isinstance(key, int) and len(args) > key:
        tensor = args[key]
    if not isinstance(tensor, Tensor):
        keywords = ", ".join(kwargs) or "none"
        raise BadEdit(
            f"{where} was given {len(args)} positional values and the keywords {keywords}, and "
            f"{item!r} is no tensor among them: say which is meant, "
            "hk.module(path, side='input', item=…)"
        )
    return tensor, key
