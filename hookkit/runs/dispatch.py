"""What the hooks of a block do in each forward of the model.

`HookDispatcher` decides which calls of modules belong to a forward in which the hooks act, and
applies the hooks at each hook point. `DispatchState` holds what is known of the texts that run in
a block: to which text each forward belongs, its captures, and how it ended. Nothing is registered
on the model here.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from threading import get_ident
from typing import Any

from torch import Tensor, nn

from ..errors import Unsupported
from ..hooks.captured_values import CapturedChunk
from ..hooks.decided_tokens import Decisions
from ..hooks.logits import Force
from ..models.batch_positions import ForwardPass
from ..models.lm import LM
from ..models.padding import in_padding_trial
from ..models.prompts import positions_of_text
from ..models.scopes import CURRENT_SCOPES, PROGRESS, Scope, adopt_attached_scopes, has_open_scope
from ..models.sites import AnySite, Site
from ..models.views import full_sizes
from ..models.wrappers import wrappers_to_hook
from .acting import apply_hook
from .generation import (
    Generation,
    GenerationWatch,
    final_rows,
    plan_generation,
    text_ending,
    watch_generate,
    without_compilation,
)
from .outcomes import CaptureStore, check_cached, check_positions
from .overflow import forget, settle
from .taps import BoundHook, HookPoint, find_input, logits_hook_point, pick_output, replace_output
from .trace import Tracer
from .tracking import PositionTracker, arguments_by_name


class DispatchState:
    """The texts that have run since a block was entered. Owned by the `HookDispatcher`."""

    def __init__(self, lm: LM, bound_hooks: Sequence[BoundHook], tracer: Tracer | None) -> None:
        self.lm, self.bound_hooks, self.tracer = lm, bound_hooks, tracer
        self.tracker = PositionTracker(
            partial(positions_of_text, lm), "logits_to_keep" in lm.takes, lm.two_texts
        )
        self.captures = CaptureStore(bound_hooks)
        self.rows: list[list[int]] = []  # the tokens of each sequence of the last `generate`
        self.watch = GenerationWatch()

    @property
    def generating(self) -> bool:
        """True while a `generate` runs."""
        return self.tracker.generation is not None

    def begin_forward(self, arguments: Mapping[str, Any]) -> ForwardPass:
        """Returns the forward that begins with these arguments.

        Raises if a hook names a position that its text cannot have.
        """
        forward_pass, is_new_text = self.tracker.begin_forward(arguments)
        text = forward_pass.text
        self.captures.turn_to(text)
        if is_new_text:
            self._check_positions(forward_pass)
        if self.generating:
            text.history = self.watch.tokens
            text.ended_rows = self.watch.ended_rows
            if text.beams > 1:  # beams change rows from step to step
                self.tracker.remember_beams(forward_pass, self.watch.tokens)
        return forward_pass

    def _check_positions(self, forward_pass: ForwardPass) -> None:
        text, generation = forward_pass.text, self.tracker.generation
        check_cached(self.bound_hooks, text)
        if text.final or generation is not None:
            check_positions(self.bound_hooks, text, forward_pass, generation)
        selections = {id(bound_hook.where): bound_hook.where for bound_hook in self.bound_hooks}
        for where in selections.values():
            text.selected_positions(
                where
            )  # raises for a phrase that is not in the text, or a position below 0

    def plan_generation(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Generation:
        """Returns what a call of `generate` will do, or raises `Unsupported` with the reason."""
        if self.lm.two_texts:
            raise Unsupported(
                f"generate of an encoder-decoder ({type(self.lm.root).__name__}) runs its two "
                "parts by themselves: call the model with input_ids and decoder_input_ids in the "
                "block"
            )
        return plan_generation(self.lm.root, args, kwargs)

    def _with_every_position(self, kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Adds logits_to_keep where the model needs it to run its blocks at every position."""
        keep = self.lm.logits_to_keep(1)
        if keep == 1 or "logits_to_keep" in kwargs:
            return kwargs
        if all(bound_hook.head for bound_hook in self.bound_hooks):
            return kwargs
        return {**kwargs, "logits_to_keep": keep}

    def generate(
        self,
        plan: Generation,
        original: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        acts: Callable[[], bool] | None = None,
    ) -> Any:
        """Runs transformers' `generate` and follows each row from its prompt to its end.

        `acts` is true for those calls of the model's own methods that belong to this `generate`.
        """
        text = self.tracker.text = plan.text(self.tracker.find)
        self.tracker.generation = plan
        self.captures.turn_to(text)
        if self.tracer is not None:
            self.tracer.begin(plan)
        decisions = None
        if any(_decides(bound_hook) for bound_hook in self.bound_hooks):
            decisions = Decisions(text, plan.width if plan.embeddings else 0)
        try:
            with watch_generate(self.lm.root, self.tracer, decisions, acts) as self.watch:
                keywords = without_compilation(args, self._with_every_position(kwargs))
                output = original(*args, **keywords)
            sequences = output if isinstance(output, Tensor) else output.sequences
            self.rows = final_rows(plan, text, sequences, self.watch)
            ending = text_ending(plan, text, sequences, self.rows, self.tracker.histories)
            self.captures.finish(text, ending)
            if self.tracer is not None:
                prompt_lengths = [text.lengths[prompt] for prompt in ending.prompts]
                self.tracer.finish(self.rows, prompt_lengths, ending.sources)
        except BaseException:
            self.captures.forget(text)
            raise
        finally:
            self.tracker.generation = None
            self.tracker.histories = {}
        return output


def _decides(bound_hook: BoundHook) -> bool:
    """True if the hook decides on a token that `generate` has to take."""
    return isinstance(bound_hook.hook, Force) and bound_hook.hook.decides


class Stop(BaseException):
    """Ends a forward after the last hook has acted, where no output is needed.

    It is no `Exception`, so that code which handles errors does not catch it.
    """


ELSEWHERE = (
    "a block of hk.attach is open on this model in another thread or task, and hookkit cannot know "
    "whether its hooks are to act in this forward: leave the block first, give this code a block "
    "of its own, use hk.forward or hk.generate, or run it in the block's context, as "
    "asyncio.to_thread does and "
    "threading.Thread(target=contextvars.copy_context().run, args=(model.generate,))"
)


class HookDispatcher:
    """Applies the hooks of one block in the forwards of a model.

    The hooks act in the context that entered the block (see `models.scopes`). If `attached`, a
    forward of other code raises, unless another block or run of hookkit covers it; otherwise such
    a forward is a plain forward of the model. While a hook's own function runs, the modules that
    it calls are not hooked.
    """

    def __init__(
        self,
        lm: LM,
        hook_points: list[HookPoint],
        *,
        stop_early: bool,
        tracer: Tracer | None,
        attached: bool = False,
    ) -> None:
        self.lm, self.hook_points, self.tracer = lm, hook_points, tracer
        self._traced_point = None if tracer is None else logits_hook_point(lm, hook_points)
        bound_hooks: list[BoundHook] = []
        for hook_point in hook_points:
            bound_hooks += hook_point.actions
        self.bound_hooks = sorted(bound_hooks, key=lambda bound_hook: bound_hook.number)
        self._stop_early, self._attached = stop_early, attached
        self._wrappers = wrappers_to_hook(lm.wrapping)
        # the modules whose forward is a forward of the model, the outermost first
        self._entry_modules = (*self._wrappers, lm.root, *lm.decoder)
        self._times_left = 0  # how often the block was left
        self._reset()

    def _reset(self) -> None:
        """Sets the state to what it is when a block is entered."""
        self._scope = Scope(weakref.ref(self.lm.root), self._attached)
        self._state = DispatchState(self.lm, self.bound_hooks, self.tracer)
        self._firings = self._state.captures.firings
        self._pass: ForwardPass | None = None  # the current forward
        self._entered: nn.Module | None = None  # the module whose forward is the current one
        self._forward_thread = 0  # the thread of the current forward; 0 if there is none
        self._hook_thread = 0  # the thread in which a hook's own function runs
        self._generate_thread = 0  # the thread in which a `generate` runs
        # the model, if it was called during a `generate` and the call is no step of it
        self._unrelated: nn.Module | None = None
        self._recomputing = False  # True while a checkpointed block runs in the backward pass
        self._pending: set[BoundHook] = set()  # the hooks for which a forward has to go on

    # ---- whether the hooks act in a call

    def acts_here(self) -> bool:
        """True in the context that entered the block.

        Raises `Unsupported` if that cannot be decided.
        """
        if in_padding_trial():
            return False
        if self._scope in CURRENT_SCOPES.get():
            return self._scope.open
        if not self._attached or not self._scope.open:
            return False
        adopt_attached_scopes()
        if self._scope in CURRENT_SCOPES.get():
            return True
        if has_open_scope(self.lm.root):
            return False
        raise Unsupported(ELSEWHERE)

    def _acts_in_forward(self) -> bool:
        """`acts_here`, at a module inside the model."""
        if self._forward_thread == get_ident():
            return True
        return self._scope.open and self._scope in CURRENT_SCOPES.get()

    def _begins_forward(self, module: nn.Module) -> bool:
        """True if the call of a module begins a forward of the model in which the hooks act."""
        if not self._scope.open or in_padding_trial():
            return False
        self._refuse_replica(module)
        if not self.acts_here() or self._is_inside_forward(module):
            return False
        if self._state.generating and not self._is_generate_step():
            if self._attached:
                raise Unsupported(
                    "the model is called while a generate of the same block runs, and the call is "
                    "no step of it: call it after the generate, or give the generate a block of "
                    "its own"
                )
            if self._unrelated is None:
                self._unrelated = module
            return False
        self._unrelated = None
        return True

    def _refuse_replica(self, module: nn.Module) -> None:
        if module not in self._entry_modules:
            raise Unsupported(
                f"a replica of {type(self.lm.root).__name__} runs (nn.DataParallel makes one for "
                "each device), and hooks are for the model itself: run model.module"
            )

    def _is_inside_forward(self, module: nn.Module) -> bool:
        """True if a hook's own function, or a wrapper whose forward has begun, calls the module."""
        thread = get_ident()
        if self._hook_thread == thread:
            return True
        if self._entered is None:
            return False
        if self._forward_thread != thread:
            raise Unsupported(
                "two threads run the model inside one block: give each a block, or take turns"
            )
        order = self._entry_modules.index
        return order(self._entered) < order(module)

    def _is_generate_step(self) -> bool:
        return self._generate_thread == get_ident() and self._state.watch.begins_step()

    # ---- one forward

    def _on_forward_start(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> None:
        if not self._begins_forward(module):
            return
        self._pass = self._begin_forward(module, args, kwargs or {})
        self._entered, self._forward_thread = module, get_ident()
        PROGRESS.forwards += 1
        forget(self.bound_hooks)
        if self._stop_early:
            self._pending = set(self.bound_hooks)

    def _begin_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> ForwardPass:
        return self._state.begin_forward(arguments_by_name(module, self.lm.root, args, kwargs))

    def _on_forward_end(self, module: nn.Module, args: object, output: object) -> None:
        if module is self._unrelated:
            self._unrelated = None
            return
        if module is not self._entered or in_padding_trial():
            return
        if self._forward_thread == get_ident() and not self._hook_thread:
            if self._pass is not None:
                self._state.tracker.end_forward(self._pass, output)
            self._clear_forward()
            settle(self.bound_hooks)

    def _clear_forward(self) -> None:
        """Notes that no forward runs. A forward that was interrupted does not come to its end."""
        self._entered = self._pass = self._unrelated = None
        self._forward_thread = 0

    def _refuse_outside_forward(self, hook_point: HookPoint) -> None:
        """Raises if a module was called in the block, but outside a forward of the model."""
        if self._unrelated is not None or not self._scope.open:
            return
        if self._scope in CURRENT_SCOPES.get() and not in_padding_trial():
            raise Unsupported(
                f"{hook_point.place.path!r} was called by itself, outside a forward of "
                f"{type(self.lm.root).__name__}: its rows and positions are unknown. Call the "
                "model, or attach to the module that is called"
            )

    def _recomputation(self) -> Callable[[], AbstractContextManager[None]]:
        """Returns a function that makes a context manager: in it, the current forward goes on."""
        return partial(self._recompute, self._pass, self._times_left)

    @contextmanager
    def _recompute(self, forward_pass: ForwardPass | None, times_left: int) -> Iterator[None]:
        """A context in which a checkpointed block runs again, as a part of an earlier forward."""
        if times_left != self._times_left:
            raise Unsupported(
                "backward() ran after the block was left, and gradient checkpointing runs the "
                "model again, without the hooks: call backward() inside the block, or "
                "model.gradient_checkpointing_disable()"
            )
        outer_pass, outer_thread = self._pass, self._forward_thread
        self._pass, self._forward_thread = forward_pass, get_ident()
        self._recomputing = True
        try:
            yield
        finally:
            self._pass, self._forward_thread = outer_pass, outer_thread
            self._recomputing = False

    # ---- the work at one hook point

    # torch calls a hook without the keywords if another thread removes it at that moment

    def _on_input(
        self,
        hook_point: HookPoint,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if self._forward_thread != get_ident():
            return self._refuse_outside_forward(hook_point)
        if self._hook_thread or in_padding_trial():
            return None
        kwargs = kwargs or {}
        location = hook_point.place
        tensor, key = find_input(args, kwargs, location.item, location.path)
        new = self._apply_hooks(hook_point, tensor)
        if new is tensor:
            return None
        return replace_input(args, kwargs, key, new)

    def _on_copied_output(
        self, hook_point: HookPoint, module: nn.Module, args: Any, output: Any
    ) -> Any:
        """`_on_output`, with a short path for the most common work: to copy a whole tensor."""
        if self._forward_thread != get_ident():
            return self._refuse_outside_forward(hook_point)
        forward_pass, bound_hook = self._pass, hook_point.actions[0]
        selection = None
        if forward_pass is not None and not self._hook_thread and not in_padding_trial():
            selection = forward_pass.whole(bound_hook.where)
        if (
            forward_pass is None
            or selection is None
            or type(output) is not Tensor
            or output.requires_grad
            or forward_pass.inference
        ):
            return self._on_output(hook_point, module, args, output)
        if self._recomputing:
            return None
        shape = output.shape
        if (
            shape[:2] != forward_pass.shape
            or bound_hook.last_pass is forward_pass
            or hook_point.place.item != 0
        ):
            return self._on_output(hook_point, module, args, output)
        bound_hook.last_pass = forward_pass
        bound_hook.fired += 1
        number = forward_pass.number
        bound_hook.pieces.append(CapturedChunk(number, selection, output.clone()))
        self._firings.append((bound_hook, number, selection, shape[2:], None))
        if self._stop_early:
            self._stop_if_done(hook_point)
        return None

    def _on_output(
        self, hook_point: HookPoint, module: nn.Module, args: Any, *kwargs_and_output: Any
    ) -> Any:
        if self._forward_thread != get_ident():
            return self._refuse_outside_forward(hook_point)
        if self._hook_thread or in_padding_trial():
            return None
        output, location = kwargs_and_output[-1], hook_point.place
        tensor = pick_output(output, location)
        module_input = None
        if hook_point.reads_input:
            module_input, _ = find_input(args, kwargs_and_output[0], 0, location.path)
        new = self._apply_hooks(hook_point, tensor, module_input)
        if new is tensor:
            return None
        if location.item == "logits" and getattr(output, "loss", None) is not None:
            raise Unsupported(
                "the model has computed its loss from the unedited logits: leave labels out, and "
                "compute the loss from the logits that come back"
            )
        return replace_output(output, location.item, new)

    def _on_inside(
        self, hook_points: dict[int | str, HookPoint], name: str, tensor: Tensor
    ) -> Tensor:
        """Applies the hooks at a tensor inside a module's forward."""
        if name not in hook_points:
            return tensor
        if self._forward_thread != get_ident():
            self._refuse_outside_forward(hook_points[name])
            return tensor
        if self._hook_thread or in_padding_trial():
            return tensor
        return self._apply_hooks(hook_points[name], tensor)

    def _apply_hooks(
        self, hook_point: HookPoint, tensor: Tensor, module_input: Tensor | None = None
    ) -> Tensor:
        """Applies all hooks at one hook point; returns the tensor with which the model goes on."""
        forward_pass = self._pass
        assert forward_pass is not None
        ranks = self.lm.ranks
        if ranks is None:
            return self._apply_to_whole(hook_point, forward_pass, tensor, module_input)
        site = self._site(hook_point)
        sizes = full_sizes(self.lm.layout, site, self.lm.place(site))

        def apply(whole: Tensor) -> Tensor:
            return self._apply_to_whole(hook_point, forward_pass, whole, module_input)

        return ranks.around(hook_point.key, tensor, sizes, apply)

    def _site(self, hook_point: HookPoint) -> AnySite:
        """Returns one of the sites of a hook point."""
        return hook_point.actions[0].site if hook_point.actions else Site("logits")

    def _apply_to_whole(
        self,
        hook_point: HookPoint,
        forward_pass: ForwardPass,
        tensor: Tensor,
        module_input: Tensor | None,
    ) -> Tensor:
        """`_apply_hooks`, on a tensor of which no other process has a part."""
        tracer = self.tracer if hook_point is self._traced_point else None
        if tracer is not None:
            tracer.before(forward_pass.number, tensor)
        self._hook_thread = self._forward_thread
        try:
            for bound_hook in hook_point.actions:
                if self._recomputing:  # the same work, but nothing of it is stored
                    bound_hook = replace(bound_hook, pieces=[], last_pass=None)
                before = tensor
                try:
                    firing, tensor = apply_hook(
                        bound_hook, hook_point, forward_pass, before, module_input
                    )
                except Exception as error:
                    number = forward_pass.number
                    error.add_note(f"in {bound_hook.hook} at {bound_hook.site}, forward {number}")
                    raise
                if firing is not None and not self._recomputing:
                    self._firings.append(firing)
                if tracer is not None and tensor is not before:
                    tracer.changed(bound_hook.hook, before, tensor)
        finally:
            self._hook_thread = 0
        if tracer is not None:
            tracer.after(tensor)
        if self._stop_early:
            self._stop_if_done(hook_point)
        return tensor

    def _stop_if_done(self, hook_point: HookPoint) -> None:
        """Ends the forward if the hooks at this hook point were the last ones."""
        self._pending.difference_update(hook_point.actions)
        if not self._pending:
            settle(self.bound_hooks)
            raise Stop


def replace_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], key: int | str, new: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments of a module with one of them replaced, by its index or keyword."""
    if isinstance(key, str):
        return args, kwargs | {key: new}
    return (*args[:key], new, *args[key + 1 :]), kwargs
