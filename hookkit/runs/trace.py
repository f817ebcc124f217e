"""The record of a generation: at each step what the model wanted, what became of it, and what was drawn.

    run = hk.generate(lm, prompt, hk.ban(" coffee"), trace=hk.trace(top=5, watch=(" tea",)))

Of every step three stages are read: `model`, the logits before any edit of logits (edits further inside have acted);
`edited`, after them; `processed`, after transformers' decoding rules (temperature, top_p …) and the user's own logits
processors. Of each stage only the top tokens, the watched, named and drawn ones are kept, with a few sums over the
vocabulary: never the vocabulary times the steps.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..arguments import checks_arguments, read_tokens, whole_number
from ..display import shown
from ..errors import BadHook, Unsupported
from ..hooks.base import Hook
from ..hooks.logits import LogitEdit
from ..models.lm import LM
from ..models.tokens import Token, rank_among
from .generation import Generation

STAGES = ("model", "edited", "processed")


@dataclass(frozen=True)
class Trace:
    """What to record of every step of a generation. Made by `trace`."""

    top: int = 5
    watch: tuple[Token, ...] = ()

    def __post_init__(self) -> None:
        meaning = "how many tokens of each stage to keep,"
        object.__setattr__(
            self, "top", whole_number(self.top, "top", least=1, meaning=meaning, error=BadHook)
        )
        object.__setattr__(self, "watch", read_tokens(self.watch, "watch"))

    def _repr_html_(self) -> str:
        return shown("trace", {"top": self.top, "watch": ", ".join(map(repr, self.watch))})


@checks_arguments
def trace(*, top: int = 5, watch: Iterable[Token] | Token = ()) -> Trace:
    """Record every step of `generate(..., trace=trace())`: the `top` tokens of each stage and the watched ones.

    >>> trace(watch=" coffee")
    Trace(top=5, watch=(' coffee',))
    """
    return Trace(top, read_tokens(watch, "watch"))


@dataclass(eq=False, slots=True)
class Stage:
    """One stage of one step: of the kept tokens [row, token], and of the whole distribution [row]."""

    logits: Float[Tensor, "row token"]
    logprobs: Float[Tensor, "row token"]
    ranks: Int[Tensor, "row token"]
    top: Int[Tensor, "row top"]
    entropy: Float[Tensor, " row"]
    varentropy: Float[Tensor, " row"]
    margin: Float[Tensor, " row"]
    candidates: Int[Tensor, " row"]  # tokens whose logit is not -inf

    def cpu(self) -> "Stage":
        """The same in memory."""
        return Stage(*(getattr(self, name).cpu() for name in Stage.__slots__))


@dataclass(eq=False, slots=True)
class Changed:
    """What one hook changed in one step: in which rows, and the ranks of the kept tokens after it."""

    hook: Hook
    rows: Bool[Tensor, " row"]
    ranks: Int[Tensor, "row token"]

    def cpu(self) -> "Changed":
        """The same in memory."""
        return Changed(self.hook, self.rows.cpu(), self.ranks.cpu())


@dataclass(eq=False, slots=True)
class Step:
    """All that is kept of one step, by model row."""

    call: int
    ids: Int[Tensor, "row token"]
    stages: dict[str, Stage]
    changes: list[Changed]  # by hooks on logits, in their order


@dataclass(frozen=True, eq=False)
class Decision:
    """One step of one row of the text: the token that was chosen, and from what."""

    row: int
    step: int
    pos: int  # where the logits stand that chose it
    token: int
    model_row: int
    record: Step
    hooks: tuple[Hook, ...]  # that changed the logits here


@dataclass(frozen=True, eq=False)
class Recorded:
    """The record of a whole generation."""

    lm: LM
    asked: Trace
    generation: Generation
    watched: tuple[int, ...]
    named: tuple[int, ...]  # the tokens that logit edits name
    decisions: tuple[Decision, ...]

    def __getstate__(self) -> dict[str, Any]:
        """What a copy has: the prompts themselves, in place of the function that reads them."""
        prompts = [self.generation.prompt(row) for row in range(len(self.generation.lengths))]
        return {**self.__dict__, "generation": replace(self.generation, prompt=prompts.__getitem__)}


@dataclass(eq=False)
class Tracer:
    """Takes the record while `generate` runs. It is told of each stage, and of what was drawn."""

    lm: LM
    asked: Trace
    hooks: Sequence[Hook]
    listener: Callable[[Tensor, Tensor], None] | None = (
        None  # is told, with each step, of the tokens and who is done
    )
    steps: list[Step] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._watched = [self.lm.token(token) for token in self.asked.watch]
        self._named = list(
            dict.fromkeys(
                i for h in self.hooks if isinstance(h, LogitEdit) for i in h.named(self.lm)
            )
        )
        self._extra = list(dict.fromkeys([*self._watched, *self._named]))
        self._generation: Generation | None = None
        self.recorded: Recorded | None = None
        self._forget()

    def _forget(self) -> None:
        self._call = -1
        self._found: dict[str, Tensor] = {}
        self._changes: list[tuple[Hook, Tensor, Tensor]] = []

    def begin(self, generation: Generation) -> None:
        """A call of `generate` starts."""
        if generation.mode == "beam_sample":
            raise Unsupported(
                "beam sampling draws among beams, and its draws leave no trace: leave trace= out, or do_sample"
            )
        self.steps, self._generation, self.recorded = [], generation, None
        self._keep = self.asked.top
        if generation.beams > 1:  # the beams take their tokens from this many of the first
            self._keep = max(self._keep, max(2, 1 + len(generation.eos)) * generation.beams)
        self._beams = generation.beams
        self._forget()

    def before(self, call: int, logits: Tensor) -> None:
        """A forward has given its logits [row, pos, vocab]."""
        self._forget()
        self._call, self._found["model"] = call, logits[:, -1].float()

    def changed(self, hook: Hook, before: Tensor, after: Tensor) -> None:
        """A hook has made one of the other."""
        self._changes.append(
            (hook, (before[:, -1] != after[:, -1]).any(dim=-1), after[:, -1].float())
        )

    def after(self, logits: Tensor) -> None:
        """All edits have acted on them."""
        self._found["edited"] = logits[:, -1].float() if self._changes else self._found["model"]

    def processed(self, scores: Float[Tensor, "row vocab"]) -> Float[Tensor, "row vocab"]:
        """What the logits processors made of the logits, and what decoding goes on with."""
        self._found["processed"] = scores.float()
        return scores

    def drawn(self, tokens: Int[Tensor, " row"], done: Bool[Tensor, " row"]) -> None:
        """The step is over: these tokens were chosen (of beams, those that go on), and some rows are done with them."""
        if "processed" not in self._found or "model" not in self._found:
            return
        step = self._step(None if self._beams > 1 else tokens)
        self.steps.append(step)
        self._forget()
        if self.listener is not None:
            self.listener(tokens, done)

    @property
    def generation(self) -> Generation:
        """The call of `generate` that runs."""
        assert self._generation is not None
        return self._generation

    def now(self, tokens: Mapping[int, int], lengths: Mapping[int, int]) -> Recorded:
        """The record of the newest step alone, in which each of these rows chose a token."""
        number = len(self.steps) - 1
        decisions = [
            _decision(self.steps[-1], row, number, lengths[row], token, row)
            for row, token in tokens.items()
        ]
        return self._recorded(decisions)

    def _recorded(self, decisions: list[Decision]) -> Recorded:
        return Recorded(
            self.lm,
            self.asked,
            self.generation,
            tuple(self._watched),
            tuple(self._named),
            tuple(decisions),
        )

    def _step(self, drawn: Int[Tensor, " row"] | None) -> Step:
        real = self.lm.n_tokens or None
        found, seen = self._found, {"model": self._found["model"]}
        of = dict.fromkeys(STAGES, "model")  # a stage that changes nothing is the one before it
        if found["edited"] is not found["model"]:
            seen["edited"], of["edited"], of["processed"] = found["edited"], "edited", "edited"
        if not torch.equal(found["edited"], found["processed"]):
            seen["processed"], of["processed"] = found["processed"], "processed"
        keep = min(self._keep, found["model"][:, :real].shape[1])
        tops = {name: values[:, :real].topk(keep, dim=-1) for name, values in seen.items()}
        ids = [top.indices for top in tops.values()]
        ids += (
            [torch.tensor(self._extra, device=ids[0].device).expand(len(ids[0]), -1)]
            if self._extra
            else []
        )
        ids += [drawn[:, None].to(ids[0].device)] if drawn is not None else []
        kept = torch.cat(ids, dim=1)
        stages = {
            name: _stage(values, kept, tops[name], self.asked.top, real)
            for name, values in seen.items()
        }
        changes = [
            Changed(hook, rows, _ranks(after[:, :real], after.gather(1, kept)))
            for hook, rows, after in self._changes
        ]
        return Step(self._call, kept, {name: stages[of[name]] for name in STAGES}, changes)

    def finish(
        self,
        rows: Sequence[Sequence[int]],
        lengths: Sequence[int],
        sources: Callable[[int], Sequence[int]],
    ) -> None:
        """Put the record in the order of the final rows, of which the tokens, and how many are prompt, are given.

        `sources` says for a forward which model row each final row was in.
        """
        steps = [
            Step(s.call, s.ids.cpu(), _on_cpu(s.stages), [c.cpu() for c in s.changes])
            for s in self.steps
        ]
        decisions = []
        for row, (tokens, length) in enumerate(zip(rows, lengths, strict=True)):
            for step, token in enumerate(tokens[length:]):
                model_row = sources(steps[step].call)[row]
                decisions.append(_decision(steps[step], row, step, length, token, model_row))
        self.recorded = self._recorded(decisions)


def _decision(
    record: Step, row: int, step: int, length: int, token: int, model_row: int
) -> Decision:
    hooks = tuple(changed.hook for changed in record.changes if changed.rows[model_row])
    return Decision(row, step, length - 1 + step, token, model_row, record, hooks)


def _on_cpu(stages: dict[str, Stage]) -> dict[str, Stage]:
    moved = {id(stage): stage.cpu() for stage in stages.values()}
    return {name: moved[id(stage)] for name, stage in stages.items()}


def _ranks(
    inside: Float[Tensor, "row vocab"], mine: Float[Tensor, "row token"]
) -> Int[Tensor, "row token"]:
    return torch.stack([rank_among(inside, mine[:, n]) for n in range(mine.shape[1])], dim=1)


def _stage(
    values: Float[Tensor, "row vocab"],
    ids: Int[Tensor, "row token"],
    top: Any,
    shown: int,
    real: int | None,
) -> Stage:
    logprobs = values.log_softmax(dim=-1)
    probs = logprobs.exp()
    entropy = torch.special.entr(probs).sum(dim=-1)
    surprise = (
        logprobs.clamp(min=-1e4) + entropy[:, None]
    )  # where the probability is 0 its logarithm does not matter
    inside = values[:, :real]
    mine = values.gather(1, ids)
    second = top.values[:, 1] if top.values.shape[1] > 1 else inside.topk(2, dim=-1).values[:, 1]
    return Stage(
        logits=mine,
        logprobs=logprobs.gather(1, ids),
        ranks=_ranks(inside, mine),
        top=top.indices[:, :shown],
        entropy=entropy,
        varentropy=(probs * surprise.square()).sum(dim=-1),
        margin=top.values[:, 0] - second,
        candidates=torch.isfinite(inside).sum(dim=-1),
    )
