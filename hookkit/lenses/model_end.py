"""What the model would say of a state of its residual stream: its own final norm, head, cap and scale, on any state.

The model's own forward runs with every block passed by and the state in place of what the last block gives, so that
whatever a family does behind its blocks is done here too, by the family's own code.
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
from ..models.overrides import Lent, without_hooks
from ..models.padding import logits_of
from ..models.prompts import Row, cover, pad_id
from ..models.sites import Site
from ..runs.manager import HookManager, RegisteredHook
from ..runs.partial import CellRows, SharedForward, passed_by
from ..runs.taps import HookPoint, input_of, planned


@dataclass(frozen=True)
class Ending:
    """How a model ends.

    kinds   what each block gives: a tensor (0), or so many values of which the stream is the first
    begun   the modules that begin to run behind the last block
    ended   those that end there: the model itself too
    """

    kinds: tuple[int, ...]
    begun: frozenset[str]
    ended: frozenset[str]

    def has(self, tap: HookPoint) -> bool:
        """True where this place is behind the blocks."""
        return tap.place.path in (self.begun if tap.place.side == "input" else self.ended)


def ending(lm: LM) -> Ending:
    """How this model ends, seen in a forward of one token. `Unsupported` where its blocks are not known."""
    if not lm.n_layers or "resid_post" not in lm.layout.names:
        raise Unsupported(
            f"the blocks of {type(lm.root).__name__} are not known, so nothing can be put behind them"
        )
    if "ending" not in lm.learnt:
        lm.learnt["ending"] = _seen(lm)
    return lm.learnt["ending"]


def _seen(lm: LM) -> Ending:
    blocks = [lm.submodule(lm.family.block.format(layer=number)) for number in range(lm.n_layers)]
    inside = {id(module) for block in blocks for module in block.modules()}
    kinds: dict[int, int] = {}
    begun: set[str] = set()
    ended: set[str] = set()

    def block(number: int, inner: Any, /, *args: Any, **kwargs: Any) -> Any:
        output = inner(*args, **kwargs)
        kinds[number] = len(output) if isinstance(output, tuple) else 0
        return output

    def other(path: str, inner: Any, /, *args: Any, **kwargs: Any) -> Any:
        if len(kinds) == len(blocks):
            begun.add(path)
        output = inner(*args, **kwargs)
        if len(kinds) == len(blocks):
            ended.add(path)
        return output

    manager = _Alone(lm, inside)
    with Lent() as lent:
        for number, module in enumerate(blocks):
            lent.around(module, "forward", partial(block, number))
        for path, module in lm.root.named_modules():
            if id(module) not in inside:
                lent.around(module, "forward", partial(other, path))
        with torch.no_grad(), manager:
            lm.model(**_inputs(lm, 1))
    return Ending(
        tuple(kinds[number] for number in range(len(blocks))), frozenset(begun), frozenset(ended)
    )


def _inputs(lm: LM, rows: int) -> dict[str, Any]:
    ids = torch.full((rows, 1), pad_id(lm), device=lm.device)
    return {"input_ids": ids, **lm.accepted(use_cache=False, return_dict=True)}


class _Alone(HookManager):
    """A block in which hooks inside the model's blocks, and hookkit's own of other blocks, are silent.

    What the user hung on the modules behind the blocks goes on acting: it is part of what the model says.
    """

    alone = True

    def __init__(self, lm: LM, inside: set[int]) -> None:
        super().__init__(lm, ())
        self.inside = inside

    def _register(self, lent: Lent) -> None:
        silence(self.lm, self.inside, lent, self.acts_here)
        super()._register(lent)


def silence(lm: LM, inside: set[int], lent: Lent, acts: Callable[[], bool]) -> None:
    """Call the modules inside the model's blocks without their hooks, which must not act on a state that is put behind
    the blocks."""
    for module in lm.root.modules():
        if id(module) in inside and (module._forward_hooks or module._forward_pre_hooks):
            without_hooks(module, lent, acts)


class _StreamEnd(SharedForward):
    """A forward of what comes behind the blocks, with hooks there."""

    alone = True

    def __init__(
        self,
        lm: LM,
        known: Ending,
        lanes: Sequence[tuple[CellRows, Sequence[HookPoint]]],
        states: Tensor,
    ) -> None:
        super().__init__(lm, lanes, rows=len(states), width=1)
        self.known, self.states = known, states

    def _register(self, lent: Lent) -> None:
        blocks = [
            self.lm.submodule(self.lm.family.block.format(layer=number))
            for number in range(self.lm.n_layers)
        ]
        silence(
            self.lm,
            {id(module) for block in blocks for module in block.modules()},
            lent,
            self.acts_here,
        )
        for block, kind in zip(blocks[:-1], self.known.kinds, strict=False):
            lent.around(block, "forward", passed_by(kind))
        kind = self.known.kinds[-1]
        given = self.states[:, None]
        output = given if not kind else (given, *[None] * (kind - 1))
        lent.around(blocks[-1], "forward", lambda *_, **__: output)
        super()._register(lent)


class _Given(Exception):
    """Ends a forward at the head, with what that was given."""


@dataclass(frozen=True, eq=False)
class Read:
    """`given` [state, d] is what the head reads, `raw` [state, vocab] what it gives, `logits` what the model makes of
    that with its soft-cap or scale."""

    given: Float[Tensor, "state d"]
    raw: Float[Tensor, "state vocab"]
    logits: Float[Tensor, "state vocab"]


@dataclass(frozen=True, eq=False)
class ModelEnd:
    """What comes behind the blocks of a model, for states of these prompts, with hooks that act there.

    Made by `tail_of`. `taps` are the hooks' work behind the blocks, at each state's own row and position.
    """

    lm: LM
    known: Ending
    taps: Sequence[HookPoint]
    rows: tuple[Row, ...]

    def logits(
        self, states: Float[Tensor, "state d_model"], places: Sequence[tuple[int, int]]
    ) -> Float[Tensor, "state vocab"]:
        """What the model would say of each state; `places` has its row and position."""
        if not self.taps:
            return self._run(states, [])
        found: dict[int, Tensor] = {}
        for pos in sorted({pos for _, pos in places}):  # hooks see a forward of one position
            numbers = [number for number, place in enumerate(places) if place[1] == pos]
            lane = self._lane([places[number][0] for number in numbers], pos)
            logits = self._run(
                states[torch.tensor(numbers, device=states.device)], [(lane, self.taps)]
            )
            found |= dict(zip(numbers, logits, strict=True))
        return torch.stack([found[number] for number in range(len(places))])

    def given(self, states: Float[Tensor, "state d_model"]) -> Float[Tensor, "state d"]:
        """What the head reads of each state, without any hook; the head does not run."""
        path = self.lm.place(Site("lm_head")).path

        def forward(inner: Any, /, *args: Any, **kwargs: Any) -> Any:
            raise _Given(input_of(args, kwargs, 0, path)[0])

        with Lent() as lent:
            lent.around(self.lm.submodule(path), "forward", forward)
            try:
                self._run(states, [])
            except _Given as given:
                return given.args[0].reshape(len(states), -1)
        raise AssertionError("the head was not called")

    def read(self, states: Float[Tensor, "state d_model"]) -> "Read":
        """What the head reads of each state, what it gives and what the model makes of that, without any hook."""
        path = self.lm.place(Site("lm_head")).path
        head = self.lm.submodule(path)
        seen: list[tuple[Tensor, Tensor]] = []

        def forward(inner: Any, /, *args: Any, **kwargs: Any) -> Any:
            output = inner(*args, **kwargs)
            seen.append((input_of(args, kwargs, 0, path)[0], output))
            return output

        with Lent() as lent:
            lent.around(head, "forward", forward)
            logits = self._run(states, [])
        (given, gave) = seen[-1]
        return Read(given.reshape(len(states), -1), gave.reshape(len(states), -1), logits)

    def _lane(self, prompts: list[int], pos: int) -> CellRows:
        columns: list[Any] = [range(len(row)) for row in self.rows]
        find = partial(cover, self.lm)
        text = SequenceBatch(
            columns,
            list(map(len, self.rows)),
            self.rows.__getitem__,
            find,
            final=True,
            numbers=prompts,
        )
        return CellRows(
            tuple(prompts),
            0,
            len(prompts),
            ForwardPass(text, 0, pos, len(prompts), 1, range(1), pos),
        )

    def _run(self, states: Tensor, lanes: Sequence[tuple[CellRows, Sequence[HookPoint]]]) -> Tensor:
        with _StreamEnd(self.lm, self.known, lanes, states):
            return logits_of(self.lm.model(**_inputs(self.lm, len(states))))[:, 0]


def tail_of(lm: LM, hooks: Iterable[Hook], rows: tuple[Row, ...]) -> ModelEnd:
    """What comes behind the model's blocks, with those of the hooks that act there. `Unsupported` where an edit of an
    outer block acts there, whose rows and positions would not be known."""
    known = ending(lm)
    _refuse_outer(lm, known)
    manager = HookManager(lm, ())
    taps = [tap for tap in planned(lm, list(hooks), manager.reference) if known.has(tap)]
    for tap in taps:
        tap.actions = [action for action in tap.actions if action.change is not None]
    return ModelEnd(lm, known, [tap for tap in taps if tap.actions], rows)


def _refuse_outer(lm: LM, known: Ending) -> None:
    for path in known.ended:
        module = lm.submodule(path)
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            tap = next(
                (each for each in getattr(hook, "args", ()) if isinstance(each, HookPoint)), None
            )
            edit = (
                next((action.hook for action in tap.actions if action.change is not None), None)
                if tap
                else None
            )
            ours = isinstance(hook, RegisteredHook) and hook.manager.acts_here()
            if ours and tap is not None and edit is not None and known.has(tap):
                raise Unsupported(
                    f"{edit} of a block of hk.attach acts behind the model's blocks, where a lens reads each layer: "
                    "give it to the lens itself, as one of its hooks"
                )
