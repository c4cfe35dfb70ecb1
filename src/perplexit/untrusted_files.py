"""Files that somebody else may have written: what they should hold, and errors that say so.

Every reader opens its file here. Named pipes and devices are refused before they are read (they
would block, or never end). Every failure of a library that parses the content becomes one of
Perplexit's own errors: this is the one place with a broad `except`.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import NoReturn

from perplexit.errors import PerplexitError

_LONGEST_REASON = 300  # characters: of a library's own message, or of a value that was found


@dataclass(frozen=True, slots=True)
class Expected:
    """What a file should hold; the error where it does not; what the person can do then.

    content: "a run's record", as it follows "expected"; remedy: "evaluate again".
    """

    content: str
    error: type[PerplexitError]
    remedy: str

    def refuse(self, place: str | Path, got: str, cause: BaseException | None = None) -> NoReturn:
        """Raise the error: expected, got, what to do. Of what was got, at most 300 characters."""
        got = got if len(got) <= _LONGEST_REASON else got[:_LONGEST_REASON] + "…"
        raise self.error(f"expected {self.content} in {place}, got {got}; {self.remedy}") from cause


@contextmanager
def stated(place: str | Path, expected: Expected) -> Iterator[None]:
    """Turn every failure of the body into `expected.error`, Perplexit's own errors aside.

    A panic of a Rust library counts as a failure too: it is no `Exception` in Python.
    """
    try:
        yield
    except PerplexitError:
        raise
    except BaseException as cause:
        if not isinstance(cause, Exception) and type(cause).__name__ != "PanicException":
            raise
        expected.refuse(place, _in_words(cause), cause)


def open_regular(path: str | Path, expected: Expected) -> BufferedReader:
    """Open the regular file at `path` for reading.

    Raises `expected.error` where there is none, it may not be read, or it is a folder, a named
    pipe, a socket or a device.
    """
    with stated(path, expected):
        # Without O_NONBLOCK, opening a named pipe would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        kind = _kind(os.fstat(descriptor).st_mode)
        if kind is not None:
            os.close(descriptor)
            expected.refuse(path, kind)
        return os.fdopen(descriptor, "rb")


def check_regular(path: str | Path, expected: Expected) -> int:
    """Return the size in bytes of the regular file at `path`, which a library is about to open.

    Raises as `open_regular` does.
    """
    with open_regular(path, expected) as file:
        return os.fstat(file.fileno()).st_size


def read_bytes(path: str | Path, expected: Expected, *, largest: int) -> bytes:
    """Read a regular file of at most `largest` bytes.

    Raises as `open_regular` does, and for a larger file before any of it is read.
    """
    with open_regular(path, expected) as file, stated(path, expected):
        size = os.fstat(file.fileno()).st_size
        if size > largest:
            expected.refuse(path, f"{size:,} bytes, more than the {largest:,} that it may have")
        data = file.read(size + 1)
        if len(data) != size:
            expected.refuse(path, "a file that changed while it was read")
        return data


def _kind(mode: int) -> str | None:
    """Return in words what kind of file it is; None for a regular one."""
    if stat.S_ISREG(mode):
        return None
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def _in_words(cause: BaseException) -> str:
    """Say what went wrong, on one line, without the path that the message has anyway."""
    if isinstance(cause, FileNotFoundError):
        return "no such file"
    if isinstance(cause, RecursionError):
        return "values nested too deep"
    if isinstance(cause, MemoryError):
        return "content that does not fit into memory"
    if isinstance(cause, OSError) and cause.strerror:
        return f"an error of the system ({cause.strerror})"
    reason = " ".join(str(cause).split())
    name = type(cause).__name__
    return f"content that cannot be understood ({name}: {reason})" if reason else name
