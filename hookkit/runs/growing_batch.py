"""How the batch of a shared forward grows as it passes the blocks.

The cells of a sweep join at the first block at which they differ from the unedited rows, with the
hidden states that those have there. There are two layouts. In `GrowingRows` each row of a cell is a
row of the batch, and all rows have the same positions. In `PackedTokens` the batch has one row, in
which the cells' tokens stand one after the other, each cell's from the position of its edit on.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from inspect import signature
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from ..errors import Unsupported
from .dispatch import find_input, replace_input
from .hook_points import HookPoint

Path: TypeAlias = tuple[Any, ...]
"""Where a value is among the arguments of a block: indices and keywords."""

Factors: TypeAlias = Mapping[tuple[int, Path], int]
"""By block and path: the entries of axis 0 that an argument has for each row; 0 without rows."""

TokenAxes: TypeAlias = Mapping[tuple[int, Path], int]
"""By block and path: the axis of an argument that has an entry for each position; -1 without."""

MASK = "attention_mask"  # the argument of a block


class NotByRow(Unsupported):
    """A tensor that has no axis of rows, so that cells cannot share a forward.

    `hook_point` is where it is.
    """

    def __init__(self, message: str, hook_point: HookPoint | None = None) -> None:
        super().__init__(message)
        self.hook_point = hook_point


@dataclass(eq=False)
class GrowingBatch(ABC):
    """What both layouts have in common.

    first   the first block that runs; those before it are skipped
    counts  the number of rows, or of tokens, in each block
    states  the hidden states that join, from the block's number and the hidden states before it:
            [row, pos, d_model]; a packed batch has one row
    kinds   the output of each skipped block: 0 for a tensor, or the number of values
    """

    first: int
    counts: Sequence[int]
    states: Callable[[int, Tensor], Tensor]
    kinds: Sequence[int]
    # By id, a tensor that all blocks share, and the same for all rows or tokens that will join. The
    # tensor is stored so that its id is not used again.
    _extended: dict[int, tuple[Tensor | None, Tensor]] = field(
        default_factory=dict, init=False, repr=False
    )

    axis = 0  # of the hidden states, along which the batch grows

    def grow(
        self, number: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the arguments of a block for the batch as it is there."""
        hidden, key = find_input(args, kwargs, 0, f"block {number}")
        if number == self.first:
            hidden = self._begin(hidden)
        if self.counts[number] > hidden.shape[self.axis]:
            joining = self.states(number, hidden).to(hidden.device)
            hidden = torch.cat([hidden, joining], self.axis)
        args, kwargs = replace_input(args, kwargs, key, None)
        args, kwargs = self._extend_arguments(number, block, args, kwargs)
        return replace_input(args, kwargs, key, hidden)

    def _begin(self, hidden: Tensor) -> Tensor:
        """Returns the part of the model's own hidden states with which the batch begins: none."""
        return hidden.narrow(self.axis, 0, 0)

    def _extend_arguments(
        self, number: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return self._extend(number, (), args), self._extend(number, (), kwargs)

    def _extend(self, number: int, path: Path, value: Any) -> Any:
        """Returns an argument of a block for the batch as it is there."""
        if isinstance(value, Tensor):
            return self._extend_tensor(number, path, value)
        if isinstance(value, tuple | list) and not hasattr(value, "_fields"):
            return type(value)(
                self._extend(number, (*path, index), item) for index, item in enumerate(value)
            )
        if type(value) is dict:
            return {name: self._extend(number, (*path, name), item) for name, item in value.items()}
        return value

    @abstractmethod
    def _extend_tensor(self, number: int, path: Path, tensor: Tensor) -> Tensor: ...

    def _once(self, tensor: Tensor | None, extend: Callable[[], Tensor]) -> Tensor:
        """Returns what `extend` makes of a tensor; it is called once for each tensor."""
        if id(tensor) not in self._extended:
            self._extended[id(tensor)] = tensor, extend()
        return self._extended[id(tensor)][1]


@dataclass(eq=False)
class GrowingRows(GrowingBatch):
    """A batch to which rows are added.

    prompts  for each row, the index of a row that the model itself is called with
    base     the number of rows that the model itself is called with
    factors  which arguments of a block have rows
    """

    prompts: Sequence[int]
    base: int
    factors: Factors

    def _extend_tensor(self, number: int, path: Path, tensor: Tensor) -> Tensor:
        factor = self.factors.get((number, path))
        if factor is None:
            raise NotByRow(_unknown_argument(number, path, tensor))
        if factor == 0 or tensor.shape[0] != factor * self.base:
            return tensor

        def extend() -> Tensor:
            prompts = torch.tensor(self.prompts, device=tensor.device)
            by_row = tensor.unflatten(0, (self.base, factor))
            return by_row.index_select(0, prompts).flatten(0, 1)

        return self._once(tensor, extend)[: self.counts[number] * factor]


@dataclass(frozen=True, eq=False)
class TokenPlaces:
    """Where the tokens of a packed batch belong. The tokens of each row are together.

    The first `n_unedited` rows may be the unedited prompts themselves.

    prompts  the index of a row that the model itself is called with
    columns  the column in that row
    starts   the first column of the row of a cell to which the token belongs
    owners   the number of that row
    """

    prompts: Int[Tensor, " token"]
    columns: Int[Tensor, " token"]
    starts: Int[Tensor, " token"]
    owners: Int[Tensor, " token"]
    n_unedited: int = 0

    @classmethod
    def of_rows(
        cls, prompts: Sequence[int], widths: Sequence[int], columns: int, n_unedited: int = 0
    ) -> "TokenPlaces":
        """Returns the places for rows that have the last `widths` of so many columns."""
        counts = torch.tensor(widths)
        owners = torch.repeat_interleave(torch.arange(len(widths)), counts)
        starts = (columns - counts)[owners]
        first_tokens = (counts.cumsum(0) - counts)[owners]
        in_row = torch.arange(len(owners)) - first_tokens
        return cls(torch.tensor(prompts)[owners], starts + in_row, starts, owners, n_unedited)

    @cached_property
    def is_unedited(self) -> Bool[Tensor, " token"]:
        """True for the tokens of the unedited prompts."""
        return self.owners < self.n_unedited

    @cached_property
    def prefix(self) -> tuple[Int[Tensor, " key"], Int[Tensor, " key"]]:
        """The prompt and the column of each key before the first token of any cell, where these
        come from a cache."""
        if self.n_unedited:
            return self.prompts[:0], self.columns[:0]
        prompts, columns = self.prompts.unique(), torch.arange(int(self.starts.max()))
        return prompts.repeat_interleave(len(columns)), columns.repeat(len(prompts))

    def after_prefix(self, stored: Tensor, new: Tensor) -> Tensor:
        """Returns the keys or values [1, head, key, d] that the tokens may attend to: those of the
        prompts, of `stored` [prompt, head, column, d], and the tokens' own."""
        prompts, columns = (index.to(stored.device) for index in self.prefix)
        prefix = stored[prompts, :, columns].transpose(0, 1)[None]
        return torch.cat([prefix, new], dim=-2)

    def mask(self, of_rows: Tensor | None, past: int) -> Tensor:
        """Returns the mask [1, head, token, key] of the tokens.

        `of_rows` is the mask [prompt, head, column, key] of whole rows, whose columns begin at
        `past`. It is None where each position sees all before it.
        """
        prefix_prompts, prefix_columns = self.prefix
        key_prompts = torch.cat([prefix_prompts, self.prompts])
        key_columns = torch.cat([prefix_columns, self.columns])
        from_cache = torch.ones(len(prefix_prompts), dtype=torch.bool)
        is_of_prompt = torch.cat([from_cache, self.is_unedited])
        allowed = is_of_prompt & (self.prompts[:, None] == key_prompts)
        allowed &= key_columns < self.starts[:, None]
        allowed[:, len(prefix_prompts) :] |= self.owners[:, None] == self.owners
        if of_rows is None:
            return (allowed & (key_columns <= self.columns[:, None]))[None, None]
        device = of_rows.device
        prompts = self.prompts if len(of_rows) > 1 else torch.zeros_like(self.prompts)
        rows, queries = prompts.to(device), (self.columns - past).to(device)
        by_head = of_rows[rows[:, None], :, queries[:, None], key_columns.to(device)]
        mask, allowed = by_head.movedim(-1, 0), allowed.to(device)
        if mask.dtype == torch.bool:
            return (mask & allowed)[None]
        return mask.masked_fill(~allowed, torch.finfo(mask.dtype).min)[None]


@dataclass(eq=False)
class PackedTokens(GrowingBatch):
    """A batch of one row to which tokens are added.

    places      where the tokens belong
    past        the first column with which the model itself is called
    width       with how many columns it is called
    token_axes  which arguments of a block have positions
    last        for each row of a cell, its last token
    """

    places: TokenPlaces
    past: int
    width: int
    token_axes: TokenAxes
    last: Int[Tensor, " row"]

    axis = 1

    def _begin(self, hidden: Tensor) -> Tensor:
        """Returns the tokens of the unedited prompts, if they are in the batch."""
        is_unedited = self.places.is_unedited
        columns = self.places.columns[is_unedited] - self.past
        return hidden[self.places.prompts[is_unedited], columns][None]

    def unpack(self, inner: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Runs in place of the last block's forward: returns its output [row, pos, d_model].

        A column before the first token of a row has a copy of that token, since nothing reads it.
        """
        output = inner(*args, **kwargs)
        hidden = output[0] if isinstance(output, tuple) else output
        columns = torch.arange(self.width - 1, -1, -1)
        tokens = self.last[:, None] - columns
        first_tokens = torch.searchsorted(self.places.owners, torch.arange(len(self.last)))
        tokens = tokens.maximum(first_tokens[:, None]).to(hidden.device)
        unpacked = hidden[0].index_select(0, tokens.flatten()).unflatten(0, tokens.shape)
        return (unpacked, *output[1:]) if isinstance(output, tuple) else unpacked

    def _extend_arguments(
        self, number: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        key = key_of_mask(block, args, kwargs)
        of_rows = kwargs[key] if isinstance(key, str) else args[key]
        mask = self._once(of_rows, lambda: self.places.mask(of_rows, self.past))
        args, kwargs = replace_input(args, kwargs, key, None)
        args, kwargs = super()._extend_arguments(number, block, args, kwargs)
        count = self.counts[number]
        n_keys = mask.shape[-1] - len(self.places.owners) + count
        return replace_input(args, kwargs, key, mask[:, :, :count, :n_keys])

    def _extend_tensor(self, number: int, path: Path, tensor: Tensor) -> Tensor:
        axis = self.token_axes.get((number, path))
        if axis is None or axis > 1:
            raise NotByRow(_unknown_argument(number, path, tensor))
        if axis < 0:
            return tensor
        extended = self._once(tensor, lambda: self._by_token(tensor, axis))
        return extended.narrow(axis, 0, self.counts[number])

    def _by_token(self, tensor: Tensor, axis: int) -> Tensor:
        columns = (self.places.columns - self.past).to(tensor.device)
        if axis == 0:
            return tensor[columns]
        if len(tensor) == 1:
            return tensor[:, columns]
        return tensor[self.places.prompts.to(tensor.device), columns][None]


def key_of_mask(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str:
    """Returns the index or the keyword of a block's mask."""
    if MASK in kwargs:
        return MASK
    names = [*signature(type(block).forward).parameters][1:]  # without self
    if MASK in names[: len(args)]:
        return names.index(MASK)
    raise NotByRow(f"{type(block).__name__} is given no {MASK}")


def _unknown_argument(number: int, path: Path, tensor: Tensor) -> str:
    return f"block {number} is given a tensor {list(tensor.shape)} at {path}, which no trial showed"
