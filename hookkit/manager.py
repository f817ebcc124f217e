"""HookManager: the only file that registers hooks on modules.

    with hk.attach(lm, hk.force(" coffee"), hk.capture("resid_post.6")) as manager:
        ...                             # any code that runs the model: forwards, generate, a pipeline
    manager["resid_post.6"], manager.log

Inside the block every forward of the model is read and edited. All hooks go on together or not at all, and on leaving,
however that happens, the model carries exactly what it carried before.
"""

import functools
import inspect
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from . import generation
from .acting import act
from .calls import Call
from .captured import Captured, Kept, Piece, merged
from .errors import NotCaptured, Unsupported
from .firing import check_possible
from .following import Follower
from .hooks.base import Hook
from .hooks.looking import capture
from .inside import opened
from .keeping import Keeping
from .lent import replaced
from .model import LM, as_lm
from .prompts import Batch, as_batch, cover
from .sites import AnySite, Sites
from .taps import Action, Tap, input_of, logits_tap, picked, planned, repacked
from .tracing import Tracer
from .training import checkpointing, in_checkpointed_block, warn_of_dropout
from .wrapped import called, refuse_virtual_tokens

REFERENCE_BATCH = 16  # prompts of a reference that run together


class Stop(Exception):
    """Raised inside a forward once everything that was asked of it is there."""


def attach(model: LM | nn.Module, *hooks: Hook) -> "HookManager":
    """A block in which these hooks act on every forward of a model, whoever calls it.

    `model` is an LM, or any `nn.Module`, whose places are named with `hk.module(path)`. The hooks are checked against
    the model here, before anything is registered.

    >>> with attach(lm, force(" coffee"), capture("resid_post.6")) as manager:
    ...     output = lm.model.generate(**inputs, max_new_tokens=4, do_sample=False)
    >>> manager["resid_post.6"].shape
    torch.Size([1, 9, 576])
    """
    manager = HookManager(as_lm(model), hooks)
    warn_of_dropout(manager.lm)
    return manager


class HookManager:
    """The hooks of one block: what they do, what they kept, and where they fired.

    The hooks of one block act in the order given. Blocks can be nested: an outer block's hooks act first. A block can
    be entered again after it was left, and starts anew. While a hook's own function runs, modules that it calls are
    not hooked.
    """

    def __init__(
        self, lm: LM, hooks: Sequence[Hook], *, stop_early: bool = False, tracer: Tracer | None = None
    ) -> None:
        self.lm = lm
        self.taps = planned(lm, hooks, self.reference)
        self.tracer = tracer
        if tracer is not None:
            self._traced = logits_tap(lm, self.taps)
        self.actions = sorted((action for tap in self.taps for action in tap.actions), key=lambda a: a.number)
        self._stop_early = stop_early
        self._shells = called(lm.wrapping)
        self._runs = (*self._shells, lm.root, *lm.decoder)  # whose forward is one of the model, the outer first
        self._depth = 0
        self._entered = 0  # counts the blocks that were left
        self._stack = ExitStack()
        self._start()

    def _start(self) -> None:
        self.follower = Follower(
            functools.partial(cover, self.lm), "logits_to_keep" in self.lm.takes, self.lm.two_texts
        )
        self._keeping = Keeping(self.actions)
        self._call: Call | None = None
        self._owner: nn.Module | None = None  # the module whose forward is running
        self._thread = 0  # that it runs in
        self._busy = 0  # the thread in which a hook's own function is running
        self._again = False  # a checkpointed block runs again, in the backward pass
        self._pending: set[Action] = set()
        self.rows: list[list[int]] = []  # the tokens of each sequence that the last `generate` returned
        self._watch = generation.Watch()

    # ---- the block

    def __enter__(self) -> "HookManager":
        if self._depth == 0:
            self._start()
            try:
                self._register(self._stack)
            except BaseException:
                self._stack.close()
                raise
        self._depth += 1
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._depth -= 1
        if self._depth:
            return
        self._stack.close()
        self._call = self._owner = None
        self._entered += 1
        if kind is None:
            self._keeping.finish(self.follower.plain_ending)
            self._keeping.check_fired(self.follower.forwards)

    def _register(self, stack: ExitStack) -> None:
        root = self.lm.root
        refuse_virtual_tokens(self.lm.wrapping)
        if "torch._dynamo" in sys.modules:
            # a compiled model ignores hooks that come after its first call; inside the block it runs as it is written
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        handles: list[RemovableHandle] = []
        stack.callback(_remove, handles)
        inside: dict[nn.Module, dict[int | str, Tap]] = {}
        for tap in self.taps:
            if tap.place.side == "inside":
                inside.setdefault(tap.module, {})[tap.place.item] = tap
            elif tap.module is root and self._shells:
                handles += [self._tapped(tap, module) for module in (*self._shells, root)]
            else:
                handles.append(self._tapped(tap, tap.module))
        for module, taps in inside.items():
            say = functools.partial(self._on_inside, taps)
            wanted, verified = frozenset(map(str, taps)), self.lm.layout.verified.setdefault(module, set())
            stack.enter_context(opened(module, self.lm.family.attention, wanted, say, verified))
        for module in {block: None for tap in self.taps for block in checkpointing(root, tap.place.path)}:
            name = "_gradient_checkpointing_func"
            stack.enter_context(replaced(module, name, self._checkpointing(getattr(module, name))))
        for module in self._runs:
            handles.append(module.register_forward_pre_hook(self._begin, prepend=True, with_kwargs=True))
            handles.append(module.register_forward_hook(self._end, always_call=True))
        if callable(getattr(root, "generate", None)):
            stack.enter_context(replaced(root, "generate", self._generating(root.generate)))  # pyright: ignore

    def _tapped(self, tap: Tap, module: nn.Module) -> RemovableHandle:
        """Register what a tap does."""
        if tap.place.side == "input":
            work, hooks = self._on_input, module._forward_pre_hooks
        else:
            work, hooks = self._on_watched if tap.only_looks else self._on_output, module._forward_hooks
        hook = functools.partial(work, tap)
        if module is not tap.module or (module is self.lm.root and self._shells):
            hook = functools.partial(self._outermost, hook)
        if tap.place.side == "input":
            handle = module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
        else:
            handle = module.register_forward_hook(hook, prepend=True, with_kwargs=tap.reads_input)
        _let_outer_blocks_go_first(hooks)
        return handle

    def _ahead(self, module: nn.Module, work: Any) -> RemovableHandle:
        """Register what comes before all else at a module's input."""
        return module.register_forward_pre_hook(work, prepend=True, with_kwargs=True)

    def _outermost(self, hook: Any, module: nn.Module, *given: Any) -> Any:
        """Of several modules that are the model, only the one that was called does the work."""
        return hook(module, *given) if module is self._owner else None

    def __reduce__(self) -> Any:
        raise Unsupported("the model carries the hooks of a block, which no copy could shed: copy or save it outside")

    # ---- one forward

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        thread = threading.get_ident()
        if self._owner is not None and self._thread != thread:
            raise Unsupported("two threads run the model inside one block: give each a block, or take turns")
        inside = self._owner is not None and self._runs.index(self._owner) < self._runs.index(module)
        if self._busy == thread or inside:
            return
        given = dict(zip(_arguments(type(module), type(self.lm.root)), args, strict=False)) | kwargs
        call, begins = self.follower.call(given)
        if begins:
            self._keeping.finish(self.follower.plain_ending)
            self._keeping.running = call.text
        if begins or not call.number:
            self._check_possible(call)
        if self.follower.generation is not None:
            call.text.history = self._watch.tokens
            if call.text.beams > 1:  # beams change rows from step to step
                self.follower.remember(call, self._watch.tokens)
        self._enter_forward(call, module)
        if self._stop_early:
            self._pending = set(self.actions)

    def _enter_forward(self, call: Call, module: nn.Module) -> None:
        self._call, self._owner, self._thread = call, module, threading.get_ident()

    def _check_possible(self, call: Call) -> None:
        text, plan = call.text, self.follower.generation
        if text.final or plan is not None:
            check_possible(self.actions, text, call, plan)
        for where in {id(action.where): action.where for action in self.actions}.values():
            text.wishes(where)  # raises for a text that is not there, or a position before the first

    def _end(self, module: nn.Module, args: object, output: object) -> None:
        if module is self._owner and self._thread == threading.get_ident() and not self._busy:
            self._owner = self._call = None

    def _on_input(self, tap: Tap, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._busy:
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
        cells = None if call is None or self._busy else call.whole(action.where)
        if call is None or cells is None or type(output) is not Tensor or output.requires_grad or call.inference:
            return self._on_output(tap, module, args, output)
        if self._again:
            return None
        shape = output.shape
        if shape[:2] != call.shape:
            return self._on_output(tap, module, args, output)
        action.fired += 1
        action.pieces.append(Piece(call.number, cells, output.clone()))
        self._keeping.firings.append((action, call.number, cells, shape[2:], None))
        if self._stop_early:
            self._done(tap)
        return None

    def _on_output(self, tap: Tap, module: nn.Module, args: Any, *kwargs_and_output: Any) -> Any:
        if self._busy:
            return None
        output = kwargs_and_output[-1]
        found = output if isinstance(output, Tensor) else picked(output, tap.place)
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
        return found if self._busy or name not in taps else self._run(taps[name], found)

    def _run(self, tap: Tap, found: Tensor, before: Tensor | None = None) -> Tensor:
        """Do all that is to be done at one tap, and give the tensor that goes on."""
        call = self._call
        if call is None:
            raise Unsupported(
                f"{tap.place.path!r} was called by itself, outside a forward of {type(self.lm.root).__name__}: its "
                "rows and positions cannot be told. Call the model, or attach to the module that is called"
            )
        tracer = self.tracer if self.tracer is not None and tap is self._traced else None
        if tracer is not None:
            tracer.before(call.number, found)
        self._busy = self._thread
        try:
            for action in tap.actions:
                if self._again:  # the same work, of which nothing is kept
                    action = replace(action, pieces=[])
                given = found
                try:
                    firing, found = act(action, tap, call, given, before)
                except Exception as error:
                    error.add_note(f"in {action.hook} at {action.site}, forward {call.number}")
                    raise
                if firing is not None and not self._again:
                    self._keeping.firings.append(firing)
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
            raise Stop

    # ---- a block that runs again in the backward pass

    def refuse_checkpoints(self) -> None:
        """Raise `Unsupported` if a hook stands in a block that would run again after the hooks are gone."""
        if not self.lm.root.training:
            return
        for tap in self.taps:
            if in_checkpointed_block(self.lm.root, tap.place.path):
                raise Unsupported(
                    f"{tap.actions[0].hook} stands in a block with gradient checkpointing, which runs again in "
                    "backward(), without the hook: call model.gradient_checkpointing_disable() or model.eval(), or run "
                    "the model and backward() inside a block of hk.attach"
                )

    def _checkpointing(self, original: Any) -> Any:
        """The model's way to run a function again in the backward pass, with the hooks in the same forward again."""

        def checkpoint(function: Any, *args: Any, **kwargs: Any) -> Any:
            call, entered, ran = self._call, self._entered, False

            def run(*args: Any, **kwargs: Any) -> Any:
                nonlocal ran
                if not ran:
                    ran = True
                    return function(*args, **kwargs)
                if entered != self._entered:
                    raise Unsupported(
                        "backward() ran after the block was left, and gradient checkpointing runs the model again, "
                        "without the hooks: call backward() inside the block, or model.gradient_checkpointing_disable()"
                    )
                before, self._call, self._again = self._call, call, True
                try:
                    return function(*args, **kwargs)
                finally:
                    self._call, self._again = before, False

            return original(run, *args, **kwargs)

        return checkpoint

    # ---- one text

    def _generating(self, original: Any) -> Any:
        """transformers' `generate`, with the hooks told of its prompt, its steps and its end."""

        @functools.wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            if self._busy == threading.get_ident() or self.follower.generation is not None:
                return original(*args, **kwargs)
            if self.lm.two_texts:
                raise Unsupported(
                    f"generate of an encoder-decoder ({type(self.lm.root).__name__}) runs its two parts by themselves: "
                    "call the model with input_ids and decoder_input_ids in the block"
                )
            plan = generation.read(self.lm.root, args, kwargs)
            self._owner = self._call = None  # of a forward that was interrupted
            self._keeping.finish(self.follower.plain_ending)
            text = self._keeping.running = self.follower.text = plan.text(self.follower.find)
            self.follower.generation = plan
            if self.tracer is not None:
                self.tracer.begin(plan)
            try:
                with generation.watched(self.lm.root, self.tracer) as self._watch:
                    output = original(*args, **generation.eager(args, kwargs))
                sequences = output if isinstance(output, Tensor) else output.sequences
                self.rows = generation.final_rows(plan, text, sequences, self._watch)
                ending = generation.ending(plan, text, sequences, self.rows, self.follower.histories)
                self._keeping.finish(lambda: ending)
                if self.tracer is not None:
                    self.tracer.finish(self.rows, [text.lengths[prompt] for prompt in ending.prompts], ending.sources)
            finally:
                self.follower.generation = None
                self.follower.histories = {}
            return output

        return generate

    def reference(self, sites: Sequence[AnySite], prompts: tuple[Any, ...]) -> dict[AnySite, Captured]:
        """What is at these sites on other prompts."""
        parts: dict[AnySite, list[Captured]] = {site: [] for site in sites}
        for start in range(0, len(prompts), REFERENCE_BATCH):
            batch = as_batch(self.lm, list(prompts[start : start + REFERENCE_BATCH]))
            manager = HookManager(self.lm, [capture(sites)], stop_early=True)
            with torch.no_grad(), manager, suppress(Stop):
                manager.expect(batch)
                self.lm.model(**batch.inputs(self.lm))
            for site in sites:
                parts[site].append(manager.captured(site))
        return {site: merged(found) for site, found in parts.items()}

    def expect(self, batch: Batch) -> None:
        """Say what the next forward is going to read, so that nothing has to be read back from the device."""
        self.follower.expect(batch)

    # ---- what came of it

    @property
    def texts(self) -> list[Kept]:
        """What the captures kept, a text each: one plain forward (with the decoding steps that go on from it), or one
        `generate`."""
        in_between = self.follower.generation is None and self.follower.forwards
        return self._keeping.texts(self.follower.plain_ending if in_between else None)

    def captured(self, site: str | AnySite, name: str | None = None) -> Captured:
        """The values at a site, with their rows and positions, if one text ran in the block."""
        return self._only().captured(site, name)

    def __getitem__(self, key: str | AnySite | tuple[str | AnySite, str]) -> Tensor:
        return self._only()[key]

    @property
    def sites(self) -> Sites:
        """The sites that have values."""
        return self._only().sites

    def _only(self) -> Kept:
        texts = self.texts
        if len(texts) != 1:
            raise NotCaptured(
                f"{len(texts)} texts ran in this block, and one is meant: ask manager.texts[0][site], and so on"
                if texts
                else "no forward of the model has run in this block, so nothing was captured"
            )
        return texts[0]

    @property
    def log(self) -> pd.DataFrame:
        """Where each hook fired: one row for each hook, site, forward and row of the batch."""
        return self._keeping.log()


@functools.cache
def _arguments(kind: type[nn.Module], root: type[nn.Module]) -> tuple[str, ...]:
    """The names of a module's positional arguments; those of the model for a wrapper that passes all on."""
    parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
    if kind is not root and parameters and parameters[0].kind is inspect.Parameter.VAR_POSITIONAL:
        return _arguments(root, root)
    return tuple(parameter.name for parameter in parameters)


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def _let_outer_blocks_go_first(hooks: Any) -> None:
    """Move the hooks of outer blocks in front of the one that was just put first."""
    if len(hooks) == 1:
        return
    outer = [key for key, hook in list(hooks.items())[1:] if _is_ours(hook)]
    for key in reversed(outer):
        hooks.move_to_end(key, last=False)


def _is_ours(hook: Any) -> bool:
    return isinstance(hook, functools.partial) and isinstance(getattr(hook.func, "__self__", None), HookManager)


def hooks_of_others(root: nn.Module) -> list[str]:
    """The paths of the modules that carry hooks of the user's, and not of libraries. `Unsupported` inside a block."""
    found = []
    for path, module in root.named_modules():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if _is_ours(hook):
                raise Unsupported(
                    "a sweep inside a block of hk.attach: leave the block, and give its hooks as under=[…]"
                )
            maker = getattr(hook, "__module__", None) or type(hook).__module__
            if maker.partition(".")[0] not in ("transformers", "accelerate", "peft", "torch"):
                found.append(path)
    return found
