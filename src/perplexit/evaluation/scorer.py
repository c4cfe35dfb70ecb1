"""Windows through a session: pooled longest first, in batches that fit, results window by window.

"Place" means a window's index in the plan's order, not its row in the window table.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from perplexit.errors import CapabilityError, EngineOutOfMemoryError
from perplexit.evaluation.batch_plan import BatchPlan, longest_first
from perplexit.inputs.token_file import TokenFile
from perplexit.inputs.windows import WindowIds
from perplexit.runs.scored_batch import ScoredBatch
from perplexit.sessions.base import (
    AlternativesSession,
    DetailedSession,
    InferenceSession,
    QueueingSession,
    TimesPhases,
)
from perplexit.token_columns import TokenDetails


class ScoreWindows(Protocol):
    """How the windows of a batch are scored."""

    def __call__(self, windows: Sequence[WindowIds], *, top_k: int = 0) -> list[TokenDetails]:
        """One record a window."""
        ...


@dataclass(frozen=True, slots=True)
class ProgressUpdate:
    """How far an evaluation is.

    nll_sum: nats over `num_tokens`; both include what an earlier, interrupted process scored.
    num_tokens_resumed, num_windows_resumed: what this process did not have to score.
    seconds: this process's own scoring time.
    """

    num_tokens: int
    total_tokens: int
    nll_sum: float
    num_windows: int
    total_windows: int
    num_tokens_resumed: int
    num_windows_resumed: int
    seconds: float


@dataclass
class Scorer:
    """Runs a plan over a session, leaving out the places that are already done.

    `plan` is replaced by one with smaller batches when the engine runs out of memory; the caller
    records it before the next batch is scored (`batches` yields after every success).
    """

    session: InferenceSession
    tokens: TokenFile
    plan: BatchPlan
    top_k: int = 0
    details: ScoreWindows | None = None  # None: the session's own
    lengths: NDArray[np.int64] = field(init=False)
    order: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        told = self.details is not None or isinstance(
            self.session, DetailedSession | AlternativesSession
        )
        if self.top_k and not told:
            raise CapabilityError(
                f"--top-k {self.top_k} needs whole distributions, but "
                f"{self.session.model.address} gives the loss of each target alone; "
                "leave --top-k out, or compile with --no-perplexity"
            )
        self._score_windows = self.details or details_from(self.session, top_k=self.top_k)
        lengths = self.tokens.fed_lengths()
        self.order = longest_first(lengths)
        self.lengths = lengths[self.order]

    def batches(self, done: NDArray[np.bool_]) -> Iterator[ScoredBatch]:
        """Each batch of the plan with a place that is not `done`, scored, in plan order.

        A session that queues work on a device is given the next batch before the last one's
        results are waited for. Raises EngineOutOfMemoryError where one window does not fit.
        """
        session = self.session
        if self.details is None and isinstance(session, QueueingSession) and session.queues:
            yield from self._queued(session, done)
            return
        start = 0
        while start < len(self.order):
            stop = self.plan.batch_stop(start, self.lengths)
            if done[start:stop].all():
                start = stop
                continue
            rows = self.order[start:stop]
            windows = [self.tokens.window_ids(int(row)) for row in rows]
            began = time.perf_counter()
            try:
                details = self._score_windows(windows, top_k=self.top_k)
            except EngineOutOfMemoryError as error:
                self._halve(start, stop, error)
                continue
            seconds, decode_seconds = time.perf_counter() - began, 0.0
            if isinstance(session, TimesPhases):
                measured = session.take_seconds()
                seconds, decode_seconds = measured.prefill + measured.decode, measured.decode
            yield ScoredBatch.of(range(start, stop), rows, details, seconds, decode_seconds)
            start = stop

    def _queued(self, session: QueueingSession, done: NDArray[np.bool_]) -> Iterator[ScoredBatch]:
        """As `batches`, one batch ahead; memory is short only where nothing else is under way."""
        start, waiting, last = 0, None, 0.0
        while start < len(self.order) or waiting is not None:
            started: _Queued | None = None
            if start < len(self.order):
                stop = self.plan.batch_stop(start, self.lengths)
                if done[start:stop].all():
                    start = stop
                    continue
                try:
                    started = self._start(session, start, stop)
                except EngineOutOfMemoryError as error:
                    if waiting is None:
                        self._halve(start, stop, error)
                        continue
            if waiting is not None:
                try:
                    batch = waiting.collected(last)
                except EngineOutOfMemoryError as error:
                    self._halve(waiting.start, waiting.stop, error)
                    start, waiting = waiting.start, None
                    continue
                last = time.perf_counter()
                yield batch
            waiting, start = started, started.stop if started is not None else start

    def _start(self, session: QueueingSession, start: int, stop: int) -> "_Queued":
        rows = self.order[start:stop]
        windows = [self.tokens.window_ids(int(row)) for row in rows]
        began = time.perf_counter()
        return _Queued(start, stop, rows, session.queue_details(windows, top_k=self.top_k), began)

    def _halve(self, start: int, stop: int, error: EngineOutOfMemoryError) -> None:
        if stop - start == 1:
            raise EngineOutOfMemoryError(
                f"one window of {int(self.lengths[start])} ids does not fit in memory ({error}); "
                "prepare the input with a smaller --max-length, or use a smaller dtype"
            ) from error
        limit = [x for x in self.plan.limits if x.start <= start][-1]
        kept = tuple(x for x in self.plan.limits if x.start < start)
        self.plan = BatchPlan((*kept, limit.halved(start, stop - start)), self.plan.order)


@dataclass(frozen=True, slots=True)
class _Queued:
    """A batch under way since `began`; `wait` gives its results."""

    start: int
    stop: int
    windows: NDArray[np.int64]
    wait: Callable[[], list[TokenDetails]]
    began: float

    def collected(self, last: float) -> ScoredBatch:
        """The batch; it counts no second in which the one before, done at `last`, was running."""
        details = self.wait()
        seconds = time.perf_counter() - max(self.began, last)
        places = range(self.start, self.stop)
        return ScoredBatch.of(places, self.windows, details, seconds)


def details_from(session: InferenceSession, *, top_k: int) -> ScoreWindows:
    """Return what gives most of a session's windows: details where it can, else the nll alone."""
    if isinstance(session, DetailedSession):
        return session.token_details
    if top_k and isinstance(session, AlternativesSession):
        return partial(session.token_alternatives, top_k=top_k)

    def nll_alone(windows: Sequence[WindowIds], *, top_k: int = 0) -> list[TokenDetails]:
        return [TokenDetails({"nll": nll_N}) for nll_N in session.token_nll(windows)]

    return nll_alone
