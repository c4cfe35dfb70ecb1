"""Exported graphs, kept without their weights: exporting costs half a minute, the rest seconds."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import onnx_ir as ir
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor

from perplexit.atomic_files import cache_folder, write_bytes
from perplexit.fingerprints import json_fingerprint, sha256_of_file
from perplexit.program_record import ProgramShapes

_PLACE = "checkpoint"  # where a cached graph says that a weight is: its name is enough
_EXPORTER = (
    "compilation/onnx_export.py",
    "compilation/onnx_key_values.py",
    "compilation/body_and_head.py",
    "checkpoints/module_call.py",
)
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
        "exporter": [sha256_of_file(Path(__file__).parents[1] / name) for name in _EXPORTER],
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
