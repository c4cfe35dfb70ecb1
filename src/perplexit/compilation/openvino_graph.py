"""A checkpoint's module → an OpenVINO graph, with the perplexity head inside or with logits.

Shape suffixes: B = windows, T = ids a window, N = targets over all windows, D = hidden size,
V = vocabulary, C = rows of logits alive at a time, K = chunks of the targets.
"""

import warnings
from typing import Any

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as ops

from perplexit.checkpoints.quiet import quiet_transformers
from perplexit.compilation.model_parts import (
    Body,
    LogitsHead,
    LossHead,
    exportable_attention,
    rows_at_a_time,
)
from perplexit.errors import CompilationError
from perplexit.programs import ProgramShapes
from perplexit.quantization.openvino_engine import BOUNDARY

HEAD_PREFIX = "perplexit_head"
_LENGTH_DEPENDENT_ROTARY = ("dynamic", "longrope")


def convert_graph(model: Any, *, perplexity: bool, shapes: ProgramShapes) -> ov.Model:
    """The graph of a transformers causal language model (left in eager attention and eval mode).

    With `perplexity`: input_ids_BT, target_rows_N, target_ids_N → nll_N, the head in a loop over
    chunks of the targets. Without: input_ids_BT → logits_BTV.
    Raises CompilationError where the model cannot be traced or converted.
    """
    model.eval().requires_grad_(False)
    _check_rotary(model)
    hidden_size = int(model.config.get_text_config().hidden_size)
    vocab_size = int(model.config.get_text_config().vocab_size)
    ids_BT = torch.arange(24).reshape(2, 12) % min(7, vocab_size)
    with exportable_attention(model):
        body = _converted(Body(model), ids_BT)
    if perplexity:
        rows = rows_at_a_time(vocab_size)
        hidden_CD = torch.linspace(-1, 1, rows * hidden_size).reshape(rows, hidden_size)
        head = _converted(LossHead(model), hidden_CD, torch.arange(rows) % vocab_size)
        graph = _with_loss_head(body, head, rows)
    else:
        hidden_BTD = torch.linspace(-1, 1, 24 * hidden_size).reshape(2, 12, hidden_size)
        graph = _with_logits_head(body, _converted(LogitsHead(model), hidden_BTD))
    _fix_shapes(graph, shapes)
    return graph


def _check_rotary(model: Any) -> None:
    rotary = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    kind = rotary.get("rope_type") if isinstance(rotary, dict) else None
    if kind in _LENGTH_DEPENDENT_ROTARY:
        raise CompilationError(
            f"expected positions that do not depend on the window's length, got {kind} rotary "
            "embeddings, of which a graph would hold one branch; evaluate the checkpoint with "
            "PyTorch instead (hf:…), or compile it to ONNX"
        )


def _converted(module: torch.nn.Module, *inputs: torch.Tensor) -> ov.Model:
    """Traced, which takes a second where torch.export with any sizes takes half a minute.

    A trace keeps what depended on the example's sizes; the finished program is therefore checked
    on other sizes than these.
    """
    try:
        with torch.no_grad(), warnings.catch_warnings(), quiet_transformers():
            warnings.simplefilter("ignore")
            trace: Any = torch.jit.trace  # untyped
            traced = trace(module.eval(), inputs, strict=False, check_trace=False)
            return ov.convert_model(traced, example_input=inputs)
    except Exception as error:  # neither's errors have a common root
        first_line = str(error).strip().partition("\n")[0]
        raise CompilationError(
            f"expected a model that OpenVINO can convert; {type(error).__name__}: {first_line}. "
            "Evaluate the checkpoint with PyTorch instead (hf:…)"
        ) from error


def _with_logits_head(body: ov.Model, head: ov.Model) -> ov.Model:
    hidden_BTD = _boundary(body)
    _mark_head(head)
    head_input = head.get_parameters()[0]
    logits_BTV = head.get_results()[0].input_value(0)
    for reader in list(head_input.output(0).get_target_inputs()):
        reader.replace_source_output(hidden_BTD)
    logits_BTV.get_tensor().set_names({"logits"})
    return ov.Model([logits_BTV], _ids_of(body), "logits")


def _with_loss_head(body: ov.Model, head: ov.Model, rows: int) -> ov.Model:
    hidden_BTD = _boundary(body)
    target_rows_N = ops.parameter(ov.PartialShape([-1]), ov.Type.i64)
    target_ids_N = ops.parameter(ov.PartialShape([-1]), ov.Type.i64)
    target_rows_N.output(0).get_tensor().set_names({"target_rows"})
    target_ids_N.output(0).get_tensor().set_names({"target_ids"})
    hidden_size = int(hidden_BTD.get_partial_shape()[2].get_length())
    hidden_ND = ops.reshape(hidden_BTD, _ints(-1, hidden_size), special_zero=False)
    num_targets = ops.shape_of(target_rows_N, output_type="i64")
    chunks = [_chunked(x, num_targets, rows) for x in (target_rows_N, target_ids_N)]
    num_chunks = ops.gather(ops.shape_of(chunks[0], output_type="i64"), _int(0), _int(0))
    loop = ops.loop(num_chunks, ops.constant(True, ov.Type.boolean))
    chunk = _chunk_body(head, hidden_size, rows)
    rows_1C, ids_1C, states_ND = chunk.get_parameters()
    loop.set_function(chunk)
    for inner, outer in ((rows_1C, chunks[0]), (ids_1C, chunks[1])):
        loop.set_sliced_input(inner, outer.output(0), 0, 1, 1, -1, 0)
    loop.set_invariant_input(states_ND, hidden_ND.output(0))
    condition, nll_1C = chunk.get_results()
    loop.set_special_body_ports([-1, 0])
    loop.get_iter_value(condition.output(0), -1)
    nll_KC = loop.get_concatenated_slices(nll_1C.output(0), 0, 1, 1, -1, 0)
    flat = ops.reshape(nll_KC, _ints(-1), special_zero=False)
    nll_N = ops.slice(flat, _ints(0), num_targets, _ints(1), _ints(0))
    nll_N.output(0).get_tensor().set_names({"nll"})
    inputs = [*_ids_of(body), target_rows_N, target_ids_N]
    return ov.Model([nll_N.output(0)], inputs, "perplexity")


def _chunk_body(head: ov.Model, hidden_size: int, rows: int) -> ov.Model:
    """One turn of the loop: (1, C) rows, (1, C) ids and all hidden states → (1, C) losses."""
    rows_1C = ops.parameter(ov.PartialShape([1, rows]), ov.Type.i64)
    ids_1C = ops.parameter(ov.PartialShape([1, rows]), ov.Type.i64)
    states_ND = ops.parameter(ov.PartialShape([-1, hidden_size]), ov.Type.f32)
    hidden_CD = ops.gather(states_ND, ops.squeeze(rows_1C, _ints(0)), _int(0))
    ids_C = ops.squeeze(ids_1C, _ints(0))
    _mark_head(head)
    for inner, outer in zip(head.get_parameters(), (hidden_CD, ids_C), strict=True):
        for reader in list(inner.output(0).get_target_inputs()):
            reader.replace_source_output(outer.output(0))
    nll_1C = ops.unsqueeze(head.get_results()[0].input_value(0), _ints(0))
    goes_on = ops.constant(True, ov.Type.boolean)
    return ov.Model([goes_on.output(0), nll_1C.output(0)], [rows_1C, ids_1C, states_ND], "chunk")


def _chunked(values_N: Any, num_targets: Any, rows: int) -> Any:
    """(N) → (K, C), filled up with zeros."""
    last = ops.floor_mod(ops.negative(num_targets), _ints(rows))
    padded = ops.pad(values_N, _ints(0), last, "constant", ops.constant(0, ov.Type.i64))
    return ops.reshape(padded, _ints(-1, rows), special_zero=False)


def _boundary(body: ov.Model) -> Any:
    output = body.get_results()[0].input_value(0)
    output.get_node().set_friendly_name(BOUNDARY)
    return output


def _ids_of(body: ov.Model) -> list[Any]:
    (ids,) = body.get_parameters()
    ids.set_friendly_name("input_ids")
    ids.output(0).get_tensor().set_names({"input_ids"})
    return [ids]


def _mark_head(head: ov.Model) -> None:
    for index, op in enumerate(head.get_ops()):
        op.set_friendly_name(f"{HEAD_PREFIX}.{index}")


def _fix_shapes(graph: ov.Model, shapes: ProgramShapes) -> None:
    if shapes.batch_size is not None or shapes.length is not None:
        graph.reshape(
            {"input_ids": ov.PartialShape([shapes.batch_size or -1, shapes.length or -1])}
        )
    graph.validate_nodes_and_infer_types()


def _int(value: int) -> Any:
    return ops.constant(np.int64(value))


def _ints(*values: int) -> Any:
    return ops.constant(np.array(values, np.int64))
