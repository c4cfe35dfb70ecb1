"""Intervals: their coverage on losses of known mean, and what they refuse."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from perplexit.errors import EmptyScoreError, NonFiniteError, UsageError
from perplexit.metrics.intervals import (
    BLOCK_TOKENS,
    MAX_BLOCKS,
    MIN_BLOCKS,
    MIN_DOCUMENTS,
    Clusters,
    _jackknife_variance,
    _slow_variance,
    clusters_for,
    mean_interval,
    paired_interval,
    ratio_interval,
)
from tests.simulated_losses import MEAN, coverage, few_documents, losses, many_documents, one_text

REPETITIONS = 800  # a coverage of 95 % is then measured to ± 1.5 % (two standard errors)


def even_clusters(num_tokens: int, num_clusters: int) -> Clusters:
    return Clusters(np.arange(num_tokens) * num_clusters // num_tokens, "document", num_clusters)


@pytest.mark.trap(29)
@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_trap_29_blocks_of_windows_cover_correlated_losses(rho: float) -> None:
    found = coverage(one_text(REPETITIONS, 4096, 256, seed=3, rho=rho))
    assert 0.93 <= found.clustered <= 0.97
    if rho >= 0.5:
        assert found.independent < 0.85
    if rho == 0.9:
        assert found.independent < 0.48


@pytest.mark.trap(29)
@pytest.mark.parametrize("length_spread", [0.0, 1.0])
def test_trap_29_documents_cover_unequal_lengths_and_difficulties(length_spread: float) -> None:
    found = coverage(many_documents(REPETITIONS, 30, length_spread, effect=0.4, seed=5))
    assert 0.93 <= found.clustered <= 0.97
    assert found.independent < 0.7


@pytest.mark.trap(29)
@pytest.mark.parametrize("drift_shape", ["autoregressive", "smooth", "sections"])
@pytest.mark.parametrize(("num_tokens", "window"), [(4096, 256), (4096, 512), (12_000, 512)])
def test_trap_29_a_slow_drift_is_covered(num_tokens: int, window: int, drift_shape: str) -> None:
    drift = {"rho": 0.3, "drift_share": 0.003, "drift_length": 400.0, "drift_shape": drift_shape}
    found = coverage(one_text(2000, num_tokens, window, seed=7, **drift))
    assert 0.925 <= found.clustered <= 0.97  # 93 %, less a standard error of this simulation
    assert found.independent < 0.75


@pytest.mark.trap(29)
def test_trap_29_too_few_documents_for_clusters_are_covered_by_their_blocks() -> None:
    found = coverage(few_documents(REPETITIONS, 10, 0.5, effect=0.4, seed=3))
    assert 0.93 <= found.clustered <= 0.97
    assert found.independent < 0.4


@pytest.mark.trap(29)
def test_trap_29_independent_blocks_cover_less_of_a_drift() -> None:
    """What the cosines are for: Student's interval of the blocks themselves falls short."""
    random = np.random.default_rng(8)
    labels = np.arange(4096) // 256
    hits, slow_hits = 0, 0
    for nll in losses((REPETITIONS, 4096), random, rho=0.3, drift_share=0.003):
        plain = mean_interval(nll, Clusters(labels, "document", 16))
        slow = mean_interval(nll, Clusters(labels, "window-block", 16))
        hits += plain.low <= MEAN <= plain.high  # type: ignore[operator]
        slow_hits += slow.low <= MEAN <= slow.high  # type: ignore[operator]
    assert hits < 0.90 * REPETITIONS < 0.925 * REPETITIONS <= slow_hits


def test_the_slow_variance_is_exact_for_independent_tokens_in_unequal_blocks() -> None:
    """Each projection has the variance of the mean: so has their weighted mean."""
    random = np.random.default_rng(1)
    counts = random.integers(1, 400, 24)
    sums = random.standard_normal((20_000, 24)) * np.sqrt(counts)
    found = [ratio_interval(row, counts, "window-block", 0.95) for row in sums]
    variance = np.mean([interval.standard_error**2 for interval in found])  # type: ignore[operator]
    assert variance == pytest.approx(1 / counts.sum(), rel=0.02)
    weights = 1 - (np.arange(1, 7) / 7) ** 2
    degrees = weights.sum() ** 2 / (weights**2).sum()
    assert found[0].degrees_of_freedom == pytest.approx(degrees)
    hits = [interval.low <= 0 <= interval.high for interval in found]  # type: ignore[operator]
    assert np.mean(hits) == pytest.approx(0.95, abs=0.006)


def test_two_blocks_give_the_textbook_variance_of_two_means() -> None:
    residuals, shares = np.array([0.3, -0.3]), np.array([0.5, 0.5])
    assert _slow_variance(residuals, shares) == pytest.approx(
        _jackknife_variance(residuals, shares)
    )


def test_losses_of_a_block_without_a_count_stay_in_the_variance() -> None:
    """A block without a word has no weight, but its losses are in the sum of all."""
    counts = np.array([40.0, 0, 40, 40, 40, 40, 0])
    sums = np.array([100.0, 9, 90, 120, 80, 100, 11])
    merged = ratio_interval(
        np.array([109.0, 90, 120, 80, 111]), counts[counts > 0], "window-block", 0.95
    )
    assert ratio_interval(sums, counts, "window-block", 0.95).low == pytest.approx(merged.low)


def test_four_unequal_windows_are_four_blocks() -> None:
    window = np.repeat([0, 1, 2, 3], [1000, 1000, 1000, 10])
    found = clusters_for(np.zeros_like(window), window)
    assert found.num_clusters == 4
    assert mean_interval(np.random.default_rng(0).gamma(1, 2, len(window)), found).has_interval


def test_one_window_with_nearly_everything_leaves_the_others_their_blocks() -> None:
    window = np.repeat(np.arange(40), [100_000, *[2] * 39])
    assert clusters_for(np.zeros_like(window), window).num_clusters >= 16


def test_paired_differences_are_covered_too() -> None:
    """Both runs share what makes a token hard; their true difference is 0.01 nats."""
    random = np.random.default_rng(11)
    shared = losses((REPETITIONS, 4096), random, rho=0.5)
    noise = 0.05 * losses((REPETITIONS, 4096), random, rho=0.5)
    true = float(noise.mean())
    windows = np.arange(4096) // 256
    clusters = clusters_for(np.zeros_like(windows), windows)
    hits = 0
    for reference, extra in zip(shared, noise, strict=True):
        interval = paired_interval(reference, reference + extra, clusters)
        hits += interval.low <= true <= interval.high  # type: ignore[operator]
    assert 0.93 <= hits / REPETITIONS <= 0.97


def test_equal_clusters_give_the_textbook_interval_of_their_means() -> None:
    nll = np.random.default_rng(0).gamma(1, 2, 600)
    means = nll.reshape(12, 50).mean(1)
    textbook = stats.t.interval(0.9, 11, means.mean(), stats.sem(means))
    interval = mean_interval(nll, even_clusters(600, 12), 0.9)
    assert (interval.low, interval.high) == pytest.approx(textbook)
    assert interval.value == pytest.approx(nll.mean())
    assert interval.degrees_of_freedom == pytest.approx(11)


@given(st.integers(0, 2**32 - 1), st.integers(4, 12))
def test_the_variance_is_that_of_leaving_out_one_cluster_at_a_time(
    seed: int, num_clusters: int
) -> None:
    random = np.random.default_rng(seed)
    labels = np.r_[np.arange(num_clusters), random.integers(0, num_clusters, 60)]
    nll = random.gamma(1, 2, len(labels))
    interval = mean_interval(nll, Clusters(labels, "document", num_clusters))
    left_out = np.array([nll[labels != c].mean() for c in range(num_clusters)])
    c = num_clusters
    jackknife = math.sqrt((c - 1) / c * ((left_out - nll.mean()) ** 2).sum())
    assert interval.standard_error == pytest.approx(jackknife)


def test_one_dominating_document_leaves_few_degrees_of_freedom() -> None:
    labels = np.r_[np.zeros(10_000, dtype=int), np.arange(1, 30)]
    nll = np.random.default_rng(0).gamma(1, 2, len(labels))
    interval = mean_interval(nll, Clusters(labels, "document", 30))
    assert interval.degrees_of_freedom == 1.0


def test_without_four_clusters_there_is_no_interval_but_a_reason() -> None:
    interval = mean_interval(np.ones(6), Clusters(np.arange(6) // 2, "window-block", 3))
    assert (interval.value, interval.low, interval.high, interval.standard_error) == (
        1.0,
        None,
        None,
        None,
    )
    assert interval.reason is not None
    assert "3 windows, and at least 4" in interval.reason


def test_twenty_documents_are_clusters_nineteen_are_not() -> None:
    document = np.repeat(np.arange(MIN_DOCUMENTS), 10)
    enough = clusters_for(document, document)
    assert (enough.method, enough.num_clusters) == ("document", MIN_DOCUMENTS)
    fewer = clusters_for(document[:-10], document[:-10])
    assert (fewer.method, fewer.num_clusters) == ("window-block", MIN_BLOCKS)


def test_documents_without_a_scored_token_are_no_clusters() -> None:
    document = np.repeat(np.arange(0, 60, 2), 3)
    assert clusters_for(document, document).num_clusters == 30


@given(st.lists(st.integers(1, 400), min_size=1, max_size=200))
def test_blocks_are_contiguous_windows_of_about_equal_token_counts(counts: list[int]) -> None:
    window = np.repeat(np.arange(len(counts)) * 3, counts)  # gaps in the numbering do not matter
    clusters = clusters_for(np.zeros_like(window), window)
    sizes = np.bincount(clusters.labels)
    assert len(sizes) == clusters.num_clusters <= min(MAX_BLOCKS, len(counts))
    assert sizes.min() > 0
    assert (np.diff(clusters.labels) >= 0).all()
    for one in np.unique(window):
        assert len(np.unique(clusters.labels[window == one])) == 1
    wanted = min(MAX_BLOCKS, max(MIN_BLOCKS, len(window) // BLOCK_TOKENS), len(counts))
    assert sizes.max() <= len(window) / wanted + max(counts)


def test_longer_texts_have_more_blocks() -> None:
    def num_blocks(num_tokens: int) -> int:
        window = np.arange(num_tokens) // 256
        return clusters_for(np.zeros_like(window), window).num_clusters

    assert [num_blocks(n) for n in (512, 4_096, 12_000, 30_000, 200_000)] == [2, 16, 24, 60, 96]


def test_wrong_arguments_are_said() -> None:
    clusters = even_clusters(10, 2)
    for confidence in (0.0, 1.0, 95.0):
        with pytest.raises(UsageError, match="confidence"):
            mean_interval(np.ones(10), clusters, confidence)
    with pytest.raises(UsageError, match="a cluster for each of 9 tokens"):
        mean_interval(np.ones(9), clusters)
    with pytest.raises(UsageError, match="the same tokens twice"):
        paired_interval(np.ones(10), np.ones(9), clusters)
    with pytest.raises(UsageError, match="one entry per token"):
        clusters_for(np.ones(2, dtype=int), np.ones(3, dtype=int))
    with pytest.raises(NonFiniteError):
        mean_interval(np.full(10, np.nan), clusters)
    with pytest.raises(EmptyScoreError):
        mean_interval(np.empty(0), clusters_for(np.empty(0, dtype=int), np.empty(0, dtype=int)))
