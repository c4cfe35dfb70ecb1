"""Contenders that show a cost beside the model: of a run, of documents, of MemoryTracker's figures.

They are given a workload as all contenders are; some use nothing of it but its number of windows.
"""

import shutil
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import perplexit as px
from perplexit.inputs.windows import WindowIds
from perplexit.session_descriptions import ModelDescription, SessionDescription
from perplexit.token_columns import TokenDetails
from sidebyside.contenders import Score, Scored, Setting, Workload
from sidebyside.perplexit_contenders import evaluation_in
from sidebyside.workloads import speeches

WORDS_PER_DOCUMENT = 40
NUM_REPEATED = 20_000


class Replaying(px.PytorchInferenceSession):
    """A PyTorch session that computes each window once, and then answers from memory."""

    known: dict[tuple[int, int], TokenDetails] | None = None

    def token_details(self, windows: Sequence[WindowIds], *, top_k: int = 0) -> list[TokenDetails]:
        """Return the model's results, or those that it gave before."""
        names = [(len(window.ids_T), window.index) for window in windows]
        self.known = self.known or {}
        if not self.known.keys() >= set(names):
            found = super().token_details(windows, top_k=top_k)
            self.known |= dict(zip(names, found, strict=True))
        return [self.known[name] for name in names]


def run_kept(setting: Setting, replays: bool) -> Score:
    """Open an evaluation into a run's folder; with `replays`, later turns do without the model."""
    kind = Replaying if replays else px.PytorchInferenceSession
    session = kind(setting.model, threads=setting.threads)
    folder = Path(tempfile.mkdtemp()) / "run"

    def score(workload: Workload) -> Scored:
        shutil.rmtree(folder, ignore_errors=True)
        run = px.evaluate(session, workload.tokens, run=folder, progress=lambda _: None)
        return Scored(run.nll_sum, len(run.tokens.nll))

    return score


class DocumentsPrepared:
    """`prepare` of as many short documents as the workload has windows."""

    def __init__(self, setting: Setting) -> None:
        self._model, self._texts = setting.model, list[str]()
        self._words = " ".join(speeches(40)).split()
        self._output = Path(tempfile.mkdtemp()) / "documents.safetensors"

    def prepare(self, workload: Workload) -> None:
        """Cut texts of a few dozen words from the addresses, each with a number of its own."""
        words, size = self._words, WORDS_PER_DOCUMENT
        starts = (np.arange(workload.tokens.num_windows) * 17) % (len(words) - size)
        self._texts = [f"{i} " + " ".join(words[s : s + size]) for i, s in enumerate(starts)]

    def __call__(self, _: Workload) -> Scored:
        """Prepare the texts once more."""
        px.prepare(self._texts, tokenizer=self._model, output=self._output, force=True)
        return Scored(None, len(self._texts))


class UniformSession:
    """A session in which every token costs log V: what is left is everything but a model."""

    model = ModelDescription("uniform", "Uniform", 0, "0" * 64, 2**20)
    description = SessionDescription("uniform", "1", "float32", "cpu")

    def token_nll(self, windows: Sequence[WindowIds]) -> list[NDArray[np.float32]]:
        """Return log V for each target."""
        return [np.full(len(window.targets_N), np.log(2**20), np.float32) for window in windows]

    def max_batch_size(self, window_length: int) -> int:
        """Return 256, for windows of any length."""
        return 256

    def close(self) -> None:
        """Do nothing: there is nothing to release."""


def without_model(setting: Setting) -> Score:
    """Open an evaluation whose model costs nothing."""
    return evaluation_in(UniformSession())


def tracked(setting: Setting, work: str, **counted: Any) -> Score:
    """Open many small objects, or many torch operations, in a MemoryTracker that counts them.

    counted: options of MemoryTracker; without any, nothing is tracked.
    """
    torch.set_num_threads(setting.threads)

    def score(_workload: Workload) -> Scored:
        number = torch.ones(64)
        with px.MemoryTracker(**counted) if counted else nullcontext(), px.Timer() as timer:
            kept = [str(x) for x in range(NUM_REPEATED)] if work == "objects" else []
            for _ in range(0 if kept else NUM_REPEATED):
                number = number + 1
        return Scored(None, NUM_REPEATED, seconds=timer.seconds)

    return score
