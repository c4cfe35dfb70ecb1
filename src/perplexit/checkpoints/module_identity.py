"""The identity of a model in memory: the SHA-256 of class, configuration and tensors."""

import hashlib
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from perplexit.checkpoints.identity import deciding_settings
from perplexit.fingerprints import canonical_json


def module_fingerprint(module: nn.Module, *, without: Collection[str] = ()) -> str:
    """Return the SHA-256 of a loaded module: class, configuration, and every tensor of its state.

    without: names of tensors whose bytes are left out; their names, types and shapes count.
    """
    digest = hashlib.sha256(_json([type(module).__qualname__, settings_of(module)]))
    for name, value in sorted(module.state_dict().items()):
        shape = list(value.shape) if isinstance(value, Tensor) else None
        digest.update(_json([name, str(getattr(value, "dtype", None)), shape]))
        for part in _plain_tensors(value) if name not in without else ():
            digest.update(_content(part))
    return digest.hexdigest()


def _json(value: object) -> bytes:
    return canonical_json(value, allow_nan=True).encode()


def settings_of(module: nn.Module) -> list[str]:
    """Return `key=value` of each entry of the module's configuration that can change a number."""
    config: Any = getattr(module, "config", None)
    settings = dict(config.to_dict()) if hasattr(config, "to_dict") else {}
    return sorted(f"{key}={value}" for key, value in deciding_settings(settings).items())


def _plain_tensors(tensor: Any) -> Iterator[Tensor]:
    """Yield the plain tensors that a tensor is made of: packed codes and scales, or itself alone.

    torch.ao's packed layers hold a quantized weight and a bias as one tuple.
    """
    if isinstance(tensor, tuple):
        for part in tensor:
            yield from _plain_tensors(part)
        return
    if not isinstance(tensor, Tensor):
        return
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _plain_tensors(getattr(tensor, name))


def _content(tensor: Tensor) -> memoryview:
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().data  # NumPy has no bfloat16, but it has bytes
