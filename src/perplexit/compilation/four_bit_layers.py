"""Linear layers whose weights stay packed inside the program: MLC-LLM's q4f16 groups of 32.

Shape suffixes: N = outputs, K = inputs, S = packed bytes per row, G = groups per row.
"""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from perplexit.errors import QuantizationError
from perplexit.program_record import ProgramQuantization
from perplexit.quantization.group_quantization import GROUP_SIZE, MAX_CODE, quantize_groups


class FourBitMatrix(nn.Module):
    """A matrix (N, K) as 4-bit codes, two a byte, eight a little-endian word; float16 scales.

    Both are parameters, not buffers: compilers take buffers for constants, unpack them beforehand
    and write float32 weights into the program.
    """

    def __init__(self, weight_NK: Tensor) -> None:
        super().__init__()
        packed = quantize_groups(weight_NK.detach().float().numpy())
        self.num_inputs = packed.num_inputs
        self.num_bytes = packed.num_bytes
        self.packed_NS = _constant(packed.packed_NS.view("uint8"))
        self.scales_NG = _constant(packed.scales_NG)

    def unpacked(self, packed_NS: Tensor, scales_NG: Tensor) -> Tensor:
        """Return float32 rows, (N, K): `(code − 7) · scale`."""
        # by arithmetic on small whole numbers, which is exact: not every compiler has shifts
        both = packed_NS.float()
        second = torch.floor(both / 16)
        codes = torch.stack((both - 16 * second, second), dim=-1)
        centred = codes.reshape(*scales_NG.shape, GROUP_SIZE) - MAX_CODE
        weight = centred * scales_NG.float()[..., None]
        return weight.reshape(scales_NG.shape[0], -1)[:, : self.num_inputs]


def _constant(array: NDArray[Any]) -> nn.Parameter:
    return nn.Parameter(torch.from_numpy(array.copy()), requires_grad=False)


class FourBitLinear(nn.Module):
    """Stands in for a Linear (or GPT-2's Conv1D, whose weight is its transpose)."""

    def __init__(self, matrix: FourBitMatrix, bias: Tensor | None) -> None:
        super().__init__()
        self.matrix, self.bias = matrix, bias

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, K) → (…, N)."""
        weight_NK = self.matrix.unpacked(self.matrix.packed_NS, self.matrix.scales_NG)
        return nn.functional.linear(x, weight_NK, self.bias)


class FourBitEmbedding(nn.Module):
    """Stands in for an Embedding: the rows looked up are unpacked, no others."""

    matrix: FourBitMatrix

    def __init__(self, matrix: FourBitMatrix, scale: float | None) -> None:
        super().__init__()
        self.matrix, self.scale = matrix, scale

    def forward(self, ids: Tensor) -> Tensor:
        """Map (…) → (…, D)."""
        flat = ids.flatten()
        rows = self.matrix.unpacked(
            self.matrix.packed_NS.index_select(0, flat), self.matrix.scales_NG.index_select(0, flat)
        )
        states = rows.reshape(*ids.shape, -1)
        return states if self.scale is None else states * self.scale


def pack_model(model: Any, *, with_embedding_and_head: bool) -> tuple[int, int]:
    """Pack every matrix of the model in place; return (modules replaced, their bytes).

    Tied matrices stay one. Raises QuantizationError where there was nothing to pack.
    """
    kept = () if with_embedding_and_head else (model.get_output_embeddings(),)
    shared: dict[int, FourBitMatrix] = {}
    num_modules = 0
    for name, module in list(model.named_modules()):
        packed = _packed(module, shared, with_embedding_and_head)
        if packed is None or any(module is other for other in kept):
            continue
        model.set_submodule(name, packed)
        num_modules += 1
    if not num_modules:
        raise QuantizationError(
            "expected matrices to pack in groups of 32, found none; compile without a quantization"
        )
    return num_modules, sum(matrix.num_bytes for matrix in shared.values())


def record_of(model: Any, name: str, packed: tuple[int, int], num_parameters: int) -> Any:
    """Return the quantization's record, counted on the packed model."""
    stored = {id(x): x for x in (*model.parameters(), *model.buffers())}.values()
    num_bytes = sum(x.numel() * x.element_size() for x in stored)
    large = sorted(
        name
        for name, x in model.named_parameters()
        if x.is_floating_point() and x.numel() >= 0.01 * num_parameters and "scales_" not in name
    )
    return ProgramQuantization(
        name=name,
        library="perplexit (MLC-LLM's format), unpacked inside the program",
        num_modules=packed[0],
        num_bytes=packed[1],
        effective_bits=8 * num_bytes / num_parameters,
        unquantized=tuple(large),
        settings={"group_size": GROUP_SIZE, "bits": 4, "scales": "float16"},
    )


def _packed(module: nn.Module, shared: dict[int, FourBitMatrix], embedding: bool) -> Any:
    any_module: Any = module
    if embedding and isinstance(module, nn.Embedding):
        scale = getattr(module, "embed_scale", None)  # Gemma's embedding multiplies
        matrix = _matrix(module.weight, module.weight, shared)
        return FourBitEmbedding(matrix, None if scale is None else float(scale))
    kind = type(module).__name__
    if kind not in ("Linear", "Conv1D"):
        return None
    weight = any_module.weight if kind == "Linear" else any_module.weight.T
    return FourBitLinear(_matrix(any_module.weight, weight, shared), any_module.bias)


def _matrix(key: Tensor, weight_NK: Tensor, shared: dict[int, FourBitMatrix]) -> FourBitMatrix:
    if id(key) not in shared:
        shared[id(key)] = FourBitMatrix(weight_NK)
    return shared[id(key)]
