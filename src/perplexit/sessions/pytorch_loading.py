"""How a PyTorch session comes by its module: loaded from an address, or handed in."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from perplexit.checkpoints.loading import load_checkpoint
from perplexit.checkpoints.sources import CheckpointSource
from perplexit.errors import UsageError
from perplexit.quantization.precisions import canonical_dtype
from perplexit.sessions.base import ModelDescription
from perplexit.sessions.pytorch_device import chosen_device, chosen_threads, scoring_settings
from perplexit.sessions.pytorch_module import config_integer, dtype_name, module_fingerprint


@dataclass(frozen=True)
class OpenedModule:
    """A module, where it runs, and where it came from (None: it was handed in)."""

    module: nn.Module
    device: torch.device
    threads: int
    source: CheckpointSource | None = None

    def scoring(self) -> AbstractContextManager[None]:
        """The process's settings while the module is run; see `scoring_settings`."""
        return scoring_settings(self.module, self.threads, owned=self.source is not None)

    def describe(self, vocab_size: int) -> ModelDescription:
        """Whose numbers these are; takes the fingerprint of the weights."""
        source = self.source
        return ModelDescription(
            address=source.address if source else f"module:{type(self.module).__qualname__}",
            architecture=type(self.module).__name__,
            num_parameters=sum(p.numel() for p in self.module.parameters()),
            weights_fingerprint=source.fingerprint if source else module_fingerprint(self.module),
            vocab_size=vocab_size,
            max_length=config_integer(self.module, "max_position_embeddings", "n_positions"),
        )


def open_module(
    model: str | Path | nn.Module, *, dtype: str | None, device: str | None, threads: int | None
) -> OpenedModule:
    """The module that is meant, loaded where it is an address.

    A loaded one keeps its dtype and device; UsageError where others are asked for.
    """
    if isinstance(model, nn.Module):
        num_threads = torch.get_num_threads() if threads is None else chosen_threads(threads)
        return OpenedModule(model, _checked_placement(model, dtype, device), num_threads)
    num_threads, placed = chosen_threads(threads), chosen_device(device)
    checkpoint = load_checkpoint(
        model, dtype=canonical_dtype(dtype or "float32"), device=str(placed)
    )
    return OpenedModule(checkpoint.model, placed, num_threads, checkpoint.source)


def _checked_placement(module: nn.Module, dtype: str | None, device: str | None) -> torch.device:
    """The device that a loaded module is on, if that is what was asked for."""
    actual = next((p.device for p in module.parameters()), torch.device("cpu"))
    if device is not None and torch.device(device).type != actual.type:
        raise UsageError(
            f"expected the loaded model on {device}, but it is on {actual}; move it first: "
            f"model.to({device!r})"
        )
    if dtype is not None and canonical_dtype(dtype) != dtype_name(module):
        raise UsageError(
            f"expected the loaded model in {canonical_dtype(dtype)}, but it is in "
            f"{dtype_name(module)}; convert it first: model.to(torch.{canonical_dtype(dtype)})"
        )
    return actual
