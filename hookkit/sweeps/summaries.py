"""What a sweep says over its prompts: means with their uncertainty."""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ..errors import BadHook, checks_keywords

NOT_VALUES = ("row", "prompt", "sample")


@checks_keywords
def over_prompts(
    table: pd.DataFrame,
    *,
    by: Sequence[str] | None = None,
    values: Sequence[str] | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """The mean of each metric of a sweep over its prompts, with how sure it is.

    Of another table with a row for each cell and prompt (a lens, direct logits) say which columns are averaged, with
    `values`, and what is a cell, with `by`.

    Where a prompt was run with several samples of noise (`causal_tracing`), their mean is the prompt's value.

    `by` are the columns that say which cell a row is of; left out, the grid's own (and `control`). Columns: those,
    n (prompts), and for each column of numbers its mean under its own name, `_se` (standard error: the standard
    deviation of a sample over √n) and `_low` and `_high`, a bootstrap interval (percentiles of the means of `resamples`
    draws of the prompts with replacement, the same draws in every cell). With one prompt there is no interval: NaN.

    >>> over_prompts(table).columns[:4].tolist()
    ['layer', 'n', 'prob', 'prob_se']
    """
    if not 0 < confidence < 1:
        raise BadHook(f"confidence={confidence} is no share: give 0.95 for an interval of 95 %")
    metrics = [name.removesuffix("_before") for name in table.columns if name.endswith("_before")]
    if values is None:
        values = [name for name in table.columns if any(name == m or name.startswith(f"{m}_") for m in metrics)]
    if missing := [name for name in (*values, *(by or ())) if name not in table.columns]:
        raise BadHook(f"the table has no column {missing[0]!r}; it has {', '.join(table.columns)}")
    cells = [name for name in table.columns if name not in (*values, *NOT_VALUES)] if by is None else list(by)
    if not values or not cells:
        raise BadHook(
            f"this table has columns {', '.join(table.columns)}: give what sweep gave, or say by= and values="
        )
    for name in cells:
        table = table.assign(**{name: [_hashable(value) for value in table[name]]})
    draws = np.random.default_rng(seed)
    rows = []
    weights: dict[int, np.ndarray] = {}
    for key, found in table.groupby(cells, sort=False, dropna=False):
        if "sample" in found.columns:
            found = pd.DataFrame(found.groupby("prompt", sort=False)[values].mean())
        count = len(found)
        if count not in weights:
            weights[count] = draws.integers(0, count, (resamples, count))
        row = dict(zip(cells, key if isinstance(key, tuple) else (key,), strict=True)) | {"n": count}
        for name in values:
            row |= _summary(name, found[name].to_numpy(float), weights[count], confidence)
        rows.append(row)
    return pd.DataFrame(rows)


def _hashable(value: Any) -> Any:
    """A value of a dimension by which rows can be put together: a list of positions is a tuple of them."""
    if isinstance(value, list):
        return tuple(value)
    return value if isinstance(value, Hashable) else repr(value)


def _summary(name: str, numbers: np.ndarray, draws: np.ndarray, confidence: float) -> dict[str, float]:
    count = len(numbers)
    if count < 2:
        return {name: float(numbers.mean()), f"{name}_se": np.nan, f"{name}_low": np.nan, f"{name}_high": np.nan}
    tail = 50 * (1 - confidence)
    low, high = np.percentile(numbers[draws].mean(axis=1), [tail, 100 - tail])
    error = float(numbers.std(ddof=1) / np.sqrt(count))
    return {name: float(numbers.mean()), f"{name}_se": error, f"{name}_low": float(low), f"{name}_high": float(high)}
