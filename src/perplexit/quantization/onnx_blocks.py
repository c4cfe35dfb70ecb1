"""An ONNX graph's weight matrices → blocks of integers, by ONNX Runtime's own quantizer.

Shape suffixes: K = summed axis, N = outputs, G = blocks of the summed axis.
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

# The quantizer's own kernels. Its Python module would configure the process's root logger when
# it is imported, and holds the model as one protobuf, which ends at 2 GiB.
from onnxruntime.capi._pybind_state import quantize_matmul_4bits, quantize_matmul_8bits

from perplexit.errors import QuantizationError
from perplexit.quantization.precisions import WeightBlocks

# MatMulNBits: 0 lets the engine choose; 1 = activations stay float32; 2, 3 = float16, bfloat16;
# 4 = activations are rounded to int8 too, block by block, while it runs.
ACCURACY_LEVEL = 1
_DOMAIN = "com.microsoft"


@dataclass(frozen=True)
class QuantizedWeight:
    """One weight as the program holds it.

    name:       the checkpoint's name.
    codes_NGB:  uint8, two 4-bit codes a byte (the low half first) or one 8-bit code.
    scales_NG:  float32.
    num_summed: K; the last block may be padded.
    transposed: the checkpoint holds N × K (a Linear), not K × N (a Conv1D).
    """

    name: str
    codes_NGB: NDArray[np.uint8]
    scales_NG: NDArray[np.float32]
    num_summed: int
    transposed: bool
    blocks: WeightBlocks

    @property
    def num_bytes(self) -> int:
        """Return bytes of codes and scales."""
        return self.codes_NGB.nbytes + self.scales_NG.nbytes

    def dequantized(self) -> NDArray[np.float32]:
        """Return the weight that the codes stand for, in the checkpoint's own layout."""
        codes = self.codes_NGB
        if self.blocks.bits == 4:
            codes = np.stack((codes & 0xF, codes >> 4), axis=-1).reshape(*codes.shape[:2], -1)
        middle = np.float32(1 << (self.blocks.bits - 1))
        weight_NK = ((codes - middle) * self.scales_NG[..., None]).reshape(len(codes), -1)
        weight_NK = weight_NK[:, : self.num_summed]
        return weight_NK if self.transposed else np.ascontiguousarray(weight_NK.T)


def quantize_weights(
    model: ir.Model, blocks: WeightBlocks, *, keep: Collection[str]
) -> list[QuantizedWeight]:
    """Replace every MatMul and Gemm by a constant matrix with MatMulNBits; return the weights.

    Weights named in `keep` are left, and so is all inside subgraphs (the perplexity head's).
    Raises QuantizationError where nothing was replaced.
    """
    quantized: dict[str, tuple[QuantizedWeight, ir.Value, ir.Value]] = {}
    done = []
    for node in list(model.graph):
        value, transposed = _constant_weight(node) or (None, False)
        if value is None or value.name in keep:
            continue
        name = str(value.name)
        if name not in quantized:
            quantized[name] = _quantized(model.graph, value, transposed, blocks)
        weight, codes, scales = quantized[name]
        _replace(model.graph, node, weight, codes, scales)
        done.append(weight)
    if not done:
        raise QuantizationError(
            "expected matrix products by constant weights to quantize, found none in the "
            "exported graph: its figures would be full-precision ones; compile it without "
            "a quantization"
        )
    model.graph.opset_imports[_DOMAIN] = 1
    RemoveUnusedNodesPass()(model)
    return done


def large_tensors(model: ir.Model, *, share: float, num_parameters: int) -> tuple[str, ...]:
    """Return the floating-point matrices with at least `share` of the parameters, largest first."""
    sizes = {
        str(value.name): int(np.prod(value.const_value.shape.numpy()))
        for value in model.graph.initializers.values()
        if value.const_value is not None
        and len(value.const_value.shape) >= 2
        and value.const_value.dtype.is_floating_point()
        and not str(value.name).endswith(_SCALES)
    }
    large = [name for name, size in sizes.items() if size >= share * num_parameters]
    return tuple(sorted(large, key=lambda name: (-sizes[name], name)))


def weight_bytes(model: ir.Model) -> int:
    """Return the bytes of all the graph's constants: what its weights cost on disk."""
    return sum(
        value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value
    )


_SCALES = ".scales"


def _constant_weight(node: ir.Node) -> tuple[ir.Value, bool] | None:
    """Return (the constant matrix that the node multiplies by, whether it is transposed)."""
    if node.op_type not in ("MatMul", "Gemm") or node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type == "Gemm" and not _is_plain_gemm(node):
        return None
    value, transposed = node.inputs[1], node.attributes.get_int("transB", 0) == 1
    producer = value.producer() if value is not None else None
    if producer is not None and producer.op_type == "Transpose":
        value, transposed = producer.inputs[0], not transposed
    if value is None or value.const_value is None or len(value.const_value.shape) != 2:
        return None
    is_float = value.const_value.dtype == ir.DataType.FLOAT
    return (value, transposed) if value.is_initializer() and is_float else None


def _is_plain_gemm(node: ir.Node) -> bool:
    attributes = node.attributes
    factors = attributes.get_float("alpha", 1.0), attributes.get_float("beta", 1.0)
    return factors == (1.0, 1.0) and attributes.get_int("transA", 0) == 0


def _quantized(
    graph: ir.Graph, value: ir.Value, transposed: bool, blocks: WeightBlocks
) -> tuple[QuantizedWeight, ir.Value, ir.Value]:
    if value.const_value is None:
        raise QuantizationError(f"expected a constant, got {value.name}")
    weight = value.const_value.numpy()
    weight_KN = np.ascontiguousarray(weight.T if transposed else weight)
    codes_NGB, scales_NG = _blocks_of(weight_KN, blocks)
    name = str(value.name)
    record = QuantizedWeight(name, codes_NGB, scales_NG, len(weight_KN), transposed, blocks)
    return (
        record,
        _initializer(graph, f"{name}.codes", codes_NGB),
        _initializer(graph, f"{name}{_SCALES}", scales_NG),
    )


def _blocks_of(
    weight_KN: NDArray[np.float32], blocks: WeightBlocks
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    num_summed, num_outputs = weight_KN.shape
    num_blocks = -(-num_summed // blocks.block_size)
    padding = num_blocks * blocks.block_size - num_summed
    padded_KN = np.ascontiguousarray(np.pad(weight_KN, ((0, padding), (0, 0))))
    block_bytes = blocks.block_size * blocks.bits // 8
    codes_NGB = np.zeros((num_outputs, num_blocks, block_bytes), np.uint8)
    scales_NG = np.zeros((num_outputs, num_blocks), np.float32)
    unused_zero_points = np.zeros((num_outputs, num_blocks), np.uint8)
    quantize = quantize_matmul_4bits if blocks.bits == 4 else quantize_matmul_8bits
    sizes = blocks.block_size, num_outputs, num_summed
    quantize(codes_NGB, padded_KN, scales_NG, unused_zero_points, *sizes, True)  # symmetric
    return codes_NGB, scales_NG


def _initializer(graph: ir.Graph, name: str, array: NDArray[np.generic]) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
    value.const_value = tensor
    graph.register_initializer(value)
    return value


def _replace(
    graph: ir.Graph, node: ir.Node, weight: QuantizedWeight, codes: ir.Value, scales: ir.Value
) -> None:
    """Put MatMulNBits in the node's place (with an Add where a Gemm had a bias)."""
    product = ir.node(
        "MatMulNBits",
        [node.inputs[0], codes, scales],
        attributes={
            "K": weight.num_summed,
            "N": len(weight.codes_NGB),
            "bits": weight.blocks.bits,
            "block_size": weight.blocks.block_size,
            "accuracy_level": ACCURACY_LEVEL,
        },
        domain=_DOMAIN,
        name=f"{node.name}_blocks",
    )
    new = [product]
    bias = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
    if bias is not None:
        new.append(ir.node("Add", [product.outputs[0], bias], name=f"{node.name}_bias"))
    result, old = new[-1].outputs[0], node.outputs[0]
    result.name, result.shape, result.type = old.name, old.shape, old.type
    ir.convenience.replace_nodes_and_values(graph, node, [node], new, [old], [result])
