"""Feed-forward blocks over packed layers, with the activation inside the product before it.

The activations of a block are its largest tensors: written, read and written again, they cost a
tenth of the products themselves. Here `act(x @ gate.T)` and `(x @ up.T) * gated` are written once,
a few hundred rows at a time, so that they are read from the cache. Blocks are known by the names of
their layers and activations by their values; that a fused block gives what the block's own forward
gives is tried on every one of them.

Shape suffixes: N = rows, D = hidden size, X = any leading axes.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from perplexit.functional.nll import equal_blocks
from perplexit.sessions.pytorch.cpu_kernels.packed_linear import PackedLinear

_BLOCK_BYTES = 3 << 19  # of one activation, of which two exist at a time
_PROBE_ROWS = 17  # not a multiple of a kernel's tile
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}  # of the largest value
# What oneDNN calls an activation (name, algorithm), and what that is.
_ACTIVATIONS: dict[tuple[str, str], Callable[[Tensor], Tensor]] = {
    ("swish", ""): functional.silu,
    ("relu", ""): functional.relu,
    ("gelu", "none"): functional.gelu,
    ("gelu", "tanh"): partial(functional.gelu, approximate="tanh"),
}
# The layers by name, from the first to the last, and the activation of the first; a layer between
# them gives what the activations are multiplied with (a gated block).
_BLOCKS = (
    ("gate_proj", "up_proj", "down_proj", "act_fn"),
    ("c_fc", "c_proj", "act"),
    ("fc1", "fc2", "activation_fn"),
    ("dense_h_to_4h", "dense_4h_to_h", "act"),
)


def fuse_mlps(model: nn.Module) -> int:
    """Give the feed-forward blocks of a model a fused forward; return how many got one."""
    count = 0
    for block in model.modules():
        fused = _fused(block)
        if fused is not None and _agrees(block, fused):
            block.forward = fused
            count += 1
    return count


def restore_forwards(model: nn.Module) -> None:
    """Give every block its own forward back."""
    for block in model.modules():
        block.__dict__.pop("forward", None)


def _fused(block: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """Return the fused forward of a block, where its parts are known."""
    parts = dict(block.named_children())
    for *names, activation in _BLOCKS:
        layers = [part for n in names if isinstance(part := parts.get(n), PackedLinear)]
        if len(layers) == len(names):
            named = _named_activation(getattr(block, activation, None))
            if named is not None:
                return partial(_fused_forward, layers, named)
    return None


def _fused_forward(layers: list[PackedLinear], named: tuple[str, str], x: Tensor) -> Tensor:
    """Return `last(act(first(x)))`, or `last(act(first(x)) * up(x))`, a block of rows at a time."""
    first, *factors, last = layers
    out_XD = x.new_empty(*x.shape[:-1], last.out_features)
    for rows_ND, out_ND in _row_blocks(x, out_XD, first.out_features):
        inner = first.product(rows_ND, *named)
        for up in factors:
            inner = up.product_times(rows_ND, inner)
        out_ND.copy_(last.product(inner))
    return out_XD


def _row_blocks(x: Tensor, out: Tensor, width: int) -> Iterator[tuple[Tensor, Tensor]]:
    rows_ND, out_ND = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
    most = max(64, _BLOCK_BYTES // (width * x.element_size()) // 64 * 64)
    return ((rows_ND[block], out_ND[block]) for block in equal_blocks(len(rows_ND), most))


def _named_activation(activation: Any) -> tuple[str, str] | None:
    """Return the name that oneDNN has for an activation, found by its values."""
    if not callable(activation):
        return None
    points = torch.linspace(-30, 30, 2001)
    values = activation(points)
    for named, function in _ACTIVATIONS.items():
        if torch.allclose(values, function(points), rtol=1e-5, atol=1e-6):
            return named
    return None


def _agrees(block: nn.Module, fused: Callable[[Tensor], Tensor]) -> bool:
    layer = next(child for child in block.children() if isinstance(child, PackedLinear))
    dtype = layer.dtype
    rows_ND = torch.randn(
        _PROBE_ROWS, layer.in_features, generator=torch.Generator().manual_seed(0)
    )
    try:
        expected = block(rows_ND.to(dtype)[None])
        got = fused(rows_ND.to(dtype)[None])
    except (TypeError, RuntimeError):
        return False
    if not isinstance(expected, Tensor) or expected.shape != got.shape:
        return False
    scale = float(expected.abs().max())
    return bool((expected - got).abs().max() <= _TOLERANCE[dtype] * max(scale, 1e-6))
