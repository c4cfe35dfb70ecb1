"""A folder of parts: results as they come, so that a killed command continues from the last one.

A part is one safetensors file, written whole or not at all. Its name gives its place in the order
of the work and the hash of its content: `part-START-STOP-HASH.safetensors`. Scoring runs and
collections of information gain keep their results so.
"""

import hashlib
import re
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from perplexit.atomic_files import is_temporary, remove_leftovers, write_bytes
from perplexit.errors import PerplexitError
from perplexit.untrusted_files import Expected, read_bytes

LOCK_FILE = ".lock"
_LARGEST_PART = 16 << 30  # bytes
_NAME = re.compile(r"part-(\d{12})-(\d{12})-([0-9a-f]{16})\.safetensors")


class StoredPart(NamedTuple):
    """A part as its file holds it: results of the work at places `start … stop - 1`."""

    path: Path
    start: int
    stop: int
    data: bytes


class PartsFolder:
    """The parts in one folder, which need not exist yet.

    expected: what a part holds, and the error for a file that cannot be read.
    """

    def __init__(self, folder: Path, expected: Expected) -> None:
        self.folder = folder
        self._expected = expected

    def holds_only_parts(self) -> bool:
        """Return whether the folder, which is removed in the end, holds nothing else."""
        return self.folder.is_dir() and all(
            _NAME.fullmatch(path.name) or is_temporary(path.name) or path.name.startswith(".part-")
            for path in self.folder.iterdir()
        )

    def add(self, start: int, stop: int, data: bytes) -> None:
        """Commit a part: after this returns, a kill does not lose it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"part-{start:012d}-{stop:012d}-{_hash(data)}.safetensors"
        write_bytes(self.folder / name, data)

    def __iter__(self) -> Iterator[StoredPart]:
        """Yield every whole part, in order of its place.

        One that does not match its hash is left out, so that its work is done again.
        """
        for path in sorted(self.folder.glob("part-*.safetensors")):
            match = _NAME.fullmatch(path.name)
            if match is None:
                continue
            data = read_bytes(path, self._expected, largest=_LARGEST_PART)
            if _hash(data) == match[3]:
                yield StoredPart(path, int(match[1]), int(match[2]), data)

    def remove(self) -> None:
        """Remove the folder with all its parts, when the whole result is in place."""
        shutil.rmtree(self.folder, ignore_errors=True)


def lock_folder(
    folder: Path, what: str, remedy: str, error: type[PerplexitError]
) -> AbstractContextManager[object]:
    """Lock the folder for this process until the returned context manager ends.

    The folder is made if need be, and what killed processes left in it is removed. The system
    releases the lock of a process that dies. what: "run", as messages name it. Raises `error` where
    another process holds the lock or the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held: AbstractContextManager[object] = FileLock(folder / LOCK_FILE).acquire(timeout=0)
    except Timeout:
        raise error(
            f"another process is writing to the {what} {folder}; wait for it, or {remedy}"
        ) from None
    except OSError as cause:
        raise error(f"the {what} folder {folder} cannot be made: {cause}") from None
    remove_leftovers(folder)
    return held


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
