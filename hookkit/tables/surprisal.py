"""Surprisal: how well the model predicts each token of a text, and how an edit changes that.

    run = hk.forward(lm, "We love deep learning")
    hk.surprisal(run, top=3)                # each token: its loss, its rank, and the likeliest ones
    hk.surprisal_shift(run, hk.forward(lm, "We love deep learning", hk.skip_block(17)))

The logits that predict a token are one position before it. `pos` in these tables is the token's own
position, so the first token of a text, which nothing predicts, is left out. A token's loss is -log
of its probability, in nats; its mean over a text is what training minimizes, and e to that mean is
the perplexity.

`token_losses` reads a text that is longer than a window in windows that overlap. Each token is
scored once, in the first window that has it, so that in all but the first window at least `window -
stride` tokens precede each scored token: the method of Hugging Face's page on the perplexity of
fixed-length models. Without overlap, the first tokens of each window would be predicted from no
context.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..arguments import check_arguments, check_integer
from ..errors import BadHook, BadPrompt, EmptySelection, OutOfRange, Unsupported
from ..hooks.base import Constant, Hook
from ..hooks.capture import Capture
from ..hooks.values import FromPrompt, FromRun, Reference
from ..models.chat import Chat
from ..models.lm import LM
from ..models.next_token import rank_among, ranks_for_table, token_logits, top_tokens, values_at
from ..models.positions import IndicesLike, Span
from ..models.prompt_row import piece_of_row
from ..models.prompts import (
    Prompts,
    Row,
    as_rows,
    batches_by_length,
    check_prompts,
    continue_row,
    refuse_inputs,
)
from ..models.sites import Site
from ..runs.forward import forward
from ..runs.run import Run
from .distributions import add_roles, selected_rows, token_texts
from .rank_tables import add_deltas

# default number of tokens in a window: 200 MB of logits for 49,152 tokens of vocabulary
MAX_TOKENS = 1024
ALL_POSITIONS = (None, Span(None, None), Span(0, None))
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
    0       love  8.37   221
    1       deep  9.50   718
    2   learning  3.07     5
    """
    _check_top(top)
    _refuse_masked(run.lm)
    captured = run.captured_logits()
    assert captured.positions is not None
    parts = []
    for row in selected_rows(rows, len(captured.rows)):
        positions = captured.positions[row]
        predicted = positions + 1
        columns = ((positions >= 0) & (predicted < run.lengths[row])).nonzero().flatten()
        ids = run.tokens[row].cpu()[predicted[columns]]
        numbers = _token_numbers(run.lm, captured.values[row], columns, ids, top)
        parts.append(numbers.assign(row=row, pos=predicted[columns].tolist()))
    return add_roles(_surprisal_table(run.lm, parts), run.roles)


def _refuse_masked(lm: LM) -> None:
    """Raises `Unsupported` for a masked language model."""
    if lm.is_masked:
        raise Unsupported(
            f"{type(lm.root).__name__} is a masked language model: its logits are for the token at "
            "the same position, which it has read, and not for the next one. Put a mask in the "
            "token's place, and read hk.ranks(run, pos=…, watch=token)"
        )


def _check_top(top: int) -> None:
    meaning = "how many alternatives to show at each token (0 for none),"
    check_integer(top, "top", least=0, meaning=meaning)


def _token_numbers(
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


def _surprisal_table(lm: LM, parts: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """Returns the table of `surprisal` from `_token_numbers` with their row and pos."""
    parts = list(filter(len, parts))
    if not parts:
        raise EmptySelection(
            "there is no token that logits predict: the first token of a text has nothing before "
            "it, and logits='last' of a forward predict what follows the last; give texts of two "
            "tokens or more, with logits='all'"
        )
    numbers = pd.concat(parts).sort_values(["row", "pos"], ignore_index=True)
    rows: Any = numbers.groupby("row")
    return pd.concat([_table_of_row(lm, part) for _, part in rows], ignore_index=True)


def _table_of_row(lm: LM, numbers: pd.DataFrame) -> pd.DataFrame:
    logprob = torch.tensor(numbers["logprob"].tolist(), dtype=torch.float64)
    loss = 0.0 - logprob  # so that a certain token's loss is 0.0, not -0.0
    mean = loss.cumsum(0) / torch.arange(1, len(loss) + 1)
    table = pd.DataFrame(
        {
            "row": numbers["row"],
            "pos": numbers["pos"],
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

    Both are runs, or tables of `surprisal` or `token_losses`: of an edited forward, or of another
    model with the same tokens. Columns: row, pos, token, token_id; logprob, loss (nats), prob and
    rank, each with _before, _after and _delta (after minus before); worse (True if the loss grew).
    In the order of the text, or with `worst_first` by loss_delta, the largest first.

    Raises `OutOfRange` if the two read different tokens, as two generates do: score one text under
    both instead, `surprisal(forward(lm, text, *hooks))`.

    >>> edited = forward(lm, "I like oat milk in my", skip_block(17))
    >>> shift = surprisal_shift(run, edited, worst_first=True)
    >>> shift[["token", "loss_before", "loss_after", "worse"]].round(2).head(3)
       token  loss_before  loss_after  worse
    0   milk         4.37        4.95   True
    1   like         9.19        9.20   True
    2     in         3.28        3.18  False
    """
    before, after = _as_surprisal(before, rows), _as_surprisal(after, rows)
    _check_same_tokens(before, after)
    columns = [name for name in (*TOKEN_COLUMNS, "role") if name in before]
    table = pd.DataFrame(before[columns]).copy()
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
    missing = [name for name in [*TOKEN_COLUMNS, *COMPARED] if name not in source]
    if missing:
        raise BadHook(
            f"surprisal_shift was given a table without {', '.join(missing)}: give two runs, or "
            "two tables of surprisal(run) or token_losses(lm, …)"
        )
    selected = selected_rows(rows, max(source["row"], default=0) + 1)
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


# ---- texts of any length


@dataclass(frozen=True)
class Window:
    """A piece of a text that is read at once.

    Its tokens from index `first` on are scored. The first of them is at position `pos` of the text.
    """

    text: int
    ids: Row
    first: int
    pos: int


@check_arguments
def token_losses(
    lm: LM,
    texts: Prompts,
    *hooks: Hook,
    prefix: Prompts | None = None,
    window: int | None = None,
    stride: int | None = None,
    batch_tokens: int = MAX_TOKENS,
    top: int = 0,
) -> pd.DataFrame:
    """The table of `surprisal` for texts of any length and number: the loss of each token, once.

    Texts are prompts as `forward` takes them. `window` is how many tokens are read at once
    (default: the model's context, at most 1,024), `stride` how far the window moves (default: half
    of it): a small one gives tokens more context and costs more forwards. If a text begins with the
    tokenizer's beginning token, each of its windows does. A forward has at most `batch_tokens`
    tokens, padding included, of texts of similar length; a longer window has its own forward.
    Logits are freed after each forward.

    `prefix` are prompts, one for each text or one for all: the texts then follow the prompts, and
    only the texts' tokens are scored. `pos` counts in the whole. Tokens are joined as they are, so
    write the space with which the text begins.

    Hooks act in every window, and positions would be the window's: if a text needs several windows,
    hooks have to act at all positions. Raises `BadHook` for hooks that capture, that name rows or
    steps, or that insert values for each row or position. A hook on logits needs pos=slice(None),
    since its default position is after the last token, which is not scored.

    >>> table = token_losses(lm, [" milk in my coffee", " sand in my coffee"], prefix="I like oat")
    >>> table.groupby("row")["loss"].mean().round(1).tolist()
    [3.0, 4.8]
    """
    _refuse_masked(lm)
    rows, firsts = _rows(lm, texts, prefix)
    length, step = _window_sizes(lm, window, stride)
    meaning = "how many tokens a forward may have,"
    check_integer(batch_tokens, "batch_tokens", least=1, meaning=meaning, error=BadHook)
    _check_top(top)
    bos = getattr(lm.tokenizer, "bos_token_id", None)
    windows: list[Window] = []
    for text, row in enumerate(rows):
        windows += _windows(text, row, firsts[text], (length, step), bos)
    texts_in_windows = {window.text for window in windows}
    for hook in hooks:
        _check_hook(lm, hook, several_windows=len(texts_in_windows) < len(windows))
    parts = []
    lengths = [len(window.ids) for window in windows]
    for batch in batches_by_length(lengths, batch_tokens, one_length=lm.config is None):
        parts += _score_batch(lm, [windows[index] for index in batch], hooks, top)
    roles = [getattr(row, "roles", ()) for row in rows]
    return add_roles(_surprisal_table(lm, parts), roles)


def _score_batch(
    lm: LM, batch: Sequence[Window], hooks: Sequence[Hook], top: int
) -> Iterator[pd.DataFrame]:
    """Returns the numbers of the scored tokens of each window, computed in one forward."""
    run = forward(lm, [window.ids for window in batch], *hooks)
    for logits, window in zip(run.logits, batch, strict=True):
        columns = torch.arange(window.first - 1, len(window.ids) - 1)
        ids = torch.tensor(window.ids[window.first :])
        numbers = _token_numbers(lm, logits, columns, ids, top)
        yield numbers.assign(row=window.text, pos=window.pos + numbers.index)


def _rows(lm: LM, texts: Prompts, prefix: Prompts | None) -> tuple[list[Row], list[int]]:
    """Returns the tokens of each text, and the index of the first one that is scored."""
    if prefix is None:
        rows = as_rows(lm, texts)
        return rows, [1] * len(rows)
    contents = [_continuation(lm, text) for text in check_prompts(texts)]
    rows, prompts = as_rows(lm, contents), as_rows(lm, prefix)
    if len(prompts) not in (1, len(rows)):
        raise BadPrompt(
            f"there are {len(rows)} texts and {len(prompts)} prompts in prefix=: give one for "
            "each, or one for all"
        )
    if len(prompts) == 1:
        prompts = prompts * len(rows)
    if lm.two_texts:  # a text is what the decoder writes
        rows = [getattr(row, "source", None) or row for row in rows]
    refuse_inputs(rows, "token_losses with prefix=")
    joined = list(map(partial(continue_row, lm), prompts, rows))
    return joined, list(map(len, prompts))


def _continuation(lm: LM, text: Any) -> Any:
    """Returns a text as token ids, without the special tokens that begin a prompt."""
    if isinstance(text, Chat):
        raise BadPrompt(
            f"{text!r} cannot follow the prompts in prefix=: give the answer as a text, and "
            "the chat as the prefix"
        )
    if isinstance(text, str) and text and lm.tokenizer is not None:
        return lm.continuation(text)
    return text


def _window_sizes(lm: LM, window: int | None, stride: int | None) -> tuple[int, int]:
    context = lm.context or math.inf
    if window is None:
        window = int(min(context, MAX_TOKENS))
    meaning = "a number of tokens within the model's context,"
    check_integer(window, "window", least=2, most=context, meaning=meaning, error=BadHook)
    if stride is None:
        stride = window // 2
    check_integer(stride, "stride", least=1, meaning="a number of tokens,", error=BadHook)
    if stride >= window:
        raise BadHook(
            f"stride={stride} and window={window}: a window's first token has nothing before it, "
            f"so give a stride that is smaller than the window, such as {window // 2}"
        )
    return window, stride


def _windows(
    text: int, row: Row, first: int, sizes: tuple[int, int], bos: int | None
) -> Iterator[Window]:
    """Returns the windows of a text; each scores the tokens that no window before it has."""
    length, step = sizes
    start = end = 0
    while end < len(row):
        head = 1 if start and row[0] == bos else 0
        scored = max(end, first)
        end = min(start + length - head, len(row))
        if end > scored:
            ids = piece_of_row(row, head, start, end)
            yield Window(text, ids, scored - start + head, scored)
        start += step


def _check_hook(lm: LM, hook: Hook, *, several_windows: bool) -> None:
    """Raises `BadHook` if a hook would not act as its arguments say, or if its effect is unseen."""
    where, instead = hook.where, "see hk.surprisal(hk.forward(lm, texts, hook))"
    if isinstance(hook, Capture):
        raise BadHook(f"{hook}: token_losses gives a table and keeps no captures; see hk.harvest")
    if where.rows is not None:
        raise BadHook(
            f"{hook} names rows, and token_losses makes batches of its own: leave rows out, or "
            f"{instead}"
        )
    if where.step is not None:
        raise BadHook(
            f"{hook} acts on what follows the last token, which is not scored: "
            "say pos=slice(None) for all tokens"
        )
    for field in fields(hook):
        if _is_per_position(lm, hook, getattr(hook, field.name), several_windows):
            raise BadHook(
                f"{hook} puts in values for each row or position, and token_losses makes batches "
                f"of its own: {instead}"
            )
    named = (where.pos, getattr(hook, "key", None))
    if several_windows and any(pos not in ALL_POSITIONS for pos in named):
        raise BadHook(
            f"{hook} names positions, and there are texts that are read in several windows, where "
            "they would be the window's: leave pos out, say pos=slice(None), or give a window that "
            "is as long as the texts"
        )


def _is_per_position(lm: LM, hook: Hook, value: object, several_windows: bool) -> bool:
    """True if a hook's value is one for each row or position."""
    if isinstance(value, Reference):
        return several_windows and value.per == "position"
    if isinstance(value, Constant):
        axes = [len(lm.shape(site)) if isinstance(site, Site) else 1 for site in hook.sites]
        return value.tensor.ndim > min(axes)
    return isinstance(value, FromPrompt | FromRun)
