"""hk.sweep and hk.plan: a grid of edits, the hooks of each cell, a metric, and a long table.

    table = hk.sweep(lm, prompts, {"layer": range(30), "pos": range(14)},
                     lambda layer, pos: hk.patch(hk.Site("resid_post", layer), clean, pos=pos),
                     hk.logit_diff(" Mary", " John"))

Every cell means one forward with its hooks, and has that forward's numbers; how they come about is the plan's business.
"""

import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypedDict

import pandas as pd
from tqdm.auto import tqdm

from ..arguments import checks_arguments, whole_number
from ..errors import BadHook, Interrupted, Unsupported
from ..hooks.base import Hook
from ..models.lm import LM
from ..models.prompts import Prompts
from ..models.sites import ModuleSite
from ..models.training import levels_to_the_user, warn_of_dropout
from ..runs.engines.ray import EngineLike, Ray, as_engine
from ..runs.manager import hooks_of_others
from ..runs.run import Run
from ..runs.taps import BoundHook
from ..tables.metrics import MetricLike, as_metrics, columns
from .cell_metrics import UNEDITED, aims
from .cell_metrics import verify as verified
from .cells import (
    TAKEN,
    Cell,
    Control,
    Grid,
    HooksAt,
    References,
    as_hooks,
    cells_of,
    checked,
    controlled,
)
from .execute import Running
from .forwards import Shortcuts
from .inputs import SweepInputs, read
from .journal import Journal, journal
from .plan import Plan, memory_budget
from .reach import inside_a_block, together
from .shortcuts import by_row, no_shortcuts, reads_ahead, shortcuts


class Settings(TypedDict, total=False):
    """What the standard grids pass on to `sweep`."""

    under: Hook | Sequence[Hook]
    control: Control | None
    draws: int | None
    control_seed: int | None
    save: str | os.PathLike[str] | None
    progress: bool | None
    memory: int | None
    verify: int
    engine: EngineLike


@checks_arguments
def plan(
    lm: LM,
    prompts: Prompts,
    grid: Grid,
    hooks: HooksAt,
    metrics: MetricLike | Sequence[MetricLike],
    *,
    pos: int = -1,
    under: Hook | Sequence[Hook] = (),
    control: Control | None = None,
    draws: int | None = None,
    control_seed: int | None = None,
    memory: int | None = None,
) -> Plan:
    """What a sweep with the same arguments is going to do and to cost; nothing is run but a trial of a few tokens, and
    the texts of which a hook takes the mean or a draw.

    >>> plan(lm, prompt, {"layer": range(30)}, lambda layer: ablate(Site("attn_out", layer)), prob(" coffee")).forwards
    2
    """
    if lm.two_texts or lm.config is None:
        raise Unsupported(
            f"a sweep needs a causal language model, and this is a {type(lm.root).__name__}"
        )
    found = as_metrics(metrics)
    reading = read(lm, prompts, found, pos)
    for metric in found:
        metric.bound(lm, len(reading))  # raises before anything runs
    cells = cells_of(lm, grid, hooks, reading)
    if control is not None:
        cells += controlled(lm, cells, control, reading, draws=draws, seed=control_seed)
    elif draws is not None or control_seed is not None:
        raise BadHook(
            f"draws={draws!r} and control_seed={control_seed!r} are of a control: say control='random'"
        )
    always = tuple(checked(lm, as_hooks(under), reading, References(lm)))
    actions = [action for tap in always for action in tap.actions] + [
        each for cell in cells for each in cell.actions
    ]
    if any(_looks_on(action, reading) for action in actions):
        reading = reading.whole()
    if any(_reads_logits(lm, action) for action in actions):
        reading = replace(reading, every=True)
    _check_names(cells[0], columns(found), ["draw"] if isinstance(control, str) else [])
    if reads_ahead(lm):
        raise Unsupported(
            "this model reads ahead: what it says at a position depends on later tokens; use hk.forward"
        )
    may = _shortcuts(lm)
    _leave_alone(lm, cells, "" if may.batch else may.why["batch"])
    return Plan(lm, tuple(cells), reading, found, always, may, memory_budget(lm, memory))


def _looks_on(action: BoundHook, reading: SweepInputs) -> bool:
    """True where a user's function is given a position behind the one at which the metric looks."""
    if not reading.cropped or not together(action):
        return False
    rows = zip(reading.full.wishes(action.where), reading.fed, reading.rows, strict=True)
    return any(
        wanted is not None and any(place in wanted for place in range(len(fed), len(row)))
        for wanted, fed, row in rows
    )


def _reads_logits(lm: LM, action: BoundHook) -> bool:
    """True where something may be done with the logits of other positions than those at which the metric looks."""
    if isinstance(action.site, ModuleSite):
        return not inside_a_block(lm, action.site.path)
    return action.head and together(action)


def _check_names(cell: Cell, names: Sequence[str], more: Sequence[str]) -> None:
    """Raise where two columns of the table would have one name."""
    for name in more:
        if name in cell.at:
            raise BadHook(
                f"the grid has a dimension {name!r}, which is a column of the control: give it another name"
            )
    for name in names:
        own = [name, *(f"{name}_{end}" for end in ("before", "delta", "target", "effect"))]
        twice = [each for each in (*cell.at, *TAKEN, *more) if each in own]
        if twice:
            raise BadHook(
                f"the table has a column {twice[0]!r} of the grid's or its own, and the metric {name} makes one of "
                "that name: give the dimension, or the metric's function, another name"
            )


def _shortcuts(lm: LM) -> Shortcuts:
    """What the model allows; nothing, and nothing is tried, where it carries hooks of the user's."""
    users = hooks_of_others(lm.model)
    if not users:
        return shortcuts(lm)
    return no_shortcuts(
        f"the model carries hooks that are not hookkit's (on {users[0] or 'the model'}), which see whole batches"
    )


def _leave_alone(lm: LM, cells: Sequence[Cell], reason: str) -> None:
    """Mark the cells that cannot share a forward."""
    for cell in cells:
        cell.alone = reason
        for action in cell.actions if not reason else ():
            site = action.site
            if isinstance(site, ModuleSite) and not by_row(lm, site):
                cell.alone = f"{site} has no axes batch and pos, so that rows cannot be told apart"


@checks_arguments
def sweep(
    lm: LM,
    prompts: Prompts,
    grid: Grid,
    hooks: HooksAt,
    metrics: MetricLike | Sequence[MetricLike],
    *,
    pos: int = -1,
    under: Hook | Sequence[Hook] = (),
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
    """The metrics of every cell of a grid, for every prompt: one row each.

    `grid` maps the name of each dimension to its values; `hooks` is called with a value of each, by name, and gives a
    hook or several. `metrics` look at position `pos` of each prompt.

    under       hooks that act in every cell, in the unedited rows that cells are compared with, and in the target's
    target      prompts, or a run as it is, by which the effect is measured: 0 where nothing changed, 1 where the metric
                came to be what it is there
    control     every cell again with edits that should not matter: "random", changes as large in random directions,
                of its own at each position of each prompt (random vectors that are the same everywhere are in
                `dose_response`); "resample", patches from other prompts of the same length; or a function of the
                grid's values that gives the control's hooks
    draws       how many times such a control is drawn, 10 unless told otherwise, or as many as there are other
                prompts. Each is a cell that is run; one draw is no control
    control_seed  of the random directions, 0 unless told otherwise
    save        a folder in which values are kept as they come; a sweep that was killed goes on there
    progress    True or False; left out, a bar is shown in a terminal
    memory      bytes that it may use beside the model
    verify      so many cells, drawn by chance, are run once more by themselves, and `Unsupported` is raised if one of
                them has other values
    engine      "ray", or `Ray(…)`: the forwards run on actors that hold the model each; the table is the same

    Columns: the grid's dimensions, row (the prompt), control where one was asked for, and draw where it is drawn
    (`over_prompts` has the control's mean over its draws, with its interval); and for each metric its value,
    `_before` (without the cell's hooks), `_delta` (after minus before), and with a target `_target` (the metric there)
    and `_effect` (NaN for a prompt whose metric is the same there; `over_prompts` has the ratio of the means). Ctrl-C
    gives the rows that are done, with an `Interrupted` warning; `table.attrs["complete"]` says whether all are there.

    A user's function, in an edit, is given the rows of one cell at a time, perhaps not all of them, and the cells come
    in an order of the plan's own: what it gives for a prompt may depend on nothing but that prompt.

    Values are those of a forward up to rounding: what runs together depends on `memory`. With the same memory, a sweep
    that was killed and goes on gives the same table to the bit on the same machine; where memory ran out in between,
    the last digits may differ. `NeverFired` is raised for an edit that did nothing.

    >>> table = sweep(lm, prompt, {"layer": range(30)}, lambda layer: ablate(Site("attn_out", layer)), prob(" coffee"))
    >>> list(table.columns)
    ['layer', 'row', 'prob', 'prob_before', 'prob_delta']
    """
    whole_number(
        verify, "verify", least=0, meaning="how many cells are run once more by themselves,"
    )
    chosen = as_engine(engine, lm)
    made = plan(
        lm,
        prompts,
        grid,
        hooks,
        metrics,
        pos=pos,
        under=under,
        control=control,
        draws=draws,
        control_seed=control_seed,
        memory=memory,
    )
    warn_of_dropout(lm)
    settings = {"pos": pos, "under": [hook.to_json(tensors="digest") for hook in as_hooks(under)]}
    with journal(save, made, settings) as kept:
        aimed = None if target is None else aims(made, target, pos)
        checks, complete = _run(made, kept, progress, chosen)
        if verify:
            verified(made, kept.values, verify)
        table = _table(made, kept, aimed, drawn=isinstance(control, str))
        table.attrs |= {
            "complete": complete,
            "plan": repr(made),
            "sources_not_the_models_own": checks,
        }
        if complete:
            kept.write(table)
    return table


def _run(
    made: Plan, kept: Journal, progress: bool | None, engine: Ray | None
) -> tuple[list[str], bool]:
    """Run what is not known yet: sources that turned out to be no values of the model, and whether all is done."""
    total = len(made.cells) * len(made.reading)
    shown = None if progress is None else not progress
    with tqdm(total=total, initial=kept.done, unit="cell", disable=shown) as bar:
        running = Running(made, kept, bar.update, made.budget, engine)
        try:
            running.run()
        except KeyboardInterrupt:
            words = (
                "and with save= it could go on from there"
                if kept.folder is None
                else "call it again to go on"
            )
            warnings.warn(
                f"the sweep was interrupted: {kept.done} of {total} cells are done; {words}",
                Interrupted,
                stacklevel=levels_to_the_user(),
            )
            return running.checked, False
    return running.checked, True


def _table(
    made: Plan, kept: Journal, aimed: Sequence[Sequence[float]] | None, *, drawn: bool
) -> pd.DataFrame:
    names = columns(made.metrics)
    controls = any(cell.control for cell in made.cells)
    rows: list[dict[str, Any]] = []
    for cell in made.cells:
        for row in range(len(made.reading)):
            if (cell.number, row) not in kept.values:
                continue
            found: dict[str, Any] = {**cell.at, "row": row} | (
                {"control": cell.control} if controls else {}
            )
            found |= {"draw": cell.draw} if drawn else {}
            for place, name in enumerate(names):
                now, was = kept.values[cell.number, row][place], kept.values[UNEDITED, row][place]
                found |= {name: now, f"{name}_before": was, f"{name}_delta": now - was}
                if aimed is not None:
                    way = aimed[row][place] - was
                    found[f"{name}_target"] = aimed[row][place]
                    found[f"{name}_effect"] = (now - was) / way if way else float("nan")
            rows.append(found)
    own = (["control"] if controls else []) + (["draw"] if drawn else [])
    parts = ["", "_before", "_delta"] + ([] if aimed is None else ["_target", "_effect"])
    wanted = [*made.cells[0].at, "row", *own, *(name + part for name in names for part in parts)]
    return pd.DataFrame(rows, columns=wanted)
