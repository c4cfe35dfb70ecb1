"""A checkpoint → a TVM model library (a shared object) of fixed sizes, its parameters beside it."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import tvm
from safetensors.numpy import save_file
from tvm import relax
from tvm.relax.frontend.torch import from_exported_program

from perplexit import __version__
from perplexit.checkpoints.loading import Checkpoint
from perplexit.compilation.body_and_head import describe_model, memory_of, rows_at_a_time
from perplexit.compilation.fixed_graph import exported_fixed, fixed_shapes
from perplexit.compilation.four_bit_layers import pack_model, record_of
from perplexit.compilation.loss_check import (
    checkpoint_losses,
    program_losses,
    verification_windows,
    verified,
    verified_change,
)
from perplexit.compilation.targets import CompileRequest
from perplexit.compilation.tvm_schedule import cpu_pipeline, cpu_target
from perplexit.errors import CompilationError
from perplexit.program_record import ProgramMetadata, ProgramShapes, files_of
from perplexit.quantization.tvm_engine import (
    CPU_TARGETS,
    LIBRARY_FILE,
    PARAMETERS_FILE,
    OpenedLibrary,
    Processor,
    device_of,
    this_processor,
)
from perplexit.resources.engine_tricks import compiled_without, is_on


def build_tvm_program(
    checkpoint: Checkpoint, folder: Path, request: CompileRequest
) -> ProgramMetadata:
    """Fill `folder` with the library and its parameters; the record.

    A packed program is held to PyTorch over the same packed weights, within 1e-3 nats a token.
    Raises CompilationError, QuantizationError, CapabilityError for a device that TVM lacks.
    """
    device_of(request.device)
    model: Any = checkpoint.model
    source = checkpoint.source
    described = describe_model(model, address=source.address, fingerprint=source.fingerprint)
    shapes = fixed_shapes(request.shapes, described.max_length)
    memory = memory_of(model)
    windows = verification_windows(described, shapes)
    reference, against = checkpoint_losses(model, windows), "the checkpoint in PyTorch float32"
    quantization = None
    if request.recipe is not None:
        name = request.recipe.precision
        packed = pack_model(model, with_embedding_and_head=name == "q4f16_0")
        quantization = record_of(model, name, packed, described.num_parameters)
        full, reference = reference, checkpoint_losses(model, windows)
        verified_change(reference, full, full, name)
        against += f" with the weights that the {name} groups stand for"
    processor = this_processor() if request.device in CPU_TARGETS else None
    level = processor.level if processor else ""
    _build_library(model, folder, request, shapes, processor)
    run = OpenedLibrary(folder, request.device, level).run
    losses = program_losses(run, windows, shapes, perplexity=request.perplexity)
    return ProgramMetadata(
        engine="tvm",
        perplexity=request.perplexity,
        dtype="float32",
        opset=0,
        shapes=shapes,
        model=described,
        memory=memory,
        verification=verified(losses, reference, against),
        files=files_of(folder),
        quantization=quantization,
        head_rows=rows_at_a_time(described.vocab_size) if request.perplexity else None,
        made_by={**_versions(), "target": request.device, "processor_level": level},
    )


def _build_library(
    model: Any,
    folder: Path,
    request: CompileRequest,
    shapes: ProgramShapes,
    processor: Processor | None,
) -> None:
    exported = exported_fixed(model, shapes, perplexity=request.perplexity)
    try:
        with warnings.catch_warnings(), _quiet_stderr():
            warnings.simplefilter("ignore")
            module = from_exported_program(
                exported.run_decompositions(_decompositions()),
                keep_params_as_input=True,
                unwrap_unit_return_tuple=True,
            )
            module, parameters = relax.frontend.detach_params(module)
            built = _built(module, request.device, processor)
            built.export_library(str(folder / LIBRARY_FILE))
    except Exception as error:  # TVM's errors have no common root
        first_line = str(error).strip().partition("\n")[0]
        raise CompilationError(
            f"expected a model that TVM can compile for {request.device}; {type(error).__name__}: "
            f"{first_line}. Evaluate the checkpoint with PyTorch instead (hf:…)"
        ) from error
    arrays = {f"{i:05d}": x.numpy() for i, x in enumerate(parameters["main"])}
    save_file(arrays, folder / PARAMETERS_FILE)


def _built(module: Any, device: str, processor: Processor | None) -> Any:
    if processor is None:
        return relax.build(module, tvm.target.Target(device))
    if not is_on("tvm_schedule"):
        return relax.build(module, cpu_target(processor))
    return relax.build(module, cpu_target(processor), relax_pipeline=cpu_pipeline(processor))


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Hide what the compiler's C++ writes to file descriptor 2 for every gather."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _decompositions() -> Any:
    """Return PyTorch's own, and squares as products: TVM calls the C library's `pow` otherwise."""
    table = torch.export.default_decompositions()
    table[torch.ops.aten.pow.Tensor_Scalar] = _power
    return table


def _power(x: Any, exponent: Any) -> Any:
    return x * x if exponent == 2 else NotImplemented


def _versions() -> dict[str, str]:
    packages = ("torch", "transformers", "apache-tvm")
    versions = {name: metadata.version(name) for name in packages}
    return {"perplexit": __version__, **versions, **compiled_without()}
