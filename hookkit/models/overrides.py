"""Lending a model other methods, attributes and hooks for a while.

`Lent` keeps what one block has put on a model and takes it off again: in whatever order blocks are left, from whatever
thread, and to its end when Ctrl-C comes in between. Nothing is put back as it stood when the block was entered: each
attribute has one record, which knows the original and everything that stands around it now.
"""

import functools
import threading
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from torch import nn

_LOCK = threading.RLock()
_SHARED: dict[tuple[int, str], "_Shared"] = {}  # has entries only while something is lent
TRIES = 3  # that a step of giving back is given: Ctrl-C may end the first

EXTRAS = {  # what torch keeps about hooks, beside the hooks
    "_forward_hooks": ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    "_forward_pre_hooks": ("_forward_pre_hooks_with_kwargs",),
}


@runtime_checkable
class Work(Protocol):
    """What is done in place of a method. It is given the method itself, which it may call."""

    def __call__(self, inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any: ...


class Layer:
    """Something around a method. `acts` says whether this call, in this thread, is meant."""

    __slots__ = ("acts", "layers", "work")

    def __init__(self, work: Work, acts: Callable[[], bool]) -> None:
        self.work, self.acts = work, acts
        self.layers: Layers | None = None  # that it is one of


class Layers:
    """All that stands around one method of one object, the oldest layer first."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owned = name in owner.__dict__
        self.before = owner.__dict__.get(name)
        original = getattr(owner, name)
        self.layers: dict[Layer, None] = {}
        layers = self.layers

        @functools.wraps(original)
        def method(*args: Any, **kwargs: Any) -> Any:
            return _call(tuple(layers), original, args, kwargs)

        method.__dict__["layers"] = self
        self.method = method


def _call(layers: tuple[Layer, ...], original: Any, args: Any, kwargs: Any) -> Any:
    """Call a method through the layers around it that are meant, the newest first."""
    for number in range(len(layers) - 1, -1, -1):
        if layers[number].acts():
            inner = functools.partial(_call_inner, layers[:number], original)
            return layers[number].work(inner, *args, **kwargs)
    return original(*args, **kwargs)


def _call_inner(layers: tuple[Layer, ...], original: Any, /, *args: Any, **kwargs: Any) -> Any:
    return _call(layers, original, args, kwargs)


class _Shared:
    """An attribute that several blocks have replaced by the same."""

    def __init__(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        self.owner = owner
        self.owned = name in owner.__dict__
        self.before = owner.__dict__.get(name)
        self.value = make(getattr(owner, name))
        self.users: set[object] = set()


class Lent:
    """What one block has put on a model. `give_back` takes all of it off; done twice, it does nothing.

    It is a context manager too, for a block that ends in the function that began it.
    """

    def __init__(self) -> None:
        self._steps: list[Callable[[], None]] = []

    def __enter__(self) -> "Lent":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.give_back()
        except BaseException:
            self.give_back()  # Ctrl-C came before the first step
            raise

    def around(
        self, owner: Any, name: str, work: Work, acts: Callable[[], bool] | None = None
    ) -> None:
        """Put something around a method: `work(inner, *args, **kwargs)` runs in its place, where `acts()` is true.

        Left out, `acts` is true in this thread. Of several the newest is called first.
        """
        layer = Layer(work, in_this_thread() if acts is None else acts)
        self.later(functools.partial(_remove_layer, owner, name, layer))
        with _LOCK:
            method = owner.__dict__.get(name)
            layers = getattr(method, "layers", None)
            if not isinstance(layers, Layers) or layers.method is not method:
                layers = Layers(owner, name)
            layer.layers = layers
            layers.layers[layer] = None
            owner.__dict__[name] = layers.method

    def share(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        """Give an object another attribute, made from its own, until all blocks that did so have given it back."""
        key, user = (id(owner), name), object()
        self.later(functools.partial(_remove_user, owner, name, user))
        with _LOCK:
            shared = _SHARED.get(key)
            if shared is None:
                shared = _SHARED[key] = _Shared(owner, name, make)
            shared.users.add(user)
            owner.__dict__[name] = shared.value

    def hooked(self, module: nn.Module, kind: str, hook: Any) -> None:
        """Take a hook off a module again, that is going to be put into its hooks of this kind."""
        self.later(functools.partial(_remove_hook, module, kind, hook))

    def later(self, step: Callable[[], None]) -> None:
        """Do this when all is given back, before the steps that are kept already. It may be done twice."""
        self._steps.append(step)

    def give_back(self) -> None:
        """Do every step, whatever is raised meanwhile, and raise the first of that afterwards."""
        steps, tries, raised = self._steps, 0, None
        while steps:
            try:
                while steps:
                    steps[-1]()
                    steps.pop()
                    tries = 0
            except BaseException as error:  # noqa: BLE001  Ctrl-C too waits until all is off
                raised = error if raised is None else raised
                tries += 1
                if tries == TRIES:
                    steps.pop()
                    tries = 0
        if raised is not None:
            raise raised


def _remove_layer(owner: Any, name: str, layer: Layer) -> None:
    with _LOCK:
        layers = layer.layers
        if layers is None:
            return
        layers.layers.pop(layer, None)
        if (
            not layers.layers and owner.__dict__.get(name) is layers.method
        ):  # else somebody put his own around it
            _restore(owner, name, layers)


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


def _restore(owner: Any, name: str, kept: Layers | _Shared) -> None:
    if kept.owned:
        owner.__dict__[name] = kept.before
    else:
        owner.__dict__.pop(name, None)


def _remove_hook(module: nn.Module, kind: str, hook: Any) -> None:
    shared = _SHARED.get((id(module), kind))
    for hooks in (module.__dict__[kind], *(() if shared is None else (shared.before,))):
        numbers = [number for number, other in list(hooks.items()) if other is hook]
        for number in numbers:
            for extra in EXTRAS[kind]:
                module.__dict__[extra].pop(number, None)
            hooks.pop(number, None)


def in_this_thread() -> Callable[[], bool]:
    """A function that is true in the thread that runs now."""
    thread = threading.get_ident()
    return lambda: threading.get_ident() == thread


def locked_here() -> bool:
    """True while this thread changes what is lent, so that it must not wait for another one that wants to."""
    return _LOCK._is_owned()  # pyright: ignore[reportAttributeAccessIssue]


def without_hooks(module: nn.Module, lent: Lent, acts: Callable[[], bool] | None = None) -> None:
    """Let a module be called without its hooks. They stay where they are, for other threads."""

    def work(inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        return module.forward(*args, **kwargs)

    compiled = module.__dict__.get("_compiled_call_impl") is not None
    lent.around(module, "_compiled_call_impl" if compiled else "_call_impl", work, acts)
