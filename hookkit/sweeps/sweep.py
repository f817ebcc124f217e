"""hk.sweep and hk.plan: a grid of edits, the hooks of each cell, a metric, and a long table.

    table = hk.sweep(lm, prompts, {"layer": range(30), "pos": range(14)},
                     lambda layer, pos: hk.patch(hk.Site("resid_post", layer), clean, pos=pos),
                     hk.logit_diff(" Mary", " John"))

Every cell means one forward with its hooks, and has that forward's numbers; how they come about is the plan's business.
"""

import os
import random
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from ..errors import BadHook, Unsupported, checks_keywords
from ..hooks.base import Hook
from ..manager import hooks_of_others
from ..metrics import MetricLike, Said, as_metrics, columns, last_logits
from ..model import LM
from ..prompts import Prompts
from ..runs import Run, forward
from ..sites import ModuleSite
from ..training import warn_of_dropout
from .cells import Cell, Grid, HooksAt, References, cells_of, checked
from .controls import Control, controlled
from .grouping import memory_budget
from .journal import Values, journal
from .passes import run_trunk
from .planning import Plan
from .reading import read
from .running import Running, Saying
from .trial import LIMITS, by_row, reads_ahead, shortcuts


@checks_keywords
def plan(
    lm: LM,
    prompts: Prompts,
    grid: Grid,
    hooks: HooksAt,
    metrics: MetricLike | Sequence[MetricLike],
    *,
    pos: int = -1,
    under: Sequence[Hook] = (),
    control: Control | None = None,
    memory: int | None = None,
) -> Plan:
    """What a sweep with the same arguments is going to do and to cost; nothing but a trial of a few tokens is run.

    >>> plan(lm, prompt, {"layer": range(30)}, lambda layer: ablate(Site("attn_out", layer)), prob(" coffee")).forwards
    2
    """
    if lm.two_texts or lm.config is None:
        raise Unsupported(f"a sweep needs a causal language model, and this is a {type(lm.root).__name__}")
    found = as_metrics(metrics)
    reading = read(lm, prompts, found, pos)
    for metric in found:
        metric.bound(lm, len(reading))  # raises before anything runs
    cells = cells_of(lm, grid, hooks, reading)
    if control is not None:
        cells += controlled(lm, cells, control, reading)
    always = tuple(checked(lm, tuple(under), reading, References(lm)))
    if reads_ahead(lm):
        raise Unsupported("this model reads ahead: what it says at a position depends on later tokens; use hk.forward")
    may = shortcuts(lm)
    _leave_alone(lm, cells, "" if may.batch else may.why["batch"])
    return Plan(lm, tuple(cells), reading, found, always, may, memory_budget(lm, memory))


def _leave_alone(lm: LM, cells: Sequence[Cell], reason: str) -> None:
    """Mark the cells that cannot share a forward."""
    known: dict[tuple[str, str], bool] = {}
    users = hooks_of_others(lm.root)
    if users:
        reason = (
            f"the model carries hooks that are not hookkit's (on {users[0] or 'the model'}), which see whole batches"
        )
    for cell in cells:
        cell.alone = reason
        for action in cell.actions if not reason else ():
            site = action.site
            if isinstance(site, ModuleSite):
                key = site.path, site.side
                if key not in known:
                    known[key] = by_row(lm, *key)
                if not known[key]:
                    cell.alone = f"{site} has no axes batch and pos, so that rows cannot be told apart"


@checks_keywords
def sweep(
    lm: LM,
    prompts: Prompts,
    grid: Grid,
    hooks: HooksAt,
    metrics: MetricLike | Sequence[MetricLike],
    *,
    pos: int = -1,
    under: Sequence[Hook] = (),
    target: Run | Prompts | None = None,
    control: Control | None = None,
    save: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
    memory: int | None = None,
    verify: int = 0,
) -> pd.DataFrame:
    """The metrics of every cell of a grid, for every prompt: one row each.

    `grid` maps the name of each dimension to its values; `hooks` is called with a value of each, by name, and gives a
    hook or several. `metrics` look at position `pos` of each prompt.

    under       hooks that act in every cell, and in the unedited rows that cells are compared with
    target      a run, or prompts, by which the effect is measured: 0 where nothing changed, 1 where the metric came to
                be what it is there
    control     "random" or "resample": every cell a second time with an edit that should not matter; or a function of
                the grid's values that gives the control's hooks
    save        a folder in which values are kept as they come; a sweep that was killed goes on there
    progress    True or False; left out, a bar is shown in a terminal
    memory      bytes that it may use beside the model
    verify      so many cells, drawn by chance, are run once more by themselves, and `Unsupported` is raised if one of
                them has other values

    Columns: the grid's dimensions, row (the prompt), control where one was asked for, and for each metric its value,
    `_before` (without the cell's hooks), `_delta` (after minus before), and with a target `_effect`. Ctrl-C gives the
    rows that are done, with a warning; `table.attrs["complete"]` says whether all are there.

    >>> table = sweep(lm, prompt, {"layer": range(30)}, lambda layer: ablate(Site("attn_out", layer)), prob(" coffee"))
    >>> list(table.columns)
    ['layer', 'row', 'prob', 'prob_before', 'prob_delta']
    """
    made = plan(lm, prompts, grid, hooks, metrics, pos=pos, under=under, control=control, memory=memory)
    warn_of_dropout(lm)
    kept = journal(save, made, {"pos": pos, "under": [hook.to_json(tensors="digest") for hook in under]})
    total = len(made.cells) * len(made.reading)
    complete = True
    with kept, tqdm(total=total, unit="cell", disable=None if progress is None else not progress) as bar:
        running = Running(made, kept, bar.update, made.budget)
        try:
            running.run()
        except KeyboardInterrupt:
            complete = False
            warnings.warn(f"the sweep was interrupted: {len(kept.values)} of {total} cells are done", stacklevel=2)
    if verify:
        _verify(made, kept.values, verify)
    table = _table(made, kept.values, running.before, target, pos)
    table.attrs |= {"complete": complete, "plan": repr(made), "sources_not_the_models_own": running.checked}
    if kept.folder is not None and complete:
        _write(table, kept.folder)
    return table


def _table(made: Plan, values: Values, before: Values, target: Any, pos: int) -> pd.DataFrame:
    names = columns(made.metrics)
    controls = any(cell.control for cell in made.cells)
    aims = None if target is None else _target(made, target, pos)
    rows: list[dict[str, Any]] = []
    for cell in made.cells:
        for row in range(len(made.reading)):
            if (cell.number, row) not in values:
                continue
            found: dict[str, Any] = {**cell.at, "row": row} | ({"control": cell.control} if controls else {})
            for place, name in enumerate(names):
                now, was = values[cell.number, row][place], before[-1, row][place]
                found |= {name: now, f"{name}_before": was, f"{name}_delta": now - was}
                if aims is not None:
                    way = aims[place][row] - was
                    found[f"{name}_effect"] = (now - was) / way if way else float("nan")
            rows.append(found)
    own = ["control"] if controls else []
    parts = ["", "_before", "_delta"] + ([] if aims is None else ["_effect"])
    wanted = [*made.cells[0].at, "row", *own, *(name + part for name in names for part in parts)]
    return pd.DataFrame(rows, columns=wanted)


def _target(made: Plan, target: Any, pos: int) -> list[list[float]]:
    """What each metric is at the target, for each prompt."""
    run = target if isinstance(target, Run) else forward(made.lm, target)
    logits, count = last_logits(run, pos), len(made.reading)
    if len(logits) not in (1, count):
        raise BadHook(f"the target has {len(logits)} rows, and there are {count} prompts: give as many, or one")
    logits = logits.expand(count, -1)
    trunk = run_trunk(made.reading, range(count), made.under, (), 1, cache=False)
    looks = made.reading.looks
    if max(looks) > 1:
        raise Unsupported("the effect of a loss has no target: leave target= out")
    said = Said(logits, range(count), trunk.logits[:, -1].float().cpu())
    return [metric.bound(made.lm, count)(said).double().tolist() for metric in made.metrics]


def _verify(made: Plan, values: Values, count: int) -> None:
    """Run some cells by themselves, from beginning to end, and raise if one has other values."""
    done = sorted({cell for cell, _ in values})
    rows = tuple(range(len(made.reading)))
    measures = [metric.bound(made.lm, len(rows)) for metric in made.metrics]
    for number in random.Random(0).sample(done, min(count, len(done))):
        trunk = run_trunk(made.reading, rows, made.under, (), 1, cache=False)
        alone = run_trunk(made.reading, rows, made.taps[number], (), 1, cache=False)
        wanted = Saying(made, trunk, measures).values([(number, row) for row in rows], alone.logits)
        for key, expected in wanted.items():
            for metric, now, was in zip(made.metrics, values.get(key, expected), expected, strict=True):
                if abs(now - was) > _allowed(made, was):
                    raise Unsupported(
                        f"the cell {made.cells[number]} of prompt {key[1]} has {metric.name} {now:.6g}, and {was:.6g} "
                        "when it is run by itself: a shortcut does not hold for this model. Please report it; until "
                        "then run the cells with hk.forward"
                    )


def _allowed(made: Plan, value: float) -> float:
    limit = LIMITS.get(getattr(made.lm.root, "dtype", None), LIMITS[next(iter(LIMITS))])  # pyright: ignore
    return 5 * limit * max(1.0, abs(value))


def _write(table: pd.DataFrame, folder: Path) -> None:
    making = folder / ".table.csv.making"
    table.to_csv(making, index=False)
    making.replace(folder / "table.csv")
