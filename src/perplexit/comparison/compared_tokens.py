"""ComparedTokens: the per-token columns of one comparison, and the curves that are drawn from them.

What a comparison refused (a KL measured against another reference) is not here, so that nothing
can draw it.

Shape suffixes: M = tokens that both runs scored with a finite loss, in window order; R = all rows.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from perplexit.comparison.divergences import Divergences
from perplexit.comparison.flips import FirstChoices
from perplexit.comparison.pairing import Pairs
from perplexit.metrics.bounded_intervals import share_interval
from perplexit.metrics.distribution import CONFIDENCE_EDGES
from perplexit.metrics.estimate import Estimate
from perplexit.metrics.intervals import clusters_for
from perplexit.runs.run import Run

NUM_POINTS = 60
SMALLEST_BUCKET = 10  # fewer tokens than this say nothing about a share

Curve = list[tuple[float, float]]  # (x, share of tokens above x)


@dataclass(frozen=True, slots=True)
class AgreementBucket:
    """How often the first choices are the same where the reference's confidence is in a range.

    `low_confidence` ≤ the probability of the reference's first choice < `high_confidence`.
    """

    low_confidence: float
    high_confidence: float
    share: Estimate
    num_tokens: int


@dataclass(frozen=True, slots=True)
class ComparedTokens:
    """The columns of a comparison. Each belongs to it, or is None.

    kl:      M divergences KL(reference ‖ candidate) in nats; None where the candidate was not
             scored against this very reference, or where a value is not finite.
    choices: at which tokens the first choices differ; None where no run tells.
    """

    pairs: Pairs
    kl: NDArray[np.float64] | None
    choices: FirstChoices | None
    confidence: float

    def rises(self) -> Curve:
        """Return the share of tokens whose loss rose by more than a value, in nats."""
        return exceedance(self.pairs.delta)

    def falls(self) -> Curve:
        """Return the share of tokens whose loss fell by more than a value, in nats."""
        return exceedance(-self.pairs.delta)

    def kl_above(self) -> Curve:
        """Return the share of tokens whose KL lies above a value, in nats; empty without a KL."""
        return [] if self.kl is None else exceedance(self.kl)

    def kl_of_rows(self) -> NDArray[np.float64] | None:
        """Return R values of KL in nats, NaN at a token that was left out; None without a KL."""
        if self.kl is None:
            return None
        kl_R = np.full(len(self.pairs.tokens), np.nan)
        kl_R[self.pairs.rows] = self.kl
        return kl_R

    def agreement_by_confidence(self) -> tuple[AgreementBucket, ...]:
        """Return the share of equal first choices, by the reference's confidence in its own.

        Empty where not every change is known, or the confidence was not recorded.
        """
        choices = self.choices
        if choices is None or not choices.complete or choices.sureness is None:
            return ()
        bucket_M = np.digitize(choices.sureness, CONFIDENCE_EDGES[1:-1])
        found = []
        for bucket, (low, high) in enumerate(pairwise(CONFIDENCE_EDGES)):
            inside = np.flatnonzero(bucket_M == bucket)
            if len(inside) < SMALLEST_BUCKET:
                continue
            rows = self.pairs.rows[inside]
            tokens = self.pairs.tokens
            clusters = clusters_for(tokens.document[rows], tokens.window[rows])
            same = (~choices.changed[inside]).astype(np.float64)
            share = share_interval(same, clusters, self.confidence)
            found.append(AgreementBucket(low, high, share, len(inside)))
        return tuple(found)


def compared_tokens(
    candidate: Run,
    pairs: Pairs,
    *,
    divergences: Divergences | None,
    choices: FirstChoices | None,
    confidence: float,
) -> ComparedTokens:
    """Return a comparison's columns, with the candidate's KL only where `divergences` has it."""
    kl_R = candidate.tokens.kl
    has_kl = divergences is not None and "kl" in divergences.columns and kl_R is not None
    kl_M = np.asarray(kl_R)[pairs.rows].astype(np.float64) if has_kl else None
    return ComparedTokens(pairs, kl_M, choices, confidence)


def losses_above(run: Run) -> Curve:
    """Return the share of a run's tokens whose loss lies above a value, in nats."""
    return exceedance(run.tokens.nll)


def exceedance(values_M: NDArray[np.floating]) -> Curve:
    """Return (x, share of all tokens whose value lies above x), at points spaced evenly in log x.

    Values of zero or below count in the denominator only; values that are not finite do not count.
    """
    finite = values_M[np.isfinite(values_M)].astype(np.float64)
    positive = np.sort(finite[finite > 0])
    if len(positive) == 0:
        return []
    lowest = max(float(np.quantile(positive, 0.02)), float(positive[-1]) * 1e-6)
    points = np.geomspace(lowest, positive[-1], NUM_POINTS)
    points[-1] = np.nextafter(positive[-1], 0)  # the largest itself lies above the last point
    above = len(positive) - np.searchsorted(positive, points, side="right")
    shares = above / len(finite)
    return [(float(x), float(s)) for x, s in zip(points, shares, strict=True) if s > 0]
