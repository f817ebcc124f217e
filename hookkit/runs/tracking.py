"""Following the model: from each forward's arguments to the text and the columns that it works on."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Unsupported
from ..hooks.captured_values import SequenceEnd
from ..models.batch_positions import ForwardPass, SequenceBatch, contiguous, masked
from ..models.positions import OPEN, At
from ..models.prompts import Batch
from .generation import Generation
from .kv_cache import Caches, cache_in, cache_of, columns_in


@dataclass(eq=False)
class PositionTracker:
    """Knows which text is flowing through the model, from the arguments of one forward after the other."""

    find: Callable[[Sequence[int], At], tuple[int, ...]]
    takes_logits_to_keep: bool
    two_texts: bool = False  # an encoder-decoder, in which a position may be of either text
    text: SequenceBatch | None = None  # the one that is running, or ran last
    forwards: int = 0
    generation: Generation | None = None  # while `generate` runs
    histories: dict[int, Tensor | None] = field(
        default_factory=dict
    )  # for beams: each forward's tokens so far, by row
    expected: SequenceBatch | None = None  # a text whose layout is known before its forward
    caches: Caches = field(default_factory=Caches)

    def call(self, given: Mapping[str, Any]) -> tuple[ForwardPass, bool]:
        """The forward that these arguments start, and whether it begins a new text."""
        if self.two_texts:
            given = {
                "input_ids": next(
                    (each for each in given.values() if isinstance(each, Tensor)), None
                )
            }
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        tensor = ids if ids is not None else embeds
        if not isinstance(tensor, Tensor):
            tensor = next((value for value in given.values() if isinstance(value, Tensor)), None)
        if tensor is None or tensor.ndim == 0:
            raise Unsupported(
                "a forward was given no tensor, so its rows and positions cannot be told"
            )
        rows, width = tensor.shape[0], tensor.shape[1] if tensor.ndim > 1 else 1
        cache = None if self.two_texts else cache_in(given)
        known = self.caches.text_of(cache)
        past = columns_in(cache, known)
        text = self._text(given, cache, ids, past, rows, width)
        begins, self.text = not text.begun, text
        if begins:
            text.begun, text.start, text.seen = True, past, past
        if cache is not None:
            self.caches.note(cache, text, past)
        head = self._head(given.get("logits_to_keep", 0), width)
        if text.head is None and head:
            text.head = past + head.start
        call = ForwardPass(
            text, self.forwards, past, rows, width, head, text.seen, placed=not self.two_texts
        )
        text.seen = max(text.seen, past + width)
        self.forwards += 1
        return call, begins

    def gave(self, call: ForwardPass, output: Any) -> None:
        """A forward is over: from the cache that it gives, a later one may go on."""
        cache = None if self.two_texts or not call.text.begun else cache_of(output)
        if cache is not None:
            self.caches.note(cache, call.text, call.past + call.width)

    def expect(self, batch: Batch) -> None:
        """The next forward reads these prompts and nothing goes on from it."""
        pads = [
            batch.ids.shape[1] - length if batch.side == "left" else 0 for length in batch.lengths
        ]
        columns = contiguous(batch.lengths, pads, open_end=False)
        self.expected = SequenceBatch(
            columns, batch.lengths, batch.rows.__getitem__, self.find, final=True
        )

    def remember(self, call: ForwardPass, tokens: Tensor | None) -> None:
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
        if torch.as_tensor(keep).ndim != 1 or places != list(
            range(places[0], places[0] + len(places))
        ):
            raise Unsupported(
                "logits_to_keep chooses scattered positions: give a number of last positions, or a run of them"
            )
        return range(places[0], places[-1] + 1)

    def _text(
        self, given: Mapping[str, Any], cache: Any, ids: Any, past: int, rows: int, width: int
    ) -> SequenceBatch:
        if self.generation is not None:
            text = self.text
            assert text is not None
            text.expand = rows // len(text.lengths)
            if past and not text.begun:
                self._goes_on(text, self._source(cache, past), rows)
            return text
        if self.expected is not None:
            text, self.expected = self.expected, None
            return text
        mask = given.get("attention_mask")
        if not past:
            return self._plain(mask, ids, past, rows, width)
        source, itself = self._source(cache, past), self.caches.text_of(cache) is not None
        if source is not None and not source.generating and rows == len(source.lengths):
            if itself and not self.caches.unchanged(cache, source, past):
                raise Unsupported(
                    "the cache has other rows than the last forward left in it (reordered, or replaced), so whose "
                    "positions these are cannot be told: run each text in a block of its own, or call generate"
                )
            if itself and source.seen == past:
                return self._continued(source)
            if all(
                source.columns[row][length - 1] < past for row, length in enumerate(source.lengths)
            ):
                return self._branch(
                    self._continued(source)
                )  # it goes on from the same prompt a second time
        text = self._plain(mask, ids, past, rows, width)
        self._goes_on(text, source, rows)
        return text

    def _source(self, cache: Any, past: int) -> SequenceBatch | None:
        """The text of the block that has filled a cache, or the original of it; None where it came from outside."""
        known = self.caches.text_of(cache)
        if known is not None:
            return known[0] if past <= known[0].seen else None
        if self.caches.could_be_copy(cache, past):
            raise Unsupported(
                f"this forward goes on from a {type(cache).__name__} that no forward of the block has left as it is, "
                "and hookkit cannot tell whether it is a copy: go on from the cache that the forward gave, or run the "
                "whole text"
            )
        return self.caches.copied_from(cache, past)

    def _goes_on(self, text: SequenceBatch, source: SequenceBatch | None, rows: int) -> None:
        """Note which text's cache a text begins with, where its rows are those of that text."""
        if source is None or source.expand > 1 or source.beams > 1 or text.expand > 1:
            return
        if len(source.lengths) in (1, rows):
            text.before, text.before_rows = (
                source,
                range(rows) if len(source.lengths) == rows else [0] * rows,
            )

    def _branch(self, source: SequenceBatch) -> SequenceBatch:
        """The same prompts once more, from a cache that has less than was read, or a copy."""
        rows = range(len(source.lengths))
        return SequenceBatch(
            source.columns,
            source.lengths,
            source.prompt,
            self.find,
            before=source,
            before_rows=rows,
        )

    def _continued(self, text: SequenceBatch) -> SequenceBatch:
        """A decoding loop of the user's own goes on where the last forward ended."""
        if not text.generating and any(
            not isinstance(row, range) or row.stop != OPEN for row in text.columns
        ):
            raise Unsupported(
                "this forward goes on after rows that end in padding: pad on the left to decode a batch"
            )
        return text

    def _plain(self, mask: Any, ids: Any, past: int, rows: int, width: int) -> SequenceBatch:
        end = past + width
        if mask is None:
            columns, lengths = contiguous([end] * rows, [0] * rows, open_end=True), [end] * rows
        elif isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape == (rows, end):
            columns, lengths = masked(mask.bool(), generating=False)
        else:
            shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise Unsupported(
                f"attention_mask is {shape}: positions are counted from a mask of shape [{rows}, {end}]"
            )

        def prompt(row: int) -> tuple[int, ...]:
            chosen = columns[row][: lengths[row]]
            if ids is None:
                return (-1,) * lengths[row]
            read = [column - past for column in chosen if column >= past]
            return (*(-1,) * (lengths[row] - len(read)), *ids[row, read].tolist())

        return SequenceBatch(columns, lengths, prompt, self.find)


def plain_ending(text: SequenceBatch) -> SequenceEnd:
    """How a text ended that no `generate` made."""
    return SequenceEnd(range(len(text.lengths) * text.expand))


def named(
    module: nn.Module, root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """What the model, or one that wraps it, was given, by the names of its arguments."""
    return {**dict(zip(_arguments(type(module), type(root)), args, strict=False)), **kwargs}


@functools.cache
def _arguments(kind: type[nn.Module], root: type[nn.Module]) -> tuple[str, ...]:
    """The names of a module's positional arguments; those of the model for a wrapper that passes all on."""
    parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
    if kind is not root and parameters and parameters[0].kind is inspect.Parameter.VAR_POSITIONAL:
        return _arguments(root, root)
    return tuple(parameter.name for parameter in parameters)
