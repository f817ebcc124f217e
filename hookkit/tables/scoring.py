"""hk.token_losses: the loss of every token of any number of texts of any length.

A text that is longer than a window is read in windows that overlap. Each token is scored once, in
the first window that has it, so that in all but the first window at least `window - stride` tokens
precede each scored token: the method of Hugging Face's page on the perplexity of fixed-length
models. Without overlap, the first tokens of each window would be predicted from no context.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import pandas as pd
import torch

from ..arguments import check_arguments, check_integer
from ..errors import BadHook, BadPrompt
from ..hooks.base import Constant, Hook
from ..hooks.capture import Capture
from ..hooks.sources import FromPrompt, FromRun, Reference
from ..models.lm import LM
from ..models.positions import Span
from ..models.prompts import Prompts, Row, as_rows, batches_by_length, check_prompts
from ..models.sites import Site
from ..runs.forward import forward
from .surprisal import check_top, surprisal_table, token_numbers

# default number of tokens in a window: 200 MB of logits for 49,152 tokens of vocabulary
MOST = 1024
ALL_POSITIONS = (None, Span(None, None), Span(0, None))


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
    batch_tokens: int = MOST,
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
    rows, firsts = _rows(lm, texts, prefix)
    length, step = _window_sizes(lm, window, stride)
    meaning = "how many tokens a forward may have,"
    check_integer(batch_tokens, "batch_tokens", least=1, meaning=meaning, error=BadHook)
    check_top(top)
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
    if not parts:
        return surprisal_table(lm, [])  # raises
    numbers = pd.concat(parts).sort_values(["row", "pos"])
    by_text = []
    groups: Any = numbers.groupby("row")
    for text, part in groups:
        by_text.append((text, part["pos"].tolist(), part.reset_index(drop=True)))
    return surprisal_table(lm, by_text)


def _score_batch(
    lm: LM, batch: Sequence[Window], hooks: Sequence[Hook], top: int
) -> Iterator[pd.DataFrame]:
    """Returns the numbers of the scored tokens of each window, computed in one forward."""
    run = forward(lm, [window.ids for window in batch], *hooks)
    for logits, window in zip(run.logits, batch, strict=True):
        columns = torch.arange(window.first - 1, len(window.ids) - 1)
        ids = torch.tensor(window.ids[window.first :])
        numbers = token_numbers(lm, logits, columns, ids, top)
        yield numbers.assign(row=window.text, pos=window.pos + numbers.index)


def _rows(lm: LM, texts: Prompts, prefix: Prompts | None) -> tuple[list[Row], list[int]]:
    """Returns the tokens of each text, and the index of the first one that is scored."""
    if prefix is None:
        rows = as_rows(lm, texts)
        return rows, [1] * len(rows)
    contents: list[Any] = []  # texts as token ids, without the special tokens that begin a prompt
    for text in check_prompts(texts):
        is_text = isinstance(text, str) and bool(text) and lm.tokenizer is not None
        contents.append(lm.continuation(str(text)) if is_text else text)
    rows, prompts = as_rows(lm, contents), as_rows(lm, prefix)
    if len(prompts) not in (1, len(rows)):
        raise BadPrompt(
            f"there are {len(rows)} texts and {len(prompts)} prompts in prefix=: give one for "
            "each, or one for all"
        )
    if len(prompts) == 1:
        prompts = prompts * len(rows)
    joined = [(*prompt, *row) for prompt, row in zip(prompts, rows, strict=True)]
    return joined, list(map(len, prompts))


def _window_sizes(lm: LM, window: int | None, stride: int | None) -> tuple[int, int]:
    for name, value, least in (("window", window, 2), ("stride", stride, 1)):
        if value is not None:
            check_integer(value, name, least=least, meaning="a number of tokens,", error=BadHook)
    if window is not None and lm.context is not None and window > lm.context:
        raise BadHook(
            f"window={window} was asked for, and the model's context is {lm.context}: "
            "give that or less"
        )
    length = window or min(lm.context or MOST, MOST)
    if stride is not None and stride >= length:
        raise BadHook(
            f"stride={stride} and window={length}: a window's first token has nothing before it, "
            f"so give a stride that is smaller than the window, such as {length // 2}"
        )
    return length, stride or length // 2


def _windows(
    text: int, row: Row, first: int, sizes: tuple[int, int], bos: int | None
) -> Iterator[Window]:
    """Returns the windows of a text; each scores the tokens that no window before it has."""
    length, step = sizes
    start = end = 0
    while end < len(row):
        head = row[:1] if start and row[0] == bos else ()
        scored = max(end, first)
        end = min(start + length - len(head), len(row))
        if end > scored:
            yield Window(text, (*head, *row[start:end]), scored - start + len(head), scored)
        start += step


def _check_hook(lm: LM, hook: Hook, *, several_windows: bool) -> None:
    """Raises `BadHook` if a hook would not act as its arguments say, or if its effect is unseen."""
    if not isinstance(hook, Hook):
        return  # forward refuses it
    where, instead = hook.where, "see hk.surprisal(hk.forward(lm, texts, hook))"
    if isinstance(hook, Capture):
        raise BadHook(f"{hook}: score gives a table and keeps no captures; see hk.harvest")
    if where.rows is not None:
        raise BadHook(
            f"{hook} names rows, and score makes batches of its own: leave rows out, or {instead}"
        )
    if where.step is not None:
        raise BadHook(
            f"{hook} acts on what follows the last token, which is not scored: "
            "say pos=slice(None) for all tokens"
        )
    for field in fields(hook):
        if _is_per_position(lm, hook, getattr(hook, field.name), several_windows):
            raise BadHook(
                f"{hook} puts in values for each row or position, and score makes batches of its "
                f"own: {instead}"
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
