"""A generation as it happens, one step at a time.

    for now in hk.stream(lm, "I like oat milk in my", hk.ban(" coffee"), max_new_tokens=20):
        print(now.text[0], now.decisions["why"][0])

The generation runs in its own thread, but only while the loop waits for the next step. While the
body of the loop runs, the generation is paused and the model has no hooks of the stream. Leaving
the loop early, by `break` or Ctrl-C, ends the generation and removes its hooks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
from jaxtyping import Bool, Int
from torch import Tensor

from ..arguments import check_arguments
from ..errors import Unsupported
from ..hooks.base import Hook
from ..models.lm import LM
from ..models.prompts import Prompts, as_batch
from ..runs.forward import Logits
from ..runs.generate import generate_with_tracer
from ..runs.random_state import Draws
from ..runs.run import Run
from ..runs.trace import GenerationRecord, Trace, Tracer
from ..runs.trace import trace as every_step
from ..runs.worker_thread import ThreadedGenerator
from .decoding import candidates_table, decisions_table


@dataclass(frozen=True, eq=False)
class StreamStep:
    """The newest step: `step` counts generated tokens, `text` is each row so far."""

    step: int
    text: list[str]
    record: GenerationRecord

    @property
    def decisions(self) -> pd.DataFrame:
        """The step's rows of `hk.decisions`."""
        return decisions_table(self.record)

    @property
    def candidates(self) -> pd.DataFrame:
        """The step's rows of `hk.candidates`."""
        return candidates_table(self.record, self.record.settings.top)


class Stream:
    """The steps of a generation, to be iterated once. `run` is the whole run, after the last step.

    It owns the thread of the generation, which ends with the iteration, and each row's text so far.
    """

    def __init__(
        self,
        lm: LM,
        prompts: Prompts,
        hooks: tuple[Hook, ...],
        trace: Trace,
        logits: Logits,
        seed: int | None,
        arguments: dict[str, Any],
    ) -> None:
        rows = as_batch(lm, prompts, side="left").rows
        self._lm = lm
        self._prompt_lengths = list(map(len, rows))
        self._tokens = list(map(list, rows))  # of each row so far
        self._ended = [False] * len(rows)
        self._draws, self._tracer = Draws(lm, seed), Tracer(lm, trace, hooks, self._on_step)
        self._call = partial(
            generate_with_tracer, lm, rows, hooks, logits, self._draws, self._tracer, arguments
        )
        self._turns: ThreadedGenerator[StreamStep] | None = None
        self._run: Run | None = None

    @property
    def run(self) -> Run:
        """The whole generation, after its last step."""
        if self._run is None:
            raise Unsupported(
                "the generation has not come to its end: go through all of its steps first"
            )
        return self._run

    def __iter__(self) -> Iterator[StreamStep]:
        if self._turns is not None:
            raise Unsupported(
                "a stream is gone through once: make another, with the same seed for the same text"
            )
        self._turns = ThreadedGenerator(self._generate, name="hookkit.stream")
        try:
            with closing(self._turns) as turns:
                yield from turns
        finally:
            self._turns.close()  # Ctrl-C may have come before the other close

    def __reduce__(self) -> Any:
        raise Unsupported("a stream cannot be copied: make another with the same arguments")

    def _generate(self) -> None:
        self._run = self._call()

    def _on_step(self, tokens: Int[Tensor, " row"], done: Bool[Tensor, " row"]) -> None:
        """Hands the newest step to the loop, and waits until the loop asks for the next one."""
        generation = self._tracer.generation
        if generation.beams > 1 or generation.returned > 1:
            raise Unsupported(
                "beams and several sequences of one prompt have no single text to stream: "
                "use generate"
            )
        new_tokens, ends = tokens.tolist(), done.tolist()
        active = [row for row, ended in enumerate(self._ended) if not ended]
        for row in active:
            self._tokens[row].append(new_tokens[row])
            self._ended[row] = ends[row]
        texts = list(map(self._lm.text, self._tokens))
        lengths = {row: self._prompt_lengths[row] for row in active}
        record = self._tracer.now({row: new_tokens[row] for row in active}, lengths)
        assert self._turns is not None
        with self._draws.put_aside():
            self._turns.give(StreamStep(len(self._tracer.steps) - 1, texts, record))


@check_arguments
def stream(
    lm: LM,
    prompts: Prompts,
    *hooks: Hook,
    logits: Logits = "last",
    seed: int | None = None,
    trace: Trace | None = None,
    **arguments: Any,
) -> Stream:
    """The steps of `generate` with the same arguments, as they happen.

    Every step is recorded, as with trace=hk.trace(): `now.decisions`, `now.candidates`, and
    `now.text` so far. After the last step `stream.run` is the run that `generate` would have given.

    >>> steps = stream(lm, "The capital of France is", max_new_tokens=2, do_sample=False)
    >>> [now.decisions["token"][0] for now in steps]
    ["' Paris'", "'.'"]
    """
    return Stream(lm, prompts, hooks, trace or every_step(), logits, seed, arguments)
