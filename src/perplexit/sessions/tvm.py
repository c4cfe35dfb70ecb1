"""Apache TVM: a model library that `perplexit compile --to tvm` made, of fixed sizes."""

from pathlib import Path
from typing import Any

import tvm

from perplexit.errors import CapabilityError
from perplexit.quantization.tvm_engine import OpenedLibrary
from perplexit.sessions.compiled_program import (
    Asked,
    ProgramLogits,
    ProgramSession,
    RunningProgram,
    gives_logits,
)


class TvmInferenceSession(ProgramSession):
    """A compiled model library on TVM; with logits, it is a `TvmLogitsSession`.

    folder:  made by `perplexit compile --to tvm`. Shorter windows and smaller batches are padded.
    device:  what it was compiled for; None: that. threads: TVM_NUM_THREADS sets them.
    """

    _engine = "tvm"
    _native = True

    def __new__(cls, folder: str | Path, **_: Any) -> "TvmInferenceSession":
        """A session that has `token_details` only where the program gives logits."""
        logits = cls is TvmInferenceSession and gives_logits(folder, cls._engine)
        return super().__new__(TvmLogitsSession if logits else cls)

    def _open(self, folder: Path, asked: Asked) -> RunningProgram:
        target = self._metadata.made_by["target"]
        same = {target, "cpu"} if target == "llvm" else {target}
        if asked.device is not None and asked.device not in same:
            raise CapabilityError(
                f"the program was compiled for {target}, got device {asked.device!r}; leave it "
                f"out, or compile with --device {asked.device}"
            )
        if asked.threads is not None:
            _set_threads(asked.threads)
        level = self._metadata.made_by.get("processor_level", "")
        library = OpenedLibrary(folder, target, level)
        device = "cpu" if target == "llvm" else target
        settings = {"target": target, "processor_level": level, "native_code": True}
        return RunningProgram(library.run, "tvm", tvm.__version__, device, asked.threads, settings)


class TvmLogitsSession(ProgramLogits, TvmInferenceSession):
    """A TVM program that gives logits."""


def _set_threads(threads: int) -> None:
    # the pool is the process's; -1: the engine chooses the cores
    tvm.get_global_func("runtime.config_threadpool")(1, threads)
