"""Following the model: from each forward's arguments to the text and the columns that it works on."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .calls import Call, Text, contiguous, masked
from .captured import Ending
from .errors import Unsupported
from .generation import Generation
from .positions import OPEN, At
from .prompts import Batch


@dataclass(eq=False)
class Follower:
    """Knows which text is flowing through the model, from the arguments of one forward after the other."""

    find: Callable[[Sequence[int], At], tuple[int, ...]]
    takes_logits_to_keep: bool
    two_texts: bool = False  # an encoder-decoder, in which a position may be of either text
    text: Text | None = None  # the one that is running, or ran last
    forwards: int = 0
    generation: Generation | None = None  # while `generate` runs
    histories: dict[int, Tensor | None] = field(default_factory=dict)  # for beams: each forward's tokens so far, by row
    expected: Text | None = None  # a text whose layout is known before its forward

    def call(self, given: Mapping[str, Any]) -> tuple[Call, bool]:
        """The forward that these arguments start, and whether it begins a new text."""
        if self.two_texts:
            given = {"input_ids": next((each for each in given.values() if isinstance(each, Tensor)), None)}
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        tensor = ids if ids is not None else embeds
        if not isinstance(tensor, Tensor):
            tensor = next((value for value in given.values() if isinstance(value, Tensor)), None)
        if tensor is None or tensor.ndim == 0:
            raise Unsupported("a forward was given no tensor, so its rows and positions cannot be told")
        rows, width = tensor.shape[0], tensor.shape[1] if tensor.ndim > 1 else 1
        cache = given.get("past_key_values", given.get("cache_params"))
        past = self._past(cache)
        text = self._text(given, ids, past, rows, width)
        new, self.text = text is not self.text, text
        if new:
            text.start = text.seen = past
        head = self._head(given.get("logits_to_keep", 0), width)
        if text.head is None and head:
            text.head = past + head.start
        call = Call(text, self.forwards, past, rows, width, head, text.seen, placed=not self.two_texts)
        text.seen = max(text.seen, past + width)
        self.forwards += 1
        return call, new

    def _past(self, cache: Any) -> int:
        """How many columns the cache has seen."""
        if not hasattr(cache, "get_seq_length"):
            return 0
        try:
            return int(cache.get_seq_length())
        except ValueError:  # a state-space model's cache does not count: it goes on where the last forward ended
            return self.text.seen if self.text is not None and cache.has_previous_state() else 0

    def expect(self, batch: Batch) -> None:
        """The next forward reads these prompts and nothing goes on from it."""
        pads = [batch.ids.shape[1] - length if batch.side == "left" else 0 for length in batch.lengths]
        columns = contiguous(batch.lengths, pads, open_end=False)
        self.expected = Text(columns, batch.lengths, batch.rows.__getitem__, self.find, final=True)

    def remember(self, call: Call, tokens: Tensor | None) -> None:
        """Keep what the beams have read before this forward; None while they all read the prompt."""
        assert self.generation is not None
        reads_prompt = call.past + call.width <= self.generation.width
        self.histories[call.number] = None if reads_prompt else tokens

    def _head(self, keep: Any, width: int) -> range:
        if not self.takes_logits_to_keep:
            return range(width)
        if isinstance(keep, int):
            return range(max(0, width - keep) if keep else 0, width)
        places = [int(place) % width for place in torch.as_tensor(keep).flatten()]
        if torch.as_tensor(keep).ndim != 1 or places != list(range(places[0], places[0] + len(places))):
            raise Unsupported(
                "logits_to_keep chooses scattered positions: give a number of last positions, or a run of them"
            )
        return range(places[0], places[-1] + 1)

    def _text(self, given: Mapping[str, Any], ids: Any, past: int, rows: int, width: int) -> Text:
        if self.generation is not None:
            text = self.text
            assert text is not None
            text.expand = rows // len(text.lengths)
            return text
        if self.expected is not None:
            text, self.expected = self.expected, None
            return text
        if self.text is not None and past and self.text.seen == past and rows == len(self.text.lengths):
            return self._continued(self.text)
        return self._plain(given.get("attention_mask"), ids, past, rows, width)

    def _continued(self, text: Text) -> Text:
        """A decoding loop of the user's own goes on where the last forward ended."""
        if not text.generating and any(not isinstance(row, range) or row.stop != OPEN for row in text.columns):
            raise Unsupported("this forward goes on after rows that end in padding: pad on the left to decode a batch")
        return text

    def _plain(self, mask: Any, ids: Any, past: int, rows: int, width: int) -> Text:
        end = past + width
        if mask is None:
            columns, lengths = contiguous([end] * rows, [0] * rows, open_end=True), [end] * rows
        elif isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape == (rows, end):
            columns, lengths = masked(mask.bool(), generating=False)
        else:
            shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise Unsupported(f"attention_mask is {shape}: positions are counted from a mask of shape [{rows}, {end}]")

        def prompt(row: int) -> tuple[int, ...]:
            if ids is None or past:
                return (-1,) * lengths[row]
            chosen = columns[row]
            return tuple(ids[row, list(chosen[: lengths[row]])].tolist())

        return Text(columns, lengths, prompt, self.find)

    def plain_ending(self) -> Ending:
        """How a text ended that no `generate` made."""
        assert self.text is not None
        return Ending(range(len(self.text.lengths) * self.text.expand))


def named(module: nn.Module, root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What the model, or one that wraps it, was given, by the names of its arguments."""
    return {**dict(zip(_arguments(type(module), type(root)), args, strict=False)), **kwargs}


@functools.cache
def _arguments(kind: type[nn.Module], root: type[nn.Module]) -> tuple[str, ...]:
    """The names of a module's positional arguments; those of the model for a wrapper that passes all on."""
    parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
    if kind is not root and parameters and parameters[0].kind is inspect.Parameter.VAR_POSITIONAL:
        return _arguments(root, root)
    return tuple(parameter.name for parameter in parameters)
