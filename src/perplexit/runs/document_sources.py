"""Where the documents of a run came from: source file, row and kept columns."""

import pyarrow as pa

from perplexit.errors import RunError
from perplexit.runs.run import Run
from perplexit.untrusted_files import Expected, stated
from perplexit.untrusted_tensors import read_parquet

DOCUMENTS_FILE = "documents.parquet"
_EXPECTED = Expected("the documents of a run", RunError, "evaluate again")
_SOURCES = ["source_file", "source_row"]


def sources_of(run: Run) -> pa.Table | None:
    """Return `document`, `source_file`, `source_row` and the kept columns; None if not recorded.

    Runs of older versions have none. Raises RunError for a file that is damaged.
    """
    path = None if run.folder is None else run.folder / DOCUMENTS_FILE
    if path is None or not path.exists():
        return None
    table = read_parquet(path, _EXPECTED)
    with stated(path, _EXPECTED):
        numbers = table.column("document").to_pylist()
        known = set(_SOURCES) <= set(table.column_names)
        if not known or numbers != list(range(run.num_documents)):
            _EXPECTED.refuse(path, "other documents than the run has")
        return table


def with_sources(table: pa.Table, run: Run) -> pa.Table:
    """Return a table with the columns of `sources_of` inserted behind its column `document`."""
    sources = sources_of(run)
    if sources is None:
        return table
    with stated(str(run.folder), _EXPECTED):
        rows = sources.take(table.column("document"))
    place = table.column_names.index("document")
    for name in rows.column_names[1:]:
        place += 1
        table = table.add_column(place, name, rows.column(name))
    return table
