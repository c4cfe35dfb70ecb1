"""`Timer`: the seconds that a stretch of code took, the devices' queued work included."""

from contextlib import ContextDecorator
from time import perf_counter
from typing import Self

from perplexit.resources.loaded_torch import synchronize


class Timer(ContextDecorator):
    """The seconds between entry and exit, on a monotonic clock.

        with Timer("prefill") as timer:
            ...
        print(timer.label, timer.seconds)

    Work that torch has queued on CUDA or MPS is waited for at both ends. `seconds` inside the block
    is the time so far. One timer may be used again (it starts anew), and decorates a function.
    """

    def __init__(self, label: str = "") -> None:
        self.label = label
        self._started: float | None = None
        self._seconds = 0.0

    @property
    def seconds(self) -> float:
        """Return the seconds from entry to exit, or to now where the block still runs."""
        if self._started is None:
            return self._seconds
        return perf_counter() - self._started

    @property
    def duration_seconds(self) -> float:
        """Return `seconds`, under the name that `MemoryTracker` uses too."""
        return self.seconds

    def __enter__(self) -> Self:
        synchronize()
        self._started = perf_counter()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is None:  # after an error, a failing device must not take the error's place
            synchronize()
        self._seconds = self.seconds
        self._started = None

    def __str__(self) -> str:
        return f"{self.label or 'time'}: {self.seconds:.3f} s"
