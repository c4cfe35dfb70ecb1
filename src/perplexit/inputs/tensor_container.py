"""The safetensors container, written from streams and read as a memory map.

Layout: 8 bytes of header length (little-endian), a JSON header, then the tensors without gaps. Ours
is canonical: tensors in order of item size and name (so every one is aligned), sorted keys, blanks
up to a multiple of 8 bytes. So a header with one changed bit is an error.
"""

import contextlib
import hashlib
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any, Literal, TypedDict

import msgspec
import numpy as np
from numpy.typing import NDArray

from perplexit.atomic_files import new_temporary_folder
from perplexit.errors import TokenFileError
from perplexit.fingerprints import canonical_json
from perplexit.untrusted_files import Expected, check_regular, parse_json, stated, typed

DTYPES: dict[str, np.dtype[Any]] = {
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_Size = Annotated[int, msgspec.Meta(ge=0, lt=1 << 48)]
Layout = dict[str, tuple[str, tuple[int, ...]]]  # of each tensor: its dtype, the shape of a row

_COPY_BYTES = 1 << 18
_PIECE_BYTES = 1_048_320  # whole rows of every tensor: a multiple of 56 bytes (a window) and of 8
_LARGEST_HEADER = 100_000_000  # the safetensors library's own limit, in bytes
_EXPECTED = Expected("a token file", TokenFileError, "`perplexit prepare` makes one from text")


class _HeaderEntry(TypedDict):
    dtype: Literal["I64", "I32", "U16", "U8", "BOOL"]
    shape: Annotated[list[_Size], msgspec.Meta(min_length=1, max_length=2)]
    data_offsets: list[int]


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Name, dtype, shape and content hash of one tensor."""

    name: str
    dtype: str  # a key of DTYPES
    shape: tuple[int, ...]
    sha256: str = ""

    @property
    def num_bytes(self) -> int:
        """Return how many bytes the tensor takes in the file."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def header_bytes(entries: list[TensorEntry], metadata: Mapping[str, str]) -> bytes:
    """Return the canonical header, with its length in front."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for entry in sorted(entries, key=_file_order):
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.num_bytes],
        }
        offset += entry.num_bytes
    text = canonical_json(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class TensorSpool:
    """Tensors that grow row by row in files beside the output, assembled into it at the end.

    Memory stays flat however large they become. Used as a context manager: without `assemble`,
    nothing is left behind.
    """

    def __init__(self, output: Path, layout: Layout) -> None:
        self._output = output
        self._layout = dict(layout)
        self._folder = new_temporary_folder(output)
        self._files: dict[str, IO[bytes]] = {
            name: (self._folder / name).open("wb") for name in layout
        }
        self._hashes = {name: hashlib.sha256() for name in layout}
        self._num_rows = dict.fromkeys(layout, 0)

    def __enter__(self) -> "TensorSpool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the files beside the output."""
        for file in self._files.values():
            with contextlib.suppress(OSError):  # of a full disk, which was reported when it was met
                file.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def num_rows(self, name: str) -> int:
        """Return how many rows were appended so far."""
        return self._num_rows[name]

    def append(self, name: str, rows: NDArray[Any]) -> None:
        """Add rows at the end of the tensor `name`."""
        dtype, row_shape = self._layout[name]
        data = np.ascontiguousarray(rows, dtype=DTYPES[dtype])
        if data.shape[1:] != row_shape:
            raise ValueError(f"{name} takes rows of shape {row_shape}, got {data.shape[1:]}")
        self._files[name].write(data.data)
        self._hashes[name].update(data.data)
        self._num_rows[name] += len(data)

    def read_back(self, name: str, num_bytes: int) -> Iterator[bytes]:
        """Yield the last bytes that were appended to a tensor, in pieces."""
        self._files[name].flush()
        with (self._folder / name).open("rb") as file:
            file.seek(-num_bytes, os.SEEK_END)
            yield from iter(lambda: file.read(_COPY_BYTES), b"")

    def entries(self) -> list[TensorEntry]:
        """Return the tensors as they stand."""
        return [
            TensorEntry(name, dtype, (self._num_rows[name], *row), self._hashes[name].hexdigest())
            for name, (dtype, row) in self._layout.items()
        ]

    def assemble(
        self, metadata: Mapping[str, str], *, check: Callable[[Path], None] | None = None
    ) -> None:
        """Write the output in one piece: it appears whole or not at all.

        `check` is given the whole file, and raises where it may not be put in place.
        """
        entries = self.entries()
        whole = self._folder / "whole"
        with whole.open("wb") as target:
            target.write(header_bytes(entries, metadata))
            for entry in sorted(entries, key=_file_order):
                self._files[entry.name].close()
                part = self._folder / entry.name
                with part.open("rb") as source:
                    shutil.copyfileobj(source, target, _COPY_BYTES)
                part.unlink()
            target.flush()
            os.fsync(target.fileno())
        if check is not None:
            check(whole)
        os.replace(whole, self._output)


def read_container(path: Path) -> tuple[dict[str, str], dict[str, NDArray[Any]]]:
    """Return (metadata, memory-mapped tensors) of a canonical container.

    Checks the layout to the last byte, not the tensors' content. Raises TokenFileError.
    """
    if check_regular(path, _EXPECTED) == 0:
        _EXPECTED.refuse(path, "an empty file")
    with stated(path, _EXPECTED):
        data = np.memmap(path, dtype=np.uint8, mode="r")
    header, body_start = _parse_header(path, data)
    metadata = typed(header.pop("__metadata__", None), _EXPECTED, dict[str, str], place=path)
    declared = typed(header, _EXPECTED, dict[str, _HeaderEntry], place=path)
    entries = [TensorEntry(k, e["dtype"], tuple(e["shape"])) for k, e in declared.items()]
    if header_bytes(entries, metadata) != data[:body_start].tobytes():
        _EXPECTED.refuse(path, "a damaged header: it is not byte for byte what was written")
    expected = body_start + sum(entry.num_bytes for entry in entries)
    if expected != len(data):
        _EXPECTED.refuse(
            path, f"{len(data)} bytes, not {expected}: it was cut short or added to after that"
        )
    whole = np.asarray(data)  # a slice of a memmap costs twice that of an array
    tensors, offset = {}, body_start
    for entry in sorted(entries, key=_file_order):
        part = whole[offset : offset + entry.num_bytes]
        tensors[entry.name] = part.view(DTYPES[entry.dtype]).reshape(entry.shape)
        offset += entry.num_bytes
    return metadata, tensors


def content_hashes(
    path: Path,
    tensors: Mapping[str, NDArray[Any]],
    *,
    first: Sequence[str] = (),
    look: Callable[[str, int, NDArray[Any]], None] = lambda name, row, piece: None,
) -> dict[str, str]:
    """Return the SHA-256 of each tensor; `tensors` are the views of `read_container`.

    Read as a file, since touched pages of the map count as the process's memory. `look` is given
    every piece, with the tensor's name and the piece's first row; the tensors named in `first`
    come before the others.
    """
    starts, position = {}, path.stat().st_size - sum(each.nbytes for each in tensors.values())
    for name, tensor in tensors.items():  # in the order of the file
        starts[name], position = position, position + tensor.nbytes
    buffer = memoryview(bytearray(_PIECE_BYTES))
    hashes = {}
    with path.open("rb", buffering=0) as file:
        for name in [*first, *(name for name in tensors if name not in first)]:
            tensor, digest, row = tensors[name], hashlib.sha256(), 0
            file.seek(starts[name])
            left = tensor.nbytes
            while left and (count := file.readinto(buffer[: min(left, _PIECE_BYTES)])):
                digest.update(buffer[:count])
                left -= count
                piece = np.frombuffer(buffer[:count], dtype=tensor.dtype)
                rows = piece.reshape(-1, *tensor.shape[1:])
                look(name, row, rows)
                row += len(rows)
            hashes[name] = digest.hexdigest()
    return hashes


def _file_order(entry: TensorEntry) -> tuple[int, str]:
    return -DTYPES[entry.dtype].itemsize, entry.name


def _parse_header(path: Path, data: NDArray[np.uint8]) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(data[:8].tobytes(), "little")
    if len(data) < 8 or length > min(len(data) - 8, _LARGEST_HEADER):
        raise TokenFileError(
            f"expected a token file made by `perplexit prepare`, got {path}, which is another "
            f"file or was cut short. To score a text, prepare it first: perplexit prepare {path} "
            f"--tokenizer MODEL -o {path.with_suffix('.safetensors').name}"
        )
    text = data[8 : 8 + length].tobytes()
    return parse_json(text, _EXPECTED, dict[str, Any], place=path), 8 + length
