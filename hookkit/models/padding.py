"""Padding: how rows of several lengths are given to a model, proved once on a padded row against the row alone.

Models count positions in many ways: from 0, from an offset behind the padding id (RoBERTa), in columns with the padding
counted in (BART), or by the mask. What a model is given beside ids and a mask is therefore chosen by trial: the first
of a few ways in which a padded row has the numbers of the row alone. Where none has, `Unsupported` says what to do.

A trial is a few forwards of nine tokens, the first time that a model is given padding on a side. It runs without
gradients, in evaluation mode, and neither the user's hooks nor hookkit's see it.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import Unsupported
from .lm import LM
from .overrides import Lent

Side: TypeAlias = Literal["left", "right"]
LONG, SHORT = 9, 5  # tokens of the rows of a trial
LIMITS = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}
OTHERS_NOISE = 5  # so many times what an unpadded batch changes may be changed by padding
LIBRARIES = (
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "deepspeed",
    "hookkit",
)  # whose hooks a model needs
_thread = threading.local()


def unseen() -> bool:
    """True in a trial's forwards, which hooks are not to see."""
    return getattr(_thread, "unseen", False)


@dataclass(frozen=True)
class Way:
    """What a model is given with a padded batch.

    positions  whether it is given position ids, and the first of them
    fill       the id that stands in the padding, where the model knows padding by it
    """

    positions: int | None = None
    fill: int | None = None

    def inputs(self, ids: Tensor, positions: Tensor, width: int) -> dict[str, Tensor]:
        """The arguments for ids with these positions, -1 where there is padding: those of the last `width` columns."""
        real = positions >= 0
        if self.fill is not None:
            ids = ids.where(real.to(ids.device), self.fill)
        inputs = {"input_ids": ids[:, -width:], "attention_mask": real.long().to(ids.device)}
        if self.positions is not None:
            shifted = (positions + self.positions).clamp(min=max(0, self.positions - 1))
            inputs["position_ids"] = shifted[:, -width:].to(ids.device)
        return inputs


def padded_inputs(
    lm: LM, ids: Tensor, positions: Tensor, side: Side, width: int | None = None
) -> dict[str, Tensor]:
    """The arguments of a forward over a padded batch, of which the last `width` columns are run.

    `positions` [row, column] counts each row's tokens from 0, and is -1 in the padding.
    """
    return way_of(lm, side).inputs(ids, positions, ids.shape[1] if width is None else width)


def pads(lm: LM, side: Side) -> bool:
    """True if a batch can be padded on this side: if a padded row then has the numbers of the row alone."""
    try:
        way_of(lm, side)
    except Unsupported:
        return False
    return True


def way_of(lm: LM, side: Side) -> Way:
    """What the model is given with a batch that is padded on this side, or `Unsupported` where no way is right."""
    key = "padding", side, *_state(lm)
    if key not in lm.learnt:
        lm.learnt[key] = _tried(lm, side)
    found = lm.learnt[key]
    if isinstance(found, str):
        raise Unsupported(found)
    return found


def check_generation(
    lm: LM, *, padded: bool, chunk: int | None, width: int, cache: str | None = None
) -> None:
    """Raise `Unsupported` where transformers' `generate` gives a row other logits than the row alone has.

    A batch that is `padded` on the left, a prompt that is read in chunks, another kind of `cache`, and a model whose
    positions begin at an offset are tried, once for each kind: chunks of one token, chunks of which the last has one
    token, and others.
    """
    rest = None if not chunk or chunk >= width else (min(chunk, 3), min(width % chunk, 2))
    # "paged" packs prompts into one row, which hooks refuse
    other = cache if cache not in (None, "dynamic", "dynamic_full", "paged") else None
    if not padded and rest is None and other is None and _offset(lm) is None:
        return
    if padded and (rest is not None or other is not None):
        check_generation(lm, padded=True, chunk=None, width=width)
    if rest is not None and other is not None:
        check_generation(lm, padded=False, chunk=None, width=width, cache=other)
    key = "padding", "generate", padded, rest, other, *_state(lm)
    if key not in lm.learnt:
        lm.learnt[key] = _generated(lm, padded, rest, other)
    if lm.learnt[key] is not None:
        raise Unsupported(lm.learnt[key])


def _state(lm: LM) -> tuple[Any, ...]:
    """What may change which way is right."""
    return (
        getattr(lm.config, "_attn_implementation", None),
        getattr(lm.root, "dtype", None),
        lm.adapters,
    )


# ---- one forward


def _tried(lm: LM, side: Side) -> Way | str:
    name = type(lm.root).__name__
    if not lm.accepts("attention_mask"):
        return (
            f"the prompts have several lengths, and {name} takes no attention_mask to hide padding: give prompts of "
            "one length, or one at a time"
        )
    rows = _rows(lm)
    try:
        with quiet(lm):
            alone = [
                _forward(lm, {"input_ids": torch.tensor([row], device=lm.device)})[0]
                for row in rows
            ]
            wrong: dict[Way, float] = {}
            for way in _ways(lm, side):
                wrong[way] = _padded_apart(lm, way, side, rows, alone)
                if wrong[way] <= _limit(lm, alone[1], 0.0):
                    return way
            together = _forward(
                lm, {"input_ids": torch.tensor([rows[1], rows[1][::-1]], device=lm.device)}
            )
            noise = apart(together[0], alone[1])
    except Exception as error:  # noqa: BLE001  whatever a model refuses: nothing is known of its padding then
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        return f"a trial of {name} with a padded row failed ({reason}): give prompts of one length, or one at a time"
    if noise <= _limit(
        lm, alone[1], 0.0
    ):  # what an unpadded batch changes too is not the padding's doing
        for way, difference in wrong.items():
            if difference <= _limit(lm, alone[1], noise):
                return way
    return _refusal(lm, side, noise, min(wrong.values()))


def _ways(lm: LM, side: Side) -> Iterator[Way]:
    """The ways in which a model may be given padding on a side, the likeliest first."""
    offset, own = _offset(lm), getattr(lm.config, "pad_token_id", None)
    counted = (
        [Way(0), *([] if offset is None else [Way(offset)])] if "position_ids" in lm.takes else []
    )
    plain = [Way(), *([] if not isinstance(own, int) else [Way(fill=own)])]
    yield from (counted + plain if side == "left" else plain + counted)


def _offset(lm: LM) -> int | None:
    """The first position of a table of positions whose rows begin behind that of the padding."""
    for path, module in lm.root.named_modules():
        padding = getattr(module, "padding_idx", None)
        if (
            "position" in path.rpartition(".")[2]
            and isinstance(module, nn.Embedding)
            and padding is not None
        ):
            return padding + 1
    return None


def _padded_apart(
    lm: LM, way: Way, side: Side, rows: list[list[int]], alone: list[Tensor]
) -> float:
    """How far the rows of a padded batch are from the rows alone."""
    ids, positions = _batch(rows, side, lm.device)
    values = _forward(lm, way.inputs(ids, positions, ids.shape[1]))
    differences = []
    for number, row in enumerate(rows):
        part = values[number, -len(row) :] if side == "left" else values[number, : len(row)]
        differences.append(apart(part, alone[number]))
    return max(differences)


def _refusal(lm: LM, side: Side, noise: float, difference: float) -> str:
    name = type(lm.root).__name__
    if noise > 0 and difference <= OTHERS_NOISE * noise:
        return (
            f"rows of one batch change one another in {name} (by {noise:.1g} of the size of the logits, without any "
            "padding): give one prompt at a time"
        )
    other = "the right" if side == "left" else "the left"
    return (
        f"a row that is padded on the {side} has other numbers than the row alone in {name} (a trial was off by "
        f"{difference:.1g} of the size of the logits), so its positions count the padding in: give prompts of one "
        f"length, or one at a time; hk.forward with logits='all' pads on {other}"
        if side == "left"
        else f"a row that is padded on the right has other numbers than the row alone in {name} (a trial was off by "
        f"{difference:.1g} of the size of the logits): give prompts of one length, or one at a time"
    )


# ---- generate


def _generated(lm: LM, padded: bool, rest: tuple[int, int] | None, cache: str | None) -> str | None:
    """None if `generate` gives each row the logits that the row alone has, else what to do."""
    name = type(lm.root).__name__
    rows = [row[: LONG - 1] if rest is not None and rest[1] == 0 else row for row in _rows(lm)]
    chunk = None if rest is None else _chunk(rest, len(rows[0]))
    try:
        with quiet(lm):
            expected = _forward(lm, {"input_ids": torch.tensor([rows[1]], device=lm.device)})[0, -1]
            alone = [_written(lm, [row], None) for row in rows]
            changed = apart(alone[1][0], expected)
            together = _written(lm, [rows[1], rows[1][::-1]], None)
            noise = apart(together[0], alone[1][0])
            batch = rows if padded else rows[:1]
            found = _written(lm, batch, chunk, cache)
    except Exception as error:  # noqa: BLE001  whatever a model refuses: the user's own call will say it
        if cache is not None or (not padded and chunk is None):
            return None  # the user's own call says it
        return (
            f"a trial of {name}.generate failed ({type(error).__name__}: {str(error)[:200]}): give prompts of one "
            "length, or one at a time, without prefill_chunk_size"
        )
    if changed > _limit(lm, alone[1], noise):
        return (
            f"transformers' generate counts the positions of {name} in another way than its forward does (a trial was "
            f"off by {changed:.1g} of the size of the logits): call hk.forward, or write a decoding loop of your own "
            "inside hk.attach"
        )
    difference = max(apart(found[number], alone[number][0]) for number in range(len(batch)))
    if difference <= _limit(lm, alone[1], noise):
        return None
    if cache is not None:
        return (
            f"cache_implementation={cache!r} gives other logits than the prompt read at once in {name} (a trial was "
            f"off by {difference:.1g} of their size), which is transformers' own doing: leave it out"
        )
    if chunk is not None:
        return (
            f"prefill_chunk_size gives other logits than the prompt read at once in {name} (a trial was off by "
            f"{difference:.1g} of their size): transformers leaves out what its states need there. Leave "
            f"prefill_chunk_size out{' or give prompts of one length' if padded else ''}, or take larger chunks"
        )
    return _refusal(lm, "left", noise, difference)


def _chunk(rest: tuple[int, int], width: int) -> int:
    """A small chunk that leaves as many tokens as the user's: none, one, or more."""
    size, left = rest
    if size == 1:
        return 1
    fitting = [n for n in range(2, width) if min(width % n, 2) == left]
    return fitting[0] if fitting else 2


def _written(lm: LM, rows: list[list[int]], chunk: int | None, cache: str | None = None) -> Tensor:
    """The logits [row, vocab] of the first token that `generate` writes behind rows, padded on the left."""
    ids, positions = _batch(rows, "left", lm.device)
    root: Any = lm.root
    more: dict[str, Any] = {} if chunk is None else {"prefill_chunk_size": chunk}
    more |= {} if cache is None else {"cache_implementation": cache, "disable_compile": True}
    output = type(root).generate(
        root,
        input_ids=ids,
        attention_mask=(positions >= 0).long().to(lm.device),
        max_new_tokens=1 if cache is None else 4,  # a cache may have room for what is to come
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        **more,
    )
    return output.logits[0]


# ---- what both need


def _rows(lm: LM) -> list[list[int]]:
    """Two rows of token ids, none of which is one that stands in padding."""
    table = getattr(lm.root, "get_input_embeddings", lambda: None)()
    count = min(getattr(table, "num_embeddings", 64), 64)
    own = {
        getattr(lm.config, name, None) for name in ("pad_token_id", "bos_token_id", "eos_token_id")
    }
    ids = [number for number in range(3, count) if number not in own] or [0]
    spread = [ids[(11 * number + 5) % len(ids)] for number in range(LONG + SHORT)]
    return [spread[:LONG], spread[LONG:]]


def _batch(
    rows: Sequence[Sequence[int]], side: Side, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Ids, 0 in the padding, and positions, -1 there."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    positions = torch.full((len(rows), width), -1)
    for number, row in enumerate(rows):
        start = width - len(row) if side == "left" else 0
        ids[number, start : start + len(row)] = torch.tensor(row)
        positions[number, start : start + len(row)] = torch.arange(len(row))
    return ids.to(device), positions


def _forward(lm: LM, inputs: Mapping[str, Tensor]) -> Tensor:
    """What the model gives for each position [row, pos, ...]."""
    output = lm.root(**inputs, **lm.accepted(use_cache=False, return_dict=True))
    return logits_of(output).float()


def logits_of(output: Any) -> Tensor:
    """The logits in what a model gave: its own item, a tuple's first tensor, or the tensor itself."""
    found = getattr(output, "logits", output)
    if isinstance(found, Tensor):
        return found
    values = found.values() if isinstance(found, Mapping) else found
    return next(value for value in values if isinstance(value, Tensor))


def apart(found: Tensor, expected: Tensor) -> float:
    """How far logits are from others, in parts of how far the tokens' logits are from their mean."""
    found, expected = found.float(), expected.float()
    found, expected = (
        found - found.mean(-1, keepdim=True),
        expected - expected.mean(-1, keepdim=True),
    )
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))


def _limit(lm: LM, values: Tensor, noise: float) -> float:
    dtype = getattr(lm.root, "dtype", values.dtype)
    return max(LIMITS.get(dtype, 6e-2), OTHERS_NOISE * noise)


@contextmanager
def quiet(lm: LM) -> Iterator[None]:
    """A block in which the model runs as it is, in evaluation mode, and no hook sees it."""
    modules = list(lm.root.modules())
    kind = lm.device.type
    devices = [lm.device] if kind not in ("cpu", "meta") else []
    with Lent() as lent, ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(
            torch.random.fork_rng(devices=devices, device_type=kind if devices else "cuda")
        )
        lent.later(_be_seen)
        _thread.unseen = True
        for module in modules:
            if module.training:
                lent.share(module, "training", lambda _: False)
        for module in modules:
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                for number, hook in list(hooks.items()):
                    if _is_a_users(hook):
                        lent.later(partial(_put_back, hooks, number, hook))
                        hooks[number] = _silenced(hook)
        yield


def _be_seen() -> None:
    _thread.unseen = False


def _silenced(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A user's hook that does not see a trial. In other threads it acts as ever."""

    def silenced(*args: Any, **kwargs: Any) -> Any:
        return None if unseen() else hook(*args, **kwargs)

    return silenced


def _put_back(hooks: dict[int, Any], number: int, hook: Callable[..., Any]) -> None:
    if number in hooks:  # unless it was taken away meanwhile
        hooks[number] = hook


def _is_a_users(hook: Callable[..., Any]) -> bool:
    function = hook
    while hasattr(function, "func"):
        function = function.func  # pyright: ignore
    owner = getattr(function, "__module__", None) or type(function).__module__
    return owner.split(".")[0] not in LIBRARIES
