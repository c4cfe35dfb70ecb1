"""How a PyTorch session comes by its module: loaded from an address, or handed in."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from perplexit.checkpoints.adapters import adapted_fingerprint, find_adapter, with_adapter
from perplexit.checkpoints.loading import Checkpoint, load_checkpoint
from perplexit.checkpoints.location import CheckpointSource, find_checkpoint
from perplexit.checkpoints.module_call import config_integer, dtype_name, rounded_activations
from perplexit.checkpoints.module_identity import module_fingerprint
from perplexit.errors import CapabilityError, ModelError, UsageError
from perplexit.quantization.precisions import canonical_dtype
from perplexit.quantization.pytorch_quantization import (
    PytorchQuantization,
    pytorch_recipe,
    quantize_model,
)
from perplexit.session_descriptions import (
    AdapterDescription,
    ModelDescription,
    QuantizationDescription,
)
from perplexit.sessions.pytorch.device_choice import chosen_device, chosen_threads, scoring_settings
from perplexit.sessions.pytorch.placement import LoadingOptions, head_device
from perplexit.sessions.pytorch.tensor_parallel import ProcessGroup, check_split


@dataclass(frozen=True)
class OpenedModule:
    """A module, where it runs, where it came from (None: it was handed in), what was done to it.

    num_parameters: of the checkpoint, whatever packed weights and adapters count.
    spread: whether its layers may be on several devices; group: the processes it is split over.
    stamp: the checkpoint's files as they were when they were read.
    """

    module: nn.Module
    device: torch.device
    threads: int
    num_parameters: int
    source: CheckpointSource | None = None
    quantization: PytorchQuantization | None = None
    adapter: AdapterDescription | None = None
    spread: bool = False
    group: ProcessGroup | None = None
    stamp: tuple[object, ...] | None = None

    @property
    def batch_invariant(self) -> bool:
        """Return whether a row's results are its own, whatever else is in the batch."""
        return bool(self.weights is None or self.weights["batch_invariant"])

    @cached_property
    def weights(self) -> Mapping[str, Any] | None:
        """Describe how weights are stored and what happens to activations; None: both unchanged.

        A module that was handed in is looked through for layers that round activations.
        """
        if self.quantization is not None:
            return self.quantization.settings
        activations = rounded_activations(self.module) if self.source is None else None
        if activations is None:
            return None
        return {"activations": activations, "batch_invariant": False}

    @property
    def gives_head_again(self) -> bool:
        """Return whether the checkpoint at the model's address has this module's head."""
        if self.source is None or self.adapter is not None or self._has_changed(self.source):
            return False
        return self.quantization is None or not self.quantization.head

    def _has_changed(self, source: CheckpointSource) -> bool:
        try:
            return self.stamp is not None and source.stamp() != self.stamp
        except ModelError:  # it is gone
            return True

    def scoring(self) -> AbstractContextManager[None]:
        """Return the process's settings while the module is run; see `scoring_settings`."""
        return scoring_settings(self.module, self.threads, owned=self.source is not None)

    def describe(self, vocab_size: int) -> ModelDescription:
        """Describe the model; computes the fingerprint of the weights."""
        source = self.source
        if source is not None and self._has_changed(source):
            raise ModelError(
                f"expected the checkpoint {source.address} as it was when it was loaded, but its "
                "files have changed since: their fingerprint is not that of the loaded weights; "
                "load it again"
            )
        fingerprint = source.fingerprint if source else module_fingerprint(self.module)
        if self.adapter is not None:
            fingerprint = adapted_fingerprint(fingerprint, self.adapter)
        return ModelDescription(
            address=source.address if source else f"module:{type(self.module).__qualname__}",
            architecture=type(self.module).__name__,
            num_parameters=self.num_parameters,
            weights_fingerprint=fingerprint,
            vocab_size=vocab_size,
            max_length=config_integer(self.module, "max_position_embeddings", "n_positions"),
            adapter=self.adapter,
        )

    def describe_quantization(self) -> QuantizationDescription | None:
        """Describe what was quantized; None where nothing was."""
        return QuantizationDescription.of(self.quantization)


def open_module(
    model: str | Path | nn.Module, asked: LoadingOptions, *, dtype: str | None, threads: int | None
) -> OpenedModule:
    """Open the module that is meant: load it where it is an address.

    A loaded one keeps its dtype and device, and is not changed; UsageError where that is asked for.
    """
    if asked.merge_adapter and asked.adapter is None:
        raise UsageError("merge_adapter is for an adapter, but none was given; name its folder")
    if isinstance(model, nn.Module):
        if asked.changes_weights or asked.changes_placement:
            raise UsageError(
                "expected a model's address with a quantization, an adapter, an attention or a "
                "split over devices, got a loaded model, which stays as it is; give its folder, "
                "or change the model yourself"
            )
        num_threads = torch.get_num_threads() if threads is None else chosen_threads(threads)
        placed = _checked_placement(model, dtype, asked.device)
        return OpenedModule(model, placed, num_threads, _num_parameters(model))
    dtype, threads = canonical_dtype(dtype or "float32"), chosen_threads(threads)
    options = {"dtype": dtype, "options": asked.for_transformers(dtype)}
    if asked.spread or asked.tensor_parallel is not None:
        return _split(model, asked, options, threads)
    return _loaded(model, asked, options, threads)


def _loaded(
    model: str | Path, asked: LoadingOptions, options: dict[str, Any], threads: int
) -> OpenedModule:
    """Load a checkpoint and change it as asked; names and folders are checked before it is read.

    options: of `load_checkpoint`. A merged adapter is part of the weights that are quantized; one
    beside them is not.
    """
    placed = chosen_device(asked.device)
    recipe = None if asked.quantization is None else pytorch_recipe(asked.quantization)
    adapter = None
    if asked.adapter is not None:
        adapter = find_adapter(asked.adapter, merged=asked.merge_adapter)
    checkpoint = load_checkpoint(model, device=str(placed), **options)
    module, quantization = checkpoint.model, None
    num_parameters = _num_parameters(module)
    if adapter is not None and adapter.merged:
        module = with_adapter(module, adapter)
    if recipe is not None:
        quantization = quantize_model(module, recipe)
    if adapter is not None and not adapter.merged:
        module = with_adapter(module, adapter)
    return OpenedModule(
        module=module,
        device=placed,
        threads=threads,
        num_parameters=num_parameters,
        source=checkpoint.source,
        stamp=checkpoint.source.stamp(),
        quantization=quantization,
        adapter=adapter,
    )


def _split(
    model: str | Path, asked: LoadingOptions, options: dict[str, Any], threads: int
) -> OpenedModule:
    """Load a checkpoint whose layers are spread over devices, or split over processes."""
    if asked.changes_weights:
        raise CapabilityError(
            "a quantization or an adapter is for a model on one device, but this one is to be "
            "split; merge the adapter into the checkpoint first, or leave the split out"
        )
    group = None
    if asked.tensor_parallel is None:
        checkpoint = load_checkpoint(model, device=None, **options)
        device = head_device(checkpoint.model)
    else:
        group = ProcessGroup(asked.tensor_parallel, asked.device, threads)
        checkpoint, device = _loaded_together(model, options, group), group.device
    return OpenedModule(
        module=checkpoint.model,
        device=device,
        threads=threads,
        num_parameters=_num_parameters(checkpoint.model),
        source=checkpoint.source,
        stamp=checkpoint.source.stamp(),
        spread=group is None,
        group=group,
    )


def _loaded_together(model: str | Path, options: dict[str, Any], group: ProcessGroup) -> Checkpoint:
    group.start(model=str(find_checkpoint(model).folder), **options)
    try:
        checkpoint = load_checkpoint(model, device=None, split_over=group.size, **options)
        check_split(checkpoint.model, group.size)
    except BaseException:
        group.close(at_once=True)
        raise
    return checkpoint


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _checked_placement(module: nn.Module, dtype: str | None, device: str | None) -> torch.device:
    """Return the device that a loaded module is on, if that is the one asked for."""
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
