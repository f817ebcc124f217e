"""Tables of a generation: each step's candidates at each stage, and why each token was chosen.

    run = hk.generate(lm, prompt, hk.ban(" coffee"), trace=hk.trace(watch=" tea"))
    hk.decisions(run)[["step", "token", "why"]]
    hk.decoding(run)                                  # all candidates of all steps, at all stages

`pos` is the position whose logits chose the token, as in all tables.
"""

import math
from collections.abc import Iterator, Mapping

import pandas as pd

from ..arguments import check_arguments
from ..errors import NotCaptured, OutOfRange
from ..hooks.base import Hook
from ..hooks.logits import Ban, Force, Restrict
from ..models.next_token import ranks_for_table
from ..models.positions import IndicesLike, read_indices, resolve_rows
from ..runs.run import Run
from ..runs.trace import STAGES, Decision, GenerationRecord, Stage
from .rank_tables import reasons_of


@check_arguments
def decoding(run: Run, *, top: int | None = None, rows: IndicesLike = None) -> pd.DataFrame:
    """Every step's candidates at each stage: the most likely, watched, named and drawn tokens.

    Columns: row, step, pos, stage ("model", "edited" or "processed"), token, token_id, logit,
    logprob, prob, rank, drawn (True for the token that was chosen), why ("top", "watched", "named"
    by a hook, "drawn"). `top` shows fewer of each stage's first tokens than were recorded. In beam
    search the logits of the stage "processed" are log-probabilities, since there the rules of
    transformers act on those.

    Raises `NotCaptured` if the run was made without trace=, and `OutOfRange` if `top` is larger
    than what was recorded.
    """
    record = _record_of(run)
    recorded = record.asked.top
    count = recorded if top is None else top
    if not 1 <= count <= recorded:
        raise OutOfRange(
            f"top={top!r}: {recorded} tokens of each stage are on record, so give 1 to {recorded}"
        )
    table_rows: list[dict[str, object]] = []
    for decision in _decisions_of(run, record, rows):
        table_rows += candidate_rows(record, decision, count)
    return pd.DataFrame(table_rows)


def candidate_rows(
    record: GenerationRecord, decision: Decision, count: int
) -> Iterator[dict[str, object]]:
    """Returns the rows of `decoding` for one step of one row, with `count` tokens of each stage."""
    row, ids = decision.model_row, decision.record.ids[decision.model_row].tolist()
    for name in STAGES:
        stage = decision.record.stages[name]
        why = reasons_of(
            {
                "top": stage.top[row, :count].tolist(),
                "watched": record.watched,
                "named": record.named,
                "drawn": (decision.token,),
            }
        )
        numbers = {token: _numbers(stage, row, ids.index(token)) for token in why}
        for token in sorted(why, key=lambda token: _sort_key(token, numbers[token])):
            yield {
                "row": decision.row,
                "step": decision.step,
                "pos": decision.pos,
                "stage": name,
                "token": repr(record.lm.string(token)),
                "token_id": token,
                **numbers[token],
                "drawn": token == decision.token,
                "why": why[token],
            }


def _sort_key(token: int, numbers: Mapping[str, float]) -> tuple[float, int]:
    """Sorts by rank, tokens without one last, and by id."""
    rank = numbers["rank"]
    return math.inf if math.isnan(rank) else rank, token


def _numbers(stage: Stage, row: int, column: int) -> dict[str, float]:
    logprob = stage.logprobs[row, column]
    return {
        "logit": stage.logits[row, column].item(),
        "logprob": logprob.item(),
        "prob": logprob.exp().item(),
        "rank": ranks_for_table(stage.ranks[row, column]).item(),
    }


@check_arguments
def decisions(run: Run, *, rows: IndicesLike = None) -> pd.DataFrame:
    """One row for each step: the chosen token, its numbers at each stage, and why it was chosen.

    Columns: row, step, pos, token, token_id, why (a sentence); logit, prob and rank of the token,
    each _model, _edited and _processed; entropy (nats), varentropy (nats²), margin (largest logit
    minus the second) and perplexity, each by stage too; candidates (tokens left to choose from);
    top1_model (the most likely token of the unedited model).

    Raises `NotCaptured` if the run was made without trace=.
    """
    record = _record_of(run)
    return pd.DataFrame(
        [decision_row(record, decision) for decision in _decisions_of(run, record, rows)]
    )


def decision_row(record: GenerationRecord, decision: Decision) -> dict[str, object]:
    """Returns one row of `decisions`."""
    row, ids = decision.model_row, decision.record.ids[decision.model_row].tolist()
    columns: dict[str, object] = {
        "row": decision.row,
        "step": decision.step,
        "pos": decision.pos,
        "token": repr(record.lm.string(decision.token)),
        "token_id": decision.token,
        "why": explain_choice(record, decision),
    }
    stages = {name: decision.record.stages[name] for name in STAGES}
    column = ids.index(decision.token)
    numbers = {name: _numbers(stage, row, column) for name, stage in stages.items()}
    for quantity in ("logit", "prob", "rank"):
        for name in STAGES:
            columns[f"{quantity}_{name}"] = numbers[name][quantity]
    for quantity in ("entropy", "varentropy", "margin"):
        for name in STAGES:
            columns[f"{quantity}_{name}"] = getattr(stages[name], quantity)[row].item()
    for name in STAGES:
        columns[f"perplexity_{name}"] = stages[name].entropy[row].exp().item()
    columns["candidates"] = int(stages["processed"].candidates[row])
    columns["top1_model"] = None
    if not math.isnan(stages["model"].entropy[row].item()):
        columns["top1_model"] = repr(record.lm.string(int(stages["model"].top[row, 0])))
    return columns


def explain_choice(record: GenerationRecord, decision: Decision) -> str:
    """Returns the sentence that says why a token was chosen."""
    row, ids = decision.model_row, decision.record.ids[decision.model_row].tolist()
    column = ids.index(decision.token)
    if bool(decision.record.stages["edited"].logprobs[row].isnan().any()):
        return "no reason: the logits are NaN or infinite, so that no token has a probability"
    ranks = {name: int(decision.record.stages[name].ranks[row, column]) for name in STAGES}
    moves = list(_moves(decision, column))
    force = _force_of(record, decision, moves)
    certain = force is not None and (force.decides or force.margin == math.inf)
    drawn = record.generation.mode != "greedy_search" and not certain
    if force is not None and ranks["edited"] == 1 and not drawn:
        reason = f"forced by {force}: rank {ranks['model']} for the model"
        return "; ".join([reason, *_removed_first(record, decision)])
    parts = [_choice(record, decision, column, ranks["processed"])]
    parts += _removed_first(record, decision)
    return "; ".join([*parts, *_rank_changes(record, ranks, moves)])


def _rank_changes(
    record: GenerationRecord, ranks: Mapping[str, int], moves: list[tuple[Hook, int, int]]
) -> Iterator[str]:
    """Returns how hooks and logits processors changed the token's rank."""
    movers = []
    for hook, before, after in moves:
        if before != after and not isinstance(hook, Ban | Restrict):
            movers.append(str(hook))
    if movers and ranks["model"] != ranks["edited"]:
        hooks = " and ".join(movers)
        yield f"{hooks} moved it from rank {ranks['model']} to {ranks['edited']}"
    elif ranks["model"] != 1 and record.generation.mode == "sample":
        yield f"rank {ranks['model']} for the model"
    if ranks["processed"] != ranks["edited"]:
        yield f"the logits processors moved it from rank {ranks['edited']} to {ranks['processed']}"


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


def _moves(decision: Decision, column: int) -> Iterator[tuple[Hook, int, int]]:
    """Returns the hooks that changed the logits, with the token's rank before and after each."""
    row = decision.model_row
    rank = int(decision.record.stages["model"].ranks[row, column])
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
    row, ids = decision.model_row, decision.record.ids[decision.model_row].tolist()
    first = int(decision.record.stages["model"].top[row, 0])
    edited_logit = decision.record.stages["edited"].logits[row, ids.index(first)]
    if edited_logit != -math.inf or first == decision.token:
        return []
    token = repr(record.lm.string(first))
    sentences = []
    for hook in decision.hooks:
        if isinstance(hook, Ban) and first in hook.named(record.lm):
            return [*sentences, f"banned {token} was first for the model"]
        if isinstance(hook, Restrict) and first not in hook.named(record.lm):
            sentences.append(f"{hook} left out {token}, first for the model")
    return sentences


def _record_of(run: Run) -> GenerationRecord:
    if run.recorded is None:
        raise NotCaptured(
            "this run kept no record of its steps: make it with hk.generate(..., trace=hk.trace())"
        )
    return run.recorded


def _decisions_of(run: Run, record: GenerationRecord, rows: IndicesLike) -> list[Decision]:
    selected = set(resolve_rows(read_indices(rows, "row", negative=False), len(run.lengths)))
    return [decision for decision in record.decisions if decision.row in selected]
