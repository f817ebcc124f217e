"""hk.sweep and hk.sweep_plan: a grid of edits, the hooks of each cell, a metric, and a long table.

    table = hk.sweep(lm, prompts, {"layer": range(30), "pos": range(14)},
                     lambda layer, pos: hk.patch(hk.Site("resid_post", layer), clean, pos=pos),
                     hk.metrics.logit_diff(" Mary", " John"))

Every cell has the numbers of one forward with its hooks. The plan decides how they are computed.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypedDict

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from ..arguments import check_arguments, check_integer
from ..errors import BadHook, Interrupted, Unsupported
from ..hooks.base import Hook
from ..models.lm import LM
from ..models.model_setup import user_stacklevel, warn_of_dropout
from ..models.prompts import Prompts
from ..models.sites import ModuleSite
from ..runs.engines.ray import EngineLike, Ray, read_engine
from ..runs.manager import find_user_hooks
from ..runs.run import Run
from ..runs.taps import BoundHook, HookPoint
from ..tables.metrics.metric import MetricLike, as_metrics, column_names
from .cell_metrics import UNEDITED, metric_columns, target_values, verify_cells
from .cells import (
    RESERVED,
    Cell,
    Control,
    Grid,
    HooksAt,
    References,
    as_hooks,
    bind_hooks,
    create_cells,
    create_controls,
)
from .execute import PlanRun
from .forwards import Shortcuts
from .inputs import SweepInputs, read_inputs
from .journal import Journal, open_journal
from .plan import Plan, memory_budget
from .reach import (
    INPUT,
    block_of_module,
    bound_hooks_of,
    needs_all_positions,
    weights_later_keys,
)
from .shortcuts import has_rows, no_shortcuts, reads_ahead, shortcuts


class Settings(TypedDict, total=False):
    """The keywords that the standard grids pass to `sweep`."""

    base_hooks: Hook | Sequence[Hook]
    control: Control | None
    draws: int | None
    control_seed: int | None
    save: str | os.PathLike[str] | None
    progress: bool | None
    memory: int | None
    verify: int
    engine: EngineLike


@check_arguments
def sweep_plan(
    lm: LM,
    prompts: Prompts,
    grid: Grid,
    hooks: HooksAt,
    metrics: MetricLike | Sequence[MetricLike],
    *,
    pos: int = -1,
    base_hooks: Hook | Sequence[Hook] = (),
    control: Control | None = None,
    draws: int | None = None,
    control_seed: int | None = None,
    memory: int | None = None,
) -> Plan:
    """Returns what a sweep with the same arguments will do, and its cost.

    Nothing is run except a trial of a few tokens, and the texts of which a hook takes the mean or
    a draw.

    >>> hooks = lambda layer: ablate(Site("attn_out", layer))
    >>> sweep_plan(lm, prompt, {"layer": range(30)}, hooks, prob(" coffee")).forwards
    2
    """
    if lm.two_texts or lm.config is None:
        raise Unsupported(
            f"a sweep needs a causal language model, and this is a {type(lm.root).__name__}"
        )
    metric_values = as_metrics(metrics)
    inputs = read_inputs(lm, prompts, metric_values, pos)
    for metric in metric_values:
        metric.bind(lm, len(inputs))  # raises before anything runs
    cells = create_cells(lm, grid, hooks, inputs)
    if control is not None:
        cells += create_controls(lm, cells, control, inputs, draws=draws, seed=control_seed)
    elif draws is not None or control_seed is not None:
        raise BadHook(
            f"draws={draws!r} and control_seed={control_seed!r} are of a control: say "
            "control='random'"
        )
    base_hook_points = tuple(bind_hooks(lm, as_hooks(base_hooks), inputs, References(lm)))
    inputs = _extend_inputs(lm, inputs, cells, base_hook_points)
    _check_names(
        cells[0], column_names(metric_values), ["draw"] if isinstance(control, str) else []
    )
    allowed = _allowed_shortcuts(lm)
    for cell in cells:
        cell.alone = _reason_alone(lm, cell) if allowed.batch else allowed.why["batch"]
    budget = memory_budget(lm, memory)
    return Plan(lm, tuple(cells), inputs, metric_values, base_hook_points, allowed, budget)


def _extend_inputs(
    lm: LM, inputs: SweepInputs, cells: Sequence[Cell], base_hook_points: Sequence[HookPoint]
) -> SweepInputs:
    """Returns the inputs with all positions and logits that the hooks have to receive."""
    bound_hooks = bound_hooks_of(base_hook_points)
    for cell in cells:
        bound_hooks += cell.bound_hooks
    if any(_needs_cropped_positions(bound, inputs) for bound in bound_hooks):
        inputs = inputs.uncropped()
    if any(_needs_all_logits(lm, bound) for bound in bound_hooks):
        inputs = replace(inputs, all_logits=True)
    return inputs


def _needs_cropped_positions(bound: BoundHook, inputs: SweepInputs) -> bool:
    """True if a hook receives a position after the metric's, or lets a query attend to it."""
    if not inputs.cropped or not needs_all_positions(bound):
        return False
    selected_positions = inputs.full.selected_positions(bound.where)
    for positions, length, row in zip(selected_positions, inputs.lengths, inputs.rows, strict=True):
        if positions is None or length == len(row):
            continue
        if weights_later_keys(bound):
            return True
        if any(position in positions for position in range(length, len(row))):
            return True
    return False


def _needs_all_logits(lm: LM, bound: BoundHook) -> bool:
    """True if a hook may use the logits of other positions than the metric's."""
    if isinstance(bound.site, ModuleSite):
        return block_of_module(lm, bound.site.path) == INPUT
    return bound.head and needs_all_positions(bound)


def _check_names(cell: Cell, metric_names: Sequence[str], control_columns: Sequence[str]) -> None:
    for name in control_columns:
        if name in cell.point:
            raise BadHook(
                f"the grid has a dimension {name!r}, which is a column of the control: give it "
                "another name"
            )
    for metric in metric_names:
        suffixes = ("before", "delta", "target", "effect")
        metric_columns = [metric, *(f"{metric}_{suffix}" for suffix in suffixes)]
        for name in (*cell.point, *RESERVED, *control_columns):
            if name in metric_columns:
                raise BadHook(
                    f"the table has a column {name!r} of the grid's or its own, and the metric "
                    f"{metric} makes one of that name: give the dimension, or the metric's "
                    "function, another name"
                )


def _allowed_shortcuts(lm: LM) -> Shortcuts:
    """Returns what the model allows: nothing if it has hooks of the user's, which see batches."""
    if reads_ahead(lm):
        raise Unsupported(
            "this model reads ahead: what it says at a position depends on later tokens; use "
            "hk.forward"
        )
    modules = find_user_hooks(lm.model)
    if not modules:
        return shortcuts(lm)
    return no_shortcuts(
        f"the model carries hooks that are not hookkit's (on {modules[0] or 'the model'}), which "
        "see whole batches"
    )


def _reason_alone(lm: LM, cell: Cell) -> str:
    """Returns why a cell cannot share a forward; an empty string if it can."""
    for bound in cell.bound_hooks:
        site = bound.site
        if isinstance(site, ModuleSite) and not has_rows(lm, site):
            return f"{site} has no axes batch and pos, so that rows cannot be told apart"
    return ""


@check_arguments
def sweep(
    lm: LM,
    prompts: Prompts,
    grid: Grid,
    hooks: HooksAt,
    metrics: MetricLike | Sequence[MetricLike],
    *,
    pos: int = -1,
    base_hooks: Hook | Sequence[Hook] = (),
    target: Run | Prompts | None = None,
    control: Control | None = None,
    draws: int | None = None,
    control_seed: int | None = None,
    save: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
    memory: int | None = None,
    verify: int = 0,
    engine: EngineLike = None,
) -> pd.DataFrame:
    """Returns the metrics of every cell of a grid, for every prompt: one row each.

    `grid` maps the name of each dimension to its values. `hooks` is called with a value of each
    dimension, by name, and returns a hook or several. `metrics` read position `pos` of each prompt.

    base_hooks    hooks that act in every cell, in the unedited prompts that cells are compared
                  with, and in the target's prompts
    target        prompts, or a run, by which the effect is measured: 0 if nothing changed, 1 if the
                  metric became what it is there
    control       adds every cell again with edits that should not matter. "random": changes of the
                  same size in random directions, one for each position of each prompt
                  (`dose_response` has random vectors that are the same everywhere). "resample":
                  patches from other prompts of the same length. Or a function of the grid's values
                  that returns the control's hooks
    draws         how many times such a control is drawn: 10 by default, or as many as there are
                  other prompts. Each draw is a cell that is run
    control_seed  seed of the random directions, 0 by default
    save          a folder in which values are stored as they come; a sweep that was killed
                  continues there
    progress      True or False; by default a bar is shown in a terminal
    memory        bytes that the sweep may use beside the model
    verify        so many random cells are run again by themselves, and `Unsupported` is raised if
                  one of them has other values
    engine        "ray", or `Ray(…)`: the forwards run on actors that each hold the model; the table
                  is the same

    Columns: the grid's dimensions; row (the prompt); control if one was asked for, and draw if it
    is drawn (`over_prompts` has the control's mean over its draws, with its interval). For each
    metric its value, `_before` (without the cell's hooks) and `_delta` (after minus before); with a
    target also `_target` (the metric there) and `_effect` (NaN for a prompt whose metric is the
    same there; `over_prompts` has the ratio of the means). Ctrl-C returns the rows that are done,
    with an `Interrupted` warning; `table.attrs["complete"]` says whether all are there.

    A user's function in an edit receives the rows of one cell at a time, perhaps not all of them,
    and cells run in an order that the plan chooses. So its result for a prompt must depend on
    nothing but that prompt.

    Values equal those of a forward up to rounding, because `memory` decides what runs together.
    With the same memory and machine, a sweep that was killed and continues returns the same table
    to the bit; if memory ran out in between, the last digits may differ. An edit that did nothing
    raises `NeverFired`. Positions after the metric's do not run where they cannot matter, so an
    edit that could not be made there, such as a `restrict` without a token left, raises nothing.

    >>> hooks = lambda layer: ablate(Site("attn_out", layer))
    >>> table = sweep(lm, prompt, {"layer": range(30)}, hooks, prob(" coffee"))
    >>> list(table.columns)
    ['layer', 'row', 'prob', 'prob_before', 'prob_delta']
    """
    check_integer(
        verify, "verify", least=0, meaning="how many cells are run once more by themselves,"
    )
    ray = read_engine(engine, lm)
    plan = sweep_plan(
        lm,
        prompts,
        grid,
        hooks,
        metrics,
        pos=pos,
        base_hooks=base_hooks,
        control=control,
        draws=draws,
        control_seed=control_seed,
        memory=memory,
    )
    warn_of_dropout(lm.root)
    settings = {
        "pos": pos,
        "base_hooks": [hook.to_json(tensors="digest") for hook in as_hooks(base_hooks)],
    }
    with open_journal(save, plan, settings) as journal:
        targets = None
        if target is not None:
            targets = target_values(plan, target, pos)
        foreign_sources, complete = _run_plan(plan, journal, progress, ray)
        if verify:
            verify_cells(plan, journal.values, verify)
        table = _table(plan, journal, targets, drawn=isinstance(control, str))
        table.attrs["complete"] = complete
        table.attrs["plan"] = repr(plan)
        table.attrs["sources_not_the_models_own"] = foreign_sources
        if complete:
            journal.write(table)
    return table


def _run_plan(
    plan: Plan, journal: Journal, progress: bool | None, engine: Ray | None
) -> tuple[list[str], bool]:
    """Runs what the journal lacks. Returns the patches whose source is not the model's own, and
    whether all cells are done."""
    total = len(plan.cells) * len(plan.inputs)
    disable = None if progress is None else not progress
    with tqdm(total=total, initial=journal.done, unit="cell", disable=disable) as bar:
        plan_run = PlanRun(plan, journal, bar.update, engine)
        try:
            plan_run.run()
        except KeyboardInterrupt:
            advice = "call it again to go on"
            if journal.folder is None:
                advice = "and with save= it could go on from there"
            warnings.warn(
                f"the sweep was interrupted: {journal.done} of {total} cells are done; {advice}",
                Interrupted,
                stacklevel=user_stacklevel(),
            )
            return plan_run.foreign_sources, False
    return plan_run.foreign_sources, True


def _table(
    plan: Plan,
    journal: Journal,
    targets: Sequence[Sequence[float]] | None,
    *,
    drawn: bool,
) -> pd.DataFrame:
    control_columns = ["control"] if any(cell.control for cell in plan.cells) else []
    if drawn:
        control_columns.append("draw")
    records: list[dict[str, Any]] = []
    numbers: list[list[list[float]]] = []  # of each record: the values, before, in the target
    for cell in plan.cells:
        controls = {name: getattr(cell, name) for name in control_columns}
        for row in range(len(plan.inputs)):
            if (cell.number, row) in journal.values:
                records.append({**cell.point, "row": row, **controls})
                before = journal.values[UNEDITED, row]
                target = before if targets is None else targets[row]
                numbers.append([journal.values[cell.number, row], before, [*target]])
    names = [*plan.cells[0].point, "row", *control_columns]
    table = pd.DataFrame(records, columns=names)
    by_metric = np.array(numbers, dtype=float).reshape(-1, 3, len(plan.metrics))
    for index, name in enumerate(column_names(plan.metrics)):
        values, before, target = by_metric[:, :, index].T
        with np.errstate(invalid="ignore"):  # infinity minus infinity
            delta = values - before
        target = None if targets is None else target
        table = table.assign(**metric_columns(name, values, before, delta, target))
    return table
