"""OpenVINO: a program that `perplexit compile --to openvino` made, whole windows at a time."""

from pathlib import Path
from typing import Any

import openvino

from perplexit.quantization.openvino_engine import open_program
from perplexit.resources.cores import num_cores
from perplexit.resources.engine_tricks import is_on
from perplexit.sessions.compiled_program import ProgramSession, RunningProgram
from perplexit.sessions.options import EngineOptions

_MODEL_FILE = "model.xml"
# Calls at a time. A stream's threads wait for each other less; but one window runs on one stream.
_MOST_STREAMS = 4


class OpenVinoInferenceSession(ProgramSession):
    """A compiled program on OpenVINO.

    folder:  made by `perplexit compile --to openvino`.
    dtype:   float32 (the default), or bfloat16: the body in bfloat16, the head in float32.
    device:  "cpu". threads: None: the cores that this process may use.
    quantization: what the program must be; it was settled when it was compiled.
    The effective properties are in `description.settings["properties"]`.
    """

    _engine = "openvino"
    _cpu_only = (
        "expected device cpu for OpenVINO, got {got!r}: its other devices do not compute in "
        "float32; leave it out"
    )
    _dtypes = ("float32", "bfloat16")

    def _open(self, folder: Path, asked: EngineOptions) -> RunningProgram:
        threads = asked["threads"] or num_cores()
        streams = min(threads, _MOST_STREAMS) if is_on("openvino_streams") else 1
        program = open_program(
            folder / _MODEL_FILE, dtype=str(asked["dtype"]), threads=threads, streams=streams
        )
        settings: dict[str, Any] = {
            "properties": {graph: dict(says) for graph, says in program.properties.items()},
            "head_dtype": "float32",
            "opset": self._metadata.opset,
        }
        groups = {says["DYNAMIC_QUANTIZATION_GROUP_SIZE"] for says in program.properties.values()}
        if groups != {"0"}:
            settings["weights"] = {
                "activations": f"8 bits, groups of {', '.join(sorted(groups))} (OpenVINO)",
                "batch_invariant": False,
            }
        return RunningProgram(
            program.run,
            "openvino",
            openvino.__version__,
            "cpu",
            program.threads or None,
            settings,
            program.streams,
        )
