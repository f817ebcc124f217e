"""The tables of a shift report: all forwards, and what their logits show of each edit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pandas as pd
import torch

from ...hooks.base import Hook
from ...hooks.logits import named_tokens
from ...models.lm import LM
from ...models.prompts import Row
from ...models.tokens import prompt_text
from ...sweeps.summary import mean_over_prompts
from ...tables.rank_tables import Pair, shift_table
from ..comparison_page import name_prompt
from ..control_draws import NO_CONTROL, ControlMaker
from . import before_after
from .headline import (
    CHANGES,
    DISTANCES,
    against_control,
    with_ranges_of_draws,
)
from .inside import (
    attempt,
    feature_sites,
    features_of,
    layers_of,
    lens_sites,
    why_of,
)
from .named_edits import (
    Edit,
    random_controls,
    table_of,
)

MOVERS = 5  # tokens that moved most, in the table of shifts


@dataclass(frozen=True, eq=False)
class ShiftTables:
    """What a report measures, and its tables by the names of their files, which `measure` fills.

    `ranks` has the ranks of all tokens before and after, by prompt and edit, for the prompts that
    have figures. `refusals` has the reasons why a table could not be made, "" where it could.
    """

    lm: LM
    rows: tuple[Row, ...]
    base_hooks: tuple[Hook, ...]
    edits: list[Edit]
    controls: list[Edit]
    watch: list[int]
    top: int
    heads: bool
    details: int
    figures: int
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    ranks: dict[tuple[int, str], tuple[Any, ...]] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)

    def of(self, name: str, row: int, edit: str | None = None) -> pd.DataFrame:
        """The rows of a table about one prompt and edit; an empty table if there is none."""
        table: Any = self.tables.get(name, pd.DataFrame())
        if table.empty:
            return table
        table = table[table["row"] == row].drop(columns="row")
        if edit is not None:
            table = table[table["edit"] == edit].drop(columns="edit")
        return table

    def prompt(self, row: int) -> str:
        """A prompt's text, shortened; of a chat its messages."""
        return name_prompt(self.lm, prompt_text(self.lm, self.rows[row]))


def add_means(tables: dict[str, pd.DataFrame], seed: int) -> None:
    """Add the means over the prompts to the tables."""
    by = ["edit", "control"]
    over_rows = partial(mean_over_prompts, seed=seed)
    summary = over_rows(tables["watched"], by=[*by, "watched"], values=CHANGES)
    tables["summary"] = with_ranges_of_draws(summary, tables["against_control"])
    tables["summary_distances"] = over_rows(tables["distances"], by=by, values=DISTANCES)


@dataclass(frozen=True)
class DrawRequest:
    """How many random controls to draw for each edit. `is_required`: raise if one has none."""

    count: int
    seed: int
    is_required: bool


def measure(measured: ShiftTables, request: DrawRequest) -> None:
    """Run all forwards, and make all tables but those of texts and means."""
    lm, rows, details, base = measured.lm, measured.rows, measured.details, measured.base_hooks
    sites = lens_sites(lm, heads=measured.heads)
    edits = [*measured.edits, *measured.controls]
    # A forward that begins at a later block would skip the base hooks of earlier blocks.
    resumable = [] if base else [edit.hooks for edit in edits]
    plan = before_after.plan_resuming(lm, rows, resumable)
    with plan.record_outputs():
        before = before_after.run_prompts(lm, rows, Edit("", base), sites.sites, details)
    edited: list[before_after.NextTokenLogits] = []
    tables: dict[str, list[pd.DataFrame]] = defaultdict(list)
    decompositions: dict[tuple[int, ...], pd.DataFrame] = {}
    for number, edit in enumerate(edits):
        start, edit_sites = plan.starts.get(number, 0), [] if edit.control else sites.sites
        with_base = replace(edit, hooks=(*base, *edit.hooks))
        with plan.resume_at(start):
            after = before_after.run_prompts(
                lm, rows, with_base, edit_sites, details, start, before.run.captures
            )
        tables["watched"].append(before_after.watched_of(before, after, measured.watch))
        tables["distances"].append(before_after.distances_of(before, after))
        if not edit.control:
            tables["shifts"].append(_measure_ranks(measured, before, after, edit))
            tokens = measured.watch[:1] * details or after.top_tokens[:details]
            why, measured.refusals[f"why {edit.name}"] = attempt(
                pd.DataFrame(), why_of, before, after, tokens, sites, decompositions
            )
            tables["why"].append(why)
            tables["features"] += _measure_features(measured, before, after, edit, tokens)
            edited.append(replace(after, logits=after.logits[:details]))
    for edit in measured.edits:
        _measure_draws(measured, before, edit, request, tables)
    measured.tables["edits"] = table_of([*measured.edits, *measured.controls])
    for name, parts in tables.items():
        measured.tables[name] = _concatenate(parts)
    measured.tables["layers"], measured.refusals["layers"] = attempt(
        pd.DataFrame(), layers_of, before, edited, rows, sites, measured.watch, details
    )
    measured.tables["against_control"] = against_control(measured.tables)


def _measure_features(
    measured: ShiftTables,
    before: before_after.NextTokenLogits,
    after: before_after.NextTokenLogits,
    edit: Edit,
    tokens: Sequence[int],
) -> list[pd.DataFrame]:
    """Returns how an edit changed the features of each dictionary, in the first prompts."""
    tables = []
    rows = measured.rows[: measured.details]
    for site in feature_sites(measured.lm):
        features, measured.refusals[f"features {edit.name}"] = attempt(
            pd.DataFrame(), features_of, before, after, rows, tokens, site
        )
        tables.append(features)
    return tables


def _measure_draws(
    measured: ShiftTables,
    before: before_after.NextTokenLogits,
    edit: Edit,
    request: DrawRequest,
    tables: dict[str, list[pd.DataFrame]],
) -> None:
    """Draw the random control of one edit, and add its rows to the tables."""
    if not request.count:
        return
    maker = ControlMaker(measured.lm, before.logits, measured.watch)
    controls: list[Edit] = []
    try:
        controls = random_controls(maker, edit, request.count, request.seed)
        watched, distances = before_after.draws_of(
            before, measured.rows, measured.base_hooks, controls, measured.watch
        )
    except NO_CONTROL as error:
        if request.is_required:
            raise
        measured.refusals[f"control {edit.name}"] = str(error)
        return
    measured.controls.extend(controls)
    tables["watched"].append(watched)
    tables["distances"].append(distances)


def _measure_ranks(
    measured: ShiftTables,
    before: before_after.NextTokenLogits,
    after: before_after.NextTokenLogits,
    edit: Edit,
) -> pd.DataFrame:
    """Keep the ranks of all tokens for the figures. Returns the table of shifts of one edit."""
    pairs = list(zip(before.distributions, after.distributions, strict=True))
    ids = torch.arange(measured.lm.n_tokens or after.logits.shape[-1])
    for row, pair in enumerate(pairs[: measured.figures]):
        measured.ranks[row, edit.name] = tuple(side.ranks(ids).numpy() for side in pair)
    return _build_shifts(pairs, edit, measured)


def _build_shifts(pairs: list[Pair], edit: Edit, measured: ShiftTables) -> pd.DataFrame:
    """The table of `rank_shift` with the edit's name and with log10_rank_ratio."""
    named = named_tokens(measured.lm, edit.hooks)
    table = shift_table(pairs, measured.top, MOVERS, measured.watch, named)
    table.insert(2, "edit", edit.name)
    reasons = table.pop("why")
    return table.assign(log10_rank_ratio=before_after.log10_rank_ratio(table), why=reasons)


def _concatenate(tables: list[pd.DataFrame]) -> pd.DataFrame:
    filled = [table for table in tables if not table.empty]
    return pd.concat(filled, ignore_index=True) if filled else pd.DataFrame()
