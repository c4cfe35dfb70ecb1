"""Apache TVM: a model library opened on a device, its parameters beside it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from archspec import cpu
from numpy.typing import NDArray
from safetensors.numpy import load_file
from tvm import relax

from perplexit.errors import CapabilityError
from perplexit.quantization.engine_errors import engine_error

LIBRARY_FILE, PARAMETERS_FILE = "model.so", "parameters.safetensors"
# What the function takes, in order; a program without the head takes the first alone.
INPUTS = ("input_ids", "target_rows", "target_ids")
CPU_TARGETS = ("llvm", "cpu")
_DEVICES = {"llvm": "cpu", "cpu": "cpu", "cuda": "cuda", "opencl": "opencl", "vulkan": "vulkan"}

# TVM would bind the thread that calls it to one core, for good: every engine used afterwards in
# the process would have that core alone, and two processes of one thread each would share it.
os.environ.setdefault("TVM_BIND_THREADS", "0")


@dataclass(frozen=True, slots=True)
class Processor:
    """Instructions that a library may use, and the tile that fills their registers.

    level:   of the x86-64 psABI, so that a library runs on every such machine; "" for what every
             processor of the architecture has.
    rows:    of the output alive in registers, each `columns` wide.
    """

    level: str
    rows: int
    columns: int


# The best first; the last runs everywhere.
PROCESSORS = (Processor("x86_64_v4", 8, 32), Processor("x86_64_v3", 4, 16), Processor("", 4, 8))


def this_processor() -> Processor:
    """Return the highest level that this machine has."""
    return next(each for each in PROCESSORS if runs_level(each.level))


def runs_level(level: str) -> bool:
    """Return whether this machine has all instructions of the level."""
    return not level or cpu.TARGETS[level] <= cpu.host()


def device_of(target: str) -> Any:
    """Return TVM's device for a target's name.

    Raises CapabilityError where this build of TVM or this machine has none.
    """
    device = tvm.device(_DEVICES[target], 0)
    built = target in CPU_TARGETS or tvm.get_global_func(f"device_api.{target}", True)
    if not built or not device.exist:
        reason = "this machine has no such device" if built else "this build of TVM has no support"
        raise CapabilityError(
            f"expected a {target} device for the TVM program, but {reason}; compile with --device "
            f"llvm, or install a TVM that was built with {target}"
        )
    return device


class OpenedLibrary:
    """A model library ready to run on `target`'s device.

    level: the processor's that it was compiled for. Raises ModelError, CapabilityError.
    """

    def __init__(self, folder: Path, target: str, level: str = "") -> None:
        self._device = device_of(target)
        if not runs_level(level):
            raise CapabilityError(
                f"expected a processor of level {level}, which the TVM program was compiled for; "
                f"this one is {cpu.host().generic.name}. Compile the program on this machine"
            )
        try:
            library = tvm.runtime.load_module(str(folder / LIBRARY_FILE))
            self._main = relax.VirtualMachine(library, self._device)["main"]
        except (RuntimeError, AttributeError, ValueError) as error:
            raise engine_error("TVM", "load the program", error) from error
        stored = load_file(folder / PARAMETERS_FILE)
        self._parameters = [self._tensor(stored[name]) for name in sorted(stored)]

    def run(self, feed: Mapping[str, NDArray[np.int64]]) -> NDArray[np.float32]:
        """Run the program; return its output. Raises EngineOutOfMemoryError, ModelError."""
        inputs = [self._tensor(feed[name]) for name in INPUTS if name in feed]
        try:
            result: NDArray[np.float32] = self._main(*inputs, *self._parameters).numpy()
        except RuntimeError as error:
            raise engine_error("TVM", "run the program", error) from error
        return result

    def _tensor(self, array: NDArray[Any]) -> Any:
        return tvm.runtime.tensor(np.ascontiguousarray(array), self._device)
