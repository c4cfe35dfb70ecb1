"""Peak host memory of a stretch of a process: cheap enough to be always on."""

import sys
import threading
from typing import Self

import psutil

if sys.platform != "win32":
    import resource

SAMPLE_SECONDS = 0.05


def rss_bytes() -> int:
    """Return the process's resident set size now."""
    return int(psutil.Process().memory_info().rss)


def lifetime_peak_bytes() -> int:
    """Return the kernel's own highest resident set of the process since it began."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024  # Linux counts KiB


class HostMemory:
    """The peak of the process's resident set between `start` and `stop`.

    A thread samples every 50 ms. A spike between two samples is not lost where it sets a record:
    if the kernel's high-water mark grew in between, that mark is the exact peak. `with` works too.
    The figure is the whole process's, other threads included.
    """

    def __init__(self, sample_seconds: float = SAMPLE_SECONDS) -> None:
        self._sample_seconds = sample_seconds
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self.start_bytes = 0  # the resident set at `start`
        self._start_mark = 0
        self._peak_bytes = 0
        self._current_bytes = 0

    def start(self) -> Self:
        """Begin to sample; returns itself."""
        self._stopping.clear()
        self._start_mark = lifetime_peak_bytes()
        self.start_bytes = self._peak_bytes = self._current_bytes = rss_bytes()
        self._thread = threading.Thread(target=self._run, name="perplexit-rss", daemon=True)
        self._thread.start()
        return self

    def stop(self) -> int:
        """End the sampling and return the peak in bytes."""
        if self._thread is not None:
            self._stopping.set()
            self._thread.join()
            self._sample()
            self._thread = None
        return self._peak_bytes

    @property
    def peak_bytes(self) -> int:
        """Return the largest resident set so far, in bytes."""
        self._sample()
        return self._peak_bytes

    @property
    def current_bytes(self) -> int:
        """Return the resident set now, or at `stop`."""
        self._sample()
        return self._current_bytes

    def _run(self) -> None:
        while not self._stopping.wait(self._sample_seconds):
            self._sample()

    def _sample(self) -> None:
        if self._thread is None:  # before `start` and after `stop`
            return
        self._current_bytes = rss_bytes()
        mark = lifetime_peak_bytes()
        record = mark if mark > self._start_mark else 0
        self._peak_bytes = max(self._peak_bytes, self._current_bytes, record)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self.stop()
