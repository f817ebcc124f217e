"""Prompts: from what a user writes to the padded batch that a model reads, and from a text to its tokens' positions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ..arguments import prompt_rows
from ..arguments import shortened as shortened
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
    """Prompts as the model reads them: `rows` of token ids without padding, and `ids` padded on one side.

    `positions` has each token's position in its own row, -1 for padding, on the CPU.
    """

    rows: tuple[Row, ...]
    ids: Int[Tensor, "batch pos"]
    positions: Int[Tensor, "batch pos"]
    side: Side

    @property
    def lengths(self) -> list[int]:
        """How many tokens each row has."""
        return [len(row) for row in self.rows]

    @property
    def padded(self) -> bool:
        """True where the rows differ in length."""
        return len(set(self.lengths)) > 1

    @property
    def mask(self) -> Bool[Tensor, "batch pos"]:
        """True for real tokens."""
        return (self.positions >= 0).to(self.ids.device)

    def inputs(self, lm: LM) -> dict[str, Tensor]:
        """The arguments of a forward: ids, and where there is padding a mask, and what else makes a padded row the row
        alone in this model. `Unsupported` where nothing does."""
        if not self.padded:
            return {"input_ids": self.ids}
        return padded_inputs(lm, self.ids, self.positions, self.side)


def as_batch(lm: LM, prompts: Prompts, *, side: Side = "right", room: int = 0) -> Batch:
    """The prompts as one padded batch on the model's device. `room` is the number of tokens to be generated.

    Prompts are a text, a list of texts, token ids (one row or several), or what a tokenizer returned: a mapping with
    `input_ids` and perhaps `attention_mask`, padded on either side. Texts are read with the tokenizer's own special
    tokens. Empty prompts, ids outside the vocabulary and texts beyond the context raise `BadPrompt`.
    """
    rows = as_rows(lm, prompts)
    for number, row in enumerate(rows):
        _check_length(lm, number, row, room)
    if len(set(map(len, rows))) == 1:
        ids = torch.tensor(rows)
        positions = torch.arange(ids.shape[1]).expand(len(rows), -1)
    else:
        ids = padded(rows, pad_id(lm), side)
        positions = padded([range(len(row)) for row in rows], -1, side)
    return Batch(tuple(rows), ids.to(lm.device), positions, side)


def as_rows(lm: LM, prompts: Prompts) -> list[Row]:
    """The prompts as rows of token ids, however long. `BadPrompt` for empty ones and ids outside the vocabulary."""
    contents = prompt_rows(prompts)
    is_mapping = isinstance(prompts, Mapping)
    rows: list[Row] = []
    for number, content in enumerate(contents):
        is_text = isinstance(content, str)
        row = _tokens_of(lm, content) if isinstance(content, str) else content
        _check_ids(lm, number, row, is_text or is_mapping)
        rows.append(row)
    return rows


def padded(
    rows: Sequence[Sequence[int]], fill: int, side: Side = "right"
) -> Int[Tensor, "row pos"]:
    """Rows of numbers as one tensor, the short ones filled up on one side."""
    width = max(map(len, rows))
    missing = [[fill] * (width - len(row)) for row in rows]
    pairs = zip(rows, missing, strict=True) if side == "right" else zip(missing, rows, strict=True)
    return torch.tensor([[*first, *second] for first, second in pairs])


def pad_id(lm: LM) -> int:
    """What fills the short rows: the tokenizer's pad or end token, or 0. The mask hides it from the model."""
    vocab = lm.sizes["vocab"]
    candidates = (
        getattr(lm.tokenizer, "pad_token_id", None),
        getattr(lm.tokenizer, "eos_token_id", None),
    )
    return next((i for i in candidates if i is not None and (vocab is None or i < vocab)), 0)


def _tokens_of(lm: LM, text: str) -> Row:
    """The tokens of a text, with the tokenizer's own special tokens."""
    if lm.tokenizer is None:
        raise BadPrompt(
            f"{shortened(text)!r} is text, and this model came without a tokenizer: give token ids"
        )
    return tuple(lm.tokenizer.encode(text)) if text else ()


def _check_ids(lm: LM, number: int, row: Row, is_text: bool) -> None:
    vocab = lm.sizes["vocab"]
    if not row:
        raise BadPrompt(f"prompt {number} is empty: the model needs at least one token to read")
    if vocab is not None and (min(row) < 0 or max(row) >= vocab):
        wrong = next(i for i in row if not 0 <= i < vocab)
        raise BadPrompt(
            f"prompt {number} has token id {wrong}, and the vocabulary has ids 0 to {vocab - 1}"
            + (
                ": the tokenizer is not this model's, or tokens were added to it. Give the model's own, or call "
                "model.resize_token_embeddings(len(tokenizer))"
                if is_text and wrong >= vocab
                else ""
            )
        )


def _check_length(lm: LM, number: int, row: Row, room: int) -> None:
    context = lm.context
    if context is not None and len(row) + room > context:
        new = f" and {room} new ones" if room else ""
        raise BadPrompt(
            f"prompt {number} has {len(row)} tokens{new}, and the model's context is {context}: shorten it"
        )


def cover(lm: LM, row: Sequence[int], at: At) -> Row:
    """The positions of the tokens of a row that cover a text, or `OutOfRange` with the row's text."""
    if any(token_id < 0 for token_id in row):
        raise Unsupported(
            f"{at!r}: the model was given embeddings, whose tokens nobody knows; give positions as numbers"
        )
    # The end of each prefix's text is where the next token begins; half a character decodes to "�".
    texts = [lm.text(row[: end + 1]) for end in range(len(row))]
    starts = [0] + [len(text.rstrip("�")) for text in texts[:-1]]
    whole = texts[-1]
    found = [start for start in range(len(whole)) if whole.startswith(at.text, start)]
    if not found:
        raise OutOfRange(f"{at!r} was asked for, and {shortened(whole)!r} does not have it")
    if at.which is None and len(found) > 1:
        raise OutOfRange(
            f"{at.text!r} occurs {len(found)} times in {shortened(whole)!r}: say which, "
            f"at({at.text!r}, which=0) for the first or which=-1 for the last"
        )
    which = at.which or 0
    if not -len(found) <= which < len(found):
        raise OutOfRange(
            f"{at!r} was asked for, and it occurs {len(found)} times in {shortened(whole)!r}"
        )
    first, last = found[which], found[which] + len(at.text)
    return tuple(n for n in range(len(row)) if starts[n] < last and len(texts[n]) > first)
