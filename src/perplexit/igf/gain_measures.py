"""Information gain of contexts: how much one optimizer step on each lowers the objective's loss.

    gain(X) = L(objective; weights) - L(objective; weights after one step on X)         nats

Three ways to measure it, behind one interface:

mode          what                                                cost of a label
exact         takes the step and measures                         a step, the whole objective
first-order   <dL/dw, -step(X)>, the step's first-order gain      a forward and a backward pass
directional   for SGD: lr · d/dh loss(X; w + h · dL/dw) at 0      two forward passes

Shape suffixes: N = contexts of the objective, B = contexts of one call, T = ids of a context.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from perplexit.errors import NonFiniteError, UsageError
from perplexit.igf.losses import ContextScorer, context_losses
from perplexit.igf.optimizer_step import (
    StepRule,
    blocks,
    objective_gradient,
    replaced_weights,
    sparse_embedding_gradients,
    stepped,
    trainable_parameters,
)

Mode = Literal["exact", "first-order", "directional"]
MODES: tuple[Mode, ...] = ("exact", "first-order", "directional")


class GainMeasure(ABC):
    """Measures information gain. The model's weights are bit-identical before and after.

    objective_loss: nats per target, before any step.
    """

    def __init__(
        self, model: nn.Module, objective_NT: Tensor, rule: StepRule, *, dropout: bool = False
    ) -> None:
        self._model = model.eval()
        self._objective_NT = objective_NT
        self._rule = rule
        self._dropout = dropout
        self._scorer = ContextScorer(model)
        self.objective_loss = self._scorer.mean_loss(objective_NT)

    @abstractmethod
    def gains(self, contexts_BT: Tensor) -> NDArray[np.float64]:
        """Return each context's gain in nats, float64 [B]; positive: the objective improves."""


def default_rule(mode: Mode) -> StepRule:
    """Return the paper's AdamW, for the directional mode SGD without clipping."""
    return StepRule("sgd", clip_norm=None) if mode == "directional" else StepRule()


def gain_measure(
    model: nn.Module,
    objective_NT: Tensor,
    *,
    mode: Mode = "exact",
    rule: StepRule | None = None,
    dropout: bool = False,
) -> GainMeasure:
    """Return the measure of this mode. `rule` defaults to `default_rule(mode)`.

    dropout: compute each context's gradient in training mode (the original does so).
    Raises UsageError where mode and rule do not go together.
    """
    if mode not in MODES:
        raise UsageError(f"expected a mode of {', '.join(MODES)}, got {mode!r}")
    rule = rule or default_rule(mode)
    if mode == "exact":
        return ExactGain(model, objective_NT, rule, dropout=dropout)
    if mode == "first-order":
        return FirstOrderGain(model, objective_NT, rule, dropout=dropout)
    if dropout:
        raise UsageError(
            "expected no dropout with the directional mode, which compares two losses of one "
            "context; use --mode exact or first-order with dropout"
        )
    return DirectionalGain(model, objective_NT, rule)


class ExactGain(GainMeasure):
    """One step on each context, the objective's loss before and after it."""

    def gains(self, contexts_BT: Tensor) -> NDArray[np.float64]:
        """See GainMeasure."""
        return np.array([self._gain(context[None]) for context in contexts_BT], dtype=np.float64)

    def _gain(self, context_1T: Tensor) -> float:
        loss = partial(context_losses, self._model, context_1T)
        with stepped(self._model, lambda: loss()[0], self._rule, dropout=self._dropout):
            after = self._scorer.mean_loss(self._objective_NT)
        return self.objective_loss - after


class FirstOrderGain(GainMeasure):
    """The objective's gradient along each context's own step, added up parameter by parameter.

    A parameter's gradient is used as soon as backpropagation has made it and is freed at once, so
    memory holds the objective's gradient and one parameter's, never a whole second gradient. The
    norm that clipping needs is therefore known only at the end. For SGD it scales the result. For
    AdamW it would only make epsilon larger (`c·g / (|c·g| + eps) = g / (|g| + eps / c)`), and is
    left out.
    """

    def __init__(
        self, model: nn.Module, objective_NT: Tensor, rule: StepRule, *, dropout: bool = False
    ) -> None:
        super().__init__(model, objective_NT, rule, dropout=dropout)
        self._parameters = trainable_parameters(model)
        self._objective_gradient = objective_gradient(model, objective_NT)
        self._gain = 0.0
        self._square_norm = 0.0

    def gains(self, contexts_BT: Tensor) -> NDArray[np.float64]:
        """See GainMeasure."""
        self._model.train(self._dropout)
        try:
            with self._hooks(), sparse_embedding_gradients(self._model), torch.enable_grad():
                found = [self._gain_of(context[None]) for context in contexts_BT]
        finally:
            self._model.eval()
        return np.array(found, dtype=np.float64)

    def _gain_of(self, context_1T: Tensor) -> float:
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
        """Call `_take_gradient` inside whenever backpropagation has made a parameter's gradient."""
        handles = []
        for parameter, direction in zip(self._parameters, self._objective_gradient, strict=True):
            if direction is not None:
                add: Any = parameter.register_post_accumulate_grad_hook
                handles.append(add(partial(self._take_gradient, direction)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for parameter in self._parameters:
                parameter.grad = None

    def _take_gradient(self, direction: Tensor, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is not None:
            self._add(direction, gradient)

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


class DirectionalGain(GainMeasure):
    """For SGD: the derivative of each context's loss along the objective's gradient, times lr.

    `<dL/dw, dloss(X)/dw>` is the first-order gain of an SGD step, and it is symmetric in the two
    gradients: so a derivative along dL/dw, which is made once, replaces every context's backward
    pass. It is the central difference `(loss(X; w + h·dL/dw) - loss(X; w - h·dL/dw)) / 2h`: two
    forward passes; the two sets of weights are made once and are all the memory that it needs.

    shift: gives h, as the change of the objective's own loss that it makes, in nats.
    """

    def __init__(
        self, model: nn.Module, objective_NT: Tensor, rule: StepRule, *, shift: float = 0.02
    ) -> None:
        if rule.optimizer != "sgd" or rule.clip_norm is not None:
            raise UsageError(
                "expected SGD without clipping for the directional mode (the norm of a context's "
                f"gradient is never computed), got {rule.optimizer} with clip norm "
                f"{rule.clip_norm}; use --mode first-order, or --optimizer sgd --clip-norm none"
            )
        super().__init__(model, objective_NT, rule)
        self._parameters = trainable_parameters(model)
        gradient = objective_gradient(model, objective_NT)
        square_norm = sum(
            float(torch.linalg.vector_norm(g)) ** 2 for g in gradient if g is not None
        )
        if square_norm == 0:
            raise UsageError(
                "expected an objective that the trainable parameters can change, got a gradient of "
                "zero; check which parameters are trainable"
            )
        self._h = shift / square_norm
        self._above, self._below = _shifted(self._parameters, gradient, self._h)

    def gains(self, contexts_BT: Tensor) -> NDArray[np.float64]:
        """See GainMeasure."""
        above = self._losses(self._above, contexts_BT)
        slopes = (above - self._losses(self._below, contexts_BT)) / (2 * self._h)
        gains: NDArray[np.float64] = self._rule.learning_rate * slopes
        return gains

    def _losses(self, weights: list[Tensor], contexts_BT: Tensor) -> NDArray[np.float64]:
        with replaced_weights(self._parameters, weights):
            return self._scorer.losses(contexts_BT)


def _shifted(
    parameters: list[nn.Parameter], gradient: list[Tensor | None], h: float
) -> tuple[list[Tensor], list[Tensor]]:
    above, below = [], []
    for parameter, direction in zip(parameters, gradient, strict=True):
        weights = parameter.detach()
        if direction is None:
            above.append(weights)
            below.append(weights)
        else:
            above.append(torch.add(weights, direction, alpha=h))
            below.append(torch.add(weights, direction, alpha=-h, out=direction))
    return above, below
