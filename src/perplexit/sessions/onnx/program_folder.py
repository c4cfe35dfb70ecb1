"""The folder of an ONNX program: one with our record, or one from another exporter."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import nan, prod
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError

from perplexit.errors import CapabilityError, ModelError
from perplexit.fingerprints import sha256_of_file
from perplexit.program_record import (
    PROGRAM_FILE,
    ProgramFile,
    ProgramMemory,
    ProgramMetadata,
    ProgramModel,
    ProgramShapes,
    ProgramVerification,
)
from perplexit.sessions.onnx.ports import takes_cache
from perplexit.untrusted_files import Expected, read_json

OUR_FILE = "model.onnx"
# Where exporters put the graph, best first: one file for prefill and decode before one for either.
_USUAL_FILES = (OUR_FILE, "decoder_model_merged.onnx", "decoder_with_past_model.onnx")
# ONNX Runtime takes one scale from the whole tensor that these are given.
_ONE_SCALE = (
    "DynamicQuantizeLinear",
    "DynamicQuantizeMatMul",
    "DynamicQuantizeLSTM",
    "MatMulIntegerToFloat",
    "MatMulInteger",
    "ConvInteger",
    "QAttention",
)
_CONFIG = Expected("a model's configuration", ModelError, "put the checkpoint's config.json there")
_FLOATS = {"FLOAT": "float32", "FLOAT16": "float16", "BFLOAT16": "bfloat16", "DOUBLE": "float64"}


@dataclass(frozen=True, slots=True)
class OnnxProgram:
    """A graph on disk and what is known of it.

    takes_cache: whether it can be fed in blocks.
    activations: how it rounds the activations of a whole batch with one scale; None: it does not.
    rope_border: the longest window whose rotary frequencies are those of every shorter one; None
        where they are the same for all.
    """

    graph: Path
    metadata: ProgramMetadata
    takes_cache: bool
    activations: str | None = None
    rope_border: int | None = None


def find_program(folder: Path) -> OnnxProgram:
    """Find the program in a folder.

    Raises ModelError where there is none or the choice is not clear, CapabilityError where a
    program of another exporter does not give its vocabulary's size.
    """
    if (folder / PROGRAM_FILE).is_file() or not list(folder.glob("**/*.onnx")):
        metadata = ProgramMetadata.read(folder, engine="onnx")
        return OnnxProgram(folder / OUR_FILE, metadata, metadata.cache is not None)
    graph = _foreign_graph(folder)
    model = _read_graph(graph)
    names = [value.name for value in model.graph.input]
    if "target_rows" in names:
        raise ModelError(
            f"{graph} is a program that `perplexit compile` made, without its {PROGRAM_FILE}, "
            "which names the checkpoint; copy that too, or compile the checkpoint again"
        )
    config = _config(folder)
    metadata = _foreign_metadata(folder, graph, model, config)
    return OnnxProgram(
        graph, metadata, takes_cache(names), _rounded_together(model), _rope_border(config)
    )


def _rounded_together(model: Any) -> str | None:
    """Return how a graph rounds a whole batch's activations with one scale; None: it does not.

    Operators in the branches of an `If` and in functions of the graph's own count too.
    """
    found = sorted({node.op_type for node in _all_nodes(model)} & set(_ONE_SCALE))
    return f"8 bits, one scale for all of a batch ({', '.join(found)})" if found else None


def _all_nodes(model: Any) -> Iterator[Any]:
    waiting = [*model.graph.node, *(node for inner in model.functions for node in inner.node)]
    while waiting:
        node = waiting.pop()
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                waiting.extend(graph.node)


def _read_graph(path: Path) -> Any:
    """Read the graph without its weights. Raises ModelError where the file holds none."""
    try:
        model = onnx.load(str(path), load_external_data=False)
    except (DecodeError, OSError) as error:
        raise ModelError(
            f"expected an ONNX graph in {path}, which cannot be read as one ({error}); is the "
            "download complete?"
        ) from error
    if not model.graph.node:
        raise ModelError(f"expected an ONNX graph in {path}, got one without any operator")
    return model


def _foreign_graph(folder: Path) -> Path:
    found = sorted(folder.glob("*.onnx")) or sorted((folder / "onnx").glob("*.onnx"))
    usual = [path for name in _USUAL_FILES for path in found if path.name == name]
    if usual or len(found) == 1:
        return (usual or found)[0]
    raise ModelError(
        f"expected one graph in {folder}, or one of {', '.join(_USUAL_FILES)}, got "
        f"{', '.join(path.name for path in found) or 'none'}; put the one that is meant into a "
        "folder of its own, with its weights and config.json"
    )


def _foreign_metadata(
    folder: Path, graph: Path, model: Any, config: Mapping[str, Any]
) -> ProgramMetadata:
    counts: Counter[str] = Counter()
    external = {graph}
    for tensor in model.graph.initializer:
        counts[onnx.TensorProto.DataType.Name(tensor.data_type)] += prod(tensor.dims)
        external |= {graph.parent / x.value for x in tensor.external_data if x.key == "location"}
    floats = [(number, _FLOATS[name]) for name, number in counts.items() if name in _FLOATS]
    files = tuple(_file(path) for path in sorted(external))
    digest = hashlib.sha256("".join(f"{f.name}\0{f.sha256}\0" for f in files).encode())
    hidden = int(config.get("hidden_size") or config.get("n_embd") or 1024)
    heads = int(config.get("num_attention_heads") or config.get("n_head") or 16)
    limit = config.get("max_position_embeddings") or config.get("n_positions")
    batch, length = _sizes(model.graph.input, "input_ids", 2)
    if takes_cache([value.name for value in model.graph.input]):
        length = None  # of one call; a window may be longer
    return ProgramMetadata(
        engine="onnx",
        perplexity=False,
        dtype=max(floats)[1] if floats else "float32",
        opset=next((x.version for x in model.opset_import if not x.domain), 0),
        shapes=ProgramShapes(batch, length),
        model=ProgramModel(
            address=f"onnx:{folder}",
            architecture=str((config.get("architectures") or ["unknown (ONNX)"])[0]),
            num_parameters=sum(counts.values()),
            weights_fingerprint=digest.hexdigest(),
            vocab_size=_vocab_size(model, config, graph),
            max_length=int(limit) if limit else None,
        ),
        memory=ProgramMemory(4 * 24 * hidden, 4 * 3 * heads),
        verification=ProgramVerification("nothing: it was exported elsewhere", 0, nan),
        files=files,
        made_by={"producer": f"{model.producer_name} {model.producer_version}".strip()}
        | {f"{name.lower()} weights": str(number) for name, number in sorted(counts.items())},
    )


def _vocab_size(model: Any, config: Mapping[str, Any], graph: Path) -> int:
    logits = _sizes(model.graph.output, "logits", 3)[-1]
    found = logits or config.get("vocab_size")
    if not found:
        raise CapabilityError(
            f"expected a vocabulary size in the shape of the output logits or in a config.json "
            f"beside {graph}, found none; put the checkpoint's config.json there"
        )
    return int(found)


def _sizes(values: Any, name: str, rank: int) -> list[int | None]:
    """Return the fixed sizes of a port by name, None where free."""
    for value in values:
        if value.name == name:
            dims = value.type.tensor_type.shape.dim
            return [dim.dim_value or None for dim in dims] or [None] * rank
    return [None] * rank


def _rope_border(config: Mapping[str, Any]) -> int | None:
    """Return the longest window below a LongRoPE's or dynamic NTK's border; None without."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = str(rope.get("rope_type") or rope.get("type") or "") if isinstance(rope, Mapping) else ""
    if kind not in ("longrope", "su", "dynamic"):
        return None
    name = "original_max_position_embeddings"
    border = config.get("max_position_embeddings")
    if kind != "dynamic":
        border = config.get(name) or rope.get(name) or border
    return border if isinstance(border, int) else 0


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        return {}
    return read_json(path, _CONFIG, dict[str, Any], non_finite=True)


def _file(path: Path) -> ProgramFile:
    if not path.is_file():
        raise ModelError(f"expected the graph's weights in {path}, but there is no such file")
    return ProgramFile(path.name, path.stat().st_size, sha256_of_file(path))
