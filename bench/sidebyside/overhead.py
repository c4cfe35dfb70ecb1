"""What an evaluation costs beside its model: records, statistics, progress, the run's folder.

One evaluation of 20,000 tokens with the real model says how long the model takes. Then the same
evaluation runs again on a session that gives the same results from memory, so that only what is not
the model is left.
"""

import shutil
import statistics
import time
from collections.abc import Sequence
from typing import Any

import perplexit as px
from perplexit.evaluation.scorer import ProgressUpdate
from perplexit.inputs.windows import WindowIds
from perplexit.token_columns import TokenDetails
from sidebyside.alternation import Bench
from sidebyside.workloads import ids_of_speeches, write_workload

NUM_TOKENS, WINDOW = 20_000, 1024


class Replaying(px.PytorchInferenceSession):
    """A PyTorch session that computes each window once, and then answers from memory."""

    def __init__(self, model: str, threads: int) -> None:
        super().__init__(model, threads=threads)
        self.known: dict[int, TokenDetails] = {}

    def token_details(self, windows: Sequence[WindowIds], *, top_k: int = 0) -> list[TokenDetails]:
        """Return the model's results, or those that it gave before."""
        if not all(window.index in self.known for window in windows):
            found = super().token_details(windows, top_k=top_k)
            self.known |= {w.index: d for w, d in zip(windows, found, strict=True)}
        return [self.known[window.index] for window in windows]


def measure(bench: Bench) -> dict[str, Any]:
    """Return seconds of the model's evaluation, in the session and beside it, and of replays."""
    count = NUM_TOKENS // 10 if bench.quick else NUM_TOKENS
    window, scratch = min(WINDOW, count // 4), bench.subfolder("scratch")
    model, folder = bench.model(bench.first), scratch / "overhead-run"
    ids = ids_of_speeches(model)
    tokens = write_workload(scratch, ids, count // (window - 1), window).tokens
    session = Replaying(str(model), bench.threads)
    updates: list[ProgressUpdate] = []

    def evaluated() -> tuple[px.Run, float]:
        shutil.rmtree(folder, ignore_errors=True)
        began = time.perf_counter()
        run = px.evaluate(session, tokens, run=folder, progress=updates.append)
        return run, time.perf_counter() - began

    session.model.weights_fingerprint  # noqa: B018 - part of loading, computed when first asked for
    real, total = evaluated()
    in_session = sum(real.seconds[phase] or 0.0 for phase in ("prefill", "decode"))
    replays = [evaluated()[1] for _ in range(bench.rounds)]
    return {
        "num_tokens": real.num_tokens,
        "window": window,
        "total_seconds": total,
        "session_seconds": in_session,
        "beside_seconds": total - in_session,
        "share": (total - in_session) / total,
        "replay_seconds": replays,
        "replay_share": statistics.median(replays) / (in_session + statistics.median(replays)),
    }
