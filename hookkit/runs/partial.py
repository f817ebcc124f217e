"""SharedForward: one forward for many cells of a sweep; each cell's hooks act on its own rows.

The batch may grow as it passes the blocks (see `growing_batch`). The hooks of each cell see its
rows alone, as they would in a forward of their own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

from torch import Tensor, nn

from ..models.batch_positions import ForwardPass, SequenceBatch
from ..models.families.schema import ModuleLocation
from ..models.lm import LM
from .applied_hooks import apply_hook, forget, settle
from .dispatch import find_input
from .growing_batch import GrowingBatch, NotByRow, PackedTokens
from .hook_points import BoundHook, HookPoint, in_order_of_registration
from .manager import ForwardBoundary, HookBlock


@dataclass(eq=False)
class CellRows:
    """The rows of one cell in a batch: from `start` to before `stop`, of the prompts `rows`.

    In a packed batch they are the tokens from `start` to before `stop`.
    """

    rows: tuple[int, ...]
    start: int
    stop: int
    call: ForwardPass


HooksByCell: TypeAlias = dict[HookPoint, list[tuple[CellRows, list[BoundHook]]]]
"""For each hook point the hooks of each cell there."""


@dataclass(eq=False)
class Recorder:
    """Receives the input of some blocks at the last `width` positions. Owned by the caller."""

    blocks: Sequence[int]
    width: int
    states: dict[int, Tensor] = field(default_factory=dict)


class SharedForward:
    """A forward in which each cell has hooks of its own. Used once.

    It is the `HookStrategy` of its block.
    """

    def __init__(
        self,
        lm: LM,
        lanes: Sequence[tuple[CellRows, Sequence[HookPoint]]],
        growth: GrowingBatch | None = None,
        recorder: Recorder | None = None,
        *,
        rows: int,
        width: int,
    ) -> None:
        self.lm, self.growth, self.recorder = lm, growth, recorder
        self.count = rows  # the number of rows, or of packed tokens, at this moment
        self.width = width
        self._hook_points: dict[ModuleLocation, HookPoint] = {}
        self._hooks: HooksByCell = {}
        self._hooks_before: HooksByCell = {}  # those that act before the batch begins to grow
        self._before_growth = growth is not None
        self._is_packed = False  # at this moment
        for lane, hook_points in lanes:
            self._add_cell(lane, hook_points, self._hooks)
        text = SequenceBatch([], [], lambda row: (), lambda ids, at: ())
        self._whole_pass = ForwardPass(text, 0, 0, rows, width, range(width), 0)

    def act_before_the_blocks(self, lane: CellRows, hook_points: Sequence[HookPoint]) -> None:
        """Adds hooks that act on the rows of the model itself, until the first block runs."""
        self._add_cell(lane, hook_points, self._hooks_before)

    def _add_cell(
        self, lane: CellRows, hook_points: Sequence[HookPoint], hooks_by_cell: HooksByCell
    ) -> None:
        """Adds the hooks of a cell; the hook points of all cells at one location become one."""
        for hook_point in hook_points:
            location = hook_point.location
            shared = self._hook_points.get(location)
            if shared is None:
                shared = HookPoint(hook_point.module, location, [])
                self._hook_points[location] = shared
            shared.reads_input |= hook_point.reads_input
            shared.transcoded |= hook_point.transcoded
            shared.actions.extend(hook_point.actions)
            hooks_by_cell.setdefault(shared, []).append((lane, hook_point.actions))

    def run(
        self,
        arguments: Mapping[str, Any],
        add_changes: Callable[[HookBlock], None] | None = None,
        *,
        alone: bool = False,
    ) -> Any:
        """Calls the model and returns its output.

        `add_changes` and `alone` are those of a `HookBlock`.
        """
        hook_points = in_order_of_registration(self._hook_points.values())
        add_changes = add_changes or self._change_blocks
        block = HookBlock(self.lm, hook_points, lambda: self, add_changes, alone=alone)
        try:
            with block:
                return self.lm.model(**arguments)
        finally:
            block.close()  # again, since Ctrl-C may have come before `__exit__` began

    # ---- at the blocks

    def _change_blocks(self, hook_block: HookBlock) -> None:
        growth = self.growth
        for number in range(self.lm.n_layers):
            block = self.lm.submodule(self.lm.family.block.format(layer=number))
            if growth is not None and number < growth.first:
                skip = partial(skip_block, growth.kinds[number])
                hook_block.overrides.wrap_method(block, "forward", skip)
            elif growth is not None or self._records(number):
                on_input = partial(self._on_block_input, number, block)
                hook = ForwardBoundary(hook_block.dispatcher.if_in_forward, on_input)
                hook_block.register_at_input(block, hook)
            if isinstance(growth, PackedTokens) and number == self.lm.n_layers - 1:
                unpack = partial(self._unpack, growth)
                hook_block.overrides.wrap_method(block, "forward", unpack)

    def _records(self, number: int) -> bool:
        return self.recorder is not None and number in self.recorder.blocks

    def _on_block_input(
        self, number: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Records the input of a block, and lets rows join there."""
        if self.recorder is not None and self._records(number):
            hidden, _ = find_input(args, kwargs, 0, f"block {number}")
            self.recorder.states[number] = hidden[:, -self.recorder.width :].detach().clone()
        growth = self.growth
        if growth is None:
            return None
        self.count, self._before_growth = growth.counts[number], False
        self._is_packed = isinstance(growth, PackedTokens)
        return growth.grow(number, block, args, kwargs)

    def _unpack(self, growth: PackedTokens, inner: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Runs in place of the last block's forward, after which the batch has rows again."""
        output = growth.unpack(inner, *args, **kwargs)
        self.count, self._is_packed = len(growth.last), False
        return output

    # ---- at the hook points

    def accepts_forward(self) -> bool:
        return True

    def begin_forward(self, arguments: Mapping[str, Any]) -> ForwardPass:
        for hook_point in self._hook_points.values():
            forget(hook_point.actions)
        return self._whole_pass

    def begin_stack(self, stack: str, arguments: Mapping[str, Any]) -> None:
        """Nothing: a sweep runs no encoder by itself."""

    def end_forward(self, forward_pass: ForwardPass, output: Any) -> None:
        for hook_point in self._hook_points.values():
            settle(hook_point.actions)

    def finish(self) -> None:
        pass

    def apply(
        self,
        hook_point: HookPoint,
        forward_pass: ForwardPass,
        tensor: Tensor,
        module_input: Tensor | None,
        *,
        recomputing: bool,
    ) -> Tensor:
        hooks_by_cell = self._hooks_before if self._before_growth else self._hooks
        result = tensor
        for lane, bound_hooks in hooks_by_cell.get(hook_point, ()):
            if lane.stop > self.count:
                continue  # it joins later, with a state in which these edits are done
            part, input_part = self._rows_of(lane, hook_point, result), None
            if module_input is not None:
                input_part = self._rows_of(lane, hook_point, module_input)
            new = _apply_in_cell(lane, bound_hooks, hook_point, part, input_part)
            if new is part:
                continue
            if self._is_alone(lane):
                result = new
                continue
            if result is tensor:
                result = self._copy_by_row(tensor)
            self._rows_of(lane, hook_point, result).copy_(new)
        return result

    def _is_alone(self, lane: CellRows) -> bool:
        """True if no other cell is in the forward at this moment."""
        return lane.stop - lane.start == self.count and not self._is_packed

    def _rows_of(self, lane: CellRows, hook_point: HookPoint, tensor: Tensor) -> Tensor:
        if self._is_alone(lane):
            return tensor
        length, width = len(tensor) if tensor.ndim else 0, self.width
        is_flat = hook_point.location.flat or tensor.ndim == 2
        if self._is_packed and not is_flat and tensor.shape[:2] == (1, self.count):
            return tensor[0, lane.start : lane.stop].unflatten(0, lane.call.shape)
        if length == self.count:
            return tensor[lane.start : lane.stop]
        if not self._is_packed:
            if is_flat and length == self.count * width:
                return tensor[lane.start * width : lane.stop * width]
            if length == 1 and tensor.ndim > 1:
                return tensor
        raise NotByRow(
            f"{hook_point.location.path} has a tensor {list(tensor.shape)}, and {self.count} "
            "rows ran",
            hook_point,
        )

    def _copy_by_row(self, tensor: Tensor) -> Tensor:
        if tensor.shape[0] == 1 and self.count > 1 and not self._is_packed:
            return tensor.expand(self.count, *tensor.shape[1:]).clone()
        return tensor.clone()


def _apply_in_cell(
    lane: CellRows,
    bound_hooks: list[BoundHook],
    hook_point: HookPoint,
    tensor: Tensor,
    module_input: Tensor | None,
) -> Tensor:
    """Returns the rows of a cell after its hooks."""
    hook_point.begin(lane.call)
    for bound_hook in bound_hooks:
        try:
            _, tensor = apply_hook(bound_hook, hook_point, lane.call, tensor, module_input)
        except Exception as error:
            error.add_note(f"in {bound_hook.hook} at {bound_hook.site}, in a sweep")
            raise
    hook_point.end(lane.call, tensor)
    return tensor


def skip_block(kind: int, inner: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Runs in place of a block's forward, to skip the block: returns its input.

    `kind` is 0 if the block returns a tensor, or the number of values that it returns.
    """
    hidden, _ = find_input(args, kwargs, 0, "a block")
    if not kind:
        return hidden
    return (hidden, *[None] * (kind - 1))
