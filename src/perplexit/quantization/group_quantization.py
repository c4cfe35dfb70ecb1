"""Group quantization: MLC-LLM's `q4f16_0`, 4-bit codes in groups of 32 with one float16 scale.

The format (MLC-LLM's `GroupQuantize` with `quantize_dtype="int4"`, `group_size=32`):

    scale = float16(max |w| / 7)                 over the 32 weights of a group
    code  = clip(round(w / scale + 7), 0, 14)    unsigned, 4 bits; 7 stands for zero
    w'    = (code − 7) · scale

A group runs along the input axis (the axis that a matrix product sums over); the last one of a row
may be short, and is stored as if zeros followed. Eight codes lie in one uint32, the first in its
lowest four bits. MLC-LLM rounds the weights to float16 first; here they are taken as they are.

Shape suffixes: N = outputs (rows), K = inputs, G = groups of a row, S = uint32 words of a row.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from perplexit.errors import QuantizationError

GROUP_SIZE = 32
MAX_CODE = 7  # 2^(4 − 1) − 1: the largest code on either side of zero
_BITS = 4
_CODES_A_WORD = 32 // _BITS
_SHIFTS = np.arange(_CODES_A_WORD, dtype=np.uint32) * _BITS


@dataclass(frozen=True, slots=True)
class GroupQuantized:
    """A matrix in 4 bits.

    packed_NS:  uint32, 4 · G words per row; scales_NG: float16; num_inputs: K.
    """

    packed_NS: NDArray[np.uint32]
    scales_NG: NDArray[np.float16]
    num_inputs: int

    @property
    def num_bytes(self) -> int:
        """Return bytes of codes and scales: 4.5 bits a weight where K is a multiple of 32."""
        return self.packed_NS.nbytes + self.scales_NG.nbytes


def quantize_groups(weight_NK: NDArray[np.floating]) -> GroupQuantized:
    """Return the matrix in groups of 32 along its last axis.

    Ties round to even. A group whose scale rounds to zero becomes zero. Raises QuantizationError
    where a weight is not finite, or too large for a float16 scale (above 7 · 65504).
    """
    weight_NK = np.ascontiguousarray(weight_NK, dtype=np.float32)
    num_outputs, num_inputs = weight_NK.shape
    num_groups = -(-num_inputs // GROUP_SIZE)
    padding = num_groups * GROUP_SIZE - num_inputs
    if padding:
        weight_NK = np.pad(weight_NK, ((0, 0), (0, padding)))
    groups = weight_NK.reshape(num_outputs, num_groups, GROUP_SIZE)
    scales_NG = _scales(np.abs(groups).max(axis=-1))
    divisors = scales_NG.astype(np.float32)
    divisors[divisors == 0] = np.inf  # a group of zeros, or of weights below half the least scale
    codes = np.rint(groups / divisors[..., None] + np.float32(MAX_CODE))
    codes = np.clip(codes, 0, 2 * MAX_CODE).astype(np.uint8)
    return GroupQuantized(_packed(codes.reshape(num_outputs, -1)), scales_NG, num_inputs)


def dequantize_groups(quantized: GroupQuantized) -> NDArray[np.float32]:
    """Return the float32 matrix, N × K, that the codes stand for: `(code − 7) · scale`, exactly."""
    num_outputs, num_groups = quantized.scales_NG.shape
    codes = codes_of(quantized).astype(np.int8).reshape(num_outputs, num_groups, GROUP_SIZE)
    weight = (codes - np.int8(MAX_CODE)) * quantized.scales_NG.astype(np.float32)[..., None]
    weight_NK: NDArray[np.float32] = weight.reshape(num_outputs, -1)[:, : quantized.num_inputs]
    return np.ascontiguousarray(weight_NK)


def codes_of(quantized: GroupQuantized) -> NDArray[np.uint8]:
    """Return the codes one a byte, N × 32·G, those of the padding (7) included."""
    words = quantized.packed_NS[..., None] >> _SHIFTS
    return (words & np.uint32(0xF)).astype(np.uint8).reshape(len(quantized.packed_NS), -1)


def _scales(largest_NG: NDArray[np.float32]) -> NDArray[np.float16]:
    if not np.isfinite(largest_NG).all():
        raise QuantizationError(
            "expected finite weights to quantize, got NaN or infinity; is the checkpoint damaged?"
        )
    if (limit := float(np.finfo(np.float16).max) * MAX_CODE) < float(largest_NG.max(initial=0.0)):
        raise QuantizationError(
            f"expected weights of at most {limit:g}, whose float16 scale is finite, got "
            f"{float(largest_NG.max()):g}; this model cannot be held in a q4f16 format"
        )
    return (largest_NG / np.float32(MAX_CODE)).astype(np.float16)


def _packed(codes_NK: NDArray[np.uint8]) -> NDArray[np.uint32]:
    by_word = codes_NK.reshape(len(codes_NK), -1, _CODES_A_WORD).astype(np.uint32)
    packed_NS: NDArray[np.uint32] = np.bitwise_or.reduce(by_word << _SHIFTS, axis=-1)
    return packed_NS
