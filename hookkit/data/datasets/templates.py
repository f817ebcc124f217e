"""Sampling of prompt pairs: from a function that draws one pair to many different pairs.

A pair is used if the clean and the corrupted prompt have equally many tokens, and both answers are
one token that can follow either prompt. The same seed and tokenizer give the same pairs: random
numbers come only from `random.Random(seed)`.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from random import Random
from typing import TypeAlias

from ...arguments import check_integer, check_seed
from ...errors import NotOneToken, TooFew, Unsupported
from ...models.lm import LM, Token
from ...models.positions import At
from ...models.prompts import Row, positions_of_text
from .pairs import Pairs, Prompt, checksum

MAX_IDLE_DRAWS = 2000  # draws without a new pair after which the sampler stops
PILOT_PAIRS = 100  # pairs that decide the commonest length


@dataclass(frozen=True)
class TokenAfter:
    """The position after the last token of a text."""

    at: At


Label: TypeAlias = int | At | TokenAfter  # an At is the position of the text's last token


@dataclass(frozen=True)
class Draw:
    """A pair of prompts with its answers, and labels for some positions of the clean prompt."""

    clean: Prompt
    corrupted: Prompt
    answer: Token
    wrong: Token
    labels: Mapping[str, Label] = field(default_factory=dict)


DrawPair: TypeAlias = Callable[[Random], Draw | None]  # None for a pair that is unusable


@dataclass(frozen=True)
class TokenizedDraw:
    """A draw that is usable with the tokenizer. `length` is the number of tokens of a prompt."""

    draw: Draw
    labels: dict[str, int]
    length: int
    checksum: int


def check_draws(n: int, seed: int) -> None:
    """Raises an error for a number of pairs or a seed that cannot be."""
    check_integer(n, "n", least=1, meaning="how many pairs to make,")
    check_seed(seed)


def sample_pairs(
    name: str,
    lm: LM,
    draw: DrawPair,
    n: int,
    *,
    seed: int,
    same_length: bool = False,
) -> Pairs:
    """Returns `n` different pairs of a dataset. A larger n gives the same first pairs.

    `draw` returns a random pair, or None if it is unusable. Raises `TooFew` if there are fewer
    than n.
    """
    check_draws(n, seed)
    samples, of_length = _distinct_samples(lm, draw, seed), ""
    if same_length:
        pilot = islice(_distinct_samples(lm, draw, seed), PILOT_PAIRS)
        counts = Counter(sample.length for sample in pilot)
        length = max(counts, key=lambda length: (counts[length], -length), default=None)
        of_length = f" of {length} tokens, the commonest length"
        samples = _distinct_samples(lm, draw, seed, length)
    pairs = list(islice(samples, n))
    if len(pairs) < n:
        advice = "ask for another dataset, or give another model"
        if pairs:
            advice = f"ask for at most {len(pairs)}"
        raise TooFew(
            f"{name}: n={n} was asked for, and {len(pairs)} pairs{of_length} were found "
            f"with this tokenizer: {advice}"
        )
    labels: dict[str, tuple[int, ...]] = {}
    for label in pairs[0].labels:
        labels[label] = tuple(pair.labels[label] for pair in pairs)
    return Pairs(
        name,
        clean=[pair.draw.clean for pair in pairs],
        corrupted=[pair.draw.corrupted for pair in pairs],
        answers=[pair.draw.answer for pair in pairs],
        wrong=[pair.draw.wrong for pair in pairs],
        labels=labels,
        seed=seed,
        checksums=tuple(pair.checksum for pair in pairs),
    )


def _distinct_samples(
    lm: LM, draw_pair: DrawPair, seed: int, length: int | None = None
) -> Iterator[TokenizedDraw]:
    """Yields different pairs of a seed, with `length` those of so many tokens."""
    source, previous, idle = Random(seed), set(), 0
    while idle < MAX_IDLE_DRAWS:
        idle += 1
        draw = draw_pair(source)
        if draw is None or (draw.clean, draw.corrupted) in previous:
            continue
        previous.add((draw.clean, draw.corrupted))
        sample = _tokenize_draw(lm, draw)
        if sample is not None and length in (None, sample.length):
            idle = 0
            yield sample


def _tokenize_draw(lm: LM, draw: Draw) -> TokenizedDraw | None:
    """Returns the draw with its positions, or None if the tokenizer makes it unusable."""
    clean, corrupted = tokenize(lm, draw.clean), tokenize(lm, draw.corrupted)
    if len(clean) != len(corrupted):
        return None
    for prompt in (draw.clean, draw.corrupted):
        if not _can_follow(lm, prompt, draw.answer) or not _can_follow(lm, prompt, draw.wrong):
            return None
    labels = {name: _position(lm, clean, label) for name, label in draw.labels.items()}
    labels["end"] = len(clean) - 1
    tokens = checksum(clean, corrupted, lm.token(draw.answer), lm.token(draw.wrong))
    return TokenizedDraw(draw, labels, len(clean), tokens)


def _can_follow(lm: LM, prompt: Prompt, answer: Token) -> bool:
    if isinstance(prompt, str) and isinstance(answer, str):
        return next_token(lm, prompt, answer) == answer
    return True


def _position(lm: LM, row: Row, label: Label) -> int:
    if isinstance(label, TokenAfter):
        return _position(lm, row, label.at) + 1
    return positions_of_text(lm, row, label)[-1] if isinstance(label, At) else label


def tokenize(lm: LM, prompt: Prompt) -> Row:
    """Returns the token ids of a prompt, including the special tokens that the tokenizer adds."""
    return tuple(lm.tokenizer.encode(prompt)) if isinstance(prompt, str) else prompt


def next_token(lm: LM, prompt: str, continuation: str) -> str | None:
    """Returns the first token of a continuation of a prompt.

    Returns None if the continuation changes the tokens of the prompt.
    """
    before, after = tokenize(lm, prompt), tokenize(lm, prompt + continuation)
    if after[: len(before)] != before or len(after) == len(before):
        return None
    return lm.string(after[len(before)])


def one_token_words(lm: LM, words: Sequence[str], what: str, *, least: int = 5) -> list[str]:
    """Returns the words that are one token with a space before them.

    Raises `TooFew` if there are fewer than `least`.
    """
    usable = [word for word in words if is_one_token(lm, f" {word}")]
    if len(usable) < least:
        raise TooFew(
            f"at least {least} {what} that are one token are needed, and this tokenizer has "
            f"{len(usable)} of {len(words)} ({', '.join(usable) or 'none'}): take a model with a "
            "larger vocabulary, or hk.datasets.induction, which needs no words"
        )
    return usable


def is_one_token(lm: LM, text: str) -> bool:
    """True for a text that is exactly one token."""
    try:
        lm.token(text)
    except NotOneToken:
        return False
    return True


def require_tokenizer(lm: LM, name: str) -> None:
    """Raises `Unsupported` for a model without a tokenizer."""
    if lm.tokenizer is None:
        raise Unsupported(
            f"{name} writes texts, and this model came without a tokenizer: "
            "give hk.LM(model, tokenizer), or take hk.datasets.induction, which is made of "
            "token ids"
        )
