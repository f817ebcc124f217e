"""HookManager: registers the hooks of a block on the model, and removes them.

This is the only file that registers hooks on modules. What is registered: each hook point, hooks
inside attention modules, the start and end of each forward, gradient checkpointing (a checkpointed
block runs again in the backward pass, with the hooks that acted in its forward), and `generate`.
Compiled code runs uncompiled while a block is open: what was compiled before would not call hooks.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain
from threading import get_ident
from typing import Any, TypeVar

import pandas as pd
import torch
from torch import Tensor, nn

from ..arguments import check_arguments
from ..display import count_of, describe_outcome
from ..errors import NotCaptured, Unsupported
from ..hooks.base import Hook
from ..hooks.capture import Captured, Captures, capture, merge_captures
from ..models.attention import intercept_tensors
from ..models.families.schema import Family
from ..models.lm import LM, as_lm
from ..models.model_setup import (
    checkpointing_parents,
    is_in_checkpointed_block,
    refuse_virtual_tokens,
    warn_of_dropout,
    wrappers_to_hook,
)
from ..models.overrides import (
    Overrides,
    current_modes,
    enter_scope,
    leave_scope,
    remove_modes_except,
    suspend_scope,
)
from ..models.prompts import Batch, as_batch
from ..models.sites import AnySite, Site, Sites
from .dispatch import HookDispatcher, HookStrategy
from .hook_points import HookPoint, build_hook_points, sort_bound_hooks
from .run import CaptureStore
from .text_hooks import Stop, TextHooks, logits_hook_point
from .trace import Tracer

REFERENCE_BATCH = 16  # prompts of a reference that run together
LIBRARIES = ("transformers", "accelerate", "peft", "torch")  # whose hooks are no hooks of the user


@check_arguments
def attach(model: LM | nn.Module, *hooks: Hook) -> HookManager:
    """Returns a context manager: in its block, the hooks act in every forward of a model.

    `model` is an LM, or any `nn.Module`, whose sites are named with `hk.module(path)`. The hooks
    are checked against the model here, before anything is registered. Blocks can be left in any
    order.

    The hooks act in the thread or asyncio task that enters the block, and in what it starts in its
    context: tasks, `asyncio.to_thread(…)`,
    `threading.Thread(target=contextvars.copy_context().run, args=(model.generate,))`. While the
    block is open, a forward of other threads and tasks raises `Unsupported`, because hookkit
    cannot know whether the hooks are to act in it. In a block of their own, in `hk.forward` and in
    `hk.generate`, other threads and tasks have their own hooks and none of these.

    >>> with attach(lm, force(" coffee"), capture("resid_post.6")) as manager:
    ...     output = lm.model.generate(**inputs, max_new_tokens=4, do_sample=False)
    >>> manager["resid_post.6"].shape
    torch.Size([1, 9, 576])
    """
    manager = HookManager(as_lm(model), hooks, attached=True)
    warn_of_dropout(manager.lm.root)
    return manager


Block = TypeVar("Block", bound="HookBlock")


class HookBlock:
    """Registers hook points on a model for the time of a `with` block.

    Each time that the block is entered, `make_strategy` makes what applies the hooks, and
    `add_changes` is called with the block when all hooks are registered, to change the model more.
    With `alone`, the hooks of no other block act in it.
    """

    def __init__(
        self,
        lm: LM,
        hook_points: Sequence[HookPoint],
        make_strategy: Callable[[], HookStrategy],
        add_changes: Callable[[Any], None],
        *,
        attached: bool = False,
        alone: bool = False,
    ) -> None:
        lm.refuse_engine("hooks were to be put on a model")
        self.lm, self.hook_points = lm, hook_points
        self.overrides = Overrides()  # what is registered on the model
        self._make_strategy, self._add_changes = make_strategy, add_changes
        self._attached, self._alone = attached, alone
        self._wrappers = wrappers_to_hook(lm.wrapping)
        self._depth = 0  # how many `with` statements are in the block
        self._start_anew()

    def _start_anew(self) -> None:
        modules = (*self._wrappers, self.lm.root, *self.lm.decoder, *self.lm.stack_modules)
        self.strategy = self._make_strategy()
        self.dispatcher = HookDispatcher(self.lm, self.strategy, modules, attached=self._attached)

    def __enter__(self: Block) -> Block:
        try:
            if self._depth == 0:
                self._start_anew()
                enter_scope(self.dispatcher.scope, alone=self._alone)
                self._register()
            elif not self.dispatcher.acts_here():
                raise Unsupported(
                    "another thread or task has entered this block: make a block for each"
                )
            self._depth += 1
        except BaseException:
            if self._depth == 0:
                self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, *_: object
    ) -> None:
        if self._depth > 1:
            self._depth -= 1
            return
        try:
            was_open = self.close()
        except BaseException:
            self.close()  # Ctrl-C may have come before the first hook was removed
            raise
        if kind is None and was_open:
            self.strategy.finish()
        if (
            isinstance(error, RuntimeError)
            and "mutated during iteration" in str(error)
            and error.__context__
        ):
            # torch iterates over a module's hooks to pass an error on; if another thread removes a
            # hook at that moment, this new error hides the first one
            raise error.__context__ from None

    def close(self) -> bool:
        """Removes all hooks from the model. True if they were on it; it may be called twice."""
        was_open, self._depth = self._depth > 0, 0
        try:
            self.overrides.restore()
        finally:
            leave_scope(self.dispatcher.scope, alone=self._alone)
            self.dispatcher.clear_forward()
        return was_open

    def __reduce__(self) -> Any:
        raise Unsupported(
            "a block cannot be copied: make another with hk.attach; its captures are manager.texts"
        )

    def _register(self) -> None:
        """Registers all hooks. Each is noted first in `overrides`, which removes it at the end."""
        overrides, dispatcher = self.overrides, self.dispatcher
        overrides.add_cleanup(partial(_restore_modes, get_ident(), current_modes()))
        refuse_virtual_tokens(self.lm.wrapping)
        if "torch._dynamo" in sys.modules:
            run_uncompiled(overrides)
        inside: dict[nn.Module, dict[int | str, HookPoint]] = {}
        for hook_point in self.hook_points:
            if hook_point.location.side == "inside":
                inside.setdefault(hook_point.module, {})[hook_point.location.item] = hook_point
            else:
                self._register_hook_point(hook_point)
        for module, hook_points in inside.items():
            self._register_inside(module, hook_points)
        paths = (hook_point.location.path for hook_point in self.hook_points)
        for module in checkpointing_parents(self.lm.root, paths):
            name, applies = "_gradient_checkpointing_func", dispatcher.acts_in_forward
            overrides.wrap_method(module, name, dispatcher.checkpoint, applies)
        for module in dispatcher.entry_modules:
            self.register_at_input(module, ForwardBoundary(dispatcher.on_forward_start))
            end = ForwardBoundary(dispatcher.on_forward_end)
            overrides.remove_hook_on_exit(module, "_forward_hooks", end)
            module.register_forward_hook(end, always_call=True)
        self._add_changes(self)

    def _register_inside(self, module: nn.Module, hook_points: dict[int | str, HookPoint]) -> None:
        """Registers the hooks at tensors inside a module, such as the scores of its attention."""
        intercept_tensors(
            self.overrides,
            module,
            self._family_of(hook_points.values()).attention,
            frozenset(map(str, hook_points)),
            partial(self.dispatcher.on_inside, hook_points),
            self.lm.layout.verified.setdefault(module, set()),
            self.dispatcher.acts_in_forward,
        )

    def _family_of(self, hook_points: Iterable[HookPoint]) -> Family:
        """Returns the row of the stack in which these hook points are."""
        for bound_hook in chain.from_iterable(point.actions for point in hook_points):
            if isinstance(bound_hook.site, Site):
                return self.lm.layout.of_stack(bound_hook.site).family
        return self.lm.family

    def _register_hook_point(self, hook_point: HookPoint) -> None:
        """Registers the hooks at one side of a module.

        Hooks at the model's own input or output are registered on the wrappers around it too
        (of PEFT, say), because a wrapper may call the model without its hooks.
        """
        function, modules = self.dispatcher.on_output, (hook_point.module,)
        if hook_point.location.side == "input":
            function = self.dispatcher.on_input
        hook = RegisteredHook(function, hook_point)
        if hook_point.module is self.lm.root and self._wrappers:
            hook = RegisteredHook(self.dispatcher.if_outermost, hook)
            modules = (*self._wrappers, self.lm.root)
        for module in modules:
            if hook_point.location.side == "input":
                self.register_at_input(module, hook)
                let_outer_blocks_go_first(module._forward_pre_hooks)
                continue
            self.overrides.remove_hook_on_exit(module, "_forward_hooks", hook)
            module.register_forward_hook(hook, prepend=True, with_kwargs=hook_point.reads_input)
            let_outer_blocks_go_first(module._forward_hooks)

    def register_at_input(self, module: nn.Module, hook: RegisteredHook) -> None:
        """Registers a hook that acts before all others at a module's input."""
        self.overrides.remove_hook_on_exit(module, "_forward_pre_hooks", hook)
        module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)


class HookManager(HookBlock):
    """Registers the hooks of one block on the model, and returns their captures and their log.

    The hooks of one block act in the order in which they were passed. Blocks can be nested: the
    hooks of an outer block act first. A block can be entered again after it was left; it then
    starts anew. `observers` are captures of hookkit's own: the user sees them neither in `texts`
    nor in the log. With `keeps_tensors`, captures of a forward may keep the model's own tensors:
    the caller asks `strategy.kept` whether the forward has to run again.
    """

    strategy: TextHooks

    def __init__(
        self,
        lm: LM,
        hooks: Sequence[Hook],
        *,
        observers: Sequence[Hook] = (),
        stop_early: bool = False,
        tracer: Tracer | None = None,
        attached: bool = False,
        keeps_tensors: bool = False,
    ) -> None:
        reference = partial(capture_reference, lm)
        hook_points = build_hook_points(lm, hooks, reference, observers, sources=True)
        traced_point = None if tracer is None else logits_hook_point(lm, hook_points)
        bound_hooks = sort_bound_hooks(hook_points)
        self._readers = [hook.reader for hook in bound_hooks if hook.reader is not None]
        make_strategy = partial(
            TextHooks,
            lm,
            bound_hooks,
            tracer,
            traced_point,
            stop_early=stop_early,
            keeps_tensors=keeps_tensors,
        )
        replace_generate = HookManager._replace_generate  # a bound method would make a cycle
        super().__init__(lm, hook_points, make_strategy, replace_generate, attached=attached)

    def _replace_generate(self) -> None:
        for reader in self._readers:
            self.overrides.add_cleanup(reader.release)
        if callable(getattr(self.lm.root, "generate", None)):
            acts_here = self.dispatcher.acts_here
            self.overrides.wrap_method(self.lm.root, "generate", self._generate, acts_here)

    def _generate(self, inner: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Runs in place of the model's `generate`."""
        if self.lm.decodes_in_pieces and self.dispatcher.hook_thread != get_ident():
            raise Unsupported(
                f"generate of {type(self.lm.root).__name__} decodes a long sound in pieces, and "
                "returns other tokens than its decoder read: hk.generate decodes one piece, with "
                "the tokens for its language and task as decoder_input_ids"
            )
        return self.generate(inner, *args, **kwargs)

    def generate(self, inner: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Calls transformers' `generate`, and follows the text through its steps."""
        scope = self.dispatcher.scope
        if self.dispatcher.hook_thread == get_ident():
            return inner(*args, **kwargs)
        if self.strategy.generating:  # called in a logits processor, for example
            if scope.attached:
                raise Unsupported(
                    "a generate inside a generate of the same block: give each a block of its own"
                )
            with suspend_scope(scope):
                return inner(*args, **kwargs)
        self.dispatcher.clear_forward()  # of a forward that was interrupted
        return self.strategy.generate(inner, args, kwargs, scope)

    def refuse_checkpoints(self) -> None:
        """Raises `Unsupported` for a hook in a block that runs again in backward()."""
        root = self.lm.root
        if not root.training:
            return
        for hook_point in self.hook_points:
            if is_in_checkpointed_block(root, hook_point.location.path):
                hook = next((action.hook for action in hook_point.actions), "a transcoder's input")
                raise Unsupported(
                    f"{hook} stands in a block with gradient checkpointing, "
                    "which runs again in backward(), without the hook: call "
                    "model.gradient_checkpointing_disable() or model.eval(), or run the model and "
                    "backward() inside a block of hk.attach"
                )

    def expect(self, batch: Batch, prompt_lengths: Sequence[int] | None = None) -> None:
        """Sets the prompts of the next forward or generate, which are then not read back.

        With `prompt_lengths`, so many tokens of each row are its prompt, and the rest of it counts
        as generated.
        """
        self.strategy.tracker.expect(batch, prompt_lengths)

    # ---- the results

    def __repr__(self) -> str:
        hooks = count_of(len(self.captures.bound_hooks), "hook")
        text = f"HookManager({hooks}; {count_of(len(self.texts), 'text')} so far)"
        return describe_outcome(text, "manager.texts", "manager.captured(site)")

    @property
    def captures(self) -> CaptureStore:
        """The captures and firings of the hooks."""
        return self.strategy.captures

    @property
    def rows(self) -> list[list[int]]:
        """The tokens of each sequence that the last `generate` returned."""
        return self.strategy.rows

    @property
    def texts(self) -> list[Captures]:
        """The captures of each text.

        A text is one forward with the decoding steps that go on from it, or one `generate`.
        """
        return self.captures.texts()

    def captured(self, site: str | AnySite, name: str | None = None) -> Captured:
        """Returns the values at a site, with their rows and positions, if one text has run."""
        return self._only_text().captured(site, name)

    def __getitem__(self, key: str | AnySite | tuple[str | AnySite, str]) -> Tensor:
        return self._only_text()[key]

    @property
    def sites(self) -> Sites:
        """The sites that have values."""
        return self._only_text().sites

    def _only_text(self) -> Captures:
        texts = self.texts
        if not texts:
            raise NotCaptured(
                "no forward of the model has run in this block, so nothing was captured"
            )
        if len(texts) > 1:
            raise NotCaptured(
                f"{len(texts)} texts ran in this block, and one is meant: ask "
                "manager.texts[0][site], and so on"
            )
        return texts[0]

    @property
    def log(self) -> pd.DataFrame:
        """Where each hook fired: one row for each hook, site, forward and row of the batch."""
        return self.captures.log()


def capture_reference(
    lm: LM, sites: Sequence[AnySite], prompts: tuple[Any, ...]
) -> dict[AnySite, Captured]:
    """Returns the values at these sites on other prompts."""
    parts: dict[AnySite, list[Captured]] = {site: [] for site in sites}
    for start in range(0, len(prompts), REFERENCE_BATCH):
        batch = as_batch(lm, list(prompts[start : start + REFERENCE_BATCH]))
        inputs = batch.inputs(lm)
        manager = HookManager(lm, [capture(sites)], stop_early=True)
        try:
            with torch.no_grad(), manager, suppress(Stop):
                manager.expect(batch)
                lm.model(**inputs)
        finally:
            manager.close()  # again, since Ctrl-C may have come before `__exit__` began
        for site in sites:
            parts[site].append(manager.captured(site))
    return {site: merge_captures(captured) for site, captured in parts.items()}


# ---- hooks on modules


class RegisteredHook(functools.partial):
    """A hook that a `HookManager` has registered. Its type tells it from hooks of other code."""

    @property
    def dispatcher(self) -> Any:
        """The `HookDispatcher` that the hook calls."""
        return self.func.__self__  # pyright: ignore[reportFunctionMemberAccess]


class ForwardBoundary(RegisteredHook):
    """A registered hook that changes nothing itself: it acts where a forward begins or ends."""


def let_outer_blocks_go_first(hooks: Any) -> None:
    """Moves the hooks of outer blocks before the hook that was put first."""
    if len(hooks) == 1:
        return
    outer = [key for key, hook in list(hooks.items())[1:] if type(hook) is RegisteredHook]
    for key in reversed(outer):
        hooks.move_to_end(key, last=False)


def find_user_hooks(root: nn.Module) -> list[str]:
    """Returns the paths of the modules that carry hooks of the user's own.

    Hooks of libraries do not count. Raises `Unsupported` inside a block of hk.attach.
    """
    paths = []
    for path, module in root.named_modules():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if isinstance(hook, RegisteredHook):
                if hook.dispatcher.acts_here():
                    raise Unsupported(
                        "a sweep inside a block of hk.attach: leave the block, and give its hooks "
                        "as base_hooks=[…]"
                    )
                continue  # a block of another thread, which does not act here
            module_name = getattr(hook, "__module__", None) or type(hook).__module__
            if module_name.partition(".")[0] not in LIBRARIES:
                paths.append(path)
    return paths


def _restore_modes(thread: int, before: list[Any]) -> None:
    """Removes the modes of an interrupted forward, in the thread that had these modes before."""
    if get_ident() != thread:
        return
    error = sys.exc_info()[1]
    if error is not None and not isinstance(error, Exception):
        _end_interrupted_contexts(error)
    remove_modes_except(before)


def _end_interrupted_contexts(error: BaseException) -> None:
    """Ends the context managers of generators that Ctrl-C left between their steps.

    torch sets a mode aside in such a context manager. If Ctrl-C comes just before its body begins,
    Python ends the generator when the frames of the traceback are freed, which is after the model
    was restored, and torch puts the mode back then. Clearing these frames ends it now.
    """
    visited: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        current = pending.pop()
        if current is None or id(current) in visited:
            continue
        visited.add(id(current))
        pending += [current.__context__, current.__cause__]
        step = current.__traceback__
        while step is not None:
            if step.tb_frame.f_code.co_filename == contextlib.__file__:
                with contextlib.suppress(RuntimeError):  # the frame is running
                    step.tb_frame.clear()
            step = step.tb_next


# ---- compiled code

# torch has one stance for the whole process: "force_eager" is set for the first block, and taken
# back with the last one, in whatever order blocks are left. Owned by the two functions below.
_LOCK = threading.RLock()
_UNCOMPILED_BLOCKS: set[object] = set()
_STANCES: list[Any] = []  # the stance of the first block, which restores the one before


def run_uncompiled(overrides: Overrides) -> None:
    """Lets compiled code run uncompiled until `overrides` are undone.

    A compiled model ignores hooks that are registered after its first call.
    """
    block = object()
    overrides.add_cleanup(partial(_restore_compilation, block))
    with _LOCK:
        _UNCOMPILED_BLOCKS.add(block)
        if not _STANCES:
            _STANCES.append(torch.compiler.set_stance("force_eager"))


def _restore_compilation(block: object) -> None:
    with _LOCK:
        _UNCOMPILED_BLOCKS.discard(block)
        while _STANCES and not _UNCOMPILED_BLOCKS:
            _STANCES[-1].__exit__(None, None, None)
            _STANCES.pop()
