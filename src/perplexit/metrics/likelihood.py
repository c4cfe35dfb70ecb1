"""Likelihood figures: each one division of `NllTotals`, each with its unit and its interval.

Shape suffixes: M = scored tokens of a run, in window order; C = clusters.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from perplexit.errors import EmptyScoreError, UsageError
from perplexit.metrics.distribution import mean_by
from perplexit.metrics.estimate import Estimate
from perplexit.metrics.intervals import Clusters, ratio_interval
from perplexit.metrics.totals import NllTotals, require_finite

MAX_EXPONENT = math.log(sys.float_info.max)  # 709.78…: exp of anything above overflows float64


def exp_or_inf(exponent: float) -> float:
    """Return `e ** exponent`; infinite only where float64 really overflows (above 709.78)."""
    return math.exp(exponent) if exponent <= MAX_EXPONENT else math.inf


def json_figure(name: str, value: float | None) -> tuple[float | None, str | None]:
    """Return `(value, None)` for a finite figure, else `(None, reason)` as JSON needs."""
    if value is None:
        return None, f"{name} does not exist here"
    if math.isnan(value):
        return None, f"{name} is not a number: a loss was NaN"
    if math.isinf(value):
        return None, f"{name} overflows float64: its logarithm is above {MAX_EXPONENT:.2f}"
    return value, None


def mean_nll(totals: NllTotals) -> float:
    """Return `nll_sum / num_tokens`, nats per token. Raises EmptyScoreError without a token."""
    return _divide(totals.nll_sum, totals.num_tokens, "token")


def perplexity(totals: NllTotals) -> float:
    """Return `exp(nll_sum / num_tokens)`; infinite only above a mean loss of 709.78.

    Raises EmptyScoreError where no token was scored.
    """
    return exp_or_inf(mean_nll(totals))


def bits_per_byte(totals: NllTotals) -> float:
    """Return `nll_sum / (ln 2 · num_bytes)`: comparable across tokenizers, in bits.

    Raises EmptyScoreError where no byte was scored.
    """
    return _divide(totals.nll_sum, totals.num_bytes, "byte") / math.log(2)


def byte_perplexity(totals: NllTotals) -> float:
    """Return `exp(nll_sum / num_bytes)`. Raises EmptyScoreError where no byte was scored."""
    return exp_or_inf(_divide(totals.nll_sum, totals.num_bytes, "byte"))


def word_perplexity(totals: NllTotals) -> float:
    """Return `exp(nll_sum / num_words)`. Raises EmptyScoreError without a word."""
    return exp_or_inf(_divide(totals.nll_sum, totals.num_words, "word"))


def _divide(nll_sum: float, count: int, unit: str) -> float:
    if count <= 0:
        raise EmptyScoreError(
            f"expected at least one scored {unit}, got {count}: "
            "the input holds nothing to score (a text of at least two tokens is needed)"
        )
    return nll_sum / count


def group_rows(group_M: NDArray[np.integer]) -> dict[int, NDArray[np.int64]]:
    """Return the rows of each group, in order, by its index, in increasing order."""
    if len(group_M) == 0:
        return {}
    order = np.argsort(group_M, kind="stable")
    group = group_M[order]
    starts = np.flatnonzero(np.r_[True, group[1:] != group[:-1]])
    pieces = np.split(order, starts[1:])
    return dict(zip(group[starts].tolist(), pieces, strict=True))


def macro_average_perplexity(groups: Sequence[NllTotals]) -> float:
    """Return `exp(mean over groups of nll_sum / num_tokens)`: each group weighs the same.

    It is the geometric mean of the groups' perplexities (the arithmetic one is dominated by the
    hardest group). Weighing domains alike, whatever their length, is what Paloma does (Magnusson
    et al. 2024, arXiv:2312.10523).
    Raises EmptyScoreError where there is no group, or one without a scored token.
    """
    return exp_or_inf(_divide(math.fsum(mean_nll(group) for group in groups), len(groups), "group"))


_FIGURES: dict[str, tuple[str, Callable[[NllTotals], float], Callable[[float], float]]] = {
    "perplexity": ("token", perplexity, exp_or_inf),
    "bits_per_byte": ("byte", bits_per_byte, lambda nats: nats / math.log(2)),
    "byte_perplexity": ("byte", byte_perplexity, exp_or_inf),
    "word_perplexity": ("word", word_perplexity, exp_or_inf),
}


def mean_loss(nll_M: NDArray[np.floating], clusters: Clusters, confidence: float) -> Estimate:
    """Return the mean loss in nats per token, its interval not below 0."""
    counts_C = np.bincount(clusters.labels, minlength=clusters.num_clusters)
    found = ratio_interval(clusters.sums(nll_M), counts_C, clusters.method, confidence)
    return found.clamped(lowest=0.0)


def unit_estimates(
    nll_M: NDArray[np.floating],
    num_bytes_M: NDArray[np.integer],
    num_words_M: NDArray[np.integer],
    *,
    totals: NllTotals,
    clusters: Clusters,
    confidence: float,
) -> dict[str, Estimate | str]:
    """Return `perplexity`, `bits_per_byte`, `byte_perplexity` and `word_perplexity` of tokens.

    Each is estimated from the clusters' summed losses and their counts of that unit: tokens per
    byte vary between documents, so bits per byte have an interval of their own. A figure that
    does not exist is the sentence that says why. Ends are at least 1 (perplexity) or 0 (bits).
    """
    counts = {
        "token": (np.ones(len(nll_M), dtype=np.int32), totals.num_tokens),
        "byte": (num_bytes_M, totals.num_bytes),
        "word": (num_words_M, totals.num_words),
    }
    sums_C = clusters.sums(nll_M)
    found: dict[str, Estimate | str] = {}
    for name, (unit, metric, from_nats) in _FIGURES.items():
        try:
            value = metric(totals)
        except EmptyScoreError as error:
            found[name] = str(error)
            continue
        counts_M, total = counts[unit]
        counts_C = clusters.sums(counts_M)
        if not counts_C.any():
            found[name] = f"no {unit} begins in a scored token"
            continue
        counts_C *= total / counts_C.sum()  # 1, but where a tool counts more than its tokens
        nats = ratio_interval(sums_C, counts_C, clusters.method, confidence)
        found[name] = replace(nats.clamped(lowest=0.0).mapped(from_nats), value=value)
    return found


@dataclass(frozen=True, slots=True)
class PositionBucket:
    """Mean loss of the targets whose position in their window lies in `start … stop - 1`."""

    start: int
    stop: int
    num_tokens: int
    mean_nll: float | None  # None where no target lies here


def loss_by_position(
    position_M: NDArray[np.integer], nll_M: NDArray[np.floating], num_buckets: int = 16
) -> tuple[PositionBucket, ...]:
    """Mean loss by the target's position in its window, in buckets of equal width.

    A jump at some position is how a broken long-context kernel shows itself.
    Raises UsageError for less than one bucket, NonFiniteError for a loss that is not finite.
    """
    if num_buckets < 1:
        raise UsageError(f"num_buckets must be at least 1, got {num_buckets}: ask for more")
    require_finite(nll_M)
    if len(position_M) == 0:
        return ()
    first, stop = int(position_M.min()), int(position_M.max()) + 1
    num_buckets = min(num_buckets, stop - first)
    edges = first + (np.arange(num_buckets + 1) * (stop - first)) // num_buckets
    return tuple(
        PositionBucket(int(found.low), int(found.high), found.num_tokens, found.mean)
        for found in mean_by(nll_M, position_M, tuple(edges.tolist()))
    )
