"""The record of a generation: at each step the logits, every change to them, and the draw.

    run = hk.generate(lm, prompt, hk.ban(" coffee"), trace=hk.trace(top=5, watch=(" tea",)))

Each step has three stages: `model`, the logits before any edit of logits (edits further inside the
model have acted); `edited`, after them; `processed`, after transformers' decoding rules
(temperature, top_p …) and the user's own logits processors. Where an edit with a source acts, a
stage `source` has what the source says; of several, `source 1`, `source 2` … in the order of their
edits. Of each stage only the top tokens, the
watched, named and drawn ones are stored, with a few sums over the vocabulary: never the vocabulary
times the steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..arguments import check_arguments, check_integer, shorten
from ..display import render_html
from ..errors import BadHook, Unsupported
from ..hooks.base import Hook
from ..hooks.logits import named_tokens
from ..models.batch_positions import Selection
from ..models.lm import LM
from ..models.next_token import entropy_of, margin_of, ranks_among, token_logits, varentropy_of
from ..models.words import WordLike, check_words, token_ids
from .generation import Generation
from .hook_points import Firing

STAGES = ("model", "edited", "processed")


@dataclass(frozen=True)
class Trace:
    """What to record of every step of a generation. Made by `trace`."""

    top: int = 5
    watch: tuple[WordLike, ...] = ()

    def __post_init__(self) -> None:
        meaning = "how many tokens of each stage to keep,"
        top = check_integer(self.top, "top", least=1, meaning=meaning, error=BadHook)
        object.__setattr__(self, "top", top)
        object.__setattr__(self, "watch", check_words(self.watch, "watch"))

    def __repr__(self) -> str:
        return f"Trace(top={self.top}, watch={shorten(str(self.watch), 400)})"

    def _repr_html_(self) -> str:
        return render_html("trace", {"top": self.top, "watch": ", ".join(map(repr, self.watch))})


@check_arguments
def trace(*, top: int = 5, watch: Iterable[WordLike] | WordLike = ()) -> Trace:
    """Returns what `generate(..., trace=trace())` records of every step.

    `top` is the number of tokens of each stage; the tokens in `watch` are recorded too, and of a
    word its spellings of one token.

    >>> trace(watch=" coffee")
    Trace(top=5, watch=(' coffee',))
    """
    return Trace(top, check_words(watch, "watch"))


# ---- the record


@dataclass(eq=False, slots=True)
class Stage:
    """One stage of one step: numbers of the stored tokens, and of the whole distribution."""

    logits: Float[Tensor, "row token"]
    logprobs: Float[Tensor, "row token"]
    ranks: Int[Tensor, "row token"]
    top: Int[Tensor, "row top"]
    entropy: Float[Tensor, " row"]
    varentropy: Float[Tensor, " row"]
    margin: Float[Tensor, " row"]
    candidates: Int[Tensor, " row"]  # the number of tokens whose logit is not -inf


@dataclass(eq=False, slots=True)
class LogitChange:
    """What one hook changed in one step: the rows, and the ranks of the stored tokens after it."""

    hook: Hook
    rows: Bool[Tensor, " row"]
    ranks: Int[Tensor, "row token"]
    removed_first: Bool[Tensor, " row"]  # True where the model's first token is impossible after it


@dataclass(eq=False, slots=True)
class Step:
    """All that is stored of one step, by model row."""

    call: int  # the number of the forward
    ids: Int[Tensor, "row token"]
    stages: dict[str, Stage]
    changes: list[LogitChange]  # by the hooks on logits, in their order
    conditions: dict[int, list[str]]  # by model row, whether hooks acted, and why not

    def move_to_cpu(self) -> None:
        """Moves all tensors to main memory."""
        for record in (self, *self.stages.values(), *self.changes):
            for name in record.__slots__:
                value = getattr(record, name)
                if isinstance(value, Tensor):
                    setattr(record, name, value.cpu())

    def decision(self, row: int, step: int, length: int, token: int, model_row: int) -> Decision:
        """Returns the choice of a token in a row whose prompt has this length."""
        hooks = tuple(change.hook for change in self.changes if change.rows[model_row])
        return Decision(row, step, length - 1 + step, token, model_row, self, hooks)


@dataclass(frozen=True, eq=False)
class Decision:
    """One step of one row of the text: the token that was chosen, and from what."""

    row: int
    step: int
    pos: int  # the position of the logits that chose the token
    token: int
    model_row: int
    record: Step
    hooks: tuple[Hook, ...]  # the hooks that changed the logits here


@dataclass(frozen=True, eq=False)
class GenerationRecord:
    """The record of a whole generation."""

    lm: LM
    settings: Trace
    generation: Generation
    watched: tuple[int, ...]
    named: tuple[int, ...]  # the tokens that logit edits name
    decisions: tuple[Decision, ...]

    def __getstate__(self) -> dict[str, Any]:
        """The state of a copy, which has the prompts and not the function that reads them."""
        prompts = [self.generation.prompt(row) for row in range(len(self.generation.lengths))]
        return {**self.__dict__, "generation": replace(self.generation, prompt=prompts.__getitem__)}


# ---- recording


@dataclass(eq=False)
class _OpenStep:
    """The logits [row, vocab] of the step that is being recorded. Owned by the `Tracer`."""

    call: int = -1
    model: Tensor | None = None
    edited: Tensor | None = None
    processed: Tensor | None = None
    # by each hook that changed them: the rows in which it did, and the logits after it
    changes: list[tuple[Hook, Tensor, Tensor]] = field(default_factory=list)
    sources: list[Tensor] = field(
        default_factory=list
    )  # NaN in the rows that a source did not read

    def stages(self) -> dict[str, Tensor]:
        """Returns the logits of each stage; one tensor with the stage before if it changes none."""
        assert self.model is not None and self.edited is not None and self.processed is not None
        is_changed = not torch.equal(self.edited, self.processed)
        processed = self.processed if is_changed else self.edited
        sources = dict(enumerate(self.sources, start=1))
        several = len(sources) > 1
        named = {f"source {n}" if several else "source": sources[n] for n in sources}
        return {"model": self.model, **named, "edited": self.edited, "processed": processed}


@dataclass(eq=False)
class Tracer:
    """Records the steps of a `generate`. The caller of one `generate` owns it.

    `listener` is called after each step, with the chosen tokens and which rows are done.
    """

    lm: LM
    settings: Trace
    hooks: Sequence[Hook]
    listener: Callable[[Tensor, Tensor], None] | None = None
    steps: list[Step] = field(default_factory=list)
    generation: Generation = field(init=False)  # the current call of `generate`

    def __post_init__(self) -> None:
        self._watched = tuple(token_ids(self.lm, self.settings.watch))
        self._named = tuple(named_tokens(self.lm, self.hooks))
        self._always_stored = list(dict.fromkeys([*self._watched, *self._named]))
        self.recorded: GenerationRecord | None = None
        self._open_step = _OpenStep()
        self._conditional: list[Firing] = []  # the hooks with conditions in the last forward

    def begin(self, generation: Generation) -> None:
        """Called at the start of a `generate`."""
        if generation.mode == "beam_sample":
            raise Unsupported(
                "beam sampling draws among beams, and its draws leave no trace: leave trace= out, "
                "or do_sample"
            )
        self.steps, self.generation, self.recorded = [], generation, None
        self._top_count = self.settings.top
        if generation.beams > 1:  # the beams take their tokens from this many of the first
            candidates = max(2, 1 + len(generation.eos)) * generation.beams
            self._top_count = max(self._top_count, candidates)
        self._open_step = _OpenStep()

    def before(self, call: int, logits: Tensor) -> None:
        """Called with the logits [row, pos, vocab] of a forward, before any edit."""
        self._open_step = _OpenStep(call, logits[:, -1].float())

    def note_condition(self, firing: Firing) -> None:
        """Called after each hook whose condition was evaluated."""
        if self._conditional and self._conditional[-1][1] != firing[1]:
            self._conditional = []
        self._conditional.append(firing)

    def changed(self, hook: Hook, before: Tensor, after: Tensor) -> None:
        """Called after each hook that has edited the logits."""
        rows = (before[:, -1] != after[:, -1]).any(dim=-1)
        self._open_step.changes.append((hook, rows, after[:, -1].float()))

    def source(self, cells: Selection, logits: Tensor) -> None:
        """Called with the logits [row, pos, vocab] that a source has at the cells of its edit."""
        model = self._open_step.model
        assert model is not None
        width = min(model.shape[-1], logits.shape[-1])
        last = [len(positions) - 1 for positions in cells.row_positions]
        read = torch.full_like(model, math.nan)
        newest = logits[torch.arange(len(last)), last].to(read)
        read[cells.rows, :width] = newest[:, :width]
        read[cells.rows, width:] = -math.inf
        self._open_step.sources.append(read)

    def after(self, logits: Tensor) -> None:
        """Called with the logits after all edits."""
        step = self._open_step
        step.edited = logits[:, -1].float() if step.changes else step.model

    def processed(self, scores: Float[Tensor, "row vocab"]) -> Float[Tensor, "row vocab"]:
        """Called with the output of the logits processors; returns it."""
        self._open_step.processed = scores.float()
        return scores

    def drawn(self, tokens: Int[Tensor, " row"], done: Bool[Tensor, " row"]) -> None:
        """Called with the chosen tokens (of beams, those that go on) and which rows are done."""
        if self._open_step.processed is None or self._open_step.model is None:
            return
        self.steps.append(self._step(None if self.generation.beams > 1 else tokens))
        self._open_step = _OpenStep()
        if self.listener is not None:
            self.listener(tokens, done)

    def now(self, tokens: Mapping[int, int], lengths: Mapping[int, int]) -> GenerationRecord:
        """Returns the record of the newest step alone.

        `tokens` are the tokens that rows chose in it, `lengths` the lengths of their prompts.
        """
        number, step = len(self.steps) - 1, self.steps[-1]
        decisions = [
            step.decision(row, number, lengths[row], token, row) for row, token in tokens.items()
        ]
        return self._record_of(decisions)

    def finish(
        self,
        rows: Sequence[Sequence[int]],
        lengths: Sequence[int],
        sources: Callable[[int], Sequence[int]],
    ) -> None:
        """Called at the end, with the tokens of the final rows and the lengths of their prompts.

        `sources` returns for a forward the model row in which each final row was.
        """
        decisions = []
        for step in self.steps:
            step.move_to_cpu()
        for row, (tokens, length) in enumerate(zip(rows, lengths, strict=True)):
            for number, token in enumerate(tokens[length:]):
                step = self.steps[number]
                model_row = sources(step.call)[row]
                decisions.append(step.decision(row, number, length, token, model_row))
        self.recorded = self._record_of(decisions)

    def _record_of(self, decisions: list[Decision]) -> GenerationRecord:
        return GenerationRecord(
            self.lm, self.settings, self.generation, self._watched, self._named, tuple(decisions)
        )

    def _step(self, tokens: Int[Tensor, " row"] | None) -> Step:
        """The step that is open; `tokens` are the chosen ones, where each row chose one."""
        logits_by_name, n_tokens = self._open_step.stages(), self.lm.n_tokens
        different = {id(logits): logits for logits in logits_by_name.values()}
        count = min(self._top_count, token_logits(logits_by_name["model"], n_tokens).shape[1])
        tops = {
            key: token_logits(logits, n_tokens).topk(count, dim=-1).indices
            for key, logits in different.items()
        }
        parts = list(tops.values())
        always = torch.tensor(self._always_stored, dtype=torch.long, device=parts[0].device)
        parts.append(always.expand(len(parts[0]), -1))
        if tokens is not None:
            parts.append(tokens[:, None].to(parts[0].device))
        ids = torch.cat(parts, dim=1)
        stages = {
            key: _stage(logits, ids, tops[key][:, : self.settings.top], n_tokens)
            for key, logits in different.items()
        }
        changes = self._logit_changes(ids, tops[id(logits_by_name["model"])][:, :1])
        by_name = {name: stages[id(logits)] for name, logits in logits_by_name.items()}
        call = self._open_step.call
        firings = [firing for firing in self._conditional if firing[1] == call]
        return Step(call, ids, by_name, changes, _condition_sentences(firings))

    def _logit_changes(
        self, ids: Int[Tensor, "row token"], first: Int[Tensor, "row 1"]
    ) -> list[LogitChange]:
        """The ranks of tokens after each hook, and whether it removed the model's first token."""
        changes, n_tokens = [], self.lm.n_tokens
        for hook, rows, after in self._open_step.changes:
            ranks = ranks_among(token_logits(after, n_tokens), after.gather(1, ids))
            removed_first = after.gather(1, first)[:, 0].isneginf()
            changes.append(LogitChange(hook, rows, ranks, removed_first))
        return changes


def _condition_sentences(firings: Iterable[Firing]) -> dict[int, list[str]]:
    """Returns for each model row what the conditions decided at its last position, in words."""
    sentences: dict[int, list[str]] = {}
    for bound_hook, _, selection, _, _, outcome in firings:
        assert selection is not None and outcome is not None
        for index, row in enumerate(selection.rows):
            last = len(selection.row_positions[index]) - 1
            sentence = f"{bound_hook.hook} acted"
            if not bool(outcome.holds[index, last]):
                sentence = f"{bound_hook.hook} did not act: {outcome.reason_at(index, last)}"
            row_sentences = sentences.setdefault(row, [])
            if sentence not in row_sentences:
                row_sentences.append(sentence)
    return sentences


def _stage(
    logits: Float[Tensor, "row vocab"],
    ids: Int[Tensor, "row token"],
    top: Int[Tensor, "row top"],
    n_tokens: int,
) -> Stage:
    logprobs = logits.log_softmax(dim=-1)
    real_logits, logits_of_ids = token_logits(logits, n_tokens), logits.gather(1, ids)
    return Stage(
        logits=logits_of_ids,
        logprobs=logprobs.gather(1, ids),
        ranks=ranks_among(real_logits, logits_of_ids),
        top=top,
        entropy=entropy_of(logprobs),
        varentropy=varentropy_of(logprobs),
        margin=margin_of(logits, n_tokens),
        candidates=torch.isfinite(real_logits).sum(dim=-1),
    )
