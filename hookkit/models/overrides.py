"""Temporary changes of a model, and the thread, task or context in which hooks act.

`Overrides` owns the changes that one `with` block or run has made, and undoes them. This works in
whatever order blocks end, from any thread, and when Ctrl-C interrupts it. No attribute is set back
to its value at the start of a block, because another block may have changed it meanwhile: each
changed attribute has one record, which knows the original value and all current changes.

A `Scope` says where the hooks of a `with` block act. It belongs to the context that entered it
(`contextvars`) and to contexts started from it: asyncio tasks, `asyncio.to_thread`,
`contextvars.copy_context().run`. A thread that was started without that context has no scope, so
hooks of one thread never act in forwards of another. A notebook runs each cell in its own task.
Therefore a scope whose task has ended belongs to the thread that entered it.
"""

import functools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import nn
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode,
    _get_current_function_mode_stack,
    _pop_mode,
    _push_mode,
)

_LOCK = threading.RLock()
_SHARED: dict[tuple[int, str], "_SharedAttribute"] = {}  # has entries only while one is replaced
TRIES = 3  # of each cleanup step: Ctrl-C may interrupt the first

EXTRAS = {  # the other dictionaries in which torch lists a hook
    "_forward_hooks": ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    "_forward_pre_hooks": ("_forward_pre_hooks_with_kwargs",),
}


@runtime_checkable
class MethodReplacement(Protocol):
    """Runs in place of a method, which it receives as `inner` and may call."""

    def __call__(self, inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any: ...


class MethodWrapper:
    """One replacement of a method. `applies` returns True if the current call is to be replaced."""

    __slots__ = ("applies", "method", "work")

    def __init__(self, work: MethodReplacement, applies: Callable[[], bool]) -> None:
        self.work, self.applies = work, applies
        self.method: WrappedMethod | None = None  # the one that it wraps


class WrappedMethod:
    """All wrappers of one method of one object, the oldest first.

    The object's attribute owns it.
    """

    def __init__(self, owner: Any, name: str) -> None:
        self.was_instance_attribute = name in owner.__dict__
        self.original_value = owner.__dict__.get(name)
        original = getattr(owner, name)
        self.wrappers: dict[MethodWrapper, None] = {}
        wrappers = self.wrappers

        @functools.wraps(original)
        def function(*args: Any, **kwargs: Any) -> Any:
            return _call(tuple(wrappers), original, *args, **kwargs)

        function.__dict__["wrapped_method"] = self
        self.function = function


def _call(wrappers: tuple[MethodWrapper, ...], original: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Calls a method through the wrappers that apply, the newest first."""
    for number in range(len(wrappers) - 1, -1, -1):
        if wrappers[number].applies():
            inner = functools.partial(_call, wrappers[:number], original)
            return wrappers[number].work(inner, *args, **kwargs)
    return original(*args, **kwargs)


class _SharedAttribute:
    """An attribute that several blocks have replaced by the same value; owned by `_SHARED`."""

    def __init__(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        self.owner = owner  # keeps the object alive, and so its id unique
        self.was_instance_attribute = name in owner.__dict__
        self.original_value = owner.__dict__.get(name)
        self.value = make(getattr(owner, name))
        self.users: set[object] = set()


class Overrides:
    """Owns the changes that one `with` block or run has made to a model.

    `restore` undoes all of them; a second call does nothing. It is also a context manager that
    does so on exit.
    """

    def __init__(self) -> None:
        self._steps: list[Callable[[], None]] = []

    def __enter__(self) -> "Overrides":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.restore()
        except BaseException:
            self.restore()  # Ctrl-C came before the first step
            raise

    def wrap_method(
        self,
        owner: Any,
        name: str,
        work: MethodReplacement,
        applies: Callable[[], bool] | None = None,
    ) -> None:
        """Replaces a method by `work(inner, *args, **kwargs)` where `applies()` is true.

        By default it applies to the calls of this thread. Of several replacements the newest is
        called first.
        """
        wrapper = MethodWrapper(work, applies or _in_this_thread())
        self.add_cleanup(functools.partial(_remove_wrapper, owner, name, wrapper))
        with _LOCK:
            function = owner.__dict__.get(name)
            method = getattr(function, "wrapped_method", None)
            if not isinstance(method, WrappedMethod) or method.function is not function:
                method = WrappedMethod(owner, name)
            wrapper.method = method
            method.wrappers[wrapper] = None
            owner.__dict__[name] = method.function

    def replace_attribute(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        """Replaces an attribute by `make(its value)` until all blocks that replaced it end."""
        key, user = (id(owner), name), object()
        self.add_cleanup(functools.partial(_remove_user, owner, name, user))
        with _LOCK:
            shared = _SHARED.get(key)
            if shared is None:
                shared = _SHARED[key] = _SharedAttribute(owner, name, make)
            shared.users.add(user)
            owner.__dict__[name] = shared.value

    def remove_hook_on_exit(self, module: nn.Module, kind: str, hook: Any) -> None:
        """Removes a hook on cleanup. Call this before the hook is registered in `module.<kind>`."""
        self.add_cleanup(functools.partial(_remove_hook, module, kind, hook))

    def add_cleanup(self, step: Callable[[], None]) -> None:
        """Adds a step of the cleanup, to run before those added earlier. It may run twice."""
        self._steps.append(step)

    def restore(self) -> None:
        """Runs every step, even if some raise, and raises the first error at the end."""
        steps, tries, first_error = self._steps, 0, None
        while steps:
            try:
                while steps:
                    steps[-1]()
                    steps.pop()
                    tries = 0
            except BaseException as error:  # noqa: BLE001  Ctrl-C too waits until all is undone
                if first_error is None:
                    first_error = error
                tries += 1
                if tries == TRIES:
                    steps.pop()
                    tries = 0
        if first_error is not None:
            raise first_error


def _remove_wrapper(owner: Any, name: str, wrapper: MethodWrapper) -> None:
    with _LOCK:
        method = wrapper.method
        if method is None:
            return
        method.wrappers.pop(wrapper, None)
        # if the attribute is another function, somebody else has wrapped ours
        if not method.wrappers and owner.__dict__.get(name) is method.function:
            _restore(owner, name, method)


def _remove_user(owner: Any, name: str, user: object) -> None:
    with _LOCK:
        shared = _SHARED.get((id(owner), name))
        if shared is None:
            return
        shared.users.discard(user)
        if not shared.users:
            if owner.__dict__.get(name) is shared.value:
                _restore(owner, name, shared)
            _SHARED.pop((id(owner), name), None)


def _restore(owner: Any, name: str, record: WrappedMethod | _SharedAttribute) -> None:
    if record.was_instance_attribute:
        owner.__dict__[name] = record.original_value
    else:
        owner.__dict__.pop(name, None)


def _remove_hook(module: nn.Module, kind: str, hook: Any) -> None:
    hook_tables = [module.__dict__[kind]]
    shared = _SHARED.get((id(module), kind))
    if shared is not None:
        hook_tables.append(shared.original_value)
    for hooks in hook_tables:
        numbers = [number for number, other in list(hooks.items()) if other is hook]
        for number in numbers:
            for extra in EXTRAS[kind]:
                module.__dict__[extra].pop(number, None)
            hooks.pop(number, None)


def _in_this_thread() -> Callable[[], bool]:
    """Returns a function that is true in the thread that made it."""
    thread = threading.get_ident()
    return lambda: threading.get_ident() == thread


def holds_override_lock() -> bool:
    """True while this thread changes overrides and must not wait for another thread to do so."""
    return _LOCK._is_owned()  # pyright: ignore[reportAttributeAccessIssue]


def skip_hooks(
    module: nn.Module, overrides: Overrides, applies: Callable[[], bool] | None = None
) -> None:
    """Makes calls of a module skip its hooks. The hooks stay registered for other threads."""

    def call_forward(inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        return module.forward(*args, **kwargs)

    compiled = module.__dict__.get("_compiled_call_impl") is not None
    name = "_compiled_call_impl" if compiled else "_call_impl"
    overrides.wrap_method(module, name, call_forward, applies)


# ---- torch function modes


class RemovableMode(TorchFunctionMode):
    """A torch function mode that is removed even if Ctrl-C comes while torch sets it aside."""

    def __exit__(self, *_: object) -> None:
        if _get_current_function_mode() is self:
            super().__exit__(None, None, None)
        else:
            remove_modes_except([mode for mode in current_modes() if mode is not self])


def current_modes() -> list[Any]:
    """Returns the torch function modes of this thread, the innermost last."""
    return _get_current_function_mode_stack()


def remove_modes_except(modes_to_keep: list[Any]) -> None:
    """Removes from this thread's stack every mode of hookkit that is not among these."""
    current = current_modes()
    remaining = [
        mode for mode in current if mode in modes_to_keep or not isinstance(mode, RemovableMode)
    ]
    if remaining == current:
        return
    for _ in current:
        _pop_mode()
    for mode in remaining:
        _push_mode(mode)


# ---- scopes


_ALONE: ContextVar[bool] = ContextVar("hookkit.alone", default=False)
_ATTACHED: "weakref.WeakSet[Scope]" = weakref.WeakSet()  # the open scopes of hk.attach
_SCOPES_LOCK = threading.RLock()


@dataclass(eq=False, slots=True)
class Progress:
    """The number of forwards with hooks that this process has begun. Code that waits reads it."""

    forwards: int = 0


PROGRESS = Progress()


def _current_task() -> Any:
    """Returns the running asyncio task, or None."""
    asyncio = sys.modules.get("asyncio")
    if asyncio is None or asyncio._get_running_loop() is None:
        return None
    return asyncio.current_task()


def _current_task_reference() -> "weakref.ref[Any] | None":
    task = _current_task()
    return None if task is None else weakref.ref(task)


@dataclass(eq=False)
class Scope:
    """One `with` block or run: its model, who entered it, and whether it is open.

    Its manager owns it.
    """

    model: "weakref.ref[nn.Module]"
    attached: bool  # True for hk.attach, in which other code runs the model
    thread: "weakref.ref[threading.Thread]" = field(
        default_factory=lambda: weakref.ref(threading.current_thread())
    )
    task: "weakref.ref[Any] | None" = field(default_factory=_current_task_reference)
    open: bool = True
    previous: "tuple[Scope, ...]" = ()  # the scopes that this one suspends

    def belongs_to_caller(self) -> bool:
        """True in the thread that entered it, unless another task did so that is still running."""
        if self.thread() is not threading.current_thread():
            return False
        task = None if self.task is None else self.task()
        return task is None or task.done() or task is _current_task()


CURRENT_SCOPES: ContextVar[tuple[Scope, ...]] = ContextVar("hookkit.scopes", default=())
"""The scopes of this context. It may contain closed ones."""


def enter_scope(scope: Scope, *, alone: bool = False) -> None:
    """Adds a scope to this context.

    With `alone`, the other scopes are suspended until it is left.
    """
    adopt_attached_scopes()
    open_scopes = tuple(other for other in CURRENT_SCOPES.get() if other.open)
    if alone:
        scope.previous = open_scopes
        _ALONE.set(True)
        CURRENT_SCOPES.set((scope,))
    else:
        scope.previous = ()
        CURRENT_SCOPES.set((*open_scopes, scope))
    if scope.attached:
        with _SCOPES_LOCK:
            _ATTACHED.add(scope)


def leave_scope(scope: Scope, *, alone: bool = False) -> None:
    """Closes a scope. This may be called twice, and in another context than `enter_scope`."""
    scope.open = False
    with _SCOPES_LOCK:
        _ATTACHED.discard(scope)
    if alone and CURRENT_SCOPES.get() == (scope,):
        CURRENT_SCOPES.set(scope.previous)
        _ALONE.set(False)
    elif scope in CURRENT_SCOPES.get():
        CURRENT_SCOPES.set(_all_but(scope))


def adopt_attached_scopes() -> None:
    """Adds the scopes of hk.attach that this thread entered in tasks that have ended."""
    if not _ATTACHED or _ALONE.get():
        return
    with _SCOPES_LOCK:
        attached = list(_ATTACHED)
    current = CURRENT_SCOPES.get()
    candidates = [scope for scope in attached if scope.open and scope not in current]
    adopted = tuple(filter(Scope.belongs_to_caller, candidates))
    if adopted:
        CURRENT_SCOPES.set(adopted + current)


@contextmanager
def suspend_scope(scope: Scope) -> Iterator[None]:
    """Suspends a scope in this context, inside a `with` block."""
    current = CURRENT_SCOPES.get()
    CURRENT_SCOPES.set(_all_but(scope))
    try:
        yield
    finally:
        CURRENT_SCOPES.set(current)


def _all_but(scope: Scope) -> tuple[Scope, ...]:
    return tuple(other for other in CURRENT_SCOPES.get() if other is not scope)


def has_open_scope(root: nn.Module) -> bool:
    """True if this context has an open scope on the model, a part of it, or a model around it."""
    for scope in CURRENT_SCOPES.get():
        model = scope.model()
        if not scope.open or model is None:
            continue
        if root in model.modules() or model in root.modules():
            return True
    return False


# ---- forwards without hooks: trials of padding, and those of a source


_TRIALS = threading.local()


def in_padding_trial() -> bool:
    """True in the forwards of a trial of `hookkit.models.padding`, which hooks must ignore."""
    return getattr(_TRIALS, "running", False)


def hooks_are_off() -> bool:
    """True in a forward of this thread in which no hook of hookkit acts."""
    return in_padding_trial() or getattr(_TRIALS, "reading_source", False)


def turn_hooks_off(overrides: Overrides) -> None:
    """Makes hooks ignore the forwards of this thread, a source's, until `overrides` is restored."""
    before = getattr(_TRIALS, "reading_source", False)
    overrides.add_cleanup(functools.partial(setattr, _TRIALS, "reading_source", before))
    _TRIALS.reading_source = True


def enter_padding_trial(overrides: Overrides) -> None:
    """Makes hooks ignore the forwards of this thread until `overrides` is restored."""
    overrides.add_cleanup(functools.partial(setattr, _TRIALS, "running", False))
    _TRIALS.running = True
