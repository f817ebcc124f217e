"""Summaries of a sweep's table over its prompts: means with intervals, and the strongest cells."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from ..arguments import check_arguments
from ..errors import BadHook, EmptySelection, OutOfRange
from ..tables import intervals
from ..tables.intervals import Estimates

NOT_VALUES = ("row", "prompt", "sample", "draw", "random_vectors")
COMPANIONS = ("_random_sd", "_random_rest")  # how the random vectors of a gain vary
SUFFIXES = ("", "_se", "_low", "_high", "_n")
Effects = Literal["ratio_of_means", "mean_of_ratios"]
Matrix = Float[np.ndarray, "prompt sample"]


@check_arguments
def over_prompts(
    table: pd.DataFrame,
    *,
    by: Sequence[str] | None = None,
    values: Sequence[str] | None = None,
    effects: Effects = "ratio_of_means",
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Returns the mean of each metric of a sweep over its prompts, with an interval.

    For another table with a row for each cell and prompt (a lens, direct logits), `values` names
    the columns that are averaged, and `by` the columns that identify a cell (by default the grid's
    and `control`).

    Columns: those of `by`; n, the prompts that count; for each column of numbers its mean under its
    own name, `_se` (standard error), `_low` and `_high` (the interval) and `_n` (how many prompts
    count); interval, the methods.

    The interval is a t interval below 30 prompts, its tails shared by the sample's skewness, and a
    BCa bootstrap (Efron 1987) of `resamples` draws from 30 on. For a column of True and False it is
    Wilson's. In simulations, intervals of 95 % contain the true mean in 93 to 97 % of experiments
    with normal numbers (3 to 50 prompts), and in 88 % or more with lognormal ones. One prompt has
    no interval: NaN. NaN does not count. An infinite value makes the mean infinite and leaves it
    without an interval.

    An `_effect` is the ratio of the means, mean(patched - corrupted) / mean(clean - corrupted), so
    that a pair whose clean and corrupted metric hardly differ does not decide it. Its interval is
    Fieller's (1954) below 30 pairs, and a BCa bootstrap over the pairs from 30 on; NaN if the
    pairs do not distinguish mean(clean - corrupted) from 0. Its `_n` are the pairs that differ.
    `effects="mean_of_ratios"` returns the mean of the pairs' own effects, over those that have one.
    In a table without the metric's `_target`, an effect is averaged like any other column.

    Several rows of one prompt in a cell are averaged first: draws of noise (`causal_tracing`) or of
    a control, or layers that `by` does not name. If every prompt has the same samples, such as
    random vectors, the interval covers prompts and samples (two-way). A `_gain` (`at_damage`) has
    the interval over prompts and random vectors of what a vector does beyond one more random
    vector; in rows of random vectors (`control`) it is where such a vector would lie.

    >>> over_prompts(table).columns[:4].tolist()
    ['layer', 'n', 'prob', 'prob_se']
    """
    if not 0 < confidence < 1:
        raise BadHook(f"confidence={confidence} is no share: give 0.95 for an interval of 95 %")
    if effects not in ("ratio_of_means", "mean_of_ratios"):
        raise BadHook(f"effects={effects!r} is unknown: say 'ratio_of_means' or 'mean_of_ratios'")
    if isinstance(resamples, bool) or not isinstance(resamples, int) or resamples < 1:
        raise OutOfRange(
            f"resamples={resamples!r}: give how many draws a bootstrap has, at least 1"
        )
    cell_names, value_names = _column_names(table, by, values)
    for name in cell_names:
        table = table.assign(**{name: [_as_hashable(value) for value in table[name]]})
    arrays = _Arrays(table)
    groups = []
    for rows in _split_by_cell(table, cell_names):
        groups.append(_Group(arrays, rows, value_names, cell_names))
    first_rows = [int(group.rows[0]) for group in groups]
    summary = table[cell_names].iloc[first_rows].reset_index(drop=True)
    summary["n"] = [group.count for group in groups]
    methods: list[list[str]] = [[] for _ in groups]
    settings = _Settings(confidence, resamples, seed, effects)
    for name in value_names:
        column_summary = _summarize(groups, name, table, settings)
        for suffix in SUFFIXES:
            summary[f"{name}{suffix}"] = column_summary[suffix]
        for group_methods, method in zip(methods, column_summary["interval"], strict=True):
            if method and method not in group_methods:
                group_methods.append(method)
    summary["interval"] = ["; ".join(group_methods) for group_methods in methods]
    return summary


@dataclass(frozen=True)
class _Settings:
    confidence: float
    resamples: int
    seed: int
    effects: str


def _column_names(
    table: pd.DataFrame, by: Sequence[str] | None, values: Sequence[str] | None
) -> tuple[list[str], list[str]]:
    """Returns the columns that identify a cell, and those that are averaged."""
    value_names = _metric_columns(table) if values is None else list(values)
    for name in (*value_names, *(by or ())):
        if name not in table.columns:
            raise BadHook(f"the table has no column {name!r}; it has {', '.join(table.columns)}")
    cell_names = list(by or ())
    if by is None:
        for name in table.columns:
            is_value = name in value_names or name in NOT_VALUES
            if not is_value and not name.endswith(COMPANIONS):
                cell_names.append(name)
    if not value_names or not cell_names:
        raise BadHook(
            f"this table has columns {', '.join(table.columns)}: give what sweep gave, or say by= "
            "and values="
        )
    if table.empty:
        raise EmptySelection("the table has no row to average")
    return cell_names, value_names


def _metric_columns(table: pd.DataFrame) -> list[str]:
    metrics = [name.removesuffix("_before") for name in table.columns if name.endswith("_before")]
    names = []
    for name in table.columns:
        belongs = any(name == metric or name.startswith(f"{metric}_") for metric in metrics)
        if belongs and not name.endswith(COMPANIONS):
            names.append(name)
    return names


def _split_by_cell(table: pd.DataFrame, cell_names: list[str]) -> list[Int[np.ndarray, " row"]]:
    """Returns the row numbers of each cell, the cells in the order in which they appear."""
    numbers = table.groupby(cell_names, sort=False, dropna=False).ngroup().to_numpy()
    return np.split(np.argsort(numbers, kind="stable"), np.bincount(numbers).cumsum()[:-1])


def _as_hashable(value: Any) -> Any:
    """Returns a value of a dimension by which rows can be grouped: a list becomes a tuple."""
    if isinstance(value, list):
        return tuple(value)
    return value if isinstance(value, Hashable) else repr(value)


class _Arrays:
    """The columns of a table as arrays. It owns the arrays, which are computed once each."""

    def __init__(self, table: pd.DataFrame) -> None:
        self.table = table
        self._numbers: dict[str, Float[np.ndarray, " row"]] = {}
        self._codes: dict[str, Int[np.ndarray, " row"]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.table.columns

    def numbers(self, name: str) -> Float[np.ndarray, " row"]:
        """Returns a column of numbers."""
        if name not in self._numbers:
            self._numbers[name] = self.table[name].to_numpy(float, na_value=np.nan)
        return self._numbers[name]

    def codes(self, name: str) -> Int[np.ndarray, " row"]:
        """Returns a column with its different values numbered from 0."""
        if name not in self._codes:
            self._codes[name] = pd.factorize(self.table[name])[0]
        return self._codes[name]


class _Group:
    """The rows of one cell, by prompt and sample.

    prompts  the number of each row's prompt; None if each prompt has one row
    samples  the number of each row's sample; None unless all prompts have the same samples
    count    how many prompts have a value
    """

    def __init__(
        self,
        arrays: _Arrays,
        rows: Int[np.ndarray, " row"],
        value_names: Sequence[str],
        cell_names: Sequence[str],
    ) -> None:
        self.arrays, self.rows = arrays, rows
        self.prompts: np.ndarray | None = None
        self.samples: np.ndarray | None = None
        key = "prompt" if "prompt" in arrays else "row"
        if key in arrays and key not in cell_names:
            unique, numbers = np.unique(arrays.codes(key)[rows], return_inverse=True)
            if len(unique) < len(rows):
                self.prompts = numbers
        if self.prompts is not None and self._has_shared_samples(cell_names):
            self.samples = np.unique(arrays.codes("sample")[rows], return_inverse=True)[1]
        is_number = [~np.isnan(self.values(name)) for name in value_names]
        self.count = int(np.logical_or.reduce(is_number).sum())

    def _has_shared_samples(self, cell_names: Sequence[str]) -> bool:
        """True if every prompt has every sample, and a sample is the same for all prompts."""
        arrays, rows = self.arrays, self.rows
        if "sample" not in arrays or "sample" in cell_names:
            return False
        assert self.prompts is not None
        if "prompt" in arrays and "row" in arrays:
            n_rows = len(np.unique(arrays.codes("row")[rows]))
        else:
            n_rows = 0
        if n_rows == len(rows):
            return False  # draws of noise, which differ between prompts
        n_prompts = self.prompts.max() + 1
        n_samples = len(np.unique(arrays.codes("sample")[rows]))
        return n_samples > 1 and n_prompts * n_samples == len(rows)

    def column(self, name: str) -> Float[np.ndarray, " row"]:
        """Returns the numbers of a column, one for each row."""
        return self.arrays.numbers(name)[self.rows]

    def values(self, name: str) -> Float[np.ndarray, " prompt"]:
        """Returns the numbers of a column, one for each prompt: the mean over its rows."""
        numbers = self.column(name)
        if self.prompts is None:
            return numbers
        is_number = ~np.isnan(numbers)
        counts = np.bincount(self.prompts, weights=is_number)
        sums = np.bincount(self.prompts, weights=np.where(is_number, numbers, 0.0))
        return np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)

    def matrix(self, numbers: Float[np.ndarray, " row"]) -> Matrix | None:
        """Returns numbers by prompt and sample; None if samples are not shared by the prompts, or
        if a number is not finite."""
        if self.samples is None or self.prompts is None or not np.isfinite(numbers).all():
            return None
        matrix = np.full((self.prompts.max() + 1, self.samples.max() + 1), np.nan)
        matrix[self.prompts, self.samples] = numbers
        return None if np.isnan(matrix).any() else matrix


def _summarize(
    groups: list[_Group], name: str, table: pd.DataFrame, settings: _Settings
) -> pd.DataFrame:
    """Returns the mean, standard error, interval, count and method of one column in every cell."""
    if name.endswith("_effect") and settings.effects == "ratio_of_means":
        metric = name.removesuffix("_effect")
        parts = [f"{metric}{suffix}" for suffix in ("_delta", "_before", "_target")]
        if all(part in table.columns for part in parts):
            return _summarize_ratios(groups, parts, settings)
    values = [group.values(name) for group in groups]
    summary = _summarize_means(values, table[name].dtype == bool, settings)
    metric = name.removesuffix("_gain")
    companions = {f"{metric}{suffix}" for suffix in COMPANIONS}
    if name.endswith("_gain") and companions <= set(table.columns):
        _widen_gains(groups, summary, metric, settings)
        return summary
    for number, group in enumerate(groups):
        matrix = group.matrix(group.column(name))
        if matrix is not None:
            _widen(summary, number, matrix, settings)
    return summary


def _empty_summary(count: int) -> pd.DataFrame:
    summary = pd.DataFrame(np.nan, index=range(count), columns=["", "_se", "_low", "_high"])
    return summary.assign(_n=0, interval="")


def _fill(
    summary: pd.DataFrame, numbers: list[int], estimates: Estimates, counts: list[int]
) -> None:
    """Writes the estimates of some cells into the summary."""
    summary.loc[numbers, ""] = estimates.mean
    summary.loc[numbers, "_se"] = estimates.error
    summary.loc[numbers, "_low"] = estimates.low
    summary.loc[numbers, "_high"] = estimates.high
    summary.loc[numbers, "_n"] = counts
    has_interval = np.isfinite(estimates.low)
    summary.loc[numbers, "interval"] = np.where(has_interval, estimates.method, "")


def _summarize_means(
    values: list[np.ndarray], is_boolean: bool, settings: _Settings
) -> pd.DataFrame:
    summary = _empty_summary(len(values))
    by_count: dict[int, list[int]] = {}  # cells with the same number of values are computed at once
    for number, cell_values in enumerate(values):
        count = int(np.isfinite(cell_values).sum())
        if np.isinf(cell_values).any():
            with np.errstate(invalid="ignore"):  # +inf and -inf have no mean
                summary.loc[number, ""] = np.nanmean(cell_values)
            summary.loc[number, "_n"] = int((~np.isnan(cell_values)).sum())
        elif count:
            by_count.setdefault(count, []).append(number)
    for count, numbers in by_count.items():
        matrix = np.stack([values[number][np.isfinite(values[number])] for number in numbers])
        if is_boolean and np.isin(matrix, (0, 1)).all():
            estimates = intervals.shares(matrix.sum(axis=1).astype(int), count, settings.confidence)
        else:
            estimates = intervals.means(
                matrix, settings.confidence, settings.resamples, settings.seed
            )
        _fill(summary, numbers, estimates, [count] * len(numbers))
    return summary


def _summarize_ratios(
    groups: list[_Group], parts: Sequence[str], settings: _Settings
) -> pd.DataFrame:
    """Summarizes effects as ratios of means: the change in a cell, over the target's change."""
    summary = _empty_summary(len(groups))
    by_count: dict[int, list[int]] = {}
    numerators: list[np.ndarray] = []
    denominators: list[np.ndarray] = []
    for number, group in enumerate(groups):
        delta, before, target = (group.values(part) for part in parts)
        with np.errstate(invalid="ignore"):
            distance = target - before
        is_finite = np.isfinite(delta) & np.isfinite(distance)
        numerators.append(delta[is_finite])
        denominators.append(distance[is_finite])
        if is_finite.any():
            by_count.setdefault(int(is_finite.sum()), []).append(number)
    for numbers in by_count.values():
        numerator = np.stack([numerators[number] for number in numbers])
        denominator = np.stack([denominators[number] for number in numbers])
        estimates = intervals.ratios(
            numerator, denominator, settings.confidence, settings.resamples, settings.seed
        )
        n_different = (denominator != 0).sum(axis=1)
        _fill(summary, numbers, estimates, n_different.tolist())
    for number, group in enumerate(groups):
        ratio = _mean_of(summary, number)
        if not np.isfinite(ratio):
            continue
        delta, before, target = (group.column(part) for part in parts)
        distance = target - before
        matrix = group.matrix(delta - ratio * distance)
        if matrix is not None:
            _widen(summary, number, matrix / distance.mean(), settings)
    return summary


def _mean_of(summary: pd.DataFrame, number: int) -> float:
    return float(summary.loc[number, ""])  # pyright: ignore


def _widen(summary: pd.DataFrame, number: int, matrix: Matrix, settings: _Settings) -> None:
    """Replaces the interval of a cell by one over prompts and samples."""
    two_way = intervals.two_way(matrix, settings.confidence)
    if two_way is None:
        return
    error, half = two_way
    mean = _mean_of(summary, number)
    summary.loc[number, ["_se", "_low", "_high"]] = [error, mean - half, mean + half]
    summary.loc[number, "interval"] = intervals.TWO_WAY


def _widen_gains(
    groups: list[_Group], summary: pd.DataFrame, metric: str, settings: _Settings
) -> None:
    """Replaces the intervals of gains by intervals over prompts and random vectors."""
    for number, group in enumerate(groups):
        mean = _mean_of(summary, number)
        if "site" in group.arrays and len(np.unique(group.arrays.codes("site")[group.rows])) > 1:
            raise BadHook(
                "gains at several sites are in one cell, whose random vectors are others: name "
                "'site' in by="
            )
        between, rest = (float(group.column(f"{metric}{suffix}")[0]) for suffix in COMPANIONS)
        vectors = int(group.column("random_vectors")[0])
        gains = group.values(f"{metric}_gain")
        if "control" in group.arrays and group.column("control").all():
            gains = gains[:0]  # rows of random vectors: the interval of one more of them
        error, half = intervals.beyond_random(
            gains[np.isfinite(gains)], between, rest, vectors, settings.confidence
        )
        numbers, method = [np.nan] * 3, ""
        if np.isfinite(half):
            numbers, method = [error, mean - half, mean + half], intervals.TWO_WAY
        summary.loc[number, ["_se", "_low", "_high"]] = numbers
        summary.loc[number, "interval"] = method


@check_arguments
def strongest(
    table: pd.DataFrame,
    *,
    top: int = 5,
    value: str | None = None,
    by: Sequence[str] | None = None,
    toward: Literal["either", "up", "down"] = "either",
    effects: Effects = "ratio_of_means",
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Returns the cells of a sweep with the largest effects, chosen on one half of the prompts and
    measured on the other.

    The largest of many numbers is too large, because chance helped to choose it. So the 1st, 3rd,
    5th … prompt choose the cells, and the 2nd, 4th … measure them: numbers and intervals are those
    of `over_prompts` on prompts that had no part in the choice.

    `value` is the column by which cells are chosen (by default the first effect, else the first
    delta): by absolute value, or `toward` "up" or "down". Controls are not chosen. Columns: those
    of `over_prompts`, and `<value>_chosen`, the value in the choosing half, by which the rows are
    sorted. The table needs at least 4 prompts.

    >>> strongest(pd.concat([table, table.assign(row=table["row"] + 2)]), top=1)["n"].tolist()
    [2]
    """
    if isinstance(top, bool) or not isinstance(top, int) or top < 1:
        raise OutOfRange(f"top={top!r}: give how many cells are chosen, at least 1")
    if toward not in ("either", "up", "down"):
        raise BadHook(f"toward={toward!r} is unknown: say 'either', 'up' or 'down'")
    only = None if value is None or by is None else [value]
    cell_names, value_names = _column_names(table, by, only)
    value = value or _default_value(value_names)
    if value not in table.columns:
        raise BadHook(f"the table has no column {value!r}; it has {', '.join(table.columns)}")
    key = _prompt_column(table)
    if "control" in table.columns:
        table = pd.DataFrame(table[~table["control"].astype(bool)])
    is_first_half = pd.factorize(table[key])[0] % 2 == 0
    settings: dict[str, Any] = {
        "by": cell_names,
        "values": value_names,
        "effects": effects,
        "confidence": confidence,
        "resamples": resamples,
        "seed": seed,
    }
    chosen = over_prompts(pd.DataFrame(table[is_first_half]), **settings)
    measured = over_prompts(pd.DataFrame(table[~is_first_half]), **settings)
    keys = {"either": -chosen[value].abs(), "up": -chosen[value], "down": chosen[value]}
    order = keys[toward].sort_values(kind="stable").index[:top]
    best = chosen.loc[order, [*cell_names, value]].rename(columns={value: f"{value}_chosen"})
    return best.merge(measured, on=cell_names, how="left")


def _default_value(value_names: Sequence[str]) -> str:
    for suffix in ("_effect", "_delta"):
        for name in value_names:
            if name.endswith(suffix):
                return name
    return value_names[0]


def _prompt_column(table: pd.DataFrame) -> str:
    """Returns the column that identifies the prompt. Raises for fewer than 4 prompts."""
    name = "prompt" if "prompt" in table.columns else "row"
    count = 0
    if name in table.columns:
        prompts: Any = table[name]
        count = int(prompts.nunique())
    if count < 4:
        raise OutOfRange(
            f"{count} prompts: cells are chosen on one half of the prompts and measured on the "
            "other, so give at least 4"
        )
    return name
