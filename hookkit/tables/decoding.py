"""Tables of a generation: each step's candidates at each stage, and why each token was chosen.

    run = hk.generate(lm, prompt, hk.ban(" coffee"), trace=hk.trace(watch=" tea"))
    hk.decisions(run)[["step", "token", "why"]]
    hk.candidates(run)                                  # all candidates of all steps, at all stages

    for now in hk.stream(lm, prompt, hk.ban(" coffee"), max_new_tokens=20):
        print(now.text[0], now.decisions["why"][0])   # step by step, while it is generated

`pos` is the position whose logits chose the token, as in all tables.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pandas as pd
from jaxtyping import Bool, Int
from torch import Tensor

from ..arguments import check_arguments
from ..display import count_of, describe_outcome
from ..errors import NotCaptured, OutOfRange, Unsupported
from ..hooks.base import Hook
from ..hooks.grammar import Grammar
from ..hooks.logit_shifts import Ban, Restrict
from ..hooks.logits import Force
from ..hooks.sources import SourceEdit
from ..models.lm import LM
from ..models.next_token import ranks_for_table
from ..models.positions import IndicesLike
from ..models.prompts import Prompts, as_batch
from ..runs.forward import Logits
from ..runs.generate import Draws, generate_with_tracer
from ..runs.run import Run
from ..runs.trace import STAGES, Decision, GenerationRecord, Trace, Tracer
from ..runs.trace import trace as every_step
from ..runs.worker_thread import ThreadedGenerator
from .distributions import prompts_of_run, selected_rows
from .rank_tables import reasons_of


@check_arguments
def candidates(run: Run, *, top: int | None = None, rows: IndicesLike = None) -> pd.DataFrame:
    """Every step's candidates at each stage: the most likely, watched, named and drawn tokens.

    Columns: row, step, pos, stage ("model", "edited" or "processed"; where an edit with a source
    acts, "source" too, of several "source 1", "source 2" …), token, token_id, logit,
    logprob, prob, rank, drawn (True for the token that was chosen), why ("top", "watched", "named"
    by a hook, "drawn"). `top` shows fewer of each stage's first tokens than were recorded. In beam
    search the logits of the stage "processed" are log-probabilities, since there the rules of
    transformers act on those.

    Raises `NotCaptured` if the run was made without trace=, and `OutOfRange` if `top` is larger
    than what was recorded.
    """
    record = _record_of(run, rows)
    recorded = record.settings.top
    count = recorded if top is None else top
    if not 1 <= count <= recorded:
        raise OutOfRange(
            f"top={top!r}: {recorded} tokens of each stage are on record, so give 1 to {recorded}"
        )
    table = candidates_table(record, count)
    table.attrs |= prompts_of_run(run)
    return table


def candidates_table(record: GenerationRecord, count: int) -> pd.DataFrame:
    """Returns the table of `candidates` for a record, with `count` tokens of each stage."""
    table_rows: list[dict[str, Any]] = []
    for decision in record.decisions:
        for name, stage in decision.record.stages.items():
            is_source = name not in STAGES
            if is_source and bool(stage.entropy[decision.model_row].isnan()):
                continue  # the source was not read in this row
            table_rows += _candidates(record, decision, name, count)
    return pd.DataFrame(table_rows)


def _candidates(
    record: GenerationRecord, decision: Decision, name: str, count: int
) -> list[dict[str, Any]]:
    """Returns the rows of `candidates` for one stage of one step of one row."""
    why = reasons_of(
        {
            "top": decision.record.stages[name].top[decision.model_row, :count].tolist(),
            "watched": record.watched,
            "named": record.named,
            "drawn": (decision.token,),
        }
    )
    table_rows: list[dict[str, Any]] = []
    for token, reason in why.items():
        table_rows.append(
            {
                "row": decision.row,
                "step": decision.step,
                "pos": decision.pos,
                "stage": name,
                "token": record.lm.string(token),
                "token_id": token,
                **_numbers(decision, name, token),
                "drawn": token == decision.token,
                "why": reason,
            }
        )
    # tokens without a rank are the last
    table_rows.sort(key=lambda row: (math.isnan(row["rank"]), row["rank"], row["token_id"]))
    return table_rows


def _numbers(decision: Decision, name: str, token: int) -> dict[str, float]:
    """Returns the numbers of a token at a stage."""
    stage, index = decision.record.stages[name], (decision.model_row, _column(decision, token))
    logprob = stage.logprobs[index]
    return {
        "logit": stage.logits[index].item(),
        "logprob": logprob.item(),
        "prob": logprob.exp().item(),
        "rank": ranks_for_table(stage.ranks[index]).item(),
    }


def _column(decision: Decision, token: int) -> int:
    """Returns the column of a token in the numbers of a step."""
    return decision.record.ids[decision.model_row].tolist().index(token)


@check_arguments
def decisions(run: Run, *, rows: IndicesLike = None) -> pd.DataFrame:
    """One row for each step: the chosen token, its numbers at each stage, and why it was chosen.

    Columns: row, step, pos, token, token_id, why (a sentence); logit, prob and rank of the token,
    each _model, _edited and _processed; entropy (nats), varentropy (nats²), margin (largest logit
    minus the second) and perplexity, each by stage too; candidates (tokens left to choose from);
    top1_model (the most likely token of the unedited model); conditions (of each hook with `when=`
    whether it acted on the logits' position, and if not what its condition read; "" if none asked).

    Raises `NotCaptured` if the run was made without trace=.
    """
    return decisions_table(_record_of(run, rows))


def decisions_table(record: GenerationRecord) -> pd.DataFrame:
    """Returns the table of `decisions` for a record."""
    return pd.DataFrame([_decision_row(record, decision) for decision in record.decisions])


def _record_of(run: Run, rows: IndicesLike) -> GenerationRecord:
    """Returns the record of a generation, with the decisions of the selected rows."""
    if run.recorded is None:
        raise NotCaptured(
            "this run kept no record of its steps: make it with hk.generate(..., trace=hk.trace())"
        )
    selected = selected_rows(rows, len(run.lengths))
    decisions = [decision for decision in run.recorded.decisions if decision.row in selected]
    return replace(run.recorded, decisions=tuple(decisions))


def _decision_row(record: GenerationRecord, decision: Decision) -> dict[str, object]:
    lm, row, stages = record.lm, decision.model_row, decision.record.stages
    columns: dict[str, object] = {
        "row": decision.row,
        "step": decision.step,
        "pos": decision.pos,
        "token": lm.string(decision.token),
        "token_id": decision.token,
        "why": _reason(record, decision),
    }
    numbers = {name: _numbers_at(decision, name) for name in STAGES}
    for quantity in ("logit", "prob", "rank", "entropy", "varentropy", "margin", "perplexity"):
        for name in STAGES:
            columns[f"{quantity}_{name}"] = numbers[name][quantity]
    columns["candidates"] = int(stages["processed"].candidates[row])
    columns["top1_model"] = None
    if not math.isnan(numbers["model"]["entropy"]):
        columns["top1_model"] = lm.string(int(stages["model"].top[row, 0]))
    columns["conditions"] = "; ".join(decision.record.conditions.get(row, ()))
    return columns


def _numbers_at(decision: Decision, name: str) -> dict[str, Any]:
    """Returns the numbers of the chosen token and of its distribution at a stage."""
    stage, row = decision.record.stages[name], decision.model_row
    numbers: dict[str, Any] = dict(_numbers(decision, name, decision.token))
    for quantity in ("entropy", "varentropy", "margin"):
        numbers[quantity] = getattr(stage, quantity)[row].item()
    return {**numbers, "perplexity": stage.entropy[row].exp().item()}


def _reason(record: GenerationRecord, decision: Decision) -> str:
    """Returns the sentence that says why a token was chosen."""
    row, column = decision.model_row, _column(decision, decision.token)
    stages = decision.record.stages
    if bool(stages["edited"].logprobs[row].isnan().any()):
        return "no reason: the logits are NaN or infinite, so that no token has a probability"
    ranks = [int(stages[name].ranks[row, column]) for name in STAGES]
    moves = list(_moves(decision, column, ranks[0]))
    force = _force_of(record, decision, moves)
    certain = force is not None and (force.decides or force.margin == math.inf)
    drawn = record.generation.mode != "greedy_search" and not certain
    removed = _removed_first(record, decision)
    if force is not None and ranks[1] == 1 and not drawn:
        verb = "forced" if certain else "pushed"
        return "; ".join([f"{verb} by {force}: rank {ranks[0]} for the model", *removed])
    changes = _rank_changes(record, ranks, moves)
    return "; ".join([_choice(record, decision, column, ranks[2]), *removed, *changes])


def _rank_changes(
    record: GenerationRecord, ranks: list[int], moves: list[tuple[Hook, int, int]]
) -> Iterator[str]:
    """Returns how hooks and logits processors changed the token's rank."""
    model, edited, processed = ranks
    movers = []
    for hook, before, after in moves:
        if before != after and not isinstance(hook, Ban | Restrict | Grammar):
            movers.append(hook.in_words() if isinstance(hook, SourceEdit) else str(hook))
    if movers and model != edited:
        yield f"{' and '.join(movers)} moved it from rank {model} to {edited}"
    elif model != 1 and record.generation.mode == "sample":
        yield f"rank {model} for the model"
    if processed != edited:
        yield f"the logits processors moved it from rank {edited} to {processed}"


def _choice(record: GenerationRecord, decision: Decision, column: int, rank: int) -> str:
    """Returns how transformers chose the token."""
    stage, row = decision.record.stages["processed"], decision.model_row
    count, mode, rules = int(stage.candidates[row]), record.generation.mode, record.generation.rules
    suffix = f" ({rules})" if rules else ""
    if count == 1:
        return f"the only candidate left{suffix}"
    if mode == "sample":
        prob = stage.logprobs[row, column].exp().item()
        return f"drawn with p = {prob:.2g} among {count} candidates{suffix}"
    if mode == "beam_search":
        return f"beam search: rank {rank} of {count} on the best of {record.generation.beams} beams"
    if stage.margin[row] == 0:
        return f"greedy: first of {count}, with the lowest id of those that share the largest logit"
    return f"greedy: first of {count}"


def _moves(decision: Decision, column: int, rank: int) -> Iterator[tuple[Hook, int, int]]:
    """Returns the hooks that changed the logits, with the token's rank before and after each."""
    row = decision.model_row
    for change in decision.record.changes:
        if change.rows[row]:
            new_rank = int(change.ranks[row, column])
            yield change.hook, rank, new_rank
            rank = new_rank


def _force_of(
    record: GenerationRecord, decision: Decision, moves: list[tuple[Hook, int, int]]
) -> Force | None:
    """Returns the last force hook that put this token first."""
    for hook, _, rank in reversed(moves):
        if isinstance(hook, Force) and rank == 1 and decision.token in hook.named(record.lm):
            return hook
    return None


def _removed_first(record: GenerationRecord, decision: Decision) -> list[str]:
    """Returns a sentence if a hook removed the model's own first token, else an empty list."""
    first = int(decision.record.stages["model"].top[decision.model_row, 0])
    edited_logit = _numbers(decision, "edited", first)["logit"]
    if edited_logit != -math.inf or first == decision.token:
        return []
    token = repr(record.lm.string(first))
    sentences, was_removed = [], False
    for change in decision.record.changes:
        hook = change.hook
        if not change.rows[decision.model_row]:
            continue
        if isinstance(hook, Ban) and first in hook.named(record.lm):
            return [*sentences, f"banned {token} was first for the model"]
        if isinstance(hook, Restrict) and first not in hook.named(record.lm):
            sentences.append(f"{hook} left out {token}, first for the model")
        is_removed = bool(change.removed_first[decision.model_row])
        if isinstance(hook, Grammar) and is_removed and not was_removed:
            sentences.append(f"{hook} banned {token}, rank 1 for the model")
        was_removed = is_removed
    return sentences


# ---- a generation as it happens


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

    The stream owns each row's text so far, and the thread of the generation, which runs only while
    the loop waits for the next step. While the body of the loop runs, the model has no hooks of the
    stream. Leaving the loop early, by `break` or Ctrl-C, ends the thread and removes its hooks.
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

    def __repr__(self) -> str:
        state = "not started"
        if self._turns is not None:
            state = "ended" if self._run is not None else "running"
        text = f"Stream({count_of(len(self._tokens), 'prompt')}, {state})"
        return describe_outcome(text, "for step in stream", "stream.run (after the last step)")

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
                "a stream can be iterated once: make another, with the same seed for the same text"
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
    [' Paris', '.']
    """
    return Stream(lm, prompts, hooks, trace or every_step(), logits, seed, arguments)
