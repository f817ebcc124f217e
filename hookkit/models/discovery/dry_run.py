"""A dry run of a model that records its modules, their inputs and outputs, and its attention.

During the run, each recorded module has a wrapped forward that copies its inputs and outputs;
copies are needed because some families add to a tensor in place. Afterwards the model is as it was
before.
"""

import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import RemovableMode, current_modes, intercept_tensors, remove_modes_except
from ..overrides import Overrides, skip_hooks

F = nn.functional
SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)
MATMUL = (torch.matmul, Tensor.matmul, Tensor.__matmul__)
BATCHED_MATMUL = (torch.bmm, Tensor.bmm, torch.baddbmm, Tensor.baddbmm)
RELU = (F.relu, torch.relu, Tensor.relu)
TANH = (F.tanh, torch.tanh, Tensor.tanh)
SIGMOID = (F.sigmoid, torch.sigmoid, Tensor.sigmoid)
SMOOTH_OR_CLIPPED = (F.silu, F.gelu, F.relu6, F.elu, F.leaky_relu, F.mish, F.softplus, F.hardswish)
KINDS: dict[Any, str] = {
    **dict.fromkeys(SOFTMAX, "softmax"),
    **dict.fromkeys((*MATMUL, *BATCHED_MATMUL), "product"),
    **dict.fromkeys((*RELU, *TANH, *SIGMOID, *SMOOTH_OR_CLIPPED), "activation"),
    F.linear: "linear",
    F.scaled_dot_product_attention: "fused",
}
HEAD_TENSORS = ("query", "key", "value")
INPUT_KEYWORDS = ("hidden_states", "input", "x")  # the names of a module's main input


@dataclass(eq=False)
class FunctionCall:
    """One call of a torch function in a module's own code."""

    kind: str
    inputs: list[Tensor]
    keywords: dict[str, Any]
    output: Tensor
    start: int


@dataclass(eq=False)
class ModuleCall:
    """One call of a module.

    `enclosing` are the calls during which it happened, the outermost first.
    """

    path: str
    module: nn.Module
    enclosing: tuple["ModuleCall", ...]
    start: int
    end: int = 0
    inputs: dict[int | str, Tensor] = field(default_factory=dict)
    outputs: tuple[Any, ...] = ()
    function_calls: list[FunctionCall] = field(default_factory=list)
    attention_tensors: dict[str, Tensor] = field(
        default_factory=dict
    )  # from `intercept_tensors`, by name

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
        if self.outputs and isinstance(self.outputs[0], Tensor):
            return self.outputs[0]
        return None

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


@dataclass(eq=False)
class Recording:
    """What a dry run of [rows, width] tokens recorded."""

    rows: int
    width: int
    calls: list[ModuleCall]
    counts: dict[nn.Module, int]  # calls of each module, recorded or not
    attention_error: str = ""  # why scores and pattern could not be intercepted

    def runs_once(self, call: ModuleCall) -> bool:
        """True if a hook on the module would fire once in a forward."""
        return self.counts[call.module] == 1

    def only_call(self, module: nn.Module | None) -> ModuleCall | None:
        """Returns the call of a module that ran once, or None."""
        for call in self.calls:
            if call.module is module and self.runs_once(call):
                return call
        return None

    def calls_at(self, path: str) -> list[ModuleCall]:
        """Returns the calls of the module at a path, in order."""
        return [call for call in self.calls if call.path == path]

    def calls_within(self, call: ModuleCall) -> list[ModuleCall]:
        """Returns the module calls during a call, in order."""
        return [other for other in self.calls if call in other.enclosing]

    def function_calls_within(self, call: ModuleCall) -> list[FunctionCall]:
        """Returns the calls of torch functions during a call, in order."""
        function_calls = list(call.function_calls)
        for inner in self.calls_within(call):
            function_calls.extend(inner.function_calls)
        return sorted(function_calls, key=lambda function_call: function_call.start)

    def by_token(self, tensor: Any) -> Tensor | None:
        """Returns a tensor as [batch, pos, …], or None if it has no such axes."""
        if not isinstance(tensor, Tensor):
            return None
        if tensor.ndim == 2 and tensor.shape[0] == self.rows * self.width:
            return tensor.view(self.rows, self.width, -1)
        if tensor.ndim == 3 and tensor.shape[:2] == (self.rows, self.width):
            return tensor
        return None


def dry_run(
    root: nn.Module, modules: dict[str, nn.Module], skipped: list[nn.Module], ids: Tensor
) -> Recording:
    """Runs the model once on token ids [batch, pos] and records these modules, named by path.

    Nothing inside the skipped modules is recorded.
    """
    try:
        return _run(root, modules, skipped, ids, (*HEAD_TENSORS, "scores", "pattern"))
    except Exception as error:  # noqa: BLE001  without scores, a family may have other sites
        recording = _run(root, modules, skipped, ids, HEAD_TENSORS)
        recording.attention_error = str(error).split("\n")[0] or type(error).__name__
        return recording


def _run(
    root: nn.Module,
    modules: dict[str, nn.Module],
    skipped: list[nn.Module],
    ids: Tensor,
    attention_tensors: tuple[str, ...],
) -> Recording:
    recorder = _Recorder()
    requested = frozenset(attention_tensors)
    with Overrides() as overrides:
        overrides.add_cleanup(partial(remove_modes_except, current_modes()))
        for module in root.modules():
            _disable_dropout_and_hooks(module, overrides)
        for path, module in modules.items():
            if _may_call_attention_interface(module):
                intercept_tensors(
                    overrides, module, "interface", requested, recorder.record_attention
                )
            overrides.around(module, "forward", recorder.recorded_forward(path, module))
        for module in skipped:
            overrides.around(module, "forward", recorder.skipped_forward)
        with torch.no_grad(), recorder:
            root(input_ids=ids, use_cache=False)
    rows, width = ids.shape
    return Recording(rows, width, recorder.calls, recorder.counts)


def _disable_dropout_and_hooks(module: nn.Module, overrides: Overrides) -> None:
    if module.training:
        overrides.replace_attribute(module, "training", lambda training: False)
    if module._forward_hooks or module._forward_pre_hooks:
        skip_hooks(module, overrides)


def _may_call_attention_interface(module: nn.Module) -> bool:
    module_class = type(module)
    class_name = module_class.__name__.lower()
    if "attention" not in class_name and "attn" not in class_name:
        return False
    eager = getattr(sys.modules[module_class.__module__], "eager_attention_forward", None)
    return eager is not None and hasattr(module.__dict__.get("config"), "_attn_implementation")


class _Recorder(RemovableMode):
    """Records the calls of modules, and the torch functions in them. One dry run owns it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[ModuleCall] = []
        self.counts: dict[nn.Module, int] = {}
        self.stack: list[ModuleCall] = []
        self.clock = 0
        self.skip_depth = 0

    def recorded_forward(self, path: str, module: nn.Module) -> Callable[..., Any]:
        """Returns a replacement of the module's forward that records its inputs and outputs."""

        def forward(inner: Any, /, *args: Any, **kwargs: Any) -> Any:
            self.counts[module] = self.counts.get(module, 0) + 1
            if self.skip_depth:
                return inner(*args, **kwargs)
            call = ModuleCall(path, module, tuple(self.stack), self._tick())
            call.inputs = _copy_tensors([*enumerate(args), *kwargs.items()])
            self.calls.append(call)
            self.stack.append(call)
            try:
                output = inner(*args, **kwargs)
            finally:
                self.stack.pop()
            call.outputs, call.end = _copy_output(output), self._tick()
            return output

        return forward

    def skipped_forward(self, inner: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Replaces a module's forward. Calls of recorded modules inside it are only counted."""
        self.skip_depth += 1
        try:
            return inner(*args, **kwargs)
        finally:
            self.skip_depth -= 1

    def record_attention(self, name: str, tensor: Tensor) -> Tensor:
        """Records a tensor inside attention and returns it unchanged."""
        if not self.skip_depth:
            self.stack[-1].attention_tensors[name] = _copy(tensor)
        return tensor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kind = KINDS.get(func)
        if kind is None or not self.stack or self.skip_depth:
            return func(*args, **kwargs)
        inputs: list[Tensor] = []
        keywords: dict[str, Any] = {}
        if kind != "linear":  # the module call has its input, and its weight is large
            named = kwargs.items() if kind == "product" else ()
            inputs = list(_copy_tensors([*enumerate(args), *named]).values())
            keywords = {key: _copy(value) for key, value in kwargs.items()}
        output = func(*args, **kwargs)
        self.stack[-1].function_calls.append(
            FunctionCall(kind, inputs, keywords, _copy(output), self._tick())
        )
        return output

    def _tick(self) -> int:
        self.clock += 1
        return self.clock


def _copy_tensors(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Tensor]:
    """Returns copies of the values that are tensors with data."""
    copies = {}
    for key, value in pairs:
        if isinstance(value, Tensor) and not value.is_meta:
            copies[key] = _copy(value)
    return copies


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _copy_output(output: Any) -> tuple[Any, ...]:
    """Returns the items of a module's output: copies of tensors, and None for other values."""
    if hasattr(output, "to_tuple"):
        output = output.to_tuple()
    items = output if isinstance(output, tuple | list) else (output,)
    copies: list[Tensor | None] = []
    for item in items:
        copies.append(item.detach().clone() if isinstance(item, Tensor) else None)
    return tuple(copies)
