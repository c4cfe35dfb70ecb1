"""The block bootstrap of a ratio of sums: a check of the linearised interval, from blocks' sums.

Shape suffixes: C = clusters, B = resamples.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

from perplexit.metrics.intervals import Interval

SEED = 20_240_229
NUM_RESAMPLES = 4000
NUM_RESAMPLES_OF_MANY = 500  # beyond MANY_CLUSTERS the tails need less smoothing, and time counts
MANY_CLUSTERS = 1000
_CELLS = 1 << 22  # of the weights that are drawn at a time
NOTABLE = 0.2


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """The bootstrap's interval of the same figure, and how it lies to the reported one.

    width_ratio: its width over the reported interval's; 1 where they agree.
    agrees:      each end lies within 20 % of the reported half-width of the reported end.
    """

    low: float
    high: float
    num_resamples: int
    seed: int
    width_ratio: float
    agrees: bool


def bootstrap_check(
    sums_C: NDArray[np.float64],
    counts_C: NDArray[np.int64],
    interval: Interval,
    *,
    seed: int = SEED,
) -> Bootstrap | None:
    """Clusters drawn with replacement, held against `ratio_interval` of the same sums.

    The percentiles are those of the expanded percentile interval (Hesterberg 2015, The American
    Statistician 69): Φ(± √(C / (C - 1)) · t(confidence, degrees of freedom)), without which a
    bootstrap of few clusters is too narrow. The same seed and sums give the same numbers.
    None where the reported interval does not exist or has no width.
    """
    if interval.low is None or interval.high is None or interval.degrees_of_freedom is None:
        return None
    width = interval.high - interval.low
    if not width > 0:
        return None
    num_clusters = len(counts_C)
    count = NUM_RESAMPLES if num_clusters <= MANY_CLUSTERS else NUM_RESAMPLES_OF_MANY
    means_B = _resampled_means(sums_C, counts_C, count, np.random.default_rng(seed))
    quantile = special.stdtrit(interval.degrees_of_freedom, 0.5 + interval.confidence / 2)
    edge = float(special.ndtr(math.sqrt(num_clusters / (num_clusters - 1)) * quantile))
    low, high = (float(x) for x in np.quantile(means_B, (1 - edge, edge)))
    allowed = NOTABLE * width / 2
    return Bootstrap(
        low=low,
        high=high,
        num_resamples=count,
        seed=seed,
        width_ratio=(high - low) / width,
        agrees=abs(low - interval.low) <= allowed and abs(high - interval.high) <= allowed,
    )


def _resampled_means(
    sums_C: NDArray[np.float64],
    counts_C: NDArray[np.int64],
    num_resamples: int,
    random: np.random.Generator,
) -> NDArray[np.float64]:
    num_clusters = len(counts_C)
    even_C = np.full(num_clusters, 1 / num_clusters)
    at_once = max(1, _CELLS // num_clusters)
    means = []
    for start in range(0, num_resamples, at_once):
        size = min(at_once, num_resamples - start)
        drawn_BC = random.multinomial(num_clusters, even_C, size=size)
        means.append((drawn_BC @ sums_C) / (drawn_BC @ counts_C.astype(np.float64)))
    return np.concatenate(means)
