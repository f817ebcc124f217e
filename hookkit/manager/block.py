"""HookManager: the only file that registers hooks on modules."""

import functools
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..arguments import checks_arguments
from ..captured import Captured, Kept, merged
from ..errors import NotCaptured, Unsupported
from ..hooks.base import Hook
from ..hooks.looking import capture
from ..inside import opened
from ..lent import replaced
from ..model import LM, as_lm
from ..prompts import Batch, as_batch
from ..sites import AnySite, Sites
from ..taps import Tap, planned
from ..tracing import Tracer
from ..training import checkpointing, warn_of_dropout
from ..wrapped import refuse_virtual_tokens
from .again import refuse_checkpoints, run_again_within
from .forwards import Forwards, Stop
from .precedence import Work, let_outer_blocks_go_first

REFERENCE_BATCH = 16  # prompts of a reference that run together


@checks_arguments
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


class HookManager(Forwards):
    """The hooks of one block: what they do, what they kept, and where they fired.

    The hooks of one block act in the order given. Blocks can be nested: an outer block's hooks act first. A block can
    be entered again after it was left, and starts anew.
    """

    def __init__(
        self, lm: LM, hooks: Sequence[Hook], *, stop_early: bool = False, tracer: Tracer | None = None
    ) -> None:
        self.lm = lm  # a reference is captured while the hooks are planned
        super().__init__(lm, planned(lm, hooks, self.reference), stop_early=stop_early, tracer=tracer)
        self._depth = 0
        self._stack = ExitStack()

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
        self._left += 1
        if kind is None:
            self._running.finish()
            self._running.check_fired()

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
        for module in checkpointing(root, (tap.place.path for tap in self.taps)):
            name = "_gradient_checkpointing_func"
            stack.enter_context(replaced(module, name, run_again_within(getattr(module, name), self._here)))
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
        hook = Work(work, tap)
        if module is not tap.module or (module is self.lm.root and self._shells):
            hook = Work(self._outermost, hook)
        if tap.place.side == "input":
            handle = module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
        else:
            handle = module.register_forward_hook(hook, prepend=True, with_kwargs=tap.reads_input)
        let_outer_blocks_go_first(hooks)
        return handle

    def _ahead(self, module: nn.Module, work: Any) -> RemovableHandle:
        """Register what comes before all else at a module's input."""
        return module.register_forward_pre_hook(work, prepend=True, with_kwargs=True)

    def _outermost(self, hook: Any, module: nn.Module, *given: Any) -> Any:
        """Of several modules that are the model, only the one that was called does the work."""
        return hook(module, *given) if module is self._owner else None

    def __reduce__(self) -> Any:
        raise Unsupported("the model carries the hooks of a block, which no copy could shed: copy or save it outside")

    def refuse_checkpoints(self) -> None:
        """Raise `Unsupported` if a hook stands in a block that would run again after the hooks are gone."""
        refuse_checkpoints(self.lm.root, self.taps)

    # ---- one text

    def _generating(self, original: Any) -> Any:
        """transformers' `generate`, with the hooks told of its prompt, its steps and its end."""

        @functools.wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            if self._busy == threading.get_ident() or self._running.generating:
                return original(*args, **kwargs)
            plan = self._running.plan(args, kwargs)
            self._owner = self._call = None  # of a forward that was interrupted
            return self._running.generate(plan, original, args, kwargs)

        return generate

    def reference(self, sites: Sequence[AnySite], prompts: tuple[Any, ...]) -> dict[AnySite, Captured]:
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
    def rows(self) -> list[list[int]]:
        """The tokens of each sequence that the last `generate` returned."""
        return self._running.rows

    @property
    def texts(self) -> list[Kept]:
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
        return self._running.keeping.log()


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
