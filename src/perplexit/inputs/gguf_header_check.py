"""The header of a GGUF file, walked before any library reads it: what it declares must be there.

Layout: magic `GGUF`, u32 version, u64 tensors, u64 pairs, then the pairs (a string is u64 length
and bytes, an array u32 element type, u64 count and elements), then one entry per tensor: name, u32
dimensions, their sizes (u64), u32 type, u64 offset; then, aligned, the data.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import hashlib
import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

from perplexit.errors import TokenizerError
from perplexit.untrusted_files import Expected, open_regular, stated

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_STRING, _ARRAY = 8, 9
_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_VERSION = b"tokenizer-1"  # raised when what is kept of a conversion changes
_EXPECTED = Expected("a GGUF file of version 2 or 3", TokenizerError, "download it again")
# At most this many values, each of which a library makes some hundred bytes of Python objects of;
# the largest vocabularies have some 260,000 tokens and 600,000 merges.
_MOST_VALUES = 4_000_000
_LONGEST_STRING = 1 << 24  # bytes; chat templates have some thousand
_DEEPEST_ARRAY = 4
_MOST_DIMENSIONS = 4
_SMALLEST_BITS = 1  # of a weight, in any of ggml's types


def metadata_fingerprint(path: Path) -> str:
    """Return the SHA-256 of the key-value section, which holds the tokenizer; quick for any size.

    Raises TokenizerError where the file is no GGUF, or its header declares what is not there.
    """
    end = check_gguf(path, _EXPECTED)
    with open_regular(path, _EXPECTED) as file, stated(path, _EXPECTED):
        return hashlib.sha256(_VERSION + file.read(end)).hexdigest()


def check_gguf(path: Path, expected: Expected) -> int:
    """Check the whole header of a GGUF file; return where its key-value section ends, in bytes.

    Every string, array and tensor must lie within the file, so that nothing is allocated for what
    is only declared. Raises `expected.error` otherwise.
    """
    with open_regular(path, expected) as file, stated(path, expected):
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            walk = _Walk(data)
            walk.pairs()
            end = walk.position
            walk.tensors()
        return end


@dataclass(slots=True)
class _Walk:
    """A place in the header; each method reads on from there. Raises ValueError, struct.error."""

    data: mmap.mmap
    position: int = 24
    num_values: int = 0

    def pairs(self) -> None:
        """Go to the end of the key-value section."""
        version = _U32.unpack_from(self.data, 4)[0]
        if self.data[:4] != b"GGUF" or version not in (2, 3):
            raise ValueError("it does not begin as one")
        for _ in range(self._count(_U64.unpack_from(self.data, 16)[0], 13)):
            self._string()
            self._value(self._u32(), 0)

    def tensors(self) -> None:
        """Go to the end of the tensors' entries. Each must lie within the file's data."""
        names = set()
        furthest = 0
        for _ in range(self._count(_U64.unpack_from(self.data, 8)[0], 32)):
            names.add(self._string())
            num_dimensions = self._u32()
            if not 0 < num_dimensions <= _MOST_DIMENSIONS:
                raise ValueError(f"a tensor of {num_dimensions} dimensions")
            size = math.prod(self._u64() for _ in range(num_dimensions))
            self._u32()
            furthest = max(furthest, self._u64() + size * _SMALLEST_BITS // 8)
        if self.position + furthest > len(self.data):
            raise ValueError("tensors that reach beyond the end of the file")
        if len(names) != _U64.unpack_from(self.data, 8)[0]:
            raise ValueError("two tensors of one name")

    def _value(self, kind: int, depth: int) -> None:
        if kind in _SCALAR_BYTES:
            self._skip(_SCALAR_BYTES[kind])
        elif kind == _STRING:
            self._string()
        elif kind == _ARRAY and depth < _DEEPEST_ARRAY:
            element = self._u32()
            count = self._count(self._u64(), _SCALAR_BYTES.get(element, 8))
            if element in _SCALAR_BYTES:
                self._skip(count * _SCALAR_BYTES[element])
                return
            for _ in range(count):
                self._value(element, depth + 1)
        else:
            raise ValueError(f"a value of the unknown type {kind}")

    def _count(self, count: int, smallest_bytes: int) -> int:
        """Return a declared count if the file is long enough for so many of `smallest_bytes`."""
        self.num_values += count
        if count * smallest_bytes > len(self.data) or self.num_values > _MOST_VALUES:
            raise ValueError(f"{count:,} declared values in {len(self.data):,} bytes")
        return count

    def _string(self) -> bytes:
        length = self._u64()
        if length > _LONGEST_STRING:
            raise ValueError(f"a string of {length:,} bytes")
        begin = self.position
        self._skip(length)
        return self.data[begin : self.position]

    def _u32(self) -> int:
        self._skip(4)
        return int(_U32.unpack_from(self.data, self.position - 4)[0])

    def _u64(self) -> int:
        self._skip(8)
        return int(_U64.unpack_from(self.data, self.position - 8)[0])

    def _skip(self, num_bytes: int) -> None:
        self.position += num_bytes
        if self.position > len(self.data):
            raise ValueError("it is cut short")
