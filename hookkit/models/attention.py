"""Values from inside a module's forward: queries, keys, values, scores, pattern and router logits.

These tensors are no module's input or output. `intercept_tensors` wraps the forward of an attention
module (of a router, or of experts), so that a callback receives each of them by name and returns
the tensor to continue with. Scores and pattern are computed by the eager attention of the module's
own file. If no callback changes them, the result of the attention implementation in use (sdpa,
flash attention) is returned, which keeps the output equal bit for bit.
"""

import functools
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import Unsupported
from .experts import NEURONS, compute_experts
from .overrides import Overrides, RemovableMode
from .views import is_hidden

NAME = "hookkit"  # the attention implementation that is registered with transformers

TensorCallback: TypeAlias = Callable[[str, Tensor], Tensor]
"""Receives the name of a tensor and the tensor. Returns the tensor to continue with."""

Style: TypeAlias = Literal["interface", "own"]
"""How a module computes attention: by transformers' AttentionInterface, or in its own code."""


@dataclass(eq=False)
class _Interception:
    """The callbacks of one running forward. Owned by `_RUNNING` until that forward ends."""

    callbacks: list[tuple[frozenset[str], TensorCallback]]  # of the outermost `with` block first
    verified: set[str]  # the implementations that agreed with eager attention
    implementation: str = ""  # the one that the configuration names

    def __post_init__(self) -> None:
        self.first_callback = self.callbacks[0][1]

    def needs(self, *names: str) -> bool:
        return any(not requested.isdisjoint(names) for requested, _ in self.callbacks)

    def replace(self, name: str, tensor: Tensor) -> Tensor:
        for requested, callback in self.callbacks:
            if name in requested:
                tensor = callback(name, tensor)
        return tensor


class _RunningForwards(threading.local):
    """The intercepted modules whose forward is running in this thread."""

    def __init__(self) -> None:
        self.interceptions: dict[nn.Module, _Interception] = {}


_RUNNING = _RunningForwards()


def intercept_tensors(
    overrides: Overrides,
    module: nn.Module,
    style: Style,
    requested: frozenset[str],
    callback: TensorCallback,
    verified: set[str] | None = None,
    applies: Callable[[], bool] | None = None,
) -> None:
    """Calls `callback` with the tensors named in `requested`, until `overrides` is restored.

    `verified` is filled with the attention implementations of this module that agreed with eager
    attention, so that each is compared once. Only calls for which `applies()` is true are
    intercepted; by default, those of this thread.
    """
    if verified is None:
        verified = set()
    has_neurons = not requested.isdisjoint(NEURONS)

    def intercepted_forward(inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        interceptions = _RUNNING.interceptions
        outer = interceptions.get(module)
        if outer is not None:  # an inner `with` block intercepts this forward already
            outer.callbacks.insert(0, (requested, callback))
            return inner(*args, **kwargs)
        interception = _Interception([(requested, callback)], verified)
        mode: AbstractContextManager[Any] = nullcontext()
        compute = inner
        if has_neurons:
            arguments = (*args, *kwargs.values())
            compute = functools.partial(compute_experts, module, inner, interception, arguments)
            args, kwargs = (), {}
        elif "router" in requested:
            mode = _RouterMode(interception.replace)
        elif style == "own":
            mode = _SoftmaxMode(interception.replace, _input_dtype((*args, *kwargs.values())))
        else:
            interception.implementation = _configured_implementation(module)
        interceptions[module] = interception
        try:
            with mode:
                return compute(*args, **kwargs)
        finally:
            interceptions.pop(module, None)

    overrides.add_cleanup(functools.partial(_discard_interrupted, module, callback))
    if style == "interface" and "router" not in requested and not has_neurons:
        from transformers import AttentionInterface

        AttentionInterface.register(NAME, _attention)
        overrides.replace_attribute(module, "config", _intercepting_config)
    overrides.wrap_method(module, "forward", intercepted_forward, applies)


def _discard_interrupted(module: nn.Module, callback: TensorCallback) -> None:
    """Discards the interception of a forward that was interrupted before it ended."""
    interception = _RUNNING.interceptions.get(module)
    if interception is not None and interception.first_callback is callback:
        _RUNNING.interceptions.pop(module, None)


def _configured_implementation(module: nn.Module) -> str:
    return module.config.__dict__["_attn_implementation_internal"]  # pyright: ignore


def _input_dtype(arguments: tuple[Any, ...]) -> torch.dtype:
    """Returns the dtype of the first floating-point argument, which masks have too."""
    for argument in arguments:
        if isinstance(argument, Tensor) and argument.is_floating_point():
            return argument.dtype
    return torch.float32


class _Unchanged(Exception):
    """Raised when no callback changed scores or pattern, to end eager attention early."""


class _SoftmaxMode(RemovableMode):
    """Passes the input (scores) and output (pattern) of the first softmax to a callback.

    `dtype` is the dtype of the masks, which may be narrower than that of the scores. The first
    `key_count` columns (default: all) are keys; a sink may follow them. If `stop` is set,
    `_Unchanged` is raised after an unchanged pattern.
    """

    def __init__(
        self, callback: TensorCallback, dtype: torch.dtype, key_count: int | None = None
    ) -> None:
        super().__init__()
        self.callback, self.dtype, self.key_count = callback, dtype, key_count
        self.stop = self.done = self.changed = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.done:
            return func(*args, **kwargs)
        if func in (nn.functional.softmax, torch.softmax, Tensor.softmax):
            self.done = True
            return self._softmax(func, args, kwargs)
        if func is nn.functional.scaled_dot_product_attention:
            self.done = True
            eager_output = self._eager_attention(*args, **kwargs)
            if self.changed:
                return eager_output
        return func(*args, **kwargs)

    def _softmax(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        scores, *further = args or (kwargs.pop("input"),)
        pattern = func(self._replace("scores", scores), *further, **kwargs)
        pattern = self._replace("pattern", pattern)
        if self.stop and not self.changed:
            raise _Unchanged
        return pattern

    def _replace(self, name: str, full: Tensor) -> Tensor:
        part = full[..., : self.key_count]
        old = _with_full_mask(part, self.dtype) if name == "scores" else part
        new = self.callback(name, old)
        if name == "scores" and new is not old:
            new = torch.where(is_hidden(old), part, new)  # masked keys stay masked
        # a new tensor that requires gradients counts as a change: a capture must be on their path
        if new is old or (torch.equal(new, part) and not new.requires_grad):
            return full
        self.changed = True
        if part.shape == full.shape:
            return new
        return torch.cat([new, full[..., self.key_count :]], dim=-1)

    def _eager_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **_: Any,
    ) -> Tensor:
        """Returns what `scaled_dot_product_attention` computes."""
        factor: float = query.shape[-1] ** -0.5 if scale is None else scale
        scores = query @ key.transpose(-1, -2) * factor
        mask = _causal_mask(scores) if is_causal else attn_mask
        if mask is not None:
            scores = scores + _to_additive(mask, scores.dtype)
        pattern = self._softmax(nn.functional.softmax, (scores,), {"dim": -1}).to(value.dtype)
        return nn.functional.dropout(pattern, dropout_p) @ value


def _with_full_mask(scores: Tensor, mask_dtype: torch.dtype) -> Tensor:
    """Returns scores in which masked keys have the smallest number of the scores' own dtype.

    A mask of a narrower dtype has a larger one: gptj adds float16's smallest number to float32
    scores.
    """
    smallest = torch.finfo(scores.dtype).min
    if torch.finfo(mask_dtype).min == smallest:
        return scores
    return scores.masked_fill(is_hidden(scores, mask_dtype), smallest)


class _RouterMode(RemovableMode):
    """Passes the output of the first linear map of a router, which is its logits, to a callback."""

    def __init__(self, callback: TensorCallback) -> None:
        super().__init__()
        self.callback, self.done = callback, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if self.done or func is not nn.functional.linear:
            return output
        self.done = True
        return self.callback("router", output)


class _InterceptingConfig:
    """Mixin for a configuration that names hookkit's attention during an intercepted forward.

    An attention module looks up its implementation by the name in its configuration at each call.
    """

    def __init_subclass__(cls, **_: Any) -> None:
        """Skips what transformers does to the configuration classes of new models."""

    @property
    def _attn_implementation(self) -> str:
        if _RUNNING.interceptions:
            return NAME
        return self.__dict__["_attn_implementation_internal"]


def _intercepting_config(config: Any) -> Any:
    """Returns a configuration with the mixin, which shares the attributes of `config`."""
    intercepting: Any = object.__new__(_intercepting_class(type(config)))
    object.__setattr__(intercepting, "__dict__", config.__dict__)
    return intercepting


@functools.cache
def _intercepting_class(config_class: type[Any]) -> type[Any]:
    metaclass: Any = type(config_class)
    return metaclass(config_class.__name__, (_InterceptingConfig, config_class), {})


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    **settings: Any,
) -> tuple[Tensor, Tensor | None]:
    """Computes a module's attention through transformers' AttentionInterface and intercepts it.

    `query` is [batch, head, query, d_head]; `key` and `value` are [batch, kv_head, key, d_head],
    with all that the cache holds. Returns [batch, query, head, d_head], and the pattern if the
    implementation in use returns one.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager = eager_attention_of(module)
    if eager is None:
        raise Unsupported(
            f"{type(module).__name__} has no attention of its own that gives weights "
            "(eager_attention_forward): scores, pattern, q_rot and k_rot cannot be reached; q, k, "
            "v and z can"
        )
    interception = _RUNNING.interceptions.get(module)
    if interception is None:  # an attention module inside another one that is intercepted
        configured: Any = ALL_ATTENTION_FUNCTIONS.get(_configured_implementation(module), eager)
        return configured(module, query, key, value, attention_mask, **settings)
    query = interception.replace("query", query)
    key = interception.replace("key", key)
    value = interception.replace("value", value)
    if isinstance(attention_mask, Tensor):
        attention_mask = interception.replace("mask", attention_mask)
    selected = settings.get("indices")
    if selected is not None and interception.implementation in ("eager", "sdpa"):
        attention_mask = _only_selected(attention_mask, settings.pop("indices"))
    # transformers 5.0 has no get_interface
    fused: Any = ALL_ATTENTION_FUNCTIONS.get(interception.implementation, eager)
    compute_fused = functools.partial(fused, module, query, key, value, attention_mask, **settings)
    if not interception.needs("scores", "pattern"):
        return compute_fused()
    mask = attention_mask
    is_causal = settings.get("is_causal")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if mask is not None or is_causal:
        mask = _additive_mask(mask, query, key, settings.get("sliding_window"))
    compute_eager = functools.partial(eager, module, query, key, value, mask, **settings)
    mode = _SoftmaxMode(interception.replace, query.dtype, key_count=key.shape[2])
    if fused is eager:
        with mode:
            return compute_eager()
    return _compute_twice(module, mask, mode, compute_eager, compute_fused)


def _compute_twice(
    module: nn.Module,
    mask: Tensor | None,
    mode: _SoftmaxMode,
    compute_eager: Callable[[], tuple[Tensor, Tensor | None]],
    compute_fused: Callable[[], tuple[Tensor, Tensor | None]],
) -> tuple[Tensor, Tensor | None]:
    """Returns what the fused attention gives, or the eager one if its scores or weights are edited.

    The first time, both are computed without edits and must be equal.
    """
    interception = _RUNNING.interceptions[module]
    # in training, dropout makes two computations differ
    if interception.implementation in interception.verified or module.training:
        mode.stop = True
        with suppress(_Unchanged), mode:
            return compute_eager()
        return compute_fused()
    with mode:
        eager_output = compute_eager()
    with torch.no_grad():
        unedited = compute_eager() if mode.changed else eager_output
        _check_equal(module, interception.implementation, unedited[0], compute_fused()[0], mask)
    interception.verified.add(interception.implementation)
    return eager_output if mode.changed else compute_fused()


def _check_equal(
    module: nn.Module, implementation: str, eager: Tensor, fused: Tensor, mask: Tensor | None
) -> None:
    """Raises `Unsupported` if `fused` differs from `eager` (sdpa has no soft-cap)."""
    difference = (eager.detach().float() - fused.detach().float().reshape(eager.shape)).abs()
    difference = difference.amax((-2, -1))
    if mask is not None:  # the output of a padding query, which attends to nothing, may be anything
        blind = is_hidden(mask).all(-1)  # [query], or [batch, head, query]
        if blind.ndim == 3:
            blind = blind.all(1)
        difference = difference.masked_fill(blind.expand_as(difference), 0)
    largest = float(difference.max())
    scale = max(1.0, float(eager.detach().abs().max()))
    limit = 16 * torch.finfo(eager.dtype).eps * scale
    if largest > max(limit, 1e-4):
        raise Unsupported(
            f"{type(module).__name__} under {implementation!r} computes another attention than its "
            f"own code does step by step (they differ by {largest:.2g}; {implementation!r} may "
            "leave out a soft-cap or a sink), so its scores and pattern are unknown: load the "
            "model with attn_implementation='eager'"
        )


def eager_attention_of(module: nn.Module) -> Any:
    """Returns the function in the module's own file that computes attention step by step."""
    functions = sys.modules[type(module).__module__]
    if "Vision" in type(module).__name__:  # Llama 4's file has one for each of its two stacks
        vision = getattr(functions, "vision_eager_attention_forward", None)
        if vision is not None:
            return vision
    return getattr(functions, "eager_attention_forward", None)


def _additive_mask(mask: Any, query: Tensor, key: Tensor, window: int | None) -> Tensor | None:
    """Returns a mask to add to the scores, from one made for any attention implementation.

    transformers passes no mask to sdpa for plain causal attention (the first query is then at the
    first key), or a boolean one that is true where a query attends. Flash attention receives the
    padding mask of the keys, or none.
    """
    queries, keys = query.shape[2], key.shape[2]
    if mask is not None and not isinstance(mask, Tensor):
        raise Unsupported(
            f"a mask of {type(mask).__name__} (flex attention) cannot be read: load the model with "
            "sdpa"
        )
    if mask is None:
        if queries == 1:
            return None
        # transformers 5.0 slices four axes
        return _causal_mask(query.new_empty(queries, keys))[None, None]
    if mask.ndim == 4:
        return _to_additive(mask[..., :keys], query.dtype)
    query_positions = torch.arange(keys - queries, keys, device=query.device)[:, None]
    key_positions = torch.arange(keys, device=query.device)
    visible = (key_positions <= query_positions) & mask[:, None, None, :keys].bool()
    if window is not None:
        visible = visible & (key_positions > query_positions - window)
    return _to_additive(visible, query.dtype)


def _only_selected(mask: Tensor, indices: Tensor) -> Tensor:
    """Returns a mask that also hides the keys that an indexer did not select for a query.

    Sparse attention selects keys [batch, query, choice]. For eager attention and sdpa, the module
    would do the same before it calls them, but it asks for their names, which are replaced.
    """
    hidden = torch.ones(mask.shape, dtype=torch.bool, device=mask.device)
    hidden = hidden.scatter(-1, indices.long()[:, None], False)
    if mask.dtype == torch.bool:
        return mask & ~hidden
    return mask.masked_fill(hidden, torch.finfo(mask.dtype).min)


def _causal_mask(scores: Tensor) -> Tensor:
    """Returns the additive causal mask for scores whose first query is at the first key."""
    queries, keys = scores.shape[-2:]
    visible = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).tril()
    return _to_additive(visible, scores.dtype)


def _to_additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a boolean mask (true where a query attends) as an additive one."""
    if mask.dtype != torch.bool:
        return mask
    zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return zeros.masked_fill(~mask, torch.finfo(dtype).min)
