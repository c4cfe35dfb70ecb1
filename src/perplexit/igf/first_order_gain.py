"""First-order information gain: the objective's gradient along a context's own step.

Shape suffixes: N = contexts of the objective, B = contexts of one call, T = ids of a context.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from perplexit.errors import NonFiniteError
from perplexit.igf.gradients import objective_gradient, sparse_embedding_gradients
from perplexit.igf.losses import context_losses, mean_loss
from perplexit.igf.steps import StepRule, blocks, trainable_parameters


class FirstOrderGain:
    """The objective's gradient along each context's own step, added up parameter by parameter.

    A parameter's gradient is used the moment backpropagation has made it and freed at once, so
    memory holds the objective's gradient and one parameter's, never a whole second gradient. The
    norm that clipping needs is therefore known only at the end. For SGD it scales the result. For
    AdamW it would only make epsilon larger (`c·g / (|c·g| + eps) = g / (|g| + eps / c)`), and is
    left out.
    """

    batch_size = 4

    def __init__(
        self,
        model: nn.Module,
        objective_NT: Tensor,
        rule: StepRule,
        *,
        dropout: bool = False,
        batch_ids: int = 1024,
    ) -> None:
        self._model = model.eval()
        self._rule = rule
        self._dropout = dropout
        self._parameters = trainable_parameters(model)
        self.objective_loss = mean_loss(model, objective_NT, batch_ids=batch_ids)
        self._objective_gradient = objective_gradient(model, objective_NT)
        self._gain = 0.0
        self._square_norm = 0.0

    def gains(self, contexts_BT: Tensor) -> NDArray[np.float64]:
        """See GainMeasure."""
        self._model.train(self._dropout)
        try:
            with self._hooks(), sparse_embedding_gradients(self._model), torch.enable_grad():
                found = [self._one(context[None]) for context in contexts_BT]
        finally:
            self._model.eval()
        return np.array(found, dtype=np.float64)

    def _one(self, context_1T: Tensor) -> float:
        self._gain = self._square_norm = 0.0
        torch.autograd.backward(context_losses(self._model, context_1T)[0])
        gain = self._rule.learning_rate * self._gain
        if self._rule.optimizer == "sgd" and self._rule.clip_norm is not None:
            gain *= min(1.0, self._rule.clip_norm / (self._square_norm**0.5 + 1e-6))
        if not np.isfinite(gain):
            raise NonFiniteError(
                f"expected a finite gain, got {gain}; load the model in float32, and check its "
                "weights"
            )
        return gain

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        handles = []
        for parameter, direction in zip(self._parameters, self._objective_gradient, strict=True):
            if direction is not None:
                add: Any = parameter.register_post_accumulate_grad_hook
                handles.append(add(self._adder(direction)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for parameter in self._parameters:
                parameter.grad = None

    def _adder(self, direction: Tensor) -> Callable[[Tensor], None]:
        def add(parameter: Tensor) -> None:
            gradient = parameter.grad
            parameter.grad = None
            if gradient is not None:
                self._add(direction, gradient)

        return add

    def _add(self, direction: Tensor, gradient: Tensor) -> None:
        if gradient.is_sparse:  # an embedding: rows of ids that the context lacks are zero
            gradient = gradient.coalesce()
            direction, gradient = direction[gradient.indices()[0]], gradient.values()
        if self._rule.optimizer == "sgd":
            self._gain += float(torch.dot(direction.flatten(), gradient.flatten()))
            self._square_norm += float(torch.linalg.vector_norm(gradient)) ** 2
            return
        for along, block in blocks(direction, gradient):
            denominator = block.abs().add_(self._rule.epsilon)
            self._gain += float(torch.dot(along.flatten(), block.div_(denominator).flatten()))
