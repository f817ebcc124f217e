"""hk.score: the loss of every token of any number of texts, however long they are.

A text that is longer than what is read at once is read in windows that overlap. Each token is scored once, in the first
window that has it, so that all but the first window's tokens have at least `window - stride` tokens before them: the
method of Hugging Face's page on the perplexity of fixed-length models. A window without overlap would ask of its first
tokens what nobody could know.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from typing import Any

import pandas as pd
import torch

from ..arguments import checks_arguments, prompt_rows, whole_number
from ..errors import BadHook, BadPrompt
from ..hooks.ablation import FromPrompt, FromRun, Reference
from ..hooks.base import Constant, Hook
from ..hooks.capture import Capture
from ..models.lm import LM
from ..models.positions import Span
from ..models.prompts import Prompts, Row, as_rows
from ..models.sites import Site
from ..runs.forward import forward
from .surprisal import as_table, said_of

MOST = 1024  # tokens read at once unless said otherwise: their logits are 200 MB for 49,152 tokens of vocabulary
WHOLE = (None, Span(None, None), Span(0, None))


@dataclass(frozen=True)
class Window:
    """A piece of a text that is read at once. Its tokens from `first` on are scored, and stand at `pos` and on."""

    text: int
    ids: Row
    first: int
    pos: int


@checks_arguments
def score(
    lm: LM,
    texts: Prompts,
    *hooks: Hook,
    after: Prompts | None = None,
    window: int | None = None,
    stride: int | None = None,
    batch_tokens: int = MOST,
    top: int = 0,
) -> pd.DataFrame:
    """The table of `surprisal` for texts of any length and number: each token once, its loss, rank and perplexity.

    Texts are prompts as `forward` takes them. `window` is how many tokens are read at once (the model's context, at
    most 1,024, unless said otherwise), `stride` how far a window is moved on (half of it): a small one gives tokens
    more context and costs more forwards. Where a text begins with the tokenizer's beginning token, each of its windows
    does. Forwards are of at most `batch_tokens` tokens, padding included, of texts of like length; a longer window is
    one of its own. Logits are let go after each forward.

    `after` are prompts, one for each text or one for all: then the texts go on from them, and only the texts' tokens
    are scored. `pos` counts in the whole. Tokens are joined as they are, so write the space that the text begins with.

    Hooks act in every window, and positions would be the window's: where a text needs several, hooks have to act at
    all positions. Hooks that capture, that name rows or steps, or that put in values for each row or position are
    refused with `BadHook`; a hook on logits needs pos=slice(None), since what it does behind the last token unless told
    otherwise is not scored.

    >>> table = score(lm, [" milk in my coffee", " sand in my coffee"], after="I like oat")
    >>> table.groupby("row")["loss"].mean().round(1).tolist()
    [3.0, 4.8]
    """
    rows, firsts = _rows(lm, texts, after)
    length, step = _window_of(lm, window, stride)
    whole_number(
        batch_tokens,
        "batch_tokens",
        least=1,
        meaning="how many tokens a forward may have,",
        error=BadHook,
    )
    whole_number(
        top, "top", least=0, meaning="how many alternatives to show at each token (0 for none),"
    )
    begin = getattr(lm.tokenizer, "bos_token_id", None)
    windows = [
        each
        for text, row in enumerate(rows)
        for each in _windows(text, row, firsts[text], (length, step), begin)
    ]
    for hook in hooks:
        _check(lm, hook, several=len({each.text for each in windows}) < len(windows))
    batches = _batches(windows, batch_tokens, one_length=lm.config is None)
    found = [said for batch in batches for said in _scored(lm, batch, hooks, top)]
    return as_table(lm, _joined(found))


def _scored(
    lm: LM, batch: Sequence[Window], hooks: Sequence[Hook], top: int
) -> Iterator[tuple[Window, pd.DataFrame]]:
    """What one forward says of the windows' tokens; the forward's logits are gone before the next begins."""
    run = forward(lm, [each.ids for each in batch], *hooks)
    for logits, each in zip(run.logits, batch, strict=True):
        columns = torch.arange(each.first - 1, len(each.ids) - 1)
        yield each, said_of(lm, logits, columns, torch.tensor(each.ids[each.first :]), top)


def _rows(lm: LM, texts: Prompts, after: Prompts | None) -> tuple[list[Row], list[int]]:
    """The tokens of each text, and the first of each that is scored."""
    if after is None:
        rows = as_rows(lm, texts)
        return rows, [1] * len(rows)
    rows, prompts = as_rows(lm, _without_special_tokens(lm, texts)), as_rows(lm, after)
    if len(prompts) not in (1, len(rows)):
        raise BadPrompt(
            f"there are {len(rows)} texts and {len(prompts)} prompts in after=: give one for each, or one for all"
        )
    prompts = prompts * len(rows) if len(prompts) == 1 else prompts
    return [(*prompt, *row) for prompt, row in zip(prompts, rows, strict=True)], [
        len(prompt) for prompt in prompts
    ]


def _without_special_tokens(lm: LM, texts: Prompts) -> Prompts:
    """The same with texts as token ids, without the special tokens that begin a prompt."""
    rows: list[Any] = []
    for text in prompt_rows(texts):
        has_words = isinstance(text, str) and bool(text) and lm.tokenizer is not None
        rows.append(lm.continuation(text) if has_words else text)  # pyright: ignore[reportArgumentType]
    return rows


def _window_of(lm: LM, window: int | None, stride: int | None) -> tuple[int, int]:
    for word, value, least in (("window", window, 2), ("stride", stride, 1)):
        if value is not None:
            whole_number(value, word, least=least, meaning="a number of tokens,", error=BadHook)
    if window is not None and lm.context is not None and window > lm.context:
        raise BadHook(
            f"window={window} was asked for, and the model's context is {lm.context}: give that or less"
        )
    length = window or min(lm.context or MOST, MOST)
    if stride is not None and stride >= length:
        raise BadHook(
            f"stride={stride} and window={length}: a window's first token has nothing before it, so give a stride that "
            f"is smaller than the window, such as {length // 2}"
        )
    return length, stride or length // 2


def _windows(
    text: int, row: Row, first: int, sizes: tuple[int, int], begin: int | None
) -> Iterator[Window]:
    """The windows of a text, each with the tokens that no window before it had."""
    length, step = sizes
    start = end = 0
    while end < len(row):
        head = row[:1] if start and row[0] == begin else ()
        new = max(end, first)
        end = min(start + length - len(head), len(row))
        if end > new:
            yield Window(text, (*head, *row[start:end]), new - start + len(head), new)
        start += step


def _batches(windows: Sequence[Window], tokens: int, *, one_length: bool) -> list[list[Window]]:
    """The windows in batches of at most so many tokens, padding included, the longest first."""
    found: list[list[Window]] = []
    for each in sorted(windows, key=lambda each: -len(each.ids)):
        width = len(found[-1][0].ids) if found else 0
        fits = (
            bool(found)
            and width * (len(found[-1]) + 1) <= tokens
            and (not one_length or width == len(each.ids))
        )
        found[-1].append(each) if fits else found.append([each])
    return found


def _joined(
    found: Sequence[tuple[Window, pd.DataFrame]],
) -> Iterator[tuple[int, list[int], pd.DataFrame]]:
    """Each text's positions, and what was said of the tokens there, in order."""
    ordered = sorted(found, key=lambda pair: (pair[0].text, pair[0].pos))
    for text, pairs in groupby(ordered, key=lambda pair: pair[0].text):
        pieces = list(pairs)
        places = [place for each, said in pieces for place in range(each.pos, each.pos + len(said))]
        yield text, places, pd.concat([said for _, said in pieces], ignore_index=True)


def _check(lm: LM, hook: Hook, *, several: bool) -> None:
    """Raise `BadHook` where a hook would not do what it says, or would do it unseen."""
    if not isinstance(hook, Hook):
        return  # which forward refuses
    where, instead = hook.where, "see hk.surprisal(hk.forward(lm, texts, hook))"
    if isinstance(hook, Capture):
        raise BadHook(f"{hook}: score gives a table and keeps no captures; see hk.harvest")
    if where.rows is not None:
        raise BadHook(
            f"{hook} names rows, and score makes batches of its own: leave rows out, or {instead}"
        )
    if where.step is not None:
        raise BadHook(
            f"{hook} acts on what comes behind the last token, which is not scored: say pos=slice(None) for all tokens"
        )
    if any(_by_place(lm, hook, getattr(hook, each.name), several) for each in fields(hook)):
        raise BadHook(
            f"{hook} puts in values for each row or position, and score makes batches of its own: {instead}"
        )
    named = (where.pos, getattr(hook, "key", None))
    if several and any(pos not in WHOLE for pos in named):
        raise BadHook(
            f"{hook} names positions, and there are texts that are read in several windows, where they would be the "
            "window's: leave pos out, say pos=slice(None), or give a window that is as long as the texts"
        )


def _by_place(lm: LM, hook: Hook, value: object, several: bool) -> bool:
    """Whether a hook's value is one for each row or position."""
    if isinstance(value, Reference):
        return several and value.per == "position"
    if isinstance(value, Constant):
        axes = [len(lm.shape(site)) if isinstance(site, Site) else 1 for site in hook.sites]
        return value.tensor.ndim > min(axes)
    return isinstance(value, FromPrompt | FromRun)
