"""Running a plan: the unedited rows once, then the jobs, with what is found kept as it comes.

What a sweep has to compute: forwards of some cells, each by itself, here or elsewhere.

Whether a patch puts in what the model itself has, up to where its text differs: looked at, and never assumed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..errors import NeverFired, TooLittleMemory
from ..hooks.capture import capture
from ..hooks.captured_values import Captured, CapturedChunk
from ..models.lm import LM
from ..models.sites import AnySite, ModuleSite, Site
from ..runs.engines.actors import computed
from ..runs.engines.ray import Ray
from ..runs.engines.work import Step, Steps
from ..runs.taps import BoundHook, planned
from .cell_metrics import UNEDITED, CellMetrics, Values, unedited
from .cells import Cell
from .forwards import BaseForward, CellPrompt, run_trunk, run_units
from .journal import Journal
from .plan import Job, Plan
from .reach import INPUT, FirstEffect, source_of
from .shortcuts import LIMITS, is_called

WITHOUT_MEMORY = (
    "not enough memory",
    "out of memory",
    "can't allocate memory",
)  # in errors of torch
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
class TaskResult:
    """The values of a task, those of each forward together, and how often it was halved for want of memory."""

    values: list[Values]
    halved: int = 0


@dataclass(eq=False)
class SweepWorker:
    """What computes the tasks of a plan. It holds one base at a time."""

    plan: Plan
    _held: tuple[Base, BaseForward, FirstEffect, CellMetrics] | None = field(
        default=None, init=False
    )

    def __getstate__(self) -> dict[str, Any]:
        return {"plan": replace(self.plan), "_held": None}  # without what was worked out meanwhile

    def hold(self, base: Base, trunk: BaseForward) -> CellMetrics:
        """Take in what forwards start from; what says the metrics of these prompts."""
        plan = self.plan
        said = CellMetrics(plan.reading, plan.measures, unedited(plan.reading, trunk, plan.metrics))
        self._held = base, trunk, plan.reach(trusted=base.trusted), said
        return said

    def release(self) -> None:
        """Let go of it."""
        self._held = None

    def compute(self, task: Task) -> TaskResult:
        """The values of a task."""
        base, plan = task.base, self.plan
        if self._held is None or self._held[0] != base:
            self.release()
            self.hold(
                base,
                run_trunk(
                    plan.reading, base.rows, plan.under, base.blocks, base.width, cache=base.cache
                ),
            )
        return (
            self._job(task.work)
            if isinstance(task.work, Job)
            else self._alone(plan.cells[task.work])
        )

    def _alone(self, cell: Cell) -> TaskResult:
        assert self._held is not None
        base, _, reach, said = self._held
        trunk = run_trunk(
            self.plan.reading, base.rows, self.plan.taps[cell.number], (), 1, cache=False
        )
        _check_fired(cell, base.rows, reach)
        return TaskResult([said.values([(cell.number, row) for row in base.rows], trunk.logits)])

    def _job(self, job: Job) -> TaskResult:
        assert self._held is not None
        _, trunk, reach, said = self._held
        plan = self.plan
        try:
            logits = run_units(
                trunk, plan.reading, job.units, plan.taps, job.width, plan.may, plan.under
            )
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
            return TaskResult(first.values + second.values, 1 + first.halved + second.halved)
        for unit in job.units:
            _check_fired(plan.cells[unit.cell], (unit.row,), reach)
        return TaskResult([found])


def _check_fired(cell: Cell, rows: Sequence[int], reach: FirstEffect) -> None:
    """Raise `NeverFired` for an edit that was to change what these rows say, and did nothing."""
    for action in cell.actions:
        if action.change is not None and never_fired(action, rows, reach):
            raise NeverFired(
                f"{action.hook} never fired at {action.site} in the sweep's cell {cell}: the model never calls "
                "this module (some are bypassed by fused code). See lm.describe() for the sites"
            )


def never_fired(action: BoundHook, rows: Sequence[int], reach: FirstEffect) -> bool:
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
        f"free: free some, give shorter prompts, or load the model in a smaller dtype. {error}".split(
            "\n"
        )[0]
    )


def out_of_memory(error: BaseException, lm: LM) -> bool:
    """True for an error that means that there was too little memory, which this process alone can make good."""
    if lm.ranks is not None:
        return False
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in WITHOUT_MEMORY)


Sources: TypeAlias = dict[AnySite, list[tuple[BoundHook, Captured]]]
"""Patches with their sources, by the site without its head; each source once."""


def sources_of(plan: Plan) -> Sources:
    """The patches whose source is taken to be this model's own up to where the texts differ."""
    found: Sources = {}
    known = set()
    for cell in plan.cells:
        for action in cell.actions:
            source = source_of(action)
            if source is None or cell.alone:
                continue
            values = source.values
            same = (
                action.site,
                values.data_ptr(),
                values.shape,
                values.stride(),
                source.rows,
                source.prompts,
            )
            if same not in known:
                known.add(same)
                found.setdefault(_whole(action.site), []).append((action, source))
    return found


def _whole(site: AnySite) -> AnySite:
    return Site(site.name, site.layer) if isinstance(site, Site) else site


def not_its_own(
    reach: FirstEffect, sources: Sources, pieces: dict[AnySite, CapturedChunk], rows: Sequence[int]
) -> str:
    """The first patch whose source has, where the texts are the same, other values than this model; empty if none has.

    A source may come from another model, from before a change of weights, or from a run with edits.
    """
    for site, patches in sources.items():
        piece = pieces[site]
        assert piece.cells is not None
        sizes = _sizes(piece)
        for action, source in patches:
            head = action.site.head if isinstance(action.site, Site) else None
            for number, row in enumerate(rows):
                if len(source.rows) > 1 and row not in source.rows:
                    continue  # the patch leaves it alone
                until = reach.common(source, row)
                places = {
                    place: column
                    for column, place in enumerate(piece.cells.places[number])
                    if place < until
                }
                values = piece.values[number] if head is None else piece.values[number][:, head]
                if not _same(source, source.row(row), places, values, sizes[number]):
                    return str(action.hook)
    return ""


def _sizes(piece: CapturedChunk) -> Tensor:
    """The largest value at each row and position, over all heads; what is hidden from a query does not count."""
    values = piece.values.float()
    values = values.masked_fill(values.abs() > torch.finfo(piece.values.dtype).max / 16, 0)
    return values.abs().flatten(2).amax(-1)


def _same(
    source: Captured, theirs: int, places: Mapping[int, int], values: Tensor, sizes: Tensor
) -> bool:
    """True if a source has in its row `theirs` what `values` [column, ...] has in the columns of these places.

    Each position is held against its own size: the first one's is often a thousand times that of the others.
    """
    assert source.positions is not None
    found = [
        (n, places[place])
        for n, place in enumerate(source.positions[theirs].tolist())
        if place in places
    ]
    if not found:
        return True
    there, columns = map(list, zip(*found, strict=True))
    was = source.by_place[theirs, there].float()
    now = values[columns].float().to(was.device)
    if was.ndim > 1 and was.shape[-1] != now.shape[-1]:  # queries look at as many keys as there are
        width = min(was.shape[-1], now.shape[-1])
        was, now = was[..., :width], now[..., :width]
    apart = (was - now).abs().flatten(1).amax(-1)
    limit = LIMITS.get(source.values.dtype, LIMITS[torch.float32])
    return bool((apart <= limit * sizes[columns].to(was.device).clamp(min=1e-9)).all())


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
    checked: list[str] = field(
        default_factory=list
    )  # sources that turned out to be no values of this model

    def run(self) -> None:
        """Run all that is not known yet."""
        if self.engine is not None:
            working = SweepWorker(self.plan)
            steps = (step for rows in self.plan.chunks() for step in self._steps(rows, working))
            computed(self.engine, self.plan.lm, working, steps)
            return
        for rows in self.plan.chunks():
            self._here(rows)

    def _here(self, rows: tuple[int, ...]) -> None:
        working = SweepWorker(self.plan)
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

    def _steps(self, rows: tuple[int, ...], working: SweepWorker) -> Steps:
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

    def _base(
        self, rows: tuple[int, ...]
    ) -> tuple[Base, BaseForward, Sequence[Job], Sequence[CellPrompt]]:
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

    def _trunk(
        self, base: Base, sites: Sequence[AnySite]
    ) -> tuple[BaseForward, dict[AnySite, CapturedChunk]]:
        plan = self.plan
        looking = planned(plan.lm, [capture(site) for site in sites], _no_reference)
        taps = [*plan.under, *looking]
        trunk = run_trunk(plan.reading, base.rows, taps, base.blocks, base.width, cache=base.cache)
        pieces = {action.site: action.pieces[0] for tap in looking for action in tap.actions}
        return trunk, pieces

    def _filled(self, rows: Sequence[int], units: Sequence[CellPrompt], before: Values) -> Values:
        """The cells that cannot matter have the value that there is without them."""
        run = {(unit.cell, unit.row) for unit in units}
        cells = [cell.number for cell in self.plan.cells if not cell.alone]
        return {
            (cell, row): before[UNEDITED, row]
            for cell in cells
            for row in rows
            if (cell, row) not in run
        }

    def _take(self, found: TaskResult) -> None:
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
                raise NeverFired(
                    f"{action.hook}, which is to act under every cell, never fired at {action.site}"
                )


def _no_reference(sites: Any, prompts: Any) -> Any:
    raise AssertionError("a capture has no reference")
