"""What the laws are tried on: a model with prompts, some of its blocks, and what its forward gives at every site.

What a law is: a way to try it on a model, the sites of which it says something, and what it finds at each.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from ..errors import BadPrompt
from ..hooks.base import Hook
from ..hooks.capture import capture
from ..models.lm import LM
from ..models.sites import SQUARE, WHOLE_MODEL, Site
from ..models.views import hidden
from ..runs.forward import forward
from ..runs.run import Run
from ..runs.taps import reader

LENGTHS = (7, 2, 5)  # of the prompts, in tokens
LIMITS = {torch.float64: 1e-7, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""Of the largest value: how far two ways to compute one thing may differ in a dtype."""


@dataclass(frozen=True, eq=False)
class Study:
    """A model with prompts, and what its forward gives at every site of the blocks that are tried."""

    lm: LM
    prompts: list
    layers: list[int]

    @cached_property
    def few(self) -> "Study":
        """The same with the shorter prompts alone, for laws that take a forward for every site."""
        return Study(self.lm, self.prompts[1:], self.layers)

    @cached_property
    def sites(self) -> list[Site]:
        """The sites that are tried."""
        found = [site for site in self.lm.sites() if isinstance(site, Site)]
        return [site for site in found if site.layer is None or site.layer in self.layers]

    def having(self, *names: str) -> list[int]:
        """The blocks that have all these sites."""
        return [
            layer
            for layer in self.layers
            if all(self.lm.layout.find(name, layer) for name in names)
        ]

    @cached_property
    def plain(self) -> Run:
        """The forward of the prompts with nothing attached."""
        return forward(self.lm, self.prompts)

    @cached_property
    def run(self) -> Run:
        """The same with every site captured."""
        return forward(self.lm, self.prompts, capture(self.sites))

    @cached_property
    def limit(self) -> float:
        """How far two ways to compute one thing may differ in this model's dtype."""
        return LIMITS.get(self.run[self.sites[0]].dtype, LIMITS[torch.float32])

    def logits(self, *edits: Hook) -> Tensor:
        """The logits under these hooks."""
        return forward(self.lm, self.prompts, *edits).logits

    def vector(self, site: Site) -> Tensor:
        """A random vector as large as what is at a site."""
        size = float(self.run[site].float().std()) or 1.0
        return size * torch.randn(self.lm.shape(site), generator=torch.Generator().manual_seed(0))

    def written(self, value: Tensor, source: Site, target: Site) -> Tensor:
        """What the block adds to the stream for values at `source` (z or mlp_post): projection, norm, multiplier."""
        inner, outer = self.lm.place(source).path, self.lm.place(target).path
        with torch.no_grad():
            given = reader(self.lm, source)(value)
            if not f"{inner}.".startswith(f"{outer}."):  # a norm stands behind it
                given = self.lm.submodule(outer)(given)
        return given * self.lm.layout.factor(target)


def apart(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a part of the largest value expected."""
    if found.shape != expected.shape:
        return float("nan")
    if not found.numel():
        return 0.0
    size = max(float(expected.abs().max()), 1e-3)
    return float((found.double() - expected.double()).abs().max()) / size


def _squares(found: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """Scores or patterns of one text that were captured with more keys and with fewer, as far as both have them.

    Keys that are not seen are left at zero."""
    width = min(found.shape[-1], expected.shape[-1])
    found, expected = found[..., :width], expected[..., :width]
    return found.masked_fill(hidden(found), 0), expected.masked_fill(hidden(expected), 0)


def compared(site: Site, found: Tensor, expected: Tensor) -> float:
    """The same of what is at a site."""
    return (
        apart(*_squares(found, expected))
        if site.name in SQUARE
        else apart(found.float(), expected.float())
    )


def some_prompts(lm: LM) -> list[list[int]]:
    """Three prompts of token ids spread over the vocabulary, the same every time."""
    tokens = lm.n_tokens
    if not tokens:
        raise BadPrompt(f"the vocabulary of {lm!r} is not known: give prompts, rows of token ids")
    numbers = iter(range(3, 3 + sum(LENGTHS)))
    return [[next(numbers) ** 3 * 7919 % tokens for _ in range(length)] for length in LENGTHS]


def of_each_kind(lm: LM, layers: Iterable[int] | None) -> list[int]:
    """The first, middle and last block of each kind, blocks being of one kind if they have the same sites."""
    if layers is not None:
        return list(layers)
    kinds: dict[tuple[str, ...], list[int]] = {}
    for layer in range(lm.n_layers):
        names = tuple(
            name
            for name in lm.layout.names
            if name not in WHOLE_MODEL and lm.layout.find(name, layer)
        )
        kinds.setdefault(names, []).append(layer)
    return sorted({each[place] for each in kinds.values() for place in (0, len(each) // 2, -1)})


@dataclass(frozen=True)
class Finding:
    """How one law stands at one site: the difference, as a part of the largest value, and what it may be at most."""

    site: str
    difference: float
    limit: float
    note: str = ""
    at_least: bool = False  # the difference has to be larger than the limit

    @property
    def holds(self) -> bool:
        """True where the law holds; never for a difference that is not a number."""
        return self.difference > self.limit if self.at_least else self.difference <= self.limit


Check: TypeAlias = Callable[[Study], Iterator[Finding]]


@dataclass(frozen=True)
class Law:
    """A law: its name, how it is tried, and every site of which it may find something."""

    name: str
    check: Check
    sites: tuple[str, ...]


def law(name: str, *sites: str) -> Callable[[Check], Law]:
    """Make a law of the function that tries it."""
    return lambda check: Law(name, check, sites)
