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
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from perplexit.atomic_files import (
    is_temporary,
    remove_leftovers,
    write_atomically,
    write_bytes,
)
from perplexit.errors import RunError
from perplexit.fingerprints import sha256_of_file
from perplexit.runs.document_sources import DOCUMENTS_FILE
from perplexit.runs.parts_folder import LOCK_FILE, PartsFolder, lock_folder
from perplexit.runs.run import RUN_FILE, TOKENS_FILE, Run
from perplexit.runs.run_tokens import RunTokens
from perplexit.runs.scored_batch import PART, ScoredBatch
from perplexit.untrusted_files import stated

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
        """Whether a run, or the beginning of one, is in the folder and nothing else is."""
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
        """The run as recorded so far, or None in a new folder."""
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
    """The runs in a folder (itself one, or its sub-folders at any depth), oldest first.

    Raises RunError where the folder does not exist. A folder whose record cannot be read is left
    out; `find_runs` gives those too.
    """
    yield from (each for each in find_runs(folders) if isinstance(each, Run))


def find_runs(
    folders: str | Path | Iterable[str | Path] = "runs",
) -> list[Run | UnreadableRun]:
    """The runs in a folder, oldest first, then those whose record cannot be read, by name.

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
