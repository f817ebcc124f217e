"""What the hooks of a block do in each forward of the model: where one begins and ends, and the work at every place.

The texts that run in a block: which one each forward is of, what its captures kept, and how it ended.
"""

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from threading import get_ident
from typing import Any

from torch import Tensor, nn

from ..errors import Unsupported
from ..hooks.captured_values import CapturedChunk, Captures
from ..hooks.decided_tokens import Decisions
from ..hooks.logits import Force
from ..models.batch_positions import ForwardPass
from ..models.lm import LM
from ..models.padding import unseen
from ..models.prompts import cover
from ..models.scopes import HERE, PROGRESS, Scope, adopt, has_scope
from ..models.sites import AnySite, Site
from ..models.views import full_sizes
from ..models.wrappers import called
from . import generation
from .acting import act
from .generation import Generation
from .outcomes import CaptureStore, check_cached, check_possible
from .overflow import forget, settle
from .taps import BoundHook, HookPoint, input_of, logits_tap, picked, repacked
from .trace import Tracer
from .tracking import PositionTracker, named, plain_ending


class DispatchState:
    """The texts since a block was entered. The tracer, if there is one, is told of each `generate`."""

    def __init__(self, lm: LM, actions: Sequence[BoundHook], tracer: Tracer | None) -> None:
        self.lm, self.actions, self.tracer = lm, actions, tracer
        self.follower = PositionTracker(
            functools.partial(cover, lm), "logits_to_keep" in lm.takes, lm.two_texts
        )
        self.keeping = CaptureStore(actions)
        self.rows: list[
            list[int]
        ] = []  # the tokens of each sequence that the last `generate` returned
        self._watch = generation.Watch()
        self._decides = any(
            isinstance(action.hook, Force) and action.hook.decides for action in actions
        )

    @property
    def generating(self) -> bool:
        """True while a `generate` runs."""
        return self.follower.generation is not None

    def call(self, given: Mapping[str, Any]) -> ForwardPass:
        """The forward that begins with these arguments, its hooks' wishes held against what the text can give."""
        call, begins = self.follower.call(given)
        self.keeping.turn_to(call.text)
        if begins:
            self._check_possible(call)
        if self.generating:
            call.text.history = self._watch.tokens
            call.text.ended_rows = self._watch.ended_rows
            if call.text.beams > 1:  # beams change rows from step to step
                self.follower.remember(call, self._watch.tokens)
        return call

    def _check_possible(self, call: ForwardPass) -> None:
        text, plan = call.text, self.follower.generation
        check_cached(self.actions, text)
        if text.final or plan is not None:
            check_possible(self.actions, text, call, plan)
        for where in {id(action.where): action.where for action in self.actions}.values():
            text.wishes(
                where
            )  # raises for a text that is not there, or a position before the first

    def gave(self, call: ForwardPass, output: Any) -> None:
        """A forward is over."""
        self.follower.gave(call, output)

    def finish(self) -> None:
        """Hold what was kept of the texts that no `generate` made."""
        self.keeping.finish_all(plain_ending)

    def check_fired(self) -> None:
        """Raise `NeverFired` for a hook that did nothing, or not all that it was to do."""
        self.keeping.check_fired(self.follower.forwards)

    @property
    def kept(self) -> list[Captures]:
        """What the captures kept, a text each."""
        return self.keeping.texts(plain_ending)

    def plan(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Generation:
        """What a call of `generate` is going to do, or `Unsupported` with the reason."""
        if self.lm.two_texts:
            raise Unsupported(
                f"generate of an encoder-decoder ({type(self.lm.root).__name__}) runs its two parts by themselves: "
                "call the model with input_ids and decoder_input_ids in the block"
            )
        return generation.read(self.lm.root, args, kwargs)

    def _with_every_position(self, kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The arguments of `generate`, so that every block reads every position of the prompt where hooks need it."""
        keep = self.lm.logits_to_keep(1)
        if keep == 1 or "logits_to_keep" in kwargs or all(action.head for action in self.actions):
            return kwargs
        return {**kwargs, "logits_to_keep": keep}

    def begins_step(self) -> bool:
        """True where the forward that begins is a step of the `generate` that runs."""
        return self._watch.begins_step()

    def generate(
        self,
        plan: Generation,
        original: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        acts: Callable[[], bool] | None = None,
    ) -> Any:
        """transformers' `generate`, followed from its prompts to the end of each row.

        `acts` says which calls of the model's own methods are of it.
        """
        text = self.follower.text = plan.text(self.follower.find)
        self.follower.generation = plan
        self.keeping.turn_to(text)
        if self.tracer is not None:
            self.tracer.begin(plan)
        decisions = Decisions(text, plan.width if plan.embeddings else 0) if self._decides else None
        try:
            with generation.watched(self.lm.root, self.tracer, decisions, acts) as self._watch:
                output = original(
                    *args, **generation.eager(args, self._with_every_position(kwargs))
                )
            sequences = output if isinstance(output, Tensor) else output.sequences
            self.rows = generation.final_rows(plan, text, sequences, self._watch)
            ending = generation.ending(plan, text, sequences, self.rows, self.follower.histories)
            self.keeping.finish(text, ending)
            if self.tracer is not None:
                self.tracer.finish(
                    self.rows, [text.lengths[prompt] for prompt in ending.prompts], ending.sources
                )
        except BaseException:
            self.keeping.forget(text)
            raise
        finally:
            self.follower.generation = None
            self.follower.histories = {}
        return output


class Stop(BaseException):
    """Raised inside a forward once everything that was asked of it is there.

    It is no error: nothing that catches errors on its way is meant to.
    """


ELSEWHERE = (
    "a block of hk.attach is open on this model in another thread or task, and whether this forward is "
    "meant to be in it cannot be told: leave the block first, give this code a block of its own, use "
    "hk.forward or hk.generate, or run it in the block's context, as asyncio.to_thread does and "
    "threading.Thread(target=contextvars.copy_context().run, args=(model.generate,))"
)


class HookDispatcher:
    """The forwards of a model in which these taps have something to do.

    While a hook's own function runs, modules that it calls are not hooked. Hooks act in the context that entered the
    block (see `scopes`). With `attached` a forward of other code that no block or run of hookkit's covers raises;
    without, it is a plain forward of the model.
    """

    def __init__(
        self,
        lm: LM,
        taps: list[HookPoint],
        *,
        stop_early: bool,
        tracer: Tracer | None,
        attached: bool = False,
    ) -> None:
        self.lm, self.taps, self.tracer = lm, taps, tracer
        self._traced = None if tracer is None else logits_tap(lm, taps)
        self.actions = sorted(
            (action for tap in taps for action in tap.actions), key=lambda a: a.number
        )
        self._stop_early, self._attached = stop_early, attached
        self._shells = called(lm.wrapping)
        self._runs = (
            *self._shells,
            lm.root,
            *lm.decoder,
        )  # whose forward is one of the model, the outer first
        self._left = 0  # how often the block was left
        self._start()

    def _start(self) -> None:
        self._scope = Scope(weakref.ref(self.lm.root), self._attached)
        self._running = DispatchState(self.lm, self.actions, self.tracer)
        self._firings = self._running.keeping.firings
        self._call: ForwardPass | None = None
        self._owner: nn.Module | None = None  # the module whose forward is running
        self._thread = 0  # that it runs in; 0 while no forward runs
        self._busy = 0  # the thread in which a hook's own function is running
        self._writer = 0  # the thread in which a `generate` is running
        self._aside: nn.Module | None = (
            None  # what was called in the midst of a generate, and is no step of it
        )
        self._again = False  # a checkpointed block runs again, in the backward pass
        self._pending: set[BoundHook] = set()

    # ---- whose forward it is

    def acts_here(self) -> bool:
        """True where the hooks are meant: in the context that entered the block. `Unsupported` where none can tell."""
        if unseen():
            return False
        if self._scope in HERE.get():
            return self._scope.open
        if not self._attached or not self._scope.open:
            return False
        adopt()
        if self._scope in HERE.get():
            return True
        if has_scope(self.lm.root):
            return False
        raise Unsupported(ELSEWHERE)

    def _acts_in_forward(self) -> bool:
        """`acts_here`, at a module inside the model."""
        return self._thread == get_ident() or (self._scope.open and self._scope in HERE.get())

    def _is_meant(self, module: nn.Module) -> bool:
        """True for a forward of the model that begins here and in which the hooks are to act."""
        if not self._scope.open or unseen():
            return False
        if module not in self._runs:
            raise Unsupported(
                f"a replica of {type(self.lm.root).__name__} runs (nn.DataParallel makes one for each device), and "
                "hooks are for the model itself: run model.module"
            )
        if not self.acts_here():
            return False
        thread = get_ident()
        if self._busy == thread:
            return False
        if self._owner is not None:
            if self._thread != thread:
                raise Unsupported(
                    "two threads run the model inside one block: give each a block, or take turns"
                )
            if self._runs.index(self._owner) < self._runs.index(module):
                return False
        if self._running.generating and not (
            self._writer == thread and self._running.begins_step()
        ):
            if self._attached:
                raise Unsupported(
                    "the model is called while a generate of the same block runs, and the call is no step of it: call "
                    "it after the generate, or give the generate a block of its own"
                )
            self._aside = module if self._aside is None else self._aside
            return False
        self._aside = None
        return True

    # ---- one forward

    def _begin(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> None:
        if not self._is_meant(module):
            return
        self._enter_forward(self._begun(module, args, kwargs or {}), module)
        if self._stop_early:
            self._pending = set(self.actions)

    def _begun(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> ForwardPass:
        """The forward that begins with these arguments."""
        return self._running.call(named(module, self.lm.root, args, kwargs))

    def _enter_forward(self, call: ForwardPass, module: nn.Module) -> None:
        self._call, self._owner, self._thread = call, module, get_ident()
        PROGRESS.forwards += 1
        forget(self.actions)

    def _end(self, module: nn.Module, args: object, output: object) -> None:
        if module is self._aside:
            self._aside = None
        elif (
            module is self._owner
            and not unseen()
            and self._thread == get_ident()
            and not self._busy
        ):
            if self._call is not None:
                self._running.gave(self._call, output)
            self._no_forward()
            settle(self.actions)

    def _no_forward(self) -> None:
        """No forward runs, or none that counts: one that was interrupted does not come to its end."""
        self._owner = self._call = self._aside = None
        self._thread = 0

    def _outside(self, tap: HookPoint) -> None:
        """Raise if a module was called in the block, and outside a forward of the model."""
        if self._aside is None and self._scope.open and self._scope in HERE.get() and not unseen():
            raise Unsupported(
                f"{tap.place.path!r} was called by itself, outside a forward of {type(self.lm.root).__name__}: its "
                "rows and positions cannot be told. Call the model, or attach to the module that is called"
            )

    def _here(self) -> Callable[[], AbstractContextManager[None]]:
        """A way back into this very forward."""
        return partial(self._back_in, self._call, self._left)

    @contextmanager
    def _back_in(self, call: ForwardPass | None, left: int) -> Iterator[None]:
        """A forward in which a checkpointed block runs again."""
        if left != self._left:
            raise Unsupported(
                "backward() ran after the block was left, and gradient checkpointing runs the model again, "
                "without the hooks: call backward() inside the block, or model.gradient_checkpointing_disable()"
            )
        before = self._call, self._thread
        self._call, self._thread, self._again = call, get_ident(), True
        try:
            yield
        finally:
            (self._call, self._thread), self._again = before, False

    # ---- the work at one place

    # torch calls a hook without the keywords when another thread takes it off just then

    def _on_input(
        self,
        tap: HookPoint,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if self._thread != get_ident():
            return self._outside(tap)
        if self._busy or unseen():
            return None
        kwargs = kwargs or {}
        found, key = input_of(args, kwargs, tap.place.item, tap.place.path)
        new = self._run(tap, found)
        if new is found:
            return None
        if isinstance(key, str):
            return args, kwargs | {key: new}
        return (*args[:key], new, *args[key + 1 :]), kwargs

    def _on_watched(self, tap: HookPoint, module: nn.Module, args: Any, output: Any) -> Any:
        """`_on_output`, with a short cut through the commonest work: to copy a whole tensor out."""
        if self._thread != get_ident():
            return self._outside(tap)
        call, action = self._call, tap.actions[0]
        cells = None if call is None or self._busy or unseen() else call.whole(action.where)
        if (
            call is None
            or cells is None
            or type(output) is not Tensor
            or output.requires_grad
            or call.inference
        ):
            return self._on_output(tap, module, args, output)
        if self._again:
            return None
        shape = output.shape
        if shape[:2] != call.shape or action.last is call or tap.place.item != 0:
            return self._on_output(tap, module, args, output)
        action.last = call
        action.fired += 1
        action.pieces.append(CapturedChunk(call.number, cells, output.clone()))
        self._firings.append((action, call.number, cells, shape[2:], None))
        if self._stop_early:
            self._done(tap)
        return None

    def _on_output(
        self, tap: HookPoint, module: nn.Module, args: Any, *kwargs_and_output: Any
    ) -> Any:
        if self._thread != get_ident():
            return self._outside(tap)
        if self._busy or unseen():
            return None
        output = kwargs_and_output[-1]
        found = picked(output, tap.place)
        before = (
            input_of(args, kwargs_and_output[0], 0, tap.place.path)[0] if tap.reads_input else None
        )
        new = self._run(tap, found, before)
        if new is found:
            return None
        if tap.place.item == "logits" and getattr(output, "loss", None) is not None:
            raise Unsupported(
                "the model has computed its loss from the unedited logits: leave labels out, and compute the loss from "
                "the logits that come back"
            )
        return repacked(output, tap.place.item, new)

    def _on_inside(self, taps: dict[int | str, HookPoint], name: str, found: Tensor) -> Tensor:
        if name not in taps:
            return found
        if self._thread != get_ident():
            self._outside(taps[name])
            return found
        return found if self._busy or unseen() else self._run(taps[name], found)

    def _run(self, tap: HookPoint, found: Tensor, before: Tensor | None = None) -> Tensor:
        """Do all that is to be done at one tap, and give the tensor that goes on."""
        call = self._call
        assert call is not None
        ranks = self.lm.ranks
        if ranks is None:
            return self._whole(tap, call, found, before)
        site = self._site(tap)
        sizes = full_sizes(self.lm.layout, site, self.lm.place(site))
        return ranks.around(
            tap.key, found, sizes, lambda whole: self._whole(tap, call, whole, before)
        )

    def _site(self, tap: HookPoint) -> AnySite:
        """One of the sites that a tap is of."""
        return tap.actions[0].site if tap.actions else Site("logits")

    def _whole(
        self, tap: HookPoint, call: ForwardPass, found: Tensor, before: Tensor | None
    ) -> Tensor:
        """`_run`, on a tensor of which no other process has a part."""
        tracer = self.tracer if tap is self._traced else None
        if tracer is not None:
            tracer.before(call.number, found)
        self._busy = self._thread
        try:
            for action in tap.actions:
                if self._again:  # the same work, of which nothing is kept
                    action = replace(action, pieces=[], last=None)
                given = found
                try:
                    firing, found = act(action, tap, call, given, before)
                except Exception as error:
                    error.add_note(f"in {action.hook} at {action.site}, forward {call.number}")
                    raise
                if firing is not None and not self._again:
                    self._firings.append(firing)
                if tracer is not None and found is not given:
                    tracer.changed(action.hook, given, found)
        finally:
            self._busy = 0
        if tracer is not None:
            tracer.after(found)
        if self._stop_early:
            self._done(tap)
        return found

    def _done(self, tap: HookPoint) -> None:
        """Stop the forward if nothing is left to be done in it."""
        self._pending.difference_update(tap.actions)
        if not self._pending:
            settle(self.actions)
            raise Stop
