"""Worker processes: each measurement has its own, and so has each contender that takes turns."""

import ctypes
import gc
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, suppress
from dataclasses import asdict
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import perplexit as px
from sidebyside.contenders import Score, Setting, Workload, contender_named

LIBRARIES = ("OMP", "MKL", "OPENBLAS", "RAYON", "TVM")
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}


class WorkerError(Exception):
    """What went wrong in a worker's process."""


class OwnProcess:
    """A process with so many threads and cores, in which functions are called.

    log: the file for all that it prints; None: where the parent's goes. without: an engine trick
    that is switched off. source: the `src` of another version, imported in place of this one.
    """

    def __init__(
        self,
        threads: int,
        *,
        log: Path | None = None,
        without: str = "",
        source: Path | None = None,
    ) -> None:
        counts = {f"{library}_NUM_THREADS": str(threads) for library in LIBRARIES}
        os.environ.update(counts | OFFLINE)
        self._log, start = log, (threads, log, without)
        self._executor = ProcessPoolExecutor(1, get_context("spawn"), _begin, start)
        path = list(sys.path)
        sys.path[:0] = [] if source is None else [str(source)]
        self._executor.submit(os.getpid)  # starts the process, with this one's path
        sys.path[:] = path

    def start(self, function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
        """Start the call; what is returned waits for its result and raises WorkerError."""
        running = self._executor.submit(_stated, function, arguments)

        def result() -> Any:
            try:
                return running.result()
            except BrokenProcessPool:
                raise WorkerError(f"the process ended early; see {self._log}") from None

        return result

    def close(self) -> None:
        """End the process and wait for it."""
        self._executor.shutdown(cancel_futures=True)


def in_own_process(threads: int, function: str, *arguments: Any, **where: Any) -> Any:
    """Return what a function returns in a new process that ends with it.

    function: `MODULE:FUNCTION` of this package, or `MODULE:FUNCTION:ARGUMENT`, a last argument.
    where:    of OwnProcess.
    """
    with closing(OwnProcess(threads, **where)) as process:
        return process.start(_call, function, *arguments)()


def _call(function: str, *arguments: Any, **options: Any) -> Any:
    module, name, *more = function.split(":")
    return getattr(import_module(f"sidebyside.{module}"), name)(*arguments, *more, **options)


def _begin(threads: int, log: Path | None, without: str) -> None:
    if without:
        os.environ["PERPLEXIT_WITHOUT"] = without
    if sys.platform == "linux":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    if log is not None:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)


def _stated(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Call the function, with its error as a WorkerError: not every library's can be sent on."""
    try:
        return function(*arguments)
    except Exception as error:
        traceback.print_exc()
        raise WorkerError(f"{type(error).__name__}: {error}") from None


class OpenContender:
    """A loaded contender, in its own process, that is asked for turns."""

    def __init__(self, name: str, setting: Setting) -> None:
        contender = contender_named(name)
        self.score: Score = _call(contender.opener, setting, **contender.options)
        self.on_cuda = setting.device != "cpu"

    def prepare(self, workload: Workload) -> None:
        """Let the contender get ready for turns of the workload, where it wants that."""
        getattr(self.score, "prepare", lambda _: None)(workload)

    def turn(self, workload: Workload) -> dict[str, Any]:
        """Take a turn with its seconds; the nll of single tokens is left out."""
        with px.Timer() as timer:
            cpu = time.process_time()
            scored = self.score(workload)
        cpu_seconds = time.process_time() - cpu
        found = {"seconds": scored.seconds or timer.seconds, "cpu_seconds": cpu_seconds}
        return asdict(scored) | {"nll": None} | found

    def memory(self, workload: Workload) -> dict[str, Any]:
        """Take a turn with the peak of memory beyond what was held before it.

        It is the resident set's on the CPU, and that of torch's allocator on CUDA.
        process_bytes: the process's own peak so far, loading included.
        """
        highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
        with PeakMemory() as memory:
            scored = self.score(workload)
        total, beyond = memory.host_rss_total_peak_bytes, memory.host_rss_peak_bytes
        peak = memory.torch_cuda_peak_bytes if self.on_cuda else beyond
        found = {
            "first_seconds": memory.duration_seconds,
            "loaded_bytes": total - beyond,
            "process_bytes": max(highest, total),
            # Where a part of the turn is timed alone, the turn's memory belongs to nobody.
            "peak_bytes": None if scored.seconds else peak,
        }
        return asdict(scored) | found

    def tensor_bytes(self, workload: Workload) -> dict[str, Any]:
        """Take a turn while torch's operations are counted, which costs time and memory."""
        with px.MemoryTracker(python=False) as memory:
            self.score(workload)
        return {"tensor_bytes": memory.torch_cpu_peak_bytes}


_OPEN: list[OpenContender] = []  # the one contender of a worker's process


def load(name: str, setting: Setting) -> float:
    """Open this process's contender; return the seconds that it took."""
    with px.Timer() as timer:
        _OPEN.append(OpenContender(name, setting))
    return timer.seconds


def ask(method: str, workload: Workload) -> Any:
    """Return what the method of this process's contender returns, without what is not known."""
    found = getattr(_OPEN[0], method)(workload) or {}
    return {name: value for name, value in found.items() if value is not None}


class PeakMemory(px.MemoryTracker):
    """The peak of a stretch alone, without what was freed or reached before it.

    What was freed is given back to the system first, and the kernel's high-water mark of the
    resident set begins anew (Linux; elsewhere the resident set is sampled).
    """

    def __init__(self) -> None:
        gc.collect()
        with suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        super().__init__(python=False, torch_cpu=False)
