"""Inside the shown prompts of a shift report: the logit lens, and the components of a logit.

`layers_of` says what each layer would say before and after an edit. `why_of` decomposes the change
of one token's logit into the components that made it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ...errors import HookkitError, Unsupported
from ...lenses.components import WITH_FEATURES, required_sites
from ...lenses.direct import decompose_logits, direct_logits
from ...lenses.logit_lens import LensStates, lens_table, stream_sites
from ...models.lm import LM
from ...models.prompts import Row
from ...models.sites import Site
from ...runs.forward import forward
from ...tables.distributions import token_texts
from ...tables.rank_tables import add_deltas
from .before_after import NextTokenLogits

NUMBERS = ("logit", "prob", "rank")
SMALLEST = 1e-4  # logits: a component with a smaller change gets no row of its own


@dataclass(frozen=True)
class LensSites:
    """The sites of the lens and of the decomposition, or why the model has no lens or no sum."""

    lens: tuple[Site, ...]
    parts: tuple[Site, ...]
    no_lens: str = ""
    no_parts: str = ""

    @property
    def sites(self) -> list[Site]:
        """All sites, without duplicates."""
        return list(dict.fromkeys((*self.lens, *self.parts)))


def lens_sites(lm: LM, *, heads: bool) -> LensSites:
    """The sites that the lens and the decomposition read in this model."""
    lens, no_lens = attempt((), stream_sites, lm, "resid_post")
    parts, no_parts = attempt((), required_sites, lm, heads=heads, neurons=False)
    return LensSites(tuple(lens), tuple(parts), no_lens, no_parts)


def attempt(default: Any, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a function returns and "", or `default` and why the model does not allow it."""
    try:
        return function(*args, **kwargs), ""
    except HookkitError as error:
        return default, str(error)


def layers_of(
    before: NextTokenLogits,
    edited: Sequence[NextTokenLogits],
    rows: Sequence[Row],
    sites: LensSites,
    watch: Sequence[int],
    details: int,
) -> pd.DataFrame:
    """The logit lens before and after each edit. Raises `HookkitError` if there is none.

    Columns: row, edit, layer, site, edited (whether the edit acts in this block), token, token_id;
    logit, prob and rank, each with _before, _after and _delta. The tokens are the watched ones, and
    the most likely ones before and after.
    """
    if sites.no_lens:
        raise Unsupported(sites.no_lens)
    shown_tokens = [*watch, *before.top_tokens[:details]]
    all_tokens = list(shown_tokens)
    for after in edited:
        all_tokens += after.top_tokens[:details]
    lens_before = _lens(before, rows, sites, all_tokens)
    parts = []
    for after in edited:
        lens_after = _lens(after, rows, sites, [*shown_tokens, *after.top_tokens[:details]])
        parts.append(_join_lenses(lens_before, lens_after, before, after, watch))
    return pd.concat(parts, ignore_index=True)


def _lens(
    outcome: NextTokenLogits, rows: Sequence[Row], sites: LensSites, tokens: Sequence[int]
) -> pd.DataFrame:
    states = LensStates(outcome.run, sites.lens)
    unique_tokens = list(dict.fromkeys(tokens))
    hooks = outcome.edit.hooks
    return lens_table(states, hooks, tuple(rows), 0, unique_tokens, anywhere=False)


def _join_lenses(
    lens_before: pd.DataFrame,
    lens_after: pd.DataFrame,
    before: NextTokenLogits,
    after: NextTokenLogits,
    watch: Sequence[int],
) -> pd.DataFrame:
    """The two lenses side by side, with the tokens that are shown of each prompt."""
    edit = after.edit
    keys = ["row", "layer", "site", "token_id"]
    table: Any = lens_after[[*keys, *NUMBERS]].merge(
        lens_before[[*keys, *NUMBERS]],
        on=keys,
        suffixes=("_after", "_before"),
        validate="one_to_one",
    )
    is_shown = []
    for row, token in zip(table["row"], table["token_id"], strict=True):
        is_shown.append(token in (*watch, before.top_tokens[row], after.top_tokens[row]))
    table = add_deltas(table[is_shown], NUMBERS)
    table.insert(1, "edit", edit.name)
    table.insert(4, "edited", table["layer"].isin(edit.layers))
    table.insert(5, "token", token_texts(after.lm, table["token_id"]))
    return table.sort_values(["row", "token_id", "layer"], kind="stable", ignore_index=True)


def why_of(
    before: NextTokenLogits,
    after: NextTokenLogits,
    tokens: Sequence[int],
    sites: LensSites,
    decompositions: dict[tuple[int, ...], pd.DataFrame],
) -> pd.DataFrame:
    """One token's logit as a sum over components, before and after.

    Raises `HookkitError` if it is no sum.

    `tokens` has the token of each shown prompt. `decompositions` belongs to the caller: it has the
    unedited run's decompositions by their tokens, and a new one is added.

    Columns: row, edit, token, token_id, component, kind, layer, head; logit_before, logit_after,
    logit_delta. The rows of a prompt sum to its token's logits; the row "residual" is the rounding
    error.
    """
    if sites.no_parts:
        raise Unsupported(sites.no_parts)
    rows = range(len(tokens))
    logits = [*before.logits[rows, tokens].tolist(), *after.logits[rows, tokens].tolist()]
    if not np.isfinite(logits).all():
        raise Unsupported(
            "the token's logit is infinite, which is no sum of anything: the edit bans it"
        )
    padding = [0] * (len(after.logits) - len(tokens))
    row_tokens: Any = [*tokens, *padding]
    if tuple(tokens) not in decompositions:
        decompositions[tuple(tokens)] = decompose_logits(before.run, row_tokens)
    after_parts = decompose_logits(after.run, row_tokens)
    table = join_decompositions(decompositions[tuple(tokens)], after_parts)
    return _with_tokens(table, after, tokens)


def _with_tokens(table: Any, after: NextTokenLogits, tokens: Sequence[int]) -> pd.DataFrame:
    """The table with the name of the edit and the token of each prompt."""
    ids = [tokens[row] for row in table["row"]]
    table.insert(1, "edit", after.edit.name)
    table.insert(2, "token", token_texts(after.lm, ids))
    table.insert(3, "token_id", ids)
    return table


def feature_sites(lm: LM) -> list[Site]:
    """The dictionaries' sites by whose features a logit can be split."""
    return [site for site in lm.layout.dictionaries if site.base_name in WITH_FEATURES]


def features_of(
    before: NextTokenLogits,
    after: NextTokenLogits,
    rows: Sequence[Row],
    tokens: Sequence[int],
    site: Site,
) -> pd.DataFrame:
    """The table of `why_of`, with a dictionary's features and its error for what they stand for.

    The prompts `rows` are read again. Raises `HookkitError` if the logit is no sum.
    """
    tables: list[pd.DataFrame] = []
    for outcome in (before, after):
        run = forward(outcome.lm, list(rows), *outcome.edit.hooks, logits="last")
        tables.append(direct_logits(run, list(tokens), features=site))
    return _with_tokens(join_decompositions(*tables), after, tokens)


def join_decompositions(before: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
    """Two decompositions side by side. A component that only one of them has is 0 in the other."""
    keys = ["row", "component", "kind", "layer", "head"]
    table: Any = before[[*keys, "logit"]].merge(
        after[[*keys, "logit"]], on=keys, how="outer", suffixes=("_before", "_after"), sort=False
    )
    numbers = table[["logit_before", "logit_after"]].fillna(0.0)
    table = table.assign(**numbers, logit_delta=numbers["logit_after"] - numbers["logit_before"])
    order = list(dict.fromkeys([*before["component"], *after["component"]]))
    table["component"] = pd.Categorical(table["component"], order)
    table = table.sort_values(["row", "component"], kind="stable", ignore_index=True)
    return table.astype({"component": before["component"].dtype})


def most_moved(why: pd.DataFrame, top: int) -> pd.DataFrame:
    """The components that changed most, the sum of the other components, and the logit.

    Columns: component, logit_before, logit_after, logit_delta.
    """
    numbers = ["logit_before", "logit_after", "logit_delta"]
    change: Any = why["logit_delta"].abs()
    order = change.sort_values(ascending=False, kind="stable").index
    count = min(top, int((change > SMALLEST).sum()))
    largest: Any = why.loc[order[:count], ["component", *numbers]]
    largest = largest.sort_values("logit_delta", ascending=False, kind="stable")
    smaller: Any = why.loc[order[count:], numbers]
    sums = []
    for name, table in ((f"the other {len(smaller)}", smaller), ("sum: the logit", why[numbers])):
        if len(table):
            sums.append({"component": name, **table.sum()})
    return pd.concat([largest, pd.DataFrame(sums)], ignore_index=True)
