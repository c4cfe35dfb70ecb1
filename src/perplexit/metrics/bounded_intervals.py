"""Intervals of figures whose range is bounded: shares, positive means, means over groups.

Student's interval around such a figure reaches beyond what is possible, and covers least where the
figure is close to its bound. Shape suffixes: M = tokens, C = clusters.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy import special

from perplexit.metrics.estimate import Estimate
from perplexit.metrics.intervals import Clusters, mean_interval, ratio_interval


def share_interval(
    values_M: NDArray[np.floating], clusters: Clusters, confidence: float = 0.95
) -> Estimate:
    """Return the mean of values between 0 and 1 (the share of tokens that agree) with its interval.

    Wilson's score interval with as many trials as the clustered variance leaves of the tokens,
    n = p (1 - p) / variance, and Student's t for the normal quantile:

        (p + t² / 2n ± t √(p (1 - p) / n + t² / 4n²)) / (1 + t² / n)

    Where no token differs the variance is 0 and n is the number of tokens: that nothing differed
    among n tokens does not show that nothing ever does, so the interval is not a point.
    Sources: Wilson 1927, JASA 22; Korn & Graubard 1998, Survey Methodology 24 (the trials left).
    """
    found = mean_interval(values_M, clusters, confidence)
    share, error, degrees = found.value, found.standard_error, found.degrees_of_freedom
    if error is None or degrees is None:
        return found
    t = float(special.stdtrit(degrees, 0.5 + confidence / 2))
    spread = share * (1 - share)
    trials = spread / error**2 if error > 0 and spread > 0 else float(len(values_M))
    middle = (share + t * t / (2 * trials)) / (1 + t * t / trials)
    half = t * math.sqrt(spread / trials + (t / (2 * trials)) ** 2) / (1 + t * t / trials)
    low, high = min(middle - half, share), max(middle + half, share)  # rounding apart, they hold it
    return replace(found, low=low, high=high).clamped(0.0, 1.0)


def positive_interval(
    sums_C: NDArray[np.float64],
    counts_C: NDArray[np.int64] | NDArray[np.float64],
    method: str,
    confidence: float,
) -> Estimate:
    """Return `Σ sums / Σ counts` of sums of 0 or above, with an interval on the logarithmic scale.

        value · exp(± t(confidence, degrees) · standard error / value)

    For skewed figures (KL, perplexities) it covers more than the interval around the mean, and
    never reaches below 0. `ratio_interval` gives the standard error and the degrees of freedom.
    """
    found = ratio_interval(sums_C, counts_C, method, confidence)
    error, degrees = found.standard_error, found.degrees_of_freedom
    if error is None or degrees is None or not found.value > 0:
        return found
    reach = float(special.stdtrit(degrees, 0.5 + confidence / 2)) * error / found.value
    low, high = (found.value * math.exp(side * min(reach, 700.0)) for side in (-1, 1))
    return replace(found, low=low, high=high)


def positive_mean(
    values_M: NDArray[np.floating], clusters: Clusters, confidence: float = 0.95
) -> Estimate:
    """Return the mean of values that are 0 or above (KL), with `positive_interval`."""
    counts_C = np.bincount(clusters.labels, minlength=clusters.num_clusters)
    sums_C = clusters.sums(values_M)
    return positive_interval(sums_C, counts_C, clusters.method, confidence).clamped(lowest=0.0)


def averaged(parts: Sequence[Estimate], confidence: float) -> Estimate:
    """Return the mean of independent figures, each of the same weight, with its interval.

    variance = Σ variance_g / G², degrees of freedom by Satterthwaite: (Σ v)² / Σ (v² / degrees_g).
    Without an interval of each part there is none, and the reason is the part's.
    """
    count = len(parts)
    value = math.fsum(part.value for part in parts) / count
    method = " and ".join(sorted({part.method for part in parts if part.method is not None}))
    clusters = sum(part.num_clusters for part in parts if part.num_clusters is not None)
    variances, weights = [], []
    for part in parts:
        if part.standard_error is None or part.degrees_of_freedom is None:
            return Estimate(value, None, None, method, clusters, confidence, reason=part.reason)
        variances.append(part.standard_error**2)
        weights.append(part.standard_error**4 / part.degrees_of_freedom)
    total = math.fsum(variances)
    degrees = total**2 / math.fsum(weights) if total > 0 else float(clusters - count)
    error = math.sqrt(total) / count
    half = float(special.stdtrit(degrees, 0.5 + confidence / 2)) * error
    return Estimate(value, value - half, value + half, method, clusters, confidence, error, degrees)
