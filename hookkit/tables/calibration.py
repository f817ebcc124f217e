"""Judging a confidence: whether answers given with 80 % are right eight times in ten, and whether it tells right from
wrong at all.

    table = hk.calibration(confidence, right)     # bins of confidence, and how often each was right
    table.attrs["ece"]                            # the expected calibration error
    hk.roc(confidence, right).attrs["auc"]        # 1: every right answer has more confidence than every wrong one

A confidence can be ordered well and still be no probability, and the other way round; these are two questions. Nothing
here knows torch: confidences and rights are lists, arrays or columns of any table.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from ..arguments import as_real, checks_arguments, described, items_of, whole_number
from ..errors import BadHook, EmptySelection, OutOfRange


@checks_arguments
def calibration(
    confidence: Iterable[float], right: Iterable[Any], *, bins: int = 10
) -> pd.DataFrame:
    """How often answers of each confidence were right, in bins of equal width, and how far that is from the confidence.

    `confidence` is a probability (0 to 1) for each answer, `right` whether it was right. Columns: bin, low, high (a bin
    has low < confidence ≤ high; 0 is in the first), count, confidence and accuracy (means; empty where the bin is), gap
    (confidence minus accuracy: positive where the model is too sure) and error, |gap| times the bin's part of all
    answers. The errors' sum is the expected calibration error (Guo et al. 2017, "On Calibration of Modern Neural
    Networks"), which is also `table.attrs["ece"]`. It depends on the number of bins: report it with them.

    >>> calibration([0.9, 0.9, 0.6, 0.6], [True, True, True, False], bins=2).attrs["ece"]
    0.0
    """
    sure, answers = _pairs(confidence, right)
    if ((sure < 0) | (sure > 1)).any():
        raise OutOfRange(
            f"a confidence is a probability, 0 to 1, and one is {sure[(sure < 0) | (sure > 1)][0]}"
        )
    whole_number(bins, "bins", least=1, meaning="how many bins,")
    edges = np.linspace(0, 1, bins + 1)
    numbers = np.clip(np.searchsorted(edges, sure, side="left") - 1, 0, bins - 1)
    counts = np.bincount(numbers, minlength=bins)
    there = np.where(counts > 0, counts, np.nan)
    means = [
        np.bincount(numbers, weights=values, minlength=bins) / there
        for values in (sure, answers.astype(float))
    ]
    gap = means[0] - means[1]
    table = pd.DataFrame(
        {"bin": range(bins), "low": edges[:-1], "high": edges[1:], "count": counts}
    )
    table = table.assign(confidence=means[0], accuracy=means[1], gap=gap)
    error = np.nan_to_num(np.abs(gap)) * counts / len(sure)
    table = table.assign(error=error)
    table.attrs["ece"] = round(float(error.sum()), 12)  # 0.0 where it is one but for rounding
    return table


@checks_arguments
def roc(score: Iterable[float], right: Iterable[Any]) -> pd.DataFrame:
    """The receiver operating characteristic of a score that should be larger for right answers than for wrong ones.

    Columns: threshold, false_positive_rate and true_positive_rate: of the wrong, and of the right answers, the part
    whose score is at least the threshold. From "trust nothing" (an infinite threshold) to "trust all"; equal scores are
    one point. `table.attrs["auc"]` is the area under it: the probability that a right answer has a larger score than a
    wrong one, equal ones counting half (Hanley & McNeil 1982); 0.5 is no better than chance.

    >>> roc([0.9, 0.8, 0.3], [True, False, False]).attrs["auc"]
    1.0
    """
    scores, answers = _pairs(score, right)
    if answers.all() or not answers.any():
        raise EmptySelection(
            f"all {len(answers)} answers are {'right' if answers.all() else 'wrong'}, so there is nothing to tell "
            "apart: give answers of both kinds"
        )
    thresholds, place = np.unique(-scores, return_inverse=True)
    rates = []
    for kind in (~answers, answers):
        counts = np.bincount(place, weights=kind, minlength=len(thresholds)).cumsum()
        rates.append(np.concatenate([[0.0], counts / kind.sum()]))
    table = pd.DataFrame({"threshold": np.concatenate([[np.inf], -thresholds])})
    table = table.assign(false_positive_rate=rates[0], true_positive_rate=rates[1])
    table.attrs["auc"] = float(np.trapezoid(rates[1], rates[0]))
    return table


def _pairs(numbers: Iterable[float], right: Iterable[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays, once it is sure that they belong together."""
    for name, given in (("the numbers", numbers), ("right", right)):
        if items_of(given) is None:
            raise BadHook(
                f"{name}: {described(given)} is one value, and one for each answer is meant, in a list"
            )
    read = [as_real(number) for number in items_of(numbers) or ()]
    if None in read:
        wrong = (items_of(numbers) or [])[read.index(None)]
        raise BadHook(f"{described(wrong)} is no number: give a real number for each answer")
    values, answers = np.asarray(read, dtype=float), np.asarray(items_of(right) or [])
    if len(values) != len(answers):
        raise BadHook(
            f"there are {len(values)} numbers and {len(answers)} answers: give one of each for every answer"
        )
    if not len(values):
        raise EmptySelection("there is no answer to judge: give at least one")
    if np.isnan(values).any():
        raise OutOfRange(
            f"number {int(np.isnan(values).argmax())} is NaN: leave out what was not measured"
        )
    if not all(each in (0, 1) for each in answers.tolist()):
        wrong = next(each for each in answers.tolist() if each not in (0, 1))
        raise BadHook(
            f"right says for each answer whether it was: True or False, and one is {wrong!r}"
        )
    return values, answers.astype(bool)
