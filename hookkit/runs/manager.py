"""HookManager: the only file that registers hooks on modules.

A checkpointed block runs again in the backward pass: with the hooks, in the forward in which it ran first.

Whose hooks act first at a module, and which of those on it are not hookkit's.

Compiled code runs as it is written while a block is open: what was compiled before would not see the hooks.

torch keeps one stance for the whole process. It is put back when the last block is left, in whatever order.
"""

import functools
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, suppress
from threading import get_ident
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from ..arguments import checks_arguments
from ..errors import NotCaptured, Unsupported
from ..hooks.base import Hook
from ..hooks.capture import capture
from ..hooks.captured_values import Captured, Captures, merged
from ..models.attention import keep_modes, listen, modes
from ..models.lm import LM, as_lm
from ..models.overrides import Lent, Work
from ..models.prompts import Batch, as_batch
from ..models.scopes import HERE, enter, leave, without
from ..models.sites import AnySite, Sites
from ..models.training import checkpointing, in_checkpointed_block, warn_of_dropout
from ..models.wrappers import refuse_virtual_tokens
from .dispatch import HookDispatcher, Stop
from .outcomes import CaptureStore
from .taps import HookPoint, planned
from .trace import Tracer


def refuse_checkpoints(root: nn.Module, taps: Iterable[HookPoint]) -> None:
    """Raise `Unsupported` if a hook stands in a block that would run again after the hooks are gone."""
    if not root.training:
        return
    for tap in taps:
        if in_checkpointed_block(root, tap.place.path):
            raise Unsupported(
                f"{tap.actions[0].hook} stands in a block with gradient checkpointing, which runs again in "
                "backward(), without the hook: call model.gradient_checkpointing_disable() or model.eval(), or run "
                "the model and backward() inside a block of hk.attach"
            )


def run_again_within(here: Callable[[], Callable[[], AbstractContextManager[None]]]) -> Work:
    """A model's way to run a function again in the backward pass, within what `here` gave when it first ran."""

    def checkpoint(inner: Callable[..., Any], /, function: Any, *args: Any, **kwargs: Any) -> Any:
        back_here, ran = here(), False

        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal ran
            if not ran:
                ran = True
                return function(*args, **kwargs)
            with back_here():
                return function(*args, **kwargs)

        return inner(run, *args, **kwargs)

    return checkpoint


class RegisteredHook(functools.partial):
    """What a block does at one place, told apart by its kind from the hooks of users and libraries."""

    @property
    def manager(self) -> Any:
        """The block that it is of."""
        return self.func.__self__  # pyright: ignore[reportFunctionMemberAccess]


class Border(RegisteredHook):
    """Where a block notes that a forward begins or ends."""


def let_outer_blocks_go_first(hooks: Any) -> None:
    """Move the hooks of outer blocks in front of the one that was just put first."""
    if len(hooks) == 1:
        return
    outer = [key for key, hook in list(hooks.items())[1:] if type(hook) is RegisteredHook]
    for key in reversed(outer):
        hooks.move_to_end(key, last=False)


def hooks_of_others(root: nn.Module) -> list[str]:
    """The paths of the modules that carry hooks of the user's, and not of libraries. `Unsupported` inside a block."""
    found = []
    for path, module in root.named_modules():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if isinstance(hook, RegisteredHook):
                if hook.manager.acts_here():
                    raise Unsupported(
                        "a sweep inside a block of hk.attach: leave the block, and give its hooks as under=[…]"
                    )
                continue  # a block of another thread, which does not act here
            maker = getattr(hook, "__module__", None) or type(hook).__module__
            if maker.partition(".")[0] not in ("transformers", "accelerate", "peft", "torch"):
                found.append(path)
    return found


_LOCK = threading.RLock()
_BLOCKS: set[object] = set()
_STANCES: list[Any] = []  # the one that the first block set; it knows what was before


def run_as_written(lent: Lent) -> None:
    """Let compiled code run as it is written until this, and all else that asked for it, is given back."""
    block = object()
    lent.later(functools.partial(_leave, block))
    with _LOCK:
        _BLOCKS.add(block)
        if not _STANCES:
            _STANCES.append(torch.compiler.set_stance("force_eager"))


def _leave(block: object) -> None:
    with _LOCK:
        _BLOCKS.discard(block)
        while _STANCES and not _BLOCKS:
            _STANCES[-1].__exit__(None, None, None)
            _STANCES.pop()


REFERENCE_BATCH = 16  # prompts of a reference that run together


@checks_arguments
def attach(model: LM | nn.Module, *hooks: Hook) -> "HookManager":
    """A block in which these hooks act on every forward of a model, whoever calls it.

    `model` is an LM, or any `nn.Module`, whose places are named with `hk.module(path)`. The hooks are checked against
    the model here, before anything is registered. Blocks can be left in any order.

    The block is of the thread, or task of asyncio, that enters it, and of what it starts in its context: tasks,
    `asyncio.to_thread(…)`, `threading.Thread(target=contextvars.copy_context().run, args=(model.generate,))`. While it
    is open, a forward of other threads and tasks raises `Unsupported`, unless hookkit knows what is meant: in a block
    of their own, in `hk.forward` and `hk.generate`, they have their own hooks and none of these.

    >>> with attach(lm, force(" coffee"), capture("resid_post.6")) as manager:
    ...     output = lm.model.generate(**inputs, max_new_tokens=4, do_sample=False)
    >>> manager["resid_post.6"].shape
    torch.Size([1, 9, 576])
    """
    manager = HookManager(as_lm(model), hooks, attached=True)
    warn_of_dropout(manager.lm)
    return manager


class HookManager(HookDispatcher):
    """The hooks of one block: what they do, what they kept, and where they fired.

    The hooks of one block act in the order given. Blocks can be nested: an outer block's hooks act first. A block can
    be entered again after it was left, and starts anew.
    """

    alone = False  # True for a run in which the hooks of no other block act

    def __init__(
        self,
        lm: LM,
        hooks: Sequence[Hook],
        *,
        stop_early: bool = False,
        tracer: Tracer | None = None,
        attached: bool = False,
    ) -> None:
        self.lm = lm  # a reference is captured while the hooks are planned
        taps = planned(lm, hooks, self.reference)
        super().__init__(lm, taps, stop_early=stop_early, tracer=tracer, attached=attached)
        self._depth = 0
        self._lent = Lent()

    # ---- the block

    def __enter__(self) -> "HookManager":
        try:
            if self._depth == 0:
                self._start()
                enter(self._scope, alone=self.alone)
                self._register(self._lent)
            elif not self.acts_here():
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
            self.close()  # Ctrl-C may have come before the first hook was off
            raise
        if kind is None and was_open:
            self._running.finish()
            self._running.check_fired()
        if (
            isinstance(error, RuntimeError)
            and "mutated during iteration" in str(error)
            and error.__context__
        ):
            # torch goes through a module's hooks to pass an error on, and another thread took hooks off just then
            raise error.__context__ from None

    def close(self) -> bool:
        """Take all hooks off the model. True if they were on; done again, it does nothing."""
        was_open, self._depth = self._depth > 0, 0
        try:
            self._lent.give_back()
        finally:
            leave(self._scope, alone=self.alone)
            self._no_forward()
            self._left += was_open
        return was_open

    def _register(self, lent: Lent) -> None:
        root = self.lm.root
        lent.later(functools.partial(_keep_modes, get_ident(), modes()))
        refuse_virtual_tokens(self.lm.wrapping)
        if "torch._dynamo" in sys.modules:
            # a compiled model ignores hooks that come after its first call; inside the block it runs as it is written
            run_as_written(lent)
        inside: dict[nn.Module, dict[int | str, HookPoint]] = {}
        for tap in self.taps:
            if tap.place.side == "inside":
                inside.setdefault(tap.module, {})[tap.place.item] = tap
            elif tap.module is root and self._shells:
                for module in (*self._shells, root):
                    self._tapped(lent, tap, module)
            else:
                self._tapped(lent, tap, tap.module)
        for module, taps in inside.items():
            say = functools.partial(self._on_inside, taps)
            wanted, verified = (
                frozenset(map(str, taps)),
                self.lm.layout.verified.setdefault(module, set()),
            )
            listen(
                lent, module, self.lm.family.attention, wanted, say, verified, self._acts_in_forward
            )
        for module in checkpointing(root, (tap.place.path for tap in self.taps)):
            again = run_again_within(self._here)
            lent.around(module, "_gradient_checkpointing_func", again, self._acts_in_forward)
        for module in self._runs:
            self._put_first(lent, module, Border(self._begin))
            end = Border(self._end)
            lent.hooked(module, "_forward_hooks", end)
            module.register_forward_hook(end, always_call=True)
        if callable(getattr(root, "generate", None)):
            lent.around(root, "generate", self._generating, self.acts_here)

    def _tapped(self, lent: Lent, tap: HookPoint, module: nn.Module) -> None:
        """Register what a tap does."""
        if tap.place.side == "input":
            work, hooks = self._on_input, module._forward_pre_hooks
        else:
            work, hooks = (
                self._on_watched if tap.only_looks else self._on_output,
                module._forward_hooks,
            )
        hook = RegisteredHook(work, tap)
        if module is not tap.module or (module is self.lm.root and self._shells):
            hook = RegisteredHook(self._outermost, hook)
        if tap.place.side == "input":
            self._put_first(lent, module, hook)
        else:
            lent.hooked(module, "_forward_hooks", hook)
            module.register_forward_hook(hook, prepend=True, with_kwargs=tap.reads_input)
        let_outer_blocks_go_first(hooks)

    def _put_first(self, lent: Lent, module: nn.Module, hook: Any) -> None:
        """Register what comes before all else at a module's input."""
        lent.hooked(module, "_forward_pre_hooks", hook)
        module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)

    def _outermost(self, hook: Any, module: nn.Module, *given: Any) -> Any:
        """Of several modules that are the model, only the one that was called does the work."""
        return hook(module, *given) if module is self._owner else None

    def __reduce__(self) -> Any:
        if self._depth:
            raise Unsupported(
                "the model carries the hooks of a block, which no copy could shed: copy or save it outside"
            )
        raise Unsupported(
            "a block cannot be copied: make another with hk.attach; what it kept are manager.texts"
        )

    def refuse_checkpoints(self) -> None:
        """Raise `Unsupported` if a hook stands in a block that would run again after the hooks are gone."""
        refuse_checkpoints(self.lm.root, self.taps)

    # ---- one text

    def _generating(self, inner: Any, /, *args: Any, **kwargs: Any) -> Any:
        """transformers' `generate`, with the hooks told of its prompt, its steps and its end."""
        if self._busy == get_ident():
            return inner(*args, **kwargs)
        if self._running.generating:  # in a logits processor, say
            if self._attached:
                raise Unsupported(
                    "a generate inside a generate of the same block: give each a block of its own"
                )
            with without(self._scope):
                return inner(*args, **kwargs)
        plan = self._running.plan(args, kwargs)
        self._no_forward()  # of a forward that was interrupted
        writer = self._writer = get_ident()
        acts = lambda: get_ident() == writer and self._scope in HERE.get()  # noqa: E731
        return self._running.generate(plan, inner, args, kwargs, acts)

    def reference(
        self, sites: Sequence[AnySite], prompts: tuple[Any, ...]
    ) -> dict[AnySite, Captured]:
        """What is at these sites on other prompts."""
        parts: dict[AnySite, list[Captured]] = {site: [] for site in sites}
        for start in range(0, len(prompts), REFERENCE_BATCH):
            batch = as_batch(self.lm, list(prompts[start : start + REFERENCE_BATCH]))
            inputs = batch.inputs(self.lm)
            manager = HookManager(self.lm, [capture(sites)], stop_early=True)
            with torch.no_grad(), manager, suppress(Stop):
                manager.expect(batch)
                self.lm.model(**inputs)
            for site in sites:
                parts[site].append(manager.captured(site))
        return {site: merged(found) for site, found in parts.items()}

    def expect(self, batch: Batch) -> None:
        """Say what the next forward is going to read, so that nothing has to be read back from the device."""
        self._running.follower.expect(batch)

    # ---- what came of it

    @property
    def keeping(self) -> CaptureStore:
        """What came of the hooks."""
        return self._running.keeping

    @property
    def rows(self) -> list[list[int]]:
        """The tokens of each sequence that the last `generate` returned."""
        return self._running.rows

    @property
    def texts(self) -> list[Captures]:
        """What the captures kept, a text each: one plain forward (with the decoding steps that go on from it), or one
        `generate`."""
        return self._running.kept

    def captured(self, site: str | AnySite, name: str | None = None) -> Captured:
        """The values at a site, with their rows and positions, if one text ran in the block."""
        return self._only().captured(site, name)

    def __getitem__(self, key: str | AnySite | tuple[str | AnySite, str]) -> Tensor:
        return self._only()[key]

    @property
    def sites(self) -> Sites:
        """The sites that have values."""
        return self._only().sites

    def _only(self) -> Captures:
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
        return self._running.keeping.log()


def _keep_modes(thread: int, before: list[Any]) -> None:
    """Take off the modes of a forward that was interrupted, in the thread that had these before."""
    if get_ident() == thread:
        keep_modes(before)
