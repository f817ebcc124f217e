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


@dataclass(frozen=True)
class TokenizedDraw:
    """A draw that is usable with the tokenizer. `length` is the number of tokens of a prompt."""

    draw: Draw
    labels: dict[str, int]
    length: int
    checksum: int


@dataclass(frozen=True)
class PairSampler:
    """Samples pairs of a dataset. `draw` returns a random pair, or None if it is unusable."""

    name: str
    lm: LM
    draw: Callable[[Random], Draw | None]
    seed: int

    def sample(self, n: int, *, same_length: bool = False) -> Pairs:
        """Returns `n` different pairs. A larger n gives the same first pairs.

        Raises `TooFew` if there are fewer than n.
        """
        check_size_and_seed(n, self.seed)
        length = self._commonest_length() if same_length else None
        samples = list(islice(self._distinct(length), n))
        if len(samples) < n:
            of_length = f" of {length} tokens, the commonest length" if same_length else ""
            advice = f"ask for at most {len(samples)}"
            if not samples:
                advice = "ask for another dataset, or give another model"
            raise TooFew(
                f"{self.name}: n={n} was asked for, and {len(samples)} pairs{of_length} were found "
                f"with this tokenizer: {advice}"
            )
        draws = [sample.draw for sample in samples]
        labels: dict[str, tuple[int, ...]] = {}
        for name in samples[0].labels:
            labels[name] = tuple(sample.labels[name] for sample in samples)
        return Pairs(
            name=self.name,
            clean=[draw.clean for draw in draws],
            corrupted=[draw.corrupted for draw in draws],
            answers=[draw.answer for draw in draws],
            wrong=[draw.wrong for draw in draws],
            labels=labels,
            seed=self.seed,
            checksums=tuple(sample.checksum for sample in samples),
        )

    def _commonest_length(self) -> int | None:
        """Returns the commonest length of the first pairs, the shortest of several."""
        counts = Counter(sample.length for sample in islice(self._distinct(None), PILOT_PAIRS))
        return max(counts, key=lambda length: (counts[length], -length), default=None)

    def _distinct(self, length: int | None) -> Iterator[TokenizedDraw]:
        source, previous, idle = Random(self.seed), set(), 0
        while idle < MAX_IDLE_DRAWS:
            idle += 1
            draw = self.draw(source)
            if draw is None or (draw.clean, draw.corrupted) in previous:
                continue
            previous.add((draw.clean, draw.corrupted))
            sample = _tokenize_draw(self.lm, draw)
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


def check_size_and_seed(n: int, seed: int) -> None:
    """Raises `OutOfRange` for an invalid number of pairs or an invalid seed."""
    check_integer(n, "n", least=1, meaning="how many pairs to make,")
    check_seed(seed)
