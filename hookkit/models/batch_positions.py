"""Which tokens a forward pass reads: maps batch columns to positions in each row's own text.

A batch may be padded, cached and read in chunks, so a column of a tensor is not a position. A
`SequenceBatch` holds the prompts of one plain forward, or of all forwards of one `generate`. A
`ForwardPass` is one of these forwards. `ForwardPass.cells` returns the rows and columns that a
hook selects in it. Positions are computed from masks, cache lengths and prompts, and never from
how often a module was called.
"""

from bisect import bisect_left
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import compress, count
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ..errors import OutOfRange, Unsupported
from .positions import NO_END, Named, PositionRange, Where, resolve_positions, resolve_rows
from .sites import Site

Columns = range | tuple[int, ...]
Places: TypeAlias = Sequence[Sequence["ImagePlace"]]
"""Where the images of each row are, in a tensor of a tower."""
Side: TypeAlias = Literal["left", "right"]


@dataclass(frozen=True)
class DecidedToken:
    """A token that a hook puts first, and the hook in words."""

    token: int
    hook: str
    certain: bool = True  # False for a push, which sampling may overrule


@dataclass(frozen=True, eq=False)
class Ruling:
    """The tokens that a grammar allows in the current step of a `generate`, and it in words."""

    hook: str
    rows: list[int]  # of the model
    prompts: list[int]
    steps: list[int]
    allowed: Bool[Tensor, "row vocab"]
    name_token: Callable[[int], str]


@dataclass(frozen=True)
class ImagePlace:
    """Where the positions of one image, or sound, are in a tensor [image, patch, ...] of a tower.

    Its first position in the row, its index on the tensor's first axis, and the columns of its
    positions on the second. A tower that joins all images to one has one entry on the first axis.
    """

    first: int
    index: int
    columns: Columns


@dataclass(eq=False)
class SequenceBatch:
    """The prompts of a forward or a `generate`, with the state of reading them.

    The model may run `expand` rows of each prompt. Lists have one entry per prompt. The tracker of
    the run (`hookkit.runs.tracking`) owns the object and updates its state in each forward.
    """

    columns: list[Columns]  # the column of each position, per prompt
    lengths: list[int]  # the number of tokens of each prompt
    # Returns the token ids of a prompt; each is -1 where the model was called with embeddings.
    prompt: Callable[[int], tuple[int, ...]]
    # Returns the positions in a row of token ids of a text, a role, a turn or the template.
    find: Callable[[Sequence[int], Named], tuple[int, ...]]
    generating: bool = False
    final: bool = False  # True if there is one forward only
    expand: int = 1
    # The prompt of each model row; None where the model has `expand` rows of each prompt in order.
    numbers: Sequence[int] | None = None
    beams: int = 1
    # The tokens that each model row has read before this forward, in a generate.
    history: Int[Tensor, "row column"] | None = None
    # Returns the model rows whose text ended with the last step.
    ended_rows: Callable[[], Sequence[int]] = tuple
    begun: bool = False  # True after its first forward has started
    # The batch whose cache this one continues, if it ran in the same `with` block.
    before: "SequenceBatch | None" = None
    before_rows: Sequence[int] = ()  # the row of that batch for each row of this one
    start: int = 0  # the first column that this batch reads itself; earlier ones are in a cache
    n_read: int = 0  # columns below this one have been read
    head: int | None = None  # the first column for which logits were computed
    # What the model's other stacks read: the source of an encoder, or the patches of images.
    stacks: "dict[str, SequenceBatch]" = field(default_factory=dict)
    unit: str = "tokens"  # what a position is
    # Of a generate: the tokens that end a row, and the column at which each model row ended, or 0.
    eos: frozenset[int] = frozenset()
    ended: Int[Tensor, " row"] | None = None
    # The tokens that hooks put first, by model row and column.
    decided: dict[tuple[int, int], DecidedToken] = field(default_factory=dict)
    rulings: list[Ruling] = field(default_factory=list)  # of grammars, in the current step
    _positions: dict[Where, list[PositionRange | None]] = field(default_factory=dict)

    def forget_step(self) -> None:
        """Drops what hooks have decided in the last step of a `generate`."""
        self.decided.clear()
        self.rulings.clear()

    def selected_positions(self, where: Where) -> list[PositionRange | None]:
        """Returns the positions that `where` selects in each prompt; None for rows without any."""
        known = self._positions.get(where)
        if known is not None:
            return known
        positions: list[PositionRange | None] = [None] * len(self.lengths)
        for row in resolve_rows(where.rows, len(self.lengths)):
            if not self.lengths[row]:  # a prompt without an image has no patches
                continue

            def cover(place: Named, row: int = row) -> tuple[int, ...]:
                return self.find(self.prompt(row), place)

            positions[row] = resolve_positions(where, self.lengths[row], cover)
        self._positions[where] = positions
        return positions

    def of(self, row: int) -> int:
        """Returns the prompt that a model row belongs to."""
        return row // self.expand if self.numbers is None else self.numbers[row]

    def first_missed_position(self, where: Where, row: int) -> int | None:
        """Returns the first selected position of a row that was cached without the hook acting.

        These are positions in the cache with which the batch started. Returns None if the hook
        acted at all of them when the cache was filled.
        """
        positions = self.selected_positions(where)[row]
        if positions is None:
            return None
        columns = self.columns[row]
        for position in positions_between(positions, columns, 0, self.start):
            if not self._acted_before(where, row, columns[position], position):
                return position
        return None

    def _acted_before(self, where: Where, row: int, column: int, position: int) -> bool:
        """True if a hook acted at a position when an earlier batch read it in this column."""
        batch = self
        while batch.before is not None:
            batch, row = batch.before, batch.before_rows[row]
            columns = batch.columns[row]
            if position >= len(columns) or columns[position] != column or column >= batch.n_read:
                return False
            if position not in (batch.selected_positions(where)[row] or ()):
                return False
            if column >= batch.start:
                return True
        return False

    def reached(self, row: int, *, head: bool) -> range:
        """Returns the positions of a prompt that have been read; with `head`, those with logits."""
        columns, first = self.columns[row], 0
        if head and self.head is not None:
            first = self.head
        return range(bisect_left(columns, first), bisect_left(columns, self.n_read))


@dataclass(eq=False)
class Selection:
    """The rows and positions of one forward that a hook selects.

    `row_positions[i]` holds the positions in model row `rows[i]`. `index` takes them from a tensor
    [batch, pos, ...]: two slices where they form a rectangle, else two index tensors [row, 1] and
    [row, pos]. `valid` [row, pos] is False where a shorter row was padded. `whole` is True if the
    selection is the whole tensor. The `ForwardPass` that made the selection owns it.
    """

    text: SequenceBatch
    rows: list[int]
    row_positions: list[PositionRange]
    index: tuple[slice, slice] | tuple[Tensor, Tensor]
    valid: Bool[Tensor, "row pos"] | None
    whole: bool

    @property
    def scattered(self) -> bool:
        """True if the cells form no rectangle, so that gathering them makes a copy."""
        return not isinstance(self.index[0], slice)

    @property
    def prompts(self) -> list[int]:
        """The prompt of each row."""
        return list(map(self.text.of, self.rows))

    @cached_property
    def positions(self) -> Int[Tensor, "row pos"]:
        """Each position in its row's own text; -1 where a shorter row was padded."""
        return pad_rows(self.row_positions, -1)

    @cached_property
    def steps(self) -> Int[Tensor, "row pos"]:
        """The step whose token the logits at each position choose.

        It is 0 at the prompt's last token and negative before it.
        """
        first_steps = [[self.text.lengths[prompt] - 1] for prompt in self.prompts]
        return self.positions - torch.tensor(first_steps)

    def gather(self, values: Tensor) -> Tensor:
        """Returns the selected cells [row, pos, ...] of a tensor [batch, pos, ...].

        Cells where a shorter row was padded are zero. The result is a view if the cells form a
        rectangle.
        """
        if self.whole:
            return values
        if not self.scattered:
            return values[self.index]
        gathered = values[self._index_on(values.device)]
        if self.valid is None:
            return gathered
        return gathered.masked_fill(~expand_mask(self.valid, gathered), 0)

    def scatter(self, into: Tensor, values: Tensor) -> None:
        """Writes cells [row, pos, ...] into a tensor [batch, pos, ...], in place."""
        if not self.scattered:
            into[self.index] = values
            return
        rows, columns = self._index_on(into.device)
        if self.valid is None:
            into[rows, columns] = values
            return
        valid = self.valid.to(into.device)
        into[rows.expand_as(columns)[valid], columns[valid]] = values[valid]

    def _index_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Moves the index tensors to a device once, and returns them."""
        rows, columns = self.index
        if isinstance(rows, Tensor) and isinstance(columns, Tensor) and rows.device != device:
            self.index = rows, columns = rows.to(device), columns.to(device)
        return rows, columns  # pyright: ignore[reportReturnType]

    def real(self, changed: Bool[Tensor, "row pos ..."]) -> Int[Tensor, "row pos"]:
        """Returns how many numbers of each cell are True; 0 in padded cells."""
        if self.valid is not None:
            changed = changed & expand_mask(self.valid, changed)
        return changed.reshape(*changed.shape[:2], -1).sum(2, dtype=torch.int32)


@dataclass(eq=False)
class ForwardPass:
    """One forward: `rows` model rows, and the columns `past` to `past + width` of the batch.

    The selections that hooks ask for are cached in it. The tracker of the run owns the object.
    """

    text: SequenceBatch
    number: int
    past: int
    rows: int
    width: int
    head: range  # the columns that the unembedding computes, counted from `past`
    n_read: int  # the number of columns that were read before this forward
    # The forwards of the model's other stacks: an encoder, or the tower that reads images.
    stacks: "Mapping[str, ForwardPass]" = field(default_factory=dict)
    end: int | None = None  # the first column that is not filled yet, where tensors have more room
    images: Places | None = None  # in a tower, where the images of each row of the batch are
    # The tensors at the sites that transcoders read, for the hooks at what they write.
    read_by_transcoders: dict[Site, Tensor] = field(default_factory=dict)
    # What hooks have changed so far at the features of the current hook point, by dictionary.
    feature_edits: dict[Site, Any] = field(default_factory=dict)
    _by_key_count: dict[int, "ForwardPass"] = field(default_factory=dict)
    _pieces: dict[tuple[int, int], "ForwardPass"] = field(default_factory=dict)
    _begun: dict[Hashable, int] = field(default_factory=dict)
    _selections: dict[tuple[int, bool, bool], Selection | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.shape = self.rows, self.width  # of the tensors inside the model
        self.inference = torch.is_inference_mode_enabled()

    def with_keys(self, count: int) -> "ForwardPass":
        """Returns this forward with the columns that attention's keys have.

        Keys are all columns that the cache holds. A sliding window keeps the last ones only, and a
        static cache has room for more.
        """
        if count == self.width or self.images is not None:
            return self
        if count not in self._by_key_count:
            end = self.past + self.width
            first = max(0, end - count)
            self._by_key_count[count] = ForwardPass(
                self.text, self.number, first, self.rows, count, range(count), self.n_read, end=end
            )
        return self._by_key_count[count]

    def next_piece(self, caller: Hashable, count: int) -> "ForwardPass":
        """Returns the part of a tower's forward that has the next `count` columns.

        Some towers compute the attention of each image, or of each window of an image, in a call of
        its own. `caller` is where these calls are counted.
        """
        start = self._begun.get(caller, 0)
        self._begun[caller] = (start + count) % self.width
        if (start, count) not in self._pieces:
            assert self.images is not None
            images = [_crop_places(row_images, start, start + count) for row_images in self.images]
            self._pieces[start, count] = replace(
                self, width=count, head=range(count), images=images, _selections={}
            )
        return self._pieces[start, count]

    def source_keys(self, cells: "Selection") -> list[list["KeySpan"]]:
        """Returns the same as `keys`, for attention to the source of an encoder-decoder."""
        source = self.stacks["encoder"]
        return source.keys(cells, source.width)

    def keys(self, cells: "Selection", count: int) -> list[list["KeySpan"]]:
        """Returns where each row's own keys are among `count` columns of keys."""
        if self.images is not None:
            rows = zip(cells.rows, cells.row_positions, strict=True)
            return [_keys_of_images(self.images[row], positions) for row, positions in rows]
        end = self.past + self.width
        start = max(0, end - count)
        spans = []
        for prompt in cells.prompts:
            columns = self.text.columns[prompt]
            if not isinstance(columns, range):
                raise Unsupported(
                    "attention_mask has gaps, so the keys of scores and pattern are not in one "
                    "piece"
                )
            first, last = bisect_left(columns, start), bisect_left(columns, end)
            column = columns[first] - start
            span = KeySpan(slice(None), first, last, slice(column, column + last - first))
            spans.append([span])
        return spans

    def whole(self, where: Where) -> Selection | None:
        """Returns the cached selection of a capture if it covers the whole tensor, else None."""
        cells = self._selections.get((id(where), False, True))
        if cells is None or not cells.whole:
            return None
        return cells

    def cells(self, where: Where, head: bool, new: bool) -> Selection | None:
        """Returns the cells that a hook selects in this forward, or None if there are none.

        `head` is True at the unembedding. With `new=True`, columns that an earlier forward has
        read are left out.
        """
        # Hooks keep their Where alive, so its id is unique. Hashing it at every site is slower.
        key = (id(where), head, new)
        if key not in self._selections:
            self._selections[key] = self._select(where, head, new)
        return self._selections[key]

    def _select(self, where: Where, head: bool, new: bool) -> Selection | None:
        if self.images is not None:
            return None if new and self.n_read else self._select_patches(self.images, where, new)
        computed = self.head if head else range(self.width)
        first, last = self.past + computed.start, self.past + computed.stop
        if self.end is not None:
            last = min(last, self.end)
        lowest = first
        if new:
            lowest = max(first, self.n_read)
        rows, positions = self._positions_between(where, lowest, last)
        if not rows:
            return None
        columns: list[Columns] = []
        for row, row_positions in zip(rows, positions, strict=True):
            prompt_columns = self.text.columns[self.text.of(row)]
            columns.append(_columns_of(row_positions, prompt_columns, first))
        return self._build_selection(rows, positions, columns, len(computed))

    def _positions_between(
        self, where: Where, first: int, last: int
    ) -> tuple[list[int], list[PositionRange]]:
        """Returns the rows with selected positions from column `first` to `last`, and those."""
        selected = self.text.selected_positions(where)
        rows: list[int] = []
        positions: list[PositionRange] = []
        for row in range(self.rows):
            prompt = self.text.of(row)
            columns = self.text.columns[prompt]
            row_positions = positions_between(selected[prompt], columns, first, last)
            if row_positions:
                rows.append(row)
                positions.append(row_positions)
        return rows, positions

    def _select_patches(self, images: Places, where: Where, new: bool) -> Selection | None:
        """Returns the cells that a hook selects in a tower, whose rows may have several images.

        Where the model runs several rows of each prompt, a capture (`new`) reads the first of them.
        """
        selected = self.text.selected_positions(where)
        rows: list[int] = []
        positions: list[PositionRange] = []
        indices: list[Columns] = []
        columns: list[Columns] = []
        step = self.text.expand if new else 1
        for row in range(0, len(images), step):
            row_images, row_selected = images[row], selected[self.text.of(row)]
            cells = [] if row_selected is None else _cells_of_images(row_images, row_selected)
            if cells:
                row_positions, row_indices, row_columns = zip(*cells, strict=True)
                rows.append(row)
                positions.append(row_positions)
                indices.append(row_indices)
                columns.append(_as_range(row_columns))
        if not rows:
            return None
        first_indices = [row_indices[0] for row_indices in indices]
        if all(len(set(row_indices)) == 1 for row_indices in indices):
            return self._build_selection(rows, positions, columns, self.width, first_indices)
        return self._build_selection(rows, positions, columns, self.width, indices)

    def _build_selection(
        self,
        rows: list[int],
        positions: list[PositionRange],
        columns: list[Columns],
        width: int,
        indices: Sequence[int] | Sequence[Columns] | None = None,
    ) -> Selection:
        """Returns the selection of these columns of rows, which have other `indices` in a tower."""
        tensor_rows: Any = rows if indices is None else indices
        if isinstance(tensor_rows[0], int):
            rectangle = _rectangle(tensor_rows, columns)
            if rectangle is not None:
                whole = len(rows) == self.rows and len(columns[0]) == width
                return Selection(self.text, rows, positions, rectangle, None, whole)
            tensor_rows = [(row,) for row in tensor_rows]
        index = pad_rows(tensor_rows, 0), pad_rows(columns, 0)
        widths = torch.tensor(list(map(len, columns)))[:, None]
        valid: Tensor | None = torch.arange(index[1].shape[1]) < widths
        if valid.all():
            valid = None
        return Selection(self.text, rows, positions, index, valid, whole=False)


@dataclass(frozen=True)
class KeySpan:
    """Where the keys are that some queries of a row may see.

    `queries` are the indices of these queries in the selection, `first` and `last` the keys'
    positions, and `columns` where they are in the tensor.
    """

    queries: slice | list[int]
    first: int
    last: int
    columns: slice | list[int]


def _keys_of_images(places: Sequence[ImagePlace], positions: PositionRange) -> list[KeySpan]:
    """Returns where the keys of a row's queries are: a patch sees those of its own image."""
    spans: list[KeySpan] = []
    for image in places:
        end = image.first + len(image.columns)
        first, last = bisect_left(positions, image.first), bisect_left(positions, end)
        if first < last:
            queries = list(range(first, last))
            spans.append(KeySpan(queries, image.first, end, list(image.columns)))
    return spans


def _cells_of_images(
    places: Sequence[ImagePlace], positions: PositionRange
) -> list[tuple[int, int, int]]:
    """Returns the positions of a row that are in these images, each with its index and column."""
    cells: list[tuple[int, int, int]] = []
    for image in places:
        end = image.first + len(image.columns)
        first, last = bisect_left(positions, image.first), bisect_left(positions, end)
        for position in positions[first:last]:
            cells.append((position, image.index, image.columns[position - image.first]))
    return cells


def _crop_places(places: Sequence[ImagePlace], start: int, stop: int) -> list[ImagePlace]:
    """Returns the parts of images that are in these columns, which are counted from `start`."""
    cropped: list[ImagePlace] = []
    for image in places:
        first, last = bisect_left(image.columns, start), bisect_left(image.columns, stop)
        if first < last:
            columns = tuple(column - start for column in image.columns[first:last])
            cropped.append(ImagePlace(image.first + first, image.index, columns))
    return cropped


def _as_range(columns: Sequence[int]) -> Columns:
    """Returns columns as a range if they follow one another."""
    if columns[-1] - columns[0] == len(columns) - 1:
        return range(columns[0], columns[-1] + 1)
    return tuple(columns)


def columns_of_mask(
    mask: Bool[Tensor, "batch pos"], *, generating: bool
) -> tuple[list[Columns], list[int]]:
    """Returns the columns of the real tokens of each row of a mask, and their numbers.

    Raises `OutOfRange` for a row without any, and `Unsupported` for a row from which `generate`
    cannot continue.
    """
    mask_rows: list[list[bool]] = mask.tolist()
    lengths = list(map(sum, mask_rows))
    if 0 in lengths:
        raise OutOfRange(
            "a row of attention_mask is all zeros: every row needs at least one real token"
        )
    columns = list(map(_columns_of_row, mask_rows))
    if generating and not all(isinstance(row, range) and row.stop == NO_END for row in columns):
        raise Unsupported(
            "generation continues from the last column, and a row ends in padding: pad on the left"
        )
    return columns, lengths


def _columns_of_row(mask_row: list[bool]) -> Columns:
    real = tuple(compress(count(), mask_row))
    if real[-1] - real[0] + 1 != len(real):
        return real
    # a row without padding at its end continues in the generated text
    return range(real[0], NO_END if mask_row[-1] else real[-1] + 1)


def positions_between(
    positions: PositionRange | None, columns: Columns, first: int, last: int
) -> PositionRange:
    """Returns the positions whose column is at least `first` and below `last`."""
    if positions is None:
        return ()
    low, high = bisect_left(columns, first), bisect_left(columns, last)
    if isinstance(positions, tuple):
        return tuple(position for position in positions if low <= position < high)
    skipped = max(0, low - positions.start)
    skipped_steps = -(-skipped // positions.step)  # rounded up
    start = positions.start + skipped_steps * positions.step
    return range(start, max(start, min(positions.stop, high)), positions.step)


def _rectangle(rows: Sequence[int], columns: Sequence[Columns]) -> tuple[slice, slice] | None:
    """Returns the slices of rows and columns if the selected cells are a rectangle, else None."""
    first = columns[0]
    is_consecutive = list(rows) == [*range(rows[0], rows[-1] + 1)]
    if not is_consecutive or columns.count(first) != len(columns):
        return None
    if not isinstance(first, range) or first.step != 1:
        return None
    return slice(rows[0], rows[-1] + 1), slice(first.start, first.stop)


def _columns_of(positions: PositionRange, columns: Columns, first: int) -> Columns:
    """Returns the columns of positions, counted from column `first`; a range where possible."""
    if isinstance(columns, range) and (isinstance(positions, range) or len(positions) == 1):
        start = columns.start + positions[0] - first
        step = getattr(positions, "step", 1)
        return range(start, start + (positions[-1] - positions[0]) + 1, step)
    return tuple(columns[position] - first for position in positions)


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


def pad_batch(
    rows: Sequence[Sequence[int]], fill: int, side: Side
) -> tuple[Int[Tensor, "row pos"], Int[Tensor, "row pos"]]:
    """Returns rows of token ids as one tensor, and each token's position, -1 in the padding."""
    ids, lengths = pad_rows(rows, fill, side), torch.tensor(list(map(len, rows)))[:, None]
    positions = torch.arange(ids.shape[1]).expand(ids.shape)
    if side == "left":
        positions = positions - (ids.shape[1] - lengths)
    return ids, positions.where((positions >= 0) & (positions < lengths), -1)


def expand_mask(mask: Tensor, values: Tensor) -> Tensor:
    """Returns a mask [row, pos] with as many axes as the values, on their device."""
    return mask.to(values.device).reshape(*mask.shape, *[1] * (values.ndim - 2))
