"""An OpenVINO graph's weights → integers of 8 or 4 bits, by NNCF's weight compression, counted."""

from collections.abc import Iterator
from contextlib import redirect_stdout
from importlib import metadata
from io import StringIO
from typing import Any

import nncf
import numpy as np
import openvino as ov

from perplexit.checkpoints.quiet import quiet_logger
from perplexit.errors import QuantizationError
from perplexit.program_record import ProgramQuantization
from perplexit.quantization.precisions import Recipe

_BITS = {"i4": 4, "u4": 4, "i8": 8, "u8": 8, "f16": 16, "bf16": 16, "f32": 32}
_LARGE_SHARE = 0.01  # a tensor with at least 1 % of the parameters is large


def compress_weights(
    graph: ov.Model, recipe: Recipe, *, head_prefix: str, num_parameters: int
) -> tuple[ov.Model, ProgramQuantization]:
    """Return the graph with its body's weights compressed, and the record of what was.

    Nodes named `head_prefix.…` stay as they are. The graph given is used up. Raises
    QuantizationError where NNCF compressed nothing.
    """
    scope = nncf.IgnoredScope(patterns=[rf"{head_prefix}\..*"], validate=False)
    settings: dict[str, Any] = {"mode": "int8_asym", "group": "one output row"}
    options: dict[str, Any] = {"mode": nncf.CompressWeightsMode.INT8_ASYM}
    if recipe.weights.bits == 4:
        group = recipe.weights.block_size
        settings = {"mode": "int4_asym", "group": group, "ratio": 1.0}
        settings["embedding and last layer"] = "int8_asym"
        options = {"mode": nncf.CompressWeightsMode.INT4_ASYM, "group_size": group, "ratio": 1.0}
    with quiet_logger("nncf"), redirect_stdout(StringIO()):  # tables and progress bars
        compressed = nncf.compress_weights(graph, ignored_scope=scope, **options)
    codes, others = _constants(compressed)
    if not codes:
        raise QuantizationError(
            f"expected matrices to compress to {recipe.precision}, but NNCF compressed none: the "
            "figures would be full-precision ones; compile without a quantization"
        )
    companions = [x for x in others if x.get_friendly_name().endswith(("/scale", "/zero_point"))]
    sizes = _sizes(others, head_prefix)
    large = [name for name, size in sizes.items() if size >= _LARGE_SHARE * num_parameters]
    record = ProgramQuantization(
        name=recipe.precision,
        library=f"nncf {metadata.version('nncf')}",
        num_modules=len(codes),
        num_bytes=sum(_num_bytes(x) for x in (*codes, *companions)),
        effective_bits=8 * sum(_num_bytes(x) for x in (*codes, *others)) / num_parameters,
        unquantized=tuple(sorted(large, key=sizes.__getitem__, reverse=True)),
        settings={**settings, "head": "float32, left as it was"},
    )
    return compressed, record


def _sizes(constants: list[Any], head_prefix: str) -> dict[str, int]:
    """Return the numbers of each constant by its name; the head's blocks are one."""
    sizes: dict[str, int] = {}
    for constant in constants:
        name = constant.get_friendly_name()
        name = head_prefix if name.startswith(f"{head_prefix}.") else name
        sizes[name] = sizes.get(name, 0) + _size(constant)
    return sizes


def _constants(graph: ov.Model) -> tuple[list[Any], list[Any]]:
    """Return (the integer matrices, all other constants), inside loops too."""
    codes: list[Any] = []
    others: list[Any] = []
    for op in _ops_of(graph):
        if op.get_type_name() != "Constant":
            continue
        small = op.get_element_type().to_string() in ("u8", "i8", "u4", "i4")
        is_code = small and not op.get_friendly_name().endswith("/zero_point") and _size(op) > 1
        (codes if is_code else others).append(op)
    return codes, others


def _ops_of(graph: Any) -> Iterator[Any]:
    for op in graph.get_ops():
        yield op
        if op.get_type_name() == "Loop":
            yield from _ops_of(op.get_function())


def _size(constant: Any) -> int:
    return int(np.prod(list(constant.get_output_shape(0)), dtype=np.int64))


def _num_bytes(constant: Any) -> int:
    bits = _BITS.get(constant.get_element_type().to_string(), 64)
    return -(-_size(constant) * bits // 8)
