"""The random numbers of a generate: those of its seed, or those that torch draws next.

torch has one generator for the whole process. Runs that draw take turns, so that the draws of one
thread do not change those of another. Code that is not hookkit's does not wait.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import Unsupported
from ..models.lm import LM
from ..models.overrides import PROGRESS

_TURN = threading.RLock()
PATIENCE = 20.0  # seconds without a forward in any thread after which waiting ends


class Draws:
    """A context in which draws start from a seed; afterwards torch's generators are as before.

    Without a seed the draws are torch's own; `sampling` says whether there are any. All processes
    that hold a split model draw the same.
    """

    def __init__(self, lm: LM, seed: int | None, *, sampling: bool = False) -> None:
        self.lm, self.seed, self.sampling = lm, seed, sampling
        self._turns = 0  # how often this object has acquired the lock
        self._outer_states: Any = None  # of torch's generators outside the context

    def __enter__(self) -> None:
        seed = self.seed
        if seed is None and self.lm.ranks is not None:
            seed = self.lm.ranks.gather_values(int(torch.randint(2**62, ())))[0]
        if seed is None and not self.sampling:
            return
        try:
            self._take_turn()
            if seed is not None:
                self._outer_states = _generator_states()
                torch.manual_seed(seed)
        except BaseException:
            self._end()
            raise

    def __exit__(self, *_: object) -> None:
        try:
            self._end()
        except BaseException:
            self._end()  # Ctrl-C may have come in the midst of it
            raise

    def _end(self) -> None:
        if self._outer_states is not None:
            _set_generator_states(self._outer_states)
            self._outer_states = None
        self._give_turn()

    @contextmanager
    def put_aside(self) -> Iterator[None]:
        """A context inside this one in which others may draw; it does not change the next draw."""
        turns, inner_states = self._turns, None
        if self._outer_states is not None:
            inner_states = _generator_states()
            _set_generator_states(self._outer_states)
        self._give_turn()
        try:
            yield
        finally:
            if turns:
                self._take_turn()
            if inner_states is not None:
                self._outer_states = _generator_states()
                _set_generator_states(inner_states)

    def _take_turn(self) -> None:
        forwards = -1
        while not _TURN.acquire(timeout=PATIENCE):
            if forwards == PROGRESS.forwards:
                raise Unsupported(
                    "another thread draws random numbers in a generate that does not go on: torch "
                    "has one generator for all threads, so let one generate end before the next"
                )
            forwards = PROGRESS.forwards
        self._turns += 1

    def _give_turn(self) -> None:
        while self._turns:
            self._turns -= 1
            _TURN.release()


def _generator_states() -> dict[str, Any]:
    states: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state_all()
    elif torch.accelerator.is_available():
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is not None and accelerator.type != "cuda":
            states[accelerator.type] = torch.get_device_module(accelerator).get_rng_state()
    return states


def _set_generator_states(states: dict[str, Any]) -> None:
    for kind, state in states.items():
        if kind == "cpu":
            torch.set_rng_state(state)
        elif kind == "cuda":
            torch.cuda.set_rng_state_all(state)
        else:
            torch.get_device_module(kind).set_rng_state(state)
