"""A checkpoint → a TVM model library (a shared object) of fixed sizes, its parameters beside it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import tvm
from safetensors.numpy import save_file
from tvm import relax, s_tir, tirx
from tvm.ir.transform import Pass, PassContext, Sequential, module_pass
from tvm.relax.backend.cpu_generic import pipeline
from tvm.relax.frontend.torch import from_exported_program

from perplexit.checkpoints.loading import Checkpoint
from perplexit.compilation.compiler_errors import stated_by
from perplexit.compilation.fixed_graph import exported_fixed, fixed_shapes
from perplexit.compilation.four_bit_layers import pack_model, record_of
from perplexit.compilation.program_build import IN_FLOAT32, ProgramBuild, verified, verified_change
from perplexit.compilation.targets import CompileRequest
from perplexit.program_record import ProgramMetadata, ProgramShapes
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

PRODUCTS = ("matmul", "NT_matmul")
_FEWEST_MULTIPLICATIONS = 2**16
_PACKAGES = ("torch", "transformers", "apache-tvm")


def cpu_target(processor: Processor) -> Any:
    """Return TVM's target for the processor."""
    kind: dict[str, Any] = {"kind": "llvm"}
    if processor.level:
        kind["mcpu"] = processor.level.replace("_", "-")  # as LLVM spells it
        # LLVM's x86-64-v4 has 512-bit registers and leaves them idle unless told
        kind["mattr"] = ["-prefer-256-bit"]
    return tvm.target.Target(kind)


def cpu_pipeline(processor: Processor) -> Pass:
    """Return TVM's own CPU pipeline, with weights read as stored and kernels that are scheduled."""
    target = cpu_target(processor)
    return Sequential(
        [
            *pipeline.library_dispatch_passes(target),
            relax.transform.FuseTransposeMatmul(),
            *pipeline.legalize_passes(target),
            scheduled(processor),
            *pipeline.dataflow_lower_passes(target),
            *pipeline.finalize_passes(target),
        ]
    )


def scheduled(processor: Processor) -> Pass:
    """Return the pass that gives every kernel its loops: tiled products, the rest over threads."""

    def give_loops(module: Any, _context: PassContext) -> Any:
        for variable, function in list(module.functions_items()):
            if isinstance(function, tirx.PrimFunc) and _has_blocks(function):
                module[variable] = _scheduled(function, processor)
        return module

    return module_pass(give_loops, opt_level=0, name="ScheduleForCpu")


def _has_blocks(function: Any) -> bool:
    """Return False for a kernel that TVM writes by hand, such as a sort: it has its loops."""
    body = function.body
    return isinstance(body, s_tir.SBlockRealize) and body.block.name_hint == "root"


def _scheduled(function: Any, processor: Processor) -> Any:
    schedule = s_tir.Schedule(function)
    for block in schedule.get_child_blocks(schedule.get_sblock("root")):
        name = schedule.get(block).name_hint
        if name in PRODUCTS and _multiplications(schedule, block) >= _FEWEST_MULTIPLICATIONS:
            _tile(schedule, block, processor)
        else:
            _spread(schedule, block)
    (result,) = schedule.mod.functions.values()
    return result.with_attrs(dict(function.attrs.items())) if function.attrs else result


def _multiplications(schedule: Any, block: Any) -> int:
    total = 1
    for loop in schedule.get_loops(block):
        extent = schedule.get(loop).extent
        if not isinstance(extent, tirx.IntImm):
            return 0
        total *= int(extent)
    return total


def _tile(schedule: Any, product: Any, processor: Processor) -> None:
    """Pack a panel of the right matrix; keep tiles of the output in registers over K.

    The loop nest of Goto and van de Geijn (2008), with one level of blocking: a panel of K ×
    `columns` fits the second cache at the sizes of transformer layers.
    """
    rows, columns = processor.rows, processor.columns
    *batch, _, _, _ = schedule.get_loops(product)
    schedule.pad_einsum(product, [*(1 for _ in batch), rows, columns, 1])
    *batch, i, j, k = schedule.get_loops(product)
    i_tiles, i_inner = schedule.split(i, [None, rows])
    j_tiles, j_inner = schedule.split(j, [None, columns])
    schedule.reorder(*batch, j_tiles, i_tiles, k, i_inner, j_inner)
    panel = schedule.cache_read(product, 1, "global")
    if schedule.get(product).name_hint.startswith("NT"):
        schedule.transform_layout(panel, ("write", 0), lambda *at: (*at[:-2], at[-1], at[-2]))
    schedule.compute_at(panel, j_tiles)
    tile = schedule.cache_write(product, 0, "local")
    schedule.reverse_compute_at(tile, i_tiles)
    *_, tile_rows, tile_columns = schedule.get_loops(tile)
    schedule.vectorize(tile_columns)
    schedule.unroll(tile_rows)
    schedule.parallel(schedule.fuse(*batch, j_tiles))
    schedule.vectorize(j_inner)
    schedule.unroll(i_inner)
    schedule.decompose_reduction(product, k)


def _spread(schedule: Any, block: Any) -> None:
    """Share the outer loops, which do not sum, among the threads."""
    loops = schedule.get_loops(block)
    kinds = [each.iter_type for each in schedule.get(block).iter_vars]
    if len(kinds) != len(loops):
        return
    outer = []
    for loop, kind in zip(loops[:-1], kinds[:-1], strict=True):
        if kind != tirx.IterVar.DataPar:
            break
        outer.append(loop)
    if outer:
        schedule.parallel(schedule.fuse(*outer) if len(outer) > 1 else outer[0])


def build_tvm_program(
    checkpoint: Checkpoint, folder: Path, request: CompileRequest
) -> ProgramMetadata:
    """Compile the checkpoint into a library and parameters in `folder`; return the record.

    A packed program is held to PyTorch over the same packed weights, within 1e-3 nats a token.
    Raises CompilationError, QuantizationError, CapabilityError for a device that TVM lacks.
    """
    device_of(request.device)
    shapes = fixed_shapes(request.shapes, checkpoint.model)
    build = ProgramBuild("tvm", checkpoint, request, shapes, _PACKAGES)
    reference, against = build.checkpoint_losses(), IN_FLOAT32
    quantization = None
    if request.recipe is not None:
        name = request.recipe.precision
        packed = pack_model(build.module, with_embedding_and_head=name == "q4f16_0")
        quantization = record_of(build.module, name, packed, build.model.num_parameters)
        full, reference = reference, build.checkpoint_losses()
        verified_change(reference, full, full, name)
        against += f" with the weights that the {name} groups stand for"
    processor = this_processor() if request.device in CPU_TARGETS else None
    level = processor.level if processor else ""
    _build_library(build.module, folder, request, shapes, processor)
    losses = build.program_losses(OpenedLibrary(folder, request.device, level).run)
    made_by = {**compiled_without(), "target": request.device, "processor_level": level}
    verification = verified(losses, reference, against)
    return build.record(folder, verification, quantization=quantization, made_by=made_by)


def _build_library(
    model: Any,
    folder: Path,
    request: CompileRequest,
    shapes: ProgramShapes,
    processor: Processor | None,
) -> None:
    exported = exported_fixed(model, shapes, perplexity=request.perplexity)
    with stated_by(f"TVM can compile for {request.device}", logger="tvm"), _quiet_stderr():
        module = from_exported_program(
            exported.run_decompositions(_decompositions()),
            keep_params_as_input=True,
            unwrap_unit_return_tuple=True,
        )
        module, parameters = relax.frontend.detach_params(module)
        built = _built(module, request.device, processor)
        built.export_library(str(folder / LIBRARY_FILE))
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
    table[torch.ops.aten.pow.Tensor_Scalar] = lambda x, n: x * x if n == 2 else NotImplemented
    return table
