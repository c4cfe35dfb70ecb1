"""The key-value section of a GGUF file, walked only to know where it ends.

Layout: magic `GGUF`, u32 version, u64 tensors, u64 pairs, then the pairs; a string is u64 length
and bytes, an array u32 element type, u64 count and elements.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import hashlib
import mmap
import struct
from pathlib import Path

from perplexit.errors import TokenizerError

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_STRING, _ARRAY = 8, 9
_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_VERSION = b"tokenizer-1"  # raised when what is kept of a conversion changes


def metadata_fingerprint(path: Path) -> str:
    """SHA-256 of the key-value section, in which the tokenizer is: cheap for files of any size.

    Raises TokenizerError where the file is no GGUF.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            end = _pairs_end(data)
            return hashlib.sha256(_VERSION + data[:end]).hexdigest()
    except (struct.error, KeyError, ValueError) as error:
        raise TokenizerError(
            f"{path} is no GGUF file of version 2 or 3, or is cut short: its key-value section "
            f"cannot be read. Download it again."
        ) from error


def _pairs_end(data: mmap.mmap) -> int:
    version = _U32.unpack_from(data, 4)[0]
    if data[:4] != b"GGUF" or version not in (2, 3):
        raise ValueError("no GGUF")
    num_pairs = _U64.unpack_from(data, 16)[0]
    position = 24
    for _ in range(num_pairs):
        position = _after_string(data, position)
        kind = _U32.unpack_from(data, position)[0]
        position = _after_value(data, position + 4, kind)
    if position > len(data):
        raise ValueError("cut short")
    return position


def _after_value(data: mmap.mmap, position: int, kind: int) -> int:
    if kind == _STRING:
        return _after_string(data, position)
    if kind != _ARRAY:
        return position + _SCALAR_BYTES[kind]
    element = _U32.unpack_from(data, position)[0]
    count = _U64.unpack_from(data, position + 4)[0]
    position += 12
    if element in _SCALAR_BYTES:
        return int(position + count * _SCALAR_BYTES[element])
    for _ in range(count):
        position = _after_value(data, position, element)
    return position


def _after_string(data: mmap.mmap, position: int) -> int:
    return int(position + 8 + _U64.unpack_from(data, position)[0])
