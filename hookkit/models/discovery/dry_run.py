"""A dry run of a model that records its modules, their inputs and outputs, and its attention.

During the run, each recorded module has a wrapped forward that copies its inputs and outputs;
copies are needed because some families add to a tensor in place. Afterwards the model is as it was
before. At the end are the comparisons of recorded tensors: equal values, sums and multiples.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..attention import (
    eager_attention_of,
    intercept_tensors,
)
from ..families.schema import ModuleLocation
from ..overrides import Overrides, RemovableMode, current_modes, remove_modes_except, skip_hooks

ROWS, WIDTH = 2, 7  # of the token ids of a dry run
PRODUCTS = ("matmul", "__matmul__", "bmm", "baddbmm")
SATURATING = ("tanh", "sigmoid")
RECTIFIERS = ("relu", "relu6", "elu", "leaky_relu", "silu", "gelu", "mish", "softplus", "hardswish")
KINDS = {  # of the torch functions, and methods of tensors, with these names
    "softmax": "softmax",
    "scaled_dot_product_attention": "fused",
    "linear": "linear",
    **dict.fromkeys(PRODUCTS, "product"),
    **dict.fromkeys((*SATURATING, *RECTIFIERS), "activation"),
}
HEAD_TENSORS = frozenset({"query", "key", "value"})
RELATIVE_TOLERANCE = 1e-5
INPUT_KEYWORDS = ("hidden_states", "input", "x")  # the names of a module's main input


@dataclass(eq=False)
class FunctionCall:
    """One call of a torch function in a module's own code."""

    kind: str
    owner: "ModuleCall"
    inputs: list[Tensor]
    output: Tensor

    @property
    def is_matrix_product(self) -> bool:
        """True for a product of two matrices, or of two batches of them."""
        return self.kind == "product" and len(self.inputs) >= 2


@dataclass(eq=False, repr=False)
class ModuleCall:
    """One call of a module.

    `enclosing` are the calls during which it happened, the outermost first; `inner` and
    `function_calls` are the calls that happened during it, in order.
    """

    path: str
    module: nn.Module
    enclosing: tuple["ModuleCall", ...]
    start: int
    end: int = 0
    inputs: dict[int | str, Tensor] = field(default_factory=dict)
    outputs: tuple[Any, ...] = ()  # tensors, and None for anything else
    inner: list["ModuleCall"] = field(default_factory=list)
    function_calls: list[FunctionCall] = field(default_factory=list)
    attention_tensors: dict[str, Tensor] = field(default_factory=dict)  # of `intercept_tensors`
    attends_again: bool = False  # its attention is computed more than once
    runs_once: bool = False  # a hook on the module fires once in a forward

    @property
    def input(self) -> Tensor | None:
        """The main input, which is also the one that a hook on the module's input reads."""
        for key in (0, *INPUT_KEYWORDS):
            if key in self.inputs:
                return self.inputs[key]
        return None

    @property
    def output(self) -> Tensor | None:
        """The output, or the first of several."""
        return next(iter(self.outputs), None)

    @property
    def input_by_token(self) -> Tensor | None:
        return by_token(self.input)

    @property
    def output_by_token(self) -> Tensor | None:
        return by_token(self.output)

    @property
    def name(self) -> str:
        """The path inside the block, for messages."""
        return re.sub(r"^.*?\.\d+\.", "", self.path)

    @property
    def is_linear(self) -> bool:
        """True for a module whose weight is a matrix, such as nn.Linear or transformers' Conv1D."""
        weight = getattr(self.module, "weight", None)
        is_matrix = isinstance(weight, Tensor) and weight.ndim == 2
        return is_matrix and not isinstance(self.module, nn.Embedding)

    @property
    def has_matrix(self) -> bool:
        """True for a module with a matrix in it, or a weight with more axes."""
        return self.is_linear or any(weight.ndim > 1 for weight in self.module.parameters())

    @property
    def linear_calls(self) -> list["ModuleCall"]:
        """The calls of linear modules during it."""
        return [call for call in self.inner if call.is_linear]

    @property
    def parent(self) -> "ModuleCall":
        """The innermost of the enclosing calls."""
        return self.enclosing[-1]

    def is_within(self, other: "ModuleCall | None") -> bool:
        """True if it is the other call, or happened during it."""
        return self is other or other in self.enclosing

    def location(
        self, side: Literal["input", "output"] = "output", **fields: Any
    ) -> ModuleLocation:
        """Returns the location of its input or output, or of a part of that."""
        tensor = self.input if side == "input" else self.output
        is_flat = tensor is not None and tensor.ndim == 2
        return ModuleLocation(self.path, side, flat=is_flat, **fields)


def by_token(tensor: Tensor | None) -> Tensor | None:
    """Returns a tensor as [batch, pos, …], or None if it has no such axes."""
    if tensor is None:
        return None
    if tensor.shape[:-1] == (ROWS * WIDTH,):
        return tensor.view(ROWS, WIDTH, -1)
    return tensor if tensor.shape[:-1] == (ROWS, WIDTH) else None


@dataclass(eq=False)
class Recording:
    """The calls of a dry run, in order."""

    calls: list[ModuleCall]
    attention_error: str = ""  # why scores and pattern could not be intercepted

    def only_call(self, module: nn.Module | None) -> ModuleCall | None:
        """Returns the call of a module that ran once, or None."""
        for call in self.calls:
            if call.module is module and call.runs_once:
                return call
        return None

    def calls_at(self, path: str) -> list[ModuleCall]:
        return [call for call in self.calls if call.path == path]


def dry_run(root: nn.Module, skipped: set[str], ids: Tensor) -> Recording:
    """Runs the model once on token ids [batch, pos] and records its modules.

    Nothing inside the modules at the paths `skipped` is recorded.
    """
    try:
        return _run(root, skipped, ids, HEAD_TENSORS | {"scores", "pattern"})
    except Exception as error:  # noqa: BLE001  without scores, a family may have other sites
        recording = _run(root, skipped, ids, HEAD_TENSORS)
        recording.attention_error = str(error).split("\n")[0] or type(error).__name__
        return recording


def _run(
    root: nn.Module, skipped: set[str], ids: Tensor, attention_tensors: frozenset[str]
) -> Recording:
    recorder = _Recorder()
    with Overrides() as overrides:
        overrides.add_cleanup(partial(remove_modes_except, current_modes()))
        for module in root.modules():
            _disable_dropout_and_hooks(module, overrides)
        for path, module in root.named_modules():
            if path in skipped:
                overrides.wrap_method(module, "forward", recorder.skipped_forward)
        for path, module in _recorded_modules(root, skipped):
            if _may_call_attention_interface(module):
                intercept_tensors(
                    overrides, module, "interface", attention_tensors, recorder.record_attention
                )
            overrides.wrap_method(module, "forward", recorder.recorded_forward(path, module))
        with torch.no_grad(), recorder:
            root(input_ids=ids, use_cache=False)
    for call in recorder.calls:
        call.runs_once = recorder.counts[call.module] == 1
    return Recording(recorder.calls)


def _disable_dropout_and_hooks(module: nn.Module, overrides: Overrides) -> None:
    if module.training:
        overrides.replace_attribute(module, "training", lambda training: False)
    if module._forward_hooks or module._forward_pre_hooks:
        skip_hooks(module, overrides)


def _recorded_modules(root: nn.Module, skipped: set[str]) -> Iterator[tuple[str, nn.Module]]:
    """Yields every module with its path, except for the root and the skipped modules."""
    prefixes = tuple(f"{path}." for path in skipped)
    for path, module in root.named_modules():
        if path and not f"{path}.".startswith(prefixes):
            yield path, module


def _may_call_attention_interface(module: nn.Module) -> bool:
    class_name = type(module).__name__.lower()
    if "attention" not in class_name and "attn" not in class_name:
        return False
    has_setting = hasattr(module.__dict__.get("config"), "_attn_implementation")
    return has_setting and eager_attention_of(module) is not None


class _Recorder(RemovableMode):
    """Records the calls of modules, and the torch functions in them. One dry run owns it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[ModuleCall] = []
        self.counts: dict[nn.Module, int] = {}  # of the calls, recorded or not
        self.stack: list[ModuleCall] = []
        self.clock = itertools.count(1)

    def recorded_forward(self, path: str, module: nn.Module) -> Callable[..., Any]:
        """Returns a replacement of the module's forward that records its inputs and outputs."""

        def forward(inner: Any, /, *args: Any, **kwargs: Any) -> Any:
            self.counts[module] = self.counts.get(module, 0) + 1
            call = ModuleCall(path, module, tuple(self.stack), next(self.clock))
            call.inputs = _copy_tensors([*enumerate(args), *kwargs.items()])
            self.calls.append(call)
            for enclosing in self.stack:
                enclosing.inner.append(call)
            self.stack.append(call)
            try:
                output = inner(*args, **kwargs)
            finally:
                self.stack.pop()
            items = output.to_tuple() if hasattr(output, "to_tuple") else output
            if not isinstance(items, tuple | list):
                items = (items,)
            copies = _copy_tensors(enumerate(items))
            call.outputs = tuple(map(copies.get, range(len(items))))
            call.end = next(self.clock)
            return output

        return forward

    def skipped_forward(self, inner: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Replaces a module's forward. Calls of recorded modules inside it are only counted."""
        calls, stack = self.calls, self.stack
        self.calls, self.stack = [], []
        try:
            return inner(*args, **kwargs)
        finally:
            self.calls, self.stack = calls, stack

    def record_attention(self, name: str, tensor: Tensor) -> Tensor:
        """Records a tensor inside attention and returns it unchanged."""
        call = self.stack[-1]
        call.attends_again = call.attends_again or name in call.attention_tensors
        call.attention_tensors[name] = tensor.detach().clone()
        return tensor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kind = KINDS.get(getattr(func, "__name__", ""))
        if kind is None or not self.stack:
            return func(*args, **kwargs)
        inputs = _copy_function_inputs(kind, args, kwargs)
        output = func(*args, **kwargs)
        function_call = FunctionCall(kind, self.stack[-1], inputs, output.detach().clone())
        for enclosing in self.stack:
            enclosing.function_calls.append(function_call)
        return output


def _copy_function_inputs(kind: str, args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    if kind == "linear":  # the module call has its input, and its weight is large
        return []
    named = kwargs.items() if kind == "product" else ()
    return list(_copy_tensors([*enumerate(args), *named]).values())


def _copy_tensors(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Tensor]:
    """Returns copies of the values that are tensors with data."""
    copies = {}
    for key, value in pairs:
        if isinstance(value, Tensor) and not value.is_meta:
            copies[key] = value.detach().clone()
    return copies


def tolerance(tensor: Tensor) -> float:
    """Returns how far two computations of the same tensor may differ, relative to their terms."""
    if not tensor.is_floating_point():
        return 0.0
    return max(RELATIVE_TOLERANCE, 2 * torch.finfo(tensor.dtype).eps)


def equal_values(first: Tensor | None, second: Tensor | None) -> bool:
    """True if both have the same numbers in the same order. Their axes may differ."""
    if first is None or second is None:
        return False
    if (first.numel(), first.dtype) != (second.numel(), second.dtype):
        return False
    return torch.equal(first.reshape(-1), second.reshape(-1))


def sum_error(terms: list[Tensor], total: Tensor) -> float:
    """Returns how far the sum is from the total at most, relative to the size of its terms."""
    added, size = reduce(torch.add, terms), reduce(torch.add, map(torch.abs, terms))
    relative = (added - total).abs() / (size + total.abs()).clamp(min=1e-20)
    return float(relative.max().nan_to_num(nan=1e9))


def is_sum(terms: list[Tensor], total: Tensor) -> bool:
    """True if the terms add up to the total."""
    same_shape = {term.shape for term in terms} == {total.shape}
    return same_shape and sum_error(terms, total) <= tolerance(total)


def scale_factor(tensor: Tensor, expected: Tensor) -> float | None:
    """Returns the number by which `tensor` must be multiplied to give `expected`, or None."""
    tensor, expected = tensor.double(), expected.double()
    square = float((tensor * tensor).sum())
    if square == 0:
        return None
    factor = float((tensor * expected).sum()) / square
    limit = max(RELATIVE_TOLERANCE, float(expected.abs().max()) * RELATIVE_TOLERANCE)
    if factor == 0 or not float((tensor * factor - expected).abs().max()) <= limit:
        return None
    return factor
