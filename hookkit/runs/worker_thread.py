"""A function in a thread of its own that takes turns with the one that reads what it gives: only one of them runs.

It is a generator for functions that cannot yield, since what gives the values is called deep inside of them. The thread
has what torch keeps for each thread as it was where the reading began: autocast, modes, devices.
"""

import contextvars
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from ..models.overrides import locked_here
from ..models.scopes import adopt

Value = TypeVar("Value")


START = 0.5  # seconds within which a thread begins, or was never started: Ctrl-C came before


class Closed(BaseException):
    """Nobody reads any more. Raised where the function gives its next value."""


class Turns(Generic[Value]):
    """What a function gives, value by value. `close` ends the function at its next value, and waits for it."""

    def __init__(self, function: Callable[[], object], *, name: str) -> None:
        self._function = function
        self._reader, self._writer = threading.Semaphore(0), threading.Semaphore(0)
        self._value: list[Value] = []
        self._error: BaseException | None = None
        self._starting = self._closed = False
        self._begun, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._context: contextvars.Context | None = None
        self._torch: list[Callable[[], AbstractContextManager[Any]]] = []

    def __iter__(self) -> Iterator[Value]:
        adopt()
        self._context, self._torch = contextvars.copy_context(), state_of_torch()
        self._starting = True
        self._thread.start()
        while True:
            self._writer.release()
            self._reader.acquire()
            if not self._value:
                break
            yield self._value.pop()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def give(self, value: Value) -> None:
        """Hand a value over and wait until the next one is asked for. Called by the function."""
        if self._closed:
            raise Closed
        self._value.append(value)
        self._reader.release()
        self._writer.acquire()
        if self._closed:
            raise Closed

    def close(self) -> None:
        """End the function, if it has not ended, and wait until it has cleaned up behind itself."""
        raised: BaseException | None = None
        while True:
            try:
                self._closed = True
                self._writer.release()
                self._wait()
                break
            except BaseException as error:  # noqa: BLE001  Ctrl-C waits until the model is as it was
                raised = error if raised is None else raised
        if raised is not None:
            raise raised

    def _wait(self) -> None:
        if not self._begun.wait(START if self._starting else 0):
            return  # should it begin after all, it finds that all is over, and touches nothing
        while not self._ended.wait(1.0):
            if locked_here():
                return  # closed by the garbage collector in the midst of what the function needs: it ends by itself
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
            for state in self._torch:
                stack.enter_context(state())
            self._function()


def state_of_torch() -> list[Callable[[], AbstractContextManager[Any]]]:
    """What makes torch in another thread work as it does in this one: autocast, modes, gradients, device and stream."""
    states: list[Callable[[], AbstractContextManager[Any]]] = []
    states += [
        lambda mode=mode: _entered(TorchDispatchMode, mode)
        for mode in _get_current_dispatch_mode_stack()
    ]
    states += [
        lambda mode=mode: _entered(TorchFunctionMode, mode)
        for mode in _get_current_function_mode_stack()
    ]
    inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    states.append(lambda: torch.inference_mode(inference))
    states.append(lambda: torch.set_grad_enabled(grad))
    cached = torch.is_autocast_cache_enabled()
    for device in _devices():
        enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        states.append(
            lambda d=device, e=enabled, t=dtype: torch.autocast(
                d, dtype=t, enabled=e, cache_enabled=cached
            )
        )
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        number, stream = torch.cuda.current_device(), torch.cuda.current_stream()
        states.append(lambda: torch.cuda.device(number))
        states.append(lambda: torch.cuda.stream(stream))
    return states


@contextmanager
def _entered(kind: Any, mode: Any) -> Iterator[None]:
    """A block in which a mode acts. What its own class does when a user enters it is left out."""
    kind.__enter__(mode)
    try:
        yield
    finally:
        kind.__exit__(mode, None, None, None)


def _devices() -> list[str]:
    """The kinds of device on which there may be autocast."""
    accelerator = (
        torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    )
    return ["cpu"] if accelerator is None else ["cpu", accelerator.type]
