"""OCP Microscaling (MX) v1.0: blocks of 32 narrow numbers that share a power of two as their scale.

The formats' definition, written plainly and applied to float32 weights ("fake quantization": the
result is the float that the narrow numbers stand for). For a block V of 32 values:

    X   = 2^(floor(log2 max|V|) − emax)         the shared scale, E8M0: 2^−127 … 2^127
    P_i = round-to-nearest-even(V_i / X)        in the element format, saturated at its largest
    V'_i = X · P_i

`emax` is the exponent of the largest power of two in the element format. A block of zeros stays
zero. Source: OCP Microscaling Formats (MX) Specification v1.0, tables 1–6 and section 6.3.

Shape suffixes: N = rows, K = inputs, G = blocks of a row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from perplexit.errors import QuantizationError

BLOCK_SIZE = 32
_E8M0_LIMIT = 127


@dataclass(frozen=True, slots=True)
class ElementFormat:
    """A narrow number format: `bits` in all, `mantissa_bits` of them after the leading one.

    min_exponent: of the smallest normal number; smaller ones share its spacing (subnormals).
    max_exponent: of the largest power of two (`emax`); max_value: the largest number.
    """

    name: str
    bits: int
    mantissa_bits: int
    min_exponent: int
    max_exponent: int
    max_value: float


FP6_E3M2 = ElementFormat("FP6 E3M2", 6, 2, min_exponent=-2, max_exponent=4, max_value=28.0)
FP6_E2M3 = ElementFormat("FP6 E2M3", 6, 3, min_exponent=0, max_exponent=2, max_value=7.5)
# Two's complement with an implied 2^−6: steps of 1/64 up to 127/64. −2 is left out, so that the
# format is symmetric, as the specification allows.
INT8 = ElementFormat("INT8", 8, 6, min_exponent=0, max_exponent=0, max_value=127 / 64)


def mx_round_trip(weight_NK: Tensor, element: ElementFormat) -> Tensor:
    """Return the float32 values of the matrix's MX form, in blocks along the last axis.

    A short last block is taken as it is. Raises QuantizationError where a weight is not finite
    (the specification leaves the conversion of NaN and infinity to the implementation).
    """
    num_rows, num_inputs = weight_NK.shape
    blocks = padded_to_blocks(weight_NK.double()).reshape(num_rows, -1, BLOCK_SIZE)
    scales = torch.exp2(scale_exponents(blocks, element).double())[..., None]
    rounded = round_to_element(blocks / scales, element) * scales
    return rounded.reshape(num_rows, -1)[:, :num_inputs].to(torch.float32).contiguous()


def padded_to_blocks(weight_NK: Tensor) -> Tensor:
    """Return the matrix with zeros up to whole blocks. Raises QuantizationError if not finite."""
    if not bool(torch.isfinite(weight_NK).all()):
        raise QuantizationError(
            "expected finite weights to quantize, got NaN or infinity; is the checkpoint damaged?"
        )
    return torch.nn.functional.pad(weight_NK, (0, -weight_NK.shape[1] % BLOCK_SIZE))


def scale_exponents(blocks_NGB: Tensor, element: ElementFormat) -> Tensor:
    """Return the shared scales' exponents, (N, G), integers that E8M0 can hold."""
    largest_NG = blocks_NGB.abs().amax(dim=-1)
    # frexp: largest = m · 2^e with 0.5 ≤ m < 1, so floor(log2) is e − 1, exactly
    exponents_NG = torch.frexp(largest_NG).exponent - 1 - element.max_exponent
    exponents_NG = exponents_NG.where(largest_NG > 0, torch.zeros_like(exponents_NG))
    return exponents_NG.clamp(-_E8M0_LIMIT, _E8M0_LIMIT)


def round_to_element(values: Tensor, element: ElementFormat) -> Tensor:
    """Round to the nearest numbers of the element format, ties to even, saturated (float64)."""
    values = values.double()
    exponents = (torch.frexp(values).exponent - 1).clamp(min=element.min_exponent)
    steps = torch.exp2((exponents - element.mantissa_bits).double())
    return ((values / steps).round() * steps).clamp(-element.max_value, element.max_value)


def mx_num_bytes(weight_NK: Tensor, bits: int) -> int:
    """Return the matrix's bytes in an MX format: `bits` an element, one byte of scale a block."""
    num_rows, num_inputs = weight_NK.shape
    num_blocks = -(-num_inputs // BLOCK_SIZE)
    return -(-num_rows * num_inputs * bits // 8) + num_rows * num_blocks
