"""What a shift report says first: each edit over all prompts, beside the draws of its control."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ...display import quote_token
from ...tables.intervals import MIN_FOR_INTERVAL, means
from ..control_draws import CONFIDENCE, compare
from ..typesetting import format_value

CHANGES = ["logit_delta", "logprob_delta", "prob_delta", "log10_rank_ratio"]
DISTANCES = ["kl", "entropy_delta", "top1_changed"]
UNBOUNDED = (-np.inf, np.inf)
BOUNDS = {"kl": (0.0, np.inf), "top1_changed": (0.0, 1.0)}  # the possible values
RESAMPLES = 2000  # of the bootstrap of an edit's own interval
# The rows of the table on the page; against_control.csv has all.
SHOWN_MEASURES = {
    "logprob_delta": "Δ log-probability (nats)",
    "kl": "KL(before‖after) (nats)",
    "top1_changed": "part of the prompts with another first token",
}
FEW_PROMPTS = (
    f"With fewer than {MIN_FOR_INTERVAL} prompts an interval over prompts says little: the values "
    "of the prompts themselves stand in its place, and the smallest and largest of the draws."
)


def against_control(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """The effect of every edit that has a random control, beside the draws of the control.

    Columns: edit, watched ("" for a measure of the whole distribution), measure, n (prompts), draws
    and the columns of `compare`.
    """
    distances = tables["distances"].assign(watched="")
    records = [*_compare_all(tables["watched"], CHANGES), *_compare_all(distances, DISTANCES)]
    return pd.DataFrame(records)


def _compare_all(table: Any, measures: list[str]) -> Iterator[dict[str, Any]]:
    """Yields the rows of `against_control` for the measures of one table."""
    is_drawn = ~table["control"].isin(["", "all"])
    for (edit, name), draws in table[is_drawn].groupby(["control", "watched"], sort=False):
        is_edit = (table["control"] == "") & (table["edit"] == edit)
        effects = table[is_edit & (table["watched"] == name)].sort_values("row")
        for measure in measures:
            numbers = effects[measure].astype(float).to_numpy()
            grid = draws.assign(number=draws[measure].astype(float))
            grid = grid.pivot(index="row", columns="draw", values="number").to_numpy()
            about = {"edit": edit, "watched": name, "measure": measure}
            counts = {"n": len(numbers), "draws": grid.shape[1]}
            yield about | counts | compare(numbers, grid, BOUNDS.get(measure, UNBOUNDED))


def with_ranges_of_draws(summary: pd.DataFrame, comparison: pd.DataFrame) -> pd.DataFrame:
    """The means over prompts with the range of 95 % of further draws as the intervals of controls.

    `comparison` is the table of `against_control`. An interval of the mean of the draws would say
    how well their mean is known, and not what one more draw may do.
    """
    summary = summary.copy()
    for row in comparison.to_dict("records"):
        name = row["measure"]
        if f"{name}_low" in summary:
            is_row = (summary["control"] == row["edit"]) & (summary["watched"] == row["watched"])
            summary.loc[is_row, f"{name}_low"] = row["control_low"]
            summary.loc[is_row, f"{name}_high"] = row["control_high"]
    return summary


@dataclass(frozen=True)
class Headline:
    """The sentences about one edit.

    watched    its rows of the table of watched tokens, about the token that the headline names
    distances  its rows of the table of distances
    control    its row of `against_control` about that token's log-probability; None if it has none
    why_none   why there is no control; "" if none was asked for
    prompt     the text of the first prompt
    """

    edit: str
    watched: Any
    distances: Any
    control: dict[str, Any] | None
    description: str
    why_none: str
    prompt: str

    def text(self) -> str:
        """All sentences."""
        if self.distances["top1_changed"].isna().any():
            count = int(self.distances["top1_changed"].isna().sum())
            return (
                f"With the edit “{self.edit}” or without it, the model's logits are NaN after "
                f"{count} of {len(self.watched)} prompts, so that nothing can be compared there."
            )
        sentences = self._one_prompt() if len(self.watched) == 1 else self._all_prompts()
        return " ".join([*sentences, *self._beside_control()])

    @property
    def _token(self) -> str:
        return quote_token(self.watched["token"].iloc[0])

    def _one_prompt(self) -> Iterator[str]:
        row, distances = self.watched.iloc[0], self.distances.iloc[0]
        before, after = int(row["rank_before"]), int(row["rank_after"])
        probs = row["prob_before"], row["prob_after"]
        start = f"With the edit “{self.edit}”, after “{self.prompt}”, the token {self._token}"
        if before == after:
            yield (
                f"{start} stays at rank {before:,}; its probability was {probs[0]:.3g} and is "
                f"{probs[1]:.3g}."
            )
        else:
            verb = "rises" if after < before else "falls"
            yield (
                f"{start} {verb} from rank {before:,} (probability {probs[0]:.3g}) to rank "
                f"{after:,} (probability {probs[1]:.3g})."
            )
        top_before = quote_token(distances["top1_before"])
        top_after = quote_token(distances["top1_after"])
        if top_after != top_before:
            yield f"The most likely token is now {top_after}; before the edit it was {top_before}."
        elif after != 1:
            yield f"The most likely token is still {top_after}."

    def _all_prompts(self) -> Iterator[str]:
        watched, n = self.watched, len(self.watched)
        name = self._token if watched["token_id"].nunique() == 1 else "the token that was first"
        rises, falls = sum(watched["rank_delta"] < 0), sum(watched["rank_delta"] > 0)
        first_after = sum(watched["rank_after"] == 1)
        first_before = sum(watched["rank_before"] == 1)
        yield (
            f"With the edit “{self.edit}”, over {n} prompts, {name} rises in {rises} and falls in "
            f"{falls}. It is the most likely token after {first_after} of {n} prompts with the "
            f"edit, and after {first_before} without it."
        )
        yield self._mean_change()

    def _mean_change(self) -> str:
        n, changes = len(self.watched), self.watched["logprob_delta"].to_numpy(float)
        if not np.isfinite(changes).all():
            count = int((self.watched["prob_after"] == 0).sum())
            return f"Its probability is 0 after {count} of {n} prompts with the edit."
        interval = ""
        if n >= MIN_FOR_INTERVAL:
            mean = means(changes[None], CONFIDENCE, RESAMPLES, 0)
            interval = f" (95 % interval {mean.low[0]:+.3g} to {mean.high[0]:+.3g})"
        return f"Its log-probability changes by {changes.mean():+.3g} nats on average{interval}."

    def _beside_control(self) -> Iterator[str]:
        row = self.control
        if row is None:
            if self.why_none:
                yield f"There is no control: {self.why_none}"
            return
        draws, as_large = row["draws"], row["as_large"]
        start = f"Its control, {self.description}, was drawn {draws} times"
        if not np.isfinite([row["control_min"], row["control_max"]]).all():
            yield f"{start}; some of the draws make the token impossible."
            return
        mean = f"{start}, and changes the same log-probability by {row['control']:+.3g} on average"
        yield f"{mean}{_describe_spread(row)}."
        verb = "raise" if row["effect"] > 0 else "lower"
        if as_large == 0:
            yield f"None of the {draws} draws {verb}s it as much as the edit does."
        else:
            yield f"Of the {draws} draws, {as_large} {verb} it as much as the edit does."
        yield from _describe_gain(row)


def _describe_spread(row: dict[str, Any]) -> str:
    """Where single draws of a control lie; of few prompts, the smallest and the largest."""
    if row["n"] < MIN_FOR_INTERVAL or np.isnan(row["control_low"]):
        return f", a single draw by {row['control_min']:+.3g} to {row['control_max']:+.3g}"
    low, high = row["control_low"], row["control_high"]
    return f"; 95 % of such edits lie between {low:+.3g} and {high:+.3g}"


def _describe_gain(row: dict[str, Any]) -> Iterator[str]:
    low, high = row["gain_low"], row["gain_high"]
    if row["n"] < MIN_FOR_INTERVAL or np.isnan(low):
        return
    verdict = "is not distinguished from"
    if low > 0 or high < 0:
        verdict = "differs from"
    yield (
        f"So the edit {verdict} its control: the difference is {row['gain']:+.3g} (95 % interval "
        f"{low:+.3g} to {high:+.3g})."
    )


def control_table(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of `against_control` that the page shows, with intervals as texts."""
    rows: Any = table[table["measure"].isin(SHOWN_MEASURES)]
    records = []
    for row in rows.to_dict("records"):
        record = {
            "edit": row["edit"],
            "about": row["watched"] or "all tokens",
            "measure": SHOWN_MEASURES[row["measure"]],
            "edit's mean": row["effect"],
            "control's mean": row["control"],
        }
        if row["n"] >= MIN_FOR_INTERVAL:
            record["95 % of draws"] = _range_text(row["control_low"], row["control_high"])
            record["difference"] = row["gain"]
            record["95 % interval"] = _range_text(row["gain_low"], row["gain_high"])
        else:
            record["the draws"] = _range_text(row["control_min"], row["control_max"])
            record["difference"] = row["gain"]
        record["draws as large"] = f"{row['as_large']} of {row['draws']}"
        records.append(record)
    return pd.DataFrame(records)


def _range_text(low: float, high: float) -> str:
    if np.isnan(low) or np.isnan(high):
        return ""
    return f"{format_value(low)} to {format_value(high)}"
