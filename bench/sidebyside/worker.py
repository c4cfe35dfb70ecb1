"""One contender in a process of its own: JSON lines in on stdin, JSON lines out on stdout.

    python -m sidebyside.worker '{"contender": "plain loop", "setting": {...}}'

Requests: `{"do": "prepare", "workload": {...}}`, and `turn`, `memory` or `flops` alone.
The process is pinned to as many cores as it has threads; whatever libraries print goes to stderr.
"""

import dataclasses
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TextIO, TypeVar

from perplexit.resources.host_memory import HostMemory
from perplexit.resources.memory_advice import return_freed_memory
from sidebyside.contenders import Contender, Scored, Setting, open_contender
from sidebyside.pool import pin_to_cores
from sidebyside.workloads import Workload

WARM_UP_IDS = 17
_T = TypeVar("_T")


class Answering:
    """What a worker does with each request."""

    def __init__(self, contender: str, setting: Setting) -> None:
        began = time.perf_counter()
        self.contender: Contender = open_contender(contender, setting)
        self.load_seconds = time.perf_counter() - began
        self.workload: Workload | None = None
        self.turn: Callable[[], Scored] | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The reply to one request."""
        match request["do"]:
            case "prepare":
                return self.prepared(Workload(**request["workload"]))
            case "turn":
                return self.timed()
            case "memory":
                return self.measured()
            case "flops":
                flops: Any = getattr(self.contender, "flops")  # noqa: B009 - gemm's alone
                return dataclasses.asdict(flops(self.workload))
        raise ValueError(f"expected prepare, turn, memory or flops, got {request['do']!r}")

    def prepared(self, workload: Workload) -> dict[str, Any]:
        """Ready for turns of the workload; the first time after a turn of a few ids.

        That one maps the weights and whatever else is loaded when it is first used.
        """
        if self.turn is None:
            stride = None if workload.stride is None else WARM_UP_IDS // 2
            self.contender.prepare(Workload(workload.ids_file, WARM_UP_IDS, WARM_UP_IDS, stride))()
        self.workload, self.turn = workload, self.contender.prepare(workload)
        return {"load_seconds": self.load_seconds}

    def timed(self) -> dict[str, Any]:
        """A turn with its seconds; nll of single tokens is left out."""
        turn = self._prepared()
        cpu, began = time.process_time(), time.perf_counter()
        scored = turn()
        seconds = time.perf_counter() - began
        found = dataclasses.asdict(scored) | {"nll": None}
        return found | {
            "seconds": scored.seconds or seconds,
            "cpu_seconds": time.process_time() - cpu,
        }

    def measured(self) -> dict[str, Any]:
        """A turn with the peak of the resident set beyond what was held before it, untimed.

        What earlier turns freed is given back to the system first, and the kernel's high-water
        mark begins anew, so that the peak is this turn's own.
        """
        turn = self._prepared()
        return_freed_memory()
        reset_high_water_mark()
        with HostMemory() as memory:
            scored = turn()
        return dataclasses.asdict(scored) | {
            "loaded_bytes": memory.start_bytes,
            # Where a part of the turn is timed alone, the turn's memory is nobody's.
            "peak_bytes": None if scored.seconds else memory.peak_bytes - memory.start_bytes,
        }

    def _prepared(self) -> Callable[[], Scored]:
        if self.turn is None:
            raise ValueError("expected a workload before a turn")
        return self.turn


def reset_high_water_mark() -> None:
    """Let the kernel's peak of the resident set begin anew (Linux; elsewhere it is sampled)."""
    path = Path("/proc/self/clear_refs")
    if path.exists():
        path.write_text("5")


def attempted(work: Callable[[], _T]) -> _T | dict[str, str]:
    """What the work gives, or its error as a reply (its traceback goes to the log)."""
    try:
        return work()
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


def serve(replies: TextIO) -> None:
    """Answer until stdin ends."""
    job = json.loads(sys.argv[1])
    setting = Setting(**job["setting"])
    pin_to_cores(setting.threads)
    loaded = attempted(lambda: Answering(job["contender"], setting))
    for line in sys.stdin:
        reply = loaded
        if isinstance(loaded, Answering):
            reply = attempted(partial(loaded.answer, json.loads(line)))
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def main() -> None:
    """Keep stdout for replies; everything that libraries print goes to stderr."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(replies)


if __name__ == "__main__":
    main()
