"""Files and folders that are whole or absent after a crash, their hashes, and the cache."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import platformdirs


def cache_folder() -> Path:
    """$PERPLEXIT_CACHE, or the user's cache folder of perplexit. Safe to delete at any time."""
    chosen = os.environ.get("PERPLEXIT_CACHE")
    return Path(chosen) if chosen else Path(platformdirs.user_cache_dir("perplexit"))


def kept_folder(folder: Path, proof: str, fill: Callable[[Path], None]) -> Path:
    """`folder`, made by `fill` once and then kept; it appears whole or not at all.

    proof: a file that every whole one has. Of two processes that make it at once, the first wins:
    the content is the same.
    """
    if (folder / proof).is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".new-", dir=folder.parent))
    try:
        fill(staging)
        staging.chmod(0o755)  # mkdtemp makes it private
        if folder.exists() and not (folder / proof).is_file():
            shutil.rmtree(folder, ignore_errors=True)  # left incomplete by something else
        try:
            staging.rename(folder)
        except OSError:
            if not (folder / proof).is_file():  # else another process was faster
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place in one step.

    The content is on the disk before its name is: after a kill or a power cut, `path` is whole
    or absent (or what it was before).
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes it private; a result is not a secret
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256_of_file(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
