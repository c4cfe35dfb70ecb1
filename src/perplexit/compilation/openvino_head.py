"""The perplexity head of an OpenVINO graph: a loop over rows of targets, blocks of the vocabulary.

In a turn of the loop every size is fixed, so that the blocks use the same memory one after the
other (of sizes that the engine does not know, each has its own), and small enough that a block of
logits is still in the cache when its exponentials are taken. Each block is a node with its own
constant slice of the head's matrix, which the engine packs once.

Shape suffixes: N = targets over all windows, R = rows of a turn, L = turns, D = hidden size,
V = vocabulary, C = columns of a block, K = blocks.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as ops
from torch import Tensor, nn

from perplexit.checkpoints.module_call import twin_with
from perplexit.compilation.body_and_head import LogitsHead
from perplexit.compilation.openvino_attention import ints
from perplexit.errors import CompilationError
from perplexit.resources.engine_tricks import is_on

HEAD_PREFIX = "perplexit_head"
ROWS = 128  # fewer make slower products, more fill up the last turn with rows for nothing
_FEWEST_COLUMNS = 1024  # with 128 rows half a megabyte: more is not quicker
_MOST_BLOCKS = 256  # of a very large vocabulary: every block is a handful of nodes to compile

Convert = Callable[..., ov.Model]  # a module and its example inputs → its graph


def columns_at_a_time(vocab_size: int) -> int:
    """Return how many columns of logits the head makes at a time; all with the trick off."""
    if not is_on("openvino_head"):
        return vocab_size
    shared = -(-vocab_size // _MOST_BLOCKS)
    return min(vocab_size, max(_FEWEST_COLUMNS, -(-shared // 64) * 64))


def nll_of_targets(
    model: Any, hidden_ND: Any, target_rows_N: Any, target_ids_N: Any, convert: Convert
) -> Any:
    """Return a node that gives nll_N, float32, by the model's own head.

    `hidden_ND` are the states of all windows end to end, of which `target_rows_N` predict.
    Raises CompilationError where the head has no single matrix.
    """
    num_targets = ops.shape_of(target_rows_N, output_type="i64")
    turns = [_in_turns(values, num_targets) for values in (target_rows_N, target_ids_N)]
    num_turns = ops.gather(ops.shape_of(turns[0], output_type="i64"), _int(0), _int(0))
    loop = ops.loop(num_turns, ops.constant(True, ov.Type.boolean))
    body = _turn(model, int(hidden_ND.get_output_partial_shape(0)[1].get_length()), convert)
    loop.set_function(body)
    rows_1R, ids_1R, states_ND = body.get_parameters()
    for inner, outer in ((rows_1R, turns[0]), (ids_1R, turns[1])):
        loop.set_sliced_input(inner, outer.output(0), 0, 1, 1, -1, 0)
    loop.set_invariant_input(states_ND, hidden_ND.output(0))
    goes_on, nll_1R = body.get_results()
    loop.set_special_body_ports([-1, 0])
    loop.get_iter_value(goes_on.output(0), -1)
    nll_LR = loop.get_concatenated_slices(nll_1R.output(0), 0, 1, 1, -1, 0)
    flat = ops.reshape(nll_LR, ints(-1), special_zero=False)
    return ops.slice(flat, ints(0), num_targets, ints(1), ints(0))


def mark_head(head: ov.Model) -> None:
    """Name the head's nodes, so that no weight compression takes them."""
    for index, op in enumerate(head.get_ops()):
        op.set_friendly_name(f"{HEAD_PREFIX}.{index}")


def _in_turns(values_N: Any, num_targets: Any) -> Any:
    """Reshape (N) to (L, R), filled up with zeros."""
    missing = ops.floor_mod(ops.negative(num_targets), ints(ROWS))
    padded = ops.pad(values_N, ints(0), missing, "constant", ops.constant(0, ov.Type.i64))
    return ops.reshape(padded, ints(-1, ROWS), special_zero=False)


def _turn(model: Any, hidden_size: int, convert: Convert) -> ov.Model:
    """Return a turn of the loop: (1, R) rows, (1, R) ids, all hidden states → (1, R) losses."""
    rows_1R = ops.parameter(ov.PartialShape([1, ROWS]), ov.Type.i64)
    ids_1R = ops.parameter(ov.PartialShape([1, ROWS]), ov.Type.i64)
    states_ND = ops.parameter(ov.PartialShape([-1, hidden_size]), ov.Type.f32)
    hidden_RD = ops.gather(states_ND, ops.squeeze(rows_1R, ints(0)), _int(0))
    nll_R = _nll_in_blocks(model, hidden_RD, ops.squeeze(ids_1R, ints(0)), convert)
    nll_1R = ops.unsqueeze(nll_R, ints(0))
    goes_on = ops.constant(True, ov.Type.boolean)
    return ov.Model([goes_on.output(0), nll_1R.output(0)], [rows_1R, ids_1R, states_ND], "turn")


def _nll_in_blocks(model: Any, hidden_RD: Any, target_ids_R: Any, convert: Convert) -> Any:
    """Return a node that gives nll_R of the target ids.

    nll = log Σ_k s_k·exp(m_k − m) + m − own, with m_k and s_k = Σ exp(logit − m_k) of block k,
    m = max m_k, and own the target's logit.
    """
    vocab_size = len(_output_linear(model)[1].weight)
    columns = columns_at_a_time(vocab_size)
    target_R1 = ops.unsqueeze(target_ids_R, ints(1))
    column_R1 = ops.floor_mod(target_R1, ints(columns))
    largest, sums, own = [], [], []
    for index, logits_RC in enumerate(_block_logits(model, hidden_RD, columns, convert)):
        largest_R1 = ops.reduce_max(logits_RC, ints(1), keep_dims=True)
        shifted_RC = ops.exp(ops.subtract(logits_RC, largest_R1))
        largest.append(largest_R1)
        sums.append(ops.reduce_sum(shifted_RC, ints(1), keep_dims=True))
        last = min(columns, vocab_size - index * columns) - 1
        inside_R1 = ops.minimum(column_R1, ints(last))  # the last block is narrower
        own.append(ops.gather_elements(logits_RC, inside_R1, axis=1))
    largest_RK, sums_RK, own_RK = (ops.concat(each, axis=1) for each in (largest, sums, own))
    block_R1 = ops.divide(target_R1, ints(columns))
    own_R1 = ops.gather_elements(own_RK, block_R1, axis=1)
    top_R1 = ops.reduce_max(largest_RK, ints(1), keep_dims=True)
    scaled_RK = ops.multiply(sums_RK, ops.exp(ops.subtract(largest_RK, top_R1)))
    log_sum_R1 = ops.log(ops.reduce_sum(scaled_RK, ints(1), keep_dims=True))
    return ops.squeeze(ops.add(log_sum_R1, ops.subtract(top_R1, own_R1)), ints(1))


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
        """Map (B, T, D) to (B, T, C)."""
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
        self.head = LogitsHead(twin_with(model, path, self.turns))

    def forward(self, hidden_RD: Tensor) -> list[Tensor]:
        """Map (R, D) to K times (R, C)."""
        return [self.head(hidden_RD[None]).flatten(0, 1) for _ in self.turns.blocks]


def _block_logits(model: Any, hidden_RD: Any, columns: int, convert: Convert) -> list[Any]:
    """Return the logits_RC of each block as a node that reads `hidden_RD`."""
    hidden_size = int(hidden_RD.get_output_partial_shape(0)[1].get_length())
    example_RD = torch.linspace(-1, 1, ROWS * hidden_size).reshape(ROWS, hidden_size)
    head = convert(_LogitsInBlocks(model, columns), example_RD)
    mark_head(head)
    for reader in list(head.get_parameters()[0].output(0).get_target_inputs()):
        reader.replace_source_output(hidden_RD.output(0))
    return [result.input_value(0) for result in head.get_results()]


def _output_linear(model: Any) -> tuple[str, nn.Linear]:
    """Return where the matrix that makes the logits is in the model, and the matrix."""
    output = model.get_output_embeddings()
    path = next((name for name, module in model.named_modules() if module is output), None)
    if path is None or not isinstance(output, nn.Linear):
        raise CompilationError(
            f"expected a head with one matrix, got {type(output).__name__} in "
            f"{type(model).__name__}; evaluate the checkpoint with PyTorch instead (hf:…), or "
            "compile it with --no-perplexity"
        )
    return path, output


def _int(value: int) -> Any:
    return ops.constant(np.int64(value))
