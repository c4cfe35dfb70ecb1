"""Tensors and one JSON record in a safetensors file: how IGF keeps articles, pairs and learners.

The record is one metadata entry in canonical JSON, so that equal content gives equal bytes.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from perplexit.errors import PerplexitError
from perplexit.fingerprints import canonical_json
from perplexit.protected_outputs import Kind, OutputFile, header_has_mark
from perplexit.untrusted_files import Expected, parse_json, read_json, stated
from perplexit.untrusted_tensors import read_tensors

PICKLE_SUFFIXES = (".jbl", ".joblib", ".pkl", ".pickle", ".pt", ".bin")
_RECORD = "perplexit"


class StoredFileError(PerplexitError):
    """A file of IGF is missing, damaged, or holds something else."""


def tensor_path(path: str | Path) -> Path:
    """Return `path`; for a pickle's name (`.jbl`, `.pt`, …) the `.safetensors` in its place."""
    path = Path(path)
    return path.with_suffix(".safetensors") if path.suffix in PICKLE_SUFFIXES else path


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file of one kind, as it follows "expected" in messages.

    Its path may have a pickle's suffix; see `tensor_path`.
    """

    kind: str

    def output(
        self, path: str | Path, *, inputs: tuple[Path, ...] = (), force: bool = False
    ) -> OutputFile:
        """Return the file to be written. Raises OutputError where something else is there.

        Files of older versions have a blank after the record's colons.
        """
        marks = [json.dumps(f'"kind":{blank}"{self.kind}"')[1:-1].encode() for blank in ("", " ")]
        kind = Kind(self.kind, lambda found: any(header_has_mark(found, mark) for mark in marks))
        return OutputFile(tensor_path(path), kind, inputs, force)

    def write(
        self, path: str | Path, tensors: Mapping[str, NDArray[Any]], record: Mapping[str, Any]
    ) -> Path:
        """Write tensors and record in one step; return the path. Raises as `output` does."""
        document = canonical_json({"kind": self.kind, "version": 1, **record})
        arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
        file = self.output(path, force=True)
        return file.write(lambda p: save_file(arrays, p, metadata={_RECORD: document}))

    @contextmanager
    def opened(self, path: str | Path) -> Iterator[tuple[dict[str, NDArray[Any]], dict[str, Any]]]:
        """Yield the tensors and the record that `write` wrote.

        Raises StoredFileError where the file is missing, damaged or of another kind, and for
        whatever fails within the block.
        """
        path = tensor_path(path)
        if not path.is_file():
            raise StoredFileError(f"expected {self.kind} in {path}, but there is no such file")
        expected = stored_as(self.kind)
        tensors, metadata = read_tensors(path, expected)
        if _RECORD not in metadata:
            expected.refuse(path, "tensors without a record")
        record = parse_json(metadata[_RECORD], expected, dict[str, Any], place=path)
        if record.get("kind") != self.kind or record.get("version") != 1:
            found = f"{record.get('kind')!r:.60} of version {record.get('version')!r:.20}"
            raise StoredFileError(
                f"expected {self.kind} of version 1 in {path}, got {found}; name another file, or "
                "make it again"
            )
        with stated(path, expected):
            yield tensors, record


def json_kind(key: str) -> Kind:
    """Return the kind of output that is a JSON object with this key."""
    return Kind("a record in JSON", lambda path: key in object_in(path))


def object_in(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; an empty one where there is something else."""
    try:
        return read_json(path, stored_as("a JSON object"), dict[str, Any])
    except StoredFileError:
        return {}


def stored_as(kind: str) -> Expected:
    """Return what a file of this kind should hold, for messages."""
    return Expected(f"{kind} written by Perplexit", StoredFileError, "make it again")
