"""Which products and blocks a loaded model runs on: transformers' own, or the packed ones here.

A model that was loaded for scoring alone may be laid out for it. What that changes is rounding:
the model's logits for a few fixed ids are compared before and after, and a model that would give
others is put back as it was.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from perplexit.errors import UsageError
from perplexit.resources.freed_memory import keep_freed_memory, return_freed_memory
from perplexit.sessions.base import SessionDescription
from perplexit.sessions.pytorch.call import ModuleCall, field_of
from perplexit.sessions.pytorch.causal_attention import use_causal_blocks, use_sdpa
from perplexit.sessions.pytorch.forward import ForwardPass, LinearHead
from perplexit.sessions.pytorch.fused_mlp import fuse_mlps, restore_forwards
from perplexit.sessions.pytorch.fused_norm import fuse_norms
from perplexit.sessions.pytorch.loading import OpenedModule
from perplexit.sessions.pytorch.module import num_embeddings
from perplexit.sessions.pytorch.packed_linear import pack_linears, unpack_linears
from perplexit.sessions.pytorch.threads import ForwardTrace

KERNELS = ("packed", "plain")
_ENVIRONMENT = "PERPLEXIT_KERNELS"
_PROBE_SHAPE = (1, 133)  # more than one block of queries, and no multiple of a tile
# Of the logits' spread, as root mean squares: additions in another order, through all layers.
# In bfloat16 a deep model's own rounding is a twentieth; another computation gives more than one.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.2}
_PLAIN: Mapping[str, Any] = {"kernels": "plain"}


def chosen_kernels(name: str | None) -> str:
    """`packed` or `plain`: as named, else by PERPLEXIT_KERNELS, else packed."""
    source = "kernels" if name is not None else _ENVIRONMENT
    chosen = name or os.environ.get(_ENVIRONMENT) or KERNELS[0]
    if chosen not in KERNELS:
        raise UsageError(f"expected {source} to be {' or '.join(KERNELS)}, got {chosen!r}")
    return chosen


def kernels_for(
    opened: OpenedModule, name: str | None, *, compiled: bool = False
) -> Mapping[str, Any]:
    """What a module runs on from now on, for the record; packed in place where that is meant.

    A module that was handed in stays its owner's, a compiled one torch.compile's; quantized layers
    and adapters have products of their own. Off the CPU, and in dtypes without packed products,
    there is nothing to pack.
    """
    chosen = chosen_kernels(name)
    own = opened.quantization is None and (opened.adapter is None or opened.merged)
    alone = opened.group is None and not opened.spread and opened.device.type == "cpu"
    if chosen == "plain" or compiled or opened.source is None or not (own and alone):
        return _PLAIN
    return pack_model(opened.module)


def with_kernels(
    description: SessionDescription, kernels: Mapping[str, Any], forward: ForwardPass
) -> SessionDescription:
    """The description with the kernels among the settings, and whether the head runs in blocks."""
    blocked = isinstance(forward.head, LinearHead) and forward.head.blocked
    settings = {**description.settings, **kernels, "head_in_blocks": blocked}
    return replace(description, settings=settings)


def pack_model(model: nn.Module) -> Mapping[str, Any]:
    """What the model runs on from now on: packed where that gives the model's own logits."""
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(num_embeddings(model) or 2, _PROBE_SHAPE, generator=generator)
    expected = _logits(model, ids_BT)
    num_linears = pack_linears(model)
    if not num_linears:
        return _PLAIN
    num_mlps, num_norms, blocks = fuse_mlps(model), fuse_norms(model), use_causal_blocks(model)
    trace = ForwardTrace(model)
    if not _close(expected, _logits(model, ids_BT)):
        restore_forwards(model)
        unpack_linears(model)
        if blocks:
            use_sdpa(model)
        return _PLAIN
    return_freed_memory()  # the plain weights
    return {
        "kernels": "packed",
        "packed_linears": num_linears,
        "fused_mlps": num_mlps,
        "fused_norms": num_norms,
        "windows_side_by_side": trace.leaves_nothing(),
        "keeps_freed_memory": keep_freed_memory(),
    }


def _close(expected: Tensor, got: Tensor) -> bool:
    spread = float((expected - expected.float().mean(-1, keepdim=True)).square().mean().sqrt())
    difference = float((got.float() - expected.float()).square().mean().sqrt())
    return difference <= _TOLERANCE[expected.dtype] * spread


def _logits(model: nn.Module, ids_BT: Tensor) -> Tensor:
    return field_of(ModuleCall(model)(ids_BT, None), "logits")
