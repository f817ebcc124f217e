"""Induction: random tokens, and the same again; the model should go on as it did the first time."""

from collections.abc import Callable
from functools import cache, partial
from random import Random

from ..arguments import checks_arguments, whole_number
from ..errors import BadPrompt
from ..model import LM, Token
from .drawing import Draw, Urn, is_token, read
from .pairs import Pairs


@checks_arguments
def induction(lm: LM, n: int, *, length: int = 20, seed: int = 0) -> Pairs:
    """`length` random tokens, then the same ones again up to the last but one; the answer is the last.

    Prompts are token ids, 2·length - 1 of them behind what the tokenizer begins a prompt with; the tokens are drawn
    uniformly from the vocabulary, special ones left out, and none comes twice in a block. The corrupted prompt has
    another token where the first block has the answer, and nothing else changed: `wrong` is that token, and is right.

    Works without a tokenizer: then answers are ids too. Labels: A1 (where the last token read stood the first time), B1
    (the answer, which followed it, and the one place where the prompts differ), end.

    Source: Olsson et al. 2022, In-context Learning and Induction Heads (arXiv 2209.11895): [A][B] … [A] → [B].

    >>> pairs = datasets.induction(lm, 50, length=8)
    >>> len(pairs.clean[0])
    15
    >>> pairs.labels["B1"][0], lm.string(pairs.clean[0][7]) == pairs.answers[0]
    (7, True)
    """
    whole_number(length, "length", least=2, meaning="how many tokens are repeated,")
    lead = _lead(lm)
    if lm.context is not None and len(lead) + 2 * length - 1 > lm.context:
        raise BadPrompt(
            f"induction with length={length} makes prompts of {len(lead) + 2 * length - 1} tokens, and the model's "
            f"context is {lm.context}: give a smaller length"
        )
    return Urn("induction", lm, partial(_draw, lm, lead, length, _named(lm)), seed).pairs(n)


def _lead(lm: LM) -> tuple[int, ...]:
    """The tokens that the tokenizer begins every prompt with."""
    if lm.tokenizer is None:
        return ()
    whole, bare = read(lm, " a"), tuple(lm.encode(" a"))
    return whole[: len(whole) - len(bare)] if whole[len(whole) - len(bare) :] == bare else ()


def _named(lm: LM) -> Callable[[int], Token | None]:
    """A token as an answer names it: as text, or by its id without a tokenizer; None for one that cannot be named."""
    added = frozenset() if lm.tokenizer is None else frozenset(lm.tokenizer.added_tokens_decoder)

    @cache
    def named(token_id: int) -> Token | None:
        if lm.tokenizer is None:
            return token_id
        text = lm.string(token_id)
        return text if token_id not in added and is_token(lm, text) and lm.token(text) == token_id else None

    return named


def _draw(
    lm: LM, lead: tuple[int, ...], length: int, named: Callable[[int], Token | None], source: Random
) -> Draw | None:
    tried = source.sample(range(lm.n_tokens), min(lm.n_tokens, 4 * length + 4))
    drawn = [(token_id, name) for token_id in tried if (name := named(token_id)) is not None][: length + 1]
    if len(drawn) <= length:
        return None
    (*block, answer), wrong = drawn[:length], drawn[length]
    same = tuple(token_id for token_id, _ in block)
    first = len(lead) + length - 1  # where the answer stands in the first block
    return Draw(
        clean=(*lead, *same, answer[0], *same),
        corrupted=(*lead, *same, wrong[0], *same),
        answer=answer[1],
        wrong=wrong[1],
        labels={"A1": first - 1, "B1": first},
    )
