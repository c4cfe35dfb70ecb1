"""The files of an OpenVINO program: convert, compress, save, verify, describe."""

from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import openvino as ov

from perplexit import __version__
from perplexit.checkpoints.loading import Checkpoint
from perplexit.compilation.body_and_head import describe_model, memory_of
from perplexit.compilation.loss_check import (
    checkpoint_losses,
    program_losses,
    verification_windows,
    verified,
    verified_change,
)
from perplexit.compilation.openvino_graph import convert_graph
from perplexit.compilation.openvino_head import HEAD_PREFIX, ROWS, columns_at_a_time
from perplexit.compilation.targets import CompileRequest
from perplexit.program_record import ProgramMetadata, files_of
from perplexit.quantization.openvino_engine import open_program
from perplexit.quantization.openvino_weights import compress_weights
from perplexit.resources.engine_tricks import compiled_without

MODEL_FILE = "model.xml"


def build_openvino_program(
    checkpoint: Checkpoint, folder: Path, request: CompileRequest
) -> ProgramMetadata:
    """Fill `folder` with the program; its record.

    The full-precision program is held to the checkpoint's losses in float32 before any weight is
    compressed. Raises CompilationError, QuantizationError.
    """
    model: Any = checkpoint.model
    source = checkpoint.source
    described = describe_model(model, address=source.address, fingerprint=source.fingerprint)
    shapes = replace(request.shapes, num_targets=None)  # the loop takes any number
    windows = verification_windows(described, shapes)
    path = folder / MODEL_FILE
    graph = convert_graph(model, perplexity=request.perplexity, shapes=shapes)
    reference = checkpoint_losses(model, windows)
    _save(graph, path)
    losses = _losses(path, windows, shapes, request.perplexity)
    verification = verified(losses, reference, "the checkpoint in PyTorch float32")
    quantization = None
    if request.recipe is not None:
        compressed, quantization = compress_weights(
            graph,
            request.recipe,
            head_prefix=HEAD_PREFIX,
            num_parameters=described.num_parameters,
        )
        _save(compressed, path)
        changed = _losses(path, windows, shapes, request.perplexity)
        verification = verified_change(changed, reference, losses, request.recipe.precision)
    return ProgramMetadata(
        engine="openvino",
        perplexity=request.perplexity,
        dtype="float32",
        opset=13,
        shapes=shapes,
        model=described,
        memory=memory_of(model),
        verification=verification,
        files=files_of(folder),
        quantization=quantization,
        head_rows=ROWS if request.perplexity else None,
        head_columns=columns_at_a_time(described.vocab_size) if request.perplexity else None,
        made_by=_versions(),
    )


def _save(graph: ov.Model, path: Path) -> None:
    ov.save_model(graph, str(path), compress_to_fp16=False)  # its default halves every weight


def _losses(path: Path, windows: Any, shapes: Any, perplexity: bool) -> Any:
    program = open_program(path)
    return program_losses(program.run, windows, shapes, perplexity=perplexity)


def _versions() -> dict[str, str]:
    packages = ("torch", "transformers", "openvino", "nncf")
    versions = {name: metadata.version(name) for name in packages}
    return {"perplexit": __version__, **versions, **compiled_without()}
