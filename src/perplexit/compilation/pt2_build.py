"""A checkpoint → an AOTInductor package of fixed sizes: machine code by a C++ compiler."""

import os
import platform
import shutil
from pathlib import Path
from typing import Any

import torch
import torch._inductor

from perplexit.checkpoints.loading import Checkpoint
from perplexit.compilation.compiler_errors import stated_by
from perplexit.compilation.fixed_graph import exported_fixed, fixed_shapes
from perplexit.compilation.program_build import ProgramBuild, verified
from perplexit.compilation.targets import CompileRequest
from perplexit.errors import CapabilityError
from perplexit.program_batches import RunProgram
from perplexit.program_record import ProgramMetadata

PACKAGE_FILE = "model.pt2"


def build_pt2_program(
    checkpoint: Checkpoint, folder: Path, request: CompileRequest
) -> ProgramMetadata:
    """Compile the checkpoint into a package in `folder`; return the program's record.

    Raises CapabilityError where there is no C++ compiler, CompilationError.
    """
    compiler = _compiler()
    shapes = fixed_shapes(request.shapes, checkpoint.model)
    build = ProgramBuild("pt2", checkpoint, request, shapes, ("torch", "transformers"))
    reference = build.checkpoint_losses()
    exported = exported_fixed(build.module, shapes, perplexity=request.perplexity)
    package = folder / PACKAGE_FILE
    with stated_by("AOTInductor can compile", logger="torch._inductor"), torch.no_grad():
        torch._inductor.aoti_compile_and_package(exported, package_path=str(package))
    losses = build.program_losses(_runner(package))
    made_by = {"compiler": Path(compiler).name, "processor": platform.machine()}
    return build.record(folder, verified(losses, reference), made_by=made_by)


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
