"""`MemoryTracker`: the peaks of a stretch of code, each kind of memory a figure of its own."""

from contextlib import ExitStack
from importlib import import_module
from typing import Any, Self

from perplexit.errors import MemoryBoundError, UsageError
from perplexit.resources.host_memory import HostMemory
from perplexit.resources.loaded_torch import cuda_in_use, loaded_torch
from perplexit.resources.shared_peak import CudaAllocations, PythonAllocations, SharedPeak, Stretch
from perplexit.resources.timer import Timer

_PYTHON = SharedPeak(PythonAllocations())
CUDA_PEAKS = _CUDA = SharedPeak(CudaAllocations())  # one for the process: the meter has one peak
_MB = 1024 * 1024  # as in the seed: a "MB" of 1,048,576 bytes


class MemoryTracker:
    """Peak memory between entry and exit, in bytes beyond what was held at entry.

        with MemoryTracker("assembly", bound_bytes=2 << 30) as tracker:
            ...
        print(f"Peak: {tracker.peak_mb:.1f} MB")

    python_peak_bytes:       Python objects and NumPy arrays, by `tracemalloc`; sees no tensor.
    host_rss_peak_bytes:     growth of the process's resident set: everything on the host, but
                             memory that the process reuses, or never touches, does not grow it.
    torch_cpu_peak_bytes:    CPU tensors that torch operations of this thread returned.
    torch_cuda_peak_bytes:   torch's CUDA allocator, summed over devices.
    peak_bytes, peak_mb:     the largest of these. They overlap, so they are never added up.
    host_rss_total_peak_bytes: the whole resident set's peak, what was held at entry included.
    duration_seconds:        wall time on a monotonic clock, devices synchronised.

    A figure that was not measured is None: the torch figures need torch to be loaded at entry (CPU)
    or CUDA to be in use at exit, and `python` and `torch_cpu` switch theirs off. They cost time:
    code that makes many small objects runs some ten times slower while it is traced, and every
    torch operation takes tens of microseconds more. Trackers nest and overlap: an inner one does
    not disturb the outer one's peak.

    bound_bytes: exit raises MemoryBoundError where `peak_bytes` exceeded it, unless the block
        itself raised.
    """

    def __init__(
        self,
        label: str = "",
        bound_bytes: int | None = None,
        *,
        python: bool = True,
        torch_cpu: bool = True,
    ) -> None:
        if bound_bytes is not None and bound_bytes < 0:
            raise UsageError(f"bound_bytes must not be negative, got {bound_bytes}: give bytes")
        self.label = label
        self.bound_bytes = bound_bytes
        self._wants_python = python
        self._wants_torch_cpu = torch_cpu
        self._running = False
        self._clear()

    def _clear(self) -> None:
        self._timer = Timer(self.label)
        self._host = HostMemory()
        self._python: Stretch | None = None
        self._cuda: Stretch | None = None
        self._cpu: Any = None  # CpuTensorBytes, of a module that imports torch
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        if self._running:
            raise UsageError(
                f"memory tracker {self.label!r} already runs: make a second one to nest them"
            )
        self._clear()
        self._timer.__enter__()
        with ExitStack() as stack:  # what was opened is closed again where a later one fails
            stack.enter_context(self._host)
            self._cuda = _CUDA.open()
            stack.callback(_CUDA.close, self._cuda)
            if self._wants_torch_cpu and loaded_torch() is not None:
                # not imported above: it imports torch, which the program has loaded itself
                module = import_module("perplexit.resources.cpu_tensor_bytes")
                self._cpu = stack.enter_context(module.CpuTensorBytes())
            if self._wants_python:
                self._python = _PYTHON.open()
                stack.callback(_PYTHON.close, self._python)
            self._stack = stack.pop_all()
        self._running = True
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._timer.__exit__(kind, error, traceback)
        self._stack.close()
        self._running = False
        if error is None:
            self._check_bound()

    def _check_bound(self) -> None:
        if self.bound_bytes is not None and self.peak_bytes > self.bound_bytes:
            figures = ", ".join(
                f"{name} {value:,}" for name, value in self.figures().items() if value is not None
            )
            raise MemoryBoundError(
                f"{self.label or 'the block'} was to stay within {self.bound_bytes:,} bytes beyond "
                f"its start, got a peak of {self.peak_bytes:,} ({figures}): use smaller batches or "
                "windows, or state a larger bound"
            )

    @property
    def python_peak_bytes(self) -> int | None:
        """Return the peak of traced Python allocations beyond the start; None where not traced."""
        if self._running and self._python is not None:
            _PYTHON.fold()
        return _beyond_start(self._python)

    @property
    def host_rss_peak_bytes(self) -> int:
        """Return the peak of the process's resident set beyond the start."""
        return self._host.peak_bytes - self._host.start_bytes

    @property
    def host_rss_total_peak_bytes(self) -> int:
        """Return the peak of the process's resident set."""
        return self._host.peak_bytes

    @property
    def torch_cpu_peak_bytes(self) -> int | None:
        """Return the peak of the CPU tensors made inside; None where torch was not loaded."""
        return None if self._cpu is None else int(self._cpu.peak_bytes)

    @property
    def torch_cuda_peak_bytes(self) -> int | None:
        """Return the peak of torch's CUDA allocations beyond the start; None without CUDA."""
        if self._running:
            _CUDA.fold()
        return _beyond_start(self._cuda) if cuda_in_use() else None

    def figures(self) -> dict[str, int | None]:
        """Return every kind of peak by its name, in bytes beyond the start."""
        return {
            "python_peak_bytes": self.python_peak_bytes,
            "host_rss_peak_bytes": self.host_rss_peak_bytes,
            "torch_cpu_peak_bytes": self.torch_cpu_peak_bytes,
            "torch_cuda_peak_bytes": self.torch_cuda_peak_bytes,
        }

    @property
    def peak_bytes(self) -> int:
        """Return the largest of the separate peaks, so that none hides behind another."""
        return max(value for value in self.figures().values() if value is not None)

    @property
    def peak_mb(self) -> float:
        """Return `peak_bytes` in units of 1,048,576 bytes."""
        return self.peak_bytes / _MB

    @property
    def current_bytes(self) -> int:
        """Return the largest of the kinds held now (or at exit) beyond the start; never below 0."""
        if self._running:
            _PYTHON.fold()
            _CUDA.fold()
        held = [self._host.current_bytes - self._host.start_bytes]
        held += [s.current_bytes - s.start_bytes for s in (self._python, self._cuda) if s]
        return max(0, *held, 0 if self._cpu is None else self._cpu.current_bytes)

    @property
    def current_mb(self) -> float:
        """Return `current_bytes` in units of 1,048,576 bytes."""
        return self.current_bytes / _MB

    @property
    def duration_seconds(self) -> float:
        """Return the seconds from entry to exit, or to now."""
        return self._timer.seconds

    def __str__(self) -> str:
        return f"{self.label or 'memory'}: peak {self.peak_mb:.1f} MB, {self._timer.seconds:.3f} s"


def _beyond_start(stretch: Stretch | None) -> int | None:
    return None if stretch is None else max(0, stretch.peak_bytes - stretch.start_bytes)
