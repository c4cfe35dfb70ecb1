"""The loss of a causal language model on short contexts: differentiable, or only measured.

Shape suffixes: N = contexts, B = contexts of one batch, T = ids of a context.
A context of T ids has T - 1 targets; the last id predicts nothing and is never fed.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from perplexit.errors import NonFiniteError, UsageError
from perplexit.functional.nll import token_statistics

DEFAULT_BATCH_IDS = 1024


def context_losses(model: nn.Module, contexts_BT: Tensor) -> Tensor:
    """The mean nll of each context in nats, [B], differentiable, in float32 or better."""
    logits = model(input_ids=contexts_BT[:, :-1], use_cache=False).logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = functional.cross_entropy(
        logits.flatten(0, 1), contexts_BT[:, 1:].flatten(), reduction="none"
    )
    return losses.view(contexts_BT.shape[0], -1).mean(1)


def measured_losses(
    model: nn.Module, contexts_NT: Tensor, *, batch_ids: int = DEFAULT_BATCH_IDS
) -> NDArray[np.float64]:
    """The mean nll of each context in nats, float64 [N]: batched, without a gradient.

    Goes through the same log-softmax as every run of Perplexit. The model should be in evaluation
    mode. Raises NonFiniteError where a target's loss is not finite.
    """
    num_contexts, length = contexts_NT.shape
    if length < 2:
        raise UsageError(f"expected contexts of at least 2 ids, got {length}; nothing is predicted")
    batch_size = max(1, batch_ids // length)
    losses = np.empty(num_contexts, dtype=np.float64)
    with torch.inference_mode():
        for start in range(0, num_contexts, batch_size):
            batch = contexts_NT[start : start + batch_size]
            losses[start : start + len(batch)] = _batch_losses(model, batch)
    if not np.isfinite(losses).all():
        first = int(np.flatnonzero(~np.isfinite(losses))[0])
        raise NonFiniteError(
            f"expected finite losses, got {losses[first]} on context {first}; "
            "load the model in float32, or lower the learning rate"
        )
    return losses


def _batch_losses(model: nn.Module, contexts_BT: Tensor) -> NDArray[np.float64]:
    logits = model(input_ids=contexts_BT[:, :-1], use_cache=False).logits
    nll = token_statistics(
        logits.flatten(0, 1), contexts_BT[:, 1:].flatten(), with_details=False
    ).nll_N
    sums = nll.view(len(contexts_BT), -1).to(torch.float64).mean(1)
    return np.asarray(sums.cpu().numpy(), dtype=np.float64)


def mean_loss(
    model: nn.Module, contexts_NT: Tensor, *, batch_ids: int = DEFAULT_BATCH_IDS
) -> float:
    """The mean nll a target over all contexts (they are equally long), in nats."""
    return float(measured_losses(model, contexts_NT, batch_ids=batch_ids).mean())


def perplexity_of(loss: float) -> float:
    """exp(loss), infinite only where a float64 cannot hold it."""
    return math.exp(loss) if loss < 709.78 else math.inf
