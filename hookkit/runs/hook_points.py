"""Hook points: the sides of modules at which hooks act.

`build_hook_points` turns the user's hooks into `HookPoint`s, each with the bound hooks that act
there in their order. All that can be checked without a forward is checked here. Nothing is
registered on the model here. `applied_hooks` says how a bound hook acts on a tensor.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import BadHook
from ..hooks.base import Binding, Change, EditHook, Hook
from ..hooks.capture import Capture, Captured, CapturedChunk
from ..hooks.concepts import SwapConcept
from ..hooks.conditions import BoundCondition, Outcome
from ..hooks.sources import SourceEdit
from ..models.batch_positions import ForwardPass, Selection
from ..models.families.schema import ModuleLocation
from ..models.lm import LM, refuse_no_gradient
from ..models.positions import Where
from ..models.sites import LOGIT_SITES, AnySite, Site, has_name
from ..models.views import SiteView, source_of_features, view_of
from .source_readers import LayerReader, Reader, reader_of

Reference: TypeAlias = Callable[[Sequence[AnySite], tuple[Any, ...]], dict[AnySite, Captured]]
"""A function that captures sites on the prompts of a reference."""


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
    condition: BoundCondition | None = None  # where the hook acts, if not everywhere
    reader: Reader | None = None  # of an edit with a source
    # for an observer that hands values to the edit or the condition that needs them
    receive: Callable[[ForwardPass, Selection, Tensor], None] | None = None
    elsewhere: str = ""  # why the positions of a module's tensor are not known; "" if they are
    pieces: list[CapturedChunk] = field(default_factory=list)  # of the current text
    fired: int = 0  # number of forwards in which the hook did something
    overflow_flags: list[Tensor] = field(default_factory=list)  # of the current forward
    last_pass: Any = None  # the last forward in which the hook did something

    @property
    def stack(self) -> str:
        """The stack whose positions are meant, such as "vision"; "" for the text."""
        return self.site.position_stack


@dataclass(eq=False)
class HookPoint:
    """One side of one module, with the bound hooks that act there in the order of the hooks."""

    module: nn.Module
    location: ModuleLocation
    actions: list[BoundHook]
    reads_input: bool = False  # True if an edit of the output also needs the module's input
    copies_output: bool = False  # True if all that is done is to copy a whole output tensor
    transcoded: set[Site] = field(default_factory=set)  # sites here that transcoders read

    @property
    def stack(self) -> str:
        """The stack whose positions the tensor has, such as "vision"; "" for the text."""
        stacks = [bound_hook.stack for bound_hook in self.actions]
        return max((*stacks, *(site.position_stack for site in self.transcoded)), default="")

    @property
    def site(self) -> AnySite:
        """One of the sites in the tensor; the logits if a trace alone reads it."""
        if self.actions:
            return self.actions[0].site
        return next(iter(self.transcoded), Site("logits"))

    def begin(self, forward_pass: ForwardPass) -> None:
        """Called before the hooks act here in a forward."""
        forward_pass.feature_edits.clear()

    def end(self, forward_pass: ForwardPass, tensor: Tensor) -> None:
        """Called with the tensor that the hooks leave, which transcoders read."""
        for site in self.transcoded:
            forward_pass.read_by_transcoders[site] = tensor

    def add(self, bound_hook: BoundHook, location: ModuleLocation) -> None:
        """Adds a hook, whose site is at this location in the tensor."""
        hook = bound_hook.hook
        if isinstance(hook, EditHook) and hook.reads_input and bound_hook.receive is None:
            self.reads_input = True
        is_alone = not self.actions and not self.transcoded
        self.copies_output = is_alone and _is_copy(bound_hook, location)
        self.actions.append(bound_hook)


Firing: TypeAlias = tuple[
    BoundHook, int, Selection | None, torch.Size, Tensor | None, Outcome | None
]
"""One hook at one site in one forward.

The bound hook, the forward's number, the selection, the shape of one cell (of the whole tensor if
there is no selection), for an edit how many numbers it changed in each cell, if they were counted,
and where its condition held.
"""


# ---- from hooks to hook points


def build_hook_points(
    lm: LM,
    hooks: Sequence[Hook],
    reference: Reference,
    observers: Sequence[Hook] = (),
    *,
    sources: bool = False,
) -> list[HookPoint]:
    """Returns the hook points of these hooks, each checked against the model.

    `reference` captures sites on the prompts of a reference. `observers` are hooks of hookkit's
    own. They act after the user's hooks. Edits with a source raise unless `sources` is True.
    """
    hook_points: dict[ModuleLocation, HookPoint] = {}
    layer_readers: list[LayerReader] = []
    for number, hook in enumerate((*hooks, *observers)):
        _check_hook(lm, hook)
        locations = lm.located(hook.sites)
        reference_value = _reference_values(tuple(locations), reference)
        where = hook.placed(lm)
        reader = None
        if sources and isinstance(hook, SourceEdit | SwapConcept):
            reader = reader_of(lm, hook)
        if isinstance(reader, LayerReader):
            layer_readers.append(reader)
        condition = _bind_condition(lm, hook, tuple(locations))
        if condition is not None:
            # A state is read as a capture just before the hook would read it.
            for reads in condition.readers:
                _add_observer(lm, hook_points, number, hook, reads.site, reads.where, reads.receive)
        for site, location in locations.items():
            bound_hook = BoundHook(
                number,
                hook,
                site,
                where,
                view=view_of(lm.layout, site, location),
                change=_bind_edit(lm, hook, site, reference_value, reader),
                head=has_name(site, *LOGIT_SITES),
                observer=number >= len(hooks),
                condition=condition,
                reader=reader,
                elsewhere=lm.why_no_positions(site),
            )
            _add_bound_hook(lm, hook_points, bound_hook, location)
    for number, reader in enumerate(layer_readers, start=len(hooks) + len(observers)):
        hook, site = reader.hook, reader.layer.site
        _add_observer(lm, hook_points, number, hook, site, hook.placed(lm), reader.receive)
    return in_order_of_registration(hook_points.values())


def _add_bound_hook(
    lm: LM,
    hook_points: dict[ModuleLocation, HookPoint],
    bound_hook: BoundHook,
    location: ModuleLocation,
) -> None:
    tensor = location.tensor  # all sites in a tensor share its hook point
    if tensor not in hook_points:
        hook_points[tensor] = HookPoint(lm.submodule(tensor.path), tensor, [])
    hook_points[tensor].add(bound_hook, location)
    source = source_of_features(lm.layout, bound_hook.site)
    if source is not None:
        _add_transcoded(lm, source, hook_points)


def _bind_condition(lm: LM, hook: Hook, sites: tuple[AnySite, ...]) -> BoundCondition | None:
    if not isinstance(hook, EditHook) or hook.when is None:
        return None
    try:
        return BoundCondition(hook, lm, sites)
    except Exception as error:
        error.add_note(f"in {hook}")
        raise


def _add_observer(
    lm: LM,
    hook_points: dict[ModuleLocation, HookPoint],
    number: int,
    hook: Hook,
    site: AnySite,
    where: Where,
    receive: Callable[[ForwardPass, Selection, Tensor], None],
) -> None:
    """Adds the bound hook that hands the values at a site to the edit that needs them."""
    location = lm.location(site)
    bound_hook = BoundHook(
        number,
        hook,
        site,
        where,
        view_of(lm.layout, site, location),
        None,
        has_name(site, *LOGIT_SITES),
        observer=True,
        receive=receive,
    )
    _add_bound_hook(lm, hook_points, bound_hook, location)


def _add_transcoded(lm: LM, source: Site, hook_points: dict[ModuleLocation, HookPoint]) -> None:
    """Adds a site that a transcoder reads to the hook point of its tensor."""
    tensor = lm.location(source).tensor
    if tensor not in hook_points:
        hook_points[tensor] = HookPoint(lm.submodule(tensor.path), tensor, [])
    hook_points[tensor].copies_output = False
    hook_points[tensor].transcoded.add(source)


def sort_bound_hooks(hook_points: Iterable[HookPoint]) -> list[BoundHook]:
    """Returns the hooks at these hook points in the order in which the user passed them."""
    bound_hooks = chain.from_iterable(hook_point.actions for hook_point in hook_points)
    return sorted(bound_hooks, key=lambda bound_hook: bound_hook.number)


def in_order_of_registration(hook_points: Iterable[HookPoint]) -> list[HookPoint]:
    """Returns the hook points with those that write into a shared input before all others.

    torch calls the hook that was registered first first, and those have to act before the hooks
    that read the input.
    """
    return sorted(hook_points, key=lambda hook_point: not hook_point.location.shared)


def _check_hook(lm: LM, hook: object) -> None:
    if not isinstance(hook, Hook):
        raise BadHook(
            f"{hook!r} is a {type(hook).__name__} and no hook: make one with hk.capture, hk.steer, "
            "hk.force …"
        )
    if isinstance(hook, Capture):
        if hook.device is not None:
            _check_device(hook.device)
        if hook.grad:
            refuse_no_gradient(lm)


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    # torch raises another class for each kind of device that is missing
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise BadHook(f"device={device!r} is not on this machine: {reason}") from error


def _is_copy(bound_hook: BoundHook, location: ModuleLocation) -> bool:
    """True if all that a hook does is to copy a whole output, without a conversion or a move."""
    hook = bound_hook.hook
    if not isinstance(hook, Capture) or hook.grad or not (hook.dtype is hook.device is None):
        return False
    is_module_output = location.item == 0 and not location.shared and not bound_hook.head
    return is_module_output and bound_hook.view.plain


def _reference_values(
    sites: tuple[AnySite, ...], capture_sites: Reference
) -> Callable[[AnySite, tuple[Any, ...]], Captured]:
    """A function of the values at one of the sites, all of which it captures when first called."""
    values: dict[AnySite, Captured] = {}

    def reference_value(site: AnySite, prompts: tuple[Any, ...]) -> Captured:
        if not values:
            values.update(capture_sites(sites, prompts))
        return values[site]

    return reference_value


def _bind_edit(
    lm: LM,
    hook: Hook,
    site: AnySite,
    reference_value: Callable[[AnySite, tuple[Any, ...]], Captured],
    reader: Reader | None,
) -> Change | None:
    """The function by which a hook changes the values at a site; None for a capture."""
    if not isinstance(hook, EditHook):
        return None
    try:
        return hook.change(Binding(lm, site, partial(reference_value, site), reader))
    except Exception as error:
        error.add_note(f"in {hook}")
        raise
