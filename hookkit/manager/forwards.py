"""What the hooks of a block do in each forward of the model: where one begins and ends, and the work at every place."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..acting import act
from ..calls import Call
from ..captured import Piece
from ..errors import Unsupported
from ..following import named
from ..forms import full_sizes
from ..model import LM
from ..overflow import forget, settle
from ..padding import unseen
from ..sites import AnySite, Site
from ..taps import Action, Tap, input_of, logits_tap, picked, repacked
from ..tracing import Tracer
from ..wrapped import called
from .running import Running


class Stop(Exception):
    """Raised inside a forward once everything that was asked of it is there."""


class Forwards:
    """The forwards of a model in which these taps have something to do.

    While a hook's own function runs, modules that it calls are not hooked.
    """

    def __init__(self, lm: LM, taps: list[Tap], *, stop_early: bool, tracer: Tracer | None) -> None:
        self.lm, self.taps, self.tracer = lm, taps, tracer
        self._traced = None if tracer is None else logits_tap(lm, taps)
        self.actions = sorted((action for tap in taps for action in tap.actions), key=lambda a: a.number)
        self._stop_early = stop_early
        self._shells = called(lm.wrapping)
        self._runs = (*self._shells, lm.root, *lm.decoder)  # whose forward is one of the model, the outer first
        self._left = 0  # how often the block was left
        self._start()

    def _start(self) -> None:
        self._running = Running(self.lm, self.actions, self.tracer)
        self._firings = self._running.keeping.firings
        self._call: Call | None = None
        self._owner: nn.Module | None = None  # the module whose forward is running
        self._thread = 0  # that it runs in
        self._busy = 0  # the thread in which a hook's own function is running
        self._again = False  # a checkpointed block runs again, in the backward pass
        self._pending: set[Action] = set()

    # ---- one forward

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if unseen():
            return
        thread = threading.get_ident()
        if self._owner is not None and self._thread != thread:
            raise Unsupported("two threads run the model inside one block: give each a block, or take turns")
        inside = self._owner is not None and self._runs.index(self._owner) < self._runs.index(module)
        if self._busy == thread or inside:
            return
        self._enter_forward(self._running.call(named(module, self.lm.root, args, kwargs)), module)
        if self._stop_early:
            self._pending = set(self.actions)

    def _enter_forward(self, call: Call, module: nn.Module) -> None:
        self._call, self._owner, self._thread = call, module, threading.get_ident()
        forget(self.actions)

    def _end(self, module: nn.Module, args: object, output: object) -> None:
        if module is self._owner and not unseen() and self._thread == threading.get_ident() and not self._busy:
            if self._call is not None:
                self._running.gave(self._call, output)
            self._owner = self._call = None
            settle(self.actions)

    def _here(self) -> Callable[[], AbstractContextManager[None]]:
        """A way back into this very forward."""
        return partial(self._back_in, self._call, self._left)

    @contextmanager
    def _back_in(self, call: Call | None, left: int) -> Iterator[None]:
        """A forward in which a checkpointed block runs again."""
        if left != self._left:
            raise Unsupported(
                "backward() ran after the block was left, and gradient checkpointing runs the model again, "
                "without the hooks: call backward() inside the block, or model.gradient_checkpointing_disable()"
            )
        before, self._call, self._again = self._call, call, True
        try:
            yield
        finally:
            self._call, self._again = before, False

    # ---- the work at one place

    def _on_input(self, tap: Tap, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._busy or unseen():
            return None
        found, key = input_of(args, kwargs, tap.place.item, tap.place.path)
        new = self._run(tap, found)
        if new is found:
            return None
        if isinstance(key, str):
            return args, kwargs | {key: new}
        return (*args[:key], new, *args[key + 1 :]), kwargs

    def _on_watched(self, tap: Tap, module: nn.Module, args: Any, output: Any) -> Any:
        """`_on_output`, with a short cut through the commonest work: to copy a whole tensor out."""
        call, action = self._call, tap.actions[0]
        cells = None if call is None or self._busy or unseen() else call.whole(action.where)
        if call is None or cells is None or type(output) is not Tensor or output.requires_grad or call.inference:
            return self._on_output(tap, module, args, output)
        if self._again:
            return None
        shape = output.shape
        if shape[:2] != call.shape or action.last is call or tap.place.item != 0:
            return self._on_output(tap, module, args, output)
        action.last = call
        action.fired += 1
        action.pieces.append(Piece(call.number, cells, output.clone()))
        self._firings.append((action, call.number, cells, shape[2:], None))
        if self._stop_early:
            self._done(tap)
        return None

    def _on_output(self, tap: Tap, module: nn.Module, args: Any, *kwargs_and_output: Any) -> Any:
        if self._busy or unseen():
            return None
        output = kwargs_and_output[-1]
        found = picked(output, tap.place)
        before = input_of(args, kwargs_and_output[0], 0, tap.place.path)[0] if tap.reads_input else None
        new = self._run(tap, found, before)
        if new is found:
            return None
        if tap.place.item == "logits" and getattr(output, "loss", None) is not None:
            raise Unsupported(
                "the model has computed its loss from the unedited logits: leave labels out, and compute the loss from "
                "the logits that come back"
            )
        return repacked(output, tap.place.item, new)

    def _on_inside(self, taps: dict[int | str, Tap], name: str, found: Tensor) -> Tensor:
        return found if self._busy or unseen() or name not in taps else self._run(taps[name], found)

    def _run(self, tap: Tap, found: Tensor, before: Tensor | None = None) -> Tensor:
        """Do all that is to be done at one tap, and give the tensor that goes on."""
        call = self._call
        if call is None:
            raise Unsupported(
                f"{tap.place.path!r} was called by itself, outside a forward of {type(self.lm.root).__name__}: its "
                "rows and positions cannot be told. Call the model, or attach to the module that is called"
            )
        ranks = self.lm.ranks
        if ranks is None:
            return self._whole(tap, call, found, before)
        site = self._site(tap)
        sizes = full_sizes(self.lm.layout, site, self.lm.place(site))
        return ranks.around(tap.key, found, sizes, lambda whole: self._whole(tap, call, whole, before))

    def _site(self, tap: Tap) -> AnySite:
        """One of the sites that a tap is of."""
        return tap.actions[0].site if tap.actions else Site("logits")

    def _whole(self, tap: Tap, call: Call, found: Tensor, before: Tensor | None) -> Tensor:
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

    def _done(self, tap: Tap) -> None:
        """Stop the forward if nothing is left to be done in it."""
        self._pending.difference_update(tap.actions)
        if not self._pending:
            settle(self.actions)
            raise Stop
