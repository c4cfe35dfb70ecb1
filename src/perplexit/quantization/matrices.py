"""The weight matrices of a loaded PyTorch model: which are quantized, and which are left alone."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from perplexit.checkpoints.module_call import input_embedding, output_layer
from perplexit.errors import QuantizationError
from perplexit.quantization.group_quantization import dequantize_groups, quantize_groups
from perplexit.quantization.mx_formats import (
    FP6_E2M3,
    FP6_E3M2,
    INT8,
    ElementFormat,
    mx_num_bytes,
    mx_round_trip,
)

# A matrix with less of the model's parameters than this is not worth naming when it is left alone.
_SHARE_WORTH_NAMING = 0.005


@dataclass(frozen=True)
class Matrix:
    """One weight matrix: the module that owns it, and the module's name in the model."""

    name: str
    module: Any

    @property
    def inputs_last(self) -> Tensor:
        """Return a view of shape NK: the inputs, which a product sums over, as the last axis."""
        weight: Tensor = self.module.weight
        return weight.detach().t() if isinstance(self.module, Conv1D) else weight.detach()


def matrices_of(model: nn.Module, *, head: bool, embeddings: bool) -> list[Matrix]:
    """Return the model's linear layers (and Conv1D), with head and embeddings where asked for.

    Raises QuantizationError where there is none: its figures would be full-precision ones.
    """
    output = output_layer(model)
    kinds = (nn.Linear, Conv1D, nn.Embedding) if embeddings else (nn.Linear, Conv1D)
    found = [
        Matrix(name, module)
        for name, module in model.named_modules()
        if isinstance(module, kinds) and (head or module is not output)
    ]
    if not found:
        raise QuantizationError(
            f"expected linear layers to quantize, found none in {type(model).__name__}: its "
            "figures would be full-precision ones; leave the quantization out"
        )
    return found


def head_is_tied(model: nn.Module) -> bool:
    """Return whether the head shares the embedding's weight."""
    head, embedding = output_layer(model), input_embedding(model)
    return head is not None and embedding is not None and head.weight is embedding.weight


def untie_head(model: Any) -> None:
    """Give a tied head a weight of its own: quantizing it then leaves the embedding as it is."""
    head: Any = output_layer(model)
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False


def as_linear(model: nn.Module, matrix: Matrix) -> Matrix:
    """Return the matrix in a plain linear layer; a Conv1D, which no library knows, is replaced."""
    module = matrix.module
    if not isinstance(module, Conv1D):
        return matrix
    weight_KN = module.weight.detach()
    num_inputs, num_outputs = weight_KN.shape
    linear = nn.Linear(num_inputs, num_outputs, bias=module.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight_KN.t().contiguous(), requires_grad=False)
    if module.bias is not None:
        linear.bias = nn.Parameter(module.bias.detach(), requires_grad=False)
    replace_module(model, matrix.name, linear)
    return Matrix(matrix.name, linear)


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where the model has the submodule `name`."""
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def large_matrices(parameters: dict[str, Tensor], num_parameters: int) -> tuple[str, ...]:
    """Return the names of the matrices worth naming, largest first."""
    large = {
        name: tensor.numel()
        for name, tensor in parameters.items()
        if tensor.ndim >= 2 and tensor.numel() >= _SHARE_WORTH_NAMING * num_parameters
    }
    return tuple(sorted(large, key=lambda name: (-large[name], name)))


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
