"""The files of an OpenVINO program: convert, compress, save, verify, describe."""

from dataclasses import replace
from pathlib import Path

import openvino as ov

from perplexit.checkpoints.loading import Checkpoint
from perplexit.compilation.openvino_graph import convert_graph
from perplexit.compilation.openvino_head import HEAD_PREFIX, head_rows
from perplexit.compilation.program_build import Losses, ProgramBuild, verified, verified_change
from perplexit.compilation.targets import CompileRequest
from perplexit.program_record import ProgramMetadata
from perplexit.quantization.openvino_engine import open_program
from perplexit.quantization.openvino_weights import compress_weights
from perplexit.resources.engine_tricks import compiled_without

MODEL_FILE = "model.xml"
_PACKAGES = ("torch", "transformers", "openvino", "nncf")


def build_openvino_program(
    checkpoint: Checkpoint, folder: Path, request: CompileRequest
) -> ProgramMetadata:
    """Compile the checkpoint into a program in `folder`; return the program's record.

    The full-precision program is held to the checkpoint's losses in float32 before any weight is
    compressed. Raises CompilationError, QuantizationError.
    """
    shapes = replace(request.shapes, num_targets=None)  # the loop takes any number
    build = ProgramBuild("openvino", checkpoint, request, shapes, _PACKAGES)
    path = folder / MODEL_FILE

    def saved(graph: ov.Model) -> Losses:
        # OpenVINO's default halves every weight
        ov.save_model(graph, str(path), compress_to_fp16=False)
        return build.program_losses(open_program(path).run)

    graph = convert_graph(build.module, perplexity=request.perplexity, shapes=shapes)
    reference = build.checkpoint_losses()
    losses = saved(graph)
    verification, quantization = verified(losses, reference), None
    if request.recipe is not None:
        compressed, quantization = compress_weights(
            graph,
            request.recipe,
            head_prefix=HEAD_PREFIX,
            num_parameters=build.model.num_parameters,
        )
        changed = saved(compressed)
        verification = verified_change(changed, reference, losses, request.recipe.precision)
    return build.record(
        folder,
        verification,
        opset=13,
        quantization=quantization,
        head_rows=head_rows(build.model.vocab_size) if request.perplexity else None,
        made_by=compiled_without(),
    )
