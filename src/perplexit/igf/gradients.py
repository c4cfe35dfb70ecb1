"""The objective's gradient, and what keeps gradients small and weights whole while it is used.

Shape suffixes: N = contexts of the objective, T = ids of a context.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from perplexit.igf.losses import context_losses
from perplexit.igf.steps import gradient_scale, trainable_parameters


def objective_gradient(
    model: nn.Module, objective_NT: Tensor, *, batch_ids: int = 256
) -> list[Tensor | None]:
    """The gradient of the objective's mean loss, a tensor a trainable parameter (None: unused).

    Batched; the model is in evaluation mode and its `.grad` fields are empty afterwards.
    Raises NonFiniteError where it is not finite.
    """
    parameters = trainable_parameters(model)
    batch_size = max(1, batch_ids // objective_NT.shape[1])
    model.eval()
    try:
        for parameter in parameters:
            parameter.grad = None
        with torch.enable_grad():
            for batch in torch.split(objective_NT, batch_size):
                torch.autograd.backward(context_losses(model, batch).sum() / len(objective_NT))
        gradient = [p.grad for p in parameters]
    finally:
        for parameter in parameters:
            parameter.grad = None
    gradient_scale([g for g in gradient if g is not None], None)  # raises unless finite
    return gradient


@contextmanager
def sparse_embedding_gradients(model: nn.Module) -> Iterator[None]:
    """While inside, embeddings give sparse gradients: a few rows instead of the vocabulary's."""
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding) and m.max_norm is None]
    before = [e.sparse for e in embeddings]
    try:
        for embedding in embeddings:
            embedding.sparse = True
        yield
    finally:
        for embedding, sparse in zip(embeddings, before, strict=True):
            embedding.sparse = sparse
