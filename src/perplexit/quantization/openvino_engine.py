"""OpenVINO made to compute in the precision that was asked for, and asked what it really does."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as ops

from perplexit.errors import CapabilityError
from perplexit.quantization.engine_errors import engine_error
from perplexit.resources.cores import has_virtual_amx

# OpenVINO's bindings look NumPy up when a tensor's data are first used. Two threads that do so at
# once wait for each other for ever: one holds Python's lock, the other that of the look-up.
np.copyto(ov.Tensor(ov.Type.i64, ov.Shape([1])).data, 0)

# In a virtual machine with AMX, compiling a bfloat16 graph ended the process (SIGFPE; OpenVINO
# 2026.4). Its oneDNN reads this variable once, at its first product; what a user set stays.
_MAX_ISA = "ONEDNN_MAX_CPU_ISA"
_SAFE_ISA = "AVX512_CORE_BF16"
if has_virtual_amx():
    os.environ.setdefault(_MAX_ISA, _SAFE_ISA)

# The node whose output the head reads: the program is cut there where the body is not float32.
BOUNDARY = "perplexit_hidden_states"
# Left alone, this engine computes "float32" in bfloat16 where the processor can, keeps keys and
# values as float16 and rounds the activations of quantized layers to 8 bits.
_EXACT = {
    "EXECUTION_MODE_HINT": "ACCURACY",
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
}
_BFLOAT16 = _EXACT | {
    "EXECUTION_MODE_HINT": "PERFORMANCE",
    "INFERENCE_PRECISION_HINT": "bf16",
    "KV_CACHE_PRECISION": "bf16",
}
_REPORTED = (*_EXACT, "NUM_STREAMS", "INFERENCE_NUM_THREADS", "EXECUTION_DEVICES")


@dataclass(frozen=True)
class OpenedProgram:
    """A program ready to run: one compiled graph, or body and head one after the other.

    properties: the engine's own effective properties, for each graph.
    """

    graphs: tuple[Any, ...]
    properties: Mapping[str, Mapping[str, str]]
    _idle: SimpleQueue[tuple[Any, ...]] = field(default_factory=SimpleQueue)

    def run(self, feed: Mapping[str, NDArray[np.int64]]) -> NDArray[np.float32]:
        """Run the program; return its output. Raises EngineOutOfMemoryError, ModelError."""
        requests: tuple[Any, ...] = ()
        try:
            requests = self._requests()
            if len(requests) == 1:
                result = requests[0].infer(dict(feed))[0]
            else:
                body, head = requests
                rest = {name: value for name, value in feed.items() if name != "input_ids"}
                hidden_BTD = body.infer({"input_ids": feed["input_ids"]})[0]
                result = head.infer({"hidden_states": hidden_BTD, **rest})[0]
        except (RuntimeError, MemoryError) as error:
            raise engine_error("OpenVINO", "run the program", error) from error
        finally:
            if requests:
                self._idle.put(requests)
        return np.asarray(result)

    @property
    def streams(self) -> int:
        """Return how many threads may call `run` at a time; the engine allows one per core."""
        return min(int(says["NUM_STREAMS"]) for says in self.properties.values())

    @property
    def threads(self) -> int:
        """Return how many threads the engine runs on."""
        return int(self.graphs[0].get_property("INFERENCE_NUM_THREADS"))

    def _requests(self) -> tuple[Any, ...]:
        """Return one call's own request for each graph: an idle one, or a new one."""
        try:
            return self._idle.get_nowait()
        except Empty:
            return tuple(graph.create_infer_request() for graph in self.graphs)


def open_program(
    model: Path | ov.Model, *, dtype: str = "float32", threads: int | None = None, streams: int = 1
) -> OpenedProgram:
    """Open the program on this machine's processor with its body in `dtype`; the head is float32.

    dtype: `float32` or `bfloat16`. streams: calls to run at a time, which share the threads.
    Raises CapabilityError where the processor or the engine does
    something else, ModelError where the program cannot be read.
    """
    core = ov.Core()
    counted: dict[str, Any] = {"NUM_STREAMS": streams}
    if threads is not None:
        counted["INFERENCE_NUM_THREADS"] = threads
    try:
        graph = core.read_model(model) if isinstance(model, Path) else model
        if dtype == "float32":
            whole = core.compile_model(graph, "CPU", {**_EXACT, **counted})
            return OpenedProgram((whole,), {"program": _checked(whole, "f32")})
        body_graph, head_graph = _cut(graph)
        body = core.compile_model(body_graph, "CPU", {**_BFLOAT16, **counted})
        head = core.compile_model(head_graph, "CPU", {**_EXACT, **counted})
    except (RuntimeError, MemoryError) as error:
        raise engine_error("OpenVINO", "load the program", error) from error
    properties = {"body": _checked(body, "bf16"), "head": _checked(head, "f32")}
    return OpenedProgram((body, head), properties)


def _cut(model: ov.Model) -> tuple[ov.Model, ov.Model]:
    """Return (ids → hidden states, these and other inputs → results); consumes the model."""
    boundary = next((op for op in model.get_ops() if op.get_friendly_name() == BOUNDARY), None)
    if boundary is None:
        raise CapabilityError(
            "expected a program made by `perplexit compile --to openvino`, whose body can run in "
            "another precision than its head; compile the checkpoint again, or leave dtype out"
        )
    output = boundary.output(0)
    hidden = ops.parameter(output.get_partial_shape(), output.get_element_type())
    hidden.output(0).get_tensor().set_names({"hidden_states"})
    readers = list(output.get_target_inputs())
    others = [p for p in model.get_parameters() if "input_ids" not in p.output(0).get_names()]
    ids = [p for p in model.get_parameters() if "input_ids" in p.output(0).get_names()]
    for reader in readers:
        reader.replace_source_output(hidden.output(0))
    head = ov.Model(model.get_results(), [hidden, *others], "head")
    return ov.Model([output], ids, "body"), head


def _checked(graph: Any, precision: str) -> dict[str, str]:
    """Return the effective properties. Raises CapabilityError where the precision is another."""
    says = {name: _plain(graph.get_property(name)) for name in _REPORTED}
    if _MAX_ISA in os.environ:
        says[_MAX_ISA] = os.environ[_MAX_ISA]
    if says["INFERENCE_PRECISION_HINT"] != precision:
        raise CapabilityError(
            f"expected OpenVINO to compute in {precision}, but on this processor it computes in "
            f"{says['INFERENCE_PRECISION_HINT']}; leave dtype out"
        )
    return says


def _plain(value: Any) -> str:
    if isinstance(value, ov.Type):
        return str(value.to_string())
    return str(value).rpartition(".")[2] if "ExecutionMode." in str(value) else str(value)
