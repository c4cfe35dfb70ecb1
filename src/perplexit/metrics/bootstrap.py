"""The block bootstrap of a ratio of sums: a check of the linearised interval, from blocks' sums.

Shape suffixes: C = clusters, B = resamples.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

from perplexit.metrics.estimate import Estimate
from perplexit.metrics.intervals import DOCUMENT, WINDOW_BLOCK, ratio_interval

SEED = 20_240_229
NUM_RESAMPLES = 4000
NUM_RESAMPLES_OF_MANY = 500  # beyond MANY_CLUSTERS the tails need less smoothing, and time counts
MANY_CLUSTERS = 1000
_FEWEST_PAIRS = 8
_CELLS = 1 << 22  # of the weights that are drawn at a time
NOTABLE = 1 / 3
DECISIVE = 0.8


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """The bootstrap's interval of the same figure, and how it lies to that of the same clusters.

    width_ratio:    its width over that of Student's interval of the same clusters.
    agrees:         neither end lies beyond that interval by more than a third of its half-width
                    (of unequal clusters the bootstrap is the narrower, and wrongly so: no matter),
                    and no cluster makes more than 80 % of the variance.
    decisive_share: of the variance Σ e_c², that of the cluster with the largest part.
    decisive_token_share: that cluster's share of the tokens.
    """

    low: float
    high: float
    num_resamples: int
    seed: int
    width_ratio: float
    agrees: bool
    decisive_share: float
    decisive_token_share: float


def bootstrap_check(
    sums_C: NDArray[np.float64],
    counts_C: NDArray[np.int64],
    interval: Estimate,
    *,
    seed: int = SEED,
) -> Bootstrap | None:
    """Return clusters drawn with replacement, held against the interval of the same sums.

    The percentiles are those of the expanded percentile interval (Hesterberg 2015, The American
    Statistician 69): Φ(± √(C / (C - 1)) · t(confidence, degrees of freedom)), without which a
    bootstrap of few clusters is too narrow. The same seed and sums give the same numbers. Blocks of
    one text are drawn in pairs of neighbours, and held against Student's interval of these pairs:
    what is checked is skewness and dominance, not how far blocks move together.
    None where the reported interval does not exist or has no width.
    """
    confidence = interval.confidence
    if interval.low is None or confidence is None:
        return None
    if interval.method == WINDOW_BLOCK:
        starts = np.arange(0, len(counts_C), 2 if len(counts_C) >= 2 * _FEWEST_PAIRS else 1)
        sums_C, counts_C = np.add.reduceat(sums_C, starts), np.add.reduceat(counts_C, starts)
        interval = ratio_interval(sums_C, counts_C, DOCUMENT, confidence)
    if interval.low is None or interval.high is None or interval.degrees_of_freedom is None:
        return None
    width = interval.high - interval.low
    if not width > 0:
        return None
    num_clusters = len(counts_C)
    count = NUM_RESAMPLES if num_clusters <= MANY_CLUSTERS else NUM_RESAMPLES_OF_MANY
    means_B = _resampled_means(sums_C, counts_C, count, np.random.default_rng(seed))
    quantile = special.stdtrit(interval.degrees_of_freedom, 0.5 + confidence / 2)
    edge = float(special.ndtr(math.sqrt(num_clusters / (num_clusters - 1)) * quantile))
    low, high = (float(x) for x in np.quantile(means_B, (1 - edge, edge)))
    allowed = NOTABLE * width / 2
    inside = interval.low - low <= allowed and high - interval.high <= allowed
    part_C = (sums_C - interval.value * counts_C) ** 2
    part_C = part_C / part_C.sum()
    return Bootstrap(
        low=low,
        high=high,
        num_resamples=count,
        seed=seed,
        width_ratio=(high - low) / width,
        agrees=inside and float(part_C.max()) <= DECISIVE,
        decisive_share=float(part_C.max()),
        decisive_token_share=float(counts_C[part_C.argmax()] / counts_C.sum()),
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
