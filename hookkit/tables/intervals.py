"""Confidence intervals: of means, ratios of means and shares, over prompts and over samples. numpy and scipy, no torch.

Every interval that hookkit prints is made here.

Below 30 values   a t interval. Its two tails share 1 - confidence by the skewness of the values: a sample with a long
                  upper tail has a mean that is too small more often than one that is too large. With normal numbers
                  the coverage stays exact, since skewness and t are then independent (Basu's theorem).
From 30 values    a BCa bootstrap (bias-corrected and accelerated: Efron 1987), expanded for the size of the sample
                  (Hesterberg 2015).
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import numpy as np
from jaxtyping import Float, Int

FEW = 30  # values below which a mean has a t interval
DRAWN = 10  # values below which a figure shows the values and no interval
TILT = 2.0  # how fast the tails part with skewness: tanh of so many standard errors of it
LEAST = 0.02  # the share of 1 - confidence that the smaller tail keeps
AT_ONCE = 4_000_000  # numbers of a bootstrap that are held together

T, BCA, WILSON, FIELLER, TWO_WAY, NONE = "t", "BCa", "Wilson", "Fieller", "t, two-way", ""

Values: TypeAlias = Float[np.ndarray, "cell value"]
Numbers: TypeAlias = Float[np.ndarray, " cell"]


@dataclass(frozen=True, eq=False)
class Estimates:
    """Means or ratios of some cells, with standard errors and intervals; NaN where there is none."""

    mean: Numbers
    error: Numbers
    low: Numbers
    high: Numbers
    method: str


def means(values: Values, confidence: float, resamples: int, seed: int) -> Estimates:
    """The means of rows of numbers, each row as long as the others, with intervals."""
    count = values.shape[1]
    mean = values.mean(axis=1)
    if count < 2:
        nothing = np.full(len(values), np.nan)
        return Estimates(mean, nothing, nothing, nothing, NONE)
    error = values.std(axis=1, ddof=1) / np.sqrt(count)
    if count < FEW:
        below, above = _tails(values, confidence)
        return Estimates(mean, error, mean - below * error, mean + above * error, T)
    low, high = _bootstrapped(values, None, confidence, resamples, seed)
    return Estimates(mean, error, low, high, BCA)


def ratios(over: Values, under: Values, confidence: float, resamples: int, seed: int) -> Estimates:
    """The ratios of two means of pairs of numbers, `over` / `under`, with intervals.

    Fieller's (1954) below 30 pairs, else a BCa bootstrap over the pairs. No interval (NaN) where the data does not tell
    the mean below from 0, so that the ratio may be anything.
    """
    count = over.shape[1]
    top, bottom = over.mean(axis=1), under.mean(axis=1)
    ratio = np.divide(top, bottom, out=np.full(len(top), np.nan), where=bottom != 0)
    nothing = np.full(len(ratio), np.nan)
    if count < 2:
        return Estimates(ratio, nothing, nothing, nothing, NONE)
    error = _linear(over, under, ratio).std(axis=1, ddof=1) / np.sqrt(count)
    low, high = _fieller(over, under, confidence)
    if count < FEW:
        return Estimates(ratio, error, low, high, FIELLER)
    bounded = np.isfinite(low)
    low, high = nothing.copy(), nothing.copy()
    if bounded.any():
        low[bounded], high[bounded] = _bootstrapped(
            over[bounded], under[bounded], confidence, resamples, seed
        )
    return Estimates(ratio, error, low, high, BCA)


def shares(hits: Int[np.ndarray, " cell"], count: int, confidence: float) -> Estimates:
    """Shares of a count of answers that are yes or no, with Wilson's interval (1927)."""
    from scipy.special import ndtri

    share = hits / count
    error = np.sqrt(share * (1 - share) / count)
    z = ndtri(0.5 + confidence / 2)
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
    return Estimates(
        share, error, np.maximum(middle - half, 0.0), np.minimum(middle + half, 1.0), WILSON
    )


@dataclass(frozen=True)
class Variation:
    """The mean squares of a table of prompts by samples, in which every prompt has every sample."""

    prompts: float
    samples: float
    rest: float
    n_prompts: int
    n_samples: int


def variation(values: Float[np.ndarray, "prompt sample"]) -> Variation:
    """How much a table of prompts by samples varies from prompt to prompt, from sample to sample, and besides."""
    n, k = values.shape
    rows, columns, mean = values.mean(axis=1), values.mean(axis=0), values.mean()
    rest = values - rows[:, None] - columns[None, :] + mean
    return Variation(
        prompts=k * float(((rows - mean) ** 2).sum()) / max(n - 1, 1),
        samples=n * float(((columns - mean) ** 2).sum()) / max(k - 1, 1),
        rest=float((rest**2).sum()) / max((n - 1) * (k - 1), 1),
        n_prompts=n,
        n_samples=k,
    )


def two_way(
    values: Float[np.ndarray, "prompt sample"], confidence: float
) -> tuple[float, float] | None:
    """The standard error of the mean over prompts and samples, and half the width of its t interval.

    Both are drawn from something larger, and every prompt has every sample (random effects, degrees of freedom by
    Satterthwaite 1946). None where samples differ by no more than chance: then the prompts' means say all there is.
    """
    parts = variation(values)
    n, k = parts.n_prompts, parts.n_samples
    if n < 2 or k < 2 or parts.samples <= parts.rest:
        return None
    terms = [(parts.prompts, n - 1), (parts.samples, k - 1), (parts.rest, (n - 1) * (k - 1))]
    variance = (parts.prompts + parts.samples - parts.rest) / (n * k)
    spread = sum((square / (n * k)) ** 2 / degrees for square, degrees in terms)
    return float(np.sqrt(variance)), float(
        _quantile(variance**2 / spread, confidence) * np.sqrt(variance)
    )


def beyond_random(
    gains: Float[np.ndarray, " prompt"],
    between: float,
    rest: float,
    vectors: int,
    confidence: float,
) -> tuple[float, float]:
    """The standard error of one vector's mean gain over random ones, and half the width of its t interval.

    `gains` are what it has beyond the mean of the random vectors, for each prompt. Under the null hypothesis it is one
    more random vector: its mean differs from theirs with variance between² (1 + 1/vectors), where `between` is the
    standard deviation of the random vectors' means over the same prompts. This has the prompts' part of a random vector
    in it; what the vector varies beyond that from prompt to prompt (`rest` is the random ones' standard deviation) is
    added.
    """
    count = len(gains)
    if vectors < 2 or not np.isfinite(between):
        return np.nan, np.nan
    share = 1 + 1 / vectors
    variance, degrees = between**2 * share, float(vectors - 1)
    if count > 1:
        own, expected = float(gains.var(ddof=1)), rest**2 * share
        if expected == 0 or own / expected > _ratio_of_variances(
            count - 1, (count - 1) * (vectors - 1)
        ):
            more = (own - expected) / count
            spread = variance**2 / degrees + more**2 / (count - 1)
            variance += more
            degrees = variance**2 / spread if spread > 0 else degrees
    return float(np.sqrt(variance)), float(_quantile(degrees, confidence) * np.sqrt(variance))


def _ratio_of_variances(above: int, below: int) -> float:
    """What a ratio of two estimates of one variance exceeds once in twenty times (F)."""
    from scipy.special import fdtri

    return float(fdtri(above, below, 0.95))


def _quantile(degrees: float, confidence: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(degrees, 0.5 + confidence / 2))


def _tails(values: Values, confidence: float) -> tuple[Numbers, Numbers]:
    """How many standard errors a t interval reaches below and above each mean."""
    from scipy.special import stdtrit

    count = values.shape[1]
    upper = np.full(len(values), 0.5)  # the share of the upper tail in 1 - confidence
    if count > 2:
        away = values - values.mean(axis=1, keepdims=True)
        squares = (away**2).mean(axis=1)
        skewness = np.divide(
            (away**3).mean(axis=1), squares**1.5, out=np.zeros(len(values)), where=squares > 0
        )
        error = np.sqrt(
            6 * (count - 2) / ((count + 1) * (count + 3))
        )  # of the skewness of normal numbers
        upper = np.clip(0.5 - 0.5 * np.tanh(TILT * skewness / error), LEAST, 1 - LEAST)
    rest = 1 - confidence
    return stdtrit(count - 1, 1 - rest * (1 - upper)), stdtrit(count - 1, 1 - rest * upper)


def _linear(over: Values, under: Values, ratio: Numbers) -> Values:
    """How much each pair moves the ratio of the means, times their number."""
    bottom = under.mean(axis=1, keepdims=True)
    return np.divide(
        over - ratio[:, None] * under, bottom, out=np.full(over.shape, np.nan), where=bottom != 0
    )


def _fieller(over: Values, under: Values, confidence: float) -> tuple[Numbers, Numbers]:
    count = over.shape[1]
    top, bottom = over.mean(axis=1), under.mean(axis=1)
    away, below = over - top[:, None], under - bottom[:, None]
    scale = _quantile(count - 1, confidence) ** 2 / (count * (count - 1))
    tops, both, bottoms = (
        scale * (a * b).sum(axis=1) for a, b in ((away, away), (away, below), (below, below))
    )
    first, second, third = bottom**2 - bottoms, top * bottom - both, top**2 - tops
    bounded = first > 0  # else the mean below may be 0
    first = np.where(bounded, first, np.nan)
    root = np.sqrt(np.maximum(second**2 - first * third, 0.0))
    return (second - root) / first, (second + root) / first


def _bootstrapped(
    over: Values, under: Values | None, confidence: float, resamples: int, seed: int
) -> tuple[Numbers, Numbers]:
    """The limits of a BCa bootstrap, of means or of ratios of means; the same draws in every cell."""
    weights = _weights(over.shape[1], resamples, seed)
    step = max(1, AT_ONCE // resamples)
    parts = []
    for start in range(0, len(over), step):
        some = None if under is None else under[start : start + step]
        parts.append(_accelerated(over[start : start + step], some, weights, confidence))
    lows, highs = zip(*parts, strict=True)
    return np.concatenate(lows), np.concatenate(highs)


@lru_cache(maxsize=8)
def _weights(count: int, resamples: int, seed: int) -> Float[np.ndarray, "resample value"]:
    """How often each value is in each draw with replacement, divided by their number."""
    draws = np.random.default_rng([seed, count]).multinomial(
        count, np.full(count, 1 / count), size=resamples
    )
    return draws / count


def _accelerated(
    over: Values,
    under: Values | None,
    weights: Float[np.ndarray, "resample value"],
    confidence: float,
) -> tuple[Numbers, Numbers]:
    from scipy.special import ndtr, ndtri, stdtrit

    count = over.shape[1]
    tops, drawn = over.mean(axis=1), over @ weights.T
    left_out = (count * tops[:, None] - over) / (count - 1)  # the means without one value
    if under is None:
        estimate = tops
    else:
        bottoms = under.mean(axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            drawn = drawn / (under @ weights.T)
            left_out = left_out * (count - 1) / (count * bottoms[:, None] - under)
        estimate = tops / bottoms
    resamples = drawn.shape[1]
    same = (drawn == estimate[:, None]).sum(axis=1)
    below = ((drawn < estimate[:, None]).sum(axis=1) + same / 2) / resamples
    away = left_out.mean(axis=1, keepdims=True) - left_out
    squares = (away**2).sum(axis=1)
    bend = np.divide(
        (away**3).sum(axis=1), 6 * squares**1.5, out=np.zeros(len(over)), where=squares > 0
    )
    bias = ndtri(np.clip(below, 0.5 / resamples, 1 - 0.5 / resamples))
    reach = np.sqrt(count / (count - 1)) * stdtrit(count - 1, 0.5 + confidence / 2)
    drawn = np.sort(drawn, axis=1)
    limits = []
    for side in (-reach, reach):
        moved = bias + side
        limits.append(_at(drawn, ndtr(bias + moved / (1 - bend * moved))))
    still = squares <= (1e-12 * np.abs(estimate)) ** 2  # all values are one
    return np.where(still, estimate, limits[0]), np.where(still, estimate, limits[1])


def _at(ordered: Float[np.ndarray, "cell draw"], shares: Numbers) -> Numbers:
    """The number at each row's share of the way through it, between two by a straight line."""
    places = np.nan_to_num(shares) * (ordered.shape[1] - 1)
    first = np.floor(places).astype(int)
    then = np.minimum(first + 1, ordered.shape[1] - 1)
    rows = np.arange(len(ordered))
    return ordered[rows, first] + (places - first) * (ordered[rows, then] - ordered[rows, first])
