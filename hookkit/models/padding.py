"""Padding: how a model receives rows of several lengths.

A trial compares a padded row with the row alone.

Models count positions in many ways: from 0, from an offset after the padding id (RoBERTa), in
columns that include the padding (BART), or by the mask. Therefore a trial chooses what a model
receives besides ids and a mask: the first of a few schemes in which a padded row has the numbers of
the row alone. If none has, `Unsupported` says what to do.

A trial is a few forwards of nine tokens, the first time that a model receives padding on one side.
With images or other inputs, it is a trial of the user's own longest and shortest prompt.
It runs without gradients and in evaluation mode, and it calls neither the user's hooks nor
hookkit's.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Unsupported
from .batch_positions import Side, pad_batch
from .lm import LM, logits_of
from .overrides import Overrides, enter_padding_trial, in_padding_trial
from .prompt_row import Row, has_inputs, input_names, join_inputs, join_sources

LONG, SHORT = 9, 5  # tokens of the two rows of a trial
LIMITS = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}
BEGIN_AT_ONE = ("paligemma",)  # types of models that count positions from 1
NOISE_FACTOR = 5  # padding may change logits by this multiple of what an unpadded batch changes
# a model needs the hooks of these
LIBRARIES = ("torch", "transformers", "accelerate", "peft", "deepspeed", "hookkit")


@dataclass(frozen=True)
class PaddingScheme:
    """What a model receives with a padded batch.

    positions  the first position id, or None if the model receives no position ids
    fill       the id in the padding, or None if the model knows padding by the mask alone
    """

    positions: int | None = None
    fill: int | None = None

    def inputs(self, ids: Tensor, positions: Tensor, width: int) -> dict[str, Tensor]:
        """Returns the arguments for the last `width` columns. `positions` is -1 in the padding."""
        real = positions >= 0
        if self.fill is not None:
            ids = ids.where(real.to(ids.device), self.fill)
        inputs = {"input_ids": ids[:, -width:], "attention_mask": real.long().to(ids.device)}
        if self.positions is not None:
            shifted = (positions + self.positions).clamp(min=max(0, self.positions - 1))
            inputs["position_ids"] = shifted[:, -width:].to(ids.device)
        return inputs


def forward_inputs(
    lm: LM, rows: Sequence[Row], own: Mapping[str, Tensor], width: int, side: Side
) -> dict[str, Tensor]:
    """Returns the arguments of a forward of these rows, which are padded to `width` on one side.

    `own` are the arguments made of their token ids; an encoder-decoder's decoder reads them.
    """
    others = join_inputs(rows, width, side)
    if lm.two_texts:
        own = {f"decoder_{name}": values for name, values in own.items()}
        pad_token_id = getattr(lm.config, "pad_token_id", None)
        others |= join_sources(rows, pad_token_id or 0)
    moved = {name: values.to(lm.device) for name, values in others.items()}
    return {**own, **moved}


def can_pad(lm: LM, side: Side, rows: Sequence[Row] = ()) -> bool:
    """True if a row that is padded on this side has the numbers of the row alone."""
    try:
        padding_scheme(lm, side, rows)
    except Unsupported:
        return False
    return True


def padding_scheme(lm: LM, side: Side, rows: Sequence[Row] = ()) -> PaddingScheme:
    """Returns the scheme of a model for one side. Raises `Unsupported` if no scheme is right.

    `rows` are the rows to be padded, if they have more inputs than token ids.
    """
    return _trial_result(lm, _choose_scheme, side, rows=rows)


def check_generation(
    lm: LM,
    *,
    padded: bool,
    chunk: int | None,
    width: int,
    cache: str | None = None,
    rows: Sequence[Row] = (),
) -> None:
    """Raises `Unsupported` if `generate` gives a row other logits than the row alone has.

    A trial is made for a batch that is `padded` on the left, a prompt that is read in chunks,
    another kind of `cache`, and a model whose positions begin at an offset. Each is tried once for
    each kind of chunks: chunks of one token, chunks of which the last has one token, and others.
    """
    chunk_kind = _chunk_kind(chunk, width)
    if chunk_kind is not None and input_names(rows):
        raise Unsupported(
            f"the prompts have {input_names(rows)[0]!r} beside their tokens, and "
            "prefill_chunk_size would divide the tokens alone: leave it out"
        )
    # "paged" packs prompts into one row, which hooks refuse
    if cache in ("dynamic", "dynamic_full", "paged"):
        cache = None
    is_plain = (padded, chunk_kind, cache) == (False, None, None)
    if is_plain and _position_offset(lm) is None and not lm.two_texts:
        return
    if padded:
        _trial_result(lm, _generation_problem, True, None, None, rows=rows)
    if chunk_kind is not None and cache is not None:
        _trial_result(lm, _generation_problem, False, None, cache, rows=rows)
    _trial_result(lm, _generation_problem, padded, chunk_kind, cache, rows=rows)


def _chunk_kind(chunk: int | None, width: int) -> tuple[int, int] | None:
    """Returns a chunk's size (at most 3) and the tokens of the last one (0 if full, at most 2)."""
    if not chunk or chunk >= width:
        return None
    return min(chunk, 3), min(width % chunk, 2)


def _lengths(row: Row) -> tuple[int, int]:
    """Returns the number of tokens of a row, and of an encoder-decoder's source."""
    return len(row), len(getattr(row, "source", None) or ())


def _trial_result(
    lm: LM, trial: Callable[..., Any], *arguments: Any, rows: Sequence[Row] = ()
) -> Any:
    """Returns the result of `trial(lm, rows, *arguments)`. Raises `Unsupported` if it is a message.

    A trial runs once for each attention implementation, dtype, set of adapters and set of inputs.
    """
    attention = getattr(lm.config, "_attn_implementation", None)
    key = trial, *arguments, attention, getattr(lm.root, "dtype", None), lm.adapters
    names = input_names(rows)
    key = *key, names, bool(names) and len(set(map(len, rows))) > 1
    if key not in lm.trial_results:
        own_rows = trial_rows(lm)
        if input_names(rows):
            own_rows = [max(rows, key=_lengths), min(rows, key=_lengths)]
        lm.trial_results[key] = trial(lm, own_rows, *arguments)
    if isinstance(lm.trial_results[key], str):
        raise Unsupported(lm.trial_results[key])
    return lm.trial_results[key]


# ---- trials of one forward


def _choose_scheme(lm: LM, rows: list[Row], side: Side) -> PaddingScheme | str:
    """Returns the first scheme that is right, or the message of an error."""
    name = type(lm.root).__name__
    if not lm.accepts("attention_mask"):
        return (
            f"the prompts have several lengths, and {name} takes no attention_mask to hide "
            "padding: give prompts of one length, or one at a time"
        )
    try:
        with _trial_conditions(lm):
            return _first_right_scheme(lm, rows, side)
    except Exception as error:  # noqa: BLE001  a model may refuse a trial in any way
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        return (
            f"a trial of {name} with a padded row failed ({reason}): give prompts of one length, "
            "or one at a time"
        )


def _first_right_scheme(lm: LM, rows: list[Row], side: Side) -> PaddingScheme | str:
    alone = [_forward_unpadded(lm, [row])[0] for row in rows]
    exact_limit = _limit(lm, alone[1], 0.0)
    differences: dict[PaddingScheme, float] = {}
    for scheme in _possible_schemes(lm, side):
        differences[scheme] = _padding_difference(lm, scheme, side, rows, alone)
        if differences[scheme] <= exact_limit:
            return scheme
    together = _forward_unpadded(lm, [rows[1], _other_row(rows[1])])
    noise = _relative_difference(together[0], alone[1])
    limit = _limit(lm, alone[1], noise)
    right = [scheme for scheme, difference in differences.items() if difference <= limit]
    # a change that an unpadded batch makes too is not due to padding
    if right and noise <= exact_limit:
        return right[0]
    return _refusal(lm, side, noise, min(differences.values()))


def _possible_schemes(lm: LM, side: Side) -> list[PaddingScheme]:
    """Returns the schemes that a model may need, the most likely first."""
    with_positions = []
    if ("decoder_position_ids" if lm.two_texts else "position_ids") in lm.takes:
        offset = _position_offset(lm)
        if offset is not None:
            with_positions.append(PaddingScheme(offset))
        with_positions.append(PaddingScheme(0))
    without_positions = [PaddingScheme()]
    pad_token_id = getattr(lm.config, "pad_token_id", None)
    if isinstance(pad_token_id, int):
        without_positions.append(PaddingScheme(fill=pad_token_id))
    if side == "left":
        return with_positions + without_positions
    return without_positions + with_positions


def _position_offset(lm: LM) -> int | None:
    """Returns the first position of a model that does not begin at 0, or None.

    It is that of a position embedding whose first rows are for padding.
    """
    if getattr(lm.config, "model_type", None) in BEGIN_AT_ONE:
        return 1
    for path, module in lm.root.named_modules():
        is_for_positions = "position" in path.rpartition(".")[2]
        if is_for_positions and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.padding_idx + 1
    return None


def _padding_difference(
    lm: LM, scheme: PaddingScheme, side: Side, rows: list[Row], alone: list[Tensor]
) -> float:
    """Returns the largest relative difference between rows of a padded batch and the rows alone."""
    ids, positions = pad_batch(rows, 0, side)
    width = ids.shape[1]
    own = scheme.inputs(ids.to(lm.device), positions, width)
    logits = _forward(lm, forward_inputs(lm, rows, own, width, side))
    is_real = (positions >= 0).to(logits.device)
    differences: list[float] = []
    for row, expected in enumerate(alone):
        differences.append(_relative_difference(logits[row, is_real[row]], expected))
    return max(differences)


def _refusal(lm: LM, side: Side, noise: float, difference: float) -> str:
    name = type(lm.root).__name__
    if noise > 0 and difference <= NOISE_FACTOR * noise:
        return (
            f"rows of one batch change one another in {name} (by {noise:.1g} of the size of the "
            "logits, without any padding): give one prompt at a time"
        )
    problem = (
        f"a row that is padded on the {side} has other numbers than the row alone in {name} (a "
        f"trial was off by {difference:.1g} of the size of the logits)"
    )
    if side == "right":
        return f"{problem}: give prompts of one length, or one at a time"
    return (
        f"{problem}, so its positions count the padding in: give prompts of one length, or one at "
        "a time; hk.forward with logits='all' pads on the right"
    )


# ---- trials of generate


def _generation_problem(
    lm: LM, rows: list[Row], padded: bool, chunk_kind: tuple[int, int] | None, cache: str | None
) -> str | None:
    """Returns an error message if `generate` gives other logits than a row alone has, else None."""
    name = type(lm.root).__name__
    rows, chunk = _chunked_rows(rows, chunk_kind)
    try:
        with _trial_conditions(lm):
            expected = _forward_unpadded(lm, [rows[1]])[0, -1]
            alone = [_generated_logits(lm, [row], None)[0] for row in rows]
            together = _generated_logits(lm, [rows[1], _other_row(rows[1])], None)
            logits = _generated_logits(lm, rows if padded else rows[:1], chunk, cache)
    except Exception as error:  # noqa: BLE001  a model may refuse a trial in any way
        if cache is not None or (not padded and chunk_kind is None):
            return None  # the user's own call raises the same
        return (
            f"a trial of {name}.generate failed ({type(error).__name__}: {str(error)[:200]}): give "
            "prompts of one length, or one at a time, without prefill_chunk_size"
        )
    noise = _relative_difference(together[0], alone[1])
    limit = _limit(lm, alone[1], noise)
    from_forward = _relative_difference(alone[1][0], expected)
    if from_forward > limit:
        return (
            f"transformers' generate counts the positions of {name} in another way than its "
            f"forward does (a trial was off by {from_forward:.1g} of the size of the "
            "logits): call hk.forward, or write a decoding loop of your own inside hk.attach"
        )
    difference = max(map(_relative_difference, logits, alone))
    if difference <= limit:
        return None
    if cache is None and chunk_kind is None:
        return _refusal(lm, "left", noise, difference)
    return _changed_logits(name, padded, cache, difference)


def _changed_logits(name: str, padded: bool, cache: str | None, difference: float) -> str:
    """Returns the message for a kind of cache or for chunks with which logits differ."""
    if cache is not None:
        return (
            f"cache_implementation={cache!r} gives other logits than the prompt read at once in "
            f"{name} (a trial was off by {difference:.1g} of their size), which is transformers' "
            "own doing: leave it out"
        )
    alternative = " or give prompts of one length" if padded else ""
    return (
        f"prefill_chunk_size gives other logits than the prompt read at once in {name} (a trial "
        f"was off by {difference:.1g} of their size): transformers leaves out what its states need "
        f"there. Leave prefill_chunk_size out{alternative}, or take larger chunks"
    )


def _chunked_rows(
    rows: list[Row], chunk_kind: tuple[int, int] | None
) -> tuple[list[Row], int | None]:
    """Returns rows, and a small chunk size that leaves none, one or more tokens as the user's."""
    if chunk_kind is None:
        return rows, None
    size, remainder = chunk_kind
    width = LONG if remainder else LONG - 1
    chunks = range(min(size, 2), width)
    chunk = next((chunk for chunk in chunks if min(width % chunk, 2) == remainder), 2)
    return [row[:width] for row in rows], chunk


def plain_generate(lm: LM) -> Any:
    """Returns the function that decodes one batch, which reads the model as its first argument."""
    if lm.decodes_in_pieces:
        from transformers import GenerationMixin

        return GenerationMixin.generate  # pyright: ignore[reportAttributeAccessIssue]
    kind: Any = type(lm.root)
    return kind.generate


def _generated_logits(
    lm: LM, rows: list[Row], chunk: int | None, cache: str | None = None
) -> Tensor:
    """Returns the logits [row, 2, vocab] of two generated tokens, for rows padded on the left.

    The second token reads the cache, which may count padding in another way than the prompt.
    """
    ids, positions = pad_batch(rows, 0, "left")
    root: Any = lm.root
    options: dict[str, Any] = {"max_new_tokens": 2}
    if chunk is not None:
        options["prefill_chunk_size"] = chunk
    if cache is not None:
        # a cache may reserve room for the tokens to come
        options |= {"cache_implementation": cache, "disable_compile": True, "max_new_tokens": 4}
    mask = (positions >= 0).long().to(lm.device)
    own = {"input_ids": ids.to(lm.device), "attention_mask": mask}
    output = plain_generate(lm)(
        root,
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        # a row writes its last token again, whatever the others do; no token ends the text
        prefix_allowed_tokens_fn=lambda row, text: [rows[row][-1]],
        eos_token_id=None,
        **forward_inputs(lm, rows, own, ids.shape[1], "left"),
        **options,
    )
    return torch.stack(output.logits[:2], dim=1)


# ---- rows, logits and conditions of all trials


def trial_rows(lm: LM) -> list[Row]:
    """Returns two rows of token ids that contain no special token."""
    count = min(lm.sizes["vocab"] or 64, 64)
    names = ("pad_token_id", "bos_token_id", "eos_token_id")
    special = {getattr(lm.config, name, None) for name in names}
    ids = [number for number in range(3, count) if number not in special] or [0]
    spread = tuple(ids[(11 * number + 5) % len(ids)] for number in range(LONG + SHORT))
    return [spread[:LONG], spread[LONG:]]


def _other_row(row: Row) -> Row:
    """Returns another row of the same length; with images or the like, the row itself."""
    return row if has_inputs(row) else row[::-1]


def _forward_unpadded(lm: LM, rows: list[Row]) -> Tensor:
    ids = torch.tensor(rows, device=lm.device)
    return _forward(lm, forward_inputs(lm, rows, {"input_ids": ids}, ids.shape[1], "right"))


def _forward(lm: LM, inputs: Mapping[str, Tensor]) -> Tensor:
    """Returns the model's output [row, pos, ...] in float32."""
    output = lm.root(**inputs, **lm.accepted(use_cache=False, return_dict=True))
    return logits_of(output).float()


def _relative_difference(logits: Tensor, expected: Tensor) -> float:
    """Returns the norm of the difference over that of `expected`, each with its mean removed.

    It is infinite if a logit is not a number, but for those that are none in `expected` either.
    """
    logits, expected = logits.float(), expected.float()
    is_number = expected.isfinite().all(-1, keepdim=True)
    logits, expected = logits.where(is_number, 0), expected.where(is_number, 0)
    logits = logits - logits.mean(-1, keepdim=True)
    expected = expected - expected.mean(-1, keepdim=True)
    difference = float((logits - expected).norm() / expected.norm().clamp(min=1e-12))
    return math.inf if math.isnan(difference) else difference


def _limit(lm: LM, values: Tensor, noise: float) -> float:
    dtype = getattr(lm.root, "dtype", values.dtype)
    return max(LIMITS.get(dtype, 6e-2), NOISE_FACTOR * noise)


@contextmanager
def _trial_conditions(lm: LM) -> Iterator[None]:
    """Runs the model in evaluation mode, without gradients and without hooks of users."""
    modules = list(lm.root.modules())
    with Overrides() as overrides, ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(lm.device.type, enabled=False))
        if lm.device.type in ("cpu", "meta"):
            stack.enter_context(torch.random.fork_rng(devices=[]))
        else:
            stack.enter_context(torch.random.fork_rng([lm.device], device_type=lm.device.type))
        enter_padding_trial(overrides)
        for module in modules:
            if module.training:
                overrides.replace_attribute(module, "training", lambda _: False)
            _silence_user_hooks(module._forward_hooks, overrides)
            _silence_user_hooks(module._forward_pre_hooks, overrides)
        yield


def _silence_user_hooks(hooks: dict[int, Any], overrides: Overrides) -> None:
    for number, hook in list(hooks.items()):
        if _is_user_hook(hook):
            overrides.add_cleanup(partial(_put_back, hooks, number, hook))
            hooks[number] = _silenced(hook)


def _silenced(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a hook that does nothing in a trial. In other threads it acts as before."""

    def silenced(*args: Any, **kwargs: Any) -> Any:
        if in_padding_trial():
            return None
        return hook(*args, **kwargs)

    return silenced


def _put_back(hooks: dict[int, Any], number: int, hook: Callable[..., Any]) -> None:
    if number in hooks:  # otherwise it was removed meanwhile
        hooks[number] = hook


def _is_user_hook(hook: Callable[..., Any]) -> bool:
    function = hook
    while hasattr(function, "func"):
        function = function.func  # pyright: ignore
    owner = getattr(function, "__module__", None) or type(function).__module__
    return owner.split(".")[0] not in LIBRARIES
