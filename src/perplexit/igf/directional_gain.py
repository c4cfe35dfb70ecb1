"""Directional information gain: for SGD, from losses alone, for a whole batch of contexts at once.

Shape suffixes: N = contexts of the objective, B = contexts of one call, T = ids of a context.
"""

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from perplexit.errors import UsageError
from perplexit.igf.losses import ContextScorer, context_losses
from perplexit.igf.optimizer_step import (
    StepRule,
    objective_gradient,
    replaced_weights,
    trainable_parameters,
)

Derivative = Literal["central", "forward-mode"]


class DirectionalGain:
    """For SGD: the derivative of each context's loss along the objective's gradient, times lr.

    `<dL/dw, dloss(X)/dw>` is the first-order gain of an SGD step, and it is symmetric in the two
    gradients: so a derivative along dL/dw, which is made once, replaces every context's backward
    pass. There are two ways to compute that derivative:

    central:      `(loss(X; w + h·dL/dw) - loss(X; w - h·dL/dw)) / 2h`, two forward passes; the two
                  sets of weights are made once and are all the memory that it needs.
    forward-mode: dual numbers, exact, about three forward passes and slower attention.

    shift: h, given as the change of the objective's own loss that it stands for, in nats.
    """

    def __init__(
        self,
        model: nn.Module,
        objective_NT: Tensor,
        rule: StepRule,
        *,
        shift: float = 0.02,
        derivative: Derivative = "central",
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
        self._derivative = derivative
        if derivative == "central":
            self._h = shift / _square_norm(gradient)
            self._above, self._below = _shifted(self._parameters, gradient, self._h)
        else:
            self._tangents = {
                name: direction
                for (name, _), direction in zip(_named(model), gradient, strict=True)
                if direction is not None
            }

    def gains(self, contexts_BT: Tensor) -> NDArray[np.float64]:
        """See GainMeasure."""
        if self._derivative == "central":
            above = self._losses(self._above, contexts_BT)
            slopes = (above - self._losses(self._below, contexts_BT)) / (2 * self._h)
        else:
            slopes = self._forward_mode(contexts_BT)
        gains: NDArray[np.float64] = self._rule.learning_rate * slopes
        return gains

    def _losses(self, weights: list[Tensor], contexts_BT: Tensor) -> NDArray[np.float64]:
        with replaced_weights(self._parameters, weights):
            return self._scorer.losses(contexts_BT)

    def _forward_mode(self, contexts_BT: Tensor) -> NDArray[np.float64]:
        weights = {n: p.detach() for n, p in _named(self._model) if n in self._tangents}

        def losses(dual: dict[str, Tensor]) -> Tensor:
            found: Tensor = torch.func.functional_call(_Losses(self._model), dual, (contexts_BT,))
            return found

        point = {f"model.{name}": tensor for name, tensor in weights.items()}
        along = {f"model.{name}": tensor for name, tensor in self._tangents.items()}
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no dual form
            slopes: Tensor = torch.func.jvp(losses, (point,), (along,))[1]
        return np.asarray(slopes.double().cpu().numpy())


class _Losses(nn.Module):
    """A module whose output is the contexts' losses, so that `functional_call` replaces weights."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, contexts_BT: Tensor) -> Tensor:
        """See `context_losses`."""
        return context_losses(self.model, contexts_BT)


def _named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


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
