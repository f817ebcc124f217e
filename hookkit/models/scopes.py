"""Scopes: in which thread, task or context the hooks of a block act.

A scope belongs to the context that entered it (`contextvars`), and to those that are started from there with it:
tasks of asyncio, `asyncio.to_thread`, `contextvars.copy_context().run`. A thread that is started without that context
has none of it, so that the hooks of one thread never act in the forwards of another.

A notebook runs each cell in a task of its own. So a scope whose task has ended belongs to the thread that entered it.
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
_ATTACHED: "weakref.WeakSet[Scope]" = weakref.WeakSet()  # the open scopes of blocks of hk.attach
_LOCK = threading.RLock()


@dataclass(eq=False, slots=True)
class Progress:
    """How many forwards with hooks have begun in this process: a sign of life for those who wait."""

    forwards: int = 0


PROGRESS = Progress()


@dataclass(eq=False)
class Scope:
    """One block or run: on which model, who entered it, and whether it is open."""

    model: "weakref.ref[nn.Module]"
    attached: bool  # a block of hk.attach, in which code of others runs the model
    thread: "weakref.ref[threading.Thread]" = field(
        default_factory=lambda: weakref.ref(threading.current_thread())
    )
    task: "weakref.ref[Any] | None" = field(default_factory=lambda: _reference(_current_task()))
    open: bool = True
    before: "tuple[Scope, ...]" = ()

    def belongs_here(self) -> bool:
        """True in the thread that entered it, unless another task of that thread did, which is still running."""
        if self.thread() is not threading.current_thread():
            return False
        task = None if self.task is None else self.task()
        return task is None or task.done() or task is _current_task()


HERE: ContextVar[tuple[Scope, ...]] = ContextVar("hookkit.scopes", default=())
"""The scopes that act in this context. Closed ones may be among them."""


def enter(scope: Scope, *, alone: bool = False) -> None:
    """Let a scope act in this context; with `alone`, no other one until it is left."""
    adopt()
    others = tuple(other for other in HERE.get() if other.open)
    scope.before = others if alone else ()
    if alone:
        _ALONE.set(True)
    HERE.set((scope,) if alone else (*others, scope))
    if scope.attached:
        with _LOCK:
            _ATTACHED.add(scope)


def leave(scope: Scope, *, alone: bool = False) -> None:
    """Let a scope act nowhere any more. It may be left in another context than it was entered in, and twice."""
    scope.open = False
    with _LOCK:
        _ATTACHED.discard(scope)
    if alone and HERE.get() == (scope,):
        HERE.set(scope.before)
        _ALONE.set(False)
    elif scope in HERE.get():
        HERE.set(tuple(other for other in HERE.get() if other is not scope))


def adopt() -> None:
    """Let the open blocks that this thread entered act in this context too, if their own task has ended."""
    if not _ATTACHED or _ALONE.get():
        return
    with _LOCK:
        attached = list(_ATTACHED)
    here = HERE.get()
    new = [scope for scope in attached if scope.open and scope not in here and scope.belongs_here()]
    if new:
        HERE.set((*new, *here))


@contextmanager
def without(scope: Scope) -> Iterator[None]:
    """A block in which a scope does not act in this context."""
    here = HERE.get()
    HERE.set(tuple(other for other in here if other is not scope))
    try:
        yield
    finally:
        HERE.set(here)


def has_scope(root: nn.Module) -> bool:
    """True where a block or run of this context is open on the model, a part of it, or what it is a part of."""
    models = [scope.model() for scope in HERE.get() if scope.open]
    return any(model is not None and _overlap(model, root) for model in models)


def _overlap(one: nn.Module, other: nn.Module) -> bool:
    if one is other:
        return True
    return any(module is other for module in one.modules()) or any(
        module is one for module in other.modules()
    )


def _reference(task: Any) -> "weakref.ref[Any] | None":
    return None if task is None else weakref.ref(task)


def _current_task() -> Any:
    """The task of asyncio that runs, if there is one."""
    asyncio = sys.modules.get("asyncio")
    if asyncio is None or asyncio._get_running_loop() is None:
        return None
    return asyncio.current_task()
