"""Surprisal: how well the model predicts each token of a text, and how an edit changes that.

    run = hk.forward(lm, "We love deep learning")
    hk.surprisal(run, top=3)                # each token: its loss, its rank, and the likeliest ones
    hk.surprisal_shift(run, hk.forward(lm, "We love deep learning", hk.skip_block(17)))

The logits that predict a token are one position before it. `pos` in these tables is the token's own
position, so the first token of a text, which nothing predicts, is left out. A token's loss is -log
of its probability, in nats; its mean over a text is what training minimizes, and e to that mean is
the perplexity.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..arguments import check_arguments, check_integer
from ..errors import BadHook, EmptySelection, OutOfRange
from ..models.lm import LM
from ..models.next_token import rank_among, ranks_for_table, token_logits, top_tokens, values_at
from ..models.positions import IndicesLike, read_indices, resolve_rows
from ..runs.run import Run
from .distributions import token_texts
from .rank_tables import add_deltas

NUMBERS_AT_ONCE = 2**22  # logits in one piece of work: 16 MiB of float32
TOKEN_COLUMNS = ["row", "pos", "token", "token_id"]
COMPARED = ["logprob", "loss", "prob", "rank"]


@check_arguments
def surprisal(run: Run, *, rows: IndicesLike = None, top: int = 0) -> pd.DataFrame:
    """How well the model predicts each token: of a forward every token but the first, of a generate
    the generated ones.

    Columns: row, pos (the token's own), token, token_id; logprob and loss (nats, loss = -logprob),
    bits (loss / ln 2), rank, prob; mean_loss (over the row's tokens up to this one) and perplexity
    (e^mean_loss). With `top`, also alternatives: the most likely tokens at that position with their
    probabilities, as text; their numbers are in `ranks(run, pos=…)`, one position earlier.

    The logits include every edit, but not the decoding rules of a generate (temperature, top_p). A
    banned token's loss is infinite. Raises `NotCaptured` if the run kept no logits, and
    `EmptySelection` if no logits have a token after them.

    >>> surprisal(forward(lm, "We love deep learning"))[["token", "loss", "rank"]].round(2)
             token  loss  rank
    0      ' love'  8.37   221
    1      ' deep'  9.50   718
    2  ' learning'  3.07     5
    """
    check_top(top)
    captured = run.captured_logits()
    assert captured.positions is not None
    parts = []
    for row in resolve_rows(read_indices(rows, "row", negative=False), len(captured.rows)):
        positions = captured.positions[row]
        predicted = positions + 1
        columns = ((positions >= 0) & (predicted < run.lengths[row])).nonzero().flatten()
        ids = run.tokens[row].cpu()[predicted[columns]]
        numbers = token_numbers(run.lm, captured.values[row], columns, ids, top)
        parts.append((row, predicted[columns].tolist(), numbers))
    return surprisal_table(run.lm, parts)


def check_top(top: int) -> None:
    """Raises `OutOfRange` if `top` is no number of alternatives."""
    meaning = "how many alternatives to show at each token (0 for none),"
    check_integer(top, "top", least=0, meaning=meaning)


def token_numbers(
    lm: LM,
    logits: Float[Tensor, "pos vocab"],
    columns: Int[Tensor, " n"],
    ids: Int[Tensor, " n"],
    top: int,
) -> pd.DataFrame:
    """Returns the numbers of these tokens, predicted by the logits at these columns.

    Columns: token_id, logprob, rank and, with `top`, alternatives. The logits are read in pieces,
    so that they are never copied as a whole.
    """
    step = max(1, NUMBERS_AT_ONCE // logits.shape[-1])
    parts = []
    for start in range(0, len(columns), step):
        piece = logits[columns[start : start + step].to(logits.device)]
        parts.append(_numbers_of_piece(lm, piece, ids[start : start + step], top))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def _numbers_of_piece(
    lm: LM, logits: Float[Tensor, "n vocab"], ids: Int[Tensor, " n"], top: int
) -> pd.DataFrame:
    logits = logits.detach().float()
    logprobs = logits.log_softmax(-1)
    ranks = rank_among(token_logits(logits, lm.n_tokens), values_at(logits, ids))
    table = pd.DataFrame(
        {
            "token_id": ids.tolist(),
            "logprob": values_at(logprobs, ids).double().tolist(),
            "rank": ranks_for_table(ranks).tolist(),
        }
    )
    if top:
        best = top_tokens(logits, lm.n_tokens, top)
        probs = logprobs.gather(1, best).exp()
        alternatives = []
        for tokens, token_probs in zip(best.tolist(), probs.tolist(), strict=True):
            pairs = zip(tokens, token_probs, strict=True)
            alternatives.append(
                ", ".join(f"{lm.string(token)!r} {prob:.2g}" for token, prob in pairs)
            )
        table["alternatives"] = alternatives
    return table


def surprisal_table(lm: LM, parts: Iterable[tuple[int, list[int], pd.DataFrame]]) -> pd.DataFrame:
    """Returns the table of `surprisal` from (row, positions, `token_numbers` there)."""
    tables = [
        _table_of_row(lm, row, positions, part) for row, positions, part in parts if positions
    ]
    if not tables:
        raise EmptySelection(
            "there is no token that logits predict: the first token of a text has nothing before "
            "it, and logits='last' of a forward predict what follows the last; give texts of two "
            "tokens or more, with logits='all'"
        )
    return pd.concat(tables, ignore_index=True)


def _table_of_row(lm: LM, row: int, positions: list[int], numbers: pd.DataFrame) -> pd.DataFrame:
    logprob = torch.tensor(numbers["logprob"].tolist(), dtype=torch.float64)
    loss = 0.0 - logprob  # so that a certain token's loss is 0.0, not -0.0
    mean = loss.cumsum(0) / torch.arange(1, len(loss) + 1)
    table = pd.DataFrame(
        {
            "row": row,
            "pos": positions,
            "token": token_texts(lm, numbers["token_id"].tolist()),
            "token_id": numbers["token_id"],
            "logprob": numbers["logprob"],
            "loss": loss.tolist(),
            "bits": (loss / math.log(2)).tolist(),
            "rank": numbers["rank"],
            "prob": logprob.exp().tolist(),
            "mean_loss": mean.tolist(),
            "perplexity": mean.exp().tolist(),  # infinite if it is too large for a number
        }
    )
    if "alternatives" in numbers:
        table["alternatives"] = numbers["alternatives"]
    return table


@check_arguments
def surprisal_shift(
    before: Run | pd.DataFrame,
    after: Run | pd.DataFrame,
    *,
    rows: IndicesLike = None,
    worst_first: bool = False,
) -> pd.DataFrame:
    """How each token's loss changed between two runs that read the same text.

    Both are runs, or tables of `surprisal` or `score`: of an edited forward, or of another model
    with the same tokens. Columns: row, pos, token, token_id; logprob, loss (nats), prob and rank,
    each with _before, _after and _delta (after minus before); worse (True if the loss grew). In the
    order of the text, or with `worst_first` by loss_delta, the largest first.

    Raises `OutOfRange` if the two read different tokens, as two generates do: score one text under
    both instead, `surprisal(forward(lm, text, *hooks))`.

    >>> edited = forward(lm, "I like oat milk in my", skip_block(17))
    >>> shift = surprisal_shift(run, edited, worst_first=True)
    >>> shift[["token", "loss_before", "loss_after", "worse"]].round(2).head(3)
         token  loss_before  loss_after  worse
    0  ' milk'         4.37        4.95   True
    1  ' like'         9.19        9.20   True
    2    ' in'         3.28        3.18  False
    """
    before, after = _as_surprisal(before, rows), _as_surprisal(after, rows)
    _check_same_tokens(before, after)
    table = pd.DataFrame(before[TOKEN_COLUMNS]).copy()
    for name in COMPARED:
        table[f"{name}_before"], table[f"{name}_after"] = before[name], after[name]
    table = add_deltas(table, COMPARED)
    table["worse"] = table["loss_delta"] > 0
    unknown = pd.Series(table["loss_delta"]).isna()
    if bool(unknown.any()):
        table["worse"] = table["worse"].astype(object).mask(unknown, None)
    if worst_first:
        table = table.sort_values(
            ["loss_delta", "row", "pos"], ascending=[False, True, True], ignore_index=True
        )
    return pd.DataFrame(table)


def _as_surprisal(source: Run | pd.DataFrame, rows: IndicesLike) -> pd.DataFrame:
    if isinstance(source, Run):
        return surprisal(source, rows=rows)
    problem = ""
    if not isinstance(source, pd.DataFrame):
        problem = f"a {type(source).__name__}"
    elif missing := [name for name in [*TOKEN_COLUMNS, *COMPARED] if name not in source]:
        problem = f"a table without {', '.join(missing)}"
    if problem:
        raise BadHook(
            f"surprisal_shift was given {problem}: give two runs, or two tables of surprisal(run) "
            "or score(lm, …)"
        )
    count = max(source["row"].tolist(), default=0) + 1
    selected = resolve_rows(read_indices(rows, "row", negative=False), count)
    return pd.DataFrame(source[source["row"].isin(selected)]).reset_index(drop=True)


def _check_same_tokens(before: pd.DataFrame, after: pd.DataFrame) -> None:
    tokens_before = before[TOKEN_COLUMNS].itertuples(index=False, name=None)
    tokens_after = after[TOKEN_COLUMNS].itertuples(index=False, name=None)
    for one, other in zip(tokens_before, tokens_after, strict=False):
        if one != other:
            raise OutOfRange(
                f"the two read different tokens: {_words(*one)} before, and {_words(*other)} "
                "after. Compare both on one text: surprisal(hk.forward(lm, text, *hooks)) reads "
                "what is given"
            )
    if len(before) != len(after):
        raise OutOfRange(
            f"there are {len(before)} tokens before and {len(after)} after: give runs of the same "
            "texts, or choose rows="
        )


def _words(row: int, pos: int, token: str, token_id: int) -> str:
    return f"{token} (id {token_id}) at position {pos} of row {row}"
