"""MX formats: golden values worked out by hand from the OCP specification, and properties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perplexit.errors import QuantizationError
from perplexit.quantization.mx_formats import (
    BLOCK_SIZE,
    FP6_E2M3,
    FP6_E3M2,
    INT8,
    mx_num_bytes,
    mx_round_trip,
    round_to_element,
    scale_exponents,
)

FORMATS = [FP6_E2M3, FP6_E3M2, INT8]


def block(*values: float) -> torch.Tensor:
    return torch.tensor([[*values, *[0.0] * (BLOCK_SIZE - len(values))]])


def representable(element) -> list[float]:
    """Every non-negative number of the format, enumerated from its fields (specification, 5.3)."""
    if element is INT8:
        return [code / 64 for code in range(128)]
    bias = {"FP6 E2M3": 1, "FP6 E3M2": 3}[element.name]
    mantissas = 1 << element.mantissa_bits
    values = []
    for exponent in range(1 << (5 - element.mantissa_bits)):
        for mantissa in range(mantissas):
            fraction = mantissa / mantissas
            normal = math.ldexp(1 + fraction, exponent - bias)
            values.append(normal if exponent else math.ldexp(fraction, 1 - bias))
    return values


@pytest.mark.parametrize("element", FORMATS, ids=lambda e: e.name)
def test_the_limits_are_those_of_the_specification_s_tables(element):
    values = representable(element)
    assert max(values) == element.max_value
    assert {"FP6 E2M3": 7.5, "FP6 E3M2": 28.0, "INT8": 127 / 64}[element.name] == max(values)
    assert 2.0**element.max_exponent == max(v for v in values if v and math.log2(v).is_integer())


@pytest.mark.parametrize("element", FORMATS, ids=lambda e: e.name)
def test_every_number_of_the_format_is_itself_and_others_go_to_the_nearest(element):
    values = torch.tensor(representable(element), dtype=torch.float64)
    assert torch.equal(round_to_element(values, element), values)
    assert torch.equal(round_to_element(-values, element), -values)
    random = torch.rand(2000, dtype=torch.float64) * 1.2 * element.max_value
    distance = (round_to_element(random, element) - random).abs()
    assert torch.allclose(distance, (random[:, None] - values).abs().amin(dim=1), atol=1e-12)


@pytest.mark.parametrize(
    ("element", "value", "expected"),
    [
        (FP6_E2M3, 0.0625, 0.0),  # half the smallest subnormal (0.125): a tie, to the even 0
        (FP6_E2M3, 0.1875, 0.25),  # 1.5 subnormal steps: a tie, to the even 2
        (FP6_E2M3, 1.0625, 1.0),  # halfway between 1.000 and 1.125: mantissa 0 is even
        (FP6_E2M3, 1.1875, 1.25),  # halfway between 1.125 and 1.25: mantissa 2 is even
        (FP6_E2M3, 7.9, 7.5),  # beyond the largest: saturated
        (FP6_E3M2, 0.03125, 0.0),  # half the smallest subnormal, 0.0625
        (FP6_E3M2, 0.2, 0.1875),  # the largest subnormal is nearer than 0.25
        (FP6_E3M2, 26.0, 24.0),  # halfway between 24 and 28: mantissa 2 (24) is even
        (FP6_E3M2, -31.0, -28.0),
        (INT8, 1.9999, 127 / 64),
        (INT8, 3 / 128, 2 / 64),  # 1.5 steps: a tie, to the even 2
    ],
)
def test_golden_elements_by_hand(element, value, expected):
    assert float(round_to_element(torch.tensor([value]), element)) == expected


@pytest.mark.parametrize(
    ("element", "largest", "exponent"),
    [
        (FP6_E2M3, 1.0, -2),  # floor(log2 1) = 0, less emax 2
        (FP6_E2M3, 7.9, 0),
        (FP6_E2M3, 0.99, -3),
        (FP6_E3M2, 1.0, -4),
        (FP6_E3M2, 2.0**-40, -44),
        (INT8, 1.0, 0),
        (INT8, 1.9999, 0),
        (INT8, 3e38, 127),
        (INT8, 1e-45, -127),  # E8M0 ends at 2^-127
        (INT8, 0.0, 0),
    ],
)
def test_golden_scales_by_hand(element, largest, exponent):
    values = block(-largest, largest / 3).double().reshape(1, 1, BLOCK_SIZE)
    assert scale_exponents(values, element).tolist() == [[exponent]]


def test_golden_block_by_hand():
    # largest 5: scale 2^(2-2) = 1 for E2M3; 2^(2-4) = 1/4 for E3M2; 2^2 = 4 for INT8
    weight = block(5.0, 1.06, -0.3, 0.02)
    expected = {
        FP6_E2M3: (5.0, 1.0, -0.25, 0.0),
        FP6_E3M2: (5.0, 1.0, -0.3125, 0.015625),
        INT8: (5.0, 1.0625, -0.3125, 0.0),
    }
    for element, values in expected.items():
        assert mx_round_trip(weight, element)[0, :4].tolist() == list(values)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 70),
    st.integers(0, 2**31),
    st.floats(-100, 100),
    st.sampled_from(FORMATS),
)
def test_bounded_error_idempotent_and_free_of_the_scale(n, k, seed, power, element):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator) * 2.0 ** round(power)
    back = mx_round_trip(weight, element)
    assert back.shape == weight.shape
    padded = torch.nn.functional.pad(weight, (0, -k % BLOCK_SIZE)).reshape(n, -1, BLOCK_SIZE)
    largest = padded.abs().amax(-1, keepdim=True).expand_as(padded).reshape(n, -1)[:, :k]
    # Half a step of the topmost binade; saturation costs what lies between largest and 2^(emax+1).
    step = 2.0 ** -(element.mantissa_bits + 1)
    gap = 2 - element.max_value / 2.0**element.max_exponent
    assert ((back - weight).abs() <= largest * max(step, gap) * 1.001).all()
    assert torch.equal(mx_round_trip(back, element), back)
    assert torch.equal(mx_round_trip(weight * 8, element), back * 8)  # powers of two change nothing


@pytest.mark.parametrize("element", FORMATS, ids=lambda e: e.name)
def test_blocks_of_zeros_stay_zeros_beside_others(element):
    weight = torch.cat([torch.zeros(2, BLOCK_SIZE), torch.randn(2, BLOCK_SIZE)], dim=1)
    back = mx_round_trip(weight, element)
    assert torch.equal(back[:, :BLOCK_SIZE], torch.zeros(2, BLOCK_SIZE))
    assert back[:, BLOCK_SIZE:].abs().min() >= 0
    assert back[:, BLOCK_SIZE:].any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(bad):
    with pytest.raises(QuantizationError, match="finite weights"):
        mx_round_trip(block(1.0, bad), INT8)


def test_bytes_are_elements_and_a_byte_of_scale_a_block():
    assert mx_num_bytes(torch.zeros(4, 64), 6) == 4 * 64 * 6 // 8 + 4 * 2
    assert mx_num_bytes(torch.zeros(1, 33), 8) == 33 + 2


@pytest.mark.parametrize(("element", "name"), [(FP6_E2M3, "E2M3"), (FP6_E3M2, "E3M2")])
def test_another_implementation_gives_the_same_numbers(element, name):
    pytest.importorskip("torchao")
    from torchao.prototype.mx_formats import config, constants, mx_tensor  # noqa: PLC0415

    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(64, 96, generator=generator)
    weight = weight * torch.exp(3 * torch.randn(64, 1, generator=generator))
    theirs = mx_tensor.MXTensor.to_mx(
        weight,
        getattr(constants, f"DTYPE_FP6_{name}"),
        BLOCK_SIZE,
        scaling_mode=config.ScaleCalculationMode.FLOOR,
    )
    assert torch.equal(mx_round_trip(weight, element), theirs.dequantize(torch.float32))
