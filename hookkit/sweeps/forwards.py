"""The forwards of a sweep: the unedited prompts once, then many cells in one batch.

Three things save work. The positions before the first edit have the keys and values of the
unedited prompts, which are computed once and shared by all rows. A row joins the batch at the block
at which it begins to differ. After the last attention no position reads another, so that only the
positions that the metric reads are computed there.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, cat

from ..errors import Unsupported
from ..models.batch_positions import ForwardPass, SequenceBatch
from ..models.lm import LM, logits_of
from ..models.overrides import Overrides
from ..models.sites import Site
from ..runs.partial import CellRows, Factors, JoinSchedule, Recorder, SharedForward
from ..runs.taps import HookPoint
from .inputs import SweepInputs
from .reach import AFTER_ATTENTION, INPUT, block_of_module, bound_hooks_of, needs_all_positions


def prefix_cache(whole: Any, columns: int, rows: Callable[[], Tensor]) -> Any:
    """Returns a cache of transformers that holds the first `columns` columns of another one.

    The cache stores nothing new. Each update of a layer returns the prefix of the rows that are in
    the batch at that moment, `rows()`, followed by the new keys and values. So the batch can grow
    from layer to layer, and no prefix is stored twice.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    class PrefixLayer(DynamicLayer):
        """The prefix in one layer."""

        def __init__(self, keys: Tensor, values: Tensor) -> None:
            super().__init__()
            self.keys, self.values = keys[..., :columns, :], values[..., :columns, :]
            self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

        def update(
            self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
        ) -> tuple[Tensor, Tensor]:
            assert self.keys is not None and self.values is not None
            indices = rows()
            keys = _append(self.keys, indices, key_states)
            return keys, _append(self.values, indices, value_states)

    cache: Any = DynamicCache()
    cache.layers = []
    for layer in whole.layers:
        if layer.is_initialized:
            cache.layers.append(PrefixLayer(layer.keys, layer.values))
        else:
            cache.layers.append(DynamicLayer())  # of a layer without keys and values
    return cache


def _append(prefix: Tensor, rows: Tensor, new: Tensor) -> Tensor:
    """Returns the new keys or values after the prefix of these rows."""
    if len(prefix) == 1:  # one row needs no second copy
        selected = prefix.expand(len(rows), *prefix.shape[1:])
    else:
        selected = prefix.index_select(0, rows.to(prefix.device))
    return cat([selected, new], dim=-2)


# Inputs of modules of the last block that work on each position by itself.
NARROWED_INPUTS = ("z", "mlp_in")

# Sites inside those modules.
INSIDE_NARROWED = frozenset({"mlp_pre", "mlp_post", "router_logits", "experts", "expert_weights"})


def can_narrow(lm: LM, hook_points: Sequence[HookPoint]) -> bool:
    """True if no hook needs the other positions of the last block after its attention."""
    for bound in bound_hooks_of(hook_points):
        site = bound.site
        if not isinstance(site, Site):
            return False
        if site.layer is not None and site.layer < lm.n_layers - 1:
            continue
        if site.name in INSIDE_NARROWED:
            return False
        if site.name in AFTER_ATTENTION and needs_all_positions(bound):
            return False
    return True


@contextmanager
def narrow_last_block(lm: LM, width: int) -> Iterator[None]:
    """Inside this context those modules compute the last `width` positions and return zeros for
    the other ones."""
    with Overrides() as lent:
        for name in NARROWED_INPUTS:
            location = lm.layout.find(name, lm.n_layers - 1)
            if location is not None and location.side == "input":
                module = lm.submodule(location.path)
                lent.wrap_method(module, "forward", partial(_compute_last_positions, width))
        yield


def _compute_last_positions(
    width: int, inner: Any, /, hidden: Tensor, *args: Any, **kwargs: Any
) -> Any:
    shape = hidden.shape[:2]
    if hidden.ndim != 3:
        raise Unsupported(
            "a module of the last block has an input that is not [batch, pos, d]: "
            f"{list(hidden.shape)}"
        )

    def crop(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.shape[:2] != shape:
            return value
        return value[:, -width:].contiguous()  # modules may make a view of their input

    cropped_kwargs = {name: crop(value) for name, value in kwargs.items()}
    output = inner(crop(hidden), *map(crop, args), **cropped_kwargs)
    first = output[0] if isinstance(output, tuple) else output
    if not isinstance(first, Tensor) or first.shape[:2] != (shape[0], width):
        raise Unsupported("a module of the last block has an output that is not [batch, pos, d]")
    full = first.new_zeros(*shape, first.shape[-1])
    full[:, -width:] = first
    if isinstance(output, tuple):
        return (full, *output[1:])
    return full


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


@dataclass(frozen=True, eq=False)
class Shortcuts:
    """The shortcuts that a model allows, and the facts that they need.

    batch    cells can share a forward, each with its own rows
    grow     rows can join at the block at which they begin to differ
    prefix   positions before the first that differs can come from a cache
    last     after the last attention only the metric's positions have to be computed
    why      for each shortcut that is not allowed, the reason
    factors  which inputs of the blocks have rows (see `JoinSchedule`)
    kinds    what each block returns: 0 for a tensor, or the length of a tuple
    """

    batch: bool
    grow: bool
    prefix: bool
    last: bool
    why: Mapping[str, str]
    factors: Factors
    kinds: Sequence[int]


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
    cell_rows = _cell_rows(inputs.padded_batch(columns), tuple(rows), 0, 0, columns, n_logits)
    recorder = Recorder(blocks, width)
    shared_forward = SharedForward(
        inputs.lm, [(cell_rows, hook_points)], recorder=recorder, rows=len(rows), width=columns
    )
    stored = DynamicCache() if cache else None
    logits = _run_model(shared_forward, inputs, rows, columns, columns, stored, rows)
    return BaseForward(tuple(rows), columns, stored, recorder.states, logits)


def run_cell_prompts(
    base: BaseForward,
    inputs: SweepInputs,
    cell_prompts: Sequence[CellPrompt],
    hook_points: Sequence[Sequence[HookPoint]],
    width: int,
    shortcuts: Shortcuts,
    base_hook_points: Sequence[HookPoint] = (),
) -> Float[Tensor, "row pos vocab"]:
    """Runs sorted cell prompts over the last `width` columns.

    `hook_points` are those of each cell. `base_hook_points` are those among them that act in every
    cell: what they change before the blocks may also reach the blocks beside the residual stream
    (the per-layer inputs of Gemma, for example).
    """
    lm, past = inputs.lm, base.columns - width
    batch = inputs.padded_batch(base.columns)  # one for all cells: it caches the hooks' positions
    prompt_rows = [cell_prompt.row for cell_prompt in cell_prompts]
    index_of = {row: index for index, row in enumerate(base.rows)}
    row_indices = [index_of[row] for row in prompt_rows]
    n_logits = inputs.count_logits(prompt_rows, width)
    lanes = _lanes_of_cells(batch, cell_prompts, hook_points, past, width, n_logits)
    rows, schedule = prompt_rows, None
    if cell_prompts[0].block > INPUT:
        rows = base.rows
        schedule = _join_schedule(base, lm, cell_prompts, row_indices, width, shortcuts)
    shared_forward = SharedForward(lm, lanes, schedule, rows=len(rows), width=width)
    if schedule is not None and base_hook_points:
        lane = _cell_rows(batch, base.rows, 0, past, width, n_logits)
        outside = _outside_the_blocks(lm, base_hook_points)
        shared_forward.act_before_the_blocks(lane, outside)
    cache = None
    if past:
        indices = torch.tensor(row_indices)
        cache = prefix_cache(base.cache, past, lambda: indices[: shared_forward.count])
    narrows = shortcuts.last and n_logits < width
    narrows = narrows and all(can_narrow(lm, points) for _, points in lanes)
    with narrow_last_block(lm, n_logits) if narrows else nullcontext():
        return _run_model(shared_forward, inputs, rows, base.columns, width, cache, prompt_rows)


def _run_model(
    shared_forward: SharedForward,
    inputs: SweepInputs,
    rows: Sequence[int],
    columns: int,
    width: int,
    cache: Any,
    prompt_rows: Sequence[int],
) -> Float[Tensor, "row pos vocab"]:
    """Returns the logits of `prompt_rows`, from a forward whose inputs are those of `rows`."""
    n_read = max(inputs.read_counts[row] for row in prompt_rows)
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


def _outside_the_blocks(lm: LM, hook_points: Sequence[HookPoint]) -> list[HookPoint]:
    return [point for point in hook_points if block_of_module(lm, point.location.path) == INPUT]


def _lanes_of_cells(
    batch: SequenceBatch,
    cell_prompts: Sequence[CellPrompt],
    hook_points: Sequence[Sequence[HookPoint]],
    past: int,
    width: int,
    n_logits: int,
) -> list[tuple[CellRows, Sequence[HookPoint]]]:
    """Returns the rows of each cell and its hook points; rows that join together are together."""
    lanes: list[tuple[CellRows, Sequence[HookPoint]]] = []
    start = 0
    for (_, cell), group in groupby(cell_prompts, key=itemgetter(0, 1)):
        rows = tuple(cell_prompt.row for cell_prompt in group)
        lane = _cell_rows(batch, rows, start, past, width, n_logits)
        lanes.append((lane, hook_points[cell]))
        start += len(rows)
    return lanes


def _cell_rows(
    batch: SequenceBatch, rows: tuple[int, ...], start: int, past: int, width: int, n_logits: int
) -> CellRows:
    """Returns some rows of a forward that computes the logits of the last `n_logits` positions."""
    head = range(width - n_logits, width)
    forward_pass = ForwardPass(replace(batch, numbers=rows), 0, past, len(rows), width, head, past)
    return CellRows(rows, start, start + len(rows), forward_pass)


def _join_schedule(
    base: BaseForward,
    lm: LM,
    cell_prompts: Sequence[CellPrompt],
    row_indices: list[int],
    width: int,
    shortcuts: Shortcuts,
) -> JoinSchedule:
    blocks = [cell_prompt.block for cell_prompt in cell_prompts]
    counts = [bisect_right(blocks, block) for block in range(lm.n_layers)]

    def joining_states(block: int) -> Tensor:
        states = base.states[block]
        joining = row_indices[bisect_left(blocks, block) : bisect_right(blocks, block)]
        return states[torch.tensor(joining, device=states.device), -width:]

    return JoinSchedule(
        blocks[0],
        counts,
        joining_states,
        row_indices,
        len(base.rows),
        shortcuts.kinds,
        shortcuts.factors,
    )
