"""Runs the plan of a sweep.

For each group of prompts the unedited prompts run once. Then the forwards of the cells are computed
as tasks, in this process or by an engine, and their values are stored as they come. The sources of
patches are first compared with the model's own values: only a source that agrees allows to skip the
positions before the first different token.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, product
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import NeverFired, TooLittleMemory
from ..hooks.capture import CapturedChunk, capture
from ..models.sites import AnySite, ModuleSite, Site
from ..runs.engines.actors import Step, Steps, run_steps
from ..runs.engines.ray import Ray
from ..runs.hook_points import BoundHook, HookPoint, build_hook_points
from .cell_batches import BaseForward, CellPrompt, Job
from .forwards import run_base, run_cell_prompts, run_with_unedited
from .hook_needs import bound_hooks_of
from .inputs import UNEDITED, CellMetrics, Values, count_cells
from .jobs import patch_source
from .journal import Journal
from .plan import Plan
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
        blocks, widths = set(), [1]
        for job in jobs:
            if job.joins and not job.n_unedited:
                blocks |= {cell_prompt.block for cell_prompt in job.cell_prompts}
                widths.append(job.width)
        columns = plan.inputs.count_columns(rows)
        after_base = [job for job in jobs if not job.n_unedited]
        cache = any(job.packed or job.width < columns for job in after_base)
        return cls(rows, sources_match, tuple(sorted(blocks)), max(widths), cache)

    def run(self, plan: Plan, captures: Sequence[HookPoint] = ()) -> BaseForward:
        """Runs the unedited prompts, with some captures beside the base hooks."""
        hook_points = [*plan.base_hook_points, *captures]
        return run_base(
            plan.inputs, self.rows, hook_points, self.blocks, self.width, cache=self.cache
        )


class BaseResults(NamedTuple):
    """The results of some unedited prompts, and the forwards of the cells.

    `logits` are those of the cell prompts of a single job that has run already; else None.
    """

    settings: BaseSettings
    forward: BaseForward
    jobs: Sequence[Job]
    cell_prompts: Sequence[CellPrompt]
    logits: Float[Tensor, "row pos vocab"] | None


@dataclass(frozen=True, eq=False)
class Task:
    """One forward. `name` names its first cells, in error messages."""

    base: BaseSettings
    job: Job
    name: str

    def __str__(self) -> str:
        return self.name


def create_task(plan: Plan, base: BaseSettings, job: Job) -> Task:
    """Returns a task with the names of its cells."""
    cells = list(dict.fromkeys(plan.cells[cell] for cell, _ in job.keys))
    names = list(map(str, cells[:MAX_CELL_NAMES]))
    if len(cells) > MAX_CELL_NAMES:
        names.append(f"and {len(cells) - MAX_CELL_NAMES} more")
    word = "cell" if len(cells) == 1 else "cells"
    return Task(base, job, f"the sweep's {word} {'; '.join(names)}")


@dataclass(eq=False)
class SweepWorker:
    """Computes the tasks of a plan. It owns the results of one unedited forward at a time."""

    plan: Plan
    base: tuple[BaseSettings, BaseForward, CellMetrics] | None = field(default=None, init=False)

    def __getstate__(self) -> dict[str, Any]:
        # The copy of the plan has none of the cached properties.
        return {"plan": replace(self.plan), "base": None}

    def load(self, settings: BaseSettings, forward: BaseForward) -> CellMetrics:
        """Takes the results of an unedited forward. Returns the metrics of its prompts."""
        cell_metrics = self.plan.cell_metrics(forward)
        self.base = settings, forward, cell_metrics
        return cell_metrics

    def compute(self, task: Task) -> list[Values]:
        """Returns the values of a task: of one forward, or of each part that it was split into
        because memory ran out."""
        if self.base is None or self.base[0] != task.base:
            self.base = None  # frees the earlier one
            self.load(task.base, task.base.run(self.plan))
        return self._run(task.job)

    def _run(self, job: Job) -> list[Values]:
        assert self.base is not None
        plan = self.plan
        settings, forward, cell_metrics = self.base
        try:
            logits = run_cell_prompts(
                forward,
                plan.inputs,
                job,
                plan.hook_points,
                plan.shortcuts,
                plan.base_hook_points,
                plan.tokens,
            )
            values = cell_metrics.values(job.keys, logits)
        except RuntimeError as error:
            count = len(job.cell_prompts)
            check_out_of_memory(error, plan, count)
            del error
            parts = [self._run(part) for part in job.split((count + 1) // 2)]
            return list(chain.from_iterable(parts))
        check_fired(plan, job, settings.sources_match)
        return [values]


def check_fired(plan: Plan, job: Job, sources_match: bool) -> None:
    """Raises `NeverFired` for an edit that had to change a row of a job and did nothing."""
    for number, row in job.keys:
        cell = plan.cells[number]
        for bound in cell.bound_hooks:
            if should_have_fired(bound, plan, [row], sources_match):
                raise NeverFired(
                    f"{bound.hook} never fired at {bound.site} in the sweep's cell {cell}: the "
                    "model never calls this module (some are bypassed by fused code). See "
                    "lm.describe() for the sites"
                )


def should_have_fired(
    bound: BoundHook, plan: Plan, rows: Sequence[int], sources_match: bool
) -> bool:
    """True if an edit did not fire and would do nothing in forwards of whole prompts either.

    An edit may be idle because it acts only where the metric cannot see it. At a module that the
    model never calls, it is idle everywhere.
    """
    if bound.fired or bound.change is None:
        return False
    start_of = partial(plan.first_effect.start_of, bound, sources_match=sources_match)
    if any(map(start_of, rows)):
        return True
    return isinstance(bound.site, ModuleSite) and not is_called(plan.lm, bound.site)


def check_out_of_memory(error: RuntimeError, plan: Plan, rows: int) -> None:
    """Returns if an error means too little memory for so many rows, and this process alone can
    react to it by running fewer. Raises the error otherwise."""
    is_named = any(map(str(error).__contains__, MEMORY_ERRORS))
    is_memory = is_named or isinstance(error, torch.OutOfMemoryError)
    if not is_memory or plan.lm.ranks is not None:
        raise error
    if rows == 1:
        message = (
            f"a forward of one prompt of up to {max(plan.inputs.lengths)} tokens does not fit into "
            "the memory that is free: free some, give shorter prompts, or load the model in a "
            f"smaller dtype. {error}"
        )
        raise TooLittleMemory(message.split("\n")[0]) from error


def collect_sources(plan: Plan) -> dict[AnySite, list[BoundHook]]:
    """Returns the patches whose sources have to be compared with the model's own values, by site
    without head; one for each source."""
    patches: dict[Any, BoundHook] = {}
    sharing_cells = [cell.bound_hooks for cell in plan.cells if not cell.alone]
    for bound in chain.from_iterable(sharing_cells):
        source = patch_source(bound)
        if source is not None:
            tensor = source.values.data_ptr(), source.values.shape, source.values.stride()
            patches.setdefault((bound.site, tensor, source.rows, source.prompts), bound)
    by_site: dict[AnySite, list[BoundHook]] = defaultdict(list)
    for bound in patches.values():
        site = bound.site
        by_site[Site(site.name, site.layer) if isinstance(site, Site) else site].append(bound)
    return by_site


def find_foreign_source(
    plan: Plan, patches: Sequence[BoundHook], chunk: CapturedChunk, rows: Sequence[int]
) -> str:
    """Returns the first patch whose source differs from the model's own values of these rows
    although the tokens are the same; an empty string if there is none.

    A source may come from another model, from before a change of weights, or from a run with edits.
    Each position is compared with its own size, the largest value over all heads: the first one's
    is often a thousand times that of the other ones.
    """
    model_values = chunk.values.float()
    magnitudes = model_values.abs()
    # Masked scores do not count.
    is_masked = magnitudes > torch.finfo(chunk.values.dtype).max / 16
    sizes = magnitudes.masked_fill(is_masked, 0).flatten(2).amax(-1).clamp(min=1e-9)
    assert chunk.cells is not None
    for bound in patches:
        rows_of_model = zip(chunk.cells.row_positions, model_values, sizes, strict=True)
        for row, (positions, values, row_sizes) in zip(rows, rows_of_model, strict=True):
            if not _has_values_of_model(plan, bound, row, positions, values, row_sizes):
                return str(bound.hook)
    return ""


def _has_values_of_model(
    plan: Plan,
    bound: BoundHook,
    row: int,
    positions: Sequence[int],
    values: Float[Tensor, "pos ..."],
    sizes: Float[Tensor, " pos"],
) -> bool:
    """True if a patch's source has the model's own values of a row where the tokens are the same.

    `values` are the model's at these positions of the row, and `sizes` are their sizes.
    """
    source, site = patch_source(bound), bound.site
    assert source is not None and source.positions is not None
    if len(source.rows) > 1 and row not in source.rows:
        return True  # the patch does not act on this row
    source_row, first = source.row(row), positions[0]
    end = min(plan.first_effect.common_prefix(source, row), positions[-1] + 1)
    shared = [position for position in source.columns[source_row] if first <= position < end]
    if not shared:
        return True
    source_columns = _as_slice([source.column(source_row, position) for position in shared])
    columns = _as_slice([position - first for position in shared])
    model_values = values[columns]
    if isinstance(site, Site) and site.head is not None:
        model_values = model_values[:, site.head]
    limit = LIMITS.get(source.values.dtype, LIMITS[torch.float32])
    source_values = source.by_position[source_row, source_columns]
    return _is_close(source_values, model_values, limit * sizes[columns])


def _as_slice(indices: list[int]) -> slice | list[int]:
    """Returns indices as a slice if they follow one another, which is faster as an index."""
    if indices[-1] - indices[0] == len(indices) - 1:
        return slice(indices[0], indices[-1] + 1)
    return indices


def _is_close(actual: Tensor, expected: Tensor, limits: Float[Tensor, " pos"]) -> bool:
    """True if no value differs by more than the limit of its position."""
    if actual.ndim > 1:  # scores of texts with different numbers of keys
        width = min(actual.shape[-1], expected.shape[-1])
        actual, expected = actual[..., :width], expected[..., :width]
    differences = (actual.float() - expected.to(actual.device)).abs().flatten(1)
    return bool((differences <= limits.to(actual.device)[:, None]).all())


@dataclass(eq=False)
class PlanRun:
    """Runs a plan. It owns `halvings`, `foreign_sources` and `runs_apart`, which change while
    it runs.

    on_progress      is called with the number of cells that were finished, counted for each prompt
    halvings         how often memory ran out, so that later prompts have smaller forwards
    foreign_sources  patches whose source has other values than this model
    runs_apart       True if memory ran out where the unedited prompts ran together with cells

    Which cells run together depends only on the plan and on the memory. So a sweep that continues
    after it was killed runs the same forwards, except those that were finished, and so does any
    engine.
    """

    plan: Plan
    journal: Journal
    on_progress: Callable[[int], object] = lambda count: None
    engine: Ray | None = None
    halvings: int = field(default=0, init=False)
    foreign_sources: list[str] = field(default_factory=list, init=False)
    runs_apart: bool = field(default=False, init=False)

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
            check_out_of_memory(error, self.plan, len(rows))
            worker.base = None
            half = len(rows) // 2
            self._run_here(rows[:half])
            self._run_here(rows[half:])

    def _steps(self, rows: tuple[int, ...], worker: SweepWorker) -> Steps:
        """Yields the values that need no forward of a cell, and then the forwards."""
        plan, stored = self.plan, self.journal.values
        base = self._run_base(rows)
        forward = base.forward
        self._check_base_fired(rows)
        cell_metrics = worker.load(base.settings, forward)
        values = cell_metrics.values(list(product([UNEDITED], rows)), forward.logits)
        of_cells: Values = {}
        if base.logits is not None:
            (job,) = base.jobs
            of_cells = cell_metrics.values(job.keys, base.logits)
            check_fired(plan, job, base.settings.sources_match)
        del forward
        if self.engine is not None:
            worker.base = None
        values = {key: stored.get(key, numbers) for key, numbers in values.items()}
        unchanged = self._unchanged(rows, base.cell_prompts, values)
        yield Step(None, lambda _: self._store(values))
        yield Step(None, lambda _: self._store(unchanged))
        if of_cells:
            yield Step(None, lambda _: self._store(of_cells))
            return
        for job in base.jobs:
            if not stored.keys() >= set(job.keys):
                yield Step(create_task(plan, base.settings, job), self._store_parts)

    def _check_base_fired(self, rows: Sequence[int]) -> None:
        for bound in self.plan.first_effect.base:
            if should_have_fired(bound, self.plan, rows, sources_match=False):
                raise NeverFired(
                    f"{bound.hook}, a base hook of every cell, never fired at {bound.site}"
                )

    def _run_base(self, rows: tuple[int, ...]) -> BaseResults:
        """Runs the unedited prompts, together with the cells if the plan says so."""
        plan = self.plan
        sources_match = not self.foreign_sources
        patches = collect_sources(plan) if sources_match else {}
        cell_prompts = plan.cell_prompts(rows, sources_match=sources_match)
        budget = max(1, plan.budget // 2**self.halvings)
        jobs = plan.chooser.jobs(rows, cell_prompts, budget)
        if not self._can_run_together(jobs):
            jobs = plan.chooser.jobs(rows, cell_prompts, budget, together=False)
        settings = BaseSettings.of_jobs(plan, rows, jobs, sources_match=sources_match)
        captures = build_hook_points(plan.lm, list(map(capture, patches)), no_reference)
        logits = None
        if jobs and jobs[0].n_unedited:
            try:
                forward, logits = self._run_together(rows, jobs[0], captures)
            except RuntimeError as error:
                check_out_of_memory(error, plan, len(jobs[0].cell_prompts))
                self.runs_apart = True
                return self._run_base(rows)
        else:
            forward = settings.run(plan, captures)
        for bound in bound_hooks_of(captures):
            foreign = find_foreign_source(plan, patches[bound.site], bound.pieces[0], rows)
            if foreign:
                self.foreign_sources.append(foreign)
                return self._run_base(rows)
        return BaseResults(settings, forward, jobs, cell_prompts, logits)

    def _can_run_together(self, jobs: Sequence[Job]) -> bool:
        """True if the plan has the unedited prompts in a forward with cells, and can have it so."""
        if not jobs or not jobs[0].n_unedited or self.engine is not None or self.runs_apart:
            return False
        return not self.journal.values.keys() >= set(jobs[0].keys)

    def _run_together(
        self, rows: Sequence[int], job: Job, captures: Sequence[HookPoint]
    ) -> tuple[BaseForward, Tensor]:
        plan = self.plan
        hook_points: dict[int, Sequence[HookPoint]] = dict(enumerate(plan.hook_points))
        hook_points[UNEDITED] = [*plan.base_hook_points, *captures]
        return run_with_unedited(plan.inputs, rows, job, hook_points, plan.shortcuts, plan.tokens)

    def _unchanged(
        self, rows: Sequence[int], cell_prompts: Sequence[CellPrompt], unedited: Values
    ) -> Values:
        """Returns the values of the cells that cannot matter: those of the unedited prompts."""
        running = {cell_prompt.key for cell_prompt in cell_prompts}
        keys = product(range(len(self.plan.cells)), rows)
        return {key: unedited[UNEDITED, key[1]] for key in keys if key not in running}

    def _store_parts(self, parts: list[Values]) -> None:
        self.halvings += len(parts) - 1
        for values in parts:
            self._store(values)

    def _store(self, values: Values) -> None:
        new = {key: values[key] for key in values if key not in self.journal.values}
        if new:
            self.journal.add(new)
        self.on_progress(count_cells(new))
