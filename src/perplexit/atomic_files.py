"""Files and folders that are whole or absent after a crash, and the cache folder.

Whatever is being written has a hidden name that says which process owns it:
`.NAME.HOST-PID-STARTED.RANDOM.perplexit-tmp`. What a killed process leaves is removed by the next
process that writes to the same folder (`remove_leftovers`).
"""

import contextlib
import functools
import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs
import psutil

from perplexit.errors import PerplexitError

TEMPORARY, RETIRED = ".perplexit-tmp", ".perplexit-old"
_LEFTOVER = re.compile(
    r"\.(?P<name>.+)\.(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-(?P<started>\d+)\.[^.]+"
    rf"(?P<kind>{re.escape(TEMPORARY)}|{re.escape(RETIRED)})"
)
_CLOCK_SECONDS = 60  # two readings of one process's start may differ by a correction of the clock
_LONGEST_NAME = 150  # of the 255 bytes that file systems allow; the rest says whose it is
_swept: set[tuple[int, Path]] = set()


def cache_folder() -> Path:
    """Return $PERPLEXIT_CACHE, or the user's cache folder. It is safe to delete at any time."""
    chosen = os.environ.get("PERPLEXIT_CACHE")
    return Path(chosen) if chosen else Path(platformdirs.user_cache_dir("perplexit"))


def kept_folder(folder: Path, proof: str, fill: Callable[[Path], None]) -> Path:
    """Return `folder`, made by `fill` once and then kept; it appears whole or not at all.

    proof: a file that every whole one has. Of two processes that make it at once, the first wins:
    the content is the same.
    """
    if (folder / proof).is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(folder) as staging:
        fill(staging)
        if folder.exists() and not (folder / proof).is_file():
            shutil.rmtree(folder, ignore_errors=True)  # left incomplete by something else
        try:
            staging.rename(folder)
        except OSError:
            if not (folder / proof).is_file():  # else another process was faster
                raise
    return folder


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder`, and put it in its place where the block ends well.

    After a kill `folder` is what it was, or what it should become; a kill between the two renames
    leaves the old one under a hidden name, from which the next call brings it back.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(folder) as staging:
        yield staging
        retired = staging.with_suffix(RETIRED)
        if folder.exists():
            folder.rename(retired)
        staging.rename(folder)
        shutil.rmtree(retired, ignore_errors=True)


@contextmanager
def temporary_folder(target: Path) -> Iterator[Path]:
    """Yield a new folder beside `target`, removed at the end whatever happens.

    It has the permissions that any new folder of this process would have.
    """
    staging = new_temporary_folder(target)
    try:
        staging.chmod(0o777 & ~_umask())  # mkdtemp makes it private; a result is no secret
        yield staging
    except PerplexitError as error:
        error.args = tuple(str(part).replace(str(staging), str(target)) for part in error.args)
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def new_temporary_folder(target: Path) -> Path:
    """Return a new private folder beside `target`, which the caller removes.

    Where this process is killed first, the next one that writes to the same place removes it.
    """
    remove_leftovers(target.parent)
    return Path(tempfile.mkdtemp(prefix=_prefix(target), suffix=TEMPORARY, dir=target.parent))


class TemporaryFolder(tempfile.TemporaryDirectory[str]):
    """A private folder of the system's temporary folder that goes when this object goes."""

    def __init__(self, name: str) -> None:
        target = Path(tempfile.gettempdir()) / f"perplexit-{name}"
        remove_leftovers(target.parent)
        super().__init__(prefix=_prefix(target), suffix=TEMPORARY, dir=target.parent)


def write_atomically(
    path: Path, write: Callable[[Path], object], *, check: Callable[[Path], None] | None = None
) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place in one step.

    The content is on the disk before its name is: after a kill or a power cut, `path` is whole
    or absent (or what it was before). `check` is given the whole temporary file, and raises where
    it may not be put in place.
    """
    remove_leftovers(path.parent)
    descriptor, name = tempfile.mkstemp(prefix=_prefix(path), suffix=TEMPORARY, dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes it private; a result is no secret
        if check is not None:
            check(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Put `data` in place as the content of `path` in one step; see `write_atomically`."""
    write_atomically(path, lambda temporary: temporary.write_bytes(data))


def write_json(path: Path, value: object) -> None:
    """Put `value` in place as indented JSON in one step. Raises ValueError for NaN and infinity."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # Half of a surrogate pair, as in a name that is no UTF-8, becomes its escape in JSON.
    write_bytes(path, text.encode(errors="backslashreplace"))


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes of this machine left in `folder`; bring back what they retired.

    Looks at each folder once per process. What belongs to a process that still runs, or to one on
    another machine, stays.
    """
    place = (os.getpid(), folder.absolute())
    if place in _swept or not folder.is_dir():
        return
    _swept.add(place)
    for path in list(folder.iterdir()):
        match = _LEFTOVER.fullmatch(path.name)
        if match is None or _still_owned(match):
            continue
        target = folder / match["name"]
        with contextlib.suppress(OSError):  # another process may be removing it too
            if match["kind"] == RETIRED and not target.exists():
                path.rename(target)
            elif path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def is_temporary(name: str) -> bool:
    """Return whether a file of this name is one that is being written, or was when a kill came."""
    return _LEFTOVER.fullmatch(name) is not None


def _prefix(target: Path) -> str:
    """Return how the hidden name begins under which this process writes `target`."""
    return f".{target.name[:_LONGEST_NAME]}.{_owner(os.getpid())}."


@functools.cache
def _owner(pid: int) -> str:
    return f"{_host()}-{pid}-{int(psutil.Process(pid).create_time())}"


@functools.cache
def _host() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _still_owned(match: re.Match[str]) -> bool:
    if match["host"] != _host():
        return True
    try:
        process = psutil.Process(int(match["pid"]))
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return bool(abs(process.create_time() - int(match["started"])) <= _CLOCK_SECONDS)
    except psutil.NoSuchProcess:
        return False
    except (psutil.Error, OverflowError):
        return True


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
