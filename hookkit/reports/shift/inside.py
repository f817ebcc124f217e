"""Inside the shown prompts: what each layer would say before and after, and which components made the change."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ...errors import HookkitError
from ...lenses.components import needed
from ...lenses.direct import decomposed
from ...lenses.logit_lens import States, lens_of, stream_sites
from ...models.lm import LM
from ...models.prompts import Row
from ...models.sites import Site
from .before_after import NextTokenLogits
from .named_edits import literal

NUMBERS = ("logit", "prob", "rank")
NOTHING = 1e-4  # logits: a smaller change of a component is not shown by itself


@dataclass(frozen=True)
class LensSites:
    """What is kept of the shown prompts: the sites, and why the lens or the decomposition is left out, if it is."""

    lens: tuple[Site, ...]
    parts: tuple[Site, ...]
    no_lens: str = ""
    no_parts: str = ""

    @property
    def sites(self) -> list[Site]:
        """All of them, each once."""
        return list(dict.fromkeys((*self.lens, *self.parts)))


def looks_of(lm: LM, *, heads: bool) -> LensSites:
    """The sites that the lens and the decomposition read in this model."""
    lens: tuple[Site, ...] = ()
    parts: tuple[Site, ...] = ()
    why = ["", ""]
    try:
        lens = stream_sites(lm, "resid_post")
    except HookkitError as error:
        why[0] = str(error)
    try:
        parts = tuple(needed(lm, heads=heads, neurons=False))
    except HookkitError as error:
        why[1] = str(error)
    return LensSites(lens, parts, *why)


def layers_of(
    was: NextTokenLogits,
    edited: Sequence[NextTokenLogits],
    rows: Sequence[Row],
    looks: LensSites,
    watch: Sequence[int],
    shown: int,
) -> tuple[pd.DataFrame, str]:
    """The logit lens before and after each edit, and "" or why there is none.

    Columns: row, edit, layer, site, edited (whether the edit acts in this block), token, token_id; logit, prob and
    rank, each with _before, _after and _delta. The tokens are those watched, and those first before and after.
    """
    if looks.no_lens:
        return pd.DataFrame(), looks.no_lens
    every = list(
        dict.fromkeys(
            [*watch, *was.first[:shown], *(i for each in edited for i in each.first[:shown])]
        )
    )
    parts = []
    try:
        before = _lens(was, rows, looks, every)
        for now in edited:
            mine = list(dict.fromkeys([*watch, *was.first[:shown], *now.first[:shown]]))
            parts.append(_both(before, _lens(now, rows, looks, mine), was, now, watch))
    except HookkitError as error:
        return pd.DataFrame(), str(error)
    return pd.concat(parts, ignore_index=True), ""


def _lens(
    each: NextTokenLogits, rows: Sequence[Row], looks: LensSites, tokens: Sequence[int]
) -> pd.DataFrame:
    hooks = each.run.hooks[: -1 if looks.sites else None]  # without the report's own capture
    return lens_of(States(each.run, looks.lens), hooks, tuple(rows), 0, tokens, anywhere=False)


def _both(
    before: pd.DataFrame,
    after: pd.DataFrame,
    was: NextTokenLogits,
    now: NextTokenLogits,
    watch: Sequence[int],
) -> pd.DataFrame:
    assert now.edit is not None
    places = ["row", "layer", "site", "token_id"]
    both = after[[*places, *NUMBERS]].merge(
        before[[*places, *NUMBERS]],
        on=places,
        suffixes=("_after", "_before"),
        validate="one_to_one",
    )
    mine = {row: {*watch, was.first[row], now.first[row]} for row in set(both["row"])}
    keep = [token in mine[row] for row, token in zip(both["row"], both["token_id"], strict=True)]
    kept: Any = both[keep]
    kept = kept.assign(edit=now.edit.name, edited=kept["layer"].isin(now.edit.layers))
    kept["token"] = [literal(now.lm, int(token)) for token in kept["token_id"]]
    for name in NUMBERS:
        kept[f"{name}_delta"] = kept[f"{name}_after"] - kept[f"{name}_before"]
    numbers = [f"{name}_{when}" for name in NUMBERS for when in ("before", "after", "delta")]
    order = ["row", "edit", "layer", "site", "edited", "token", "token_id", *numbers]
    return kept[order].sort_values(["row", "token_id", "layer"], kind="stable", ignore_index=True)


def why_of(
    was: NextTokenLogits,
    now: NextTokenLogits,
    tokens: Sequence[int],
    looks: LensSites,
    known: dict[tuple[int, ...], pd.DataFrame],
) -> tuple[pd.DataFrame, str]:
    """One token's logit, before and after an edit, as its sum over components, and "" or why there is none.

    `tokens` has the token of each shown prompt; `known` the unedited run's decompositions by their tokens.
    Columns: row, edit, token, token_id, component, kind, layer, head; logit_before, logit_after, logit_delta. The rows
    of a prompt sum to its token's logits; the row "residual" is what rounding left.
    """
    assert now.edit is not None
    if looks.no_parts:
        return pd.DataFrame(), looks.no_parts
    if not all(
        np.isfinite(float(each.logits[row, i]))
        for each in (was, now)
        for row, i in enumerate(tokens)
    ):
        return (
            pd.DataFrame(),
            "the token's logit is infinite, which is no sum of anything: the edit bans it",
        )
    asked: Any = [*tokens, *[0] * (len(now.logits) - len(tokens))]
    try:
        if tuple(tokens) not in known:
            known[tuple(tokens)] = decomposed(was.run, asked)
        both = joined(known[tuple(tokens)], decomposed(now.run, asked))
    except HookkitError as error:
        return pd.DataFrame(), str(error)
    ids = [tokens[row] for row in both["row"]]
    both.insert(1, "edit", now.edit.name)
    both.insert(2, "token", [literal(now.lm, token) for token in ids])
    both.insert(3, "token_id", ids)
    return both, ""


def joined(before: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
    """Two decompositions side by side; a component that only one of them has adds 0 in the other."""
    keys = ["row", "component", "kind", "layer", "head"]
    both: Any = before[[*keys, "logit"]].merge(
        after[[*keys, "logit"]], on=keys, how="outer", suffixes=("_before", "_after"), sort=False
    )
    numbers = both[["logit_before", "logit_after"]].fillna(0.0)
    both = both.assign(**numbers, logit_delta=numbers["logit_after"] - numbers["logit_before"])
    names = [*before["component"], *after["component"]]
    order = {
        name: place for place, name in reversed([*enumerate(names)])
    }  # the first place of each
    placed = both.assign(_place=both["component"].map(order)).sort_values(
        ["row", "_place"], kind="stable"
    )
    return placed.drop(columns="_place").reset_index(drop=True)


def most_moved(why: pd.DataFrame, top: int) -> pd.DataFrame:
    """The components that changed most, the others together, and the sum, which is the logit.

    Columns: component, logit_before, logit_after, logit_delta.
    """
    columns = ["component", "logit_before", "logit_after", "logit_delta"]
    all_of: Any = why
    change: Any = why["logit_delta"].abs()
    order = change.sort_values(ascending=False, kind="stable").index
    count = min(top, int((change > NOTHING).sum()))
    shown: Any = why.loc[order[:count], columns]
    others: Any = why.loc[order[count:], columns]
    shown = shown.sort_values("logit_delta", ascending=False, kind="stable")
    rows: list[Mapping[str, object]] = []
    sums: tuple[tuple[str, Any], ...] = (
        (f"the other {len(others)}", others),
        ("sum: the logit", all_of),
    )
    for name, part in sums:
        if len(part):
            rows.append(
                {"component": name, **{column: float(part[column].sum()) for column in columns[1:]}}
            )
    return pd.concat([shown, pd.DataFrame(rows)], ignore_index=True)
