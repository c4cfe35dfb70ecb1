"""Apache TVM: a model library that `perplexit compile --to tvm` made, of fixed sizes."""

from pathlib import Path

import tvm

from perplexit.errors import CapabilityError
from perplexit.quantization.tvm_engine import OpenedLibrary
from perplexit.sessions.compiled_program import ProgramSession, RunningProgram
from perplexit.sessions.options import EngineOptions


class TvmInferenceSession(ProgramSession):
    """A compiled model library on TVM.

    folder:  made by `perplexit compile --to tvm`. Shorter windows and smaller batches are padded.
    device:  what it was compiled for; None: that. threads: TVM_NUM_THREADS sets them.
    """

    _engine = "tvm"
    _native = True

    def _open(self, folder: Path, asked: EngineOptions) -> RunningProgram:
        device, threads = asked["device"], asked["threads"]
        target = self._metadata.made_by["target"]
        own = "cpu" if target == "llvm" else target
        if device not in (None, target, own):
            raise CapabilityError(
                f"the program was compiled for {target}, got device {device!r}; leave it "
                f"out, or compile with --device {device}"
            )
        if threads is not None:
            # the pool is the process's; -1: the engine chooses the cores
            tvm.get_global_func("runtime.config_threadpool")(1, threads)
        level = self._metadata.made_by.get("processor_level", "")
        library = OpenedLibrary(folder, target, level)
        settings = {"target": target, "processor_level": level, "native_code": True}
        return RunningProgram(library.run, "tvm", tvm.__version__, own, threads, settings)
