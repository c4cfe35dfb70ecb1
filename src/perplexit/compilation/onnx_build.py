"""The files of an ONNX program: export, quantize, save, verify, describe."""

from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from numpy.typing import NDArray

from perplexit.checkpoints.loading import Checkpoint
from perplexit.compilation.body_and_head import halve_body
from perplexit.compilation.onnx_export import ExportedGraph, export_graph
from perplexit.compilation.onnx_key_values import CacheShape
from perplexit.compilation.program_build import (
    IN_FLOAT32,
    TOLERANCE,
    ProgramBuild,
    check_changed,
    verified,
)
from perplexit.compilation.targets import CompileRequest
from perplexit.program_batches import Feed, RunProgram
from perplexit.program_record import ProgramCache, ProgramMetadata, ProgramQuantization
from perplexit.quantization.onnx_blocks import (
    ACCURACY_LEVEL,
    QuantizedWeight,
    large_tensors,
    quantize_weights,
    weight_bytes,
)
from perplexit.quantization.precisions import Recipe

MODEL_FILE = "model.onnx"
_PACKAGES = ("torch", "transformers", "onnxscript", "onnxruntime")
_LARGE_SHARE = 0.01  # a tensor with at least 1 % of the parameters is large
# Nats per token. In float16, PyTorch and ONNX Runtime round their sums at other places.
_TOLERANCES = {"float32": TOLERANCE, "float16": 0.1}


def build_onnx_program(
    checkpoint: Checkpoint, folder: Path, request: CompileRequest
) -> ProgramMetadata:
    """Write the program into `folder` and return its record.

    The checkpoint's module is used up: it ends with the weights that the program holds.
    Raises CompilationError where the program's losses are not the checkpoint's, and
    QuantizationError where the recipe changed nothing.
    """
    recipe, against = request.recipe, IN_FLOAT32
    build = ProgramBuild("onnx", checkpoint, request, request.shapes, _PACKAGES)
    model = build.module
    if request.dtype == "float16":
        halve_body(model)
        against = "the checkpoint in PyTorch, its body in float16 and its head in float32"
    graph = export_graph(
        model,
        perplexity=request.perplexity,
        shapes=build.shapes,
        weights_fingerprint=build.model.weights_fingerprint,
    )
    reference = build.checkpoint_losses()
    quantization, weights = _quantize(graph, recipe, build.model.num_parameters)
    path = folder / MODEL_FILE
    ir.save(graph.model, path, external_data=f"{MODEL_FILE}.data")
    if recipe is not None:
        for weight in weights:
            model.get_parameter(weight.name).data.copy_(torch.from_numpy(weight.dequantized()))
        before, reference = reference, build.checkpoint_losses()
        check_changed(reference, before, recipe.precision)
        against += f" with the weights that the {recipe.precision} blocks stand for"
    losses = build.program_losses(_runner(path), masked=True)
    return build.record(
        folder,
        verified(losses, reference, against, tolerance=_TOLERANCES[request.dtype]),
        dtype=request.dtype,
        opset=graph.model.graph.opset_imports[""],
        quantization=quantization,
        cache=_cache_of(graph.cache, request.dtype),
    )


def _cache_of(shape: CacheShape | None, dtype: str) -> ProgramCache | None:
    if shape is None:
        return None
    elements = sum(heads * size for layer in shape.layers for heads, size in layer)
    return ProgramCache(len(shape.layers), (2 if dtype == "float16" else 4) * elements, dtype)


def _quantize(
    graph: ExportedGraph, recipe: Recipe | None, num_parameters: int
) -> tuple[ProgramQuantization | None, Sequence[QuantizedWeight]]:
    if recipe is None:
        return None, ()
    weights = quantize_weights(graph.model, recipe.weights, keep=graph.head_weights)
    stored = {weight.name: weight for weight in weights}
    record = ProgramQuantization(
        name=recipe.precision,
        library=f"{recipe.library} {metadata.version('onnxruntime')}",
        num_modules=len(weights),
        num_bytes=sum(weight.num_bytes for weight in stored.values()),
        effective_bits=8 * weight_bytes(graph.model) / num_parameters,
        unquantized=large_tensors(graph.model, share=_LARGE_SHARE, num_parameters=num_parameters),
        settings={
            "bits": recipe.weights.bits,
            "block_size": recipe.weights.block_size,
            "symmetric": True,
            "accuracy_level": ACCURACY_LEVEL,
            "head": "float32, left as it was",
        },
    )
    return record, list(stored.values())


def _runner(path: Path) -> RunProgram:
    """Return the program as a function; one with a cache makes a prefill, one id, and the rest."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(feed: Feed) -> NDArray[np.float32]:
        pasts: dict[str, Any] = {
            x.name: np.empty(
                (len(feed["input_ids"]), x.shape[1], 0, x.shape[3]),
                np.float16 if x.type == "tensor(float16)" else np.float32,
            )
            for x in session.get_inputs()
            if x.name not in feed
        }
        if not pasts:
            output: NDArray[np.float32] = session.run(None, feed)[0]
            return output
        ids_BT, mask_BT = feed["input_ids"], feed["attention_mask"]
        length, parts = ids_BT.shape[1], []
        prompt = max(1, length // 2)
        for start, stop in ((0, prompt), (prompt, prompt + 1), (prompt + 1, length)):
            if start < min(stop, length):
                block = {"input_ids": ids_BT[:, start:stop], "attention_mask": mask_BT[:, :stop]}
                logits, *presents = session.run(None, block | pasts)
                pasts = dict(zip(pasts, presents, strict=True))
                parts.append(logits)
        return np.concatenate(parts, axis=1)

    return run
