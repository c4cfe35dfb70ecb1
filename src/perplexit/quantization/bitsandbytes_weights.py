"""bitsandbytes' recipes: nf4 and fp4 in blocks of 64, and LLM.int8()."""

from typing import Any

import bitsandbytes
import torch
from bitsandbytes.nn.modules import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from torch import nn

from perplexit.errors import QuantizationError
from perplexit.quantization.matrices import Matrix, as_linear, replace_module

BLOCK_SIZE = 64
OUTLIER_THRESHOLD = 6.0  # LLM.int8(): columns with a larger activation are computed in float16


def quantize_matrices(model: nn.Module, matrices: list[Matrix], precision: str) -> dict[str, int]:
    """Replace the layers; return each matrix's bytes, scales included, by module name."""
    num_bytes = {}
    for matrix in matrices:
        layer = _quantized(as_linear(model, matrix).module, precision)
        replace_module(model, matrix.name, layer)
        num_bytes[matrix.name] = _num_bytes(layer, precision)
    return num_bytes


def _quantized(linear: Any, precision: str) -> Any:
    weight: torch.Tensor = linear.weight
    num_outputs, num_inputs = weight.shape
    plain = weight.detach().cpu()
    layer: Any
    codes: Any
    shape: Any = {"bias": False, "device": "meta"}
    if precision == "llm-int8":
        layer = Linear8bitLt(
            num_inputs, num_outputs, has_fp16_weights=False, threshold=OUTLIER_THRESHOLD, **shape
        )
        codes = Int8Params(plain, requires_grad=False, has_fp16_weights=False)
    else:
        kind: Any = {"quant_type": precision, "compress_statistics": False}
        layer = Linear4bit(  # type: ignore[no-untyped-call]
            num_inputs, num_outputs, compute_dtype=weight.dtype, **kind, **shape
        )
        codes = Params4bit(plain, requires_grad=False, blocksize=BLOCK_SIZE, module=layer, **kind)
        # On CPUs with AVX512-BF16 the first forward pass would repack the codes and round their
        # scales to bfloat16: other losses than elsewhere, and a corrupt state_dict afterwards.
        layer.support_avx512bf16_for_cpu = False
    layer.weight, layer.bias = codes.to(weight.device), linear.bias
    return layer


def _num_bytes(layer: Any, precision: str) -> int:
    codes = layer.weight
    scales = codes.SCB if precision == "llm-int8" else getattr(codes.quant_state, "absmax", None)
    if codes.dtype not in (torch.uint8, torch.int8) or scales is None:
        raise QuantizationError(
            f"expected bitsandbytes {bitsandbytes.__version__} to quantize a layer to {precision}, "
            f"but its weight is still {codes.dtype}; pip install 'perplexit[quantization]'"
        )
    return int(codes.numel() * codes.element_size() + scales.numel() * scales.element_size())
