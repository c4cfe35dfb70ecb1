"""llama.cpp through its Python binding, as the binding's own documentation has it."""

from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp import Llama

from sidebyside.contenders import Prepare, Scored, Setting, Turn
from sidebyside.workloads import Workload

_FLOAT32 = 0  # ggml's number; the default, float16 keys and values, is another computation


def python_binding(setting: Setting) -> Prepare:
    """Open the program's GGUF file, float32 weights, with `Llama(logits_all=True)`.

    A turn is `eval` of each window's ids, then the binding's own log-softmax over `scores`.
    """
    if setting.program is None:
        raise ValueError("llama.cpp needs a GGUF file, and none was compiled")
    file = Path(setting.program) / "model.gguf"

    def prepare(workload: Workload) -> Turn:
        windows = [window.ids_T for window in workload.windows()]
        engine: Any = Llama(
            str(file),
            n_ctx=workload.max_length,
            n_threads=setting.threads,
            n_threads_batch=setting.threads,
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
            return Scored(nll_sum, workload.tokens.num_targets)

        return turn

    return prepare
