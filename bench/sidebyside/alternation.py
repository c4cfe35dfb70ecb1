"""The runner of a section: programs compiled, contenders loaded, memory first, then turns."""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from perplexit.errors import PerplexitError
from sidebyside.contenders import CEILING, CONTENDERS, Setting
from sidebyside.paired_ratios import turns
from sidebyside.sections import MODELS, Section
from sidebyside.workers import OwnProcess, WorkerError, ask, in_own_process, load
from sidebyside.workloads import Workload, ids_of_speeches, random_ids, write_workload

WARM_UP_IDS = 17


@dataclass(frozen=True)
class Bench:
    """Where everything is, and how much is measured.

    models: checkpoint folders by name, the user's own and those that were made. first: the name of
        the one whose tokenizer gives the ids.
    """

    folder: Path
    threads: int
    rounds: int
    quick: bool
    models: dict[str, Path]
    first: str

    def model(self, name: str) -> Path:
        """Return the folder of a checkpoint; one of MODELS is made where it is missing."""
        if name not in self.models:
            function, *arguments = MODELS[name]
            path = self.folder / "models" / name
            self.models[name] = in_own_process(self.threads, function, path, *arguments)
        return self.models[name]

    def subfolder(self, name: str) -> Path:
        """Return a folder below the output, made where it is missing."""
        path = self.folder / name
        path.mkdir(parents=True, exist_ok=True)
        return path


class Alternation:
    """The contenders of one section, loaded side by side, who take turns."""

    def __init__(self, bench: Bench, section: Section) -> None:
        self._bench, self._section = bench, section
        self._processes: dict[str, OwnProcess] = {}
        self._loading: dict[str, Callable[[], float]] = {}
        self._found: dict[str, dict[str, Any]] = {name: {} for name in section.contenders}

    def measure(self) -> dict[str, Any]:
        """Return the section's record; a contender that fails is in it with its error."""
        section, before = self._section, round(psutil.getloadavg()[0], 2)
        # GPT-2's vocabulary is the larger, so the demo model's ids are ids of both.
        first = None if section.random_ids else self._bench.model(self._bench.first)
        ids = random_ids() if first is None else ids_of_speeches(first)
        size: dict[str, Any] = {"strided": section.strided, "batch_size": section.batch_size}
        write = partial(write_workload, self._bench.subfolder("scratch"), ids)
        workload = write(section.windows, section.max_length, **size)
        warm_up = write(1, WARM_UP_IDS, strided=section.strided)
        check = write(section.check_windows, section.check) if section.check else None
        with ExitStack() as stack:
            self._for_each("starting", partial(self._start, stack, warm_up))
            self._for_each("loading", partial(self._first, check, workload))
            for _, name in turns(self._sound(), section.rounds or self._bench.rounds):
                self._attempt(name, self._turn)
        _compare_tokens(self._found, section.reference)
        return {
            "contenders": self._found,
            "flops": self._found.get(CEILING, {}).get("flops"),
            "workload": {"windows": section.windows, "max_length": section.max_length} | size,
            "fed_ids": sum(len(window.ids_T) - 1 for window in workload.windows()),
            "base": section.base,
            "model": section.model,
            "dtype": section.dtype,
            "load_average": [before, round(psutil.getloadavg()[0], 2)],
        }

    def _start(self, stack: ExitStack, warm_up: Workload, name: str) -> dict[str, Any]:
        section, bench = self._section, self._bench
        model, program = bench.model(section.model), CONTENDERS[name].program
        folder = None
        if program is not None:
            folder = bench.folder / "programs" / "-".join(filter(None, (section.model, *program)))
            if not folder.exists():
                arguments = "sidebyside.checkpoints:compiled", model, folder, *program
                in_own_process(bench.threads, *arguments)
        threads = section.threads or bench.threads
        path = None if folder is None else str(folder)
        setting = Setting(str(model), section.dtype, threads, path, section.device)
        log = bench.subfolder("logs") / (name.replace(" ", "-").replace("'", "") + ".log")
        self._processes[name] = OwnProcess(threads, log)
        stack.callback(self._processes[name].close)
        self._loading[name] = self._processes[name].start(load, name, setting, warm_up)
        return {}

    def _first(self, check: Workload | None, workload: Workload, name: str) -> dict[str, Any]:
        """Get the contender ready: its losses and its memory, from its first turn."""
        found: dict[str, Any] = {"load_seconds": self._loading[name]()}
        if check is not None:
            self._ask(name, "prepare", check)
            found["check"] = self._ask(name, "memory")
        self._ask(name, "prepare", workload)
        if name != CEILING:
            found["memory"] = self._ask(name, "memory")
        return found

    def _turn(self, name: str) -> dict[str, Any]:
        answer, found = self._ask(name, "turn"), self._found[name]
        del answer["nll"]
        for key in ("seconds", "cpu_seconds"):
            answer[key] = [*found.get(key, []), answer[key]]
        return answer

    def _ask(self, name: str, method: str, *arguments: Any) -> dict[str, Any]:
        answer: dict[str, Any] = self._processes[name].start(ask, method, *arguments)()
        return answer

    def _for_each(self, doing: str, work: Callable[[str], dict[str, Any]]) -> None:
        for name in self._section.contenders:
            say(f"{self._section.name}: {doing} {name}")
            self._attempt(name, work)

    def _attempt(self, name: str, work: Callable[[str], dict[str, Any]]) -> None:
        """Add what the work gives to what was found, or leave the contender out from here on."""
        if "error" in self._found[name]:
            return
        try:
            self._found[name] |= work(name)
        except (WorkerError, PerplexitError) as error:
            self._found[name] = {"error": str(error)}
            say(f"{self._section.name}: {name} is left out: {error}")

    def _sound(self) -> list[str]:
        return [name for name, entry in self._found.items() if "error" not in entry]


def _compare_tokens(found: dict[str, dict[str, Any]], reference: str) -> None:
    """Add the largest difference of a token's loss from the reference's; drop the losses."""
    for part in ("check", "memory"):
        losses = {name: entry.get(part, {}).pop("nll", None) for name, entry in found.items()}
        wanted = losses.get(reference)
        for name, nll in losses.items():
            if nll and wanted and len(nll) == len(wanted):
                pairs = zip(nll, wanted, strict=True)
                found[name][part]["largest_difference"] = max(abs(a - b) for a, b in pairs)


def say(what: str) -> None:
    """Tell people what goes on."""
    print(what, file=sys.stderr, flush=True)
