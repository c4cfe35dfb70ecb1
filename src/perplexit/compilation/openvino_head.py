"""The perplexity head of an OpenVINO graph: a loop over rows of targets.

In a turn of the loop every size is fixed, so that the turns use the same memory one after the other
(of sizes that the engine does not know, each has its own).

Shape suffixes: N = targets over all windows, R = rows of a turn, L = turns, D = hidden size,
V = vocabulary.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as ops

from perplexit.compilation.body_and_head import LogitsHead, rows_at_a_time
from perplexit.compilation.openvino_attention import ints

HEAD_PREFIX = "perplexit_head"
Convert = Callable[..., ov.Model]  # a module and its example inputs → its graph


def head_rows(vocab_size: int) -> int:
    """Return how many targets a turn of the loop takes.

    Fewer make slower products, more fill up the last turn with rows for nothing.
    """
    return rows_at_a_time(vocab_size, logits_bytes=64 * 2**20, most=128)


def nll_of_targets(
    model: Any, hidden_ND: Any, target_rows_N: Any, target_ids_N: Any, convert: Convert
) -> Any:
    """Return a node that gives nll_N, float32, by the model's own head.

    `hidden_ND` are the states of all windows end to end, of which `target_rows_N` predict.
    """
    num_targets = ops.shape_of(target_rows_N, output_type="i64")
    rows = head_rows(int(model.config.get_text_config().vocab_size))
    turns = [_in_turns(values, rows, num_targets) for values in (target_rows_N, target_ids_N)]
    num_turns = ops.gather(ops.shape_of(turns[0], output_type="i64"), _int(0), _int(0))
    loop = ops.loop(num_turns, ops.constant(True, ov.Type.boolean))
    hidden_size = int(hidden_ND.get_output_partial_shape(0)[1].get_length())
    body = _turn(model, rows, hidden_size, convert)
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


def attached(head: ov.Model, hidden: ov.Output) -> Any:
    """Return the logits of a converted head that reads `hidden` in place of its parameter.

    Its nodes get names by which weight compression leaves them alone.
    """
    for index, op in enumerate(head.get_ops()):
        op.set_friendly_name(f"{HEAD_PREFIX}.{index}")
    for reader in list(head.get_parameters()[0].output(0).get_target_inputs()):
        reader.replace_source_output(hidden)
    return head.get_results()[0].input_value(0)


def _in_turns(values_N: Any, rows: int, num_targets: Any) -> Any:
    """Reshape (N) to (L, R), filled up with zeros."""
    missing = ops.floor_mod(ops.negative(num_targets), ints(rows))
    padded = ops.pad(values_N, ints(0), missing, "constant", ops.constant(0, ov.Type.i64))
    return ops.reshape(padded, ints(-1, rows), special_zero=False)


def _turn(model: Any, rows: int, hidden_size: int, convert: Convert) -> ov.Model:
    """Return a turn of the loop: (1, R) rows, (1, R) ids, all hidden states → (1, R) losses."""
    rows_1R = ops.parameter(ov.PartialShape([1, rows]), ov.Type.i64)
    ids_1R = ops.parameter(ov.PartialShape([1, rows]), ov.Type.i64)
    states_ND = ops.parameter(ov.PartialShape([-1, hidden_size]), ov.Type.f32)
    hidden_RD = ops.gather(states_ND, ops.squeeze(rows_1R, ints(0)), _int(0))
    nll_R = _nll_of_rows(model, hidden_RD, ops.squeeze(ids_1R, ints(0)), convert)
    nll_1R = ops.unsqueeze(nll_R, ints(0))
    goes_on = ops.constant(True, ov.Type.boolean)
    return ov.Model([goes_on.output(0), nll_1R.output(0)], [rows_1R, ids_1R, states_ND], "turn")


def _nll_of_rows(model: Any, hidden_RD: Any, target_ids_R: Any, convert: Convert) -> Any:
    """Return a node that gives nll_R of the target ids: log Σ exp(logit − m) + m − own.

    m is the largest logit, own the target's.
    """
    rows, hidden_size = (int(axis) for axis in hidden_RD.get_output_shape(0))
    example_1RD = torch.linspace(-1, 1, rows * hidden_size).reshape(1, rows, hidden_size)
    head = convert(LogitsHead(model), example_1RD)
    logits_1RV = attached(head, ops.unsqueeze(hidden_RD, ints(0)).output(0))
    logits_RV = ops.squeeze(logits_1RV, ints(0))
    largest_R1 = ops.reduce_max(logits_RV, ints(1), keep_dims=True)
    shifted_RV = ops.exp(ops.subtract(logits_RV, largest_R1))
    log_sum_R1 = ops.log(ops.reduce_sum(shifted_RV, ints(1), keep_dims=True))
    own_R1 = ops.gather_elements(logits_RV, ops.unsqueeze(target_ids_R, ints(1)), axis=1)
    return ops.squeeze(ops.add(log_sum_R1, ops.subtract(largest_R1, own_R1)), ints(1))


def _int(value: int) -> Any:
    return ops.constant(np.int64(value))
