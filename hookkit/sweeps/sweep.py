"""hk.sweep and hk.sweep_plan: a grid of edits, the hooks of each cell, a metric, and a long table.

    table = hk.sweep(lm, prompts, {"layer": range(30), "pos": range(14)},
                     lambda layer, pos: hk.patch(hk.Site("resid_post", layer), clean, pos=pos),
                     hk.metrics.logit_diff(" Mary", " John"))

Every cell has the numbers of one forward with its hooks. The plan decides how they are computed.
"""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import chain, product, repeat
from typing import Any, TypeAlias, TypedDict

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from ..arguments import check_arguments, check_integer
from ..errors import BadHook, Interrupted, Unsupported
from ..hooks.base import Hook
from ..models.lm import LM
from ..models.model_setup import user_stacklevel, warn_of_dropout
from ..models.prompts import Prompts, as_batch
from ..models.sites import CROSS_SITES, QUERY_KEY_SITES, STACKS, ModuleSite, Site
from ..models.tokens import describe_prompts
from ..runs.engines.ray import EngineLike, Ray, read_engine
from ..runs.hook_points import BoundHook, HookPoint
from ..runs.manager import find_user_hooks
from ..runs.run import Run
from ..tables.metrics.metric import MetricLike, as_metrics, column_names, logits_at
from .cell_batches import Shortcuts
from .cells import (
    RESERVED,
    Cell,
    Control,
    Grid,
    HooksAt,
    References,
    as_hooks,
    bind_hooks,
    check_reached,
    create_cells,
    create_controls,
)
from .execute import PlanRun
from .forwards import run_base
from .hook_needs import (
    INPUT,
    block_of_module,
    bound_hooks_of,
    needs_all_positions,
    weights_later_keys,
)
from .inputs import UNEDITED, CellMetrics, SweepInputs, Values, read_inputs
from .journal import Journal, hooks_as_json, open_journal
from .plan import Plan, first_position, memory_budget
from .shortcuts import LIMITS, READS_AHEAD, has_rows, no_shortcuts, reads_ahead, shortcuts

METRIC_SUFFIXES = ("", "_before", "_delta", "_target", "_effect")  # of a metric's columns


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
    if (lm.two_texts and not lm.family.stacks) or lm.config is None:
        raise Unsupported(
            f"a sweep needs a language model with named sites, and this is {type(lm.root).__name__}"
        )
    metric_values = as_metrics(metrics)
    inputs = read_inputs(lm, prompts, metric_values, pos)
    for metric in metric_values:
        metric.bind(lm, len(inputs))  # raises before anything runs
    cells = create_cells(lm, grid, hooks, inputs)
    cells += create_controls(lm, cells, control, inputs, draws=draws, seed=control_seed)
    base_hook_points = tuple(bind_hooks(lm, as_hooks(base_hooks), inputs, References(lm)))
    if reads_ahead(lm, inputs.run_rows):
        inputs = _whole_prompts(lm, inputs)
    inputs = _extend_inputs(lm, inputs, cells, base_hook_points)
    _check_names(cells[0], column_names(metric_values), _draw_column(control))
    allowed = _allowed_shortcuts(lm, inputs)
    for cell in cells:
        cell.alone = allowed.why.get("batch") or _reason_alone(lm, cell, base_hook_points)
    budget = memory_budget(lm, memory)
    return Plan(lm, tuple(cells), inputs, metric_values, base_hook_points, allowed, budget)


def _whole_prompts(lm: LM, inputs: SweepInputs) -> SweepInputs:
    """Returns the inputs with whole prompts, for a model that reads ahead."""
    if inputs.has_continuation:
        raise Unsupported(
            f"{type(lm.root).__name__} reads ahead, and what it says at a token depends on the "
            "token itself: the loss of a continuation has no meaning for it"
        )
    return inputs.uncropped()


def _extend_inputs(
    lm: LM, inputs: SweepInputs, cells: Sequence[Cell], base_hook_points: Sequence[HookPoint]
) -> SweepInputs:
    """Returns the inputs with all positions and logits that the hooks have to receive."""
    hook_points = chain(base_hook_points, *[cell.hook_points for cell in cells])
    bound_hooks = list(bound_hooks_of(hook_points))
    for bound in bound_hooks:
        _refuse_source_positions(bound)
    # what is cropped may be a part of an image
    if inputs.has_more_than_tokens or any(
        _needs_cropped_positions(bound, inputs) for bound in bound_hooks
    ):
        inputs = inputs.uncropped()
    if any(_needs_all_logits(lm, bound) for bound in bound_hooks):
        inputs = replace(inputs, all_logits=True)
    return inputs


def _refuse_source_positions(bound: BoundHook) -> None:
    """Raises `Unsupported` for a site whose positions or keys are those of a source."""
    site, stack = bound.site, bound.stack
    if stack in ("vision", "audio"):
        raise Unsupported(
            f"{site} has {STACKS[stack]} as positions, and a sweep edits what the text model "
            "reads: run hk.forward with each hook"
        )
    is_cross = isinstance(site, Site) and site.name in CROSS_SITES & QUERY_KEY_SITES
    if bound.stack or is_cross:
        raise Unsupported(
            f"{site} has positions of the source, and a sweep edits what the decoder reads: run "
            "hk.forward with each hook; cross_z.L.H is a head's attention to the source"
        )


def _needs_cropped_positions(bound: BoundHook, inputs: SweepInputs) -> bool:
    """True if a hook receives a position after the metric's, or lets a query attend to it."""
    if not inputs.cropped or not needs_all_positions(bound):
        return False
    selected = inputs.full.selected_positions(bound.where)
    for positions, length, row in zip(selected, inputs.lengths, inputs.rows, strict=True):
        if positions and length < len(row) and weights_later_keys(bound):
            return True
        if first_position(positions, length, len(row)) is not None:
            return True
    return False


def _needs_all_logits(lm: LM, bound: BoundHook) -> bool:
    """True if a hook may use the logits of other positions than the metric's."""
    if isinstance(bound.site, ModuleSite):
        return block_of_module(lm, bound.site.path) == INPUT
    return bound.head and needs_all_positions(bound)


def _draw_column(control: Control | None) -> list[str]:
    """Returns the name of the column that numbers the draws of a control, if it is drawn."""
    return ["draw"] if isinstance(control, str) else []


def _check_names(cell: Cell, metric_names: Sequence[str], draw_column: Sequence[str]) -> None:
    """Raises if two columns of the table have one name."""
    for name in draw_column:
        if name in cell.point:
            raise BadHook(
                f"the grid has a dimension {name!r}, which is a column of the control: give it "
                "another name"
            )
    names = [*cell.point, *RESERVED, *draw_column]
    for metric, suffix in product(metric_names, METRIC_SUFFIXES):
        name = f"{metric}{suffix}"
        if name in names:
            raise BadHook(
                f"the table has a column {name!r} of the grid's or its own, and the metric "
                f"{metric} makes one of that name: give the dimension, or the metric's "
                "function, another name"
            )


def _allowed_shortcuts(lm: LM, inputs: SweepInputs) -> Shortcuts:
    """Returns what the model allows: nothing if it reads ahead, or if it has hooks of the user's,
    which see batches."""
    modules = find_user_hooks(lm.model)
    if not modules:
        return shortcuts(lm, inputs.run_rows)
    if reads_ahead(lm, inputs.run_rows):
        return no_shortcuts(READS_AHEAD)
    return no_shortcuts(
        f"the model carries hooks that are not hookkit's (on {modules[0] or 'the model'}), which "
        "see whole batches"
    )


def _reason_alone(lm: LM, cell: Cell, base_hook_points: Sequence[HookPoint]) -> str:
    """Returns why a cell cannot share a forward; an empty string if it can."""
    for bound in (*bound_hooks_of(base_hook_points), *cell.bound_hooks):
        if bound.receive is not None:
            # a cell that joins later, or after a cache, would not compute what it reads
            return f"a condition reads {bound.site}, so that the whole model runs"
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
    is drawn (`mean_over_prompts` has the control's mean over its draws, with its interval). For
    each metric its value, `_before` (without the cell's hooks) and `_delta` (after minus before);
    with a target also `_target` (the metric there) and `_effect` (NaN for a prompt whose metric is
    the same there; `mean_over_prompts` has the ratio of the means). Ctrl-C returns the rows that
    are done, with an `Interrupted` warning; `table.attrs["complete"]` says whether all are there.

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
    settings = {"pos": pos, "base_hooks": hooks_as_json(as_hooks(base_hooks))}
    with open_journal(save, plan, settings) as journal:
        targets = None if target is None else target_values(plan, target, pos)
        foreign_sources, complete = _run_plan(plan, journal, progress, ray)
        if verify:
            verify_cells(plan, journal.values, verify)
        table = _table(plan, journal.values, targets, _draw_column(control))
        table.attrs |= describe_prompts(lm, plan.inputs.rows, tokens=True)
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
    values: Values,
    targets: Sequence[Sequence[float]] | None,
    draw_column: Sequence[str],
) -> pd.DataFrame:
    """Returns a row for each cell and prompt whose values are known."""
    control_column = ["control"] if plan.cells[-1].control else []  # controls are the last cells
    names = [*plan.cells[0].point, "row", *control_column, *draw_column]
    every = product(range(len(plan.cells)), range(len(plan.inputs)))
    keys = [key for key in every if key in values]
    records: list[dict[str, Any]] = []
    for number, row in keys:
        cell = plan.cells[number]
        records.append({"control": cell.control, "draw": cell.draw, **cell.point, "row": row})
    table = pd.DataFrame(records, columns=names)
    after = _by_metric(plan, values, keys)
    before = _by_metric(plan, values, product([UNEDITED], table["row"]))
    target: Iterable[Any] = repeat(None, len(plan.metrics))
    if targets is not None:
        target = _by_metric(plan, targets, table["row"])
    with np.errstate(invalid="ignore"):  # infinity minus infinity
        delta = after - before
    for numbers in zip(column_names(plan.metrics), after, before, delta, target, strict=True):
        table = table.assign(**metric_columns(*numbers))
    return table


def _by_metric(plan: Plan, values: Any, keys: Iterable[Any]) -> Float[np.ndarray, "metric cell"]:
    """Returns the values of some cells, which `values` has by key, as a row for each metric."""
    numbers = [values[key] for key in keys]
    return np.array(numbers, dtype=float).reshape(-1, len(plan.metrics)).T


def metric_columns(
    name: str,
    values: Float[np.ndarray, " cell"],
    before: Float[np.ndarray, " cell"],
    delta: Float[np.ndarray, " cell"],
    target: Float[np.ndarray, " cell"] | None,
) -> dict[str, Float[np.ndarray, " cell"]]:
    """Returns the columns of a metric: its values, `_before` and `_delta`, with a target also
    `_target` and `_effect` (NaN where the target is the unedited value)."""
    columns = {name: values, f"{name}_before": before, f"{name}_delta": delta}
    if target is not None:
        with np.errstate(invalid="ignore"):  # infinity minus infinity
            distance = target - before
            effect = np.divide(delta, distance, out=distance * np.nan, where=distance != 0)
        columns |= {f"{name}_target": target, f"{name}_effect": effect}
    return columns


# ---- the target, and the check of single cells


def target_values(plan: Plan, target: Run | Prompts, pos: int) -> list[list[float]]:
    """Returns the metrics of each prompt's target: of a run, or of prompts, which are run with the
    base hooks."""
    if isinstance(target, Run):
        inputs, logits_of = _read_run(plan, target, pos)
    else:
        inputs, logits_of = _read_prompts(plan, target, pos)
    values: Values = {}
    for rows in plan.chunks():
        cell_metrics = replace(_unedited_metrics(plan, rows), inputs=inputs)
        values |= cell_metrics.values(list(product([UNEDITED], rows)), logits_of(rows))
    return list(values.values())  # in the order of the prompts


def _unedited_metrics(plan: Plan, rows: tuple[int, ...]) -> CellMetrics:
    """Returns the metrics of some prompts, which are run if a metric compares with them."""
    base = run_base(plan.inputs, rows, plan.base_hook_points) if plan.compares else None
    return plan.cell_metrics(base)


LogitsOf: TypeAlias = Callable[[Sequence[int]], Float[Tensor, "row pos vocab"]]
"""Returns the logits of some prompts' targets that the metrics read."""


def _read_run(plan: Plan, target: Run, pos: int) -> tuple[SweepInputs, LogitsOf]:
    if plan.inputs.has_continuation:
        raise Unsupported(
            "a run has not read the continuation whose loss is meant: give prompts as the target"
        )
    logits = logits_at(target, pos)
    _check_target_count(plan, len(logits))
    by_prompt = logits.expand(len(plan.inputs), -1)[:, None]
    inputs = replace(plan.inputs, read_counts=(1,) * len(plan.inputs))
    return inputs, lambda rows: by_prompt[list(rows)]


def _read_prompts(plan: Plan, target: Prompts, pos: int) -> tuple[SweepInputs, LogitsOf]:
    rows = list(as_batch(plan.lm, target).rows)
    _check_target_count(plan, len(rows))
    if len(rows) == 1:
        rows *= len(plan.inputs)
    inputs = read_inputs(plan.lm, rows, plan.metrics, pos)
    check_reached(plan.base_hook_points, inputs)
    return inputs, lambda rows: run_base(inputs, rows, plan.base_hook_points).logits


def _check_target_count(plan: Plan, n_rows: int) -> None:
    count = len(plan.inputs)
    if n_rows not in (1, count):
        raise BadHook(
            f"the target has {n_rows} rows, and there are {count} prompts: give as many, or one"
        )


def verify_cells(plan: Plan, values: Values, count: int) -> None:
    """Runs some random cells by themselves. Raises `Unsupported` if one has other values."""
    cells = sorted({cell for cell, _ in values} - {UNEDITED})
    for cell in random.Random(0).sample(cells, min(count, len(cells))):
        for rows in plan.chunks():
            logits = run_base(plan.inputs, rows, plan.hook_points[cell]).logits
            keys = list(product([cell], rows))
            for key, expected in _unedited_metrics(plan, rows).values(keys, logits).items():
                _check_values(plan, key, values.get(key, expected), expected)


def _check_values(
    plan: Plan, key: tuple[int, int], actual: Sequence[float], expected: Sequence[float]
) -> None:
    dtype = getattr(plan.lm.root, "dtype", torch.float64)
    limit = 5 * LIMITS.get(dtype, LIMITS[torch.float64])
    for metric, value, number in zip(plan.metrics, actual, expected, strict=True):
        if abs(value - number) > limit * max(1.0, abs(number)):
            raise Unsupported(
                f"the cell {plan.cells[key[0]]} of prompt {key[1]} has {metric.name} {value:.6g}, "
                f"and {number:.6g} when it is run by itself: a shortcut does not hold for this "
                "model. Please report it; until then run the cells with hk.forward"
            )
