"""Turns prompts into the padded batch that a model reads, and a text into its tokens' positions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ..arguments import check_prompts
from ..arguments import shorten as shorten
from ..errors import BadPrompt, OutOfRange, Unsupported
from .lm import LM
from .padding import Side as Side
from .padding import padded_inputs
from .positions import At

Prompts: TypeAlias = (
    str | Sequence[int] | Sequence[str | Sequence[int] | Tensor] | Tensor | Mapping[str, Any]
)
Row: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """Prompts as the model reads them.

    `rows` are token ids without padding, and `ids` the same padded on one side. `positions` has
    each token's position in its own row, -1 for padding, on the CPU.
    """

    rows: tuple[Row, ...]
    ids: Int[Tensor, "batch pos"]
    positions: Int[Tensor, "batch pos"]
    side: Side

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each row."""
        return [len(row) for row in self.rows]

    @property
    def padded(self) -> bool:
        """True if the rows differ in length."""
        return len(set(self.lengths)) > 1

    @property
    def mask(self) -> Bool[Tensor, "batch pos"]:
        """True for real tokens."""
        return (self.positions >= 0).to(self.ids.device)

    def inputs(self, lm: LM) -> dict[str, Tensor]:
        """Returns the arguments of a forward.

        A padded batch has a mask too, and what else the model needs so that a padded row gives the
        same numbers as the row alone. Raises `Unsupported` for a model in which nothing does so.
        """
        if not self.padded:
            return {"input_ids": self.ids}
        return padded_inputs(lm, self.ids, self.positions, self.side)


def as_batch(lm: LM, prompts: Prompts, *, side: Side = "right", room: int = 0) -> Batch:
    """Returns the prompts as one padded batch on the model's device.

    Prompts are a text, a list of texts, token ids (one row or several), or what a tokenizer
    returned: a mapping with `input_ids` and perhaps `attention_mask`, padded on either side. Texts
    are tokenized with the tokenizer's own special tokens. `room` is the number of tokens to be
    generated. Raises `BadPrompt` for empty prompts, for ids outside the vocabulary and for texts
    beyond the context.
    """
    rows = as_rows(lm, prompts)
    for number, row in enumerate(rows):
        _check_length(lm, number, row, room)
    if len(set(map(len, rows))) == 1:
        ids = torch.tensor(rows)
        positions = torch.arange(ids.shape[1]).expand(len(rows), -1)
    else:
        ids = pad_rows(rows, pad_id(lm), side)
        positions = pad_rows([range(len(row)) for row in rows], -1, side)
    return Batch(tuple(rows), ids.to(lm.device), positions, side)


def as_rows(lm: LM, prompts: Prompts) -> list[Row]:
    """Returns the prompts as rows of token ids, of any length.

    Raises `BadPrompt` for empty prompts and for ids outside the vocabulary.
    """
    is_mapping = isinstance(prompts, Mapping)
    rows: list[Row] = []
    for number, content in enumerate(check_prompts(prompts)):
        is_text = isinstance(content, str)
        row = _tokenize(lm, content) if isinstance(content, str) else content
        _check_ids(lm, number, row, from_tokenizer=is_text or is_mapping)
        rows.append(row)
    return rows


def pad_rows(
    rows: Sequence[Sequence[int]], fill: int, side: Side = "right"
) -> Int[Tensor, "row pos"]:
    """Returns rows of numbers as one tensor, with short rows padded on one side."""
    width = max(map(len, rows))
    filled: list[list[int]] = []
    for row in rows:
        padding = [fill] * (width - len(row))
        filled.append([*row, *padding] if side == "right" else [*padding, *row])
    return torch.tensor(filled)


def batches_by_length(
    lengths: Sequence[int], max_tokens: int, *, one_length: bool = False
) -> list[list[int]]:
    """Returns batches of indices into rows of these lengths, the longest rows first.

    A batch has at most `max_tokens` tokens with padding; a longer row has a batch of its own. With
    `one_length`, for models that take no mask, all rows of a batch are equally long.
    """
    result: list[list[int]] = []
    width = 0  # of the last batch
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        fits = bool(result) and width * (len(result[-1]) + 1) <= max_tokens
        if fits and (not one_length or width == lengths[index]):
            result[-1].append(index)
        else:
            result.append([index])
            width = lengths[index]
    return result


def pad_id(lm: LM) -> int:
    """Returns the token id of padding: the tokenizer's pad or end token, or 0.

    The mask hides it from the model.
    """
    vocab = lm.sizes["vocab"]
    for name in ("pad_token_id", "eos_token_id"):
        token_id = getattr(lm.tokenizer, name, None)
        if token_id is not None and (vocab is None or token_id < vocab):
            return token_id
    return 0


def _tokenize(lm: LM, text: str) -> Row:
    """Returns the token ids of a text, with the tokenizer's own special tokens."""
    if lm.tokenizer is None:
        raise BadPrompt(
            f"{shorten(text)!r} is text, and this model came without a tokenizer: give token ids"
        )
    return tuple(lm.tokenizer.encode(text)) if text else ()


def _check_ids(lm: LM, number: int, row: Row, *, from_tokenizer: bool) -> None:
    if not row:
        raise BadPrompt(f"prompt {number} is empty: the model needs at least one token to read")
    vocab = lm.sizes["vocab"]
    if vocab is None:
        return
    invalid = [token_id for token_id in row if not 0 <= token_id < vocab]
    if not invalid:
        return
    hint = ""
    if from_tokenizer and invalid[0] >= vocab:
        hint = (
            ": the tokenizer is not this model's, or tokens were added to it. Give the model's "
            "own, or call model.resize_token_embeddings(len(tokenizer))"
        )
    raise BadPrompt(
        f"prompt {number} has token id {invalid[0]}, and the vocabulary has ids 0 to "
        f"{vocab - 1}{hint}"
    )


def _check_length(lm: LM, number: int, row: Row, room: int) -> None:
    context = lm.context
    if context is not None and len(row) + room > context:
        new = f" and {room} new ones" if room else ""
        raise BadPrompt(
            f"prompt {number} has {len(row)} tokens{new}, and the model's context is {context}: "
            "shorten it"
        )


def positions_of_text(lm: LM, row: Sequence[int], at: At) -> Row:
    """Returns the positions of the tokens of a row that cover a text.

    Raises `OutOfRange` with the row's text if the text does not occur in it, or if it is not clear
    which occurrence is meant.
    """
    if any(token_id < 0 for token_id in row):
        raise Unsupported(
            f"{at!r}: the model was given embeddings, whose tokens are unknown; give positions "
            "as numbers"
        )
    # A token begins where the text of the tokens before it ends. Half a character decodes to "�".
    prefixes = [lm.text(row[: end + 1]) for end in range(len(row))]
    starts = [0] + [len(prefix.rstrip("�")) for prefix in prefixes[:-1]]
    ends = [len(prefix) for prefix in prefixes]
    first = _occurrence(prefixes[-1], at)
    last = first + len(at.text)
    return tuple(n for n in range(len(row)) if starts[n] < last and ends[n] > first)


def _occurrence(text: str, at: At) -> int:
    """Returns the index at which the occurrence that `at` means begins in a text."""
    starts = [start for start in range(len(text)) if text.startswith(at.text, start)]
    if not starts:
        raise OutOfRange(f"{at!r} was asked for, and {shorten(text)!r} does not have it")
    if at.which is None and len(starts) > 1:
        raise OutOfRange(
            f"{at.text!r} occurs {len(starts)} times in {shorten(text)!r}: say which, "
            f"at({at.text!r}, which=0) for the first or which=-1 for the last"
        )
    which = at.which or 0
    if not -len(starts) <= which < len(starts):
        raise OutOfRange(
            f"{at!r} was asked for, and it occurs {len(starts)} times in {shorten(text)!r}"
        )
    return starts[which]
