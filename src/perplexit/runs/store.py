"""RunStore: one folder per run, filled part by part, so that a killed run can be continued.

run.json         the record; written first with status "running", last with "complete"
parts/           per-token results as they come, each file written atomically and named by its
                 content's hash; removed when the run is complete
tokens.parquet   one row per scored token, written once at the end
documents.parquet  one row per document: where it came from
.lock            held while a process writes here; the system releases it if that process dies
"""

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from safetensors.numpy import load, save

from perplexit.atomic_files import is_temporary, remove_leftovers, write_atomically, write_bytes
from perplexit.errors import RunError
from perplexit.fingerprints import sha256_of_file
from perplexit.runs.level_tables import DOCUMENTS_FILE
from perplexit.runs.parts_folder import LOCK_FILE, PartsFolder, lock_folder
from perplexit.runs.run import RUN_FILE, TOKENS_FILE, Run
from perplexit.runs.run_tokens import RunTokens
from perplexit.token_columns import TokenDetails
from perplexit.untrusted_files import Expected, parse_json, stated

PART = Expected("a committed part of a run", RunError, "remove the file: it is scored again")
_KNOWN = "known."  # before a column's name: which of its rows are known, where not all are


@dataclass(frozen=True, slots=True)
class ScoredBatch:
    """Results of the windows at places `start … stop - 1` of the batch plan's order.

    window_W:      int64, rows of the window table.
    num_targets_W: int64, how many results each window has.
    details:       the results, window after window.
    seconds:       time in the session; decode_seconds: of these, what was not prefill.
    """

    start: int
    stop: int
    window_W: NDArray[np.int64]
    num_targets_W: NDArray[np.int64]
    details: TokenDetails
    seconds: float
    decode_seconds: float = 0.0

    @classmethod
    def of(
        cls,
        places: range,
        window_W: NDArray[np.int64],
        details: Sequence[TokenDetails],
        seconds: float,
        decode_seconds: float = 0.0,
    ) -> "ScoredBatch":
        """Return the batch of the windows at `places`, of which each has its own details."""
        counts_W = np.array([len(window) for window in details], dtype=np.int64)
        joined = TokenDetails.joined(details)
        return cls(places.start, places.stop, window_W, counts_W, joined, seconds, decode_seconds)

    @classmethod
    def joined(cls, batches: Sequence["ScoredBatch"]) -> "ScoredBatch":
        """Return consecutive batches of the plan as one; `batches` holds at least one."""
        return cls(
            start=batches[0].start,
            stop=batches[-1].stop,
            window_W=np.concatenate([batch.window_W for batch in batches]),
            num_targets_W=np.concatenate([batch.num_targets_W for batch in batches]),
            details=TokenDetails.joined([batch.details for batch in batches]),
            seconds=sum(batch.seconds for batch in batches),
            decode_seconds=sum(batch.decode_seconds for batch in batches),
        )

    def to_bytes(self) -> bytes:
        """Return the batch as a safetensors document."""
        columns = dict(self.details.columns)
        columns |= {_KNOWN + n: flags for n, flags in self.details.known.items() if not flags.all()}
        tensors = {f"column.{name}": np.ascontiguousarray(a) for name, a in columns.items()}
        tensors |= {"window": self.window_W, "num_targets": self.num_targets_W}
        seconds = {"prefill": self.seconds - self.decode_seconds, "decode": self.decode_seconds}
        return bytes(save(tensors, metadata={"seconds": json.dumps(seconds)}))

    @classmethod
    def from_bytes(cls, data: bytes, start: int, stop: int) -> "ScoredBatch":
        """Return the batch that `to_bytes` wrote.

        Raises RunError where a column has another length than the windows say.
        """
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        seconds = parse_json(
            header["__metadata__"]["seconds"], PART, dict[str, float], place="a part"
        )
        window_W, num_targets_W = tensors.pop("window"), tensors.pop("num_targets")
        columns = {name.removeprefix("column."): array for name, array in tensors.items()}
        total = int(num_targets_W.sum()) if num_targets_W.dtype.kind == "i" else -1
        shaped = window_W.shape == num_targets_W.shape == (len(window_W),)
        long = all(len(column) == total for column in columns.values())
        if not (shaped and long and "nll" in columns and int(window_W.min(initial=0)) >= 0):
            PART.refuse(f"part {start}-{stop}", "columns of other lengths")
        known = {n: columns.pop(n) for n in [*columns] if n.startswith(_KNOWN)}
        details = TokenDetails(columns, {n.removeprefix(_KNOWN): a for n, a in known.items()})
        return cls(
            start,
            stop,
            window_W,
            num_targets_W,
            details,
            sum(seconds.values()),
            seconds["decode"],
        )


PARTS_FOLDER = "parts"
SECONDS_BETWEEN_PARTS = 1.0


class RunStore:
    """The writer of one run folder. Use as a context manager: it holds the folder's lock.

    Raises RunError where the folder holds something else, or another process writes to it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._parts = PartsFolder(self.folder / PARTS_FOLDER, PART)
        if self.folder.exists() and not self.folder.is_dir():
            raise RunError(f"expected a folder for the run, got the file {folder}; name another")
        if self.folder.is_dir() and not self._is_ours():
            raise RunError(
                f"expected a new folder or a run's folder, got {folder} with other files in it; "
                "name another with --run"
            )
        self._held: AbstractContextManager[object] | None = None
        self._pending: list[ScoredBatch] = []
        self._last_commit = time.perf_counter()

    def _is_ours(self) -> bool:
        """Return whether a run, or the beginning of one, is in the folder and nothing else is."""
        names = {path.name for path in self.folder.iterdir()}
        if PARTS_FOLDER in names and not self._parts.holds_only_parts():
            return False
        ours = {RUN_FILE, PARTS_FOLDER, LOCK_FILE}
        return RUN_FILE in names or all(name in ours or is_temporary(name) for name in names)

    def __enter__(self) -> "RunStore":
        remedy = "name another folder with --run"
        self._held = lock_folder(self.folder, "run", remedy, RunError)
        remove_leftovers(self._parts.folder)
        return self

    def __exit__(self, *error: Any) -> None:
        if self._held is not None:
            self._held.__exit__(*error)

    def record(self) -> Run | None:
        """Return the run as recorded so far, or None in a new folder."""
        return Run.open(self.folder) if (self.folder / RUN_FILE).exists() else None

    def write_record(self, run: Run) -> None:
        """Put `run.json` in place, whole."""
        text = json.dumps(run.to_json(), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
        write_bytes(self.folder / RUN_FILE, text.encode())

    def add(self, batch: ScoredBatch) -> None:
        """Take a scored batch; consecutive ones are committed together, about once a second."""
        if self._pending and self._pending[-1].stop != batch.start:
            self.commit()
        self._pending.append(batch)
        if time.perf_counter() - self._last_commit >= SECONDS_BETWEEN_PARTS:
            self.commit()

    def commit(self) -> None:
        """Write the batches that were added: after this returns, a kill does not lose them."""
        if self._pending:
            part = ScoredBatch.joined(self._pending)
            self._parts.add(part.start, part.stop, part.to_bytes())
        self._pending = []
        self._last_commit = time.perf_counter()

    def parts(self) -> Iterator[ScoredBatch]:
        """Yield every whole part, in plan order.

        One that does not match its hash is left out, and its windows are scored again.
        """
        for stored in self._parts:
            with stated(stored.path, PART):
                part = ScoredBatch.from_bytes(stored.data, stored.start, stored.stop)
            yield part

    def write_tokens(self, tokens: RunTokens) -> str:
        """Put `tokens.parquet` in place and give its SHA-256."""
        path = self.folder / TOKENS_FILE
        write_atomically(path, tokens.write)
        return sha256_of_file(path)

    def write_documents(self, table: pa.Table) -> None:
        """Put `documents.parquet` in place: where each document of the input came from."""
        path = self.folder / DOCUMENTS_FILE
        write_atomically(path, lambda temporary: pq.write_table(table, temporary))

    def remove_parts(self) -> None:
        """Drop the parts of a run that is complete."""
        self._parts.remove()


@dataclass(frozen=True, slots=True)
class UnreadableRun:
    """A folder that has a run's record, of which the record cannot be read; `reason` says why."""

    folder: Path
    reason: str


def list_runs(folders: str | Path | Iterable[str | Path] = "runs") -> Iterator[Run]:
    """Return the runs in a folder (itself one, or its sub-folders at any depth), oldest first.

    Raises RunError where the folder does not exist. A folder whose record cannot be read is left
    out; `find_runs` gives those too.
    """
    yield from (each for each in find_runs(folders) if isinstance(each, Run))


def find_runs(
    folders: str | Path | Iterable[str | Path] = "runs",
) -> list[Run | UnreadableRun]:
    """Return the runs in a folder, oldest first, then those whose record cannot be read, by name.

    Raises RunError where the folder does not exist.
    """
    if isinstance(folders, str | Path):
        folders = [folders]
    runs: list[Run] = []
    unreadable: list[UnreadableRun] = []
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise RunError(f"expected a folder with runs in it, got {folder}, which is not there")
        for path in folder.rglob(RUN_FILE):
            try:
                runs.append(Run.open(path.parent))
            except RunError as error:
                unreadable.append(UnreadableRun(path.parent, str(error)))
    runs.sort(key=lambda run: (run.created, str(run.folder)))
    return [*runs, *sorted(unreadable, key=lambda each: str(each.folder))]
