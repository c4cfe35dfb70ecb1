"""AOTInductor: a package that `perplexit compile --to pt2` made, machine code by PyTorch."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from perplexit.program_batches import Feed
from perplexit.quantization.engine_errors import engine_error
from perplexit.sessions.compiled_program import ProgramSession, RunningProgram
from perplexit.sessions.options import EngineOptions

_PACKAGE_FILE = "model.pt2"


class Pt2InferenceSession(ProgramSession):
    """A compiled package of AOTInductor.

    folder:  made by `perplexit compile --to pt2`. Shorter windows and smaller batches are padded.
    device:  "cpu". threads: of torch; None: as they are.
    """

    _engine = "pt2"
    _cpu_only = "the program was compiled for the cpu, got device {got!r}; leave it out"
    _native = True

    def _open(self, folder: Path, asked: EngineOptions) -> RunningProgram:
        if asked["threads"] is not None:
            torch.set_num_threads(asked["threads"])
        try:
            program = torch._inductor.aoti_load_package(str(folder / _PACKAGE_FILE))
        except (RuntimeError, OSError) as error:
            raise engine_error("AOTInductor", "load the program", error) from error

        def run(feed: Feed) -> NDArray[np.float32]:
            names = [x for x in ("input_ids", "target_rows", "target_ids") if x in feed]
            with torch.inference_mode():
                result = program(*(torch.from_numpy(feed[name]) for name in names))
            array: NDArray[np.float32] = result.numpy()
            return array

        settings = {"made_for": self._metadata.made_by.get("processor", ""), "native_code": True}
        threads = torch.get_num_threads()
        return RunningProgram(run, "aotinductor", torch.__version__, "cpu", threads, settings)
