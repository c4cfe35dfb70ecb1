"""Files that somebody else may have written: what they should hold, and errors that say so.

Every reader opens its file here. Named pipes and devices are refused before they are read (they
would block, or never end). Every failure of a library that parses the content becomes one of
Perplexit's own errors: this is the one place with a broad `except`.
"""

import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import msgspec

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


T = TypeVar("T")
# The name of a file that lies beside the record: no path leads out of the folder.
FileName = Annotated[
    str, msgspec.Meta(min_length=1, max_length=255, pattern=r"^(?!\.\.?$)[^/\x00]+$")
]

# A byte of JSON becomes at most about 24 bytes of Python objects (`{},{},…`).
LARGEST_RECORD = 8 << 20
LARGEST_TABLE = 512 << 20  # tokenizer.json and the index of a checkpoint's files
_DEPTH = 64
_DIGITS = 40  # tokenizers write 10**30 for "no limit"
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_AT = re.compile(r" - at `(.*)`$", re.DOTALL)


def read_json(
    path: str | Path,
    expected: Expected,
    schema: type[T],
    *,
    largest: int = LARGEST_RECORD,
    non_finite: bool = False,
    halves: bool = False,
) -> T:
    """Read the document in a regular file, as `schema`.

    largest:    bytes that the file may have.
    non_finite: whether NaN and Infinity (which JSON does not have) are allowed.
    halves:     whether half of a surrogate pair, which is no text, is allowed.
    Raises `expected.error`, whatever is wrong.
    """
    data = read_bytes(path, expected, largest=largest)
    return parse_json(data, expected, schema, place=path, non_finite=non_finite, halves=halves)


def parse_json(
    text: str | bytes,
    expected: Expected,
    schema: type[T],
    *,
    place: str | Path,
    non_finite: bool = False,
    halves: bool = False,
) -> T:
    """Parse the document in `text`, as `schema`; `place` names it in errors, as in `read_json`."""
    with stated(place, expected):
        content = text.decode("utf-8") if isinstance(text, bytes) else text
        hooks = _Hooks(partial(expected.refuse, place), non_finite)
        try:
            value = json.loads(
                content,
                object_pairs_hook=hooks.unique,
                parse_int=hooks.integer,
                parse_float=hooks.number,
                parse_constant=hooks.constant,
            )
        except json.JSONDecodeError as error:
            where = f"line {error.lineno}, column {error.colno}"
            expected.refuse(
                place, f"text that cannot be read as JSON ({error.msg}: {where})", error
            )
        suspicious = not halves and _SURROGATE.search(content) is not None
        _check_tree(value, place, expected, suspicious=suspicious)
    return typed(value, expected, schema, place=place)


def typed(value: object, expected: Expected, schema: type[T], *, place: str | Path) -> T:
    """Return a parsed document as `schema`, without conversions: a string is no number.

    Raises `expected.error` with the key's path, the type expected there and the one found.
    """
    try:
        return msgspec.convert(value, schema)
    except msgspec.ValidationError as error:
        expected.refuse(place, _mismatch(str(error)), error)


@dataclass(frozen=True)
class _Hooks:
    """What the parser calls for each object and number."""

    refuse: Callable[[str], NoReturn]
    non_finite: bool

    def unique(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            self.refuse(f"the key {_short(twice)} twice in one object")
        return found

    def integer(self, digits: str) -> int:
        if len(digits) > _DIGITS:
            self.refuse(f"an integer of {len(digits):,} digits (at most {_DIGITS})")
        return int(digits)

    def number(self, digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            self.refuse(f"the number {_short(digits)}, which is too large")
        return value

    def constant(self, name: str) -> float:
        if not self.non_finite:
            self.refuse(f"{name}, which JSON does not have")
        return float(name.replace("Infinity", "inf"))


def _check_tree(value: Any, place: str | Path, expected: Expected, *, suspicious: bool) -> None:
    """Refuse a document that is nested too deep; where there may be any, halves of surrogates."""
    level, depth = [value], 0
    while level:
        if depth > _DEPTH:
            expected.refuse(place, f"values nested deeper than {_DEPTH} levels")
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                if suspicious:
                    _check_text("".join(item), place, expected)
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
            elif suspicious and isinstance(item, str):
                _check_text(item, place, expected)
        level, depth = below, depth + 1


def _check_text(text: str, place: str | Path, expected: Expected) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X}"
        expected.refuse(place, f"half of a surrogate pair ({half}), which is no text", error)


def _mismatch(message: str) -> str:
    """Return the message of a failed conversion, as it follows "got"."""
    at = _AT.search(message)
    path = at[1] if at else "$"
    return f"a document that differs at `{path}`: {_AT.sub('', message)}"


def _short(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "…"
