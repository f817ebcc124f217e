"""Turns: runs a function in a thread of its own and yields the values that it gives.

It is a generator for functions that cannot yield, because their values are given by code that they
call. The thread and the reader take turns: only one of them runs. The thread has torch's state of
the thread in which the reading began: autocast, modes, devices.
"""

import contextvars
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from ..models.overrides import adopt_attached_scopes, holds_override_lock

Value = TypeVar("Value")

START_TIMEOUT = 0.5  # seconds within which a thread starts, unless Ctrl-C came before its start


class Closed(BaseException):
    """Raised in the function where it gives a value that nobody reads any more."""


class ThreadedGenerator(Generic[Value]):
    """Iterates over the values of a function.

    `close` ends the function at its next value, and waits until it has ended.
    """

    def __init__(self, function: Callable[[], object], *, name: str) -> None:
        self._function = function
        self._reader, self._writer = threading.Semaphore(0), threading.Semaphore(0)
        self._value: list[Value] = []
        self._error: BaseException | None = None
        self._starting = self._closed = False
        self._begun, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._context: contextvars.Context | None = None
        self._torch_state: list[Callable[[], AbstractContextManager[Any]]] = []

    def __iter__(self) -> Iterator[Value]:
        adopt_attached_scopes()
        self._context, self._torch_state = contextvars.copy_context(), state_of_torch()
        self._starting = True
        try:
            self._thread.start()
        except RuntimeError as error:
            raise _interrupt_of(error) from None
        while True:
            try:
                self._writer.release()
                self._reader.acquire()
            except RuntimeError as error:
                raise _interrupt_of(error) from None
            if not self._value:
                break
            yield self._value.pop()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def give(self, value: Value) -> None:
        """Called by the function: gives a value to the reader and waits until it wants the next."""
        if self._closed:
            raise Closed
        self._value.append(value)
        self._reader.release()
        self._writer.acquire()
        if self._closed:
            raise Closed

    def close(self) -> None:
        """Ends the function, if it has not ended, and waits until it has cleaned up."""
        first_error: BaseException | None = None
        while True:
            try:
                self._closed = True
                self._writer.release()
                self._wait()
                break
            except BaseException as error:  # noqa: BLE001  Ctrl-C waits until the model is restored
                if first_error is None:
                    first_error = _interrupt_of(error)
        if first_error is not None:
            raise first_error

    def _wait(self) -> None:
        if not self._begun.wait(START_TIMEOUT if self._starting else 0):
            return  # if the thread starts after all, it sees that it is closed and changes nothing
        while not self._ended.wait(1.0):
            if holds_override_lock():
                # the garbage collector closes it while this thread holds a lock that the function
                # needs: the function ends by itself
                return
        while self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(1.0)

    def _work(self) -> None:
        try:
            self._begun.set()
            if not self._closed:
                self._writer.acquire()
            if not self._closed and self._context is not None:
                self._context.run(self._run)
        except Closed:
            pass
        except BaseException as error:  # noqa: BLE001  it is raised where the values are read
            self._error = error
        finally:
            self._ended.set()
            self._reader.release()

    def _run(self) -> None:
        with ExitStack() as stack:
            for make_context in self._torch_state:
                stack.enter_context(make_context())
            self._function()


def _interrupt_of(error: BaseException) -> BaseException:
    """Returns the KeyboardInterrupt that Python turned into a RuntimeError, else the error.

    `threading.Condition` raises "release unlocked lock" if Ctrl-C comes while it takes its lock
    again.
    """
    interrupt = error.__context__
    if isinstance(error, RuntimeError) and isinstance(interrupt, KeyboardInterrupt):
        return interrupt
    return error


def state_of_torch() -> list[Callable[[], AbstractContextManager[Any]]]:
    """Returns functions that make context managers; in them torch works as in this thread.

    They restore autocast, modes, gradients, device and stream.
    """
    contexts: list[Callable[[], AbstractContextManager[Any]]] = []
    for mode in _get_current_dispatch_mode_stack():
        contexts.append(partial(_entered, TorchDispatchMode, mode))
    for mode in _get_current_function_mode_stack():
        contexts.append(partial(_entered, TorchFunctionMode, mode))
    contexts.append(partial(torch.inference_mode, torch.is_inference_mode_enabled()))
    contexts.append(partial(torch.set_grad_enabled, torch.is_grad_enabled()))
    for device in filter(None, ("cpu", accelerator_type())):
        autocast = partial(
            torch.autocast,
            device,
            dtype=torch.get_autocast_dtype(device),
            enabled=torch.is_autocast_enabled(device),
            cache_enabled=torch.is_autocast_cache_enabled(),
        )
        contexts.append(autocast)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        contexts.append(partial(torch.cuda.device, torch.cuda.current_device()))
        contexts.append(partial(torch.cuda.stream, torch.cuda.current_stream()))
    return contexts


def accelerator_type() -> str | None:
    """Returns the type of this machine's accelerator, such as "cuda"; None if it has none."""
    if not torch.accelerator.is_available():
        return None
    accelerator = torch.accelerator.current_accelerator()
    return None if accelerator is None else accelerator.type


@contextmanager
def _entered(kind: Any, mode: Any) -> Iterator[None]:
    """A context in which a mode acts, without what its own class does when it is entered."""
    kind.__enter__(mode)
    try:
        yield
    finally:
        kind.__exit__(mode, None, None, None)
