"""Tables of ranks, shifts and uncertainty: from runs to pandas DataFrames, one row per observation.

`sampling_distributions` shows the effect of temperature, top-k and top-p on a distribution.

Every table has `row` (the prompt in the batch) and `pos` (the position of the logits: the token
there is the last one read, and the logits predict the next one). `token` is the plain text of a
token, with its leading space, and `token_id` tells tokens of the same text apart; `hk.show` prints
tokens in quotes. Probabilities are 0 to 1, entropies in nats, logits raw. Rank 1 is the most likely
token, and equal logits share a rank. A delta is after minus before; `rank_delta` is negative for a
token that rose.

If a model gives NaN for a logit, everything that depends on it is NaN: probabilities, entropies,
divergences and the token's rank (a column of ranks then has floating-point numbers). No token is
then named as the most likely one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import pandas as pd
import torch

from ..arguments import as_items, check_arguments, check_integer, check_number
from ..errors import BadHook, OutOfRange
from ..hooks.logits import named_tokens
from ..models.lm import LM
from ..models.next_token import NO_RANK, divergences
from ..models.positions import IndicesLike, PosLike
from ..models.words import WordLike, check_words, token_ids
from ..runs.run import Run
from .distributions import (
    Distribution,
    add_roles,
    distributions,
    prompts_of_run,
    scenario,
    token_texts,
)

Pair: TypeAlias = tuple[Distribution, Distribution]


@check_arguments
def ranks(
    run: Run,
    *,
    pos: PosLike = None,
    step: IndicesLike = None,
    rows: IndicesLike = None,
    top: int | None = 10,
    watch: Iterable[WordLike] | WordLike = (),
) -> pd.DataFrame:
    """The most likely next tokens at a position, and the watched tokens with any rank.

    Columns: row, pos, token, token_id, logit, logprob, prob, rank. The table has one row for each
    token, ordered by rank. `pos` is the prompt's last position by default (a masked language model
    needs that of a mask, pos=hk.at("[MASK]")); `step` counts generated
    tokens (0 is the first after the prompt), and is then a column too. `top=None` gives the whole
    vocabulary, `top=0` only the watched tokens.

    >>> ranks(run, top=2, watch=" tea")[["token", "rank"]]
          token  rank
    0    coffee     1
    1   morning     2
    2       tea     5
    """
    pos = _default_pos(run.lm, pos, step)
    watched = watched_ids(run.lm, watch)
    _check_top(top, least=0 if watched else 1)
    parts = []
    for distribution in distributions(run, pos=pos, step=step, rows=rows):
        ids = torch.tensor(list(dict.fromkeys([*distribution.top(top), *watched])))
        parts.append(pd.DataFrame(distribution.names(ids) | distribution.numbers(ids)))
    table = pd.concat(parts, ignore_index=True)
    table.attrs |= prompts_of_run(run)
    return table.sort_values(["row", "pos", "rank", "token_id"], ignore_index=True)


def _default_pos(lm: LM, pos: PosLike, step: IndicesLike) -> PosLike:
    """Returns the prompt's last position if neither a position nor a step is selected."""
    if pos is not None or step is not None:
        return pos
    lm.refuse_next_token()
    return -1


@check_arguments
def rank_shift(
    before: Run,
    after: Run,
    *,
    pos: PosLike = None,
    step: IndicesLike = None,
    rows: IndicesLike = None,
    top: int = 10,
    movers: int = 3,
    watch: Iterable[WordLike] | WordLike = (),
) -> pd.DataFrame:
    """How the ranks of tokens changed from one run to another, and why each token is in the table.

    Columns: row, pos, token, token_id; logit, logprob, prob and rank, each with _before, _after and
    _delta (after minus before; `rank_delta` is negative for a token that rose); why. In `why`,
    "top before" and "top after" are the first `top` of each run, "mover" the `movers` tokens each
    that rose and fell by the largest factor in rank, "edited" a token that a hook of either run
    names, "watched" a token of `watch`. The table is ordered by rank after.

    Positions are counted in each run's own text, so that pos=-1 compares the two prompts' last
    tokens. `pos` in the table is that of `after`.
    """
    pos = _default_pos(after.lm, pos, step)
    pairs = _pairs(before, after, pos=pos, step=step, rows=rows)
    edited = [*named_tokens(before.lm, before.hooks), *named_tokens(after.lm, after.hooks)]
    watched = watched_ids(after.lm, watch)
    table = shift_table(pairs, top, movers, watched, list(dict.fromkeys(edited)))
    table.attrs |= prompts_of_run(after)
    return table


def shift_table(
    pairs: Iterable[Pair], top: int, movers: int, watched: list[int], edited: list[int]
) -> pd.DataFrame:
    """Returns the table of `rank_shift` for distributions before and after."""
    _check_top(top)
    check_integer(movers, "movers", least=0, meaning="how many tokens that moved most to show,")
    parts = []
    reasons: list[str] = []
    for before, after in pairs:
        why = reasons_of(
            {
                "top before": before.top(top),
                "top after": after.top(top),
                "mover": _movers(before, after, movers),
                "edited": edited,
                "watched": watched,
            }
        )
        ids = torch.tensor(list(why))
        columns = before.numbers(ids, "_before") | after.numbers(ids, "_after")
        parts.append(pd.DataFrame(after.names(ids) | columns))
        reasons += why.values()
    table = add_deltas(pd.concat(parts, ignore_index=True), ("logit", "logprob", "prob", "rank"))
    table = table.assign(why=reasons)
    return table.sort_values(["row", "pos", "rank_after", "token_id"], ignore_index=True)


def reasons_of(tokens_by_reason: Mapping[str, Iterable[int]]) -> dict[int, str]:
    """Returns the reasons for which each token is in a table, joined by commas."""
    reasons: dict[int, list[str]] = {}
    for reason, tokens in tokens_by_reason.items():
        for token in tokens:
            reasons.setdefault(token, []).append(reason)
    return {token: ", ".join(names) for token, names in reasons.items()}


def add_deltas(table: pd.DataFrame, names: Iterable[str]) -> pd.DataFrame:
    """Returns the table with NAME_before, NAME_after, NAME_delta of each name as its last columns.

    A delta is after minus before. It is 0 where both are the same infinite number.
    """
    for name in names:
        before, after = table[f"{name}_before"], table[f"{name}_after"]
        deltas = (after - before).where(after != before, 0)
        table = table.drop(columns=[f"{name}_before", f"{name}_after"]).assign(
            **{f"{name}_before": before, f"{name}_after": after, f"{name}_delta": deltas}
        )
    return table


def _pairs(
    before: Run, after: Run, *, pos: PosLike, step: IndicesLike, rows: IndicesLike
) -> Iterator[Pair]:
    befores = list(distributions(before, pos=pos, step=step, rows=rows))
    afters = list(distributions(after, pos=pos, step=step, rows=rows))
    rows_before = [distribution.location["row"] for distribution in befores]
    rows_after = [distribution.location["row"] for distribution in afters]
    if rows_before != rows_after:
        raise OutOfRange(
            f"the runs have {len(befores)} and {len(afters)} positions to compare: give runs of "
            "the same number of prompts, and say which positions or steps are meant"
        )
    sizes = {len(befores[0].logits), len(afters[0].logits)}
    if len(sizes) > 1:
        raise OutOfRange(
            f"the runs have vocabularies of {sorted(sizes)} tokens, whose ranks cannot be compared"
        )
    return zip(befores, afters, strict=True)


def _movers(before: Distribution, after: Distribution, count: int) -> list[int]:
    """Returns the tokens whose rank changed by the largest factor, up and down.

    A change from rank 200 to 20 is as large as one from 20 to 2.
    """
    ids = torch.arange(len(after.real))
    ranks_before, ranks_after = before.ranks(ids), after.ranks(ids)
    ranked = (ranks_before != NO_RANK) & (ranks_after != NO_RANK)
    factors = (ranks_before.log() - ranks_after.log()).masked_fill(~ranked, 0.0)
    movers: list[int] = []
    for changes in (factors, -factors):
        largest = changes.topk(min(count, len(ids)))
        movers += largest.indices[largest.values > 0].tolist()
    return movers


@check_arguments
def shift_summary(
    before: Run,
    after: Run,
    *,
    pos: PosLike = None,
    step: IndicesLike = None,
    rows: IndicesLike = None,
    top: int = 10,
) -> pd.DataFrame:
    """How far the whole distribution moved from one run to another: one row for each position.

    Columns: row, pos; kl (KL(before‖after), in nats: infinite if a token was banned), kl_reverse
    (KL(after‖before)), js (Jensen-Shannon divergence, in nats, at most ln 2), tv (total variation,
    0 to 1); entropy and margin (largest logit minus the second), each with _before, _after and
    _delta; top1_before, top1_after, top1_changed; top_overlap (how many of the first `top` tokens
    are still among them).
    """
    pos = _default_pos(after.lm, pos, step)
    pairs = _pairs(before, after, pos=pos, step=step, rows=rows)
    return summary_table(pairs, top)


def summary_table(pairs: Iterable[Pair], top: int = 10) -> pd.DataFrame:
    """Returns the table of `shift_summary` for distributions before and after."""
    _check_top(top)
    return pd.DataFrame([_summary_row(before, after, top) for before, after in pairs])


def _summary_row(before: Distribution, after: Distribution, top: int) -> dict[str, object]:
    distances = divergences(before.exact, after.exact)
    columns: dict[str, object] = {**after.location}
    columns |= {name: float(value) for name, value in distances.items()}
    for name in ("entropy", "margin"):
        number_before, number_after = getattr(before, name), getattr(after, name)
        columns[f"{name}_before"], columns[f"{name}_after"] = number_before, number_after
        columns[f"{name}_delta"] = number_after - number_before
    (columns["top1_before"],), (columns["top1_after"],) = before.top_names(1), after.top_names(1)
    columns["top1_changed"] = columns["top_overlap"] = None
    if not (before.unknown or after.unknown):
        columns["top1_changed"] = before.top(1) != after.top(1)
        columns["top_overlap"] = len(set(before.top(top)) & set(after.top(top)))
    return columns


@check_arguments
def uncertainty(
    run: Run, *, pos: PosLike = None, step: IndicesLike = None, rows: IndicesLike = None
) -> pd.DataFrame:
    """How sure the model is: one row for each selected position, by default all that have logits.

    Columns: row, pos, read (the token there, the last one read); entropy (nats), varentropy
    (nats²), perplexity (e^entropy: as unsure as an even choice among that many tokens), margin
    (largest logit minus the second), prob_margin, top1, top1_prob, nucleus_90 (how many tokens make
    up 90 % of the probability), top2, top2_prob, and scenario: "very confident" (top1_prob at least
    0.9), "two good options" (top2_prob at least half of it, both together at least 0.6), "one clear
    winner" (top1_prob at least 0.5), else "uncertain", the first that fits; "unknown" if logits are
    NaN.
    """
    table_rows = []
    for distribution in distributions(run, pos=pos, step=step, rows=rows):
        row, position = distribution.location["row"], distribution.location["pos"]
        (token,) = token_texts(run.lm, [int(run.tokens[row, position])])
        table_rows.append({**distribution.location, "read": token, **_uncertainty(distribution)})
    return add_roles(pd.DataFrame(table_rows), run.roles)


def _uncertainty(distribution: Distribution) -> dict[str, object]:
    probs = distribution.exact.exp().sort(descending=True).values
    nucleus = math.nan
    if not distribution.unknown:
        nucleus = int((probs.cumsum(0) < 0.9 - 1e-9).sum()) + 1
    first_prob, second_prob = distribution.probs[distribution.top(2)].tolist()
    first, second = distribution.top_names(2)
    return {
        "entropy": distribution.entropy,
        "varentropy": distribution.varentropy,
        "perplexity": math.exp(distribution.entropy),
        "margin": distribution.margin,
        "prob_margin": float(probs[0] - probs[1]),
        "top1": first,
        "top1_prob": first_prob,
        "nucleus_90": nucleus,
        "top2": second,
        "top2_prob": second_prob,
        "scenario": scenario(first_prob, second_prob),
    }


@check_arguments
def sampling_distributions(
    run: Run,
    *,
    pos: PosLike = -1,
    rows: IndicesLike = None,
    temperature: float | Sequence[float] = (),
    top_k: int | Sequence[int] = (),
    top_p: float | Sequence[float] = (),
    top: int = 5,
) -> pd.DataFrame:
    """The distribution of the model, and the one that sampling draws from with each setting alone.

    Columns: row, pos, setting ("as it is", "temperature=0.5", …), token, token_id, prob, rank, kept
    (False if the setting took the token out), and of the whole distribution tokens_kept, entropy
    (nats) and perplexity (e^entropy). Every setting shows the same tokens: the first `top` of the
    distribution as it is. `pos` is the prompt's last position by default.

    Temperature divides all logits and changes no rank. Top-k keeps the k most likely tokens. Top-p
    (nucleus sampling) keeps the fewest tokens that together have the probability p. The probability
    of the other tokens is shared among those that are kept.

    The settings are the warpers that `generate` samples with (temperature: Ackley et al. 1985;
    top_k: Fan et al. 2018; top_p: Holtzman et al. 2020). Raises `BadHook` for values that they
    cannot take, or if no setting is given.

    >>> table = sampling_distributions(run, temperature=0.5, top_k=1, top=1)
    >>> table[["setting", "prob", "tokens_kept"]].round(3)
               setting   prob  tokens_kept
    0         as it is  0.152        49152
    1  temperature=0.5  0.405        49152
    2          top_k=1  1.000            1
    """
    warpers = list(_warpers(temperature, top_k, top_p))
    if not warpers:
        raise BadHook(
            "no setting was given: say temperature=(0.5, 1, 2), top_k=(5, 50) or top_p=(0.5, 0.9)"
        )
    check_integer(top, "top", least=1, meaning="how many tokens to show,")
    parts = []
    for distribution in distributions(run, pos=pos, rows=rows):
        ids = torch.tensor(distribution.top(top))
        for setting, warper in [("as it is", None), *warpers]:
            result = distribution
            if warper is not None:  # these three do not read the token ids
                result = replace(distribution, logits=warper(None, distribution.logits[None])[0])
            numbers = result.numbers(ids)
            columns = {
                **result.location,
                "setting": setting,
                **result.names(ids),
                "prob": numbers["prob"],
                "rank": numbers["rank"],
                "kept": (result.logits[ids] > -math.inf).tolist(),
                "tokens_kept": int((result.real > -math.inf).sum()),
                "entropy": result.entropy,
                "perplexity": math.exp(result.entropy),
            }
            parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


def _warpers(temperature: Any, top_k: Any, top_p: Any) -> Iterator[tuple[str, Any]]:
    """Returns the name of each setting and the warper that transformers has for it."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    for item in _items(temperature):
        meaning = "a temperature (greedy is top_k=1),"
        value = check_number(item, "temperature", above=0.0, meaning=meaning)
        yield f"temperature={value:g}", TemperatureLogitsWarper(float(value))
    for item in _items(top_k):
        value = check_integer(item, "top_k", least=1, meaning="how many tokens,", error=BadHook)
        yield f"top_k={value}", TopKLogitsWarper(value)
    for item in _items(top_p):
        value = check_number(item, "top_p", above=0.0, most=1.0, meaning="a probability")
        yield f"top_p={value:g}", TopPLogitsWarper(float(value))


def _items(values: Any) -> list[Any]:
    items = as_items(values)
    return [values] if items is None else items


def watched_ids(lm: LM, watch: Iterable[WordLike] | WordLike) -> list[int]:
    """Returns the ids of the tokens of `watch=`; of a word, of its spellings of one token."""
    return token_ids(lm, check_words(watch, "watch"))


def _check_top(top: int | None, *, least: int = 1) -> None:
    if top is not None:
        check_integer(top, "top", least=least, meaning="how many tokens to show")
