"""A corpus of ever more documents: `prepare` and `evaluate`, on a session that costs nothing."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import perplexit as px
from perplexit.inputs.windows import WindowIds
from perplexit.resources.host_memory import HostMemory
from perplexit.resources.memory_advice import return_freed_memory
from perplexit.session_descriptions import ModelDescription, SessionDescription
from sidebyside.growth import DOCUMENTS, exponents
from sidebyside.scripts import Job, printed
from sidebyside.texts import speeches
from sidebyside.worker import reset_high_water_mark

WORDS_A_DOCUMENT = 40


class UniformSession:
    """Every token costs log V: what is left of an evaluation is everything but a model."""

    model = ModelDescription("uniform", "Uniform", 0, "0" * 64, 2**20)
    description = SessionDescription("uniform", "1", "float32", "cpu")

    def token_nll(self, windows: Sequence[WindowIds]) -> list[NDArray[np.float32]]:
        """log V for each target."""
        return [np.full(len(window.targets_N), np.log(2**20), np.float32) for window in windows]

    def max_batch_size(self, window_length: int) -> int:
        """As many as anybody would want."""
        del window_length
        return 256

    def close(self) -> None:
        """Nothing to release."""


def documents(count: int) -> list[str]:
    """Texts of a few dozen words, cut from the addresses, each with a number of its own."""
    words = " ".join(speeches(40)).split()
    starts = (np.arange(count) * 17) % (len(words) - WORDS_A_DOCUMENT)
    return [f"{i} " + " ".join(words[at : at + WORDS_A_DOCUMENT]) for i, at in enumerate(starts)]


def measured(work: Callable[[], object]) -> dict[str, float]:
    """Processor seconds, and peak bytes beyond what was held before."""
    return_freed_memory()
    reset_high_water_mark()
    with HostMemory() as memory:
        began = time.process_time()
        work()
        seconds = time.process_time() - began
    return {"seconds": seconds, "peak_bytes": memory.peak_bytes - memory.start_bytes}


def measure(job: Job, scratch: Path) -> dict[str, Any]:
    """Both verbs at each number of documents."""
    points: dict[str, list[dict[str, float]]] = {"prepare": [], "evaluate": []}
    path = scratch / "many.safetensors"
    px.evaluate(UniformSession(), px.prepare(documents(50), tokenizer=job.model, output=path))
    for size in DOCUMENTS[: 2 if job.quick else None]:
        texts = documents(size)
        found = measured(partial(px.prepare, texts, tokenizer=job.model, output=path))
        points["prepare"].append({"size": size, **found})
        tokens = px.TokenFile.open(path)
        found = measured(partial(px.evaluate, UniformSession(), tokens))
        points["evaluate"].append({"size": size, **found})
    return {"label": "documents", "points": points, "exponents": exponents(points)}


if __name__ == "__main__":
    printed(measure)
