"""What a sweep has to compute: forwards of some cells, each by itself, here or elsewhere."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..errors import NeverFired, TooLittleMemory
from ..model import LM
from ..sites import ModuleSite
from ..taps import Action
from .cells import Cell
from .grouping import Job
from .passes import Trunk, run_trunk, run_units
from .planning import Plan
from .reach import INPUT, Reach
from .saying import Saying, Values, unedited
from .trial import is_called

WITHOUT_MEMORY = ("not enough memory", "out of memory", "can't allocate memory")  # in errors of torch
NAMED = 4  # so many cells are named in an error


@dataclass(frozen=True)
class Base:
    """Some prompts, and what is kept of their unedited rows for the forwards that start from them.

    trusted  patches' sources were seen to be the model's own
    blocks, width, cache  those of `run_trunk`
    """

    rows: tuple[int, ...]
    trusted: bool
    blocks: tuple[int, ...]
    width: int
    cache: bool


def base_of(plan: Plan, rows: tuple[int, ...], jobs: Sequence[Job], *, trusted: bool) -> Base:
    """What these forwards start from."""
    columns = max(plan.reading.lengths[row] for row in rows)
    blocks = sorted({unit.start.block for job in jobs for unit in job.units} - {INPUT})
    width = max((job.width for job in jobs), default=1)
    return Base(rows, trusted, tuple(blocks), width, cache=any(job.width < columns for job in jobs))


@dataclass(frozen=True, eq=False)
class Task:
    """A forward: a job, or the number of a cell that runs alone. `names` are those of its first cells."""

    base: Base
    work: Job | int
    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"the sweep's cell{'' if len(self.names) == 1 else 's'} {'; '.join(self.names)}"

    @property
    def keys(self) -> list[tuple[int, int]]:
        """The cells, by number, and the prompts that it has the values of."""
        if isinstance(self.work, Job):
            return [(unit.cell, unit.row) for unit in self.work.units]
        return [(self.work, row) for row in self.base.rows]


def task(plan: Plan, base: Base, work: Job | int) -> Task:
    """A task with the names of its cells."""
    cells = list(dict.fromkeys(cell for cell, _ in Task(base, work, ()).keys))
    more = (f"and {len(cells) - NAMED} more",) if len(cells) > NAMED else ()
    return Task(base, work, (*(str(plan.cells[cell]) for cell in cells[:NAMED]), *more))


@dataclass(frozen=True, eq=False)
class Found:
    """The values of a task, those of each forward together, and how often it was halved for want of memory."""

    values: list[Values]
    halved: int = 0


@dataclass(eq=False)
class Working:
    """What computes the tasks of a plan. It holds one base at a time."""

    plan: Plan
    _held: tuple[Base, Trunk, Reach, Saying] | None = field(default=None, init=False)

    def __getstate__(self) -> dict[str, Any]:
        return {"plan": replace(self.plan), "_held": None}  # without what was worked out meanwhile

    def hold(self, base: Base, trunk: Trunk) -> Saying:
        """Take in what forwards start from; what says the metrics of these prompts."""
        plan = self.plan
        said = Saying(plan.reading, plan.measures, unedited(plan.reading, trunk, plan.metrics))
        self._held = base, trunk, plan.reach(trusted=base.trusted), said
        return said

    def release(self) -> None:
        """Let go of it."""
        self._held = None

    def compute(self, task: Task) -> Found:
        """The values of a task."""
        base, plan = task.base, self.plan
        if self._held is None or self._held[0] != base:
            self.release()
            self.hold(base, run_trunk(plan.reading, base.rows, plan.under, base.blocks, base.width, cache=base.cache))
        return self._job(task.work) if isinstance(task.work, Job) else self._alone(plan.cells[task.work])

    def _alone(self, cell: Cell) -> Found:
        assert self._held is not None
        base, _, reach, said = self._held
        trunk = run_trunk(self.plan.reading, base.rows, self.plan.taps[cell.number], (), 1, cache=False)
        _check_fired(cell, base.rows, reach)
        return Found([said.values([(cell.number, row) for row in base.rows], trunk.logits)])

    def _job(self, job: Job) -> Found:
        assert self._held is not None
        _, trunk, reach, said = self._held
        plan = self.plan
        try:
            logits = run_units(trunk, plan.reading, job.units, plan.taps, job.width, plan.may, plan.under)
            found = said.values([(unit.cell, unit.row) for unit in job.units], logits)
        except RuntimeError as error:
            if not out_of_memory(error, plan.lm):
                raise
            if len(job.units) == 1:
                raise too_little_memory(plan, error) from error
            del error
            half = len(job.units) // 2
            first = self._job(Job(job.width, job.units[:half]))
            second = self._job(Job(job.width, job.units[half:]))
            return Found(first.values + second.values, 1 + first.halved + second.halved)
        for unit in job.units:
            _check_fired(plan.cells[unit.cell], (unit.row,), reach)
        return Found([found])


def _check_fired(cell: Cell, rows: Sequence[int], reach: Reach) -> None:
    """Raise `NeverFired` for an edit that was to change what these rows say, and did nothing."""
    for action in cell.actions:
        if action.change is not None and never_fired(action, rows, reach):
            raise NeverFired(
                f"{action.hook} never fired at {action.site} in the sweep's cell {cell}: the model never calls "
                "this module (some are bypassed by fused code). See lm.describe() for the sites"
            )


def never_fired(action: Action, rows: Sequence[int], reach: Reach) -> bool:
    """True for an action that did nothing in these rows, and would have done nothing in forwards of whole prompts.

    An edit may be idle because it acts only where the metric cannot see it. At a module that the model never calls,
    it is idle everywhere.
    """
    if action.fired:
        return False
    if any(reach.of(action, row) is not None for row in rows):
        return True
    return isinstance(action.site, ModuleSite) and not is_called(reach.lm, action.site)


def too_little_memory(plan: Plan, error: BaseException) -> TooLittleMemory:
    """What to raise where a forward of one row does not fit."""
    return TooLittleMemory(
        f"a forward of one prompt of up to {max(plan.reading.lengths)} tokens does not fit into the memory that is "
        f"free: free some, give shorter prompts, or load the model in a smaller dtype. {error}".split("\n")[0]
    )


def out_of_memory(error: BaseException, lm: LM) -> bool:
    """True for an error that means that there was too little memory, which this process alone can make good."""
    if lm.ranks is not None:
        return False
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in WITHOUT_MEMORY)
