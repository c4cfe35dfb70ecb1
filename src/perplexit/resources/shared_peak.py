"""Peaks of overlapping stretches of a program, from a meter that has one resettable peak."""

import threading
import tracemalloc
from dataclasses import dataclass
from typing import Protocol

from perplexit.resources.loaded_torch import cuda_in_use, loaded_torch


class PeakMeter(Protocol):
    """Bytes held now, and the most since the last `reset`; both for the whole process."""

    def begin(self) -> None:
        """Begin to measure, before the first of several overlapping stretches."""

    def end(self) -> None:
        """End the measurement, after the last of them."""

    def read(self) -> tuple[int, int]:
        """Return `(bytes now, peak bytes since the last reset)`."""

    def reset(self) -> None:
        """Let the peak begin anew at what is held now."""


@dataclass(slots=True, eq=False)
class Stretch:
    """What one stretch saw: bytes at its start, now (or at its end), and at its peak."""

    start_bytes: int
    current_bytes: int
    peak_bytes: int


class SharedPeak:
    """Gives each of several nested or overlapping stretches its own peak of one meter.

    Resetting a meter's only peak for an inner stretch would lose the outer one's: so before every
    reset the peak is folded into all the stretches that are open.
    """

    def __init__(self, meter: PeakMeter) -> None:
        self._meter = meter
        self._open: list[Stretch] = []
        self._lock = threading.RLock()

    def open(self) -> Stretch:
        """Return a new stretch that begins now."""
        with self._lock:
            if not self._open:
                self._meter.begin()
            self.fold()
            self._meter.reset()
            held = self._meter.read()[0]
            stretch = Stretch(held, held, held)
            self._open.append(stretch)
            return stretch

    def fold(self) -> None:
        """Bring every open stretch up to date."""
        with self._lock:
            held, peak = self._meter.read()
            for stretch in self._open:
                stretch.current_bytes = held
                stretch.peak_bytes = max(stretch.peak_bytes, peak)

    def close(self, stretch: Stretch) -> None:
        """End a stretch, whose figures no longer change; harmless when repeated."""
        with self._lock:
            if stretch in self._open:
                self.fold()
                self._open.remove(stretch)
                if not self._open:
                    self._meter.end()


class PythonAllocations:
    """The allocations that `tracemalloc` traces: Python objects and NumPy arrays, no tensors."""

    def __init__(self) -> None:
        self._tracing_is_ours = False

    def begin(self) -> None:
        """Start to trace, unless the program already does."""
        self._tracing_is_ours = not tracemalloc.is_tracing()
        if self._tracing_is_ours:
            tracemalloc.start(1)

    def end(self) -> None:
        """Stop to trace, unless the program did so before."""
        if self._tracing_is_ours:
            tracemalloc.stop()

    def read(self) -> tuple[int, int]:
        """Return the traced bytes now and at their peak."""
        return tracemalloc.get_traced_memory()

    def reset(self) -> None:
        """Reset tracemalloc's peak: a peak that the program itself reads begins anew too."""
        tracemalloc.reset_peak()


class CudaAllocations:
    """Bytes that torch's CUDA allocator has handed out, summed over devices; 0 without CUDA.

    The peaks of several devices need not coincide, so their sum is an upper bound of the joint one.
    """

    def begin(self) -> None:
        """Do nothing: the allocator always counts."""

    def end(self) -> None:
        """Do nothing."""

    def read(self) -> tuple[int, int]:
        """Return the allocated bytes now and at their peak."""
        torch = loaded_torch()
        if torch is None or not cuda_in_use():
            return 0, 0
        devices = range(torch.cuda.device_count())
        return (
            sum(int(torch.cuda.memory_allocated(device)) for device in devices),
            sum(int(torch.cuda.max_memory_allocated(device)) for device in devices),
        )

    def reset(self) -> None:
        """Reset the allocator's peak on every device."""
        torch = loaded_torch()
        if torch is not None and cuda_in_use():
            for device in range(torch.cuda.device_count()):
                torch.cuda.reset_peak_memory_stats(device)
