"""The sums of `hk.token_shifts`: what is kept of a corpus, whatever its length.

The positions of one text depend on each other, so a text counts as one observation. Of each text
only its sums over its positions are used, and of all texts only the sums of these, of their squares
and of their products with the numbers of positions, from which `intervals.clustered_means` computes
means with intervals. The draws of the control are observations as well, and each has its sums.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

TOKEN_SUMS = ("logprob", "rank", "promoted", "demoted")  # of each token
CONTEXT = 24  # tokens of the context of an example, at most
PADDING = -1  # before the context of an example near the beginning of its text
# The columns of an example: the text, the piece of it, the position, and its last tokens.
LOCATION = 3 + CONTEXT


@dataclass(eq=False)
class Sums:
    """Sums over some positions: of a text or a piece of one, or of the texts of a draw.

    counts    the number of positions, and of those with ranks
    kl        of KL(before‖after); of a draw over the positions with ranks
    of_token  the sums of each token's change of the log-probability and of the rank (of a draw both
              over the positions with ranks), and how often it was promoted and demoted
    """

    counts: Float[Tensor, "2"]
    kl: Float[Tensor, ""]
    of_token: dict[str, Float[Tensor, " token"]]

    @classmethod
    def empty(cls, n_tokens: int) -> Self:
        """Returns the sums over no position."""
        of_token = {name: torch.zeros(n_tokens, dtype=torch.float64) for name in TOKEN_SUMS}
        counts = torch.zeros(2, dtype=torch.float64)
        return cls(counts, torch.zeros((), dtype=torch.float64), of_token)

    @property
    def n_tokens(self) -> int:
        return len(self.of_token["logprob"])

    def merge(self, other: "Sums") -> None:
        """Adds other sums to these."""
        self.counts += other.counts
        self.kl += other.kl
        for name, values in other.of_token.items():
            self.of_token[name] += values

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Returns all sums by their names in a file."""
        named = {"counts": self.counts, "kl": self.kl, **self.of_token}
        return {prefix + name: tensor for name, tensor in named.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], prefix: str) -> Self:
        """Returns the sums that `tensors` named."""
        of_token = {name: tensors[prefix + name].clone() for name in TOKEN_SUMS}
        return cls(tensors[prefix + "counts"].clone(), tensors[prefix + "kl"].clone(), of_token)


def _new_moments() -> Float[Tensor, "4"]:
    return torch.zeros(4, dtype=torch.float64)


@dataclass(eq=False)
class TextMoments:
    """Moments of the sums of texts.

    sizes     for positions and for positions with ranks: the number of texts that have any, the sum
              of their numbers, the sum of the squares
    kl        the sum of the texts' sums, of their squares, and of their products with the sizes,
              and the number of texts whose sum is not 0
    of_token  the same for each token, [4, token]
    """

    n_tokens: int
    sizes: Float[Tensor, "2 3"] = field(
        default_factory=lambda: torch.zeros(2, 3, dtype=torch.float64)
    )
    kl: Float[Tensor, "4"] = field(default_factory=_new_moments)
    of_token: dict[str, Float[Tensor, "4 token"]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in TOKEN_SUMS:
            shape = 4, self.n_tokens
            self.of_token.setdefault(name, torch.zeros(shape, dtype=torch.float64))

    def add(self, text: Sums) -> None:
        """Adds the sums of a complete text."""
        sizes = torch.stack([(text.counts > 0).double(), text.counts, text.counts**2], dim=1)
        self.sizes += sizes
        positions, ranked = text.counts.tolist()
        _add_moments(self.kl, text.kl, positions)
        for name, values in text.of_token.items():
            size = ranked if name == "rank" else positions
            if name in ("promoted", "demoted"):  # of which a text has few
                _add_few_moments(self.of_token[name], values, size)
            elif size:
                _add_moments(self.of_token[name], values, size)

    def merge(self, other: "TextMoments") -> None:
        """Adds the moments of other texts."""
        self.sizes += other.sizes
        self.kl += other.kl
        for name, moments in other.of_token.items():
            self.of_token[name] += moments

    def tensors(self) -> dict[str, Tensor]:
        """Returns all moments by their names in a file."""
        named = {"sizes": self.sizes, "kl": self.kl, **self.of_token}
        return {f"texts.{name}": tensor for name, tensor in named.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Returns the moments that `tensors` named."""
        of_token = {name: tensors[f"texts.{name}"].clone() for name in TOKEN_SUMS}
        n_tokens = of_token["logprob"].shape[1]
        sizes, kl = tensors["texts.sizes"].clone(), tensors["texts.kl"].clone()
        return cls(n_tokens, sizes, kl, of_token)


def _add_moments(moments: Tensor, values: Tensor, size: float) -> None:
    moments[0] += values
    moments[1].addcmul_(values, values)
    moments[2].add_(values, alpha=size)
    moments[3] += values != 0


def _add_few_moments(moments: Tensor, values: Tensor, size: float) -> None:
    tokens = values.nonzero().flatten()
    few = values[tokens]
    moments[:, tokens] += torch.stack([few, few**2, few * size, torch.ones_like(few)])


# ---- examples


@dataclass(frozen=True, eq=False)
class Examples:
    """Positions at which tokens moved: a row for each, the strongest of a token first.

    tokens     which token moved
    strength   how much its log-probability rose, or fell
    locations  the number of the text, the piece of it, the position, and the last `CONTEXT` tokens
               up to there
    """

    tokens: np.ndarray
    strength: np.ndarray
    locations: np.ndarray

    @classmethod
    def none(cls) -> Self:
        """Returns no example."""
        locations = np.empty((0, LOCATION), dtype=np.int32)
        return cls(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32), locations)

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Returns the examples by their names in a file."""
        named = {"tokens": self.tokens, "strength": self.strength, "locations": self.locations}
        return {prefix + name: torch.tensor(array) for name, array in named.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], prefix: str) -> Self:
        """Returns the examples that `tensors` named."""
        names = ("tokens", "strength", "locations")
        return cls(*(tensors[prefix + name].clone().numpy() for name in names))


def strongest_examples(parts: Sequence[Examples], count: int) -> Examples:
    """Returns the `count` strongest examples of each token, each of another text.

    Of equal ones the first in the order of the texts is kept.
    """
    tokens = np.concatenate([part.tokens for part in parts])
    strength = np.concatenate([part.strength for part in parts])
    locations = np.concatenate([part.locations for part in parts])
    text, piece, pos = locations[:, 0], locations[:, 1], locations[:, 2]
    order = np.lexsort((pos, piece, -strength, text, tokens))
    order = order[_is_new(tokens[order], text[order])]
    order = order[np.lexsort((text[order], -strength[order], tokens[order]))]
    starts = np.flatnonzero(_is_new(tokens[order]))
    lengths = np.diff(np.append(starts, len(order)))
    number_in_token = np.arange(len(order)) - np.repeat(starts, lengths)
    order = order[number_in_token < count]
    return Examples(tokens[order], strength[order], locations[order])


def _is_new(*keys: np.ndarray) -> np.ndarray:
    """Returns where a row differs from the one before in any of the keys."""
    is_new = np.zeros(len(keys[0]), dtype=bool)
    is_new[:1] = True
    for key in keys:
        is_new[1:] |= key[1:] != key[:-1]
    return is_new


# ---- what is kept of a corpus


@dataclass(frozen=True, eq=False)
class BatchShifts:
    """What a batch of texts shows.

    texts     the moments of the texts that are complete in it
    pieces    the sums of pieces of longer texts, in their order, with the numbers of their texts
    draws     the sums of the control by draw
    examples  by "promoted" and "demoted"
    """

    texts: TextMoments
    pieces: list[tuple[int, Sums]]
    draws: dict[int, Sums]
    examples: dict[str, Examples]


@dataclass(eq=False)
class CorpusSums:
    """Everything that is kept of the texts read so far. One call of `token_shifts` owns it.

    open_text  the number and the sums of a text of which pieces may follow
    waiting    examples that are not merged yet
    """

    texts: TextMoments
    draws: list[Sums]
    n_examples: int  # examples of each token
    examples: dict[str, Examples] = field(default_factory=dict)
    open_text: tuple[int, Sums] | None = None
    waiting: list[dict[str, Examples]] = field(default_factory=list)

    @classmethod
    def empty(cls, n_tokens: int, n_draws: int, n_examples: int) -> Self:
        """Returns the sums of no text."""
        draws = [Sums.empty(n_tokens) for _ in range(n_draws)]
        examples = {"promoted": Examples.none(), "demoted": Examples.none()}
        return cls(TextMoments(n_tokens), draws, n_examples, examples)

    def add(self, batch: BatchShifts) -> None:
        """Adds a batch."""
        self.texts.merge(batch.texts)
        for text, sums in batch.pieces:
            if self.open_text is None or self.open_text[0] != text:
                self.close_text()
                self.open_text = text, Sums.empty(self.texts.n_tokens)
            self.open_text[1].merge(sums)
        for draw, sums in batch.draws.items():
            self.draws[draw].merge(sums)
        self.waiting.append(batch.examples)

    def close_text(self) -> None:
        """Counts the open text as complete."""
        if self.open_text is not None:
            self.texts.add(self.open_text[1])
        self.open_text = None

    def merge_examples(self) -> None:
        """Keeps the strongest of the examples that wait."""
        for name, examples in self.examples.items():
            parts = [examples, *(part[name] for part in self.waiting)]
            self.examples[name] = strongest_examples(parts, self.n_examples)
        self.waiting.clear()

    def tensors(self) -> dict[str, Tensor]:
        """Returns everything by its name in a file."""
        self.merge_examples()
        named = self.texts.tensors()
        for number, sums in enumerate(self.draws):
            named |= sums.tensors(f"draw.{number}.")
        for name, examples in self.examples.items():
            named |= examples.tensors(f"{name}.")
        if self.open_text is not None:
            text, sums = self.open_text
            named |= {"open.text": torch.tensor([text]), **sums.tensors("open.")}
        return named

    def load(self, tensors: Mapping[str, Any]) -> None:
        """Takes everything from a file."""
        self.texts = TextMoments.from_tensors(tensors)
        for number in range(len(self.draws)):
            self.draws[number] = Sums.from_tensors(tensors, f"draw.{number}.")
        for name in self.examples:
            self.examples[name] = Examples.from_tensors(tensors, f"{name}.")
        if "open.text" in tensors:
            self.open_text = int(tensors["open.text"]), Sums.from_tensors(tensors, "open.")
