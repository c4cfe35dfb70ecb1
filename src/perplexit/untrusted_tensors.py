"""Tensors from disk: safetensors and Parquet, opened only where their sizes are those of the file.

The safetensors library checks a file's header against its size before it gives a tensor; Parquet
does not, and a few kilobytes may declare a billion rows. What either library raises on a damaged
file becomes a stated error here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from safetensors import safe_open

from perplexit.untrusted_files import Expected, check_regular, open_regular, stated

# What a Parquet file may become in memory: this much whatever its size, and beyond that so many
# times its size. Columns of one value compress a thousandfold, losses and ids hardly at all.
_DECODED_BYTES = 64 << 20
_DECODED_RATIO = 1000
_VALUE_BYTES = {"BOOLEAN": 0.125, "INT64": 8, "DOUBLE": 8, "INT96": 12}  # the others: 4 at least
_VARIABLE = (pa.string(), pa.binary(), pa.large_string(), pa.large_binary())


@contextmanager
def opened_tensors(path: Path, expected: Expected, *, framework: str = "numpy") -> Iterator[Any]:
    """Open the safetensors file at `path` by `safe_open`.

    Raises `expected.error` for any other file, and for whatever fails within the block.
    """
    check_regular(path, expected)
    with stated(path, expected), safe_open(str(path), framework=framework) as file:
        yield file


def read_tensors(path: Path, expected: Expected) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Return (tensors by name, metadata) of a safetensors file. Raises `expected.error`."""
    with opened_tensors(path, expected) as file:
        tensors = {name: np.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
        return tensors, dict(file.metadata() or {})


def read_parquet(path: Path, expected: Expected) -> pa.Table:
    """Read the table in a Parquet file, one row group after the other.

    Raises `expected.error` for any other file, and for one that declares more values, or repeats
    longer ones, than a file of its size can hold: before they are decoded.
    """
    size = check_regular(path, expected)
    allowed = _DECODED_BYTES + _DECODED_RATIO * size
    with open_regular(path, expected) as source, stated(path, expected):
        schema = pq.read_schema(source)
        variable = [field.name for field in schema if field.type in _VARIABLE]
        # Long values that repeat stay in a dictionary until their sum is known.
        file = pq.ParquetFile(source, read_dictionary=variable)
        _require(_declared_bytes(file.metadata) <= allowed, path, expected, size)
        groups = [file.read_row_group(index) for index in range(file.num_row_groups)]
        table = pa.concat_tables(groups) if groups else file.schema_arrow.empty_table()
        for name in variable:
            _require(_decoded_bytes(table.column(name)) <= allowed, path, expected, size)
        table = table.cast(schema)
        if table.num_rows != file.metadata.num_rows:
            expected.refuse(path, f"{table.num_rows:,} rows, not {file.metadata.num_rows:,}")
        table.validate(full=True)
        return table


def _require(holds: bool, path: Path, expected: Expected, size: int) -> None:
    if not holds:
        expected.refuse(path, f"{size:,} bytes that unfold to more than a file of this size can")


def _declared_bytes(metadata: pq.FileMetaData) -> float:
    """Return the bytes that the values need at least, by the footer; infinite if it is wrong."""
    total = 0.0
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        total += max(0, group.total_byte_size)
        for place in range(group.num_columns):
            column = group.column(place)
            if column.num_values < 0 or column.total_uncompressed_size < 0:
                return float("inf")
            total += column.num_values * _VALUE_BYTES.get(column.physical_type, 4)
    return total


def _decoded_bytes(column: pa.ChunkedArray) -> int:
    """Return the bytes that a column of text or bytes takes without its dictionary."""
    total = 0
    for chunk in column.chunks:
        if pa.types.is_dictionary(chunk.type):
            lengths = pc.binary_length(chunk.dictionary).take(chunk.indices.drop_null())
            total += pc.sum(lengths, min_count=0).as_py()
        else:
            total += chunk.nbytes
    return total
