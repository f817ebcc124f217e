"""Calibration and ROC of confidences: whether answers given with 80 % are right in 80 of 100 cases,
and whether a confidence separates right answers from wrong ones.

    table = hk.stats.calibration(confidence, right)  # bins of confidence, and how often right
    table.attrs["ece"]                                # the expected calibration error
    hk.stats.roc(confidence, right).attrs["auc"]        # 1: every right answer is above every wrong
    one

These are two questions: a confidence can be ordered well and be no probability, or the reverse.
Confidences and answers are lists, arrays or columns of any table; no torch is needed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from ..arguments import as_items, as_number, check_arguments, check_integer, describe
from ..errors import BadHook, EmptySelection, OutOfRange


@check_arguments
def calibration(
    confidence: Iterable[float], right: Iterable[Any], *, bins: int = 10
) -> pd.DataFrame:
    """How often answers of each confidence were right, in bins of equal width.

    `confidence` is a probability (0 to 1) for each answer, `right` whether it was right. Columns:
    bin, low, high (a bin has low < confidence ≤ high; 0 is in the first), count, confidence and
    accuracy (means; empty if the bin is), gap (confidence minus accuracy: positive if the model is
    too sure) and error, |gap| times the bin's part of all answers. The sum of the errors is the
    expected calibration error (Guo et al. 2017, "On Calibration of Modern Neural Networks"), which
    is also `table.attrs["ece"]`. It depends on the number of bins: report it with them.

    >>> calibration([0.9, 0.9, 0.6, 0.6], [True, True, True, False], bins=2).attrs["ece"]
    0.0
    """
    confidences, answers = _pairs(confidence, right)
    invalid = (confidences < 0) | (confidences > 1)
    if invalid.any():
        raise OutOfRange(
            f"a confidence is a probability, 0 to 1, and one is {confidences[invalid][0]}"
        )
    check_integer(bins, "bins", least=1, meaning="how many bins,")
    edges = np.linspace(0, 1, bins + 1)
    bin_of = np.clip(np.searchsorted(edges, confidences, side="left") - 1, 0, bins - 1)
    groups: Any = pd.DataFrame({"confidence": confidences, "accuracy": answers}).groupby(bin_of)
    table = groups.mean().reindex(range(bins)).reset_index(names="bin")
    counts = groups.size().reindex(range(bins), fill_value=0)
    table = table.assign(low=edges[:-1], high=edges[1:], count=counts)
    gap = table["confidence"] - table["accuracy"]
    error = gap.abs().fillna(0.0) * counts / len(confidences)
    columns = ["bin", "low", "high", "count", "confidence", "accuracy"]
    table = pd.DataFrame(table[columns]).assign(gap=gap, error=error)
    table.attrs["ece"] = round(float(error.sum()), 12)  # without the error of rounding
    return table


@check_arguments
def roc(score: Iterable[float], right: Iterable[Any]) -> pd.DataFrame:
    """The receiver operating characteristic of a score that should be larger for right answers.

    Columns: threshold, false_positive_rate and true_positive_rate: the part of the wrong, and of
    the right answers whose score is at least the threshold. The first row has an infinite threshold
    (no answer is trusted), the last one the smallest score (all are); equal scores are one point.
    `table.attrs["auc"]` is the area under the curve: the probability that a right answer has a
    larger score than a wrong one, equal scores counting half (Hanley & McNeil 1982); 0.5 is no
    better than chance. `attrs["right"]` and `attrs["wrong"]` are the numbers of answers.

    >>> roc([0.9, 0.8, 0.3], [True, False, False]).attrs["auc"]
    1.0
    """
    scores, answers = _pairs(score, right)
    if answers.all() or not answers.any():
        kind = "right" if answers.all() else "wrong"
        raise EmptySelection(
            f"all {len(answers)} answers are {kind}, so there is nothing to tell apart: "
            "give answers of both kinds"
        )
    thresholds, index = np.unique(-scores, return_inverse=True)
    rates = []
    for is_counted in (~answers, answers):
        counts = np.bincount(index, weights=is_counted, minlength=len(thresholds)).cumsum()
        rates.append(np.concatenate([[0.0], counts / is_counted.sum()]))
    table = pd.DataFrame({"threshold": np.concatenate([[np.inf], -thresholds])})
    table = table.assign(false_positive_rate=rates[0], true_positive_rate=rates[1])
    table.attrs["auc"] = float(np.trapezoid(rates[1], rates[0]))
    table.attrs["right"], table.attrs["wrong"] = int(answers.sum()), int((~answers).sum())
    return table


def _pairs(numbers: Iterable[float], right: Iterable[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Returns both as arrays, after checking that they belong together."""
    number_items, answers = _items(numbers, "the numbers"), _items(right, "right")
    numbers_or_none = list(map(as_number, number_items))
    if None in numbers_or_none:
        item = number_items[numbers_or_none.index(None)]
        raise BadHook(f"{describe(item)} is no number: give a real number for each answer")
    values = np.array(numbers_or_none, dtype=float)
    if len(values) != len(answers):
        raise BadHook(
            f"there are {len(values)} numbers and {len(answers)} answers: "
            "give one of each for every answer"
        )
    if not len(values):
        raise EmptySelection("there is no answer to judge: give at least one")
    if np.isnan(values).any():
        first = int(np.isnan(values).argmax())
        raise OutOfRange(f"number {first} is NaN: leave out what was not measured")
    for answer in np.asarray(answers).tolist():
        if answer not in (0, 1):
            raise BadHook(
                f"right says for each answer whether it was: True or False, and one is {answer!r}"
            )
    return values, np.asarray(answers).astype(bool)


def _items(values: Any, name: str) -> list[Any]:
    items = as_items(values)
    if items is None:
        raise BadHook(
            f"{name}: {describe(values)} is one value: give a list with one for each answer"
        )
    return items
