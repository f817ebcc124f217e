"""The end of a model, applied to any state of its residual stream: final norm, head, cap and scale.

The model's own forward runs with every block skipped and the state in place of the last block's
output. Whatever a family does after its blocks is therefore done by the family's own code.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import Unsupported
from ..hooks.base import Hook
from ..hooks.capture import Captured
from ..models.batch_positions import ForwardPass, SequenceBatch
from ..models.lm import LM, logits_of
from ..models.named_positions import find_positions
from ..models.overrides import MethodReplacement, skip_hooks
from ..models.prompts import Row, pad_id
from ..models.sites import Site
from .dispatch import find_input
from .hook_points import BoundHook, HookPoint, build_hook_points
from .manager import HookBlock, RegisteredHook, capture_reference
from .partial import CellRows, SharedForward, skip_block


@dataclass(frozen=True)
class Ending:
    """How a model ends.

    kinds   what each block returns: a tensor (0), or a tuple of this length whose first item is the
            stream
    begun   the modules that start to run after the last block
    ended   the modules that end there: the model itself too
    """

    kinds: tuple[int, ...]
    begun: frozenset[str]
    ended: frozenset[str]

    def has(self, tap: HookPoint) -> bool:
        """True if this module input or output is after the blocks."""
        return tap.location.path in (self.begun if tap.location.side == "input" else self.ended)

    def edits(self, tap: HookPoint) -> list[BoundHook]:
        """Returns the edits at this module input or output, if it is after the blocks."""
        if not self.has(tap):
            return []
        return [action for action in tap.actions if action.change is not None]


def find_ending(lm: LM) -> Ending:
    """Returns how this model ends, observed in a forward of one token.

    Raises `Unsupported` if the model's blocks are not known.
    """
    if not lm.n_layers or "resid_post" not in lm.layout.names:
        raise Unsupported(
            f"the blocks of {type(lm.root).__name__} are not known, so nothing can be put "
            "after them"
        )
    if "ending" not in lm.trial_results:
        lm.trial_results["ending"] = _observe_ending(lm)
    return lm.trial_results["ending"]


def _observe_ending(lm: LM) -> Ending:
    blocks = _blocks_of(lm)
    inside = _modules_inside(blocks)
    kinds: dict[int, int] = {}
    begun: set[str] = set()
    ended: set[str] = set()

    def run_block(number: int, inner: Any, /, *args: Any, **kwargs: Any) -> Any:
        output = inner(*args, **kwargs)
        kinds[number] = 0
        if isinstance(output, tuple):
            kinds[number] = len(output)
        return output

    def run_module(path: str, inner: Any, /, *args: Any, **kwargs: Any) -> Any:
        if len(kinds) == len(blocks):
            begun.add(path)
        output = inner(*args, **kwargs)
        if len(kinds) == len(blocks):
            ended.add(path)
        return output

    def wrap_modules(hook_block: HookBlock) -> None:
        _skip_hooks_inside_blocks(hook_block)
        for number, block in enumerate(blocks):
            hook_block.overrides.wrap_method(block, "forward", partial(run_block, number))
        for path, module in lm.root.named_modules():
            if module not in inside:
                hook_block.overrides.wrap_method(module, "forward", partial(run_module, path))

    with torch.no_grad():
        SharedForward(lm, (), rows=1, width=1).run(_inputs(lm, 1), wrap_modules, alone=True)
    kinds_in_order = tuple(map(kinds.__getitem__, range(len(blocks))))
    return Ending(kinds_in_order, frozenset(begun), frozenset(ended))


def _blocks_of(lm: LM) -> list[torch.nn.Module]:
    return [lm.submodule(lm.family.block.format(layer=number)) for number in range(lm.n_layers)]


def _modules_inside(blocks: Sequence[torch.nn.Module]) -> set[torch.nn.Module]:
    return set(itertools.chain.from_iterable(map(torch.nn.Module.modules, blocks)))


def _inputs(lm: LM, rows: int) -> dict[str, Any]:
    ids = torch.full((rows, 1), pad_id(lm), device=lm.device)
    settings = lm.accepted(use_cache=False, return_dict=True)
    if not lm.two_texts:
        return {"input_ids": ids, **settings}
    from transformers.modeling_outputs import BaseModelOutput

    # what the decoder reads of a source does not matter after its blocks
    width = lm.layout.stacks["encoder"].sizes["d_model"] or 1
    dtype = getattr(lm.root, "dtype", None)
    states = torch.zeros(rows, 1, width, dtype=dtype, device=lm.device)
    encoder_outputs = BaseModelOutput(last_hidden_state=states)  # pyright: ignore
    return {"decoder_input_ids": ids, "encoder_outputs": encoder_outputs, **settings}


def _skip_hooks_inside_blocks(hook_block: HookBlock) -> None:
    """Lets the modules inside the model's blocks be called without their hooks.

    Those hooks must not act on a state that is inserted after the blocks. The user's own hooks on
    modules after the blocks still act: they are part of the model's output.
    """
    for module in _modules_inside(_blocks_of(hook_block.lm)):
        if module._forward_hooks or module._forward_pre_hooks:
            skip_hooks(module, hook_block.overrides)


class _HeadReached(Exception):
    """Ends a forward at the head. Its argument is the head's input."""


@dataclass(frozen=True, eq=False)
class Cells:
    """Captured rows and positions: the `index` and `column` of each in the captured values, and the
    prompt (`rows`) and the position in its text that it is."""

    index: Int[Tensor, " cell"]
    column: Int[Tensor, " cell"]
    rows: Int[Tensor, " cell"]
    positions: Int[Tensor, " cell"]

    def select(self, selection: slice | Tensor) -> "Cells":
        """Returns some of the cells."""
        return Cells(*[numbers[selection] for numbers in vars(self).values()])


def cells_of(captured: Captured) -> Cells:
    """Returns each captured row and position."""
    assert captured.positions is not None
    index, column = (captured.positions >= 0).nonzero(as_tuple=True)
    rows = torch.tensor(captured.rows)[index]
    return Cells(index, column, rows, captured.positions[index, column])


@dataclass(frozen=True, eq=False)
class Read:
    """The head's `input` [state, d] and `raw` output [state, vocab], and the model's `logits`,
    which are `raw` after a soft-cap or scale."""

    input: Float[Tensor, "state d"]
    raw: Float[Tensor, "state vocab"]
    logits: Float[Tensor, "state vocab"]


@dataclass(frozen=True, eq=False)
class ModelEnd:
    """What comes after the blocks of a model, for states of these prompts. Made by `model_end_of`.

    `taps` are the actions of hooks after the blocks, at each state's own row and position.
    """

    lm: LM
    kinds: tuple[int, ...]
    taps: Sequence[HookPoint]
    rows: tuple[Row, ...]

    @property
    def _head_path(self) -> str:
        return self.lm.location(Site("lm_head")).path

    def logits(
        self, states: Float[Tensor, "state d_model"], cells: Cells | None = None
    ) -> Float[Tensor, "state vocab"]:
        """Returns the model's logits for each state; hooks need its row and position in `cells`."""
        if not self.taps:
            return self._run(states)
        assert cells is not None
        parts = []
        order = cells.positions.argsort(stable=True)
        positions, counts = cells.positions.unique(return_counts=True)
        pieces = order.split(counts.tolist())
        for pos, numbers in zip(positions.tolist(), pieces, strict=True):
            # hooks see a forward of one position
            lane = self._lane(cells.rows[numbers].tolist(), pos)
            parts.append(self._run(states[numbers], [(lane, self.taps)]))
        return torch.cat(parts)[order.argsort()]

    def head_input(self, states: Float[Tensor, "state d_model"]) -> Float[Tensor, "state d"]:
        """Returns the head's input for each state, without any hook; the head does not run."""

        def stop(inner: Any, /, *args: Any, **kwargs: Any) -> Any:
            raise _HeadReached(find_input(args, kwargs, 0, self._head_path)[0])

        try:
            self._run(states, head=stop)
        except _HeadReached as reached:
            return reached.args[0].reshape(len(states), -1)
        raise AssertionError("the head was not called")

    def read(self, states: Float[Tensor, "state d_model"]) -> Read:
        """Returns the head's input and output and the logits for each state, without any hook."""
        calls: list[Tensor] = []

        def record(inner: Any, /, *args: Any, **kwargs: Any) -> Any:
            output = inner(*args, **kwargs)
            calls[:] = find_input(args, kwargs, 0, self._head_path)[0], output
            return output

        logits = self._run(states, head=record)
        head_input, output = calls
        count = len(states)
        return Read(head_input.reshape(count, -1), output.reshape(count, -1), logits)

    def _lane(self, prompts: list[int], pos: int) -> CellRows:
        lengths = list(map(len, self.rows))
        columns: list[Any] = list(map(range, lengths))
        find = partial(find_positions, self.lm)
        batch = SequenceBatch(
            columns, lengths, self.rows.__getitem__, find, final=True, numbers=prompts
        )
        count = len(prompts)
        forward_pass = ForwardPass(batch, 0, pos, count, 1, range(1), pos)
        return CellRows(tuple(prompts), 0, count, forward_pass)

    def _run(
        self,
        states: Tensor,
        lanes: Sequence[tuple[CellRows, Sequence[HookPoint]]] = (),
        head: MethodReplacement | None = None,
    ) -> Float[Tensor, "state vocab"]:
        """Runs the model with the states as its last block's output; `head` replaces the head."""
        *skipped, last = _blocks_of(self.lm)
        output: Any = states[:, None]
        if self.kinds[-1]:
            output = (output, *[None] * (self.kinds[-1] - 1))

        def replace_modules(hook_block: HookBlock) -> None:
            _skip_hooks_inside_blocks(hook_block)
            overrides = hook_block.overrides
            for block, kind in zip(skipped, self.kinds, strict=False):
                overrides.wrap_method(block, "forward", partial(skip_block, kind))
            overrides.wrap_method(last, "forward", lambda *_, **__: output)
            if head is not None:
                overrides.wrap_method(self.lm.submodule(self._head_path), "forward", head)

        shared_forward = SharedForward(self.lm, lanes, rows=len(states), width=1)
        inputs = _inputs(self.lm, len(states))
        return logits_of(shared_forward.run(inputs, replace_modules, alone=True))[:, 0]


def model_end_of(lm: LM, hooks: Iterable[Hook], rows: tuple[Row, ...]) -> ModelEnd:
    """Returns what comes after the model's blocks, with those of the hooks that act there.

    Raises `Unsupported` if an edit of an outer `with` block acts there, since its rows and
    positions are not known.
    """
    end = find_ending(lm)
    _refuse_outer_edits(lm, end)
    taps = []
    for tap in build_hook_points(lm, list(hooks), partial(capture_reference, lm)):
        tap.actions = end.edits(tap)
        for bound_hook in tap.actions:
            if bound_hook.condition is not None and bound_hook.condition.readers:
                raise Unsupported(
                    f"{bound_hook.hook} asks about values inside the model, and a lens reads each "
                    "layer through what comes after the blocks alone: leave when= out, or give the "
                    "hook to hk.forward"
                )
        if tap.actions:
            taps.append(tap)
    return ModelEnd(lm, end.kinds, taps, rows)


def _refuse_outer_edits(lm: LM, end: Ending) -> None:
    for tap in itertools.chain.from_iterable(map(_outer_hook_points, map(lm.submodule, end.ended))):
        if end.edits(tap):
            raise Unsupported(
                f"{end.edits(tap)[0].hook} of hk.attach acts after the model's blocks, where a "
                "lens reads each layer: give it to the lens itself, as one of its hooks"
            )


def _outer_hook_points(module: torch.nn.Module) -> Iterator[HookPoint]:
    """Yields the inputs and outputs of a module at which hooks of hk.attach act."""
    for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
        if isinstance(hook, RegisteredHook) and hook.dispatcher.acts_here():
            yield from (tap for tap in hook.args if isinstance(tap, HookPoint))
