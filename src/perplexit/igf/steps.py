"""One optimizer step on one context, and a way back from it that is exact to the last bit.

The first step of AdamW from a zero state has a closed form: the bias corrections cancel, and with
gradient `g` (after clipping), learning rate `lr` and `epsilon`

    step = -lr · g / (|g| + epsilon)                         AdamW, no weight decay
    step = -lr · g                                           SGD

so no optimizer state is needed. The new weights are built in the gradients' own memory and put in
the parameters' place; the old ones are never written to, hence nothing has to be restored.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from perplexit.errors import NonFiniteError, UsageError

_BLOCK = 1 << 18  # elements: three blocks of float32 stay in a core's cache


@dataclass(frozen=True, slots=True)
class StepRule:
    """The optimizer whose first step is meant.

    clip_norm: the gradient's norm is limited to this before the step; None: no limit.
    epsilon:   AdamW's; unused by SGD.
    """

    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 5e-5
    epsilon: float = 1e-8
    clip_norm: float | None = 3.0

    def __post_init__(self) -> None:
        if self.optimizer not in ("adamw", "sgd"):
            raise UsageError(f"expected the optimizer adamw or sgd, got {self.optimizer!r}")
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise UsageError(f"expected a learning rate above 0, got {self.learning_rate!r}")
        if not (self.epsilon > 0 and math.isfinite(self.epsilon)):
            raise UsageError(f"expected an epsilon above 0, got {self.epsilon!r}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise UsageError(f"expected a clip norm above 0 or none, got {self.clip_norm!r}")

    def to_json(self) -> dict[str, Any]:
        """The rule as JSON values."""
        return asdict(self)

    @classmethod
    def paper(cls) -> "StepRule":
        """AdamW with learning rate 5e-5, no weight decay, gradients clipped at norm 3."""
        return cls()


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that a step changes, each once (tied weights are one parameter).

    Raises UsageError where there are none.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise UsageError(
            "expected a model with trainable parameters, got one whose parameters are all frozen; "
            "call requires_grad_(True) on those to train"
        )
    return parameters


def gradient_scale(gradients: Sequence[Tensor], clip_norm: float | None) -> float:
    """`min(1, clip_norm / (norm + 1e-6))`, as torch.nn.utils.clip_grad_norm_ scales by it.

    Raises NonFiniteError where the norm is NaN or infinite.
    """
    norm = math.sqrt(sum(float(torch.linalg.vector_norm(g)) ** 2 for g in gradients))
    if not math.isfinite(norm):
        raise NonFiniteError(
            f"expected a finite gradient, got one of norm {norm}; "
            "load the model in float32, and check its weights"
        )
    return 1.0 if clip_norm is None else min(1.0, clip_norm / (norm + 1e-6))


@contextmanager
def stepped(
    model: nn.Module, loss: Callable[[], Tensor], rule: StepRule, *, dropout: bool = False
) -> Iterator[None]:
    """While inside, the model's weights are those after one step of `rule` on `loss()`.

    Outside they are the very tensors they were before, also after an exception. Costs one copy of
    the trainable weights (the gradients' memory). The model is left in evaluation mode; `dropout`
    computes the gradient in training mode.
    """
    parameters = trainable_parameters(model)
    gradients = _gradients(model, parameters, loss, dropout)
    turn_gradients_into_weights(parameters, gradients, rule)
    changed = [(p, w) for p, w in zip(parameters, gradients, strict=True) if w is not None]
    with replaced_weights([p for p, _ in changed], [w for _, w in changed]):
        yield


@contextmanager
def replaced_weights(
    parameters: Sequence[nn.Parameter], weights: Sequence[Tensor]
) -> Iterator[None]:
    """While inside, the parameters hold `weights`; then again the very tensors they held before."""
    kept = [p.data for p in parameters]
    try:
        for parameter, replacement in zip(parameters, weights, strict=True):
            parameter.data = replacement
        yield
    finally:
        for parameter, original in zip(parameters, kept, strict=True):
            parameter.data = original


def _gradients(
    model: nn.Module, parameters: list[nn.Parameter], loss: Callable[[], Tensor], dropout: bool
) -> list[Tensor | None]:
    model.train(dropout)
    try:
        for parameter in parameters:
            parameter.grad = None
        with torch.enable_grad():
            torch.autograd.backward(loss())
        return [p.grad for p in parameters]
    finally:
        model.eval()
        for parameter in parameters:
            parameter.grad = None


def turn_gradients_into_weights(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], rule: StepRule
) -> None:
    """Overwrite each gradient with the weights after the step; None stays None."""
    present = [g for g in gradients if g is not None]
    scale = gradient_scale(present, rule.clip_norm)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            continue
        for weights, block in blocks(parameter.detach(), gradient):
            if rule.optimizer == "sgd":
                torch.add(weights, block, alpha=-rule.learning_rate * scale, out=block)
            else:
                block.mul_(scale)
                denominator = block.abs().add_(rule.epsilon)
                torch.addcdiv(weights, block, denominator, value=-rule.learning_rate, out=block)


def blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same stretch of each tensor (all of one shape), a cache's worth at a time, as views."""
    if all(t.is_contiguous() for t in tensors):
        flat = [t.view(-1) for t in tensors]
        yield from zip(*(torch.split(t, _BLOCK) for t in flat), strict=True)
    else:
        yield tensors
