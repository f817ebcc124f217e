"""PositionTracker: from each forward's arguments to the text and the columns that it works on.

A forward says only its ids or embeddings, a mask and a cache. The tracker finds out from them
which text the forward belongs to (a new one, or one that continues a cache), and which columns
of the text it reads.
"""

import functools
import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ..arguments import leave_out_none
from ..errors import Unsupported
from ..models.batch_positions import (
    Columns,
    ForwardPass,
    ImagePlace,
    SequenceBatch,
    columns_of_mask,
)
from ..models.positions import NO_END, Named
from ..models.prompt_row import Row
from ..models.prompts import Batch
from ..models.sites import STACKS
from .generation import Generation

ARGUMENT_NAMES = (
    "past_key_values",
    "cache_params",
    "past_key_value",
    "layer_past",
    "past_buckets_states",
    "mems",
    "state",
)
LAYER_TENSORS = ("keys", "recurrent_states", "ssm_states", "conv_states")  # of a cache's layer


@dataclass(eq=False, slots=True)
class _ForwardArguments:
    """What the arguments of one forward say: `past` columns in a cache, then `width` new ones."""

    ids: Any
    mask: Any
    cache: Any
    past: int
    rows: int
    width: int


@dataclass(eq=False)
class PositionTracker:
    """Finds the text of each forward of a block. Owned by the block's `TextHooks`."""

    find: Callable[[Sequence[int], Named], tuple[int, ...]]  # the positions of a phrase in ids
    takes_logits_to_keep: bool
    two_texts: bool = False  # an encoder-decoder, in which a position may be of either text
    # `hookkit.models.tower_images.find_images` of the model
    find_images: Callable[..., Any] = lambda *arguments: None
    towers: frozenset[str] = frozenset()  # those in which hooks act
    text: SequenceBatch | None = None  # the text of the last forward
    forwards: int = 0
    generation: Generation | None = None  # while `generate` runs
    expected: SequenceBatch | None = None  # a text whose columns are known before its forward
    inputs: Mapping[str, Any] = field(default_factory=dict)  # of the `generate` that runs
    prompts: Sequence[Row] = ()  # of the expected text, with their images or sources
    caches: "Caches" = field(default_factory=lambda: Caches())

    def begin_forward(self, arguments: Mapping[str, Any]) -> tuple[ForwardPass, bool]:
        """Returns the forward that begins with these arguments; True if it begins a new text."""
        own_arguments = arguments
        if self.two_texts:
            arguments = _decoder_arguments(arguments)
        rows, width = _rows_and_width(arguments)
        cache = cache_in(arguments)
        past = columns_in(cache, self.caches.text_of(cache))
        ids, mask = arguments.get("input_ids"), arguments.get("attention_mask")
        text = self._text_of(_ForwardArguments(ids, mask, cache, past, rows, width))
        is_new_text = not text.begun
        self.text = text
        if is_new_text:
            text.begun, text.start, text.n_read = True, past, past
        self.caches.note(cache, text, past)
        head = self._head(arguments.get("logits_to_keep", 0), width)
        if text.head is None and head:
            text.head = past + head.start
        forward_pass = ForwardPass(
            text,
            self.forwards,
            past,
            rows,
            width,
            head,
            text.n_read,
            self._stack_passes(own_arguments, text, rows),
        )
        text.n_read = max(text.n_read, past + width)
        self.forwards += 1
        return forward_pass, is_new_text

    def end_forward(self, forward_pass: ForwardPass, output: Any) -> None:
        """Notes the cache that a forward returned, from which a later one may go on."""
        text = forward_pass.text
        if text.begun and not text.final:
            self.caches.note(cache_of(output), text, forward_pass.past + forward_pass.width)

    def expect(self, batch: Batch, prompt_lengths: Sequence[int] | None = None) -> None:
        """Sets the prompts of the next forward, which none continues, or of the next `generate`.

        With `prompt_lengths`, the tokens of each row after so many count as generated.
        """
        columns: list[Columns] = []
        for length in batch.lengths:
            pad = batch.ids.shape[1] - length if batch.side == "left" else 0
            columns.append(range(pad, pad + length))
        if prompt_lengths is not None:
            prompts = [row[:n] for row, n in zip(batch.rows, prompt_lengths, strict=True)]
            self.expected = SequenceBatch(
                columns, list(prompt_lengths), prompts.__getitem__, self.find, history=batch.ids
            )
            return
        self.expected = SequenceBatch(
            columns, batch.lengths, batch.rows.__getitem__, self.find, final=True
        )
        self.prompts = batch.rows

    def begin_stack(self, stack: str, arguments: Mapping[str, Any]) -> ForwardPass:
        """Returns the forward in which `generate` runs another stack, before the text's."""
        assert self.text is not None
        if stack == "encoder":
            rows, _ = _rows_and_width(arguments)
            stacks = {stack: self._source_pass(arguments, self.text, rows)}
        else:
            rows = len(self.text.lengths)
            stacks = self._stack_passes(self.inputs, self.text, rows)
        return ForwardPass(self.text, self.forwards, 0, rows, 0, range(0), 0, stacks)

    def _stack_passes(
        self, arguments: Mapping[str, Any], text: SequenceBatch, rows: int
    ) -> dict[str, ForwardPass]:
        """Returns the forwards of the model's other stacks, which run in a forward of the model."""
        passes: dict[str, ForwardPass] = {}
        if self.two_texts:
            passes["encoder"] = self._source_pass(arguments, text, rows)
        for stack in self.towers:
            prompts: Sequence[Row] = self.prompts
            if len(prompts) != len(text.lengths):
                prompts = list(map(text.prompt, range(len(text.lengths))))
            images = self.find_images(stack, arguments, prompts, rows)
            if images is not None:
                passes[stack] = self._tower_pass(stack, text, rows, *images)
        return passes

    def _tower_pass(
        self,
        stack: str,
        text: SequenceBatch,
        rows: int,
        shape: tuple[int, int],
        images: Sequence[Sequence[ImagePlace]],
    ) -> ForwardPass:
        """Returns the forward of a tower, whose rows are the patches of each prompt's images."""
        if stack not in text.stacks:
            expand = rows // len(text.lengths)
            lengths: list[int] = []
            for row_images in images[::expand]:
                lengths.append(sum(len(image.columns) for image in row_images))
            text.stacks[stack] = SequenceBatch(
                list(map(range, lengths)),
                lengths,
                lambda row: (-1,) * lengths[row],
                partial(_refuse_named, stack),
                final=True,
                expand=expand,
                unit="frames" if stack == "audio" else "patches",
            )
        patches = text.stacks[stack]
        n_read, patches.n_read = patches.n_read, max(patches.lengths)
        count, width = shape
        return ForwardPass(
            patches, self.forwards, 0, count, width, range(width), n_read, images=images
        )

    def _source_pass(
        self, arguments: Mapping[str, Any], text: SequenceBatch, rows: int
    ) -> ForwardPass:
        """Returns the forward over the source, which has as many rows as the decoder."""
        if "encoder" not in text.stacks:
            text.stacks["encoder"] = self._source_text(arguments)
        source = text.stacks["encoder"]
        count = len(source.lengths)
        if rows != count * source.expand:
            source = replace(source, expand=rows // count, _positions={})
            text.stacks["encoder"] = source
        width = max(columns[-1] + 1 for columns in source.columns)
        return ForwardPass(source, self.forwards, 0, rows, width, range(width), 0)

    def _source_text(self, arguments: Mapping[str, Any]) -> SequenceBatch:
        """Returns the text that the encoder reads, from its arguments or those of the model."""
        ids, mask = arguments.get("input_ids"), arguments.get("attention_mask")
        rows, width = _shape_of_source(arguments)
        if isinstance(arguments.get("input_features"), Tensor):
            mask = None  # the mask counts frames
        columns: list[Columns] = [range(width)] * rows
        lengths = [width] * rows
        if isinstance(mask, Tensor):
            columns, lengths = columns_of_mask(mask.bool(), generating=False)
            columns = [_closed(row, width) for row in columns]
        source_rows = [getattr(row, "source", None) for row in self.prompts]
        self.prompts = ()

        def prompt(row: int) -> tuple[int, ...]:
            own = source_rows[row] if len(source_rows) == rows else None
            return tuple(own) if own is not None else _read_ids(ids, row, columns[row])

        return SequenceBatch(columns, lengths, prompt, self.find, final=True)

    def begin_generation(self, plan: Generation, inputs: Mapping[str, Any]) -> SequenceBatch:
        """Returns the text of a call of `generate`, to which the next forwards belong.

        `inputs` are the keywords that `generate` was given, such as pixel_values.
        """
        self.generation, self.inputs = plan, inputs
        prompt = plan.prompt
        if self.expected is not None:
            prompt, self.expected = self.expected.prompt, None  # rows that know who says what
        self.text = SequenceBatch(
            plan.columns,
            plan.lengths,
            prompt,
            self.find,
            generating=True,
            beams=plan.beams,
            eos=plan.eos,
        )
        return self.text

    def _head(self, logits_to_keep: Any, width: int) -> range:
        """The columns of a forward for which logits are computed."""
        if not self.takes_logits_to_keep:
            return range(width)
        if isinstance(logits_to_keep, int):
            return range(width)[-logits_to_keep:]
        indices = torch.as_tensor(logits_to_keep)
        columns = (indices.flatten() % width).tolist()
        if indices.ndim != 1 or columns != list(range(columns[0], columns[0] + len(columns))):
            raise Unsupported(
                "logits_to_keep chooses scattered positions: give a number of last positions, or a "
                "run of them"
            )
        return range(columns[0], columns[-1] + 1)

    # ---- the text of a forward

    def _text_of(self, call: _ForwardArguments) -> SequenceBatch:
        if self.generation is not None:
            return self._generated_text(call)
        if self.expected is not None:
            text, self.expected = self.expected, None
            return text
        if not call.past:
            return self._new_text(call)
        source = self._source_of(call)
        text = None
        if source is not None:
            text = self._continued_text(call, source)
        if text is None:
            text = self._new_text(call)
            _note_source(text, source, call.rows)
        return text

    def _generated_text(self, call: _ForwardArguments) -> SequenceBatch:
        """The text of the `generate` that runs."""
        text = self.text
        assert text is not None
        text.expand = call.rows // len(text.lengths)
        if call.past and not text.begun:
            _note_source(text, self._source_of(call), call.rows)
        return text

    def _source_of(self, call: _ForwardArguments) -> SequenceBatch | None:
        """The text that has filled a cache, or of whose cache it is a copy.

        None if no forward of the block has filled it.
        """
        entry = self.caches.text_of(call.cache)
        if entry is not None:
            text, _ = entry
            return text if call.past <= text.n_read else None
        if self.caches.could_be_copy(call.cache, call.past):
            raise Unsupported(
                f"this forward continues a {type(call.cache).__name__} that no forward of the "
                "block has returned, and hookkit cannot tell whether it is a copy of one: go on "
                "from the cache that the forward returned, or run the whole text"
            )
        return self.caches.copied_from(call.cache, call.past)

    def _continued_text(
        self, call: _ForwardArguments, source: SequenceBatch
    ) -> SequenceBatch | None:
        """The text of a forward in a decoding loop; None if the forward begins another text.

        That is so if it has other rows, or if its cache ends inside the prompts.
        """
        if source.generating or call.rows != len(source.lengths):
            return None
        if self.caches.text_of(call.cache) is not None:
            if not self.caches.unchanged(call.cache, source, call.past):
                raise Unsupported(
                    "the cache has other rows than the last forward left in it (reordered, or "
                    "replaced), so the positions of its rows are unknown: run each text in a "
                    "block of its own, or call generate"
                )
            if source.n_read == call.past:
                _check_open_ends(source)
                return source
        prompts = zip(source.columns, source.lengths, strict=True)
        if any(columns[length - 1] >= call.past for columns, length in prompts):
            return None
        _check_open_ends(source)
        # the same prompts once more, from a cache that was cut off, or copied
        return SequenceBatch(
            source.columns,
            source.lengths,
            source.prompt,
            self.find,
            before=source,
            before_rows=range(len(source.lengths)),
        )

    def _new_text(self, call: _ForwardArguments) -> SequenceBatch:
        """A text whose rows are laid out by the mask of its first forward."""
        rows, past, ids, mask = call.rows, call.past, call.ids, call.mask
        end = past + call.width
        if mask is None:
            lengths = [end] * rows
            columns: list[Columns] = [range(NO_END)] * rows
        elif isinstance(mask, Tensor) and mask.shape == (rows, end):
            columns, lengths = columns_of_mask(mask.bool(), generating=False)
        else:
            shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise Unsupported(
                f"attention_mask is {shape}: positions are counted from a mask of shape "
                f"[{rows}, {end}]"
            )

        def prompt(row: int) -> tuple[int, ...]:
            return _read_ids(ids, row, columns[row][: lengths[row]], past)

        return SequenceBatch(columns, lengths, prompt, self.find)


def _note_source(text: SequenceBatch, source: SequenceBatch | None, rows: int) -> None:
    """Notes with which text's cache a text begins, if its rows are the rows of that text."""
    if source is None or source.expand > 1 or source.beams > 1 or text.expand > 1:
        return
    if len(source.lengths) == rows:
        text.before, text.before_rows = source, range(rows)
    elif len(source.lengths) == 1:
        text.before, text.before_rows = source, [0] * rows


def _shape_of_source(arguments: Mapping[str, Any]) -> tuple[int, int]:
    """Returns how many rows an encoder reads, and how many positions a row has."""
    features, outputs = arguments.get("input_features"), arguments.get("encoder_outputs")
    if isinstance(features, Tensor):  # two frames of sound are one position
        return features.shape[0], (features.shape[-1] + 1) // 2
    if outputs is not None and not isinstance(arguments.get("input_ids"), Tensor):
        return outputs[0].shape[:2]
    return _rows_and_width(arguments)


def _read_ids(ids: Any, row: int, columns: Columns, past: int = 0) -> tuple[int, ...]:
    """Returns the ids of a row, in which column `past` is the first; -1 where they are unknown."""
    if not isinstance(ids, Tensor):
        return (-1,) * len(columns)
    known = [column - past for column in columns if column >= past]
    return (*(-1,) * (len(columns) - len(known)), *ids[row, known].tolist())


def _decoder_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of an encoder-decoder that its decoder reads, by their plain names."""
    names = {"input_ids", "attention_mask", "inputs_embeds", "position_ids"}
    given = {name: arguments.get(f"decoder_{name}") for name in names}
    if given["input_ids"] is None and given["inputs_embeds"] is None:
        if "encoder_hidden_states" not in arguments and arguments.get("labels") is not None:
            raise Unsupported(
                "the model makes the decoder's ids from labels, so its positions are unknown: give "
                "decoder_input_ids"
            )
        given["input_ids"] = _first_tensor(arguments.values())  # the decoder was called by itself
    others = {name: value for name, value in arguments.items() if name not in names}
    return {**others, **leave_out_none(given)}


def _refuse_named(stack: str, ids: Sequence[int], place: Named) -> tuple[int, ...]:
    """Raises `Unsupported` for positions by text or role, where positions are no tokens."""
    raise Unsupported(
        f"{place!r} means tokens of the text, and the positions in the {stack} tower are "
        f"{STACKS[stack]}: give numbers"
    )


def _closed(columns: Columns, width: int) -> Columns:
    """Returns the columns of a text that no forward goes on with."""
    if isinstance(columns, range):
        return range(columns.start, min(columns.stop, width))
    return columns


def _first_tensor(values: Iterable[Any]) -> Tensor | None:
    return next((value for value in values if isinstance(value, Tensor)), None)


def _rows_and_width(arguments: Mapping[str, Any]) -> tuple[int, int]:
    named = (arguments.get("input_ids"), arguments.get("inputs_embeds"))
    tensor = _first_tensor((*named, *arguments.values()))
    if tensor is None or tensor.ndim == 0:
        raise Unsupported("a forward was given no tensor, so its rows and positions are unknown")
    if tensor.ndim == 1:
        return len(tensor), 1
    return tensor.shape[0], tensor.shape[1]


def _check_open_ends(text: SequenceBatch) -> None:
    """Raises `Unsupported` if a row of a text ends in padding, so that no forward can go on."""
    if any(not isinstance(columns, range) or columns.stop != NO_END for columns in text.columns):
        raise Unsupported(
            "this forward continues rows that end in padding: pad on the left to decode a batch"
        )


def arguments_by_name(
    module: nn.Module, root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the arguments of the model, or of a wrapper of it, by their names."""
    names = _parameter_names(type(module), type(root))
    return {**dict(zip(names, args, strict=False)), **kwargs}


@functools.cache
def _parameter_names(kind: type[nn.Module], root: type[nn.Module]) -> tuple[str, ...]:
    """The names of a module's parameters; those of the model for a wrapper that passes all on."""
    parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
    if kind is not root and parameters and parameters[0].kind is inspect.Parameter.VAR_POSITIONAL:
        return _parameter_names(root, root)
    return tuple(parameter.name for parameter in parameters)


# ---- caches of keys and values, or of states


class Caches:
    """The caches that the forwards of a block were called with, or returned.

    It knows of each cache which text it belongs to and how many columns of it it has. A cache is
    recognised by the object itself, or by the tensors in a tuple; a copy of a cache by its values.
    Owned by the block's `PositionTracker`.
    """

    def __init__(self) -> None:
        # by the object: the text of a cache, and the columns that it had
        self._entries = WeakIdKeyDictionary()
        self._fingerprints: dict[tuple[SequenceBatch, int], Tensor] = {}

    def note(self, cache: Any, text: SequenceBatch, columns: int) -> None:
        """Notes that a cache, if there is one, has this many columns of a text."""
        identity = _identity(cache)
        if identity is None:
            return
        self._entries[identity] = text, columns
        fingerprint = _fingerprint(cache, columns)
        if fingerprint is not None:
            self._fingerprints[text, columns] = fingerprint

    def text_of(self, cache: Any) -> tuple[SequenceBatch, int] | None:
        """Returns the text of a cache that the block knows, and the columns that it had."""
        identity = _identity(cache)
        return None if identity is None else self._entries.get(identity)

    def copied_from(self, cache: Any, columns: int) -> SequenceBatch | None:
        """Returns the text of which a cache holds a copy."""
        fingerprint = _fingerprint(cache, columns)
        if fingerprint is None:
            return None
        for (text, text_columns), other in reversed(self._fingerprints.items()):
            if text_columns == columns and _equal(fingerprint, other):
                return text
        return None

    def could_be_copy(self, cache: Any, columns: int) -> bool:
        """True if a cache may be a copy, and has no values by which that can be decided."""
        if _fingerprint(cache, columns) is not None:
            return False
        return any(text.n_read >= columns for text, _ in self._entries.values())

    def unchanged(self, cache: Any, text: SequenceBatch, columns: int) -> bool:
        """False if the rows of a cache are not those that the last forward left in it."""
        fingerprint, other = _fingerprint(cache, columns), self._fingerprints.get((text, columns))
        return fingerprint is None or other is None or _equal(fingerprint, other)


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """Returns the cache among the arguments of a forward; None if there is none."""
    caches = map(arguments.get, ARGUMENT_NAMES)
    return next((cache for cache in caches if cache is not None), None)


def cache_of(output: Any) -> Any:
    """Returns the cache in the output of a forward; None if there is none."""
    caches = (getattr(output, name, None) for name in ARGUMENT_NAMES)
    cache = next((cache for cache in caches if cache is not None), None)
    if cache is None and isinstance(output, tuple):
        cache = next(filter(_is_cache, output), None)
    return cache


def columns_in(cache: Any, entry: tuple[SequenceBatch, int] | None) -> int:
    """Returns how many columns of a text a cache has, or raises `Unsupported`.

    `entry` is what `Caches.text_of` returns for it.
    """
    if cache is None:
        return 0
    columns = None
    if hasattr(cache, "get_seq_length"):
        columns = _columns_by_itself(cache)
    elif entry is None:
        columns = _columns_of_tensors(cache)
    if columns is not None:
        return columns
    if entry is None:
        raise Unsupported(
            f"this forward continues a {type(cache).__name__} that no forward of the block has "
            "filled, and it does not say how many tokens it has read: fill it in the block, or run "
            "the whole text"
        )
    return entry[1]


def _columns_by_itself(cache: Any) -> int | None:
    """The columns that a cache says it has; None if it has some and does not count them."""
    try:
        columns = int(cache.get_seq_length())
    except ValueError:  # a state-space model's cache does not count
        return None if cache.has_previous_state() else 0
    if columns == 0 and getattr(cache, "linear_cache", None):
        # MiniMax: the first block keeps no keys, and the cache counts those of the first block
        return max(int(layer.get_seq_length()) for layer in cache.layers)
    return columns


def _columns_of_tensors(cache: Any) -> int | None:
    """The columns that the tensors of a cache have; None if they are not all keys and values."""
    tensors = list(_tensors(cache))
    if not tensors:
        return 0
    if any(tensor.ndim != 4 for tensor in tensors):
        return None
    lengths = {tensor.shape[-2] for tensor in tensors}
    return lengths.pop() if len(lengths) == 1 else None


def _is_cache(item: Any) -> bool:
    if hasattr(item, "get_seq_length"):
        return True
    if not isinstance(item, tuple | list) or not item:
        return False
    return all(
        isinstance(layer, tuple | list) and next(_tensors(layer), None) is not None
        for layer in item
    )


def _tensors(cache: Any) -> Iterator[Tensor]:
    if isinstance(cache, Tensor):
        yield cache
    elif isinstance(cache, tuple | list):
        for item in cache:
            yield from _tensors(item)


def _identity(cache: Any) -> Any:
    """The object by which a cache is recognised; None if there is no cache, or no such object."""
    if cache is None:
        return None
    if isinstance(cache, tuple | list):
        return next(_tensors(cache), None)
    try:
        weakref.ref(cache)
    except TypeError:
        return None
    return cache


def _fingerprint(cache: Any, columns: int) -> Tensor | None:
    """The last layer's values at the last column: equal in a copy, different for another text."""
    layers = getattr(cache, "layers", None)
    if layers is None:
        tensors = [tensor for tensor in _tensors(cache) if tensor.ndim == 4]
        values = tensors[-1][..., -1, :] if tensors else None
    else:
        states = (_last_state(layer, columns) for layer in reversed(layers))
        values = next((state for state in states if state is not None), None)
    return None if values is None else values.detach().clone()


def _last_state(layer: Any, columns: int) -> Tensor | None:
    """A layer's keys at the last column, or the state of a layer without keys; None if empty."""
    for name in LAYER_TENSORS:
        values = getattr(layer, name, None)
        if not isinstance(values, Tensor) or values.ndim < 3 or not values.numel():
            continue
        if name != "keys":
            return values
        return values[..., columns - 1 if columns <= values.shape[-2] else -1, :]
    return None


def _equal(fingerprint: Tensor, other: Tensor) -> bool:
    if fingerprint.shape != other.shape:
        return False
    return torch.equal(fingerprint, other.to(fingerprint.device))
