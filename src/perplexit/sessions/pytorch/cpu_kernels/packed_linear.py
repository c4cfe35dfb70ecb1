"""Linear layers whose weights lie in memory as oneDNN's matrix products want them (on the CPU).

Laid out once, at load, the same product runs 10 to 20 % faster in float32 and up to 40 % faster in
bfloat16 than over the rows of a plain weight, at every number of rows from one on.

Shape suffixes: O = outputs, I = inputs, X = any leading axes.
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from perplexit.checkpoints.module_call import output_layer
from perplexit.resources.memory_advice import MappedFiles

PACKED_DTYPES = (torch.float32, torch.bfloat16)


class PackedLinear(nn.Module):
    """As the `nn.Linear` or transformers `Conv1D` that it is made of, with the weight packed.

    `state_dict` holds the weight in its plain form, so that a saved model is as it was.
    """

    bias: nn.Parameter | None

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        weight_OI, bias = _weight(layer), layer.bias
        self.is_transposed = isinstance(layer, Conv1D)
        self.out_features, self.in_features = weight_OI.shape
        self.dtype = weight_OI.dtype
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI, None)
        self.bias = bias if isinstance(bias, nn.Parameter) else None

    @property
    def weight(self) -> Tensor:
        """Return a copy of the weight, in the shape that the layer had before."""
        plain_OI: Tensor = self._packed.to_dense()
        return plain_OI.t().contiguous() if self.is_transposed else plain_OI

    def forward(self, input: Tensor) -> Tensor:
        """Return `input @ weight.T + bias`."""
        return self.product(input)

    def product(self, input_XI: Tensor, activation: str = "none", algorithm: str = "") -> Tensor:
        """Return `activation(input @ weight.T + bias)`, applied before the result leaves the cache.

        activation: none, swish, relu, or gelu with the algorithm none or tanh.
        """
        out_XO: Tensor = torch.ops.mkldnn._linear_pointwise(
            input_XI, self._packed, self.bias, activation, [], algorithm
        )
        return out_XO

    def product_times(self, input_XI: Tensor, factor_XO: Tensor) -> Tensor:
        """Return `(input @ weight.T + bias) * factor`."""
        out_XO: Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            input_XI, factor_XO, self._packed, self.bias, "mul"
        )
        return out_XO

    def unpacked(self) -> nn.Module:
        """Return a plain layer of the same kind and weights as the one this was made of."""
        layer: Any
        with torch.device("meta"):
            if self.is_transposed:
                layer = Conv1D(self.out_features, self.in_features)  # type: ignore[no-untyped-call]
            else:
                layer = nn.Linear(self.in_features, self.out_features, self.bias is not None)
        layer.weight, layer.bias = nn.Parameter(self.weight, requires_grad=False), self.bias
        plain: nn.Module = layer.eval()
        return plain

    def _save_to_state_dict(self, destination: object, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight  # type: ignore[index]

    def extra_repr(self) -> str:
        """Return what `print(model)` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


def why_no_packing(dtype: torch.dtype) -> str | None:
    """Say why this CPU and this build of PyTorch have no packed products of a dtype; None: they do.

    The operators are private to PyTorch and may change, so a small layer is tried: an operator
    that is missing, takes other arguments or gives other products rules packing out.
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return "this build of PyTorch has no oneDNN"
    generator = torch.Generator().manual_seed(0)
    rows_XI = torch.randn(3, 16, generator=generator).to(dtype)
    try:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return "this CPU has no instructions for bfloat16"  # oneDNN would do it in software
        layer = nn.Linear(16, 8, dtype=dtype).requires_grad_(False)
        packed = PackedLinear(layer)
        plain = layer(rows_XI)
        pairs = [
            (packed(rows_XI), plain),
            (packed.product(rows_XI, "swish"), functional.silu(plain)),
            (packed.product(rows_XI, "gelu", "tanh"), functional.gelu(plain, approximate="tanh")),
            (packed.product_times(rows_XI, plain), plain * plain),
        ]
        same = torch.equal(packed.weight, layer.weight)
    except (AttributeError, TypeError, RuntimeError, NotImplementedError) as error:
        return f"PyTorch's packed products are not the ones known here ({type(error).__name__})"
    near = 1e-4 if dtype == torch.float32 else 3e-2
    if not same or not all(torch.allclose(x, y, rtol=near, atol=near) for x, y in pairs):
        return "PyTorch's packed products give other values than plain ones"
    return None


def pack_linears(model: nn.Module) -> int:
    """Replace the linear layers inside a model by packed ones; return how many there are.

    The plain weights are freed one by one; pages of a mapped file are released.
    Left as they are: the output embedding (which the scoring head reads itself, and which is often
    the input embedding), shared weights, layers with hooks, and whatever is not exactly a linear
    layer with a plain weight.
    """
    output = output_layer(model)
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) in (nn.Linear, Conv1D) and _is_plain(child) and child is not output
    ]
    # Shared weights have one reading of `id` under two modules; embeddings are read too.
    shares = Counter(
        id(weight)
        for module in model.modules()
        if (weight := module._parameters.get("weight")) is not None
    )
    files, packed = MappedFiles.of_this_process(), 0
    while places:
        parent, name, layer = places.pop()
        plain: Any = layer.weight
        if shares[id(plain)] == 1:
            setattr(parent, name, PackedLinear(layer))
            files.forget(plain.data_ptr(), plain.nbytes if plain.is_contiguous() else 0)
            packed += 1
    return packed


def unpack_linears(model: nn.Module) -> None:
    """Put plain layers back in place of the packed ones."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, PackedLinear):
                setattr(parent, name, child.unpacked())


def _is_plain(layer: nn.Module) -> bool:
    weight: object = layer.weight
    if type(weight) is not nn.Parameter or weight.dtype not in PACKED_DTYPES:
        return False
    hooked = layer._forward_hooks or layer._forward_pre_hooks
    return weight.device.type == "cpu" and min(weight.shape) > 0 and not hooked


def _weight(layer: nn.Module) -> Tensor:
    weight: Tensor = layer.weight.detach()  # type: ignore[operator]
    return weight.t().contiguous() if isinstance(layer, Conv1D) else weight.contiguous()
