"""The end of a model, applied to any state of its residual stream: final norm, head, cap and scale.

The model's own forward runs with every block skipped and the state in place of the last block's
output. Whatever a family does after its blocks is therefore done by the family's own code.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import Unsupported
from ..hooks.base import Hook
from ..models.batch_positions import ForwardPass, SequenceBatch
from ..models.lm import LM
from ..models.overrides import Overrides, skip_hooks
from ..models.padding import logits_of
from ..models.prompts import Row, pad_id, positions_of_text
from ..models.sites import Site
from ..runs.manager import HookManager, RegisteredHook
from ..runs.partial import CellRows, SharedForward, skip_block
from ..runs.taps import HookPoint, build_hook_points, find_input


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
        return tap.place.path in (self.begun if tap.place.side == "input" else self.ended)


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


def _blocks_of(lm: LM) -> list[torch.nn.Module]:
    return [lm.submodule(lm.family.block.format(layer=number)) for number in range(lm.n_layers)]


def _ids_of_modules(blocks: Sequence[torch.nn.Module]) -> set[int]:
    """Returns the `id` of every module inside the blocks."""
    ids: set[int] = set()
    for block in blocks:
        ids.update(map(id, block.modules()))
    return ids


def _observe_ending(lm: LM) -> Ending:
    blocks = _blocks_of(lm)
    inside = _ids_of_modules(blocks)
    kinds: dict[int, int] = {}
    begun: set[str] = set()
    ended: set[str] = set()

    def run_block(number: int, inner: Any, /, *args: Any, **kwargs: Any) -> Any:
        output = inner(*args, **kwargs)
        kinds[number] = len(output) if isinstance(output, tuple) else 0
        return output

    def run_module(path: str, inner: Any, /, *args: Any, **kwargs: Any) -> Any:
        if len(kinds) == len(blocks):
            begun.add(path)
        output = inner(*args, **kwargs)
        if len(kinds) == len(blocks):
            ended.add(path)
        return output

    manager = _ObservingManager(lm, inside)
    with Overrides() as lent:
        for number, block in enumerate(blocks):
            lent.around(block, "forward", partial(run_block, number))
        for path, module in lm.root.named_modules():
            if id(module) not in inside:
                lent.around(module, "forward", partial(run_module, path))
        with torch.no_grad(), manager:
            lm.model(**_inputs(lm, 1))
    kinds_in_order = tuple([kinds[number] for number in range(len(blocks))])
    return Ending(kinds_in_order, frozenset(begun), frozenset(ended))


def _inputs(lm: LM, rows: int) -> dict[str, Any]:
    ids = torch.full((rows, 1), pad_id(lm), device=lm.device)
    return {"input_ids": ids, **lm.accepted(use_cache=False, return_dict=True)}


class _ObservingManager(HookManager):
    """Silences the hooks inside the model's blocks, and hookkit's own from outer `with` blocks.

    The user's own hooks on modules after the blocks still act: they are part of the model's output.
    """

    alone = True

    def __init__(self, lm: LM, inside: set[int]) -> None:
        super().__init__(lm, ())
        self.inside = inside

    def _register(self, lent: Overrides) -> None:
        silence(self.lm, self.inside, lent, self.acts_here)
        super()._register(lent)


def silence(lm: LM, inside: set[int], lent: Overrides, acts: Callable[[], bool]) -> None:
    """Calls the modules inside the model's blocks without their hooks.

    These hooks must not act on a state that is inserted after the blocks.
    """
    for module in lm.root.modules():
        if id(module) in inside and (module._forward_hooks or module._forward_pre_hooks):
            skip_hooks(module, lent, acts)


class _StreamEnd(SharedForward):
    """A forward of what comes after the blocks, with hooks there."""

    alone = True

    def __init__(
        self,
        lm: LM,
        kinds: Sequence[int],
        lanes: Sequence[tuple[CellRows, Sequence[HookPoint]]],
        states: Tensor,
    ) -> None:
        super().__init__(lm, lanes, rows=len(states), width=1)
        self.kinds, self.states = kinds, states

    def _register(self, lent: Overrides) -> None:
        blocks = _blocks_of(self.lm)
        silence(self.lm, _ids_of_modules(blocks), lent, self.acts_here)
        for block, kind in zip(blocks[:-1], self.kinds, strict=False):
            lent.around(block, "forward", skip_block(kind))
        output: Any = self.states[:, None]
        if self.kinds[-1]:
            output = (output, *[None] * (self.kinds[-1] - 1))
        lent.around(blocks[-1], "forward", lambda *_, **__: output)
        super()._register(lent)


class _HeadReached(Exception):
    """Ends a forward at the head. Its argument is the head's input."""


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

    def logits(
        self, states: Float[Tensor, "state d_model"], locations: Sequence[tuple[int, int]]
    ) -> Float[Tensor, "state vocab"]:
        """Returns the model's logits for each state; `locations` has its row and position."""
        if not self.taps:
            return self._run(states, [])
        rows_of_states: dict[int, Tensor] = {}
        for pos in sorted({pos for _, pos in locations}):  # hooks see a forward of one position
            numbers = [number for number, location in enumerate(locations) if location[1] == pos]
            cells = self._cells([locations[number][0] for number in numbers], pos)
            part = states[torch.tensor(numbers, device=states.device)]
            logits = self._run(part, [(cells, self.taps)])
            rows_of_states |= dict(zip(numbers, logits, strict=True))
        return torch.stack([rows_of_states[number] for number in range(len(locations))])

    def head_input(self, states: Float[Tensor, "state d_model"]) -> Float[Tensor, "state d"]:
        """Returns the head's input for each state, without any hook; the head does not run."""
        path = self.lm.place(Site("lm_head")).path

        def stop(inner: Any, /, *args: Any, **kwargs: Any) -> Any:
            raise _HeadReached(find_input(args, kwargs, 0, path)[0])

        with Overrides() as lent:
            lent.around(self.lm.submodule(path), "forward", stop)
            try:
                self._run(states, [])
            except _HeadReached as reached:
                return reached.args[0].reshape(len(states), -1)
        raise AssertionError("the head was not called")

    def read(self, states: Float[Tensor, "state d_model"]) -> Read:
        """Returns the head's input and output and the logits for each state, without any hook."""
        path = self.lm.place(Site("lm_head")).path
        calls: list[tuple[Tensor, Tensor]] = []

        def record(inner: Any, /, *args: Any, **kwargs: Any) -> Any:
            output = inner(*args, **kwargs)
            calls.append((find_input(args, kwargs, 0, path)[0], output))
            return output

        with Overrides() as lent:
            lent.around(self.lm.submodule(path), "forward", record)
            logits = self._run(states, [])
        head_input, output = calls[-1]
        count = len(states)
        return Read(head_input.reshape(count, -1), output.reshape(count, -1), logits)

    def _cells(self, prompts: list[int], pos: int) -> CellRows:
        lengths = list(map(len, self.rows))
        columns: list[Any] = list(map(range, lengths))
        find = partial(positions_of_text, self.lm)
        batch = SequenceBatch(
            columns, lengths, self.rows.__getitem__, find, final=True, numbers=prompts
        )
        count = len(prompts)
        forward_pass = ForwardPass(batch, 0, pos, count, 1, range(1), pos)
        return CellRows(tuple(prompts), 0, count, forward_pass)

    def _run(self, states: Tensor, lanes: Sequence[tuple[CellRows, Sequence[HookPoint]]]) -> Tensor:
        with _StreamEnd(self.lm, self.kinds, lanes, states):
            return logits_of(self.lm.model(**_inputs(self.lm, len(states))))[:, 0]


def model_end_of(lm: LM, hooks: Iterable[Hook], rows: tuple[Row, ...]) -> ModelEnd:
    """Returns what comes after the model's blocks, with those of the hooks that act there.

    Raises `Unsupported` if an edit of an outer `with` block acts there, since its rows and
    positions are not known.
    """
    end = find_ending(lm)
    _refuse_outer_edits(lm, end)
    manager = HookManager(lm, ())
    taps = []
    for tap in build_hook_points(lm, list(hooks), manager.reference):
        if end.has(tap):
            tap.actions = [action for action in tap.actions if action.change is not None]
            if tap.actions:
                taps.append(tap)
    return ModelEnd(lm, end.kinds, taps, rows)


def _refuse_outer_edits(lm: LM, end: Ending) -> None:
    for path in end.ended:
        module = lm.submodule(path)
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if not isinstance(hook, RegisteredHook) or not hook.manager.acts_here():
                continue
            edits = _edits_after_blocks(hook, end)
            if edits:
                raise Unsupported(
                    f"{edits[0]} of hk.attach acts after the model's blocks, where a lens reads "
                    "each layer: give it to the lens itself, as one of its hooks"
                )


def _edits_after_blocks(hook: RegisteredHook, end: Ending) -> list[Hook]:
    """Returns the edits of a registered hook that act after the model's blocks."""
    edits = []
    for tap in hook.args:
        if isinstance(tap, HookPoint) and end.has(tap):
            edits += [action.hook for action in tap.actions if action.change is not None]
    return edits
