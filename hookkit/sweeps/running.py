"""Running a plan: the unedited rows once, then the jobs, with what is found kept as it comes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..captured import Piece
from ..errors import NeverFired
from ..hooks.looking import capture
from ..model import LM
from ..sites import AnySite
from ..taps import planned
from .cells import Cell
from .grouping import Job
from .journal import Journal
from .passes import Trunk, Unit, run_trunk, run_units
from .planning import Plan
from .reach import INPUT, Reach
from .saying import UNEDITED, Saying, Values, unedited
from .sources import not_its_own, sources_of


@dataclass(eq=False)
class Running:
    """A plan while it runs. `tell` is told how many cells, counted for each prompt, have come to be known.

    Which cells run together depends on the plan alone, and on what memory there is: a plan that goes on where an
    earlier run was killed makes the same forwards, but for those that were finished.
    """

    plan: Plan
    journal: Journal
    tell: Callable[[int], Any]
    budget: int
    checked: list[str] = field(default_factory=list)  # sources that turned out to be no values of this model

    def run(self) -> None:
        """Run all that is not known yet."""
        for rows in self.plan.chunks():
            self._rows(rows)

    def _rows(self, rows: tuple[int, ...]) -> None:
        try:
            self._with_trunk(rows)
        except RuntimeError as error:
            if not out_of_memory(error, self.plan.lm) or len(rows) == 1:
                raise
            half = len(rows) // 2
            self._rows(rows[:half])
            self._rows(rows[half:])

    def _with_trunk(self, rows: tuple[int, ...]) -> None:
        plan = self.plan
        sources = {} if self.checked else sources_of(plan)
        reach = plan.reach(trusted=not self.checked)
        units = plan.units(rows, reach)
        jobs = plan.jobs(rows, units, self.budget)
        trunk, pieces = self._trunk(rows, jobs, list(sources))
        if wrong := not_its_own(reach, sources, pieces, rows):
            self.checked.append(wrong)
            self._with_trunk(rows)
            return
        self._check_under(rows)
        said = Saying(plan.reading, plan.measures, unedited(plan.reading, trunk, plan.metrics))
        self._keep(said.values([(UNEDITED, row) for row in rows], trunk.logits))
        self._fill(rows, units)
        for cell in plan.alone:
            self._alone(cell, rows, reach, said)
        for job in jobs:
            self._job(trunk, job, reach, said)

    def _known(self, keys: Sequence[tuple[int, int]]) -> bool:
        return all(key in self.journal.values for key in keys)

    def _trunk(
        self, rows: tuple[int, ...], jobs: Sequence[Job], sites: Sequence[AnySite]
    ) -> tuple[Trunk, dict[AnySite, Piece]]:
        plan = self.plan
        columns = max(plan.reading.lengths[row] for row in rows)
        looking = planned(plan.lm, [capture(site) for site in sites], _no_reference)
        blocks = sorted({unit.start.block for job in jobs for unit in job.units} - {INPUT})
        width = max((job.width for job in jobs), default=1)
        cache = any(job.width < columns for job in jobs)
        trunk = run_trunk(plan.reading, rows, [*plan.under, *looking], blocks, width, cache=cache)
        pieces = {action.site: action.pieces[0] for tap in looking for action in tap.actions}
        return trunk, pieces

    def _fill(self, rows: Sequence[int], units: Sequence[Unit]) -> None:
        """The cells that cannot matter have the value that there is without them."""
        run = {(unit.cell, unit.row) for unit in units}
        cells = [cell.number for cell in self.plan.cells if not cell.alone]
        keys = [(cell, row) for cell in cells for row in rows if (cell, row) not in run]
        self._keep({key: self.journal.values[UNEDITED, key[1]] for key in keys})

    def _alone(self, cell: Cell, rows: tuple[int, ...], reach: Reach, said: Saying) -> None:
        keys = [(cell.number, row) for row in rows]
        if self._known(keys):
            return
        trunk = run_trunk(self.plan.reading, rows, self.plan.taps[cell.number], (), 1, cache=False)
        self._check_fired(cell, rows, reach)
        self._keep(said.values(keys, trunk.logits))

    def _job(self, trunk: Trunk, job: Job, reach: Reach, said: Saying) -> None:
        plan = self.plan
        keys = [(unit.cell, unit.row) for unit in job.units]
        if self._known(keys):
            return
        try:
            logits = run_units(trunk, plan.reading, job.units, plan.taps, job.width, plan.may)
            found = said.values(keys, logits)
        except RuntimeError as error:
            if not out_of_memory(error, plan.lm) or len(job.units) == 1:
                raise
            del error
            self.budget = max(1, self.budget // 2)  # for what comes later
            half = len(job.units) // 2
            self._job(trunk, Job(job.width, job.units[:half]), reach, said)
            self._job(trunk, Job(job.width, job.units[half:]), reach, said)
            return
        for unit in job.units:
            self._check_fired(plan.cells[unit.cell], (unit.row,), reach)
        self._keep(found)

    def _keep(self, found: Values) -> None:
        new = {key: values for key, values in found.items() if key not in self.journal.values}
        if new:
            self.journal.add(new)
        self.tell(sum(cell != UNEDITED for cell, _ in new))

    # ---- every wish takes effect or raises

    def _check_fired(self, cell: Cell, rows: Sequence[int], reach: Reach) -> None:
        """Raise `NeverFired` for an edit that was to change what these rows say, and did nothing."""
        for action in cell.actions:
            idle = action.change is not None and not action.fired
            if idle and any(reach.of(action, row) is not None for row in rows):
                raise NeverFired(
                    f"{action.hook} never fired at {action.site} in the sweep's cell {cell}: the model never calls "
                    "this module (some are bypassed by fused code). See lm.describe() for the sites"
                )

    def _check_under(self, rows: Sequence[int]) -> None:
        wanted = self.plan.reading.full.wishes
        for action in (action for tap in self.plan.under for action in tap.actions):
            if not action.fired and any(wanted(action.where)[row] is not None for row in rows):
                raise NeverFired(f"{action.hook}, which is to act under every cell, never fired at {action.site}")


def out_of_memory(error: BaseException, lm: LM) -> bool:
    """True for an error that means that there was too little memory, and that one process alone can make good."""
    if lm.ranks is not None:
        return False
    if isinstance(error, torch.OutOfMemoryError):
        return True
    words = str(error)
    return isinstance(error, RuntimeError) and ("not enough memory" in words or "out of memory" in words)


def _no_reference(sites: Any, prompts: Any) -> Any:
    raise AssertionError("a capture has no reference")
