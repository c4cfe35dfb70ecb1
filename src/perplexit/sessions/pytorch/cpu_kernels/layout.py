"""Which kernels a loaded model runs on: those of transformers, or the packed ones of this package.

A model that was loaded only for scoring may be laid out for it. That changes rounding, nothing
else: the model's logits for a few fixed ids are compared before and after, and a model that would
give others is restored. In bfloat16 "others" means farther from the same model in float32 than its
own bfloat16 forward is.
"""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from perplexit.checkpoints.own_logits import OwnLogits
from perplexit.errors import UsageError
from perplexit.resources.engine_tricks import is_on
from perplexit.resources.memory_advice import return_freed_memory
from perplexit.sessions.pytorch.cpu_kernels.fused_mlp import fuse_mlps, restore_forwards
from perplexit.sessions.pytorch.cpu_kernels.packed_linear import (
    PACKED_DTYPES,
    pack_linears,
    unpack_linears,
    why_no_packing,
)
from perplexit.sessions.pytorch.cpu_kernels.window_threads import ForwardTrace
from perplexit.sessions.pytorch.loading import OpenedModule

KERNELS = ("packed", "plain")
_ENVIRONMENT = "PERPLEXIT_KERNELS"
_PROBE_SHAPE = (1, 133)  # no multiple of a kernel's tile
# Of the logits' spread, as root mean squares: additions in another order, through all layers.
_TOLERANCE = 1e-4
# How much farther from float32 than the model's own bfloat16 forward, whose distance varies.
_MOST_FARTHER = 1.25
_OTHER_LOGITS = {
    torch.float32: "packed products would give the model other logits",
    torch.bfloat16: f"packed products would be farther from float32 than {_MOST_FARTHER} times the "
    "model's own bfloat16 forward",
}
_PLAIN: Mapping[str, Any] = {"kernels": "plain"}


def chosen_kernels(name: str | None) -> str:
    """Return `packed` or `plain`: the given name, else PERPLEXIT_KERNELS, else packed."""
    source = "kernels" if name is not None else _ENVIRONMENT
    chosen = name or os.environ.get(_ENVIRONMENT) or KERNELS[0]
    if chosen not in KERNELS:
        raise UsageError(f"expected {source} to be {' or '.join(KERNELS)}, got {chosen!r}")
    return chosen


def heads_in_blocks(name: str | None) -> bool:
    """Return whether linear heads may make their logits in blocks; see LinearHead."""
    return chosen_kernels(name) != "plain" and is_on("head_blocks")


def kernels_for(
    opened: OpenedModule, name: str | None, *, compiled: bool = False
) -> Mapping[str, Any]:
    """Choose the kernels of a module and pack its weights in place; return the record's entries.

    A module that was handed in belongs to its owner, a compiled one to torch.compile; quantized
    layers and adapters have products of their own. Off the CPU, and in dtypes without packed
    products, there is nothing to pack.
    """
    chosen = chosen_kernels(name)
    own = opened.quantization is None and (opened.adapter is None or opened.adapter.merged)
    alone = opened.group is None and not opened.spread and opened.device.type == "cpu"
    if chosen == "plain" or compiled or opened.source is None or not (own and alone):
        return _PLAIN
    if not is_on("packed_linear"):
        return {**_PLAIN, "kernels_reason": "packed_linear is switched off (PERPLEXIT_WITHOUT)"}
    return pack_model(opened.module)


def pack_model(model: nn.Module) -> Mapping[str, Any]:
    """Pack the model where that gives its own logits; return what it runs on, for the record.

    Where it does not, or where PyTorch has no such products, the record says why.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if dtype not in PACKED_DTYPES:
        return _PLAIN
    reason = why_no_packing(dtype)
    if reason is not None:
        return {**_PLAIN, "kernels_reason": reason}
    try:
        own = OwnLogits.of(model, _PROBE_SHAPE, tolerance=_TOLERANCE, most_farther=_MOST_FARTHER)
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        return {**_PLAIN, "kernels_reason": f"the probe does not run ({type(error).__name__})"}
    try:
        num_linears = pack_linears(model)
        if not num_linears:
            return _PLAIN
        num_mlps = fuse_mlps(model)
        trace = ForwardTrace(model)
        reason = None if own.why_not(model) is None else _OTHER_LOGITS[dtype]
    except (RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
        reason = f"the packed model does not run ({type(error).__name__})"
    if reason is not None:
        restore_forwards(model)
        unpack_linears(model)
        return {**_PLAIN, "kernels_reason": reason}
    return_freed_memory()  # the plain weights
    return {
        "kernels": "packed",
        "packed_linears": num_linears,
        "fused_mlps": num_mlps,
        "windows_side_by_side": is_on("window_threads") and trace.leaves_nothing(),
    }
