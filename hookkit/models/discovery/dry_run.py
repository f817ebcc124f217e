"""One dry run of a model: which modules ran, what each read and gave, and what attention was made of.

For the time of the run each watched module has a forward that writes down what goes in and comes out (copies, since
some families add to a tensor in place). Afterwards the model is what it was.
"""

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import Mode, keep_modes, listen, modes
from ..overrides import Lent, without_hooks

F = nn.functional
SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)
PRODUCTS = (
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    torch.bmm,
    Tensor.bmm,
    torch.baddbmm,
    Tensor.baddbmm,
)
BENT = (
    *(
        F.silu,
        F.gelu,
        F.relu,
        Tensor.relu,
        torch.relu,
        F.relu6,
        F.elu,
        F.leaky_relu,
        F.mish,
        F.softplus,
        F.hardswish,
    ),
    *(torch.tanh, Tensor.tanh, torch.sigmoid, Tensor.sigmoid, F.tanh, F.sigmoid),
)
KINDS: dict[Any, str] = {
    **dict.fromkeys(SOFTMAX, "softmax"),
    **dict.fromkeys(PRODUCTS, "product"),
    **dict.fromkeys(BENT, "activation"),
    F.linear: "linear",
    F.scaled_dot_product_attention: "fused",
}
INSIDE = ("query", "key", "value", "scores", "pattern")
HIDDEN = ("hidden_states", "input", "x")  # the keywords under which a module is given what it reads


@dataclass(eq=False)
class Step:
    """One of torch's functions, called in a module's own code."""

    kind: str
    given: list[Tensor]
    keywords: dict[str, Any]
    gave: Tensor
    start: int


@dataclass(eq=False)
class Visit:
    """One call of a module: `above` are the calls in which it happened, the outermost first."""

    path: str
    module: nn.Module
    above: tuple["Visit", ...]
    start: int
    end: int = 0
    given: dict[int | str, Tensor] = field(default_factory=dict)
    gave: tuple[Any, ...] = ()
    steps: list[Step] = field(default_factory=list)
    heads: dict[str, Tensor] = field(
        default_factory=dict
    )  # what transformers' attention interface was given and made

    @property
    def read(self) -> Tensor | None:
        """What it was given first, as a hook on its input finds it."""
        return self.given.get(
            0, next((self.given[name] for name in HIDDEN if name in self.given), None)
        )

    @property
    def result(self) -> Tensor | None:
        """What it gave, or the first of several."""
        return self.gave[0] if self.gave and isinstance(self.gave[0], Tensor) else None

    @property
    def name(self) -> str:
        """Its path in the block, for a sentence."""
        return re.sub(r"^.*?\.\d+\.", "", self.path)

    @property
    def linear(self) -> bool:
        """True for a matrix with a forward: nn.Linear, transformers' Conv1D, a family's own kind of it."""
        weight = getattr(self.module, "weight", None)
        return (
            isinstance(weight, Tensor)
            and weight.ndim == 2
            and not isinstance(self.module, nn.Embedding)
        )


@dataclass(eq=False)
class Watched:
    """What a dry run of [rows, width] tokens showed."""

    rows: int
    width: int
    visits: list[Visit]
    calls: dict[nn.Module, int]
    logits: Tensor | None
    unopened: str = ""  # why scores and pattern could not be asked for

    def once(self, visit: Visit) -> bool:
        """True where a hook on the module would fire once in a forward."""
        return self.calls[visit.module] == 1

    def of(self, module: nn.Module | None) -> Visit | None:
        """The call of a module that ran once."""
        return next(
            (visit for visit in self.visits if visit.module is module and self.once(visit)), None
        )

    def inside(self, visit: Visit) -> list[Visit]:
        """The calls that happened in a call, in order."""
        return [other for other in self.visits if visit in other.above]

    def steps(self, visit: Visit) -> list[Step]:
        """torch's functions that were called in a call, in order."""
        found = [step for each in (visit, *self.inside(visit)) for step in each.steps]
        return sorted(found, key=lambda step: step.start)

    def laid(self, tensor: Any) -> Tensor | None:
        """A tensor as [batch, pos, …]; None where it is not one number or more for each token."""
        if not isinstance(tensor, Tensor):
            return None
        if tensor.ndim == 2 and tensor.shape[0] == self.rows * self.width:
            return tensor.view(self.rows, self.width, -1)
        return tensor if tensor.ndim == 3 and tensor.shape[:2] == (self.rows, self.width) else None


def dry_run(
    root: nn.Module, modules: dict[str, nn.Module], left_out: list[nn.Module], ids: Tensor
) -> Watched:
    """Run the model once on token ids [batch, pos] and write down what these modules, by path, do.

    What happens in the modules that are left out is not written down.
    """
    try:
        return _run(root, modules, left_out, ids, frozenset(INSIDE))
    except Exception as error:  # noqa: BLE001  a family whose scores cannot be asked for has other sites
        watched = _run(root, modules, left_out, ids, frozenset(INSIDE[:3]))
        watched.unopened = str(error).splitlines()[0] if str(error) else type(error).__name__
        return watched


def _run(
    root: nn.Module,
    modules: dict[str, nn.Module],
    left_out: list[nn.Module],
    ids: Tensor,
    wanted: frozenset[str],
) -> Watched:
    watcher = _Watcher()
    with Lent() as lent:
        lent.later(partial(keep_modes, modes()))
        for module in root.modules():
            _put_at_rest(module, lent)
        for path, module in modules.items():
            if _speaks(module):
                listen(lent, module, "interface", wanted, watcher.say)
            lent.around(module, "forward", watcher.watched(path, module))
        for module in left_out:
            lent.around(module, "forward", watcher.unwatched)
        with torch.no_grad(), watcher:
            output = root(input_ids=ids, use_cache=False)
    rows, width = ids.shape
    return Watched(rows, width, watcher.visits, watcher.calls, getattr(output, "logits", None))


def _put_at_rest(module: nn.Module, lent: Lent) -> None:
    """Let a module run without dropout and without the user's own hooks, which are not to notice the run."""
    if module.training:
        lent.share(module, "training", lambda training: False)
    if module._forward_hooks or module._forward_pre_hooks:
        without_hooks(module, lent)


def _speaks(module: nn.Module) -> bool:
    """True where a module may call transformers' attention interface."""
    kind = type(module)
    named = "attention" in kind.__name__.lower() or "attn" in kind.__name__.lower()
    config = module.__dict__.get("config")
    own = getattr(sys.modules[kind.__module__], "eager_attention_forward", None)
    return named and own is not None and hasattr(config, "_attn_implementation")


class _Watcher(Mode):
    """Writes down the calls of modules, and torch's functions in them."""

    def __init__(self) -> None:
        super().__init__()
        self.visits: list[Visit] = []
        self.calls: dict[nn.Module, int] = {}
        self.stack: list[Visit] = []
        self.clock = 0
        self.muted = 0

    def watched(self, path: str, module: nn.Module) -> Callable[..., Any]:
        """In place of the module's forward, one that writes down what goes in and comes out."""

        def running(inner: Any, /, *args: Any, **kwargs: Any) -> Any:
            self.calls[module] = self.calls.get(module, 0) + 1
            if self.muted:
                return inner(*args, **kwargs)
            visit = Visit(path, module, tuple(self.stack), self._now())
            visit.given = {
                key: _kept(found) for key, found in _tensors([*enumerate(args), *kwargs.items()])
            }
            self.visits.append(visit)
            self.stack.append(visit)
            try:
                output = inner(*args, **kwargs)
            finally:
                self.stack.pop()
            visit.gave, visit.end = _items(output), self._now()
            return output

        return running

    def unwatched(self, inner: Any, /, *args: Any, **kwargs: Any) -> Any:
        """In place of a module's forward, one in which nothing but calls of watched modules is counted."""
        self.muted += 1
        try:
            return inner(*args, **kwargs)
        finally:
            self.muted -= 1

    def say(self, name: str, found: Tensor) -> Tensor:
        """Write down what attention has inside."""
        if not self.muted:
            self.stack[-1].heads[name] = _kept(found)
        return found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = KINDS.get(func) if self.stack and not self.muted else None
        if kind is None:
            return func(*args, **(kwargs or {}))
        if kind == "linear":  # what it reads is known, and its weight is large
            gave = func(*args, **(kwargs or {}))
            self.stack[-1].steps.append(Step(kind, [], {}, _kept(gave), self._now()))
            return gave
        named = (kwargs or {}).items() if kind == "product" else ()
        given = [_kept(found) for _, found in _tensors([*enumerate(args), *named])]
        keywords = {
            key: _kept(each) if isinstance(each, Tensor) else each
            for key, each in (kwargs or {}).items()
        }
        gave = func(*args, **(kwargs or {}))
        self.stack[-1].steps.append(Step(kind, given, keywords, _kept(gave), self._now()))
        return gave

    def _now(self) -> int:
        self.clock += 1
        return self.clock


def _tensors(pairs: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, Tensor]]:
    for key, found in pairs:
        if isinstance(found, Tensor) and not found.is_meta:
            yield key, found


def _kept(found: Tensor) -> Tensor:
    return found.detach().clone()


def _items(output: Any) -> tuple[Any, ...]:
    """The items of what a module gave, its tensors as copies."""
    if hasattr(output, "to_tuple"):
        output = output.to_tuple()
    items = output if isinstance(output, tuple | list) else (output,)
    return tuple(_kept(item) if isinstance(item, Tensor) else None for item in items)
