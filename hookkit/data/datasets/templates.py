"""Drawing: from a way to draw one pair to many that differ, the same for the same seed and tokenizer.

A draw is kept where the tokenizer makes as many tokens of the clean prompt as of the corrupted one, and both answers
are one token that follows either. What is random comes from `random.Random(seed)` and lists alone.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from random import Random

from ...arguments import seed_of, whole_number
from ...errors import NotOneToken, TooFew, Unsupported
from ...models.lm import LM, Token
from ...models.positions import At
from ...models.prompts import Row, cover
from .pairs import Pairs, Prompt, checksum

PATIENCE = 2000  # draws in a row that give nothing new, after which there is no more to be found
PILOT = 100  # pairs by which the commonest length is found


@dataclass(frozen=True)
class Draw:
    """One pair as it was drawn. A label is a position, a text whose last token has it, or the token behind a text."""

    clean: Prompt
    corrupted: Prompt
    answer: Token
    wrong: Token
    labels: Mapping[str, "int | At | Behind"] = field(default_factory=dict)


@dataclass(frozen=True)
class Behind:
    """The token that follows a text."""

    at: At


@dataclass(frozen=True)
class Made:
    """A draw that this tokenizer can carry: its labels are positions, its prompts `length` tokens long."""

    draw: Draw
    labels: dict[str, int]
    length: int
    checksum: int


@dataclass(frozen=True)
class Urn:
    """What pairs are drawn from: `draw` makes one from a source of random numbers, or None where it came to nothing."""

    name: str
    lm: LM
    draw: Callable[[Random], Draw | None]
    seed: int

    def pairs(self, n: int, *, same_length: bool = False) -> Pairs:
        """`n` pairs that differ; the first of them are the same for any n. `TooFew` where there are not so many."""
        check_numbers(n, self.seed)
        length = self._commonest_length() if same_length else None
        found = list(islice(self._distinct(length), n))
        if len(found) < n:
            of_length = f" of {length} tokens, the commonest length" if same_length else ""
            raise TooFew(
                f"{self.name}: n={n} was asked for, and {len(found)} pairs{of_length} were found with this tokenizer: "
                f"{f'ask for at most {len(found)}' if found else 'ask for another dataset, or give another model'}"
            )
        draws = [made.draw for made in found]
        return Pairs(
            name=self.name,
            clean=[draw.clean for draw in draws],
            corrupted=[draw.corrupted for draw in draws],
            answers=[draw.answer for draw in draws],
            wrong=[draw.wrong for draw in draws],
            labels={name: tuple(made.labels[name] for made in found) for name in found[0].labels},
            seed=self.seed,
            checksums=tuple(made.checksum for made in found),
        )

    def _commonest_length(self) -> int | None:
        counts = Counter(made.length for made in islice(self._distinct(None), PILOT))
        return max(counts, key=lambda length: (counts[length], -length), default=None)

    def _distinct(self, length: int | None) -> Iterator[Made]:
        source, seen, idle = Random(self.seed), set(), 0
        while idle < PATIENCE:
            idle += 1
            draw = self.draw(source)
            if draw is None or (draw.clean, draw.corrupted) in seen:
                continue
            seen.add((draw.clean, draw.corrupted))
            made = _made(self.lm, draw)
            if made is not None and length in (None, made.length):
                idle = 0
                yield made


def _made(lm: LM, draw: Draw) -> Made | None:
    clean, corrupted = read(lm, draw.clean), read(lm, draw.corrupted)
    if len(clean) != len(corrupted):
        return None
    texts = [prompt for prompt in (draw.clean, draw.corrupted) if isinstance(prompt, str)]
    for answer in (draw.answer, draw.wrong):
        if isinstance(answer, str) and any(
            next_token(lm, text, answer) != answer for text in texts
        ):
            return None
    places = {name: _position(lm, clean, label) for name, label in draw.labels.items()}
    tokens = checksum(clean, corrupted, lm.token(draw.answer), lm.token(draw.wrong))
    return Made(draw, {**places, "end": len(clean) - 1}, len(clean), tokens)


def _position(lm: LM, row: Row, label: int | At | Behind) -> int:
    if isinstance(label, Behind):
        return _position(lm, row, label.at) + 1
    return cover(lm, row, label)[-1] if isinstance(label, At) else label


def read(lm: LM, prompt: Prompt) -> Row:
    """The tokens of a prompt as the model reads them, the tokenizer's special ones included."""
    return tuple(lm.tokenizer.encode(prompt)) if isinstance(prompt, str) else prompt


def next_token(lm: LM, prompt: str, continuation: str) -> str | None:
    """The token that begins a continuation of a prompt; None where the prompt's own tokens become others with it."""
    before, after = read(lm, prompt), read(lm, prompt + continuation)
    return (
        lm.string(after[len(before)])
        if after[: len(before)] == before and len(after) > len(before)
        else None
    )


def one_token(lm: LM, words: Sequence[str], what: str, *, least: int = 5) -> list[str]:
    """Those of some words that are one token with a space before them; `TooFew` where there are less than `least`."""
    found = [word for word in words if is_token(lm, f" {word}")]
    if len(found) < least:
        raise TooFew(
            f"at least {least} {what} that are one token are needed, and this tokenizer has {len(found)} of "
            f"{len(words)} ({', '.join(found) or 'none'}): take a model with a larger vocabulary, or "
            "hk.datasets.induction, which needs no words"
        )
    return found


def is_token(lm: LM, text: str) -> bool:
    """True where a text is exactly one token."""
    try:
        lm.token(text)
    except NotOneToken:
        return False
    return True


def needs_tokenizer(lm: LM, name: str) -> None:
    """Raise `Unsupported` for a model that came without a tokenizer."""
    if lm.tokenizer is None:
        raise Unsupported(
            f"{name} writes texts, and this model came without a tokenizer: give hk.LM(model, tokenizer), or take "
            "hk.datasets.induction, which is made of token ids"
        )


def check_numbers(n: int, seed: int) -> None:
    """Raises `OutOfRange` where so many pairs cannot be made, or the seed is none."""
    whole_number(n, "n", least=1, meaning="how many pairs to make,")
    seed_of(seed)
