"""Which cell prompts of a sweep share a forward, and how much memory that takes.

A forward runs over as many of the last positions as its cell prompts need. Those that need more are
run apart from those that need fewer, or all are packed: what is less work by a count of tokens.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import torch

from ..hooks.ablation import Ablate
from ..hooks.capture import Captured
from ..hooks.values import FromRun
from ..models.lm import LM
from ..runs.hook_points import BoundHook, HookPoint
from .cell_batches import CellPrompt, Job, Shortcuts, token_widths
from .cells import Cell
from .hook_needs import INPUT, can_pack
from .inputs import SweepInputs

# The fixed cost of running a block (reading its weights, calling it), in tokens.
BLOCK_COST = {"cpu": 40, "cuda": 256}

# How many tokens a packed forward may have: the sizes that are compared.
PACKED_TOKENS = (256, 512, 1024, 2048)


def patch_source(bound: BoundHook) -> Captured | None:
    """Returns the values that a patch inserts at its site; None for any other hook."""
    hook = bound.hook
    if not isinstance(hook, Ablate) or not isinstance(hook.to, FromRun):
        return None
    return next(source for source in hook.to.sources if source.site == bound.site)


def _block_counts(cell_prompts: Sequence[CellPrompt], n_layers: int) -> list[int]:
    """Returns how many blocks each cell prompt runs through."""
    return [n_layers - max(0, cell_prompt.block) for cell_prompt in cell_prompts]


def _cheapest_jobs(by_width: Mapping[int, Sequence[CellPrompt]], lm: LM) -> tuple[float, list[Job]]:
    """Returns the cheapest jobs for cell prompts, by how many of the last positions they need, and
    their cost.

    A job costs its tokens, at its largest width, and the fixed cost of each block that it runs.
    More widths mean fewer tokens and more forwards.
    """
    fixed = _fixed_cost(lm)
    widths = sorted(by_width)
    counts = [_block_counts(by_width[width], lm.n_layers) for width in widths]
    blocks, deepest = list(map(sum, counts)), list(map(max, counts))
    best: list[tuple[float, list[Job]]] = [(0, [])]  # for the first widths: none, one, two ...
    for last, width in enumerate(widths):
        costs: list[float] = []
        for first in range(last + 1):
            group = slice(first, last + 1)
            costs.append(best[first][0] + sum(blocks[group]) * width + fixed * max(deepest[group]))
        first = costs.index(min(costs))
        cell_prompts = chain.from_iterable(map(by_width.__getitem__, widths[first : last + 1]))
        job = Job(width, tuple(sorted(cell_prompts)))
        best.append((costs[first], [*best[first][1], job]))
    return best[-1]


def _fixed_cost(lm: LM) -> int:
    return BLOCK_COST.get(lm.device.type, BLOCK_COST["cuda"])


@dataclass(frozen=True, eq=False)
class JobChooser:
    """Decides which cell prompts of a sweep run in one forward.

    `tokens_computed` are of how many tokens the forwards of the cells compute logits, at most.
    """

    lm: LM
    inputs: SweepInputs
    cells: Sequence[Cell]
    base_hook_points: Sequence[HookPoint]
    shortcuts: Shortcuts
    tokens_computed: int

    def jobs(
        self,
        rows: Sequence[int],
        cell_prompts: Sequence[CellPrompt],
        budget: int,
        *,
        together: bool = True,
    ) -> list[Job]:
        """Returns the forwards that run these cell prompts.

        If a single packed one suffices, and has room for them, the unedited prompts are in it,
        where they may run `together`.
        """
        columns = self.inputs.count_columns(rows)
        alone: dict[int, list[CellPrompt]] = defaultdict(list)  # by cell
        from_input: dict[int, list[CellPrompt]] = defaultdict(list)  # by width; their batch is full
        joining: dict[int, list[CellPrompt]] = defaultdict(list)  # by width; their batch grows
        for cell_prompt in cell_prompts:
            if self.cells[cell_prompt.cell].alone:
                alone[cell_prompt.cell].append(cell_prompt)
            else:
                by_width = joining if cell_prompt.block > INPUT else from_input
                by_width[self._width_of(cell_prompt, columns)].append(cell_prompt)
        jobs = [Job(columns, tuple(group)) for group in alone.values()]
        jobs += _cheapest_jobs(from_input, self.lm)[1] + self._joining_jobs(joining, budget)
        parts: list[Job] = []
        for job in jobs:
            n_rows = max(1, budget // 2 // self.row_bytes(job.width, columns))
            parts += [job] if job.packed else job.split(n_rows)
        is_one = len(parts) == 1 and parts[0].packed
        if is_one and together and self._can_join_unedited(rows):
            whole = parts[0].with_unedited(rows, columns)
            is_cheap = self.packed_cost(whole) < self.packed_cost(parts[0]) + self._base_cost(rows)
            if is_cheap and self.packed_bytes(whole) <= budget // 2:
                return [whole]
        return parts

    def _can_join_unedited(self, rows: Sequence[int]) -> bool:
        """True if unedited prompts may be packed. The values with which the sources of patches are
        compared come in one tensor only from prompts of one length."""
        return not self._has_patches or len({self.inputs.lengths[row] for row in rows}) == 1

    @cached_property
    def _has_patches(self) -> bool:
        """True if a cell has a patch. Owned by this plan."""
        bound_hooks = chain.from_iterable(cell.bound_hooks for cell in self.cells)
        return any(patch_source(bound) is not None for bound in bound_hooks)

    def _base_cost(self, rows: Sequence[int]) -> int:
        """Returns the cost of the unedited prompts in a forward of their own."""
        n_tokens = len(rows) * self.inputs.count_columns(rows)
        return (n_tokens + _fixed_cost(self.lm)) * self.lm.n_layers

    def _joining_jobs(self, by_width: Mapping[int, Sequence[CellPrompt]], budget: int) -> list[Job]:
        """Returns the cheapest forwards for cell prompts that join at blocks, packed or not."""
        cost, jobs = _cheapest_jobs(by_width, self.lm)
        others: dict[int, list[CellPrompt]] = defaultdict(list)  # those that cannot be packed
        packable: list[CellPrompt] = []
        least = self.inputs.count_read(range(len(self.inputs)))
        for width, cell_prompts in by_width.items():
            for cell_prompt in cell_prompts:
                is_long = self.inputs.lengths[cell_prompt.row] >= least
                can_be_packed = is_long and cell_prompt.cell in self.packable_cells
                (packable if can_be_packed else others[width]).append(cell_prompt)
        if not packable:
            return jobs
        rest = {width: others[width] for width in others if others[width]}
        cost_of_rest, jobs_of_rest = _cheapest_jobs(rest, self.lm)
        for size in PACKED_TOKENS:
            packed = self._packed_jobs(packable, size)
            if max(map(self.packed_bytes, packed)) > budget // 2:
                continue
            cost_with = cost_of_rest + sum(map(self.packed_cost, packed))
            if cost_with < cost:
                cost, jobs = cost_with, [*jobs_of_rest, *packed]
        return jobs

    @cached_property
    def packable_cells(self) -> frozenset[int]:
        """The cells that may be packed. Owned by this plan."""
        lm, is_allowed = self.lm, self.shortcuts.pack and not self.inputs.all_logits
        if not is_allowed or not can_pack(lm, self.base_hook_points):
            return frozenset()
        return frozenset(cell.number for cell in self.cells if can_pack(lm, cell.hook_points))

    def _packed_jobs(self, cell_prompts: Iterable[CellPrompt], size: int) -> list[Job]:
        """Returns jobs of at most so many tokens, if each cell prompt has fewer."""
        jobs: list[Job] = []
        group: list[CellPrompt] = []
        n_tokens = longest = 0
        least = self.inputs.count_read(range(len(self.inputs)))
        for cell_prompt in sorted(cell_prompts):
            width = max(least, self.inputs.width_of(cell_prompt.row, cell_prompt.pos))
            if group and n_tokens + width > size:
                jobs.append(Job(longest, tuple(group), packed=True))
                group, n_tokens, longest = [], 0, 0
            group.append(cell_prompt)
            n_tokens, longest = n_tokens + width, max(longest, width)
        jobs.append(Job(longest, tuple(group), packed=True))
        return jobs

    def packed_cost(self, job: Job) -> float:
        """Returns the cost of a packed job, as that of `_cheapest_jobs`. Each token is compared
        with all keys, for which it costs a part of what it costs in a block's matrices."""
        counts, n_prefix = self._packed_counts(job)
        per_key = 1 / (4 * max(1, self.lm.sizes["d_model"] or 0))
        cost = sum(count * (1 + (n_prefix + count) * per_key) for count in counts)
        return cost + _fixed_cost(self.lm) * max(_block_counts(job.cell_prompts, self.lm.n_layers))

    def _packed_counts(self, job: Job) -> tuple[list[int], int]:
        """Returns how many tokens of a packed job are in each block, and of how many positions of
        the unedited prompts there are keys, at most."""
        widths = token_widths(self.inputs, job)
        columns = self.inputs.count_columns(range(len(self.inputs)))
        n_prefix = 0 if job.n_unedited else len(set(job.rows)) * (columns - min(widths))
        return job.counts_by_block(widths, self.lm.n_layers), n_prefix

    def packed_bytes(self, job: Job) -> int:
        """Returns about how much memory a packed job takes at its peak."""
        counts, n_prefix = self._packed_counts(job)
        n_tokens, n_keys = counts[-1], counts[-1] + n_prefix
        sizes = {name: size or 0 for name, size in self.lm.sizes.items()}
        mlp = sizes.get("d_mlp") or 4 * sizes["d_model"]
        activations = n_tokens * (8 * sizes["d_model"] + 3 * mlp) + n_keys * 4 * sizes["d_model"]
        attention = (sizes.get("head") or 1) * n_tokens * n_keys
        n_logits = self.inputs.count_read(job.rows) * self.tokens_computed
        return self.number_bytes * (activations + attention) + 12 * n_logits * len(job.rows)

    def _width_of(self, cell_prompt: CellPrompt, columns: int) -> int:
        """Returns how many of the last positions a cell prompt has to run."""
        if not self.shortcuts.prefix:
            return columns
        return self.inputs.width_of(cell_prompt.row, cell_prompt.pos)

    def bytes_of(self, columns: int, job: Job) -> int:
        """Returns about how much memory a job takes at its peak."""
        if job.packed:
            return self.packed_bytes(job)
        return len(job.cell_prompts) * self.row_bytes(job.width, columns)

    def row_bytes(self, width: int, columns: int) -> int:
        """Returns about how much memory a row of a forward takes at its peak: its activations in a
        block, the keys and values that it reads, the mask, and its logits three times."""
        sizes = {name: size or 0 for name, size in self.lm.sizes.items()}
        mlp = sizes.get("d_mlp") or 4 * sizes["d_model"]
        activations = width * (8 * sizes["d_model"] + 3 * mlp)
        heads = sizes.get("head") or 1
        attention = columns * 4 * sizes["d_model"] + heads * width * columns
        n_logits = self.inputs.count_logits(range(len(self.inputs)), width) * self.tokens_computed
        return self.number_bytes * (activations + attention) + 12 * n_logits

    @cached_property
    def number_bytes(self) -> int:
        return torch.finfo(getattr(self.lm.root, "dtype", torch.float32)).bits // 8
