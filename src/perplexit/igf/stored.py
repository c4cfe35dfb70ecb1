"""Tensors and one JSON record in a safetensors file: what IGF keeps, and never a pickle.

The record is one metadata entry in canonical JSON, so equal content gives equal bytes.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from perplexit.atomic_files import write_atomically
from perplexit.errors import PerplexitError, ResumeError
from perplexit.protected_outputs import Kind, OutputFile, header_has_mark
from perplexit.untrusted_files import Expected
from perplexit.untrusted_json import parse_json
from perplexit.untrusted_tensors import read_tensors

PICKLE_SUFFIXES = (".jbl", ".joblib", ".pkl", ".pickle", ".pt", ".bin")
_RECORD = "perplexit"
CONDITIONS = Expected(
    "the conditions of what was begun here", ResumeError, "remove the folder, or name another"
)


class StoredFileError(PerplexitError):
    """A file of IGF's that is missing, damaged, or holds something else."""


def tensor_path(path: str | Path) -> Path:
    """The path, or for a pickle's name (`.jbl`, `.pt`, …) the `.safetensors` in its place."""
    path = Path(path)
    return path.with_suffix(".safetensors") if path.suffix in PICKLE_SUFFIXES else path


def write_stored(
    path: str | Path, kind: str, tensors: Mapping[str, NDArray[Any]], record: Mapping[str, Any]
) -> Path:
    """Write tensors and record in one step; returns the path written (see `tensor_path`).

    Raises OutputError where something else than an older file of the same kind is there.
    """
    file = OutputFile(tensor_path(path), stored_kind(kind), force=True)
    document = json.dumps(
        {"kind": kind, "version": 1, **record}, sort_keys=True, ensure_ascii=False, allow_nan=False
    )
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    return file.write(lambda p: save_file(arrays, p, metadata={_RECORD: document}))


def stored_kind(kind: str) -> Kind:
    """The kind of output that `write_stored` writes under this name."""
    mark = json.dumps(json.dumps({"kind": kind})[1:-1])[1:-1].encode()
    return Kind(kind, lambda path: header_has_mark(path, mark))


def json_kind(key: str) -> Kind:
    """A record in JSON, told by a key that it has."""
    return Kind("a record in JSON", lambda path: key in object_in(path))


def object_in(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one where there is something else."""
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError, OSError):
        return {}
    return found if isinstance(found, dict) else {}


def write_text(path: Path, text: str) -> None:
    """Put a text file in place in one step."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomically(path, write)


def read_stored(path: str | Path, kind: str) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """The tensors and the record that `write_stored` wrote.

    Raises StoredFileError where the file is missing, damaged or of another kind.
    """
    path = tensor_path(path)
    if not path.is_file():
        raise StoredFileError(f"expected {kind} in {path}, but there is no such file")
    expected = stored_as(kind)
    tensors, metadata = read_tensors(path, expected)
    if _RECORD not in metadata:
        expected.refuse(path, "tensors without a record")
    record = parse_json(metadata[_RECORD], expected, dict[str, Any], place=path)
    if record.get("kind") != kind or record.get("version") != 1:
        found = f"{record.get('kind')!r:.60} of version {record.get('version')!r:.20}"
        raise StoredFileError(
            f"expected {kind} of version 1 in {path}, got {found}; name another file, or make it "
            "again"
        )
    return tensors, record


def stored_as(kind: str) -> Expected:
    """What a file of this kind should hold; for those who read on in what `read_stored` gave."""
    return Expected(f"{kind} written by Perplexit", StoredFileError, "make it again")
