"""Files that may be compressed, as one stream of bytes: whole, or an error that says where.

A stream that was cut short or damaged must never become a shorter corpus. So every member is read
to its end (several members in one file are one stream), its checksum is verified, and anything
behind the last member but zeros is an error.
"""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from perplexit.errors import CorpusError
from perplexit.untrusted_files import Expected, open_regular

_CHUNK_BYTES = 1 << 18
_PIECE_BYTES = 1 << 20  # of decompressed data at a time, however much a chunk holds
_SUFFIX_OF = {
    b"\x1f\x8b": ".gz",
    b"\x28\xb5\x2f\xfd": ".zst",
    b"BZh": ".bz2",
    b"\xfd7zXZ\x00": ".xz",
}
COMPRESSED_SUFFIXES = frozenset(_SUFFIX_OF.values())
TEXT_OR_TABLE = Expected("a text or a table", CorpusError, "name another file")


def is_compressed(path: Path) -> bool:
    """Return whether the file's name says that it is compressed."""
    return path.suffix.lower() in COMPRESSED_SUFFIXES


def open_bytes(path: Path) -> io.BufferedReader:
    """Open a file as bytes, decompressed where its name ends in .gz, .zst, .bz2 or .xz.

    Raises CorpusError, here or while it is read, for a file that is cut short, damaged, or
    compressed otherwise than its name says.
    """
    file = open_regular(path, TEXT_OR_TABLE)
    suffix = path.suffix.lower()
    found = _suffix_by_content(file)
    if suffix not in COMPRESSED_SUFFIXES:
        if found and found != ".bz2":  # whose beginning may be text
            file.close()
            raise CorpusError(
                f"expected text in {path}, got compressed data; give it a name that ends in {found}"
            )
        return file
    if found != suffix:
        file.close()
        raise CorpusError(
            f"expected {suffix} data in {path}, as its name says, got "
            f"{'an empty file' if found == '' else f'{found} data' if found else 'something else'};"
            " name it after what it is, or fetch it again"
        )
    return io.BufferedReader(_Decompressed(path, file, suffix), _PIECE_BYTES)


def _suffix_by_content(file: BinaryIO) -> str | None:
    """Return the suffix that the first bytes call for; "" for an empty file, else None."""
    begin = file.read(6)
    file.seek(0)
    found = (suffix for magic, suffix in _SUFFIX_OF.items() if begin.startswith(magic))
    return next(found, None if begin else "")


class _Decompressed(io.RawIOBase):
    """A raw stream over the members of a compressed file."""

    def __init__(self, path: Path, file: BinaryIO, suffix: str) -> None:
        self._path = path
        self._file = file
        self._suffix = suffix
        self._num_bytes = 0
        self._stream = _STREAMS[suffix](file)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read(len(buffer))
        except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, pa.ArrowException) as e:
            raise CorpusError(
                f"expected whole {self._suffix} data in {self._path}, got data that is cut short "
                f"or damaged after {self._num_bytes:,} decompressed bytes ({e}); fetch the file "
                "again"
            ) from e
        buffer[: len(data)] = data
        self._num_bytes += len(data)
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


class _Members:
    """The decompressed pieces of a file of one or more bzip2 or xz members.

    The standard library's BZ2File and LZMAFile ignore what stands behind the last member.
    """

    def __init__(self, file: BinaryIO, new_decoder: Callable[[], Any]) -> None:
        self._file = file
        self._new_decoder = new_decoder
        self._decoder: Any = None
        self._rest = b""

    def read(self, size: int) -> bytes:
        """Return at most `size` bytes, none at the end. Raises EOFError for a cut-off member."""
        while True:
            if self._decoder is None or self._decoder.eof:
                self._rest = getattr(self._decoder, "unused_data", b"") or self._rest
                self._rest = self._rest or self._file.read(_CHUNK_BYTES)
                if self._decoder is not None:
                    self._skip_padding()
                if not self._rest:
                    return b""
                self._decoder = self._new_decoder()
            data, self._rest = self._decoder.decompress(self._rest, size), b""
            if data:
                return bytes(data)
            if self._decoder.eof:
                continue
            if self._decoder.needs_input:
                self._rest = self._file.read(_CHUNK_BYTES)
                if not self._rest:
                    raise EOFError("it ends in the middle")

    def _skip_padding(self) -> None:
        """Skip zeros behind a member, with which tapes and block devices fill up."""
        self._rest = self._rest.lstrip(b"\0")
        while not self._rest and (chunk := self._file.read(_CHUNK_BYTES)):
            self._rest = chunk.lstrip(b"\0")


_STREAMS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".zst": lambda file: pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd"),
    ".bz2": lambda file: _Members(file, bz2.BZ2Decompressor),
    ".xz": lambda file: _Members(file, lzma.LZMADecompressor),
}
