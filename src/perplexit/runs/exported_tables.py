"""Tables written for other tools: CSV, JSON lines or Parquet, by the file's name."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute
import pyarrow.csv
import pyarrow.parquet as pq

from perplexit.errors import UsageError
from perplexit.protected_outputs import Kind, OutputFile, paths_among

EXPORT_SUFFIXES = (".csv", ".parquet", ".jsonl")
_LONGEST_ROW = 1 << 20  # bytes of a first row


def export_file(
    path: str | Path, columns: Sequence[str], *, inputs: Sequence[object] = (), force: bool = False
) -> OutputFile:
    """The file that a table is to be exported to, with these columns at the least.

    Raises UsageError for another suffix than those of `EXPORT_SUFFIXES`, OutputError where the
    file holds something else than such a table, or is one of `inputs`.
    """
    path = Path(path)
    if path.suffix not in EXPORT_SUFFIXES:
        raise UsageError(
            f"expected a file name that ends in one of {', '.join(EXPORT_SUFFIXES)}, "
            f"got {path.name}"
        )
    kind = Kind("an exported table", lambda found: set(columns) <= _columns_of(found))
    return OutputFile(path, kind, paths_among(*inputs), force)


def write_table(table: pa.Table, file: OutputFile) -> Path:
    """Write `table` in the format that the file's name ends in, whole or not at all."""
    if file.path.suffix == ".parquet":
        return file.write(lambda temporary: pq.write_table(table, temporary))
    if file.path.suffix == ".csv":
        flat = _lists_as_columns(table)
        return file.write(lambda temporary: pyarrow.csv.write_csv(flat, temporary))
    return file.write(lambda temporary: _write_json_lines(table, temporary))


def _columns_of(path: Path) -> set[str]:
    """The names of the columns of an exported table; none for another file."""
    try:
        if path.suffix == ".parquet":
            return set(pq.read_schema(path).names)
        with path.open("rb") as file:
            first = file.readline(_LONGEST_ROW).decode("utf-8")
        if path.suffix == ".csv":
            return set(next(csv.reader([first]), []))
        row = json.loads(first)
        return set(row) if isinstance(row, dict) else set()
    except (pa.ArrowException, ValueError, OSError, RecursionError, csv.Error):
        return set()


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
