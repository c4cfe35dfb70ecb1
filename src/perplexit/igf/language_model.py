"""The language model that IGF measures and tunes: loading, copying, LoRA, saving."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from perplexit.atomic_files import write_json
from perplexit.checkpoints.loading import load_checkpoint
from perplexit.checkpoints.quiet import quiet_transformers
from perplexit.declared_options import check_numbers
from perplexit.errors import UsageError, needing
from perplexit.igf.tensors_with_record import PICKLE_SUFFIXES, object_in
from perplexit.protected_outputs import Kind, OutputFolder, paths_among

GPT2 = "openai-community/gpt2"
MODEL_FILE = "perplexit.json"
_MODEL_KIND = "a fine-tuned model"


def load_model(model: nn.Module | str | Path, *, device: str = "cpu") -> nn.Module:
    """Return a causal language model in evaluation mode: loaded in float32, or the one given."""
    if isinstance(model, nn.Module):
        return model.eval()
    return load_checkpoint(model, dtype="float32", device=device).model.eval()


def load_gpt2(model_name: str = GPT2, *, model: nn.Module | str | Path | None = None) -> nn.Module:
    """Return the original's GPT-2, or the `model` named instead of it."""
    return load_model(model_name if model is None else model)


def recopy_gpt2(
    orig_model: nn.Module, device: Any, max_steps: int
) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    """Return a copy of the model, a fresh AdamW (5e-5, no decay) and its linear schedule to 0."""
    model = copy.deepcopy(orig_model).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, eps=1e-8, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: max(0.0, 1 - step / max(1, max_steps))
    )
    return model, optimizer, schedule


def with_lora(
    model: nn.Module, *, rank: int = 8, alpha: int | None = None, targets: Any = None
) -> nn.Module:
    """Return the model with low-rank adapters (PEFT); only the adapters are trained.

    targets: names of the modules to adapt; None: what PEFT knows for the architecture.
    Raises MissingPackageError without PEFT, UsageError where no module can be adapted.
    """
    if rank < 1:
        raise UsageError(f"expected a LoRA rank of at least 1, got {rank}")
    with needing("LoRA", "pip install 'perplexit[igf]'", "peft"):
        from peft import LoraConfig, get_peft_model  # noqa: PLC0415 - an optional package's door
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
    """Set the number of CPU threads that PyTorch computes with."""
    check_numbers(threads=threads)
    torch.set_num_threads(threads)


@contextmanager
def weights_restored(model: nn.Module) -> Iterator[None]:
    """Put the trainable weights back after the block, to the last bit."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    kept = [p.detach().clone() for p in trainable]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, weights in zip(trainable, kept, strict=True):
                parameter.copy_(weights)


def model_output(
    path: str | Path,
    *,
    inputs: object = (),
    request: Mapping[str, Any] | None = None,
    force: bool = False,
) -> OutputFolder:
    """Return the folder for a fine-tuned model; a pickle's suffix is dropped.

    request: what was asked for; a model that the same request made is replaced without `force`.
    Raises OutputError where another model or anything else is there.
    """
    folder = Path(path)
    folder = folder.with_suffix("") if folder.suffix in PICKLE_SUFFIXES else folder
    output = OutputFolder(folder, Kind(_MODEL_KIND, _is_model), paths_among(inputs), force)
    if output.exists:
        output.check_replaceable(request is not None and _record(folder)["request"] == request)
    return output


def save_model(
    model: nn.Module,
    path: str | Path,
    *,
    inputs: object = (),
    request: Mapping[str, Any] | None = None,
    force: bool = False,
) -> Path:
    """Write the model as a Hugging Face folder (safetensors), whole or not at all.

    The arguments and the errors are those of `model_output`. Returns the folder.
    """
    output = model_output(path, inputs=inputs, request=request, force=force)
    with output.staged() as staging:
        with quiet_transformers():
            model.save_pretrained(staging)  # type: ignore[operator]
        files = sorted(entry.name for entry in staging.iterdir())
        record = {"kind": _MODEL_KIND, "version": 1, "request": request, "files": files}
        write_json(staging / MODEL_FILE, record)
    return output.path


def _record(folder: Path) -> dict[str, Any]:
    found = object_in(folder / MODEL_FILE)
    return found if found.get("kind") == _MODEL_KIND and "request" in found else {}


def _is_model(folder: Path) -> bool:
    """Return whether the folder holds a model that was fine-tuned here and no other file."""
    files = _record(folder).get("files", ())
    own = {MODEL_FILE, *(files if isinstance(files, list) else ())}
    return len(own) > 1 and all(entry.name in own for entry in folder.iterdir())
