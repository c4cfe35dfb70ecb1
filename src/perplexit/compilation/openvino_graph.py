"""A checkpoint's module → an OpenVINO graph, with the perplexity head inside or with logits.

Shape suffixes: B = windows, T = ids per window, N = targets over all windows, D = hidden size,
V = vocabulary.
"""

from typing import Any

import openvino as ov
import torch
from openvino import opset13 as ops

from perplexit.checkpoints.quiet import quiet_transformers
from perplexit.compilation.body_and_head import Body, LogitsHead, check_rotary, exportable_attention
from perplexit.compilation.compiler_errors import stated_by
from perplexit.compilation.openvino_attention import ints, skip_future_keys
from perplexit.compilation.openvino_head import attached, nll_of_targets
from perplexit.program_record import ProgramShapes
from perplexit.quantization.openvino_engine import BOUNDARY
from perplexit.resources.engine_tricks import is_on


def convert_graph(model: Any, *, perplexity: bool, shapes: ProgramShapes) -> ov.Model:
    """Convert a transformers causal language model (left in eager attention and eval mode).

    With `perplexity`: input_ids_BT, target_rows_N, target_ids_N → nll_N, the head in a loop over
    rows of targets. Without: input_ids_BT → logits_BTV.
    Raises CompilationError where the model cannot be traced or converted.
    """
    model.eval().requires_grad_(False)
    check_rotary(model, shapes)
    hidden_size = int(model.config.get_text_config().hidden_size)
    vocab_size = int(model.config.get_text_config().vocab_size)
    ids_BT = torch.arange(24).reshape(2, 12) % min(7, vocab_size)
    with exportable_attention(model):
        body = _converted(Body(model), ids_BT)
    if is_on("openvino_attention"):
        skip_future_keys(body)
    if perplexity:
        graph = _with_loss_head(model, body)
    else:
        hidden_BTD = torch.linspace(-1, 1, 24 * hidden_size).reshape(2, 12, hidden_size)
        graph = _with_logits_head(body, _converted(LogitsHead(model), hidden_BTD))
    _fix_shapes(graph, shapes)
    return graph


def _converted(module: torch.nn.Module, *inputs: torch.Tensor) -> ov.Model:
    """Trace and convert: a trace takes a second, torch.export with any sizes half a minute.

    A trace keeps what depended on the example's sizes; the finished program is therefore checked
    on other sizes than these.
    """
    stated = stated_by("OpenVINO can convert", logger="accelerate")
    with stated, torch.no_grad(), quiet_transformers():
        trace: Any = torch.jit.trace  # untyped
        traced = trace(module.eval(), inputs, strict=False, check_trace=False)
        return ov.convert_model(traced, example_input=inputs)


def _with_logits_head(body: ov.Model, head: ov.Model) -> ov.Model:
    logits_BTV = attached(head, _boundary(body))
    logits_BTV.get_tensor().set_names({"logits"})
    return ov.Model([logits_BTV], _ids_of(body), "logits")


def _with_loss_head(model: Any, body: ov.Model) -> ov.Model:
    hidden_BTD = _boundary(body)
    target_rows_N = ops.parameter(ov.PartialShape([-1]), ov.Type.i64)
    target_ids_N = ops.parameter(ov.PartialShape([-1]), ov.Type.i64)
    target_rows_N.output(0).get_tensor().set_names({"target_rows"})
    target_ids_N.output(0).get_tensor().set_names({"target_ids"})
    hidden_size = int(hidden_BTD.get_partial_shape()[2].get_length())
    hidden_ND = ops.reshape(hidden_BTD, ints(-1, hidden_size), special_zero=False)
    nll_N = nll_of_targets(model, hidden_ND, target_rows_N, target_ids_N, _converted)
    nll_N.output(0).get_tensor().set_names({"nll"})
    inputs = [*_ids_of(body), target_rows_N, target_ids_N]
    return ov.Model([nll_N.output(0)], inputs, "perplexity")


def _boundary(body: ov.Model) -> Any:
    output = body.get_results()[0].input_value(0)
    output.get_node().set_friendly_name(BOUNDARY)
    return output


def _ids_of(body: ov.Model) -> list[Any]:
    (ids,) = body.get_parameters()
    ids.set_friendly_name("input_ids")
    ids.output(0).get_tensor().set_names({"input_ids"})
    return [ids]


def _fix_shapes(graph: ov.Model, shapes: ProgramShapes) -> None:
    if shapes.batch_size is not None or shapes.length is not None:
        graph.reshape(
            {"input_ids": ov.PartialShape([shapes.batch_size or -1, shapes.length or -1])}
        )
    graph.validate_nodes_and_infer_types()
