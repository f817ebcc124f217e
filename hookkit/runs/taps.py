"""From hooks to taps: which module, which side of it, which part of the tensor, and what to do there in which order.

Everything that can be checked without a forward is checked here. Nothing is registered on the model.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
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
from ..models.sites import LOGITS, AnySite, Site
from ..models.training import refuse_no_gradient
from ..models.views import SiteView, form_of

Reference = Callable[[Sequence[AnySite], tuple[Any, ...]], dict[AnySite, Captured]]


@dataclass(eq=False, slots=True)
class BoundHook:
    """One hook at one site, and what came of it."""

    number: int  # the hook's place in the order given
    hook: Hook
    site: AnySite
    where: Where  # the hook's, with a phrase's steps written out
    form: SiteView  # how the site stands in the module's tensor
    change: Change | None  # None for a capture
    head: bool  # at the unembedding, which may compute fewer positions than the rest of the model
    pieces: list[CapturedChunk] = field(default_factory=list)  # of the text that is running
    fired: int = 0  # forwards in which it did something
    doubts: list[Tensor] = field(
        default_factory=list
    )  # whether results of the forward that runs are refused
    last: Any = None  # the forward in which it did so last


@dataclass(eq=False)
class HookPoint:
    """One side of one module, with all that happens there, in the order of the hooks."""

    module: nn.Module
    place: ModuleLocation
    actions: list[BoundHook]
    reads_input: bool = False  # an edit needs what the module was given, beside what it gives
    only_looks: bool = (
        True  # all that is to be done is to copy the output of a module inside the model as it is
    )

    @property
    def key(self) -> tuple[str, str, int | str]:
        """The tensor, in words."""
        return self.place.path, self.place.side, self.place.item


def planned(lm: LM, hooks: Sequence[Hook], reference: Reference) -> list[HookPoint]:
    """The taps for these hooks, each checked against the model. `reference` captures sites on a reference's prompts."""
    taps: dict[ModuleLocation, HookPoint] = {}
    for number, hook in enumerate(hooks):
        if not isinstance(hook, Hook):
            raise BadHook(
                f"{hook!r} is a {type(hook).__name__} and no hook: make one with hk.capture, hk.steer, hk.force …"
            )
        if isinstance(hook, Capture) and hook.device is not None:
            check_device(hook.device)
        located = lm.located(hook.sites)
        referred = _once(lambda prompts, sites=tuple(located): reference(sites, prompts))
        edits = hook if isinstance(hook, EditHook) else None
        if isinstance(hook, Capture) and hook.grad:
            refuse_no_gradient(lm)
        looks = isinstance(hook, Capture) and hook.dtype is hook.device is None and not hook.grad
        reads_input = edits is not None and edits.reads_input
        where = hook.placed(lm)
        for site, place in located.items():
            change = _change(lm, edits, site, referred) if edits is not None else None
            where_at = place.tensor  # parts of one tensor share a tap
            tap = taps.get(where_at)
            if tap is None:
                tap = taps[where_at] = HookPoint(lm.submodule(place.path), where_at, [])
            tap.reads_input |= reads_input
            at_head = isinstance(site, Site) and site.name in LOGITS
            form = form_of(lm.layout, site, place)
            simple = form.plain and place.item == 0 and not place.shared
            tap.only_looks = (
                looks and not at_head and simple and not tap.actions and lm.ranks is None
            )
            tap.actions.append(BoundHook(number, hook, site, where, form, change, at_head))
    # the first one registered acts first: what the stream is comes before what reads it
    return sorted(taps.values(), key=lambda tap: not tap.place.shared)


def logits_tap(lm: LM, taps: list[HookPoint]) -> HookPoint:
    """The tap at the logits that the model returns, added where no hook asks for it. `Unsupported` if they are edited
    before they are there."""
    for tap in taps:
        for action in tap.actions:
            if action.change is not None and action.head and action.site != Site("logits"):
                raise Unsupported(
                    f"{action.hook} acts at {action.site}, before the logits that a trace reads as the model's own: "
                    "let it act at 'logits', or leave trace= out"
                )
    place = lm.place(Site("logits"))
    found = next((tap for tap in taps if tap.place == place), None)
    if found is None:
        found = HookPoint(lm.submodule(place.path), place, [], only_looks=False)
        taps.append(found)
    return found


def reader(lm: LM, site: AnySite) -> Callable[[Tensor], Tensor]:
    """The module that reads a site, as a function of all of it, also where this process has a part of its weights."""
    place = lm.place(site)
    forward = lm.submodule(place.path).forward
    ranks = lm.ranks
    split = None if ranks is None else ranks.splits.get((place.path, place.side, place.item))
    if ranks is None or split is None:
        return forward
    return lambda given: forward(ranks.part(given, replace(split, axis=given.ndim - 1)))


def check_device(name: str) -> None:
    """Raises `BadHook` where this machine has no such device, before anything runs."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise BadHook(
            f"device={name!r} is not on this machine: {str(error).splitlines()[0]}"
        ) from error


def _change(lm: LM, hook: EditHook, site: AnySite, referred: Callable[[Any], Any]) -> Change:
    try:
        return hook.change(Binding(lm, site, lambda prompts: referred(prompts)[site]))
    except Exception as error:
        error.add_note(f"in {hook}")
        raise


def _once(compute: Callable[[Any], Any]) -> Callable[[Any], Any]:
    known: list[Any] = []

    def computed(prompts: Any) -> Any:
        if not known:
            known.append(compute(prompts))
        return known[0]

    return computed


def picked(output: Any, place: ModuleLocation) -> Tensor:
    """The tensor at a module's output, or one of several; `BadEdit` where there is none."""
    item = place.item
    models_own = (
        item == "logits" and not place.path
    )  # a model may give its logits by themselves, or first
    found = None
    if isinstance(output, Tensor):
        found = output if item == 0 or models_own else None
    else:
        key: Any = 0 if models_own and isinstance(output, tuple) else item
        with suppress(KeyError, IndexError, TypeError):
            found = output[key]
    if not isinstance(found, Tensor):
        there = type(output).__name__ + (
            f" of {len(output)}" if isinstance(output, tuple | list) else ""
        )
        raise BadEdit(
            f"{place.path or 'the model'} gives a {there}, and item {item!r} of it is no tensor: "
            "say which is meant, hk.module(path, item=…)"
        )
    return found


def repacked(output: Any, item: int | str, new: Tensor) -> Any:
    """The same output with one tensor replaced, of the module's own kind: what reads it finds what it expects."""
    if isinstance(output, Tensor):
        return new
    if isinstance(output, tuple | list):
        place = item if isinstance(item, int) else 0
        items = [new if number == place else each for number, each in enumerate(output)]
        return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
    changed = copy.copy(output)  # a dict, or a ModelOutput, which is one and takes an index too
    changed[item if item in output or not isinstance(item, int) else list(output)[item]] = new
    return changed


def input_of(
    args: tuple[Any, ...], kwargs: dict[str, Any], item: int | str, where: str
) -> tuple[Tensor, int | str]:
    """The tensor that a module was given, and under which index or keyword."""
    if isinstance(item, str):
        key: int | str = item
    else:
        named = next((name for name in ("hidden_states", "input", "x") if name in kwargs), None)
        key = named if item == 0 and not args and named is not None else item
    found = args[key] if isinstance(key, int) and len(args) > key else kwargs.get(key)  # pyright: ignore
    if not isinstance(found, Tensor):
        raise BadEdit(
            f"{where} was given {len(args)} positional values and the keywords {', '.join(kwargs) or 'none'}, and "
            f"{item!r} is no tensor among them: say which is meant, hk.module(path, side='input', item=…)"
        )
    return found, key
