"""What the hooks of a block do in each forward of the model.

`HookDispatcher` has the functions that are registered on the model. It decides which calls belong
to a forward in which the hooks act, and takes the tensors out of a module's input and output. A
`HookStrategy` applies the hooks to them: that of runs is `TextHooks`. Nothing is registered on the
model here.
"""

import copy
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from threading import get_ident
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from ..errors import BadEdit, Unsupported
from ..models.batch_positions import ForwardPass
from ..models.families.schema import ModuleLocation
from ..models.lm import LM
from ..models.overrides import (
    CURRENT_SCOPES,
    PROGRESS,
    Scope,
    adopt_attached_scopes,
    has_open_scope,
    hooks_are_off,
)
from ..models.sites import AnySite
from ..models.views import full_sizes
from .hook_points import HookPoint
from .tracking import arguments_by_name

ELSEWHERE = (
    "a block of hk.attach is open on this model in another thread or task, and hookkit cannot know "
    "whether its hooks are to act in this forward: leave the block first, give this code a block "
    "of its own, use hk.forward or hk.generate, or run it in the block's context, as "
    "asyncio.to_thread does and "
    "threading.Thread(target=contextvars.copy_context().run, args=(model.generate,))"
)


HIDDEN_STATES_KEYWORDS = ("hidden_states", "input", "x")


@runtime_checkable
class HookStrategy(Protocol):
    """Decides which rows of a batch each hook sees, and where in their texts these rows begin."""

    def accepts_forward(self) -> bool:
        """False if a `generate` runs, and the call that begins is not one of its steps."""
        ...

    def begin_forward(self, arguments: Mapping[str, Any]) -> ForwardPass:
        """Returns the forward that begins with these arguments."""
        ...

    def begin_stack(self, stack: str, arguments: Mapping[str, Any]) -> ForwardPass | None:
        """Called where an encoder, or a tower that reads images, runs by itself.

        Returns the forward if it is a part of a `generate`, else None.
        """
        ...

    def end_forward(self, forward_pass: ForwardPass, output: Any) -> None:
        """Called at the end of a forward."""

    def apply(
        self,
        hook_point: HookPoint,
        forward_pass: ForwardPass,
        tensor: Tensor,
        module_input: Tensor | None,
        *,
        recomputing: bool,
    ) -> Tensor:
        """Applies all hooks at a hook point; returns the tensor that the model continues with.

        `recomputing` is true where the same work is done again in a backward pass.
        """
        ...

    def finish(self) -> None:
        """Called when the block was left without an error; raises for hooks that did not act."""


class HookDispatcher:
    """Passes the calls of a model's modules to a strategy, from when a block is entered to its end.

    The hooks act in the context that entered the block (see `models.overrides`). If `attached`, a
    forward of other code raises, unless another block or run of hookkit covers it; otherwise such
    a forward is a plain forward of the model. While a hook's own function runs, the modules that
    it calls are not hooked.

    `entry_modules` are those whose forward is a forward of the model, the outermost first.
    """

    def __init__(
        self,
        lm: LM,
        strategy: HookStrategy,
        entry_modules: tuple[nn.Module, ...],
        *,
        attached: bool,
    ) -> None:
        self.lm, self.strategy = lm, strategy
        self.scope = Scope(weakref.ref(lm.root), attached)
        self.hook_thread = 0  # the thread in which a hook's own function runs
        self.entry_modules = entry_modules
        self._pass: ForwardPass | None = None  # the current forward
        self._entered: nn.Module | None = None  # the module whose forward is the current one
        self._forward_thread = 0  # the thread of the current forward; 0 if there is none
        # the model, if it was called during a `generate` and the call is no step of it
        self._unrelated: nn.Module | None = None
        self._recomputing = False  # True while a checkpointed block runs in the backward pass

    def __reduce__(self) -> Any:
        raise Unsupported(
            "the model carries the hooks of a block, which a copy could not remove: copy or "
            "save it outside the block"
        )

    # ---- whether the hooks act in a call

    def acts_here(self) -> bool:
        """True in the context that entered the block.

        Raises `Unsupported` if that cannot be decided.
        """
        if hooks_are_off():
            return False
        if self.scope in CURRENT_SCOPES.get():
            return self.scope.open
        if not self.scope.attached or not self.scope.open:
            return False
        adopt_attached_scopes()
        if self.scope in CURRENT_SCOPES.get():
            return True
        if has_open_scope(self.lm.root):
            return False
        raise Unsupported(ELSEWHERE)

    def acts_in_forward(self) -> bool:
        """`acts_here`, at a module inside the model."""
        if hooks_are_off():
            return False
        if self._forward_thread == get_ident():
            return True
        return self.scope.open and self.scope in CURRENT_SCOPES.get()

    def _begins_forward(self, module: nn.Module) -> bool:
        """True if the call of a module begins a forward of the model in which the hooks act."""
        if not self.scope.open or hooks_are_off():
            return False
        if module not in self.entry_modules:
            raise Unsupported(
                f"a replica of {type(self.lm.root).__name__} runs (nn.DataParallel makes one for "
                "each device), and hooks are for the model itself: run model.module"
            )
        if not self.acts_here() or self._is_inside_forward(module):
            return False
        if not self.strategy.accepts_forward():
            self._note_unrelated(module)
            return False
        self._unrelated = None
        return True

    def _note_unrelated(self, module: nn.Module) -> None:
        """Notes a call of the model in which the hooks do not act, because a `generate` runs."""
        if self.scope.attached:
            raise Unsupported(
                "the model is called while a generate of the same block runs, and the call is no "
                "step of it: call it after the generate, or give the generate a block of its own"
            )
        if self._unrelated is None:
            self._unrelated = module

    def _is_inside_forward(self, module: nn.Module) -> bool:
        """True if a hook's own function, or a wrapper whose forward has begun, calls the module."""
        thread = get_ident()
        if self.hook_thread == thread:
            return True
        if self._entered is None:
            return False
        if self._forward_thread != thread:
            raise Unsupported(
                "two threads run the model inside one block: give each a block, or take turns"
            )
        order = self.entry_modules.index
        return order(self._entered) < order(module)

    # ---- one forward

    def on_forward_start(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> None:
        """Registered at the input of the entry modules."""
        if module in self.lm.stack_modules:
            self._on_stack_start(module, args, kwargs or {})
        elif self._begins_forward(module):
            arguments = arguments_by_name(module, self.lm.root, args, kwargs or {})
            self._pass = self.strategy.begin_forward(arguments)
            self._entered, self._forward_thread = module, get_ident()
            PROGRESS.forwards += 1

    def _on_stack_start(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Notes that `generate` runs another stack; inside a forward of the model it is a part."""
        acts = self.scope.open and not hooks_are_off() and self.acts_here()
        if not acts or self._entered is not None:
            return
        stack = self.lm.stack_modules[module]
        arguments = arguments_by_name(module, module, args, kwargs)
        forward_pass = self.strategy.begin_stack(stack, arguments)
        if forward_pass is not None:
            self._pass = forward_pass
            self._entered, self._forward_thread = module, get_ident()

    def on_forward_end(self, module: nn.Module, args: object, output: object) -> None:
        """Registered at the output of the entry modules, also for forwards that raise."""
        if module is self._unrelated:
            self._unrelated = None
            return
        if module is not self._entered or hooks_are_off():
            return
        if self._forward_thread == get_ident() and not self.hook_thread:
            forward_pass = self._pass
            self.clear_forward()
            if forward_pass is not None:
                self.strategy.end_forward(forward_pass, output)

    def clear_forward(self) -> None:
        """Notes that no forward runs. A forward that was interrupted does not come to its end."""
        self._entered = self._pass = self._unrelated = None
        self._forward_thread = 0

    def checkpoint(
        self, inner: Callable[..., Any], /, function: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Runs in place of a model's checkpointing function.

        It calls `function` in the forward, and again in the backward pass, where the hooks act as
        in that forward.
        """
        forward_pass, has_run = self._pass, False

        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal has_run
            if has_run:
                return self._recompute(forward_pass, function, *args, **kwargs)
            has_run = True
            return function(*args, **kwargs)

        return inner(run, *args, **kwargs)

    def _recompute(
        self, forward_pass: ForwardPass | None, function: Any, /, *args: Any, **kwargs: Any
    ) -> Any:
        if not self.scope.open:
            raise Unsupported(
                "backward() ran after the block was left, and gradient checkpointing runs the "
                "model again, without the hooks: call backward() inside the block, or "
                "model.gradient_checkpointing_disable()"
            )
        outer_pass, outer_thread = self._pass, self._forward_thread
        self._pass, self._forward_thread = forward_pass, get_ident()
        self._recomputing = True
        try:
            return function(*args, **kwargs)
        finally:
            self._pass, self._forward_thread = outer_pass, outer_thread
            self._recomputing = False

    # ---- the work at one module

    # torch calls a hook without the keywords if another thread removes it at that moment

    def if_outermost(self, hook: Any, module: nn.Module, *arguments: Any) -> Any:
        """Calls a hook at the model or a wrapper of it, if the user called that module."""
        if module is self._entered:
            return hook(module, *arguments)
        return None

    def if_in_forward(
        self,
        function: Callable[..., Any],
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Calls a function with the arguments of a module, if a forward runs in this thread."""
        if self._forward_thread != get_ident():
            return None
        return function(args, kwargs or {})

    def on_input(
        self,
        hook_point: HookPoint,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Registered at the input of a module with hooks."""
        if not self._acts_at(hook_point):
            return None
        kwargs, location = kwargs or {}, hook_point.location
        tensor, key = find_input(args, kwargs, location.item, location.path)
        new = self._apply_hooks(hook_point, tensor)
        if new is tensor:
            return None
        return replace_input(args, kwargs, key, new)

    def on_output(
        self, hook_point: HookPoint, module: nn.Module, args: Any, *kwargs_and_output: Any
    ) -> Any:
        """Registered at the output of a module with hooks."""
        if not self._acts_at(hook_point):
            return None
        output, location = kwargs_and_output[-1], hook_point.location
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

    def on_inside(
        self, hook_points: dict[int | str, HookPoint], name: str, tensor: Tensor
    ) -> Tensor:
        """Called with a tensor inside a module's forward; returns the tensor to continue with."""
        if name in hook_points and self._acts_at(hook_points[name]):
            return self._apply_hooks(hook_points[name], tensor)
        return tensor

    def _acts_at(self, hook_point: HookPoint) -> bool:
        """True if hooks act in a call of their module; raises if it is in no forward."""
        if self._forward_thread == get_ident():
            return not self.hook_thread and not hooks_are_off()
        if self._unrelated is not None or not self.scope.open:
            return False
        if self.scope in CURRENT_SCOPES.get() and not hooks_are_off():
            raise Unsupported(
                f"{hook_point.location.path!r} was called by itself, outside a forward of "
                f"{type(self.lm.root).__name__}: its rows and positions are unknown. Call the "
                "model, or attach to the module that is called"
            )
        return False

    def _apply_hooks(
        self, hook_point: HookPoint, tensor: Tensor, module_input: Tensor | None = None
    ) -> Tensor:
        """Applies all hooks at one hook point; returns the tensor with which the model goes on."""
        ranks = self.lm.ranks
        if ranks is None:
            return self._apply_to_whole(hook_point, module_input, tensor)
        site = hook_point.site
        sizes = full_sizes(self.lm.layout, site, self.lm.location(site))
        location = hook_point.location
        key = location.path, location.side, location.item
        apply = partial(self._apply_to_whole, hook_point, module_input)
        return ranks.around(key, tensor, sizes, apply)

    def _apply_to_whole(
        self, hook_point: HookPoint, module_input: Tensor | None, tensor: Tensor
    ) -> Tensor:
        """`_apply_hooks`, on a tensor of which no other process has a part."""
        forward_pass = self._pass
        assert forward_pass is not None
        self.hook_thread = self._forward_thread
        try:
            return self.strategy.apply(
                hook_point, forward_pass, tensor, module_input, recomputing=self._recomputing
            )
        finally:
            self.hook_thread = 0


# ---- the tensors of a module


def find_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], item: int | str, where: str
) -> tuple[Tensor, int | str]:
    """Returns a tensor that a module was called with, and its index or keyword.

    `where` names the module in the error message.
    """
    key = item
    if item == 0 and not args:
        key = next((name for name in HIDDEN_STATES_KEYWORDS if name in kwargs), 0)
    tensor = _tensor_at(kwargs if isinstance(key, str) else args, key)
    if tensor is None:
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


def pick_output(output: Any, location: ModuleLocation) -> Tensor:
    """Returns the tensor of a module's output, or one of several; `BadEdit` if it is no tensor."""
    key = location.item
    if key == "logits" and not location.path and isinstance(output, Tensor | tuple):
        key = 0  # the model returns its logits alone, or as the first item of a tuple
    if isinstance(output, Tensor):
        tensor = output if key == 0 else None
    else:
        tensor = _tensor_at(output, key)
    if tensor is None:
        size = f" of {len(output)}" if isinstance(output, tuple | list) else ""
        raise BadEdit(
            f"{location.path or 'the model'} gives a {type(output).__name__}{size}, and item "
            f"{location.item!r} of it is no tensor: say which is meant, hk.module(path, item=…)"
        )
    return tensor


def _tensor_at(values: Any, key: int | str) -> Tensor | None:
    """The tensor at an index or a name; None if no tensor is there."""
    try:
        value = values[key]
    except (KeyError, IndexError, TypeError):
        return None
    return value if isinstance(value, Tensor) else None


def replace_output(output: Any, item: int | str, new: Tensor) -> Any:
    """Returns the same output with one tensor replaced; its type is the type of the output."""
    if isinstance(output, Tensor):
        return new
    if isinstance(output, tuple | list):
        items = list(output)
        items[item if isinstance(item, int) else 0] = new
        make = getattr(output, "_make", type(output))  # `_make` is that of a named tuple
        return make(items)
    changed = copy.copy(output)  # a dict, or a ModelOutput, which is a dict that has indices too
    key = item
    if isinstance(item, int) and item not in output:
        key = list(output)[item]
    changed[key] = new
    return changed


def forward_of_site(lm: LM, site: AnySite) -> Callable[[Tensor], Tensor]:
    """Returns the forward of the module that reads a site, as a function of the whole site.

    This also holds where each process of a split model has a part of the module's weights.
    """
    location = lm.location(site)
    forward, split = lm.submodule(location.path).forward, None
    ranks = lm.ranks
    if ranks is not None:
        split = ranks.splits.get((location.path, location.side, location.item))
    if ranks is None or split is None:
        return forward

    def forward_of_part(values: Tensor) -> Tensor:
        return forward(ranks.part(values, replace(split, axis=values.ndim - 1)))

    return forward_of_part
