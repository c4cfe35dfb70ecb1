"""The NumPy path from logits to losses, against float64 SciPy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax

from perplexit.sessions.logit_rows import details_of_rows


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 9),
    vocab=st.integers(2, 700),
    spread=st.floats(0.01, 60),
    shift=st.floats(-1000, 1000),
    seed=st.integers(0, 2**32 - 1),
)
def test_agrees_with_a_float64_log_softmax(rows, vocab, spread, shift, seed):
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((rows, vocab)) * spread + shift).astype(np.float32)
    ids = rng.integers(0, vocab, rows)
    top_k = min(5, vocab)
    details = details_of_rows(logits, ids, top_k=top_k)
    logprobs = log_softmax(logits.astype(np.float64), axis=-1)
    own = logprobs[np.arange(rows), ids]
    np.testing.assert_allclose(details.nll_N, -own, rtol=1e-6, atol=2e-6)
    np.testing.assert_allclose(
        details.entropy_N, -(np.exp(logprobs) * logprobs).sum(-1), rtol=1e-5, atol=2e-5
    )
    np.testing.assert_array_equal(
        details.rank_N, 1 + (logits > logits[np.arange(rows), ids][:, None]).sum(-1)
    )
    order = np.argsort(-logits, axis=-1, kind="stable")[:, :top_k]
    np.testing.assert_array_equal(
        np.take_along_axis(logits, details.top_ids_NK.astype(np.int64), -1),
        np.take_along_axis(logits, order, -1),
    )
    np.testing.assert_allclose(
        details.top_logprobs_NK, np.take_along_axis(logprobs, order, -1), rtol=1e-6, atol=2e-6
    )
    plain = details_of_rows(logits, ids, with_details=False)
    assert plain.nll_N.tobytes() == details.nll_N.tobytes()
    assert plain.entropy_N is None


def test_blocks_do_not_show_in_the_result():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((40, 60_000)).astype(np.float32)  # 8 rows a block
    ids = rng.integers(0, 60_000, 40)
    together = details_of_rows(logits, ids, top_k=2)
    alone = [details_of_rows(logits[i : i + 1], ids[i : i + 1], top_k=2) for i in range(40)]
    np.testing.assert_array_equal(together.nll_N, np.concatenate([x.nll_N for x in alone]))
    np.testing.assert_array_equal(
        together.top_ids_NK, np.concatenate([x.top_ids_NK for x in alone])
    )


@pytest.mark.trap(22)
def test_probabilities_over_the_whole_vocabulary_sum_to_one():
    """Trap 22: no token is masked."""
    logits = np.random.default_rng(1).standard_normal((1, 300)).astype(np.float32).repeat(300, 0)
    nll = details_of_rows(logits, np.arange(300)).nll_N
    assert np.exp(-nll.astype(np.float64)).sum() == pytest.approx(1, abs=1e-6)


@pytest.mark.trap(23)
def test_minus_infinity_is_probability_zero_and_nan_stays_nan():
    """Trap 23: an impossible token is infinite, a NaN row is NaN, and neither warns away."""
    logits = np.array([[0.0, -np.inf, 0.0], [0.0, np.nan, 0.0]], dtype=np.float32)
    details = details_of_rows(logits, np.array([1, 0]))
    assert details.nll_N[0] == np.inf
    assert details.entropy_N[0] == pytest.approx(np.log(2))
    assert np.isnan(details.nll_N[1])


def test_no_rows_give_empty_columns():
    details = details_of_rows(np.empty((0, 7), np.float32), np.empty(0, np.int64), top_k=3)
    assert details.nll_N.shape == (0,)
    assert details.top_ids_NK.shape == (0, 3)
