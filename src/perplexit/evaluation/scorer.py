"""Windows through a session: pooled longest first, in batches that fit, results window by window.

"Place" means a window's index in the plan's order, not its row in the window table.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from perplexit.errors import CapabilityError, EngineOutOfMemoryError
from perplexit.inputs.token_file import TokenFile
from perplexit.inputs.windows import WindowIds
from perplexit.runs.store import ScoredBatch
from perplexit.sessions.base import (
    AlternativesSession,
    DetailedSession,
    InferenceSession,
    QueueingSession,
    TimesPhases,
)
from perplexit.token_columns import TokenDetails


@dataclass(frozen=True, slots=True)
class BatchLimit:
    """How large batches are from place `start` on; one window is always allowed.

    max_windows: windows per batch; max_ids: ids fed forward per batch, padding included.
    """

    start: int
    max_windows: int
    max_ids: int | None = None

    def halved(self, start: int, num_windows: int) -> "BatchLimit":
        """Return the limit after a batch of `num_windows` at `start` did not fit."""
        return BatchLimit(start, max(1, num_windows // 2), self.max_ids and self.max_ids // 2)


@dataclass(frozen=True)
class BatchPlan:
    """Which windows go together: frozen at the start of a run, so that a resumed run repeats it.

    A batch's composition can change the last bits of its results; the same plan on the same
    machine gives the same bits. `limits` grows only when an engine runs out of memory.
    """

    limits: tuple[BatchLimit, ...]
    order: str = "longest-first"

    def to_json(self) -> dict[str, Any]:
        """Return the plan as `run.json` holds it."""
        return {
            "order": self.order,
            "limits": [
                {"start": x.start, "max_windows": x.max_windows, "max_ids": x.max_ids}
                for x in self.limits
            ],
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "BatchPlan":
        """Return the plan that `to_json` described."""
        return cls(tuple(BatchLimit(**limit) for limit in record["limits"]), record["order"])

    def batch_stop(self, start: int, lengths: NDArray[np.int64]) -> int:
        """Return where the batch that begins at place `start` ends. `lengths` are in plan order."""
        limit = [x for x in self.limits if x.start <= start][-1]
        next_change = min((x.start for x in self.limits if x.start > start), default=len(lengths))
        size = limit.max_windows
        if limit.max_ids is not None:  # longest first: the first window sets the padded length
            size = min(size, max(1, limit.max_ids // max(1, int(lengths[start]))))
        return min(start + size, next_change, len(lengths))


def plan_batches(
    session: InferenceSession, tokens: TokenFile, batch_size: int | None = None
) -> BatchPlan:
    """Return the plan for a new run: `batch_size` windows per batch, or what memory allows."""
    if batch_size is not None:
        return BatchPlan((BatchLimit(0, batch_size),))
    longest = int(tokens.fed_lengths().max(initial=1))
    size = max(1, session.max_batch_size(longest))
    return BatchPlan((BatchLimit(0, max_windows=4096, max_ids=size * longest),))


def longest_first(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return rows of the window table, longest window first, ties in table order."""
    return np.argsort(-lengths, kind="stable")


class ScoreWindows(Protocol):
    """How the windows of a batch are scored."""

    def __call__(self, windows: Sequence[WindowIds], *, top_k: int = 0) -> list[TokenDetails]:
        """Return one record per window."""


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
        """Return each batch of the plan with a place that is not `done`, scored, in plan order.

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
        """Yield what `batches` yields, one batch ahead.

        Memory is short only where no other batch is under way.
        """
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
        """Return the batch; its seconds begin where the batch before was done, at `last`."""
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
