"""q4f16_0 as MLC-LLM defines it: golden values by hand, and what must hold for any matrix."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perplexit.errors import QuantizationError
from perplexit.quantization.group_quantization import (
    GroupQuantized,
    codes_of,
    dequantize_groups,
    quantize_groups,
)


def random_matrix(num_outputs: int, num_inputs: int, seed: int = 0, scale: float = 1.0):
    values = np.random.default_rng(seed).standard_normal((num_outputs, num_inputs))
    return (scale * values).astype(np.float32)


def test_golden_group_by_hand():
    # largest 7 -> scale 1: the codes are weight + 7 rounded, ties to even
    row = np.zeros(32, np.float32)
    row[:10] = [7, -7, 0.4, 0.5, 1.5, -0.6, -2.5, 3.49, 6.6, -6.4]
    quantized = quantize_groups(row[None])
    assert quantized.scales_NG.dtype == np.float16
    assert quantized.scales_NG.tolist() == [[1.0]]
    codes = codes_of(quantized)[0]
    assert codes[:10].tolist() == [14, 0, 7, 8, 8, 6, 4, 10, 14, 1]
    assert set(codes[10:].tolist()) == {7}
    # eight codes a word, the first in the lowest four bits
    assert quantized.packed_NS.shape == (1, 4)
    assert hex(quantized.packed_NS[0, 0]) == "0xa468870e"
    expected = np.zeros(32)
    expected[:10] = [7, -7, 0, 1, 1, -1, -3, 3, 7, -6]
    assert np.array_equal(dequantize_groups(quantized)[0], expected)


def test_the_scale_is_rounded_to_float16_before_the_codes_are_chosen():
    row = np.full(32, 1e-3, np.float32)
    scale = np.float16(np.float32(1e-3) / np.float32(7))
    quantized = quantize_groups(row[None])
    assert quantized.scales_NG[0, 0] == scale
    assert np.array_equal(dequantize_groups(quantized)[0], np.full(32, 7 * np.float32(scale)))


def test_groups_run_along_the_inputs_of_each_row():
    weight = random_matrix(3, 96)
    scales = quantize_groups(weight).scales_NG
    expected = np.abs(weight).reshape(3, 3, 32).max(-1) / 7
    assert np.allclose(scales, expected, rtol=1e-3)


@pytest.mark.parametrize("num_inputs", [1, 31, 33, 50, 64])
def test_a_short_last_group_is_stored_as_if_zeros_followed(num_inputs):
    weight = random_matrix(4, num_inputs)
    quantized = quantize_groups(weight)
    num_groups = -(-num_inputs // 32)
    assert quantized.packed_NS.shape == (4, 4 * num_groups)
    assert dequantize_groups(quantized).shape == weight.shape
    assert (codes_of(quantized)[:, num_inputs:] == 7).all()
    assert quantized.num_bytes == 4 * num_groups * 18


def test_four_and_a_half_bits_a_weight():
    assert quantize_groups(random_matrix(8, 64)).num_bytes * 8 == 8 * 64 * 4.5


def test_zeros_stay_zeros_without_a_warning():
    weight = random_matrix(2, 64)
    weight[0, :32] = 0
    weight[1] = 1e-12  # below the least float16 scale
    with np.errstate(all="raise", under="ignore"):
        back = dequantize_groups(quantize_groups(weight))
    assert np.array_equal(back[0, :32], np.zeros(32))
    assert np.array_equal(back[1], np.zeros(64))
    assert back[0, 32:].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, 5e5])
def test_what_no_float16_scale_can_hold_is_refused(bad):
    weight = random_matrix(2, 32)
    weight[1, 3] = bad
    with pytest.raises(QuantizationError, match="expected"):
        quantize_groups(weight)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 100), st.integers(0, 2**31), st.sampled_from([1e-3, 1.0, 30])
)
def test_the_error_is_at_most_half_a_scale_and_quantizing_twice_changes_nothing(n, k, seed, scale):
    weight = random_matrix(n, k, seed, scale)
    quantized = quantize_groups(weight)
    back = dequantize_groups(quantized)
    scale_of_each = np.repeat(quantized.scales_NG.astype(np.float32), 32, axis=1)[:, :k]
    # float16 rounds a scale by up to 2^-11 (or half a subnormal step), and 7 codes multiply that
    slack = 7 * np.maximum(2.0**-11 * scale_of_each, 2.0**-25)
    assert (np.abs(back - weight) <= 0.5 * scale_of_each * 1.0001 + slack).all()
    again = quantize_groups(back)
    assert np.array_equal(again.packed_NS, quantized.packed_NS)
    assert np.array_equal(again.scales_NG, quantized.scales_NG)


def test_packing_is_undone_by_unpacking():
    codes = np.random.default_rng(1).integers(0, 16, (3, 64)).astype(np.uint32)
    packed = np.zeros((3, 8), np.uint32)
    for place in range(64):
        packed[:, place // 8] |= codes[:, place] << (4 * (place % 8))
    assert np.array_equal(codes_of(GroupQuantized(packed, np.ones((3, 2), np.float16), 64)), codes)
