"""Tables: from runs to pandas DataFrames, one row per observation.

Every table has `row` (the prompt in the batch) and `pos` (the position whose logits it is about: the token there is
the last one read, and the logits say what comes next). Tokens are shown as Python strings in quotes, so that a leading
space is seen; `token_id` is the one to filter by. Probabilities are 0 to 1, entropies in nats, logits raw; rank 1 is
the most likely token, and equal logits share a rank. A delta is after minus before; a shift is positive for a token
that rose.

Where a model gives NaN for a logit, all that follows from it is NaN: probabilities, entropies, divergences and that
token's rank (a column of ranks then has floating-point numbers), and no token is named as the most likely one.
"""

import math
from collections.abc import Iterable, Iterator
from typing import TypeAlias

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from ..arguments import checks_arguments, read_tokens, whole_number
from ..errors import OutOfRange
from ..hooks.logits import LogitEdit
from ..models.lm import LM, Token
from ..models.positions import CountLike, PosLike
from ..models.tokens import NO_RANK, shown_ranks
from ..runs.run import Run
from .distributions import Distribution, distributions, divergences, scenario

Pair: TypeAlias = tuple[Distribution, Distribution]


@checks_arguments
def ranks(
    run: Run,
    *,
    pos: PosLike = None,
    step: CountLike = None,
    rows: CountLike = None,
    top: int | None = 10,
    watch: Iterable[Token] | Token = (),
) -> pd.DataFrame:
    """The most likely next tokens at a position, and the watched tokens wherever they stand.

    Columns: row, pos, token, token_id, logit, logprob, prob, rank. One row of the table a token, by rank. `pos` is the
    prompt's last position unless said otherwise; `step` counts generated tokens (0 is what follows the prompt), and is
    then a column too. `top=None` gives the whole vocabulary, `top=0` the watched tokens alone.

    >>> ranks(run, top=2, watch=" tea")[["token", "rank"]]
            token  rank
    0   ' coffee'     1
    1  ' morning'     2
    2      ' tea'     5
    """
    pos = -1 if pos is None and step is None else pos
    watched = _token_ids(run.lm, watch)
    _check_top(top, least=0 if watched else 1)
    parts = []
    for said in distributions(run, pos=pos, step=step, rows=rows):
        ids = torch.tensor(list(dict.fromkeys([*said.top(top), *watched])))
        parts.append(_place(said, ids) | _numbers(said, ids))
    table = pd.concat([pd.DataFrame(part) for part in parts], ignore_index=True)
    return table.sort_values(["row", "pos", "rank", "token_id"], ignore_index=True)


def _place(said: Distribution, ids: Int[Tensor, " n"]) -> dict[str, object]:
    tokens = [repr(said.lm.string(i)) for i in ids.tolist()]
    return {**said.place, "token": tokens, "token_id": ids.tolist()}


def _numbers(said: Distribution, ids: Int[Tensor, " n"], suffix: str = "") -> dict[str, object]:
    columns = {"logit": said.logits, "logprob": said.logprobs, "prob": said.probs}
    found: dict[str, object] = {
        name + suffix: values[ids].double().tolist() for name, values in columns.items()
    }
    return found | {"rank" + suffix: shown_ranks(said.ranks(ids)).tolist()}


@checks_arguments
def rank_shift(
    before: Run,
    after: Run,
    *,
    pos: PosLike = None,
    step: CountLike = None,
    rows: CountLike = None,
    top: int = 10,
    movers: int = 3,
    watch: Iterable[Token] | Token = (),
) -> pd.DataFrame:
    """How the ranking of tokens moved from one run to another, and why each token is in the table.

    Columns: row, pos, token, token_id; logit, logprob, prob and rank, each with _before, _after and _delta (after minus
    before); shift (ranks risen: positive for a token that rose); why. In `why`, "top before" and "top after" are the
    first `top` of each run, "mover" the `movers` tokens each that rose and fell by the largest factor in rank, "edited"
    a token that a hook of either run names, "watched" one that was asked for. By rank after.

    Positions are taken in each run's own text, so that pos=-1 compares the two prompts' last tokens. `pos` in the table
    is that of `after`.
    """
    pos = -1 if pos is None and step is None else pos
    pairs = _pairs(before, after, pos=pos, step=step, rows=rows)
    return shift_of(pairs, top, movers, _token_ids(after.lm, watch), _edited(before, after))


def shift_of(
    pairs: Iterable[Pair], top: int, movers: int, watched: list[int], edited: list[int]
) -> pd.DataFrame:
    """`rank_shift` of distributions before and after."""
    _check_top(top)
    whole_number(movers, "movers", least=0, meaning="how many tokens that moved most to show,")
    parts = []
    for was, now in pairs:
        reasons = {
            "top before": was.top(top),
            "top after": now.top(top),
            "mover": _movers(was, now, movers),
        }
        reasons |= {"edited": edited, "watched": watched}
        why: dict[int, list[str]] = {}
        for reason, tokens in reasons.items():
            for token in tokens:
                why.setdefault(token, []).append(reason)
        ids = torch.tensor(list(why))
        part = pd.DataFrame(
            _place(now, ids) | _numbers(was, ids, "_before") | _numbers(now, ids, "_after")
        )
        parts.append(
            _with_deltas(part).assign(why=[", ".join(reasons) for reasons in why.values()])
        )
    table = pd.concat(parts, ignore_index=True)
    return table.sort_values(["row", "pos", "rank_after", "token_id"], ignore_index=True)


def _with_deltas(part: pd.DataFrame) -> pd.DataFrame:
    names = ("logit", "logprob", "prob", "rank")
    for name in names:
        was, now = part[f"{name}_before"], part[f"{name}_after"]
        part[f"{name}_delta"] = (now - was).where(now != was, 0)  # -inf minus -inf is no change
    part["shift"] = -part["rank_delta"]
    order = [f"{name}_{when}" for name in names for when in ("before", "after", "delta")]
    places = [name for name in ("row", "pos", "step", "token", "token_id") if name in part]
    return pd.DataFrame(part[[*places, *order, "shift"]])


def _pairs(before: Run, after: Run, **places: object) -> Iterator[Pair]:
    was = list(distributions(before, **places))  # pyright: ignore[reportArgumentType]
    now = list(distributions(after, **places))  # pyright: ignore[reportArgumentType]
    if [said.place["row"] for said in was] != [said.place["row"] for said in now]:
        raise OutOfRange(
            f"the runs have {len(was)} and {len(now)} positions to compare: give runs of the same number of prompts, "
            "and say which positions or steps are meant"
        )
    sizes = {len(was[0].logits), len(now[0].logits)}
    if len(sizes) > 1:
        raise OutOfRange(
            f"the runs have vocabularies of {sorted(sizes)} tokens, whose ranks cannot be compared"
        )
    return zip(was, now, strict=True)


def _movers(was: Distribution, now: Distribution, count: int) -> list[int]:
    """The tokens whose rank changed by the largest factor, up and down: from 200 to 20 is as far as from 20 to 2."""
    ids = torch.arange(len(now.real))
    before, after = was.ranks(ids), now.ranks(ids)
    ranked = (before != NO_RANK) & (after != NO_RANK)
    factor = (before.log() - after.log()).masked_fill(~ranked, 0.0)
    up, down = factor.topk(min(count, len(ids))), (-factor).topk(min(count, len(ids)))
    moved = [*zip(*map(list, (up.indices.tolist(), up.values.tolist())), strict=True)]
    moved += [*zip(*map(list, (down.indices.tolist(), down.values.tolist())), strict=True)]
    return [int(token) for token, by in moved if by > 0]


def _edited(*runs: Run) -> list[int]:
    """The tokens that the runs' logit edits name."""
    hooks = [(run.lm, hook) for run in runs for hook in run.hooks if isinstance(hook, LogitEdit)]
    return list(dict.fromkeys(token for lm, hook in hooks for token in hook.named(lm)))


@checks_arguments
def shift_summary(
    before: Run,
    after: Run,
    *,
    pos: PosLike = None,
    step: CountLike = None,
    rows: CountLike = None,
    top: int = 10,
) -> pd.DataFrame:
    """How far the whole distribution moved from one run to another: one row for each position.

    Columns: row, pos; kl (KL(before‖after), in nats: infinite where a token was banned), kl_reverse (KL(after‖before)),
    js (Jensen-Shannon divergence, in nats, at most ln 2), tv (total variation, 0 to 1); entropy and margin (largest
    logit minus the second), each with _before, _after and _delta; top1_before, top1_after, top1_changed; kept (how many
    of the first `top` tokens are still among them).
    """
    pos = -1 if pos is None and step is None else pos
    return summary_of(_pairs(before, after, pos=pos, step=step, rows=rows), top)


def summary_of(pairs: Iterable[Pair], top: int = 10) -> pd.DataFrame:
    """`shift_summary` of distributions before and after."""
    _check_top(top)
    rows_of_table = []
    for was, now in pairs:
        known = not (was.unknown or now.unknown)
        firsts = was.top(1)[0], now.top(1)[0]
        found: dict[str, object] = {**now.place, **divergences(was, now)}
        for name, a, b in (
            ("entropy", was.entropy, now.entropy),
            ("margin", was.margin, now.margin),
        ):
            found |= {f"{name}_before": a, f"{name}_after": b, f"{name}_delta": b - a}
        found |= {"top1_before": _first(was, firsts[0]), "top1_after": _first(now, firsts[1])}
        found |= {"top1_changed": firsts[0] != firsts[1] if known else None}
        found |= {"kept": len({*was.top(top)} & {*now.top(top)}) if known else None}
        rows_of_table.append(found)
    return pd.DataFrame(rows_of_table)


def _first(said: Distribution, token: int) -> str | None:
    """A most likely token, or None where logits are NaN and no token is."""
    return None if said.unknown else repr(said.lm.string(token))


@checks_arguments
def uncertainty(
    run: Run, *, pos: PosLike = None, step: CountLike = None, rows: CountLike = None
) -> pd.DataFrame:
    """How sure the model is, one row for each position (all that have logits, unless chosen).

    Columns: row, pos, read (the token there, the last one read); entropy (nats), varentropy (nats²), perplexity
    (e^entropy: as unsure as an even choice among so many tokens), margin (largest logit minus the second), prob_margin,
    top1, top1_prob, nucleus_90 (how many tokens make up 90 % of the probability), top2, top2_prob, and scenario: "very
    confident" (top1_prob at least 0.9), "two good options" (top2_prob at least half of it, both together at least 0.6),
    "one clear winner" (top1_prob at least 0.5), else "uncertain", the first that fits; "unknown" where logits are NaN.
    """
    found = []
    for said in distributions(run, pos=pos, step=step, rows=rows):
        best = said.exact.exp().sort(descending=True).values
        first, second = said.top(2)
        probs = float(said.probs[first]), float(said.probs[second])
        found.append(
            {
                **said.place,
                "read": repr(run.lm.string(int(run.tokens[said.place["row"], said.place["pos"]]))),
                "entropy": said.entropy,
                "varentropy": said.varentropy,
                "perplexity": math.exp(said.entropy),
                "margin": said.margin,
                "prob_margin": float(best[0] - best[1]),
                "top1": _first(said, first),
                "top1_prob": probs[0],
                "nucleus_90": math.nan
                if said.unknown
                else int((best.cumsum(0) < 0.9 - 1e-9).sum()) + 1,
                "top2": _first(said, second),
                "top2_prob": probs[1],
                "scenario": scenario(*probs),
            }
        )
    return pd.DataFrame(found)


def _token_ids(lm: LM, watch: Iterable[Token] | Token) -> list[int]:
    return [lm.token(token) for token in read_tokens(watch, "watch")]


def _check_top(top: int | None, *, least: int = 1) -> None:
    if top is not None:
        whole_number(top, "top", least=least, meaning="how many tokens to show")
