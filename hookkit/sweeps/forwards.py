"""The forwards of a sweep: the unedited prompts once, then many cells in one batch.

Four things save work. The positions before the first edit have the keys and values of the unedited
prompts, which are computed once and shared by all rows. A row joins the batch at the block at which
it begins to differ. The rows of cells whose edits are at different positions are packed, so that
none is padded. After the last attention no position reads another, so that only the positions that
the metric reads are computed there.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, chain, filterfalse, groupby
from operator import itemgetter
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, cat, nn
from torch.nn import functional

from ..errors import Unsupported
from ..hooks.ablation import Ablate
from ..hooks.base import EditHook
from ..hooks.conditions import calls_function
from ..hooks.edits import Edit
from ..models.batch_positions import ForwardPass, SequenceBatch
from ..models.lm import LM, logits_of
from ..models.overrides import Overrides
from ..models.sites import QUERY_KEY_SITES, ModuleSite, Site
from ..runs.growing_batch import (
    Factors,
    GrowingBatch,
    GrowingRows,
    PackedTokens,
    TokenAxes,
    TokenPlaces,
)
from ..runs.hook_points import BoundHook, HookPoint
from ..runs.partial import CellRows, Recorder, SharedForward
from .inputs import UNEDITED, SweepInputs

Lanes: TypeAlias = list[tuple[CellRows, Sequence[HookPoint]]]
"""The rows of each cell in a forward, with its hook points."""

HookPointsOfCells: TypeAlias = Sequence[Sequence[HookPoint]] | Mapping[int, Sequence[HookPoint]]
"""All hook points of each cell, by its number."""


def prefix_cache(whole: Any, columns: int, append: Callable[[Tensor, Tensor], Tensor]) -> Any:
    """Returns a cache of transformers that holds the first `columns` columns of another one.

    The cache stores nothing new. Each update of a layer returns what `append` makes of all that the
    other cache holds there and the new keys, or values. So the batch can grow from layer to layer,
    and no prefix is stored twice.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    class PrefixLayer(DynamicLayer):
        """The prefix in one layer."""

        def __init__(self, keys: Tensor, values: Tensor) -> None:
            super().__init__()
            self.whole = keys, values
            self.keys, self.values = keys[..., :columns, :], values[..., :columns, :]
            self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

        def update(
            self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
        ) -> tuple[Tensor, Tensor]:
            keys, values = self.whole
            return append(keys, key_states), append(values, value_states)

    cache: Any = DynamicCache()
    cache.layers = []
    for layer in whole.layers:
        if layer.is_initialized:
            cache.layers.append(PrefixLayer(layer.keys, layer.values))
        else:
            cache.layers.append(DynamicLayer())  # of a layer without keys and values
    return cache


def cache_of_rows(whole: Any, columns: int, rows: Callable[[], Tensor]) -> Any:
    """Returns a cache with the prefix of the rows that are in the batch at that moment, `rows()`,
    before the new keys and values."""

    def append(stored: Tensor, new: Tensor) -> Tensor:
        return _append(stored[..., :columns, :], rows(), new)

    return prefix_cache(whole, columns, append)


def _append(prefix: Tensor, rows: Tensor, new: Tensor) -> Tensor:
    """Returns the new keys or values after the prefix of these rows."""
    if len(prefix) == 1:  # one row needs no second copy
        selected = prefix.expand(len(rows), *prefix.shape[1:])
    else:
        selected = prefix.index_select(0, rows.to(prefix.device))
    return cat([selected, new], dim=-2)


# ---- what the hooks of a cell need


INPUT = -1  # the block number of what is before the first block

# Sites after the attention of their block. They reach other positions through later blocks only.
AFTER_ATTENTION = {"scores", "pattern", "z", "attn_out", "resid_mid", "mlp_in"}
AFTER_ATTENTION |= {"router_logits", "experts", "expert_weights", "mlp_pre", "mlp_post", "mlp_out"}
AFTER_ATTENTION |= {"resid_post", "final_norm", "lm_head", "logits"}

# Inputs of modules of the last block that work on each position by itself.
NARROWED_INPUTS = ("z", "mlp_in")

# Sites inside those modules.
INSIDE_NARROWED = frozenset({"mlp_pre", "mlp_post", "router_logits", "experts", "expert_weights"})


def bound_hooks_of(hook_points: Iterable[HookPoint]) -> list[BoundHook]:
    """Returns the hooks at all hook points."""
    return list(chain.from_iterable(hook_point.actions for hook_point in hook_points))


def block_of_module(lm: LM, path: str) -> int:
    """Returns the block that a module is or is in; `INPUT` for a module outside the blocks."""
    before = lm.family.block.partition("{layer}")[0]
    number = path.removeprefix(before).partition(".")[0]
    if not path.startswith(before) or not number.isdecimal() or int(number) >= lm.n_layers:
        return INPUT
    block = lm.family.block.format(layer=number)
    return int(number) if f"{path}.".startswith(f"{block}.") else INPUT


def needs_all_positions(bound: BoundHook) -> bool:
    """True if what a hook does at a position may depend on other positions."""
    if bound.receive is not None:
        return True  # it may read positions at which nothing is edited
    hook = bound.hook
    mixes_positions = isinstance(hook, EditHook) and (
        hook.mixes_positions or calls_function(hook.when)
    )
    return mixes_positions or weights_later_keys(bound)


def weights_later_keys(bound: BoundHook) -> bool:
    """True if a query may attend to later positions after an edit of its scores or pattern.

    A user's function may change the values of keys that the query does not see, and so does a
    score of zero, since an unseen key's score is -inf. Other edits leave unseen keys unseen.
    """
    if not isinstance(bound.site, Site) or bound.site.name not in QUERY_KEY_SITES:
        return False
    if isinstance(bound.hook, Ablate):
        return bound.hook.to == "zero" and bound.site.name == "scores"
    return isinstance(bound.hook, Edit)


def is_after_blocks(lm: LM, hook_point: HookPoint) -> bool:
    """True for a hook point that is not inside the blocks: where a packed batch has rows."""
    location = hook_point.location
    last_block = lm.family.block.format(layer=lm.n_layers - 1)
    is_output = location.path == last_block and location.side == "output"
    return is_output or block_of_module(lm, location.path) == INPUT


def can_pack(lm: LM, hook_points: Iterable[HookPoint]) -> bool:
    """True if the hooks at these points act on each position by itself, in a module's input or
    output, so that rows of different widths may stand side by side."""
    for hook_point in hook_points:
        if hook_point.location.side == "inside" or hook_point.stack:
            return False
        if hook_point.reads_input and is_after_blocks(lm, hook_point):
            return False  # the input of the last block is packed, and its output is not
        for bound in hook_point.actions:
            if not isinstance(bound.site, Site) or bound.site.base_name in QUERY_KEY_SITES:
                return False
            if bound.elsewhere or needs_all_positions(bound):
                return False
    return True


def can_narrow(lm: LM, hook_points: Iterable[HookPoint]) -> bool:
    """True if no hook needs the other positions of the last block after its attention."""
    return not any(_needs_last_block(lm, bound) for bound in bound_hooks_of(hook_points))


def _needs_last_block(lm: LM, bound: BoundHook) -> bool:
    site = bound.site
    if not isinstance(site, Site):
        return True
    if site.layer is not None and site.layer < lm.n_layers - 1:
        return False
    mixes_later = site.base_name in AFTER_ATTENTION and needs_all_positions(bound)
    return mixes_later or site.base_name in INSIDE_NARROWED


@contextmanager
def narrow_last_block(lm: LM, positions: slice | Tensor) -> Iterator[None]:
    """Inside this context those modules compute these positions and return zeros for the other
    ones."""
    with Overrides() as overrides:
        for name in NARROWED_INPUTS:
            location = lm.layout.find(name, lm.n_layers - 1)
            if location is not None and location.side == "input":
                module = lm.submodule(location.path)
                overrides.wrap_method(module, "forward", partial(_compute_positions, positions))
        yield


def _compute_positions(
    positions: slice | Tensor, inner: Any, /, hidden: Tensor, *args: Any, **kwargs: Any
) -> Any:
    if hidden.ndim != 3:
        raise Unsupported(
            "a module of the last block has an input that is not [batch, pos, d]: "
            f"{list(hidden.shape)}"
        )
    crop = partial(_crop, hidden.shape[:2], positions)
    cropped_kwargs = {name: crop(value) for name, value in kwargs.items()}
    cropped = crop(hidden)
    output = inner(cropped, *map(crop, args), **cropped_kwargs)
    fill = partial(_fill_with_zeros, hidden, cropped.shape[:2], positions)
    return (fill(output[0]), *output[1:]) if isinstance(output, tuple) else fill(output)


def _crop(shape: torch.Size, positions: slice | Tensor, value: Any) -> Any:
    """Returns some positions of a tensor with these rows and positions, and other values as they
    are."""
    if not isinstance(value, Tensor) or value.shape[:2] != shape:
        return value
    return value[:, positions].contiguous()  # modules may make a view of their input


def _fill_with_zeros(
    hidden: Tensor, cropped: torch.Size, positions: slice | Tensor, values: Any
) -> Tensor:
    """Returns the values of some positions of `hidden`, with zeros at the other positions."""
    if not isinstance(values, Tensor) or values.shape[:2] != cropped:
        raise Unsupported("a module of the last block has an output that is not [batch, pos, d]")
    full = values.new_zeros(*hidden.shape[:2], values.shape[-1])
    full[:, positions] = values
    return full


def can_compute_tokens(lm: LM, hook_points: Iterable[HookPoint]) -> bool:
    """True if the head is a plain linear layer, and no hook at these points reads its output."""
    location = lm.layout.find("lm_head", None)
    if location is None or lm.ranks is not None:
        return False
    head = lm.submodule(location.path)
    if type(head) is not nn.Linear or "forward" in vars(head):
        return False
    return not any(_may_read_logits(lm, bound) for bound in bound_hooks_of(hook_points))


def _may_read_logits(lm: LM, bound: BoundHook) -> bool:
    if isinstance(bound.site, ModuleSite):
        return block_of_module(lm, bound.site.path) == INPUT
    return bound.head


@contextmanager
def compute_tokens(lm: LM, tokens: Sequence[int]) -> Iterator[None]:
    """Inside this context the head computes the logits of these tokens only, in this order."""
    location = lm.layout.find("lm_head", None)
    assert location is not None
    head = lm.submodule(location.path)
    with Overrides() as overrides:
        overrides.wrap_method(head, "forward", partial(_logits_of_tokens, head, list(tokens)))
        yield


def _logits_of_tokens(head: Any, tokens: list[int], inner: Any, /, hidden: Tensor) -> Tensor:
    bias = None if head.bias is None else head.bias[tokens]
    return functional.linear(hidden, head.weight[tokens], bias)


# ---- the forwards


class CellPrompt(NamedTuple):
    """One prompt of one cell, and the block and position at which it begins to differ from the
    unedited prompt. The cell prompts of a forward are sorted."""

    block: int
    cell: int
    row: int
    pos: int

    @property
    def key(self) -> tuple[int, int]:
        """The cell number and the row."""
        return self.cell, self.row


@dataclass(frozen=True)
class Job:
    """Cell prompts that run in one forward, over the last `width` positions.

    All of them join at blocks, or all of them run from the input on. Those that join may be packed
    into one row. Then the first ones may be the unedited prompts, which otherwise ran before.
    """

    width: int
    cell_prompts: tuple[CellPrompt, ...]
    packed: bool = False

    @property
    def n_unedited(self) -> int:
        """How many unedited prompts run in the forward."""
        return sum(cell_prompt.cell == UNEDITED for cell_prompt in self.cell_prompts)

    @property
    def keys(self) -> list[tuple[int, int]]:
        """The cell number and the row of each cell prompt, without unedited ones."""
        return [cell_prompt.key for cell_prompt in self.cell_prompts[self.n_unedited :]]

    def with_unedited(self, rows: Sequence[int], columns: int) -> "Job":
        """Returns the same job with these unedited prompts."""
        unedited = [CellPrompt(0, UNEDITED, row, 0) for row in rows]
        return Job(columns, (*unedited, *self.cell_prompts), packed=True)

    def without_unedited(self) -> "Job":
        """Returns the same job for a forward after that of the unedited prompts."""
        return replace(self, cell_prompts=self.cell_prompts[self.n_unedited :])

    @property
    def rows(self) -> list[int]:
        """The row of each cell prompt."""
        return [cell_prompt.row for cell_prompt in self.cell_prompts]

    @property
    def joins(self) -> bool:
        """True if the cell prompts join at blocks."""
        return self.cell_prompts[0].block > INPUT

    def counts_by_block(self, sizes: Sequence[int], n_layers: int) -> list[int]:
        """Returns the sum of the sizes of the cell prompts that are in each block."""
        blocks = [cell_prompt.block for cell_prompt in self.cell_prompts]
        sums = [0, *accumulate(sizes)]
        return [sums[bisect_right(blocks, block)] for block in range(n_layers)]

    def split(self, size: int) -> list["Job"]:
        """Returns jobs of at most `size` of the cell prompts each."""
        starts = range(0, len(self.cell_prompts), size)
        return [
            replace(self, cell_prompts=self.cell_prompts[start : start + size]) for start in starts
        ]


@dataclass(frozen=True, eq=False)
class BaseForward:
    """The results of the unedited prompts, from which later forwards start.

    cache   transformers' cache of every position; None if it was not stored
    states  the inputs of the blocks at which a row may join: the last `width` positions
    logits  the logits that the metrics read
    """

    rows: tuple[int, ...]
    columns: int
    cache: Any
    states: Mapping[int, Tensor]
    logits: Float[Tensor, "row pos vocab"]

    def indices_of(self, rows: Sequence[int]) -> list[int]:
        """Returns the index of each of these rows among those that were run."""
        indices = {row: index for index, row in enumerate(self.rows)}
        return list(map(indices.__getitem__, rows))


@dataclass(frozen=True, eq=False)
class Shortcuts:
    """The shortcuts that a model allows, and the facts that they need.

    batch    cells can share a forward, each with its own rows
    grow     rows can join at the block at which they begin to differ
    prefix   positions before the first that differs can come from a cache
    pack     cells that differ from different positions on can share a row of the batch
    last     after the last attention only the metric's positions have to be computed
    tokens   of the logits only those of the tokens that the metrics read have to be computed
    why      for each shortcut that is not allowed, the reason
    factors  which inputs of the blocks have rows (see `GrowingRows`)
    kinds    what each block returns: 0 for a tensor, or the length of a tuple
    token_axes   which inputs of the blocks have positions (see `PackedTokens`)
    reads_ahead  True if the logits at a position depend on a later token
    """

    batch: bool
    grow: bool
    prefix: bool
    last: bool
    tokens: bool
    why: Mapping[str, str]
    factors: Factors
    kinds: Sequence[int]
    pack: bool = False
    token_axes: TokenAxes = field(default_factory=dict)
    reads_ahead: bool = False


def run_base(
    inputs: SweepInputs,
    rows: Sequence[int],
    hook_points: Sequence[HookPoint],
    blocks: Sequence[int] = (),
    width: int = 1,
    *,
    cache: bool = False,
) -> BaseForward:
    """Runs some prompts from the first token to the last, with the same hooks on all of them.

    The inputs of `blocks` at the last `width` positions are recorded, and with `cache` all keys
    and values.
    """
    from transformers import DynamicCache

    columns = inputs.count_columns(rows)
    n_logits = inputs.count_logits(rows, columns)
    cell_rows = _cell_rows(inputs.padded_batch(columns), 0, columns, n_logits, rows)
    recorder = Recorder(blocks, width)
    shared_forward = SharedForward(
        inputs.lm, [(cell_rows, hook_points)], recorder=recorder, rows=len(rows), width=columns
    )
    stored = DynamicCache() if cache else None
    logits = _run_model(shared_forward, inputs, rows, columns, stored, rows)
    return BaseForward(tuple(rows), columns, stored, recorder.states, logits)


def run_with_unedited(
    inputs: SweepInputs,
    rows: Sequence[int],
    job: Job,
    hook_points: HookPointsOfCells,
    shortcuts: Shortcuts,
    tokens: Sequence[int] | None = None,
) -> tuple[BaseForward, Float[Tensor, "row pos vocab"]]:
    """Runs the unedited prompts and the cell prompts of a packed job in one forward.

    `hook_points` has those of the unedited prompts as those of the cell `UNEDITED`. Returns the
    results of the unedited prompts, without a cache, and the logits of the cell prompts.
    """
    columns = inputs.count_columns(rows)
    base = BaseForward(tuple(rows), columns, None, {}, torch.empty(0, 0, 0))
    base_hook_points = hook_points[UNEDITED]
    logits = run_cell_prompts(base, inputs, job, hook_points, shortcuts, base_hook_points, tokens)
    return replace(base, logits=logits[: len(rows)]), logits[len(rows) :]


def run_cell_prompts(
    base: BaseForward,
    inputs: SweepInputs,
    job: Job,
    hook_points: HookPointsOfCells,
    shortcuts: Shortcuts,
    base_hook_points: Sequence[HookPoint] = (),
    tokens: Sequence[int] | None = None,
) -> Float[Tensor, "row pos vocab"]:
    """Runs the cell prompts of a job. Returns their logits, perhaps those of `tokens` only.

    `hook_points` are those of each cell. `base_hook_points` are those among them that act in every
    cell: what they change before the blocks may also reach the blocks beside the residual stream
    (the per-layer inputs of Gemma, for example).
    """
    lm, past = inputs.lm, base.columns - job.width
    n_logits = inputs.count_logits(job.rows, job.width)
    arrange = _arrange_tokens if job.packed else _arrange_rows
    batch = arrange(base, inputs, job, hook_points, n_logits, shortcuts)
    rows = base.rows if job.joins else job.rows
    shared_forward = SharedForward(lm, batch.lanes, batch.growth, rows=len(rows), width=job.width)
    if job.joins:
        outside = [p for p in base_hook_points if block_of_module(lm, p.location.path) == INPUT]
        lane = _cell_rows(inputs.padded_batch(base.columns), past, job.width, n_logits, rows)
        shared_forward.act_before_the_blocks(lane, outside)
    takes_cache = past > 0 or (job.packed and not job.n_unedited)
    cache = batch.cache(shared_forward) if takes_cache else None
    acting = list(chain.from_iterable(points for _, points in batch.lanes))
    with ExitStack() as contexts:
        if shortcuts.last and n_logits < job.width and can_narrow(lm, acting):
            contexts.enter_context(narrow_last_block(lm, batch.read))
        if shortcuts.tokens and tokens is not None and can_compute_tokens(lm, acting):
            contexts.enter_context(compute_tokens(lm, tokens))
        return _run_model(shared_forward, inputs, rows, base.columns, cache, job.rows)


class CellBatch(NamedTuple):
    """How the rows of a job stand in a batch.

    lanes   the rows of each cell, with its hook points
    growth  how the batch grows; None if all rows run from the input on
    cache   returns the cache for a forward
    read    the positions that the head reads, in the last block
    """

    lanes: Lanes
    growth: GrowingBatch | None
    cache: Callable[[SharedForward], Any]
    read: slice | Tensor


def _arrange_rows(
    base: BaseForward,
    inputs: SweepInputs,
    job: Job,
    hook_points: HookPointsOfCells,
    n_logits: int,
    shortcuts: Shortcuts,
) -> CellBatch:
    """Returns a batch in which each cell prompt has a row with the last columns."""
    lm, past = inputs.lm, base.columns - job.width
    prompts = base.indices_of(job.rows)
    text = inputs.padded_batch(base.columns)  # one for all cells: it caches the hooks' positions
    cell_rows = partial(_cell_rows, text, past, job.width, n_logits)
    growth = None
    if job.joins:
        counts = job.counts_by_block([1] * len(prompts), lm.n_layers)

        def joining_states(block: int, hidden: Tensor) -> Tensor:
            states = base.states[block]
            joining = prompts[len(hidden) : counts[block]]
            return states[torch.tensor(joining, device=states.device), -job.width :]

        growth = GrowingRows(
            job.cell_prompts[0].block,
            counts,
            joining_states,
            shortcuts.kinds,
            prompts,
            len(base.rows),
            shortcuts.factors,
        )
    indices = torch.tensor(prompts)

    def cache(forward: SharedForward) -> Any:
        return cache_of_rows(base.cache, past, lambda: indices[: forward.count])

    lanes = _lanes_of_cells(job.cell_prompts, hook_points, cell_rows)
    return CellBatch(lanes, growth, cache, slice(-n_logits, None))


def _arrange_tokens(
    base: BaseForward,
    inputs: SweepInputs,
    job: Job,
    hook_points: HookPointsOfCells,
    n_logits: int,
    shortcuts: Shortcuts,
) -> CellBatch:
    """Returns a batch with one row, in which the tokens of each cell prompt from its position on
    follow those of the one before."""
    lm, past = inputs.lm, base.columns - job.width
    widths = token_widths(inputs, job)
    prompts = base.indices_of(job.rows)
    places = TokenPlaces.of_rows(prompts, widths, base.columns, job.n_unedited)
    counts = job.counts_by_block(widths, lm.n_layers)
    last = torch.tensor(widths).cumsum(0) - 1

    def joining_states(block: int, hidden: Tensor) -> Tensor:
        joining = slice(hidden.shape[1], counts[block])
        joining_prompts, columns = places.prompts[joining], places.columns[joining]
        if job.n_unedited:
            return hidden[:, last[joining_prompts] - (base.columns - 1 - columns)]
        states = base.states[block]
        return states[joining_prompts, columns - (base.columns - states.shape[1])][None]

    growth = PackedTokens(
        job.cell_prompts[0].block,
        counts,
        joining_states,
        shortcuts.kinds,
        places,
        past,
        job.width,
        shortcuts.token_axes,
        last,
    )
    text = inputs.padded_batch(base.columns)
    lanes = _lanes_of_tokens(lm, job.cell_prompts, widths, hook_points, text, n_logits)
    after_blocks: dict[int, Sequence[HookPoint]] = {}
    for cell in {cell_prompt.cell for cell_prompt in job.cell_prompts}:
        after_blocks[cell] = list(filter(partial(is_after_blocks, lm), hook_points[cell]))
    of_rows = partial(_cell_rows, text, past, job.width, n_logits)
    lanes += _lanes_of_cells(job.cell_prompts, after_blocks, of_rows)
    read = last[:, None] - torch.arange(n_logits - 1, -1, -1)
    return CellBatch(
        lanes,
        growth,
        lambda forward: prefix_cache(base.cache, past, places.after_prefix),
        read.flatten(),
    )


def token_widths(inputs: SweepInputs, job: Job) -> list[int]:
    """Returns over how many of the last positions each cell prompt of a job runs."""
    if not job.packed:
        return [job.width] * len(job.cell_prompts)
    least = inputs.count_read(job.rows)
    widths: list[int] = []
    for cell_prompt in job.cell_prompts:
        widths.append(max(least, inputs.width_of(cell_prompt.row, cell_prompt.pos)))
    return widths


def _lanes_of_tokens(
    lm: LM,
    cell_prompts: Sequence[CellPrompt],
    widths: Sequence[int],
    hook_points: HookPointsOfCells,
    text: SequenceBatch,
    n_logits: int,
) -> Lanes:
    """Returns the tokens of each cell and its hook points in the blocks; rows of one width that
    join together are together."""
    lanes: Lanes = []
    start, columns = 0, max(map(max, filter(None, text.columns))) + 1
    numbered = zip(cell_prompts, widths, strict=True)
    for (_, cell, width), group in groupby(numbered, key=lambda pair: (*pair[0][:2], pair[1])):
        rows = tuple(cell_prompt.row for cell_prompt, _ in group)
        lane = _cell_rows(text, columns - width, width, n_logits, rows, start)
        lane.stop = start + len(rows) * width
        in_blocks = filterfalse(partial(is_after_blocks, lm), hook_points[cell])
        lanes.append((lane, list(in_blocks)))
        start = lane.stop
    return lanes


def _lanes_of_cells(
    cell_prompts: Sequence[CellPrompt],
    hook_points: HookPointsOfCells,
    cell_rows: Callable[[Sequence[int], int], CellRows],
) -> Lanes:
    """Returns the rows of each cell and its hook points; rows that join together are together."""
    lanes: Lanes = []
    start = 0
    for (_, cell), group in groupby(cell_prompts, key=itemgetter(0, 1)):
        rows = [cell_prompt.row for cell_prompt in group]
        lanes.append((cell_rows(rows, start), hook_points[cell]))
        start += len(rows)
    return lanes


def _cell_rows(
    batch: SequenceBatch, past: int, width: int, n_logits: int, rows: Sequence[int], start: int = 0
) -> CellRows:
    """Returns some rows of a forward that computes the logits of the last `n_logits` positions."""
    numbers = tuple(rows)
    head = range(width - n_logits, width)
    row_batch = replace(batch, numbers=numbers)
    forward_pass = ForwardPass(row_batch, 0, past, len(rows), width, head, past)
    return CellRows(numbers, start, start + len(rows), forward_pass)


def _run_model(
    shared_forward: SharedForward,
    inputs: SweepInputs,
    rows: Sequence[int],
    columns: int,
    cache: Any,
    prompt_rows: Sequence[int],
) -> Float[Tensor, "row pos vocab"]:
    """Returns the logits of `prompt_rows`, from a forward whose inputs are those of `rows`."""
    width = shared_forward.width
    n_read = inputs.count_read(prompt_rows)
    n_computed = inputs.count_logits(prompt_rows, width)
    settings = inputs.lm.accepted(
        use_cache=cache is not None, return_dict=True, logits_to_keep=n_computed
    )
    if cache is not None:
        settings["past_key_values"] = cache
    with torch.no_grad():
        output = shared_forward.run({**inputs.model_inputs(rows, columns, width), **settings})
    logits = logits_of(output)[:, -n_read:]
    if n_read < n_computed:
        return logits.clone()  # so that the other positions are freed
    return logits
