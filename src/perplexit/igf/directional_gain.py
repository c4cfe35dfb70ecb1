"""Directional information gain: for SGD, from losses alone, for a whole batch of contexts at once.

Shape suffixes: N = contexts of the objective, B = contexts of one call, T = ids of a context.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from perplexit.errors import UsageError
from perplexit.igf.losses import ContextScorer
from perplexit.igf.optimizer_step import (
    StepRule,
    objective_gradient,
    replaced_weights,
    trainable_parameters,
)


class DirectionalGain:
    """For SGD: the derivative of each context's loss along the objective's gradient, times lr.

    `<dL/dw, dloss(X)/dw>` is the first-order gain of an SGD step, and it is symmetric in the two
    gradients: so a derivative along dL/dw, which is made once, replaces every context's backward
    pass. It is the central difference `(loss(X; w + h·dL/dw) - loss(X; w - h·dL/dw)) / 2h`: two
    forward passes; the two sets of weights are made once and are all the memory that it needs.

    shift: h, given as the change of the objective's own loss that it stands for, in nats.
    """

    def __init__(
        self,
        model: nn.Module,
        objective_NT: Tensor,
        rule: StepRule,
        *,
        shift: float = 0.02,
    ) -> None:
        if rule.optimizer != "sgd" or rule.clip_norm is not None:
            raise UsageError(
                "expected SGD without clipping for the directional mode (the norm of a context's "
                f"gradient is never computed), got {rule.optimizer} with clip norm "
                f"{rule.clip_norm}; use --mode first-order, or --optimizer sgd --clip-norm none"
            )
        self._model = model.eval()
        self._rule = rule
        self._scorer = ContextScorer(model)
        self._parameters = trainable_parameters(model)
        self.objective_loss = self._scorer.mean_loss(objective_NT)
        gradient = objective_gradient(model, objective_NT)
        self._h = shift / _square_norm(gradient)
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


def _square_norm(gradient: list[Tensor | None]) -> float:
    norms = (float(torch.linalg.vector_norm(g)) for g in gradient if g is not None)
    found = sum(norm**2 for norm in norms)
    if found == 0:
        raise UsageError(
            "expected an objective that the trainable parameters can change, got a gradient of "
            "zero; check which parameters are trainable"
        )
    return found


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
