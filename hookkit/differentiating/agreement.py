"""hk.agreement: how far an estimate of patching tells what patching tells."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from ..arguments import checks_arguments
from ..errors import BadHook, EmptySelection, did_you_mean

COUNTS = ("row", "prompt", "sample", "n", "control", "interval")


@checks_arguments
def agreement(
    estimate: pd.DataFrame,
    truth: pd.DataFrame,
    *,
    value: str | None = None,
    by: str | None = None,
    top: int = 10,
) -> pd.DataFrame:
    """How alike two tables of the same cells are: of `attribution` and `patching`, say, or of `over_prompts` of each.

    Cells are put together by all columns that both have beside the metric's. `value` is the column that is compared
    (the first `_delta` that both have); `by` is one with a row of the result for each of its values, such as "site".

    Columns: `by`, value, n (cells in both), pearson, spearman (-1 to 1), same_sign (share of the cells that are zero in
    neither), top (how many of the largest were compared, by size) and overlap (the share of them that both have).
    Cells that are zero in both, such as those before the token that differs, count in all but same_sign and overlap.

    >>> agreement(table, table)["pearson"].round(3).tolist()
    [1.0]
    """
    value = _value(estimate, truth, value)
    cells = _cells(estimate, truth)
    pair = estimate[[*cells, value]].merge(truth[[*cells, value]], on=cells, suffixes=("", "_true"))
    if pair.empty:
        raise EmptySelection(f"the tables have no cell in common by {', '.join(cells)}: make them of one grid")
    if any(table.duplicated(cells).any() for table in (estimate, truth)):
        raise BadHook(f"a cell of {', '.join(cells)} stands several times in a table: leave one of each, or average")
    if by is not None and by not in cells:
        raise BadHook(f"by={by!r} is no column of both tables{did_you_mean(by, cells)} They share {', '.join(cells)}.")
    groups = [(None, pair)] if by is None else list(pair.groupby(by, sort=False))
    rows = []
    for name, found in groups:
        rows.append(({} if by is None else {by: name}) | {"value": value} | _alike(found, value, top))
    return pd.DataFrame(rows)


def _value(estimate: pd.DataFrame, truth: pd.DataFrame, value: str | None) -> str:
    both = [name for name in estimate.columns if name in truth.columns]
    found = value or next((name for name in both if name.endswith("_delta")), None)
    if found is None or found not in both:
        raise BadHook(f"the tables share {', '.join(both) or 'no column'}, and not {found or 'a _delta'}: say value=")
    return found


def _cells(estimate: pd.DataFrame, truth: pd.DataFrame) -> list[str]:
    metrics = [
        name.removesuffix(end)
        for table in (estimate, truth)
        for name in table.columns
        for end in ("_before", "_delta")
        if name.endswith(end)
    ]
    own = [name for name in estimate.columns if any(name == m or name.startswith(f"{m}_") for m in metrics)]
    own += ["n", "interval"]
    cells = [name for name in estimate.columns if name in truth.columns and name not in own]
    if not [name for name in cells if name not in COUNTS]:
        raise BadHook(f"the tables share no column that says which cell a row is of: {', '.join(estimate.columns)}")
    return cells


def _alike(pair: pd.DataFrame, value: str, top: int) -> dict[str, Any]:
    mine: Any = pair[value]
    true: Any = pair[f"{value}_true"]
    neither = (mine != 0) & (true != 0)
    count = min(top, int(neither.sum()))
    largest: Sequence[set[object]] = [set(each[neither].abs().nlargest(count).index) for each in (mine, true)]
    return {
        "n": len(pair),
        "pearson": mine.corr(true),
        "spearman": mine.rank().corr(true.rank()),
        "same_sign": float(((mine > 0) == (true > 0))[neither].mean()),
        "top": count,
        "overlap": len(largest[0] & largest[1]) / count if count else float("nan"),
    }
