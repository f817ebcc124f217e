"""What is sent to the process of an engine for a run, and what comes back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ...hooks.base import Hook
from ...hooks.capture import Captured
from ...models.sites import AnySite


@dataclass(frozen=True, eq=False)
class ServedRun:
    """A run as it is sent to an engine. `references` are values at sites on other prompts.

    prompts    the token ids of each prompt
    returned   how many rows each prompt has
    most       how many tokens may be generated
    eos        the tokens that end a row
    is_forward  True if the prompts are read, and the token after each is left out
    order      the hooks at their sites, by number, in the order in which a run lists them
    """

    hooks: tuple[Hook, ...]
    observers: tuple[Hook, ...]
    prompts: tuple[tuple[int, ...], ...]
    returned: int
    most: int
    eos: frozenset[int]
    references: Sequence[tuple[tuple[Any, ...], dict[AnySite, Captured]]] = ()
    is_forward: bool = False
    order: Sequence[tuple[int, AnySite]] = ()

    @property
    def rows(self) -> range:
        """The rows of the run: `returned` of each prompt."""
        return range(len(self.prompts) * self.returned)


@dataclass(frozen=True, eq=False)
class SampledRun:
    """A run, and how vLLM chooses its tokens: `settings` are those of its `SamplingParams`.

    `seeds` are those of the rows, or None. `salts` keep the cached prefixes of a row to itself.
    """

    run: ServedRun
    settings: Mapping[str, Any]
    seeds: Sequence[int | None]
    salts: Sequence[str | None]


@dataclass(frozen=True, eq=False)
class ServedResult:
    """A run's result: the tokens of each row, the captured and observed values, and the log."""

    rows: list[list[int]]
    captures: list[Captured]
    observed: list[Captured]
    log: pd.DataFrame
