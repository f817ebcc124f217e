"""Running a plan: the unedited rows once, then the jobs, with what is found kept as it comes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..captured import Piece
from ..engines import Ray, Step, Steps, computed
from ..errors import NeverFired
from ..hooks.looking import capture
from ..sites import AnySite
from ..taps import planned
from .grouping import Job
from .journal import Journal
from .passes import Trunk, Unit, run_trunk
from .planning import Plan
from .saying import UNEDITED, Values
from .sources import not_its_own, sources_of
from .working import Base, Found, Working, base_of, never_fired, out_of_memory, task, too_little_memory


@dataclass(eq=False)
class Running:
    """A plan while it runs. `tell` is told how many cells, counted for each prompt, have come to be known.

    Which cells run together depends on the plan alone, and on what memory there is: a plan that goes on where an
    earlier run was killed makes the same forwards, but for those that were finished, and so does any engine.
    """

    plan: Plan
    journal: Journal
    tell: Callable[[int], Any]
    budget: int
    engine: Ray | None = None
    checked: list[str] = field(default_factory=list)  # sources that turned out to be no values of this model

    def run(self) -> None:
        """Run all that is not known yet."""
        if self.engine is not None:
            working = Working(self.plan)
            steps = (step for rows in self.plan.chunks() for step in self._steps(rows, working))
            computed(self.engine, self.plan.lm, working, steps)
            return
        for rows in self.plan.chunks():
            self._here(rows)

    def _here(self, rows: tuple[int, ...]) -> None:
        working = Working(self.plan)
        try:
            computed(None, self.plan.lm, working, self._steps(rows, working))
        except RuntimeError as error:
            if not out_of_memory(error, self.plan.lm):
                raise
            if len(rows) == 1:
                raise too_little_memory(self.plan, error) from error
            working.release()
            half = len(rows) // 2
            self._here(rows[:half])
            self._here(rows[half:])

    def _steps(self, rows: tuple[int, ...], working: Working) -> Steps:
        """What is known without a cell's forward, and then the forwards."""
        plan = self.plan
        base, trunk, jobs, units = self._base(rows)
        self._check_under(rows)
        found = working.hold(base, trunk).values([(UNEDITED, row) for row in rows], trunk.logits)
        del trunk
        if self.engine is not None:
            working.release()
        before = {key: self.journal.values.get(key, values) for key, values in found.items()}
        yield Step(None, lambda _: self._keep(before))
        yield Step(None, lambda _: self._keep(self._filled(rows, units, before)))
        for work in (*(cell.number for cell in plan.alone), *jobs):
            todo = task(plan, base, work)
            if not all(key in self.journal.values for key in todo.keys):
                yield Step(todo, self._take)

    def _base(self, rows: tuple[int, ...]) -> tuple[Base, Trunk, Sequence[Job], Sequence[Unit]]:
        """What the forwards of some prompts start from, and which they are."""
        plan = self.plan
        sources = {} if self.checked else sources_of(plan)
        reach = plan.reach(trusted=not self.checked)
        units = plan.units(rows, reach)
        jobs = plan.jobs(rows, units, self.budget)
        base = base_of(plan, rows, jobs, trusted=not self.checked)
        trunk, pieces = self._trunk(base, list(sources))
        if wrong := not_its_own(reach, sources, pieces, rows):
            self.checked.append(wrong)
            return self._base(rows)
        return base, trunk, jobs, units

    def _trunk(self, base: Base, sites: Sequence[AnySite]) -> tuple[Trunk, dict[AnySite, Piece]]:
        plan = self.plan
        looking = planned(plan.lm, [capture(site) for site in sites], _no_reference)
        taps = [*plan.under, *looking]
        trunk = run_trunk(plan.reading, base.rows, taps, base.blocks, base.width, cache=base.cache)
        pieces = {action.site: action.pieces[0] for tap in looking for action in tap.actions}
        return trunk, pieces

    def _filled(self, rows: Sequence[int], units: Sequence[Unit], before: Values) -> Values:
        """The cells that cannot matter have the value that there is without them."""
        run = {(unit.cell, unit.row) for unit in units}
        cells = [cell.number for cell in self.plan.cells if not cell.alone]
        return {(cell, row): before[UNEDITED, row] for cell in cells for row in rows if (cell, row) not in run}

    def _take(self, found: Found) -> None:
        self.budget = max(1, self.budget // 2**found.halved)  # for what comes later
        for values in found.values:
            self._keep(values)

    def _keep(self, found: Values) -> None:
        new = {key: values for key, values in found.items() if key not in self.journal.values}
        if new:
            self.journal.add(new)
        self.tell(sum(cell != UNEDITED for cell, _ in new))

    def _check_under(self, rows: Sequence[int]) -> None:
        reach = self.plan.reach(trusted=False)
        for action in (action for tap in self.plan.under for action in tap.actions):
            if never_fired(action, rows, reach):
                raise NeverFired(f"{action.hook}, which is to act under every cell, never fired at {action.site}")


def _no_reference(sites: Any, prompts: Any) -> Any:
    raise AssertionError("a capture has no reference")
