"""Surprisal: what the model expected at each token of a text, and which tokens it expects less after an edit.

    run = hk.forward(lm, "We love deep learning")
    hk.surprisal(run, top=3)                     # each token: its loss, its rank, and what was expected instead
    hk.surprisal_shift(run, hk.forward(lm, "We love deep learning", hk.skip_block(17)))

The logits that a token is chosen from stand one position before it. `pos` in these tables is the token's own position,
so the first token of a text, of which nothing was expected, is left out. A token's loss is -log of the probability that
it was given, in nats; its mean over a text is what training makes small, and e to that mean is the perplexity.
"""

import math
from collections.abc import Iterable, Sequence

import pandas as pd
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from ..arguments import checks_arguments, whole_number
from ..errors import BadHook, EmptySelection, OutOfRange
from ..models.lm import LM
from ..models.positions import CountLike, as_count, chosen
from ..models.tokens import rank_among, shown_ranks
from ..runs.run import Run

NUMBERS_AT_ONCE = 2**22  # logits in one piece of work: 16 MiB of float32
PLACES = ("row", "pos", "token", "token_id")
COMPARED = ("logprob", "loss", "prob", "rank")


@checks_arguments
def surprisal(run: Run, *, rows: CountLike = None, top: int = 0) -> pd.DataFrame:
    """What the model expected at each token: of a forward every token but the first, of a generate those it wrote.

    Columns: row, pos (the token's own), token, token_id; logprob and loss (nats, loss = -logprob), bits (loss / ln 2),
    rank, prob; mean_loss (over the row's tokens up to this one) and perplexity (e^mean_loss). With `top`, also
    alternatives: the most likely tokens at that place with their probabilities, for reading; their numbers are in
    `ranks(run, pos=…)`, one position earlier.

    Every edit is in the logits, and the decoding rules of a generate (temperature, top_p) are not. A banned token's
    loss is infinite. `NotCaptured` where the run kept no logits, `EmptySelection` where none has a token after it.

    >>> surprisal(forward(lm, "We love deep learning"))[["token", "loss", "rank"]].round(2)
             token  loss  rank
    0      ' love'  8.37   221
    1      ' deep'  9.50   718
    2  ' learning'  3.07     5
    """
    _check_top(top)
    kept = run.captured_logits()
    assert kept.positions is not None
    parts = []
    for row in chosen(as_count(rows, "row", negative=False), len(kept.rows)):
        places = kept.positions[row]
        columns = ((places >= 0) & (places + 1 < run.lengths[row])).nonzero().flatten()
        ids = run.tokens[row].cpu()[places[columns] + 1]
        parts.append(
            (
                row,
                (places[columns] + 1).tolist(),
                said_of(run.lm, kept.values[row], columns, ids, top),
            )
        )
    return as_table(run.lm, parts)


def said_of(
    lm: LM,
    logits: Float[Tensor, "pos vocab"],
    columns: Int[Tensor, " n"],
    ids: Int[Tensor, " n"],
    top: int,
) -> pd.DataFrame:
    """What logits at these columns say of these tokens. Columns: token_id, logprob, rank and, with `top`, alternatives.

    It goes through the logits in pieces, so that no copy of all of them is made.
    """
    step = max(1, NUMBERS_AT_ONCE // logits.shape[-1])
    parts = [
        _piece(
            lm,
            logits[columns[start : start + step].to(logits.device)],
            ids[start : start + step],
            top,
        )
        for start in range(0, len(columns), step)
    ]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def _piece(
    lm: LM, logits: Float[Tensor, "n vocab"], ids: Int[Tensor, " n"], top: int
) -> pd.DataFrame:
    logits = logits.detach().float()
    real, wanted = logits[:, : lm.n_tokens or None], ids.to(logits.device)[:, None]
    logprobs = logits.log_softmax(-1)
    numbers: dict[str, Shaped[Tensor, " n"]] = {
        "token_id": ids,
        "logprob": logprobs.gather(1, wanted)[:, 0].double(),
        "rank": shown_ranks(rank_among(real, logits.gather(1, wanted)[:, 0])),
    }
    found = pd.DataFrame({name: values.tolist() for name, values in numbers.items()})
    if top:
        best = torch.sort(real, descending=True, stable=True).indices[
            :, :top
        ]  # the lower id first among equals
        found["alternatives"] = _named(lm, best.tolist(), logprobs.gather(1, best).exp().tolist())
    return found


def _named(lm: LM, ids: Sequence[Sequence[int]], probs: Sequence[Sequence[float]]) -> list[str]:
    pairs = [zip(*both, strict=True) for both in zip(ids, probs, strict=True)]
    return [", ".join(f"{lm.string(token)!r} {prob:.2g}" for token, prob in each) for each in pairs]


def as_table(lm: LM, parts: Iterable[tuple[int, list[int], pd.DataFrame]]) -> pd.DataFrame:
    """The table of surprisals from (row, positions, what was said of the tokens there); rows without any are left."""
    tables = []
    for row, places, said in parts:
        if not places:
            continue
        logprob = torch.tensor(said["logprob"].tolist(), dtype=torch.float64)
        loss = 0.0 - logprob  # so that a certain token's loss is 0.0, not -0.0
        mean = loss.cumsum(0) / torch.arange(1, len(loss) + 1)
        columns = {
            "row": row,
            "pos": places,
            "token": [repr(lm.string(token)) for token in said["token_id"].tolist()],
            "token_id": said["token_id"],
            "logprob": said["logprob"],
            "loss": loss.tolist(),
            "bits": (loss / math.log(2)).tolist(),
            "rank": said["rank"],
            "prob": logprob.exp().tolist(),
            "mean_loss": mean.tolist(),
            "perplexity": mean.exp().tolist(),  # infinite where that is too large for a number
        }
        tables.append(
            pd.DataFrame(
                columns | {"alternatives": said["alternatives"]}
                if "alternatives" in said
                else columns
            )
        )
    if not tables:
        raise EmptySelection(
            "there is no token of which something was expected: the first token of a text has nothing before it, and "
            "logits='last' of a forward stand behind the last; give texts of two tokens or more, with logits='all'"
        )
    return pd.concat(tables, ignore_index=True)


@checks_arguments
def surprisal_shift(
    before: Run | pd.DataFrame,
    after: Run | pd.DataFrame,
    *,
    rows: CountLike = None,
    worst_first: bool = False,
) -> pd.DataFrame:
    """Which tokens of a text became less expected: each token's loss in one run and in another that read the same.

    Both are runs, or tables of `surprisal` or `score`: of an edited forward, or of another model with the same tokens.
    Columns: row, pos, token, token_id; logprob, loss (nats), prob and rank, each with _before, _after and _delta (after
    minus before); worse (True where the loss grew). In the order of the text, or with `worst_first` by loss_delta, the
    largest first.

    Raises `OutOfRange` where the two read different tokens, as two generates do: score one text under both instead,
    `surprisal(forward(lm, text, *hooks))`.

    >>> edited = forward(lm, "I like oat milk in my", skip_block(17))
    >>> shift = surprisal_shift(run, edited, worst_first=True)
    >>> shift[["token", "loss_before", "loss_after", "worse"]].round(2).head(3)
         token  loss_before  loss_after  worse
    0  ' milk'         4.37        4.95   True
    1  ' like'         9.19        9.20   True
    2    ' in'         3.28        3.18  False
    """
    was, now = (_as_surprisal(each, rows) for each in (before, after))
    _check_same(was, now)
    found = pd.DataFrame(was[list(PLACES)]).copy()
    for name in COMPARED:
        found[f"{name}_before"], found[f"{name}_after"] = was[name], now[name]
        found[f"{name}_delta"] = (now[name] - was[name]).where(
            now[name] != was[name], 0
        )  # inf minus inf is no change
    found["worse"] = found["loss_delta"] > 0
    unknown = pd.Series(found["loss_delta"]).isna()
    if bool(unknown.any()):
        found["worse"] = found["worse"].astype(object).mask(unknown, None)
    if worst_first:
        found = found.sort_values(
            ["loss_delta", "row", "pos"], ascending=[False, True, True], ignore_index=True
        )
    return pd.DataFrame(found)


def _as_surprisal(given: Run | pd.DataFrame, rows: CountLike) -> pd.DataFrame:
    if isinstance(given, Run):
        return surprisal(given, rows=rows)
    missing = (
        [name for name in (*PLACES, *COMPARED) if name not in given]
        if isinstance(given, pd.DataFrame)
        else []
    )
    if missing or not isinstance(given, pd.DataFrame):
        what = f"a table without {', '.join(missing)}" if missing else f"a {type(given).__name__}"
        raise BadHook(
            f"surprisal_shift was given {what}: give two runs, or two tables of surprisal(run) or score(lm, …)"
        )
    wanted = chosen(
        as_count(rows, "row", negative=False), max(given["row"].tolist(), default=0) + 1
    )
    return pd.DataFrame(given[given["row"].isin(wanted)]).reset_index(drop=True)


def _check_same(was: pd.DataFrame, now: pd.DataFrame) -> None:
    places = [list(table[list(PLACES)].itertuples(index=False, name=None)) for table in (was, now)]
    for one, two in zip(*places, strict=False):
        if one != two:
            said = [
                f"{token} (id {number}) at position {pos} of row {row}"
                for row, pos, token, number in (one, two)
            ]
            raise OutOfRange(
                f"the two read different tokens: {said[0]} before, and {said[1]} after. Compare what both say of one "
                "text: surprisal(hk.forward(lm, text, *hooks)) reads what is given"
            )
    if len(was) != len(now):
        raise OutOfRange(
            f"there are {len(was)} tokens before and {len(now)} after: give runs of the same texts, or choose rows="
        )


def _check_top(top: int) -> None:
    whole_number(
        top, "top", least=0, meaning="how many alternatives to show at each token (0 for none),"
    )
