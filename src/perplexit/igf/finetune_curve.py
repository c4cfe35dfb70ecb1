"""The curve of a fine-tuning, and how far it is. Needs no engine."""

from dataclasses import asdict, dataclass, field
from typing import Any

from perplexit.metrics.likelihood import exp_or_inf


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
