"""The loss of a causal language model on short contexts: differentiable, or only measured.

Shape suffixes: N = contexts, B = contexts of one batch, T = ids of a context.
A context of T ids has T - 1 targets; the last id predicts nothing and is not given to the model.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from perplexit.checkpoints.length_dependent_rope import LengthDependentRope, held_at
from perplexit.errors import NonFiniteError, UsageError
from perplexit.functional.nll import DEFAULT_LOGITS_BYTES, HeadRequest, head_statistics, rows_within
from perplexit.sessions.pytorch.forward_probe import find_forward

DEFAULT_BATCH_IDS = 1024


def ids_on_device(model: nn.Module, ids_NT: NDArray[np.int32]) -> Tensor:
    """Return the ids as an int64 tensor [N, T] on the model's device."""
    return torch.from_numpy(np.ascontiguousarray(ids_NT)).long().to(next(model.parameters()).device)


def context_losses(model: nn.Module, contexts_BT: Tensor) -> Tensor:
    """Return the mean nll of each context in nats, [B], differentiable, in float32 or better."""
    with held_at(LengthDependentRope.of(model), contexts_BT.shape[1]):
        logits = model(input_ids=contexts_BT[:, :-1], use_cache=False).logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = functional.cross_entropy(
        logits.flatten(0, 1), contexts_BT[:, 1:].flatten(), reduction="none"
    )
    return losses.view(contexts_BT.shape[0], -1).mean(1)


class ContextScorer:
    """Losses of contexts without a gradient, through the scoring core of Perplexit's sessions.

    Make it once per model: it finds the model's own head, so that only a chunk of the logits exists
    at a time. Each call reads the weights as they are then, also while they are replaced.
    """

    def __init__(self, model: nn.Module, *, batch_ids: int = DEFAULT_BATCH_IDS) -> None:
        model.eval()
        self._model = model
        self._batch_ids = batch_ids
        with torch.inference_mode():
            self._forward, vocab_size = find_forward(
                model,
                len(model.get_input_embeddings().weight),  # type: ignore[operator]
            )
            self._rope = LengthDependentRope.of(model)
        self._chunk_rows = rows_within(DEFAULT_LOGITS_BYTES, vocab_size)

    def losses(self, contexts_NT: Tensor) -> NDArray[np.float64]:
        """Return the mean nll of each context in nats, float64 [N].

        Raises NonFiniteError where one is not finite, UsageError for contexts without a target.
        """
        length = contexts_NT.shape[1]
        if length < 2:
            raise UsageError(f"expected contexts of at least 2 ids, got {length}; no targets")
        self._model.eval()
        with torch.inference_mode():
            batches = torch.split(contexts_NT, max(1, self._batch_ids // length))
            found = [self._batch(batch) for batch in batches]
        losses = np.concatenate(found) if found else np.zeros(0)
        if not np.isfinite(losses).all():
            first = int(np.flatnonzero(~np.isfinite(losses))[0])
            raise NonFiniteError(
                f"expected finite losses, got {losses[first]} on context {first}; "
                "load the model in float32, or lower the learning rate"
            )
        return losses

    def mean_loss(self, contexts_NT: Tensor) -> float:
        """Return the mean nll per target over all contexts (they are equally long), in nats."""
        return float(self.losses(contexts_NT).mean())

    def _batch(self, contexts_BT: Tensor) -> NDArray[np.float64]:
        with held_at(self._rope, contexts_BT.shape[1]):
            rows_NX = self._forward.rows(contexts_BT[:, :-1], None).flatten(0, 1)
        statistics = head_statistics(self._forward.head)(
            rows_NX, contexts_BT[:, 1:].flatten(), HeadRequest(self._chunk_rows)
        )
        nll_BT = statistics.nll_N.view(len(contexts_BT), -1).to(torch.float64)
        return np.asarray(nll_BT.mean(1).cpu().numpy(), dtype=np.float64)
