"""What may be written where: nothing of the user's is overwritten.

Every command and function that writes asks here, before any work is done. An output that exists is
replaced only where Perplexit made it, which its content says, and where its new content is the same
or `force` was given. What the same call reads is never replaced, whatever its name: links, hard
links and names in another case are followed to the file that they mean.
"""

import filecmp
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from perplexit.atomic_files import replaced_folder, write_atomically
from perplexit.errors import OutputError

_MARK_BYTES = 1 << 16  # how far into a file its mark is looked for
_LARGEST_HEADER = 100_000_000  # of a safetensors file, in bytes


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of output: what messages call it, and whether Perplexit made what is at a path."""

    noun: str  # with its article
    is_made: Callable[[Path], bool]


@dataclass(frozen=True)
class _Output(ABC):
    """What is to be written. Making one raises OutputError where it must not be.

    inputs: files and folders that the same call reads.
    force:  whether a thing of this kind with other content may be replaced.
    """

    path: Path
    kind: Kind
    inputs: tuple[Path, ...] = ()
    force: bool = False
    sort: ClassVar[str]  # "file" or "folder", as messages call it

    def __post_init__(self) -> None:
        self.check()

    @property
    def place(self) -> Path:
        """Return where the content goes: `path` with links followed, so that a link stays one."""
        return Path(os.path.realpath(self.path))

    @property
    @abstractmethod
    def exists(self) -> bool:
        """Return whether something with content is there now."""

    def check(self) -> None:
        """Raise OutputError where `path` may not be written, whatever its content will be."""
        check_place(self.path, self.kind, self.inputs)
        found = "folder" if self.path.is_dir() else "file" if self.path.is_file() else None
        if self.path.exists() and found != self.sort:
            raise self._refused(f"a {found}" if found else "which is no ordinary file")
        if self.exists and not self.kind.is_made(self.path):
            raise self._refused(
                "which holds something else, and nothing of yours is overwritten (not with --force "
                "either)"
            )

    def refused_as_other(self) -> OutputError:
        """Return the error for an existing output of this kind with other content."""
        return self._refused(
            f"which holds {self.kind.noun} already, another one",
            ", or replace it with --force (in Python: force=True)",
        )

    def _refused(self, what: str, or_else: str = "") -> OutputError:
        return OutputError(
            f"expected a new place for {self.kind.noun}, got {self.path}, {what}; name another "
            f"{self.sort}{or_else}"
        )


@dataclass(frozen=True)
class OutputFile(_Output):
    """A file that is to be written."""

    sort = "file"

    @property
    def exists(self) -> bool:
        """Return whether a file with content is there now."""
        return self.path.is_file() and self.path.stat().st_size > 0

    def check_replaceable(self, candidate: Path) -> None:
        """Raise OutputError where the whole file `candidate` may not be put in place."""
        self.check()
        if self.exists and not self.force and not filecmp.cmp(candidate, self.path, shallow=False):
            raise self.refused_as_other()

    def write(self, write: Callable[[Path], object]) -> Path:
        """Let `write` fill a temporary file, and put that in place in one step."""
        self.place.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.place, write, check=self.check_replaceable)
        return self.path

    def write_text(self, text: str) -> Path:
        """Write `text` as UTF-8, in one step."""
        return self.write(lambda temporary: temporary.write_bytes(text.encode()))


@dataclass(frozen=True)
class OutputFolder(_Output):
    """A folder that is to be written as one thing.

    `kind.is_made` must also say no to a folder in which somebody put another file.
    """

    sort = "folder"

    @property
    def exists(self) -> bool:
        """Return whether there is a folder with something in it."""
        return self.path.is_dir() and any(self.path.iterdir())

    def check_replaceable(self, is_same: bool) -> None:
        """Raise OutputError where another thing of this kind is there; `is_same`: it is no other.

        What was made from the same things with the same settings is simply made again.
        """
        self.check()
        if self.exists and not (self.force or is_same):
            raise self.refused_as_other()

    @contextmanager
    def staged(self) -> Iterator[Path]:
        """Yield a temporary folder, put in the output's place when the block ends well."""
        with replaced_folder(self.place) as temporary:
            yield temporary
            self.check()


def is_same_file(first: Path, second: Path) -> bool:
    """Return whether two paths mean one file or folder, links and case aside."""
    try:
        return os.path.samefile(first, second)
    except (OSError, ValueError):
        return False


def is_within(path: Path, folder: Path) -> bool:
    """Return whether `path`, which need not exist, lies in the folder, links followed."""
    parents = Path(os.path.realpath(path)).parents
    return folder.is_dir() and any(is_same_file(parent, folder) for parent in parents)


def begins_with_mark(path: Path, mark: bytes) -> bool:
    """Return whether `mark` stands near the beginning of a file."""
    with path.open("rb") as file:
        return mark in file.read(_MARK_BYTES)


def header_has_mark(path: Path, mark: bytes) -> bool:
    """Return whether `mark` stands in the header of a safetensors file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = os.fstat(file.fileno()).st_size
        return length <= min(size - 8, _LARGEST_HEADER) and mark in file.read(length)


def paths_among(*values: object) -> tuple[Path, ...]:
    """Return those of `values`, and of the lists among them, that name something on disk."""
    found: list[Path] = []
    for value in values:
        if isinstance(value, list | tuple):
            found += paths_among(*value)
        elif isinstance(value, str | os.PathLike):
            path = Path(value).expanduser()
            # os.path: no error for a text that is too long for a name
            found += [path] if os.path.exists(path) else []
    return tuple(found)


def check_place(path: Path, kind: Kind, inputs: Iterable[Path]) -> None:
    """Raise OutputError for what is no place at all, for one of `inputs`, or a folder with one."""
    if str(path) == "-":
        raise OutputError(
            f"expected the name of a file or folder for {kind.noun}, got '-': it is not written to "
            "standard output; name one"
        )
    if path.is_symlink() and not path.exists():
        raise OutputError(
            f"expected a place for {kind.noun}, got {path}, a link to {os.readlink(path)}, which "
            "does not exist; name the place itself"
        )
    for read in inputs if path.exists() else ():
        if is_same_file(path, read) or is_within(read, path):
            raise OutputError(
                f"expected a new place for {kind.noun}, got {path}, which is what this command "
                "reads, and that is never overwritten; name another"
            )
