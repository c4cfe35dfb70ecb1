"""Tables written for other tools: CSV, JSON lines or Parquet, by the file's name."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.compute
import pyarrow.csv
import pyarrow.parquet as pq

from perplexit.errors import UsageError
from perplexit.files import write_atomically

EXPORT_SUFFIXES = (".csv", ".parquet", ".jsonl")


def write_table(table: pa.Table, path: Path) -> Path:
    """Write `table` in the format that `path` ends in, whole or not at all.

    Raises UsageError for another suffix.
    """
    if path.suffix not in EXPORT_SUFFIXES:
        raise UsageError(
            f"expected a file name that ends in one of {', '.join(EXPORT_SUFFIXES)}, "
            f"got {path.name}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        write_atomically(path, lambda temporary: pq.write_table(table, temporary))
    elif path.suffix == ".csv":
        flat = _lists_as_columns(table)
        write_atomically(path, lambda temporary: pyarrow.csv.write_csv(flat, temporary))
    else:
        write_atomically(path, lambda temporary: _write_json_lines(table, temporary))
    return path


def _lists_as_columns(table: pa.Table) -> pa.Table:
    """The table with each list as one column an element: `top_ids_1`, `top_ids_2` and so on."""
    for field in table.schema:
        if pa.types.is_fixed_size_list(field.type):
            column = table.column(field.name).combine_chunks()
            size = field.type.list_size
            table = table.drop_columns([field.name])
            for k in range(size):
                element = pa.compute.list_element(column, k)
                table = table.append_column(f"{field.name}_{k + 1}", element)
    return table


def _write_json_lines(table: pa.Table, path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        for batch in table.to_batches(max_chunksize=65536):
            for row in batch.to_pylist():
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
