"""Tensors and one JSON record in a safetensors file: how IGF keeps articles, pairs and learners.

The record is one metadata entry in canonical JSON, so that equal content gives equal bytes.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from perplexit.errors import PerplexitError
from perplexit.fingerprints import canonical_json
from perplexit.protected_outputs import Kind, OutputFile, header_has_mark
from perplexit.untrusted_files import Expected, parse_json, read_json
from perplexit.untrusted_tensors import read_tensors

PICKLE_SUFFIXES = (".jbl", ".joblib", ".pkl", ".pickle", ".pt", ".bin")
_RECORD = "perplexit"


class StoredFileError(PerplexitError):
    """A file of IGF is missing, damaged, or holds something else."""


def tensor_path(path: str | Path) -> Path:
    """Return `path`; for a pickle's name (`.jbl`, `.pt`, …) the `.safetensors` in its place."""
    path = Path(path)
    return path.with_suffix(".safetensors") if path.suffix in PICKLE_SUFFIXES else path


def write_stored(
    path: str | Path, kind: str, tensors: Mapping[str, NDArray[Any]], record: Mapping[str, Any]
) -> Path:
    """Write tensors and record in one step; returns the path written (see `tensor_path`).

    Raises OutputError where something else than an older file of the same kind is there.
    """
    file = OutputFile(tensor_path(path), stored_kind(kind), force=True)
    document = canonical_json({"kind": kind, "version": 1, **record})
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    return file.write(lambda p: save_file(arrays, p, metadata={_RECORD: document}))


def stored_kind(kind: str) -> Kind:
    """Return the kind of output that `write_stored` writes under this name.

    Files of older versions have a blank after the record's colons.
    """
    marks = [json.dumps(f'"kind":{blank}"{kind}"')[1:-1].encode() for blank in ("", " ")]
    return Kind(kind, lambda path: any(header_has_mark(path, mark) for mark in marks))


def json_kind(key: str) -> Kind:
    """Return the kind of output that is a JSON object with this key."""
    return Kind("a record in JSON", lambda path: key in object_in(path))


def object_in(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; an empty one where there is something else."""
    try:
        return read_json(path, stored_as("a JSON object"), dict[str, Any])
    except StoredFileError:
        return {}


def read_stored(path: str | Path, kind: str) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Return the tensors and the record that `write_stored` wrote.

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
    """Return what a file of this kind should hold, for checks of what `read_stored` returned."""
    return Expected(f"{kind} written by Perplexit", StoredFileError, "make it again")
