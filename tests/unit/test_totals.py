"""Sums: exact, mergeable, and never silent about a loss that is not finite."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from perplexit.errors import NonFiniteError, UsageError
from perplexit.metrics.totals import NllTotals, exact_sum, finite_mask, require_finite

losses = arrays.arrays(
    np.float32,
    st.integers(0, 40),
    elements=st.floats(0, 1e4, width=32),
)


@given(losses)
def test_the_sum_is_the_nearest_float64_to_the_true_one(nll: np.ndarray) -> None:
    assert exact_sum(nll) == float(sum((Fraction(float(x)) for x in nll), Fraction(0)))


@given(losses, st.randoms())
def test_the_sum_does_not_depend_on_the_order(nll: np.ndarray, random: object) -> None:
    shuffled = nll.tolist()
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert exact_sum(np.array(shuffled, dtype=np.float32)) == exact_sum(nll)


def test_the_sum_goes_on_past_one_chunk() -> None:
    nll = np.full(200_003, 0.1, dtype=np.float32)
    assert exact_sum(nll) == pytest.approx(200_003 * float(np.float32(0.1)), rel=1e-15)


@pytest.mark.trap(11)
def test_trap_11_float32_losses_are_summed_in_float64() -> None:
    """A float32 running sum of four million losses of 10.1 nats is off by several per cent."""
    nll = np.full(4_000_000, 10.1, dtype=np.float32)
    totals = NllTotals.of(nll)
    assert totals.nll_sum / totals.num_tokens == pytest.approx(float(np.float32(10.1)), abs=1e-12)
    narrow = float(np.cumsum(nll, dtype=np.float32)[-1]) / len(nll)
    assert abs(narrow - 10.1) > 1e-5


@given(losses, st.data())
@pytest.mark.trap(8)
def test_trap_8_parts_merge_to_the_whole(nll: np.ndarray, data: st.DataObject) -> None:
    """Denominators of merged parts count exactly the tokens in their numerators."""
    cut = data.draw(st.integers(0, len(nll)))
    num_bytes, num_words = np.arange(len(nll)), np.arange(len(nll)) % 2
    whole = NllTotals.of(nll, num_bytes, num_words)
    parts = NllTotals.of(nll[:cut], num_bytes[:cut], num_words[:cut]) + NllTotals.of(
        nll[cut:], num_bytes[cut:], num_words[cut:]
    )
    assert parts.nll_sum == pytest.approx(whole.nll_sum, rel=1e-14)
    assert (parts.num_tokens, parts.num_bytes, parts.num_words) == (
        len(nll),
        int(num_bytes.sum()),
        int(num_words.sum()),
    )
    assert whole + NllTotals() == whole


def test_columns_of_other_tokens_are_refused() -> None:
    with pytest.raises(UsageError, match="num_words must have one entry"):
        NllTotals.of(np.ones(3), np.ones(3, dtype=int), np.ones(2, dtype=int))


@pytest.mark.trap(23)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_trap_23_the_first_loss_that_is_not_finite_is_found_and_named(bad: float) -> None:
    nll = np.ones(10, dtype=np.float32)
    nll[[4, 7]] = bad
    columns = {
        "window_M": np.repeat([0, 1], 5),
        "position_M": np.arange(10) + 1,
        "token_id_M": np.arange(10) + 100,
    }
    place = r"token 4, window 0, position 5, token id 104 \(the first of 2\)"
    with pytest.raises(NonFiniteError, match=place):
        require_finite(nll, **columns)
    with pytest.raises(NonFiniteError):
        NllTotals.of(nll)


@pytest.mark.trap(23)
def test_trap_23_policies_stop_or_count() -> None:
    nll = np.array([1, np.nan, 3, np.inf], dtype=np.float32)
    with pytest.raises(NonFiniteError):
        finite_mask(nll, "error")
    keep, num_non_finite = finite_mask(nll, "count")
    assert keep.tolist() == [True, False, True, False]
    assert num_non_finite == 2
    totals = NllTotals.of(nll[keep])
    assert (totals.nll_sum, totals.num_tokens) == (4.0, 2)
    assert finite_mask(nll[keep], "error")[1] == 0
    with pytest.raises(UsageError, match="'error' or 'count'"):
        finite_mask(nll, "ignore")  # type: ignore[arg-type]


def test_all_finite_finds_nothing() -> None:
    require_finite(np.ones(3))
    require_finite(np.empty(0))
