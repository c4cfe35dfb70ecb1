"""Information gain of contexts: how much one optimizer step on each lowers the objective's loss.

    gain(X) = L(objective; weights) - L(objective; weights after one step on X)         nats

Three ways to it, behind one protocol:

mode          what                                                cost of a label
exact         takes the step and measures                         a step, the whole objective
first-order   <dL/dw, -step(X)>, the step's first-order gain      a forward and a backward pass
directional   for SGD: lr · d/dh loss(X; w + h · dL/dw) at 0      two forward passes

Shape suffixes: N = contexts of the objective, B = contexts of one call, T = ids of a context.
"""

from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from perplexit.errors import UsageError
from perplexit.igf.directional_gain import DirectionalGain
from perplexit.igf.first_order_gain import FirstOrderGain
from perplexit.igf.losses import ContextScorer, context_losses
from perplexit.igf.steps import StepRule, stepped

Mode = Literal["exact", "first-order", "directional"]
MODES: tuple[Mode, ...] = ("exact", "first-order", "directional")


class GainMeasure(Protocol):
    """Measures information gain. The model's weights are bit-identical before and after."""

    objective_loss: float  # nats a target, before any step
    batch_size: int  # contexts that one call of `gains` takes best

    def gains(self, contexts_BT: Tensor) -> NDArray[np.float64]:
        """The gain of each context in nats, float64 [B]; positive = the objective gets easier."""
        ...


def gain_measure(
    model: nn.Module,
    objective_NT: Tensor,
    *,
    mode: Mode = "exact",
    rule: StepRule | None = None,
    dropout: bool = False,
    batch_ids: int = 1024,
) -> GainMeasure:
    """The measure of that name. `rule` defaults to the paper's AdamW, for `directional` to SGD.

    dropout: compute each context's gradient in training mode (the original does so).
    Raises UsageError where mode and rule do not go together.
    """
    if mode == "directional":
        rule = rule or StepRule("sgd", clip_norm=None)
        if dropout:
            raise UsageError(
                "expected no dropout with the directional mode, which compares two losses of one "
                "context; use --mode exact or first-order with dropout"
            )
        return DirectionalGain(model, objective_NT, rule, batch_ids=batch_ids)
    rule = rule or StepRule()
    if mode == "exact":
        return ExactGain(model, objective_NT, rule, dropout=dropout, batch_ids=batch_ids)
    if mode == "first-order":
        return FirstOrderGain(model, objective_NT, rule, dropout=dropout, batch_ids=batch_ids)
    raise UsageError(f"expected a mode of {', '.join(MODES)}, got {mode!r}")


class ExactGain:
    """One step on each context, the objective's loss before and after it."""

    batch_size = 1

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
        self._objective_NT = objective_NT
        self._rule = rule
        self._dropout = dropout
        self._scorer = ContextScorer(model, batch_ids=batch_ids)
        self.objective_loss = self._scorer.mean_loss(objective_NT)

    def gains(self, contexts_BT: Tensor) -> NDArray[np.float64]:
        """See GainMeasure."""
        return np.array([self._gain(context[None]) for context in contexts_BT], dtype=np.float64)

    def _gain(self, context_1T: Tensor) -> float:
        def loss() -> Tensor:
            return context_losses(self._model, context_1T)[0]

        with stepped(self._model, loss, self._rule, dropout=self._dropout):
            after = self._scorer.mean_loss(self._objective_NT)
        return self.objective_loss - after
