"""Where each document of a token file came from: file, row, and the columns that were kept.

None of it decides a number, so it has a hash of its own, apart from the `input_fingerprint`.

Shape suffixes: D = documents.
"""

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from perplexit.fingerprints import canonical_json
from perplexit.inputs.corpus_document import Document
from perplexit.inputs.tensor_container import Layout
from perplexit.inputs.token_file_checks import EXPECTED
from perplexit.token_columns import TOKEN_COLUMNS
from perplexit.untrusted_files import parse_json

_TAKEN = {*TOKEN_COLUMNS, "text", "source_file", "source_row"}  # beside the columns of a run
SOURCE_KEYS = ("source", "source_fingerprint")  # of the metadata
SOURCE_LAYOUT: Layout = {"source_files": ("I32", ()), "source_rows": ("I64", ())}
KEPT_LAYOUT: Layout = {"kept_starts": ("I64", ()), "kept_json": ("U8", ())}


class SourceRecord(TypedDict):
    """The entry of the metadata; `tensors` has the same form as that of the content."""

    files: list[str]
    columns: list[str]
    skipped: dict[str, list[Any]]
    tensors: dict[str, str]


class SourceRows:
    """The sources of documents as they come: codes of files, rows, kept values."""

    def __init__(self, columns: Sequence[str] = ()) -> None:
        self.columns = tuple(columns)
        self.files: dict[str, int] = {}
        self.skipped: dict[str, list[Any]] = {}
        self._num_kept_bytes = 0

    @property
    def layout(self) -> Layout:
        """Return the layout of the tensors that hold the sources."""
        return SOURCE_LAYOUT | (KEPT_LAYOUT if self.columns else {})

    def tensors(self, documents: Sequence[Document]) -> dict[str, NDArray[Any]]:
        """Return the next rows of each tensor."""
        files = [
            -1 if d.source_file is None else self.files.setdefault(d.source_file, len(self.files))
            for d in documents
        ]
        rows: dict[str, NDArray[Any]] = {
            "source_files": np.array(files, dtype=np.int32),
            "source_rows": np.array([d.source_row for d in documents], dtype=np.int64),
        }
        if self.columns:
            kept = [canonical_json(list(document.kept)).encode() for document in documents]
            ends = np.cumsum([len(entry) for entry in kept], dtype=np.int64) + self._num_kept_bytes
            self._num_kept_bytes += sum(map(len, kept))
            rows["kept_starts"] = ends
            rows["kept_json"] = np.frombuffer(b"".join(kept), dtype=np.uint8)
        return rows

    def skip(self, reason: str, document: Document) -> None:
        """Note where a document was left out."""
        self.skipped.setdefault(reason, []).append([document.source_file, document.source_row])

    def metadata(self, tensors: Mapping[str, str]) -> dict[str, str]:
        """Return the entries of the metadata."""
        text = canonical_json(
            {
                "files": list(self.files),
                "columns": self.columns,
                "skipped": self.skipped,
                "tensors": tensors,
            }
        )
        return {"source": text, "source_fingerprint": _hash(text)}


@dataclass(frozen=True)
class DocumentSources:
    """Where the documents of a token file came from.

    files:  names of the files as they were reached. file_D: int32, the index into them, -1 for a
            document that was in memory. row_D: int64, the row of the file (of the list), counted
            from 0, empty ones too.
    columns: the columns that were kept; skipped: by reason, file and row of the first few
            documents left out.
    """

    files: tuple[str, ...]
    file_D: NDArray[np.int32]
    row_D: NDArray[np.int64]
    columns: tuple[str, ...]
    skipped: dict[str, list[Any]]
    kept_starts: NDArray[np.int64] | None = None
    kept_json: NDArray[np.uint8] | None = None

    def kept(self, document: int) -> list[Any]:
        """Return the values of the kept columns of one document."""
        if self.kept_starts is None or self.kept_json is None:
            return []
        begin, end = self.kept_starts[document : document + 2].tolist()
        values: list[Any] = json.loads(self.kept_json[begin:end].tobytes())
        return values

    def of(self, document: int) -> dict[str, Any]:
        """Return `source_file`, `source_row` and the kept columns of one document."""
        code = int(self.file_D[document])
        return {
            "source_file": None if code < 0 else self.files[code],
            "source_row": int(self.row_D[document]),
            **dict(zip(self.columns, self.kept(document), strict=True)),
        }

    def table(self) -> pa.Table:
        """Return one row per document: its number, file, row and kept columns.

        A kept column that has one type keeps it; values of several types become JSON. A name that
        a run's column has gets `kept_` in front.
        """
        num_documents = len(self.row_D)
        files = pa.array([*self.files, None], pa.string())
        codes = np.where(self.file_D < 0, len(self.files), self.file_D)
        columns: dict[str, Any] = {
            "document": pa.array(np.arange(num_documents, dtype=np.int32)),
            "source_file": files.take(pa.array(codes)),
            "source_row": pa.array(np.asarray(self.row_D)),
        }
        kept = [self.kept(document) for document in range(num_documents)] if self.columns else []
        for place, name in enumerate(self.columns):
            shown = f"kept_{name}" if name in _TAKEN else name
            columns[shown] = _column([values[place] for values in kept])
        return pa.table(columns)

    @classmethod
    def read(
        cls, path: Path, metadata: Mapping[str, str], tensors: Mapping[str, NDArray[Any]]
    ) -> "DocumentSources | None":
        """Read what a token file holds of sources; None for one that was made without.

        The caller checks the tensors' hashes. Raises TokenFileError for what makes no sense.
        """
        if "source" not in metadata:
            return None
        record = source_record(path, metadata)
        shape = tensors["document_domains"].shape
        file_D, row_D = np.array(tensors["source_files"]), np.array(tensors["source_rows"])
        if file_D.shape != shape or row_D.shape != shape:
            EXPECTED.refuse(path, "sources of other documents than its own")
        known_D = (file_D >= -1) & (file_D < len(record["files"])) & (row_D >= 0)
        if not known_D.all():
            EXPECTED.refuse(path, "a document from a file or row that it does not name")
        found = cls(
            tuple(record["files"]),
            file_D,
            row_D,
            tuple(record["columns"]),
            record["skipped"],
            tensors.get("kept_starts"),
            tensors.get("kept_json"),
        )
        found._check_kept(path)
        return found

    def _check_kept(self, path: Path) -> None:
        """Raise TokenFileError unless each document has a JSON list with a value per column."""
        if bool(self.columns) != (self.kept_starts is not None):
            EXPECTED.refuse(path, "columns without values")
        if self.kept_starts is None or self.kept_json is None:
            return
        starts = np.array(self.kept_starts)
        whole = len(starts) == len(self.row_D) + 1 and int(starts[0]) == 0
        if not (whole and (np.diff(starts) > 0).all() and int(starts[-1]) == len(self.kept_json)):
            EXPECTED.refuse(path, "kept columns that do not fit its documents")
        for begin, end in pairwise(starts.tolist()):
            text = self.kept_json[begin:end].tobytes()
            if len(parse_json(text, EXPECTED, list[Any], place=path)) != len(self.columns):
                EXPECTED.refuse(path, "kept columns of which a document lacks some")


def source_record(path: Path, metadata: Mapping[str, str]) -> SourceRecord:
    """Return what the metadata say of sources. Raises TokenFileError where that was changed."""
    if metadata.get("source_fingerprint") != _hash(metadata["source"]):
        EXPECTED.refuse(path, "sources that do not hash to their source_fingerprint")
    return parse_json(metadata["source"], EXPECTED, SourceRecord, place=path)


def _column(values: list[Any]) -> pa.Array:
    """Return the values as one column; lists, objects and mixed types as JSON text."""
    with contextlib.suppress(pa.ArrowException, OverflowError):
        if not any(isinstance(value, list | dict) for value in values):
            return pa.array(values)
    return pa.array([None if v is None else canonical_json(v) for v in values], pa.string())


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
