"""The files of an ONNX program: export, quantize, save, verify, describe."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor

from perplexit import __version__
from perplexit.atomic_files import cache_folder, write_bytes
from perplexit.checkpoints.loading import Checkpoint
from perplexit.compilation.body_and_head import describe_model, halve_body, memory_of
from perplexit.compilation.loss_check import (
    TOLERANCE,
    check_changed,
    checkpoint_losses,
    program_losses,
    verification_windows,
    verified,
)
from perplexit.compilation.onnx_export import ExportedGraph, export_graph
from perplexit.compilation.onnx_key_values import CacheShape
from perplexit.compilation.targets import CompileRequest
from perplexit.fingerprints import json_fingerprint, sha256_of_file
from perplexit.program_batches import Feed, RunProgram
from perplexit.program_record import (
    ProgramCache,
    ProgramMetadata,
    ProgramQuantization,
    ProgramShapes,
    files_of,
)
from perplexit.quantization.onnx_blocks import (
    ACCURACY_LEVEL,
    QuantizedWeight,
    large_tensors,
    quantize_weights,
    weight_bytes,
)
from perplexit.quantization.precisions import Recipe

MODEL_FILE = "model.onnx"
_LARGE_SHARE = 0.01  # a tensor with at least 1 % of the parameters is large
# Nats a token. In float16, PyTorch and ONNX Runtime round their sums at other places.
_TOLERANCES = {"float32": TOLERANCE, "float16": 0.1}


def build_onnx_program(
    checkpoint: Checkpoint, folder: Path, request: CompileRequest
) -> ProgramMetadata:
    """Write the program into `folder` and return its record.

    The checkpoint's module is used up: it ends with the weights that the program holds.
    Raises CompilationError where the program's losses are not the checkpoint's, and
    QuantizationError where the recipe changed nothing.
    """
    recipe, perplexity, shapes = request.recipe, request.perplexity, request.shapes
    against = "the checkpoint in PyTorch float32"
    model: Any = checkpoint.model
    described = describe_model(
        model, address=checkpoint.source.address, fingerprint=checkpoint.source.fingerprint
    )
    windows = verification_windows(described, shapes)
    if request.dtype == "float16":
        halve_body(model)
        against = "the checkpoint in PyTorch, its body in float16 and its head in float32"
    graph = export_graph(
        model,
        perplexity=perplexity,
        shapes=shapes,
        weights_fingerprint=described.weights_fingerprint,
    )
    reference = checkpoint_losses(model, windows)
    quantization, weights = _quantize(graph, recipe, described.num_parameters)
    path = folder / MODEL_FILE
    ir.save(graph.model, path, external_data=f"{MODEL_FILE}.data")
    if recipe is not None:
        for weight in weights:
            model.get_parameter(weight.name).data.copy_(torch.from_numpy(weight.dequantized()))
        before, reference = reference, checkpoint_losses(model, windows)
        check_changed(reference, before, recipe.precision)
        against += f" with the weights that the {recipe.precision} blocks stand for"
    losses = program_losses(_runner(path), windows, shapes, perplexity=perplexity, masked=True)
    verification = verified(losses, reference, against, tolerance=_TOLERANCES[request.dtype])
    return ProgramMetadata(
        engine="onnx",
        perplexity=perplexity,
        dtype=request.dtype,
        opset=graph.model.graph.opset_imports[""],
        shapes=shapes,
        model=described,
        memory=memory_of(model),
        verification=verification,
        files=files_of(folder),
        quantization=quantization,
        head_rows=graph.head_rows,
        cache=_cache_of(graph.cache, request.dtype),
        made_by=_versions(),
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


def _versions() -> dict[str, str]:
    packages = ("torch", "transformers", "onnxscript", "onnxruntime")
    return {"perplexit": __version__} | {name: metadata.version(name) for name in packages}


_PLACE = "checkpoint"  # where a cached graph says that a weight is: its name is enough
_EXPORTER = ("onnx_export.py", "onnx_key_values.py", "body_and_head.py")
_MADE_BY = ("torch", "transformers", "onnxscript", "onnx-ir")


def cached_graph(
    export: Callable[[], ir.Model],
    parameters: Mapping[str, Tensor],
    *,
    weights_fingerprint: str,
    perplexity: bool,
    shapes: ProgramShapes,
) -> ir.Model:
    """Return what `export` returns for this very checkpoint, from the cache where it is there.

    `parameters` by the names that the graph's initializers have. The key holds everything that
    the graph depends on, the weights too: folding may have turned some into other constants.
    """
    conditions = {
        "weights": weights_fingerprint,
        "perplexity": perplexity,
        "shapes": asdict(shapes),
        "dtypes": sorted({str(tensor.dtype) for tensor in parameters.values()}),
        "made_by": {name: metadata.version(name) for name in _MADE_BY},
        "exporter": [sha256_of_file(Path(__file__).parent / name) for name in _EXPORTER],
    }
    path = cache_folder() / "onnx-graphs" / f"{json_fingerprint(conditions)}.onnx"
    graph = _read(path, parameters) if path.is_file() else None
    if graph is None:
        graph = export()
        _write(path, graph, parameters)
    return graph


def _read(path: Path, parameters: Mapping[str, Tensor]) -> ir.Model | None:
    """Return the cached graph with its weights back in place; None where it cannot be used."""
    try:
        graph = ir.load(path)
    except Exception:  # a damaged cache is a slow start, no error; protobuf's errors are many
        return None
    for value in graph.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            parameter = parameters.get(str(value.name))
            if parameter is None:
                return None
            value.const_value = TorchTensor(parameter, name=value.name)
    return graph


def _write(path: Path, graph: ir.Model, parameters: Mapping[str, Tensor]) -> None:
    weights = {
        value: value.const_value
        for value in graph.graph.initializers.values()
        if value.name in parameters and value.const_value is not None
    }
    try:
        for value, tensor in weights.items():
            shape, name = ir.Shape(tensor.shape.numpy()), str(value.name)
            value.const_value = ir.ExternalTensor(
                _PLACE, 0, 0, tensor.dtype, shape=shape, name=name, base_dir=""
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, ir.to_proto(graph).SerializeToString())
    except OSError:  # a read-only home: exported again next time
        return
    finally:
        for value, tensor in weights.items():
            value.const_value = tensor
