"""Loss for each token, byte and word of a text: every figure with the interval of its own two sums.

Tokens per byte vary between documents, so the interval of bits per byte is not that of the mean
loss in another unit: the bytes of each cluster are counted beside its losses.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from perplexit.errors import EmptyScoreError
from perplexit.metrics import likelihood
from perplexit.metrics.estimate import Estimate
from perplexit.metrics.intervals import Clusters, ratio_interval
from perplexit.metrics.likelihood import ScoredTokens, exp_or_inf
from perplexit.metrics.totals import NllTotals

_Metric = Callable[[NllTotals], float]
_FIGURES: dict[str, tuple[str, _Metric, Callable[[float], float]]] = {
    "perplexity": ("token", likelihood.perplexity, exp_or_inf),
    "bits_per_byte": ("byte", likelihood.bits_per_byte, lambda nats: nats / math.log(2)),
    "byte_perplexity": ("byte", likelihood.byte_perplexity, exp_or_inf),
    "word_perplexity": ("word", likelihood.word_perplexity, exp_or_inf),
}


def mean_loss(tokens: ScoredTokens, clusters: Clusters, confidence: float) -> Estimate:
    """The mean loss in nats for each token, its interval not below 0."""
    counts_C = np.bincount(clusters.labels, minlength=clusters.num_clusters)
    found = ratio_interval(clusters.sums(tokens.nll), counts_C, clusters.method, confidence)
    return found.clamped(lowest=0.0)


def unit_estimates(
    tokens: ScoredTokens, totals: NllTotals, clusters: Clusters, confidence: float
) -> dict[str, Estimate | str]:
    """`perplexity`, `bits_per_byte`, `byte_perplexity` and `word_perplexity` of these tokens.

    Each is estimated from the clusters' summed losses and their counts of that unit. A figure that
    does not exist is the sentence that says why. Ends are at least 1 (perplexity) or 0 (bits).
    """
    counts = {
        "token": (np.ones(len(tokens.nll), dtype=np.int32), totals.num_tokens),
        "byte": (tokens.num_bytes, totals.num_bytes),
        "word": (tokens.num_words, totals.num_words),
    }
    sums_C = clusters.sums(tokens.nll)
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
