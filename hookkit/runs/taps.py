"""Hook points: from the user's hooks to the modules at which they act.

`build_hook_points` turns hooks into `HookPoint`s: one for each side of a module at which something
is done, with the bound hooks that act there in their order. All that can be checked without a
forward is checked here. Nothing is registered on the model here.
"""

import copy
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadEdit, BadHook, EmptySelection, OutOfRange, Unsupported
from ..hooks.base import Binding, Change, EditHook, Hook
from ..hooks.capture import Capture, Captured, CapturedChunk
from ..models.batch_positions import ForwardPass, SequenceBatch
from ..models.families.schema import ModuleLocation
from ..models.layout import SiteView, view_of
from ..models.lm import LM, refuse_no_gradient
from ..models.positions import Where
from ..models.sites import LOGIT_SITES, AnySite, Site
from .generation import Generation

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
    location: ModuleLocation
    actions: list[BoundHook]
    reads_input: bool = False  # True if an edit of the output also needs the module's input
    copies_output: bool = False  # True if all that is done is to copy a whole output tensor

    @property
    def key(self) -> tuple[str, str, int | str]:
        """The path, the side and the item, which identify the tensor."""
        return self.location.path, self.location.side, self.location.item


def build_hook_points(
    lm: LM, hooks: Sequence[Hook], reference: Reference, observers: Sequence[Hook] = ()
) -> list[HookPoint]:
    """Returns the hook points of these hooks, each checked against the model.

    `reference` captures sites on the prompts of a reference. `observers` are hooks of hookkit's
    own. They act after the user's hooks.
    """
    hook_points: dict[ModuleLocation, HookPoint] = {}
    for number, hook in enumerate((*hooks, *observers)):
        _check_hook(lm, hook)
        locations = lm.located(hook.sites)
        reference_value = _reference_values(tuple(locations), reference)
        where = hook.placed(lm)
        for site, location in locations.items():
            change = None
            if isinstance(hook, EditHook):
                change = _bind_edit(lm, hook, site, reference_value)
            hook_point = hook_points.get(location.tensor)  # all sites in a tensor share it
            if hook_point is None:
                hook_point = HookPoint(lm.submodule(location.path), location.tensor, [])
                hook_points[location.tensor] = hook_point
            hook_point.reads_input |= isinstance(hook, EditHook) and hook.reads_input
            view = view_of(lm.layout, site, location)
            at_head = isinstance(site, Site) and site.name in LOGIT_SITES
            is_observer = number >= len(hooks)
            bound = BoundHook(number, hook, site, where, view, change, at_head, is_observer)
            hook_point.copies_output = not hook_point.actions and _is_copy(bound, location)
            hook_point.actions.append(bound)
    return in_order_of_registration(hook_points.values())


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
            try:
                torch.empty(0, device=hook.device)
            # torch raises another class for each kind of device that is missing
            except (RuntimeError, AssertionError, NotImplementedError) as error:
                reason = str(error).splitlines()[0]
                raise BadHook(f"device={hook.device!r} is not on this machine: {reason}") from error
        if hook.grad:
            refuse_no_gradient(lm)


def _is_copy(bound_hook: BoundHook, location: ModuleLocation) -> bool:
    """True if all that a hook does is to copy a whole output, without a conversion or a move."""
    hook = bound_hook.hook
    return (
        isinstance(hook, Capture)
        and hook.dtype is hook.device is None
        and not hook.grad
        and not bound_hook.head
        and bound_hook.view.plain
        and location.item == 0
        and not location.shared
    )


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
    edit: EditHook,
    site: AnySite,
    reference_value: Callable[[AnySite, tuple[Any, ...]], Captured],
) -> Change:
    try:
        return edit.change(Binding(lm, site, partial(reference_value, site)))
    except Exception as error:
        error.add_note(f"in {edit}")
        raise


def logits_hook_point(lm: LM, hook_points: list[HookPoint]) -> HookPoint:
    """Returns the hook point at the logits that the model returns; adds it if no hook acts there.

    Raises `Unsupported` if an edit changes the logits before a trace can read them.
    """
    location, traced_point = lm.location(Site("logits")), None
    for hook_point in hook_points:
        if hook_point.location == location:
            traced_point = hook_point
        for bound_hook in hook_point.actions:
            is_edit = bound_hook.change is not None
            if is_edit and bound_hook.head and bound_hook.site != Site("logits"):
                raise Unsupported(
                    f"{bound_hook.hook} acts at {bound_hook.site}, before the logits that a trace "
                    "reads as the model's own: let it act at 'logits', or leave trace= out"
                )
    if traced_point is None:
        traced_point = HookPoint(lm.submodule(location.path), location, [])
        hook_points.append(traced_point)
    return traced_point


# ---- checks of positions before a forward


def check_positions(
    bound_hooks: Iterable[BoundHook], forward_pass: ForwardPass, generation: Generation | None
) -> None:
    """Raises if a hook names a position that the text cannot have, or selects nothing in a row.

    Only for a text whose length is known: one forward of prompts, or a `generate`.
    """
    text = forward_pass.text
    for bound_hook in one_per_selection(bound_hooks):
        first, end = _possible_columns(bound_hook, forward_pass, generation)
        for row, positions in enumerate(text.selected_positions(bound_hook.where)):
            if positions is None:
                continue
            columns = text.columns[row]
            last = bisect_left(columns, end)
            if not text.generating:
                last = min(last, text.lengths[row])
            possible = range(bisect_left(columns, first), last)
            if isinstance(positions, tuple):
                missing = [position for position in positions if position not in possible]
                if missing:
                    raise OutOfRange(
                        _out_of_range_message(
                            bound_hook, text, row, missing[0], possible, generation
                        )
                    )
            elif bisect_left(positions, possible.start) >= bisect_left(positions, possible.stop):
                at_logits = " at the logits" if bound_hook.head else ""
                raise EmptySelection(
                    f"{bound_hook.hook} selects nothing in row {row}, which has positions "
                    f"{first_to_last(possible)}{at_logits}: choose others, or leave the row out "
                    "with rows="
                )


def check_text(
    bound_hooks: Sequence[BoundHook], forward_pass: ForwardPass, generation: Generation | None
) -> None:
    """Raises if a hook names a position that the text of its first forward cannot have."""
    text = forward_pass.text
    _check_cached(bound_hooks, text)
    if text.final or generation is not None:
        check_positions(bound_hooks, forward_pass, generation)
        return
    for bound_hook in one_per_selection(bound_hooks):
        # raises for a phrase that is not in the text, or a position below 0
        text.selected_positions(bound_hook.where)


def _check_cached(bound_hooks: Iterable[BoundHook], text: SequenceBatch) -> None:
    """Raises for a hook at positions that are in a cache already, at which it did not act.

    A capture of all positions is allowed: it holds the positions that it has.
    """
    if not text.start:
        return
    for bound_hook in bound_hooks:
        everywhere = bound_hook.where.pos is None and bound_hook.where.step is None
        if bound_hook.head or (everywhere and bound_hook.change is None):
            continue
        for row in range(len(text.lengths)):
            position = text.first_missed_position(bound_hook.where, row)
            if position is None:
                continue
            error = Unsupported if everywhere else OutOfRange
            raise error(
                f"{bound_hook.hook} at {bound_hook.site} means position {position} of row {row}, "
                f"and the forward goes on from a cache that has columns 0 to {text.start - 1}: "
                "they are not read again, and the hook did not act there when the cache was "
                f"filled. Run the whole text, say pos=slice({text.start}, None), or fill the cache "
                "inside the same block"
            )


def one_per_selection(bound_hooks: Iterable[BoundHook]) -> Iterable[BoundHook]:
    """Returns one bound hook for each selection: a hook selects the same at all its sites."""
    by_selection = {
        (id(bound_hook.where), bound_hook.head): bound_hook for bound_hook in bound_hooks
    }
    return by_selection.values()


def _possible_columns(
    bound_hook: BoundHook, forward_pass: ForwardPass, generation: Generation | None
) -> tuple[int, int]:
    """The first column at which a hook can act, and the end of the columns that are read."""
    first = 0
    if generation is None:
        end = forward_pass.past + forward_pass.width
        if bound_hook.head:
            first = forward_pass.past + forward_pass.head.start
        return first, end
    if bound_hook.head:
        first = forward_pass.text.head or 0
    return first, generation.max_width - 1  # the last token is never read


def _out_of_range_message(
    bound_hook: BoundHook,
    text: SequenceBatch,
    row: int,
    position: int,
    possible: range,
    generation: Generation | None,
) -> str:
    length, new_tokens = text.lengths[row], 0
    if generation is not None:
        new_tokens = generation.max_width - generation.width
    meaning = f"{bound_hook.hook} means position {position} of row {row}"
    if bound_hook.where.step is not None:
        meaning = f"{bound_hook.hook} means step {position - length + 1} of row {row}"
        if generation is not None:
            return f"{meaning}, and at most {new_tokens} tokens are generated: steps count from 0"
        return (
            f"{meaning}, and a forward of the prompt has step 0 only: use generate for later steps"
        )
    if bound_hook.head and position < possible.start:
        return (
            f"{meaning}, where no logits are computed; they are at positions "
            f"{first_to_last(possible)} (forward with logits='all')"
        )
    if generation is None:
        return f"{meaning}, which has {length} tokens: positions 0 to {length - 1}"
    return (
        f"{meaning}, and with {new_tokens} new tokens the model reads positions "
        f"{first_to_last(possible)}"
    )


def first_to_last(positions: range) -> str:
    """Returns positions as text for a message."""
    return f"{positions[0]} to {positions[-1]}" if positions else "none"


# ---- the tensors of a module


def forward_of_site(lm: LM, site: AnySite) -> Callable[[Tensor], Tensor]:
    """Returns the forward of the module that reads a site, as a function of the whole site.

    This also holds where each process of a split model has a part of the module's weights.
    """
    location = lm.location(site)
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


def replace_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], key: int | str, new: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments of a module with one of them replaced, by its index or keyword."""
    if isinstance(key, str):
        return args, kwargs | {key: new}
    return (*args[:key], new, *args[key + 1 :]), kwargs
