"""torchao's recipes: int8 and int4 weights, 8da4w, and the MX formats it has numbers for.

Shape suffixes: N = outputs, K = inputs.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.mx_tensor import MXTensor
from torchao.quantization import (
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    quantize_,
)
from torchao.quantization.granularity import PerGroup

from perplexit.errors import QuantizationError
from perplexit.quantization.matrices import Matrix, RoundTrip, as_linear, round_trip_matrices
from perplexit.quantization.mx_formats import BLOCK_SIZE, mx_num_bytes, padded_to_blocks

_GROUP_SIZE = 32
_INT4: Any = getattr(torch, "int4")  # noqa: B009 - torch defines it where type checkers do not look
_CONFIGS = {
    "int8": lambda: Int8WeightOnlyConfig(set_inductor_config=False),
    "int4": lambda: IntxWeightOnlyConfig(_INT4, PerGroup(_GROUP_SIZE)),
    "8da4w": lambda: Int8DynamicActivationIntxWeightConfig(
        weight_dtype=_INT4, weight_granularity=PerGroup(_GROUP_SIZE)
    ),
}
_MX_ELEMENTS = {
    "mxfp4": (torch.float4_e2m1fn_x2, 4),
    "mxfp8": (torch.float8_e4m3fn, 8),
    "mxfp8_e5m2": (torch.float8_e5m2, 8),
}


def quantize_matrices(model: nn.Module, matrices: list[Matrix], precision: str) -> dict[str, int]:
    """Quantize in place; return each matrix's bytes, scales included, by module name.

    Matrices whose inputs are no multiple of the groups of 32 are left alone.
    """
    if precision in _MX_ELEMENTS:
        return round_trip_matrices(matrices, _mx_round_trip(*_MX_ELEMENTS[precision]))
    wanted = {
        m.name: as_linear(model, m)
        for m in matrices
        if precision == "int8" or m.inputs_last.shape[1] % _GROUP_SIZE == 0
    }
    quantize_(model, _CONFIGS[precision](), filter_fn=lambda _, name: name in wanted)
    return {name: _num_bytes(matrix.module, precision) for name, matrix in wanted.items()}


def _num_bytes(module: Any, precision: str) -> int:
    """Count codes at their nominal bits (torchao stores a 4-bit code in a byte), and scales."""
    weight = module.weight
    codes, scale = getattr(weight, "qdata", None), getattr(weight, "scale", None)
    if not isinstance(codes, Tensor) or not isinstance(scale, Tensor):
        raise QuantizationError(
            f"expected torchao to quantize every layer to {precision}, but one of "
            f"{tuple(module.weight.shape)} is still {type(weight).__name__}; another version of "
            "torchao may behave differently: pip install 'perplexit[quantization]'"
        )
    bits = 8 if precision == "int8" else 4
    return codes.numel() * bits // 8 + scale.numel() * scale.element_size()


def _mx_round_trip(element: torch.dtype, bits: int) -> RoundTrip:
    """Return the round trip in blocks of 32 with the MX specification's scale (torchao's FLOOR)."""

    def round_trip(weight_NK: Tensor) -> tuple[Tensor, int]:
        narrow = MXTensor.to_mx(
            padded_to_blocks(weight_NK),
            element,
            BLOCK_SIZE,
            scaling_mode=ScaleCalculationMode.FLOOR,
        )
        values = narrow.dequantize(torch.float32)[:, : weight_NK.shape[1]]
        return values, mx_num_bytes(weight_NK, bits)

    return round_trip
