"""A checkpoint → an AOTInductor package of fixed sizes: machine code by a C++ compiler."""

import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch._inductor

from perplexit import __version__
from perplexit.checkpoints.loading import Checkpoint
from perplexit.compilation.body_and_head import describe_model, memory_of, rows_at_a_time
from perplexit.compilation.compiler_errors import stated_by
from perplexit.compilation.fixed_graph import exported_fixed, fixed_shapes
from perplexit.compilation.loss_check import (
    checkpoint_losses,
    program_losses,
    verification_windows,
    verified,
)
from perplexit.compilation.targets import CompileRequest
from perplexit.errors import CapabilityError
from perplexit.program_batches import RunProgram
from perplexit.program_record import ProgramMetadata, files_of

PACKAGE_FILE = "model.pt2"


def build_pt2_program(
    checkpoint: Checkpoint, folder: Path, request: CompileRequest
) -> ProgramMetadata:
    """Fill `folder` with the package; its record.

    Raises CapabilityError where there is no C++ compiler, CompilationError.
    """
    compiler = _compiler()
    model: Any = checkpoint.model
    source = checkpoint.source
    described = describe_model(model, address=source.address, fingerprint=source.fingerprint)
    shapes = fixed_shapes(request.shapes, described.max_length)
    windows = verification_windows(described, shapes)
    reference = checkpoint_losses(model, windows)
    exported = exported_fixed(model, shapes, perplexity=request.perplexity)
    package = folder / PACKAGE_FILE
    with stated_by("AOTInductor can compile", logger="torch._inductor"), torch.no_grad():
        torch._inductor.aoti_compile_and_package(exported, package_path=str(package))
    losses = program_losses(_runner(package), windows, shapes, perplexity=request.perplexity)
    return ProgramMetadata(
        engine="pt2",
        perplexity=request.perplexity,
        dtype="float32",
        opset=0,
        shapes=shapes,
        model=described,
        memory=memory_of(model),
        verification=verified(losses, reference, "the checkpoint in PyTorch float32"),
        files=files_of(folder),
        head_rows=rows_at_a_time(described.vocab_size) if request.perplexity else None,
        made_by={
            "perplexit": __version__,
            "torch": torch.__version__,
            "transformers": metadata.version("transformers"),
            "compiler": Path(compiler).name,
            "processor": platform.machine(),
        },
    )


def _compiler() -> str:
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["g++", "clang++"]:
        path = shutil.which(name)
        if path:
            return path
    raise CapabilityError(
        f"compiling to pt2 needs a C++ compiler, found no {wanted or 'g++ or clang++'}; install "
        "one (apt install g++), or name one in the environment variable CXX"
    )


def _runner(path: Path) -> RunProgram:
    program = torch._inductor.aoti_load_package(str(path))

    def run(feed: Any) -> Any:
        with torch.inference_mode():
            return program(*(torch.from_numpy(value) for value in feed.values())).numpy()

    return run
