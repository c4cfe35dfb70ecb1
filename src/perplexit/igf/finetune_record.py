"""How a fine-tuning is set up, how far it is, and what came of it."""

from dataclasses import asdict, dataclass, field
from typing import Any

from perplexit.errors import UsageError
from perplexit.igf.losses import perplexity_of


@dataclass(frozen=True, slots=True)
class FinetuneSettings:
    """How to fine-tune; the defaults are the paper's.

    steps:           optimizer steps. eval_interval: steps between evaluations (0 too is evaluated).
    schedule_steps:  the learning rate falls linearly to 0 over so many steps; None: constant.
    micro_batch:     contexts in one forward pass; changes memory and rounding, not the gradient.
    dropout:         train in training mode (the original does); a mask follows from seed and step.
    seed_compatible: the original's gradient: that of the last accepted context alone.
    max_candidates:  the most candidates that one step may look at before the filter is given up on.
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
        names = (
            "steps",
            "batch_size",
            "eval_interval",
            "micro_batch",
            "max_candidates",
        )
        for name in names:
            if getattr(self, name) < 1:
                raise UsageError(f"expected {name} of at least 1, got {getattr(self, name)}")
        if not (self.learning_rate > 0 and self.clip_norm > 0):
            raise UsageError("expected a learning rate and a clip norm above 0")

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return asdict(self)


@dataclass
class FinetuneCurve:
    """What came of a fine-tuning: the test loss step by step, and what it cost.

    tokens are ids: `trained` went forward and backward, `scored` forward only, to be selected;
    `judged` were only looked at by the filter. Evaluation is in none of them, nor in `seconds`.
    """

    steps: list[int] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)  # nats a target
    num_candidates: list[int] = field(default_factory=list)  # seen until that step
    train_loss: list[float] = field(default_factory=list)  # a value a step, before the step
    tokens_trained: int = 0
    tokens_scored: int = 0
    tokens_judged: int = 0
    seconds: dict[str, float] = field(
        default_factory=lambda: {"select": 0.0, "train": 0.0, "evaluate": 0.0}
    )
    num_steps_resumed: int = 0

    def perplexities(self) -> list[float]:
        """The test perplexity at each of `steps`."""
        return [perplexity_of(loss) for loss in self.test_loss]

    def to_json(self) -> dict[str, Any]:
        """The curve as JSON values."""
        return asdict(self) | {"test_perplexity": self.perplexities()}


@dataclass(frozen=True, slots=True)
class FinetuneProgress:
    """How far a fine-tuning is; `test_perplexity` is the latest evaluation's."""

    step: int
    total_steps: int
    train_loss: float
    test_perplexity: float
    num_candidates: int
