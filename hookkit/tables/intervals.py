"""Confidence intervals of means, ratios of means and shares, over prompts and over samples.

Every interval in hookkit is computed in this file, with numpy and scipy, without torch.

Below 30 values   a t interval. The skewness of the values decides how its two tails share
                  1 - confidence: the mean of a sample with a long upper tail is more often too
                  small than too large. For normal numbers the coverage is exact, since skewness and
                  t are then independent (Basu's theorem).
From 30 values    a BCa bootstrap (bias-corrected and accelerated: Efron 1987), expanded for the
                  size of the sample (Hesterberg 2015).
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import fdtri, ndtr, ndtri, stdtrit

MIN_FOR_BOOTSTRAP = 30  # with fewer values a mean has a t interval
MIN_FOR_INTERVAL = 10  # with fewer values a figure shows the values and no interval
TILT = 2.0  # how fast the tails part with skewness: tanh of TILT standard errors of it
MIN_TAIL = 0.02  # the smallest share of 1 - confidence that a tail has
NUMBERS_AT_ONCE = 4_000_000  # how many numbers of a bootstrap are in memory at once

T, BCA, WILSON, FIELLER, TWO_WAY, NONE = "t", "BCa", "Wilson", "Fieller", "t, two-way", ""

Values: TypeAlias = Float[np.ndarray, "cell value"]
Numbers: TypeAlias = Float[np.ndarray, " cell"]


@dataclass(frozen=True, eq=False)
class Estimates:
    """Means or ratios of some cells, with standard errors and intervals; NaN if there is none."""

    mean: Numbers
    error: Numbers
    low: Numbers
    high: Numbers
    method: str


def means(values: Values, confidence: float, resamples: int, seed: int) -> Estimates:
    """Returns the mean of each row of values, with an interval."""
    count = values.shape[1]
    mean = values.mean(axis=1)
    if count < 2:
        nothing = np.full(len(values), np.nan)
        return Estimates(mean, nothing, nothing, nothing, NONE)
    error = values.std(axis=1, ddof=1) / np.sqrt(count)
    if count < MIN_FOR_BOOTSTRAP:
        below, above = _tails(values, confidence)
        return Estimates(mean, error, mean - below * error, mean + above * error, T)
    low, high = _bootstrap(values, None, confidence, resamples, seed)
    return Estimates(mean, error, low, high, BCA)


def ratios(over: Values, under: Values, confidence: float, resamples: int, seed: int) -> Estimates:
    """Returns the ratio of two means, `over` / `under`, of each row of pairs, with an interval.

    The interval is Fieller's (1954) below 30 pairs, else a BCa bootstrap over the pairs. There is
    none (NaN) if the mean of `under` may be 0, so that the ratio may be anything.
    """
    count = over.shape[1]
    over_mean, under_mean = over.mean(axis=1), under.mean(axis=1)
    nothing = np.full(len(over), np.nan)
    ratio = np.divide(over_mean, under_mean, out=nothing.copy(), where=under_mean != 0)
    if count < 2:
        return Estimates(ratio, nothing, nothing, nothing, NONE)
    # the standard deviation of each pair's linear influence on the ratio
    error = (
        (over - ratio[:, None] * under).std(axis=1, ddof=1) / np.abs(under_mean) / np.sqrt(count)
    )
    low, high = _fieller(over, under, confidence)
    if count < MIN_FOR_BOOTSTRAP:
        return Estimates(ratio, error, low, high, FIELLER)
    bounded = np.isfinite(low)
    if bounded.any():
        low[bounded], high[bounded] = _bootstrap(
            over[bounded], under[bounded], confidence, resamples, seed
        )
    return Estimates(ratio, error, low, high, BCA)


def shares(hits: Int[np.ndarray, " cell"], count: int, confidence: float) -> Estimates:
    """Returns the shares of `count` yes-or-no answers, with Wilson's interval (1927)."""
    share = hits / count
    error = np.sqrt(share * (1 - share) / count)
    z = ndtri(0.5 + confidence / 2)
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
    low, high = np.maximum(middle - half, 0.0), np.minimum(middle + half, 1.0)
    return Estimates(share, error, low, high, WILSON)


@dataclass(frozen=True)
class Clusters:
    """Clusters of values that depend on each other: how many, how many values, Σ size²."""

    count: float
    total: float
    squares: float

    @property
    def effective(self) -> float:
        """The number of clusters of one size that say as much about a mean (Kish 1965)."""
        return self.total**2 / self.squares if self.squares else 0.0


def clustered_means(
    sums: Float[np.ndarray, "4 cell"], clusters: Clusters, confidence: float
) -> Estimates:
    """Returns the means over all values of clusters, with t intervals over the clusters.

    `sums` has, over the clusters, the sums of the clusters' sums, of their squares, and of their
    products with the sizes, and how many clusters' sums are not 0. A cluster's deviation is its sum
    minus its size times the mean (the linearised variance of a ratio: Cochran 1977). There is no
    interval (NaN) if fewer than two clusters count; where the mean is infinite, it is its own
    interval.
    """
    nothing = np.full(sums.shape[1], np.nan)
    if not clusters.total:
        return Estimates(nothing, nothing, nothing, nothing, NONE)
    mean = sums[0] / clusters.total
    count = clusters.effective
    if count <= 1 or clusters.count < 2:
        return Estimates(mean, nothing, nothing, nothing, NONE)
    with np.errstate(invalid="ignore"):
        spread = sums[1] - 2 * mean * sums[2] + mean**2 * clusters.squares
        variance = np.maximum(spread, 0.0) / clusters.total**2 * count / (count - 1)
        error = np.where(np.isinf(mean), 0.0, np.sqrt(variance))
    reach = _t_quantile(count - 1, confidence) * error
    return Estimates(mean, error, mean - reach, mean + reach, T)


def clustered_shares(
    sums: Float[np.ndarray, "4 cell"], clusters: Clusters, confidence: float
) -> Estimates:
    """Returns the shares of the values of clusters that are 1, with Wilson's interval.

    The sums are those of `clustered_means`. The number of answers is the number of independent ones
    that would give the same variance (Korn and Graubard 1998), and the number of clusters where all
    values are equal. A variance from few clusters that have a 1 at all is uncertain, so they limit
    the degrees of freedom: in simulations 87 to 98 % of the intervals have the share.
    """
    means_of_clusters = clustered_means(sums, clusters, confidence)
    share, error = means_of_clusters.mean, means_of_clusters.error
    if means_of_clusters.method == NONE:
        return means_of_clusters
    count = clusters.effective
    with np.errstate(divide="ignore", invalid="ignore"):
        answers = np.minimum(share * (1 - share) / error**2, clusters.total)
    answers = np.where(error > 0, answers, count)
    degrees = np.where(sums[3] > 0, np.minimum(count - 1, sums[3] + 2), count - 1)
    z = stdtrit(degrees, 0.5 + confidence / 2)
    middle = (share + z**2 / (2 * answers)) / (1 + z**2 / answers)
    half = z * np.sqrt(share * (1 - share) / answers + z**2 / (4 * answers**2))
    half = half / (1 + z**2 / answers)
    low, high = np.maximum(middle - half, 0.0), np.minimum(middle + half, 1.0)
    return Estimates(share, error, low, high, WILSON)


def further_draws(draws: Float[np.ndarray, "draw cell"], confidence: float) -> Estimates:
    """Returns the means over draws, and the limits of one more draw (NaN for one draw)."""
    mean, count = draws.mean(axis=0), len(draws)
    if count < 2:
        nothing = np.full(draws.shape[1], np.nan)
        return Estimates(mean, nothing, nothing, nothing, NONE)
    with np.errstate(invalid="ignore"):
        error = draws.std(axis=0, ddof=1) * np.sqrt(1 + 1 / count)
    error = np.where(np.isinf(mean), 0.0, error)
    reach = _t_quantile(count - 1, confidence) * error
    return Estimates(mean, error, mean - reach, mean + reach, T)


@dataclass(frozen=True)
class Variation:
    """The mean squares of a table of prompts by samples, in which every prompt has every sample.

    `residual` is the mean square of what neither the prompt's nor the sample's mean explains.
    """

    prompts: float
    samples: float
    residual: float


def variation(values: Float[np.ndarray, "prompt sample"]) -> Variation:
    """Returns the mean squares between prompts, between samples, and of the residuals."""
    n, k = values.shape
    rows, columns, mean = values.mean(axis=1), values.mean(axis=0), values.mean()
    residuals = values - rows[:, None] - columns[None, :] + mean
    return Variation(
        prompts=k * float(((rows - mean) ** 2).sum()) / max(n - 1, 1),
        samples=n * float(((columns - mean) ** 2).sum()) / max(k - 1, 1),
        residual=float((residuals**2).sum()) / max((n - 1) * (k - 1), 1),
    )


def two_way(
    values: Float[np.ndarray, "prompt sample"], confidence: float
) -> tuple[float, float] | None:
    """Returns the standard error of the mean over prompts and samples, and half the width of its t
    interval.

    Both are random effects, and every prompt has every sample (degrees of freedom by Satterthwaite
    1946). Returns None if samples differ by no more than chance: then the prompts' means have all
    the information.
    """
    squares, (n, k) = variation(values), values.shape
    if n < 2 or k < 2 or squares.samples <= squares.residual:
        return None
    terms = [
        (squares.prompts, n - 1),
        (squares.samples, k - 1),
        (squares.residual, (n - 1) * (k - 1)),
    ]
    variance = (squares.prompts + squares.samples - squares.residual) / (n * k)
    spread = sum((square / (n * k)) ** 2 / degrees for square, degrees in terms)
    error = np.sqrt(variance)
    return float(error), float(_t_quantile(variance**2 / spread, confidence) * error)


def beyond_random(
    gains: Float[np.ndarray, " prompt"],
    between: float,
    residual: float,
    vectors: int,
    confidence: float,
) -> tuple[float, float]:
    """Returns the standard error of one vector's mean gain over random vectors, and half the width
    of its t interval.

    `gains` are its values minus the mean of the random vectors, for each prompt. Under the null
    hypothesis the vector is one more random vector: its mean differs from theirs with variance
    between² (1 + 1/vectors), where `between` is the standard deviation of the random vectors' means
    over the same prompts. This includes the variance of a random vector between prompts (`residual`
    is its standard deviation); if the vector varies more between prompts, the excess is added.
    """
    count = len(gains)
    if vectors < 2 or not np.isfinite(between):
        return np.nan, np.nan
    share = 1 + 1 / vectors
    variance, degrees = between**2 * share, float(vectors - 1)
    if count > 1:
        measured, expected = float(gains.var(ddof=1)), residual**2 * share
        # What the ratio of two estimates of one variance exceeds in 1 of 1000 cases. A lower limit
        # would widen the intervals of the vectors at the edge, and so exclude 0 too rarely.
        limit = float(fdtri(count - 1, (count - 1) * (vectors - 1), 0.999))
        if expected == 0 or measured / expected > limit:
            excess = (measured - expected) / count
            spread = variance**2 / degrees + excess**2 / (count - 1)
            variance += excess
            if spread > 0:
                degrees = variance**2 / spread
    return float(np.sqrt(variance)), float(_t_quantile(degrees, confidence) * np.sqrt(variance))


def _t_quantile(degrees: float, confidence: float) -> float:
    return float(stdtrit(degrees, 0.5 + confidence / 2))


def _tails(values: Values, confidence: float) -> tuple[Numbers, Numbers]:
    """Returns how many standard errors a t interval reaches below and above each mean."""
    count = values.shape[1]
    upper = np.full(len(values), 0.5)  # the share of the upper tail in 1 - confidence
    if count > 2:
        centred = values - values.mean(axis=1, keepdims=True)
        squares = (centred**2).mean(axis=1)
        cubes = (centred**3).mean(axis=1)
        zeros = np.zeros(len(values))
        skewness = np.divide(cubes, squares**1.5, out=zeros, where=squares > 0)
        # the standard error of the skewness of normal numbers
        error = np.sqrt(6 * (count - 2) / ((count + 1) * (count + 3)))
        upper = np.clip(0.5 - 0.5 * np.tanh(TILT * skewness / error), MIN_TAIL, 1 - MIN_TAIL)
    outside = 1 - confidence
    below = stdtrit(count - 1, 1 - outside * (1 - upper))
    above = stdtrit(count - 1, 1 - outside * upper)
    return below, above


def _fieller(over: Values, under: Values, confidence: float) -> tuple[Numbers, Numbers]:
    count = over.shape[1]
    over_mean, under_mean = over.mean(axis=1), under.mean(axis=1)
    over_centred, under_centred = over - over_mean[:, None], under - under_mean[:, None]
    scale = _t_quantile(count - 1, confidence) ** 2 / (count * (count - 1))
    over_variance = scale * (over_centred * over_centred).sum(axis=1)
    covariance = scale * (over_centred * under_centred).sum(axis=1)
    under_variance = scale * (under_centred * under_centred).sum(axis=1)
    # the limits are the roots of first x² - 2 second x + third
    first = under_mean**2 - under_variance
    second = over_mean * under_mean - covariance
    third = over_mean**2 - over_variance
    first = np.where(first > 0, first, np.nan)  # else the mean of `under` may be 0
    root = np.sqrt(np.maximum(second**2 - first * third, 0.0))
    return (second - root) / first, (second + root) / first


def _bootstrap(
    over: Values, under: Values | None, confidence: float, resamples: int, seed: int
) -> tuple[Numbers, Numbers]:
    """Returns the limits of a BCa bootstrap, of means or of ratios of means.

    Every cell has the same draws.
    """
    weights = resampling_weights(over.shape[1], resamples, seed)
    step = max(1, NUMBERS_AT_ONCE // resamples)
    parts = []
    for start in range(0, len(over), step):
        cells = slice(start, start + step)
        under_part = None if under is None else under[cells]
        parts.append(_bca_limits(over[cells], under_part, weights, confidence))
    low, high = np.concatenate(parts, axis=1)
    return low, high


@lru_cache(maxsize=8)
def resampling_weights(
    count: int, resamples: int, seed: int
) -> Float[np.ndarray, "resample value"]:
    """Returns how often each value is in each draw with replacement, divided by `count`."""
    generator = np.random.default_rng([seed, count])
    draws = generator.multinomial(count, np.full(count, 1 / count), size=resamples)
    return draws / count


def _bca_limits(
    over: Values,
    under: Values | None,
    weights: Float[np.ndarray, "resample value"],
    confidence: float,
) -> tuple[Numbers, Numbers]:
    count, resamples = over.shape[1], len(weights)
    estimate, drawn = over.mean(axis=1), over @ weights.T
    left_out = (count * estimate[:, None] - over) / (count - 1)  # the means without one value
    if under is not None:
        under_mean = under.mean(axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            drawn = drawn / (under @ weights.T)
            left_out = left_out * (count - 1) / (count * under_mean[:, None] - under)
        estimate = estimate / under_mean
    equal = (drawn == estimate[:, None]).sum(axis=1)
    below = ((drawn < estimate[:, None]).sum(axis=1) + equal / 2) / resamples
    bias = ndtri(np.clip(below, 0.5 / resamples, 1 - 0.5 / resamples))
    centred = left_out.mean(axis=1, keepdims=True) - left_out
    squares, cubes = (centred**2).sum(axis=1), (centred**3).sum(axis=1)
    zeros = np.zeros(len(over))
    acceleration = np.divide(cubes, 6 * squares**1.5, out=zeros, where=squares > 0)
    reach = np.sqrt(count / (count - 1)) * stdtrit(count - 1, 0.5 + confidence / 2)
    drawn = np.sort(drawn, axis=1)
    constant = squares <= (1e-12 * np.abs(estimate)) ** 2  # all values are equal
    limits = []
    for side in (-reach, reach):
        shifted = bias + side
        limit = _interpolate(drawn, ndtr(bias + shifted / (1 - acceleration * shifted)))
        limits.append(np.where(constant, estimate, limit))
    return limits[0], limits[1]


def _interpolate(ordered: Float[np.ndarray, "cell draw"], shares: Numbers) -> Numbers:
    """Returns the number at each row's share of the way through it, by linear interpolation."""
    last = ordered.shape[1] - 1
    index = np.nan_to_num(shares)[:, None] * last
    first = np.floor(index).astype(int)
    low = np.take_along_axis(ordered, first, axis=1)
    high = np.take_along_axis(ordered, np.minimum(first + 1, last), axis=1)
    return (low + (index - first) * (high - low))[:, 0]


# ---- areas under ROC curves


@dataclass(frozen=True, eq=False)
class Auroc:
    """An area under the ROC curve of held-out scores, with its interval.

    `influence` is each cluster's first-order share of the error: their squares sum to `error`².
    """

    value: float
    low: float
    high: float
    error: float
    influence: Float[np.ndarray, " cluster"]


def auroc(
    scores: Float[np.ndarray, " text"],
    is_positive: Bool[np.ndarray, " text"],
    folds: Int[np.ndarray, " text"],
    clusters: Int[np.ndarray, " text"],
    confidence: float = 0.95,
) -> Auroc:
    """Returns the share of pairs of a positive and a negative text, both of one fold, in which the
    positive one scores higher, ties as one half.

    Scores of different folds come from different fits and are not compared. The standard error is
    that of DeLong et al. (1988), over clusters of texts that depend on each other (Obuchowski
    1997), times the factor of Nadeau and Bengio (2003) for fits that share their texts. The
    interval is Wilson's, with as many answers as would give this error, but at most those of Hanley
    and McNeil's (1982) model of the area; so it has a width if no pair is wrong (as Newcombe 2006,
    method 5). Each fold needs texts of both labels. In simulations of 5 folds, 40 to 300 texts and
    areas of 0.5 to 0.93, 96 to 100 % of the intervals have the expected area.
    """
    wins, pairs = np.zeros(len(scores)), np.zeros(len(scores))
    n_folds = len(np.unique(folds))
    for fold in np.unique(folds):
        positives = np.flatnonzero((folds == fold) & is_positive)
        negatives = np.flatnonzero((folds == fold) & ~is_positive)
        higher = np.sign(scores[positives][:, None] - scores[negatives][None, :]) / 2 + 0.5
        wins[positives], pairs[positives] = higher.sum(axis=1), len(negatives)
        wins[negatives], pairs[negatives] = higher.sum(axis=0), len(positives)
    value = wins[is_positive].sum() / pairs[is_positive].sum()
    index = np.unique(clusters, return_inverse=True)[1]
    sums = np.bincount(index, wins - value * pairs) / pairs[is_positive].sum()
    positive = len(np.unique(index[is_positive]))
    negative = len(np.unique(index[~is_positive]))
    smaller = min(positive, negative)
    shared_fits = 1 + n_folds / (n_folds - 1) if n_folds > 1 else 1.0
    influence = sums * np.sqrt(smaller / (smaller - 1) * shared_fits)
    error = float(np.sqrt((influence**2).sum()))
    mean_count = (positive + negative) / 2
    curvature = (1 - value) / (2 - value) + value / (1 + value)
    answers = positive * negative / (1 + (mean_count - 1) * curvature)
    if error > 0:
        answers = min(answers, value * (1 - value) / error**2)
    z = _t_quantile(len(sums) - 1, confidence)
    middle = (value + z**2 / (2 * answers)) / (1 + z**2 / answers)
    half = (
        z * np.sqrt(value * (1 - value) / answers + z**2 / (4 * answers**2)) / (1 + z**2 / answers)
    )
    low, high = float(max(middle - half, 0.0)), float(min(middle + half, 1.0))
    return Auroc(float(value), low, high, error, influence)


def auroc_difference(first: Auroc, second: Auroc) -> tuple[float, float]:
    """Returns the limits of the difference of two areas, first minus second, of the same texts.

    They are those of both areas, squared and added, less what the two have in common (Newcombe
    1998; Zou and Donner 2008).
    """
    difference = first.value - second.value
    product = first.error * second.error
    shared = float((first.influence * second.influence).sum()) / product if product > 0 else 0.0
    limits = []
    for one, other in (
        (first.value - first.low, second.high - second.value),
        (first.high - first.value, second.value - second.low),
    ):
        limits.append(np.sqrt(max(one**2 + other**2 - 2 * shared * one * other, 0.0)))
    return float(difference - limits[0]), float(difference + limits[1])
