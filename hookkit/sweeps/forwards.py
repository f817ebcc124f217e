"""The forwards of a sweep: the unedited prompts, and many cells in one batch."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..models.lm import LM, logits_of
from ..runs.hook_points import HookPoint
from ..runs.partial import Recorder, SharedForward
from .cell_batches import (
    BaseForward,
    HookPointsOfCells,
    Job,
    Shortcuts,
    arrange_rows,
    arrange_tokens,
    cell_rows_of,
)
from .hook_needs import (
    INPUT,
    block_of_module,
    can_compute_tokens,
    can_narrow,
    compute_tokens,
    narrow_last_block,
)
from .inputs import UNEDITED, SweepInputs


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
    cell_rows = cell_rows_of(inputs.padded_batch(columns), 0, columns, n_logits, rows)
    recorder = Recorder(blocks, width)
    shared_forward = SharedForward(
        inputs.lm, [(cell_rows, hook_points)], recorder=recorder, rows=len(rows), width=columns
    )
    stored = DynamicCache() if cache else None
    arguments = inputs.model_inputs(rows, columns, columns)
    logits = _run_model(shared_forward, inputs, arguments, stored, rows)
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
    arrange = arrange_tokens if job.packed else arrange_rows
    batch = arrange(base, inputs, job, hook_points, n_logits, shortcuts)
    rows = base.rows if job.joins else job.rows
    shared_forward = SharedForward(lm, batch.lanes, batch.growth, rows=len(rows), width=job.width)
    if job.joins:
        lane = cell_rows_of(inputs.padded_batch(base.columns), past, job.width, n_logits, rows)
        shared_forward.act_before_the_blocks(lane, _outside_blocks(lm, base_hook_points))
    takes_cache = past > 0 or (job.packed and not job.n_unedited)
    cache = batch.cache(shared_forward) if takes_cache else None
    arguments = inputs.model_inputs(rows, base.columns, job.width)  # may run a trial
    acting = list(chain.from_iterable(points for _, points in batch.lanes))
    narrows = shortcuts.last and n_logits < job.width and can_narrow(lm, acting)
    with ExitStack() as contexts:
        if narrows:
            contexts.enter_context(narrow_last_block(lm, batch.read))
        if shortcuts.tokens and tokens is not None and can_compute_tokens(lm, acting):
            contexts.enter_context(compute_tokens(lm, tokens))
        return _run_model(shared_forward, inputs, arguments, cache, job.rows)


def _outside_blocks(lm: LM, hook_points: Sequence[HookPoint]) -> list[HookPoint]:
    """Returns the hook points that are in no block."""
    return [
        hook_point
        for hook_point in hook_points
        if block_of_module(lm, hook_point.location.path) == INPUT
    ]


def _run_model(
    shared_forward: SharedForward,
    inputs: SweepInputs,
    arguments: Mapping[str, Tensor],
    cache: Any,
    prompt_rows: Sequence[int],
) -> Float[Tensor, "row pos vocab"]:
    """Returns the logits of `prompt_rows`, from a forward with these arguments."""
    n_read = inputs.count_read(prompt_rows)
    n_computed = inputs.count_logits(prompt_rows, shared_forward.width)
    settings = inputs.lm.accepted(
        use_cache=cache is not None, return_dict=True, logits_to_keep=n_computed
    )
    if cache is not None:
        settings["past_key_values"] = cache
    with torch.no_grad():
        output = shared_forward.run({**arguments, **settings})
    logits = logits_of(output)[:, -n_read:]
    if n_read < n_computed:
        return logits.clone()  # so that the other positions are freed
    return logits
