"""Runs the plan of a sweep.

For each group of prompts the unedited prompts run once. Then the forwards of the cells are computed
as tasks, in this process or by an engine, and their values are stored as they come. The sources of
patches are first compared with the model's own values: only a source that agrees allows to skip the
positions before the first different token.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..errors import NeverFired, TooLittleMemory
from ..hooks.capture import capture
from ..hooks.captured_values import Captured, CapturedChunk
from ..models.lm import LM
from ..models.sites import AnySite, ModuleSite, Site
from ..runs.engines.actors import Step, Steps, run_steps
from ..runs.engines.ray import Ray
from ..runs.taps import BoundHook, HookPoint, build_hook_points
from .cell_metrics import UNEDITED, CellMetrics, Values, cell_keys, unedited_logits
from .cells import Cell
from .forwards import BaseForward, CellPrompt, run_base, run_cell_prompts
from .journal import Journal
from .plan import Job, Plan
from .reach import INPUT, FirstEffect, bound_hooks_of, patch_source
from .shortcuts import LIMITS, is_called, no_reference

# Parts of torch's error messages that mean too little memory.
MEMORY_ERRORS = ("not enough memory", "out of memory", "can't allocate memory")

MAX_CELL_NAMES = 4  # cells that are named in an error


@dataclass(frozen=True)
class BaseSettings:
    """Some prompts, and what their unedited forward has to store for later forwards.

    sources_match  True if patches have the model's own values (see `FirstEffect`)
    blocks, width, cache  arguments of `run_base`
    """

    rows: tuple[int, ...]
    sources_match: bool
    blocks: tuple[int, ...]
    width: int
    cache: bool

    @classmethod
    def of_jobs(
        cls, plan: Plan, rows: tuple[int, ...], jobs: Sequence[Job], *, sources_match: bool
    ) -> "BaseSettings":
        """Returns the settings that these forwards need."""
        columns = plan.inputs.count_columns(rows)
        blocks: set[int] = set()
        for job in jobs:
            blocks |= {cell_prompt.start.block for cell_prompt in job.cell_prompts}
        blocks.discard(INPUT)
        width = max((job.width for job in jobs), default=1)
        cache = any(job.width < columns for job in jobs)
        return cls(rows, sources_match, tuple(sorted(blocks)), width, cache)

    def run(self, plan: Plan, captures: Sequence[HookPoint] = ()) -> BaseForward:
        """Runs the unedited prompts, with some captures beside the base hooks."""
        hook_points = [*plan.base_hook_points, *captures]
        return run_base(
            plan.inputs, self.rows, hook_points, self.blocks, self.width, cache=self.cache
        )


@dataclass(frozen=True, eq=False)
class Task:
    """One forward: a job, or the number of a cell that runs alone.

    `names` are the names of its first cells, for error messages.
    """

    base: BaseSettings
    work: Job | int
    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"the sweep's cell{'' if len(self.names) == 1 else 's'} {'; '.join(self.names)}"

    @property
    def keys(self) -> list[tuple[int, int]]:
        """The cell numbers and rows whose values it computes."""
        if isinstance(self.work, Job):
            return self.work.keys
        return cell_keys(self.work, self.base.rows)


def create_task(plan: Plan, base: BaseSettings, work: Job | int) -> Task:
    """Returns a task with the names of its cells."""
    task = Task(base, work, ())
    cells = list(dict.fromkeys(cell for cell, _ in task.keys))
    names = [str(plan.cells[cell]) for cell in cells[:MAX_CELL_NAMES]]
    if len(cells) > MAX_CELL_NAMES:
        names.append(f"and {len(cells) - MAX_CELL_NAMES} more")
    return replace(task, names=tuple(names))


@dataclass(frozen=True, eq=False)
class TaskResult:
    """The values of a task, one entry for each forward that it took, and how often it was split
    in half because memory ran out."""

    values: list[Values]
    halvings: int = 0


@dataclass(frozen=True, eq=False)
class LoadedBase:
    """The results of one unedited forward, and what the worker derives from them."""

    settings: BaseSettings
    forward: BaseForward
    first_effect: FirstEffect
    cell_metrics: CellMetrics


@dataclass(eq=False)
class SweepWorker:
    """Computes the tasks of a plan. It owns the results of one unedited forward at a time."""

    plan: Plan
    _base: LoadedBase | None = field(default=None, init=False)

    def __getstate__(self) -> dict[str, Any]:
        # The copy of the plan has none of the cached properties.
        return {"plan": replace(self.plan), "_base": None}

    def load(self, settings: BaseSettings, forward: BaseForward) -> CellMetrics:
        """Takes the results of an unedited forward. Returns the metrics of its prompts."""
        plan = self.plan
        before = unedited_logits(plan, forward)
        cell_metrics = CellMetrics(plan.inputs, plan.measures, before)
        first_effect = plan.first_effect(sources_match=settings.sources_match)
        self._base = LoadedBase(settings, forward, first_effect, cell_metrics)
        return cell_metrics

    def release(self) -> None:
        """Frees the results of the unedited forward."""
        self._base = None

    def compute(self, task: Task) -> TaskResult:
        """Returns the values of a task."""
        if self._base is None or self._base.settings != task.base:
            self.release()
            self.load(task.base, task.base.run(self.plan))
        assert self._base is not None
        if isinstance(task.work, Job):
            return self._run_job(self._base, task.work)
        return self._run_alone(self._base, self.plan.cells[task.work])

    def _run_alone(self, base: LoadedBase, cell: Cell) -> TaskResult:
        rows = base.settings.rows
        hook_points = self.plan.hook_points[cell.number]
        forward = run_base(self.plan.inputs, rows, hook_points, (), 1, cache=False)
        _check_fired(cell, rows, base.first_effect)
        keys = cell_keys(cell.number, rows)
        return TaskResult([base.cell_metrics.values(keys, forward.logits)])

    def _run_job(self, base: LoadedBase, job: Job) -> TaskResult:
        plan = self.plan
        try:
            logits = run_cell_prompts(
                base.forward,
                plan.inputs,
                job.cell_prompts,
                plan.hook_points,
                job.width,
                plan.shortcuts,
                plan.base_hook_points,
            )
            values = base.cell_metrics.values(job.keys, logits)
        except RuntimeError as error:
            if not is_out_of_memory(error, plan.lm):
                raise
            if len(job.cell_prompts) == 1:
                raise too_little_memory(plan, error) from error
            del error
            half = len(job.cell_prompts) // 2
            first = self._run_job(base, Job(job.width, job.cell_prompts[:half]))
            second = self._run_job(base, Job(job.width, job.cell_prompts[half:]))
            return TaskResult(first.values + second.values, 1 + first.halvings + second.halvings)
        for cell_prompt in job.cell_prompts:
            _check_fired(plan.cells[cell_prompt.cell], (cell_prompt.row,), base.first_effect)
        return TaskResult([values])


def _check_fired(cell: Cell, rows: Sequence[int], first_effect: FirstEffect) -> None:
    """Raises `NeverFired` for an edit that had to change these rows and did nothing."""
    for bound in cell.bound_hooks:
        if bound.change is not None and never_fired(bound, rows, first_effect):
            raise NeverFired(
                f"{bound.hook} never fired at {bound.site} in the sweep's cell {cell}: the model "
                "never calls this module (some are bypassed by fused code). See lm.describe() for "
                "the sites"
            )


def never_fired(bound: BoundHook, rows: Sequence[int], first_effect: FirstEffect) -> bool:
    """True if a hook did nothing in these rows and would do nothing in forwards of whole prompts.

    An edit may be idle because it acts only where the metric cannot see it. At a module that the
    model never calls, it is idle everywhere.
    """
    if bound.fired:
        return False
    if any(first_effect.start_of(bound, row) is not None for row in rows):
        return True
    return isinstance(bound.site, ModuleSite) and not is_called(first_effect.lm, bound.site)


def too_little_memory(plan: Plan, error: BaseException) -> TooLittleMemory:
    """Returns the error for a forward of one row that does not fit."""
    message = (
        f"a forward of one prompt of up to {max(plan.inputs.lengths)} tokens does not fit into "
        "the memory that is free: free some, give shorter prompts, or load the model in a smaller "
        f"dtype. {error}"
    )
    return TooLittleMemory(message.split("\n")[0])


def is_out_of_memory(error: BaseException, lm: LM) -> bool:
    """True if an error means too little memory, and this process alone can react to it."""
    if lm.ranks is not None:
        return False
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in MEMORY_ERRORS)


Sources: TypeAlias = dict[AnySite, list[tuple[BoundHook, Captured]]]
"""Patches with their sources, by site without head; each source once."""


def collect_sources(plan: Plan) -> Sources:
    """Returns the patches whose sources have to be compared with the model's own values."""
    sources: Sources = {}
    keys = set()
    for cell in plan.cells:
        if cell.alone:
            continue
        for bound in cell.bound_hooks:
            source = patch_source(bound)
            if source is None:
                continue
            values = source.values
            tensor = values.data_ptr(), values.shape, values.stride()
            key = bound.site, tensor, source.rows, source.prompts
            if key not in keys:
                keys.add(key)
                sources.setdefault(_without_head(bound.site), []).append((bound, source))
    return sources


def _without_head(site: AnySite) -> AnySite:
    return Site(site.name, site.layer) if isinstance(site, Site) else site


def find_foreign_source(
    first_effect: FirstEffect,
    sources: Sources,
    chunks: Mapping[AnySite, CapturedChunk],
    rows: Sequence[int],
) -> str:
    """Returns the first patch whose source differs from the model's own values although the tokens
    are the same; an empty string if there is none.

    A source may come from another model, from before a change of weights, or from a run with edits.
    """
    for site, patches in sources.items():
        chunk = chunks[site]
        sizes = _sizes(chunk)
        for bound, source in patches:
            for index, row in enumerate(rows):
                if len(source.rows) > 1 and row not in source.rows:
                    continue  # the patch does not act on this row
                shared = first_effect.common_prefix(source, row)
                if not _source_matches(source, row, bound.site, chunk, index, shared, sizes[index]):
                    return str(bound.hook)
    return ""


def _sizes(chunk: CapturedChunk) -> Tensor:
    """Returns the largest value at each row and position, over all heads. Masked scores do not
    count."""
    values = chunk.values.float()
    values = values.masked_fill(values.abs() > torch.finfo(chunk.values.dtype).max / 16, 0)
    return values.abs().flatten(2).amax(-1)


def _source_matches(
    source: Captured,
    row: int,
    site: AnySite,
    chunk: CapturedChunk,
    index: int,
    shared: int,
    sizes: Tensor,
) -> bool:
    """True if a source agrees with row `index` of a chunk at the first `shared` positions.

    Each position is compared with its own size: the first one's is often a thousand times that of
    the other ones.
    """
    assert source.positions is not None and chunk.cells is not None
    column_of = {}
    for column, position in enumerate(chunk.cells.places[index]):
        if position < shared:
            column_of[position] = column
    source_row = source.row(row)
    source_columns, columns = [], []
    for source_column, position in enumerate(source.positions[source_row].tolist()):
        if position in column_of:
            source_columns.append(source_column)
            columns.append(column_of[position])
    if not columns:
        return True
    values = chunk.values[index]
    if isinstance(site, Site) and site.head is not None:
        values = values[:, site.head]
    source_values = source.by_place[source_row, source_columns].float()
    model_values = values[columns].float().to(source_values.device)
    if source_values.ndim > 1 and source_values.shape[-1] != model_values.shape[-1]:
        # Scores and patterns of texts with different numbers of keys.
        width = min(source_values.shape[-1], model_values.shape[-1])
        source_values, model_values = source_values[..., :width], model_values[..., :width]
    differences = (source_values - model_values).abs().flatten(1).amax(-1)
    limit = LIMITS.get(source.values.dtype, LIMITS[torch.float32])
    allowed = limit * sizes[columns].to(source_values.device).clamp(min=1e-9)
    return bool((differences <= allowed).all())


@dataclass(eq=False)
class PlanRun:
    """Runs a plan. It owns `budget` and `foreign_sources`, which change while it runs.

    on_progress      is called with the number of cells that were finished, counted for each prompt
    foreign_sources  patches whose source has other values than this model

    Which cells run together depends only on the plan and on the memory. So a sweep that continues
    after it was killed runs the same forwards, except those that were finished, and so does any
    engine.
    """

    plan: Plan
    journal: Journal
    on_progress: Callable[[int], Any]
    budget: int
    engine: Ray | None = None
    foreign_sources: list[str] = field(default_factory=list)

    def run(self) -> None:
        """Runs all forwards whose values are not in the journal."""
        if self.engine is None:
            for rows in self.plan.chunks():
                self._run_here(rows)
            return
        worker = SweepWorker(self.plan)
        steps = (self._steps(rows, worker) for rows in self.plan.chunks())
        run_steps(self.engine, self.plan.lm, worker, chain.from_iterable(steps))

    def _run_here(self, rows: tuple[int, ...]) -> None:
        worker = SweepWorker(self.plan)
        try:
            run_steps(None, self.plan.lm, worker, self._steps(rows, worker))
        except RuntimeError as error:
            if not is_out_of_memory(error, self.plan.lm):
                raise
            if len(rows) == 1:
                raise too_little_memory(self.plan, error) from error
            worker.release()
            half = len(rows) // 2
            self._run_here(rows[:half])
            self._run_here(rows[half:])

    def _steps(self, rows: tuple[int, ...], worker: SweepWorker) -> Steps:
        """Yields the values that need no forward of a cell, and then the forwards."""
        plan = self.plan
        settings, forward, jobs, cell_prompts = self._run_base(rows)
        self._check_base_hooks(rows)
        cell_metrics = worker.load(settings, forward)
        values = cell_metrics.values(cell_keys(UNEDITED, rows), forward.logits)
        del forward
        if self.engine is not None:
            worker.release()
        for key in values:
            values[key] = self.journal.values.get(key, values[key])
        yield Step(None, lambda _: self._store(values))
        yield Step(None, lambda _: self._store(self._unchanged(rows, cell_prompts, values)))
        for work in (*(cell.number for cell in plan.alone), *jobs):
            task = create_task(plan, settings, work)
            if not all(key in self.journal.values for key in task.keys):
                yield Step(task, self._store_result)

    def _run_base(
        self, rows: tuple[int, ...]
    ) -> tuple[BaseSettings, BaseForward, Sequence[Job], Sequence[CellPrompt]]:
        """Runs the unedited prompts. Returns the results, and the forwards that start from them."""
        plan = self.plan
        sources_match = not self.foreign_sources
        sources = collect_sources(plan) if sources_match else {}
        first_effect = plan.first_effect(sources_match=sources_match)
        cell_prompts = plan.cell_prompts(rows, first_effect)
        jobs = plan.jobs(rows, cell_prompts, self.budget)
        settings = BaseSettings.of_jobs(plan, rows, jobs, sources_match=sources_match)
        captures = build_hook_points(plan.lm, [capture(site) for site in sources], no_reference)
        forward = settings.run(plan, captures)
        chunks = {bound.site: bound.pieces[0] for bound in bound_hooks_of(captures)}
        foreign = find_foreign_source(first_effect, sources, chunks, rows)
        if foreign:
            self.foreign_sources.append(foreign)
            return self._run_base(rows)
        return settings, forward, jobs, cell_prompts

    def _unchanged(
        self, rows: Sequence[int], cell_prompts: Sequence[CellPrompt], unedited: Values
    ) -> Values:
        """Returns the values of the cells that cannot matter: those of the unedited prompts."""
        running = {cell_prompt.key for cell_prompt in cell_prompts}
        values: Values = {}
        for cell in self.plan.cells:
            if cell.alone:
                continue
            for row in rows:
                if (cell.number, row) not in running:
                    values[cell.number, row] = unedited[UNEDITED, row]
        return values

    def _store_result(self, result: TaskResult) -> None:
        self.budget = max(1, self.budget // 2**result.halvings)  # for later prompts
        for values in result.values:
            self._store(values)

    def _store(self, values: Values) -> None:
        stored = self.journal.values
        new = {key: numbers for key, numbers in values.items() if key not in stored}
        if new:
            self.journal.add(new)
        self.on_progress(sum(cell != UNEDITED for cell, _ in new))

    def _check_base_hooks(self, rows: Sequence[int]) -> None:
        first_effect = self.plan.first_effect(sources_match=False)
        for bound in first_effect.base:
            if never_fired(bound, rows, first_effect):
                raise NeverFired(
                    f"{bound.hook}, which is to act under every cell, never fired at {bound.site}"
                )
