"""A checkpoint's module → an ONNX graph, with the perplexity head inside or with logits.

Shape suffixes: B = windows, T = ids per window, N = targets over all windows, D = hidden size,
V = vocabulary, C = rows of logits alive at a time.
"""

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from onnxscript.optimizer import fold_constants
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan

from perplexit.compilation.body_and_head import (
    LogitsProgram,
    check_rotary,
    exportable_attention,
    rows_at_a_time,
)
from perplexit.compilation.compiler_errors import stated_by
from perplexit.compilation.onnx_graph_cache import cached_graph
from perplexit.compilation.onnx_key_values import (
    PAST,
    PRESENT,
    CachedLogitsProgram,
    CacheShape,
    cache_shape,
)
from perplexit.errors import CompilationError
from perplexit.program_record import ProgramShapes

_OPSET = 23  # the first with an Attention operator, which holds the scores once, not three times


@dataclass(frozen=True)
class ExportedGraph:
    """An ONNX graph whose initializers bear the checkpoint's own names.

    head_weights: the names under which the head's matrix occurs.
    cache:        of a program that takes and gives keys and values, their shape.
    """

    model: ir.Model
    head_weights: frozenset[str]
    cache: CacheShape | None = None


def export_graph(
    model: Any, *, perplexity: bool, shapes: ProgramShapes, weights_fingerprint: str
) -> ExportedGraph:
    """Export a transformers causal language model, left in eager attention and eval mode.

    `weights_fingerprint` finds the graph again when the same checkpoint is compiled once more.
    With `perplexity`: input_ids_BT, attention_mask_BT, target_rows_N (the row of the flattened
    B·T hidden states that predicts the target) and target_ids_N → nll_N.
    Without: input_ids_BT, attention_mask_BT → logits_BTV; where the length is free and the model
    keeps keys and values, with pasts in and presents out (see `onnx_key_values`).
    """
    check_rotary(model, shapes)
    model.eval().requires_grad_(False)
    head_rows = rows_at_a_time(model.config.get_text_config().vocab_size) if perplexity else None
    cache = None if perplexity or shapes.length else cache_shape(model)
    module: nn.Module = _LossProgram(model, head_rows) if head_rows else LogitsProgram(model)
    signature = _signature(shapes, head_rows)
    if cache is not None:
        module, signature = CachedLogitsProgram(model), _with_cache(signature, cache, shapes, model)

    def export() -> ir.Model:
        with exportable_attention(model):
            graph = _exported(module, signature)
        _hoist_transposes(graph)
        _simplify(graph)
        _restore_names(graph, model.base_model_prefix)
        return graph

    model.set_attn_implementation("eager")  # the plainest: what the program is checked against
    graph = cached_graph(
        export,
        dict(model.named_parameters(remove_duplicate=False)),
        weights_fingerprint=weights_fingerprint,
        perplexity=perplexity,
        shapes=shapes,
    )
    return ExportedGraph(graph, _head_weight_names(model), cache)


class _LossProgram(LogitsProgram):
    def __init__(self, model: Any, head_rows: int) -> None:
        super().__init__(model)
        self.head_rows = head_rows

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor, target_rows: Tensor, target_ids: Tensor
    ) -> Tensor:
        hidden_BTD = self.body(input_ids, attention_mask)
        num_targets = target_rows.shape[0]
        num_chunks = (num_targets + self.head_rows - 1) // self.head_rows
        padding = (0, num_chunks * self.head_rows - num_targets)
        rows, ids = (
            nn.functional.pad(x, padding).reshape(num_chunks, self.head_rows)
            for x in (target_rows, target_ids)
        )
        _, nll = scan(self._chunk, hidden_BTD.flatten(0, 1), (rows, ids))
        return nll.flatten()[:num_targets]  # type: ignore[no-any-return]

    def _chunk(self, hidden_ND: Tensor, chunk: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        rows_C, ids_C = chunk
        logits_CV = self.head(hidden_ND.index_select(0, rows_C)[None])[0]
        shifted_CV = logits_CV - logits_CV.amax(-1, keepdim=True)
        # Summed in float64: ONNX Runtime's float32 ReduceLogSumExp is 1e-4 nats low at V = 49,152.
        sum_C = shifted_CV.exp().sum(-1, dtype=torch.float64)
        nll_C = sum_C.log().float() - shifted_CV.gather(-1, ids_C[:, None])[:, 0]
        return hidden_ND.clone(), nll_C  # a scan may not return its carry itself


@dataclass(frozen=True)
class _Signature:
    """Example arguments, which of their sizes are free, and the names of all that goes in and out.

    dynamic: a mapping from axis to size for each argument, those of `*pasts` in a tuple.
    """

    arguments: tuple[Tensor, ...]
    dynamic: tuple[Any, ...]
    inputs: list[str]
    outputs: list[str]


def _signature(shapes: ProgramShapes, head_rows: int | None) -> _Signature:
    # Sizes above 1 (1 would be taken for a constant), and more targets than one chunk.
    batch, length = shapes.batch_size or 2, shapes.length or 12
    any_size = torch.export.Dim.DYNAMIC
    ids = torch.arange(batch * length).reshape(batch, length) % 7
    dims = {
        axis: any_size
        for axis, fixed in enumerate((shapes.batch_size, shapes.length))
        if fixed is None
    }
    arguments, dynamic = [ids, torch.ones_like(ids)], [dims, dims]
    names = ["input_ids", "attention_mask"]
    if head_rows:
        num_targets = shapes.num_targets or head_rows + 3
        targets = torch.arange(num_targets) % min(7, batch * length)
        arguments += [targets, targets.clone()]
        dynamic += [{} if shapes.num_targets else {0: any_size}] * 2
        names += ["target_rows", "target_ids"]
    return _Signature(tuple(arguments), tuple(dynamic), names, ["nll" if head_rows else "logits"])


def _with_cache(
    plain: _Signature, cache: CacheShape, shapes: ProgramShapes, model: Any
) -> _Signature:
    ids, mask = plain.arguments
    pasts = cache.example(len(ids), 5, next(model.parameters()).dtype)
    any_size = torch.export.Dim.DYNAMIC
    dims = {2: any_size} if shapes.batch_size else {0: any_size, 2: any_size}
    return _Signature(
        (ids, torch.cat([mask[:, :5], mask], 1), *pasts),
        (*plain.dynamic, tuple(dims for _ in pasts)),
        plain.inputs + cache.names(PAST),
        plain.outputs + cache.names(PRESENT),
    )


def _exported(module: nn.Module, signature: _Signature) -> ir.Model:
    with stated_by("PyTorch can export to ONNX", logger="torch.onnx"), torch.no_grad():
        program = torch.onnx.export(
            torch.export.export(
                module, signature.arguments, dynamic_shapes=signature.dynamic, strict=False
            ),
            input_names=signature.inputs,
            output_names=signature.outputs,
            dynamo=True,
            opset_version=_OPSET,
            optimize=False,  # its pattern search takes a minute; `_simplify` takes a second
            verbose=False,
        )
    if program is None:
        raise CompilationError("expected an ONNX program, but PyTorch's exporter returned none")
    return program.model


def _simplify(model: ir.Model) -> None:
    """Fold what is constant but the weights' transposes, which would cost them their names."""
    fold_constants(model, should_fold=lambda node: False if node.op_type == "Transpose" else None)
    for each in (
        passes.IdentityEliminationPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        # The exporter notes source lines and paths of this machine at every node.
        passes.ClearMetadataAndDocStringPass(),
    ):
        each(model)


def _hoist_transposes(model: ir.Model) -> None:
    """Move transposes of weights out of subgraphs: there, the engine keeps both layouts."""
    for node in list(model.graph):
        kept = [a for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]
        for subgraph in [attribute.as_graph() for attribute in kept]:
            for inner in list(subgraph):
                weight = inner.inputs[0] if inner.op_type == "Transpose" else None
                if weight is not None and weight.name in model.graph.initializers:
                    subgraph.remove(inner)
                    model.graph.insert_before(node, inner)


def _restore_names(model: ir.Model, body_prefix: str) -> None:
    """Rename initializers from the program's module tree to the checkpoint's."""
    for value in list(model.graph.initializers.values()):
        if value.name and value.name.startswith("body.body."):
            value.name = f"{body_prefix}.{value.name.removeprefix('body.body.')}"
        elif value.name and value.name.startswith("head.head."):
            value.name = value.name.removeprefix("head.head.")


def _head_weight_names(model: Any) -> frozenset[str]:
    head = model.get_output_embeddings()
    if head is None:
        return frozenset()
    parameters = model.named_parameters(remove_duplicate=False)
    return frozenset(name for name, tensor in parameters if tensor is head.weight)
