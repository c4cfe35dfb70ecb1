"""How well a secondary learner predicts, and the warning for one that does not. Needs no engine.

Shape suffix: N = contexts.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from perplexit.metrics.estimate import Estimate
from perplexit.metrics.intervals import DOCUMENT, Clusters, ratio_interval


def score_predictions(
    predicted_N: NDArray[np.float64],
    true_N: NDArray[np.float64],
    *,
    threshold: float = 1.0,
    article_N: NDArray[Any] | None = None,
) -> dict[str, Any]:
    """Return how well predicted z-scores match true ones, of articles not used for training.

    article_N: the article of each context. The result, as JSON values:

    num_pairs, num_articles: of the contexts; 0 articles where they are not known.
    mse, mse_of_mean: the second is that of predicting the mean of the fitted pairs for all.
    r2:        1 - mse / mse_of_mean; None where the z-scores do not vary. r2_low, r2_high: its 95 %
               interval, clustered by article; None with fewer than 4 articles.
    spearman:  rank correlation; None where predictions do not vary.
    accepted:  the share of contexts predicted at or above `threshold`.
    precision: the share of those that really are; None where there are none.
    base_rate: that share among all contexts.
    """
    error_N, error_of_mean_N = (predicted_N - true_N) ** 2, true_N**2
    articles = np.zeros(len(true_N)) if article_N is None else article_N
    names, labels = np.unique(articles, return_inverse=True)
    varies = len(true_N) > 2 and np.ptp(predicted_N) > 0 and np.ptp(true_N) > 0
    accepted = predicted_N >= threshold
    r2: Estimate | None = None  # Σ (error of the mean - error) / Σ error of the mean
    if error_of_mean_N.any():
        clusters = Clusters(labels.astype(np.int64), DOCUMENT, len(names))
        explained_C = clusters.sums(error_of_mean_N - error_N)
        totals_C = clusters.sums(error_of_mean_N)
        r2 = ratio_interval(explained_C, totals_C, clusters.method, 0.95).clamped(highest=1.0)
    return {
        "num_pairs": len(true_N),
        "num_articles": 0 if article_N is None else len(names),
        "mse": float(error_N.mean()),
        "mse_of_mean": float(error_of_mean_N.mean()),
        "r2": None if r2 is None else r2.value,
        "spearman": float(stats.spearmanr(predicted_N, true_N).statistic) if varies else None,
        "threshold": threshold,
        "accepted": float(accepted.mean()),
        "precision": float((true_N[accepted] >= threshold).mean()) if accepted.any() else None,
        "base_rate": float((true_N >= threshold).mean()),
        "r2_low": None if r2 is None else r2.low,
        "r2_high": None if r2 is None else r2.high,
    }


def doubt_about(scores: Mapping[str, Any] | None) -> str | None:
    """Return a warning for a learner that does not predict; None for one that does.

    scores: those of its record. A learner without them (trained elsewhere) is not judged.
    """
    if not scores or "r2" not in scores:
        return None
    r2, low = scores["r2"], scores.get("r2_low")
    held_out = f"on {scores['num_pairs']} held-out pairs"
    if r2 is None:
        return f"This learner cannot be judged: the gains {held_out} are all alike."
    if r2 <= 0:
        return (
            f"This learner predicts nothing: {held_out} it is no better than predicting the mean "
            f"for every context (R² {r2:.3f}). Filtering with it is filtering at random; collect "
            "more pairs, or train another kind of learner."
        )
    if low is not None and low <= 0:
        return (
            f"It is not shown that this learner predicts anything: {held_out} its R² is {r2:.3f}, "
            f"with an interval from {low:.3f} to {scores['r2_high']:.3f}. Collect more pairs."
        )
    return None
