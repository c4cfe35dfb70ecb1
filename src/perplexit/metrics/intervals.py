"""Intervals around a mean loss that do not pretend tokens to be independent.

Shape suffixes: M = scored tokens of a run, in window order; C = clusters; Q = cosines.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

from perplexit.errors import EmptyScoreError, UsageError
from perplexit.metrics.estimate import Estimate, counted
from perplexit.metrics.totals import require_finite

MIN_DOCUMENTS = 20  # fewer documents than this are too few clusters to trust
MIN_CLUSTERS = 4  # fewer say next to nothing: two give 12.7 standard errors on either side
# Measured: docs/decisions, on intervals. Losses of real text drift over some hundred tokens; blocks
# need only be short against that, since the cosines over them leave out what is faster.
BLOCK_TOKENS = 500
MIN_BLOCKS = 16
MAX_BLOCKS = 96
MIN_COSINES = 4  # fewer are wide by Student's t alone
BLOCKS_A_COSINE = 4
DOCUMENT, WINDOW_BLOCK = "document", "window-block"


@dataclass(frozen=True, slots=True)
class Clusters:
    """Which tokens vary together. `labels[m]` is the cluster of token m, dense from 0."""

    labels: NDArray[np.int64]
    method: str  # "document" or "window-block"
    num_clusters: int

    def sums(self, values_M: NDArray[Any]) -> NDArray[np.float64]:
        """Return the sum of `values_M` in each cluster: [C], float64."""
        return np.bincount(
            self.labels, weights=values_M.astype(np.float64), minlength=self.num_clusters
        ).astype(np.float64)


def clusters_for(document_M: NDArray[np.integer], window_M: NDArray[np.integer]) -> Clusters:
    """Return the clusters of a run's tokens: documents, or blocks of windows for few documents.

    From 20 documents on, each is a cluster. Below, the windows in their order are cut into
    contiguous blocks of about equal token counts: as many as hold 500 tokens each, but at least
    16 and at most 96, and never more than there are windows. Blocks are not taken for independent:
    `mean_interval` measures how they move together.
    """
    if len(document_M) != len(window_M):
        raise UsageError(
            f"document and window must have one entry per token, got {len(document_M)} and "
            f"{len(window_M)}: give columns of the same tokens"
        )
    document_index = _dense(document_M)
    num_documents = _count(document_index)
    if num_documents >= MIN_DOCUMENTS:
        return Clusters(document_index, DOCUMENT, num_documents)
    max_blocks = min(MAX_BLOCKS, max(MIN_BLOCKS, len(window_M) // BLOCK_TOKENS))
    block_index = _blocks(_dense(window_M), max_blocks)
    return Clusters(block_index, WINDOW_BLOCK, _count(block_index))


def clusters_within(
    clusters: Clusters, rows_K: NDArray[np.integer], window_M: NDArray[np.integer]
) -> Clusters:
    """Return the clusters of the tokens `rows_K` alone: those of one domain, for example.

    Documents stay documents where the part has at least 4 of them; what has fewer, or was in blocks
    before, is cut into blocks of its own windows.
    """
    labels = _dense(clusters.labels[rows_K])
    if clusters.method == DOCUMENT and _count(labels) >= MIN_CLUSTERS:
        return Clusters(labels, DOCUMENT, _count(labels))
    window_K = window_M[rows_K]
    return clusters_for(np.zeros_like(window_K), window_K)


def mean_interval(
    nll_M: NDArray[np.floating], clusters: Clusters, confidence: float = 0.95
) -> Estimate:
    """Return the mean of `nll_M` with its cluster-robust interval.

    The mean is the ratio of two sums over clusters, Σ y_c / Σ n_c, with e_c = (y_c - mean · n_c) /
    Σ n and each cluster's share h_c = n_c / Σ n.

    Documents are independent. The variance is linearised and corrected for each cluster's leverage,
    which is the delete-one-cluster jackknife; unequal clusters also leave fewer degrees of freedom
    than their number says:

        variance = (C - 1) / C · Σ (e_c / (1 - h_c))²
        degrees of freedom = 1 / Σ h_c² - 1        (C - 1 for equal clusters; never below 1)

    Blocks of one text are not. The mean's variance is the long-run variance, the spectrum of the
    losses at frequency 0, and is estimated from the slowest movements: the q = max(4, C / 4)
    cosines cos(π j p_c), p_c being the place of the block's middle in the text and j = 1 … q,
    made orthonormal under the weights h_c and against a constant (v_j). Slower ones weigh more,
    by w_j ∝ 1 - (j / (q + 1))² with Σ w_j = 1:

        variance = Σ_j w_j · (Σ_c v_jc · e_c)²
        degrees of freedom = 1 / Σ w_j²            (Satterthwaite; 3.6 for q = 4)

    interval = mean ± t(confidence, degrees of freedom) · √variance

    Sources: Cochran, Sampling Techniques, ch. 6 (the ratio); Bell & McCaffrey 2002 (CR3); Carter,
    Schnepel & Steigerwald 2017 (effective number of clusters); Müller 2007 and Lazarus, Lewis,
    Stock & Watson 2018 (cosines and Student's t); coverage: docs/decisions.
    Below four clusters there is no interval, and the reason is given.
    Raises EmptyScoreError without tokens, NonFiniteError for NaN or infinite values.
    """
    _check_confidence(confidence)
    if len(nll_M) == 0:
        raise EmptyScoreError("expected at least one scored token, got 0: nothing has a mean")
    if len(nll_M) != len(clusters.labels):
        raise UsageError(
            f"expected a cluster for each of {len(nll_M)} tokens, got {len(clusters.labels)}: "
            "give the clusters of the same tokens"
        )
    require_finite(nll_M)
    counts_C = np.bincount(clusters.labels, minlength=clusters.num_clusters)
    return ratio_interval(clusters.sums(nll_M), counts_C, clusters.method, confidence)


def paired_interval(
    nll_reference_M: NDArray[np.floating],
    nll_candidate_M: NDArray[np.floating],
    clusters: Clusters,
    confidence: float = 0.95,
) -> Estimate:
    """Return the mean of `candidate - reference` over the same tokens, with its interval, in nats.

    It is the log of the ratio of the two perplexities. Pairing takes out what makes a token hard
    for both, so the interval is far narrower than that of either mean.
    """
    if len(nll_reference_M) != len(nll_candidate_M):
        raise UsageError(
            f"expected the same tokens twice, got {len(nll_reference_M)} and "
            f"{len(nll_candidate_M)}: compare runs over the same input"
        )
    difference_M = nll_candidate_M.astype(np.float64) - nll_reference_M.astype(np.float64)
    return mean_interval(difference_M, clusters, confidence)


def ratio_interval(
    sums_C: NDArray[np.float64],
    counts_C: NDArray[np.int64] | NDArray[np.float64],
    method: str,
    confidence: float,
) -> Estimate:
    """Return `Σ sums / Σ counts` over clusters with its interval, as in `mean_interval`.

    The counts may be of tokens, or of bytes where a sum stands for several of them, or be sums of
    their own.
    """
    num_clusters, num_tokens = len(counts_C), float(counts_C.sum())
    mean = float(sums_C.sum() / num_tokens)
    reason = _why_no_interval(counts_C, method)
    if reason is not None:
        return Estimate(mean, None, None, method, num_clusters, confidence, reason=reason)
    residuals_C = (sums_C - mean * counts_C) / num_tokens
    estimate = _slow_variance if method == WINDOW_BLOCK else _jackknife_variance
    variance, degrees = estimate(residuals_C, counts_C / num_tokens)
    error = math.sqrt(variance)
    half = float(special.stdtrit(degrees, 0.5 + confidence / 2)) * error
    return Estimate(
        mean, mean - half, mean + half, method, num_clusters, confidence, error, degrees
    )


def _why_no_interval(counts_C: NDArray[np.int64] | NDArray[np.float64], method: str) -> str | None:
    unit = "window" if method == WINDOW_BLOCK else method
    found = int(np.count_nonzero(counts_C))
    if found < MIN_CLUSTERS:
        return (
            f"too little text for an interval: {counted(found, unit)}, and at least "
            f"{MIN_CLUSTERS} are needed"
        )
    return None


def _jackknife_variance(
    residuals_C: NDArray[np.float64], share_C: NDArray[np.float64]
) -> tuple[float, float]:
    """Return (variance of the mean, degrees of freedom) of independent clusters."""
    num_clusters = len(share_C)
    left_out_C = residuals_C / (1 - share_C)
    variance = (num_clusters - 1) / num_clusters * float(left_out_C @ left_out_C)
    return variance, max(1.0, 1 / float(share_C @ share_C) - 1)


def _slow_variance(
    residuals_C: NDArray[np.float64], share_C: NDArray[np.float64]
) -> tuple[float, float]:
    """Return (variance of the mean, degrees of freedom) of consecutive clusters of one text.

    Under independent tokens each projection has exactly the variance of the mean.
    """
    kept_C = np.flatnonzero(share_C > 0)  # a block without a word, say: its losses go to the last
    residuals_C = np.add.reduceat(residuals_C, np.r_[0, kept_C[1:]])
    share_C = share_C[kept_C]
    num_blocks = len(share_C)
    num_cosines = max(1, min(max(MIN_COSINES, num_blocks // BLOCKS_A_COSINE), num_blocks - 1))
    place_C = np.cumsum(share_C) - share_C / 2
    waves_CQ = np.cos(np.pi * np.arange(num_cosines + 1) * place_C[:, None])
    root_C = np.sqrt(share_C)
    basis_CQ = np.linalg.qr(waves_CQ * root_C[:, None])[0][:, 1:]
    projections_Q = (residuals_C / root_C) @ basis_CQ
    weight_Q = 1 - (np.arange(1, num_cosines + 1) / (num_cosines + 1)) ** 2
    weight_Q /= weight_Q.sum()
    return float(weight_Q @ projections_Q**2), 1 / float(weight_Q @ weight_Q)


def _blocks(window_index_M: NDArray[np.int64], max_blocks: int) -> NDArray[np.int64]:
    """Return a block index for each token: contiguous windows, cut where the token counts are even.

    Few windows are a block each. Where one window holds nearly everything, the others keep blocks
    of their own: cut where the numbers of windows are even.
    """
    counts = np.bincount(window_index_M)
    if len(counts) <= max_blocks:
        return window_index_M
    middles = np.cumsum(counts) - counts / 2
    block_of_window = np.floor(middles * max_blocks / counts.sum())
    if len(np.unique(block_of_window)) < MIN_CLUSTERS:
        block_of_window = np.arange(len(counts)) * max_blocks // len(counts)
    return _dense(block_of_window.astype(np.int64)[window_index_M])


def _dense(labels_M: NDArray[np.integer]) -> NDArray[np.int64]:
    index: NDArray[np.int64] = np.unique(labels_M, return_inverse=True)[1].astype(np.int64)
    return index.reshape(-1)


def _count(index_M: NDArray[np.int64]) -> int:
    return int(index_M.max()) + 1 if len(index_M) else 0


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise UsageError(
            f"confidence must lie between 0 and 1, got {confidence}: 0.95 is the usual choice"
        )
