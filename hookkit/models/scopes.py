"""Scopes: in which thread, task or context the hooks of a `with` block act.

A scope belongs to the context that entered it (`contextvars`) and to contexts started from it:
asyncio tasks, `asyncio.to_thread`, `contextvars.copy_context().run`. A thread that was started
without that context has no scope, so hooks of one thread never act in forwards of another.

A notebook runs each cell in its own task. Therefore a scope whose task has ended belongs to the
thread that entered it.
"""

import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import nn

_ALONE: ContextVar[bool] = ContextVar("hookkit.alone", default=False)
_ATTACHED: "weakref.WeakSet[Scope]" = weakref.WeakSet()  # the open scopes of hk.attach
_LOCK = threading.RLock()


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
        with _LOCK:
            _ATTACHED.add(scope)


def leave_scope(scope: Scope, *, alone: bool = False) -> None:
    """Closes a scope. This may be called twice, and in another context than `enter_scope`."""
    scope.open = False
    with _LOCK:
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
    with _LOCK:
        attached = list(_ATTACHED)
    current = CURRENT_SCOPES.get()
    adopted = []
    for scope in attached:
        if scope.open and scope not in current and scope.belongs_to_caller():
            adopted.append(scope)
    if adopted:
        CURRENT_SCOPES.set((*adopted, *current))


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
