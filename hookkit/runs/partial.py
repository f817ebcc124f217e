"""SharedForward: one forward for many cells of a sweep; each cell's hooks act on its own rows.

The batch grows as it passes the blocks. A row joins at the first block where its cell differs from
the unedited row, with the hidden state that the unedited row has there. The hooks of each cell see
its rows alone, as they would in a forward of their own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from threading import get_ident
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import Unsupported
from ..models.batch_positions import ForwardPass, SequenceBatch
from ..models.families.schema import ModuleLocation
from ..models.lm import LM
from ..models.overrides import MethodReplacement, Overrides
from ..models.sites import AnySite
from .acting import apply_hook
from .dispatch import replace_input
from .manager import ForwardBoundary, HookManager
from .taps import BoundHook, HookPoint, find_input

Path: TypeAlias = tuple[Any, ...]
"""Where a value is among the arguments of a block: indices and keywords."""

Factors: TypeAlias = Mapping[tuple[int, Path], int]
"""By block and path: the entries of axis 0 that an argument has for each row; 0 without rows."""


class NotByRow(Unsupported):
    """A tensor that has no axis of rows, so that cells cannot share a forward.

    `hook_point` is where it is.
    """

    def __init__(self, message: str, hook_point: HookPoint | None = None) -> None:
        super().__init__(message)
        self.hook_point = hook_point


@dataclass(eq=False)
class CellRows:
    """The rows of one cell in a batch: from `start` to before `stop`, of the prompts `rows`."""

    rows: tuple[int, ...]
    start: int
    stop: int
    call: ForwardPass


HooksByCell: TypeAlias = dict[HookPoint, list[tuple[CellRows, list[BoundHook]]]]
"""For each hook point the hooks of each cell there."""


@dataclass(frozen=True, eq=False)
class JoinSchedule:
    """How the batch grows.

    first    the first block that runs; those before it are skipped
    counts   the number of rows in each block
    states   the hidden states of the unedited rows that join: block -> [row, pos, d_model]
    prompts  for each row, the index of a row that the model itself is called with
    base     the number of rows that the model itself is called with
    kinds    the output of each skipped block: 0 for a tensor, or the number of values
    factors  which arguments of a block have rows
    """

    first: int
    counts: Sequence[int]
    states: Callable[[int], Tensor]
    prompts: Sequence[int]
    base: int
    kinds: Sequence[int]
    factors: Factors


@dataclass(eq=False)
class Recorder:
    """Stores the input of some blocks at the last `width` positions. Owned by the caller."""

    blocks: Sequence[int]
    width: int
    states: dict[int, Tensor] = field(default_factory=dict)

    def note(self, block: int, hidden: Tensor) -> None:
        """Stores a copy of the input of a block."""
        self.states[block] = hidden[:, -self.width :].detach().clone()


class SharedForward(HookManager):
    """A forward in which each cell has hooks of its own. Used once."""

    def __init__(
        self,
        lm: LM,
        lanes: Sequence[tuple[CellRows, Sequence[HookPoint]]],
        growth: JoinSchedule | None = None,
        recorder: Recorder | None = None,
        *,
        rows: int,
        width: int,
        alone: bool = False,
    ) -> None:
        super().__init__(lm, (), alone=alone)
        self.growth, self.recorder = growth, recorder
        self.count = rows  # the number of rows at this moment
        self.width = width
        self.hook_points: list[HookPoint] = []
        self._hooks: HooksByCell = {}
        self._hooks_before: HooksByCell = {}  # those that act before the batch begins to grow
        self._before_growth = growth is not None
        self._add_cells(lanes, self._hooks)
        text = SequenceBatch([], [], lambda row: (), lambda ids, at: ())
        self._whole_pass = ForwardPass(text, 0, 0, rows, width, range(width), 0)
        # by id, a tensor that all blocks share and its expansion to all rows; the tensor is stored
        # so that its id is not used again
        self._expanded: dict[int, tuple[Tensor, Tensor]] = {}

    def act_before_the_blocks(self, lane: CellRows, hook_points: Sequence[HookPoint]) -> None:
        """Adds hooks that act on the rows of the model itself, until the first block runs."""
        self._add_cells([(lane, hook_points)], self._hooks_before)

    def _add_cells(
        self, lanes: Sequence[tuple[CellRows, Sequence[HookPoint]]], hooks_by_cell: HooksByCell
    ) -> None:
        """Adds the hooks of cells; the hook points of all cells at one location become one."""
        merged: dict[ModuleLocation, HookPoint] = {
            hook_point.place: hook_point for hook_point in self.hook_points
        }
        for lane, hook_points in lanes:
            for hook_point in hook_points:
                location = hook_point.place
                shared = merged.get(location)
                if shared is None:
                    shared = HookPoint(hook_point.module, location, [], copies_output=False)
                    merged[location] = shared
                shared.reads_input |= hook_point.reads_input
                cells = hooks_by_cell.setdefault(shared, [])
                if cells and cells[-1][0] is lane:
                    cells[-1][1].extend(hook_point.actions)
                else:
                    cells.append((lane, list(hook_point.actions)))
        self.hook_points = sorted(
            merged.values(), key=lambda hook_point: not hook_point.place.shared
        )

    # ---- at the blocks

    def _register(self, lent: Overrides) -> None:
        super()._register(lent)
        growth, recorder = self.growth, self.recorder
        if growth is None and recorder is None:
            return
        for number in range(self.lm.n_layers):
            block = self.lm.submodule(self.lm.family.block.format(layer=number))
            if growth is not None and number < growth.first:
                lent.around(block, "forward", skip_block(growth.kinds[number]))
            elif growth is not None or (recorder is not None and number in recorder.blocks):
                hook = ForwardBoundary(self._on_block_input, number)
                self._register_first(lent, block, hook)

    def _on_block_input(
        self,
        number: int,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Records the input of a block, and lets rows join there."""
        if self._forward_thread != get_ident():
            return None
        assert kwargs is not None
        hidden, key = find_input(args, kwargs, 0, f"block {number}")
        if self.recorder is not None and number in self.recorder.blocks:
            self.recorder.note(number, hidden)
        if self.growth is None:
            return None
        hidden = self._with_joining_rows(self.growth, number, hidden)
        args = tuple(
            self._for_all_rows(self.growth, number, (index,), value)
            for index, value in enumerate(args)
        )
        kwargs = {
            name: self._for_all_rows(self.growth, number, (name,), value)
            for name, value in kwargs.items()
        }
        return replace_input(args, kwargs, key, hidden)

    def _with_joining_rows(self, growth: JoinSchedule, number: int, hidden: Tensor) -> Tensor:
        """The rows of a block: those of the block before, then those that join at this block."""
        before = 0
        if number > growth.first:
            before = growth.counts[number - 1]
        self.count, self._before_growth = growth.counts[number], False
        if self.count == before:
            return hidden
        joining = growth.states(number).to(hidden.device)
        if not before:
            return joining
        return torch.cat([hidden, joining])

    def _for_all_rows(self, growth: JoinSchedule, number: int, path: Path, value: Any) -> Any:
        """An argument of a block, with an entry for each row at this moment."""
        if isinstance(value, Tensor):
            return self._expand_rows(growth, number, path, value)
        if isinstance(value, tuple | list) and not hasattr(value, "_fields"):
            return type(value)(
                self._for_all_rows(growth, number, (*path, index), item)
                for index, item in enumerate(value)
            )
        if type(value) is dict:
            return {
                name: self._for_all_rows(growth, number, (*path, name), item)
                for name, item in value.items()
            }
        return value

    def _expand_rows(self, growth: JoinSchedule, number: int, path: Path, tensor: Tensor) -> Tensor:
        factor = growth.factors.get((number, path))
        if factor is None:
            raise NotByRow(
                f"block {number} is given a tensor {list(tensor.shape)} at {path}, which no trial "
                "showed"
            )
        if factor == 0 or tensor.shape[0] != factor * growth.base:
            return tensor
        if id(tensor) not in self._expanded:
            # what all blocks share is expanded once, to all the rows that will join
            prompts = torch.tensor(growth.prompts, device=tensor.device)
            by_row = tensor.unflatten(0, (growth.base, factor))
            expanded = by_row.index_select(0, prompts).flatten(0, 1)
            self._expanded[id(tensor)] = tensor, expanded
        _, expanded = self._expanded[id(tensor)]
        return expanded[: self.count * factor]

    # ---- at the hook points

    def _begin_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> ForwardPass:
        return self._whole_pass

    def _site(self, hook_point: HookPoint) -> AnySite:
        cells = self._hooks.get(hook_point) or self._hooks_before[hook_point]
        _, bound_hooks = cells[0]
        return bound_hooks[0].site

    def _apply_to_whole(
        self,
        hook_point: HookPoint,
        forward_pass: ForwardPass,
        tensor: Tensor,
        module_input: Tensor | None,
    ) -> Tensor:
        hooks_by_cell = self._hooks_before if self._before_growth else self._hooks
        result = tensor
        self._hook_thread = self._forward_thread
        try:
            for lane, bound_hooks in hooks_by_cell.get(hook_point, ()):
                if lane.stop > self.count:
                    continue  # it joins later, with a state in which these edits are done
                part = new = self._rows_of(lane, hook_point, result)
                input_part = None
                if module_input is not None:
                    input_part = self._rows_of(lane, hook_point, module_input)
                for bound_hook in bound_hooks:
                    new = _apply_hook_of_cell(bound_hook, hook_point, lane, new, input_part)
                if new is part:
                    continue
                if lane.stop - lane.start == self.count:
                    result = new
                    continue
                if result is tensor:
                    result = self._copy_by_row(tensor)
                self._rows_of(lane, hook_point, result).copy_(new)
        finally:
            self._hook_thread = 0
        return result

    def _rows_of(self, lane: CellRows, hook_point: HookPoint, tensor: Tensor) -> Tensor:
        """The rows of a cell in a tensor."""
        if lane.stop - lane.start == self.count:
            return tensor  # no other cell is in the forward
        length = tensor.shape[0] if tensor.ndim else 0
        if tensor.ndim and length == self.count:
            return tensor[lane.start : lane.stop]
        is_flat = hook_point.place.flat or tensor.ndim == 2
        if tensor.ndim and length == self.count * self.width and is_flat:
            return tensor[lane.start * self.width : lane.stop * self.width]
        if tensor.ndim > 1 and length == 1:
            return tensor
        raise NotByRow(
            f"{hook_point.place.path} has a tensor {list(tensor.shape)}, and {self.count} rows ran",
            hook_point,
        )

    def _copy_by_row(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor, with an entry for each row."""
        if tensor.shape[0] == 1 and self.count > 1:
            return tensor.expand(self.count, *tensor.shape[1:]).clone()
        return tensor.clone()


def _apply_hook_of_cell(
    bound_hook: BoundHook,
    hook_point: HookPoint,
    lane: CellRows,
    tensor: Tensor,
    module_input: Tensor | None,
) -> Tensor:
    try:
        _, new = apply_hook(bound_hook, hook_point, lane.call, tensor, module_input)
    except Exception as error:
        error.add_note(f"in {bound_hook.hook} at {bound_hook.site}, in a sweep")
        raise
    return new


def skip_block(kind: int) -> MethodReplacement:
    """Returns what runs in place of a block's forward, to skip the block: it returns its input.

    `kind` is 0 if the block returns a tensor, or the number of values that it returns.
    """
    return partial(_return_input, kind)


def _return_input(kind: int, inner: Any, /, *args: Any, **kwargs: Any) -> Any:
    hidden, _ = find_input(args, kwargs, 0, "a block")
    if not kind:
        return hidden
    return (hidden, *[None] * (kind - 1))
