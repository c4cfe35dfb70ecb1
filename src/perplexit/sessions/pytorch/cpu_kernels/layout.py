"""Which kernels a loaded model runs on: those of transformers, or the packed ones of this package.

A model that was loaded only for scoring may be laid out for it. That changes rounding, nothing
else: the model's logits for a few fixed ids are compared before and after, and a model that would
give others is restored. In bfloat16 "others" means farther from the same model in float32 than its
own bfloat16 forward is.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from perplexit.checkpoints.widened import widened
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
from perplexit.sessions.pytorch.module_call import (
    ModuleCall,
    config_integer,
    field_of,
    num_embeddings,
)

KERNELS = ("packed", "plain")
_ENVIRONMENT = "PERPLEXIT_KERNELS"
_PROBE_IDS = 133  # no multiple of a kernel's tile
# Of the logits' spread, as root mean squares: additions in another order, through all layers.
_TOLERANCE = 1e-4
# How much farther from float32 than the model's own bfloat16 forward, whose distance varies.
_MOST_FARTHER = 1.25
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
    """Choose the kernels of a module, pack it in place where it is to be packed; the record.

    A module that was handed in belongs to its owner, a compiled one to torch.compile; quantized
    layers and adapters have products of their own. Off the CPU, and in dtypes without packed
    products, there is nothing to pack.
    """
    chosen = chosen_kernels(name)
    own = opened.quantization is None and (opened.adapter is None or opened.merged)
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
        ids_BT = _probe_ids(model)
        judge = _Judge.of(model, ids_BT, dtype)
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        return {**_PLAIN, "kernels_reason": f"the probe does not run ({type(error).__name__})"}
    try:
        num_linears = pack_linears(model)
        if not num_linears:
            return _PLAIN
        num_mlps = fuse_mlps(model)
        trace = ForwardTrace(model)
        reason = judge.why_not(_logits(model, ids_BT))
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


@dataclass(frozen=True)
class _Judge:
    """The plain model's logits for the probe; in a narrow dtype, those of float32 beside them."""

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
        """Say why a packed model's logits are not good enough; None: they are."""
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
    """Return the same random ids each time, (1, T): not more than the model has positions."""
    positions = config_integer(model, "max_position_embeddings", "n_positions") or _PROBE_IDS
    generator = torch.Generator().manual_seed(0)
    length = max(1, min(_PROBE_IDS, positions))
    return torch.randint(num_embeddings(model) or 2, (1, length), generator=generator)


def _logits(model: nn.Module, ids_BT: Tensor) -> Tensor:
    return field_of(ModuleCall(model)(ids_BT, None), "logits")
