"""In the midst of a module's forward: attention's queries, keys, values, scores and pattern, and a router's logits.

While a block has asked for one of these, the module's own forward runs inside `opened`, which tells `say` of each
tensor on its way and goes on with what it gives back. Scores and pattern are computed as the module's own code does it
when it is asked for weights ("eager"). Only where one of them was changed, what comes of them goes on; else the result
is that of sdpa or flash attention, bit for bit, as in all other modules.
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
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode,
    _get_current_function_mode_stack,
    _pop_mode,
    _push_mode,
)

from ..errors import Unsupported
from .overrides import Lent
from .views import hidden

NAME = "hookkit"  # of the attention function that transformers is told of

Say: TypeAlias = Callable[[str, Tensor], Tensor]
"""Told the name of a tensor and the tensor; gives the tensor to go on with."""

Style: TypeAlias = Literal["interface", "own"]


@dataclass(eq=False)
class _Telling:
    """What is told of one module: to whom, the outermost block first, and by which attention it is computed else."""

    told: list[tuple[frozenset[str], Say]]
    verified: set[str]  # the implementations that were seen to compute what is told of
    kind: str = ""

    def __post_init__(self) -> None:
        self.first = self.told[0][1]  # who began to listen

    def wants(self, *names: str) -> bool:
        return any(wanted & {*names} for wanted, _ in self.told)

    def say(self, name: str, found: Tensor) -> Tensor:
        for wanted, say in self.told:
            found = say(name, found) if name in wanted else found
        return found


class _Listening(threading.local):
    """The modules whose forward runs in this thread and is told of."""

    def __init__(self) -> None:
        self.tellings: dict[nn.Module, _Telling] = {}


_LISTENING = _Listening()


def listen(
    lent: Lent,
    module: nn.Module,
    style: Style,
    wanted: frozenset[str],
    say: Say,
    verified: set[str] | None = None,
    acts: Callable[[], bool] | None = None,
) -> None:
    """Let a module say what it has inside, until `lent` is given back. `wanted` names the tensors that are asked for.

    `verified` keeps, from block to block, the attention implementations of this module that were seen to compute what
    is told of; each is compared once. `acts` says which calls are meant; left out, those of this thread.
    """
    known = set() if verified is None else verified

    def speaking(inner: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        tellings = _LISTENING.tellings
        outer = tellings.get(module)
        if outer is not None:  # a block inside this one has begun to listen already
            outer.told.insert(0, (wanted, say))
            return inner(*args, **kwargs)
        telling = _Telling([(wanted, say)], known)
        dtype = _dtype_of((*args, *kwargs.values()))
        tellings[module] = telling
        try:
            with _listening(module, style, telling, dtype):
                return inner(*args, **kwargs)
        finally:
            tellings.pop(module, None)

    lent.later(functools.partial(_forget, module, say))
    if style == "interface" and not wanted & {"router"}:
        from transformers import AttentionInterface

        AttentionInterface.register(NAME, _attention)
        lent.share(module, "config", _listened)
    lent.around(module, "forward", speaking, acts)


def _forget(module: nn.Module, say: Say) -> None:
    """Forget a forward that was interrupted before it could end."""
    telling = _LISTENING.tellings.get(module)
    if telling is not None and telling.first is say:
        _LISTENING.tellings.pop(module, None)


def _listening(
    module: nn.Module, style: Style, telling: _Telling, dtype: torch.dtype
) -> AbstractContextManager[Any]:
    if telling.wants("router"):
        return _Router(telling.say)
    if style == "own":
        return _Arithmetic(telling.say, dtype)
    telling.kind = module.config.__dict__["_attn_implementation_internal"]  # pyright: ignore
    return nullcontext()


def _dtype_of(given: tuple[Any, ...]) -> torch.dtype:
    """The dtype that a module was given numbers in, in which its masks are made too."""
    return next(
        (each.dtype for each in given if isinstance(each, Tensor) and each.is_floating_point()),
        torch.float32,
    )


class _Unchanged(Exception):
    """Nothing that was told of was changed: the values need not be weighed once more."""


class Mode(TorchFunctionMode):
    """A mode of hookkit's. Torch lays a mode aside while it works; Ctrl-C may come in between."""

    def __exit__(self, *_: object) -> None:
        if _get_current_function_mode() is self:
            super().__exit__(None, None, None)
        else:
            keep_modes([mode for mode in modes() if mode is not self])


def modes() -> list[Any]:
    """The modes of this thread, the innermost last."""
    return _get_current_function_mode_stack()


def keep_modes(kept: list[Any]) -> None:
    """Take those modes of hookkit's off this thread that are not among these."""
    now = modes()
    right = [mode for mode in now if mode in kept or not isinstance(mode, Mode)]
    if right == now:
        return
    for _ in now:
        _pop_mode()
    for mode in right:
        _push_mode(mode)


class _Arithmetic(Mode):
    """Tells of the first softmax, into which scores go and out of which the pattern comes, wherever it is written.

    `dtype` is that of the masks, which may be narrower than that of the scores. With `stop`, `_Unchanged` ends the
    computation behind a pattern that nobody changed.
    """

    def __init__(
        self, say: Say, dtype: torch.dtype, keys: int | None = None, *, stop: bool = False
    ) -> None:
        super().__init__()
        self.say, self.dtype, self.keys, self.stop, self.done = say, dtype, keys, stop, False
        self.changed = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.done and func in (nn.functional.softmax, torch.softmax, Tensor.softmax):
            self.done = True
            return self._softmax(func, args, kwargs)
        if not self.done and func is nn.functional.scaled_dot_product_attention:
            self.done = True
            written_out = self._written_out(*args, **kwargs)
            return written_out if self.changed else func(*args, **kwargs)
        return func(*args, **kwargs)

    def _softmax(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        scores, rest = (args[0], args[1:]) if args else (kwargs.pop("input"), ())
        keys = (
            scores.shape[-1] if self.keys is None else self.keys
        )  # behind the keys may stand a sink
        pattern = func(self._told("scores", scores, keys), *rest, **kwargs)
        pattern = self._told("pattern", pattern, keys)
        if self.stop and not self.changed:
            raise _Unchanged
        return pattern

    def _told(self, name: str, found: Tensor, keys: int) -> Tensor:
        part = found[..., :keys]
        shown = _wider(part, self.dtype) if name == "scores" else part
        new = self.say(name, shown)
        if name == "scores" and new is not shown:
            new = torch.where(hidden(shown), part, new)  # what the mask hid is hidden still
        if new is shown or (torch.equal(new, part) and not new.requires_grad):
            return (
                found  # a capture with gradients has to be on their path, so it counts as a change
            )
        self.changed = True
        return new if keys == found.shape[-1] else torch.cat([new, found[..., keys:]], dim=-1)

    def _written_out(
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
        """What torch's fused attention computes, in steps."""
        scores = (
            query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
        )
        mask = _causal(scores) if is_causal else attn_mask
        if mask is not None:
            scores = scores + (_as_added(mask, scores.dtype) if mask.dtype == torch.bool else mask)
        pattern = self._softmax(nn.functional.softmax, (scores,), {"dim": -1}).to(value.dtype)
        return nn.functional.dropout(pattern, dropout_p) @ value


def squares(
    query: Tensor, key: Tensor, value: Tensor, *args: Any, **settings: Any
) -> dict[str, Tensor]:
    """The scores and the pattern of a call of torch's fused attention."""
    told: dict[str, Tensor] = {}
    arithmetic = _Arithmetic(lambda name, found: told.setdefault(name, found), query.dtype)
    arithmetic._written_out(query, key, value, *args, **settings)
    return told


def _wider(scores: Tensor, masks: torch.dtype) -> Tensor:
    """Scores in which a mask of a narrower dtype hides keys as one of their own would (gptj adds float16's smallest
    number to float32 scores)."""
    if torch.finfo(masks).min == torch.finfo(scores.dtype).min:
        return scores
    return scores.masked_fill(hidden(scores, masks), torch.finfo(scores.dtype).min)


class _Router(Mode):
    """Tells of the first linear map in a router, which gives its logits."""

    def __init__(self, say: Say) -> None:
        super().__init__()
        self.say, self.done = say, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if self.done or func is not nn.functional.linear:
            return found
        self.done = True
        return self.say("router", found)


class _Listens:
    """A kind of configuration that names hookkit's attention while an attention module of this thread is listened to.

    An attention module looks its function up by the name in its configuration, at each call.
    """

    def __init_subclass__(cls, **_: Any) -> None:
        """Leave out what transformers does with the configurations of new models."""

    @property
    def _attn_implementation(self) -> str:
        return NAME if _LISTENING.tellings else self.__dict__["_attn_implementation_internal"]


def _listened(config: Any) -> Any:
    """The same configuration, also for what is set in one of the two later, as one of that kind."""
    kind = _listened_kind(type(config))
    listened: Any = object.__new__(kind)
    object.__setattr__(listened, "__dict__", config.__dict__)
    return listened


@functools.cache
def _listened_kind(kind: type[Any]) -> type[Any]:
    make: Any = type(kind)
    return make(kind.__name__, (_Listens, kind), {})


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    **settings: Any,
) -> tuple[Tensor, Tensor | None]:
    """A module's attention, which says what it has inside. What transformers' interface calls.

    query is [batch, head, query, d_head], key and value [batch, kv_head, key, d_head] with all that the cache holds.
    Comes back: [batch, query, head, d_head], and the pattern where the function in use gives one.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    telling = _LISTENING.tellings.get(module)
    if telling is None:  # an attention module in the midst of another one, which is listened to
        kind = module.config.__dict__["_attn_implementation_internal"]  # pyright: ignore
        function: Any = ALL_ATTENTION_FUNCTIONS.get(kind, _own_attention(module))
        return function(module, query, key, value, attention_mask, **settings)
    query, key, value = (
        telling.say("query", query),
        telling.say("key", key),
        telling.say("value", value),
    )
    own = _own_attention(module)
    fused: Any = ALL_ATTENTION_FUNCTIONS.get(telling.kind, own)  # get_interface is not in 5.0
    if not telling.wants("scores", "pattern"):
        return fused(module, query, key, value, attention_mask, **settings)
    mask = _additive(attention_mask, query, key, settings.get("sliding_window"))
    compare = (
        telling.kind not in telling.verified and not module.training and fused is not own
    )  # dropout draws anew
    if not compare and fused is not own:
        with suppress(_Unchanged), _Arithmetic(telling.say, query.dtype, key.shape[2], stop=True):
            return own(module, query, key, value, mask, **settings)
        return fused(module, query, key, value, attention_mask, **settings)
    with _Arithmetic(telling.say, query.dtype, key.shape[2]) as arithmetic:
        written_out = own(module, query, key, value, mask, **settings)
    if not compare:
        return written_out
    with torch.no_grad():
        plain = (
            own(module, query, key, value, mask, **settings) if arithmetic.changed else written_out
        )
        used = fused(module, query, key, value, attention_mask, **settings)
        _check_same(module, telling.kind, plain[0], used[0], mask)
    telling.verified.add(telling.kind)
    return (
        written_out
        if arithmetic.changed
        else fused(module, query, key, value, attention_mask, **settings)
    )


def _check_same(
    module: nn.Module, kind: str, own: Tensor, fused: Tensor, mask: Tensor | None
) -> None:
    """Raise if the attention in use computes something else than the steps that were told of (sdpa has no soft-cap)."""
    difference = (
        (own.detach().float() - fused.detach().float().reshape(own.shape)).abs().amax((-2, -1))
    )
    if (
        mask is not None
    ):  # what a query of the padding gives, which sees nothing, is nobody's concern
        blind = hidden(mask).all(-1)  # [query], or [batch, head, query]
        blind = blind.all(1) if blind.ndim == 3 else blind
        difference = difference.masked_fill(blind.expand_as(difference), 0)
    apart = float(difference.max())
    limit = 16 * torch.finfo(own.dtype).eps * max(1.0, float(own.detach().abs().max()))
    if apart > max(limit, 1e-4):
        raise Unsupported(
            f"{type(module).__name__} under {kind!r} computes another attention than its own code does step by step "
            f"(they differ by {apart:.2g}: a soft-cap or a sink that {kind!r} leaves out, say), so its scores and "
            "pattern cannot be told: load the model with attn_implementation='eager'"
        )


def _own_attention(module: nn.Module) -> Any:
    """The function of the module's own file that computes attention step by step."""
    own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if own is None:
        raise Unsupported(
            f"{type(module).__name__} has no attention of its own that gives weights (eager_attention_forward): "
            "scores, pattern, q_rot and k_rot cannot be reached; q, k, v and z can"
        )
    return own


def _additive(mask: Any, query: Tensor, key: Tensor, window: int | None) -> Tensor | None:
    """A mask to be added to the scores, whatever kind the model was going to use.

    transformers gives sdpa no mask where a causal one is meant (then the first query stands at the first key), or a
    boolean one that is true for what is seen; flash attention gets the padding mask of the keys, or none.
    """
    queries, keys = query.shape[2], key.shape[2]
    if mask is not None and not isinstance(mask, Tensor):
        raise Unsupported(
            f"a mask of {type(mask).__name__} (flex attention) cannot be read: load the model with sdpa"
        )
    if mask is None:
        return (
            None if queries == 1 else _causal(query.new_empty(queries, keys))[None, None]
        )  # 5.0 cuts four axes
    if mask.ndim == 4:
        return (
            _as_added(mask[..., :keys], query.dtype)
            if mask.dtype == torch.bool
            else mask[..., :keys]
        )
    places = torch.arange(keys - queries, keys, device=query.device)[:, None]
    columns = torch.arange(keys, device=query.device)
    seen = (columns <= places) & mask[:, None, None, :keys].bool()
    return _as_added(seen if window is None else seen & (columns > places - window), query.dtype)


def _causal(scores: Tensor) -> Tensor:
    """The mask to be added where the first query stands at the first key."""
    queries, keys = scores.shape[-2:]
    seen = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).tril()
    return _as_added(seen, scores.dtype)


def _as_added(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask that is true for what is seen, as one that is added."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(
        ~seen, torch.finfo(dtype).min
    )
