"""The digests of large files, remembered in the cache."""

import hashlib
import time
from pathlib import Path

from perplexit.atomic_files import cache_folder, write_atomically
from perplexit.fingerprints import sha256_of_file

__all__ = ["cache_folder", "file_digest"]

_LARGE_FILE_BYTES = 32 * 2**20
_SETTLED_SECONDS = 3.0


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal; a large file's is remembered.

    Remembered under its path, size, inode and times of change (the inode's time cannot be set by
    a program), and only once the file has rested, so that two changes within one tick of the file
    system's clock cannot share a digest.
    """
    stat = path.stat()
    if stat.st_size < _LARGE_FILE_BYTES:
        return sha256_of_file(path)
    key = f"{path.resolve()}|{stat.st_size}|{stat.st_ino}|{stat.st_mtime_ns}|{stat.st_ctime_ns}"
    remembered = cache_folder() / "digests" / hashlib.sha256(key.encode()).hexdigest()
    if remembered.is_file():
        return remembered.read_text(encoding="ascii")
    digest = sha256_of_file(path)
    if time.time() - max(stat.st_mtime, stat.st_ctime) > _SETTLED_SECONDS:
        _remember(remembered, digest)
    return digest


def _remember(path: Path, digest: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda temporary: _write(temporary, digest))
    except OSError:  # a read-only home: the digest is computed again next time
        return


def _write(path: Path, digest: str) -> None:
    path.write_text(digest, encoding="ascii")
