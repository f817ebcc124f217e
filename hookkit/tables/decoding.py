"""Tables of a generation: every step's candidates at each stage, and why each token was chosen.

    run = hk.generate(lm, prompt, hk.ban(" coffee"), trace=hk.trace(watch=" tea"), max_new_tokens=10)
    hk.decisions(run)[["step", "token", "why"]]
    hk.decoding(run)                                  # all candidates of all steps, at all stages

`pos` is the position whose logits chose the token, as in all tables.
"""

import math
from collections.abc import Iterator, Mapping

import pandas as pd

from ..arguments import checks_arguments
from ..errors import NotCaptured, OutOfRange
from ..hooks.base import Hook
from ..hooks.logits import Ban, Force, Restrict
from ..models.positions import CountLike, as_count, chosen
from ..models.tokens import shown_ranks
from ..runs.run import Run
from ..runs.trace import STAGES, Decision, Recorded, Stage

SUMS = ("entropy", "varentropy", "perplexity", "margin")


@checks_arguments
def decoding(run: Run, *, top: int | None = None, rows: CountLike = None) -> pd.DataFrame:
    """Every step's candidates at each stage, a row each: the top ones, the watched, named and drawn ones.

    Columns: row, step, pos, stage ("model", "edited" or "processed"), token, token_id, logit, logprob, prob, rank,
    drawn (True for the token that was chosen), why ("top", "watched", "named" by a hook, "drawn"). `top` shows fewer of
    each stage's first than were recorded. In beam search the logits of the stage "processed" are log-probabilities,
    as there transformers' rules act on those.

    Raises `NotCaptured` where the run was made without trace=, `OutOfRange` for a `top` that is not on record.
    """
    record = _record(run)
    shown = record.asked.top if top is None else top
    if not 1 <= shown <= record.asked.top:
        most = record.asked.top
        raise OutOfRange(
            f"top={top!r}: {most} tokens of each stage are on record, so give 1 to {most}"
        )
    parts = [
        part
        for decision in _of_rows(run, record, rows)
        for part in candidates(record, decision, shown)
    ]
    return pd.DataFrame(parts)


def candidates(record: Recorded, decision: Decision, shown: int) -> Iterator[dict[str, object]]:
    """The rows of `decoding` for one step of one row."""
    ids = decision.record.ids[decision.model_row].tolist()
    for name in STAGES:
        stage = decision.record.stages[name]
        reasons = {"top": stage.top[decision.model_row, :shown].tolist(), "watched": record.watched}
        reasons |= {"named": record.named, "drawn": (decision.token,)}
        why: dict[int, list[str]] = {}
        for reason, tokens in reasons.items():
            for token in tokens:
                why.setdefault(token, []).append(reason)
        numbers = sorted(
            (
                {"token_id": token, **_numbers(stage, decision.model_row, ids.index(token))}
                for token in why
            ),
            key=_order,
        )
        for found in numbers:
            token = int(found["token_id"])
            place = {"row": decision.row, "step": decision.step, "pos": decision.pos, "stage": name}
            yield place | {"token": repr(record.lm.string(token))} | found | {
                "drawn": token == decision.token, "why": ", ".join(why[token])
            }  # fmt: skip


def _order(numbers: Mapping[str, float]) -> tuple[float, float]:
    """By rank, tokens without one last, and by id."""
    rank = numbers["rank"]
    return math.inf if math.isnan(rank) else rank, numbers["token_id"]


def _numbers(stage: Stage, row: int, column: int) -> dict[str, float]:
    logit, logprob = stage.logits[row, column].item(), stage.logprobs[row, column]
    return {
        "logit": logit,
        "logprob": logprob.item(),
        "prob": logprob.exp().item(),
        "rank": shown_ranks(stage.ranks[row, column]).item(),
    }


@checks_arguments
def decisions(run: Run, *, rows: CountLike = None) -> pd.DataFrame:
    """One row for each step: the token that was chosen, what became of it from stage to stage, and why it was chosen.

    Columns: row, step, pos, token, token_id, why (a sentence); logit, prob and rank of the token, each _model, _edited
    and _processed; entropy (nats), varentropy (nats²), perplexity, margin (largest logit minus the second), each by
    stage too; candidates (tokens left to choose from); top1_model (what the model itself would have said).

    Raises `NotCaptured` where the run was made without trace=.
    """
    record = _record(run)
    return pd.DataFrame([decided(record, decision) for decision in _of_rows(run, record, rows)])


def decided(record: Recorded, decision: Decision) -> dict[str, object]:
    """One row of `decisions`."""
    row, ids = decision.model_row, decision.record.ids[decision.model_row].tolist()
    found: dict[str, object] = {"row": decision.row, "step": decision.step, "pos": decision.pos}
    found |= {
        "token": repr(record.lm.string(decision.token)),
        "token_id": decision.token,
        "why": why(record, decision),
    }
    stages = {name: decision.record.stages[name] for name in STAGES}
    numbers = {
        name: _numbers(stage, row, ids.index(decision.token)) for name, stage in stages.items()
    }
    for quantity in ("logit", "prob", "rank"):
        found |= {f"{quantity}_{name}": numbers[name][quantity] for name in STAGES}
    for quantity in ("entropy", "varentropy", "margin"):
        found |= {
            f"{quantity}_{name}": getattr(stages[name], quantity)[row].item() for name in STAGES
        }
    found |= {f"perplexity_{name}": stages[name].entropy[row].exp().item() for name in STAGES}
    found["candidates"] = int(stages["processed"].candidates[row])
    known = not math.isnan(stages["model"].entropy[row].item())
    found["top1_model"] = (
        repr(record.lm.string(int(stages["model"].top[row, 0]))) if known else None
    )
    return found


def why(record: Recorded, decision: Decision) -> str:
    """The sentence that says why a token was chosen."""
    row, ids = decision.model_row, decision.record.ids[decision.model_row].tolist()
    column = ids.index(decision.token)
    if bool(decision.record.stages["edited"].logprobs[row].isnan().any()):
        return "no reason: the logits are NaN or infinite, so that no token has a probability"
    ranks = {name: int(decision.record.stages[name].ranks[row, column]) for name in STAGES}
    moves = list(_moves(decision, column))
    forced = _forced(record, decision, moves)
    certain = isinstance(forced, Force) and (forced.decides or forced.margin == math.inf)
    drawn = record.generation.mode != "greedy_search" and not certain
    if forced is not None and ranks["edited"] == 1 and not drawn:
        sentence = f"forced by {forced}: rank {ranks['model']} for the model"
        return "; ".join([sentence, *_taken_out(record, decision)])
    parts = [_chosen(record, decision, column, ranks["processed"]), *_taken_out(record, decision)]
    movers = [
        str(hook) for hook, was, now in moves if was != now and not isinstance(hook, Ban | Restrict)
    ]
    if movers and ranks["model"] != ranks["edited"]:
        parts.append(
            f"{' and '.join(movers)} moved it from rank {ranks['model']} to {ranks['edited']}"
        )
    elif ranks["model"] != 1 and record.generation.mode == "sample":
        parts.append(f"rank {ranks['model']} for the model")
    if ranks["processed"] != ranks["edited"]:
        parts.append(
            f"the logits processors moved it from rank {ranks['edited']} to {ranks['processed']}"
        )
    return "; ".join(parts)


def _chosen(record: Recorded, decision: Decision, column: int, rank: int) -> str:
    """How transformers chose the token."""
    stage, row = decision.record.stages["processed"], decision.model_row
    count, mode, rules = int(stage.candidates[row]), record.generation.mode, record.generation.rules
    suffix = f" ({rules})" if rules else ""
    if count == 1:
        return f"the only candidate left{suffix}"
    if mode == "sample":
        return f"drawn with p = {stage.logprobs[row, column].exp().item():.2g} among {count} candidates{suffix}"
    if mode == "beam_search":
        return f"beam search: rank {rank} of {count} on the best of {record.generation.beams} beams"
    if stage.margin[row] == 0:
        return f"greedy: first of {count}, with the lowest id of those that share the largest logit"
    return f"greedy: first of {count}"


def _moves(decision: Decision, column: int) -> Iterator[tuple[Hook, int, int]]:
    """The hooks that changed the logits, with the token's rank before and after each."""
    row, was = (
        decision.model_row,
        int(decision.record.stages["model"].ranks[decision.model_row, column]),
    )
    for changed in decision.record.changes:
        if changed.rows[row]:
            now = int(changed.ranks[row, column])
            yield changed.hook, was, now
            was = now


def _forced(
    record: Recorded, decision: Decision, moves: list[tuple[Hook, int, int]]
) -> Hook | None:
    """The last hook that put this token first."""
    for hook, _, now in reversed(moves):
        if isinstance(hook, Force) and now == 1 and decision.token in hook.named(record.lm):
            return hook
    return None


def _taken_out(record: Recorded, decision: Decision) -> Iterator[str]:
    """What is to be said of the model's own first token if a hook took it out."""
    first = int(decision.record.stages["model"].top[decision.model_row, 0])
    column = decision.record.ids[decision.model_row].tolist().index(first)
    if (
        decision.record.stages["edited"].logits[decision.model_row, column] != -float("inf")
        or first == decision.token
    ):
        return
    token = repr(record.lm.string(first))
    for hook in decision.hooks:
        if isinstance(hook, Ban) and first in hook.named(record.lm):
            yield f"banned {token} was first for the model"
            return
        if isinstance(hook, Restrict) and first not in hook.named(record.lm):
            yield f"{hook} left out {token}, first for the model"


def _record(run: Run) -> Recorded:
    if run.recorded is None:
        raise NotCaptured(
            "this run kept no record of its steps: make it with hk.generate(..., trace=hk.trace())"
        )
    return run.recorded


def _of_rows(run: Run, record: Recorded, rows: CountLike) -> list[Decision]:
    wanted = set(chosen(as_count(rows, "row", negative=False), len(run.lengths)))
    return [decision for decision in record.decisions if decision.row in wanted]
