"""The random numbers of a generate: those of a seed of its own, or those that torch draws next.

torch has one generator for the whole process. Runs that draw take turns, so that the draws of one thread do not change
those of another; code that is not hookkit's is not held back.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import Unsupported
from ..models.lm import LM
from ..models.scopes import PROGRESS

_TURN = threading.RLock()
PATIENCE = 20.0  # seconds without any forward after which nobody is waited for any more


class Draws:
    """A block whose draws start from a seed, after which torch's generators are as they were.

    Without a seed they are torch's own; `sampling` says whether there are any. The ranks of a model that is split draw
    the same.
    """

    def __init__(self, lm: LM, seed: int | None, *, sampling: bool = False) -> None:
        self.lm, self.seed, self.sampling = lm, seed, sampling
        self._turns = 0
        self._outside: Any = None

    def __enter__(self) -> None:
        seed = self.seed
        if seed is None and self.lm.ranks is not None:
            seed = self.lm.ranks.first(int(torch.randint(2**62, ())))
        if seed is None and not self.sampling:
            return
        try:
            self._take_turn()
            if seed is not None:
                self._outside = _states()
                torch.manual_seed(seed)
        except BaseException:
            self._end()
            raise

    def __exit__(self, *_: object) -> None:
        try:
            self._end()
        except BaseException:
            self._end()
            raise

    def _end(self) -> None:
        if self._outside is not None:
            _set_states(self._outside)
            self._outside = None
        self._give_turn()

    @contextmanager
    def put_aside(self) -> Iterator[None]:
        """A block in the midst of it in which others draw, without a change to what this one draws next."""
        inside = None if self._outside is None else _states()
        turns = self._turns
        if self._outside is not None:
            _set_states(self._outside)
        self._give_turn()
        try:
            yield
        finally:
            if turns:
                self._take_turn()
            if inside is not None:
                self._outside = _states()
                _set_states(inside)

    def _take_turn(self) -> None:
        forwards = -1
        while not _TURN.acquire(timeout=PATIENCE):
            if forwards == PROGRESS.forwards:
                raise Unsupported(
                    "another thread draws random numbers in a generate that does not go on: torch has one "
                    "generator for all threads, so let one generate end before the next"
                )
            forwards = PROGRESS.forwards
        self._turns += 1

    def _give_turn(self) -> None:
        while self._turns:
            self._turns -= 1
            _TURN.release()


def _states() -> dict[str, Any]:
    """The states of torch's generators."""
    states: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state_all()
    elif torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type  # pyright: ignore[reportOptionalMemberAccess]
        if kind != "cuda":
            states[kind] = torch.get_device_module(kind).get_rng_state()
    return states


def _set_states(states: dict[str, Any]) -> None:
    for kind, state in states.items():
        if kind == "cpu":
            torch.set_rng_state(state)
        elif kind == "cuda":
            torch.cuda.set_rng_state_all(state)
        else:
            torch.get_device_module(kind).set_rng_state(state)
