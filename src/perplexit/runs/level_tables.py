"""A run as a table of tokens, words, windows or documents: for exports and for pandas.

Shape suffixes: R = rows (scored tokens), G = groups (windows or documents).
"""

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from perplexit.errors import RunError, UsageError, needing
from perplexit.inputs.token_file import TokenFile
from perplexit.metrics.likelihood import exp_or_inf
from perplexit.protected_outputs import Kind, OutputFile, paths_among
from perplexit.runs.run import RUN_FILE, TOKENS_FILE, Run
from perplexit.runs.words import COLUMNS, surprisal_of_words
from perplexit.untrusted_files import Expected, stated
from perplexit.untrusted_tensors import read_parquet

EXPORT_SUFFIXES = (".csv", ".parquet", ".jsonl")
_LONGEST_ROW = 1 << 20  # bytes of a first row


def export_file(
    path: str | Path, columns: Sequence[str], *, inputs: Sequence[object] = (), force: bool = False
) -> OutputFile:
    """Return the file that a table is to be exported to, with these columns at the least.

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
    """Return the names of the columns of an exported table; none for another file."""
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
    """Return the table with one column per list element: `top_ids_1`, `top_ids_2` and so on."""
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


Level = Literal["token", "word", "window", "document"]
_FIGURES = ("num_tokens", "nll_sum", "perplexity", "bits_per_byte")
# The columns that tell an exported table from another file.
_TOLD_BY: dict[str, tuple[str, ...]] = {
    "token": ("document", "window", "position", "token_id", "nll", "text"),
    "word": tuple(COLUMNS),
    "window": ("window", "document", *_FIGURES),
    "document": ("document", *_FIGURES),
}


def level_table(run: Run, level: Level, *, tokens: TokenFile | None = None) -> pa.Table:
    """Return one row per token, word, window or document of a complete run.

    Each row has the document's source file, source row and kept columns, where they were recorded.
    token:    the columns of `tokens.parquet`, with `text` in place of the token's bytes.
    word:     see `surprisal_of_words`, which `tokens` is for: the run's input.
    window, document: those with a scored token. `num_tokens` are scored tokens with a finite loss,
        `nll_sum` is in nats, `perplexity` is exp(nll_sum / num_tokens), `bits_per_byte` is null
        where no byte was scored. A token that several windows scored counts in each of them, as in
        the run's own figures.
    Raises UsageError for another level, RunError where the run is not complete.
    """
    if level not in _TOLD_BY:
        raise UsageError(f"expected the level {', '.join(_TOLD_BY)}; got {level!r:.40}")
    if run.status != "complete":
        where = f" in {run.folder}" if run.folder else ""
        raise RunError(f"expected a complete run, got one that is {run.status}{where}")
    if level == "word":
        table = surprisal_of_words(run, tokens)
    elif level == "token":
        table = _token_table(run)
    else:
        table = _group_table(run, level)
    return with_sources(table, run)


def level_frame(run: Run, level: Level, *, tokens: TokenFile | None = None) -> Any:
    """Return `level_table` as a pandas DataFrame.

    Raises MissingPackageError where pandas is not installed.
    """
    table = level_table(run, level, tokens=tokens)
    with needing("a DataFrame", "pip install pandas", "pandas"):
        return table.to_pandas()


def export_level(
    run: Run | str | Path,
    path: str | Path,
    level: Level,
    *,
    tokens: TokenFile | str | Path | None = None,
    force: bool = False,
) -> Path:
    """Write `level_table` as CSV, JSON lines or Parquet, by the suffix of `path`.

    force: another export at `path` is replaced. Raises UsageError for another suffix, OutputError
    where `path` holds something else, and what `level_table` raises.
    """
    folder = run.folder if isinstance(run, Run) else Path(run)
    own = [] if folder is None else [folder / n for n in (RUN_FILE, TOKENS_FILE, DOCUMENTS_FILE)]
    file = export_file(path, _TOLD_BY[level], inputs=[*own, tokens], force=force)
    opened = run if isinstance(run, Run) else Run.open(run)
    if tokens is not None and not isinstance(tokens, TokenFile):
        tokens = TokenFile.open(tokens)
    return write_table(level_table(opened, level, tokens=tokens), file)


def export_tokens(run: Run | str | Path, path: str | Path, *, force: bool = False) -> Path:
    """Write one row per scored token; see `export_level`."""
    return export_level(run, path, "token", force=force)


def export_documents(run: Run | str | Path, path: str | Path, *, force: bool = False) -> Path:
    """Write one row per document with its figures; see `export_level`."""
    return export_level(run, path, "document", force=force)


def export_words(
    run: Run | str | Path,
    path: str | Path,
    *,
    tokens: TokenFile | str | Path | None = None,
    force: bool = False,
) -> Path:
    """Write one row per word with its surprisal; see `export_level` and `surprisal_of_words`."""
    return export_level(run, path, "word", tokens=tokens, force=force)


def _token_table(run: Run) -> pa.Table:
    """Return the token table with `text` for `token_bytes` and plain strings for the domain."""
    table = run.tokens.table()
    raw = table.column("token_bytes").to_pylist()
    text = [None if b is None else b.decode("utf-8", errors="replace") for b in raw]
    place = table.column_names.index("token_bytes")
    table = table.set_column(place, "text", pa.array(text, pa.string()))
    domain = table.column("domain").cast(pa.string())
    return table.set_column(table.column_names.index("domain"), "domain", domain)


def _group_table(run: Run, level: str) -> pa.Table:
    """Return the figures of each window or document with a scored token."""
    tokens = run.tokens
    group_R: NDArray[np.int32] = getattr(tokens, level)
    finite_R = np.isfinite(tokens.nll)
    group_G, first_G = np.unique(group_R, return_index=True)
    of_R = np.searchsorted(group_G, group_R[finite_R])

    def summed(column: NDArray[Any]) -> NDArray[Any]:
        values_R = column[finite_R].astype(np.float64)
        return np.bincount(of_R, values_R, minlength=len(group_G))

    num_tokens_G = np.bincount(of_R, minlength=len(group_G))
    kept = np.flatnonzero(num_tokens_G)
    count_K, nll_K = num_tokens_G[kept], summed(tokens.nll)[kept]
    bytes_K, words_K = summed(tokens.num_bytes)[kept], summed(tokens.num_words)[kept]
    names = [*tokens.domains, None]
    first_K = first_G[kept]
    columns = {level: pa.array(group_G[kept].astype(np.int32))}
    if level != "document":
        columns["document"] = pa.array(tokens.document[first_K])
    domains = [names[code] for code in tokens.domain[first_K].tolist()]
    figures = {
        "domain": pa.array(domains, pa.string()),
        "num_tokens": pa.array(count_K),
        "num_bytes": pa.array(bytes_K.astype(np.int64)),
        "num_words": pa.array(words_K.astype(np.int64)),
        "nll_sum": pa.array(nll_K),
        "perplexity": pa.array([exp_or_inf(float(rate)) for rate in nll_K / count_K]),
        "bits_per_byte": pa.array(nll_K / math.log(2) / np.maximum(bytes_K, 1), mask=bytes_K == 0),
    }
    return pa.table(columns | figures)
