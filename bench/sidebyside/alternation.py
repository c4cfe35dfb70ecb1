"""The runner of a section: programs compiled, contenders loaded, memory first, then turns."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from perplexit.errors import PerplexitError
from sidebyside.contenders import CEILING, TABLES, Setting, Workload, contender_named
from sidebyside.sections import Section
from sidebyside.workers import OwnProcess, WorkerError, ask, in_own_process, load
from sidebyside.workloads import ids_of_speeches, random_ids, write_workload

WARM_UP_IDS = 17
Found = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """Where everything is, and how much is measured.

    models: checkpoint folders by name. first: the name of the one whose tokenizer gives the ids.
    against: the source tree of the version that is compared with this one.
    """

    folder: Path
    threads: int
    rounds: int
    quick: bool
    models: dict[str, Path]
    first: str
    against: Path | None = None

    def model(self, name: str) -> Path:
        """Return the folder of a checkpoint; one of the table's is made where it is missing."""
        if name not in self.models:
            made = "checkpoints:checkpoint", self.folder / "models" / name, TABLES["models"][name]
            self.models[name] = in_own_process(self.threads, *made)
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
        self._found: dict[str, Found] = {name: {} for name in section.contenders}

    def measure(self) -> Found:
        """Return the section's record; a contender that fails is in it with its error."""
        section, bench, before = self._section, self._bench, round(psutil.getloadavg()[0], 2)
        # GPT-2's vocabulary is the larger, so the demo model's ids are ids of both.
        ids = random_ids() if section.random_ids else ids_of_speeches(bench.model(bench.first))
        size: Found = {"strided": section.strided, "batch_size": section.batch_size}
        write = partial(write_workload, bench.subfolder("scratch"), ids)
        workload = write(section.windows, section.max_length, **size)
        warm_up = write(1, WARM_UP_IDS, strided=section.strided)
        check = write(section.check_windows, section.check) if section.check else None
        names, rounds = section.contenders, section.rounds or bench.rounds
        orders = [names, names[::-1]] if section.mirrored else [names]
        for half, order in enumerate(orders):
            with ExitStack() as stack:
                start = partial(self._start, stack)
                first_turn = partial(self._first, warm_up, check, workload)
                for doing, work in (("starting", start), ("loading", first_turn)):
                    for name in order:
                        say(f"{section.name}: {doing} {name}")
                        self._attempt(name, work)
                for number, name in turns(order, rounds // len(orders)):
                    self._attempt(name, partial(self._turn, workload, half or number))
        if all("error" in entry for entry in self._found.values()):
            raise WorkerError("no contender could be measured")
        _compare_tokens(self._found, section.contenders[0])
        return {
            "contenders": self._found,
            "flops": self._found.get(CEILING, {}).get("flops"),
            "workload": {"windows": section.windows, "max_length": section.max_length} | size,
            "base": section.base,
            "model": section.model,
            "dtype": section.dtype,
            "load_average": [before, round(psutil.getloadavg()[0], 2)],
        }

    def _start(self, stack: ExitStack, name: str) -> None:
        section, bench, contender = self._section, self._bench, contender_named(name)
        source = bench.against if contender.before else None
        if contender.before and source is None:
            raise WorkerError("expected --against, the source tree of an older version")
        where: Found = {"without": contender.without, "source": source}
        model, program = bench.model(section.model), None
        if contender.program is not None:
            options = (f"{option}-{value}" for option, value in contender.program.items())
            words = (section.model, *options, contender.without, source)
            named = "-".join(str(word).replace("/", "-") for word in words if word)
            program = str(bench.folder / "programs" / named)
            if not Path(program).exists():
                compiled = "perplexit_contenders:compiled", model, program, contender.program
                in_own_process(bench.threads, *compiled, **where)
        threads = section.threads or bench.threads
        setting = Setting(str(model), section.dtype, threads, program, section.device)
        log = bench.subfolder("logs") / (name.replace(" ", "-").replace("'", "") + ".log")
        process = self._processes[name] = OwnProcess(threads, log=log, **where)
        stack.callback(process.close)
        self._loading[name] = process.start(load, name, setting)

    def _first(
        self, warm_up: Workload, check: Workload | None, workload: Workload, name: str
    ) -> None:
        """Get the contender ready: its losses and its memory, from its first turn.

        The warm-up maps the weights and whatever else is loaded at first use.
        """
        found = self._found[name]
        found["load_seconds"] = self._loading[name]()
        if self._section.warms_up:
            self._ask("prepare", warm_up, name)
            self._ask("turn", warm_up, name)
        if check is not None:
            self._ask("prepare", check, name)
            found["check"] = self._ask("memory", check, name)
        self._ask("prepare", workload, name)
        if name != CEILING:
            found["memory"] = self._ask("memory", workload, name)
        if self._section.counts_tensors:
            found["memory"] |= self._ask("tensor_bytes", workload, name)

    def _turn(self, workload: Workload, number: int, name: str) -> None:
        answer, found = self._ask("turn", workload, name), self._found[name]
        for key in ("seconds", "cpu_seconds"):
            answer[key] = [*(found[key] if number else []), answer[key]]
        found |= answer

    def _ask(self, method: str, workload: Workload, name: str) -> Found:
        answer: Found = self._processes[name].start(ask, method, workload)()
        return answer

    def _attempt(self, name: str, work: Callable[[str], None]) -> None:
        """Do the work, or leave the contender out from here on."""
        if "error" not in self._found[name]:
            try:
                work(name)
            except (WorkerError, PerplexitError) as error:
                self._found[name] = {"error": str(error)}
                say(f"{self._section.name}: {name} is left out: {error}")


def _compare_tokens(found: dict[str, Found], reference: str) -> None:
    """Add the largest difference of a token's loss from the reference's; drop the losses."""
    for part in ("check", "memory"):
        losses = {name: entry.get(part, {}).pop("nll", ()) for name, entry in found.items()}
        for name, nll in losses.items():
            if nll and len(nll) == len(losses[reference]):
                pairs = zip(nll, losses[reference], strict=True)
                found[name][part]["largest_difference"] = max(abs(a - b) for a, b in pairs)


def turns(names: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """Yield (round, name) of every turn: A B C A B C …, so that a slow minute hits all alike."""
    return ((number, name) for number in range(rounds) for name in names)


def say(what: str) -> None:
    """Tell people what goes on."""
    print(what, file=sys.stderr, flush=True)
