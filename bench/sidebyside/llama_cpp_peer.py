"""llama.cpp through its Python binding, as the binding's own documentation has it."""

from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp import Llama

from sidebyside.contenders import Scored, Setting, Workload

_FLOAT32 = 0  # ggml's number; the default, float16 keys and values, is another computation


class PythonBinding:
    """The program's GGUF file, float32 weights, with `Llama(logits_all=True)`.

    A turn is `eval` of each window's ids, then the binding's own log-softmax over `scores`.
    """

    def __init__(self, setting: Setting) -> None:
        if setting.program is None:
            raise ValueError("llama.cpp needs a GGUF file, and none was compiled")
        self._file, threads = Path(setting.program) / "model.gguf", setting.threads
        self._options: dict[str, Any] = {"n_threads": threads, "n_threads_batch": threads}
        self._options |= {"type_k": _FLOAT32, "type_v": _FLOAT32}
        self._options |= {"logits_all": True, "verbose": False}
        self._engine: Any = None

    def prepare(self, workload: Workload) -> None:
        """Make an engine for the windows; mapping its weights is not a turn's memory."""
        self._engine = Llama(str(self._file), n_ctx=workload.max_length, **self._options)
        self._engine.eval(workload.windows()[0].ids_T[:8].tolist())

    def __call__(self, workload: Workload) -> Scored:
        """Score the windows one after the other."""
        nll_sum = 0.0
        for ids in [window.ids_T for window in workload.windows()]:
            self._engine.reset()
            self._engine.eval(ids[:-1].tolist())
            logprobs = Llama.logits_to_logprobs(self._engine.scores[: len(ids) - 1])
            picked = logprobs[np.arange(len(ids) - 1), ids[1:]]
            nll_sum -= float(picked.sum(dtype=np.float64))
        return Scored(nll_sum, workload.tokens.num_targets)
