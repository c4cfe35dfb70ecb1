"""How far a model is from itself: some windows scored again in batches of another size.

Rounding depends on the shape of a batch: kernels split their sums by it, and dynamic quantization
takes its scales from it. A difference between two runs below that says nothing of the models.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from perplexit.errors import EmptyScoreError
from perplexit.evaluation.scorer import BatchPlan
from perplexit.inputs.token_file import TokenFile
from perplexit.metrics.intervals import clusters_for, mean_interval
from perplexit.runs.run import Run
from perplexit.sessions.base import InferenceSession

MAX_WINDOWS = 32


@dataclass(frozen=True, slots=True)
class NoiseFloor:
    """The mean nll in the other batches minus the run's, over the same tokens.

    nats_a_token: the interval's end that lies farther from 0. Without an interval it is the mean
                  size of the differences: their mean may be close to 0 by chance.
    batch_size:   windows per batch, when they were scored again.
    """

    nats_a_token: float
    mean: float
    low: float | None
    high: float | None
    largest_token: float
    batch_size: int
    num_windows: int
    num_tokens: int

    def to_json(self) -> dict[str, Any]:
        """Return the floor as plain JSON values."""
        return asdict(self)


def noise_floor_of(session: InferenceSession, tokens: TokenFile, run: Run) -> NoiseFloor:
    """Return a complete run's noise floor, from up to 32 of its windows, evenly spread.

    A run in batches of several windows is repeated window by window, any other in pairs.
    Raises EmptyScoreError where no token has a finite loss both times.
    """
    rows = run.tokens
    scored = np.unique(rows.window)
    chosen = scored[np.linspace(0, len(scored) - 1, min(MAX_WINDOWS, len(scored))).astype(int)]
    batch_size = 1 if _largest_batch(run, tokens) > 1 else 2
    again: dict[int, Any] = {}
    for start in range(0, len(chosen), batch_size):
        batch = [int(window) for window in chosen[start : start + batch_size]]
        losses = session.token_nll([tokens.window_ids(window) for window in batch])
        again |= dict(zip(batch, losses, strict=True))
    place_R = np.flatnonzero(np.isin(rows.window, chosen))
    delta_R = np.concatenate([again[int(w)] for w in chosen]).astype(np.float64) - rows.nll[place_R]
    finite_R = np.isfinite(delta_R)
    delta_R, place_R = delta_R[finite_R], place_R[finite_R]
    if len(delta_R) == 0:
        raise EmptyScoreError("expected a token with a finite loss in both batchings, got none")
    clusters = clusters_for(rows.document[place_R], rows.window[place_R])
    interval = mean_interval(delta_R, clusters, run.confidence)
    ends = [abs(end) for end in (interval.low, interval.high) if end is not None]
    return NoiseFloor(
        nats_a_token=max(ends, default=float(np.abs(delta_R).mean())),
        mean=interval.value,
        low=interval.low,
        high=interval.high,
        largest_token=float(np.abs(delta_R).max()),
        batch_size=batch_size,
        num_windows=len(chosen),
        num_tokens=len(delta_R),
    )


def _largest_batch(run: Run, tokens: TokenFile) -> int:
    plan = BatchPlan.from_json({key: run.batch_plan[key] for key in ("order", "limits")})
    lengths = np.sort(tokens.fed_lengths())[::-1].astype(np.int64)
    start, largest = 0, 1
    while start < len(lengths):
        stop = plan.batch_stop(start, lengths)
        largest, start = max(largest, stop - start), stop
    return largest
