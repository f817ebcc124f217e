"""One prompt as the model reads it: token ids, other inputs such as images, and who said what.

A processor returns more than token ids: `pixel_values` of images, `input_features` of sound,
`token_type_ids`. A `PromptRow` is a tuple of token ids that carries them, so that every function
that passes rows on passes them on too. `split_inputs` divides what a processor returned among its
rows, and `join_inputs` joins the inputs of a batch.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..arguments import describe
from ..errors import BadPrompt, Unsupported
from .batch_positions import Side, pad_batch

Row: TypeAlias = tuple[int, ...]

# Inputs with a value per token. Others may have as many columns by chance, as masks of sound do.
PER_TOKEN = ("token_type_ids", "mm_token_type_ids", "langs")
TEMPLATE_ROLE = "template"  # the role of the tokens that a chat template added
# Inputs with the patches of each image [time, height, width], and where all patches are.
VALUES_OF_GRIDS = {"image_grid_thw": "pixel_values", "video_grid_thw": "pixel_values_videos"}


class PromptRow(tuple[int, ...]):
    """The token ids of one prompt, and what belongs to them.

    inputs     other arguments of the model's forward: their first axis counts images or the like
    per_token  other arguments with one value for each token, such as token_type_ids
    turns      in a chat, the number of each token's message; None for the template's own tokens
    speakers   in a chat, the role of each message: "user", "assistant", …
    source     for an encoder-decoder, the token ids that the encoder reads; the row itself is what
               the decoder reads
    """

    inputs: Mapping[str, Tensor]
    per_token: Mapping[str, Tensor]
    turns: tuple[int | None, ...]
    speakers: tuple[str, ...]
    source: Row | None

    def __new__(
        cls,
        ids: Iterable[int],
        inputs: Mapping[str, Tensor] | None = None,
        per_token: Mapping[str, Tensor] | None = None,
        turns: Sequence[int | None] = (),
        speakers: Sequence[str] = (),
        source: Row | None = None,
    ) -> "PromptRow":
        row = super().__new__(cls, ids)
        row.inputs = inputs or {}
        row.per_token = per_token or {}
        row.turns = tuple(turns)
        row.speakers = tuple(speakers)
        row.source = source
        return row

    @property
    def has_inputs(self) -> bool:
        """True if the model reads more than the token ids."""
        return bool(self.inputs or self.per_token) or self.source is not None

    @property
    def roles(self) -> tuple[str, ...]:
        """Who said each token: a role, or "template"; empty if the prompt is no chat."""
        names = {None: TEMPLATE_ROLE, **dict(enumerate(self.speakers))}
        return tuple(map(names.__getitem__, self.turns))

    def __eq__(self, other: object) -> bool:
        """True for the same ids with the same other inputs."""
        if not isinstance(other, tuple) or not super().__eq__(other):
            return False
        if self.source != getattr(other, "source", None):
            return False
        return _equal_inputs(self.inputs, getattr(other, "inputs", {})) and _equal_inputs(
            self.per_token, getattr(other, "per_token", {})
        )

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = tuple.__hash__


def _equal_inputs(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    if first.keys() != second.keys():
        return False
    return all(torch.equal(first[name], second[name]) for name in first)


def input_names(rows: Sequence[Row]) -> tuple[str, ...]:
    """Returns the names of what the model reads besides the token ids of these rows."""
    names: set[str] = set()
    for row in rows:
        if isinstance(row, PromptRow):
            names |= row.inputs.keys() | row.per_token.keys()
            if row.source is not None:
                names.add("input_ids")
    return tuple(sorted(names))


def has_inputs(row: Row) -> bool:
    """True if the model reads more than the token ids of this row."""
    return isinstance(row, PromptRow) and row.has_inputs


def row_as_json(row: Row) -> list[Any]:
    """Returns the token ids of a row, and the digest of each other input after them."""
    facts: list[Any] = list(row)
    if isinstance(row, PromptRow):
        if row.source is not None:
            facts.append({"source": list(row.source)})
        for name, values in sorted({**row.inputs, **row.per_token}.items()):
            numbers = values.detach().cpu().float().contiguous().numpy()
            digest = hashlib.sha256(numbers.tobytes()).hexdigest()
            facts.append({"input": name, "shape": list(values.shape), "sha256": digest})
    return facts


def crop_row(row: Row, length: int) -> Row:
    """Returns the first tokens of a row, with what belongs to them."""
    if not isinstance(row, PromptRow):
        return row[:length]
    per_token = {name: values[:length] for name, values in row.per_token.items()}
    turns = row.turns[:length]
    return PromptRow(row[:length], row.inputs, per_token, turns, row.speakers, row.source)


def piece_of_row(row: Row, head: int, start: int, stop: int) -> Row:
    """Returns the first `head` tokens of a row and those from `start` to `stop`, with their roles.

    Raises `Unsupported` for a part of a row with an image or other inputs.
    """
    if head == 0 and start == 0 and stop >= len(row):
        return row
    ids = (*row[:head], *row[start:stop])
    if not isinstance(row, PromptRow):
        return ids
    if row.has_inputs:
        raise Unsupported(
            f"a prompt with {input_names([row])[0]!r} beside its {len(row)} tokens cannot be read "
            "in pieces: give a longer window or context, or a shorter prompt"
        )
    return PromptRow(ids, turns=(*row.turns[:head], *row.turns[start:stop]), speakers=row.speakers)


def extend_row(row: Row, ids: Sequence[int], fills: Mapping[str, int] | None = None) -> Row:
    """Returns a row with more tokens at its end.

    `fills` has the values per token of the new tokens; others repeat the value of the last one. In
    a chat, more tokens are the assistant's: of its last message if the chat ends in it, else of a
    new one.
    """
    if not isinstance(row, PromptRow):
        return (*row, *ids)
    per_token: dict[str, Tensor] = {}
    for name, values in row.per_token.items():
        new = values[-1:].expand(len(ids)).clone()
        if fills is not None and name in fills:
            new.fill_(fills[name])
        per_token[name] = torch.cat([values, new])
    turns, speakers = row.turns, row.speakers
    if turns:
        if speakers[-1] != "assistant":
            speakers = (*speakers, "assistant")
        turns = (*turns, *[len(speakers) - 1] * len(ids))
    return PromptRow((*row, *ids), row.inputs, per_token, turns, speakers, row.source)


# ---- from what a processor returned to rows


def split_inputs(
    rows: Sequence[Row], columns: Sequence[Sequence[int]], width: int, others: Mapping[str, Any]
) -> list[Row]:
    """Returns the rows with the other inputs that a processor returned for them.

    `columns` are those of each row's tokens among the `width` columns of the processor's ids. Of
    inputs without a value per token, one row has all; several rows have one entry each, and what
    cannot be divided so raises `BadPrompt`.
    """
    if not others:
        return list(rows)
    tensors = {name: _as_tensor(name, values) for name, values in others.items()}
    per_token, inputs = {}, {}
    for name, values in tensors.items():
        is_per_token = name in PER_TOKEN and tuple(values.shape) == (len(rows), width)
        (per_token if is_per_token else inputs)[name] = values
    parts = divide_inputs(inputs, len(rows))
    result: list[Row] = []
    for number, row in enumerate(rows):
        own = {name: values[number, list(columns[number])] for name, values in per_token.items()}
        result.append(PromptRow(row, parts[number], own))
    return result


def _as_tensor(name: str, values: Any) -> Tensor:
    if isinstance(values, Tensor):
        return values
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadPrompt(
            f"the prompts have {name!r}, {describe(values)}, which is no tensor: ask the processor "
            "for tensors, with return_tensors='pt'"
        ) from error


def divide_inputs(inputs: Mapping[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """Returns the inputs of each of `count` rows."""
    if count == 1:
        return [dict(inputs)]
    divided: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for name, values in inputs.items():
        sizes = _entries_by_row(name, inputs)
        if len(sizes) != count or sum(sizes) != values.shape[0]:
            raise BadPrompt(
                f"the prompts are {count} rows with {name!r} of shape {list(values.shape)}, which "
                "cannot be divided among the rows: give a list, with what the processor returns "
                "for each prompt"
            )
        for row, part in zip(divided, values.split(sizes), strict=True):
            row[name] = part
    return divided


def _entries_by_row(name: str, inputs: Mapping[str, Tensor]) -> list[int]:
    """Returns how many entries of the first axis of an input each row has, if each has an image."""
    for grid, values_name in VALUES_OF_GRIDS.items():
        if name == values_name and grid in inputs:
            return inputs[grid].prod(-1).tolist()
    values = inputs[name]
    return [1] * values.shape[0] if values.ndim else []


# ---- from rows to the inputs of a batch


def join_inputs(rows: Sequence[Row], width: int, side: Side) -> dict[str, Tensor]:
    """Returns the other inputs of a batch of rows, padded with zeros to a common size."""
    carriers = [row for row in rows if isinstance(row, PromptRow) and row.has_inputs]
    joined: dict[str, Tensor] = {}
    for name in _names(row.inputs for row in carriers):
        parts = [row.inputs[name] for row in carriers if name in row.inputs]
        joined[name] = _concatenate(name, parts)
    for name in _names(row.per_token for row in carriers):
        joined[name] = _pad_per_token(name, rows, width, side)
    return joined


def _names(inputs: Iterable[Mapping[str, Tensor]]) -> list[str]:
    names: dict[str, None] = {}
    for mapping in inputs:
        names |= dict.fromkeys(mapping)
    return list(names)


def _concatenate(name: str, parts: Sequence[Tensor]) -> Tensor:
    shapes = [tuple(part.shape[1:]) for part in parts]
    if len(set(map(len, shapes))) > 1:
        raise BadPrompt(f"the prompts have {name!r} of shapes {shapes}: give one number of axes")
    sizes = list(map(max, zip(*shapes, strict=True)))
    padded: list[Tensor] = []
    for part in parts:
        filled = part.new_zeros(part.shape[0], *sizes)
        filled[tuple(map(slice, part.shape))] = part
        padded.append(filled)
    return torch.cat(padded)


def _pad_per_token(name: str, rows: Sequence[Row], width: int, side: Side) -> Tensor:
    values_by_row = [getattr(row, "per_token", {}).get(name) for row in rows]
    dtype = next(values.dtype for values in values_by_row if values is not None)
    joined = torch.zeros(len(rows), width, dtype=dtype)
    for number, values in enumerate(values_by_row):
        if values is not None:
            start = 0 if side == "right" else width - len(values)
            joined[number, start : start + len(values)] = values
    return joined


def join_sources(rows: Sequence[Row], pad: int) -> dict[str, Tensor]:
    """Returns the ids and the mask of the sources of an encoder-decoder, padded on the right."""
    sources = [getattr(row, "source", None) for row in rows]
    if None in sources:
        return {}
    ids, positions = pad_batch([source or () for source in sources], pad, "right")
    return {"input_ids": ids, "attention_mask": (positions >= 0).long()}
