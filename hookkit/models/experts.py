"""Neurons of experts: what each chosen expert of a token computes inside a mixture of experts.

transformers computes the experts of most families through one interface. It lists all pairs of a
token and an expert that the token chose, sorts them by expert ("grouped_mm") or leaves them in
order ("batched_mm"), and calls the module's `_apply_gate`, or its activation, once for all pairs.
`compute_experts` stands in for a module's forward. It passes the neurons before and after that call
to a callback as [token, choice, neuron], in the order in which the router lists a token's choices.

Other implementations compute the experts one by one ("eager"), or in one kernel. Under these the
neurons come from a second computation by "grouped_mm", which is compared once with the first. If no
callback changes them, the first result is returned, which keeps the output equal bit for bit.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..errors import Unsupported
from .overrides import Overrides, RemovableMode

NEURONS = ("mlp_pre", "mlp_post")
WITH_ALL_PAIRS = ("grouped_mm", "batched_mm")  # implementations that gate all pairs in one call


@runtime_checkable
class NeuronCallbacks(Protocol):
    """The callbacks of a running forward, and the implementations that agreed with "grouped_mm"."""

    verified: set[str]

    def needs(self, *names: str) -> bool: ...

    def replace(self, name: str, tensor: Tensor) -> Tensor: ...


def has_neurons(module: nn.Module) -> bool:
    """True for experts that transformers computes through its common interface."""
    settings = ("has_gate", "is_concatenated", "is_transposed", "down_proj")
    return all(hasattr(module, name) for name in settings)


def count_neurons(module: Any) -> int | None:
    """Returns the number of neurons of each expert; None if the experts have another form."""
    if not has_neurons(module):
        return None
    return module.down_proj.shape[-2 if module.is_transposed else -1]


def compute_experts(
    module: Any,
    inner: Callable[..., Tensor],
    callbacks: NeuronCallbacks,
    arguments: tuple[Any, ...],
) -> Tensor:
    """Runs the forward of experts, and passes their neurons to the callbacks.

    `arguments` are hidden states [token, d_model], and experts and weights [token, choice]. `inner`
    computes the experts with them.
    """
    name = type(module).__name__
    if not has_neurons(module):
        raise Unsupported(
            f"{name} does not compute its experts through transformers' common interface, so their "
            "neurons cannot be reached: use mlp_in, mlp_out and the sites of the router"
        )
    if module._is_expert_parallel:
        raise Unsupported(
            f"each process holds some of the experts of {name}, and computes only these: their "
            "neurons cannot be reached with expert parallelism; use mlp_in, mlp_out and the sites "
            "of the router"
        )
    implementation = module.config._experts_implementation
    if implementation in WITH_ALL_PAIRS:
        return _Gate(module, callbacks, arguments[1].shape).run(implementation, inner, arguments)
    return _compute_twice(module, implementation, inner, callbacks, arguments)


def _compute_twice(
    module: Any,
    implementation: str,
    inner: Callable[..., Tensor],
    callbacks: NeuronCallbacks,
    arguments: tuple[Any, ...],
) -> Tensor:
    """Returns the result of the implementation in use if no callback changes the neurons."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if module.down_proj.is_meta:
        raise Unsupported(
            f"the weights of {type(module).__name__} are offloaded, and under "
            f"experts_implementation={implementation!r} its neurons need them twice: call "
            "model.set_experts_implementation('grouped_mm')"
        )
    output = inner(*arguments)  # first, because the callbacks of outer `with` blocks join here
    # torch has no grouped product of float64
    by_pairs = "batched_mm" if output.dtype == torch.float64 else "grouped_mm"
    gate = _Gate(module, callbacks, arguments[1].shape)

    def compute(*arguments: Any) -> Tensor:
        return ALL_EXPERTS_FUNCTIONS[by_pairs](module, *arguments)

    result = gate.run(by_pairs, compute, arguments)
    if implementation not in callbacks.verified:
        with torch.no_grad():
            unedited = compute(*arguments) if gate.changed else result
            _check_equal(module, implementation, unedited, output)
        callbacks.verified.add(implementation)
    return result if gate.changed else output


def _check_equal(module: nn.Module, implementation: str, ours: Tensor, theirs: Tensor) -> None:
    """Raises `Unsupported` if two computations of the same experts differ."""
    largest = float((ours - theirs).abs().max())
    scale = max(1.0, float(theirs.abs().max()))
    limit = max(1e-4, 16 * torch.finfo(theirs.dtype).eps * scale)
    if not largest <= limit:
        raise Unsupported(
            f"{type(module).__name__} under experts_implementation={implementation!r} computes "
            f"something else than under 'grouped_mm' (they differ by {largest:.2g}), so its "
            "neurons are unknown: call model.set_experts_implementation('grouped_mm')"
        )


@dataclass(eq=False)
class _Gate:
    """Stands in for the gate, or activation, of experts in one forward of theirs."""

    module: Any
    callbacks: NeuronCallbacks
    shape: torch.Size  # [token, choice]
    order: "_SortMode" = field(default_factory=lambda: _SortMode())
    calls: int = 0
    changed: bool = False  # True if a callback changed neurons

    def run(
        self, implementation: str, compute: Callable[..., Tensor], arguments: tuple[Any, ...]
    ) -> Tensor:
        """Returns what `compute` returns with the neurons that the callbacks return."""
        sorts = implementation == "grouped_mm"
        mode: AbstractContextManager[Any] = self.order if sorts else nullcontext()
        with Overrides() as overrides, mode:
            if self.module.has_gate:
                overrides.wrap_method(self.module, "_apply_gate", self.gate)
            else:
                overrides.wrap_method(self.module.act_fn, "forward", self.activate)
            output = compute(*arguments)
        if self.calls != 1 or sorts != (self.order.indices is not None):
            raise Unsupported(
                f"{type(self.module).__name__} under experts_implementation={implementation!r} "
                "does not compute all tokens in one piece, so its neurons cannot be reached: use "
                "another version of transformers"
            )
        return output

    def gate(self, inner: Callable[..., Tensor], /, *arguments: Any, **keywords: Any) -> Tensor:
        """Runs in place of `_apply_gate`, whose input holds a gate and a factor per neuron."""
        (gates_and_factors,) = (*arguments, *keywords.values())
        self.calls += 1
        before = self._gate_part(gates_and_factors)
        new = self._pass("mlp_pre", before)
        if new is not before:
            gates_and_factors = gates_and_factors.clone()
            self._gate_part(gates_and_factors).copy_(new)
        return self._pass("mlp_post", inner(gates_and_factors))

    def activate(self, inner: Callable[..., Tensor], /, *arguments: Any, **keywords: Any) -> Tensor:
        """Runs in place of the activation of experts without a gate."""
        (before,) = (*arguments, *keywords.values())
        self.calls += 1
        return self._pass("mlp_post", inner(self._pass("mlp_pre", before)))

    def _gate_part(self, both: Tensor) -> Tensor:
        """Returns the view of the gate's part of its input."""
        if self.module.is_concatenated:
            return both.chunk(2, dim=-1)[0]
        return both[..., ::2]

    def _pass(self, name: str, pairs: Tensor) -> Tensor:
        """Passes neurons [pair, neuron] to the callbacks, and returns those to continue with."""
        if not self.callbacks.needs(name):
            return pairs
        order = self.order.indices
        values = pairs
        if order is not None:
            inverse_order = torch.empty_like(order)
            inverse_order[order] = torch.arange(len(order), device=order.device)
            values = pairs[inverse_order]
        values = values.unflatten(0, self.shape)
        new = self.callbacks.replace(name, values)
        # a new tensor that requires gradients counts as a change: a capture must be on their path
        if new is values or (torch.equal(new, values) and not new.requires_grad):
            return pairs
        self.changed = True
        new = new.flatten(0, 1)
        return new if order is None else new[order]


class _SortMode(RemovableMode):
    """Notes the order in which the pairs of a token and a choice are sorted: the first sort."""

    def __init__(self) -> None:
        super().__init__()
        self.indices: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is torch.sort and self.indices is None:
            self.indices = output[1]
        return output
