"""Summaries of per-token divergences."""

import numpy as np
import pytest

from perplexit.errors import EmptyScoreError, NonFiniteError
from perplexit.metrics.distribution import distribution, mean_by
from perplexit.metrics.intervals import clusters_for


def test_a_distribution_is_its_columns_own() -> None:
    values = np.random.default_rng(0).exponential(0.02, 3000).astype(np.float32)
    window = np.repeat(np.arange(30), 100)
    found = distribution(values, clusters_for(np.zeros(3000, dtype=np.int64), window))
    assert found.mean.value == pytest.approx(values.mean(dtype=np.float64))
    assert found.mean.low < found.mean.value < found.mean.high
    assert found.maximum == values.max()
    assert found.median in values
    shares = [(values <= v).mean() * 100 for _, v in found.percentiles]
    np.testing.assert_allclose(shares, [p for p, _ in found.percentiles], atol=0.05)
    assert found.root_mean_square == pytest.approx(np.sqrt((values.astype(np.float64) ** 2).mean()))


def test_buckets_hold_every_token_once() -> None:
    key = np.array([0.0, 0.05, 0.1, 0.5, 0.99, 1.0])
    buckets = mean_by(np.arange(6.0), key, (0.0, 0.1, 0.5, 0.9, 1.0))
    assert [b.num_tokens for b in buckets] == [2, 1, 1, 2]
    assert [b.mean for b in buckets] == [0.5, 2.0, 3.0, 4.5]
    assert mean_by(np.ones(1), np.ones(1), (0.0, 0.5, 1.0))[0].mean is None
    with pytest.raises(EmptyScoreError):
        mean_by(np.ones(0), np.ones(0), (0.0, 1.0))


def test_a_value_that_is_not_finite_is_named() -> None:
    window = np.arange(4)
    with pytest.raises(NonFiniteError):
        distribution(np.array([0.0, np.inf, 0.0, 0.0]), clusters_for(window * 0, window))
