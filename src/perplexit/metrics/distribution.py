"""Divergence figures of a candidate from a reference: summaries of per-token columns.

Shape suffix: M = scored tokens, in window order.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from perplexit.errors import EmptyScoreError
from perplexit.metrics.estimate import Estimate
from perplexit.metrics.intervals import Clusters, mean_interval

PERCENTILES = (0.1, 1.0, 5.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 99.0, 99.9)
CONFIDENCE_EDGES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)


@dataclass(frozen=True, slots=True)
class Distribution:
    """A column's mean with its clustered interval, and where its values lie.

    percentiles: (percent, value) for 0.1 … 99.9; the value is an actual token's
        (inverted empirical distribution), so that the 99.9th of few tokens is not an invention.
    """

    mean: Estimate
    root_mean_square: float
    percentiles: tuple[tuple[float, float], ...]
    minimum: float
    maximum: float

    @property
    def median(self) -> float:
        """Return the 50th percentile."""
        return dict(self.percentiles)[50.0]


IntervalOf = Callable[[NDArray[np.floating], Clusters, float], Estimate]


def distribution(
    values_M: NDArray[np.floating],
    clusters: Clusters,
    confidence: float = 0.95,
    *,
    interval_of: IntervalOf = mean_interval,
) -> Distribution:
    """Return the distribution of a per-token figure (KL, Δp, agreement) over the scored tokens.

    interval_of: how the mean is estimated: `share_interval`, for example.
    Raises EmptyScoreError without tokens, NonFiniteError where a value is NaN or infinite.
    """
    interval = interval_of(values_M, clusters, confidence)
    values = values_M.astype(np.float64)
    found = np.percentile(values, PERCENTILES, method="inverted_cdf")
    return Distribution(
        mean=interval,
        root_mean_square=float(np.sqrt(np.mean(values**2))),
        percentiles=tuple(zip(PERCENTILES, found.tolist(), strict=True)),
        minimum=float(values.min()),
        maximum=float(values.max()),
    )


@dataclass(frozen=True, slots=True)
class Bucket:
    """The tokens whose key lies in `low ≤ key < high` (the last bucket includes its high end)."""

    low: float
    high: float
    num_tokens: int
    mean: float | None  # None where no token lies here


def mean_by(
    values_M: NDArray[np.floating], key_M: NDArray[np.number], edges: tuple[float, ...]
) -> tuple[Bucket, ...]:
    """Return the mean of a per-token figure in buckets of another: KL by confidence, say.

    Raises EmptyScoreError without tokens.
    """
    if len(values_M) == 0:
        raise EmptyScoreError("expected at least one scored token, got 0: nothing has a mean")
    bucket_M = np.clip(np.searchsorted(edges, key_M, side="right") - 1, 0, len(edges) - 2)
    counts = np.bincount(bucket_M, minlength=len(edges) - 1)
    sums = np.bincount(bucket_M, weights=values_M.astype(np.float64), minlength=len(edges) - 1)
    return tuple(
        Bucket(low, high, int(count), float(total / count) if count else None)
        for low, high, count, total in zip(edges, edges[1:], counts, sums, strict=False)
    )
