"""How TVM's kernels go through a CPU: which instructions, and the loops of its matrix products.

Without a schedule TVM leaves a product as three plain loops, a hundred times slower than these.
Shape suffixes: I = rows, J = columns, K = the summed axis.
"""

from typing import Any

import tvm
from tvm import relax, s_tir, tirx
from tvm.ir.transform import Pass, PassContext, Sequential, module_pass
from tvm.relax.backend.cpu_generic import pipeline

from perplexit.quantization.tvm_engine import Processor

PRODUCTS = ("matmul", "NT_matmul")
_FEWEST_MULTIPLICATIONS = 2**16


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
