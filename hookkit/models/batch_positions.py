"""Which tokens a forward call sees: from columns of a padded, cached, chunked batch to each row's own positions.

A `SequenceBatch` is what flows through the model: one plain forward, or all the forwards of one `generate`. A `ForwardPass` is one of
those forwards. `ForwardPass.cells` says which of its rows and columns a hook wants. Everything is counted from masks, cache
lengths and the prompts; nothing from how often something was called.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ..errors import OutOfRange, Unsupported
from .positions import OPEN, At, PositionRange, Where, chosen, wish

Columns = range | tuple[int, ...]


@dataclass(frozen=True)
class Decided:
    """A token that a hook has decided on, and the hook in words."""

    token: int
    hook: str


@dataclass(eq=False)
class SequenceBatch:
    """Prompts on their way through the model, which may run `expand` rows of each. Lists have one entry a prompt."""

    columns: list[Columns]  # the column at which each position of the row stands
    lengths: list[int]  # tokens in each prompt
    prompt: Callable[
        [int], tuple[int, ...]
    ]  # the token ids of prompt n; -1 each where the model was given embeddings
    find: Callable[
        [Sequence[int], At], tuple[int, ...]
    ]  # the positions in a row of ids that cover a text
    generating: bool = False
    final: bool = False  # one forward is all there will be
    expand: int = 1
    numbers: Sequence[int] | None = (
        None  # the prompt of each model row, where rows are not `expand` of each in order
    )
    beams: int = 1
    history: Int[Tensor, "row column"] | None = (
        None  # what each model row has read before this forward, in a generate
    )
    ended_rows: Callable[[], Sequence[int]] = (
        tuple  # the model rows whose text ended with the last step
    )
    begun: bool = False  # a forward of it has started
    before: "SequenceBatch | None" = (
        None  # the text whose cache it goes on from, where that ran in the same block
    )
    before_rows: Sequence[int] = ()  # the row of that text, for each of its own
    start: int = 0  # the first column that it reads itself; those before it are in a cache
    seen: int = 0  # columns before this one have been seen
    head: int | None = None  # the first column for which logits were computed
    decided: dict[tuple[int, int], Decided] = field(
        default_factory=dict
    )  # what to take at a model row and column
    _wishes: dict[Where, list[PositionRange | None]] = field(default_factory=dict)

    def wishes(self, where: Where) -> list[PositionRange | None]:
        """What a hook wants of each prompt, as positions; None for a row that it leaves alone."""
        if where not in self._wishes:
            wanted: list[PositionRange | None] = [None] * len(self.lengths)
            for row in chosen(where.rows, len(self.lengths)):
                wanted[row] = wish(
                    where, self.lengths[row], lambda at, row=row: self.find(self.prompt(row), at)
                )
            self._wishes[where] = wanted
        return self._wishes[where]

    def of(self, row: int) -> int:
        """The prompt that a model row is of."""
        return row // self.expand if self.numbers is None else self.numbers[row]

    def missed(self, where: Where, row: int) -> int | None:
        """The first wanted position of a row that stands in the cache with which the text began, and at which the hook
        did not act when the cache was filled; None if there is none."""
        wanted, columns = self.wishes(where)[row], self.columns[row]
        if wanted is None:
            return None
        for place in _between(wanted, columns, 0, self.start):
            if self.before is None or not self.before.did(
                where, self.before_rows[row], columns[place], place
            ):
                return place
        return None

    def did(self, where: Where, row: int, column: int, place: int) -> bool:
        """True if a hook acted at a position of a row, which stands in this column, when this text read it."""
        columns, wanted = self.columns[row], self.wishes(where)[row]
        same = place < len(columns) and columns[place] == column and column < self.seen
        if not same or wanted is None or place not in wanted:
            return False
        if column >= self.start:
            return True
        return self.before is not None and self.before.did(
            where, self.before_rows[row], column, place
        )

    def reached(self, row: int, *, head: bool) -> range:
        """The positions of a prompt's row that have been seen, or those whose logits were computed. What a cache had
        before was held against the hooks when the text began."""
        first = self.head or 0 if head else 0
        return range(
            bisect_left(self.columns[row], first), bisect_left(self.columns[row], self.seen)
        )


@dataclass(eq=False)
class Selection:
    """The rows and positions of one call that a hook wants: `places[i]` are the positions in model row `rows[i]`.

    `index` picks them from a tensor [batch, pos, ...]: two slices where they form a block, else two index tensors
    [row, 1] and [row, pos], with `valid` [row, pos] false where a shorter row was filled up.
    """

    text: SequenceBatch
    rows: list[int]
    places: list[PositionRange]
    index: tuple[slice, slice] | tuple[Tensor, Tensor]
    valid: Bool[Tensor, "row pos"] | None
    whole: bool

    @property
    def scattered(self) -> bool:
        """True where the cells form no block, so that gathering them makes a copy."""
        return not isinstance(self.index[0], slice)

    @property
    def prompts(self) -> list[int]:
        """The prompt that each row is of."""
        return [self.text.of(row) for row in self.rows]

    @cached_property
    def positions(self) -> Int[Tensor, "row pos"]:
        """Each position in its row's own text; -1 where a shorter row was filled up."""
        return _filled([list(places) for places in self.places], -1)

    @cached_property
    def steps(self) -> Int[Tensor, "row pos"]:
        """The generated token that each position's logits choose: 0 at the prompt's last token, negative before."""
        return self.positions - torch.tensor(
            [[self.text.lengths[prompt] - 1] for prompt in self.prompts]
        )

    def gather(self, values: Tensor) -> Tensor:
        """The chosen cells [row, pos, ...] of a tensor [batch, pos, ...]; zero where a shorter row was filled up.

        For a block this is a view.
        """
        if self.whole:
            return values
        if not self.scattered:
            return values[self.index]
        picked = values[self._on(values.device)]
        return picked if self.valid is None else picked.masked_fill(~_fit(self.valid, picked), 0)

    def scatter(self, into: Tensor, values: Tensor) -> None:
        """Write chosen cells [row, pos, ...] into a tensor [batch, pos, ...], in place."""
        if not self.scattered:
            into[self.index] = values
            return
        rows, columns = self._on(into.device)
        if self.valid is None:
            into[rows, columns] = values
            return
        valid = self.valid.to(into.device)
        into[rows.expand_as(columns)[valid], columns[valid]] = values[valid]

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        rows, columns = self.index
        if isinstance(rows, Tensor) and isinstance(columns, Tensor) and rows.device != device:
            self.index = rows, columns = rows.to(device), columns.to(device)
        return rows, columns  # pyright: ignore[reportReturnType]

    def real(self, changed: Bool[Tensor, "row pos ..."]) -> Int[Tensor, "row pos"]:
        """How many numbers of each cell are true, 0 in the filled-up cells."""
        if self.valid is not None:
            changed = changed & _fit(self.valid, changed)
        return changed.reshape(*changed.shape[:2], -1).sum(2, dtype=torch.int32)


@dataclass(eq=False)
class ForwardPass:
    """One forward: `rows` rows, and the columns `past` to `past + width` of the text."""

    text: SequenceBatch
    number: int
    past: int
    rows: int
    width: int
    head: range  # the columns that the unembedding computes, counted from the first of this call
    seen: int  # the columns that the text had before this call
    placed: bool = (
        True  # false for an encoder-decoder, whose tensors may be of one text or the other
    )
    end: int | None = (
        None  # the first column that is not there yet, where the tensors have room for more
    )
    _keys: dict[int, "ForwardPass"] = field(default_factory=dict)
    _known: dict[tuple[int, bool, bool], Selection | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.shape = self.rows, self.width  # of the tensors inside the model
        self.inference = torch.is_inference_mode_enabled()

    def over_keys(self, count: int) -> "ForwardPass":
        """This call as attention's keys see it: all the columns that the cache holds, of which a sliding window keeps
        the last ones and a static cache has room for more."""
        if count == self.width:
            return self
        if count not in self._keys:
            end = self.past + self.width
            first = max(0, end - count)
            self._keys[count] = ForwardPass(
                self.text, self.number, first, self.rows, count, range(count), self.seen, end=end
            )
        return self._keys[count]

    def keys(self, cells: "Selection", count: int) -> list[tuple[int, int, int]]:
        """Of `count` columns of keys, for each row of the cells: the positions from the first to behind the last that
        are its own, and the column of the first."""
        end = self.past + self.width
        start = max(0, end - count)
        spans = []
        for prompt in cells.prompts:
            columns = self.text.columns[prompt]
            if not isinstance(columns, range):
                raise Unsupported(
                    "attention_mask has gaps, so the keys of scores and pattern are not in one piece"
                )
            first, last = bisect_left(columns, start), bisect_left(columns, end)
            spans.append((first, last, columns[first] - start))
        return spans

    def whole(self, where: Where) -> Selection | None:
        """The cells of a capture inside the model, if they were found before and are all there are."""
        cells = self._known.get((id(where), False, True))
        return cells if cells is not None and cells.whole else None

    def cells(self, where: Where, head: bool, new: bool) -> Selection | None:
        """The cells that a hook wants here, or None. `head`: at the unembedding. `new`: only those not seen before."""
        key = (
            id(where),
            head,
            new,
        )  # hooks keep their Where alive; hashing it for every site would cost more
        if key not in self._known:
            self._known[key] = self._find(where, head, new)
        return self._known[key]

    def _find(self, where: Where, head: bool, new: bool) -> Selection | None:
        inside = self.head if head else range(self.width)
        first, last = self.past + inside.start, self.past + inside.stop
        last = last if self.end is None else min(last, self.end)
        lowest = max(first, self.seen) if new else first
        wanted = self.text.wishes(where)
        rows, places, columns = [], [], []
        for row in range(self.rows):
            prompt = self.text.of(row)
            found = _between(wanted[prompt], self.text.columns[prompt], lowest, last)
            if found:
                rows.append(row)
                places.append(found)
                columns.append(_columns(self.text.columns[prompt], found, first))
        return self._cells(rows, places, columns, len(inside)) if rows else None

    def _cells(
        self, rows: list[int], places: list[PositionRange], columns: list[Columns], width: int
    ) -> Selection:
        first = columns[0]
        together = len(rows) == rows[-1] - rows[0] + 1 and all(same == first for same in columns)
        if together and isinstance(first, range) and first.step == 1:
            block = slice(rows[0], rows[-1] + 1), slice(first.start, first.stop)
            return Selection(
                self.text, rows, places, block, None, len(rows) == self.rows and len(first) == width
            )
        index = torch.tensor(rows)[:, None], _filled([list(each) for each in columns], 0)
        valid = _filled([[1] * len(each) for each in columns], 0).bool()
        return Selection(self.text, rows, places, index, None if valid.all() else valid, False)


def contiguous(lengths: Sequence[int], pads: Sequence[int], *, open_end: bool) -> list[Columns]:
    """The columns of rows that stand in one piece behind their padding, going on into generated text if `open_end`."""
    return [
        range(pad, OPEN if open_end else pad + length)
        for length, pad in zip(lengths, pads, strict=True)
    ]


def masked(mask: Bool[Tensor, "batch pos"], *, generating: bool) -> tuple[list[Columns], list[int]]:
    """The columns of the real tokens of each row of a mask, and how many there are."""
    columns: list[Columns] = []
    for row in mask.tolist():
        real = [column for column, there in enumerate(row) if there]
        if not real:
            raise OutOfRange(
                "a row of attention_mask is all zeros: every row needs at least one real token"
            )
        in_one_piece = real[-1] - real[0] + 1 == len(real)
        if generating and not (in_one_piece and row[-1]):
            raise Unsupported(
                "generation goes on from the last column, and a row ends in padding: pad on the left"
            )
        columns.append(
            range(real[0], OPEN if row[-1] else real[-1] + 1) if in_one_piece else tuple(real)
        )
    return columns, [sum(map(bool, row)) for row in mask.tolist()]


def _between(
    wanted: PositionRange | None, columns: Columns, first: int, last: int
) -> PositionRange:
    """The wanted positions whose column is at least `first` and below `last`."""
    if wanted is None:
        return ()
    low, high = bisect_left(columns, first), bisect_left(columns, last)
    if isinstance(wanted, tuple):
        return tuple(place for place in wanted if low <= place < high)
    behind = max(0, low - wanted.start)
    start = wanted.start + -(-behind // wanted.step) * wanted.step
    return range(start, max(start, min(wanted.stop, high)), wanted.step)


def _columns(columns: Columns, places: PositionRange, first: int) -> Columns:
    """The columns of positions, counted from column `first`; a range where they are next to each other."""
    if isinstance(columns, range) and (isinstance(places, range) or len(places) == 1):
        start = columns.start + places[0] - first
        step = places.step if isinstance(places, range) else 1
        return range(start, start + (places[-1] - places[0]) + 1, step)
    return tuple(columns[place] - first for place in places)


def _filled(rows: list[list[int]], fill: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows])


def _fit(mask: Tensor, values: Tensor) -> Tensor:
    """A mask [row, pos] with as many axes as the values, on their device."""
    return mask.to(values.device).reshape(*mask.shape, *[1] * (values.ndim - 2))
