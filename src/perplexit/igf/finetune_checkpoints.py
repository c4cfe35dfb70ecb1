"""Checkpoints of a fine-tuning: trainable weights, optimizer state, curve; whole or absent."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from perplexit.atomic_files import write_atomically
from perplexit.errors import ResumeError, UsageError
from perplexit.fingerprints import canonical_json
from perplexit.igf.losses import perplexity_of
from perplexit.igf.resumable_work import require_same
from perplexit.untrusted_files import Expected, parse_json
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


@dataclass(frozen=True, slots=True)
class FinetuneSettings:
    """How to fine-tune; the defaults are the paper's.

    steps:           optimizer steps.
    eval_interval:   steps between evaluations; step 0 is evaluated too.
    schedule_steps:  the learning rate falls linearly to 0 over so many steps; None: constant.
    micro_batch:     contexts in one forward pass; changes memory and rounding, not the gradient.
    dropout:         train in training mode (the original does); a mask follows from seed and step.
    seed_compatible: the original's gradient: that of the last accepted context alone.
    max_candidates:  one step looks at no more candidates; beyond them the filter is an error.
    """

    steps: int = 60
    batch_size: int = 16
    context_length: int = 32
    learning_rate: float = 5e-5
    clip_norm: float = 3.0
    schedule_steps: int | None = None
    eval_interval: int = 10
    seed: int = 0
    micro_batch: int = 16
    dropout: bool = False
    seed_compatible: bool = False
    max_candidates: int = 20000

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "eval_interval", "micro_batch", "max_candidates"):
            if getattr(self, name) < 1:
                raise UsageError(f"expected {name} of at least 1, got {getattr(self, name)}")
        if not (self.learning_rate > 0 and self.clip_norm > 0):
            raise UsageError("expected a learning rate and a clip norm above 0")

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return asdict(self)


@dataclass
class FinetuneCurve:
    """The result of a fine-tuning: the test loss step by step, and the cost.

    Tokens are ids: `trained` went forward and backward; `scored` went forward, to be selected;
    `judged` were seen by the filter. Evaluation counts in none of them.
    """

    steps: list[int] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)  # nats per target
    num_candidates: list[int] = field(default_factory=list)  # seen until that step
    train_loss: list[float] = field(default_factory=list)  # one value per step, before the step
    tokens_trained: int = 0
    tokens_scored: int = 0
    tokens_judged: int = 0
    seconds: dict[str, float] = field(
        default_factory=lambda: {"select": 0.0, "train": 0.0, "evaluate": 0.0}
    )
    num_steps_resumed: int = 0

    def perplexities(self) -> list[float]:
        """Return the test perplexity at each of `steps`."""
        return [perplexity_of(loss) for loss in self.test_loss]

    def to_json(self) -> dict[str, Any]:
        """Return the curve as JSON values."""
        return asdict(self) | {"test_perplexity": self.perplexities()}


@dataclass(frozen=True, slots=True)
class FinetuneProgress:
    """How far a fine-tuning is; `test_perplexity` is the latest evaluation's."""

    step: int
    total_steps: int
    train_loss: float
    test_perplexity: float
    num_candidates: int
