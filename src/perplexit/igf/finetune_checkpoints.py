"""Checkpoints of a fine-tuning: trainable weights, optimizer state, curve; whole or absent."""

from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from perplexit.atomic_files import write_atomically
from perplexit.errors import ResumeError
from perplexit.fingerprints import canonical_json
from perplexit.igf.resume_conditions import require_same
from perplexit.untrusted_files import Expected
from perplexit.untrusted_json import parse_json
from perplexit.untrusted_tensors import opened_tensors

FILE = "checkpoint.safetensors"
_EXPECTED = Expected("a checkpoint of this model", ResumeError, "remove it, or name another folder")
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class _Record(TypedDict):
    conditions: dict[str, Any]
    state: dict[str, Any]


class FinetuneCheckpoints:
    """A folder that holds the latest checkpoint of one fine-tuning.

    conditions: what must be equal for a checkpoint to be continued; see `require_same`.
    """

    def __init__(self, folder: str | Path, conditions: dict[str, Any]) -> None:
        self._path = Path(folder) / FILE
        self._conditions = conditions

    def save(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
    ) -> None:
        """Replace the last checkpoint with one of the model, the optimizer and `state`."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        for name, parameter in _trainable(model):
            tensors[f"weight.{name}"] = parameter.detach().cpu().contiguous()
            for moment in _MOMENTS:
                if moment in optimizer.state.get(parameter, {}):
                    value = optimizer.state[parameter][moment]
                    tensors[f"{moment}.{name}"] = value.detach().cpu().contiguous()
        record = canonical_json({"conditions": self._conditions, "state": state})
        write_atomically(self._path, lambda p: save_file(tensors, p, metadata={"record": record}))

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        """Load the last checkpoint into model and optimizer; return its state, None without one.

        Raises ResumeError where it was made under other conditions or is damaged.
        """
        if not self._path.exists():
            return None
        with opened_tensors(self._path, _EXPECTED, framework="pt") as file:
            text = (file.metadata() or {})["record"]
            record = parse_json(text, _EXPECTED, _Record, place=self._path)
            require_same(record["conditions"], self._conditions, "fine-tuning", self._path)
            names = set(file.keys())
            for name, parameter in _trainable(model):
                parameter.data.copy_(file.get_tensor(f"weight.{name}"))
                optimizer.state[parameter] = {
                    moment: file.get_tensor(f"{moment}.{name}").to(
                        "cpu" if moment == "step" else parameter.device
                    )
                    for moment in _MOMENTS
                    if f"{moment}.{name}" in names
                }
        return record["state"]


def _trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]
