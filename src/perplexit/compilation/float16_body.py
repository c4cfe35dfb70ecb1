"""A checkpoint's body in float16, its head in float32: what a program of dtype float16 holds."""

from typing import Any

import torch
from torch import Tensor, nn


def halve_body(model: Any) -> None:
    """Turn the body's weights to float16 in place; the head keeps its own, and gets float32 rows.

    A head that shares the embedding's weights keeps a float32 copy of them. Buffers (rotary
    frequencies) stay float32, as in a checkpoint that transformers loads in float16.
    """
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().float().clone(), requires_grad=False)
    for parameter in model.base_model.parameters():
        parameter.data = parameter.data.to(torch.float16)
    head.register_forward_pre_hook(_widened)


def _widened(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    hidden, *rest = arguments
    return (hidden.float(), *rest)
