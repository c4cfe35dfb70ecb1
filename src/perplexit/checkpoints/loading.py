"""A checkpoint as a PyTorch model in evaluation mode: quickly, quietly, and all of its weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

from perplexit.checkpoints.configuration import check_weights_are_plain, checked_config
from perplexit.checkpoints.location import CheckpointSource, find_checkpoint
from perplexit.checkpoints.quiet import quiet_transformers
from perplexit.checkpoints.stored_tensors import StoredTensors
from perplexit.errors import ModelError, PerplexitError


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A loaded checkpoint and where it came from."""

    source: CheckpointSource
    model: nn.Module


def load_checkpoint(
    address: str | Path,
    *,
    dtype: str = "float32",
    device: str | None = "cpu",
    options: Mapping[str, Any] | None = None,
    split_over: int | None = None,
) -> Checkpoint:
    """Load the model at `address` (see `find_checkpoint`) in `dtype`, in evaluation mode.

    device: None leaves it where transformers puts it. options: more for `from_pretrained`.
    split_over: processes that load it together, each a part of every layer.
    Remote code is off and pickles are not read. Raises ModelError where the folder is not a causal
    language model that transformers knows, where weights are missing (transformers would fill
    them with random numbers), and where a tensor or a field of config.json would go unused.
    """
    source = find_checkpoint(address)
    check_weights_are_plain(source)
    stored = StoredTensors.of(source)
    options = dict(options or {})
    if split_over is not None:
        options["distributed_config"] = DistributedConfig(tp_size=split_over, tp_plan="auto")
    model, loading_info = _loaded(source, getattr(torch, dtype), options)
    stored.check_used(model, loading_info)
    return Checkpoint(source, (model if device is None else model.to(device)).eval())


def _loaded(
    source: CheckpointSource, dtype: torch.dtype, options: dict[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    try:
        with quiet_transformers():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source.folder,
                config=checked_config(source),
                dtype=dtype,
                trust_remote_code=False,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                **options,
            )
    except PerplexitError:
        raise
    except Exception as error:  # of transformers' many model classes
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"expected a causal language model that transformers knows in {source.folder}, but it "
            f"cannot be loaded: {reason} (code shipped with a model is never run)"
        ) from error
    model, loading_info = loaded
    return model, loading_info
