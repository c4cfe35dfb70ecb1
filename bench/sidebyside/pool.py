"""Worker processes, and the turns that they take."""

import json
import os
import subprocess
import sys
from collections.abc import Container, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sidebyside.contenders import Setting
from sidebyside.workloads import Workload

BENCH = Path(__file__).parent.parent


class WorkerError(Exception):
    """What a worker said went wrong."""


class Worker:
    """A contender's process, which loads as soon as it is started."""

    def __init__(self, contender: str, setting: Setting, log: Path) -> None:
        self.contender = contender
        self._log = log.open("ab")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "sidebyside.worker", _job(contender, setting)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=worker_environment(setting.threads),
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """The reply. Raises WorkerError where the worker could not give one."""
        if self._process.stdin is None or self._process.stdout is None:
            raise WorkerError("the worker has no pipes")
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            code = self._process.wait()
            raise WorkerError(f"{self.contender} ended with code {code}; see {self._log.name}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise WorkerError(f"{self.contender}: {reply['error']}")
        return reply

    @property
    def is_running(self) -> bool:
        """Whether the process is still there."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the process and wait for it."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


class Pool:
    """Workers by contender and setting; one that is there is used again."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._workers: dict[tuple[str, Setting], Worker] = {}
        logs.mkdir(parents=True, exist_ok=True)

    def worker(self, contender: str, setting: Setting) -> Worker:
        """The worker of that contender, started where it is not there (any more)."""
        key = contender, setting
        if key not in self._workers or not self._workers[key].is_running:
            name = contender.replace(" ", "-").replace("'", "")
            self._workers[key] = Worker(contender, setting, self._logs / f"{name}.log")
        return self._workers[key]

    def keep_only(self, wanted: Container[tuple[str, Setting]]) -> None:
        """End the workers of all others: memory for those that come."""
        for key in [key for key in self._workers if key not in wanted]:
            self._workers.pop(key).close()

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def prepare_turn(worker: Worker, workload: Workload) -> dict[str, Any]:
    """The worker loaded, warmed up on a short window, and ready for turns of the workload."""
    return worker.ask(do="prepare", workload=workload.to_json())


def worker_environment(threads: int) -> Mapping[str, str]:
    """The environment of a process that computes with that many threads, and downloads nothing."""
    counts = dict.fromkeys(
        ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"),
        str(threads),
    )
    path = os.pathsep.join(filter(None, (str(BENCH), os.environ.get("PYTHONPATH"))))
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true", "PYTHONPATH": path}
    return os.environ | counts | offline


def pin_to_cores(threads: int) -> None:
    """Keep the process on its first `threads` cores, where the system can."""
    if sys.platform == "linux":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def _job(contender: str, setting: Setting) -> str:
    return json.dumps({"contender": contender, "setting": asdict(setting)})
