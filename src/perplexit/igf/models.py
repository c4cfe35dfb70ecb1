"""Models for IGF: any causal language model of a checkpoint's, the seed's GPT-2, and LoRA."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from perplexit.checkpoints.loading import load_checkpoint
from perplexit.errors import MissingPackageError, UsageError
from perplexit.option_ranges import check_numbers

GPT2 = "openai-community/gpt2"


def load_model(model: nn.Module | str | Path, *, device: str = "cpu") -> nn.Module:
    """A causal language model in float32, in evaluation mode: loaded, or the one given."""
    if isinstance(model, nn.Module):
        return model.eval()
    return load_checkpoint(model, dtype="float32", device=device).model.eval()


def load_gpt2(model_name: str = GPT2, *, model: nn.Module | str | Path | None = None) -> nn.Module:
    """The seed's GPT-2, or the `model` named instead of it."""
    return load_model(model_name if model is None else model)


def recopy_gpt2(
    orig_model: nn.Module, device: Any, max_steps: int
) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    """A copy of the model with a fresh AdamW (5e-5, no decay) and its linear schedule to 0."""
    model = copy.deepcopy(orig_model).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, eps=1e-8, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: max(0.0, 1 - step / max(1, max_steps))
    )
    return model, optimizer, schedule


def with_lora(
    model: nn.Module, *, rank: int = 8, alpha: int | None = None, targets: Any = None
) -> nn.Module:
    """The model with low-rank adapters (PEFT): only they are trained.

    targets: names of the modules to adapt; None: what PEFT knows for the architecture.
    Raises MissingPackageError without PEFT, UsageError where no module can be adapted.
    """
    if rank < 1:
        raise UsageError(f"expected a LoRA rank of at least 1, got {rank}")
    try:
        from peft import LoraConfig, get_peft_model  # noqa: PLC0415 - an optional package's door
    except ImportError:
        raise MissingPackageError(
            "LoRA needs the package peft: pip install 'perplexit[igf]'"
        ) from None
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        lora_dropout=0.0,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    try:
        adapted: nn.Module = get_peft_model(model, config)
    except ValueError as error:
        raise UsageError(f"LoRA cannot be added to {type(model).__name__}: {error}") from None
    return adapted


def set_threads(threads: int) -> None:
    """Compute with this many CPU threads from now on."""
    check_numbers(threads=threads)
    torch.set_num_threads(threads)


def weights_of(model: nn.Module) -> list[torch.Tensor]:
    """A copy of the trainable weights, to go back to with `restore_weights`."""
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


def restore_weights(model: nn.Module, weights: list[torch.Tensor]) -> None:
    """Put back what `weights_of` copied, to the last bit."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter, kept in zip(trainable, weights, strict=True):
            parameter.copy_(kept)
