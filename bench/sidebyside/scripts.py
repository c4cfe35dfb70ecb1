"""Measurements that are no alternation of loaded models: each a process that prints its record."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sidebyside.pool import WorkerError, pin_to_cores, worker_environment


@dataclass(frozen=True, slots=True)
class Job:
    """What a script is told.

    model, ids: of the first model. quick: a tenth of the work.
    """

    folder: str
    model: str
    ids: str
    threads: int
    rounds: int
    quick: bool


def run_script(module: str, job: Job) -> dict[str, Any]:
    """The record that the module printed. Raises WorkerError where it failed."""
    ended = subprocess.run(
        [sys.executable, "-m", module, json.dumps(asdict(job))],
        check=False,
        stdout=subprocess.PIPE,
        env=worker_environment(job.threads),
    )
    if ended.returncode != 0:
        raise WorkerError(f"{module} ended with code {ended.returncode}")
    record: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return record


def printed(work: Callable[[Job, Path], dict[str, Any]]) -> None:
    """Do the work of the job on the command line and print its record as the last line."""
    job = Job(**json.loads(sys.argv[1]))
    pin_to_cores(job.threads)
    scratch = Path(job.folder) / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    print(json.dumps(work(job, scratch)))
