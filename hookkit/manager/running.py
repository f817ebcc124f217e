"""The texts that run in a block: which one each forward is of, what its captures kept, and how it ended."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from .. import generation
from ..calls import Call
from ..captured import Kept
from ..deciding import Decisions
from ..errors import Unsupported
from ..firing import check_cached, check_possible
from ..following import Follower, plain_ending
from ..generation import Generation
from ..hooks.choosing import Force
from ..keeping import Keeping
from ..model import LM
from ..prompts import cover
from ..taps import Action
from ..tracing import Tracer


class Running:
    """The texts since a block was entered. The tracer, if there is one, is told of each `generate`."""

    def __init__(self, lm: LM, actions: Sequence[Action], tracer: Tracer | None) -> None:
        self.lm, self.actions, self.tracer = lm, actions, tracer
        self.follower = Follower(functools.partial(cover, lm), "logits_to_keep" in lm.takes, lm.two_texts)
        self.keeping = Keeping(actions)
        self.rows: list[list[int]] = []  # the tokens of each sequence that the last `generate` returned
        self._watch = generation.Watch()
        self._decides = any(isinstance(action.hook, Force) and action.hook.decides for action in actions)

    @property
    def generating(self) -> bool:
        """True while a `generate` runs."""
        return self.follower.generation is not None

    def call(self, given: Mapping[str, Any]) -> Call:
        """The forward that begins with these arguments, its hooks' wishes held against what the text can give."""
        call, begins = self.follower.call(given)
        self.keeping.turn_to(call.text)
        if begins:
            self._check_possible(call)
        if self.generating:
            call.text.history = self._watch.tokens
            call.text.ended_rows = self._watch.ended_rows
            if call.text.beams > 1:  # beams change rows from step to step
                self.follower.remember(call, self._watch.tokens)
        return call

    def _check_possible(self, call: Call) -> None:
        text, plan = call.text, self.follower.generation
        check_cached(self.actions, text)
        if text.final or plan is not None:
            check_possible(self.actions, text, call, plan)
        for where in {id(action.where): action.where for action in self.actions}.values():
            text.wishes(where)  # raises for a text that is not there, or a position before the first

    def gave(self, call: Call, output: Any) -> None:
        """A forward is over."""
        self.follower.gave(call, output)

    def finish(self) -> None:
        """Hold what was kept of the texts that no `generate` made."""
        self.keeping.finish_all(plain_ending)

    def check_fired(self) -> None:
        """Raise `NeverFired` for a hook that did nothing, or not all that it was to do."""
        self.keeping.check_fired(self.follower.forwards)

    @property
    def kept(self) -> list[Kept]:
        """What the captures kept, a text each."""
        return self.keeping.texts(plain_ending)

    def plan(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Generation:
        """What a call of `generate` is going to do, or `Unsupported` with the reason."""
        if self.lm.two_texts:
            raise Unsupported(
                f"generate of an encoder-decoder ({type(self.lm.root).__name__}) runs its two parts by themselves: "
                "call the model with input_ids and decoder_input_ids in the block"
            )
        return generation.read(self.lm.root, args, kwargs)

    def _with_every_position(self, kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The arguments of `generate`, so that every block reads every position of the prompt where hooks need it."""
        keep = self.lm.logits_to_keep(1)
        if keep == 1 or "logits_to_keep" in kwargs or all(action.head for action in self.actions):
            return kwargs
        return {**kwargs, "logits_to_keep": keep}

    def begins_step(self) -> bool:
        """True where the forward that begins is a step of the `generate` that runs."""
        return self._watch.begins_step()

    def generate(
        self,
        plan: Generation,
        original: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        acts: Callable[[], bool] | None = None,
    ) -> Any:
        """transformers' `generate`, followed from its prompts to the end of each row.

        `acts` says which calls of the model's own methods are of it.
        """
        text = self.follower.text = plan.text(self.follower.find)
        self.follower.generation = plan
        self.keeping.turn_to(text)
        if self.tracer is not None:
            self.tracer.begin(plan)
        decisions = Decisions(text, plan.width if plan.embeddings else 0) if self._decides else None
        try:
            with generation.watched(self.lm.root, self.tracer, decisions, acts) as self._watch:
                output = original(*args, **generation.eager(args, self._with_every_position(kwargs)))
            sequences = output if isinstance(output, Tensor) else output.sequences
            self.rows = generation.final_rows(plan, text, sequences, self._watch)
            ending = generation.ending(plan, text, sequences, self.rows, self.follower.histories)
            self.keeping.finish(text, ending)
            if self.tracer is not None:
                self.tracer.finish(self.rows, [text.lengths[prompt] for prompt in ending.prompts], ending.sources)
        except BaseException:
            self.keeping.forget(text)
            raise
        finally:
            self.follower.generation = None
            self.follower.histories = {}
        return output
