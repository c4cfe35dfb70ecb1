"""Documents of a run: where they came from, beside tokens or with figures of their own.

Shape suffixes: R = rows (scored tokens), D = documents.
"""

import math
from pathlib import Path

import numpy as np
import pyarrow as pa

from perplexit.errors import RunError
from perplexit.metrics.likelihood import exp_or_inf
from perplexit.runs.exported_tables import export_file, write_table
from perplexit.runs.run import RUN_FILE, TOKENS_FILE, Run
from perplexit.untrusted_files import Expected, stated
from perplexit.untrusted_tensors import read_parquet

DOCUMENTS_FILE = "documents.parquet"
_EXPECTED = Expected("the documents of a run", RunError, "evaluate again")
_SOURCES = ["source_file", "source_row"]


def sources_of(run: Run) -> pa.Table | None:
    """`document`, `source_file`, `source_row` and the kept columns; None where not recorded.

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
    """A table that has a column `document`, with the columns of `sources_of` behind that one."""
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


def document_table(run: Run) -> pa.Table:
    """One row for each document with a scored token: where it came from, and its figures.

    `num_tokens` are scored tokens with a finite loss, `nll_sum` is in nats, `perplexity` is
    exp(nll_sum / num_tokens), `bits_per_byte` is null where no byte was scored. A token that
    several windows scored counts in each of them, as in the run's own figures.
    """
    tokens = run.tokens
    finite_R = np.isfinite(tokens.nll)
    document_R = tokens.document[finite_R]
    length = run.num_documents

    def summed(values: np.ndarray) -> np.ndarray:
        return np.bincount(document_R, values[finite_R].astype(np.float64), minlength=length)

    num_tokens_D = np.bincount(document_R, minlength=length)
    nll_D, bytes_D, words_D = map(summed, (tokens.nll, tokens.num_bytes, tokens.num_words))
    scored = np.flatnonzero(num_tokens_D)
    domain_D = np.full(length, -1)
    domain_D[tokens.document] = tokens.domain
    rate_D = nll_D[scored] / num_tokens_D[scored]
    bits = [
        float(n / math.log(2) / b) if b else None
        for n, b in zip(nll_D[scored], bytes_D[scored], strict=True)
    ]
    names = [*tokens.domains, None]
    table = pa.table(
        {
            "document": pa.array(scored.astype(np.int32)),
            "domain": pa.array([names[code] for code in domain_D[scored].tolist()], pa.string()),
            "num_tokens": pa.array(num_tokens_D[scored]),
            "num_bytes": pa.array(bytes_D[scored].astype(np.int64)),
            "num_words": pa.array(words_D[scored].astype(np.int64)),
            "nll_sum": pa.array(nll_D[scored]),
            "perplexity": pa.array([exp_or_inf(float(rate)) for rate in rate_D]),
            "bits_per_byte": pa.array(bits, pa.float64()),
        }
    )
    return with_sources(table, run)


def export_documents(folder: str | Path, path: str | Path, *, force: bool = False) -> Path:
    """Write a run's documents as CSV, JSON lines or Parquet, by the suffix of `path`.

    `force`: another export at `path` is replaced. Raises UsageError for another suffix, OutputError
    where `path` holds something else, RunError where the run is not complete.
    """
    own = [Path(folder) / name for name in (RUN_FILE, TOKENS_FILE, DOCUMENTS_FILE)]
    told_by = ("document", "num_tokens", "nll_sum", "perplexity", "bits_per_byte")
    file = export_file(path, told_by, inputs=own, force=force)
    run = Run.open(folder)
    if run.status != "complete":
        raise RunError(f"expected a complete run, got one that is {run.status} in {folder}")
    return write_table(document_table(run), file)
