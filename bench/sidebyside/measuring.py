"""A section measured: programs compiled, workers loaded, memory first, then turns."""

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from perplexit.errors import PerplexitError
from sidebyside.contenders import CEILING, Setting
from sidebyside.figures import turns
from sidebyside.machine import load_average
from sidebyside.pool import Pool, WorkerError, prepare_turn
from sidebyside.sections import Section
from sidebyside.workloads import Workload

Told = Callable[[str], None]


@dataclass(frozen=True)
class Bench:
    """Where everything is, and how much is measured.

    models: checkpoint folders by name. ids: of the text, by model.
    """

    folder: Path
    models: dict[str, Path]
    ids: dict[str, Path]
    threads: int
    rounds: int
    told: Told = print


@dataclass(frozen=True)
class Alternation:
    """The workers of one section."""

    bench: Bench
    section: Section
    pool: Pool

    def measure(self) -> dict[str, Any]:
        """The record of the section; a contender that fails is in it with its error."""
        found: dict[str, dict[str, Any]] = {name: {} for name in self.section.contenders}
        workload = self._workload(self.section.max_length)
        before = load_average()
        self._start(found)
        for name in self.section.contenders:
            self._try(found, name, partial(self._open, name, workload))
        flops = self._flops(found)
        for number, name in turns(self._sound(found), self.bench.rounds):
            self.bench.told(f"{self.section.name}: round {number + 1}, {name}")
            self._try(found, name, partial(self._turn, name, found[name]))
        _compare_tokens(found, self.section.reference)
        return {
            "contenders": found,
            "flops": flops,
            "workload": workload.to_json() | {"ids_file": Path(workload.ids_file).name},
            "fed_ids": sum(workload.fed_lengths()),
            "base": self.section.base,
            "model": self.section.model,
            "dtype": self.section.dtype,
            "load_average": [before, load_average()],
        }

    def _workload(self, length: int) -> Workload:
        ids, section = self.bench.ids[self.section.model], self.section
        if section.stride is not None:
            return Workload(str(ids), section.windows * length, length, section.stride)
        return Workload.of_windows(ids, section.windows, length)

    def _start(self, found: dict[str, dict[str, Any]]) -> None:
        """All workers, which load side by side; others of the section before end."""
        settings: dict[str, Setting] = {}

        def compile_for(name: str) -> dict[str, Any]:
            settings[name] = self._setting(name)
            return {}

        for name in found:
            self._try(found, name, partial(compile_for, name))
        self.pool.keep_only(settings.items())
        for name, setting in settings.items():
            self.pool.worker(name, setting)

    def _open(self, name: str, workload: Workload) -> dict[str, Any]:
        """The contender loaded; its losses and its memory, from the first turn of this length."""
        self.bench.told(f"{self.section.name}: loading {name}")
        worker = self.pool.worker(name, self._setting(name))
        found: dict[str, Any] = {}
        if self.section.check is not None:
            prepare_turn(worker, self._check())
            found["check"] = worker.ask(do="memory")
        found |= prepare_turn(worker, workload)
        if name != CEILING:
            found["memory"] = worker.ask(do="memory")
        return found

    def _check(self) -> Workload:
        length = self.section.check or 0
        ids = self.bench.ids[self.section.model]
        return Workload.of_windows(ids, self.section.check_windows, length)

    def _turn(self, name: str, found: dict[str, Any]) -> dict[str, Any]:
        reply = self.pool.worker(name, self._setting(name)).ask(do="turn")
        lists = {key: [*found.get(key, []), reply[key]] for key in ("seconds", "cpu_seconds")}
        return lists | {k: reply[k] for k in ("nll_sum", "num_tokens", "own_perplexity")}

    def _flops(self, found: dict[str, dict[str, Any]]) -> dict[str, float] | None:
        if CEILING not in self._sound(found):
            return None
        return self.pool.worker(CEILING, self._setting(CEILING)).ask(do="flops")

    def _setting(self, name: str) -> Setting:
        model = self.bench.models[self.section.model]
        scratch = self.bench.folder / "scratch"
        scratch.mkdir(parents=True, exist_ok=True)
        program = self.section.program_of(name)
        folder = None
        if program is not None:
            to, quantization = program
            label = "-".join(filter(None, (self.section.model, to, quantization)))
            folder = self.bench.folder / "programs" / label
            if not folder.exists():
                self.bench.told(f"{self.section.name}: compiling {label}")
                in_own_process("sidebyside.building:compiled", model, folder, to, quantization)
        return Setting(
            str(model),
            self.section.dtype,
            self.bench.threads,
            str(scratch),
            None if folder is None else str(folder),
        )

    def _try(
        self, found: dict[str, dict[str, Any]], name: str, work: Callable[[], dict[str, Any]]
    ) -> None:
        if "error" in found[name]:
            return
        try:
            found[name] |= work()
        except (WorkerError, PerplexitError) as error:
            found[name] = {"error": str(error)}
            self.bench.told(f"{self.section.name}: {name} is left out: {error}")

    def _sound(self, found: dict[str, dict[str, Any]]) -> Sequence[str]:
        return [name for name, entry in found.items() if "error" not in entry]


def _compare_tokens(found: dict[str, dict[str, Any]], reference: str) -> None:
    """Add the largest difference of a token's loss from the reference's; drop the losses."""
    for part in ("check", "memory"):
        losses = {name: entry.get(part, {}).pop("nll", None) for name, entry in found.items()}
        wanted = losses.get(reference)
        for name, nll in losses.items():
            if nll and wanted and len(nll) == len(wanted):
                pairs = zip(nll, wanted, strict=True)
                found[name][part]["largest_difference"] = max(abs(a - b) for a, b in pairs)


def in_own_process(home: str, *arguments: Any) -> Any:
    """What the function `module:name` gives, computed in a new process that ends with it."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        return executor.submit(_call, home, *arguments).result()


def _call(home: str, *arguments: Any) -> Any:
    module, _, name = home.partition(":")
    return getattr(import_module(module), name)(*arguments)
