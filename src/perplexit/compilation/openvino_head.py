"""The perplexity head of an OpenVINO graph: log-sum-exp over blocks of the vocabulary.

Every block is a node with its own constant slice of the head's matrix, which the engine packs once
for its matrix product; the rows of a call are never cut, so that no loop and no padding is needed.

Shape suffixes: N = targets over all windows, D = hidden size, V = vocabulary, C = columns of a
block, K = blocks.
"""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as ops
from torch import Tensor, nn

from perplexit.compilation.model_parts import LogitsHead
from perplexit.errors import CompilationError

HEAD_PREFIX = "perplexit_head"
# Columns of logits alive at a time. A row of them takes what a hidden state takes; fewer columns
# leave the matrix product waiting, more fall out of the cache between it and the exponentials.
_FEWEST_COLUMNS = 1024
_MOST_BLOCKS = 256  # of a very large vocabulary: every block is a handful of nodes to compile

Convert = Callable[..., ov.Model]  # a module and its example inputs → its graph


def columns_at_a_time(vocab_size: int) -> int:
    """How many columns of logits the head makes at a time."""
    shared = -(-vocab_size // _MOST_BLOCKS)
    return min(vocab_size, max(_FEWEST_COLUMNS, -(-shared // 64) * 64))


def nll_in_blocks(model: Any, hidden_ND: Any, target_ids_N: Any, convert: Convert) -> Any:
    """Nodes that give nll_N of the target ids, float32, by the model's own head.

    nll = log Σ_k s_k·exp(m_k − m) + m − own, with m_k and s_k = Σ exp(logit − m_k) of block k,
    m = max m_k, and own the target's logit.
    Raises CompilationError where the head has no single matrix.
    """
    vocab_size = len(_output_linear(model)[1].weight)
    columns = columns_at_a_time(vocab_size)
    target_N1 = ops.unsqueeze(target_ids_N, _ints(1))
    column_N1 = ops.floor_mod(target_N1, _ints(columns))
    largest, sums, own = [], [], []
    for index, logits_NC in enumerate(_block_logits(model, hidden_ND, columns, convert)):
        largest_N1 = ops.reduce_max(logits_NC, _ints(1), keep_dims=True)
        shifted_NC = ops.exp(ops.subtract(logits_NC, largest_N1))
        largest.append(largest_N1)
        sums.append(ops.reduce_sum(shifted_NC, _ints(1), keep_dims=True))
        last = min(columns, vocab_size - index * columns) - 1
        inside_N1 = ops.minimum(column_N1, _ints(last))  # the last block is narrower
        own.append(ops.gather_elements(logits_NC, inside_N1, axis=1))
    largest_NK, sums_NK, own_NK = (ops.concat(each, axis=1) for each in (largest, sums, own))
    block_N1 = ops.divide(target_N1, _ints(columns))
    own_N1 = ops.gather_elements(own_NK, block_N1, axis=1)
    top_N1 = ops.reduce_max(largest_NK, _ints(1), keep_dims=True)
    scaled_NK = ops.multiply(sums_NK, ops.exp(ops.subtract(largest_NK, top_N1)))
    log_sum_N1 = ops.log(ops.reduce_sum(scaled_NK, _ints(1), keep_dims=True))
    return ops.squeeze(ops.add(log_sum_N1, ops.subtract(top_N1, own_N1)), _ints(1))


def mark_head(head: ov.Model) -> None:
    """Name the head's nodes, so that no weight compression takes them."""
    for index, op in enumerate(head.get_ops()):
        op.set_friendly_name(f"{HEAD_PREFIX}.{index}")


class _BlocksInTurn(nn.Module):
    """Stands in for the head's matrix: its next block of columns with every call."""

    def __init__(self, linear: nn.Linear, columns: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        for start in range(0, linear.out_features, columns):
            weight_CD = linear.weight[start : start + columns]
            block = nn.Linear(linear.in_features, len(weight_CD), bias=linear.bias is not None)
            block.weight = nn.Parameter(weight_CD, requires_grad=False)
            if linear.bias is not None:
                bias_C = linear.bias[start : start + columns]
                block.bias = nn.Parameter(bias_C, requires_grad=False)
            self.blocks.append(block)
        self.turn = 0

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """(B, T, D) → (B, T, C)."""
        block = self.blocks[self.turn % len(self.blocks)]
        self.turn += 1
        return block(hidden_BTD)  # type: ignore[no-any-return]


class _LogitsInBlocks(nn.Module):
    """Hidden states → the logits block by block; what follows the matrix is taken for elementwise.

    Where it is not, the finished program's losses are not the checkpoint's, which is an error.
    """

    def __init__(self, model: Any, columns: int) -> None:
        super().__init__()
        path, linear = _output_linear(model)
        self.turns = _BlocksInTurn(linear, columns)
        self.head = LogitsHead(_with_module(model, path.split("."), self.turns))

    def forward(self, hidden_ND: Tensor) -> list[Tensor]:
        """(N, D) → K times (N, C)."""
        return [self.head(hidden_ND[None]).flatten(0, 1) for _ in self.turns.blocks]


def _block_logits(model: Any, hidden_ND: Any, columns: int, convert: Convert) -> list[Any]:
    """The logits_NC of each block as a node that reads `hidden_ND`."""
    hidden_size = int(hidden_ND.get_output_partial_shape(0)[1].get_length())
    example_ND = torch.linspace(-1, 1, 16 * hidden_size).reshape(16, hidden_size)
    head = convert(_LogitsInBlocks(model, columns), example_ND)
    mark_head(head)
    for reader in list(head.get_parameters()[0].output(0).get_target_inputs()):
        reader.replace_source_output(hidden_ND.output(0))
    return [result.input_value(0) for result in head.get_results()]


def _output_linear(model: Any) -> tuple[str, nn.Linear]:
    """The matrix that makes the logits, and where it is in the model."""
    output = model.get_output_embeddings()
    path = next((name for name, module in model.named_modules() if module is output), None)
    if path is None or not isinstance(output, nn.Linear):
        raise CompilationError(
            f"expected a head with one matrix, got {type(output).__name__} in "
            f"{type(model).__name__}; evaluate the checkpoint with PyTorch instead (hf:…), or "
            "compile it with --no-perplexity"
        )
    return path, output


def _with_module(module: Any, path: list[str], replacement: nn.Module) -> Any:
    """A shallow copy of `module` with another module at `path`; the original stays as it is."""
    name, rest = path[0], path[1:]
    changed = copy.copy(module)
    inner = _with_module(module._modules[name], rest, replacement) if rest else replacement
    changed._modules = {**module._modules, name: inner}
    return changed


def _ints(*values: int) -> Any:
    return ops.constant(np.array(values, np.int64))
