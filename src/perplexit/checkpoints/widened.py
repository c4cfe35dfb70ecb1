"""A narrow model run once in float32: each layer's weights are widened only while it runs."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_Kept = list[tuple[dict[str, Any], str, Tensor]]


@contextmanager
def widened(model: nn.Module) -> Iterator[None]:
    """Compute in float32 inside the block from the model's weights; restore them bit for bit.

    One repeated layer is widened at a time, so that memory grows by that layer's float32 weights.
    """
    kept: dict[int, _Kept] = {}
    with ExitStack() as stack:
        for module, parts in _units(model):

            def widen(module: nn.Module, *_: Any, parts: list[nn.Module] = parts) -> None:
                if id(module) not in kept:
                    kept[id(module)] = _widen(parts)

            def restore(module: nn.Module, *_: Any) -> None:
                _restore(kept.pop(id(module), []))

            stack.enter_context(_removed(module.register_forward_pre_hook(widen)))
            stack.enter_context(_removed(module.register_forward_hook(restore, always_call=True)))
        try:
            yield
        finally:
            for tensors in kept.values():
                _restore(tensors)


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def _units(module: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """Yield (module that runs, modules widened meanwhile): list items whole, others alone."""
    if isinstance(module, nn.ModuleList):
        yield from ((item, list(item.modules())) for item in module)
        return
    if module._parameters or module._buffers:
        yield module, [module]
    for child in module.children():
        yield from _units(child)


def _widen(parts: list[nn.Module]) -> _Kept:
    """Put float32 copies in place of narrow tensors; what was there before."""
    kept: _Kept = []
    for part in parts:
        places: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
        for tensors in places:
            for name, tensor in tensors.items():
                if tensor is not None and tensor.dtype in (torch.bfloat16, torch.float16):
                    kept.append((tensors, name, tensor))
                    wide = tensor.detach().float()
                    tensors[name] = (
                        nn.Parameter(wide, requires_grad=False)
                        if isinstance(tensor, nn.Parameter)
                        else wide
                    )
    return kept


def _restore(kept: _Kept) -> None:
    for tensors, name, tensor in kept:
        tensors[name] = tensor
