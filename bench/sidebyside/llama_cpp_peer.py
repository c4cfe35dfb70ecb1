"""llama.cpp through its Python binding, as the binding's own documentation has it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp import Llama

from sidebyside.contenders import Contender, Scored, Setting
from sidebyside.workloads import Workload

_FLOAT32 = 0  # ggml's number; the default, float16 keys and values, is another computation


@dataclass(frozen=True)
class PythonBinding:
    """A GGUF file and `Llama(logits_all=True)`."""

    file: Path
    threads: int

    def prepare(self, workload: Workload) -> Callable[[], Scored]:
        """`eval` of each window's ids, then the binding's own log-softmax over `scores`."""
        windows = workload.windows()
        engine: Any = Llama(
            str(self.file),
            n_ctx=workload.max_length,
            n_threads=self.threads,
            n_threads_batch=self.threads,
            type_k=_FLOAT32,
            type_v=_FLOAT32,
            logits_all=True,
            verbose=False,
        )
        engine.eval(windows[0][:8].tolist())  # maps the weights: they are not a turn's memory

        def turn() -> Scored:
            nll_sum = 0.0
            for window in windows:
                engine.reset()
                engine.eval(window[:-1].tolist())
                logprobs = Llama.logits_to_logprobs(engine.scores[: len(window) - 1])
                picked = logprobs[np.arange(len(window) - 1), window[1:]]
                nll_sum -= float(picked.sum(dtype=np.float64))
            return Scored(nll_sum, workload.num_targets)

        return turn


def python_binding(setting: Setting) -> Contender:
    """The program's GGUF file, float32 weights."""
    if setting.program is None:
        raise ValueError("llama.cpp needs a GGUF file, and none was compiled")
    return PythonBinding(Path(setting.program) / "model.gguf", setting.threads)
