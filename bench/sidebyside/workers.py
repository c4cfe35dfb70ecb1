"""Contenders in processes of their own, which are asked one thing at a time."""

import os
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from perplexit.resources.loaded_torch import synchronize
from perplexit.resources.memory_advice import return_freed_memory
from perplexit.resources.memory_tracker import MemoryTracker
from sidebyside.contenders import Scored, Setting, Turn, open_contender
from sidebyside.workloads import Workload

THREAD_COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}


class WorkerError(Exception):
    """What went wrong in a worker's process."""


class OwnProcess:
    """A process with so many threads and cores, in which functions are called.

    log: the file to which everything goes that the process prints; None: where the parent's goes.
    """

    def __init__(self, threads: int, log: Path | None = None) -> None:
        os.environ.update(dict.fromkeys(THREAD_COUNTS, str(threads)) | OFFLINE)
        self._log = log
        self._executor = ProcessPoolExecutor(
            1, get_context("spawn"), initializer=_begin, initargs=(threads, log)
        )

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


class OpenContender:
    """A loaded contender, in its own process, that is asked for turns.

    warm_up: a short workload. Its turn maps the weights and whatever else is loaded when it is
        first used.
    """

    def __init__(self, name: str, setting: Setting, warm_up: Workload) -> None:
        began = time.perf_counter()
        self._prepare = open_contender(name, setting)
        self.load_seconds = time.perf_counter() - began
        self._on_cuda = setting.device != "cpu"
        self._prepare(warm_up)()
        self._turn: Turn | None = None

    def prepare(self, workload: Workload) -> None:
        """Get ready for turns of the workload."""
        self._turn = self._prepare(workload)

    def turn(self) -> dict[str, Any]:
        """Take a turn with its seconds; the nll of single tokens is left out."""
        synchronize()
        cpu, began = time.process_time(), time.perf_counter()
        scored = self._scored()
        synchronize()
        seconds = time.perf_counter() - began
        found = {"seconds": scored.seconds or seconds, "cpu_seconds": time.process_time() - cpu}
        return asdict(scored) | {"nll": None} | found

    def memory(self) -> dict[str, Any]:
        """Take a turn with the peak of memory beyond what was held before it, untimed.

        It is the resident set's on the CPU, and that of torch's allocator on CUDA.
        """
        with PeakMemory() as memory:
            scored = self._scored()
        beyond = memory.torch_cuda_peak_bytes if self._on_cuda else memory.host_rss_peak_bytes
        return asdict(scored) | {
            "loaded_bytes": memory.host_rss_total_peak_bytes - memory.host_rss_peak_bytes,
            # Where a part of the turn is timed alone, the turn's memory belongs to nobody.
            "peak_bytes": None if scored.seconds else beyond,
        }

    def _scored(self) -> Scored:
        if self._turn is None:
            raise ValueError("expected a workload before a turn")
        return self._turn()


class PeakMemory(MemoryTracker):
    """The peak of a stretch alone, without what was freed or reached before it.

    What was freed is given back to the system first, and the kernel's high-water mark of the
    resident set begins anew (Linux; elsewhere the resident set is sampled).
    """

    def __init__(self) -> None:
        return_freed_memory()
        mark = Path("/proc/self/clear_refs")
        if mark.exists():
            mark.write_text("5")
        super().__init__(python=False, torch_cpu=False)


_OPEN: list[OpenContender] = []  # the one contender of a worker's process


def load(name: str, setting: Setting, warm_up: Workload) -> float:
    """Open this process's contender; return the seconds that it took."""
    _OPEN.append(OpenContender(name, setting, warm_up))
    return _OPEN[0].load_seconds


def ask(method: str, *arguments: Any) -> Any:
    """Return what the method of this process's contender returns."""
    return getattr(_OPEN[0], method)(*arguments)


def in_own_process(threads: int, function: str, *arguments: Any) -> Any:
    """Return what `module:function` returns in a new process that ends with it."""
    process = OwnProcess(threads)
    try:
        return process.start(_call, function, *arguments)()
    finally:
        process.close()


def _call(function: str, *arguments: Any) -> Any:
    module, _, name = function.partition(":")
    return getattr(import_module(module), name)(*arguments)


def _begin(threads: int, log: Path | None) -> None:
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
