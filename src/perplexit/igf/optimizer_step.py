"""Gradients, one optimizer step on a loss, and a way back that is exact to the last bit.

The first step of AdamW from a zero state has a closed form: the bias corrections cancel, and with
gradient `g` (after clipping), learning rate `lr` and `epsilon`

    step = -lr · g / (|g| + epsilon)                         AdamW, no weight decay
    step = -lr · g                                           SGD

so no optimizer state is needed. The new weights are built in the gradients' own memory and put in
the parameters' place; the old ones are never written to, hence nothing has to be restored.

Shape suffixes: N = contexts of the objective, T = ids of a context.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from perplexit.errors import NonFiniteError, UsageError
from perplexit.igf.losses import context_losses

_BLOCK = 1 << 18  # elements: three blocks of float32 stay in a core's cache
_OBJECTIVE_BATCH_IDS = 256


@dataclass(frozen=True, slots=True)
class StepRule:
    """The optimizer whose first step is meant; the defaults are the paper's.

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


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that a step changes, each once (tied weights are one parameter).

    Raises UsageError where there are none.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise UsageError(
            "expected a model with trainable parameters, got one whose parameters are all frozen; "
            "call requires_grad_(True) on those to train"
        )
    return parameters


def objective_gradient(model: nn.Module, objective_NT: Tensor) -> list[Tensor | None]:
    """Return the gradient of the objective's mean loss: one tensor per trainable parameter.

    None stands for a parameter that the loss does not use. Computed in batches, in evaluation
    mode. Raises NonFiniteError where the gradient is not finite.
    """
    batch_size = max(1, _OBJECTIVE_BATCH_IDS // objective_NT.shape[1])
    batches = torch.split(objective_NT, batch_size)
    losses = (context_losses(model, batch).sum() / len(objective_NT) for batch in batches)
    gradient = _gradients(model, trainable_parameters(model), lambda: losses, dropout=False)
    gradient_scale([g for g in gradient if g is not None], None)  # raises unless finite
    return gradient


@contextmanager
def sparse_embedding_gradients(model: nn.Module) -> Iterator[None]:
    """Let embeddings give sparse gradients inside: a few rows instead of the whole vocabulary."""
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding) and m.max_norm is None]
    before = [e.sparse for e in embeddings]
    try:
        for embedding in embeddings:
            embedding.sparse = True
        yield
    finally:
        for embedding, sparse in zip(embeddings, before, strict=True):
            embedding.sparse = sparse


def gradient_scale(gradients: Sequence[Tensor], clip_norm: float | None) -> float:
    """Return `min(1, clip_norm / (norm + 1e-6))`, as torch.nn.utils.clip_grad_norm_ scales.

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
    """Hold the model's weights after one step of `rule` on `loss()` inside the block.

    Outside they are the very tensors they were before, also after an exception. Costs one copy of
    the trainable weights (the gradients' memory). The model is left in evaluation mode; with
    `dropout` the gradient is computed in training mode.
    """
    parameters = trainable_parameters(model)
    gradients = _gradients(model, parameters, lambda: [loss()], dropout=dropout)
    turn_gradients_into_weights(parameters, gradients, rule)
    changed = [(p, w) for p, w in zip(parameters, gradients, strict=True) if w is not None]
    with replaced_weights([p for p, _ in changed], [w for _, w in changed]):
        yield


@contextmanager
def replaced_weights(
    parameters: Sequence[nn.Parameter], weights: Sequence[Tensor]
) -> Iterator[None]:
    """Put `weights` into the parameters inside the block; afterwards put the same tensors back."""
    kept = [p.data for p in parameters]
    try:
        for parameter, replacement in zip(parameters, weights, strict=True):
            parameter.data = replacement
        yield
    finally:
        for parameter, original in zip(parameters, kept, strict=True):
            parameter.data = original


def _gradients(
    model: nn.Module,
    parameters: list[nn.Parameter],
    losses: Callable[[], Iterable[Tensor]],
    *,
    dropout: bool,
) -> list[Tensor | None]:
    """Return the gradient of the sum of `losses()`, computed one loss after the other.

    The model is in evaluation mode and its `.grad` fields are empty afterwards.
    """
    model.train(dropout)
    try:
        for parameter in parameters:
            parameter.grad = None
        with torch.enable_grad():
            for loss in losses():
                torch.autograd.backward(loss)
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
    """Yield views of the same stretch of each tensor (all of one shape), of a cache's size."""
    if all(t.is_contiguous() for t in tensors):
        flat = [t.view(-1) for t in tensors]
        yield from zip(*(torch.split(t, _BLOCK) for t in flat), strict=True)
    else:
        yield tensors
