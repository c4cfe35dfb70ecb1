"""The settings of a fine-tuning, its curve and its progress. Needs no engine."""

from dataclasses import asdict, dataclass, field
from typing import Any

from perplexit.errors import UsageError
from perplexit.metrics.likelihood import exp_or_inf


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
        return [exp_or_inf(loss) for loss in self.test_loss]

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
