"""Running a plan: the unedited rows once, then the jobs, with what is found kept as it comes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..captured import Captured, Piece
from ..hooks.looking import capture
from ..metrics import Measure, Said
from ..sites import AnySite, Site
from ..taps import Action, planned
from .grouping import Job
from .journal import Journal, Values
from .passes import Trunk, run_trunk, run_units
from .planning import Plan
from .reach import INPUT, Reach, source_of
from .trial import LIMITS


@dataclass(eq=False)
class Running:
    """A plan while it runs. `tell` is told how many units are done."""

    plan: Plan
    journal: Journal
    tell: Callable[[int], Any]
    budget: int
    before: Values = field(default_factory=dict)  # the metrics without any edit, as of cell -1
    checked: list[str] = field(default_factory=list)  # sources that turned out to be no values of this model

    def run(self) -> None:
        """Run all that is not known yet."""
        for rows in self.plan.chunks():
            self._rows(rows)

    def _rows(self, rows: tuple[int, ...]) -> None:
        try:
            self._with_trunk(rows)
        except RuntimeError as error:
            if not out_of_memory(error) or len(rows) == 1:
                raise
            half = len(rows) // 2
            self._rows(rows[:half])
            self._rows(rows[half:])

    def _with_trunk(self, rows: tuple[int, ...]) -> None:
        plan = self.plan
        sources = {} if self.checked else _sources(plan, rows)
        reach = plan.reach(trusted=not self.checked)
        jobs = plan.jobs(rows, self._left(plan.units(rows, reach)), self.budget)
        trunk, pieces = self._trunk(rows, jobs, list(sources))
        if wrong := _not_its_own(reach, sources, pieces, rows):
            self.checked.append(wrong)
            self._with_trunk(rows)
            return
        measures = [metric.bound(plan.lm, len(plan.reading)) for metric in plan.metrics]
        said = Saying(plan, trunk, measures)
        self.before |= said.values([(-1, row) for row in rows], trunk.logits)
        self._fill(rows, reach)
        for cell in plan.alone:
            self._alone(cell.number, rows, said)
        for job in jobs:
            self._job(trunk, job, said)

    def _left(self, units: Sequence[Any]) -> list[Any]:
        return [unit for unit in units if (unit.cell, unit.row) not in self.journal.values]

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

    def _fill(self, rows: Sequence[int], reach: Reach) -> None:
        """The cells that cannot matter have the value that there is without them."""
        run = {(unit.cell, unit.row) for unit in self.plan.units(rows, reach)}
        cells = [cell.number for cell in self.plan.cells if not cell.alone]
        keys = [(cell, row) for cell in cells for row in rows if (cell, row) not in run]
        self._keep({key: self.before[-1, key[1]] for key in keys})

    def _alone(self, cell: int, rows: tuple[int, ...], said: "Saying") -> None:
        keys = [(cell, row) for row in rows]
        if any(key not in self.journal.values for key in keys):
            trunk = run_trunk(self.plan.reading, rows, self.plan.taps[cell], (), 1, cache=False)
            self._keep(said.values(keys, trunk.logits))

    def _job(self, trunk: Trunk, job: Job, said: "Saying") -> None:
        plan = self.plan
        try:
            logits = run_units(trunk, plan.reading, job.units, plan.taps, job.width, plan.may)
            found = said.values([(unit.cell, unit.row) for unit in job.units], logits)
        except RuntimeError as error:
            if not out_of_memory(error) or len(job.units) == 1:
                raise
            del error
            self.budget = max(1, self.budget // 2)  # for what comes later
            half = len(job.units) // 2
            self._job(trunk, Job(job.width, job.units[:half]), said)
            self._job(trunk, Job(job.width, job.units[half:]), said)
            return
        self._keep(found)

    def _keep(self, found: Values) -> None:
        new = {key: values for key, values in found.items() if key not in self.journal.values}
        if new:
            self.journal.add(new)
        self.tell(len(found))


@dataclass(frozen=True, eq=False)
class Saying:
    """From logits to the metrics of units."""

    plan: Plan
    trunk: Trunk
    measures: Sequence[Measure]

    def values(self, keys: Sequence[tuple[int, int]], logits: Tensor) -> Values:
        """The metrics of these cells and prompts, from logits [row, look, vocab]."""
        found: Values = {}
        part = max(1, 2**26 // max(1, logits[0].numel()))  # rows at a time, since a metric makes copies
        for start in range(0, len(keys), part):
            some = keys[start : start + part]
            said = self._said([row for _, row in some], logits[start : start + part])
            columns = [measure(said).double().tolist() for measure in self.measures]
            found |= {key: list(values) for key, *values in zip(some, *columns, strict=True)}
        return found

    def _said(self, rows: list[int], logits: Tensor) -> Said:
        looks = self.plan.reading.looks
        if max(looks) == 1:
            return Said(logits[:, -1].float(), rows, self._before(rows), None)
        first = torch.stack([each[-looks[row]] for each, row in zip(logits, rows, strict=True)])
        after = [each[-looks[row] :].float() for each, row in zip(logits, rows, strict=True)]
        return Said(first.float(), rows, self._before(rows), after)

    def _before(self, rows: list[int]) -> Tensor | None:
        """The logits of these prompts without an edit, where a metric compares with them."""
        if not any(metric.compares for metric in self.plan.metrics):
            return None
        number = {row: place for place, row in enumerate(self.trunk.rows)}
        looks, logits = self.plan.reading.looks, self.trunk.logits
        return torch.stack([logits[number[row], -looks[row]] for row in rows]).float()


def _sources(plan: Plan, rows: Sequence[int]) -> dict[AnySite, list[tuple[Action, Captured]]]:
    """The patches whose source is taken to be this model's own up to where the texts differ, by the site's whole."""
    found: dict[AnySite, list[tuple[Action, Captured]]] = {}
    for cell in plan.cells:
        for action in cell.actions:
            source = source_of(action)
            if source is None or cell.alone:
                continue
            site = action.site
            whole = Site(site.name, site.layer) if isinstance(site, Site) else site
            known = found.setdefault(whole, [])
            if all(source.values is not other.values or action.site != first.site for first, other in known):
                known.append((action, source))
    return found


def _not_its_own(
    reach: Reach,
    sources: dict[AnySite, list[tuple[Action, Captured]]],
    pieces: dict[AnySite, Piece],
    rows: Sequence[int],
) -> str:
    """The first source whose values, where the texts are the same, are not those of this model; empty if there is none.

    A source may come from another model, from before a change of weights, or from a run with edits.
    """
    for site, patches in sources.items():
        piece = pieces[site]
        for action, source in patches:
            head = action.site.head if isinstance(action.site, Site) else None
            for number, row in enumerate(rows):
                until = reach.same_until(action, row)
                if until and not _same(source, piece, row, number, until, head):
                    return str(action.hook)
    return ""


def _same(source: Captured, piece: Piece, row: int, number: int, until: int, head: int | None) -> bool:
    """True if a source has, before position `until`, what the model itself has there."""
    assert source.positions is not None and piece.cells is not None
    theirs = source.row(row)
    columns = [(n, place) for n, place in enumerate(source.positions[theirs].tolist()) if 0 <= place < until]
    if not columns:
        return True
    there, places = zip(*columns, strict=True)
    was = source.by_place[theirs, list(there)].float()
    values = piece.values if head is None else piece.values[:, :, head]
    now = values[number, list(places)].float().to(was.device)
    if was.ndim > 1 and was.shape[-1] != now.shape[-1]:  # queries look at as many keys as there are
        width = min(was.shape[-1], now.shape[-1])
        was, now = was[..., :width], now[..., :width]
    size = max(float(values[number].float().abs().max()), 1e-9) if was.isfinite().all() else 1.0
    limit = LIMITS.get(source.values.dtype, LIMITS[torch.float32])
    return bool((was - now).abs().max() <= limit * size)


def out_of_memory(error: BaseException) -> bool:
    """True for an error that means that there was too little memory."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    words = str(error)
    return isinstance(error, RuntimeError) and ("not enough memory" in words or "out of memory" in words)


def _no_reference(sites: Any, prompts: Any) -> Any:
    raise AssertionError("a capture has no reference")
