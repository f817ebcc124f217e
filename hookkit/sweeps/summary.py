"""Summaries of a sweep's table over its prompts: means with intervals, and the strongest cells."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any, Literal, TypeAlias, TypedDict, Unpack

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from ..arguments import check_arguments, check_integer
from ..errors import BadHook, EmptySelection, OutOfRange
from ..tables import intervals
from ..tables.intervals import Estimates

NOT_VALUES = ("row", "prompt", "sample", "draw", "random_vectors")
COMPANIONS = ("_random_sd", "_random_rest")  # how the random vectors of a gain vary
SUFFIXES = ("", "_se", "_low", "_high", "_n")
Effects = Literal["ratio_of_means", "mean_of_ratios"]
Matrix = Float[np.ndarray, "prompt sample"]
Summary: TypeAlias = dict[str, np.ndarray]
"""Of one column, by suffix: the mean, standard error, interval and count of every cell, and under
"interval" the method."""


@check_arguments
def mean_over_prompts(
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
    random vectors, the interval covers prompts and samples (two-way). A `_gain`
    (`effect_at_damage`) has the interval over prompts and random vectors of what a vector does
    beyond one more random vector; in rows of random vectors (`control`) it is where such a vector
    would lie.

    >>> mean_over_prompts(table).columns[:4].tolist()
    ['layer', 'n', 'prob', 'prob_se']
    """
    if not 0 < confidence < 1:
        raise BadHook(f"confidence={confidence} is no share: give 0.95 for an interval of 95 %")
    check_integer(resamples, "resamples", least=1, meaning="how many draws a bootstrap has,")
    cell_names, value_names = _column_names(table, by, values)
    cells = _Cells(table, cell_names)
    settings = _Settings(confidence, resamples, seed, effects)
    first_rows = list(map(itemgetter(0), cells.rows))
    summary = cells.table[cell_names].iloc[first_rows].reset_index(drop=True)
    has_value = ~np.isnan(list(map(cells.by_prompt, value_names))).all(axis=0)
    summary["n"] = np.bincount(cells.prompt_cells, weights=has_value).astype(int)
    methods = []
    for name in value_names:
        column = _summarize(cells, name, settings)
        for suffix in SUFFIXES:
            summary[f"{name}{suffix}"] = column[suffix]
        methods.append(column["interval"])
    summary["interval"] = list(map(_join_methods, zip(*methods, strict=True)))
    return summary


def _join_methods(methods: Iterable[str]) -> str:
    """Returns the different methods of a cell's intervals, in one text."""
    return "; ".join(dict.fromkeys(filter(None, methods)))


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
    cell_names = _cell_columns(table, value_names) if by is None else list(by)
    _check_columns(table, *value_names, *cell_names)
    if not value_names or not cell_names:
        raise BadHook(
            f"this table has columns {', '.join(table.columns)}: give what sweep gave, or say by= "
            "and values="
        )
    if table.empty:
        raise EmptySelection("the table has no row to average")
    return cell_names, value_names


def _check_columns(table: pd.DataFrame, *names: str) -> None:
    for name in names:
        if name not in table.columns:
            raise BadHook(f"the table has no column {name!r}; it has {', '.join(table.columns)}")


def _cell_columns(table: pd.DataFrame, value_names: Sequence[str]) -> list[str]:
    excluded = {*value_names, *NOT_VALUES}
    names = [name for name in table.columns if name not in excluded]
    return [name for name in names if not name.endswith(COMPANIONS)]


def _metric_columns(table: pd.DataFrame) -> list[str]:
    names = [name for name in table.columns if not name.endswith(COMPANIONS)]
    metrics = [name.removesuffix("_before") for name in names if name.endswith("_before")]
    prefixes = tuple(f"{metric}_" for metric in metrics)
    return [name for name in names if name in metrics or name.startswith(prefixes)]


def _prompt_column(table: pd.DataFrame) -> str:
    return "prompt" if "prompt" in table.columns else "row"


def _as_hashable(value: Any) -> Any:
    """Returns a value of a dimension by which rows can be grouped: a list becomes a tuple."""
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, Hashable):
        return value
    return repr(value)


class _Cells:
    """The cells of a table, with their rows and prompts.

    rows          for each cell its row numbers, the cells in the order in which they appear
    prompts       for each row the number of its prompt, counted over all cells
    prompt_cells  for each prompt its cell
    samples       for each row the number of its sample; None unless rows have samples
    """

    def __init__(self, table: pd.DataFrame, cell_names: Sequence[str]) -> None:
        hashable = {name: list(map(_as_hashable, table[name])) for name in cell_names}
        self.table, self.cell_names = table.assign(**hashable), cell_names
        by_cell = self.table.groupby(list(cell_names), sort=False, dropna=False)
        row_cells = by_cell.ngroup().to_numpy()
        ends = np.bincount(row_cells).cumsum()
        self.rows = np.split(np.argsort(row_cells, kind="stable"), ends[:-1])
        prompt_keys = self._codes(_prompt_column(table))
        if prompt_keys is None:
            prompt_keys = np.arange(len(table))
        pairs = pd.DataFrame({"cell": row_cells, "prompt": prompt_keys}).groupby(["cell", "prompt"])
        self.prompts = pairs.ngroup().to_numpy()
        self.prompt_cells = pairs["cell"].first().to_numpy()
        self.samples = self._codes("sample")

    def _codes(self, name: str) -> Int[np.ndarray, " row"] | None:
        """Returns a column with its different values numbered from 0; None if the table has none of
        this name beside those that identify a cell."""
        if name not in self.table.columns or name in self.cell_names:
            return None
        return pd.factorize(self.table[name])[0]

    def numbers(self, name: str) -> Float[np.ndarray, " row"]:
        """Returns a column of numbers."""
        return self.table[name].to_numpy(float, na_value=np.nan)

    def by_prompt(self, name: str) -> Float[np.ndarray, " prompt"]:
        """Returns the mean of a column over the rows of each prompt of each cell."""
        numbers = self.numbers(name)
        is_number = ~np.isnan(numbers)
        counts = np.bincount(self.prompts, weights=is_number)
        with np.errstate(invalid="ignore"):  # infinity minus infinity
            sums = np.bincount(self.prompts, weights=np.where(is_number, numbers, 0.0))
        return np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)

    def split(self, numbers: Float[np.ndarray, "... prompt"]) -> list[np.ndarray]:
        """Returns numbers of all prompts by cell."""
        return np.split(numbers, np.bincount(self.prompt_cells).cumsum()[:-1], axis=-1)

    def matrix(self, cell: int, numbers: Float[np.ndarray, " row"]) -> Matrix | None:
        """Returns the numbers of a cell's rows by prompt and sample; None unless every prompt has
        every sample, with a finite number, and a sample is the same for all prompts."""
        rows = self.rows[cell]
        if self.samples is None or not np.isfinite(numbers).all() or self._has_own_draws(rows):
            return None
        prompts = np.unique(self.prompts[rows], return_inverse=True)[1]
        samples = np.unique(self.samples[rows], return_inverse=True)[1]
        matrix = np.full((prompts.max() + 1, samples.max() + 1), np.nan)
        if matrix.shape[1] < 2 or matrix.size != len(rows):
            return None
        matrix[prompts, samples] = numbers
        return None if np.isnan(matrix).any() else matrix

    def _has_own_draws(self, rows: Int[np.ndarray, " row"]) -> bool:
        """True if the samples of rows are draws of noise, which differ between prompts."""
        if not {"prompt", "row"} <= set(self.table.columns):
            return False
        return self.table["row"].iloc[rows].nunique() == len(rows)


def _summarize(cells: _Cells, name: str, settings: _Settings) -> Summary:
    """Returns the mean, standard error, interval, count and method of one column in every cell."""
    parts = _related_columns(cells.table, name, "_effect", ("_delta", "_before", "_target"))
    if parts and settings.effects == "ratio_of_means":
        return _summarize_ratios(cells, parts, settings)
    summary = _summarize_means(cells, name, settings)
    spreads = _related_columns(cells.table, name, "_gain", COMPANIONS)
    if spreads:
        _widen_gains(cells, summary, name, spreads, settings)
        return summary
    numbers = cells.numbers(name)
    for cell, rows in enumerate(cells.rows):
        _widen(summary, cell, cells.matrix(cell, numbers[rows]), settings)
    return summary


def _related_columns(
    table: pd.DataFrame, name: str, suffix: str, suffixes: Sequence[str]
) -> list[str]:
    """Returns the columns with other suffixes in place of one; none unless the table has all."""
    names = [f"{name.removesuffix(suffix)}{other}" for other in suffixes]
    return names if name.endswith(suffix) and set(names) <= set(table.columns) else []


def _estimate(
    parts: Sequence[Float[np.ndarray, "part value"]], estimate: Callable[[np.ndarray], Estimates]
) -> Summary:
    """Returns the estimates of each cell; cells with the same number of values are computed at
    once, as [cell, part, value]."""
    summary: Summary = {suffix: np.full(len(parts), np.nan) for suffix in SUFFIXES[:-1]}
    summary |= {"_n": np.zeros(len(parts), dtype=int), "interval": np.full(len(parts), "", object)}
    by_count: dict[int, list[int]] = defaultdict(list)
    for cell, part in enumerate(parts):
        by_count[part.shape[1]].append(cell)
    by_count.pop(0, None)
    for count, cells in by_count.items():
        estimates = estimate(np.stack([parts[cell] for cell in cells]))
        summary[""][cells], summary["_se"][cells] = estimates.mean, estimates.error
        summary["_low"][cells], summary["_high"][cells] = estimates.low, estimates.high
        summary["_n"][cells] = count
        summary["interval"][cells] = np.where(np.isfinite(estimates.low), estimates.method, "")
    return summary


def _summarize_means(cells: _Cells, name: str, settings: _Settings) -> Summary:
    def estimate(values: np.ndarray) -> Estimates:
        matrix = values[:, 0]
        if cells.table[name].dtype == bool and np.isin(matrix, (0, 1)).all():
            hits = matrix.sum(axis=1).astype(int)
            return intervals.shares(hits, matrix.shape[1], settings.confidence)
        return intervals.means(matrix, settings.confidence, settings.resamples, settings.seed)

    values_by_cell = cells.split(cells.by_prompt(name))
    parts = []
    for values in values_by_cell:
        has_infinity = np.isinf(values).any()
        parts.append(values[None, np.isfinite(values) & ~has_infinity])
    summary = _estimate(parts, estimate)
    for cell, values in enumerate(values_by_cell):
        if np.isinf(values).any():
            with np.errstate(invalid="ignore"):  # +inf and -inf have no mean
                summary[""][cell] = np.nanmean(values)
            summary["_n"][cell] = (~np.isnan(values)).sum()
    return summary


def _summarize_ratios(cells: _Cells, names: Sequence[str], settings: _Settings) -> Summary:
    """Summarizes effects as ratios of means: the change in a cell, over the target's change."""

    def estimate(values: np.ndarray) -> Estimates:
        return intervals.ratios(
            values[:, 0], values[:, 1], settings.confidence, settings.resamples, settings.seed
        )

    delta, before, target = map(cells.by_prompt, names)
    with np.errstate(invalid="ignore"):
        pairs = np.stack([delta, target - before])
    parts = [pair[:, np.isfinite(pair).all(axis=0)] for pair in cells.split(pairs)]
    summary = _estimate(parts, estimate)
    summary["_n"] = np.array([np.count_nonzero(part[1]) for part in parts])
    delta, before, target = map(cells.numbers, names)
    for cell, rows in enumerate(cells.rows):
        with np.errstate(invalid="ignore"):
            distance = target[rows] - before[rows]
            matrix = cells.matrix(cell, delta[rows] - summary[""][cell] * distance)
        if matrix is not None:
            _widen(summary, cell, matrix / distance.mean(), settings)
    return summary


def _widen(summary: Summary, cell: int, matrix: Matrix | None, settings: _Settings) -> None:
    """Replaces the interval of a cell by one over prompts and samples, if it has such a matrix."""
    two_way = None if matrix is None else intervals.two_way(matrix, settings.confidence)
    if two_way is not None:
        _set_interval(summary, cell, *two_way)


def _set_interval(summary: Summary, cell: int, error: float, half: float) -> None:
    """Sets the standard error and the interval of a cell, of which half the width is given. An
    infinite one is none."""
    mean, method = summary[""][cell], intervals.TWO_WAY
    if not np.isfinite(half):
        error, half, method = np.nan, np.nan, ""
    summary["_se"][cell], summary["_low"][cell] = error, mean - half
    summary["_high"][cell], summary["interval"][cell] = mean + half, method


def _widen_gains(
    cells: _Cells, summary: Summary, name: str, spreads: Sequence[str], settings: _Settings
) -> None:
    """Replaces the intervals of gains by intervals over prompts and random vectors."""
    gains_by_cell = cells.split(cells.by_prompt(name))
    between, residual = map(cells.numbers, spreads)
    vectors = cells.numbers("random_vectors")
    for cell, (rows, gains) in enumerate(zip(cells.rows, gains_by_cell, strict=True)):
        if _is_of_random_vectors(cells.table.iloc[rows]):
            gains = gains[:0]  # the interval of one more of them
        first = rows[0]
        error, half = intervals.beyond_random(
            gains[np.isfinite(gains)],
            float(between[first]),
            float(residual[first]),
            int(vectors[first]),
            settings.confidence,
        )
        _set_interval(summary, cell, error, half)


def _is_of_random_vectors(cell: pd.DataFrame) -> bool:
    """True if the rows of a cell are those of random vectors. Raises if it has several sites."""
    if "site" in cell.columns and len(cell["site"].unique()) > 1:
        raise BadHook(
            "gains at several sites are in one cell, whose random vectors are others: name "
            "'site' in by="
        )
    return "control" in cell.columns and bool(cell["control"].astype(bool).all())


class SummarySettings(TypedDict, total=False):
    """The keywords that `strongest` passes to `mean_over_prompts`."""

    effects: Effects
    confidence: float
    resamples: int
    seed: int


@check_arguments
def strongest(
    table: pd.DataFrame,
    *,
    top: int = 5,
    value: str | None = None,
    by: Sequence[str] | None = None,
    toward: Literal["either", "up", "down"] = "either",
    **settings: Unpack[SummarySettings],
) -> pd.DataFrame:
    """Returns the cells of a sweep with the largest effects, chosen on one half of the prompts and
    measured on the other.

    The largest of many numbers is too large, because chance helped to choose it. So the 1st, 3rd,
    5th … prompt choose the cells, and the 2nd, 4th … measure them: numbers and intervals are those
    of `mean_over_prompts` on prompts that had no part in the choice.

    `value` is the column by which cells are chosen (by default the first effect, else the first
    delta): by absolute value, or `toward` "up" or "down". Controls are not chosen. Columns: those
    of `mean_over_prompts`, and `<value>_chosen`, the value in the choosing half, by which the rows
    are sorted. The table needs at least 4 prompts. `effects`, `confidence`, `resamples` and `seed`
    are those of `mean_over_prompts`.

    >>> strongest(pd.concat([table, table.assign(row=table["row"] + 2)]), top=1)["n"].tolist()
    [2]
    """
    check_integer(top, "top", least=1, meaning="how many cells are chosen,")
    only = None if value is None or by is None else [value]
    cell_names, value_names = _column_names(table, by, only)
    value = value or _default_value(value_names)
    _check_columns(table, value)
    key = _prompt_column(table)
    count = len(set(table[key].dropna())) if key in table.columns else 0
    if count < 4:
        raise OutOfRange(
            f"{count} prompts: cells are chosen on one half of the prompts and measured on the "
            "other, so give at least 4"
        )
    if "control" in table.columns:
        table = pd.DataFrame(table[~table["control"].astype(bool)])
    is_first_half = pd.factorize(table[key])[0] % 2 == 0
    average = partial(mean_over_prompts, by=cell_names, values=value_names, **settings)
    first_half, measured = average(table[is_first_half]), average(table[~is_first_half])
    means = first_half[value]
    keys = {"either": -means.abs(), "up": -means, "down": means}
    order = keys[toward].sort_values(kind="stable").index[:top]
    best = first_half.loc[order, [*cell_names, value]].rename(columns={value: f"{value}_chosen"})
    return best.merge(measured, on=cell_names, how="left")


def _default_value(names: Sequence[str]) -> str:
    """Returns the first effect among columns, else the first delta, else the first column."""
    return min(names, key=lambda name: (not name.endswith("_effect"), not name.endswith("_delta")))
