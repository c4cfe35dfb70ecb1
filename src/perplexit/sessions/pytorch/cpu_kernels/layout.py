"""Which products and blocks a loaded model runs on: transformers' own, or the packed ones here.

A model that was loaded for scoring alone may be laid out for it. What that changes is rounding:
the model's logits for a few fixed ids are compared before and after, and a model that would give
others is put back as it was. In bfloat16 "others" means farther from the same model in float32
than its own bfloat16 forward is.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from perplexit.checkpoints.widened import widened
from perplexit.errors import UsageError
from perplexit.resources.freed_memory import keep_freed_memory, return_freed_memory
from perplexit.session_descriptions import (
    SessionDescription,
)
from perplexit.sessions.pytorch.cpu_kernels.causal_attention import use_causal_blocks, use_sdpa
from perplexit.sessions.pytorch.cpu_kernels.fused_mlp import fuse_mlps, restore_forwards
from perplexit.sessions.pytorch.cpu_kernels.fused_norm import fuse_norms
from perplexit.sessions.pytorch.cpu_kernels.packed_linear import (
    PACKED_DTYPES,
    pack_linears,
    unpack_linears,
    why_no_packing,
)
from perplexit.sessions.pytorch.cpu_kernels.window_threads import ForwardTrace
from perplexit.sessions.pytorch.forward import ForwardPass, LinearHead
from perplexit.sessions.pytorch.loading import OpenedModule
from perplexit.sessions.pytorch.module_call import ModuleCall, field_of
from perplexit.sessions.pytorch.module_facts import config_integer, num_embeddings

KERNELS = ("packed", "plain")
_ENVIRONMENT = "PERPLEXIT_KERNELS"
_PROBE_IDS = 133  # more than one block of queries, and no multiple of a tile
# Of the logits' spread, as root mean squares: additions in another order, through all layers.
_TOLERANCE = 1e-4
# How much farther from float32 than the model's own bfloat16 forward: that far varies with the ids.
_MOST_FARTHER = 1.25
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
    """What the model runs on from now on: packed where that gives the model's own logits.

    Where it does not, or where PyTorch has no such products, the record says why.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if dtype not in PACKED_DTYPES:
        return _PLAIN
    reason = why_no_packing(dtype)
    if reason is not None:
        return {**_PLAIN, "kernels_reason": reason}
    try:
        ids_BT = _probe_ids(model)
        judge = _Judge.of(model, ids_BT, dtype)
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        return {**_PLAIN, "kernels_reason": f"the probe does not run ({type(error).__name__})"}
    blocks = False
    try:
        num_linears = pack_linears(model)
        if not num_linears:
            return _PLAIN
        num_mlps, num_norms, blocks = fuse_mlps(model), fuse_norms(model), use_causal_blocks(model)
        trace = ForwardTrace(model)
        reason = judge.why_not(_logits(model, ids_BT))
    except (RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
        reason = f"the packed model does not run ({type(error).__name__})"
    if reason is not None:
        restore_forwards(model)
        unpack_linears(model)
        if blocks:
            use_sdpa(model)
        return {**_PLAIN, "kernels_reason": reason}
    return_freed_memory()  # the plain weights
    return {
        "kernels": "packed",
        "packed_linears": num_linears,
        "fused_mlps": num_mlps,
        "fused_norms": num_norms,
        "windows_side_by_side": trace.leaves_nothing(),
        "keeps_freed_memory": keep_freed_memory(),
    }


@dataclass(frozen=True)
class _Judge:
    """The model's own logits for the probe, and in a narrow dtype those of float32 beside them."""

    plain: Tensor
    wide: Tensor | None

    @classmethod
    def of(cls, model: nn.Module, ids_BT: Tensor, dtype: torch.dtype) -> "_Judge":
        plain = _logits(model, ids_BT).float()
        if dtype == torch.float32:
            return cls(plain, None)
        with widened(model):
            return cls(plain, _logits(model, ids_BT).float())

    def why_not(self, got: Tensor) -> str | None:
        """Why a packed model's logits are not good enough; None: they are."""
        if self.wide is None:
            spread = _rms(self.plain - self.plain.mean(-1, keepdim=True))
            near = _rms(got.float() - self.plain) <= _TOLERANCE * spread
            return None if near else "packed products would give the model other logits"
        own = _rms(self.plain.log_softmax(-1) - self.wide.log_softmax(-1))
        if _rms(got.float().log_softmax(-1) - self.wide.log_softmax(-1)) <= _MOST_FARTHER * own:
            return None
        return (
            f"packed products would be farther from float32 than {_MOST_FARTHER} times the "
            "model's own bfloat16 forward"
        )


def _rms(difference: Tensor) -> float:
    return float(difference.square().mean().sqrt())


def _probe_ids(model: nn.Module) -> Tensor:
    """The same random ids each time, as many as the model has positions for."""
    positions = config_integer(model, "max_position_embeddings", "n_positions") or _PROBE_IDS
    generator = torch.Generator().manual_seed(0)
    length = max(1, min(_PROBE_IDS, positions))
    return torch.randint(num_embeddings(model) or 2, (1, length), generator=generator)


def _logits(model: nn.Module, ids_BT: Tensor) -> Tensor:
    return field_of(ModuleCall(model)(ids_BT, None), "logits")
