"""Weight formats that are applied on loading: each matrix becomes the floats its codes stand for.

No kernel computes in these formats on a CPU, so the arithmetic is the session's own dtype; the
losses are those of the format, memory and speed are not.

Shape suffixes: N = outputs, K = inputs.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from perplexit.quantization.group_quantization import dequantize_groups, quantize_groups
from perplexit.quantization.matrices import Matrix
from perplexit.quantization.mx_formats import (
    FP6_E2M3,
    FP6_E3M2,
    INT8,
    ElementFormat,
    mx_num_bytes,
    mx_round_trip,
)

# A matrix in float32 → the values after a round trip through the format, and the format's bytes.
RoundTrip = Callable[[Tensor], tuple[Tensor, int]]


def group_round_trip(weight_NK: Tensor) -> tuple[Tensor, int]:
    """Return q4f16_0's values of the matrix, and its bytes."""
    quantized = quantize_groups(weight_NK.cpu().numpy())
    return torch.from_numpy(dequantize_groups(quantized)), quantized.num_bytes


def _mx(element: ElementFormat) -> RoundTrip:
    def round_trip(weight_NK: Tensor) -> tuple[Tensor, int]:
        return mx_round_trip(weight_NK, element), mx_num_bytes(weight_NK, element.bits)

    return round_trip


ROUND_TRIPS: Mapping[str, RoundTrip] = {
    "mxfp6": _mx(FP6_E2M3),
    "mxfp6_e3m2": _mx(FP6_E3M2),
    "mxint8": _mx(INT8),
    "q4f16_0": group_round_trip,
    "q4f16_2": group_round_trip,
}


def quantize_matrices(model: nn.Module, matrices: list[Matrix], precision: str) -> dict[str, int]:
    """Change the weights in place; return each matrix's bytes in the format, by module name."""
    del model
    return round_trip_matrices(matrices, ROUND_TRIPS[precision])


def round_trip_matrices(matrices: list[Matrix], round_trip: RoundTrip) -> dict[str, int]:
    """Change each weight, also one that two modules share, once; see `quantize_matrices`."""
    num_bytes: dict[str, int] = {}
    done: dict[int, int] = {}
    for matrix in matrices:
        key = id(matrix.module.weight)
        if key not in done:
            weight_NK = matrix.inputs_last
            values_NK, done[key] = round_trip(weight_NK.float().contiguous())
            weight_NK.copy_(values_NK)
            num_bytes[matrix.name] = done[key]
        else:
            num_bytes[matrix.name] = 0  # its bytes are counted with the module it shares them with
    return num_bytes
