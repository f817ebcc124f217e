"""A generation as it happens, a step at a time.

    for now in hk.stream(lm, "I like oat milk in my", hk.ban(" coffee"), max_new_tokens=20):
        print(now.text[0], now.decisions["why"][0])

The generation runs in a thread of its own, but only while the next step is waited for: nothing runs beside the body of
the loop, in which the model has no hooks of the stream's. Leaving the loop early, by `break` or Ctrl-C, ends it and
takes the hooks off.
"""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import pandas as pd
from jaxtyping import Bool, Int
from torch import Tensor

from ..arguments import checks_arguments
from ..errors import Unsupported
from ..hooks.base import Hook
from ..models.lm import LM
from ..models.prompts import Prompts, as_batch
from ..runs.generate import traced
from ..runs.random_state import Draws
from ..runs.run import Logits, Run
from ..runs.trace import Recorded, Trace, Tracer
from ..runs.trace import trace as every_step
from ..runs.worker_thread import Turns
from .decoding import candidates, decided


@dataclass(frozen=True, eq=False)
class StreamStep:
    """One step of a generation, just taken: `step` counts generated tokens, `text` is each row so far."""

    step: int
    text: list[str]
    record: Recorded

    @property
    def decisions(self) -> pd.DataFrame:
        """The step's rows of `hk.decisions`."""
        return pd.DataFrame([decided(self.record, decision) for decision in self.record.decisions])

    @property
    def candidates(self) -> pd.DataFrame:
        """The step's rows of `hk.decoding`."""
        top = self.record.asked.top
        return pd.DataFrame(
            [row for each in self.record.decisions for row in candidates(self.record, each, top)]
        )


class Stream:
    """The steps of a generation, to be gone through once. `run` is the whole of it, after the last step."""

    def __init__(
        self, lm: LM, prompts: Prompts, hooks: tuple[Hook, ...], asked: Trace, given: dict[str, Any]
    ) -> None:
        self._lm, self._hooks, self._given = lm, hooks, given
        self._rows = as_batch(lm, prompts, side="left").rows
        self._tracer = Tracer(lm, asked, hooks, listener=self._listen)
        self._written: list[list[int]] = [[] for _ in self._rows]
        self._ended = [False] * len(self._rows)
        self._turns: Turns[StreamStep] | None = None
        self._draws = Draws(lm, given.pop("seed"))
        self._run: Run | None = None

    @property
    def run(self) -> Run:
        """The whole generation, once its last step was taken."""
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
        self._turns = Turns(self._generate, name="hookkit.stream")
        try:
            with closing(self._turns) as turns:
                yield from turns
        finally:
            self._turns.close()  # Ctrl-C may have come before the other close

    def __reduce__(self) -> Any:
        raise Unsupported("a stream cannot be copied: make another with the same arguments")

    def _generate(self) -> None:
        logits = self._given.pop("logits")
        self._run = traced(
            self._lm, self._rows, self._hooks, logits, self._draws, self._tracer, self._given
        )

    def _listen(self, tokens: Int[Tensor, " row"], done: Bool[Tensor, " row"]) -> None:
        going = self._tracer.generation
        if going.beams > 1 or going.returned > 1:
            raise Unsupported(
                "beams and several sequences of one prompt have no single text to stream: use generate"
            )
        chosen, ends = tokens.tolist(), done.tolist()
        going_on = [row for row, ended in enumerate(self._ended) if not ended]
        for row in going_on:
            self._written[row].append(chosen[row])
            self._ended[row] = ends[row]
        texts = [
            self._lm.text([*row, *new]) for row, new in zip(self._rows, self._written, strict=True)
        ]
        lengths = {row: len(self._rows[row]) for row in going_on}
        record = self._tracer.now({row: chosen[row] for row in going_on}, lengths)
        assert self._turns is not None
        with self._draws.put_aside():
            self._turns.give(StreamStep(len(self._tracer.steps) - 1, texts, record))


@checks_arguments
def stream(
    lm: LM,
    prompts: Prompts,
    *hooks: Hook,
    logits: Logits = "last",
    seed: int | None = None,
    trace: Trace | None = None,
    **arguments: Any,
) -> Stream:
    """The steps of `generate` with the same arguments, as they happen, each with its candidates and the reason.

    Every step is recorded, as with trace=hk.trace(): `now.decisions`, `now.candidates`, and `now.text` so far. After
    the last step `stream.run` is the run that `generate` would have given.

    >>> steps = stream(lm, "The capital of France is", max_new_tokens=2, do_sample=False)
    >>> [now.decisions["token"][0] for now in steps]
    ["' Paris'", "'.'"]
    """
    return Stream(
        lm, prompts, hooks, trace or every_step(), {"logits": logits, "seed": seed, **arguments}
    )
