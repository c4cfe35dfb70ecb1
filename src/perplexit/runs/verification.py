"""Stored runs checked against themselves, and written out for other tools."""

import math
from pathlib import Path
from typing import Any

import pyarrow as pa

from perplexit.errors import PerplexitError
from perplexit.metrics.intervals import MIN_CLUSTERS
from perplexit.runs.documents import DOCUMENTS_FILE, with_sources
from perplexit.runs.exported_tables import export_file, write_table
from perplexit.runs.run import RUN_FILE, TOKENS_FILE, Run
from perplexit.runs.run_figures import figures_of
from perplexit.runs.run_tokens import read_token_table

_EXPORTED = ("document", "window", "position", "token_id", "nll", "text")  # what tells an export


def verify_run(folder: str | Path) -> list[str]:
    """What is wrong with a stored run, one sentence each; empty where it is sound.

    The token table must be the one that was recorded (SHA-256), and every figure in `run.json`
    must follow from it: all are computed again, without a model.
    Raises RunError where there is no run to check.
    """
    run = Run.open(folder)
    if run.status != "complete":
        return [f"the run is {run.status}; go on with `perplexit eval` and the same --run"]
    damage = run.damage()
    if damage is not None:
        return [f"{damage}; evaluate again with the same --run"]
    if run.measurement_fingerprint != run.identified().measurement_fingerprint:
        return ["measurement_fingerprint is not that of the conditions that are recorded"]
    try:
        figures = figures_of(
            run.tokens,
            confidence=run.confidence,
            on_non_finite=run.on_non_finite,
            spec=run.input_spec,
        )
    except PerplexitError as error:
        return [str(error)]
    recorded = run.to_json()
    computed = Run.from_json(recorded | figures).to_json()
    if run.schema_version == 1:
        recorded = _as_now(recorded, computed)
    return list(_differences(recorded, computed))


def _as_now(recorded: dict[str, Any], computed: dict[str, Any]) -> dict[str, Any]:
    """A record of version 1 with what it lacks, or measured in another way, as it is now.

    Version 1 scaled the interval of bits per byte from that of the loss, gave two and three
    clusters an interval, and domains and the other figures none.
    """
    new = {name for name in recorded if name.endswith(("_low", "_high"))} | {"reasons"}
    if recorded["interval_method"] is not None and recorded["num_clusters"] >= MIN_CLUSTERS:
        new -= {"perplexity_low", "perplexity_high"}
    domains = [
        now | then for now, then in zip(computed["domains"], recorded["domains"], strict=False)
    ]
    if len(domains) != len(recorded["domains"]):
        domains = recorded["domains"]
    return recorded | {name: computed[name] for name in new} | {"domains": domains}


def _differences(recorded: dict[str, Any], computed: dict[str, Any]) -> list[str]:
    return [
        f"{name}: recorded {recorded[name]!r}, but the tokens give {computed[name]!r}"
        for name in recorded
        if not _same(recorded[name], computed[name])
    ]


def _same(a: Any, b: Any) -> bool:
    """Equal, floats to the last few bits (another platform's exp may differ there)."""
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-12, abs_tol=1e-300)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


def export_tokens(folder: str | Path, path: str | Path, *, force: bool = False) -> Path:
    """Write a run's token table as CSV, JSON lines or Parquet, by the suffix of `path`.

    The document's source file, row and kept columns are added, where the run recorded them, and
    `text`: the token's bytes as text, with U+FFFD for those that are no whole character.
    `force`: another export at `path` is replaced. Raises UsageError for another suffix, OutputError
    where `path` holds something else, RunError where the run is not complete.
    """
    own = [Path(folder) / name for name in (RUN_FILE, TOKENS_FILE, DOCUMENTS_FILE)]
    file = export_file(path, _EXPORTED, inputs=own, force=force)
    run = Run.open(folder)
    table = _with_text(read_token_table(run.whole_tokens_file()))
    return write_table(with_sources(table, run), file)


def _with_text(table: pa.Table) -> pa.Table:
    """The table with `text` for `token_bytes` and plain strings for the domain."""
    raw = table.column("token_bytes").to_pylist()
    text = [None if b is None else b.decode("utf-8", errors="replace") for b in raw]
    place = table.column_names.index("token_bytes")
    table = table.set_column(place, "text", pa.array(text, pa.string()))
    domain = table.column("domain").cast(pa.string())
    return table.set_column(table.column_names.index("domain"), "domain", domain)
