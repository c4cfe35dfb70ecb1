"""Tables in files → documents: JSON Lines and arrays, CSV and TSV, Parquet.

One row (of Parquet: one record batch) is in memory at a time.
"""

import csv
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from perplexit.errors import CorpusError
from perplexit.inputs.compressed_files import is_compressed, open_bytes
from perplexit.inputs.corpus_document import Document, Keys, check_columns, row_document

Rows = Iterator[tuple[str, int, Mapping[str, Any]]]  # where a row is, its number, its columns

BOM = b"\xef\xbb\xbf"
_ROWS_PER_BATCH = 1024
_BATCH_BYTES = 16 << 20
_LARGEST_ARRAY = 1 << 30


def table_documents(path: Path, kind: str, keys: Keys) -> Iterator[Document]:
    """Yield the rows of a table as documents; kind: a key of TABLE_READERS."""
    for origin, number, row in TABLE_READERS[kind](path, keys):
        yield row_document(row, keys, origin, source_file=str(path), source_row=number)


def _json_rows(path: Path, keys: Keys) -> Rows:
    """Yield the rows of a .json file: of one array, or one object on each line."""
    with open_bytes(path) as file:
        begin = file.peek(1 << 12)[: 1 << 12].removeprefix(BOM).lstrip()
        if begin[:1] != b"[":
            yield from _rows_of_lines(path, file)
            return
        data = file.read(_LARGEST_ARRAY + 1)
    if len(data) > _LARGEST_ARRAY:
        raise CorpusError(
            f"{path} is one JSON array of more than {_LARGEST_ARRAY:,} bytes. Write it as JSON "
            "Lines, one object per line."
        )
    rows = _parsed(decoded(data.removeprefix(BOM), str(path)), str(path))
    for number, row in enumerate(rows):
        origin = f"{path}, item {number}"
        yield origin, number, _object(row, origin)


def _jsonl_rows(path: Path, keys: Keys) -> Rows:
    """Yield the rows of a file with one JSON object on each line; blank lines hold none."""
    with open_bytes(path) as file:
        yield from _rows_of_lines(path, file)


def _rows_of_lines(path: Path, file: BinaryIO) -> Rows:
    for number, text in enumerate(_decoded_lines(path, file)):
        if text.strip(" \t\n\v\f\r"):
            origin = f"{path}, line {number + 1}"
            yield origin, number, _object(_parsed(text, origin), origin)


def _parsed(text: str, origin: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise CorpusError(f"{origin} holds JSON that is nested too deep.") from error
    except ValueError as error:  # also an integer of more digits than Python converts
        raise CorpusError(f"{origin} is no JSON: {error}. Expected one object a line.") from error


def _object(row: Any, origin: str) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise CorpusError(f"{origin} holds a {type(row).__name__}. Expected one object a line.")
    return row


def _delimited_rows(path: Path, keys: Keys, *, delimiter: str) -> Rows:
    """Yield the rows of a CSV or TSV file, whose first row names the columns.

    A field in quotes may hold delimiters, line ends and doubled quotes. An empty field is an empty
    text. Lines without anything are rows without text.
    """
    csv.field_size_limit(sys.maxsize)  # of the csv module as a whole; its default is 128 KiB
    with open_bytes(path) as file:
        reader = csv.reader(_decoded_lines(path, file), delimiter=delimiter, strict=True)
        line = 1
        names: list[str] = []
        try:
            for row_number, fields in enumerate(reader, start=-1):
                origin, line = f"{path}, line {line}", reader.line_num + 1
                if not names:
                    names = _header(fields, keys, origin)
                    continue
                if fields and len(fields) != len(names):
                    raise CorpusError(
                        f"{origin} has {len(fields)} fields, expected {len(names)}, as many as the "
                        "first line names. Put fields that hold a delimiter in quotes."
                    )
                values = fields or [""] * len(names)
                yield origin, row_number, dict(zip(names, values, strict=True))
        except csv.Error as error:
            kind = "TSV" if delimiter == "\t" else "CSV"
            raise CorpusError(
                f"{path}, line {line}: a row begins that is no {kind} ({error}). Put "
                'fields with quotes or line ends in quotes, and write a quote in them as "".'
            ) from error
        if not names:
            raise CorpusError(f"{path} is empty. Expected a first line that names the columns.")


def _header(fields: list[str], keys: Keys, origin: str) -> list[str]:
    check_columns(fields, keys, origin)
    for key in keys.names:
        if fields.count(key) > 1:
            raise CorpusError(f"{origin} names the column {key!r} twice. Rename one.")
    return fields


def _decoded_lines(path: Path, file: BinaryIO) -> Iterator[str]:
    offset = 0
    for number, line in enumerate(file, start=1):
        content = line.removeprefix(BOM) if number == 1 else line
        yield decoded(content, f"{path}, line {number}", offset)
        offset += len(line)


def _parquet_rows(path: Path, keys: Keys) -> Rows:
    if is_compressed(path):
        raise CorpusError(
            f"{path} is a compressed Parquet file, which is compressed inside already. Decompress "
            "it first."
        )
    try:
        with pq.ParquetFile(path) as file:
            check_columns(file.schema_arrow.names, keys, str(path))
            row_number = 0
            for batch in file.iter_batches(batch_size=_batch_rows(file), columns=keys.names):
                for row in batch.to_pylist():
                    yield f"{path}, row {row_number}", row_number, row
                    row_number += 1
    except (pa.ArrowException, OSError, ValueError) as error:
        raise CorpusError(f"{path} cannot be read as Parquet: {error}.") from error


def _batch_rows(file: pq.ParquetFile) -> int:
    """Return how many rows to read at a time: fewer where rows are large."""
    groups = [file.metadata.row_group(k) for k in range(file.metadata.num_row_groups)]
    num_bytes = sum(int(group.total_byte_size) for group in groups)
    per_row = num_bytes // max(1, int(file.metadata.num_rows)) + 1
    return max(1, min(_ROWS_PER_BATCH, _BATCH_BYTES // per_row))


def decoded(data: bytes, origin: str, offset: int = 0) -> str:
    """Return the text of exactly these bytes: no newline changed, a byte order mark kept.

    Raises CorpusError with the byte's offset in the file, where `data` begins at `offset`.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        guess = " (UTF-16 begins so)" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise CorpusError(
            f"{origin} is not UTF-8: byte {offset + error.start} (0x{data[error.start]:02X}) "
            f"cannot be decoded{guess}. Convert it first, as with iconv -t UTF-8."
        ) from error


def check_is_no_utf16(begin: bytes, path: Path) -> None:
    """Raise CorpusError for UTF-16 or UTF-32, whose NUL bytes are valid UTF-8 too."""
    if len(begin) > 3 and begin.count(0) * 3 > len(begin):
        raise CorpusError(
            f"{path} is not UTF-8: every other byte is NUL, as in UTF-16. Convert it first, as "
            "with iconv -f UTF-16 -t UTF-8."
        )


TABLE_READERS: dict[str, Callable[[Path, Keys], Rows]] = {
    ".jsonl": _jsonl_rows,
    ".ndjson": _jsonl_rows,
    ".json": _json_rows,
    ".csv": partial(_delimited_rows, delimiter=","),
    ".tsv": partial(_delimited_rows, delimiter="\t"),
    ".parquet": _parquet_rows,
}
